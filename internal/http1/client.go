package http1

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
)

// maxInterim is how many 1xx responses may precede a final one.
const maxInterim = 32

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

// ClientOptions say how an upstream connection is used. The zero value is ready.
type ClientOptions struct {
	HeadSize int64    // most bytes of a response head; 0: 64 KiB
	Buffers  *Buffers // shared with other connections; nil: none are shared
	Traffic  Traffic  // what counts the connection's bytes

	// OnIdle, if set, is called when an exchange was closed and the connection can
	// carry another. It is called by whoever closed the exchange, holding no lock,
	// and owns the connection from then on.
	OnIdle func(*Conn)

	// OnEnd and OnSwitch, if set: one of them is called, once, when the connection was
	// closed, or switched and so given away. byPeer says that the upstream had closed it
	// before, or reset it; of a connection that is no TCP or unix socket nobody knows. A
	// lock of the Conn is held: they must not call back, nor block.
	OnEnd    func(byPeer bool)
	OnSwitch func()
}

// Conn is a connection to an upstream. It carries one exchange at a time, and
// while it carries none it has neither a goroutine nor a buffer.
type Conn struct {
	conn    net.Conn
	options ClientOptions
	in      *reader

	mu       sync.Mutex
	current  *clientExchange
	used     bool // an exchange was begun
	closed   bool
	switched bool // the connection is no longer ours
}

// NewClient returns a Conn over a fresh connection, which it then owns.
func NewClient(conn net.Conn, o ClientOptions) *Conn {
	if o.HeadSize <= 0 {
		o.HeadSize = defaultHeadSize
	}
	if o.Buffers == nil {
		o.Buffers = new(Buffers)
	}
	if o.OnEnd == nil {
		o.OnEnd = func(bool) {}
	}
	if o.OnSwitch == nil {
		o.OnSwitch = func() {}
	}
	return &Conn{conn: conn, options: o, in: newReader(conn, o.Buffers, o.Traffic.Received)}
}

// Exchange begins an exchange. It fails if the connection is closed or carries one.
func (c *Conn) Exchange() (exchange.Upstream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed || c.switched:
		return nil, net.ErrClosed
	case c.current != nil:
		return nil, errBusy
	}
	e := &clientExchange{c: c, reused: c.used, body: bodyReader{in: c.in}}
	e.out = bodyWriter{conn: c.conn, buffers: c.options.Buffers, counted: c.options.Traffic.Sent}
	c.used = true
	c.current = e
	return e, nil
}

// Reusable says whether the connection can carry another exchange now.
func (c *Conn) Reusable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current == nil && !c.closed && !c.switched
}

// Alive says whether an idle connection is still good, as far as the kernel knows:
// it is open and nothing has come that nobody asked for. It does not block. Of a
// connection that is no TCP or unix socket it knows only whether we closed it.
func (c *Conn) Alive() bool {
	if !c.Reusable() {
		return false
	}
	if c.in.raw == nil {
		return true
	}
	alive := false
	err := c.in.raw.Control(func(fd uintptr) { alive = nothingToRead(int(fd)) })
	return err == nil && alive
}

// nothingToRead is true of an open socket without unread bytes. End of file and
// pending errors are something to read.
func nothingToRead(fd int) bool {
	var b [1]byte
	for {
		_, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return err == unix.EAGAIN
		}
	}
}

// leftByPeer says whether the upstream has closed or reset the connection, also if
// nobody has read that far.
func (c *Conn) leftByPeer() bool {
	if c.in.raw == nil {
		return false
	}
	left := false
	err := c.in.raw.Control(func(fd uintptr) { left = hungUp(int(fd)) })
	return err == nil && left
}

// hungUp is leftByPeer of a socket. Besides the event that is asked for, poll(2) tells
// of POLLHUP and POLLERR, one of which a reset leaves.
func hungUp(fd int) bool {
	events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(events, 0)
		if err != unix.EINTR {
			return err == nil && n > 0
		}
	}
}

// Close closes the connection, whatever it carries, unless it was switched.
// Further calls do nothing.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.switched {
		return nil
	}
	return c.closeLocked()
}

func (c *Conn) closeLocked() error {
	c.closed = true
	c.options.OnEnd(c.leftByPeer())
	return c.conn.Close()
}

// isClosed says whether an error may be our own doing.
func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// clientExchange implements [exchange.Upstream] on a Conn.
type clientExchange struct {
	c        *Conn
	reused   bool
	answered atomic.Bool // a byte of a response has come

	// Owned by the goroutine that receives.
	body    bodyReader
	final   bool // the final head, or a 101, was received
	interim int

	// Guarded by c.mu. Once sentAll and gotAll are set, sender and receiver leave
	// the connection alone: it may carry the next exchange.
	over    bool
	method  string // "" before Send
	upgrade bool   // the request asks for one
	agreed  bool   // the upstream has agreed to it
	sentAll bool
	gotAll  bool
	lastOne bool // the connection ends with this exchange

	mu  sync.Mutex // held while sending
	out bodyWriter
}

func (e *clientExchange) Reused() bool              { return e.reused }
func (e *clientExchange) Trailers() exchange.Fields { return e.body.dec.trailers }

// Send implements [exchange.Upstream]. The head of a request with a body is held
// back until Write, Finish or Receive, to go out together with what follows.
func (e *clientExchange) Send(r *exchange.Request) error {
	if err := e.begin(r); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	b, err := appendRequest(e.out.take(), r)
	if err != nil {
		return err
	}
	e.out.held = b
	switch {
	case r.ContentLength == -1:
		e.out.kind = byChunks
	case r.ContentLength > 0:
		e.out.kind, e.out.left = byLength, r.ContentLength
	default:
		err = e.out.flush()
		e.sent(err)
	}
	if err != nil && !e.answered.Load() && !e.c.isClosed() {
		return fmt.Errorf("%w: %w", exchange.ErrNoAnswer, err)
	}
	return err
}

func (e *clientExchange) begin(r *exchange.Request) error {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	switch {
	case e.over:
		return errOver
	case e.method != "":
		return errSent
	}
	e.method = r.Method
	e.upgrade = r.Upgrade != ""
	return nil
}

// sent notes that the request is complete, unless sending it failed.
func (e *clientExchange) sent(err error) {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.sentAll = err == nil
}

// maySend says whether there is a request to go on with.
func (e *clientExchange) maySend() error {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	switch {
	case e.over:
		return errOver
	case e.method == "":
		return errNotSent
	}
	return nil
}

// Write implements [exchange.Upstream].
func (e *clientExchange) Write(p []byte) (int, error) {
	if err := e.maySend(); err != nil {
		return 0, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.write(p)
}

// Finish implements [exchange.Upstream].
func (e *clientExchange) Finish(trailers exchange.Fields) error {
	if err := e.maySend(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	err := e.out.finish(trailers)
	e.out.kind = noBody
	e.sent(err)
	return err
}

// Receive implements [exchange.Upstream]. What the upstream may not answer is a
// *exchange.StatusError 502.
func (e *clientExchange) Receive() (*exchange.Response, error) {
	if e.final {
		return nil, errReceived
	}
	if err := e.maySend(); err != nil {
		return nil, err
	}
	// The lock is taken only if nobody is sending: a sender sends the head first,
	// and may be held up by an upstream that answers before it reads on. If it
	// fails, reading tells whether the upstream has answered nevertheless.
	if e.mu.TryLock() {
		e.out.flush()
		e.mu.Unlock()
	}
	head, err := e.readHead()
	if err != nil {
		return nil, err
	}
	if head.Status < 200 && head.Status != 101 {
		e.interim++
		if e.interim > maxInterim {
			return nil, badGateway(errEndless)
		}
		return head.Response, nil
	}
	return head.Response, e.settle(&head)
}

// readHead reads the next head, interim or final.
func (e *clientExchange) readHead() (responseHead, error) {
	in := e.c.in
	scan := headScanner{limit: int(e.c.options.HeadSize)}
	for {
		end, err := scan.scan(in.buffered())
		if err != nil {
			return responseHead{}, badGateway(err)
		}
		if end > 0 {
			head, err := parseResponse(string(in.buffered()[:end]), scan.lines-1, e.method)
			if err != nil {
				return responseHead{}, badGateway(err)
			}
			in.consume(end)
			return head, nil
		}
		if err := in.fill(); err != nil {
			return responseHead{}, e.receiveError(err)
		}
		e.answered.Store(true)
	}
}

// settle notes what a final head, or a 101, means for the connection.
func (e *clientExchange) settle(head *responseHead) error {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if head.Status == 101 && !e.upgrade {
		return badGateway(errUnasked)
	}
	e.final = true
	e.body.dec = head.body
	e.agreed = head.Status == 101 && head.Upgrade == "websocket"
	e.lastOne = head.close || e.upgrade
	e.gotLocked()
	return nil
}

// gotLocked notes the end of the response once it is there. Bytes behind it belong
// to no request.
func (e *clientExchange) gotLocked() {
	if e.body.dec.done() {
		e.gotAll = true
		e.lastOne = e.lastOne || len(e.c.in.buffered()) > 0
	}
}

// cutShort is a response that did not end because its connection did. It is
// io.ErrUnexpectedEOF for [errors.Is].
type cutShort struct{ error }

func (e cutShort) Unwrap() error      { return e.error }
func (cutShort) Is(target error) bool { return target == io.ErrUnexpectedEOF }

// receiveError explains why the connection gave no more bytes.
func (e *clientExchange) receiveError(err error) error {
	switch {
	case e.c.isClosed():
		return net.ErrClosed
	case !e.answered.Load():
		return fmt.Errorf("%w: %w", exchange.ErrNoAnswer, err)
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return cutShort{badGateway(errTruncated)}
	}
	return cutShort{badGateway(err)}
}

// Read implements [exchange.Upstream].
func (e *clientExchange) Read(p []byte) (int, error) {
	switch {
	case !e.final:
		return 0, errNotFinal
	case e.body.err != nil:
		return 0, e.body.err
	case e.body.dec.done():
		return 0, io.EOF
	}
	n, err := e.body.read(p)
	if err != nil && err != io.EOF {
		e.body.err = e.bodyError(err)
		return n, e.body.err
	}
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.gotLocked()
	return n, err
}

func (e *clientExchange) bodyError(err error) error {
	if exchange.StatusOf(err, 0) != 0 {
		return badGateway(err)
	}
	return e.receiveError(err)
}

// Switch implements [exchange.Upstream]. It fails unless the upstream has answered
// an upgrade request with a 101 to WebSocket.
func (e *clientExchange) Switch() (net.Conn, []byte, error) {
	c := e.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case e.over || c.closed:
		return nil, nil, errOver
	case !e.agreed || c.switched:
		return nil, nil, errNoSwitch
	}
	c.switched = true
	c.options.OnSwitch()
	early := append([]byte(nil), c.in.buffered()...)
	c.in.consume(len(early))
	return c.conn, early, nil
}

// Close implements [exchange.Upstream].
func (e *clientExchange) Close() error {
	c := e.c
	c.mu.Lock()
	if e.over || c.switched {
		c.mu.Unlock()
		return nil
	}
	e.over = true
	idle := e.sentAll && e.gotAll && !e.lastOne && !c.closed
	c.current = nil
	if !idle && !c.closed {
		c.closeLocked()
	}
	c.mu.Unlock()
	if idle && c.options.OnIdle != nil {
		c.options.OnIdle(c)
	}
	return nil
}
