package route_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/route"
)

// to is a route that sends everything below prefix to a cluster of that name.
func to(prefix, cluster string) config.Route {
	return config.Route{
		Match:    config.Match{Prefix: prefix},
		Clusters: []config.WeightedCluster{{Cluster: cluster, Weight: config.Dynamic{Value: 1}}},
	}
}

func host(name string, domains []string, routes ...config.Route) config.VirtualHost {
	return config.VirtualHost{Name: name, Listeners: []string{"public"}, Domains: domains, Routes: routes}
}

func table(hosts ...config.VirtualHost) *route.Table {
	return route.New(&config.Config{VirtualHosts: hosts}, nil)
}

func TestVirtualHostIsFoundByDomain(t *testing.T) {
	t.Parallel()
	all := []config.VirtualHost{
		host("exact", []string{"chat.example.com", "[2001:db8::1]"}, to("/", "c")),
		host("one", []string{"*.example.com"}, to("/", "c")),
		host("two", []string{"*.chat.example.com"}, to("/", "c")),
		host("any", []string{"*"}, to("/", "c")),
	}
	hosts := table(all...)
	tests := []struct{ name, authority, want string }{
		{"an exact domain wins over every suffix", "chat.example.com", "exact"},
		{"the longest suffix wins", "a.chat.example.com", "two"},
		{"a suffix covers several labels", "a.b.example.com", "one"},
		{"a suffix needs something before it", "example.com", "any"},
		{"a suffix needs more than its dot", ".example.com", "any"},
		{"a suffix ends at a label's border", "badexample.com", "any"},
		{"the star takes the rest", "elsewhere.org", "any"},
		{"the port is not looked at", "chat.example.com:8443", "exact"},
		{"nor is an empty port", "chat.example.com:", "exact"},
		{"letters compare without case", "CHAT.Example.COM", "exact"},
		{"a trailing dot does not count", "chat.example.com.", "exact"},
		{"nor does it before a port", "chat.example.com.:80", "exact"},
		{"two trailing dots are another name", "chat.example.com..", "any"},
		{"an IPv6 address with port", "[2001:db8::1]:80", "exact"},
		{"an IPv6 address in another spelling", "[2001:DB8:0::0001]", "exact"},
		{"another IPv6 address", "[2001:db8::2]", "any"},
		{"an IPv6 address without its end", "[2001:db8::1", "any"},
		{"the Kelvin sign is no k", "chat.example.\u212aom", "any"},
		{"no authority at all", "", "any"},
		{"nothing but dots", strings.Repeat(".", 60000), "any"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, outcome := hosts.Match(&route.Query{Listener: "public", Authority: tt.authority, Target: "/"})
			if outcome != route.Matched || r.VirtualHost != tt.want {
				t.Errorf("authority %.80q: got %v, %+v; want virtual host %q", tt.authority, outcome, r, tt.want)
			}
		})
	}

	t.Run("without a star an unknown domain has none", func(t *testing.T) {
		t.Parallel()
		r, outcome := table(all[:3]...).Match(&route.Query{Listener: "public", Authority: "elsewhere.org", Target: "/"})
		if r != nil || outcome != route.NoVirtualHost {
			t.Errorf("got %v, %v", r, outcome)
		}
	})
	t.Run("another listener has none", func(t *testing.T) {
		t.Parallel()
		r, outcome := hosts.Match(&route.Query{Listener: "private", Authority: "chat.example.com", Target: "/"})
		if r != nil || outcome != route.NoVirtualHost {
			t.Errorf("got %v, %v", r, outcome)
		}
	})
	t.Run("listeners of one host share its routes", func(t *testing.T) {
		t.Parallel()
		vh := host("shared", []string{"*"}, to("/", "c"))
		vh.Listeners = []string{"public", "private"}
		for _, l := range vh.Listeners {
			if _, outcome := table(vh).Match(&route.Query{Listener: l, Authority: "x", Target: "/"}); outcome != route.Matched {
				t.Errorf("listener %q: %v", l, outcome)
			}
		}
	})
}

func TestRouteIsFoundByPath(t *testing.T) {
	t.Parallel()
	exact := to("", "exact")
	exact.Match = config.Match{Path: "/health"}
	routes := table(host("vh", []string{"*"},
		exact, to("/socket", "socket"), to("/socket/deep", "shadowed"), to("/api/", "api")))
	tests := []struct{ name, target, want string }{
		{"an exact path", "/health", "vh:path=/health"},
		{"an exact path with a query", "/health?verbose", "vh:path=/health"},
		{"an exact path with a query that holds another path", "/health?x=/socket", "vh:path=/health"},
		{"more than the exact path", "/health/", ""},
		{"a prefix", "/socket", "vh:prefix=/socket"},
		{"a prefix is of bytes, not of segments", "/sockets", "vh:prefix=/socket"},
		{"the first match wins", "/socket/deep/er", "vh:prefix=/socket"},
		{"less than the prefix", "/api", ""},
		{"a prefix does not reach into the query", "/?/api/", ""},
		{"paths compare with case", "/Socket", ""},
		{"percent-encoding stays as it came", "/%73ocket", ""},
		{"dot segments stay as they came", "/api/../socket", "vh:prefix=/api/"},
		{"slashes are not merged", "//socket", ""},
		{"the asterisk form matches nothing", "*", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, outcome := routes.Match(&route.Query{Listener: "public", Authority: "x", Target: tt.target})
			switch {
			case tt.want == "" && outcome != route.NoRoute:
				t.Errorf("%s: got %v, %+v; want no route", tt.target, outcome, r)
			case tt.want != "" && (outcome != route.Matched || r.Name != tt.want):
				t.Errorf("%s: got %v, %+v; want %s", tt.target, outcome, r, tt.want)
			}
		})
	}
}

func TestTargetIsRewritten(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name            string
		match           config.Match
		rewrite         string
		target, rewrote string
	}{
		{"no rewrite", config.Match{Prefix: "/a"}, "", "/a/b?q=1", "/a/b?q=1"},
		{"a prefix", config.Match{Prefix: "/socket"}, "/ws", "/socket/room?id=7", "/ws/room?id=7"},
		{"a prefix that is the whole path", config.Match{Prefix: "/socket"}, "/ws", "/socket?id=7", "/ws?id=7"},
		{"within a segment", config.Match{Prefix: "/socket"}, "/ws", "/sockets", "/wss"},
		{"to the root, literally", config.Match{Prefix: "/a"}, "/", "/a/b", "//b"},
		{"to the root, with the slash", config.Match{Prefix: "/a/"}, "/", "/a/b", "/b"},
		{"from the root", config.Match{Prefix: "/"}, "/v2/", "/b?c", "/v2/b?c"},
		{"a query that looks like the prefix", config.Match{Prefix: "/a"}, "/b", "/a?/a", "/b?/a"},
		{"a whole path", config.Match{Path: "/old"}, "/new", "/old?q", "/new?q"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := to("", "c")
			c.Match, c.PrefixRewrite = tt.match, tt.rewrite
			r, outcome := table(host("vh", []string{"*"}, c)).Match(&route.Query{Listener: "public", Authority: "x", Target: tt.target})
			if outcome != route.Matched {
				t.Fatal(outcome)
			}
			if got := r.Target(tt.target); got != tt.rewrote {
				t.Errorf("got %q, want %q", got, tt.rewrote)
			}
		})
	}
}

func TestRedirectLocation(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name              string
		redirect          config.Redirect
		scheme, authority string
		target, want      string // want "" if there is none
	}{
		{"a scheme", config.Redirect{Scheme: "https"}, "http", "a.example", "/p?q", "https://a.example/p?q"},
		{"a scheme drops the old default port", config.Redirect{Scheme: "https"}, "http", "a.example:80", "/", "https://a.example/"},
		{"of an IPv6 address too", config.Redirect{Scheme: "https"}, "http", "[::1]:80", "/", "https://[::1]/"},
		{"a scheme keeps another port", config.Redirect{Scheme: "https"}, "http", "a.example:8080", "/", "https://a.example:8080/"},
		{"the same scheme keeps its port", config.Redirect{Scheme: "http", Path: "/x"}, "http", "a.example:80", "/", "http://a.example:80/x"},
		{"back to http", config.Redirect{Scheme: "http"}, "https", "a.example:443", "/", "http://a.example/"},
		{"a host", config.Redirect{Host: "b.example:8443"}, "https", "a.example", "/p?q", "https://b.example:8443/p?q"},
		{"a path replaces path and query", config.Redirect{Path: "/new"}, "http", "a.example", "/p?q", "http://a.example/new"},
		{"everything", config.Redirect{Scheme: "https", Host: "b", Path: "/n?x"}, "http", "a", "/p?q", "https://b/n?x"},
		{"a target that looks like a host stays a path", config.Redirect{Scheme: "https"}, "http", "a", "//evil/", "https://a//evil/"},
		{"no host known", config.Redirect{Scheme: "https"}, "http", "", "//evil/", ""},
		{"no host known but the route's", config.Redirect{Host: "b"}, "http", "", "/", "http://b/"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.redirect.Status = 308
			c := config.Route{Match: config.Match{Prefix: "/"}, Redirect: &tt.redirect}
			r, _ := table(host("vh", []string{"*"}, c)).Match(&route.Query{Listener: "public", Authority: tt.authority, Target: tt.target})
			if !r.Redirects() || r.Cluster(1) != "" {
				t.Fatalf("redirects %v, cluster %q", r.Redirects(), r.Cluster(1))
			}
			status, location, ok := r.Redirect(tt.scheme, tt.authority, tt.target)
			if ok != (tt.want != "") {
				t.Fatalf("ok is %v", ok)
			}
			if ok && (status != 308 || location != tt.want) {
				t.Errorf("got %d %q, want 308 %q", status, location, tt.want)
			}
		})
	}
}

func TestClustersShareByWeight(t *testing.T) {
	t.Parallel()
	c := config.Route{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{
		{Cluster: "off", Weight: config.Dynamic{Value: 0}}, {Cluster: "v1", Weight: config.Dynamic{Value: 90}}, {Cluster: "out", Weight: config.Dynamic{Value: 0}}, {Cluster: "v2", Weight: config.Dynamic{Value: 10}}}}
	r, _ := table(host("vh", []string{"*"}, c)).Match(&route.Query{Listener: "public", Authority: "x", Target: "/"})
	got := map[string]int{}
	for n := range uint64(1000) {
		got[r.Cluster(n)]++
	}
	if got["v1"] != 900 || got["v2"] != 100 {
		t.Errorf("of 1000: %v", got)
	}
	if r.Cluster(89) != "v1" || r.Cluster(90) != "v2" {
		t.Error("equal numbers must give equal clusters")
	}
}

func TestWeightsMayFillTheirType(t *testing.T) {
	t.Parallel()
	const most = 1<<32 - 1
	c := config.Route{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{
		{Cluster: "a", Weight: config.Dynamic{Value: most}}, {Cluster: "b", Weight: config.Dynamic{Value: most}}}}
	r, _ := table(host("vh", []string{"*"}, c)).Match(&route.Query{Listener: "public", Authority: "x", Target: "/"})
	if a, b := r.Cluster(most-1), r.Cluster(most); a != "a" || b != "b" {
		t.Errorf("got %s and %s", a, b)
	}
}

func TestMatchAllocatesNothing(t *testing.T) {
	header := func(c config.Condition) []config.Condition {
		c.Name = "x-v"
		return []config.Condition{c}
	}
	missing := []config.Match{
		{Prefix: "/", Methods: []string{"PUT", "POST"}},
		{Prefix: "/X", IgnoreCase: true, Headers: header(config.Condition{Text: "1,2"})},
		{Prefix: "/x", Segments: true, Headers: header(config.Condition{Test: config.Range, From: 1, To: 2})},
		{Regex: whole("/x(a|b)"), Headers: header(config.Condition{Test: config.Suffix, Text: "c"})},
		{Regex: whole("/x+"), Query: header(config.Condition{Test: config.Regex, Regex: whole("[0-9]+")})},
		{Prefix: "/", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		{Prefix: "/", Fraction: &config.Dynamic{Value: 1}},
	}
	routes := []config.Route{to("/none", "c")}
	for i, m := range missing {
		routes = append(routes, named(fmt.Sprint(i), m))
	}
	hosts := table(host("one", []string{"*.example.com"}, append(routes, to("/", "c"))...))
	fields := &lines{{"Accept", "*/*"}, {"X-V", "1"}, {"x-v", "b"}}
	n := testing.AllocsPerRun(100, func() {
		q := route.Query{
			Listener: "public", Authority: "a.b.example.com:443", Target: "/x?y&x-v=a", Method: "GET",
			Fields: fields, Client: netip.MustParseAddr("::ffff:11.0.0.1"), Random: func() uint64 { return 1 },
		}
		r, _ := hosts.Match(&q)
		if r == nil || r.Name != "one:prefix=/" {
			t.Fatal(r)
		}
		r.Target("/x?y")
		r.Cluster(7)
	})
	if n != 0 {
		t.Errorf("%v allocations per match", n)
	}
}

func TestRoutesAreNumberedInTheOrderOfTheConfiguration(t *testing.T) {
	t.Parallel()
	tbl := table(host("one", []string{"one.example"}, to("/a", "c"), to("/b", "c")), host("two", []string{"two.example"}, to("/", "c")))
	var names []string
	for i, r := range tbl.Routes() {
		if r.Number != i {
			t.Errorf("%s has the number %d, want %d", r.Name, r.Number, i)
		}
		names = append(names, r.Name)
	}
	if got, want := strings.Join(names, " "), "one:prefix=/a one:prefix=/b two:prefix=/"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if r, _ := tbl.Match(&route.Query{Listener: "public", Authority: "two.example", Target: "/x"}); r != tbl.Routes()[r.Number] {
		t.Error("a matched route is not the one of its number")
	}
}
