package proxy_test

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

func set(name, value string) *config.Headers {
	return &config.Headers{Set: []config.Header{{Name: name, Value: value}}}
}

func add(name, value string) *config.Headers {
	return &config.Headers{Add: []config.Header{{Name: name, Value: value}}}
}

// linesOf returns all lines of a field.
func linesOf(f exchange.Fields, name string) []string { return slices.Collect(f.Values(name)) }

func wantLines(t *testing.T, f exchange.Fields, name string, want ...string) {
	t.Helper()
	if got := linesOf(f, name); !slices.Equal(got, want) {
		t.Errorf("%s: %q, want %q", name, got, want)
	}
}

// asks gives a client's request fields.
func (c *client) asks(lines ...string) *client {
	c.request.Fields = append(c.request.Fields, fields(lines...)...)
	return c
}

// runs answers what the client asks.
func (f *farm) runs(t *testing.T, c *client) {
	c.start(f.manager()).wait()
}

// An action of a route is tried with an ordinary request, and with an upgrade.
type trial struct {
	f       *farm
	c       *client
	upgrade bool
}

// answered says whether an endpoint was asked, and what it has seen.
func (x *trial) sent() *exchange.Request {
	if all := x.f.origins(); len(all) > 0 {
		return &all[0].head
	}
	return &exchange.Request{}
}

// applies has, for each key of a route, how it is set up, and how it shows that it has
// applied.
var applies = map[string]applying{
	"cluster": {
		shows: func(x *trial) bool { return len(x.f.origins()) == 1 },
	},
	"weighted_clusters": {
		route: func(r *config.Route, f *farm) {
			f.cluster["other"] = []string{"10.0.0.2:80"}
			f.behave["10.0.0.2:80"] = f.behave[first]
			r.Clusters = []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 0}}, {Cluster: "other", Weight: config.Dynamic{Value: 1}}}
		},
		shows: func(x *trial) bool { return slices.Contains(x.f.attempts, "10.0.0.2:80") },
	},
	"split_by_hash": {
		route: func(r *config.Route, f *farm) {
			f.cluster["other"] = []string{"10.0.0.2:80"}
			f.behave["10.0.0.2:80"] = f.behave[first]
			r.SplitByHash, r.HashPolicy = true, []config.HashPolicy{{Header: "X-User"}}
			r.Clusters = []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}, {Cluster: "other", Weight: config.Dynamic{Value: 1}}}
			f.options = numbered(0) // of random numbers, "web"
		},
		ask:   func(c *client) { c.asks("X-User: a") },
		shows: func(x *trial) bool { return slices.Contains(x.f.attempts, "10.0.0.2:80") },
	},
	"cluster_header": {
		route: func(r *config.Route, f *farm) {
			f.cluster["other"] = []string{"10.0.0.2:80"}
			f.behave["10.0.0.2:80"] = f.behave[first]
			r.Clusters, r.ClusterHeader = nil, "X-Cluster"
		},
		ask:   func(c *client) { c.asks("X-Cluster: other") },
		shows: func(x *trial) bool { return slices.Contains(x.f.attempts, "10.0.0.2:80") },
	},
	"redirect": {
		route: func(r *config.Route, _ *farm) {
			r.WebSocket, r.Clusters, r.Redirect = false, nil, &config.Redirect{Path: "/new", Status: 308}
		},
		shows: func(x *trial) bool { return x.c.status() == 308 },
	},
	"direct_response": {
		route: func(r *config.Route, _ *farm) {
			r.WebSocket, r.Clusters, r.Direct = false, nil, &config.DirectResponse{Status: 418, Body: "tea", ContentType: "a/b"}
		},
		shows: func(x *trial) bool {
			kind, _ := x.c.answer.Fields.Get("Content-Type")
			return x.c.status() == 418 && x.c.received() == "tea" && kind == "a/b" && x.c.answer.Close == x.upgrade
		},
	},
	"websocket": {
		route: func(r *config.Route, _ *farm) { r.WebSocket = true },
		shows: func(x *trial) bool { return len(x.f.tunnels) == 1 },
	},
	"upgrades": {
		route: func(r *config.Route, f *farm) {
			r.Upgrades = []string{"my-proto"}
			f.behave[first] = func(o *origin) {
				if o.head.Upgrade == "" {
					ok(o)
					return
				}
				o.heads <- &exchange.Response{Status: 101, Upgrade: o.head.Upgrade}
			}
		},
		ask: func(c *client) {
			if c.request.Upgrade != "" {
				c.request.Upgrade, c.request.Offer = "", "my-proto"
			}
		},
		shows: func(x *trial) bool { return len(x.f.tunnels) == 1 && x.sent().Upgrade == "my-proto" },
	},
	"origins": {
		route: func(r *config.Route, _ *farm) { r.Origins = []string{"https://a.example"} },
		ask:   func(c *client) { c.asks("Origin: https://b.example") },
		shows: func(x *trial) bool { return x.c.status() == 403 },
	},
	"allow_missing_origin": {
		route: func(r *config.Route, _ *farm) {
			r.Origins, r.RefuseWithoutOrigin = []string{"https://a.example"}, true
		},
		shows: func(x *trial) bool { return x.c.status() == 403 },
	},
	"prefix_rewrite": {
		route: func(r *config.Route, _ *farm) { r.PrefixRewrite = "/new/" },
		shows: func(x *trial) bool { return x.sent().Target == "/new/path?query" },
	},
	"regex_rewrite": {
		route: func(r *config.Route, _ *farm) {
			r.RegexRewrite = &config.RegexRewrite{Pattern: "^/p(.*)$", Substitution: `/\1/p`}
		},
		shows: func(x *trial) bool { return x.sent().Target == "/ath/p?query" },
	},
	"host_rewrite": {
		route: func(r *config.Route, _ *farm) { r.HostRewrite = "b.example" },
		shows: func(x *trial) bool { return x.sent().Authority == "b.example" },
	},
	"host_rewrite_header": {
		route: func(r *config.Route, _ *farm) { r.HostRewriteHeader = "X-Host" },
		ask:   func(c *client) { c.asks("X-Host: b.example:81") },
		shows: func(x *trial) bool { return x.sent().Authority == "b.example:81" },
	},
	"auto_host_rewrite": {
		route: func(r *config.Route, _ *farm) { r.AutoHostRewrite = true },
		shows: func(x *trial) bool { return x.sent().Authority == first },
	},
	"timeout": {
		route: func(r *config.Route, f *farm) { r.Timeout = 1e9; f.behave[first] = silently },
		shows: func(x *trial) bool { return x.c.status() == 504 },
	},
	"stream_idle_timeout": {
		route: func(r *config.Route, f *farm) { r.StreamIdleTimeout = 1e9; f.behave[first] = silently },
		shows: func(x *trial) bool { return x.c.status() == 504 },
	},
	"request_buffer": {
		route: func(r *config.Route, _ *farm) { r.RequestBuffer = 4 },
		ask: func(c *client) {
			c.request.ContentLength, c.request.UpgradeBody = 5, c.request.Upgrade != ""
		},
		shows: func(x *trial) bool { return x.c.status() == 413 },
	},
	"retry": {
		route: func(r *config.Route, f *farm) { r.Retry = retrying(on5xx).Retry; f.behave[first] = answering(503) },
		shows: func(x *trial) bool { return len(x.f.attempts) > 1 },
	},
	"mirror": {
		route: func(r *config.Route, f *farm) {
			f.cluster["other"] = []string{"10.0.0.2:80"}
			f.behave["10.0.0.2:80"] = answering(204)
			r.Mirror = &config.Mirror{Cluster: "other", Percent: config.Dynamic{Value: dynamic.Whole}}
		},
		shows: func(x *trial) bool { return slices.Contains(x.f.attempts, "10.0.0.2:80") },
	},
	"max_body_size": {
		route: func(r *config.Route, _ *farm) { r.MaxBodySize = 4 },
		ask: func(c *client) {
			c.request.ContentLength, c.request.UpgradeBody = 5, c.request.Upgrade != ""
		},
		shows: func(x *trial) bool { return x.c.status() == 413 },
	},
	"max_head_size": {
		route: func(r *config.Route, _ *farm) { r.MaxHeadSize = 1024 },
		ask:   func(c *client) { c.asks("X: " + strings.Repeat("x", 1000)) },
		shows: func(x *trial) bool { return x.c.status() == 431 },
	},
	"priority": {
		route: func(r *config.Route, f *farm) {
			r.Priority = config.PriorityHigh
			f.limits[config.PriorityHigh][config.LimitedRequests].Set = true // at 0
			f.limits[config.PriorityHigh][config.LimitedTunnels].Set = true
		},
		shows: func(x *trial) bool { return x.c.status() == 503 && x.c.answer.Fields.Has("Holdfast-Overloaded") },
	},
	"request_headers": {
		route: func(r *config.Route, _ *farm) { r.RequestHeaders = set("X-Set", "%PROTOCOL%") },
		shows: func(x *trial) bool { return slices.Equal(linesOf(x.sent().Fields, "X-Set"), []string{"HTTP/1.1"}) },
	},
	"response_headers": {
		route: func(r *config.Route, _ *farm) { r.ResponseHeaders = set("X-Set", "%UPSTREAM_CLUSTER%") },
		shows: func(x *trial) bool { return slices.Equal(linesOf(x.c.answer.Fields, "X-Set"), []string{"web"}) },
	},
	"cors": {
		route: func(r *config.Route, _ *farm) { r.CORS = &config.CORS{AllowOrigins: []string{"https://a.example"}} },
		ask:   func(c *client) { c.asks("Origin: https://a.example") },
		shows: func(x *trial) bool { return x.c.answer.Fields.Has("Access-Control-Allow-Origin") },
	},
	"hash_policy": {
		route: func(r *config.Route, _ *farm) {
			r.HashPolicy = []config.HashPolicy{{Cookie: &config.HashCookie{Name: "seat", Make: true}}}
		},
		shows: func(x *trial) bool {
			cookie, _ := x.c.answer.Fields.Get("Set-Cookie")
			return strings.HasPrefix(cookie, "seat=")
		},
	},
	"tunnels": {
		route: func(r *config.Route, f *farm) { r.Tunnels.HandshakeTimeout = 1e9; f.behave[first] = silently },
		shows: func(x *trial) bool { return x.c.status() == 504 },
	},
	"allow":             filtering(config.Filters{Allow: networks("10.0.0.0/8")}, 403),
	"deny":              filtering(config.Filters{Deny: networks("0.0.0.0/0", "::/0")}, 403),
	"rate_limit":        filtering(config.Filters{RateLimit: noTokens}, 429),
	"tunnel_rate_limit": filtering(config.Filters{TunnelRateLimit: noTokens}, 429),
	"fault":             filtering(config.Filters{Fault: &config.Fault{Abort: config.FaultAbort{Percent: config.Dynamic{Value: dynamic.Whole}, Status: 418}}}, 418),
	"authorize": {
		route: authorizing(true),
		shows: func(x *trial) bool { return x.c.status() == 403 && len(x.f.seenBy(authAt)) == 1 },
	},
	"authorize_upgrades": {
		route: authorizing(false),
		shows: func(x *trial) bool { return len(x.f.seenBy(authAt)) == 0 },
	},
}

// applying is how a key of a route is set up, and how it shows that it has applied.
type applying struct {
	route func(*config.Route, *farm)
	ask   func(*client)
	shows func(*trial) bool
}

// filtering is a key that answers with a status.
func filtering(filters config.Filters, status int) applying {
	return applying{
		route: func(r *config.Route, _ *farm) { r.Filters = &filters },
		shows: func(x *trial) bool { return x.c.status() == status },
	}
}

// noTokens is a limit that nothing passes.
var noTokens = &config.RateLimit{Requests: config.Dynamic{Value: 1}, Per: time.Hour, Burst: 0}

// authorizing has a service that says no, asked about upgrades or not.
func authorizing(upgrades bool) func(*config.Route, *farm) {
	return func(r *config.Route, f *farm) {
		a := authorize()
		a.Upgrades = upgrades
		r.Filters = &config.Filters{Authorize: a}
		f.cluster["auth"] = []string{authAt}
		f.behave[authAt] = says(403, "no")
	}
}

// silently answers an upgrade, or a request, after two seconds.
func silently(o *origin) {
	o.pause = 2e9
	answering(204)(o)
}

// The table of the documentation says what each key of a route is for, and is tried here row by
// row.
func TestWhatAppliesToUpgradesIsAsDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "### What applies to upgrades\n")
	table, _, _ = strings.Cut(table, "\n#")
	row := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (yes|no)[^|]* \\| (yes|no)[^|]* \\|$")
	seen := map[string]bool{}
	for _, m := range row.FindAllStringSubmatch(table, -1) {
		key := m[1]
		seen[key] = true
		for i, kind := range []string{"ordinary request", "upgrade"} {
			t.Run(key+" on an "+kind, func(t *testing.T) {
				t.Parallel()
				tried, ok := applies[key]
				if !ok {
					t.Fatal("the test does not know how to try it")
				}
				inBubble(t, func(t *testing.T) {
					f, c := newFarm(t), get(t, "a.example", "/path?query")
					f.routes = []config.Route{to("/", "web")}
					if i == 1 {
						f.routes[0].WebSocket = true
						f.behave[first] = agrees
						c = upgrade(t, "a.example", "/path?query")
					}
					if tried.route != nil {
						tried.route(&f.routes[0], f)
					}
					if tried.ask != nil {
						tried.ask(c)
					}
					if c.request.ContentLength > 0 {
						c.there = []byte("12345")
					}
					f.runs(t, c)
					if got := tried.shows(&trial{f, c, i == 1}); got != (m[2+i] == "yes") {
						t.Errorf("it applies: %v, the table says %s; the client got %+v", got, m[2+i], c.answer)
					}
				})
			})
		}
	}
	for key := range applies {
		if !seen[key] {
			t.Errorf("%s is not in the table", key)
		}
	}
	_, keys, _ := strings.Cut(string(text), "## `[[virtual_hosts.routes]]`\n")
	keys, _, _ = strings.Cut(keys, "\n#")
	documented := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(keys, -1)
	if len(documented) < 10 {
		t.Errorf("a route has only %d keys", len(documented))
	}
	for _, m := range documented {
		if key := m[1]; !seen[key] && key != "name" && key != "match" {
			t.Errorf("%s is a key of routes and not in the table", key)
		}
	}
}

// What is set or removed is for the upstream to rely on: no client says it by a name that CGI-like
// upstreams take for the same. The other way round the two are different fields.
func TestTwinsOfFieldsThatAreSetOrRemovedAreRemoved(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example", "/").asks("X_Api-User: forged", "x-api_user: forged", "X_Gone: forged", "X_Kept: 1", "X-Low: 1", "X_Api_Users: 1")
		f.routes[0].RequestHeaders = &config.Headers{
			Remove: []string{"X-Gone", "X_Low"},
			Set:    []config.Header{{Name: "X-Api-User", Value: "%REQ(X-None)%"}, {Name: "X-Set", Value: "a"}, {Name: "X_Set", Value: "b"}},
			Add:    []config.Header{{Name: "X-Kept", Value: "2"}},
		}
		f.behave[first] = ok
		f.runs(t, c)
		sent := f.origin().head.Fields
		for name, want := range map[string][]string{
			"X_Api-User": nil, "x-api_user": nil, "X_Gone": nil, "X_Kept": {"1"}, "X-Kept": {"2"}, "X-Low": {"1"}, "X_Api_Users": {"1"}, "X-Set": {"a"}, "X_Set": {"b"},
		} {
			wantLines(t, sent, name, want...)
		}
	})
}

// Virtual host, route, cluster: the last one has the last word, and each sees what was made.
func TestFieldsAreChangedInOrder(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example", "/").asks("X-Gone: 1", "X-Set: client", "X-Add: client", "X-Empty: client")
		f.routes[0].Edits = config.Edits{
			RequestHeaders: &config.Headers{
				Remove: []string{"x-gone"},
				Set:    []config.Header{{Name: "X-Empty", Value: "%REQ(X-None)%"}, {Name: "X-Set", Value: "route after %REQ(X-Set)%"}},
				Add:    []config.Header{{Name: "X-Add", Value: "route"}, {Name: "X-Nothing", Value: "%REQ(X-None)%"}},
			},
			ResponseHeaders: set("X-Answer", "route"),
		}
		f.hosts = config.Edits{RequestHeaders: set("X-Set", "host"), ResponseHeaders: &config.Headers{
			Set: []config.Header{{Name: "X-Answer", Value: "host"}, {Name: "X-Host", Value: "%ROUTE_NAME%"}}, Remove: []string{"X-Powered-By"}}}
		f.clusters = config.Edits{RequestHeaders: set("X-Cluster", "%REQ(X-Set)% at %UPSTREAM_HOST%"), ResponseHeaders: set("X-Answer", "cluster")}
		f.behave[first] = func(o *origin) {
			o.reads()
			o.answers(200, fields("X-Powered-By: rubbish", "X-Answer: endpoint")...)
			o.ends()
		}
		f.runs(t, c)
		sent := f.origin().head.Fields
		wantLines(t, sent, "X-Gone")
		wantLines(t, sent, "X-Empty")
		wantLines(t, sent, "X-Nothing")
		wantLines(t, sent, "X-Set", "route after host")
		wantLines(t, sent, "X-Add", "client", "route")
		wantLines(t, sent, "X-Cluster", "route after host at "+first)
		wantLines(t, c.answer.Fields, "X-Powered-By")
		wantLines(t, c.answer.Fields, "X-Answer", "cluster")
		wantLines(t, c.answer.Fields, "X-Host", "site:prefix=/")
	})
}

func TestVariables(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example:80", "/p?q").asks("User-Agent: curl", "X-Request-Id: 6")
		f.trusted = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		hostname, _ := os.Hostname()
		want := map[string]string{
			"DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": "192.0.2.1", "PROTOCOL": "HTTP/1.1", "HOSTNAME": hostname, "START_TIME": "2000-01-01T00:00:00.000Z",
			"UPSTREAM_CLUSTER": "web", "UPSTREAM_HOST": first, "ROUTE_NAME": "site:prefix=/", "REQUEST_ID": "6",
			"REQ(user-agent)": "curl", "REQ(:authority)": "a.example:80", "REQ(:path)": "/p?q", "REQ(:method)": "GET", "REQ(:scheme)": "http",
		}
		f.routes[0].RequestHeaders = new(config.Headers)
		names := map[string]string{}
		for variable := range want {
			name := fmt.Sprintf("X-%d", len(names))
			names[name] = variable
			f.routes[0].RequestHeaders.Set = append(f.routes[0].RequestHeaders.Set, config.Header{Name: name, Value: "%" + variable + "%"})
		}
		f.runs(t, c)
		for name, variable := range names {
			wantLines(t, f.origin().head.Fields, name, want[variable])
		}
	})
}

// A request that is sent again begins with what the client has sent.
func TestARepeatedRequestIsChangedOnce(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.routes[0].RequestHeaders = add("X-Add", "route")
		m := f.manager()
		get(t, "a.example", "/").start(m).wait()
		f.behave[first] = func(o *origin) {
			if o.reused {
				failing(fmt.Errorf("%w: closed", exchange.ErrNoAnswer))(o)
				return
			}
			ok(o)
		}
		c := get(t, "a.example", "/").asks("X-Add: client").start(m).wait()
		c.wantStatus(200)
		all := f.origins()
		if len(all) != 3 {
			t.Fatalf("endpoints have seen %d exchanges", len(all))
		}
		for _, o := range all[1:] {
			wantLines(t, o.head.Fields, "X-Add", "client", "route")
		}
	})
}

// Answers of our own are changed as well, with what is known by then.
func TestFieldsOfOurOwnAnswers(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example", "/")
		f.connect[first] = refused
		f.routes[0].ResponseHeaders = &config.Headers{Remove: []string{"Content-Type"}, Add: []config.Header{
			{Name: "X-A", Value: "1"}, {Name: "X-B", Value: "2"}, {Name: "X-C", Value: "3"}, {Name: "X-D", Value: "%REQUEST_ID%"}, {Name: "X-E", Value: "5"}}}
		f.runs(t, c)
		c.wantStatus(503)
		c.wantBody("503 Service Unavailable\n")
		wantLines(t, c.answer.Fields, "Content-Type")
		for name := range strings.SplitSeq("X-A X-B X-C X-D X-E", " ") {
			if n := len(linesOf(c.answer.Fields, name)); n != 1 {
				t.Errorf("%d lines of %s", n, name)
			}
		}
	})
}

func TestRefusalsOfActions(t *testing.T) {
	t.Parallel()
	rewrite := &config.RegexRewrite{Pattern: "^/", Substitution: ""}
	tests := []struct {
		name    string
		route   config.Actions
		ask     func(*client)
		upgrade bool
		status  int
		log     string
		tries   config.Retry
		gather  int64
	}{
		{name: "no path comes of it", route: config.Actions{RegexRewrite: rewrite}, status: 400, log: "makes no path"},
		{name: "no path comes of an upgrade's", route: config.Actions{RegexRewrite: rewrite}, upgrade: true, status: 400, log: "makes no path"},
		{name: "no host in the field", route: config.Actions{HostRewriteHeader: "X-Host"}, ask: func(c *client) { c.asks("X-Host: a b") }, status: 400, log: "holds no host"},
		{name: "the field for the host is not there", route: config.Actions{HostRewriteHeader: "X-Host"}, status: 200},
		{name: "the field for the host is empty", route: config.Actions{HostRewriteHeader: "X-Host"}, ask: func(c *client) { c.asks("X-Host:") }, status: 200},
		{name: "no field for the cluster", route: config.Actions{ClusterHeader: "X-Cluster"}, status: 404, log: "names no cluster"},
		{name: "no such cluster", route: config.Actions{ClusterHeader: "X-Cluster"}, ask: func(c *client) { c.asks("X-Cluster: none") }, status: 404, log: "names no cluster"},
		{name: "no such cluster for an upgrade", route: config.Actions{ClusterHeader: "X-Cluster"}, ask: func(c *client) { c.asks("X-Cluster: none") }, upgrade: true, status: 404, log: "names no cluster"},
		{name: "one of several clusters", route: config.Actions{ClusterHeader: "X-Cluster"}, ask: func(c *client) { c.asks("X-Cluster: web", "X-Cluster: none") }, status: 200},
		{name: "a body within the limit", route: config.Actions{MaxBodySize: 5}, ask: func(c *client) { c.request.ContentLength, c.there = 5, []byte("12345"); c.send.Close() }, status: 200},
		{name: "a body beyond the limit", route: config.Actions{MaxBodySize: 5}, ask: func(c *client) { c.request.ContentLength = 6 }, status: 413, log: "max_body_size"},
		{name: "a body that grows beyond the limit", route: config.Actions{MaxBodySize: 5}, ask: func(c *client) {
			c.request.Method, c.request.ContentLength, c.there = "POST", -1, []byte("123456")
		}, status: 413, log: "max_body_size"},
		{name: "a body that grows beyond the limit while it is kept", route: config.Actions{MaxBodySize: 5}, tries: config.Retry{On: config.Retry5xx, Buffer: 1000}, ask: func(c *client) {
			c.request.Method, c.request.ContentLength, c.there = "POST", -1, []byte("123456")
			c.send.Close()
		}, status: 413, log: "max_body_size"},
		{name: "a body that grows beyond the limit while it is gathered", route: config.Actions{MaxBodySize: 5}, gather: 1000, ask: func(c *client) {
			c.request.Method, c.request.ContentLength, c.there = "POST", -1, []byte("123456")
			c.send.Close()
		}, status: 413, log: "max_body_size"},
		{name: "a page that is allowed", route: config.Actions{Origins: []string{"https://*.example"}}, ask: func(c *client) { c.asks("Origin: https://a.example") }, upgrade: true, status: 101},
		{name: "a page that a draft names otherwise", route: config.Actions{Origins: []string{"https://*.example"}}, ask: func(c *client) { c.asks("Sec-WebSocket-Origin: https://a.test") }, upgrade: true, status: 403, log: "origins"},
		{name: "two pages", route: config.Actions{Origins: []string{"https://*.example"}}, ask: func(c *client) { c.asks("Origin: https://a.example", "Origin: https://a.test") }, upgrade: true, status: 403, log: "origins"},
		{name: "no page, which is allowed", route: config.Actions{Origins: []string{"https://*.example"}}, upgrade: true, status: 101},
		{name: "no page in particular", route: config.Actions{Origins: []string{"https://*.example"}}, ask: func(c *client) { c.asks("Origin: null") }, upgrade: true, status: 403, log: "origins"},
		{name: "a page comes before a body", route: config.Actions{Origins: []string{"https://*.example"}}, ask: func(c *client) { c.asks("Origin: null"); c.request.UpgradeBody = true }, upgrade: true, status: 403},
		{name: "an offer with a body", route: config.Actions{Upgrades: []string{"my-proto"}}, ask: func(c *client) { c.request.Offer, c.request.ContentLength = "my-proto", 5 }, status: 400, log: "with a body"},
		{name: "an offer that the route does not take", route: config.Actions{Upgrades: []string{"my-proto"}}, ask: func(c *client) { c.request.Offer = "other" }, status: 200},
		{name: "an offer that the upstream answers with WebSocket", route: config.Actions{Upgrades: []string{"my-proto"}}, ask: func(c *client) { c.request.Offer = "my-proto" }, upgrade: false, status: 502, log: "does not agree"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/path")
				f.routes[0].WebSocket = tt.upgrade
				f.routes[0].Actions = tt.route
				f.routes[0].RequestBuffer = tt.gather
				if tt.tries.On != 0 {
					f.routes[0].Retry = &tt.tries
				}
				if tt.route.ClusterHeader != "" {
					f.routes[0].Clusters = nil
				}
				if tt.upgrade {
					c = upgrade(t, "a.example", "/path")
				}
				f.behave[first] = func(o *origin) {
					if o.head.Upgrade != "" {
						agrees(o)
					} else {
						ok(o)
					}
				}
				if tt.ask != nil {
					tt.ask(c)
				}
				f.runs(t, c)
				c.wantStatus(tt.status)
				if tt.log != "" {
					f.wantLog("request refused", tt.log)
				}
				if len(f.tunnels) > 0 != (tt.status == 101) {
					t.Errorf("tunnels: %+v", f.tunnels)
				}
			})
		})
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	policy := config.CORS{AllowOrigins: []string{"https://a.example"}, AllowMethods: []string{"PUT"}, AllowHeaders: []string{"X-A"}, ExposeHeaders: []string{"X-B"}, MaxAge: 6e10, AllowCredentials: true}
	bare := config.CORS{AllowOrigins: []string{"*"}}
	tests := []struct {
		name   string
		policy config.CORS
		method string
		ask    []string
		asked  bool // the upstream
		want   []string
	}{
		{"a question", policy, "OPTIONS", []string{"Origin: https://a.example", "Access-Control-Request-Method: PUT"}, false, []string{
			"Access-Control-Allow-Methods: PUT", "Access-Control-Allow-Headers: X-A", "Access-Control-Max-Age: 60",
			"Vary: Origin", "Access-Control-Allow-Origin: https://a.example", "Access-Control-Allow-Credentials: true"}},
		{"a question to which there is little to say", bare, "OPTIONS", []string{"Origin: https://x", "Access-Control-Request-Method: PUT"}, false, []string{
			"Vary: Origin", "Access-Control-Allow-Origin: https://x"}},
		{"a question of another page", policy, "OPTIONS", []string{"Origin: https://b.example", "Access-Control-Request-Method: PUT"}, true, []string{
			"Access-Control-Allow-Origin: upstream", "Access-Control-Allow-Credentials: upstream", "Vary: Origin"}},
		{"no question", policy, "OPTIONS", []string{"Origin: https://a.example"}, true, []string{
			"Access-Control-Allow-Origin: https://a.example", "Access-Control-Allow-Credentials: true", "Vary: Origin", "Access-Control-Expose-Headers: X-B"}},
		{"a request", policy, "GET", []string{"Origin: https://a.example"}, true, []string{
			"Access-Control-Allow-Origin: https://a.example", "Access-Control-Allow-Credentials: true", "Vary: Origin", "Access-Control-Expose-Headers: X-B"}},
		{"a request that brings no cookies", bare, "GET", []string{"Origin: https://a.example"}, true, []string{
			"Access-Control-Allow-Origin: https://a.example", "Vary: Origin"}},
		{"a request of another page", policy, "GET", []string{"Origin: https://b.example"}, true, []string{
			"Access-Control-Allow-Origin: upstream", "Access-Control-Allow-Credentials: upstream", "Vary: Origin"}},
		{"a request of no page", policy, "GET", nil, true, []string{
			"Access-Control-Allow-Origin: upstream", "Access-Control-Allow-Credentials: upstream", "Vary: Origin"}},
		{"a request of no page in particular", bare, "GET", []string{"Origin: null"}, true, []string{
			"Access-Control-Allow-Origin: upstream", "Access-Control-Allow-Credentials: upstream", "Vary: Origin"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/").asks(tt.ask...)
				c.request.Method = tt.method
				f.routes[0].CORS = &tt.policy
				f.routes[0].RequestHeaders = &config.Headers{Remove: []string{"Origin"}} // which changes nothing of it
				f.behave[first] = func(o *origin) {
					o.reads()
					o.answers(200, fields("Access-Control-Allow-Origin: upstream", "Access-Control-Allow-Credentials: upstream")...)
					o.ends()
				}
				f.runs(t, c)
				c.wantStatus(200)
				c.wantBody("")
				var got []string
				for _, l := range c.answer.Fields {
					got = append(got, l.Name+": "+l.Value)
				}
				if !slices.Equal(got, tt.want) {
					t.Errorf("\n got %q\nwant %q", got, tt.want)
				}
				if asked := len(f.origins()) == 1; asked != tt.asked {
					t.Errorf("the upstream was asked: %v", asked)
				}
			})
		})
	}
}

// A cookie of a client that uses https is for https alone.
func TestACookieThatIsMade(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"http", "https"} {
		inBubble(t, func(t *testing.T) {
			f, c := newFarm(t), get(t, "a.example", "/")
			f.routes[0].HashPolicy = []config.HashPolicy{{Cookie: &config.HashCookie{Name: "seat", Make: true, TTL: 6e10}}}
			f.options = numbered(9)
			c.request.Scheme = scheme
			f.runs(t, c)
			want := "seat=00000000000000090000000000000009; Max-Age=60; HttpOnly"
			if scheme == "https" {
				want += "; Secure"
			}
			wantLines(t, c.answer.Fields, "Set-Cookie", want)
		})
	}
}

func TestADirectResponseWithoutABody(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example", "/")
		f.routes = []config.Route{{Match: config.Match{Prefix: "/"}, Actions: config.Actions{Direct: &config.DirectResponse{Status: 204}}}}
		f.runs(t, c)
		c.wantStatus(204)
		c.wantBody("")
		c.wantEnd(true)
		wantLines(t, c.answer.Fields, "Content-Type")
	})
}

// Whatever a route changes, a request in steady state allocates nothing.
func TestChangingFieldsAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	l := streamtest.NewVirtual(t)
	p := newPlain(l)
	p.template.Target = "/edited"
	m := p.manager(t)
	const n = 100
	var allocated uint64
	streamtest.Go(l, func(t *task.Task) {
		serve := func() { p.renew(); m.Serve(t, p) }
		for range 10 {
			serve()
		}
		allocated = mallocs(func() {
			for range n {
				serve()
			}
		})
	})
	if p.ended != n+10 || p.status != 200 {
		t.Fatalf("%d responses, the last one with %d", p.ended, p.status)
	}
	if allocated > n/2 { // the runtime has its own
		t.Errorf("%d allocations for %d requests", allocated, n)
	}
}

// However a body is sent on, a route's limit is one.
func TestALargeBodyIsRefusedHoweverItIsSent(t *testing.T) {
	t.Parallel()
	for name, sent := range map[string]func(*config.Route){
		"as it comes":  func(*config.Route) {},
		"with retries": func(r *config.Route) { r.Retry = retrying(on5xx).Retry },
		"in a buffer":  func(r *config.Route) { r.RequestBuffer = 1 << 20 },
		"with a mirror": func(r *config.Route) {
			r.Mirror = &config.Mirror{Cluster: "web", Percent: config.Dynamic{Value: dynamic.Whole}, Buffer: 1 << 20}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example", "/path")
				f.routes[0].MaxBodySize = 5
				sent(&f.routes[0])
				c.request.Method, c.request.ContentLength, c.there = "POST", -1, []byte("123456")
				c.send.Close()
				f.runs(t, c)
				if got := c.status(); got != 413 {
					t.Errorf("the answer is %d, want 413", got)
				}
			})
		})
	}
}
