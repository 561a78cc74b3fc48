package tunnel

import (
	"iter"
	"math/rand/v2"
	"time"
)

// Moments are durations since the Set's epoch, which is a little before the Set was
// made, so that 0 can be "never".

// spread is a span of time over which tunnels are closed.
type spread struct {
	from time.Duration // a moment
	over time.Duration
}

// at returns a random moment of the span, shifted by delay.
func (p spread) at(delay time.Duration) time.Duration {
	if p.over <= 0 {
		return p.from + delay
	}
	return p.from + delay + rand.N(p.over)
}

// slots deals the span out to n tunnels: one moment in each of n equal parts,
// at a random place in it, in random order. So they are even and yet have no
// common beat.
func (p spread) slots(n int) func() time.Duration {
	order := rand.Perm(n)
	next := 0
	return func() time.Duration {
		part := spread{from: p.from, over: p.over / time.Duration(n)}
		at := part.at(p.over * time.Duration(order[next]) / time.Duration(n))
		next++
		return at
	}
}

func (p spread) end() time.Duration { return p.from + p.over }

// dates say when a tunnel was started and when it has to be closed: moments, 0 for
// never.
type dates struct {
	started     time.Duration
	drainAt     time.Duration
	closeAt     time.Duration
	closeReason Reason // of closeAt
}

// due returns when a tunnel has to be closed next, as far as is known now, and why; 0
// for never. active is when a byte was last passed on.
func (d *dates) due(l *Limits, active time.Duration) (at time.Duration, reason Reason) {
	sooner := func(candidate time.Duration, r Reason) {
		if at == 0 || candidate < at {
			at, reason = candidate, r
		}
	}
	if l.IdleTimeout > 0 {
		sooner(active+l.IdleTimeout, IdleTimeout)
	}
	if l.MaxAge > 0 {
		sooner(d.started+l.MaxAge-d.share(l.MaxAge/10), MaxAge)
	}
	if d.drainAt > 0 {
		sooner(d.drainAt, DrainLimit)
	}
	if d.closeAt > 0 {
		sooner(d.closeAt, d.closeReason)
	}
	return at, reason
}

// share is a part of a span, at random but always the same of one tunnel in its Set: tunnels that
// were started together are not to end together.
func (d *dates) share(of time.Duration) time.Duration {
	n := uint64(d.started) * 0x9e3779b97f4a7c15 // moments differ in few bits (Fibonacci hashing)
	return time.Duration((n ^ n>>32) % uint64(of+1))
}

// slack is how much later than due a tunnel may be closed: one that waits long can wait
// a little longer, and its kind need not be looked at so often.
func (l *Limits) slack(r Reason) time.Duration {
	switch r {
	case IdleTimeout:
		return l.IdleTimeout / 64
	case MaxAge:
		return l.MaxAge / 64
	}
	return 0
}

// schedule is what a carrier was told about closing its tunnels.
type schedule struct {
	draining bool
	drainBy  spread
	stopping bool
	stopBy   spread
}

// join gives a tunnel that is started now its share.
func (s *schedule) join(d *dates, l *Limits) {
	if s.draining && l.DrainTimeout > 0 {
		d.drainAt = s.drainBy.at(l.DrainTimeout)
	}
	if s.stopping {
		d.closeAt, d.closeReason = s.stopBy.at(0), Stopped
	}
}

// scheduled are the tunnels of a carrier, as a schedule sees them.
type scheduled = iter.Seq2[*dates, *Limits]

// drain deals out the span to those tunnels that have a limit. A second drain has no
// effect.
func (s *schedule) drain(by spread, all scheduled) {
	if s.draining {
		return
	}
	s.draining, s.drainBy = true, by
	limited := 0
	for _, l := range all {
		if l.DrainTimeout > 0 {
			limited++
		}
	}
	slot := by.slots(limited)
	for d, l := range all {
		if l.DrainTimeout > 0 {
			d.drainAt = slot() + l.DrainTimeout
		}
	}
}

func (s *schedule) undrain(all scheduled) {
	s.draining = false
	for d := range all {
		d.drainAt = 0
	}
}

// closeAll deals out the span to all n tunnels. It can only make a close sooner, and
// [Stopped] is for good.
func (s *schedule) closeAll(reason Reason, by spread, n int, all scheduled) {
	if reason == Stopped && (!s.stopping || by.end() < s.stopBy.end()) {
		s.stopping, s.stopBy = true, by
	}
	slot := by.slots(n)
	for d := range all {
		d.condemn(slot(), reason)
	}
}

// sweeps decides when a carrier next looks for tunnels that have to be closed. There is
// one timer for all tunnels, and it is not set while no tunnel has anything due.
type sweeps struct {
	set      func(at time.Duration) // sets the carrier's timer
	at       time.Duration          // what it is set to; 0: not
	underWay bool
	next     time.Duration // the soonest that the sweep under way has seen; 0: nothing
}

// by makes sure that there is a sweep at that moment; 0 is never.
func (s *sweeps) by(at time.Duration) {
	switch {
	case at == 0:
	case s.underWay:
		s.seen(at)
	case s.at == 0 || at < s.at:
		s.at = at
		s.set(at)
	}
}

// begin starts a sweep.
func (s *sweeps) begin() { s.underWay, s.at, s.next = true, 0, 0 }

// seen takes what a tunnel has due later.
func (s *sweeps) seen(at time.Duration) {
	if s.next == 0 || at < s.next {
		s.next = at
	}
}

// end plans the next sweep, no sooner than a while from now: tunnels are closed a little
// late rather than all of them looked at too often.
func (s *sweeps) end(now, pause time.Duration) {
	s.underWay = false
	if s.next != 0 {
		s.by(max(s.next, now+pause))
	}
}
