package tunnel

import (
	"sync"
	"sync/atomic"
	"time"
)

// routine is a tunnel that has a pair of goroutines.
type routine struct {
	set *Set

	// Set once.
	record   Record // without what changes: Ended, ToUp, ToDown, Reason
	limits   *Limits
	down, up *side
	toUp     direction
	toDown   direction

	running atomic.Int32 // directions whose goroutine has not ended; the last one ends the tunnel
	active  atomic.Int64 // the moment at which a byte was last passed on

	dates // guarded by the carrier's mutex, but for started

	mu       sync.Mutex // guards what follows, and the deadlines of both connections until the tunnel is cut
	reason   Reason     // Open until the tunnel is cut
	cutAt    time.Time
	lost     *side  // the side that was cut off from us, for reasons of that kind
	closed   Reason // who closed first, by a FIN; Open while nobody did
	finished int    // directions in which the FIN was passed on
}

func newRoutine(s *Set, a *arrival) *routine {
	t := &routine{
		set:    s,
		record: a.record(),
		limits: &a.Origin.Limits,
		down:   newSide(a.Down, DownstreamClosed, DownstreamReset),
		up:     newSide(a.Up, UpstreamClosed, UpstreamReset),
		dates:  dates{started: s.moment(a.started)},
	}
	t.down.resets, t.up.resets = a.Resets[down], a.Resets[up]
	t.toUp.init(t, t.down, t.up, a.DownEarly, s.metrics.toUpstream, a.Origin.UpBytes)
	t.toDown.head = len(a.Head)
	t.toDown.init(t, t.up, t.down, a.upEarly(), s.metrics.toDownstream, a.Origin.DownBytes)
	t.down.prepare(t.limits.KeepAlive)
	t.up.prepare(t.limits.KeepAlive)
	t.active.Store(int64(t.started))
	return t
}

// start begins to relay and returns at once.
func (t *routine) start() {
	t.running.Store(2)
	go t.toUp.run()
	go t.toDown.run()
}

// snapshot returns the record as it stands.
func (t *routine) snapshot() Record {
	r := t.record
	r.ToUp, r.ToDown = t.toUp.moved.Load(), t.toDown.moved.Load()
	r.Reason, _ = t.state()
	return r
}

// cut ends the tunnel for a reason; only the first call has an effect. lost is
// the side that can no longer be reached, for reasons of that kind.
//
// It returns at once: the directions are woken by their deadlines and end the
// tunnel as the reason asks for.
func (t *routine) cut(reason Reason, lost *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reason != Open {
		return
	}
	t.reason, t.lost, t.cutAt = reason, lost, time.Now()
	for _, d := range []*direction{&t.toUp, &t.toDown} {
		d.src.conn.SetReadDeadline(longAgo)
		d.dst.conn.SetWriteDeadline(t.writeBoundLocked())
	}
}

// abandon ends the tunnel without waiting for anybody. Its directions close it, since
// they know whether they hold something that is given up.
func (t *routine) abandon() {
	t.cut(Stopped, nil)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cutAt = longAgo
	for _, s := range []*side{t.down, t.up} {
		s.conn.SetDeadline(longAgo)
	}
}

// longAgo is a deadline that makes everything fail that would wait.
var longAgo = time.Unix(1, 0)

// state returns why the tunnel was cut, Open if it was not, and which side was
// lost. When it returns a reason, the cut is complete: nobody else touches the
// deadlines any more.
func (t *routine) state() (reason Reason, lost *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reason, t.lost
}

// endBound returns when a tunnel that was cut has to be gone.
func (t *routine) endBound() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.endBoundLocked()
}

func (t *routine) endBoundLocked() time.Time {
	if t.lost != nil {
		return t.cutAt.Add(t.set.bounds.flush)
	}
	return t.cutAt.Add(t.set.bounds.linger)
}

// writeBoundLocked returns until when a write in a tunnel that was cut may wait.
func (t *routine) writeBoundLocked() time.Time {
	bound, stalled := t.endBoundLocked(), time.Now().Add(t.set.bounds.stall)
	if stalled.Before(bound) {
		return stalled
	}
	return bound
}

// finRead notes that src has sent its FIN. It must be called before the FIN is
// passed on: the other side may answer with its own at once.
func (t *routine) finRead(src *side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed == Open {
		t.closed = src.closed
	}
}

// finPassedOn notes that a direction has ended by a FIN. The second one ends the
// tunnel, with the reason of the first.
func (t *routine) finPassedOn() {
	t.mu.Lock()
	t.finished++
	both, closed := t.finished == 2, t.closed
	t.mu.Unlock()
	if both {
		t.cut(closed, nil)
	}
}

// leave is called as each direction ends. The last one ends the tunnel.
func (t *routine) leave() {
	if t.running.Add(-1) > 0 {
		return
	}
	defer t.set.routines.remove(t)
	defer t.recoverPanic()
	reason, lost := t.state()
	for _, s := range []*side{t.down, t.up} {
		switch {
		case reason == Failed || s.truncated.Load():
			s.reset()
		case lost != nil && lost != s:
			s.waitSent(t.endBound(), t.set.bounds.stall)
			s.reset()
		default:
			s.close()
		}
	}
}

// recoverPanic, deferred, keeps a fault in one tunnel from ending all others.
func (t *routine) recoverPanic() {
	if p := recover(); p != nil {
		t.set.logPanic(p, t.record.Number, t.record.ID)
		t.cut(Failed, nil)
	}
}
