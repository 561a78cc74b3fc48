package stream

import (
	"errors"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/task"
)

// streak is how many times a task reads one connection before others run: 8 reads are
// half a megabyte.
const streak = 8

// An Owner is told what happens to a connection and no task waits for. It is called on
// the loop's goroutine, must not block, and may close the connection.
type Owner interface {
	// Ready: something has come, and nobody waits to read: bytes, or the end. [Conn.HungUp]
	// tells. A task may wait to write.
	Ready(*Conn)

	// Expired: the deadline has come, and nobody waits.
	Expired(*Conn)
}

// Traffic counts the bytes of a connection, with TLS those within it; either may be nil.
type Traffic struct {
	Received, Sent *metrics.Counter

	secure *Secure // of the connection, which has this for itself; nil: it has no TLS
}

// Conn is a stream socket on a loop. It is a part of what it is for: zero until
// [Loop.Adopt] or [Loop.Dial], which may be called again after Close and Detach. One task
// at a time may read it, and one write.
//
// It is small, for it is what a parked connection costs. What it needs while something is
// under way it has from its loop.
type Conn struct {
	loop    *Loop
	owner   Owner
	traffic *Traffic
	work    *work // nil: nothing is under way

	fd     int32 // -1: closed
	handle poller.Handle
	index  uint32

	// known is what the kernel has told. Readable and Writable are taken back by what has
	// found nothing; with Hup and Urgent a short read does not mean that there is no more.
	known   poller.Events
	reads   uint8 // since there was nothing to be read, or others have run
	expired expiry
	ending  ending

	deadline poller.Deadline
}

// An expiry is for whom the deadline has come.
type expiry uint8

const (
	forNobody  expiry = iota
	forReaders        // one has waited: a send goes on
	forAll
)

// ending is what is known of how the connection ends, in bits: it costs every parked one.
type ending uint8

const (
	detached ending = 1 << iota
	resets          // see ResetOnClose
)

// work is what a connection needs while somebody reads, waits for it, or has not consumed
// all that he has read.
type work struct {
	reader, writer *task.Task // who waits; nil: nobody
	err            error      // why nothing can be done any more
	unsent         int32      // what the kernel had to send when Taken said yes; 0: not since the writer waits

	in      []byte // read and not consumed
	private []byte // the buffer that in is a part of; nil: it is the loop's
}

// waited says whether somebody waits.
func (w *work) waited() bool { return w.reader != nil || w.writer != nil }

// Adopt takes over a socket, which does not block, as c. With an error it is the caller's
// still. owner may be nil.
func (l *Loop) Adopt(c *Conn, fd int, owner Owner, traffic *Traffic) error {
	*c = Conn{loop: l, owner: owner, traffic: traffic, fd: int32(fd)}
	c.index = l.place(c)
	var err error
	if c.handle, err = l.Add(fd, l, c.index); err != nil {
		l.vacate(c.index)
		*c = Conn{fd: -1}
	}
	return err
}

// begin returns what c needs while something is under way.
func (c *Conn) begin() *work {
	if c.work == nil {
		c.work = c.loop.takeWork()
	}
	return c.work
}

// end gives that back, if nothing is under way any more.
func (c *Conn) end() {
	w := c.work
	if w == nil || w.waited() || len(w.in) > 0 {
		return
	}
	if w.err == nil || w.err == c.left() {
		c.work = nil
		c.loop.putWork(w)
	}
}

// borrows says whether what is buffered stands in the loop's buffer.
func (c *Conn) borrows() bool { return c.loop.borrower == c }

// Loop is the loop that the connection is on, or was until it was closed or detached.
func (c *Conn) Loop() *Loop { return c.loop }

// Own gives the connection to another owner.
func (c *Conn) Own(o Owner) { c.owner = o }

// FD is the connection's descriptor; -1: it is closed.
func (c *Conn) FD() int { return int(c.fd) }

// Open says whether the connection was neither closed nor detached.
func (c *Conn) Open() bool { return c.loop != nil && c.fd >= 0 }

// HungUp says whether the peer has ended its direction, or the connection is broken, also
// if not everything was read that came before.
func (c *Conn) HungUp() bool { return c.known&poller.Hup != 0 }

// Broken says whether the connection was reset or given up by the kernel.
func (c *Conn) Broken() bool { return c.known&poller.Error != 0 }

// Urgent says whether there was an urgent mark, of which a readable event tells that may
// stand for nothing.
func (c *Conn) Urgent() bool { return c.known&poller.Urgent != 0 }

// Writable says whether a send may find room.
func (c *Conn) Writable() bool { return c.known&poller.Writable != 0 }

// Readable says whether a read may find something.
func (c *Conn) Readable() bool { return c.known&poller.Readable != 0 }

// Buffered is what was read and not consumed. It is good until something is read, from
// any connection of the loop, or the task waits.
func (c *Conn) Buffered() []byte {
	if c.work == nil {
		return nil
	}
	return c.work.in
}

// Quiet says whether nothing is there to be read: no byte, no end and no error, as far as
// the kernel has told or, where that may be old, tells now.
func (c *Conn) Quiet() bool {
	if !c.Open() || c.HungUp() || c.work != nil && (c.work.err != nil || len(c.work.in) > 0) {
		return false
	}
	switch {
	case !c.Readable():
	case c.Secure() != nil: // what is on the socket may be nobody's but TLS's own
		c.More()
		return len(c.Buffered()) == 0 && c.Open() && !c.Readable()
	default:
		if _, errno := peek(c.fd, c.loop.probe[:]); errno == unix.EAGAIN {
			c.drained()
		}
	}
	return !c.Readable()
}

// Preload has a copy of bytes buffered that somebody else has read from the connection
// before it was adopted. Nothing was read since.
func (c *Conn) Preload(early []byte) {
	if len(early) > 0 {
		w := c.begin()
		w.private = c.loop.buffers.get(len(early))
		w.in = w.private[:copy(w.private, early)]
	}
}

// Consume drops n bytes from the front. What Buffered has returned is not touched by that,
// also if these were all, and is good as long as it was.
func (c *Conn) Consume(n int) {
	if n == 0 {
		return
	}
	w := c.work
	if w.in = w.in[n:]; len(w.in) == 0 {
		c.forget()
		c.end()
	}
}

// forget gives up the buffer, in which is nothing.
func (c *Conn) forget() {
	if c.borrows() {
		c.loop.borrower = nil
	}
	w := c.work
	if w.private != nil {
		c.loop.drop(w.private)
		w.private = nil
	}
	w.in = nil
}

// save moves what is in the loop's buffer to one of c's own.
func (c *Conn) save() {
	w := c.work
	w.private = c.loop.buffers.get(len(w.in))
	w.in = w.private[:copy(w.private, w.in)]
	c.loop.borrower = nil
}

// Limit has a read that waits fail with [os.ErrDeadlineExceeded] from a time on; where none
// does, a send; where nothing waits, the owner is told, and without one the next call fails.
// The zero time: never. It is exact to a quarter of a second.
func (c *Conn) Limit(at time.Time) {
	if !c.Open() {
		return
	}
	c.expired = forNobody
	c.loop.SetDeadline(&c.deadline, c, at)
}

// Expire implements [poller.Expirer].
func (c *Conn) Expire(*poller.Deadline) {
	switch {
	case c.work != nil && c.work.reader != nil:
		c.expired = forReaders
		c.work.reader.Wake()
	case c.work != nil && c.work.writer != nil:
		c.expired = forAll
		c.work.writer.Wake()
	case c.owner != nil:
		c.owner.Expired(c)
	default:
		c.expired = forAll
	}
}

// Interrupt has every call that waits, and every later one, fail with err.
func (c *Conn) Interrupt(err error) {
	if !c.Open() {
		return
	}
	if w := c.begin(); w.err == nil {
		w.err = err
	}
	c.wake()
}

func (c *Conn) wake() {
	if c.work == nil {
		return
	}
	if c.work.reader != nil {
		c.work.reader.Wake()
	}
	if c.work.writer != nil {
		c.work.writer.Wake()
	}
}

// ready notes what the kernel has told.
func (c *Conn) ready(e poller.Events) {
	if e&poller.Error != 0 {
		e |= poller.Writable // a send tells of it
	}
	c.known |= e
	if s := c.Secure(); s != nil {
		if s.shaking() {
			s.handshake.event()
			return
		}
		s.told(e)
		if e&poller.Writable != 0 && (s.owes() || s.stalled) {
			waits := s.stalled
			_ = c.flush(s) // whoever sends is told of an error, or the reader
			if waits && !s.stalled {
				e |= poller.Readable
			}
		}
	}
	if c.work != nil && c.work.writer != nil && e&poller.Writable != 0 {
		c.work.writer.Wake()
	}
	switch {
	case e&poller.Readable == 0:
	case c.work != nil && c.work.reader != nil:
		c.work.reader.Wake()
	case c.owner != nil:
		c.owner.Ready(c)
	}
}

// await waits until the connection is readable or writable, as far as is known.
func (c *Conn) await(t *task.Task, e poller.Events) error {
	for {
		if err := c.stopped(); err != nil {
			return err
		}
		if c.expired == forReaders && e == poller.Readable {
			return os.ErrDeadlineExceeded
		}
		if c.known&e != 0 {
			return nil
		}
		if err := c.yield(t, e); err != nil {
			return err
		}
	}
}

// yield lets others run, and waits if the connection is not ready for e.
func (c *Conn) yield(t *task.Task, e poller.Events) error {
	l, w := c.loop, c.begin()
	who := &w.reader
	if e == poller.Writable {
		who, w.unsent = &w.writer, 0
	}
	l.reuse()
	*who = t
	if c.known&e != 0 {
		t.Pause()
	} else {
		t.Wait()
	}
	*who = nil
	if c.work != w { // it was closed, and is used for another one
		if !w.waited() {
			l.putWork(w)
		}
		return net.ErrClosed
	}
	c.reads = 0
	return nil
}

// stopped returns why nothing can be done any more, or for now.
func (c *Conn) stopped() error {
	switch {
	case c.work != nil && c.work.err != nil:
		return c.work.err
	case !c.Open():
		return c.left()
	case c.expired == forAll:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// left returns why the connection is not on the loop any more; nil: it is.
func (c *Conn) left() error {
	switch {
	case c.Open():
		return nil
	case c.ending&detached != 0:
		return errDetached
	}
	return net.ErrClosed
}

// Fill waits for bytes and puts some behind what is buffered. io.EOF: the peer has ended
// its direction.
func (c *Conn) Fill(t *task.Task) error { return c.FillUpTo(t, readSize) }

// FillUpTo is Fill for who wants no more than so many bytes for now. Some more may be
// better left where they are: [Splice] copies what is buffered, and nothing else.
func (c *Conn) FillUpTo(t *task.Task, most int) error {
	err := c.fill(t, most)
	if err != nil {
		c.end()
	}
	return err
}

func (c *Conn) fill(t *task.Task, most int) error {
	for {
		if err := c.turn(t); err != nil {
			return err
		}
		if err := c.receive(most); err != errAgain {
			return err
		}
	}
}

// More puts behind what is buffered what else is there, and does not wait. What keeps it from
// that the next Fill tells.
func (c *Conn) More() {
	if !c.Readable() || c.stopped() != nil {
		return
	}
	if err := c.receive(readSize); err != nil && err != errAgain && err != io.EOF {
		c.Interrupt(err) // the kernel tells it once
	}
	c.end()
}

// Look is More for who does not wait until the kernel has told of what is there.
func (c *Conn) Look() {
	if c.Open() {
		c.known |= poller.Readable
		if s := c.Secure(); s != nil {
			s.dry = false
		}
		c.More()
	}
}

// turn waits until the connection is readable, and lets others run who want to when it was
// for long.
func (c *Conn) turn(t *task.Task) error {
	if c.reads >= streak && c.Readable() && c.stopped() == nil {
		if err := c.yield(t, poller.Readable); err != nil {
			return err
		}
	}
	return c.await(t, poller.Readable)
}

// errAgain says that nothing is there to be read.
var errAgain error = unix.EAGAIN

// receive reads once, up to most bytes: errAgain if there are none, io.EOF if there will be
// none.
func (c *Conn) receive(most int) error {
	c.loop.reuse()
	w := c.begin()
	free := c.room()
	free = free[:min(len(free), most)]
	n, err := c.recv(free)
	c.reads++
	if n > 0 {
		w.in = w.in[:len(w.in)+n]
		c.received(n)
	}
	if len(w.in) == 0 {
		c.forget()
	}
	return err
}

// recv reads once into p.
func (c *Conn) recv(p []byte) (int, error) {
	if s := c.Secure(); s != nil {
		return c.decrypt(s, p)
	}
	n, errno := recv(c.fd, p)
	if errno == unix.EAGAIN || n < len(p) && c.known&(poller.Hup|poller.Urgent) == 0 {
		c.drained()
	}
	switch {
	case n > 0:
		return n, nil
	case errno == 0:
		return 0, io.EOF
	case errno == unix.EAGAIN:
		return 0, errAgain
	}
	return 0, os.NewSyscallError("recv", errno)
}

// drained notes that there is nothing to be read. It is told when there is again.
func (c *Conn) drained() {
	c.known &^= poller.Readable
	c.reads = 0
}

// room returns what is free behind in, and is not empty.
func (c *Conn) room() []byte {
	l, w := c.loop, c.work
	switch {
	case len(w.in) == 0:
		c.forget()
		l.evict()
		l.borrower = c
		w.in = l.shared[:0]
	case cap(w.in) == len(w.in):
		c.grow()
	}
	return w.in[len(w.in):cap(w.in)]
}

// grow has room behind in: at the place of what was consumed, or in a larger buffer.
func (c *Conn) grow() {
	w := c.work
	whole := w.private
	if c.borrows() {
		whole = c.loop.shared[:]
	}
	if len(w.in) <= len(whole)/2 {
		w.in = whole[:copy(whole, w.in)]
		return
	}
	larger := c.loop.buffers.get(2 * len(w.in))
	n := copy(larger, w.in)
	c.forget()
	w.private, w.in = larger, larger[:n]
}

// Send sends three slices one after the other, and waits until the kernel has taken all.
// Any may be empty.
func (c *Conn) Send(t *task.Task, first, second, third []byte) error {
	left := parts{first, second, third}
	left.drop(0)
	if err := c.transmit(&left); err != nil || left.size() == 0 {
		return c.flushed(t, err)
	}
	// Whoever has given it may use its memory when we wait.
	l := c.loop
	whole := l.buffers.get(left.size())
	left = parts{left.gather(whole)}
	var err error
	for left.size() > 0 && err == nil {
		if err = c.await(t, poller.Writable); err == nil {
			err = c.transmit(&left)
		}
	}
	l.buffers.put(whole)
	err = c.flushed(t, err)
	c.end()
	return err
}

// flushed waits until the socket has taken what it was given, unless there is an error.
func (c *Conn) flushed(t *task.Task, err error) error {
	for s := c.Secure(); err == nil && s != nil && s.owes(); {
		if err = c.await(t, poller.Writable); err == nil {
			err = c.transmit(&parts{})
		}
	}
	return err
}

// SendSome waits until the kernel takes some of p, and returns how much.
func (c *Conn) SendSome(t *task.Task, p []byte) (n int, err error) {
	for n == 0 && err == nil {
		left := parts{p}
		if err = c.transmit(&left); err == nil && left.size() == len(p) {
			err = c.await(t, poller.Writable)
		}
		n = len(p) - left.size()
	}
	err = c.flushed(t, err)
	c.end()
	return n, err
}

// transmit sends once, and takes from the parts what the kernel has taken.
func (c *Conn) transmit(p *parts) error {
	if err := c.stopped(); err != nil {
		return err
	}
	if s := c.Secure(); s != nil {
		return c.encrypt(s, p)
	}
	var n int
	var errno unix.Errno
	switch {
	case len(p[0]) == 0:
		return nil
	case len(p[1]) == 0:
		n, errno = send(c.fd, p[0])
	default:
		n, errno = c.loop.vector.send(c.fd, p)
	}
	p.drop(n)
	c.sent(n)
	if p.size() > 0 {
		c.known &^= poller.Writable // it is told when there is room
	}
	if errno != 0 && errno != unix.EAGAIN {
		return os.NewSyscallError("send", errno)
	}
	return nil
}

// Taken says whether the peer has taken so many bytes since the last time that it had, of what
// it was sent before: a send may wait for long while that becomes less. The first time that a
// send waits it says so in any case, since nobody knows. Where none waits it says false.
func (c *Conn) Taken(least int) bool {
	w := c.work
	if w == nil || w.writer == nil {
		return false
	}
	now, errno := unsent(c.fd)
	if errno != 0 || w.unsent > 0 && int(w.unsent-now) < least {
		return false
	}
	w.unsent = now
	return true
}

func (c *Conn) received(n int) {
	if c.traffic != nil {
		c.loop.Counts.Add(c.traffic.Received, uint64(n))
	}
}

func (c *Conn) sent(n int) {
	if c.traffic != nil && n > 0 {
		c.loop.Counts.Add(c.traffic.Sent, uint64(n))
	}
}

// CloseWrite ends our direction. With TLS the peer is told so before (close_notify), and then
// by a FIN, when the socket has taken all: nothing is to be sent after either (RFC 8446 §6.1).
func (c *Conn) CloseWrite() error {
	if s := c.Secure(); s != nil {
		if err := s.conn.CloseWrite(); err != nil {
			return err
		}
		if s.owes() {
			s.ending = true
			return nil
		}
	}
	return os.NewSyscallError("shutdown", unix.Shutdown(int(c.fd), unix.SHUT_WR))
}

// ResetOnClose has Close tell the peer of a failure, not of a proper end (RFC 9293 §3.10.4).
func (c *Conn) ResetOnClose() {
	c.ending |= resets
	_ = unix.SetsockoptLinger(int(c.fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// Close closes the connection. Whoever waits for it is woken and fails with
// [net.ErrClosed]. Further calls do nothing. While a handshake is under way it is
// closed, and not Open any more, when that has ended.
func (c *Conn) Close() {
	if !c.Open() {
		return
	}
	if s := c.Secure(); s != nil {
		if s.shaking() {
			c.Interrupt(net.ErrClosed) // whoever waits for the handshake closes it
			return
		}
		if c.ending&resets == 0 && !s.owes() {
			_ = s.conn.CloseWrite() // nobody waits for it
		}
	}
	fd := c.fd
	c.loop.Remove(c.handle)
	c.leave(net.ErrClosed)
	closeFD(fd)
}

var errDetached = errors.New("the connection is not on the loop any more")

// Detach takes the connection from the loop: the descriptor is the caller's, and so are the
// bytes that were read and not consumed, in memory of their own.
func (c *Conn) Detach() (fd int, early []byte) {
	fd, early = int(c.fd), append([]byte(nil), c.Buffered()...)
	c.loop.Remove(c.handle)
	c.leave(errDetached)
	return fd, early
}

// Passed is a socket that a connection has given up and that stays on the loop: it is
// registered, and nobody's.
type Passed struct {
	FD     int
	Handle poller.Handle // 0: it is on no loop
	Events poller.Events // what the kernel has told, and no call has taken back
	Early  []byte        // what was read and not consumed, in memory of its own
	Secure *Secure       // nil: the bytes are on the socket as they are
	Resets *Resets       // of one of a pair of unix sockets; nil: it is none
}

// Resume takes over, as c, what another connection of the loop has passed on, or what is on no
// loop. With an error it is the caller's still.
func (l *Loop) Resume(c *Conn, p *Passed, owner Owner, traffic *Traffic) error {
	if p.Handle == 0 {
		if err := l.Adopt(c, p.FD, owner, traffic); err != nil {
			return err
		}
	} else {
		*c = Conn{loop: l, owner: owner, traffic: traffic, fd: int32(p.FD), handle: p.Handle, known: p.Events}
		c.index = l.place(c)
		l.Pass(p.Handle, l, c.index)
	}
	if p.Secure != nil {
		c.use(p.Secure)
		p.Secure.told(p.Events | poller.Readable)
	}
	c.Preload(p.Early)
	return nil
}

// PassOn is Detach for who goes on with the socket on the same loop: he gives it another
// owner ([poller.Loop.Pass]), or has it leave, before any other owner is called.
func (c *Conn) PassOn() Passed {
	p := Passed{FD: int(c.fd), Handle: c.handle, Events: c.known, Early: append([]byte(nil), c.Buffered()...), Secure: c.Secure()}
	c.leave(errDetached)
	return p
}

// Leave takes the socket from its loop.
func (p *Passed) Leave(l *Loop) {
	if p.Handle != 0 {
		l.Remove(p.Handle)
		p.Handle = 0
	}
}

// Close closes the socket.
func (p *Passed) Close(l *Loop) {
	p.Leave(l)
	closeFD(int32(p.FD))
}

// leave ends what c has to do with the loop. Whoever waits for it keeps its work until he
// has been told.
func (c *Conn) leave(err error) {
	l := c.loop
	l.Forget(&c.deadline)
	l.vacate(c.index)
	c.fd, c.owner, c.traffic = -1, nil, nil
	if err == errDetached {
		c.ending |= detached
	}
	if w := c.work; w != nil {
		c.forget()
		if w.err == nil {
			w.err = err
		}
		c.wake()
		c.end()
	}
}
