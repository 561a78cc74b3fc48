package route_test

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/route"
)

// lines are the fields of a request.
type lines [][2]string

func (l *lines) Len() int                        { return len(*l) }
func (l *lines) Line(i int) (name, value string) { return (*l)[i][0], (*l)[i][1] }

// whole is an expression as the configuration makes it of what a file has.
func whole(expression string) *regexp.Regexp { return regexp.MustCompile("^(?:" + expression + ")$") }

// matching returns a route with this match.
func matching(m config.Match) config.Route {
	return config.Route{Match: m, Clusters: []config.WeightedCluster{{Cluster: "c", Weight: config.Dynamic{Value: 1}}}}
}

func TestPathsMatchByEachKindOfPattern(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		match    config.Match
		yes, not []string
	}{
		{"a prefix that ends with a segment", config.Match{Prefix: "/api", Segments: true},
			[]string{"/api", "/api/", "/api/x", "/api?x", "/api/?x", "/api?/"}, []string{"/apis", "/apis/", "/ap", "/api.", "/API", "/api%2fx", "/"}},
		{"a prefix without case", config.Match{Prefix: "/Api", IgnoreCase: true},
			[]string{"/api", "/API", "/aPis/X"}, []string{"/ap", "/ap\u0131"}},
		{"a path without case", config.Match{Path: "/Kelvin", IgnoreCase: true},
			[]string{"/kelvin", "/KELVIN?x"}, []string{"/kelvins", "/\u212aelvin", "/kelvi"}},
		{"segments without case", config.Match{Prefix: "/Api", Segments: true, IgnoreCase: true},
			[]string{"/api", "/API/x"}, []string{"/APIs"}},
		{"signs beside the letters keep their case", config.Match{Path: "/@[`{", IgnoreCase: true}, []string{"/@[`{"}, []string{"/`[`{", "/@{`{", "/@[@["}},
		{"a regex is of the whole path", config.Match{Regex: whole("/v[0-9]+|/w")},
			[]string{"/v1", "/v22?x=/y", "/w"}, []string{"/v", "/v1/", "/x/v1", "/v1\n", "/wx", "/v1/w"}},
		{"a regex is tried on no long path", config.Match{Regex: whole("/a*")},
			[]string{"/" + strings.Repeat("a", config.MostRegexText-1)}, []string{"/" + strings.Repeat("a", config.MostRegexText)}},
		{"a regex is tried on the longest path that a client may send", config.Match{Regex: whole("/a*")}, []string{"/" + strings.Repeat("a", 8<<10-1)}, nil},
		{"the asterisk is no path", config.Match{Regex: whole(".*")}, []string{"/"}, []string{"*", "", "?/"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tbl := table(host("vh", []string{"*"}, matching(tt.match)))
			for _, target := range append(slices.Clone(tt.yes), tt.not...) {
				r, _ := tbl.Match(&route.Query{Listener: "public", Target: target})
				if want := slices.Contains(tt.yes, target); (r != nil) != want {
					t.Errorf("%.50q matches: %v", target, r != nil)
				}
			}
		})
	}
}

func TestConditions(t *testing.T) {
	t.Parallel()
	header := func(c config.Condition) config.Match {
		c.Name = "x-v"
		return config.Match{Headers: []config.Condition{c}}
	}
	query := func(c config.Condition) config.Match {
		c.Name = "v"
		return config.Match{Query: []config.Condition{c}}
	}
	type q = route.Query
	one := func(values ...string) q {
		l := lines{{"Accept", "a"}}
		for _, v := range values {
			l = append(l, [2]string{"X-V", v})
		}
		return q{Fields: &l}
	}
	target := func(s string) q { return q{Target: s} }
	from := func(a string) q { return q{Client: netip.MustParseAddr(a)} }
	networks := func(s ...string) (networks []netip.Prefix) {
		for _, n := range s {
			networks = append(networks, netip.MustParsePrefix(n))
		}
		return networks
	}
	absent := []q{one(), {}}
	long := strings.Repeat("a", config.MostRegexText)
	tests := []struct {
		name     string
		match    config.Match
		yes, not []q
	}{
		{"methods", config.Match{Methods: []string{"GET", "PUT"}}, []q{{Method: "GET"}, {Method: "PUT"}}, []q{{Method: "get"}, {Method: "HEAD"}, {}}},

		{"a header that is a value", header(config.Condition{Text: "ab"}), []q{one("ab")}, append(absent, one("abc"), one("AB"), one(""), one("ab", "ab"))},
		{"an empty one", header(config.Condition{Text: ""}), []q{one("")}, append(absent, one("a"), one("", ""))},
		{"lines are joined", header(config.Condition{Text: "a,b,,c"}), []q{one("a", "b", "", "c"), one("a,b", ",c"), one("a,b,,c")}, append(absent, one("a", "b", "c"), one("a", "b", "", "c", ""), one("a, b", "", "c"), one("a,b,", ",c"))},
		{"another value", header(config.Condition{Text: "ab", Invert: true}), []q{one("abc"), one(""), one("ab", "ab")}, append(absent, one("ab"))},
		{"a beginning", header(config.Condition{Test: config.Prefix, Text: "a,b"}), []q{one("a,bc"), one("a", "b"), one("a", "bc"), one("a,b", "c")}, append(absent, one("a"), one("a", "c"), one("a,"), one("ca", "b"), one("b", "a,b"))},
		{"an end", header(config.Condition{Test: config.Suffix, Text: "a,b"}), []q{one("ca,b"), one("a", "b"), one("ca", "b"), one("c", "a,b")}, append(absent, one("b"), one("c", "b"), one("a", "bc"), one("a,b", "c"), one(",b"))},
		{"an expression", header(config.Condition{Test: config.Regex, Regex: whole("a+(,a+)*")}), []q{one("a"), one("aa", "a")}, append(absent, one("ab"), one("a", ""), one("a", "b"), one(long, "a"))},
		{"not an expression", header(config.Condition{Test: config.Regex, Regex: whole("a+"), Invert: true}), []q{one("b"), one("a", "a"), one(long + "a")}, append(absent, one("a"), one(long))},
		{"presence", header(config.Condition{Test: config.Present}), []q{one(""), one("a"), one("a", "b")}, absent},
		{"absence", header(config.Condition{Test: config.Present, Invert: true}), absent, []q{one(""), one("a"), one("a", "b")}},
		{"a range", header(config.Condition{Test: config.Range, From: -5, To: 10}), []q{one("-5"), one("0"), one("9"), one("007"), one("-0")},
			append(absent, one("-6"), one("10"), one(""), one("-"), one("+1"), one("1.0"), one("1 "), one("0x1"), one("1", "2"), one("18446744073709551617"), one("-18446744073709551615"))},
		{"out of a range", header(config.Condition{Test: config.Range, From: -5, To: 10, Invert: true}), []q{one("10"), one("x"), one("1", "2")}, append(absent, one("9"))},
		{"a range to the ends", header(config.Condition{Test: config.Range, From: -1 << 63, To: 1<<63 - 1}), []q{one("-9223372036854775808"), one("9223372036854775806")}, []q{one("9223372036854775807"), one("9223372036854775808"), one("-9223372036854775809")}},

		{"a parameter that is a value", query(config.Condition{Text: "a=b"}), []q{target("/?v=a=b"), target("/?x&v=a=b&v=c")},
			[]q{target("/"), target("/?v=c&v=a=b"), target("/?V=a=b"), target("/?vv=a=b"), target("/?x=v=a=b"), target("/?v=a%3Db"), target("/v=a=b")}},
		{"a parameter that is there", query(config.Condition{Test: config.Present}), []q{target("/?v"), target("/?v="), target("/?a&v"), target("/??&v")}, []q{target("/?"), target("/?vx"), target("/?a=v"), target("/?%76"), target("/??v")}},
		{"one that is not", query(config.Condition{Test: config.Present, Invert: true}), []q{target("/?"), target("/?vx")}, []q{target("/?v"), target("/?v=1")}},
		{"a parameter's beginning", query(config.Condition{Test: config.Prefix, Text: "a"}), []q{target("/?v=ab")}, []q{target("/?v=ba"), target("/?v")}},
		{"a parameter's range", query(config.Condition{Test: config.Range, From: 1, To: 2}), []q{target("/?v=1")}, []q{target("/?v=2"), target("/?v")}},

		{"a network", config.Match{Sources: networks("10.0.0.0/8", "2001:db8::/32")}, []q{from("10.1.2.3"), from("::ffff:10.1.2.3"), from("2001:db8::1")}, []q{from("11.0.0.1"), from("2001:db9::"), {}}},
		{"a network of one's own link", config.Match{Sources: networks("fe80::/10")}, []q{from("fe80::1%eth0")}, []q{from("fec0::1%eth0")}},

		{"all of several", config.Match{Methods: []string{"GET"}, Headers: []config.Condition{{Name: "x-v", Text: "a"}}, Query: []config.Condition{{Name: "v", Test: config.Present}}},
			[]q{{Method: "GET", Fields: one("a").Fields, Target: "/?v"}},
			[]q{{Method: "PUT", Fields: one("a").Fields, Target: "/?v"}, {Method: "GET", Fields: one("b").Fields, Target: "/?v"}, {Method: "GET", Fields: one("a").Fields, Target: "/"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.match.Prefix = "/"
			tbl := table(host("vh", []string{"*"}, matching(tt.match)))
			check := func(q route.Query, want bool) {
				q.Listener = "public"
				if q.Target == "" {
					q.Target = "/"
				}
				if r, _ := tbl.Match(&q); (r != nil) != want {
					t.Errorf("%.200s matches: %v", show(&q), r != nil)
				}
			}
			for _, q := range tt.yes {
				check(q, true)
			}
			for _, q := range tt.not {
				check(q, false)
			}
		})
	}
}

func show(q *route.Query) string {
	return fmt.Sprintf("%s %s from %v with %q", q.Method, q.Target, q.Client, q.Fields)
}

func TestAFractionOfTheRequests(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	part := func(percent int64, key string) config.Match {
		return config.Match{Prefix: "/", Fraction: &config.Dynamic{Value: percent * dynamic.Whole / 100, Key: key}}
	}
	rest := matching(config.Match{Prefix: "/"})
	tbl := route.New(&config.Config{VirtualHosts: []config.VirtualHost{host("vh", []string{"*"}, named("a", part(50, "a")), named("b", part(50, "")), rest)}}, &values)
	count := func() map[string]int {
		got := map[string]int{}
		for a := range uint64(10) {
			for b := range uint64(10) {
				draws := []uint64{a * dynamic.Whole / 10, b*dynamic.Whole/10 + 7*dynamic.Whole}
				r, _ := tbl.Match(&route.Query{Listener: "public", Target: "/", Random: func() uint64 {
					next := draws[0]
					draws = draws[1:]
					return next
				}})
				got[r.Name]++
			}
		}
		return got
	}
	steps := []struct {
		override map[string]float64
		want     map[string]int
	}{
		{nil, map[string]int{"vh:a": 50, "vh:b": 25, "vh:prefix=/": 25}}, // each is asked anew, so the second one gets a part of the rest
		{map[string]float64{"a": 0}, map[string]int{"vh:b": 50, "vh:prefix=/": 50}},
		{map[string]float64{"a": 100}, map[string]int{"vh:a": 100}},
	}
	for _, s := range steps {
		values.Apply(s.override)
		if got := count(); fmt.Sprint(got) != fmt.Sprint(s.want) {
			t.Errorf("with %v: got %v, want %v", s.override, got, s.want)
		}
	}
}

func named(name string, m config.Match) config.Route {
	r := matching(m)
	r.Name = name
	return r
}

// Names key metrics, and tunnels that move to another generation.
func TestNamesStayWhenOtherRoutesComeAndGo(t *testing.T) {
	t.Parallel()
	header := func(value string) []config.Condition { return []config.Condition{{Name: "x-v", Text: value}} }
	half := &config.Dynamic{Value: dynamic.Whole / 2}
	all := []config.Route{
		matching(config.Match{Prefix: "/x", Methods: []string{"GET"}}),
		matching(config.Match{Prefix: "/x", Methods: []string{"PUT"}}),
		matching(config.Match{Prefix: "/x", Headers: header("1")}),
		matching(config.Match{Prefix: "/x", Headers: header("2")}),
		matching(config.Match{Prefix: "/x", Headers: []config.Condition{{Name: "x-v", Text: "2", Invert: true}}}),
		matching(config.Match{Prefix: "/x", Query: header("2")}),
		matching(config.Match{Prefix: "/x", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}),
		matching(config.Match{Prefix: "/x", Fraction: half}),
		named("checkout", config.Match{Prefix: "/x", Fraction: half}),
		matching(config.Match{Prefix: "/x", Segments: true}),
		matching(config.Match{Prefix: "/x", IgnoreCase: true, Segments: true}),
		matching(config.Match{Prefix: "/x"}),
		matching(config.Match{Path: "/X", IgnoreCase: true}),
		matching(config.Match{Regex: whole("/y(a|b)*")}),
		matching(config.Match{Regex: whole("/y" + strings.Repeat("a", 100) + "b")}),
		matching(config.Match{Regex: whole("/y" + strings.Repeat("a", 100) + "c")}),
	}
	names := func(routes []config.Route) (names []string) {
		for _, r := range table(host("vh", []string{"*"}, routes...)).Routes() {
			names = append(names, r.Name)
		}
		return names
	}
	got := names(all)
	for i, name := range got {
		if one := names(all[i : i+1]); one[0] != name {
			t.Errorf("%s is called %s where it is alone", name, one[0])
		}
		if slices.Index(got, name) != i {
			t.Errorf("several are called %s", name)
		}
	}
	// What they are called must not change from one version to another.
	want := []string{
		"vh:prefix=/x #bb94048e", "vh:prefix=/x #651ba8f3", "vh:prefix=/x #1d6fca4d", "vh:prefix=/x #c5b35070",
		"vh:prefix=/x #2e703a07", "vh:prefix=/x #a4a41ad9", "vh:prefix=/x #9b4e4561", "vh:prefix=/x #6fb0f204",
		"vh:checkout", "vh:prefix=/x segments", "vh:prefix~/x segments", "vh:prefix=/x", "vh:path~/x", "vh:regex=/y(a|b)*",
	}
	if !slices.Equal(got[:len(want)], want) {
		t.Errorf("got %s\nwant %s", got[:len(want)], want)
	}
	other := slices.Clone(all[7:8])
	other[0].Match.Fraction = &config.Dynamic{Value: 1, Key: "k"}
	if name := names(other)[0]; name != got[7] {
		t.Errorf("with another percentage %s is called %s", got[7], name)
	}
}
