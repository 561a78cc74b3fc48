package http1

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// maxInterim is how many 1xx responses may precede a final one.
const maxInterim = 32

// headAndSome is what is read at once until a head is complete: all of a usual response, and
// little of a large one. Of that the rest stays where it is, so that whoever takes it from
// there copies nothing (see [exchange.Source]), if it is longer than mostRead.
const (
	headAndSome = 20 << 10
	mostRead    = 32 << 10
)

// unixRetry is how long, at least, a unix socket whose queue is full is left alone before
// the next attempt to connect.
const unixRetry = 50 * time.Millisecond

var (
	errBusy      = errors.New("the connection carries another exchange")
	errSent      = errors.New("the request head was sent already")
	errNotSent   = errors.New("no request head was sent yet")
	errReceived  = errors.New("the final response head was received already")
	errNotFinal  = errors.New("no final response head was received yet")
	errNoSwitch  = errors.New("the upstream has not agreed to an upgrade")
	errOver      = errors.New("the exchange was closed")
	errUnasked   = malformed("a 101 that nobody asked for")
	errEndless   = malformed("interim responses without end")
	errTruncated = malformed("the connection ended within a response")
)

// ClientOptions say how an upstream connection is used. The zero value is ready. What is
// called is called on the loop's goroutine, and must not wait.
type ClientOptions struct {
	HeadSize int64           // most bytes of a response head; 0: 64 KiB
	Traffic  *stream.Traffic // what counts the connection's bytes; may be nil

	// OnIdle, if set, is called when an exchange was closed and the connection can
	// carry another, and owns it from then on. An idle connection closes itself when the
	// upstream does, or says what nobody asked for.
	OnIdle func(*Conn)

	// OnEnd and OnSwitch, if set: one of them is called, once, when the connection was
	// closed, or switched and so given away. byPeer says that the upstream had closed it
	// before, or reset it.
	OnEnd    func(byPeer bool)
	OnSwitch func()

	// OnOver, if set, is called when the exchange was closed that has switched the
	// connection: nobody uses the Conn any more, and [Conn.Renew] makes another of it.
	OnOver func()
}

// Conn is a connection to an upstream, on the loop that has dialled it and whose goroutine
// does all with it. It carries one exchange at a time, and while it carries none it has
// neither a task nor a buffer.
type Conn struct {
	options ClientOptions
	loop    *stream.Loop // nil until it is connected
	conn    stream.Conn

	// These are used for one exchange after the other, with their memory.
	current clientExchange
	head    responseHead // the last one
	body    bodyReader

	dialler *task.Task // waits to try again; nil: none does
	err     error      // what everything fails with; nil: nothing does
	carries bool       // current is an exchange that was not closed
	used    bool       // an exchange was begun
	ended   bool       // it was closed, or is no longer ours
	given   bool       // the latter
}

// NewClient returns a Conn that waits to be connected, by [Conn.Dial] or [Conn.DialUnix].
func NewClient(o ClientOptions) *Conn {
	if o.HeadSize <= 0 {
		o.HeadSize = defaultHeadSize
	}
	return &Conn{options: o}
}

// Renew has a Conn that was switched, and whose exchange is closed, wait to be connected once
// more: for who has many of them, one soon after the other.
func (c *Conn) Renew(t *stream.Traffic) {
	c.options.Traffic = t
	c.loop, c.err, c.used, c.ended, c.given = nil, nil, false, false, false
}

// Dial connects to a TCP address and waits for that, as [stream.Loop.Dial] does; owner and
// traffic are the connection's own. It is called once, and once after each Renew. A Conn that could not be connected
// needs no Close.
func (c *Conn) Dial(t *task.Task, l *stream.Loop, to netip.AddrPort, o *stream.DialOptions) error {
	if c.err != nil {
		return c.err
	}
	o.Owner, o.Traffic = nil, c.options.Traffic
	return c.connected(l, l.Dial(t, &c.conn, to, o))
}

// DialUnix is Dial for a unix socket. Where the listener's queue is full it tries again
// until there is room.
func (c *Conn) DialUnix(t *task.Task, l *stream.Loop, path string, o *stream.DialOptions) error {
	if c.err != nil {
		return c.err
	}
	o.Owner, o.Traffic = nil, c.options.Traffic
	err := l.DialUnix(t, &c.conn, path, o)
	for errors.Is(err, unix.EAGAIN) {
		if err = c.pause(t, l, o.Until); err == nil {
			err = l.DialUnix(t, &c.conn, path, o)
		}
	}
	return c.connected(l, err)
}

// connected has the connection begin, unless there is none. What had come before
// belongs to the first exchange.
func (c *Conn) connected(l *stream.Loop, err error) error {
	if err == nil {
		c.loop = l
		c.conn.Own(c)
	}
	return err
}

// An alarm wakes a task.
type alarm struct {
	deadline poller.Deadline
	task     *task.Task
	rung     bool
}

// Expire implements [poller.Expirer].
func (a *alarm) Expire(*poller.Deadline) {
	a.rung = true
	a.task.Wake()
}

// pause waits for a while, but not beyond until.
func (c *Conn) pause(t *task.Task, l *stream.Loop, until time.Time) error {
	if !until.IsZero() && !l.Now().Before(until) {
		return os.ErrDeadlineExceeded
	}
	a := alarm{task: t}
	l.SetDeadline(&a.deadline, &a, l.Now().Add(unixRetry))
	defer l.Forget(&a.deadline)
	c.dialler = t
	defer func() { c.dialler = nil }()
	for !a.rung && c.err == nil {
		t.Wait()
	}
	return c.err
}

// Interrupt has everything that waits for the connection, and all that comes later, fail
// with err: its dialling, and the exchange that it carries.
func (c *Conn) Interrupt(err error) {
	if c.err == nil {
		c.err = err
	}
	if c.conn.Open() {
		c.conn.Interrupt(err)
	}
	if c.dialler != nil {
		c.dialler.Wake()
	}
}

// Exchange begins an exchange. It fails if the connection is closed or carries one. What
// it returns is not to be used after its Close any more once the connection carries the
// next one.
func (c *Conn) Exchange() (exchange.Upstream, error) {
	switch {
	case c.loop == nil || c.ended:
		return nil, net.ErrClosed
	case c.carries:
		return nil, errBusy
	}
	c.current = clientExchange{c: c, reused: c.used, out: bodyWriter{out: &c.conn}}
	c.body.begin(&c.conn, bodyDecoder{}, 0)
	c.used, c.carries = true, true
	return &c.current, nil
}

// Alive says whether the connection is idle and still good, as far as the kernel has told:
// it is open and nothing has come that nobody asked for. It does not block.
func (c *Conn) Alive() bool {
	return c.loop != nil && !c.ended && !c.carries && c.conn.Quiet()
}

// Secure is the connection's TLS; nil: there is none.
func (c *Conn) Secure() *stream.Secure { return c.conn.Secure() }

// Ready implements [stream.Owner]: nobody has asked for what has come on an idle connection,
// unless it is TLS's own, as tickets are, and of one that carries an exchange it is what the
// next Receive or Read finds.
func (c *Conn) Ready(*stream.Conn) {
	if !c.carries && (c.conn.Secure() == nil || !c.conn.Quiet()) {
		c.Close()
	}
}

// Expired implements [stream.Owner]. How long a connection may be idle is its pool's business.
func (c *Conn) Expired(*stream.Conn) {}

// Close closes the connection, whatever it carries, unless it was switched.
// Further calls do nothing.
func (c *Conn) Close() {
	if c.loop == nil || c.ended {
		return
	}
	c.ended = true
	byPeer := hungUp(c.conn.FD())
	c.conn.Close()
	if c.options.OnEnd != nil {
		c.options.OnEnd(byPeer)
	}
}

// hungUp says whether the upstream has closed or reset the connection, also if nobody has
// read that far. Besides the event that is asked for, poll(2) tells of POLLHUP and POLLERR,
// one of which a reset leaves.
func hungUp(fd int) bool {
	events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(events, 0)
		if err != unix.EINTR {
			return err == nil && n > 0
		}
	}
}

// clientExchange implements [exchange.Upstream] on a Conn.
type clientExchange struct {
	c      *Conn
	reused bool
	over   bool // it was closed

	// The request.
	out     bodyWriter
	method  string     // what matters of it for the response; "" before Send
	upgrade string     // that the request asks for, in lower case
	sending bool       // a task sends, and may wait
	next    *task.Task // waits for that one; nil: none does
	sentAll bool

	// The response.
	text     []byte // what the strings of c.head are parts of; nil: there is none
	answered bool   // a byte of a response has come
	final    bool   // the final head, or a 101, was received
	agreed   bool   // the upstream has agreed to an upgrade
	lastOne  bool   // the connection ends with this exchange
	interim  int
}

func (e *clientExchange) Reused() bool              { return e.reused }
func (e *clientExchange) Ready() bool               { return e.final && e.c.body.ready() }
func (e *clientExchange) Trailers() exchange.Fields { return e.c.body.dec.trailers }

// Send implements [exchange.Upstream]. The head of a request with a body is held
// back until Write, Finish or Receive, to go out together with what follows.
func (e *clientExchange) Send(t *task.Task, r *exchange.Request) error {
	switch {
	case e.over:
		return errOver
	case e.method != "":
		return errSent
	}
	e.method = methodFor(r)
	e.upgrade = r.Upgrade
	b, err := appendRequest(e.out.take(), r)
	if err != nil {
		e.c.loop.Release(b)
		return err
	}
	e.out.held = b
	switch {
	case r.ContentLength == -1:
		e.out.kind = byChunks
	case r.ContentLength > 0:
		e.out.kind, e.out.left = byLength, r.ContentLength
	default:
		e.sending = true
		err = e.out.flush(t)
		e.sent()
		e.sentAll = err == nil
	}
	if err != nil && !e.answered && e.gone() == nil {
		return fmt.Errorf("%w: %w", exchange.ErrNoAnswer, err)
	}
	return err
}

// methodFor returns what a response's framing depends on, in memory that lasts.
func methodFor(r *exchange.Request) string {
	if r.Method == "HEAD" {
		return "HEAD"
	}
	return "GET"
}

// gone returns why nothing can be done any more, if that is our own doing.
func (e *clientExchange) gone() error {
	switch {
	case e.c.err != nil:
		return e.c.err
	case e.over || e.c.ended:
		return net.ErrClosed
	}
	return nil
}

// turn waits until nobody else sends. Receive may do so, with the head.
func (e *clientExchange) turn(t *task.Task) error {
	for e.sending {
		e.next = t
		t.Wait()
		e.next = nil
	}
	switch {
	case e.over:
		return errOver
	case e.method == "":
		return errNotSent
	}
	e.sending = true
	return nil
}

// sent ends the turn.
func (e *clientExchange) sent() {
	e.sending = false
	if e.next != nil {
		e.next.Wake()
	}
}

// Write implements [exchange.Upstream].
func (e *clientExchange) Write(t *task.Task, p []byte) error {
	if e.sending { // p is not ours any more when we have waited
		p = append([]byte(nil), p...)
	}
	if err := e.turn(t); err != nil {
		return err
	}
	err := e.out.write(t, p)
	e.sent()
	return err
}

// Sink implements [exchange.Sink].
func (e *clientExchange) Sink() (to *stream.Conn, left int64) {
	if e.over || e.method == "" || e.sending {
		return nil, 0
	}
	return e.out.sink()
}

// Gave implements [exchange.Sink].
func (e *clientExchange) Gave(n int) { e.out.left -= int64(n) }

// Failed implements [exchange.Sink].
func (e *clientExchange) Failed(error) { e.out.failed = true }

// Finish implements [exchange.Upstream].
func (e *clientExchange) Finish(t *task.Task, trailers exchange.Fields) error {
	if err := e.turn(t); err != nil {
		return err
	}
	err := e.out.finish(t, trailers)
	e.out.kind = noBody
	e.sent()
	e.sentAll = err == nil && !e.out.failed
	return err
}

// Receive implements [exchange.Upstream]. What the upstream may not answer is a
// *exchange.StatusError 502.
func (e *clientExchange) Receive(t *task.Task) (*exchange.Response, error) {
	switch {
	case e.final:
		return nil, errReceived
	case e.over:
		return nil, errOver
	case e.method == "":
		return nil, errNotSent
	}
	// Only if nobody is sending: a sender sends the head first, and may be held up by an
	// upstream that answers before it reads on. If it fails, reading tells whether the
	// upstream has answered nevertheless.
	if !e.sending {
		e.sending = true
		e.out.flush(t)
		e.sent()
	}
	if err := e.readHead(t); err != nil {
		return nil, err
	}
	head := &e.c.head
	if head.Status < 200 && head.Status != 101 {
		e.interim++
		if e.interim > maxInterim {
			return nil, badGateway(errEndless)
		}
		return &head.Response, nil
	}
	if err := e.settle(); err != nil {
		return nil, err
	}
	return &head.Response, nil
}

// readHead reads the next head, interim or final.
func (e *clientExchange) readHead(t *task.Task) error {
	e.forgetHead()
	in := &e.c.conn
	scan := headScanner{limit: int(e.c.options.HeadSize)}
	for {
		end, err := scan.scan(in.Buffered())
		if err != nil {
			return badGateway(err)
		}
		if end > 0 {
			e.text = e.c.loop.Buffer(end)
			head := e.text[:copy(e.text, in.Buffered()[:end])]
			in.Consume(end)
			if err := e.c.head.parse(viewOf(head), e.method); err != nil {
				return badGateway(err)
			}
			return nil
		}
		if !mayBeStatusLine(in.Buffered()) {
			return badGateway(errStatusLine)
		}
		if err := in.FillUpTo(t, headAndSome); err != nil {
			return e.receiveError(err)
		}
		e.answered = true
	}
}

// mayBeStatusLine says whether a response can begin like this. That of HTTP/0.9 has no head
// at all (RFC 1945 §6.1), and its end may never come.
func mayBeStatusLine(b []byte) bool {
	const begin = "HTTP/"
	n := min(len(b), len(begin))
	return string(b[:n]) == begin[:n]
}

// forgetHead gives the memory of the last head back.
func (e *clientExchange) forgetHead() {
	if e.text != nil {
		e.c.loop.Release(e.text)
		e.text = nil
	}
}

// settle notes what a final head, or a 101, means for the connection.
func (e *clientExchange) settle() error {
	c, head := e.c, &e.c.head
	if head.Status == 101 && e.upgrade == "" {
		return badGateway(errUnasked)
	}
	e.final = true
	c.body.begin(&c.conn, head.body, 0)
	c.body.readOn(mostRead)
	e.agreed = head.Status == 101 && head.Upgrade == e.upgrade
	e.lastOne = head.close || e.upgrade != ""
	return nil
}

// cutShort is a response that did not end because its connection did. It is
// io.ErrUnexpectedEOF for [errors.Is].
type cutShort struct {
	error       // for the receiver
	cause error // of the connection's end
}

func (e cutShort) Unwrap() []error    { return []error{e.error, e.cause} }
func (cutShort) Is(target error) bool { return target == io.ErrUnexpectedEOF }

// receiveError explains why the connection gave no more bytes.
func (e *clientExchange) receiveError(err error) error {
	gone := e.gone()
	switch {
	case gone != nil:
		return gone
	case !e.answered:
		return fmt.Errorf("%w: %w", exchange.ErrNoAnswer, err)
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return cutShort{badGateway(errTruncated), err}
	}
	return cutShort{badGateway(err), err}
}

// Read implements [exchange.Upstream].
func (e *clientExchange) Read(t *task.Task) ([]byte, error) {
	body := &e.c.body
	switch {
	case !e.final:
		return nil, errNotFinal
	case body.err == nil && body.dec.done():
		return nil, io.EOF
	case body.err == nil && e.over:
		return nil, net.ErrClosed
	case body.err != nil:
		return nil, body.err
	}
	p, err := body.read(t)
	if err != nil && err != io.EOF {
		body.err = e.bodyError(err)
	}
	return p, body.err
}

// Source implements [exchange.Source].
func (e *clientExchange) Source() (from *stream.Conn, left int64) {
	if !e.final || e.over {
		return nil, 0
	}
	return e.c.body.source()
}

// Awaiting implements [exchange.Source].
func (e *clientExchange) Awaiting() {}

// Took implements [exchange.Source].
func (e *clientExchange) Took(n int) error {
	e.c.body.took(n)
	return nil
}

// Ended implements [exchange.Source].
func (e *clientExchange) Ended(err error) {
	if err != nil {
		e.c.body.err = e.bodyError(e.c.body.failure(err))
	}
}

func (e *clientExchange) bodyError(err error) error {
	if exchange.StatusOf(err, 0) != 0 {
		return badGateway(err)
	}
	return e.receiveError(err)
}

// Switch implements [exchange.Upstream]. It fails unless the upstream has answered
// an upgrade request with a 101 to the same protocol.
func (e *clientExchange) Switch() (stream.Passed, error) {
	c := e.c
	switch {
	case e.over || c.ended:
		return stream.Passed{FD: -1}, errOver
	case !e.agreed:
		return stream.Passed{FD: -1}, errNoSwitch
	}
	passed := c.give()
	return passed, nil
}

// PassOn gives the connection up for who wants no exchange of it: the caller owns its socket,
// which does not block and is still on the loop, and what has come over it. It fails if the
// connection is closed or carries an exchange.
func (c *Conn) PassOn() (p stream.Passed, err error) {
	switch {
	case c.loop == nil || c.ended:
		return stream.Passed{FD: -1}, net.ErrClosed
	case c.carries:
		return stream.Passed{FD: -1}, errBusy
	}
	p = c.give()
	if c.options.OnOver != nil {
		c.options.OnOver()
	}
	return p, nil
}

// give gives the connection up.
func (c *Conn) give() stream.Passed {
	c.ended, c.given = true, true
	passed := c.conn.PassOn()
	if c.options.OnSwitch != nil {
		c.options.OnSwitch()
	}
	return passed
}

// Close implements [exchange.Upstream].
func (e *clientExchange) Close() {
	if e.over {
		return
	}
	e.over = true
	e.forgetHead()
	e.out.release()
	c := e.c
	c.carries = false
	switch {
	case c.given:
		if c.options.OnOver != nil {
			c.options.OnOver()
		}
	case !e.complete() || e.lastOne || c.ended || !c.conn.Quiet(): // bytes behind the response belong to no request
		c.Close()
	case c.options.OnIdle != nil:
		c.options.OnIdle(c)
	}
}

// complete says that the request was sent and the response received to their ends.
func (e *clientExchange) complete() bool {
	body := &e.c.body
	return e.sentAll && e.final && (body.err == nil || body.err == io.EOF) && body.dec.done()
}
