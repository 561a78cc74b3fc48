package tunnel

import (
	"iter"
	"time"
)

// A Verdict is what its user knows of the origins of tunnels that may end them: that they are to
// be closed, for as long as something holds. It applies to all tunnels of a Set, those that
// come later included.
type Verdict struct {
	// Of says why the tunnels of an origin are to be closed now: [EndpointRemoved] or
	// [EndpointUnhealthy]; [Open]: they are not. It is asked once for each origin that has
	// tunnels, and again after [Set.Reconsider]. Any goroutine may call it, and it does not
	// wait. nil: none is.
	Of func(*Origin) Reason

	// Over is the time across which tunnels are closed that are to be at the same time.
	Over time.Duration
}

func (v *Verdict) of(o *Origin) Reason {
	if v.Of == nil {
		return Open
	}
	return v.Of(o)
}

// Reconsider says that the [Verdict] of some origins may be another one now. The tunnels of
// those that have come to be closed are, spread evenly with jitter; of those that are not any
// more, what has not been closed by then lives on. Any goroutine may call it, and it does not
// wait.
func (s *Set) Reconsider() {
	if s.verdict.Of == nil {
		return
	}
	for _, c := range s.carriers {
		c.reconsider()
	}
}

// revocable says whether a close for that reason may be taken back.
func (r Reason) revocable() bool { return r == EndpointRemoved || r == EndpointUnhealthy }

// condemn has a tunnel closed at that moment at the latest, for good.
func (d *dates) condemn(at time.Duration, reason Reason) {
	switch {
	case d.closeAt == 0 || at < d.closeAt:
		d.closeAt, d.closeReason = at, reason
	case d.closeReason.revocable(): // which is no later
		d.closeReason = reason
	}
}

// judge applies a verdict to a tunnel. What is to be closed for good is no matter of it.
func (d *dates) judge(verdict Reason, at func() time.Duration) {
	switch {
	case d.closeAt != 0 && !d.closeReason.revocable():
	case verdict == Open:
		d.closeAt, d.closeReason = 0, Open
	case d.closeAt == 0:
		d.closeAt, d.closeReason = at(), verdict
	default: // it has its turn already
		d.closeReason = verdict
	}
}

// judged are the tunnels of a carrier, with the verdict of each.
type judged = iter.Seq2[*dates, Reason]

// judgeAll deals out the span to those tunnels that have come to be closed.
func judgeAll(by spread, all judged) {
	fresh := 0
	for d, verdict := range all {
		if d.closeAt == 0 && verdict != Open {
			fresh++
		}
	}
	slot := by.slots(fresh)
	for d, verdict := range all {
		d.judge(verdict, slot)
	}
}

// judge gives a tunnel that has come the verdict of its origin.
func (e *engine) judge(t *slot) {
	by := spread{from: e.now(), over: e.set.verdict.Over}
	t.judge(e.origins.used[t.origin].verdict, func() time.Duration { return by.at(0) })
}

// reconsider asks for the verdicts again. While that is to come it is not asked for twice.
func (e *engine) reconsider() {
	if !e.reconsidering.CompareAndSwap(false, true) {
		return
	}
	e.loop.Post(func() {
		e.reconsidering.Store(false)
		if !e.origins.reconsider() {
			return
		}
		judgeAll(spread{from: e.now(), over: e.set.verdict.Over}, func(yield func(*dates, Reason) bool) {
			for _, t := range e.table.all() {
				if !yield(&t.dates, e.origins.used[t.origin].verdict) {
					return
				}
			}
		})
		e.sweeps.by(e.now())
	})
}

// reconsider asks for the verdict of each origin. It returns whether one has changed.
func (o *origins) reconsider() (changed bool) {
	for n := range o.used {
		u := &o.used[n]
		if u.Origin == nil {
			continue
		}
		if v := o.verdict.of(u.Origin); v != u.verdict {
			u.verdict, changed = v, true
		}
	}
	return changed
}

func (c *routines) reconsider() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.live) == 0 {
		return
	}
	verdicts := make(map[*Origin]Reason)
	judgeAll(spread{from: c.set.now(), over: c.set.verdict.Over}, func(yield func(*dates, Reason) bool) {
		for t := range c.live {
			v, known := verdicts[t.record.Origin]
			if !known {
				v = c.set.verdict.of(t.record.Origin)
				verdicts[t.record.Origin] = v
			}
			if !yield(&t.dates, v) {
				return
			}
		}
	})
	c.sweepLocked()
}

// judgeLocked gives a tunnel that has come the verdict of its origin.
func (c *routines) judgeLocked(t *routine) {
	by := spread{from: c.set.now(), over: c.set.verdict.Over}
	t.judge(c.set.verdict.of(t.record.Origin), func() time.Duration { return by.at(0) })
}
