package upstream_test

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

const (
	high        = config.PriorityHigh
	connections = config.LimitedConnections
	tunnels     = config.LimitedTunnels
	pendings    = config.LimitedPending
	requests    = config.LimitedRequests
	retries     = config.LimitedRetries
)

// most is a limit.
func most(n int64) config.Limit { return config.Limit{Dynamic: config.Dynamic{Value: n}, Set: true} }

// limited is a world of one cluster with limits.
type limited struct {
	*world
	t        *testing.T
	net      *fakeNetwork
	registry *metrics.Registry
	values   dynamic.Set
	all      []*endpoint
}

// limit makes a cluster of so many loops and the endpoints, whose limits are keyed "web.…".
func limit(t *testing.T, loops int, limits config.Breakers, addresses ...string) *limited {
	t.Helper()
	w := &limited{t: t, net: new(fakeNetwork), registry: metrics.NewRegistry()}
	for p := range limits {
		for what := range limits[p] {
			stem := []string{"web.", "web.high."}[p]
			limits[p][what].Key = stem + config.Limited(what).String()
		}
	}
	c := web(addresses...)
	c.Breakers = limits
	all := loopsFor(t, loops)
	cs, err := upstream.New(t.Context(), upstream.Options{
		Config: &config.Config{
			Clusters:     []config.Cluster{c},
			VirtualHosts: []config.VirtualHost{{Routes: []config.Route{{Priority: high}}}},
		},
		Loops: all, Network: w.net.network(), Metrics: w.registry, Values: &w.values,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	w.world = &world{t, all, cs}
	w.all = w.of("web")
	return w
}

func (w *limited) cluster() *upstream.Cluster {
	c, _ := w.Get("web")
	return c
}

// attempt is an exchange, or the wait for one, on a loop.
type attempt struct {
	w       *limited
	loop    int
	e       *endpoint
	attempt upstream.Attempt
	up      *fakeUpstream
	err     error
	call    upstream.Call
	ended   <-chan struct{} // connecting
}

// begin opens an exchange; it may wait.
func (w *limited) begin(loop, at int, open opener, p config.Priority) *attempt {
	a := &attempt{w: w, loop: loop, e: w.all[at], attempt: upstream.Attempt{Priority: p}}
	l := w.loops[loop]
	a.ended = streamtest.Begin(l, func(t *task.Task) {
		up, err := open(a.e.Endpoint, t, l, &a.attempt)
		if a.err = err; err == nil {
			a.up = up.(*fakeUpstream)
			a.e.Begin(l, &a.attempt, &a.call)
		}
	})
	streamtest.Do(l, func() {})
	return a
}

// waits says whether it does.
func (a *attempt) waits() bool {
	for _, l := range a.w.loops { // what was posted has come
		streamtest.Do(l, func() {})
	}
	for range 3 * len(a.w.loops) {
		for _, l := range a.w.loops {
			streamtest.Do(l, func() {})
		}
	}
	select {
	case <-a.ended:
		return false
	default:
		return true
	}
}

// got returns the connection.
func (a *attempt) got() *fakeConn {
	a.w.t.Helper()
	if a.waits() {
		a.w.t.Fatal("it waits")
	}
	if a.err != nil {
		a.w.t.Fatal(a.err)
	}
	return a.up.conn
}

// refused wants the error to be that of a limit.
func (a *attempt) refused(what config.Limited) {
	a.w.t.Helper()
	<-a.ended
	over, ok := errors.AsType[*upstream.OverflowError](a.err)
	if !ok || over.Limit != what || over.Cluster != "web" || over.Priority != a.attempt.Priority {
		a.w.t.Errorf("got %v, want the limit of %v", a.err, what)
	}
}

// end ends an exchange whose connection can carry another, close one whose connection cannot,
// and taken one that becomes a tunnel.
func (a *attempt) end() {
	a.on(func() { a.up.Close(); a.call.End(upstream.Complete) })
}
func (a *attempt) close() {
	a.on(func() { a.up.conn.Close(); a.call.End(upstream.Reset) })
}
func (a *attempt) taken() {
	a.on(func() {
		a.up.conn.owner.Taken()
		a.e.TunnelOpened(&a.call)
		a.call.End(upstream.BecameTunnel)
	})
}
func (a *attempt) on(fn func()) { streamtest.Do(a.w.loops[a.loop], fn) }

// figure is the value of a series "name{labels}" without "holdfast_cluster_".
func (w *limited) figure(name string) int64 {
	for _, f := range w.registry.Families() {
		for _, s := range f.Series {
			if name == strings.TrimPrefix(f.Desc.Name, "holdfast_cluster_")+"{"+strings.Join(s.Labels, ",")+"}" {
				return s.Value
			}
		}
	}
	w.t.Errorf("there is no %s", name)
	return -1
}

func (w *limited) want(name string, want int64) {
	w.t.Helper()
	if got := w.figure(name); got != want {
		w.t.Errorf("%s is %d, want %d", name, got, want)
	}
}

// used is what the other generations would be told of one limit.
func (w *limited) used(p config.Priority, what config.Limited) int64 {
	for _, c := range w.Loads().Clusters {
		for _, l := range c.Used {
			if l.Priority == p.String() {
				return l.Used[what.String()]
			}
		}
	}
	return 0
}

var (
	opensGet   = (*upstream.Endpoint).Get
	opensFresh = (*upstream.Endpoint).Fresh
	opensDial  = (*upstream.Endpoint).Dial
)

func TestWhatIsBeyondALimitIsRefused(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what  config.Limited
		limit config.Limits
		open  opener
	}{
		{requests, config.Limits{requests: most(2)}, opensGet},
		{requests, config.Limits{requests: most(2)}, opensFresh},
		{tunnels, config.Limits{tunnels: most(2)}, opensDial},
		{pendings, config.Limits{connections: most(2), pendings: most(0)}, opensGet},
		{pendings, config.Limits{connections: most(2), pendings: most(0)}, opensDial},
	} {
		for p := range config.NumPriorities {
			t.Run(fmt.Sprint(c.what, " in priority ", p), func(t *testing.T) {
				t.Parallel()
				var limits config.Breakers
				limits[p] = c.limit
				w := limit(t, 2, limits, "10.0.0.1:80", "10.0.0.2:80")
				one, two := w.begin(0, 0, c.open, p), w.begin(1, 1, c.open, p)
				one.got()
				two.got()
				w.begin(0, 1, c.open, p).refused(c.what)
				w.begin(1, 0, c.open, p).refused(c.what)
				labels := "{web," + p.String() + "," + c.what.String() + "}"
				w.want("overflows_total"+labels, 2)
				w.want("circuit_breaker_open"+labels, 1)
				other := w.begin(0, 0, c.open, 1-p) // which has limits of its own
				other.got()
				other.close()

				one.close()
				if c.what != pendings {
					w.want("circuit_breaker_open"+labels, 0)
				}
				three := w.begin(0, 0, c.open, p)
				three.got()
				two.close()
				three.close()
				if loads := w.Loads(); len(loads.Clusters) > 0 {
					t.Errorf("left is %+v", loads)
				}
			})
		}
	}
}

// What ends a wait for a connection: the only one is with a request on the first loop.
func TestWhatEndsTheWaitForAConnection(t *testing.T) {
	t.Parallel()
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		loop, at int
		open     opener
		happens  func(w *limited, has, waits *attempt)
		conns    int   // that were made in all
		err      error // nil: it gets one
	}{
		"the connection was closed": {1, 1, opensGet, func(_ *limited, has, _ *attempt) { has.close() }, 2, nil},
		"it became idle for the same endpoint on the same loop": {
			0, 0, opensGet, func(_ *limited, has, _ *attempt) { has.end() }, 1, nil},
		"it became idle on another loop":                {1, 0, opensGet, func(_ *limited, has, _ *attempt) { has.end() }, 2, nil},
		"it became idle at another endpoint":            {0, 1, opensGet, func(_ *limited, has, _ *attempt) { has.end() }, 2, nil},
		"it became idle, but a fresh one is wanted":     {0, 0, opensFresh, func(_ *limited, has, _ *attempt) { has.end() }, 2, nil},
		"it became idle, but one for a tunnel is":       {0, 0, opensDial, func(_ *limited, has, _ *attempt) { has.end() }, 2, nil},
		"it became a tunnel":                            {1, 1, opensDial, func(_ *limited, has, _ *attempt) { has.taken() }, 2, nil},
		"the limit was raised":                          {1, 1, opensGet, func(w *limited, _, _ *attempt) { w.values.Apply(map[string]float64{"web.connections": 2}) }, 2, nil},
		"the limit was lifted":                          {1, 1, opensGet, func(w *limited, _, _ *attempt) { w.values.Apply(map[string]float64{"web.connections": -1}) }, 2, nil},
		"it was cancelled":                              {1, 1, opensGet, func(_ *limited, _, a *attempt) { a.on(func() { a.attempt.Cancel(gone) }) }, 1, gone},
		"its endpoint has left":                         {1, 1, opensGet, func(w *limited, _, _ *attempt) { w.leave("10.0.0.2:80") }, 1, new(upstream.ConnectError)},
		"another endpoint has left with its connection": {1, 1, opensGet, func(w *limited, has, _ *attempt) { w.leave("10.0.0.1:80"); has.end() }, 2, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := limit(t, 3, config.Breakers{{connections: most(1)}}, "10.0.0.1:80", "10.0.0.2:80")
			has := w.begin(0, 0, opensGet, 0)
			if strings.Contains(name, "became a tunnel") {
				has.close()
				has = w.begin(0, 0, opensDial, 0)
				w.net.conns = w.net.conns[:0]
				w.net.conns = append(w.net.conns, has.got())
			}
			waits := w.begin(c.loop, c.at, c.open, 0)
			if !waits.waits() {
				t.Fatal("it did not wait")
			}
			w.want("pending_active{web,default}", 1)
			c.happens(w, has, waits)
			if waits.waits() {
				t.Fatal("it waits still")
			}
			switch {
			case c.err == nil:
				if waits.got().closed.Load() {
					t.Error("its connection is closed")
				}
				waits.close()
			case reflect.TypeOf(waits.err) != reflect.TypeOf(c.err):
				t.Errorf("it ended with %v, want %v", waits.err, c.err)
			}
			if got := w.net.connections(); got != c.conns {
				t.Errorf("%d connections were made, want %d", got, c.conns)
			}
			w.want("pending_active{web,default}", 0)
			w.want("overflows_total{web,default,connections}", 1)
			w.want("overflows_total{web,default,pending}", 0)
		})
	}
}

// leave has an endpoint leave the cluster.
func (w *limited) leave(address string) {
	var members []upstream.Member
	for _, e := range w.cluster().Members() {
		if e.Address != address {
			members = append(members, upstream.Member{Address: e.Address, At: upstream.Place{Addr: e.Addr}})
		}
	}
	w.cluster().SetMembers(members)
}

// An idle connection that is of no use to a request makes room for its own.
func TestAnIdleConnectionElsewhereStarvesNobody(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ loop, at int }{{0, 1}, {1, 0}, {3, 1}} {
		w := limit(t, 4, config.Breakers{{connections: most(1)}}, "10.0.0.1:80", "10.0.0.2:80")
		idle := w.begin(0, 0, opensGet, 0)
		old := idle.got()
		idle.end()
		a := w.begin(c.loop, c.at, opensGet, 0)
		if a.got(); !old.closed.Load() {
			t.Error("the idle one is open")
		}
		if n := w.used(0, connections); n != 1 {
			t.Errorf("%d connections", n)
		}
		a.end()
	}
}

func TestThoseWhoWaitHaveTheirTurn(t *testing.T) {
	t.Parallel()
	w := limit(t, 3, config.Breakers{{connections: most(1)}}, "10.0.0.1:80")
	has := w.begin(0, 0, opensGet, 0)
	var queue []*attempt
	for i := range 9 {
		queue = append(queue, w.begin(i%3, 0, opensFresh, 0))
	}
	for i, next := range queue {
		has.close()
		for j, a := range queue[i:] {
			if a.waits() != (j > 0) {
				t.Fatalf("after %d ends the number %d behind the first one is wrong", i+1, j)
			}
		}
		has = next
	}
	has.close()
}

// A connection goes to whoever can use it rather than be closed for the first one, but not always.
func TestNobodyIsPassedOverForEver(t *testing.T) {
	t.Parallel()
	w := limit(t, 2, config.Breakers{{connections: most(1)}}, "10.0.0.1:80")
	has := w.begin(0, 0, opensGet, 0)
	first := w.begin(1, 0, opensGet, 0)
	passed := 0
	for {
		next := w.begin(0, 0, opensGet, 0)
		has.end()
		if !first.waits() {
			first.end()
			next.got()
			next.end()
			break
		}
		if passed++; passed > 100 {
			t.Fatal("the first one waits still")
		}
		next.got()
		has = next
	}
	if passed != 16 {
		t.Errorf("it was passed over %d times", passed)
	}
	if n := w.net.connections(); n != 3 {
		t.Errorf("%d connections were made", n)
	}
}

// What one priority has is of no use to the other, and takes nothing from it.
func TestEachPriorityHasItsConnections(t *testing.T) {
	t.Parallel()
	w := limit(t, 1, config.Breakers{{connections: most(1)}, {connections: most(1)}}, "10.0.0.1:80")
	one := w.begin(0, 0, opensGet, 0)
	one.end()
	two := w.begin(0, 0, opensGet, high)
	if two.got() == one.up.conn {
		t.Error("it has the other's connection")
	}
	again := w.begin(0, 0, opensGet, 0)
	if again.got() != one.up.conn {
		t.Error("its own was not used again")
	}
	if a, b := w.used(0, connections), w.used(high, connections); a != 1 || b != 1 {
		t.Errorf("%d and %d connections", a, b)
	}
	two.end()
	again.end()
}

func TestTunnelsAreCountedUntilTheyEnd(t *testing.T) {
	t.Parallel()
	w := limit(t, 1, config.Breakers{{tunnels: most(2), connections: most(1)}}, "10.0.0.1:80")
	open := func() *attempt { return w.begin(0, 0, opensDial, 0) }
	one := open()
	one.taken() // its connection is a tunnel's now
	two := open()
	two.close() // refused by the endpoint
	if n := w.used(0, tunnels); n != 1 {
		t.Fatalf("%d tunnels", n)
	}
	two = open()
	two.taken()
	if n := w.used(0, connections); n != 0 {
		t.Errorf("%d connections", n)
	}
	open().refused(tunnels)

	// Those that come from another generation are there, whatever the limit is.
	moved := w.Tunnels("web", "10.0.0.1:80", netip.MustParseAddrPort("10.0.0.1:80"))
	moved.Count(3)
	w.want("circuit_breaker_open{web,default,tunnels}", 1)
	one.e.Tunnels.Count(-1)
	two.e.Tunnels.Count(-1)
	if n := w.used(0, tunnels); n != 3 {
		t.Errorf("%d tunnels", n)
	}
	open().refused(tunnels)
	moved.Count(-2)
	w.want("circuit_breaker_open{web,default,tunnels}", 0)
	last := open()
	last.got()
	open().refused(tunnels)
	last.close()
	moved.Count(-1)

	important := one.e.Tunnels.At(high)
	important.Count(1)
	if a, b := w.used(0, tunnels), w.used(high, tunnels); a != 0 || b != 1 {
		t.Errorf("%d and %d tunnels", a, b)
	}
	important.Count(-1)
	former := w.Tunnels("gone", "10.0.0.1:80", netip.AddrPort{}).At(high)
	former.Count(1)
}

func TestRetriesAreLimited(t *testing.T) {
	t.Parallel()
	w := limit(t, 1, config.Breakers{{retries: most(2)}}, "10.0.0.1:80")
	c := w.cluster()
	got := []bool{c.TakeRetry(0), c.TakeRetry(0), c.TakeRetry(0), c.TakeRetry(high)}
	c.GiveRetry(0)
	got = append(got, c.TakeRetry(0), c.TakeRetry(0))
	if want := []bool{true, true, false, true, true, false}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	w.want("overflows_total{web,default,retries}", 2)
}

func TestLimitsChangeAtRunTime(t *testing.T) {
	t.Parallel()
	w := limit(t, 1, config.Breakers{{requests: most(1)}}, "10.0.0.1:80")
	get := func(p config.Priority) *attempt { return w.begin(0, 0, opensGet, p) }
	one := get(0)
	get(0).refused(requests)
	w.values.Apply(map[string]float64{"web.requests": 2})
	w.want("circuit_breaker_open{web,default,requests}", 0)
	two := get(0)
	two.got()
	get(0).refused(requests)
	w.values.Apply(map[string]float64{"web.requests": 0, "web.high.requests": 0})
	w.want("circuit_breaker_open{web,default,requests}", 1)
	w.want("circuit_breaker_open{web,high,requests}", 1)
	get(high).refused(requests)
	one.end()
	two.end()
	get(0).refused(requests)
	w.values.Apply(map[string]float64{"web.requests": -1})
	for range 5 {
		one = get(0)
		one.got()
		one.end()
	}
	w.values.Apply(nil)
	w.want("circuit_breaker_open{web,default,requests}", 0)
	w.want("circuit_breaker_open{web,high,requests}", 0)
}

// elsewhere is what one other generation has of a cluster.
func elsewhere(cluster string, used ...control.BreakerLoad) *control.Loads {
	return &control.Loads{Clusters: []control.ClusterLoad{{Name: cluster, Used: used}}}
}

func load(p string, what config.Limited, n int64) control.BreakerLoad {
	return control.BreakerLoad{Priority: p, Used: map[string]int64{what.String(): n}}
}

// What other generations have counts, until they say otherwise, or are gone.
func TestLimitsHoldAcrossGenerations(t *testing.T) {
	t.Parallel()
	w := limit(t, 2, config.Breakers{{tunnels: most(10), connections: most(4)}}, "10.0.0.1:80")
	tell := func(all map[int]*control.Loads) { w.SetElsewhere(all) }
	tell(map[int]*control.Loads{3: elsewhere("web", load("default", tunnels, 4)), 5: elsewhere("web", load("default", tunnels, 5))})
	one := w.begin(0, 0, opensDial, 0)
	one.got()
	w.begin(0, 0, opensDial, 0).refused(tunnels)
	w.want("circuit_breaker_open{web,default,tunnels}", 1)
	tell(map[int]*control.Loads{5: elsewhere("web", load("default", tunnels, 5))})
	w.want("circuit_breaker_open{web,default,tunnels}", 0)
	two := w.begin(0, 0, opensDial, 0)
	two.got()
	two.close()
	one.close()

	// Whoever waits goes on when others have less.
	tell(map[int]*control.Loads{5: elsewhere("web", load("default", connections, 4))})
	three := w.begin(1, 0, opensGet, 0)
	if !three.waits() {
		t.Fatal("it did not wait")
	}
	tell(nil)
	three.got()
	three.close()

	// Two that tell each other what they have stand for each other.
	other := limit(t, 1, config.Breakers{{tunnels: most(10)}}, "10.0.0.1:80")
	moved := other.Tunnels("web", "10.0.0.1:80", netip.MustParseAddrPort("10.0.0.1:80"))
	moved.Count(10)
	tell(map[int]*control.Loads{1: other.Loads()})
	w.begin(0, 0, opensDial, 0).refused(tunnels)
	moved.Count(-10)
}

// A sender that lies can have everything refused, as far as there are limits, or nothing; but not
// more, and not for longer than it lives.
func TestWhatAHostileGenerationSays(t *testing.T) {
	t.Parallel()
	w := limit(t, 1, config.Breakers{{requests: most(1)}}, "10.0.0.1:80")
	many := elsewhere("web")
	for i := range 10_000 {
		many.Clusters = append(many.Clusters, control.ClusterLoad{Name: fmt.Sprint("other ", i), Used: []control.BreakerLoad{load("default", requests, 1)}})
		many.Clusters[0].Endpoints = append(many.Clusters[0].Endpoints, control.EndpointLoad{Address: fmt.Sprint(i), Load: math.MaxInt64})
		many.Clusters[0].Used = append(many.Clusters[0].Used, load(fmt.Sprint(i), requests, 1), control.BreakerLoad{Priority: "default", Used: map[string]int64{fmt.Sprint(i): 1}})
	}
	for name, c := range map[string]struct {
		says *control.Loads
		lets bool
	}{
		"nothing":             {nil, true},
		"a negative number":   {elsewhere("web", load("default", requests, -1)), true},
		"the least number":    {elsewhere("web", load("default", requests, math.MinInt64)), true},
		"too much for a sum":  {elsewhere("web", load("default", requests, math.MaxInt64), load("default", requests, math.MaxInt64)), false},
		"names without end":   {many, true},
		"a negative priority": {elsewhere("web", load("", requests, 3), load("highest", requests, 3)), true},
	} {
		w.SetElsewhere(map[int]*control.Loads{-1: c.says, 1: c.says})
		a := w.begin(0, 0, opensGet, 0)
		if c.lets {
			if a.got(); a.err == nil {
				w.begin(0, 0, opensGet, 0).refused(requests)
				a.end()
			}
		} else {
			a.refused(requests)
		}
		if t.Failed() {
			t.Fatal(name)
		}
	}
	w.SetElsewhere(nil)
	a := w.begin(0, 0, opensGet, 0)
	a.got()
	a.end()
}

func TestTheLoadsOfEndpoints(t *testing.T) {
	t.Parallel()
	w := limit(t, 1, config.Breakers{}, "10.0.0.1:80", "10.0.0.2:80", "unix:/run/a.sock")
	var open []*attempt
	for i := range w.all {
		for range i {
			open = append(open, w.begin(0, i, opensGet, 0))
		}
	}
	w.leave("10.0.0.2:80") // but has something still
	want := &control.Loads{Clusters: []control.ClusterLoad{{
		Name: "web",
		Endpoints: []control.EndpointLoad{
			{Address: "10.0.0.2:80", At: netip.MustParseAddrPort("10.0.0.2:80"), Load: 1},
			{Address: "unix:/run/a.sock", Load: 2},
		},
		Used: []control.BreakerLoad{{Priority: "default", Used: map[string]int64{"connections": 3, "requests": 3}}},
	}}}
	if got := w.Loads(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	for _, a := range open {
		a.close()
	}
	if got := w.Loads(); !reflect.DeepEqual(got, new(control.Loads)) {
		t.Errorf("got %+v of nothing", got)
	}
}

// What there is no limit for makes no series.
func TestOnlyLimitsHaveFigures(t *testing.T) {
	t.Parallel()
	c := web("10.0.0.1:80")
	c.Breakers = config.Breakers{{tunnels: most(3), pendings: most(1024)}}
	_, r := counted(t, new(fakeNetwork), c)
	var got []string
	for _, f := range r.Families() {
		for _, s := range f.Series {
			if strings.Contains(f.Desc.Name, "overflow") || strings.Contains(f.Desc.Name, "breaker") || strings.Contains(f.Desc.Name, "pending") {
				got = append(got, fmt.Sprint(f.Desc.Name, s.Labels))
			}
		}
	}
	slices.Sort(got)
	if want := "[holdfast_cluster_circuit_breaker_open[web default tunnels] holdfast_cluster_overflows_total[web default tunnels]]"; fmt.Sprint(got) != want {
		t.Errorf("got %v", got)
	}
}

// A wait ends by the time of whoever waits, in a bubble in which nothing else happens.
func TestAWaitThatIsTooLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := limit(t, 2, config.Breakers{{connections: most(1)}}, "10.0.0.1:80")
		has := w.begin(0, 0, opensGet, 0)
		late := errors.New("late")
		waits := w.begin(1, 0, opensGet, 0)
		d := &alarm{fn: func() { waits.attempt.Cancel(late) }}
		waits.on(func() { w.loops[1].SetDeadline(&d.Deadline, d, w.loops[1].Now().Add(15e9)) })
		<-waits.ended
		if waits.err != late {
			t.Errorf("got %v", waits.err)
		}
		has.end()
		w.Close()
	})
}

type alarm struct {
	poller.Deadline
	fn func()
}

func (a *alarm) Expire(*poller.Deadline) { a.fn() }
