package balance

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
)

// overprovisioning is how much more of a tier's members there are thought to be than it needs:
// with 1.4, it has all of the traffic until less than 72 % of them are healthy.
const overprovisioning = 1.4

// An order chooses among the hosts of a tier, of which there is at least one.
type order interface{ pick(q Query) *Host }

// snapshot is what choices go by until it is replaced. But for the orders nobody changes it.
type snapshot struct {
	tiers      []tier    // those that have anybody who may be chosen, by priority
	shares     []uint64  // of evenly spread numbers: up to which one they are of the tier; 0: it gets none
	only       *tier     // which gets everything; nil: shares says who gets what
	panicBelow int64     // as it was when this was made
	until      time.Time // when weights are others; zero: they stay
}

// tier is the members of one priority.
type tier struct {
	priority int
	hosts    []*Host // those that may be chosen
	weights  []int64 // theirs, in parts of unit
	order    order
	panics   bool // too few are healthy: it is all of them
}

// isStale says whether the snapshot has to be made again.
func (s *snapshot) isStale(b *Balancer) bool {
	return b.PanicBelow.Load() != s.panicBelow || !s.until.IsZero() && !time.Now().Before(s.until)
}

// choose returns the tier for a request, nil: there is none.
func (s *snapshot) choose(q Query) *tier {
	if s.only != nil {
		return s.only
	}
	r := mix(q.Hash ^ seedOfTier)
	if !q.Hashed {
		r = rand.Uint64()
	}
	for i := range s.tiers {
		if r <= s.shares[i] && s.shares[i] > 0 {
			return &s.tiers[i]
		}
	}
	return nil
}

// health is what is known of the members of one priority.
type health struct {
	all, healthy int64   // the sum of weights
	share        float64 // of the traffic
	panics       bool
}

// spread says what share of the traffic goes to each tier, as Envoy does: each gets what its
// health allows, and what is over goes to the next. When all of them together cannot bear the
// traffic, one of which less than a share is healthy panics: all its members are used.
func spread(tiers []health, panicBelow float64) {
	const enough = 1 - 1e-9
	sum := 0.0
	for i := range tiers {
		sum += min(1, overprovisioning*float64(tiers[i].healthy)/float64(tiers[i].all))
	}
	sum = min(1, sum)
	all, every := int64(0), true
	for i := range tiers {
		t := &tiers[i]
		t.panics = sum < enough && float64(t.healthy)/float64(t.all) < panicBelow
		every = every && t.panics
		all += t.all
	}
	rest := 1.0
	for i := range tiers {
		t := &tiers[i]
		switch {
		case every: // nothing says that one is better than another
			t.share = float64(t.all) / float64(all)
		case sum > 0:
			t.share = min(rest, min(1, overprovisioning*float64(t.healthy)/float64(t.all))/sum)
			rest -= t.share
		}
	}
}

// renew makes the snapshot that follows from what is known. b.mu is held.
func (b *Balancer) renew() {
	was := b.now.Load()
	s := &snapshot{panicBelow: b.PanicBelow.Load()}
	groups, healths := group(b.members)
	spread(healths, float64(s.panicBelow)/dynamic.Whole)
	now := b.clock(b.members)
	before := 0.0
	for i, g := range groups {
		t := tier{priority: g[0].Priority, panics: healths[i].panics}
		for j := range g {
			m := &g[j]
			if !m.Healthy && !t.panics {
				continue
			}
			weight, until := b.effective(m, now)
			if !until.IsZero() && (s.until.IsZero() || until.Before(s.until)) {
				s.until = until
			}
			t.hosts = append(t.hosts, m.Host)
			t.weights = append(t.weights, weight)
		}
		if len(t.hosts) == 0 {
			continue
		}
		t.order = b.order(&t, was)
		before += healths[i].share
		s.tiers = append(s.tiers, t)
		s.shares = append(s.shares, part(before, healths[i].share))
	}
	if first := slices.IndexFunc(s.shares, func(share uint64) bool { return share > 0 }); first >= 0 && s.shares[first] == math.MaxUint64 {
		s.only = &s.tiers[first]
	}
	b.admit(was, s)
	b.now.Store(s)
}

// part is a tier's share as a bound of evenly spread numbers; sum is that of the tiers before, and
// its own.
func part(sum, share float64) uint64 {
	switch {
	case share <= 0:
		return 0
	case sum > 1-1e-9:
		return math.MaxUint64
	}
	return uint64(sum * (1 << 32) * (1 << 32))
}

// group returns the members of each priority, and what is known of them. They are sorted.
func group(members []Member) (groups [][]Member, healths []health) {
	for len(members) > 0 {
		n := 0
		var h health
		for n < len(members) && members[n].Priority == members[0].Priority {
			h.all += members[n].Weight
			if members[n].Healthy {
				h.healthy += members[n].Weight
			}
			n++
		}
		groups, healths = append(groups, members[:n]), append(healths, h)
		members = members[n:]
	}
	return groups, healths
}

// admit has the hosts know in which tier they may be chosen, before the snapshot is there for
// all. b.mu is held.
func (b *Balancer) admit(was, is *snapshot) {
	for i := range is.tiers {
		for _, h := range is.tiers[i].hosts {
			h.marked = true
			h.in.Store(int32(is.tiers[i].priority) + 1)
		}
	}
	if was != nil {
		for i := range was.tiers {
			for _, h := range was.tiers[i].hosts {
				if !h.marked {
					h.in.Store(0)
					h.leaf.Store(nil)
					h.turn = nil
				}
			}
		}
	}
	for i := range is.tiers {
		for _, h := range is.tiers[i].hosts {
			h.marked = false
		}
	}
}

// order returns what chooses in a tier. b.mu is held.
func (b *Balancer) order(t *tier, was *snapshot) order {
	switch b.cfg.Policy {
	case config.LeastConnections:
		return newTree(t, true, was.tree(t.priority))
	case config.PowerOfTwo:
		return &twoChoices{newAlias(t)}
	case config.Random:
		return newAlias(t)
	case config.Maglev:
		return &hashed{b.tables[t.priority], newAlias(t), int32(t.priority) + 1}
	}
	for _, w := range t.weights {
		if w != t.weights[0] {
			return newTree(t, false, was.tree(t.priority))
		}
	}
	turn := b.turns[t.priority]
	if turn == nil {
		turn = new(atomic.Uint64)
		b.turns[t.priority] = turn
	}
	return &rotation{turn, t.hosts}
}

// tree returns the order of a priority, if it is a tree; nil: it is none.
func (s *snapshot) tree(priority int) *tree {
	if s != nil {
		for i := range s.tiers {
			if s.tiers[i].priority == priority {
				t, _ := s.tiers[i].order.(*tree)
				return t
			}
		}
	}
	return nil
}

// rotation is turns where all weights are the same.
type rotation struct {
	next  *atomic.Uint64
	hosts []*Host
}

func (r *rotation) pick(Query) *Host {
	return r.hosts[(r.next.Add(1)-1)%uint64(len(r.hosts))]
}
