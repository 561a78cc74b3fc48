package balance_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
	"holdfast/internal/upstream/balance"
)

var policies = []config.Policy{config.RoundRobin, config.LeastConnections, config.PowerOfTwo, config.Random, config.Maglev}

// cluster is a balancer with its members.
type cluster struct {
	*balance.Balancer
	members []balance.Member
}

func newCluster(cfg config.Balancing, weights ...int64) *cluster {
	c := &cluster{Balancer: balance.New(&cfg, balance.Options{})}
	for i, w := range weights {
		c.add(i, w, 0)
	}
	c.set()
	return c
}

func even(n int) []int64 { return slices.Repeat([]int64{1}, n) }

func (c *cluster) add(i int, weight int64, priority int) {
	h := &balance.Host{Key: fmt.Sprintf("10.0.%d.%d:80", i/256, i%256), Of: i}
	c.members = append(c.members, balance.Member{Host: h, Weight: weight, Priority: priority, Healthy: true})
}

func (c *cluster) set() {
	c.Set(c.members)
	c.Settle()
}

// number returns the index of a host.
func number(h *balance.Host) int {
	if h == nil {
		return -1
	}
	return h.Of.(int)
}

func hashOf(i int) balance.Query {
	return balance.Query{Hash: uint64(i+1) * 0x9e3779b97f4a7c15, Hashed: true}
}

// counts returns how often each member is chosen, of n times.
func (c *cluster) counts(n int, query func(int) balance.Query) []int {
	got := make([]int, len(c.members))
	for i := range n {
		got[number(c.Pick(query(i)))]++
	}
	return got
}

func without(int) balance.Query { return balance.Query{} }

func TestChoicesAreInProportionToWeights(t *testing.T) {
	t.Parallel()
	weights := []int64{1, 2, 3, 4, 10, 20}
	const n = 40_000
	for _, p := range policies {
		for name, query := range map[string]func(int) balance.Query{"without a hash": without, "with one": hashOf} {
			t.Run(p.String()+" "+name, func(t *testing.T) {
				t.Parallel()
				got := newCluster(config.Balancing{Policy: p}, weights...).counts(n, query)
				slack := 0.0
				switch {
				case p == config.Maglev && query(0).Hashed:
					slack = 0.02
				case p == config.PowerOfTwo || p == config.Random || p == config.Maglev:
					slack = 0.01
				}
				for i, w := range weights {
					share := float64(got[i]) / n
					if p == config.PowerOfTwo { // two are drawn by weight, and the first counts unless that is the same
						continue
					}
					if want := float64(w) / 40; math.Abs(share-want) > slack+1.0/n*2 {
						t.Errorf("weight %d has %.4f of all, want %.4f", w, share, want)
					}
				}
			})
		}
	}
}

// Turns by weight are spread over the time: nobody waits much longer than its share says.
func TestTurnsAreSpreadOverTime(t *testing.T) {
	t.Parallel()
	weights := []int64{5, 1, 1, 3}
	c := newCluster(config.Balancing{}, weights...)
	last := slices.Repeat([]int{0}, len(weights))
	for i := 1; i <= 1000; i++ {
		n := number(c.Pick(balance.Query{}))
		if gap := i - last[n]; gap > int(10/weights[n])+len(weights) {
			t.Errorf("the host of weight %d is chosen after %d others", weights[n], gap)
		}
		last[n] = i
	}
}

// A change of members, as there may be all the time, does not favour those who come first.
func TestTurnsGoOnWhenMembersChange(t *testing.T) {
	t.Parallel()
	for _, p := range []config.Policy{config.RoundRobin, config.LeastConnections} {
		for name, weights := range map[string][]int64{"even": even(5), "by weight": {2, 1, 1, 2, 1}} {
			c := newCluster(config.Balancing{Policy: p}, weights...)
			got := make([]int64, len(weights))
			var sum int64
			for _, w := range weights {
				sum += w
			}
			for range 100 * sum {
				got[number(c.Pick(balance.Query{}))]++
				c.set()
			}
			for i, w := range weights {
				if d := got[i] - 100*w; d < -1 || d > 1 {
					t.Errorf("%s, %s: %v", p, name, got)
					break
				}
			}
		}
	}
}

func TestTwoChoicesEvenOutWhatTheyLoad(t *testing.T) {
	t.Parallel()
	weights := []int64{1, 1, 2, 4, 2}
	c := newCluster(config.Balancing{Policy: config.PowerOfTwo}, weights...)
	const n = 10_000
	for range n {
		c.Pick(balance.Query{}).Add(1)
	}
	for i, m := range c.members {
		if want := n * weights[i] / 10; m.Load() < want*95/100 || m.Load() > want*105/100 {
			t.Errorf("weight %d has %d, want about %d", weights[i], m.Load(), want)
		}
	}
}

func TestTheLeastLoadIsChosen(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	c := newCluster(config.Balancing{Policy: config.LeastConnections}, 1, 2, 3, 1, 5, 7, 1)
	elsewhere := make([]int64, len(c.members))
	for step := range 20_000 {
		m := &c.members[r.IntN(len(c.members))]
		switch r.IntN(5) {
		case 0:
			if m.Here() > 0 {
				m.Add(-1)
			}
		case 1:
			elsewhere[number(m.Host)] = r.Int64N(20)
			m.SetElsewhere(elsewhere[number(m.Host)])
		case 2:
			if r.IntN(20) == 0 {
				m.Healthy = !m.Healthy
				c.set()
			}
		default:
			h := c.Pick(balance.Query{})
			load := func(m balance.Member) float64 {
				return float64(m.Here()+elsewhere[number(m.Host)]) / float64(m.Weight)
			}
			least, any := math.Inf(1), false
			for _, m := range c.members {
				if m.Healthy {
					least, any = min(least, load(m)), true
				}
			}
			if !any {
				if h != nil {
					t.Fatalf("step %d: %d is chosen, and nobody is healthy", step, number(h))
				}
				continue
			}
			chosen := c.members[number(h)]
			if got := load(chosen); !chosen.Healthy || got != least {
				t.Fatalf("step %d: host %d has %v, the least is %v", step, number(h), got, least)
			}
			h.Add(1)
		}
	}
}

func TestEqualLoadsTakeTurnsByWeight(t *testing.T) {
	t.Parallel()
	c := newCluster(config.Balancing{Policy: config.LeastConnections}, 1, 1, 2)
	got := c.counts(400, without) // each has ended before the next one comes
	if want := []int{100, 100, 200}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// After a failure of everything all clients come back at once, on several loops.
func TestAMassReconnectEndsEven(t *testing.T) {
	t.Parallel()
	const hosts, tunnels, loops = 10, 5000, 4
	tests := []struct {
		name             string
		before           int64 // what each has here, but for the last
		elsewhere        []int64
		restarted, leave bool
	}{
		{name: "all at once"},
		{name: "one has just restarted with nothing", before: 300, restarted: true},
		{name: "draining generations hold some", elsewhere: []int64{400, 0, 0, 300, 0, 0, 100, 0, 0, 200}},
		{name: "draining generations hold some and let go", elsewhere: []int64{400, 0, 0, 300, 0, 0, 100, 0, 0, 200}, leave: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(config.Balancing{Policy: config.LeastConnections}, even(hosts)...)
			for i, m := range c.members {
				if tt.elsewhere != nil {
					m.SetElsewhere(tt.elsewhere[i])
				}
				if !tt.restarted || i != hosts-1 {
					m.Add(tt.before)
				}
			}
			var left atomic.Int64
			left.Store(tunnels)
			for i := range c.members {
				left.Add(-c.members[i].Load())
			}
			var running sync.WaitGroup
			for range loops {
				running.Go(func() {
					for left.Add(-1) >= 0 {
						c.Pick(balance.Query{}).Add(1)
					}
				})
			}
			if tt.leave {
				for i := range c.members { // those come here in place of there
					n := tt.elsewhere[i]
					c.members[i].SetElsewhere(0)
					left.Add(n)
				}
			}
			running.Wait()
			for left.Add(-1) >= 0 {
				c.Pick(balance.Query{}).Add(1)
			}
			var most, sum int64
			for i, m := range c.members {
				n := m.Here()
				if tt.elsewhere != nil && !tt.leave {
					n += tt.elsewhere[i]
				}
				most, sum = max(most, n), sum+n
			}
			if ratio := float64(most) * hosts / float64(sum); ratio > 1.02 {
				t.Errorf("the most is %d of %d: %.3f of the mean", most, sum, ratio)
			}
		})
	}
}

// moved tells the share of hashes that have another host than before.
func moved(before, after []int) float64 {
	n := 0
	for i := range before {
		if before[i] != after[i] {
			n++
		}
	}
	return float64(n) / float64(len(before))
}

const keys = 20_000

func (c *cluster) homes() []int {
	homes := make([]int, keys)
	for i := range homes {
		homes[i] = number(c.Pick(hashOf(i)))
	}
	return homes
}

func TestMaglevMovesLittle(t *testing.T) {
	t.Parallel()
	for _, n := range []int{10, 100} {
		share := 1 / float64(n)
		c := newCluster(config.Balancing{Policy: config.Maglev}, even(n)...)
		all := c.homes()

		// A host that is ill gives up what it has, and nothing else moves.
		c.members[3].Healthy = false
		c.set()
		ill := c.homes()
		others := 0
		for i := range all {
			if all[i] == 3 && ill[i] == 3 {
				t.Fatalf("of %d: hash %d has the host that is ill", n, i)
			} else if all[i] != 3 && ill[i] != all[i] {
				others++
			}
		}
		if others > 0 {
			t.Errorf("of %d: %d hashes of others have moved", n, others)
		}
		c.members[3].Healthy = true
		c.set()
		if m := moved(all, c.homes()); m > 0 {
			t.Errorf("of %d: %.4f do not return to the host that is well again", n, m)
		}

		// One that leaves: its own, and a few.
		last := c.members[n-1]
		c.members = c.members[:n-1]
		c.set()
		gone := c.homes()
		if m := moved(all, gone); m < share/2 || m > share+0.01 {
			t.Errorf("of %d: %.4f move when one leaves", n, m)
		}
		c.members = append([]balance.Member{last}, c.members...) // the order means nothing
		c.set()
		if m := moved(all, c.homes()); m > 0 {
			t.Errorf("of %d: %.4f do not return to the host that is there again", n, m)
		}
		t.Logf("of %d: %.4f moved when one left", n, moved(all, gone))
	}
}

// Every generation and build has the same: these are numbers of the first one.
func TestMaglevIsTheSameEverywhere(t *testing.T) {
	t.Parallel()
	c := newCluster(config.Balancing{Policy: config.Maglev}, 1, 2, 3, 4, 5)
	var got []int
	for i := range 20 {
		got = append(got, number(c.Pick(hashOf(i))))
	}
	if want := []int{0, 3, 4, 4, 0, 3, 4, 3, 2, 4, 4, 4, 0, 1, 4, 2, 1, 3, 2, 0}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestBeforeTheTableIsBuiltNobodyIsChosenThatLeft(t *testing.T) {
	t.Parallel()
	c := newCluster(config.Balancing{Policy: config.Maglev}, even(5)...)
	c.Set(c.members[2:]) // without Settle
	for i := range 1000 {
		if n := number(c.Pick(hashOf(i))); n < 2 {
			t.Fatalf("hash %d has host %d, which has left", i, n)
		}
	}
	c = newCluster(config.Balancing{Policy: config.Maglev})
	c.add(0, 1, 0)
	c.Set(c.members)
	if c.Pick(hashOf(1)) == nil {
		t.Error("there is nobody before there is a table")
	}
}

func TestPriorities(t *testing.T) {
	t.Parallel()
	const off = 0
	tests := []struct {
		name    string
		below   int64    // panic threshold in percent
		healthy [][2]int // of each priority: healthy ones, all
		shares  []float64
		panics  bool
	}{
		{"all are well", 50, [][2]int{{10, 10}, {10, 10}}, []float64{1, 0}, false},
		{"enough are well", 50, [][2]int{{72, 100}, {10, 10}}, []float64{1, 0}, false},
		{"what the first cannot bear goes to the next", 50, [][2]int{{5, 10}, {10, 10}}, []float64{0.7, 0.3}, false},
		{"and to the one after that", 50, [][2]int{{2, 10}, {2, 10}, {10, 10}}, []float64{0.28, 0.28, 0.44}, false},
		{"the first is ill", 50, [][2]int{{0, 10}, {10, 10}}, []float64{0, 1}, false},
		{"few are well, but others can bear it: no panic", 50, [][2]int{{1, 10}, {10, 10}}, []float64{0.14, 0.86}, false},
		{"one priority and half", 50, [][2]int{{5, 10}}, []float64{1}, false},
		{"one priority and less than half", 50, [][2]int{{4, 10}}, []float64{1}, true},
		{"one priority and less than half, and no threshold", off, [][2]int{{4, 10}}, []float64{1}, false},
		{"nobody is well", 50, [][2]int{{0, 10}}, []float64{1}, true},
		{"nobody is well in two priorities", 50, [][2]int{{0, 10}, {0, 30}}, []float64{0.25, 0.75}, true},
		{"two that together bear too little", 20, [][2]int{{3, 10}, {2, 10}}, []float64{0.6, 0.4}, false},
		{"nobody is well, and no threshold", off, [][2]int{{0, 10}, {0, 10}}, nil, false},
	}
	for _, tt := range tests {
		for _, p := range policies {
			for name, query := range map[string]func(int) balance.Query{"": without, ", hashed": hashOf} {
				t.Run(tt.name+", "+p.String()+name, func(t *testing.T) {
					t.Parallel()
					var panics metrics.Counter
					cfg := config.Balancing{Policy: p, PanicBelow: config.Dynamic{Value: tt.below * dynamic.Whole / 100}}
					c := &cluster{Balancer: balance.New(&cfg, balance.Options{Panics: &panics})}
					for priority, h := range tt.healthy {
						for i := range h[1] {
							c.add(len(c.members), 1, priority)
							c.members[len(c.members)-1].Healthy = i < h[0]
						}
					}
					c.set()
					const n = 4000
					got, ill := make([]float64, len(tt.healthy)), 0
					for i := range n {
						h := c.Pick(query(i))
						if h == nil {
							if tt.shares != nil {
								t.Fatal("nobody is chosen")
							}
							return
						}
						m := c.members[number(h)]
						got[m.Priority] += 1.0 / n
						if !m.Healthy {
							ill++
						}
					}
					for i := range got {
						if i >= len(tt.shares) || math.Abs(got[i]-tt.shares[i]) > 0.03 {
							t.Errorf("shares %.3f, want %.3f", got, tt.shares)
							break
						}
					}
					if tt.panics != (ill > 0) || tt.panics != (panics.Value() == n) || !tt.panics && panics.Value() > 0 {
						t.Errorf("%d ill ones are chosen, %d of %d choices are counted as panic, want panic %v", ill, panics.Value(), n, tt.panics)
					}
				})
			}
		}
	}
}

func TestThePanicThresholdChangesAtRunTime(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	below := values.New("panic", dynamic.Percent, 0, 0, dynamic.Whole)
	b := balance.New(&config.Balancing{}, balance.Options{PanicBelow: below})
	h := &balance.Host{Key: "a"}
	b.Set([]balance.Member{{Host: h}})
	if b.Pick(balance.Query{}) != nil {
		t.Error("who is ill is chosen without a threshold")
	}
	values.Apply(map[string]float64{"panic": 50})
	if b.Pick(balance.Query{}) != h {
		t.Error("the threshold was overridden, and nobody knows")
	}
}

func TestOthersAreThoseThatWereNotTried(t *testing.T) {
	t.Parallel()
	for _, p := range policies {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			c := &cluster{Balancer: balance.New(&config.Balancing{Policy: p}, balance.Options{})}
			for i := range 6 {
				c.add(i, 1, i/4) // four and two
			}
			c.members[1].Healthy = false
			c.set()
			for i := range 100 {
				tried := map[int]int{}
				var order []int
				for {
					h := c.Other(hashOf(i), func(h *balance.Host) int { return -tried[number(h)] })
					if h == nil {
						break
					}
					tried[number(h)]++
					order = append(order, number(h))
				}
				sorted := slices.Sorted(slices.Values(order))
				if !slices.Equal(sorted, []int{0, 2, 3, 4, 5}) || order[3] < 4 || order[4] < 4 {
					t.Fatalf("the others are %v", order)
				}
			}
			first := number(c.Other(hashOf(7), func(h *balance.Host) int { return number(h) % 3 }))
			if first != 0 && first != 3 {
				t.Errorf("%d comes before those of a lesser rank", first)
			}
			c.members[2].Add(1) // 0 and 3 have none
			for i := range 20 {
				n := number(c.Other(hashOf(i), func(h *balance.Host) int { return 0 }))
				if byLoad := p == config.LeastConnections || p == config.PowerOfTwo; byLoad && n == 2 {
					t.Error("the one with a load is the first of the others")
				}
			}
		})
	}
}

func TestMaglevHasTheSameOtherForTheSameHash(t *testing.T) {
	t.Parallel()
	c := newCluster(config.Balancing{Policy: config.Maglev}, even(10)...)
	got := make([]int, 10)
	for i := range 2000 {
		q := hashOf(i)
		tried := c.Pick(q)
		rank := func(h *balance.Host) int {
			if h == tried {
				return -1
			}
			return 0
		}
		first := c.Other(q, rank)
		if first != c.Other(q, rank) {
			t.Fatal("there are two")
		}
		got[number(first)]++
	}
	if slices.Min(got) < 120 || slices.Max(got) > 280 {
		t.Errorf("the others are uneven: %v", got)
	}
}

func TestSlowStart(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		slow   config.SlowStart
		after  time.Duration
		weight float64 // of the one that is new, in parts of its own
	}{
		{"it begins with the least", config.SlowStart{Window: 100 * time.Second, Aggression: 1, LeastWeight: dynamic.Whole / 10}, 0, 0.1},
		{"half of the time", config.SlowStart{Window: 100 * time.Second, Aggression: 1, LeastWeight: dynamic.Whole / 10}, 50 * time.Second, 0.5},
		{"fast at first", config.SlowStart{Window: 100 * time.Second, Aggression: 2, LeastWeight: dynamic.Whole / 10}, 25 * time.Second, 0.5},
		{"fast at last", config.SlowStart{Window: 100 * time.Second, Aggression: 0.5, LeastWeight: dynamic.Whole / 100}, 50 * time.Second, 0.25},
		{"it is over", config.SlowStart{Window: 100 * time.Second, Aggression: 1, LeastWeight: dynamic.Whole / 10}, 100 * time.Second, 1},
	}
	for _, tt := range tests {
		for _, p := range []config.Policy{config.RoundRobin, config.LeastConnections, config.PowerOfTwo} {
			t.Run(tt.name+", "+p.String(), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					c := newCluster(config.Balancing{Policy: p, SlowStart: &tt.slow}, even(5)...)
					c.members[4].Since = time.Now()
					c.set()
					for range 100 { // as there are requests all the time
						time.Sleep(tt.after / 100)
						c.Pick(balance.Query{})
					}
					const n = 8000
					got := make([]float64, 5)
					for range n {
						h := c.Pick(balance.Query{})
						h.Add(1)
						got[number(h)] += 1.0 / n
					}
					if want := tt.weight / (4 + tt.weight); math.Abs(got[4]-want) > 0.03 {
						t.Errorf("it gets %.3f of all, want %.3f", got[4], want)
					}
				})
			})
		}
	}
}

// Who chooses while members come, go, fall ill and get well meets nobody who was not one of
// those that may be chosen at some time since it began.
func TestMembersChangeUnderWhoChooses(t *testing.T) {
	t.Parallel()
	for _, p := range policies {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			cfg := config.Balancing{Policy: p, PanicBelow: config.Dynamic{Value: dynamic.Whole / 2}, TableSize: 1009, SlowStart: &config.SlowStart{Window: time.Minute, Aggression: 1, LeastWeight: 1}}
			c := newCluster(cfg, even(20)...)
			var may [20]atomic.Int64 // 1: it may be chosen
			var version atomic.Int64 // odd while they change
			for i := range may {
				may[i].Store(1)
			}
			done := make(chan struct{})
			var running sync.WaitGroup
			for range 3 {
				running.Go(func() {
					for i := 0; ; i++ {
						select {
						case <-done:
							return
						default:
						}
						q := hashOf(i)
						q.Hashed = i%2 == 0
						before := version.Load()
						h := c.Pick(q)
						if h == nil {
							t.Error("there is nobody")
							return
						}
						h.Add(1)
						if n := number(h); before%2 == 0 && may[n].Load() == 0 && version.Load() == before {
							t.Errorf("%d is chosen, which may not be", n)
						}
						h.Add(-1)
					}
				})
			}
			r := rand.New(rand.NewPCG(3, uint64(p)))
			for range 300 {
				var members []balance.Member
				var left []int
				for _, m := range c.members {
					m.Weight = 1 + r.Int64N(3)
					if r.IntN(3) == 0 {
						m.Since = time.Now()
					}
					if number(m.Host) == 0 || r.IntN(4) > 0 {
						members = append(members, m)
					} else {
						left = append(left, number(m.Host))
					}
				}
				version.Add(1)
				c.Set(members)
				for i := range may {
					may[i].Store(1)
				}
				for _, i := range left {
					may[i].Store(0)
				}
				version.Add(1)
				if r.IntN(3) == 0 {
					c.Settle()
				}
			}
			close(done)
			running.Wait()
			for _, m := range c.members {
				if m.Load() != 0 {
					t.Errorf("host %d has a load of %d", number(m.Host), m.Load())
				}
			}
		})
	}
}

func TestADecisionAllocatesNothing(t *testing.T) {
	for _, p := range policies {
		c := newCluster(config.Balancing{Policy: p}, even(1000)...)
		c.members[0].Weight = 2
		c.set()
		i := 0
		if n := testing.AllocsPerRun(1000, func() {
			i++
			h := c.Pick(hashOf(i))
			h.Add(1)
			h.Add(-1)
		}); n > 0 {
			t.Errorf("%s: %v", p, n)
		}
	}
}

// Whatever members a balancer gets, whoever it chooses may be chosen.
func FuzzSetAndPick(f *testing.F) {
	f.Add(byte(0), []byte("\x03abc\x00pq"))
	f.Add(byte(1), []byte("\x13\x21\x43+++---\x00ppp"))
	f.Add(byte(2), []byte("\xff\x80\x40s\x81pppp"))
	f.Add(byte(4), []byte("\x01\x02\x03\x04s\xc0pppsp"))
	f.Fuzz(func(t *testing.T, policy byte, ops []byte) {
		cfg := config.Balancing{Policy: policies[int(policy)%len(policies)], TableSize: 101, PanicBelow: config.Dynamic{Value: int64(policy) * 4000}}
		if policy > 127 {
			cfg.SlowStart = &config.SlowStart{Window: time.Minute, Aggression: 1, LeastWeight: dynamic.Whole / 10}
		}
		b := balance.New(&cfg, balance.Options{})
		var hosts [8]balance.Host
		for i := range hosts {
			hosts[i].Key, hosts[i].Of = string(rune('a'+i)), i
		}
		var members []balance.Member
		is := func(h *balance.Host) (m balance.Member, ok bool) {
			for _, m := range members {
				if m.Host == h {
					return m, true
				}
			}
			return m, false
		}
		for i, op := range ops {
			h := &hosts[op%8]
			switch op >> 5 {
			case 0, 1: // it comes, or changes
				members = slices.DeleteFunc(members, func(m balance.Member) bool { return m.Host == h })
				members = append(members, balance.Member{Host: h, Weight: int64(op) * int64(i), Priority: int(op>>3) % 3, Healthy: op%3 > 0})
				b.Set(members)
			case 2: // it goes
				members = slices.DeleteFunc(members, func(m balance.Member) bool { return m.Host == h })
				b.Set(members)
			case 3:
				h.Add(int64(op%4) + 1)
			case 4:
				h.SetElsewhere(int64(op))
			case 5:
				b.Settle()
			default:
				q := balance.Query{Hash: uint64(op) * uint64(i), Hashed: op&8 > 0}
				chosen := b.Pick(q)
				healthy := slices.ContainsFunc(members, func(m balance.Member) bool { return m.Healthy })
				if chosen == nil {
					if healthy || len(members) > 0 && cfg.PanicBelow.Value > 0 {
						t.Fatalf("op %d: nobody is chosen of %v", i, members)
					}
					continue
				}
				if m, ok := is(chosen); !ok || !m.Healthy && cfg.PanicBelow.Value == 0 {
					t.Fatalf("op %d: %v is chosen, which may not be", i, chosen.Of)
				}
				other := b.Other(q, func(h *balance.Host) int {
					if h == chosen {
						return -1
					}
					return 0
				})
				if other != nil {
					if _, ok := is(other); !ok || other == chosen {
						t.Fatalf("op %d: %v is the other of %v", i, other.Of, chosen.Of)
					}
				}
			}
		}
	})
}
