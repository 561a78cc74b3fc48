package upstream_test

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

// balanced is a cluster of n endpoints that nobody connects to.
func balanced(t *testing.T, n int, b config.Balancing, change func(*upstream.Options)) *upstream.Cluster {
	t.Helper()
	var addresses []string
	for i := range n {
		addresses = append(addresses, fmt.Sprintf("10.0.0.%d:80", i+1))
	}
	cfg := web(addresses...)
	cfg.Balancing = b
	o := upstream.Options{Config: &config.Config{Clusters: []config.Cluster{cfg}}, Network: new(fakeNetwork).network()}
	if change != nil {
		change(&o)
	}
	cs, err := upstream.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	c, _ := cs.Get("web")
	return c
}

func member(n int) upstream.Member {
	a := fmt.Sprintf("10.0.0.%d:80", n)
	return upstream.Member{Address: a, At: upstream.Place{Addr: netip.MustParseAddrPort(a)}}
}

func members(n int) (all []upstream.Member) {
	for i := range n {
		all = append(all, member(i+1))
	}
	return all
}

var half = config.Dynamic{Value: dynamic.Whole / 2}

func TestARequestTriesEveryEndpointOnceWhateverThePolicy(t *testing.T) {
	t.Parallel()
	for p := range config.Maglev + 1 {
		for name, ill := range map[string]int{"all are well": 0, "few are ill": 2, "so many are ill that all are used": 4} {
			t.Run(p.String()+", "+name, func(t *testing.T) {
				t.Parallel()
				c := balanced(t, 6, config.Balancing{Policy: p, PanicBelow: half}, nil)
				all := c.Members()
				for _, e := range all[:ill] {
					e.Mark(upstream.Ejected, true)
				}
				want := all[ill:]
				if ill == 4 {
					want = all
				}
				for i := range 50 {
					q := balance.Query{Hash: uint64(i) << 50, Hashed: i%2 == 0}
					round := c.Round(q)
					var tried []*upstream.Endpoint
					next := func() *upstream.Endpoint {
						e := round.Next()
						if e != nil {
							tried = append(tried, e)
						}
						return e
					}
					next()
					next()
					c.Again(&round, q) // what was not tried comes first
					for next() != nil {
					}
					first := tried[:len(want)]
					for _, e := range want {
						if !slices.Contains(first, e) || !slices.Contains(tried[2:], e) {
							t.Fatalf("%s is not tried in time: %v", e, tried)
						}
					}
					if len(tried) != len(want)+2 || tried[len(want)] != tried[0] || tried[len(want)+1] != tried[1] {
						t.Fatalf("a request tries %v", tried)
					}
				}
			})
		}
	}
}

func TestPanicUsesWhoIsIllAndNobodyWhoHasLeft(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	c := balanced(t, 4, config.Balancing{PanicBelow: half}, func(o *upstream.Options) { o.Metrics = r })
	all := c.Members()
	chosen := func() map[*upstream.Endpoint]bool {
		seen := map[*upstream.Endpoint]bool{}
		for range 12 {
			if round := c.Round(balance.Query{}); true {
				seen[round.Next()] = true
			}
		}
		return seen
	}
	for i, condition := range []upstream.Condition{upstream.Failing, upstream.Ejected, upstream.Unchecked} {
		all[i].Mark(condition, true)
		if want := []int{3, 2, 4}[i]; len(chosen()) != want {
			t.Errorf("%d are ill: %v are chosen, want %d", i+1, chosen(), want)
		}
	}
	c.SetMembers(members(3)) // the last one has left, and nobody is well
	if seen := chosen(); len(seen) != 3 || seen[all[3]] {
		t.Errorf("%v are chosen", seen)
	}
	panics := int64(-1)
	for _, f := range r.Families() {
		if f.Desc.Name == "holdfast_cluster_panic_total" {
			panics = f.Series[0].Value
		}
	}
	if panics != 24 {
		t.Errorf("%d choices are counted as panic, want 24", panics)
	}
}

func TestThePanicThresholdIsARuntimeValue(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	c := balanced(t, 2, config.Balancing{PanicBelow: config.Dynamic{Value: dynamic.Whole / 2, Key: "panic"}}, func(o *upstream.Options) { o.Values = &values })
	for _, e := range c.Members() {
		e.Mark(upstream.Failing, true)
	}
	round := c.Round(balance.Query{})
	if round.Next() == nil {
		t.Error("there is nobody in a panic")
	}
	values.Apply(map[string]float64{"panic": 0})
	round = c.Round(balance.Query{})
	if e := round.Next(); e != nil {
		t.Errorf("%s is chosen without a threshold", e)
	}
}

// Tunnels that are with an endpoint count, whoever has them.
func TestLeastConnectionsCountsTunnelsHereAndElsewhere(t *testing.T) {
	t.Parallel()
	var cs *upstream.Clusters
	cfg := web("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80")
	cfg.Balancing.Policy = config.LeastConnections
	cs, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{cfg}}, Network: new(fakeNetwork).network()})
	if err != nil {
		t.Fatal(err)
	}
	c, _ := cs.Get("web")
	all := c.Members()
	adopted := cs.Tunnels("web", all[0].Address, all[0].Addr)
	adopted.Count(2)
	all[1].Tunnels.Count(1)
	for range 5 {
		round := c.Round(balance.Query{})
		if e := round.Next(); e != all[2] {
			t.Errorf("%s is chosen, want the one without tunnels", e)
		}
	}
	all[2].Tunnels.Count(3)
	adopted.Count(-2)
	round := c.Round(balance.Query{})
	if e := round.Next(); e != all[0] {
		t.Errorf("%s is chosen, want the one whose tunnels have ended", e)
	}
}

// One endpoint after the other is replaced, and clients come back as soon as their tunnel has
// ended: no endpoint ever has more than what those that are there have to bear. When all come
// back at once after that, they are spread evenly, the one that was replaced last included.
func TestTunnelsStayEvenWhileEndpointsAreReplaced(t *testing.T) {
	t.Parallel()
	const n, tunnels = 10, 5000
	for _, leaves := range []bool{false, true} {
		c := balanced(t, n, config.Balancing{Policy: config.LeastConnections, PanicBelow: half}, nil)
		open := map[*upstream.Endpoint]int64{}
		opens := func(n int64) {
			for range n {
				round := c.Round(balance.Query{})
				e := round.Next()
				e.Tunnels.Count(1)
				open[e]++
			}
		}
		ends := func(e *upstream.Endpoint) (had int64) {
			had = open[e]
			e.Tunnels.Count(-had)
			delete(open, e)
			return had
		}
		wantMost := func(when string, most int64) {
			t.Helper()
			for e, n := range open {
				if n > most {
					t.Errorf("%s: %s has %d tunnels, want %d at most", when, e, n, most)
				}
			}
		}
		opens(tunnels)
		wantMost("at first", tunnels/n)
		for i := range n {
			e := c.Members()[i]
			if leaves {
				all := members(n)
				c.SetMembers(slices.Delete(all, i, i+1))
			} else {
				e.Mark(upstream.Failing, true)
			}
			opens(ends(e))
			wantMost("while one is replaced", tunnels/(n-1)+1)
			if leaves {
				c.SetMembers(members(n))
			} else {
				e.Mark(upstream.Failing, false)
			}
		}
		if len(open) != n-1 {
			t.Errorf("%d endpoints have tunnels after the last was replaced", len(open))
		}
		for e := range open {
			ends(e)
		}
		opens(tunnels)
		wantMost("when all come back", tunnels/n)
	}
}

// Endpoints that come, or get well, begin slowly; those that were there all the time do not.
func TestWhoStartsSlowly(t *testing.T) {
	t.Parallel()
	const window = 100 * time.Second
	slow := &config.SlowStart{Window: window, Aggression: 1, LeastWeight: dynamic.Whole / 10}
	inherited := func(n int, since time.Time) func(*upstream.Options) {
		return func(o *upstream.Options) {
			state := control.ClusterState{Name: "web"}
			for i := range n {
				m := member(i + 1)
				state.Endpoints = append(state.Endpoints, control.EndpointState{Address: m.Address, At: m.At.Addr, HealthySince: since})
			}
			o.Inherited = &control.ClusterStates{Clusters: []control.ClusterState{state}}
		}
	}
	tests := []struct {
		name    string
		options func() func(*upstream.Options)
		happens func(c *upstream.Cluster)
		weight  float64 // of the last of four endpoints
	}{
		{name: "all were there at the beginning", weight: 1},
		{name: "it was not checked at the beginning", happens: func(c *upstream.Cluster) {
			c.Members()[3].Mark(upstream.Unchecked, true)
			c.Members()[3].Mark(upstream.Unchecked, false)
		}, weight: 1},
		{name: "it is well again", happens: func(c *upstream.Cluster) {
			c.Members()[3].Mark(upstream.Failing, true)
			c.Members()[3].Mark(upstream.Failing, false)
		}, weight: 0.1},
		{name: "it is well again for half of the time", happens: func(c *upstream.Cluster) {
			c.Members()[3].Mark(upstream.Ejected, true)
			c.Members()[3].Mark(upstream.Ejected, false)
			time.Sleep(window / 2)
		}, weight: 0.5},
		{name: "it came late", happens: func(c *upstream.Cluster) {
			c.SetMembers(members(3))
			time.Sleep(window)
			c.SetMembers(members(4))
		}, weight: 0.1},
		{name: "it came late, and its first check took its time", happens: func(c *upstream.Cluster) {
			late := c.Members()[3]
			late.Tunnels.Count(1) // so that it is known when it comes again
			c.SetMembers(members(3))
			late.Mark(upstream.Unchecked, true)
			c.SetMembers(members(4))
			time.Sleep(window)
			late.Mark(upstream.Unchecked, false)
		}, weight: 0.1},
		{name: "the generation before had all", options: func() func(*upstream.Options) { return inherited(4, time.Time{}) }, weight: 1},
		{name: "the generation before did not have it", options: func() func(*upstream.Options) { return inherited(3, time.Time{}) }, weight: 0.1},
		{name: "all began with the generation before", options: func() func(*upstream.Options) { return inherited(4, time.Now().Add(-window/2)) }, weight: 1},
		{name: "the generation before did not have the cluster", options: func() func(*upstream.Options) {
			return func(o *upstream.Options) { o.Inherited = new(control.ClusterStates) }
		}, weight: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var options func(*upstream.Options)
				if tt.options != nil {
					options = tt.options()
				}
				c := balanced(t, 4, config.Balancing{SlowStart: slow}, options)
				if tt.happens != nil {
					tt.happens(c)
				}
				const n = 3100
				got := 0.0
				for range n {
					round := c.Round(balance.Query{})
					if round.Next() == c.Members()[3] {
						got += 1.0 / n
					}
				}
				if want := tt.weight / (3 + tt.weight); math.Abs(got-want) > 0.005 {
					t.Errorf("it gets %.3f, want %.3f", got, want)
				}
				if since := c.Members()[3].HealthySince(); tt.weight < 1 && time.Since(since) > window {
					t.Errorf("it is well since %v", since)
				}
			})
		})
	}
}

// Who starts slowly goes on with that in the next generation, whether it is checked or not.
func TestASlowStartGoesOnInTheNextGeneration(t *testing.T) {
	t.Parallel()
	const window = 100 * time.Second
	for name, happens := range map[string]func(c *upstream.Cluster){
		"it came late": func(c *upstream.Cluster) {
			c.SetMembers(members(3))
			c.SetMembers(members(4))
		},
		"it was ejected": func(c *upstream.Cluster) {
			c.Members()[3].Mark(upstream.Ejected, true)
			c.Members()[3].Mark(upstream.Ejected, false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				cfg := web("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80")
				cfg.Balancing.SlowStart = &config.SlowStart{Window: window, Aggression: 1, LeastWeight: dynamic.Whole / 10}
				generation := func(inherited *control.ClusterStates) (*upstream.Clusters, *upstream.Cluster) {
					cs, err := upstream.New(t.Context(), upstream.Options{
						Config: &config.Config{Clusters: []config.Cluster{cfg}}, Network: new(fakeNetwork).network(), Inherited: inherited,
					})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(cs.Close)
					c, _ := cs.Get("web")
					return cs, c
				}
				first, c := generation(nil)
				time.Sleep(window)
				happens(c)
				time.Sleep(window / 4)
				_, c = generation(first.State())
				const n = 3250
				got := 0.0
				for range n {
					round := c.Round(balance.Query{})
					if round.Next() == c.Members()[3] {
						got += 1.0 / n
					}
				}
				if want := 0.25 / 3.25; math.Abs(got-want) > 0.005 {
					t.Errorf("it gets %.3f, want %.3f", got, want)
				}
			})
		})
	}
}
