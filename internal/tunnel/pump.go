package tunnel

import (
	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// What a flow may move before the others have their turn: a megabyte where the kernel
// only passes pages on, a quarter of that where every byte is copied.
const (
	turnBudget = 1 << 20
	copyCost   = 4
)

// bulkRead is how much one read must take so that the kernel is asked to pass pages on
// instead: two system calls more cost less than to copy so much twice.
const bulkRead = 16 << 10

// pump moves what a flow can move now. A flow that stops for any other reason than that
// its sender has nothing more or its receiver takes nothing more is called again: the
// kernel reports edges.
func (e *engine) pump(n uint32, t *slot, from int) {
	f := &t.flows[from]
	if f.turn != e.turn {
		f.turn, f.left = e.turn, turnBudget
	}
	if f.holds && f.phase != discarding && !e.flush(n, t, from) {
		return
	}
	switch f.phase {
	case relaying, delivering:
		e.relay(n, t, from)
	case closing:
		e.on(n, t, from, emptied)
	}
	if f.phase == discarding {
		e.discard(n, t, from)
	}
}

// spent says whether a flow has used up its turn. Then it has another one in the next.
func (e *engine) spent(t *slot, from int) bool {
	if t.flows[from].left > 0 {
		return false
	}
	e.loop.Again(t.sockets[from].handle)
	return true
}

// relay passes on what the sender has sent. On entry the flow holds nothing.
func (e *engine) relay(n uint32, t *slot, from int) {
	f, src, dst := &t.flows[from], &t.sockets[from], &t.sockets[1-from]
	begin := f.moved
	for src.readable && dst.writable && !f.holds && (f.phase == relaying || f.phase == delivering) {
		switch {
		case e.spent(t, from):
			return
		case t.foreign:
			e.copyForeign(n, t, from)
		case f.bulk && !src.urgent && !e.toMove(t):
			e.splice(n, t, from)
		case e.hasBuffers():
			e.copy(n, t, from)
		default:
			e.peek(n, t, from)
		}
	}
	f.bulk = f.bulk && f.moved-begin >= bulkRead
}

// hasBuffers says whether a read is safe: there is a buffer for it, and another one that
// takes its place should it have to stay with the flow. If somebody may go on after this
// process there is a third one: the two of them may stay with flows, one after a crash in
// the middle of a read, and without any buffer nothing can be relayed.
func (e *engine) hasBuffers() bool {
	if e.spare == nil {
		e.spare = e.store.Buffer()
	}
	if e.current == nil {
		e.current, e.spare = e.spare, e.store.Buffer()
	}
	return e.spare != nil && (e.courier.vault == nil || e.store.FreeBuffers() > 0)
}

// copy passes on what one read takes. What the receiver does not take stays in the
// buffer, and the buffer with the flow.
func (e *engine) copy(n uint32, t *slot, from int) {
	f, d, b := &t.flows[from], key(n, from), e.current
	p := b.Bytes[:e.origins.used[t.origin].read]
	b.Claim(d)
	got := e.receive(n, t, from, p, 0)
	if got == 0 {
		b.Release()
		return
	}
	b.Filled(got)
	if moved := e.give(n, t, from, p[:got]); moved < got {
		e.current, e.spare = e.spare, nil
		e.hold(f, d, held{buffer: b, from: moved, to: got})
		return
	}
	b.Release()
	e.store.Complete(d, got)
	f.bulk = got >= bulkRead && e.origins.used[t.origin].splice > 0
}

// peek passes on what one read takes without taking it away from the sender's socket
// before the receiver has it. So nothing has to be held.
func (e *engine) peek(n uint32, t *slot, from int) {
	d, b, src := key(n, from), e.current, &t.sockets[from]
	b.Claim(d)
	p := b.Bytes[:e.origins.used[t.origin].read]
	got := e.receive(n, t, from, p, unix.MSG_PEEK)
	if got == 0 {
		b.Release()
		return
	}
	moved := e.give(n, t, from, p[:got])
	src.readable = src.readable || moved < got
	for left := moved; left > 0; {
		taken, errno := recv(src.fd, p[:left], unix.MSG_TRUNC)
		if taken == 0 { // what was there a moment ago is not: never seen
			e.lose(n, t, from, errno)
			break
		}
		left -= taken
	}
	b.Release()
	e.store.Complete(d, moved)
}

// discard throws away what the sender sends until its FIN.
func (e *engine) discard(n uint32, t *slot, from int) {
	f, src := &t.flows[from], &t.sockets[from]
	for t.foreign && src.readable && f.phase == discarding && !e.spent(t, from) {
		f.left -= int32(e.receive(n, t, from, e.space(), 0))
	}
	if t.foreign {
		return
	}
	if e.current == nil {
		e.hasBuffers()
	}
	for src.readable && f.phase == discarding && !e.spent(t, from) {
		f.left -= int32(e.receive(n, t, from, e.current.Bytes, unix.MSG_TRUNC))
	}
}

// receive reads from the sender of a flow. 0: there is nothing now, or it has ended.
func (e *engine) receive(n uint32, t *slot, from int, p []byte, flags uintptr) int {
	src := &t.sockets[from]
	if src.secure {
		return e.decrypt(n, t, from, p)
	}
	got, errno := recv(src.fd, p, flags)
	if got == 0 {
		e.nothing(n, t, from, errno)
		return 0
	}
	t.flows[from].heard = true
	// A short read has taken all there was. What comes later is another edge, but for
	// a FIN or a reset that has been reported already.
	src.readable = got == len(p) || src.hup || src.urgent
	return got
}

// nothing is called when a sender gave nothing, for the reason of errno.
func (e *engine) nothing(n uint32, t *slot, from int, errno unix.Errno) {
	src := &t.sockets[from]
	src.readable = false
	switch {
	case errno == 0, src.broken:
		e.end(n, t, from)
	case errno != unix.EAGAIN:
		e.lose(n, t, from, errno)
	}
}

// give sends p to the receiver of a flow. Less than all: it is slow, or was lost.
func (e *engine) give(n uint32, t *slot, from int, p []byte) (taken int) {
	if t.sockets[1-from].secure {
		return e.encrypt(n, t, from, p)
	}
	taken, errno := send(t.sockets[1-from].fd, p)
	t.flows[from].left -= copyCost * int32(taken)
	e.gave(n, t, from, taken, len(p), errno)
	return taken
}

// gave counts what a receiver has taken.
func (e *engine) gave(n uint32, t *slot, from, taken, of int, errno unix.Errno) {
	if taken > 0 {
		own := t.flows[from].took(taken)
		t.active = e.now()
		e.origins.moved(t.origin, from, own)
		e.watchFlow(n, t, from)
	}
	if taken == of {
		return
	}
	t.sockets[1-from].writable = false
	if errno != 0 && errno != unix.EAGAIN {
		e.lose(n, t, 1-from, errno)
	}
}

// held is what a flow has taken from its sender and its receiver has not taken yet, in
// the order in which it goes out.
type held struct {
	early    []byte           // from before the tunnel began, or of a foreign one
	buffer   *inflight.Buffer // nil: none
	from, to int              // what of it is to be sent
	pipe     *inflight.LoopPipe
	left     int  // bytes in it
	private  bool // of a foreign tunnel
}

// hold keeps something for a flow.
func (e *engine) hold(f *flow, d inflight.Direction, h held) {
	f.holds = true
	e.held[d] = h
	if h.buffer != nil || h.private {
		e.holds.Add(1)
	}
}

// holdEarly keeps what was read before the tunnel began: where a successor finds it, if
// there is to be one and it fits.
func (e *engine) holdEarly(n uint32, t *slot, from int, p []byte) {
	if len(p) == 0 || e.deposits(t) && e.put(n, t, from, p) {
		return
	}
	if t.foreign {
		e.holdForeign(n, t, from, p)
		return
	}
	e.hold(&t.flows[from], key(n, from), held{early: p})
}

// put keeps bytes for a flow in a buffer. It returns false where there is no room.
func (e *engine) put(n uint32, t *slot, from int, p []byte) bool {
	if len(p) > inflight.BufferSize || !e.hasBuffers() {
		return false
	}
	d, b := key(n, from), e.spare
	e.spare = nil
	b.Claim(d)
	b.Filled(copy(b.Bytes, p))
	e.hold(&t.flows[from], d, held{buffer: b, to: len(p)})
	return true
}

// drop forgets what a flow holds: all of it was sent, or nobody will ever get it and its
// receiver was reset.
func (e *engine) drop(n uint32, t *slot, from int) {
	f, d := &t.flows[from], key(n, from)
	if !f.holds {
		return
	}
	h := e.held[d]
	delete(e.held, d)
	f.holds = false
	if h.buffer != nil {
		e.store.Free(h.buffer)
	}
	if h.buffer != nil || h.private {
		e.holds.Add(-1)
		e.tidySoon()
	}
	if h.pipe != nil {
		e.store.FreePipe(h.pipe)
	}
}

// flush sends what a flow holds. It returns false while something is left.
func (e *engine) flush(n uint32, t *slot, from int) bool {
	f, d, dst := &t.flows[from], key(n, from), &t.sockets[1-from]
	for dst.writable && f.phase != over && !e.spent(t, from) {
		if dst.secure && !e.sendOwed(n, t, 1-from) {
			return false
		}
		h := e.held[d]
		switch {
		case len(h.early) == 0 && h.private: // TLS was owed something
		case h.pipe != nil:
			h.left -= e.pour(n, t, from, h.pipe, min(h.left, int(f.left)))
		case h.buffer != nil:
			h.from += e.give(n, t, from, h.buffer.Bytes[h.from:h.to])
		default:
			h.early = h.early[e.give(n, t, from, h.early[:min(len(h.early), int(f.left))]):]
		}
		if len(h.early) == 0 && h.from == h.to && h.left == 0 && !(dst.secure && e.secure(n, 1-from).Owes()) {
			e.drop(n, t, from)
			if h.buffer != nil {
				e.store.Complete(d, h.to)
			}
			if t.custody == early {
				e.depositLate(n, t)
			}
			return true
		}
		e.held[d] = h
	}
	return false
}
