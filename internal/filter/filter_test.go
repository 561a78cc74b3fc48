package filter_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/filter"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a configuration with one route, and what has become of it.
type site struct {
	t        *testing.T
	listener config.Filters
	host     config.Filters
	route    config.Filters
	values   dynamic.Set
	registry *metrics.Registry

	loop   *stream.Loop
	chain  filter.Chain
	the    *route.Route
	random uint64
}

// build makes the chain of the route.
func build(t *testing.T, change func(*site)) *site {
	s := &site{t: t, registry: metrics.NewRegistry()}
	change(s)
	cfg := &config.Config{
		HTTPListeners: []config.Listener{{Name: "public", Filters: &s.listener}},
		VirtualHosts: []config.VirtualHost{{Name: "site", Listeners: []string{"public"}, Domains: []string{"*"}, Filters: &s.host,
			Routes: []config.Route{{Match: config.Match{Prefix: "/"}, Filters: &s.route}}}},
	}
	routes := route.New(cfg, nil).Routes()
	chains := filter.New(filter.Options{Routes: routes, Listeners: cfg.HTTPListeners, Values: &s.values, Metrics: s.registry})
	s.the = routes[0]
	if all := chains["public"]; all != nil {
		s.chain = all[0]
	}
	s.loop = streamtest.NewVirtual(t)
	return s
}

// from is a request of a client.
func (s *site) from(client string) *filter.Request {
	r := &filter.Request{
		Head:     &exchange.Request{Method: "GET", Target: "/"},
		Listener: "public", Route: s.the, Loop: s.loop, Random: func() uint64 { return s.random },
	}
	if client != "" {
		r.Client = netip.MustParseAddr(client)
	}
	return r
}

// ask has a request pass the chain, and returns the status of the answer, 0 without one.
func (s *site) ask(r *filter.Request) (status int) {
	streamtest.Go(s.loop, func(t *task.Task) {
		r.Task = t
		if a := s.chain.Filter(r); a != nil {
			status = a.Status
		}
	})
	return status
}

// count is what was counted under a name and labels.
func (s *site) count(name string, labels ...string) uint64 {
	for _, f := range s.registry.Families() {
		for _, series := range f.Series {
			if f.Desc.Name == name && slices.Equal(series.Labels, labels) {
				return uint64(series.Value)
			}
		}
	}
	s.t.Errorf("there is no %s%v", name, labels)
	return 0
}

func networks(all ...string) (prefixes []netip.Prefix) {
	for _, p := range all {
		prefixes = append(prefixes, netip.MustParsePrefix(p))
	}
	return prefixes
}

func TestWithoutConfigurationThereIsNoChain(t *testing.T) {
	t.Parallel()
	s := build(t, func(*site) {})
	if s.chain != nil {
		t.Errorf("the chain is %v", s.chain)
	}
}

func TestAddresses(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name        string
		allow, deny []netip.Prefix
		pass, not   []string // "": a client on a unix socket
	}{
		{"allow", networks("10.0.0.0/8", "2001:db8::/32"), nil, []string{"10.1.2.3", "2001:db8::1"}, []string{"11.0.0.1", "2001:db9::1", ""}},
		{"deny", nil, networks("10.0.0.0/8", "::1/128"), []string{"11.0.0.1", "::2", ""}, []string{"10.1.2.3", "::1"}},
		{"deny wins", networks("10.0.0.0/8"), networks("10.1.0.0/16"), []string{"10.2.0.1"}, []string{"10.1.0.1", "11.0.0.1"}},
		{"deny wins also where allow is narrower", networks("10.1.2.3/32"), networks("10.1.0.0/16"), nil, []string{"10.1.2.3"}},
		{"all of one kind", networks("0.0.0.0/0"), nil, []string{"1.2.3.4", ""}, []string{"::1"}},
		{"nobody", nil, networks("0.0.0.0/0", "::/0"), nil, []string{"1.2.3.4", "::1", ""}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := build(t, func(s *site) { s.listener = config.Filters{Allow: tt.allow, Deny: tt.deny} })
				for _, client := range tt.pass {
					if got := s.ask(s.from(client)); got != 0 {
						t.Errorf("%q gets %d", client, got)
					}
				}
				for _, client := range tt.not {
					if got := s.ask(s.from(client)); got != 403 {
						t.Errorf("%q gets %d, want 403", client, got)
					}
				}
				if got := s.count("holdfast_filter_addresses_denied_total", "listener", "public"); got != uint64(len(tt.not)) {
					t.Errorf("%d are counted, want %d", got, len(tt.not))
				}
			})
		})
	}
}

// A client must be allowed everywhere: a route cannot let in whom the listener refuses.
func TestAddressesOfAllPlacesCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) {
			s.listener.Deny = networks("10.0.0.1/32")
			s.host.Allow = networks("10.0.0.0/24")
			s.route.Allow = networks("10.0.0.0/8")
			s.route.Deny = networks("10.0.0.3/32")
		})
		for client, want := range map[string]int{"10.0.0.1": 403, "10.0.0.2": 0, "10.0.0.3": 403, "10.0.1.1": 403} {
			if got := s.ask(s.from(client)); got != want {
				t.Errorf("%s gets %d, want %d", client, got, want)
			}
		}
	})
}

// rate is a limit of n per second.
func rate(n, burst int64, byClient bool) *config.RateLimit {
	return &config.RateLimit{Requests: config.Dynamic{Value: n, Key: "rate"}, Per: time.Second, Burst: burst, ByClient: byClient}
}

// passed asks n times at once and returns how many passed.
func (s *site) passed(n int, r func() *filter.Request) (passed int) {
	for range n {
		if s.ask(r()) == 0 {
			passed++
		}
	}
	return passed
}

func TestABucketGivesItsBurstAndThenItsRate(t *testing.T) {
	t.Parallel()
	for _, byClient := range []bool{false, true} {
		t.Run(fmt.Sprint("by client ", byClient), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := build(t, func(s *site) { s.route.RateLimit = rate(10, 3, byClient) })
				one := func() *filter.Request { return s.from("192.0.2.1") }
				want := func(what string, n int) {
					t.Helper()
					if got := s.passed(10, one); got != n {
						t.Errorf("%s: %d pass, want %d", what, got, n)
					}
				}
				want("at first", 3)
				time.Sleep(99 * time.Millisecond)
				want("before a token is back", 0)
				time.Sleep(2 * time.Millisecond)
				want("when one is back", 1)
				time.Sleep(200 * time.Millisecond)
				want("two later", 2)
				time.Sleep(time.Hour)
				want("after a long time", 3)
				if got := s.count("holdfast_filter_rate_limited_total", "route", "site:prefix=/", "requests"); got != 50-9 {
					t.Errorf("%d are counted, want 41", got)
				}
			})
		})
	}
}

func TestRequestsAndTunnelsHaveLimitsOfTheirOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) {
			s.route.RateLimit, s.listener.TunnelRateLimit = rate(1, 2, false), rate(1, 3, false)
		})
		upgrade := func() *filter.Request {
			r := s.from("192.0.2.1")
			r.Head.Upgrade = "websocket"
			return r
		}
		if got := s.passed(10, func() *filter.Request { return s.from("192.0.2.1") }); got != 2 {
			t.Errorf("%d requests pass, want 2", got)
		}
		if got := s.passed(10, upgrade); got != 3 {
			t.Errorf("%d upgrades pass, want 3", got)
		}
	})
}

func TestAnUpgradeToARouteThatAnswersItselfIsARequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) {
			s.route.RateLimit, s.listener.TunnelRateLimit = rate(1, 2, false), rate(1, 3, false)
		})
		s.the.Direct = new(config.DirectResponse)
		if got := s.passed(10, func() *filter.Request {
			r := s.from("192.0.2.1")
			r.Head.Upgrade = "websocket"
			return r
		}); got != 2 {
			t.Errorf("%d upgrades pass, want the 2 of requests", got)
		}
	})
}

func TestRetryAfterIsWhenTheNextOnePasses(t *testing.T) {
	t.Parallel()
	for after, perHour := range map[string]int64{"1": 3600 * 10, "4": 900, "360": 10} {
		synctest.Test(t, func(t *testing.T) {
			s := build(t, func(s *site) {
				s.route.RateLimit = &config.RateLimit{Requests: config.Dynamic{Value: perHour}, Per: time.Hour, Burst: 1}
			})
			s.ask(s.from("192.0.2.1"))
			r := s.from("192.0.2.1")
			streamtest.Go(s.loop, func(tk *task.Task) {
				r.Task = tk
				a := s.chain.Filter(r)
				if got, _ := a.Fields.Get("Retry-After"); a.Status != 429 || got != after || a.Cause.Flags() != flags.RateLimited {
					t.Errorf("%d an hour: %+v", perHour, a)
				}
			})
		})
	}
}

func TestARateIsOverriddenAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) { s.route.RateLimit = rate(1, 1, false) })
		one := func() *filter.Request { return s.from("192.0.2.1") }
		if got := s.passed(5, one); got != 1 {
			t.Errorf("%d pass, want 1", got)
		}
		s.values.Apply(map[string]float64{"rate": 1000})
		s.ask(one()) // finds the bucket empty, and tokens that come back faster
		time.Sleep(2 * time.Millisecond)
		if got := s.passed(5, one); got != 1 {
			t.Errorf("%d pass of the faster rate, want 1", got)
		}
		s.values.Apply(map[string]float64{"rate": 0})
		time.Sleep(time.Hour)
		if got := s.passed(5, one); got != 0 {
			t.Errorf("%d pass of none, want 0", got)
		}
	})
}

func TestEachClientHasABucketOfItsOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) { s.route.RateLimit = rate(1, 1, true) })
		for _, tt := range []struct {
			client string
			want   int
		}{
			{"192.0.2.1", 0},
			{"192.0.2.1", 429},
			{"192.0.2.2", 0},
			{"2001:db8::1", 0},
			{"2001:db8::2", 429}, // of the same network
			{"2001:db8:0:1::1", 0},
			{"::1", 0},
			{"::1", 429},
			{"", 0}, // all on unix sockets are one
			{"", 429},
		} {
			if got := s.ask(s.from(tt.client)); got != tt.want {
				t.Errorf("%q gets %d, want %d", tt.client, got, tt.want)
			}
		}
	})
}

func TestADelayTakesItsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) {
			s.route.Fault = &config.Fault{
				Headers: []config.FaultHeader{{Name: "X-Fault", Value: "yes"}, {Name: "X-Any"}},
				Delay:   config.FaultDelay{Percent: config.Dynamic{Value: dynamic.Whole / 2, Key: "delay"}, Duration: 1234 * time.Millisecond},
				Abort:   config.FaultAbort{Percent: config.Dynamic{Value: dynamic.Whole / 4}, Status: 418}, MaxActive: config.Dynamic{Value: 1},
			}
		})
		faulty := exchange.Fields{{Name: "x-fault", Value: "yes"}, {Name: "X-Any", Value: "any"}}
		for _, tt := range []struct {
			name   string
			fields exchange.Fields
			random uint64
			took   time.Duration
			status int
		}{
			{"without a field", faulty[:1], 0, 0, 0},
			{"another value", exchange.Fields{{Name: "x-fault", Value: "no"}, faulty[1]}, 0, 0, 0},
			{"both", faulty, 0, 1234 * time.Millisecond, 418},
			{"a delay alone", faulty, dynamic.Whole / 4, 1234 * time.Millisecond, 0},
			{"neither", faulty, dynamic.Whole / 2, 0, 0},
		} {
			r, began := s.from("192.0.2.1"), time.Now()
			r.Head.Fields, s.random = tt.fields, tt.random
			status := s.ask(r)
			if took := time.Since(began); took < tt.took || took > tt.took+10*time.Millisecond || status != tt.status || r.Delayed != (tt.took > 0) {
				t.Errorf("%s: %d after %v, want %d after %v", tt.name, status, took, tt.status, tt.took)
			}
		}
		s.values.Apply(map[string]float64{"delay": 0})
		began := time.Now()
		r := s.from("192.0.2.1")
		r.Head.Fields, s.random = faulty, 0
		if status := s.ask(r); status != 418 || time.Since(began) > 0 {
			t.Errorf("overridden: %d after %v", status, time.Since(began))
		}
	})
}

func TestDelaysAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) {
			s.route.Fault = &config.Fault{
				Delay:     config.FaultDelay{Percent: config.Dynamic{Value: dynamic.Whole}, Duration: time.Minute},
				MaxActive: config.Dynamic{Value: 3},
			}
		})
		var ends []<-chan struct{}
		began := time.Now()
		for range 5 {
			r := s.from("192.0.2.1")
			ends = append(ends, streamtest.Begin(s.loop, func(t *task.Task) { r.Task = t; s.chain.Filter(r) }))
		}
		<-ends[3]
		<-ends[4]
		if took := time.Since(began); took > 0 {
			t.Errorf("those that were too many took %v", took)
		}
		if active := s.count("holdfast_filter_fault_delays_active", "site", "site:prefix=/"); active != 3 {
			t.Errorf("%d are active, want 3", active)
		}
		for _, e := range ends {
			<-e
		}
		for kind, want := range map[string]uint64{"delay": 3, "overflow": 2, "abort": 0} {
			if got := s.count("holdfast_filter_faults_total", "site", "site:prefix=/", kind); got != want {
				t.Errorf("%d times %s, want %d", got, kind, want)
			}
		}
	})
}

// Who waits in a filter leaves it at once when the client has gone, and no filter behind it
// is asked.
func TestTheEndOfAnExchangeEndsAWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(s *site) {
			s.route.Fault = &config.Fault{
				Delay: config.FaultDelay{Percent: config.Dynamic{Value: dynamic.Whole}, Duration: time.Hour}, MaxActive: config.Dynamic{Value: 1},
				Abort: config.FaultAbort{Percent: config.Dynamic{Value: dynamic.Whole}, Status: 503},
			}
		})
		s.chain = append(s.chain, refuser{})
		r, gone := s.from("192.0.2.1"), errors.New("gone")
		var answer *filter.Answer
		end := streamtest.Begin(s.loop, func(t *task.Task) { r.Task = t; answer = s.chain.Filter(r) })
		time.Sleep(time.Second)
		streamtest.Do(s.loop, func() { r.End(gone) })
		<-end
		if answer != nil || r.Over() != gone {
			t.Errorf("the answer is %+v, over because of %v", answer, r.Over())
		}
		if active := s.count("holdfast_filter_fault_delays_active", "site", "site:prefix=/"); active != 0 {
			t.Errorf("%d are active", active)
		}
	})
}

// refuser refuses everything.
type refuser struct{}

func (refuser) Filter(*filter.Request) *filter.Answer { return &filter.Answer{Status: 500} }

// The order is by kind, and then from the listener to the route.
func TestTheOrderOfTheChain(t *testing.T) {
	t.Parallel()
	all := config.Filters{Deny: networks("10.0.0.0/8"), RateLimit: rate(1, 1, false), TunnelRateLimit: rate(1, 1, false)}
	s := build(t, func(s *site) {
		s.listener, s.host, s.route = all, config.Filters{Deny: all.Deny}, all
		s.route.Fault = &config.Fault{}
		s.route.Authorize = &config.Authorize{}
	})
	var got []string
	for _, f := range s.chain {
		got = append(got, strings.TrimPrefix(fmt.Sprintf("%T", f), "*filter."))
	}
	want := []string{"addresses", "addresses", "addresses", "rateLimit", "rateLimit", "rateLimit", "rateLimit", "fault", "authorization"}
	if !slices.Equal(got, want) {
		t.Errorf("\n got %v\nwant %v", got, want)
	}
}

// Listeners share the limit of a route, and routes that of a listener.
func TestALimitCountsEverythingThatItIsFor(t *testing.T) {
	t.Parallel()
	cfg := &config.Config{
		HTTPListeners: []config.Listener{{Name: "a", Filters: &config.Filters{RateLimit: rate(1, 9, false)}}, {Name: "b"}},
		VirtualHosts: []config.VirtualHost{{Name: "site", Listeners: []string{"a", "b"}, Domains: []string{"*"}, Routes: []config.Route{
			{Match: config.Match{Path: "/1"}, Filters: &config.Filters{RateLimit: rate(1, 1, false)}}, {Match: config.Match{Path: "/2"}}}}},
	}
	routes := route.New(cfg, nil).Routes()
	chains := filter.New(filter.Options{Routes: routes, Listeners: cfg.HTTPListeners})
	a, b := chains["a"], chains["b"]
	if len(a[0]) != 2 || len(a[1]) != 1 || len(b[0]) != 1 || b[1] != nil {
		t.Fatalf("the chains are %v and %v", a, b)
	}
	if a[0][0] != a[1][0] {
		t.Error("the routes of a listener do not share its limit")
	}
	if a[0][1] != b[0][0] {
		t.Error("the listeners of a route do not share its limit")
	}
}

func TestAlarmsRingInTheirOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := build(t, func(*site) {})
		var mu sync.Mutex
		var rang []time.Duration
		began := time.Now()
		var ends []<-chan struct{}
		for _, ms := range []time.Duration{50, 10, 30, 20, 40, 1} {
			r := s.from("192.0.2.1")
			ends = append(ends, streamtest.Begin(s.loop, func(tk *task.Task) {
				r.Task = tk
				if !r.Sleep(ms * time.Millisecond) {
					t.Error("cut short")
				}
				mu.Lock()
				defer mu.Unlock()
				if late := time.Since(began) - ms*time.Millisecond; late < 0 || late > 5*time.Millisecond {
					t.Errorf("the alarm of %d ms is %v late", ms, late)
				}
				rang = append(rang, ms)
			}))
		}
		for _, e := range ends {
			<-e
		}
		if !slices.IsSorted(rang) || len(rang) != 6 {
			t.Errorf("they rang in the order %v", rang)
		}
	})
}
