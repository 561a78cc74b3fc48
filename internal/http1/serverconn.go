package http1

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// serverConn is one downstream connection. While it waits between requests it is parked:
// it is its own [stream.Owner], and there is nothing else. Once something comes, it has a
// task and an exchange until it is parked again.
type serverConn struct {
	stream.Conn
	on         *serverLoop
	prev, next *serverConn     // in on.conns
	exchange   *serverExchange // nil: parked
	remote     netip.AddrPort

	// Times are since the server's epoch.
	began     time.Duration
	idleSince time.Duration

	served     bool // a request was answered
	idle       bool // no byte of a request has come
	skipped    bool // but an empty line
	idleDrains bool // what ends the idle time is the drain, not the idle timeout
}

// Ready implements [stream.Owner].
func (c *serverConn) Ready(*stream.Conn) {
	switch {
	case c.exchange != nil:
		c.exchange.look()
	case c.HungUp() && !bytesIn(c.FD()): // the usual end needs no task
		c.abort(errClientGone)
	case c.Urgent() && c.Quiet(): // an urgent mark is nothing to be read
	case c.Secure() != nil: // what has come may be nobody's but TLS's own
		c.begin()
	default:
		c.start()
	}
}

// bytesIn says whether there are bytes to be read.
func bytesIn(fd int) bool {
	var b [1]byte
	for {
		n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return n > 0
		}
	}
}

// Expired implements [stream.Owner].
func (c *serverConn) Expired(*stream.Conn) {
	switch {
	case c.exchange != nil:
		// Something has come in the same turn. If it is no request, this is told once more.
		if c.idle {
			c.limitIdle()
		}
	case c.late():
		// A request is there that we were not told of yet. It was sent while the
		// connection was open, so it is served.
		c.start()
	default:
		c.endIdle()
	}
}

// late says whether something has come when the idle time is over. With TLS it must be a
// request: of what is none there may be more than enough to keep a connection for ever.
func (c *serverConn) late() bool {
	if c.Secure() == nil {
		return bytesIn(c.FD())
	}
	c.Look()
	return c.requested()
}

// begin begins with what somebody else has read, or TLS, or was told of. An end is told once,
// so a task looks at it now.
func (c *serverConn) begin() {
	if c.Secure() != nil {
		c.More()
	}
	if c.requested() || c.Readable() {
		c.start()
	}
}

// start has a task serve what has come.
func (c *serverConn) start() {
	c.exchange = c.on.take(c)
	c.on.loop.Tasks.Go(c)
}

// Run implements [task.Runner]. It returns when the connection is parked, or has ended.
func (c *serverConn) Run(t *task.Task) {
	defer c.settle()
	defer c.contain("the codec")
	for n := 1; c.awaitRequest(t) && c.serveRequest(t); n++ {
		if n%pipelined == 0 {
			t.Pause()
		}
	}
}

// settle ends what the task has begun.
func (c *serverConn) settle() {
	if !c.idle {
		c.abort(errServed)
	}
	e := c.exchange
	c.exchange = nil
	if !e.spoiled {
		c.on.put(e)
	}
	if c.Open() {
		c.offer()
	}
}

// awaitRequest waits for the first byte of a request. With false the connection is to be
// parked, or has ended.
func (c *serverConn) awaitRequest(t *task.Task) bool {
	goes := !c.idle && c.mayGo() // to be served elsewhere, also if its next request is there
	if !goes && c.requested() {
		c.idle, c.skipped = false, false
		return true
	}
	if !c.idle {
		c.idle, c.idleSince = true, c.on.now()
		c.limitIdle()
		if goes || c.still() {
			return false
		}
	}
	for {
		if c.requested() { // still has read it, or late
			c.idle, c.skipped = false, false
			return true
		}
		err := c.Fill(t)
		switch {
		case err == nil && c.requested():
			continue
		case err == nil && c.still():
			c.limitIdle() // it may have been lifted
			return false
		case err == nil:
			continue
		case !errors.Is(err, os.ErrDeadlineExceeded):
			c.abort(errClientGone)
			return false
		}
		c.Limit(time.Time{})
		if !c.late() { // see Expired
			c.endIdle()
			return false
		}
	}
}

// requested says whether a byte of a request is buffered. An empty line before it is none,
// and skipped: some clients send one behind a body (RFC 9112 §2.2). A second one is taken
// for a request, which is refused.
func (c *serverConn) requested() bool {
	if !c.skipped && bytes.HasPrefix(c.Buffered(), crlf) {
		c.Consume(len(crlf))
		c.skipped = true
	}
	b := c.Buffered()
	return len(b) > 1 || len(b) == 1 && (b[0] != '\r' || c.skipped)
}

// still says that nothing has come behind what is no request: the connection can wait for
// the next event without a task. With TLS it has to read for that, and may find a request.
func (c *serverConn) still() bool {
	return c.Quiet() || !c.requested() && len(c.Buffered()) > 0 && !c.Readable()
}

// limitIdle sets the time at which an idle connection is given up.
func (c *serverConn) limitIdle() {
	sl := c.on
	var deadline time.Time
	if d := sl.server.options.Limits.IdleTimeout; d > 0 {
		deadline = sl.server.epoch.Add(c.idleSince + d)
	}
	c.idleDrains = !sl.drain.IsZero() && (deadline.IsZero() || sl.drain.Before(deadline))
	if c.idleDrains {
		deadline = sl.drain
	}
	c.Limit(deadline)
}

// endIdle ends a connection on which no request came in time.
func (c *serverConn) endIdle() {
	if c.idleDrains {
		c.on.server.options.Metrics.drained.Inc()
	} else {
		c.on.server.options.Metrics.idleTimeouts.Inc()
	}
	c.abort(errServed)
}

// mayGo says whether somebody wants the connection when it is idle. One with TLS cannot go: what
// its keys are is known here only.
func (c *serverConn) mayGo() bool { return c.on.give != nil && c.Secure() == nil }

// offer gives a parked connection away, if somebody wants those. It returns false if nobody
// takes it.
func (c *serverConn) offer() bool {
	sl := c.on
	if !c.mayGo() || c.exchange != nil {
		return true
	}
	// It leaves the loop before, since its descriptor may be closed by the receiver.
	fd, early := c.Detach()
	i := Idle{FD: fd, Remote: c.remote, Early: early, Since: sl.server.epoch.Add(c.idleSince)}
	switch {
	case sl.give(sl.loop, i):
		sl.remove(c, givenAway)
		return true
	case !sl.adopt(c, &stream.Passed{FD: fd}):
		unix.Close(fd)
		sl.remove(c, endedByUs)
	default:
		c.Preload(early)
		c.begin()
	}
	return false
}

// serveRequest reads one request and has it answered. It says whether the
// connection goes on.
func (c *serverConn) serveRequest(t *task.Task) bool {
	e := c.exchange
	e.progress = progress{began: c.on.now()}
	defer e.release()
	limit := c.on.server.options.Limits.BodySize
	err := e.readHead(t)
	if err == errHTTP2 {
		c.giveOver()
		return false
	}
	if err == nil && limit > 0 && e.head.ContentLength > limit && e.head.Upgrade == "" {
		err = refusal(413, "a Content-Length beyond the limit")
	}
	if err != nil {
		e.refuse(t, err)
		return false
	}
	c.served = true
	e.begin()
	e.serve(t)
	return e.end(t)
}

// prefaceHead is the preface of HTTP/2 as far as it looks like a head (RFC 9113 §3.4).
var prefaceHead = []byte("PRI * HTTP/2.0\r\n\r\n")

// errHTTP2 says that a connection is for another codec.
var errHTTP2 = errors.New("the client speaks HTTP/2")

// speaksHTTP2 says of a whole head that it is the preface of HTTP/2, which is served.
func (c *serverConn) speaksHTTP2(head []byte) bool {
	return c.on.server.options.HTTP2 != nil && !c.served && c.Secure() == nil && bytes.Equal(head, prefaceHead)
}

// giveOver has the connection served as HTTP/2.
func (c *serverConn) giveOver() {
	p := c.PassOn()
	c.on.remove(c, givenOver)
	c.on.server.options.HTTP2(c.on.loop, p, c.remote)
}

// linger ends the sending side and reads until the client ends its own, within
// bounds.
func (c *serverConn) linger(t *task.Task) {
	if c.CloseWrite() != nil {
		return
	}
	c.Limit(c.on.loop.Now().Add(lingerTime))
	for total := 0; total < lingerBytes; {
		n := len(c.Buffered())
		total += n
		c.Consume(n)
		if c.Fill(t) != nil {
			return
		}
	}
}

// abort closes the connection and ends its exchange for the given reason. Later
// calls do nothing, nor does one after Switch; they return false.
func (c *serverConn) abort(reason error) bool {
	if !c.Open() {
		return false
	}
	end := endedByUs
	if reason == errClientGone {
		end = endedByClient
	}
	if e := c.exchange; e != nil && e.endsWithConnection() {
		// Only the end of the connection tells the end of this response: a proper one
		// would look like success.
		c.ResetOnClose()
	}
	c.Close()
	c.on.remove(c, end)
	if c.exchange != nil {
		c.exchange.endWith(reason)
	}
	return true
}

// contain is deferred where bytes of a client are worked on: a panic costs that
// client its connection; the others of the process go on.
func (c *serverConn) contain(who string) {
	if p := recover(); p != nil {
		c.on.server.options.Log.Error(who+" panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		if c.exchange != nil {
			c.exchange.spoiled = true // nobody knows who still has a part of it
		}
		c.idle = false
		c.abort(errAborted)
	}
}

// client is the client's address for the log.
func (c *serverConn) client() string {
	if !c.remote.IsValid() {
		return "unix"
	}
	return c.remote.String()
}

// reasons are the phrases of the statuses that the codec answers with.
var reasons = map[int]string{
	400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
	417: "Expectation Failed", 431: "Request Header Fields Too Large", 501: "Not Implemented",
	505: "HTTP Version Not Supported",
}

// refuse answers a request that no handler sees, if there is anything to answer,
// and ends the connection so that the client can read it.
func (e *serverExchange) refuse(t *task.Task, err error) {
	c, o := e.c, &e.c.on.server.options
	status := exchange.StatusOf(err, 0)
	if status == 0 {
		c.abort(errClientGone)
		return
	}
	if status == 400 {
		o.Metrics.errors.Inc()
	}
	if !e.parsed {
		e.readRemains()
	}
	refused := Refusal{Request: &e.head.Request, Start: c.on.server.epoch.Add(e.began), Status: status, Reason: err.Error()}
	o.Log.Debug("request refused", "status", status, "reason", err.Error(), "listener", o.Listener, "client", c.client())
	refused.Sent, refused.Err = e.sendRefusal(t, status)
	if refused.Err != nil && !errors.Is(refused.Err, os.ErrDeadlineExceeded) && !c.abort(errClientGone) {
		refused.Err = net.ErrClosed // it was us, before
	}
	o.Refused(e.down, refused)
	if refused.Err == nil {
		c.linger(t)
	}
}

// readRemains reads what can be read of a head that is not valid.
func (e *serverExchange) readRemains() {
	line, _, _ := bytes.Cut(e.c.Buffered(), crlf)
	if e.memory != nil {
		e.loop().Release(e.memory)
	}
	e.memory = e.loop().Buffer(len(line) + len(crlf))
	n := copy(e.memory, e.c.Buffered()[:min(len(line)+len(crlf), len(e.c.Buffered()))])
	e.head.readable(viewOf(e.memory[:n]), e.c.on.server.options.Scheme)
}

// sendRefusal answers by ourselves. It returns how many bytes of the answer's body have
// left: none if it fails.
func (e *serverExchange) sendRefusal(t *task.Task, status int) (sent uint64, err error) {
	l := e.loop()
	text := strconv.Itoa(status) + " " + reasons[status] + "\n"
	r := &exchange.Response{Status: status, Reason: reasons[status], ContentLength: int64(len(text))}
	r.Fields.Add("Content-Type", "text/plain; charset=utf-8")
	if name := e.c.on.server.options.Server; name != "" {
		r.Fields.Add("Server", name)
	}
	b := l.Buffer(1)[:0]
	defer func() { l.Release(b) }()
	if b, err = appendResponse(b, r, framing{length: true, close: true, date: l.Date()}); err != nil {
		return 0, err
	}
	b = append(b, text...)
	e.refusing = true
	if err := e.sendWithin(t, b, lingerTime); err != nil {
		return 0, err
	}
	return uint64(len(text)), nil
}
