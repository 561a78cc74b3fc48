package http1

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/exchange"
)

// earlyBytes is the most that is kept of what a client sends before its upgrade is
// answered. Behind an ordinary request, one small buffer of pipelined bytes is.
const earlyBytes = largeBuffer

// interimTime is how long a client may take to make room for a 1xx head. The limits
// of handlers are on what comes behind it.
const interimTime = 10 * time.Second

var (
	errResponded    = errors.New("the response head was sent already")
	errNotResponded = errors.New("no response head was sent yet")
	errNotUpgrade   = errors.New("the request asked for no upgrade, or had a body")
	errStopped      = errors.New("the rest of the request body was given up")
)

// serverExchange implements [exchange.Exchange] on a serverConn.
type serverExchange struct {
	c    *serverConn
	ctx  context.Context
	head requestHead

	// What the request said, which the handler may have changed since.
	method  string
	minor   int
	upgrade bool

	mustClose atomic.Bool // nothing may follow this exchange
	wantsGoOn atomic.Bool // the client waits for a 100 that was not sent

	body     bodyReader // owned by the goroutine that reads
	bodyRead bool       // guarded by c.mu: the body was read to its end
	stopped  bool       // guarded by c.mu: nobody wants the rest of it

	mu    sync.Mutex // orders what is sent; held while it is sent
	out   bodyWriter
	state responseState
	close bool // "Connection: close" was said
}

// A responseState is how far the response is.
type responseState uint8

const (
	awaitingResponse responseState = iota
	sendingResponse                // the final head is written or held back
	responseFinished
	responseSwitched
)

func (c *serverConn) newExchange(head requestHead) *serverExchange {
	ctx, cancel := context.WithCancelCause(context.Background())
	c.mu.Lock()
	c.cancel = cancel
	if c.closed {
		cancel(net.ErrClosed)
	}
	c.mu.Unlock()
	e := &serverExchange{
		c: c, ctx: ctx, head: head,
		method: head.Method, minor: head.Minor, upgrade: head.Upgrade != "" && !head.UpgradeBody,
		body: bodyReader{in: c.in, dec: decoderFor(head.ContentLength), limit: c.server.options.Limits.BodySize},
		out:  bodyWriter{conn: c.conn, buffers: &c.server.buffers, counted: c.server.options.Metrics.traffic.Sent},
	}
	e.body.arm = e.armRead
	e.bodyRead = e.body.dec.done()
	// Behind an upgrade request stand bytes of the new protocol or of the old one,
	// as the answer may be: after a refusal nobody can tell which.
	e.mustClose.Store(head.close || head.Upgrade != "")
	e.wantsGoOn.Store(head.expect)
	return e
}

// serveExchange runs the handler.
func (c *serverConn) serveExchange(e *serverExchange) {
	c.server.requests.Add(1)
	defer c.server.requests.Add(-1)
	defer c.contain("handler") // here already, so that the exchange is settled after it
	if e.bodyRead {
		c.startWatch(e.watchLimit())
	}
	c.server.options.Handler.Serve(e)
}

func (e *serverExchange) watchLimit() int {
	if e.upgrade {
		return earlyBytes
	}
	return smallBuffer
}

// end settles the connection after the handler has returned and says whether it
// can carry another request.
func (e *serverExchange) end() bool {
	c := e.c
	c.stopWatch()
	c.mu.Lock()
	cancel := c.cancel
	c.cancel = nil
	gone := c.closed || c.switched
	c.mu.Unlock()
	cancel(errServed)
	switch {
	case gone:
		return false
	case e.state != responseFinished:
		e.cut()
		return false
	case e.close:
		if !e.head.close || !e.body.dec.done() || len(c.in.buffered()) > 0 {
			c.linger()
		}
		return false
	case !e.skipBody():
		c.linger()
		return false
	}
	return true
}

// cut ends the connection within a response. Where only the end of the connection
// would tell the end of the body, it is ended by a reset: a proper end would look
// like success.
func (e *serverExchange) cut() {
	if tcp, ok := e.c.conn.(*net.TCPConn); ok && e.out.kind == untilClose {
		tcp.SetLinger(0)
	}
	if e.out.failed {
		e.c.abort(errClientGone)
	}
	e.c.abort(errAborted)
}

// skipBody reads what the handler left of the request body, within bounds.
func (e *serverExchange) skipBody() bool {
	if e.body.dec.done() {
		return true
	}
	if e.mustClose.Load() || e.body.err != nil || e.body.dec.kind == byLength && e.body.dec.left > leftoverBytes {
		return false
	}
	e.body.arm = nil
	e.body.limit = e.body.total + leftoverBytes
	e.c.conn.SetReadDeadline(time.Now().Add(leftoverTime))
	defer e.c.conn.SetReadDeadline(time.Time{})
	buf := e.c.server.buffers.get(smallBuffer)
	defer e.c.server.buffers.put(buf)
	for {
		if _, err := e.body.read(buf); err != nil {
			return err == io.EOF
		}
	}
}

func (e *serverExchange) Request() *exchange.Request       { return e.head.Request }
func (e *serverExchange) Downstream() *exchange.Downstream { return &e.c.downstream }
func (e *serverExchange) Context() context.Context         { return e.ctx }
func (e *serverExchange) Trailers() exchange.Fields        { return e.body.dec.trailers }
func (e *serverExchange) Abort()                           { e.c.abort(errAborted) }

// gone returns why the exchange is over, or nil.
func (e *serverExchange) gone() error {
	if e.ctx.Err() != nil {
		return context.Cause(e.ctx)
	}
	return nil
}

// Read implements [exchange.Exchange]. Its errors are *exchange.StatusError (400,
// 408, 413) or mean that the client has gone.
func (e *serverExchange) Read(p []byte) (int, error) {
	if err := e.gone(); err != nil {
		return 0, err
	}
	switch {
	case e.body.err != nil:
		return 0, e.body.err
	case e.body.dec.done():
		return 0, io.EOF // the connection is the watch's now
	}
	if err := e.goOn(); err != nil {
		return 0, err
	}
	n, err := e.body.read(p)
	switch {
	case e.body.dec.done() && (err == nil || err == io.EOF):
		e.bodyEnded()
	case err == nil:
	case e.gaveUpBody():
		err = errStopped
		e.body.err = err
	default:
		e.mustClose.Store(true)
		switch exchange.StatusOf(err, 0) {
		case 0:
			e.c.abort(errClientGone)
		case 400:
			e.c.server.options.Metrics.errors.Inc()
		}
	}
	return n, err
}

// armRead sets the deadline of a read of the body.
func (e *serverExchange) armRead() error {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if e.stopped {
		return errStopped
	}
	if d := e.c.server.options.Limits.BodyTimeout; d > 0 {
		e.c.conn.SetReadDeadline(time.Now().Add(d))
	}
	return nil
}

// bodyEnded goes over from reading the body to watching the client.
func (e *serverExchange) bodyEnded() {
	e.c.mu.Lock()
	watch := !e.bodyRead && !e.stopped
	e.bodyRead = true
	if watch {
		e.c.conn.SetReadDeadline(time.Time{})
	}
	e.c.mu.Unlock()
	if watch {
		e.c.startWatch(e.watchLimit())
	}
}

func (e *serverExchange) gaveUpBody() bool {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	return e.stopped
}

// StopReading implements [exchange.Exchange]. Of a body that was read to its end
// nothing is given up, so that nothing changes then.
func (e *serverExchange) StopReading() {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if e.bodyRead || e.stopped || e.c.closed || e.c.switched {
		return
	}
	e.stopped = true
	e.mustClose.Store(true)
	e.c.conn.SetReadDeadline(longAgo)
}

// goOn sends "100 Continue" if the client waits for it, unless it has begun to
// send the body anyway (RFC 9110 §10.1.1).
func (e *serverExchange) goOn() error {
	if !e.wantsGoOn.Load() {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.wantsGoOn.Swap(false) || len(e.c.in.buffered()) > 0 {
		return nil
	}
	return e.sendInterim([]byte("HTTP/1.1 100 Continue\r\n\r\n"))
}

// sendInterim sends a 1xx head. A client that does not take it within interimTime is
// gone: it has filled its connection with answers that it does not read. Called with
// e.mu held.
func (e *serverExchange) sendInterim(head []byte) error {
	e.c.conn.SetWriteDeadline(time.Now().Add(interimTime))
	defer e.c.conn.SetWriteDeadline(time.Time{})
	err := e.out.send(head)
	if err != nil {
		e.c.abort(errClientGone)
	}
	return err
}

// Inform implements [exchange.Exchange]. HTTP/1.0 has no interim responses
// (RFC 9110 §15.2).
func (e *serverExchange) Inform(r *exchange.Response) error {
	if err := e.gone(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.state != awaitingResponse:
		return errResponded
	case r.Status < 100 || r.Status > 199 || r.Status == 101:
		return fmt.Errorf("interim response with the status %d", r.Status)
	case e.minor == 0:
		return nil
	}
	if r.Status == 100 {
		e.wantsGoOn.Store(false)
	}
	b, err := appendResponse(e.out.take(), r, responseFraming{})
	if err != nil {
		return err
	}
	defer e.c.server.buffers.put(b)
	return e.sendInterim(b)
}

// Respond implements [exchange.Exchange]. The head is held back until there is
// something to send with it, or Flush or Finish.
func (e *serverExchange) Respond(r *exchange.Response) error {
	if err := e.gone(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.state != awaitingResponse:
		return errResponded
	case r.Status < 200:
		return fmt.Errorf("final response with the status %d", r.Status)
	}
	f := e.frame(r)
	b, err := appendResponse(e.out.take(), r, f)
	if err != nil {
		return err
	}
	e.out.held = b
	e.out.kind, e.out.left = f.body, r.ContentLength
	e.out.discard = e.method == "HEAD"
	e.close = f.close
	e.state = sendingResponse
	return nil
}

// frame decides how the response's body ends, and whether the connection does.
func (e *serverExchange) frame(r *exchange.Response) responseFraming {
	// A client that waits for a 100 and gets this response instead may send its
	// body or not: what follows could be either (RFC 9110 §10.1.1).
	waits := e.wantsGoOn.Swap(false)
	_, draining := e.c.server.draining()
	if draining && !r.Close && !waits && !e.mustClose.Load() {
		e.c.server.options.Metrics.drained.Inc()
	}
	f := responseFraming{date: time.Now(), close: r.Close || draining || waits || e.mustClose.Load()}
	if f.close {
		e.mustClose.Store(true)
	}
	switch {
	case r.Status == 204:
	case r.Status == 304:
		f.length = r.ContentLength > 0
	case e.method == "HEAD":
		f.length = r.ContentLength >= 0
	case r.ContentLength >= 0:
		f.body, f.length = byLength, true
	case e.minor == 0:
		f.body = untilClose // implies close: HTTP/1.0 is always the last one
	default:
		f.body = byChunks
	}
	return f
}

// Write implements [exchange.Exchange].
func (e *serverExchange) Write(p []byte) (int, error) {
	if err := e.gone(); err != nil {
		return 0, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state != sendingResponse {
		return 0, errNotResponded
	}
	return e.out.write(p)
}

// Flush implements [exchange.Exchange].
func (e *serverExchange) Flush() error {
	if err := e.gone(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.flush()
}

// Finish implements [exchange.Exchange]. It succeeds if everything was sent before
// the client left: many leave as soon as they have the last byte.
func (e *serverExchange) Finish(trailers exchange.Fields) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state != sendingResponse {
		return cmp.Or(e.gone(), errNotResponded)
	}
	if err := e.gone(); err != nil && !e.out.complete() {
		return err
	}
	if err := e.out.finish(trailers); err != nil {
		return err
	}
	e.state = responseFinished
	return nil
}

// Switch implements [exchange.Exchange]. It fails for a request that did not ask
// for an upgrade or has a body, and for a client that has gone.
func (e *serverExchange) Switch(r *exchange.Response) (conn net.Conn, head, early []byte, err error) {
	if head, early, err = e.switchTo(r); err != nil {
		e.Abort()
		return nil, nil, nil, err
	}
	return e.c.conn, head, early, nil
}

func (e *serverExchange) switchTo(r *exchange.Response) (head, early []byte, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case !e.upgrade:
		return nil, nil, errNotUpgrade
	case e.state != awaitingResponse:
		return nil, nil, errResponded
	case r.Status != 101:
		return nil, nil, fmt.Errorf("switch with the status %d", r.Status)
	}
	e.c.stopWatch()
	if err := e.gone(); err != nil {
		return nil, nil, err
	}
	b, err := appendResponse(e.out.take(), r, responseFraming{})
	if err != nil {
		return nil, nil, err
	}
	defer e.c.server.buffers.put(b)
	early = append([]byte(nil), e.c.in.buffered()...)
	if err := e.c.giveUp(); err != nil {
		return nil, nil, err
	}
	e.c.in.consume(len(early))
	e.out.counted.Add(uint64(len(b))) // whoever has the connection sends it
	e.state = responseSwitched
	return append([]byte(nil), b...), early, nil
}

// giveUp ends our part in the connection, unless it was closed before.
func (c *serverConn) giveUp() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.switched = true
	c.conn.SetDeadline(time.Time{})
	c.server.remove(c)
	return nil
}
