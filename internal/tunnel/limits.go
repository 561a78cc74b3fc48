package tunnel

import (
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"time"
)

// config is the patience with a connection that carries nothing.
func (k KeepAlive) config() net.KeepAliveConfig {
	if k == (KeepAlive{}) {
		k = DefaultKeepAlive
	}
	return net.KeepAliveConfig{Enable: true, Idle: k.Idle, Interval: k.Interval, Count: k.Count}
}

// spread is a span of time over which tunnels are closed.
type spread struct {
	from time.Time
	over time.Duration
}

// at returns a random moment of the span, shifted by delay.
func (p spread) at(delay time.Duration) time.Time {
	if p.over <= 0 {
		return p.from.Add(delay)
	}
	return p.from.Add(delay + rand.N(p.over))
}

// slots deals the span out to n tunnels: one moment in each of n equal parts,
// at a random place in it, in random order. So they are even and yet have no
// common beat.
func (p spread) slots(n int) func() time.Time {
	order := rand.Perm(n)
	next := 0
	return func() time.Time {
		part := spread{from: p.from, over: p.over / time.Duration(n)}
		at := part.at(p.over * time.Duration(order[next]) / time.Duration(n))
		next++
		return at
	}
}

// Drain begins to close the tunnels that have a DrainTimeout, with the reason
// [DrainLimit]: each one at the start of the drain + its DrainTimeout + its share
// of over, across which they are spread evenly with jitter. Tunnels that are
// started later take part. Others are left alone. A second call has no effect.
func (s *Set) Drain(over time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return
	}
	s.draining = true
	s.drainBy = spread{from: time.Now(), over: over}
	var limited []*tunnel
	for t := range s.live {
		if t.limits.DrainTimeout > 0 {
			limited = append(limited, t)
		}
	}
	slot := s.drainBy.slots(len(limited))
	for _, t := range limited {
		t.drainAt = slot().Add(t.limits.DrainTimeout)
		s.sweepByLocked(t.drainAt)
	}
}

// Undrain takes Drain back for the tunnels that have not been closed yet.
func (s *Set) Undrain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = false
	for t := range s.live {
		t.drainAt = time.Time{}
	}
}

// CloseAll closes all living tunnels, spread evenly with jitter over within, or
// at once if that is 0. A later call can only make it sooner. The connections are
// gone a few seconds after that at the latest; [Set.Empty] tells.
//
// [Stopped] is for good: tunnels that are started later are closed in the same
// way. With any other reason they are left alone.
func (s *Set) CloseAll(reason Reason, within time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	by := spread{from: time.Now(), over: within}
	if reason == Stopped && (!s.stopping || by.from.Add(by.over).Before(s.stopBy.from.Add(s.stopBy.over))) {
		s.stopping, s.stopBy = true, by
	}
	slot := by.slots(len(s.live))
	for t := range s.live {
		at := slot()
		if t.closeAt.IsZero() || at.Before(t.closeAt) {
			t.closeAt, t.closeReason = at, reason
		}
	}
	s.sweepLocked()
}

// Abandon closes the connections of all living tunnels, of which none is waited for
// any more: what the end of the process does, but so that each end is still reported.
// The reason of those that nothing has ended so far is [Stopped].
func (s *Set) Abandon() {
	s.mu.Lock()
	tunnels := slices.Collect(maps.Keys(s.live))
	s.mu.Unlock()
	for _, t := range tunnels {
		t.cut(Stopped, nil)
		t.down.conn.Close()
		t.up.conn.Close()
	}
}

// due returns when a tunnel has to be closed next, as far as is known now, and
// why; zero for never. The Set's mutex is held.
func (t *tunnel) due() (at time.Time, reason Reason) {
	sooner := func(candidate time.Time, r Reason) {
		if at.IsZero() || candidate.Before(at) {
			at, reason = candidate, r
		}
	}
	if t.limits.IdleTimeout > 0 {
		active := t.set.epoch.Add(time.Duration(t.active.Load()))
		sooner(active.Add(t.limits.IdleTimeout), IdleTimeout)
	}
	if t.limits.MaxAge > 0 {
		sooner(t.record.Started.Add(t.limits.MaxAge), MaxAge)
	}
	if !t.drainAt.IsZero() {
		sooner(t.drainAt, DrainLimit)
	}
	if !t.closeAt.IsZero() {
		sooner(t.closeAt, t.closeReason)
	}
	return at, reason
}

// sweepByLocked makes sure that a sweep runs at that time; zero is never. There
// is one timer for all tunnels, and none while no tunnel has anything due.
func (s *Set) sweepByLocked(at time.Time) {
	switch {
	case at.IsZero() || !s.sweepAt.IsZero() && !at.Before(s.sweepAt):
		return
	case s.sweeper == nil:
		s.sweeper = time.AfterFunc(time.Until(at), s.sweep)
	default:
		s.sweeper.Reset(time.Until(at))
	}
	s.sweepAt = at
}

// sweep closes what is due.
func (s *Set) sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweepLocked()
}

// sweepLocked closes what is due and sets the timer for what comes next, but no
// sooner than a while from now: tunnels are closed a little late rather than all
// of them looked at too often.
func (s *Set) sweepLocked() {
	now := time.Now()
	var next time.Time
	for t := range s.live {
		at, reason := t.due()
		switch {
		case at.IsZero():
		case !at.After(now):
			t.cut(reason, nil)
		case next.IsZero() || at.Before(next):
			next = at
		}
	}
	s.sweepAt = time.Time{}
	if soonest := now.Add(s.bounds.sweep); !next.IsZero() && next.Before(soonest) {
		next = soonest
	}
	s.sweepByLocked(next)
}
