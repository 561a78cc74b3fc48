// Package exchange is one request and its response inside the proxy, whatever
// protocol carried them.
//
// The connection manager, the routes and the filters work on these types only.
// Codecs stand below: one that serves downstream connections implements
// [Exchange], one that speaks to an upstream implements [Upstream]. Neither side
// knows the other's protocol.
//
// Body bytes are never interpreted and never gathered: a Read hands out what has
// arrived, a Write sends before it returns.
package exchange

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
)

// Request is a request head. A codec hands it out complete and valid by RFC 9110
// and RFC 9112; whoever holds it may change it.
type Request struct {
	Method string

	// Scheme is "http" or "https": how the client reached us.
	Scheme string

	// Authority is the host, with a port where the client sent one. It is the
	// only statement about the host: no Host field stands in Fields.
	Authority string

	// Target is the origin-form target as received (path and query), or "*".
	Target string

	// Major and Minor are the protocol version of the connection that carried
	// the request.
	Major, Minor int

	// Fields hold neither Host nor framing (Content-Length, Transfer-Encoding,
	// Trailer), nor Connection and whatever it names, nor Upgrade and the other
	// fields that are meant for one hop (RFC 9110 §7.6.1).
	Fields Fields

	// ContentLength is the length of the body in bytes: 0 for none, -1 for a
	// body whose length is known only at its end.
	ContentLength int64

	// Upgrade is the protocol that the client asks to change to, in lower case,
	// or "" for an ordinary request. It is "websocket" only for GET over
	// HTTP/1.1 with the Connection token "upgrade" and exactly the one Upgrade
	// token "websocket". Every other Upgrade is dropped by the codec.
	Upgrade string

	// UpgradeBody says that an upgrade request announced a body, which none may.
	UpgradeBody bool

	// HeadTail are the bytes that belong to the handshake behind its head: the
	// 8 bytes of the draft-76 WebSocket handshake.
	HeadTail []byte

	// Trailers says that a Trailer field announced trailers.
	Trailers bool
}

// Response is a response head.
type Response struct {
	Status int

	// Reason may be empty; HTTP/1 then carries an empty reason phrase.
	Reason string

	// Fields hold no framing and nothing meant for one hop, as in [Request].
	Fields Fields

	// ContentLength is as in [Request]. For an answer to HEAD and for a 304 it
	// is what the upstream stated, or -1 where it stated nothing.
	ContentLength int64

	// Upgrade is, of a 101 only, the token that the upstream changes to, in
	// lower case, and only if Connection names it: "" marks an improper 101.
	Upgrade string

	// Close makes this response the last one of its connection: the codec adds
	// "Connection: close" where its protocol has that.
	Close bool
}

// Downstream is what is known about the connection that carried a request.
type Downstream struct {
	Listener string         // the listener's name in the configuration
	Remote   netip.AddrPort // zero for a unix socket
	Local    netip.AddrPort // zero for a unix socket
}

// Exchange is one request as its downstream codec hands it to the [Handler].
//
// One goroutine at a time reads the body, one at a time sends the response; the
// two may run concurrently. All methods fail once Context is done.
type Exchange interface {
	// Request returns the head. The handler owns it.
	Request() *Request

	Downstream() *Downstream

	// Context is done when the client has gone (its connection was reset, or
	// closed, or half-closed while we owe it an answer), when the connection is
	// closed from our side, and after the handler has returned.
	Context() context.Context

	// Read reads the request body: io.EOF at its proper end, another error if
	// it was cut short, malformed or too slow. The first Read sends "100
	// Continue" to a client that waits for it. [StatusError] says what to answer.
	io.Reader

	// StopReading gives up the rest of the request body: a Read that waits and
	// every later one fail at once. Only a body that was read to its end leaves
	// the connection fit for another request, so a response whose head was not
	// sent yet says Close. It may be called at any time, from any goroutine, and
	// without it a handler could not end a Read that waits for a silent client.
	StopReading()

	// Trailers returns the request's trailers; valid after Read returned io.EOF.
	Trailers() Fields

	// Inform sends an interim response (1xx, except 101). It is dropped where
	// the client's protocol version has none.
	Inform(*Response) error

	// Respond sends the final head, exactly once. The codec may hold it back
	// until the first Write, Flush or Finish.
	Respond(*Response) error

	// Write sends a part of the response body and blocks while the client is
	// slower than we are. Bytes beyond ContentLength are an error.
	io.Writer

	// Flush sends what is held back.
	Flush() error

	// Finish ends the response. Without it, or with fewer bytes than announced,
	// the connection is cut so that the client notices. It succeeds although
	// Context is done if the whole response was sent before.
	Finish(trailers Fields) error

	// Abort cuts the connection, so that blocked calls return and Context is done.
	// Any goroutine may call it at any time. After Switch it does nothing.
	Abort()

	// Switch gives the connection of an upgrade request up: the caller owns it and the
	// bytes that were already read from it. head is the 101 made from resp, which the
	// caller is to send before anything else. Nobody reads or writes the connection any
	// more when Switch returns. An error means that it is closed.
	Switch(*Response) (conn net.Conn, head, early []byte, err error)
}

// Handler answers one exchange. When it returns without having finished the
// response or switched, the codec cuts the connection. It must not keep the
// exchange.
type Handler interface {
	Serve(Exchange)
}

// Upstream is one request on its way to an endpoint, on a connection or stream
// of its own until Close.
//
// One goroutine at a time sends (Send, Write, Finish), one at a time receives;
// the two may run concurrently. Close may be called at any time and unblocks
// both.
type Upstream interface {
	// Send sends the head: fields as they are, framing by ContentLength,
	// "Connection: Upgrade" and the Upgrade field where Upgrade is set. The codec
	// may hold the head of a request with a body back until the first Write,
	// Finish or Receive.
	Send(*Request) error

	// Write sends a part of the body, in the framing that Send announced.
	io.Writer

	// Finish ends the request. trailers are sent only with a body of unknown length.
	Finish(trailers Fields) error

	// Receive returns the next response head. Interim ones come first, one by
	// one; a 101 ends the protocol (see Switch). The error wraps [ErrNoAnswer] where
	// the connection ended before the first byte of a response, and is
	// io.ErrUnexpectedEOF, for errors.Is, where it ended within one.
	Receive() (*Response, error)

	// Read reads the body of the final response: io.EOF at its proper end,
	// another error if it was cut short or malformed, which are told apart as by
	// Receive.
	io.Reader

	// Trailers returns the response's trailers; valid after Read returned io.EOF.
	Trailers() Fields

	// Switch gives the connection up after a 101: the caller owns it and the
	// bytes that were already read from it.
	Switch() (conn net.Conn, early []byte, err error)

	// Reused says that the connection carried an earlier request, so that
	// [ErrNoAnswer] may only mean that the upstream closed an idle connection
	// (RFC 9110 §9.2.2, RFC 9112 §9.3.1).
	Reused() bool

	// Close ends the exchange. The connection is kept for another one only if
	// request and response are complete and the upstream agreed; otherwise it is
	// closed. Further calls do nothing.
	Close() error
}

// ErrNoAnswer says that an upstream's connection ended, or could not be written
// to, before the first byte of a response came. Send and Receive of an [Upstream]
// wrap it. Whether the upstream has acted on the request is then unknown.
var ErrNoAnswer = errors.New("connection ended before the upstream answered")

// StatusError is an error of a codec that has a proper answer.
type StatusError struct {
	Status int    // 400, 408, 413, 431, …; 502 and 504 from an upstream codec
	Text   string // for the log, not for the client
}

func (e *StatusError) Error() string { return e.Text }

// StatusOf returns the status that answers err, or otherwise.
func StatusOf(err error, otherwise int) int {
	if s, ok := errors.AsType[*StatusError](err); ok {
		return s.Status
	}
	return otherwise
}
