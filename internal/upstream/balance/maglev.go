package balance

import (
	"cmp"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"

	"holdfast/internal/config"
)

// Seeds that keep what is chosen by one hash apart: the cluster of a split (which is not done
// here), the tier, and the host.
const (
	seedOfTier  = 0x8f2d6b1e5c3a4f97
	seedOfHost  = 0xd1b54a32d192ed03
	seedOfSkip  = 0x94d049bb133111eb
	seedOfOther = 0xbf58476d1ce4e5b9
)

// mix spreads a number over all uint64 (the finalizer of MurmurHash3).
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// hashKey is the hash of a host's name: the same in every process and build (FNV-1a, mixed).
func hashKey(key string, seed uint64) uint64 {
	h := uint64(14695981039346656037) ^ seed
	for i := range len(key) {
		h = (h ^ uint64(key[i])) * 1099511628211
	}
	return mix(h)
}

// rendezvous is less the more a host is the one for a hash, by weight.
func rendezvous(h *Host, hash uint64, weight int64) float64 {
	u := (float64(hashKey(h.Key, hash)>>11) + 0.5) / (1 << 53)
	return -math.Log(u) / float64(weight)
}

// table has a host for each number below its size (Maglev, Eisenbud et al. 2016, 3.4): each host
// takes, in turns by weight, the next free one of a permutation of its own. It has all members of
// a priority, well or not: that one is ill moves nothing but what it has.
type table struct {
	hosts   []*Host // in the order of their keys
	weights []int64
	places  []uint16 // indices of hosts
}

// mostInTable is how many hosts a table knows. Beyond, hosts get what has no hash alone.
const mostInTable = math.MaxUint16

func newTable(hosts []*Host, weights []int64, size int) *table {
	t := &table{hosts: hosts, weights: weights, places: make([]uint16, size)}
	const free = math.MaxUint16
	for i := range t.places {
		t.places[i] = free
	}
	n := uint64(size)
	next, skip := make([]uint64, len(hosts)), make([]uint64, len(hosts))
	scaled := make([]int64, len(hosts))
	for i, h := range hosts {
		next[i], skip[i] = hashKey(h.Key, seedOfHost)%n, hashKey(h.Key, seedOfSkip)%(n-1)+1
		scaled[i] = weights[i] * unit
	}
	var turns *tree // nil: all weights are the same
	if slices.Max(weights) > slices.Min(weights) {
		turns = newTurns(hosts, scaled)
	}
	for turn := range size {
		i := turn % len(hosts)
		if turns != nil {
			i = turns.next()
		}
		for t.places[next[i]] != free {
			if next[i] += skip[i]; next[i] >= n {
				next[i] -= n
			}
		}
		t.places[next[i]] = uint16(i)
	}
	return t
}

// newTurns returns a tree that nobody else has, which deals out turns by weight.
func newTurns(hosts []*Host, weights []int64) *tree {
	n := len(hosts)
	t := &tree{hosts: hosts, weights: weights, keys: make([]key, n), winners: make([]uint32, n)}
	for i, w := range weights {
		stride := uint64(wholeTurn / w)
		t.keys[i] = key{turn: stride, stride: stride}
	}
	for p := n - 1; p >= 1; p-- {
		t.winners[p] = t.first(t.winner(2*p), t.winner(2*p+1))
	}
	return t
}

// next returns the index of the host whose turn it is.
func (t *tree) next() int {
	i := int(t.winner(1))
	t.keys[i].turn += t.keys[i].stride
	t.moved(i)
	return i
}

// at returns the host of a hash.
func (t *table) at(hash uint64) *Host {
	i, _ := bits.Mul64(hash, uint64(len(t.places)))
	return t.hosts[t.places[i]]
}

// hashed chooses by the hash of a request, and at random where there is none.
type hashed struct {
	table *table // nil: not yet
	alias *alias
	tier  int32
}

// probes is how many places of the table are looked at for a host that may be chosen.
const probes = 8

func (o *hashed) pick(q Query) *Host {
	if !q.Hashed {
		return o.alias.hosts[o.alias.at(rand.Uint64())]
	}
	hash := mix(q.Hash ^ seedOfHost)
	if o.table != nil {
		for range probes {
			if h := o.table.at(hash); h.in.Load() == o.tier {
				return h
			}
			hash = mix(hash + seedOfOther)
		}
	}
	return o.alias.hosts[o.alias.at(mix(hash^seedOfOther))]
}

// Settle makes what takes time after the members have changed: tables of consistent hashing.
// Until then choices go by those of the members before. It may take some milliseconds: no lock
// should be held, and it is not for a loop.
func (b *Balancer) Settle() {
	if b.cfg.Policy != config.Maglev {
		return
	}
	b.building.Lock()
	defer b.building.Unlock()
	for {
		b.mu.Lock()
		version, was := b.version, b.tables
		members := slices.Clone(b.members)
		b.mu.Unlock()
		tables, changed := b.build(members, was)
		b.mu.Lock()
		if settled := b.version == version; settled {
			if changed {
				b.tables = tables
				b.renew()
			}
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
	}
}

// build returns the tables of members, those that there are where nothing has changed.
func (b *Balancer) build(members []Member, was map[int]*table) (tables map[int]*table, changed bool) {
	slices.SortFunc(members, func(a, b Member) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Key, b.Key))
	})
	groups, _ := group(members)
	tables = make(map[int]*table, len(groups))
	for _, g := range groups {
		var hosts []*Host
		var weights []int64
		for _, m := range g[:min(len(g), mostInTable)] {
			hosts, weights = append(hosts, m.Host), append(weights, m.Weight)
		}
		t := was[g[0].Priority]
		if t == nil || !slices.Equal(t.hosts, hosts) || !slices.Equal(t.weights, weights) {
			t, changed = newTable(hosts, weights, cmp.Or(b.cfg.TableSize, config.DefaultTableSize)), true
		}
		tables[g[0].Priority] = t
	}
	return tables, changed || len(tables) != len(was)
}
