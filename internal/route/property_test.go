package route_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/route"
)

// The table finds what the rules say, written down as simply as they can be.
func TestTheTableFollowsTheRules(t *testing.T) {
	t.Parallel()
	matched := 0
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 1))
		cfg := randomConfig(r)
		tbl := route.New(cfg, nil)
		for range 100 {
			q := randomQuery(r)
			draws := r.Uint64()
			q.Random = sequence(draws)
			got, outcome := tbl.Match(q)
			q.Random = sequence(draws)
			h, n, wantOutcome := reference(cfg, q)
			want := ""
			if wantOutcome == route.Matched {
				want = fmt.Sprintf("%s:r%d", cfg.VirtualHosts[h].Name, n)
				matched++
			}
			name := ""
			if got != nil {
				name = got.Name
			}
			checkExplanation(t, tbl.Explain(q), got, outcome)
			if domain, _ := tbl.ExplainHost(q); (domain == "") != (outcome == route.NoVirtualHost) {
				t.Errorf("%q is led by the domain %q: %v", q.Authority, domain, outcome)
			}
			if name != want || outcome != wantOutcome {
				t.Fatalf("seed %d: %s to %q on %s: got %q, %v; want %q, %v", seed, show(q), q.Authority, q.Listener, name, outcome, want, wantOutcome)
			}
		}
	}
	if matched < 2000 {
		t.Errorf("only %d requests had a route", matched)
	}
}

// checkExplanation compares what is explained with what has happened.
func checkExplanation(t *testing.T, e route.Explanation, got *route.Route, outcome route.Outcome) {
	t.Helper()
	sum, possible := e.Rest, outcome == e.Outcome || outcome == route.NoRoute && e.Rest > 0
	for _, c := range e.Chances {
		sum += c.Share
		possible = possible && (got == nil || e.VirtualHost == got.VirtualHost)
	}
	if got != nil {
		possible = possible && slices.ContainsFunc(e.Chances, func(c route.Chance) bool { return c.Route == got && c.Share > 0 })
	}
	if !possible || sum < 0.999999 || sum > 1.000001 {
		t.Errorf("explained as %+v, but it is %v, %v", e, got, outcome)
	}
}

// sequence returns the same numbers for the same seed.
func sequence(seed uint64) func() uint64 { return rand.New(rand.NewPCG(seed, 2)).Uint64 }

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func randomPath(r *rand.Rand) string {
	path := "/"
	for range r.IntN(4) {
		path += pick(r, "a", "A", "b", "/", "/a", "ab")
	}
	return path
}

func randomMatch(r *rand.Rand) config.Match {
	var m config.Match
	m.IgnoreCase = r.IntN(4) == 0
	switch r.IntN(4) {
	case 0:
		m.Path = randomPath(r)
	case 1:
		m.Regex = whole(pick(r, "/a.*", "/(a|b)+", ".*b", "/.?"))
		m.IgnoreCase = false
	case 2:
		m.Prefix = strings.TrimRight(randomPath(r), "/") + "a"
		m.Prefix = "/" + strings.TrimLeft(m.Prefix, "/")
		m.Segments = true
	default:
		m.Prefix = randomPath(r)
	}
	condition := func() config.Condition {
		return config.Condition{
			Name: pick(r, "x", "y"), Test: config.Test(r.IntN(6)), Text: pick(r, "", "1", "1,2", "2", ","), From: 0, To: 2,
			Regex: whole(pick(r, "[12]", "1(,.*)?")), Invert: r.IntN(3) == 0,
		}
	}
	if r.IntN(4) == 0 {
		m.Methods = []string{"GET", "PUT"}[:1+r.IntN(2)]
	}
	for range max(r.IntN(5)-2, 0) {
		m.Headers = append(m.Headers, condition())
	}
	for range max(r.IntN(5)-3, 0) {
		m.Query = append(m.Query, condition())
	}
	if r.IntN(6) == 0 {
		m.Sources = []netip.Prefix{netip.MustParsePrefix(pick(r, "10.0.0.0/8", "10.1.0.0/16"))}
	}
	if r.IntN(6) == 0 {
		m.Fraction = &config.Dynamic{Value: dynamic.Whole * int64(r.IntN(5)) / 4}
	}
	return m
}

func randomConfig(r *rand.Rand) *config.Config {
	cfg := new(config.Config)
	used := map[string]bool{}
	for i := range 1 + r.IntN(4) {
		vh := config.VirtualHost{Name: fmt.Sprint("h", i), Listeners: []string{"l1", "l2"}[r.IntN(2):]}
		for range 1 + r.IntN(2) {
			domain := pick(r, "*", "*.e", "*.a.e", "a.e", "b.a.e", "c")
			if !used[domain] {
				used[domain] = true
				vh.Domains = append(vh.Domains, domain)
			}
		}
		for j := range 1 + r.IntN(8) {
			vh.Routes = append(vh.Routes, named(fmt.Sprint("r", j), randomMatch(r)))
		}
		cfg.VirtualHosts = append(cfg.VirtualHosts, vh)
	}
	return cfg
}

func randomQuery(r *rand.Rand) *route.Query {
	fields := new(lines)
	for range r.IntN(4) {
		*fields = append(*fields, [2]string{pick(r, "x", "X", "y", "z"), pick(r, "", "1", "2", "1,2", "a")})
	}
	target := randomPath(r)
	if r.IntN(20) == 0 {
		target = "*"
	}
	for i := range r.IntN(4) {
		target += []string{"?", "&", "&", "?"}[i] + pick(r, "x", "y", "x=1", "x=2", "y=1", "z", "x=1,2")
	}
	q := &route.Query{
		Listener: pick(r, "l1", "l2", "l2", "l3"), Authority: pick(r, "a.e", "b.a.e", "x.b.a.e", "x.e", "e", "c:80", "d", ""),
		Target: target, Method: pick(r, "GET", "PUT", "POST"), Fields: fields,
	}
	if r.IntN(5) > 0 {
		q.Client = netip.MustParseAddr(pick(r, "10.0.0.1", "10.1.0.1", "11.0.0.1", "::1"))
	}
	return q
}

// reference finds the virtual host and the route by looking at everything.
func reference(cfg *config.Config, q *route.Query) (host, n int, outcome route.Outcome) {
	name, _, _ := strings.Cut(q.Authority, ":")
	host, best := -1, -1
	for i, vh := range cfg.VirtualHosts {
		for _, d := range vh.Domains {
			suffix, wild := strings.CutPrefix(d, "*")
			rank := -1
			switch {
			case d == name && d != "":
				rank = 1000
			case wild && strings.HasSuffix(name, suffix) && (len(name) > len(suffix) || suffix == ""):
				rank = len(suffix)
			}
			if rank > best && slices.Contains(vh.Listeners, q.Listener) {
				host, best = i, rank
			}
		}
	}
	if host < 0 {
		return 0, 0, route.NoVirtualHost
	}
	path, query, _ := strings.Cut(q.Target, "?")
	for i, r := range cfg.VirtualHosts[host].Routes {
		if referencePath(&r.Match, path) && referenceRest(&r.Match, q, query) {
			return host, i, route.Matched
		}
	}
	return 0, 0, route.NoRoute
}

func referencePath(m *config.Match, path string) bool {
	if path == "*" {
		return false
	}
	if m.Regex != nil {
		return m.Regex.MatchString(path)
	}
	prefix, exact := m.Prefix, m.Path
	if m.IgnoreCase {
		path, prefix, exact = strings.ToLower(path), strings.ToLower(prefix), strings.ToLower(exact)
	}
	switch {
	case exact != "":
		return path == exact
	case m.Segments:
		return path == prefix || strings.HasPrefix(path, prefix+"/")
	}
	return strings.HasPrefix(path, prefix)
}

func referenceRest(m *config.Match, q *route.Query, query string) bool {
	if len(m.Methods) > 0 && !slices.Contains(m.Methods, q.Method) {
		return false
	}
	for _, c := range m.Headers {
		var values []string
		for _, l := range *q.Fields.(*lines) {
			if strings.EqualFold(l[0], c.Name) {
				values = append(values, l[1])
			}
		}
		if !referenceValue(&c, strings.Join(values, ","), len(values) > 0) {
			return false
		}
	}
	for _, c := range m.Query {
		value, there := "", false
		for _, p := range strings.Split(query, "&") {
			if name, v, _ := strings.Cut(p, "="); name == c.Name && !there {
				value, there = v, true
			}
		}
		if !referenceValue(&c, value, there) {
			return false
		}
	}
	if len(m.Sources) > 0 && !slices.ContainsFunc(m.Sources, func(p netip.Prefix) bool { return p.Contains(q.Client) }) {
		return false
	}
	return m.Fraction == nil || q.Random()%dynamic.Whole < uint64(m.Fraction.Value)
}

func referenceValue(c *config.Condition, value string, there bool) bool {
	if !there {
		return c.Test == config.Present && c.Invert
	}
	holds := true
	switch c.Test {
	case config.Exact:
		holds = value == c.Text
	case config.Prefix:
		holds = strings.HasPrefix(value, c.Text)
	case config.Suffix:
		holds = strings.HasSuffix(value, c.Text)
	case config.Regex:
		holds = c.Regex.MatchString(value)
	case config.Range:
		n, err := strconv.ParseInt(value, 10, 64)
		holds = err == nil && value[0] != '+' && n >= c.From && n < c.To
	}
	return holds != c.Invert
}

// A file is refused for a route that can never match only if the one before it leaves nothing to
// it, and always if that one asks for no more than a path.
func TestARouteIsRefusedIfNothingIsLeftToIt(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 1))
	refused := 0
	for range 3000 {
		var matches [2]config.Match
		var written [2]string
		for i := range matches {
			m := randomMatch(r)
			m.Headers, m.Query, m.Sources, m.Fraction = nil, nil, nil, nil
			if m.Segments {
				m.Prefix = strings.TrimRight(m.Prefix, "/")
			}
			if m.Regex != nil {
				m.Regex = whole(".*")
			}
			matches[i], written[i] = m, writeMatch(&m)
		}
		file := fmt.Sprintf(`
[[listeners]]
name = "l"
address = "127.0.0.1:0"
[[clusters]]
name = "c"
endpoints = ["127.0.0.1:1"]
[[virtual_hosts]]
name = "vh"
domains = ["*"]
routes = [{ match = %s, cluster = "c" }, { match = %s, cluster = "c" }]
`, written[0], written[1])
		_, err := config.Parse("f", []byte(file))
		left := slices.ContainsFunc(requestsOf(&matches[1]), func(q *route.Query) bool {
			return takes(&matches[1], q) && !takes(&matches[0], q)
		})
		hidden := err != nil && strings.Contains(err.Error(), "can never match")
		known := matches[0].Methods == nil && matches[0].Regex == nil // what of all else hides nobody finds out
		if hidden && left || !hidden && !left && known {
			t.Errorf("%s before %s: %v", written[0], written[1], err)
		} else if hidden {
			refused++
		}
	}
	if refused < 100 {
		t.Errorf("only %d were refused", refused)
	}
}

func takes(m *config.Match, q *route.Query) bool {
	return referencePath(m, q.Target) && referenceRest(m, q, "")
}

func writeMatch(m *config.Match) string {
	var keys []string
	switch {
	case m.Regex != nil:
		keys = append(keys, `regex = ".*"`)
	case m.Path != "":
		keys = append(keys, fmt.Sprintf("path = %q", m.Path))
	default:
		keys = append(keys, fmt.Sprintf("prefix = %q", m.Prefix))
	}
	if m.Segments {
		keys = append(keys, "segments = true")
	}
	if m.IgnoreCase {
		keys = append(keys, "case_sensitive = false")
	}
	if m.Methods != nil {
		keys = append(keys, fmt.Sprintf("methods = [%q]", m.Methods[0]))
		m.Methods = m.Methods[:1]
	}
	return "{ " + strings.Join(keys, ", ") + " }"
}

// requestsOf returns those among which one is that another match does not take, if there is
// any.
func requestsOf(m *config.Match) (all []*route.Query) {
	text := m.Prefix + m.Path
	if m.Regex != nil {
		text = "/z"
	}
	for _, s := range []string{text, strings.ToUpper(text), strings.ToLower(text)} {
		for _, end := range []string{"", "x", "/", "/x"} {
			for _, method := range []string{"GET", "POST"} {
				all = append(all, &route.Query{Target: s + end, Method: method})
			}
		}
	}
	return append(all, &route.Query{Target: "/other", Method: "GET"}, &route.Query{Target: "/other", Method: "POST"})
}
