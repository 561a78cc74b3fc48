package tunnel

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

// bufferSize is what one read can take, and so the most that a direction holds.
const bufferSize = 32 << 10

// buffers is a pool of relay buffers that knows how many are out.
type buffers struct {
	pool sync.Pool // of *[bufferSize]byte
	out  atomic.Int64
}

func (b *buffers) get() *[bufferSize]byte {
	b.out.Add(1)
	if p, ok := b.pool.Get().(*[bufferSize]byte); ok {
		return p
	}
	return new([bufferSize]byte)
}

func (b *buffers) put(p *[bufferSize]byte) {
	b.out.Add(-1)
	b.pool.Put(p)
}

// direction carries the bytes from one side of a tunnel to the other, in a
// goroutine of its own, which owns all fields but moved, watched and silence.
//
// io.Copy would do the same with a pipe per idle direction: four descriptors
// more for each tunnel.
type direction struct {
	t        *routine
	src, dst *side
	early    []byte
	head     int // bytes of it that are not counted
	size     int // of a read
	moved    atomic.Uint64
	watched  atomic.Bool        // something may be on its way to dst
	total    *metrics.Counter   // of what moves this way in all tunnels
	shares   []*metrics.Counter // and in those of the same origin

	buf    *[bufferSize]byte // nil while nothing moves
	eof    bool              // src has sent its FIN
	gaveUp bool              // dst takes no more

	silence silence // of dst; the carrier's

	// For the calls through a RawConn: functions made once, which find what
	// they need and leave what they found here, so that no call allocates.
	tryRead, tryWrite func(fd uintptr) bool
	out               []byte // what tryWrite writes
	n                 int
	err               error
}

func (d *direction) init(t *routine, src, dst *side, early []byte, total *metrics.Counter, shares []*metrics.Counter) {
	d.t, d.src, d.dst, d.early, d.total, d.shares = t, src, dst, early, total, shares
	d.size = bufferSize
	if b := t.limits.Buffer; b > 0 && b < bufferSize {
		d.size = int(b)
	}
	d.tryRead, d.tryWrite = d.readFD, d.writeFD
}

// run is the goroutine of a direction.
func (d *direction) run() {
	defer d.t.leave()
	defer d.release()
	defer d.t.recoverPanic()
	d.relay()
	d.settle()
}

// relay carries bytes until src ends, dst takes no more or the tunnel is cut.
func (d *direction) relay() {
	early := d.early
	d.early = nil
	if !d.send(early) {
		return
	}
	for {
		p, err := d.receive()
		if !d.send(p) {
			return
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			d.finish()
			return
		case errors.Is(err, os.ErrDeadlineExceeded): // the tunnel was cut
			return
		default:
			d.lose(d.src, err)
			return
		}
	}
}

// lose cuts the tunnel because of an error of one side.
func (d *direction) lose(s *side, err error) { d.t.cut(s.why(err), s) }

// receive waits for bytes and returns them; they are valid until the next call.
// Where the connection allows, it waits without holding a buffer.
func (d *direction) receive() ([]byte, error) {
	if d.src.raw == nil {
		n, err := d.src.conn.Read(d.space())
		return d.buf[:n], err
	}
	if err := d.src.raw.Read(d.tryRead); err != nil {
		d.release()
		return nil, err
	}
	switch {
	case d.err != nil:
		return nil, d.err
	case d.n == 0:
		return nil, io.EOF
	}
	return d.buf[:d.n], nil
}

// readFD reads once and reports whether that was possible without waiting. Even
// after a read that took all there was, only EAGAIN ends in a wait: the poller
// reports edges, and the edge of what came meanwhile is forgotten when a new
// RawConn.Read begins.
func (d *direction) readFD(fd uintptr) bool {
	for {
		d.n, d.err = unix.Read(int(fd), d.space())
		switch d.err {
		case unix.EINTR:
		case unix.EAGAIN:
			d.release()
			return false
		default:
			return true
		}
	}
}

// space returns the buffer, from the pool if none is held.
func (d *direction) space() []byte {
	if d.buf == nil {
		d.buf = d.t.set.routines.pool.get()
	}
	return d.buf[:d.size]
}

// release gives the buffer back.
func (d *direction) release() {
	if d.buf != nil {
		d.t.set.routines.pool.put(d.buf)
		d.buf = nil
	}
}

// send passes p on and waits while dst is slow. It returns false when dst takes
// no more: because it was lost, or for too long after the tunnel was cut.
func (d *direction) send(p []byte) bool {
	p, err := d.sendQuickly(p)
	if err == nil && len(p) > 0 {
		err = d.sendSlowly(p)
	}
	if err == nil {
		return true
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		d.lose(d.dst, err)
	}
	d.gaveUp = true
	d.dst.truncated.Store(true)
	return false
}

// sendQuickly passes on what dst takes without waiting, and returns the rest.
func (d *direction) sendQuickly(p []byte) (rest []byte, err error) {
	if len(p) == 0 || d.dst.raw == nil {
		return p, nil
	}
	d.out, d.n, d.err = p, 0, nil
	err = d.dst.raw.Write(d.tryWrite)
	d.out = nil
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded): // of an earlier wait, in a tunnel that was cut
		return p, nil
	case err != nil:
		return p, err
	}
	return d.sent(p, d.n), d.err
}

// writeFD writes once. It never asks to be called again: waiting is sendSlowly's.
func (d *direction) writeFD(fd uintptr) bool {
	for {
		n, err := unix.Write(int(fd), d.out)
		switch err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		default:
			d.n, d.err = max(n, 0), err
		}
		return true
	}
}

// sendSlowly waits for dst until it has taken p. Only here a deadline is set:
// an idle or fast direction costs no timer.
func (d *direction) sendSlowly(p []byte) error {
	defer d.t.endWait(d.dst)
	for {
		d.t.boundWait(d.dst)
		n, err := d.dst.conn.Write(p)
		p = d.sent(p, n)
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		reason, _ := d.t.state()
		switch {
		case n > 0 && !d.t.overdue():
		case reason != Open:
			return err
		case d.src.broken():
			// src is not read meanwhile, so nothing else would tell. What
			// it sent before is still to be delivered, but not for ever.
			d.lose(d.src, d.src.pendingError())
		}
	}
}

// sent counts n bytes that dst took and returns the rest of p.
func (d *direction) sent(p []byte, n int) []byte {
	if n > 0 {
		own := n - min(n, d.head)
		d.head -= n - own
		d.moved.Add(uint64(own))
		d.total.Add(uint64(own))
		for _, c := range d.shares {
			c.Add(uint64(own))
		}
		d.t.active.Store(int64(d.t.set.now()))
		d.expectAnswer()
	}
	return p[n:]
}

// expectAnswer has dst watched: it has something to acknowledge.
func (d *direction) expectAnswer() {
	if d.dst.tcp != nil && !d.watched.Load() {
		d.watched.Store(true)
		d.t.set.routines.watchSoon()
	}
}

// boundWait sets the deadline of a write that waits. A connection that is not
// the kernel's gets one only when the tunnel was cut: TLS does not survive a
// write that timed out.
func (t *routine) boundWait(dst *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.reason != Open:
		dst.conn.SetWriteDeadline(t.writeBoundLocked())
	case dst.raw != nil:
		dst.conn.SetWriteDeadline(time.Now().Add(t.set.bounds.check))
	}
}

// endWait removes the deadline of boundWait.
func (t *routine) endWait(dst *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reason == Open && dst.raw != nil {
		dst.conn.SetWriteDeadline(time.Time{})
	}
}

// overdue says whether a tunnel that was cut has used up its time.
func (t *routine) overdue() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reason != Open && !time.Now().Before(t.endBoundLocked())
}

// finish passes the FIN of src on, and watches for src being reset after it.
func (d *direction) finish() {
	d.eof = true
	d.release()
	if d.src.broken() { // a reset whose error the other direction's write has taken
		d.lose(d.src, d.src.pendingError())
		return
	}
	d.t.finRead(d.src)
	halfClosed, err := d.dst.closeWrite()
	switch {
	case err != nil: // ENOTCONN: dst was lost at the same time
		d.lose(d.dst, errors.Join(err, d.dst.pendingError()))
		return
	case !halfClosed:
		d.t.cut(d.src.closed, nil)
		return
	}
	d.expectAnswer()
	d.t.finPassedOn()
	if d.src.waitBroken() {
		d.lose(d.src, d.src.pendingError())
	}
}

// settle ends the direction as the reason of the tunnel's end asks for.
func (d *direction) settle() {
	reason, lost := d.t.state()
	switch {
	case reason == Open || reason == Failed || d.gaveUp:
	case lost == d.dst: // nothing can be delivered
	case lost == d.src:
		d.deliverRest()
	default:
		if halfClosed, _ := d.dst.closeWrite(); !halfClosed {
			d.dst.conn.Close() // the only way to say that it is over
		}
		d.discardRest()
	}
}

// deliverRest sends what src had sent before it was lost: the kernel keeps that
// readable.
func (d *direction) deliverRest() {
	for !d.eof {
		d.src.conn.SetReadDeadline(time.Now().Add(d.t.set.bounds.stall))
		p, err := d.receive()
		if !d.send(p) || err != nil {
			return
		}
	}
}

// discardRest waits for the FIN of src. A connection that is closed with unread
// bytes resets its peer (RFC 1122 §4.2.2.13), which could discard what we sent to
// it last.
func (d *direction) discardRest() {
	d.src.conn.SetReadDeadline(d.t.endBound())
	for !d.eof {
		if _, err := d.receive(); err != nil {
			return
		}
	}
}
