package tunnel

import (
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// phase is what a flow does.
type phase uint8

const (
	same       phase = iota // in the table: the flow goes on as it is
	relaying                // bytes are passed on, then a FIN
	finished                // the FIN was passed on
	closing                 // we end the tunnel: what is held is still passed on, then a FIN
	discarding              // our FIN went out; what the sender sends until its own is thrown away
	delivering              // the sender was lost: what it had sent is passed on, and no FIN
	over                    // nothing is left to do
	numPhases
)

// event is what happens to a flow.
type event uint8

const (
	ended   event = iota // the sender's FIN was read; of one that was lost, the last byte
	emptied              // nothing is held any more
	cut                  // the tunnel ends
	srcLost              // the sender was lost
	dstLost              // the receiver was lost
	givenUp              // the time that an end may take is used up
	numEvents
)

// transitions say what a flow does after an event.
//
// What a peer had sent before it was lost is delivered; what it was still to be sent
// cannot be. A tunnel that we close sends FINs and waits for those of the peers, since a
// connection that is closed with unread bytes resets its peer (RFC 1122 §4.2.2.13), which
// could discard what we sent to it last.
var transitions = [numPhases][numEvents]phase{
	relaying:   {ended: finished, cut: closing, srcLost: delivering, dstLost: over, givenUp: over},
	finished:   {cut: over, srcLost: over, dstLost: over, givenUp: over},
	closing:    {emptied: discarding, dstLost: discarding, givenUp: over},
	discarding: {ended: over, srcLost: over, givenUp: over},
	delivering: {ended: over, dstLost: over, givenUp: over},
	over:       {},
}

// The reasons that a socket gives.
var (
	closedBy = [2]Reason{down: DownstreamClosed, up: UpstreamClosed}
	lostBy   = [2]Reason{down: DownstreamReset, up: UpstreamReset}
)

// on brings a flow into its next phase.
func (e *engine) on(n uint32, t *slot, from int, ev event) {
	f := &t.flows[from]
	was := f.phase
	next := transitions[was][ev]
	if next == same {
		return
	}
	f.phase = next
	switch next {
	case finished, discarding:
		e.passFin(n, t, from)
	case over:
		if f.holds || ev == givenUp && was == delivering {
			t.sockets[1-from].truncated = true
		}
	}
}

// passFin sends a FIN to the receiver of a flow, once. The second FIN that was passed on
// ends the tunnel, with the reason of the first.
func (e *engine) passFin(n uint32, t *slot, from int) {
	to := &t.sockets[1-from]
	if !to.finSent {
		e.store.Mark(key(n, from), inflight.MarkFin)
		if errno := e.sendEnd(n, t, 1-from); errno != 0 { // ENOTCONN: it was lost at the same time
			e.fail(n, t, 1-from)
			return
		}
		to.finSent = true
		e.watchFlow(n, t, from)
	}
	if t.flows[down].phase == finished && t.flows[up].phase == finished {
		e.cut(n, t, t.closed)
	}
}

// end is called when a read returned 0: the sender has sent its FIN, or was lost before
// and has nothing more.
func (e *engine) end(n uint32, t *slot, from int) {
	s := &t.sockets[from]
	failed, hungUp := e.prober.isBroken(s.fd)
	if !s.broken && (failed || hungUp && !s.finSent && !s.local || e.givenUpByPeer(n, t, from)) {
		e.fail(n, t, from) // a reset whose error somebody has taken
	}
	if !s.broken {
		s.ended = true
		if t.closed == Open {
			t.closed = closedBy[from]
			e.markClosed(n, t)
		}
	}
	e.on(n, t, from, ended)
}

// fail is lose for the reason that the kernel holds.
func (e *engine) fail(n uint32, t *slot, i int) {
	e.store.Mark(key(n, i), inflight.MarkLost) // before nobody else can find it out
	e.lose(n, t, i, takeError(t.sockets[i].fd))
}

// lose notes that a socket can no longer reach its peer, and why. If nothing else has
// ended the tunnel so far, this does.
func (e *engine) lose(n uint32, t *slot, i int, errno unix.Errno) {
	s := &t.sockets[i]
	if s.broken {
		return
	}
	s.broken = true
	e.store.Mark(key(n, i), inflight.MarkLost)
	if t.reason == Open {
		t.reason, t.cutAt, s.lost = lostBy[i], e.now(), true
		if isDead(errno) {
			t.reason = DeadPeer
		}
		e.markReason(n, t)
	}
	e.on(n, t, i, srcLost)
	e.on(n, t, 1-i, dstLost)
	s.readable, s.hup = true, true // the kernel keeps what came before
	e.loop.Again(s.handle)
	e.loop.Again(t.sockets[1-i].handle) // from which nothing may have been read for a while
}

// cut ends a tunnel that nothing has ended so far: both FINs were passed on, or we close
// it.
func (e *engine) cut(n uint32, t *slot, reason Reason) {
	if t.reason != Open {
		return
	}
	t.reason, t.cutAt = reason, e.now()
	e.markReason(n, t)
	e.on(n, t, down, cut)
	e.on(n, t, up, cut)
}

// giveUp has an end done with that has taken long enough.
func (e *engine) giveUp(n uint32, t *slot) {
	t.sockets[down].finOwed, t.sockets[up].finOwed = false, false
	e.on(n, t, down, givenUp)
	e.on(n, t, up, givenUp)
}

// abort ends a tunnel in whose handling something went wrong.
func (e *engine) abort(n uint32, t *slot) {
	if t.reason == Open {
		t.reason = Failed
	}
	t.sockets[down].truncated, t.sockets[up].truncated = true, true
	if e.current != nil {
		e.current.Release() // which it may have claimed
	}
	e.forgetParting(n)
	e.release(n, t)
}

// endBound returns the moment at which an end has taken long enough, or does not move
// on; 0 if it does not end, or is past that.
func (e *engine) endBound(t *slot) time.Duration {
	if t.reason == Open || t.parting {
		return 0
	}
	b := &e.set.bounds
	at := t.cutAt + b.linger
	if t.sockets[down].lost || t.sockets[up].lost {
		at = t.cutAt + b.flush
	}
	for from := range t.flows {
		p := t.flows[from].phase
		if (p == closing || p == delivering) && !t.sockets[1-from].writable {
			at = min(at, max(t.cutAt, t.active)+b.stall)
		}
	}
	return at
}

// parting is a tunnel of which all that is left is that a peer acknowledges what it was
// sent: then it is reset, since the other one was lost. A reset discards what the kernel
// still holds.
type parting struct {
	slot   uint32
	socket int
	queue  backlog
	next   time.Duration // the moment of the next look
}

// backlog is a send queue of which it is waited that the peer acknowledges everything:
// nothing tells, so one looks, again and again after longer and longer pauses.
type backlog struct {
	left  int           // bytes at the last look
	since time.Duration // the moment since which they are so many
	pause time.Duration // before the next look
}

const (
	firstPause = time.Millisecond
	mostPause  = 100 * time.Millisecond
)

// done says whether the wait is over, with so many bytes left now: none, or as many as
// a stall ago.
func (b *backlog) done(left int, now, stall time.Duration) bool {
	switch {
	case left == 0:
		return true
	case b.pause == 0 || left != b.left:
		b.left, b.since = left, now
	case now-b.since >= stall:
		return true
	}
	b.pause = min(max(2*b.pause, firstPause), mostPause)
	return false
}

// part closes both sockets of a tunnel whose flows are over, as soon as may be.
func (e *engine) part(n uint32, t *slot) {
	t.parting = true
	for i := range t.sockets {
		s := &t.sockets[i]
		if !t.sockets[1-i].lost || s.broken || s.truncated {
			continue
		}
		if p := (parting{slot: n, socket: i}); !e.departed(&p, e.now()) {
			e.partings = append(e.partings, p)
			e.departAt(p.next)
			return
		}
	}
	e.release(n, t)
}

// depart looks at the send queues that are waited for.
func (e *engine) depart() {
	now := e.now()
	waiting := e.partings[:0]
	var next time.Duration
	for _, p := range e.partings {
		if p.next <= now && e.departed(&p, now) {
			e.release(p.slot, e.table.at(p.slot))
			continue
		}
		waiting = append(waiting, p)
		if next == 0 || p.next < next {
			next = p.next
		}
	}
	e.partings = waiting
	e.departing = 0
	if next != 0 {
		e.departAt(next)
	}
}

// departed says whether a peer need not be waited for any longer.
func (e *engine) departed(p *parting, now time.Duration) bool {
	t, b := e.table.at(p.slot), &e.set.bounds
	s := &t.sockets[p.socket]
	if s.broken || now >= t.cutAt+b.flush || p.queue.done(unacked(s.fd), now, b.stall) {
		return true
	}
	p.next = now + p.queue.pause
	return false
}

// departAt makes sure that there is a look at that moment.
func (e *engine) departAt(at time.Duration) {
	if e.departing == 0 || at < e.departing {
		e.departing = at
		e.departer.Set(e.set.epoch.Add(at))
	}
}

// forgetParting takes a tunnel out of those that are waited for.
func (e *engine) forgetParting(n uint32) {
	for i := range e.partings {
		if e.partings[i].slot == n {
			e.partings = append(e.partings[:i], e.partings[i+1:]...)
			return
		}
	}
}

// release closes both sockets, frees the slot and leaves the record to be reported.
func (e *engine) release(n uint32, t *slot) {
	e.close(n, t, down)
	e.close(n, t, up)
	for from := range t.flows {
		e.drop(n, t, from)
	}
	kept := t.custody == deposited
	r := e.vacate(n, t)
	r.Ended = time.Now()
	if kept {
		e.withdraw(n, r)
		return
	}
	e.ended = append(e.ended, r)
	e.freeSlot(n)
}

// vacate takes a tunnel out that holds nothing, and returns its last record. Its slot is
// still to be freed.
func (e *engine) vacate(n uint32, t *slot) Record {
	for from := range t.flows {
		e.unwatchFlow(&t.flows[from])
	}
	r := e.record(n, t)
	e.entrust(t, unattended)
	delete(e.mover.standing, t.number)
	delete(e.ids, n)
	e.leaveForeign(n, t)
	e.origins.release(t.origin)
	e.table.retire(n)
	e.publishOldest()
	e.set.live.Add(-1)
	return r
}

// freeSlot lets another tunnel have a slot.
func (e *engine) freeSlot(n uint32) {
	e.forget(n) // so that the store can give memory back
	if e.table.release(n) {
		e.tidySoon()
	}
	e.unreserve()
}

// forget has nothing of a slot's tunnel in the store any more.
func (e *engine) forget(n uint32) {
	for from := range 2 {
		e.store.Begin(key(n, from))
	}
}

// close ends a connection and gives its descriptor up. Others may have duplicates of it,
// so close alone would end nothing, and the registration would live on.
func (e *engine) close(n uint32, t *slot, i int) {
	s := &t.sockets[i]
	if s.handle != 0 {
		e.loop.Remove(s.handle)
	}
	switch {
	case s.truncated, s.broken, t.sockets[1-i].lost,
		s.finSent && !s.ended && unacked(s.fd) == 0: // it has all that we sent and does not stop
		e.tellReset(n, t, i)
		reset(s.fd)
	case !s.finSent || !s.ended: // or else both directions have ended
		hangUp(s.fd)
	}
	closeFD(s.fd)
}
