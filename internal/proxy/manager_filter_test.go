package proxy_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
)

const authAt = "10.0.0.9:80" // the endpoint of "auth"

// guarded is a farm of which the route has filters, and an authorization service.
func guarded(t *testing.T, f config.Filters) *farm {
	farm := newFarm(t)
	farm.routes = []config.Route{webSocket("/", "web")}
	farm.routes[0].Filters = &f
	farm.cluster["auth"] = []string{authAt}
	return farm
}

func authorize() *config.Authorize {
	return &config.Authorize{
		Cluster: "auth", PathPrefix: "/check", Timeout: time.Second, Upgrades: true,
		RequestHeaders: []string{"Authorization"}, UpstreamHeaders: []string{"X-User"}, ClientHeaders: []string{"WWW-Authenticate"},
	}
}

// seenBy are the exchanges of one endpoint.
func (f *farm) seenBy(address string) (seen []*origin) {
	for _, o := range f.origins() {
		if o.conn.address == address {
			seen = append(seen, o)
		}
	}
	return seen
}

// says answers with these fields and a body.
func says(status int, body string, fields ...exchange.Field) func(*origin) {
	return func(o *origin) {
		o.reads()
		o.answers(status, fields...)
		o.writes(body)
		o.ends()
	}
}

func networks(all ...string) (prefixes []netip.Prefix) {
	for _, p := range all {
		prefixes = append(prefixes, netip.MustParsePrefix(p))
	}
	return prefixes
}

// What a filter refuses reaches no upstream, as a request or an upgrade, and is counted and
// said.
func TestFiltersAnswerRequestsAndUpgrades(t *testing.T) {
	t.Parallel()
	none := &config.RateLimit{Requests: config.Dynamic{Value: 1}, Per: time.Hour, Burst: 1}
	always := config.Dynamic{Value: dynamic.Whole}
	tests := []struct {
		name    string
		filters config.Filters
		status  int
		counted string
		log     string
		twice   bool // the second one is refused
	}{
		{"an address", config.Filters{Deny: networks("192.0.2.0/24")}, 403, "address denied", "address is not allowed", false},
		{"too many", config.Filters{RateLimit: none, TunnelRateLimit: none}, 429, "rate limited", "too many", true},
		{"a fault", config.Filters{Fault: &config.Fault{Abort: config.FaultAbort{Percent: always, Status: 599}}}, 599, "fault injected", "on purpose", false},
	}
	for _, tt := range tests {
		for what, begin := range map[string]func(*testing.T, string, string) *client{"request": get, "upgrade": upgrade} {
			t.Run(tt.name+", "+what, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := guarded(t, tt.filters)
					f.behave[first] = answering(200)
					m := f.manager()
					if tt.twice {
						begin(t, "a.example", "/").start(m).wait().wantStatus(200)
					}
					before := len(f.origins())
					c := begin(t, "a.example", "/").start(m).wait()
					c.wantStatus(tt.status)
					c.wantEnd(true)
					c.wantClose(what == "upgrade")
					if len(f.origins()) > before {
						t.Error("the upstream has seen it")
					}
					if after, ok := c.answer.Fields.Get("Retry-After"); ok != tt.twice || ok && after != "3600" {
						t.Errorf("Retry-After is %q, %v", after, ok)
					}
					f.wantLog("request refused by a filter", tt.log)
					got := figures(f.registry)
					if got["downstream_requests_refused_total{public,"+tt.counted+"}"] != 1 {
						t.Errorf("not counted as %q: %v", tt.counted, got)
					}
					if n := got["downstream_upgrades_total{public,filtered}"]; what == "upgrade" != (n == 1) {
						t.Errorf("%d upgrades are counted as filtered", n)
					}
				})
			})
		}
	}
}

// A filter comes after what is wrong with the request itself: an attempt that cannot become a
// tunnel takes no token.
func TestWhatIsWrongWithAnUpgradeIsSaidBeforeFilters(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := guarded(t, config.Filters{TunnelRateLimit: &config.RateLimit{Requests: config.Dynamic{Value: 1}, Per: time.Hour, Burst: 1}})
		f.behave[first] = agrees
		m := f.manager()
		bad := upgrade(t, "a.example", "/")
		bad.request.UpgradeBody = true
		bad.start(m).wait().wantStatus(400)
		upgrade(t, "a.example", "/").start(m).wait().wantStatus(101)
		upgrade(t, "a.example", "/").start(m).wait().wantStatus(429)
	})
}

// The address that counts is IPv4's own also where the socket takes both kinds.
func TestTheFiltersClientIsThePeer(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := guarded(t, config.Filters{Deny: networks("192.0.2.7/32")})
		m := f.manager()
		for addr, want := range map[string]int{"[::ffff:192.0.2.7]:1": 403, "[::ffff:192.0.2.8]:1": 200} {
			c := get(t, "a.example", "/")
			c.down.Remote = netip.MustParseAddrPort(addr)
			c.start(m).wait().wantStatus(want)
		}
	})
}

func TestAuthorization(t *testing.T) {
	t.Parallel()
	hangs := func(o *origin) { o.reads(); <-o.gone }
	field := func(name, value string) exchange.Field { return exchange.Field{Name: name, Value: value} }
	tests := []struct {
		name    string
		behave  func(*origin)
		connect func(context.Context) error
		change  func(*config.Authorize)
		status  int
		body    string // "": of our own
		user    string // what the upstream learns; "": nothing
		outcome string
		took    time.Duration
	}{
		{"yes", says(200, "ignored", field("x-user", "ann"), field("X-Other", "no")), nil, nil, 200, "", "ann", "allowed", 0},
		{"yes without a body", says(204, ""), nil, nil, 200, "", "", "allowed", 0},
		{"no", says(401, "who are you?", field("WWW-Authenticate", "Basic"), field("X-Secret", "s"), field("Content-Type", "text/x")), nil, nil, 401, "who are you?", "", "denied", 0},
		{"a redirect", says(302, "", field("Location", "/login")), nil, func(a *config.Authorize) { a.ClientHeaders = []string{"Location"} }, 302, "", "", "denied", 0},
		{"a no that is too long", says(403, strings.Repeat("x", 65<<10)), nil, nil, 403, "", "", "denied", 0},
		{"a no that does not end", func(o *origin) { o.reads(); o.answers(403); o.writes("begin"); <-o.gone }, nil, nil, 403, "", "", "denied", time.Second},
		{"a yes that does not end", func(o *origin) { o.reads(); o.answers(200, field("X-User", "ann")); <-o.gone }, nil, nil, 200, "", "ann", "allowed", time.Second},
		{"an error", answering(500), nil, nil, 403, "", "", "error", 0},
		{"a 304", answering(304), nil, nil, 403, "", "", "error", 0},
		{"another protocol", agrees, nil, nil, 403, "", "", "error", 0},
		{"nonsense", failing(&exchange.StatusError{Status: 502, Text: "two lengths"}), nil, nil, 403, "", "", "error", 0},
		{"refused", nil, refused, nil, 403, "", "", "error", 0},
		{"no answer", hangs, nil, nil, 403, "", "", "timeout", time.Second},
		{"no connection", nil, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, nil, 403, "", "", "timeout", time.Second},
		{"an error, open", answering(503), nil, func(a *config.Authorize) { a.FailOpen = true }, 200, "", "", "error", 0},
		{"no answer, open", hangs, nil, func(a *config.Authorize) { a.FailOpen = true }, 200, "", "", "timeout", time.Second},
		{"refused, open", nil, refused, func(a *config.Authorize) { a.FailOpen = true }, 200, "", "", "error", 0},
		{"no, open", says(403, "no"), nil, func(a *config.Authorize) { a.FailOpen = true }, 403, "no", "", "denied", 0},
		{"no such service", nil, nil, func(a *config.Authorize) { a.Cluster = "none" }, 403, "", "", "error", 0},
	}
	for _, tt := range tests {
		for what, begin := range map[string]func(*testing.T, string, string) *client{"request": post, "upgrade": upgrade} {
			t.Run(tt.name+", "+what, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					a := authorize()
					if tt.change != nil {
						tt.change(a)
					}
					f := guarded(t, config.Filters{Authorize: a})
					f.behave[authAt], f.connect[authAt] = tt.behave, tt.connect
					c := begin(t, "a.example", "/path?q")
					c.request.Fields = fields("Authorization: secret", "Cookie: c", "x-user: root", "X_User: root", "X-Forwarded-For: 6.6.6.6")
					want := tt.status
					if what == "upgrade" {
						if f.behave[first] = agrees; want == 200 {
							want = 101
						}
					} else {
						go func() { c.send.Write([]byte("body")); c.send.Close() }()
					}
					began := time.Now()
					c.start(f.manager()).wait()
					c.wantStatus(want)
					if took := time.Since(began); took < tt.took || took > tt.took+20*time.Millisecond {
						t.Errorf("it took %v, want %v", took, tt.took)
					}
					if tt.body != "" {
						c.wantBody(tt.body)
					}
					for _, o := range f.seenBy(authAt) {
						wantQuestion(t, o, c.request.Method)
					}
					if reached := len(f.seenBy(first)); (reached == 1) != (tt.status == 200) {
						t.Errorf("the upstream has seen %d", reached)
					}
					for _, o := range f.seenBy(first) {
						if users := slices.Collect(o.head.Fields.Values("x-user")); strings.Join(users, ",") != tt.user || o.head.Fields.Has("X_User") {
							t.Errorf("the upstream gets %v, want the user %q", o.head.Fields, tt.user)
						}
					}
					wantClientFields(t, c, tt.status)
					if got := figures(f.registry); got["filter_authorizations_total{site,site:prefix=/,"+tt.outcome+"}"] != 1 {
						t.Errorf("not counted as %q: %v", tt.outcome, got)
					}
				})
			})
		}
	}
}

// wantQuestion looks at what the service was asked.
func wantQuestion(t *testing.T, o *origin, method string) {
	t.Helper()
	h := &o.head
	auth, _ := h.Fields.Get("Authorization")
	chain, _ := h.Fields.Get("X-Forwarded-For")
	if h.Method != method || h.Target != "/check/path?q" || h.Authority != "a.example" || h.ContentLength != 0 || h.Upgrade != "" ||
		auth != "secret" || chain != "192.0.2.1" || h.Fields.Has("Cookie") || h.Fields.Has("X-User") || h.Fields.Has("X_User") || !h.Fields.Has("X-Request-Id") {
		t.Errorf("the service was asked %+v", h)
	}
}

func wantClientFields(t *testing.T, c *client, status int) {
	t.Helper()
	f := c.answer.Fields
	kind, _ := f.Get("Content-Type")
	switch {
	case f.Has("X-Secret"):
		t.Errorf("the client gets %v", f)
	case status == 401 && (!f.Has("WWW-Authenticate") || kind != "text/x"):
		t.Errorf("the client gets %v", f)
	case status == 302 && !f.Has("Location"):
		t.Errorf("the client gets %v", f)
	}
}

// An upgrade is not asked about where the configuration says so. What the client says of
// itself is not believed all the same.
func TestUpgradesWithoutAuthorization(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		a := authorize()
		a.Upgrades = false
		f := guarded(t, config.Filters{Authorize: a})
		f.behave[first] = agrees
		c := upgrade(t, "a.example", "/")
		c.request.Fields = fields("X-User: root")
		c.start(f.manager()).wait().wantStatus(101)
		if n := len(f.seenBy(authAt)); n != 0 {
			t.Errorf("the service was asked %d times", n)
		}
		if f.origin().head.Fields.Has("X-User") {
			t.Error("the upstream believes the client")
		}
	})
}

// Who asks for an upgrade that the upstream does not know has no answer to what is, then, an
// ordinary request: that nobody has allowed.
func TestAnUpgradeThatNobodyWasAskedAboutIsNoWayRound(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ answer, status int }{{200, 403}, {206, 403}, {302, 302}, {404, 404}, {503, 503}} {
		for _, asked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d, asked: %v", tt.answer, asked), func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					a := authorize()
					a.Upgrades = asked
					f := guarded(t, config.Filters{Authorize: a})
					f.behave[first], f.behave[authAt] = says(tt.answer, "secret"), says(200, "")
					c := upgrade(t, "a.example", "/").start(f.manager()).wait()
					if asked {
						c.wantStatus(tt.answer)
						return
					}
					c.wantStatus(tt.status)
					if tt.status != 403 {
						return
					}
					if strings.Contains(c.got.String(), "secret") {
						t.Error("the client gets what the upstream has said")
					}
					f.wantLog("request refused", "authorize_upgrades")
					got := figures(f.registry)
					for _, n := range []string{"downstream_requests_refused_total{public,unauthorized}", "downstream_upgrades_total{public,filtered}"} {
						if got[n] != 1 {
							t.Errorf("%s is %v", n, got[n])
						}
					}
				})
			})
		}
	}
}

// Of a route that answers by itself nothing is a tunnel, so that each request is an ordinary one.
func TestAnUpgradeIsNoWayRoundTheFiltersOfADirectResponse(t *testing.T) {
	t.Parallel()
	for _, a := range []*config.Authorize{nil, authorize()} {
		inBubble(t, func(t *testing.T) {
			f := guarded(t, config.Filters{Authorize: a})
			f.routes[0] = config.Route{Match: config.Match{Prefix: "/"}, Actions: config.Actions{Direct: &config.DirectResponse{Status: 200, Body: "secret"}}, Filters: f.routes[0].Filters}
			want := 401
			if a != nil {
				a.Upgrades = false
				f.behave[authAt] = says(401, "no")
			} else {
				f.routes[0].Filters.RateLimit = &config.RateLimit{Requests: config.Dynamic{Value: 1}, Per: time.Hour, Burst: 1}
				want = 429
			}
			m := f.manager()
			if a == nil {
				get(t, "a.example", "/").start(m).wait().wantStatus(200)
			}
			upgrade(t, "a.example", "/").start(m).wait().wantStatus(want)
		})
	}
}

// The connection to the service is kept, also after a no.
func TestTheConnectionToTheServiceIsKept(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := guarded(t, config.Filters{Authorize: authorize()})
		f.change = func(c *config.Config) {
			for i := range c.Clusters {
				c.Clusters[i].IdleTimeout = time.Minute
			}
		}
		m := f.manager()
		for _, behave := range []func(*origin){says(200, "yes"), says(403, "no"), answering(500), says(200, "")} {
			f.behave[authAt] = behave
			get(t, "a.example", "/").start(m).wait()
		}
		connections := 0
		for _, a := range f.attempts {
			if a == authAt {
				connections++
			}
		}
		if connections != 1 {
			t.Errorf("%d connections for 4 questions", connections)
		}
	})
}

// A kept connection that the service has closed costs no request.
func TestAKeptConnectionToTheServiceThatIsClosed(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := guarded(t, config.Filters{Authorize: authorize()})
		f.change = func(c *config.Config) {
			c.Clusters[0].IdleTimeout, c.Clusters[1].IdleTimeout = time.Minute, time.Minute
		}
		m := f.manager()
		f.behave[authAt] = func(o *origin) {
			if o.reused {
				o.reads()
				o.heads <- exchange.ErrNoAnswer
				return
			}
			says(200, "")(o)
		}
		for range 3 {
			get(t, "a.example", "/").start(m).wait().wantStatus(200)
		}
	})
}

// A client that goes while a filter waits ends the wait, and is recorded as one that went.
func TestAClientThatGoesWhileAFilterWaits(t *testing.T) {
	t.Parallel()
	delay := &config.Fault{Delay: config.FaultDelay{Percent: config.Dynamic{Value: dynamic.Whole}, Duration: time.Hour}, MaxActive: config.Dynamic{Value: 1}}
	slow := authorize()
	slow.Timeout = time.Hour
	for name, filters := range map[string]config.Filters{"a delay": {Fault: delay}, "authorization": {Authorize: slow}} {
		for what, begin := range map[string]func(*testing.T, string, string) *client{"request": get, "upgrade": upgrade} {
			t.Run(name+", "+what, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := guarded(t, filters)
					f.behave[authAt] = func(o *origin) { o.reads(); <-o.gone }
					c, began := begin(t, "a.example", "/").start(f.manager()), time.Now()
					time.Sleep(time.Second)
					c.cancel(errGone)
					c.wait()
					if took := time.Since(began); took > 2*time.Second {
						t.Errorf("it took %v", took)
					}
					c.wantStatus(0)
					if len(f.seenBy(first)) > 0 {
						t.Error("the upstream has seen it")
					}
					got := figures(f.registry)
					if got["downstream_requests_cut_total{public,downstream}"] != 1 || what == "upgrade" && got["downstream_upgrades_total{public,cancelled}"] != 1 {
						t.Errorf("counted are %v", got)
					}
				})
			})
		}
	}
}
