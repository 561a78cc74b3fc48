package upstream

import (
	"encoding/json"
	"sync"
	"sync/atomic"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
)

// loadsOf is a cluster with these limits, of which nothing is connected to.
func loadsOf(t testing.TB, limits config.Breakers) *Cluster {
	t.Helper()
	cs, err := newOn(t.Context(), Options{
		Config:  &config.Config{Clusters: []config.Cluster{{Name: "web", Breakers: limits}}},
		Metrics: metrics.NewRegistry(), Values: new(dynamic.Set),
	})
	if err != nil {
		t.Fatal(err)
	}
	return cs.byName["web"]
}

func set(n int64) config.Limit { return config.Limit{Dynamic: config.Dynamic{Value: n}, Set: true} }

// Nobody is let through beyond the limit, and nobody is refused because another one only tries:
// as many goroutines as the limit always find one.
func TestABreakerIsExact(t *testing.T) {
	t.Parallel()
	for _, elsewhere := range []int64{0, 5} {
		const most = 4
		c := loadsOf(t, config.Breakers{{config.LimitedRequests: set(most + elsewhere)}})
		b := &c.breakers[0].of[config.LimitedRequests]
		b.elsewhere.Store(elsewhere)
		var under, refused atomic.Int64
		var all sync.WaitGroup
		for range most {
			all.Go(func() {
				for range 20_000 {
					if !b.take() {
						refused.Add(1)
						continue
					}
					b.give()
				}
			})
		}
		all.Wait()
		if n := refused.Load(); n > 0 {
			t.Errorf("%d were refused", n)
		}
		for range 3 * most {
			all.Go(func() {
				for range 20_000 {
					if b.take() {
						if n := under.Add(1); n > most {
							t.Errorf("%d were let through", n)
						}
						under.Add(-1)
						b.give()
					}
				}
			})
		}
		all.Wait()
		if n, open := b.here.Load(), b.open.Value(); n != 0 || open != 0 || b.shown.Load() {
			t.Errorf("%d are left, and the figure says %d", n, open)
		}
	}
}

// Two that come at the same instant do not both get the last one.
func TestTheLastOneIsTakenOnce(t *testing.T) {
	t.Parallel()
	c := loadsOf(t, config.Breakers{{config.LimitedRequests: set(1)}})
	b := &c.breakers[0].of[config.LimitedRequests]
	var under atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 50_000 {
				if !b.take() {
					continue
				}
				if n := under.Add(1); n > 1 {
					t.Errorf("%d have it", n)
				}
				under.Add(-1)
				b.give()
			}
		})
	}
	all.Wait()
}

// The last connection ends when somebody has just found none, and does not stand in the queue
// yet.
func TestAConnectionThatEndsMeanwhileIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	c := loadsOf(t, config.Breakers{{config.LimitedConnections: set(1)}})
	w := &c.breakers[0].waiting
	if !w.connections.take() || w.connections.take() || !w.pending.take() {
		t.Fatal("it is not as assumed")
	}
	w.give()
	if w.join(&waiter{of: w}) {
		t.Error("it waits")
	}
	if here, pending := w.connections.here.Load(), w.pending.here.Load(); here != 1 || pending != 0 {
		t.Errorf("%d connections and %d who wait", here, pending)
	}
}

// What shows whether it is full is right whenever nothing changes any more.
func TestTheFigureOfABreakerIsRightInTheEnd(t *testing.T) {
	t.Parallel()
	c := loadsOf(t, config.Breakers{{config.LimitedTunnels: set(2)}})
	b := &c.breakers[0].of[config.LimitedTunnels]
	for round := range 2000 {
		leaves := round%3 == 0 // whether it is full then
		var all sync.WaitGroup
		for i := range 3 {
			all.Go(func() {
				if b.take() && (leaves || i > 0) {
					b.give()
				}
			})
		}
		all.Go(func() { b.force(1) })
		all.Wait()
		if got, want := b.open.Value() == 1, b.full(); got != want || b.shown.Load() != want {
			t.Fatalf("it shows %v, and is %v with %d", got, want, b.here.Load())
		}
		b.force(-b.here.Load())
	}
}

func TestABreakerAllocatesNothing(t *testing.T) {
	for _, limits := range []config.Breakers{{}, {config.Limits{set(9), set(9), set(9), set(9), set(9)}}} {
		b := &loadsOf(t, limits).breakers[0]
		var a Attempt
		if n := testing.AllocsPerRun(100, func() {
			if b.admit(&a, config.LimitedRequests) != nil || !b.connections.take() {
				t.Error("refused")
			}
			a.release()
			b.give()
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	}
}

func TestWhatTheBreakersHave(t *testing.T) {
	t.Parallel()
	c := loadsOf(t, config.Breakers{
		{config.LimitedTunnels: set(2), config.LimitedRetries: set(1), config.LimitedPending: set(1024)},
		{config.LimitedRequests: set(7)},
	})
	tunnels := &c.breakers[0].of[config.LimitedTunnels]
	tunnels.force(3)
	tunnels.elsewhere.Store(4)
	_ = tunnels.overflow()
	c.breakers[1].of[config.LimitedConnections].force(5)
	got, _ := json.Marshal(c.breakerStates())
	want := `[{"priority":"default","limits":{"pending":{"limit":1024},"retries":{"limit":1},"tunnels":{"limit":2,"here":3,"elsewhere":4,"open":true,"overflows":1}}},` +
		`{"priority":"high","limits":{"connections":{"here":5},"requests":{"limit":7}}}]`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := loadsOf(t, config.Breakers{}).breakerStates(); got != nil {
		t.Errorf("%v of nothing", got)
	}
}

func BenchmarkABreaker(b *testing.B) {
	for name, limits := range map[string]config.Breakers{"without a limit": {}, "with one": {{config.LimitedRequests: set(1000)}}} {
		b.Run(name, func(b *testing.B) {
			of := &loadsOf(b, limits).breakers[0].of[config.LimitedRequests]
			for b.Loop() {
				of.take()
				of.give()
			}
		})
	}
}
