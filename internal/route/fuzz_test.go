package route_test

import (
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/route"
)

// FuzzMatch compares the table with the rules said the slow way, and checks that a
// rewrite touches the matched bytes only.
func FuzzMatch(f *testing.F) {
	for _, seed := range [][2]string{
		{"chat.example.com", "/socket?x=1"},
		{"A.Chat.Example.Com.:443", "/"},
		{".example.com", "/a"},
		{"a.example.com:x:y", "?"},
		{"[::1]:80", "/socket/../x"},
		{"[::1", "*"},
		{"", ""},
		{"....", "/socket?/socket"},
	} {
		f.Add(seed[0], seed[1])
	}
	rewriting := to("/socket", "c")
	rewriting.PrefixRewrite = "/ws"
	domains := []string{"chat.example.com", "*.example.com", "*.chat.example.com", "[::1]"}
	var hosts []config.VirtualHost
	for _, d := range domains {
		hosts = append(hosts, host(d, []string{d}, rewriting, to("/", "c")))
	}
	t := table(hosts...)
	f.Fuzz(func(test *testing.T, authority, target string) {
		r, outcome := t.Match("public", authority, target)
		if want := slowHost(domains, authority); want == "" {
			if outcome != route.NoVirtualHost {
				test.Fatalf("authority %q: %v", authority, outcome)
			}
			return
		} else if outcome == route.Matched && r.VirtualHost != want {
			test.Fatalf("authority %q: virtual host %q, want %q", authority, r.VirtualHost, want)
		}
		path, query, _ := strings.Cut(target, "?")
		switch {
		case strings.HasPrefix(path, "/socket"):
			if got := r.Target(target); got != "/ws"+strings.TrimPrefix(target, "/socket") {
				test.Fatalf("%q became %q", target, got)
			}
			if !strings.HasSuffix(r.Target(target), query) {
				test.Fatalf("%q lost its query", target)
			}
		case strings.HasPrefix(path, "/"):
			if got := r.Target(target); got != target {
				test.Fatalf("%q became %q", target, got)
			}
		case outcome != route.NoRoute:
			test.Fatalf("%q: %v", target, outcome)
		}
	})
}

// slowHost returns the domain that authority belongs to, or "".
func slowHost(domains []string, authority string) string {
	if strings.HasPrefix(authority, "[") {
		// Spellings of addresses have a table of their own; here one is enough.
		if authority == "[::1]" || strings.HasPrefix(authority, "[::1]:") {
			return "[::1]"
		}
		if r, _ := table(host("v6", []string{"[::1]"}, to("/", "c"))).Match("public", authority, "/"); r != nil {
			return "[::1]"
		}
		return ""
	}
	name, _, _ := strings.Cut(authority, ":")
	name = strings.TrimSuffix(name, ".")
	best := ""
	for _, d := range domains {
		suffix, wild := strings.CutPrefix(d, "*")
		switch {
		case !wild && asciiEqualFold(name, d):
			return d
		case wild && len(name) > len(suffix) && asciiEqualFold(name[len(name)-len(suffix):], suffix) && len(d) > len(best):
			best = d
		}
	}
	return best
}

// asciiEqualFold is strings.EqualFold without Unicode's special cases.
func asciiEqualFold(a, b string) bool {
	return len(a) == len(b) && strings.EqualFold(a, b) && !strings.ContainsFunc(a, func(r rune) bool { return r >= 0x80 })
}
