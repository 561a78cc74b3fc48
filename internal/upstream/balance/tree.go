package balance

import "sync"

// tree has the first of some hosts at its root, by a key: a tournament. One key changes in as
// many steps as the tree is high.
//
// The key is the load by weight, or nothing, and then the turn: a virtual time that moves on for a
// host by the inverse of its weight whenever it is chosen. So among hosts of the same load, and
// among all where loads do not count, choices are shared out by weight.
type tree struct {
	loads   bool // they count
	hosts   []*Host
	weights []int64

	mu      sync.Mutex
	keys    []key
	winners []uint32 // of each pair of nodes, the root's is the second; nodes from len(hosts) on are the hosts
	now     uint64   // the turn that was chosen last
}

// key is what one host has.
type key struct {
	load   float64
	turn   uint64 // wraps around: two are never as far apart as half of it
	stride uint64
}

// leaf is a host's place in a tree.
type leaf struct {
	tree  *tree
	index int
}

// wholeTurn divided by a weight in parts of unit is a stride.
const wholeTurn = 1 << 50

// newTree returns the order of a tier that goes on with the turns of the one before, if there was
// one. The lock of the balancer is held.
func newTree(t *tier, loads bool, before *tree) *tree {
	n := len(t.hosts)
	tr := &tree{loads: loads, hosts: t.hosts, weights: t.weights, keys: make([]key, n), winners: make([]uint32, n)}
	leaves := make([]leaf, n)
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if before != nil {
		before.mu.Lock()
		tr.now = before.now
	}
	for i, h := range tr.hosts {
		stride := uint64(wholeTurn / tr.weights[i])
		ahead := stride
		if h.turn != nil && h.turn.tree == before && before != nil {
			k := before.keys[h.turn.index]
			ahead = uint64(max(0, int64(k.turn-before.now)))
			if k.stride != stride {
				ahead = uint64(float64(ahead) * float64(stride) / float64(k.stride))
			}
		}
		tr.keys[i] = key{turn: tr.now + ahead, stride: stride}
	}
	if before != nil {
		before.mu.Unlock()
	}
	for i, h := range tr.hosts {
		leaves[i] = leaf{tr, i}
		h.turn = &leaves[i]
		if loads {
			h.leaf.Store(&leaves[i]) // whoever changes the load from now on waits for the lock
			tr.keys[i].load = tr.load(i)
		}
	}
	for p := n - 1; p >= 1; p-- {
		tr.winners[p] = tr.first(tr.winner(2*p), tr.winner(2*p+1))
	}
	return tr
}

// load is that of a host by its weight: the same for the same ratio.
func (t *tree) load(i int) float64 { return float64(t.hosts[i].Load()) / float64(t.weights[i]) }

// winner returns the first of all hosts below a node.
func (t *tree) winner(node int) uint32 {
	if n := len(t.hosts); node >= n {
		return uint32(node - n)
	}
	return t.winners[node]
}

func (t *tree) first(a, b uint32) uint32 {
	x, y := &t.keys[a], &t.keys[b]
	if y.load < x.load || y.load == x.load && int64(y.turn-x.turn) < 0 {
		return b
	}
	return a
}

// moved puts the tree in order after a key has changed. t.mu is held.
func (t *tree) moved(i int) {
	self := uint32(i)
	for p := (i + len(t.hosts)) / 2; p >= 1; p /= 2 {
		w := t.first(t.winner(2*p), t.winner(2*p+1))
		if w == t.winners[p] && w != self {
			return // it is no winner, and was none
		}
		t.winners[p] = w
	}
}

// weigh looks at the load of a host anew.
func (t *tree) weigh(i int) {
	t.mu.Lock()
	t.keys[i].load = t.load(i)
	t.moved(i)
	t.mu.Unlock()
}

// pick returns the first host, which is not that of its turn any more.
func (t *tree) pick(Query) *Host {
	t.mu.Lock()
	i := t.winner(1)
	k := &t.keys[i]
	if int64(k.turn-t.now) > 0 {
		t.now = k.turn
	}
	k.turn = t.now + k.stride
	t.moved(int(i))
	t.mu.Unlock()
	return t.hosts[i]
}
