package outlier_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/upstream/outlier"
)

// defaults are those of a configuration.
func defaults() config.Outliers {
	whole := config.Dynamic{Value: dynamic.Whole}
	return config.Outliers{
		Consecutive5xx: 5, ConsecutiveConnectFailures: 5,
		Interval: 10 * time.Second, BaseEjectionTime: 30 * time.Second, MaxEjectionTime: 5 * time.Minute, MaxEjected: config.Dynamic{Value: dynamic.Whole / 10},
		SuccessRateDeviations: 1.9, SuccessRateHosts: 5, SuccessRateRequests: 100, Enforcing: whole, EnforcingSuccessRate: whole,
	}
}

// cluster is some hosts on a clock that only the test moves.
type cluster struct {
	t       *testing.T
	d       *outlier.Detector
	now     time.Time
	next    time.Time
	wakes   int
	hosts   []*outlier.Host
	former  []*outlier.Host
	ejected int
}

func newCluster(t *testing.T, hosts int, cfg config.Outliers, values *dynamic.Set) *cluster {
	c := &cluster{t: t, now: time.Unix(1_800_000_000, 0)}
	c.d = outlier.New(&cfg, values, func() { c.wakes++ })
	for i := range hosts {
		h := c.d.NewHost()
		h.Of = i
		c.hosts = append(c.hosts, h)
	}
	return c
}

// decide decides now, and returns what in words.
func (c *cluster) decide() (words []string) {
	d := c.d.Decide(c.now, c.hosts, c.former)
	c.next, c.wakes, c.ejected = d.Next, 0, d.Ejected
	for _, e := range d.Events {
		act := [...]string{outlier.Eject: "eject", outlier.Return: "return", outlier.NotForced: "spare", outlier.Overflow: "too many:"}[e.Act]
		w := fmt.Sprintf("%s %d %s", act, e.Host.Of, e.Kind)
		if e.Act == outlier.Eject {
			w += fmt.Sprintf(" #%d %v", e.Ejections, e.For)
		}
		words = append(words, w)
	}
	return words
}

// pass lets time pass, with every decision in its time.
func (c *cluster) pass(d time.Duration) (words []string) {
	end := c.now.Add(d)
	for !c.next.IsZero() && !c.next.After(end) {
		c.now = c.next
		words = append(words, c.decide()...)
	}
	c.now = end
	return words
}

func want(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("decided\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func times(n int, do func()) {
	for range n {
		do()
	}
}

func TestARowOfFailuresMakesAnOutlier(t *testing.T) {
	t.Parallel()
	all := defaults()
	all.Consecutive5xx, all.ConsecutiveGatewayFailures, all.ConsecutiveConnectFailures = 6, 4, 3
	for name, tt := range map[string]struct {
		do   func(h *outlier.Host)
		want string // kind; "" for none
	}{
		"nothing":          {func(*outlier.Host) {}, ""},
		"one too few":      {func(h *outlier.Host) { times(5, func() { h.Answered(500) }) }, ""},
		"enough":           {func(h *outlier.Host) { times(6, func() { h.Answered(500) }) }, "consecutive_5xx"},
		"more than enough": {func(h *outlier.Host) { times(60, func() { h.Answered(500) }) }, "consecutive_5xx"},
		"an answer between": {func(h *outlier.Host) {
			times(5, func() { h.Answered(500) })
			h.Answered(404)
			times(5, func() { h.Answered(500) })
		}, ""},
		"a tunnel between":           {func(h *outlier.Host) { times(3, h.Failed); h.Answered(101); times(3, h.Failed) }, ""},
		"refused upgrades":           {func(h *outlier.Host) { times(4, func() { h.Answered(503) }) }, "consecutive_gateway_failures"},
		"each kind of them":          {func(h *outlier.Host) { h.Answered(502); h.Answered(503); h.Answered(504); h.Failed() }, "consecutive_gateway_failures"},
		"another 5xx between":        {func(h *outlier.Host) { times(3, h.Failed); h.Answered(500); h.Failed() }, ""},
		"another 5xx, and more":      {func(h *outlier.Host) { times(3, h.Failed); h.Answered(500); times(2, h.Failed) }, "consecutive_5xx"},
		"no answers":                 {func(h *outlier.Host) { times(4, h.Failed) }, "consecutive_gateway_failures"},
		"no connections":             {func(h *outlier.Host) { times(3, h.NotConnected) }, "consecutive_connect_failures"},
		"one connection between":     {func(h *outlier.Host) { times(2, h.NotConnected); h.Connected(); h.NotConnected() }, ""},
		"old connections go on well": {func(h *outlier.Host) { times(3, func() { h.NotConnected(); h.Answered(200) }) }, "consecutive_connect_failures"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 10, all, nil)
			tt.do(c.hosts[3])
			got := c.decide()
			if tt.want == "" {
				want(t, got)
				return
			}
			want(t, got, "eject 3 "+tt.want+" #1 30s")
			want(t, c.decide())
		})
	}
}

func TestARowThatIsOffMakesNone(t *testing.T) {
	t.Parallel()
	cfg := defaults()
	cfg.Consecutive5xx, cfg.ConsecutiveConnectFailures, cfg.SuccessRateDeviations = 0, 0, 0
	c := newCluster(t, 3, cfg, nil)
	times(1000, c.hosts[0].NotConnected)
	if c.wakes != 0 {
		t.Error("there was something to decide")
	}
	want(t, c.decide())
}

// It returns to the moment, for as many times the base as it was ejected, and is forgiven one
// by one while it is there.
func TestEachEjectionLastsLongerUntilItIsForgiven(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 10, defaults(), nil)
	fail := func() []string { times(5, func() { c.hosts[0].Answered(500) }); return c.decide() }
	for n := 1; n <= 12; n++ {
		lasts := min(time.Duration(n)*30*time.Second, 5*time.Minute)
		want(t, fail(), fmt.Sprintf("eject 0 consecutive_5xx #%d %v", n, lasts))
		want(t, fail()) // what was under way
		want(t, c.pass(lasts-time.Nanosecond))
		if s := c.hosts[0].State(); s.Until.IsZero() || s.Ejections != n {
			t.Fatalf("before its time is over: %+v", s)
		}
		want(t, c.pass(time.Nanosecond), "return 0 consecutive_5xx")
		if s := c.hosts[0].State(); !s.Until.IsZero() {
			t.Fatalf("when its time is over: %+v", s)
		}
	}
	want(t, c.pass(3*time.Minute))
	if s := c.hosts[0].State(); s.Ejections != 0 || !c.next.IsZero() {
		t.Errorf("after a long time: %+v, and there is something due at %v", s, c.next)
	}
	want(t, fail(), "eject 0 consecutive_5xx #1 30s")
}

func TestJitterComesOnTop(t *testing.T) {
	t.Parallel()
	cfg := defaults()
	cfg.EjectionJitter = 10 * time.Second
	cfg.MaxEjected.Value = dynamic.Whole
	c := newCluster(t, 50, cfg, nil)
	seen := make(map[time.Time]bool)
	for _, h := range c.hosts {
		times(5, h.Failed)
		c.decide()
		lasts := h.State().Until.Sub(c.now)
		if lasts < 30*time.Second || lasts >= 40*time.Second {
			t.Errorf("ejected for %v", lasts)
		}
		seen[h.State().Until] = true
	}
	if len(seen) < 40 {
		t.Errorf("%d of 50 have a time of their own", len(seen))
	}
}

func TestNoMoreThanAShareIsEjected(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ hosts, percent, want int }{
		{1, 10, 1}, {3, 10, 1}, {10, 10, 1}, {19, 10, 1}, {20, 10, 2}, {25, 10, 2}, {10, 50, 5}, {10, 100, 10}, {3, 34, 1}, {3, 67, 2}, {10, 0, 0}, {0, 100, 0},
	} {
		cfg := defaults()
		cfg.MaxEjected.Value = int64(tt.percent) * dynamic.Whole / 100
		c := newCluster(t, tt.hosts, cfg, nil)
		for _, h := range c.hosts {
			times(5, h.Failed)
		}
		overflows := 0
		for _, w := range c.decide() {
			if strings.HasPrefix(w, "too many") {
				overflows++
			}
		}
		if c.ejected != tt.want || overflows != tt.hosts-tt.want {
			t.Errorf("%d of %d hosts with %d %%: %d ejected, %d too many", tt.want, tt.hosts, tt.percent, c.ejected, overflows)
		}
	}
}

func TestWhoHasLeftIsNotEjectedAndDoesNotCountAsOne(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, defaults(), nil)
	times(5, c.hosts[0].Failed)
	want(t, c.decide(), "eject 0 consecutive_5xx #1 30s")
	c.hosts, c.former = c.hosts[1:], c.hosts[:1]
	times(5, c.hosts[0].Failed)
	want(t, c.decide(), "eject 1 consecutive_5xx #1 30s")
	times(5, c.former[0].Failed)
	want(t, c.pass(29*time.Second))
	want(t, c.pass(time.Second), "return 1 consecutive_5xx", "return 0 consecutive_5xx")
}

func TestWhatIsEnforcedMayChangeAtRunTime(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	cfg := defaults()
	cfg.Enforcing.Key = "force"
	c := newCluster(t, 3, cfg, &values)
	values.Apply(map[string]float64{"force": 0})
	times(5, c.hosts[0].Failed)
	want(t, c.decide(), "spare 0 consecutive_5xx")
	times(4, c.hosts[0].Failed)
	want(t, c.decide())
	c.hosts[0].Failed() // the row has begun anew
	want(t, c.decide(), "spare 0 consecutive_5xx")
	values.Apply(nil)
	times(5, c.hosts[0].Failed)
	want(t, c.decide(), "eject 0 consecutive_5xx #1 30s")
}

// with gives each host its requests, of which so many of a hundred fail.
func (c *cluster) with(requests int, failing ...int) {
	for i, h := range c.hosts {
		for n := range requests {
			if (n*37)%100 < failing[i] { // never many in a row
				h.Answered(500)
			} else {
				h.Answered(200)
			}
		}
	}
	c.decide() // as it was woken
}

func TestASuccessRateFarBelowTheOthersMakesAnOutlier(t *testing.T) {
	t.Parallel()
	cfg := defaults()
	cfg.Consecutive5xx = 0
	for name, tt := range map[string]struct {
		requests int
		failing  []int
		want     []string
	}{
		"all alike":                   {100, []int{1, 1, 1, 1, 1, 1}, nil},
		"all fail":                    {100, []int{100, 100, 100, 100, 100, 100}, nil},
		"one fails more":              {100, []int{0, 0, 0, 0, 0, 20}, []string{"eject 5 success_rate #1 30s"}},
		"one is a little worse":       {100, []int{5, 4, 5, 6, 5, 6}, nil},
		"too few requests":            {99, []int{0, 0, 0, 0, 0, 50}, nil},
		"too few hosts":               {100, []int{0, 0, 0, 50}, nil},
		"only one of two may go":      {100, []int{0, 0, 0, 0, 0, 0, 0, 0, 0, 40, 41}, []string{"eject 9 success_rate #1 30s", "too many: 10 success_rate"}},
		"those without are no others": {0, []int{0, 0, 0, 0, 0, 0}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, len(tt.failing), cfg, nil)
			c.with(tt.requests, tt.failing...)
			want(t, c.pass(9999*time.Millisecond))
			want(t, c.pass(time.Millisecond), tt.want...)
			// What was counted does not count twice.
			if got := c.pass(29 * time.Second); len(got) != 0 {
				t.Errorf("without another request: %v", got)
			}
		})
	}
}

func TestTheSuccessRateOfAnIntervalIsSeen(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, defaults(), nil)
	c.with(200, 25, 0)
	if r := c.hosts[0].State().Rate; r >= 0 {
		t.Errorf("before the interval is over it is %v", r)
	}
	c.pass(10 * time.Second)
	if a, b := c.hosts[0].State().Rate, c.hosts[1].State().Rate; a != 0.75 || b != 1 {
		t.Errorf("the rates are %v and %v", a, b)
	}
	c.pass(10 * time.Second)
	if r := c.hosts[0].State().Rate; r >= 0 || !c.next.IsZero() {
		t.Errorf("after an interval without requests it is %v, and something is due at %v", r, c.next)
	}
}

// Nothing is due while nothing happens, and one request has the rates looked at again.
func TestWhileNothingHappensNothingIsDue(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 5, defaults(), nil)
	want(t, c.decide())
	if !c.next.IsZero() {
		t.Fatalf("something is due at %v", c.next)
	}
	for range 3 {
		times(10, func() { c.hosts[0].Answered(200) })
		if c.wakes != 1 {
			t.Fatalf("woken %d times", c.wakes)
		}
		c.decide()
		if at := c.now.Add(10 * time.Second); c.next != at {
			t.Fatalf("due at %v, want %v", c.next, at)
		}
		c.pass(time.Minute)
		if !c.next.IsZero() {
			t.Fatalf("something is due at %v", c.next)
		}
	}
}

func TestWhatAnotherProcessKnewGoesOn(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 10, defaults(), nil)
	in := func(d time.Duration) time.Time { return c.now.Add(d) }
	for i, tt := range []struct {
		was     outlier.State
		ejected bool
		until   time.Time
		count   int
	}{
		{outlier.State{Ejections: 3}, false, time.Time{}, 3},
		{outlier.State{Ejections: 2, Until: in(40 * time.Second), Kind: outlier.SuccessRate}, true, in(40 * time.Second), 2},
		{outlier.State{Ejections: 2, Until: in(-time.Second)}, false, time.Time{}, 2},
		{outlier.State{Until: in(time.Second)}, true, in(time.Second), 1},
		{outlier.State{Ejections: 1, Until: in(time.Hour)}, true, in(5 * time.Minute), 1},
		{outlier.State{Ejections: -1}, false, time.Time{}, 0},
		{outlier.State{Ejections: 1 << 40}, false, time.Time{}, 3600},
	} {
		if got := c.hosts[i].Restore(tt.was, c.now); got != tt.ejected {
			t.Errorf("%+v: ejected is %v", tt.was, got)
		}
		if s := c.hosts[i].State(); !s.Until.Equal(tt.until) || s.Ejections != tt.count || s.Kind != tt.was.Kind {
			t.Errorf("%+v has become %+v", tt.was, s)
		}
	}
	if c.wakes == 0 {
		t.Error("nobody was told")
	}
	want(t, c.decide())
	want(t, c.pass(time.Second), "return 3 consecutive_5xx")
	want(t, c.pass(39*time.Second), "return 1 success_rate")
	want(t, c.pass(260*time.Second), "return 4 consecutive_5xx")
}

// At no time are more ejected than may be, or for longer, whatever happens.
func TestWhateverHappensTheBoundsHold(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 9))
		cfg := defaults()
		cfg.MaxEjected.Value = r.Int64N(dynamic.Whole + 1)
		cfg.ConsecutiveGatewayFailures = r.IntN(4)
		cfg.EjectionJitter = time.Duration(r.IntN(5)) * time.Second
		c := newCluster(t, 1+r.IntN(20), cfg, nil)
		most := max(1, int(int64(len(c.hosts))*cfg.MaxEjected.Value/dynamic.Whole))
		longest := cfg.MaxEjectionTime + cfg.EjectionJitter
		for range 300 {
			h := c.hosts[r.IntN(len(c.hosts))]
			times(r.IntN(8), []func(){h.Failed, h.NotConnected, h.Connected, func() { h.Answered(200 + 100*r.IntN(4)) }, func() { h.Answered(503) }}[r.IntN(5)])
			if c.wakes > 0 {
				c.decide()
			}
			c.pass(time.Duration(r.IntN(20)) * time.Second)
			ejected := 0
			for _, h := range c.hosts {
				s := h.State()
				if s.Until.IsZero() {
					continue
				}
				ejected++
				if left := s.Until.Sub(c.now); left <= 0 || left > longest || s.Ejections < 1 {
					t.Fatalf("seed %d: ejected for %v more: %+v", seed, left, s)
				}
			}
			if ejected > most {
				t.Fatalf("seed %d: %d of %d are ejected, want %d at most", seed, ejected, len(c.hosts), most)
			}
		}
		c.pass(2 * time.Hour)
		for _, h := range c.hosts {
			if s := h.State(); !s.Until.IsZero() || s.Ejections != 0 {
				t.Fatalf("seed %d: hours later: %+v", seed, s)
			}
		}
	}
}

func TestManyCountAtOnceAndARowIsFoundOnce(t *testing.T) {
	t.Parallel()
	cfg := defaults()
	cfg.SuccessRateDeviations = 0
	var wakes atomic.Int64
	d := outlier.New(&cfg, nil, func() { wakes.Add(1) })
	h := d.NewHost()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { times(1000, h.Failed) })
	}
	all.Wait()
	if n := wakes.Load(); n != 1 {
		t.Errorf("woken %d times", n)
	}
	if got := d.Decide(time.Now(), []*outlier.Host{h}, nil); len(got.Events) != 1 || got.Events[0].Act != outlier.Eject {
		t.Errorf("decided %+v", got)
	}
}

func TestCountingAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	cfg := defaults()
	d := outlier.New(&cfg, nil, func() {})
	h := d.NewHost()
	if n := testing.AllocsPerRun(1000, func() { h.Answered(500); h.Answered(200); h.Connected() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAnswered(b *testing.B) {
	cfg := defaults()
	h := outlier.New(&cfg, nil, func() {}).NewHost()
	for b.Loop() {
		h.Answered(200)
	}
}

func TestKindsReadAsTheyAreDocumented(t *testing.T) {
	t.Parallel()
	for k, name := range []string{"consecutive_5xx", "consecutive_gateway_failures", "consecutive_connect_failures", "success_rate"} {
		if outlier.Kind(k).String() != name || outlier.KindOf(name) != outlier.Kind(k) {
			t.Errorf("%d is %q, want %q", k, outlier.Kind(k), name)
		}
	}
	if outlier.NumKinds.String() != "unknown" || outlier.KindOf("else") != outlier.NumKinds {
		t.Error("what is none has a name")
	}
}
