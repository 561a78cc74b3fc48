package proxy_test

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

func fields(lines ...string) (f exchange.Fields) {
	for _, l := range lines {
		name, value, _ := strings.Cut(l, ": ")
		f.Add(name, value)
	}
	return f
}

func lines(f exchange.Fields) (lines []string) {
	for _, l := range f {
		lines = append(lines, l.Name+": "+l.Value)
	}
	return lines
}

func TestForwardingFields(t *testing.T) {
	t.Parallel()
	private := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}
	everybody := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	const id = "X-Request-Id: 4a4b4c4d-0000-4000-8000-000000000007"
	told := []string{"X-Forwarded-For: 203.0.113.5", "X-Forwarded-Proto: https", "X-Forwarded-Host: outer.example",
		"X-Forwarded-Port: 443", "Forwarded: for=203.0.113.5", "X-Real-IP: 203.0.113.5", "X-Request-Id: kept", "X-Envoy-Internal: true"}
	tests := []struct {
		name    string
		trusted []netip.Prefix
		peer    string // "" for a unix socket
		sent    []string
		want    []string
	}{
		{"a client that says nothing", private, "192.0.2.1:1", []string{"Accept: a"},
			[]string{"Accept: a", "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"what a client says is dropped", private, "192.0.2.1:1", told,
			[]string{"X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"whatever the case of its letters", private, "192.0.2.1:1",
			[]string{"x-forwarded-FOR: 1", "FORWARDED: for=1", "x-real-ip: 1", "x-ENVOY-x: 1", "x-request-ID: 1", "x-forwarded-: 1"},
			[]string{"X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"other fields stay, in their order", private, "192.0.2.1:1",
			[]string{"X-Forward: 1", "X-Forwarded-For: 1", "X-Real-IPs: 2", "X-Request-Ids: 3", "Forwarded-X: 4", "X_Own: 5"},
			[]string{"X-Forward: 1", "X-Real-IPs: 2", "X-Request-Ids: 3", "Forwarded-X: 4", "X_Own: 5",
				"X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"what a trusted peer says stays", private, "10.1.2.3:1", told,
			append([]string{"X-Forwarded-For: 203.0.113.5, 10.1.2.3"}, told[1:]...)},
		{"a trusted peer that says a part", private, "10.1.2.3:1", []string{"X-Forwarded-Proto: https"},
			[]string{"X-Forwarded-Proto: https", "X-Forwarded-For: 10.1.2.3", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Port: 8080", id}},
		{"an empty request id is none", private, "10.1.2.3:1", []string{"X-Forwarded-Proto: https", "X-Request-Id: "},
			[]string{"X-Forwarded-Proto: https", id, "X-Forwarded-For: 10.1.2.3", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Port: 8080"}},
		{"several lines become one chain", private, "10.1.2.3:1", []string{"X-Forwarded-For: 1.1.1.1, 2.2.2.2", "A: b", "x-forwarded-for: 3.3.3.3"},
			[]string{"X-Forwarded-For: 1.1.1.1, 2.2.2.2, 3.3.3.3, 10.1.2.3", "A: b", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"names with underscores are dropped from everybody", private, "10.1.2.3:1",
			[]string{"X_Forwarded_For: 6.6.6.6", "x-forwarded_proto: https", "X_REQUEST_ID: 6", "X_Real_IP: 6", "X_Envoy_Internal: 6"},
			[]string{"X-Forwarded-For: 10.1.2.3", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"an IPv6 peer has no brackets", private, "[2001:db9::1]:1", nil,
			[]string{"X-Forwarded-For: 2001:db9::1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"a trusted IPv6 peer", private, "[2001:db8::1]:1", []string{"X-Forwarded-For: 1.1.1.1"},
			[]string{"X-Forwarded-For: 1.1.1.1, 2001:db8::1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"IPv4 on a dual-stack socket is IPv4", private, "[::ffff:10.1.2.3]:1", []string{"X-Forwarded-For: 1.1.1.1"},
			[]string{"X-Forwarded-For: 1.1.1.1, 10.1.2.3", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"a zone is nobody else's business", private, "[2001:db8::1%eth0]:1", []string{"X-Forwarded-For: 1.1.1.1"},
			[]string{"X-Forwarded-For: 1.1.1.1, 2001:db8::1", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"a peer on a unix socket is not trusted", private, "", []string{"X-Forwarded-For: 1.1.1.1", "X-Forwarded-Proto: https"},
			[]string{"X-Forwarded-Host: a.example:8080", "X-Forwarded-Proto: http", "X-Forwarded-Port: 8080", id}},
		{"unless everybody is", everybody, "", []string{"X-Forwarded-For: 1.1.1.1", "X-Forwarded-Proto: https"},
			[]string{"X-Forwarded-For: 1.1.1.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: a.example:8080", "X-Forwarded-Port: 8080", id}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), get(t, "a.example:8080", "/")
				f.trusted = tt.trusted
				f.options = numbered(0x4a4b4c4d_00000000, 7)
				c.request.Fields = fields(tt.sent...)
				c.down.Remote = netip.AddrPort{}
				if tt.peer != "" {
					c.down.Remote = netip.MustParseAddrPort(tt.peer)
				}
				c.start(f.manager()).wait().wantStatus(200)
				if got := lines(f.origin().head.Fields); !slices.Equal(got, tt.want) {
					t.Errorf("the upstream got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
				}
			})
		})
	}
}

func TestAnotherListenersProxiesAreNotTrusted(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), get(t, "a.example", "/")
		f.trusted = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
		f.listener = "other"
		c.request.Fields = fields("X-Forwarded-For: 6.6.6.6")
		c.start(f.manager()).wait()
		if got, _ := f.origin().head.Fields.Get("X-Forwarded-For"); got != "192.0.2.1" {
			t.Errorf("X-Forwarded-For: %s", got)
		}
	})
}

func TestRequestsHaveIdsOfTheirOwn(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		m := f.manager()
		for range 20 {
			get(t, "a.example", "/").start(m).wait()
		}
		uuid := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
		seen := map[string]bool{}
		for _, o := range f.origins() {
			id, _ := o.head.Fields.Get("X-Request-Id")
			if !uuid.MatchString(id) {
				t.Errorf("%q is no random UUID", id)
			}
			seen[id] = true
		}
		if len(seen) != 20 {
			t.Errorf("%d different ids of 20", len(seen))
		}
	})
}
