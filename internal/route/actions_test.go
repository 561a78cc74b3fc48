package route_test

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/route"
)

// only returns the route of a table that has no other.
func only(t *testing.T, c config.Route, values *dynamic.Set) *route.Route {
	t.Helper()
	return route.New(&config.Config{VirtualHosts: []config.VirtualHost{host("vh", []string{"*"}, c)}}, values).Routes()[0]
}

func TestPathsAreRewrittenByExpression(t *testing.T) {
	t.Parallel()
	long := "/" + strings.Repeat("a", 4000)
	tests := []struct {
		name                  string
		pattern, substitution string
		target, want          string // want "" if no path comes of it
	}{
		{"a group", "^/v([0-9]+)/", `/api/\1/`, "/v2/x?y", "/api/2/x?y"},
		{"nothing matches", "^/w", "/x", "/v2?w", "/v2?w"},
		{"every match", "a", "bb", "/a/a?a", "/bb/bb?a"},
		{"the query is not looked at", "q$", "Q", "/q?q", "/Q?q"},
		{"a path without query", "x", "y", "/x", "/y"},
		{"the whole match", "^/.*$", `/in\0`, "/x", "/in/x"},
		{"a backslash", "x", `\\`, "/x", `/\`},
		{"a dollar", "x", `$1`, "/x", `/$1`},
		{"no leading slash is left", "^/", "", "/x", ""},
		{"nothing is left", ".*", "", "/x", ""},
		{"too long", "^(.*)$", `\1\1\1`, long, ""},
		{"too long with its query", "^(.*)$", `\1`, long + "?" + strings.Repeat("b", 8000), long + "?" + strings.Repeat("b", 8000)},
		{"too long with its query, and changed", "^(.*)$", `\1x`, long + "?" + strings.Repeat("b", 8000), ""},
		{"too many matches", "a", "b", "/" + strings.Repeat("a", 257), ""},
		{"too many for so long a path", "x", "y", "/" + strings.Repeat("a", 8000) + strings.Repeat("x", 20), ""},
		{"few in a long path", "x", "y", "/" + strings.Repeat("a", 8000) + "xx", "/" + strings.Repeat("a", 8000) + "yy"},
		{"as many as may be", "a", "b", "/" + strings.Repeat("a", 256), "/" + strings.Repeat("b", 256)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := to("/", "c")
			c.RegexRewrite = &config.RegexRewrite{Pattern: tt.pattern, Substitution: tt.substitution}
			got, ok := only(t, c, nil).Rewrite(tt.target)
			if ok != (tt.want != "") || ok && got != tt.want {
				t.Errorf("got %.80q, %v; want %.80q", got, ok, tt.want)
			}
		})
	}
}

// FuzzRewrite makes sure that whatever comes of an expression can be sent, and has the query
// that it had.
func FuzzRewrite(f *testing.F) {
	for _, seed := range [][3]string{
		{"^/v([0-9]+)/", `/api/\1/`, "/v1/a?b"}, {"a*", "b", "/aa"}, {"/", "", "/"}, {".", `\0\0`, "/x?y?z"}, {"(?i)x|$", `\\`, "/X"},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	f.Fuzz(func(t *testing.T, pattern, substitution, target string) {
		file := "[[listeners]]\nname = \"a\"\naddress = \"127.0.0.1:80\"\n[[clusters]]\nname = \"c\"\nendpoints = [\"127.0.0.1:1\"]\n" +
			"[[virtual_hosts]]\nname = \"h\"\ndomains = [\"*\"]\n[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\ncluster = \"c\"\n" +
			"regex_rewrite = { pattern = '" + pattern + "', substitution = '" + substitution + "' }\n"
		cfg, err := config.Parse("f.toml", []byte(file))
		if err != nil || !strings.HasPrefix(target, "/") || strings.ContainsFunc(target, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '#' }) {
			return
		}
		r := route.New(cfg, nil).Routes()[0]
		got, ok := r.Rewrite(target)
		if !ok || r.Name == "" {
			return
		}
		path, query, has := strings.Cut(target, "?")
		newPath, newQuery, still := strings.Cut(got, "?")
		if newQuery != query || still != has || newPath != path && (!strings.HasPrefix(newPath, "/") || strings.ContainsFunc(newPath, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '#' })) {
			t.Errorf("%q became %q", target, got)
		}
	})
}

func TestRedirectsToOtherParts(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name              string
		redirect          config.Redirect
		scheme, authority string
		want              string // of /old/a?q; "" if there is none
	}{
		{"a port", config.Redirect{Port: 8443}, "http", "a.example", "http://a.example:8443/old/a?q"},
		{"another port", config.Redirect{Port: 8443}, "http", "a.example:80", "http://a.example:8443/old/a?q"},
		{"the scheme's own port", config.Redirect{Scheme: "https", Port: 443}, "http", "a.example:8080", "https://a.example/old/a?q"},
		{"a port of an IPv6 address", config.Redirect{Port: 81}, "http", "[::1]", "http://[::1]:81/old/a?q"},
		{"a port beside a host", config.Redirect{Host: "b", Port: 81}, "http", "a:80", "http://b:81/old/a?q"},
		{"a prefix", config.Redirect{PrefixRewrite: "/new/"}, "http", "a", "http://a/new/a?q"},
		{"an expression", config.Redirect{RegexRewrite: &config.RegexRewrite{Pattern: "^/old/(.)", Substitution: `/\1/new`}}, "http", "a", "http://a/a/new?q"},
		{"an expression that leaves no path", config.Redirect{RegexRewrite: &config.RegexRewrite{Pattern: "^/", Substitution: ""}}, "http", "a", ""},
		{"no query", config.Redirect{StripQuery: true}, "http", "a", "http://a/old/a"},
		{"a prefix without the query", config.Redirect{PrefixRewrite: "/", StripQuery: true}, "http", "a", "http://a/a"},
		{"no host known, but a port", config.Redirect{Port: 81}, "http", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.redirect.Status = 302
			r := only(t, config.Route{Match: config.Match{Prefix: "/old/"}, Redirect: &tt.redirect}, nil)
			status, location, ok := r.Redirect(tt.scheme, tt.authority, "/old/a?q")
			if ok != (tt.want != "") || ok && (location != tt.want || status != 302) {
				t.Errorf("got %d %q, %v; want %q", status, location, ok, tt.want)
			}
		})
	}
}

func TestWeightsThatAreOverridden(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	c := config.Route{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{
		{Cluster: "blue", Weight: config.Dynamic{Value: 3}}, {Cluster: "green", Weight: config.Dynamic{Value: 0, Key: "green"}}, {Cluster: "red", Weight: config.Dynamic{Value: 1, Key: "red"}},
	}}
	r := only(t, c, &values)
	shares := func() map[string]int {
		got := map[string]int{}
		for n := range uint64(1200) {
			got[r.Cluster(n)]++
		}
		return got
	}
	for _, step := range []struct {
		name             string
		overrides        map[string]float64
		blue, green, red int
	}{
		{"as configured", nil, 900, 0, 300},
		{"one is given something", map[string]float64{"green": 2}, 600, 400, 200},
		{"one is given nothing", map[string]float64{"red": 0}, 1200, 0, 0},
		{"reset", nil, 900, 0, 300},
	} {
		values.Apply(step.overrides)
		if got := shares(); got["blue"] != step.blue || got["green"] != step.green || got["red"] != step.red {
			t.Errorf("%s: %v", step.name, got)
		}
	}

	c.Clusters = []config.WeightedCluster{{Cluster: "blue", Weight: config.Dynamic{Value: 3, Key: "blue"}}, {Cluster: "red", Weight: config.Dynamic{Value: 1, Key: "red"}}}
	r = only(t, c, &values)
	values.Apply(map[string]float64{"blue": 0, "red": 0})
	if got := shares(); got["blue"] != 900 || got["red"] != 300 {
		t.Errorf("nothing in sum: %v", got)
	}
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	c := to("/", "c")
	c.WebSocket = true
	c.Origins = []string{"https://app.example.com", "https://*.example.org", "http://*.local:8080", "http://[::1]:81"}
	origins := only(t, c, nil).Origins
	for origin, want := range map[string]bool{
		"https://app.example.com":              true,
		"HTTPS://App.Example.Com":              true,
		"http://app.example.com":               false,
		"https://app.example.com:8443":         false,
		"https://app.example.com.evil.org":     false,
		"https://evil.org/app.example.com":     false,
		"https://a.example.org":                true,
		"https://a.b.example.org":              true,
		"https://example.org":                  false,
		"https://.example.org":                 false,
		"https://aexample.org":                 false,
		"https://a.example.org:443":            false,
		"https://evil.com/.example.org":        false,
		"https://evil.com:80.example.org":      false,
		"https://user@a.example.org":           false,
		"https://evil.com#.example.org":        false,
		"http://printer.local:8080":            true,
		"http://printer.local":                 false,
		"http://[::1]:81":                      true,
		"null":                                 false,
		"":                                     false,
		"https://app.example.com, http://x":    false,
		"https://app.example.\u212aom":         false,
		"https://*.example.org":                false,
		"https://" + strings.Repeat("a.", 999): false,
	} {
		if got := origins.Has(origin); got != want {
			t.Errorf("%.80q: %v, want %v", origin, got, want)
		}
	}
	c.CORS = &config.CORS{AllowOrigins: []string{"*"}}
	all := only(t, c, nil).CORS.Origins
	if !all.Has("https://anybody.example") || all.Has("null") || all.Has("") {
		t.Error("everybody who has an origin")
	}
}

func TestWhatTheBrowserIsTold(t *testing.T) {
	t.Parallel()
	c := to("/", "c")
	c.CORS = &config.CORS{AllowOrigins: []string{"*"}, AllowMethods: []string{"PUT", "DELETE"}, AllowHeaders: []string{"X-A"}, ExposeHeaders: []string{"X-B", "X-C"}, MaxAge: 10 * time.Minute}
	got := only(t, c, nil).CORS
	if got.AllowMethods != "PUT, DELETE" || got.AllowHeaders != "X-A" || got.ExposeHeaders != "X-B, X-C" || got.MaxAge != "600" || got.Credentials {
		t.Errorf("%+v", got)
	}
}

// fields are those of a request.
type fields map[string][]string

func (f fields) lines() *lines {
	var all lines
	for _, name := range slices.Sorted(maps.Keys(f)) {
		for _, v := range f[name] {
			all = append(all, [2]string{strings.ToLower(name), v}) // as HTTP/2 has them
		}
	}
	return &all
}

func TestRequestsAreHashed(t *testing.T) {
	t.Parallel()
	client, other := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	header := config.HashPolicy{Header: "X-User"}
	cookie := config.HashPolicy{Cookie: &config.HashCookie{Name: "seat"}}
	made := config.HashPolicy{Cookie: &config.HashCookie{Name: "seat", Make: true, TTL: time.Hour, Path: "/a"}}
	session := config.HashPolicy{Cookie: &config.HashCookie{Name: "seat", Make: true}}
	source := config.HashPolicy{SourceAddress: true}
	terminal := header
	terminal.Terminal = true
	tests := []struct {
		name     string
		policies []config.HashPolicy
		fields   fields
		client   netip.Addr
		like     fields // a request with the same hash; nil: there is no hash
		unlike   fields // one with another; nil: not compared
		cookies  string
	}{
		{"no policy", nil, fields{"X-User": {"a"}}, client, nil, nil, ""},
		{"a field", []config.HashPolicy{header}, fields{"X-User": {"a"}, "X": {"1"}}, client, fields{"X-User": {"a"}}, fields{"X-User": {"b"}}, ""},
		{"a field that is not there", []config.HashPolicy{header}, fields{}, client, nil, nil, ""},
		{"an empty field is there", []config.HashPolicy{header}, fields{"X-User": {""}}, client, fields{"X-User": {""}}, fields{"X-User": {"a"}}, ""},
		{"lines are told apart", []config.HashPolicy{header}, fields{"X-User": {"a", "b"}}, client, fields{"X-User": {"a", "b"}}, fields{"X-User": {"ab"}}, ""},
		{"a cookie", []config.HashPolicy{cookie}, fields{"Cookie": {"x=1; seat=2"}}, client, fields{"Cookie": {"seat=2;y"}}, fields{"Cookie": {"seat=3"}}, ""},
		{"a cookie in quotes", []config.HashPolicy{cookie}, fields{"Cookie": {`seat="2"`}}, client, fields{"Cookie": {"seat=2"}}, nil, ""},
		{"of two cookies the first", []config.HashPolicy{cookie}, fields{"Cookie": {"seat=2; seat=3"}}, client, fields{"Cookie": {"seat=2"}}, fields{"Cookie": {"seat=3"}}, ""},
		{"a cookie of another name", []config.HashPolicy{cookie}, fields{"Cookie": {"myseat=2"}}, client, nil, nil, ""},
		{"a cookie is made", []config.HashPolicy{made}, fields{}, client, fields{"Cookie": {"seat=00000000000000070000000000000007"}}, nil,
			"seat=00000000000000070000000000000007; Path=/a; Max-Age=3600; HttpOnly"},
		{"one for as long as the browser runs", []config.HashPolicy{session}, fields{}, client, fields{"Cookie": {"seat=00000000000000070000000000000007"}}, nil,
			"seat=00000000000000070000000000000007; HttpOnly"},
		{"none is made beside one that is there", []config.HashPolicy{made}, fields{"Cookie": {"seat=2"}}, client, fields{"Cookie": {"seat=2"}}, nil, ""},
		{"an address", []config.HashPolicy{source}, fields{"X": {"1"}}, client, fields{}, nil, ""},
		{"an address in its IPv6 clothes", []config.HashPolicy{source}, fields{}, netip.MustParseAddr("::ffff:192.0.2.1"), fields{}, nil, ""},
		{"no address", []config.HashPolicy{source}, fields{}, netip.Addr{}, nil, nil, ""},
		{"two things", []config.HashPolicy{header, cookie}, fields{"X-User": {"a"}, "Cookie": {"seat=b"}}, client,
			fields{"X-User": {"a"}, "Cookie": {"seat=b"}}, fields{"X-User": {"b"}, "Cookie": {"seat=a"}}, ""},
		{"one of two things", []config.HashPolicy{header, cookie}, fields{"Cookie": {"seat=b"}}, client, fields{"Cookie": {"seat=b"}}, nil, ""},
		{"the rest is left out", []config.HashPolicy{terminal, made}, fields{"X-User": {"a"}, "Cookie": {"seat=b"}}, client, fields{"X-User": {"a"}}, nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := to("/", "c")
			c.HashPolicy = tt.policies
			r := only(t, c, nil)
			seven := func() uint64 { return 7 }
			hash, cookies, ok := r.Hash(tt.fields.lines(), tt.client, seven)
			if ok != (tt.like != nil) || strings.Join(cookies, "|") != tt.cookies || r.HasHash() != (tt.policies != nil) {
				t.Fatalf("hash %x, %v; cookies %q", hash, ok, cookies)
			}
			if tt.like == nil {
				return
			}
			if same, _, ok := r.Hash(tt.like.lines(), client, seven); same != hash || !ok {
				t.Errorf("%x and %x, which should be the same", hash, same)
			}
			if tt.unlike == nil {
				return
			}
			if another, _, _ := r.Hash(tt.unlike.lines(), client, seven); another == hash {
				t.Errorf("%x twice", hash)
			}
		})
	}
	c := to("/", "c")
	c.HashPolicy = []config.HashPolicy{source}
	r := only(t, c, nil)
	one, _, _ := r.Hash(fields{}.lines(), client, nil)
	two, _, _ := r.Hash(fields{}.lines(), other, nil)
	if one == two {
		t.Error("two addresses have one hash")
	}
	// Other processes have the same, and so has the next version.
	if was := uint64(0x97f48f4f11a0ff40); one != was {
		t.Errorf("the hash of %v is %#x, was %#x", client, one, was)
	}
}

// Hashes of what hardly differs are spread over all clusters.
func TestHashesAreSpread(t *testing.T) {
	t.Parallel()
	c := config.Route{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{{Cluster: "a", Weight: config.Dynamic{Value: 1}}, {Cluster: "b", Weight: config.Dynamic{Value: 1}}, {Cluster: "c", Weight: config.Dynamic{Value: 2}}}}
	c.HashPolicy = []config.HashPolicy{{Header: "X"}}
	r := only(t, c, nil)
	got := map[string]int{}
	const n = 4000
	for i := range n {
		hash, _, _ := r.Hash(fields{"X": {"user-" + strings.Repeat("0", i%3) + string(rune('0'+i%10)) + "/" + time.Duration(i).String()}}.lines(), netip.Addr{}, nil)
		got[r.Cluster(route.Spread(hash))]++
	}
	for cluster, share := range map[string]int{"a": n / 4, "b": n / 4, "c": n / 2} {
		if d := got[cluster] - share; d < -n/20 || d > n/20 {
			t.Errorf("%v", got)
		}
	}
}

func TestWhichUpgradesARouteTakes(t *testing.T) {
	t.Parallel()
	plain, socket, other := to("/", "c"), to("/", "c"), to("/", "c")
	socket.WebSocket = true
	other.Upgrades = []string{"my-proto"}
	for i, tt := range []struct {
		route              config.Route
		any, socket, other bool
	}{{plain, false, false, false}, {socket, true, true, false}, {other, true, false, true}} {
		r := only(t, tt.route, nil)
		if r.MakesTunnels() != tt.any || r.Upgrades("websocket") != tt.socket || r.Upgrades("my-proto") != tt.other || r.Upgrades("") {
			t.Errorf("%d: %v %v %v", i, r.MakesTunnels(), r.Upgrades("websocket"), r.Upgrades("my-proto"))
		}
	}
}
