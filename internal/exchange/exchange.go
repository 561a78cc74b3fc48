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
//
// # Where it runs
//
// An exchange lives on one loop, with its connection and the upstream's. What may wait takes
// a [task.Task], and nothing else waits; whoever is called back does not. There are no locks,
// and after a wait nothing is as it was for certain.
//
// # What may be kept
//
// Nothing, without a copy. Bytes that a Read returns are good until the task waits. Strings of
// a request are parts of memory that the exchange has until its handler returns, those of a
// response until the next Receive or Close; so are those that [Texts] makes.
package exchange

import (
	"errors"
	"net/netip"

	"holdfast/internal/stream"
	"holdfast/internal/task"
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

	// Texts is memory for what is made for this request, as fields that are added.
	Texts Texts

	// ContentLength is the length of the body in bytes: 0 for none, -1 for a
	// body whose length is known only at its end.
	ContentLength int64

	// Upgrade is the protocol that the client asks to change to, in lower case,
	// or "" for an ordinary request. It is "websocket" only for GET over
	// HTTP/1.1 with the Connection token "upgrade" and exactly the one Upgrade
	// token "websocket". Every other Upgrade is dropped by the codec, but for what is
	// in Offer.
	Upgrade string

	// Offer is another protocol that the client offers to change to, in lower case, or
	// "". It is there under the conditions of Upgrade, and the request is an ordinary
	// one: only who knows the protocol moves it to Upgrade, and then no body may be
	// there.
	Offer string

	// UpgradeBody says that an upgrade request announced a body, which none may.
	UpgradeBody bool

	// HeadTail are the bytes that belong to the handshake behind its head: the
	// 8 bytes of the draft-76 WebSocket handshake.
	HeadTail []byte

	// Trailers says that a Trailer field announced trailers.
	Trailers bool

	// TakesTrailers says that the client does something with trailers of the response
	// ("TE: trailers", RFC 9110 §10.1.4). The upstream is told so. It is not set with
	// Upgrade, of which the answer is no ordinary one.
	TakesTrailers bool
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
	Secure   *stream.Secure // its TLS; nil: there is none
}

// Exchange is one request as its downstream codec hands it to the [Handler].
//
// All of it is done on the goroutine of one loop, by tasks: what takes one may wait, and
// nothing else does. One task at a time reads the body, one at a time sends the response;
// they may be two. Everything but Finish fails once the exchange is over.
type Exchange interface {
	// Request returns the head. The handler owns it, until it returns.
	Request() *Request

	Downstream() *Downstream

	// Local is the address at which the client's connection was taken; zero for a unix
	// socket, and where the connection is gone. The kernel is asked each time.
	Local() netip.AddrPort

	// Loop is the loop that the exchange lives on.
	Loop() *stream.Loop

	// Over returns why nothing can be done any more: the client has gone (its connection
	// was reset, or closed, or half-closed while we owe it an answer: errClientGone or the
	// like), or the connection was closed from our side ([net.ErrClosed] when its server was
	// closed); nil while it is open.
	Over() error

	// OnOver has w told once when that happens, on the loop's goroutine, unless the handler
	// has returned by then. If it has happened already, it is told at once.
	OnOver(w Watcher)

	// Read returns the next bytes of the request body: io.EOF at its proper end, another
	// error if it was cut short, malformed or too slow. They are good until the task
	// waits. The first Read sends "100 Continue" to a client that waits for it.
	// [StatusError] says what to answer.
	Read(*task.Task) ([]byte, error)

	// StopReading gives up the rest of the request body: a Read that waits and
	// every later one fail at once. Only a body that was read to its end leaves
	// the connection fit for another request, so a response whose head was not
	// sent yet says Close. It may be called at any time, and without it a handler could
	// not end a Read that waits for a silent client.
	StopReading()

	// Trailers returns the request's trailers; valid after Read returned io.EOF.
	Trailers() Fields

	// Inform sends an interim response (1xx, except 101). It is dropped where
	// the client's protocol version has none.
	Inform(*task.Task, *Response) error

	// Respond sends the final head, exactly once. The codec holds it back until the
	// first Write, Flush or Finish, and keeps nothing of it.
	Respond(*Response) error

	// Write sends a part of the response body and waits while the client is
	// slower than we are. Bytes beyond ContentLength are an error. p is the caller's again
	// when the task waits.
	Write(t *task.Task, p []byte) error

	// Flush sends what is held back.
	Flush(*task.Task) error

	// Taken says of a client that is waited for whether it has taken so many bytes since the
	// last time that it had, as far as is known: it may take for long what it was sent before.
	Taken(least int) bool

	// Finish ends the response. Without it, or with fewer bytes than announced,
	// the connection is cut so that the client notices. It succeeds although
	// the client has gone if the whole response was sent before.
	Finish(*task.Task, Fields) error

	// Abort cuts the connection, so that calls that wait return and the exchange is over.
	// It may be called at any time. After Switch it does nothing.
	Abort()

	// Switch gives the connection of an upgrade request up: the caller owns its socket,
	// which does not block, is still on the loop and to be passed to another owner there (see
	// [stream.Passed]), and the bytes that were already read from it. head is the 101 made
	// from resp, which the caller is to send before anything else. All of it is in memory of
	// its own. An error means that the connection is closed.
	Switch(*Response) (c stream.Passed, head []byte, err error)
}

// A Watcher is told that an exchange is over, and why. It must not wait.
type Watcher interface{ ExchangeOver(error) }

// Handler answers one exchange. When it returns without having finished the
// response or switched, the codec cuts the connection. It must not keep the
// exchange, its request, nor any string of that.
type Handler interface {
	Serve(*task.Task, Exchange)
}

// Upstream is one request on its way to an endpoint, on a connection or stream
// of its own until Close.
//
// It belongs to the loop of its exchange. One task at a time sends (Send, Write, Finish),
// one at a time receives; they may be two. Close may be called at any time and has both
// fail.
type Upstream interface {
	// Send sends the head: fields as they are, framing by ContentLength,
	// "Connection: Upgrade" and the Upgrade field where Upgrade is set. The codec
	// may hold the head of a request with a body back until the first Write,
	// Finish or Receive.
	Send(*task.Task, *Request) error

	// Write sends a part of the body, in the framing that Send announced. p is the
	// caller's again when the task waits.
	Write(t *task.Task, p []byte) error

	// Finish ends the request. trailers are sent only with a body of unknown length.
	Finish(t *task.Task, trailers Fields) error

	// Receive returns the next response head. Interim ones come first, one by
	// one; a 101 ends the protocol (see Switch). The error wraps [ErrNoAnswer] where
	// the connection ended before the first byte of a response, and is
	// io.ErrUnexpectedEOF, for errors.Is, where it ended within one. The head is good until
	// the next Receive, or Close.
	Receive(*task.Task) (*Response, error)

	// Read returns the next bytes of the body of the final response: io.EOF at its proper
	// end, another error if it was cut short or malformed, which are told apart as by
	// Receive. They are good until the task waits.
	Read(*task.Task) ([]byte, error)

	// Ready says whether the next Read will not wait, so that what it returns can leave
	// together with the head.
	Ready() bool

	// Trailers returns the response's trailers; valid after Read returned io.EOF.
	Trailers() Fields

	// Switch gives the connection up after a 101: the caller owns its socket, which
	// does not block and is still on the loop, and the bytes that were already read from it,
	// as with that of an Exchange.
	Switch() (stream.Passed, error)

	// Reused says that the connection carried an earlier request, so that
	// [ErrNoAnswer] may only mean that the upstream closed an idle connection
	// (RFC 9110 §9.2.2, RFC 9112 §9.3.1).
	Reused() bool

	// Close ends the exchange. The connection is kept for another one only if
	// request and response are complete and the upstream agreed; otherwise it is
	// closed. Further calls do nothing.
	Close()
}

// A Source is an [Upstream] or [Exchange] of whose body the bytes can be taken from the
// connection itself, so that the kernel moves them to a [Sink] without a copy.
type Source interface {
	// Source returns the connection, and how many of the next bytes are nothing but the
	// body; 0: framing comes between, or nobody knows. Some may be buffered.
	Source() (from *stream.Conn, left int64)

	// Awaiting says that whoever takes bytes has to wait for them from now on.
	Awaiting()

	// Took says that n bytes were taken from there. With an error nobody may use them, and
	// no more is taken.
	Took(n int) error

	// Ended says that no more is taken there, and why if all could not be: io.EOF is the end
	// of the connection. The next Read tells what that means.
	Ended(error)
}

// A Sink is the same for what is sent.
type Sink interface {
	// Sink returns the connection, and how many of the next bytes are nothing but the body; 0:
	// something else comes between, as a head that is held back.
	Sink() (to *stream.Conn, left int64)

	// Gave says that n bytes were put in there.
	Gave(n int)

	// Failed says that the connection takes no more.
	Failed(error)
}

// ErrNoAnswer says that an upstream's connection ended, or could not be written
// to, before the first byte of a response came. Send and Receive of an [Upstream]
// wrap it. Whether the upstream has acted on the request is then unknown.
var ErrNoAnswer = errors.New("connection ended before the upstream answered")

// ErrRefused says that an upstream has done nothing with a request, for certain: it may be sent
// again whatever its method is. Where [ErrNoAnswer] is wrapped as well, the connection takes no
// more, and another one may; otherwise the upstream has refused it.
var ErrRefused = errors.New("the upstream has done nothing with the request")

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
