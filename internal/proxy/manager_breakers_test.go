package proxy_test

import (
	"io"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/tunnel"
)

// busily answers after ten seconds.
func busily(o *origin) {
	o.reads()
	time.Sleep(10 * time.Second)
	ok(o)
}

// limiting is a farm whose clusters have limits.
func limiting(t *testing.T, limits config.Limits) *farm {
	f := newFarm(t)
	f.limits[config.PriorityDefault] = limits
	f.cluster["web"] = three
	for _, e := range three {
		f.behave[e] = busily
	}
	f.routes = []config.Route{retrying(onConnect | onReset | on5xx | onGateway)}
	f.routes[0].WebSocket = true
	f.routes[0].Timeout = 15 * time.Second
	f.routes[0].Tunnels.HandshakeTimeout = 15 * time.Second
	return f
}

func most(n int64) config.Limit { return config.Limit{Dynamic: config.Dynamic{Value: n}, Set: true} }

// wantOverloaded wants the answer to be that of a limit, or not.
func (c *client) wantOverloaded(want bool) {
	c.t.Helper()
	value, _ := c.answer.Fields.Get("Holdfast-Overloaded")
	if got := value == "true"; got != want {
		c.t.Errorf("the answer says that there is too much: %v, want %v: %+v", got, want, c.answer)
	}
}

type asks func(t *testing.T, authority, target string) *client

// What is refused by a limit is told as that, at once, and tried nowhere else.
func TestAnOverflowIsAnswered(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		limits      config.Limits
		first, then asks
		counted     string
	}{
		"requests": {
			config.Limits{config.LimitedRequests: most(1)}, get, get,
			"downstream_requests_refused_total{public,overload} 1\ncluster_overflows_total{web,default,requests} 1",
		},
		"requests with bodies": {
			config.Limits{config.LimitedRequests: most(1)}, get, post,
			"downstream_requests_refused_total{public,overload} 1\ncluster_overflows_total{web,default,requests} 1",
		},
		"upgrades under way": {
			config.Limits{config.LimitedTunnels: most(1)}, upgrade, upgrade,
			"downstream_requests_refused_total{public,overload} 1\ndownstream_upgrades_total{public,overload} 1\ncluster_overflows_total{web,default,tunnels} 1",
		},
		"requests that wait": {
			config.Limits{config.LimitedConnections: most(1), config.LimitedPending: most(0)}, get, get,
			"downstream_requests_refused_total{public,overload} 1\ncluster_overflows_total{web,default,pending} 1\ncluster_overflows_total{web,default,connections} 1",
		},
		"upgrades that wait": {
			config.Limits{config.LimitedConnections: most(1), config.LimitedPending: most(0)}, get, upgrade,
			"downstream_requests_refused_total{public,overload} 1\ndownstream_upgrades_total{public,overload} 1\n" +
				"cluster_overflows_total{web,default,pending} 1\ncluster_overflows_total{web,default,connections} 1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := limiting(t, c.limits)
				m := f.manager()
				has := c.first(t, "a.example", "/").start(m)
				time.Sleep(time.Second)
				began := time.Now()
				then := c.then(t, "a.example", "/").start(m).wait()
				then.wantStatus(503)
				then.wantOverloaded(true)
				if took := time.Since(began); took > 0 {
					t.Errorf("it took %v", took)
				}
				f.wantLog("limits.", " of the cluster is reached in priority default")
				got := map[string]int64{}
				for _, name := range []string{
					"downstream_requests_refused_total{public,overload}", "downstream_upgrades_total{public,overload}",
					"downstream_upgrades_total{public,upstream unreachable}",
					"cluster_overflows_total{web,default,requests}", "cluster_overflows_total{web,default,tunnels}", "cluster_overflows_total{web,default,retries}",
					"cluster_overflows_total{web,default,pending}", "cluster_overflows_total{web,default,connections}",
					"cluster_connect_attempts_exhausted_total{web}", "route_retries_total{site,site:prefix=/}",
				} {
					if n := figures(f.registry)[name]; n > 0 {
						got[name] = n
					}
				}
				wantFigures(t, got, c.counted)
				if len(f.attempts) != 1 {
					t.Errorf("connected to %v", f.attempts)
				}
				has.wait()
				again := get(t, "a.example", "/").start(m).wait()
				again.wantStatus(200)
				again.wantOverloaded(false)
			})
		})
	}
}

func TestARouteOfHighPriorityPassesTheLimitOfTheOthers(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := limiting(t, config.Limits{config.LimitedRequests: most(1)})
		urgent := to("/urgent", "web")
		urgent.Priority = config.PriorityHigh
		f.routes = append([]config.Route{urgent}, f.routes...)
		m := f.manager()
		has := get(t, "a.example", "/").start(m)
		time.Sleep(time.Second)
		get(t, "a.example", "/").start(m).wait().wantStatus(503)
		get(t, "a.example", "/urgent").start(m).wait().wantStatus(200)
		has.wait().wantStatus(200)
	})
}

// Who waits for a connection has the time that its route gives it.
func TestTheWaitForAConnectionIsBounded(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		asks   asks
		route  func(*config.Route)
		leaves time.Duration // 0: it does not
		status int
		took   time.Duration
	}{
		"a request gets the connection":       {get, nil, 0, 200, 20 * time.Second},
		"a request is late":                   {get, func(r *config.Route) { r.Timeout = 4 * time.Second }, 0, 504, 4 * time.Second},
		"one with a body is late":             {post, func(r *config.Route) { r.Timeout = 4 * time.Second }, 0, 504, 4 * time.Second},
		"one with a body gets the connection": {post, func(r *config.Route) { r.Timeout = 12 * time.Second }, 0, 200, 20 * time.Second},
		"an upgrade is late":                  {upgrade, func(r *config.Route) { r.Tunnels.HandshakeTimeout = 4 * time.Second }, 0, 504, 4 * time.Second},
		"nothing moves":                       {post, func(r *config.Route) { r.Timeout, r.StreamIdleTimeout = 0, 4*time.Second }, 0, 504, 4 * time.Second},
		"the client leaves":                   {get, nil, 3 * time.Second, 0, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := limiting(t, config.Limits{config.LimitedConnections: most(1)})
				f.routes[0].Timeout = 0
				f.routes[0].Retry = nil
				waits := f.routes[0]
				waits.Match.Prefix, waits.Timeout = "/waits", 25*time.Second
				if c.route != nil {
					c.route(&waits)
				}
				f.routes = []config.Route{waits, f.routes[0]}
				m := f.manager()
				has := get(t, "a.example", "/").start(m)
				time.Sleep(time.Nanosecond)
				began := time.Now()
				late := c.asks(t, "a.example", "/waits").start(m)
				if late.request.Method == "POST" {
					go func() { io.WriteString(late.send, "body"); late.send.Close() }()
				}
				if c.leaves > 0 {
					time.Sleep(c.leaves)
					late.cancel(errGone)
				}
				late.wait()
				took := time.Since(began)
				late.wantStatus(c.status)
				if took < c.took-time.Millisecond || took > c.took+2*time.Second {
					t.Errorf("it took %v, want %v", took, c.took)
				}
				if c.status == 504 {
					late.wantOverloaded(false)
				}
				has.wait().wantStatus(200)
				f.behave[first] = ok
				get(t, "a.example", "/").start(m).wait().wantStatus(200) // nothing is held by who has gone
			})
		})
	}
}

// A retry must find room in the budget and in the limit.
func TestRetriesKeepToTheLimit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		retries int64
		budget  int64
		want    string
	}{
		"no limit but the budget": {5, 3, "retries 1\nretry_limit_exceeded 1"},
		"none by the limit":       {0, 3, "retry_overflows 1"},
		"none by the budget":      {5, 0, "retry_overflows 1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := limiting(t, config.Limits{config.LimitedRetries: most(c.retries)})
				f.budget.MinConcurrency = c.budget
				for _, e := range three {
					f.behave[e] = answering(503)
				}
				m := f.manager()
				a := get(t, "a.example", "/").start(m).wait()
				a.wantStatus(503)
				a.wantOverloaded(false) // it is the upstream's
				f.wantRetries(c.want)
				if n := figures(f.registry)["cluster_circuit_breaker_open{web,default,retries}"]; n > 0 && c.retries > 0 {
					t.Error("a retry is counted still")
				}
			})
		})
	}
}

func TestACopyThatALimitRefusesIsDropped(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := mirrored(t)
		f.cluster["mirror"] = append(f.cluster["mirror"], "10.1.0.2:80")
		f.change = func(c *config.Config) {
			for i := range c.Clusters {
				if c.Clusters[i].Name == "mirror" {
					c.Clusters[i].Breakers[0][config.LimitedRequests] = most(0)
				}
			}
		}
		get(t, "a.example", "/").start(f.manager()).wait().wantStatus(200)
		time.Sleep(time.Second)
		all := figures(f.registry)
		if all["route_mirror_drops_total{site,site:prefix=/,overload}"] != 1 || all["route_mirror_failures_total{site,site:prefix=/}"] != 0 ||
			all["cluster_overflows_total{mirror,default,requests}"] != 1 {
			t.Errorf("counted %v", all)
		}
		if len(f.copies()) > 0 {
			t.Error("there is a copy")
		}
	})
}

func TestAQuestionThatALimitRefusesCannotBeAsked(t *testing.T) {
	t.Parallel()
	for open, status := range map[bool]int{false: 403, true: 200} {
		inBubble(t, func(t *testing.T) {
			f := newFarm(t)
			a := authorize()
			a.FailOpen = open
			f.routes[0].Filters = &config.Filters{Authorize: a}
			f.cluster["auth"] = []string{authAt}
			f.change = func(c *config.Config) {
				for i := range c.Clusters {
					if c.Clusters[i].Name == "auth" {
						c.Clusters[i].Breakers[0][config.LimitedRequests] = most(0)
					}
				}
			}
			get(t, "a.example", "/").start(f.manager()).wait().wantStatus(status)
			if all := figures(f.registry); all["cluster_overflows_total{auth,default,requests}"] != 1 {
				t.Errorf("counted %v", all)
			}
		})
	}
}

// A tunnel has its place until it ends, an upgrade that is refused only until then.
func TestTunnelsKeepToTheLimit(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := limiting(t, config.Limits{config.LimitedTunnels: most(2), config.LimitedConnections: most(1)})
		for _, e := range three {
			f.behave[e] = agrees
		}
		m := f.manager()
		f.behave[first] = answering(404)
		upgrade(t, "a.example", "/").start(m).wait().wantStatus(404)
		f.behave[first] = func(o *origin) { o.heads <- &exchange.Response{Status: 101, Upgrade: "other"} }
		for range 3 {
			upgrade(t, "a.example", "/").start(m).wait()
		}
		if len(f.tunnels) != 2 {
			t.Fatalf("%d tunnels", len(f.tunnels))
		}
		over := upgrade(t, "a.example", "/").start(m).wait()
		over.wantStatus(503)
		over.wantOverloaded(true)
		m.TunnelEnded(&tunnel.Record{Origin: f.tunnels[0].Origin})
		f.behave[first] = agrees
		upgrade(t, "a.example", "/").start(m).wait().wantStatus(101)
		for _, s := range f.tunnels[1:] {
			m.TunnelLeft(s.Origin)
		}
		m.TunnelArrived(f.tunnels[0].Origin)
		if got := figures(f.registry)["cluster_tunnels_active{web}"]; got != 1 {
			t.Errorf("%d tunnels are counted", got)
		}
	})
}
