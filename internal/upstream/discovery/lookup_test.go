package discovery

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"holdfast/internal/config"
)

// FuzzAnswer has a resolver answer whatever it likes, with the right id and question: neither
// may anything that is found be more than there can be, nor be what cannot be meant, nor be
// what does not belong into a head.
func FuzzAnswer(f *testing.F) {
	seed := func(kind uint16, records ...string) {
		q := new(dns.Msg).SetQuestion("a.example.", kind)
		r := new(dns.Msg).SetReply(q)
		for _, line := range records {
			rr, err := dns.NewRR(line)
			if err != nil {
				f.Fatal(err)
			}
			r.Answer = append(r.Answer, rr)
		}
		b, err := r.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(kind, b)
	}
	seed(dns.TypeA, "a.example. 5 IN A 10.0.0.1", "a.example. 5 IN A 127.0.0.1", "b.example. 5 IN A 10.0.0.2")
	seed(dns.TypeA, "a.example. 5 IN CNAME b.example.", "b.example. 5 IN CNAME a.example.")
	seed(dns.TypeAAAA, "a.example. 5 IN CNAME b.example.", "b.example. 5 IN AAAA ::ffff:127.0.0.1", "b.example. 5 IN AAAA fe80::1")
	seed(dns.TypeSRV, "a.example. 5 IN SRV 1 2 3 b.example.", `a.example. 5 IN SRV 1 2 3 b\013\010c.example.`)
	f.Fuzz(func(t *testing.T, kind uint16, b []byte) {
		exchange := func(_ context.Context, _ string, _ netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
			if len(b) >= 2 {
				b[0], b[1] = byte(q.Id>>8), byte(q.Id)
			}
			if r, ok := answerTo(q, b); ok {
				return r, nil
			}
			return nil, errNonsense
		}
		cfg := config.DNS{
			Resolvers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53")}, Family: "all", Timeout: time.Minute, MinTTL: time.Second, MaxTTL: time.Hour,
		}
		l := lookup{world: &World{Exchange: exchange, Hosts: "/nonexistent"}, cfg: &cfg}
		if kind == dns.TypeSRV {
			hosts, ttl, _, err := l.hostsOf(t.Context(), "a.example")
			if len(hosts) > mostHosts || err == nil && (ttl < cfg.MinTTL || ttl > cfg.MaxTTL) {
				t.Errorf("%d hosts for %v", len(hosts), ttl)
			}
			for _, h := range hosts {
				if !isHost(h.name) || h.port == 0 {
					t.Errorf("%+v is no host", h)
				}
			}
			return
		}
		a := l.addressesOf(t.Context(), "a.example")
		if len(a.v4) > config.MostDiscovered || len(a.v6) > config.MostDiscovered || a.err4 == nil && (a.ttl < cfg.MinTTL || a.ttl > cfg.MaxTTL) {
			t.Errorf("%d and %d addresses for %v", len(a.v4), len(a.v6), a.ttl)
		}
		for _, addr := range append(a.v4, a.v6...) {
			if addr.IsLoopback() || addr.IsMulticast() || addr.IsUnspecified() || addr.IsLinkLocalUnicast() || addr.Is4In6() {
				t.Errorf("%v was taken", addr)
			}
		}
	})
}
