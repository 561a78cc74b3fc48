package tunnel

import (
	"cmp"
	"log/slog"
	"slices"
	"sync"
	"time"

	"holdfast/internal/metrics"
)

// bounds are the waits of a tunnel that ends, and of one that stalls.
type bounds struct {
	linger time.Duration // for the peers' FINs, once we close a tunnel
	flush  time.Duration // to deliver what a lost side had sent
	stall  time.Duration // without progress in that
	check  time.Duration // between two looks for a sender's death while its receiver stalls
	sweep  time.Duration // least time between two sweeps
}

var defaultBounds = bounds{
	linger: 5 * time.Second,
	flush:  30 * time.Second,
	stall:  5 * time.Second,
	check:  10 * time.Second,
	sweep:  250 * time.Millisecond,
}

// Set holds the tunnels of one generation. Its methods may be called
// concurrently and never wait for a peer.
type Set struct {
	log     *slog.Logger
	onEnd   func(Record)
	epoch   time.Time
	bounds  bounds
	buffers buffers
	metrics setMetrics

	mu       sync.Mutex
	live     map[*tunnel]struct{}
	busy     int           // live tunnels, and those whose end is being reported
	started  uint64        // ever
	empty    chan struct{} // closed when busy becomes 0; nil while nobody asked
	draining bool
	drainBy  spread // when draining
	stopping bool
	stopBy   spread // when stopping
	sweeper  *time.Timer
	sweepAt  time.Time // when the sweeper fires; zero: not set
}

// Options are what a Set works with.
type Options struct {
	Log *slog.Logger

	// OnEnd is called once for each tunnel that has ended, after both
	// connections were closed and the tunnel has left the list; [Set.Empty]
	// waits for it. nil is allowed.
	OnEnd func(Record)

	Metrics *metrics.Registry // nil: nothing is counted
}

// NewSet returns an empty Set.
func NewSet(o Options) *Set {
	if o.OnEnd == nil {
		o.OnEnd = func(Record) {}
	}
	return &Set{
		log:     o.Log,
		onEnd:   o.OnEnd,
		epoch:   time.Now(),
		bounds:  defaultBounds,
		metrics: newSetMetrics(o.Metrics),
		live:    make(map[*tunnel]struct{}),
	}
}

// Start takes both connections over, begins to relay and returns at once. The
// caller must not use them any more; deadlines that it had set are removed. The
// tunnel is in the list when Start returns.
//
// A tunnel that is started while the Set drains or stops gets its share of that.
func (s *Set) Start(spec Spec) {
	if spec.Origin == nil {
		spec.Origin = new(Origin)
	}
	t := newTunnel(s, &spec)
	s.mu.Lock()
	s.started++
	t.record.Number = s.started
	s.live[t] = struct{}{}
	s.busy++
	if s.draining && t.limits.DrainTimeout > 0 {
		t.drainAt = s.drainBy.at(t.limits.DrainTimeout)
	}
	if s.stopping {
		t.closeAt, t.closeReason = s.stopBy.at(0), Stopped
	}
	due, _ := t.due()
	s.sweepByLocked(due)
	s.mu.Unlock()
	s.metrics.start()
	t.start()
}

// remove takes a tunnel that has ended out of the Set and reports it.
func (s *Set) remove(t *tunnel) {
	s.mu.Lock()
	delete(s.live, t)
	if len(s.live) == 0 && s.sweeper != nil {
		s.sweeper.Stop()
		s.sweepAt = time.Time{}
	}
	s.mu.Unlock()

	defer s.removed()
	defer t.recoverPanic() // of onEnd
	r := t.snapshot()
	r.Ended = time.Now()
	s.metrics.end(&r)
	s.onEnd(r)
}

func (s *Set) removed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if s.busy == 0 && s.empty != nil {
		close(s.empty)
		s.empty = nil
	}
}

// Empty returns a channel that is closed at the first moment from now on at
// which no tunnel is left and the last one was reported. A tunnel may be started
// after that: a caller that waits for the end must know that none is under way.
func (s *Set) Empty() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy == 0 {
		done := make(chan struct{})
		close(done)
		return done
	}
	if s.empty == nil {
		s.empty = make(chan struct{})
	}
	return s.empty
}

// List returns the records of the living tunnels, oldest first.
func (s *Set) List() []Record {
	s.mu.Lock()
	tunnels := make([]*tunnel, 0, len(s.live))
	for t := range s.live {
		tunnels = append(tunnels, t)
	}
	s.mu.Unlock()
	records := make([]Record, len(tunnels))
	for i, t := range tunnels {
		records[i] = t.snapshot()
	}
	slices.SortFunc(records, func(a, b Record) int { return cmp.Compare(a.Number, b.Number) })
	return records
}

// Summary returns how many tunnels live and when the oldest was started (zero
// for none).
func (s *Set) Summary() (count int, oldest time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.live {
		if oldest.IsZero() || t.record.Started.Before(oldest) {
			oldest = t.record.Started
		}
	}
	return len(s.live), oldest
}

// Total returns how many tunnels were ever started.
func (s *Set) Total() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.started
}

// Buffers returns how many relay buffers of 32 KiB are in use: one for each
// direction in which bytes move or wait for a slow receiver.
func (s *Set) Buffers() int { return int(s.buffers.out.Load()) }
