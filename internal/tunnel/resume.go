package tunnel

import (
	"errors"

	"holdfast/internal/tunnel/inflight"
)

// Resume has tunnels of a process that is dead go on, on the loop with that place in
// [Options], the Store of which was reopened. They keep their numbers, places and
// deposits. One of which nobody can say where it was ends as [LostInCrash], and the one
// that two processes in a row have died of as [Quarantined].
//
// It is called for all tunnels of that process before any other is started, best in the
// order of their numbers, and after that [Set.Resumed] once.
func (s *Set) Resume(loop int, tunnels []Resumed) {
	e := s.engines[loop]
	for i := range tunnels {
		r := &tunnels[i]
		if r.Origin == nil {
			r.Origin = new(Origin)
		}
		s.numberedFrom(r.Number)
		s.enter()
		s.total.Add(1)
		s.metrics.resume()
		e.free.Add(-1)
		fds := [2]int32{int32(r.FDs[down]), int32(r.FDs[up])}
		e.first.CompareAndSwap(0, r.Started.UnixNano()) // it counts from now on
		if !e.loop.Post(func() { e.resume(r, fds) }) {
			e.forgo(r.Record, fds, Stopped)
		}
	}
}

// Resumed says that all tunnels were resumed that there are.
func (s *Set) Resumed() {
	for _, e := range s.engines {
		e.loop.Post(func() {
			e.store.Settled()
			e.absolver.Set(e.loop.Now().Add(s.bounds.absolve))
		})
	}
}

// numberedFrom has no tunnel that is started get a number up to this one.
func (s *Set) numberedFrom(number uint64) {
	for {
		last := s.numbers.Load()
		if number <= last || s.numbers.CompareAndSwap(last, number) {
			return
		}
	}
}

// resume has a tunnel go on at its old place.
func (e *engine) resume(r *Resumed, fds [2]int32) {
	n := r.Place.Slot
	if e.damaged {
		e.set.log.Error("a tunnel cannot be resumed: what was in flight is damaged", "tunnel", r.Number, "request_id", r.ID)
		e.dismiss(r.Record, fds, LostInCrash)
		e.publishOldest()
		return
	}
	if int(n) >= e.store.Directions()/2 || e.table.taken(n) {
		e.set.log.Error("a tunnel to be resumed has no place", "tunnel", r.Number, "request_id", r.ID, "slot", n)
		e.dismiss(r.Record, fds, LostInCrash)
		e.publishOldest()
		return
	}
	t := e.table.takeAt(n)
	defer e.finish(n, t)
	e.enter(n, t, &r.Record, fds)
	t.active = e.now()
	if e.courier.vault != nil {
		e.entrust(t, deposited)
	}
	e.table.setBase(n, base{taken: r.Place.Taken, given: r.Place.Given, moved: r.Place.Moved})
	e.schedule.join(&t.dates, e.limits(t))
	e.sentence(t, &r.Sentence)
	e.judge(t)
	if reason, err := e.recall(n, t); err != nil {
		e.set.log.Error("a tunnel cannot be resumed", "tunnel", t.number, "request_id", r.ID, "reason", reason, "err", err)
		e.forfeit(n, t, reason)
	}
}

var errSuspect = errors.New("two processes in a row have died while they worked on it")

// recall finds out where a tunnel was and has it go on from there. With an error it has
// to end for that reason.
func (e *engine) recall(n uint32, t *slot) (Reason, error) {
	if slot, number, ok := e.store.Suspect(); ok && slot == n && number == uint32(t.number) {
		return Quarantined, errSuspect
	}
	e.store.Enter(n, t.number)
	was, closed := e.marked(n)
	if was == Failed || was == LostInCrash || was == Quarantined {
		return was, errors.New("it was about to be cut")
	}
	rests, err := e.settle(n, t)
	if err != nil {
		return LostInCrash, err
	}
	if !e.register(n, t) {
		return Open, nil
	}
	t.closed = closed
	e.recallEnd(n, t, was)
	e.recallLosses(n, t, &rests)
	for from := range t.flows {
		e.watchFlow(n, t, from)
		e.pump(n, t, from)
	}
	return Open, nil
}

// settle finds out what is in flight of a tunnel, which it holds then.
func (e *engine) settle(n uint32, t *slot) (rests [2]inflight.Rest, err error) {
	b := e.table.base(n)
	var looks [2]inflight.Counters
	for i := range t.sockets {
		if err := adopt(int(t.sockets[i].fd)); err != nil {
			return rests, err
		}
		c, err := inflight.Look(int(t.sockets[i].fd))
		if err != nil {
			return rests, err
		}
		looks[i] = c.Since(b.taken[i], b.given[1-i])
	}
	for from := range t.flows {
		d := key(n, from)
		r, err := e.store.Settle(d, int(t.sockets[from].fd), looks[from], looks[1-from])
		if err != nil {
			return rests, err
		}
		rests[from] = r
		t.flows[from].moved = b.moved[from] + r.Given
		if r.Buffer != nil || r.Pipe != nil {
			e.hold(&t.flows[from], d, held{buffer: r.Buffer, from: r.From, to: r.To, pipe: r.Pipe, left: r.Piped})
		}
		e.set.metrics.found(&r)
	}
	return rests, nil
}

// recallEnd gives a tunnel the phases that it was in.
func (e *engine) recallEnd(n uint32, t *slot, was Reason) {
	ours := was != Open && !was.isLoss() // we were about to end it
	t.reason, t.cutAt = was, e.now()
	for from := range t.flows {
		f := &t.flows[from]
		switch {
		case e.store.Marks(key(n, from))&inflight.MarkFin != 0:
			sendFin(t.sockets[1-from].fd) // which changes nothing if it was sent
			t.sockets[1-from].finSent = true
			f.phase = discarding
			if !ours {
				f.phase, t.sockets[from].ended = finished, true
			}
		case ours:
			f.phase = closing
		}
	}
	if was == Open && t.flows[down].phase == finished && t.flows[up].phase == finished {
		e.cut(n, t, t.closed)
	}
}

// recallLosses has those sockets lost that were, or are now.
func (e *engine) recallLosses(n uint32, t *slot, rests *[2]inflight.Rest) {
	for i := range t.sockets {
		marked := e.store.Marks(key(n, i))&inflight.MarkLost != 0
		t.sockets[i].lost = marked && (t.reason == lostBy[i] || t.reason == DeadPeer)
		if marked || rests[i].Reset {
			e.fail(n, t, i)
		}
	}
	for from := range t.flows {
		if rests[from].Lost {
			reset(t.sockets[1-from].fd)
			e.fail(n, t, 1-from)
			e.store.Surrender(key(n, from))
		}
	}
}

// forfeit cuts a tunnel that is not to go on.
func (e *engine) forfeit(n uint32, t *slot, reason Reason) {
	t.reason = reason
	e.markReason(n, t)
	t.sockets[down].truncated, t.sockets[up].truncated = true, true
	e.release(n, t)
	for from := range t.flows {
		e.store.Surrender(key(n, from))
	}
}

// Marks of a tunnel in the store, besides those that package inflight knows: why it ends
// with one flow, and who closed first with the other.

const ownMarks = 1<<6 - 1

var _ [ownMarks - numReasons]struct{}

func (e *engine) markReason(n uint32, t *slot) { e.store.Mark(key(n, down), uint8(t.reason)) }
func (e *engine) markClosed(n uint32, t *slot) { e.store.Mark(key(n, up), uint8(t.closed)) }

// marked returns the reason and who closed first, as a predecessor has marked them.
func (e *engine) marked(n uint32) (reason, closed Reason) {
	reason = Reason(e.store.Marks(key(n, down)) & ownMarks)
	closed = Reason(e.store.Marks(key(n, up)) & ownMarks)
	return reason, closed
}
