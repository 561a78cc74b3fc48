// Package balance chooses the host of a cluster that gets the next request or tunnel.
//
//	b := balance.New(&cfg.Balancing, balance.Options{})
//	b.Set(members) // whenever they, or what is known of them, changes
//	b.Settle()     // when the members themselves have changed
//	h := b.Pick(query)
//	h.Add(1)
//
// What the members are is a snapshot: whoever chooses reads it without waiting for those who
// replace it. Only the policies that go by an order (turns by weight, the least load) keep that
// order under a lock, for as long as it takes to walk from a leaf of a tree to its root.
package balance

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
)

// Host is what can be chosen: an endpoint. It must not be copied, and is a member of one
// [Balancer] at most. Its methods may be called by any goroutine, and do not wait for long.
type Host struct {
	// Key names the host in the same way in every generation: consistent hashing goes by it.
	Key string

	// Of is its owner's own.
	Of any

	here      atomic.Int64
	elsewhere atomic.Int64
	leaf      atomic.Pointer[leaf] // where its load is looked at; nil: nowhere
	in        atomic.Int32         // the tier in which it may be chosen, counted from 1; 0: in none

	// Owned by the lock of the balancer.
	marked bool
	turn   *leaf // its last place in a tree
}

// Add counts requests and tunnels that have come to the host, or with a negative n gone.
func (h *Host) Add(n int64) {
	h.here.Add(n)
	h.changed()
}

// SetElsewhere says how many requests and tunnels other generations have with the host.
func (h *Host) SetElsewhere(n int64) {
	if h.elsewhere.Swap(n) != n {
		h.changed()
	}
}

// changed tells whoever looks at the load.
func (h *Host) changed() {
	if l := h.leaf.Load(); l != nil {
		l.tree.weigh(l.index)
	}
}

// Here is how many requests and tunnels this generation has with the host, those that it is
// just connected to for included.
func (h *Host) Here() int64 { return h.here.Load() }

// Load is how many requests and tunnels there are with the host, in all generations.
func (h *Host) Load() int64 { return h.here.Load() + h.elsewhere.Load() }

// Member is a host as a cluster has it at the moment.
type Member struct {
	*Host
	Weight   int64 // from 1 to [config.MostEndpointWeight], or what is nearest to it
	Priority int   // 0 comes first
	Healthy  bool

	// Since is when the host came, or got well again, for slow start; zero: long ago.
	Since time.Time
}

// Query is what a choice may depend on.
type Query struct {
	Hash   uint64
	Hashed bool // there is a hash
}

// Options are what a balancer may have besides its configuration.
type Options struct {
	PanicBelow *dynamic.Value   // the threshold, as it holds; nil: as configured
	Panics     *metrics.Counter // of choices among all members of a tier; nil: they are not counted
}

// Balancer chooses among the members of one cluster. Its methods may be called by any
// goroutine, and but for Settle do not wait for each other for long.
type Balancer struct {
	cfg config.Balancing
	Options
	now atomic.Pointer[snapshot]

	building sync.Mutex // of tables, by one at a time; taken before mu

	mu      sync.Mutex             // of changes, not of choices
	members []Member               // by priority
	version int                    // of them
	turns   map[int]*atomic.Uint64 // of even turns, by priority
	tables  map[int]*table         // of maglev, by priority
}

// New returns a balancer without members.
func New(cfg *config.Balancing, o Options) *Balancer {
	b := &Balancer{cfg: *cfg, Options: o, turns: make(map[int]*atomic.Uint64), tables: make(map[int]*table)}
	if b.PanicBelow == nil {
		b.PanicBelow = dynamic.Fixed(cfg.PanicBelow.Value)
	}
	return b
}

// Set replaces the members: nothing is chosen from then on that may not be. The balancer keeps
// nothing of the slice.
func (b *Balancer) Set(members []Member) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members = append(b.members[:0:0], members...)
	for i := range b.members {
		m := &b.members[i]
		m.Weight = min(max(m.Weight, 1), config.MostEndpointWeight)
	}
	slices.SortStableFunc(b.members, func(a, b Member) int { return cmp.Compare(a.Priority, b.Priority) })
	b.version++
	b.renew()
}

// Pick returns the host for a request; nil: there is none. Who counts the load that comes of it
// does so at once: of two that choose at the same time, one may not know of the other's.
func (b *Balancer) Pick(q Query) *Host {
	s := b.now.Load()
	if s == nil {
		return nil
	}
	if s.isStale(b) {
		s = b.refresh(s)
	}
	t := s.choose(q)
	if t == nil {
		return nil
	}
	if t.panics {
		b.Panics.Inc()
	}
	return t.order.pick(q)
}

// Other returns the host for a request that has tried some: of those that may be chosen one of
// the least rank, among these one of the first tier, and among these the one that the policy
// has next. None of a negative rank is returned; nil: there is no other.
func (b *Balancer) Other(q Query, rank func(*Host) int) (chosen *Host) {
	s := b.now.Load()
	if s == nil {
		return nil
	}
	byLoad := b.cfg.Policy == config.LeastConnections || b.cfg.Policy == config.PowerOfTwo
	if byLoad || !q.Hashed {
		q.Hash = rand.Uint64()
	}
	var least int
	var best, bestTie float64
	for i := range s.tiers {
		t := &s.tiers[i]
		inTier := false // chosen is of this one
		for j, h := range t.hosts {
			r := rank(h)
			if r < 0 || chosen != nil && (r > least || r == least && !inTier) {
				continue
			}
			tie := rendezvous(h, q.Hash, t.weights[j])
			score := tie
			if byLoad {
				score = float64(h.Load()) / float64(t.weights[j])
			}
			if chosen == nil || r < least || score < best || score == best && tie < bestTie {
				chosen, inTier, least, best, bestTie = h, true, r, score, tie
			}
		}
	}
	return chosen
}

// refresh replaces a snapshot that time or an override has made stale, unless somebody is about
// it.
func (b *Balancer) refresh(stale *snapshot) *snapshot {
	if b.mu.TryLock() {
		if b.now.Load() == stale {
			b.renew()
		}
		b.mu.Unlock()
	}
	return b.now.Load()
}
