package proxy

import (
	"net/netip"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
)

func prefixes(networks ...string) (all []netip.Prefix) {
	for _, n := range networks {
		all = append(all, netip.MustParsePrefix(n))
	}
	return all
}

func TestWhoTheClientIs(t *testing.T) {
	t.Parallel()
	named := prefixes("10.0.0.0/8", "2001:db8::/32")
	many := strings.Repeat("10.0.0.1, ", config.MaxHops)
	tests := []struct {
		name    string
		trusted []netip.Prefix
		hops    int
		peer    string // "": a unix socket
		chain   []string
		want    string // "": nobody knows
	}{
		{"a stranger", named, 0, "192.0.2.1:1", []string{"10.0.0.1, 1.1.1.1"}, "192.0.2.1"},
		{"a stranger without a word", named, 0, "192.0.2.1:1", nil, "192.0.2.1"},
		{"nobody is trusted", nil, 0, "10.0.0.1:1", []string{"1.1.1.1"}, "10.0.0.1"},
		{"IPv4 on a dual-stack socket", nil, 0, "[::ffff:192.0.2.1]:1", nil, "192.0.2.1"},
		{"a zone", nil, 0, "[fe80::1%eth0]:1", nil, "fe80::1"},
		{"a unix socket", named, 0, "", []string{"1.1.1.1"}, ""},
		{"a trusted unix socket", prefixes("0.0.0.0/0"), 0, "", []string{"1.1.1.1"}, "1.1.1.1"},
		{"behind a unix socket, by number", nil, 1, "", []string{"6.6.6.6, 1.1.1.1"}, "1.1.1.1"},

		{"behind a proxy", named, 0, "10.0.0.1:1", []string{"1.1.1.1"}, "1.1.1.1"},
		{"what a client invents", named, 0, "10.0.0.1:1", []string{"10.6.6.6, 6.6.6.6, 1.1.1.1"}, "1.1.1.1"},
		{"behind several", named, 0, "10.0.0.1:1", []string{"6.6.6.6, 1.1.1.1,10.0.0.3 ,\t10.0.0.2"}, "1.1.1.1"},
		{"in several lines", named, 0, "10.0.0.1:1", []string{"6.6.6.6,1.1.1.1", "10.0.0.3", "10.0.0.2"}, "1.1.1.1"},
		{"behind IPv6", named, 0, "[2001:db8::1]:1", []string{"2001:db9::1, 2001:db8::2"}, "2001:db9::1"},
		{"all are proxies", named, 0, "10.0.0.1:1", []string{"10.0.0.3, 10.0.0.2"}, "10.0.0.3"},
		{"no word from a proxy", named, 0, "10.0.0.1:1", nil, "10.0.0.1"},
		{"an empty word", named, 0, "10.0.0.1:1", []string{""}, "10.0.0.1"},
		{"not an address", named, 0, "10.0.0.1:1", []string{"1.1.1.1, unknown"}, "10.0.0.1"},
		{"not an address, further off", named, 0, "10.0.0.1:1", []string{"1.1.1.1, unknown, 10.0.0.2"}, "10.0.0.2"},
		{"an empty element", named, 0, "10.0.0.1:1", []string{"1.1.1.1,, 10.0.0.2"}, "10.0.0.2"},
		{"an empty line", named, 0, "10.0.0.1:1", []string{"1.1.1.1", "", "10.0.0.2"}, "10.0.0.2"},
		{"with ports and brackets", named, 0, "10.0.0.1:1", []string{"1.1.1.1:65535, [2001:db8::1]:80, [2001:db8::2], 10.0.0.2:1"}, "1.1.1.1"},
		{"IPv4 in IPv6", named, 0, "10.0.0.1:1", []string{"1.1.1.1, ::ffff:10.0.0.2"}, "1.1.1.1"},
		{"as many as are looked at", named, 0, "10.0.0.1:1", []string{"1.1.1.1, 2.2.2.2, " + many[:len(many)-12]}, "2.2.2.2"},
		{"more than are looked at", named, 0, "10.0.0.1:1", []string{"1.1.1.1, " + many + "10.0.0.1"}, "10.0.0.1"},
		{"everybody is trusted", prefixes("0.0.0.0/0", "::/0"), 0, "192.0.2.1:1", []string{"6.6.6.6, 1.1.1.1"}, "6.6.6.6"},

		{"behind one, by number", nil, 1, "192.0.2.1:1", []string{"6.6.6.6, 1.1.1.1"}, "1.1.1.1"},
		{"behind two, by number", nil, 2, "192.0.2.1:1", []string{"6.6.6.6, 1.1.1.1, 2.2.2.2"}, "1.1.1.1"},
		{"behind two, in lines", nil, 2, "192.0.2.1:1", []string{"6.6.6.6, 1.1.1.1", "2.2.2.2"}, "1.1.1.1"},
		{"behind fewer than there should be", nil, 3, "192.0.2.1:1", []string{"1.1.1.1, 2.2.2.2"}, "1.1.1.1"},
		{"behind none", nil, 1, "192.0.2.1:1", nil, "192.0.2.1"},
		{"not an address, by number", nil, 2, "192.0.2.1:1", []string{"1.1.1.1, _hidden, 2.2.2.2"}, "2.2.2.2"},
		{"as many as can be counted", nil, config.MaxHops, "192.0.2.1:1", []string{"6.6.6.6, 1.1.1.1, " + many[:len(many)-12]}, "1.1.1.1"},
	}
	for _, tt := range tests {
		s := &side{trusted: tt.trusted, edge: config.Edge{TrustedHops: tt.hops}}
		var peer netip.AddrPort
		if tt.peer != "" {
			peer = netip.MustParseAddrPort(tt.peer)
		}
		fields := exchange.Fields{{Name: "A", Value: "3.3.3.3"}}
		for _, line := range tt.chain {
			fields = append(fields, exchange.Field{Name: "x-Forwarded-FOR", Value: line}, exchange.Field{Name: "B", Value: "3.3.3.3"})
		}
		got := s.clientOf(fields, peer, s.trustsPeer(peer))
		if want, _ := netip.ParseAddr(tt.want); got != want {
			t.Errorf("%s: got %v, want %q", tt.name, got, tt.want)
		}
	}
}

func TestWhatIsAnAddressInAChain(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"1.2.3.4":               "1.2.3.4",
		"1.2.3.4:80":            "1.2.3.4",
		"2001:db8::1":           "2001:db8::1",
		"[2001:db8::1]":         "2001:db8::1",
		"[2001:db8::1]:4711":    "2001:db8::1",
		"::ffff:1.2.3.4":        "1.2.3.4",
		"[::ffff:1.2.3.4]:1":    "1.2.3.4",
		"":                      "",
		":80":                   "",
		"[]":                    "",
		"[1.2.3.4]":             "",
		"[2001:db8::1":          "",
		"[2001:db8::1]80":       "",
		"[2001:db8::1]:":        "",
		"[2001:db8::1]:x":       "",
		"1.2.3.4:":              "",
		"1.2.3.4:123456":        "",
		"1.2.3.4:-1":            "",
		"01.2.3.4":              "",
		"1.2.3":                 "",
		"fe80::1%eth0":          "",
		"localhost":             "",
		"unknown":               "",
		"_hidden":               "",
		`"1.2.3.4"`:             "",
		"for=1.2.3.4":           "",
		"1.2.3.4 5.6.7.8":       "",
		strings.Repeat("1", 99): "",
	} {
		addr, ok := parseHop(text)
		if got, _ := netip.ParseAddr(want); ok != (want != "") || addr != got {
			t.Errorf("%q: got %v, %v", text, addr, ok)
		}
	}
}

// FuzzClient compares the walk with the whole chain, split.
func FuzzClient(f *testing.F) {
	for _, seed := range []string{"", "1.1.1.1", "1.1.1.1, 10.0.0.1", "a,,10.0.0.1\n10.0.0.2", "[::1]:80,\t10.0.0.1 ", ",", "\n"} {
		f.Add(uint8(0), seed)
		f.Add(uint8(2), seed)
	}
	f.Fuzz(func(t *testing.T, hops uint8, text string) {
		s := &side{trusted: prefixes("10.0.0.0/8")}
		if s.edge.TrustedHops = int(hops % (config.MaxHops + 1)); s.edge.TrustedHops > 0 {
			s.trusted = nil
		}
		var fields exchange.Fields
		for line := range strings.SplitSeq(text, "\n") {
			fields.Add("X-Forwarded-For", line)
		}
		want := netip.MustParseAddr("10.9.9.9")
		all := strings.Split(strings.ReplaceAll(text, "\n", ","), ",")
		for i := range min(len(all), config.MaxHops) {
			addr, ok := parseHop(strings.Trim(all[len(all)-1-i], " \t"))
			if !ok {
				break
			}
			if want = addr; s.edge.TrustedHops == i+1 || s.edge.TrustedHops == 0 && !contains(s.trusted, addr) {
				break
			}
		}
		if got := s.clientOf(fields, netip.MustParseAddrPort("10.9.9.9:1"), true); got != want {
			t.Fatalf("%q by %d: got %v, want %v", text, hops, got, want)
		}
	})
}
