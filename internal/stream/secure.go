package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/task"
)

// mostOwed is how much a connection may still have to send of what TLS says of itself, as
// answers to requests for new keys, before nothing more is read: who asks has to read, too.
const mostOwed = 32 << 10

// record is the most that one record of TLS carries (RFC 8446 §5.1).
const record = 16 << 10

// Secure is TLS on a connection. crypto/tls has the protocol, and knows of nothing but a
// socket that does not block: a read that finds nothing can be tried again, and what the
// socket does not take is kept and sent when it does.
//
// It is in one of three hands, never in two at once: a handshake's goroutine, which computes
// for long and so not on the loop; the loop, on whose goroutine everything else is done; or,
// after [Conn.Blocking], whoever uses the connection in Go's way.
//
// # Ends
//
// The end of a direction is said twice, by an alert of TLS (close_notify), which nobody else
// can make, and by a FIN, which anybody in between can. CloseWrite and Close send both, the
// alert first; after [Conn.ResetOnClose] there is none, and the peer knows of the failure. A
// direction that has ended leaves the other one open, also in TLS 1.2, which would allow a
// peer to end its own for that: one that does is an end like any other.
//
// What is read ends with io.EOF in both cases, for many peers leave the alert out, and most
// protocols say themselves where they end. [Secure.Truncated] tells: where nothing else says
// that a message is complete it is not, as a body of HTTP/1 that ends with its connection
// (RFC 9112 §9.8). A FIN within a record is io.ErrUnexpectedEOF always.
//
// # Memory
//
// An idle connection keeps what crypto/tls does: some 3 KiB with its keys, and the buffers that it
// has read into, of 3 KiB after a hello of today. The one for records is as large as the largest
// that has come, and never shrinks by itself: it has 12 KiB more once one was full. Nothing that
// crypto/tls exports gives that back; what is relayed is rid of it all the same (see slim).
type Secure struct {
	conn      *tls.Conn
	handshake *handshake // nil: it is over
	outside   net.Conn   // of Blocking; nil: the loop has it
	traffic   Traffic    // of the connection
	batch     *batch     // where records go that are sent together; nil: they are sent at once
	own       []byte     // what the socket has not taken, behind what it has
	readErr   error      // why nothing can be read any more
	sendErr   error      // why nothing can be sent any more

	fd     int32
	taken  int32 // of own
	asked  int32 // of own, what the peer has asked for
	budget int32 // how much may be read from the socket before others have a turn

	eof     bool // the peer's FIN was read
	dry     bool // the socket has nothing, and tells when it has
	thirsty bool // a read that was short may have left something: an end, or an urgent mark
	stalled bool // reading waits until own was sent
	ending  bool // a FIN is to be sent behind own

	// Known is what whoever began it keeps here for those who have the connection.
	Known any
}

// State is what was agreed on. It is not to be changed.
func (s *Secure) State() tls.ConnectionState { return s.conn.ConnectionState() }

// handshake is one that is under way: its goroutine computes, and the loop tells it of events.
type handshake struct {
	task    *task.Task
	ready   chan struct{} // something may be there to be read, or room to send; holds one
	stopped chan struct{} // closed when it is to fail with cause
	cause   error
	over    bool // the loop's; err is known then
	err     error
}

// computing bounds how many handshakes compute at once. More would be no faster, and the loops
// would wait for their turn among them.
var computing = make(chan struct{}, runtime.GOMAXPROCS(0))

// Handshake begins TLS, as its server or its client, and waits until both sides agree. It is
// called before anything was read or sent. [Conn.Limit] limits it, and Close and Interrupt have
// it fail. c is closed when it fails.
func (c *Conn) Handshake(t *task.Task, config *tls.Config, server bool) error {
	if err := c.stopped(); err != nil {
		c.Close()
		return err
	}
	s := &Secure{handshake: &handshake{task: t, ready: make(chan struct{}, 1), stopped: make(chan struct{})}}
	if s.conn = tls.Client((*wire)(s), config); server {
		s.conn = tls.Server((*wire)(s), config)
	}
	c.use(s)
	err := c.shake(t, s)
	s.handshake = nil
	if err != nil {
		c.Close()
		return err
	}
	c.known |= poller.Readable // some may have been read already
	s.told(c.known)
	return nil
}

// use has the connection use TLS.
func (c *Conn) use(s *Secure) {
	s.fd, s.traffic = c.fd, Traffic{secure: s}
	if c.traffic != nil {
		s.traffic.Received, s.traffic.Sent = c.traffic.Received, c.traffic.Sent
	}
	c.traffic = &s.traffic
}

func (c *Conn) shake(t *task.Task, s *Secure) (why error) {
	l, w, h := c.loop, c.begin(), s.handshake
	l.reuse()
	w.reader = t
	go h.run(l.Loop, s.conn)
	for !h.over {
		t.Wait()
		switch {
		case why != nil:
		case w.err != nil:
			why = w.err
		case c.expired != forNobody:
			why = os.ErrDeadlineExceeded
		}
		if why != nil {
			h.stop(why)
		}
	}
	w.reader = nil
	if c.work != w { // it was closed when it was over, and is used for another one
		if !w.waited() {
			l.putWork(w)
		}
		return net.ErrClosed
	}
	c.end()
	if why == nil {
		why = h.err
	}
	return why
}

// stop has it fail, if it is not over.
func (h *handshake) stop(cause error) {
	if h.cause == nil && !h.over {
		h.cause = cause
		close(h.stopped)
	}
}

// run is the goroutine of a handshake.
func (h *handshake) run(l *poller.Loop, conn *tls.Conn) {
	err := h.compute(conn)
	l.Post(func() {
		h.over, h.err = true, err
		h.task.Wake()
	})
}

func (h *handshake) compute(conn *tls.Conn) (err error) {
	computing <- struct{}{}
	defer func() {
		<-computing
		if p := recover(); p != nil {
			err = fmt.Errorf("the TLS handshake panicked: %v", p)
		}
	}()
	return conn.HandshakeContext(context.Background())
}

// wait waits for an event, and lets others compute meanwhile.
func (h *handshake) wait() error {
	<-computing
	defer func() { computing <- struct{}{} }()
	select {
	case <-h.ready:
		return nil
	case <-h.stopped:
		return h.cause
	}
}

// event tells of one, on the loop's goroutine.
func (h *handshake) event() {
	select {
	case h.ready <- struct{}{}:
	default:
	}
}

// shaking says whether a handshake is under way, whose goroutine uses the socket.
func (s *Secure) shaking() bool { return s.handshake != nil && !s.handshake.over }

// Secure is the connection's TLS, or nil. It is nil once the connection was closed or given
// away.
func (c *Conn) Secure() *Secure {
	if c.traffic == nil {
		return nil
	}
	return c.traffic.secure
}

// errNothing is what crypto/tls is told of a socket that has nothing to be read. Only an error
// that is temporary lets it try again.
var errNothing error = temporary{}

type temporary struct{}

func (temporary) Error() string   { return "nothing is there to be read" }
func (temporary) Timeout() bool   { return false }
func (temporary) Temporary() bool { return true }

// decrypt is recv for TLS. It reads as many records as there are, and have room in p. While
// crypto/tls may have more the connection is readable: the kernel knows nothing of that.
func (c *Conn) decrypt(s *Secure, p []byte) (n int, err error) {
	s.budget = readSize
	for n < len(p) && s.readErr == nil {
		more, err := s.conn.Read(p[n:])
		n += more
		if err == errNothing {
			if s.dry || s.stalled {
				c.drained()
			}
			break
		}
		s.readErr = err
	}
	switch {
	case n > 0: // an error is told the next time
		return n, nil
	case s.readErr != nil:
		return 0, s.readErr
	}
	return 0, errAgain
}

// told notes what the kernel has told of what there is to be read.
func (s *Secure) told(e poller.Events) {
	if e&poller.Readable != 0 {
		s.dry = false
	}
	if e&(poller.Hup|poller.Urgent) != 0 {
		s.thirsty = true
	}
}

// Truncated says that the peer has ended its direction without saying so in TLS: somebody in
// between may have cut what comes (RFC 8446 §6.1).
func (s *Secure) Truncated() bool { return s.eof }

// batch is where records are put that are sent by one call. It is the loop's.
type batch struct{ records []byte }

// batchSize is how much is sent by one call: four full records, which costs a fifth less than one
// after the other, with all that is copied for it. mostRecord is what a Write of one may add to it,
// with the framing of records that crypto/tls makes smaller at first.
const (
	batchSize  = 4 * mostRecord
	mostRecord = record + 1<<10
)

// encrypt is transmit for TLS: what it takes from the parts may be kept for a moment.
func (c *Conn) encrypt(s *Secure, p *parts) error {
	err := c.flush(s)
	if err == nil && !s.owes() {
		var n int
		n, err = s.write(c.loop, p)
		c.sent(n)
	}
	if s.owes() {
		c.known &^= poller.Writable // it is told when there is room
	}
	return err
}

// write sends some of p, and keeps what the socket does not take of that.
//
// Records of crypto/tls are small at first, so that the peer can use what has come of one
// before all has. That costs it little, and us only their framing: they are sent together.
func (s *Secure) write(l *Loop, p *parts) (n int, err error) {
	if l.batch == nil {
		l.batch = &batch{make([]byte, 0, batchSize)}
	}
	for err == nil && !s.owes() && p.size() > 0 {
		s.batch = l.batch
		before := n
		for err == nil && p.size() > 0 && len(l.batch.records)+mostRecord <= batchSize {
			b := p[0]
			if len(b) < record && len(p[1]) > 0 {
				b = l.record(p)
			}
			b = b[:min(len(b), record)]
			if _, err = s.conn.Write(b); err == nil {
				n += len(b)
				p.drop(len(b))
			}
		}
		s.batch = nil
		if e := s.send(l, l.batch.records); e != nil {
			n, err = before, e
		}
		l.batch.records = l.batch.records[:0]
	}
	return n, err
}

// record gathers the beginning of p, of as much as a record carries.
func (l *Loop) record(p *parts) []byte {
	if l.records == nil {
		l.records = new([record]byte)
	}
	return p.gather(l.records[:])
}

// send sends b, and keeps what the socket does not take.
func (s *Secure) send(l *Loop, b []byte) error {
	for len(b) > 0 {
		n, errno := send(s.fd, b)
		switch b = b[n:]; errno {
		case 0:
		case unix.EAGAIN:
			s.own = l.buffers.get(len(b))
			s.own = s.own[:copy(s.own, b)]
			return nil
		default:
			return s.broken(errno)
		}
	}
	return nil
}

// broken notes that nothing can be sent any more.
func (s *Secure) broken(errno unix.Errno) error {
	s.sendErr, s.own, s.taken, s.asked = os.NewSyscallError("send", errno), nil, 0, 0
	return s.sendErr
}

// owes says whether something is kept that the socket has not taken.
func (s *Secure) owes() bool { return len(s.own) > 0 }

// sendOwn sends what the socket has not taken before. It returns false while some of that is left.
func (s *Secure) sendOwn() bool {
	for int(s.taken) < len(s.own) && s.sendErr == nil {
		n, errno := send(s.fd, s.own[s.taken:])
		s.taken += int32(n)
		if errno == unix.EAGAIN {
			return false
		}
		if errno != 0 {
			s.broken(errno)
		}
	}
	return true
}

// flush sends what the socket has not taken before, and has the reading go on that has
// waited for that.
func (c *Conn) flush(s *Secure) error {
	if !s.sendOwn() {
		return nil
	}
	if s.owes() {
		c.loop.buffers.put(s.own)
		s.own, s.taken, s.asked = nil, 0, 0
	}
	if s.ending {
		s.ending = false
		_ = unix.Shutdown(int(c.fd), unix.SHUT_WR) // if it fails, the connection has ended
	}
	if s.stalled {
		s.stalled = false
		c.known |= poller.Readable
		if c.work != nil && c.work.reader != nil {
			c.work.reader.Wake()
		}
	}
	return s.sendErr
}

// wire is the socket as crypto/tls knows it.
type wire Secure

func (w *wire) Read(p []byte) (int, error) {
	switch {
	case w.outside != nil:
		return w.outside.Read(p)
	case w.handshake != nil:
		return w.readWaiting(p)
	case w.asked > mostOwed: // it does not take the answers
		w.stalled = true
		return 0, errNothing
	case w.dry || w.budget <= 0:
		return 0, errNothing
	}
	n, errno := recv(w.fd, p)
	w.budget -= int32(n)
	w.dry = errno == unix.EAGAIN || n < len(p) && !w.thirsty
	return w.received(n, errno)
}

// readWaiting is Read of a handshake.
func (w *wire) readWaiting(p []byte) (int, error) {
	for {
		n, errno := recv(w.fd, p)
		if errno != unix.EAGAIN {
			return w.received(n, errno)
		}
		if err := w.handshake.wait(); err != nil {
			return 0, err
		}
	}
}

func (w *wire) received(n int, errno unix.Errno) (int, error) {
	switch {
	case n > 0:
		return n, nil
	case errno == 0:
		w.eof = true
		return 0, io.EOF
	case errno == unix.EAGAIN:
		return 0, errNothing
	}
	return 0, os.NewSyscallError("recv", errno)
}

// Write sends p, or keeps it: crypto/tls cannot send the same once more.
func (w *wire) Write(p []byte) (int, error) {
	switch {
	case w.outside != nil:
		if len(w.own) > 0 { // from before
			own := append(w.own[w.taken:], p...)
			w.own, w.taken = nil, 0
			_, err := w.outside.Write(own)
			return len(p), err
		}
		return w.outside.Write(p)
	case w.batch != nil:
		w.batch.records = append(w.batch.records, p...)
		return len(p), nil
	case w.sendErr != nil:
		return 0, w.sendErr
	case len(w.own) > 0:
		w.own = append(w.own, p...)
		w.asked += int32(len(p))
		return len(p), nil
	}
	for sent := 0; sent < len(p); {
		n, errno := send(w.fd, p[sent:])
		sent += n
		switch {
		case errno == 0:
		case errno != unix.EAGAIN:
			return sent, os.NewSyscallError("send", errno)
		case w.handshake == nil:
			w.own = append([]byte(nil), p[sent:]...)
			w.asked = int32(len(w.own))
			return len(p), nil
		default:
			if err := w.handshake.wait(); err != nil {
				return sent, err
			}
		}
	}
	return len(p), nil
}

// Close implements [net.Conn]. The socket is closed by whoever has it.
func (w *wire) Close() error {
	if w.outside != nil {
		return w.outside.Close()
	}
	return nil
}

func (w *wire) LocalAddr() net.Addr {
	if w.outside != nil {
		return w.outside.LocalAddr()
	}
	return net.TCPAddrFromAddrPort(LocalAddr(int(w.fd)))
}

func (w *wire) RemoteAddr() net.Addr {
	if w.outside != nil {
		return w.outside.RemoteAddr()
	}
	return new(net.TCPAddr)
}

func (w *wire) SetDeadline(t time.Time) error {
	return errors.Join(w.SetReadDeadline(t), w.SetWriteDeadline(t))
}

func (w *wire) SetReadDeadline(t time.Time) error {
	if w.outside != nil {
		return w.outside.SetReadDeadline(t)
	}
	return nil
}

func (w *wire) SetWriteDeadline(t time.Time) error {
	if w.outside != nil {
		return w.outside.SetWriteDeadline(t)
	}
	return nil
}

// Blocking takes the connection from its loop and returns it for whoever uses it in Go's way,
// with what was read and not consumed. With TLS it has the methods of a [tls.Conn]. c is closed
// if it fails.
func (c *Conn) Blocking() (net.Conn, error) {
	s := c.Secure()
	fd, early := c.Detach()
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close()
	conn, err := net.FileConn(f)
	switch {
	case err != nil:
		return nil, err
	case s == nil && len(early) == 0:
		return conn, nil
	case s == nil:
		return &begun{conn, early}, nil
	}
	s.outside = conn
	if len(early) == 0 {
		return s.conn, nil
	}
	return &begunSecure{s.conn, early}, nil
}

// begun is a connection of which some bytes were read already.
type begun struct {
	net.Conn
	early []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.early) > 0 {
		return early(&b.early, p), nil
	}
	return b.Conn.Read(p)
}

// CloseWrite ends our direction.
func (b *begun) CloseWrite() error { return b.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// begunSecure is begun for TLS.
type begunSecure struct {
	*tls.Conn
	early []byte
}

func (b *begunSecure) Read(p []byte) (int, error) {
	if len(b.early) > 0 {
		return early(&b.early, p), nil
	}
	return b.Conn.Read(p)
}

// early takes some of b to p.
func early(b *[]byte, p []byte) int {
	n := copy(p, *b)
	*b = (*b)[n:]
	return n
}
