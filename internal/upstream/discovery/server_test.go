package discovery_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"holdfast/internal/config"
	"holdfast/internal/upstream/discovery"
)

// serve has handler answer on a port of 127.0.0.1, over UDP and TCP, until the test ends.
func serve(t *testing.T, handler dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	for range 20 { // until both ports are the same
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p, err := net.ListenPacket("udp", l.Addr().String())
		if err != nil {
			l.Close()
			continue
		}
		for _, s := range []*dns.Server{{Listener: l, Handler: handler}, {PacketConn: p, Handler: handler}} {
			over, started := make(chan struct{}), make(chan struct{})
			s.NotifyStartedFunc = func() { close(started) }
			go func() { defer close(over); s.ActivateAndServe() }()
			<-started
			t.Cleanup(func() { s.Shutdown(); <-over })
		}
		return netip.MustParseAddrPort(l.Addr().String())
	}
	t.Fatal("no port is free for both")
	return netip.AddrPort{}
}

func asking(resolvers ...netip.AddrPort) *config.Discovery {
	cfg := strict()
	cfg.DNS.Resolvers, cfg.DNS.Timeout, cfg.DNS.MinTTL = resolvers, 20*time.Second, time.Second
	cfg.DNS.BackoffBase, cfg.DNS.BackoffMax = 10*time.Millisecond, 50*time.Millisecond
	return cfg
}

func isUDP(w dns.ResponseWriter) bool { return strings.HasPrefix(w.LocalAddr().Network(), "udp") }

func TestARealServerIsAsked(t *testing.T) {
	t.Parallel()
	z := new(zone)
	z.set("a.example. A", "a.example. 1 IN A 10.0.0.1")
	z.set("_chat._tcp.example. SRV", "_chat._tcp.example. 1 IN SRV 0 3 9000 a.example.")
	server := serve(t, func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(z.answer(q)) })
	_, f := follow(t, discovery.Options{Config: asking(server), Endpoints: []config.Endpoint{{Address: "a.example:80"}, {Address: "_chat._tcp.example", SRV: true}}})
	f.await("a.example:80=10.0.0.1:80 a.example:9000=10.0.0.1:9000/3/0")
	z.set("a.example. A", "a.example. 1 IN A 10.0.0.2")
	f.await("a.example:80=10.0.0.2:80 a.example:9000=10.0.0.2:9000/3/0")
}

func TestALongAnswerComesOverTCP(t *testing.T) {
	t.Parallel()
	var records, want []string
	for i := range 1000 {
		records = append(records, fmt.Sprintf("a.example. 300 IN A 10.0.%d.%d", i/250, i%250))
	}
	for i := range 1000 {
		want = append(want, fmt.Sprintf("a.example:80=10.0.%d.%d:80", i/250, i%250))
	}
	z := new(zone)
	z.set("a.example. A", records...)
	server := serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		r := z.answer(q)
		if isUDP(w) {
			if o := q.IsEdns0(); o == nil || o.UDPSize() != 1232 {
				t.Errorf("the question has %v, want EDNS with 1232 bytes", o)
			}
			r.Truncate(1232)
		}
		w.WriteMsg(r)
	})
	_, f := follow(t, discovery.Options{Config: asking(server), Endpoints: named("a.example:80")})
	f.await(strings.Join(want, " "))
}

func TestWhatIsNoAnswerToTheQuestionIsNotRead(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]func(r *dns.Msg){
		"another id":         func(r *dns.Msg) { r.Id++ },
		"another question":   func(r *dns.Msg) { r.Question[0].Name = "b.example." },
		"another type":       func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeAAAA },
		"another class":      func(r *dns.Msg) { r.Question[0].Qclass = dns.ClassCHAOS },
		"no question":        func(r *dns.Msg) { r.Question = nil },
		"a question":         func(r *dns.Msg) { r.Response = false },
		"another operation":  func(r *dns.Msg) { r.Opcode = dns.OpcodeNotify },
		"records of another": func(r *dns.Msg) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			z := new(zone)
			z.set("a.example. A", "a.example. 300 IN A 10.0.0.1")
			server := serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
				if !isUDP(w) {
					t.Error("it was asked over TCP")
				}
				owner := "a.example."
				if name == "records of another" {
					owner = "b.example."
				}
				rr, _ := dns.NewRR(owner + " 300 IN A 10.6.6.6")
				r := new(dns.Msg).SetReply(q)
				r.Answer = append(r.Answer, rr)
				lie(r)
				if name == "records of another" {
					r.Answer = append(r.Answer, z.answer(q).Answer...)
					w.WriteMsg(r)
					return
				}
				w.WriteMsg(r)
				w.Write([]byte("\x00\x01nonsense"))
				w.WriteMsg(z.answer(q))
			})
			_, f := follow(t, discovery.Options{Config: asking(server), Endpoints: named("a.example:80")})
			f.await("a.example:80=10.0.0.1:80")
			if f.changes != 1 {
				t.Errorf("%d changes were told, want 1", f.changes)
			}
		})
	}
}

func TestTheNextServerIsAskedWhereOneIsOfNoUse(t *testing.T) {
	t.Parallel()
	z := new(zone)
	z.set("a.example. A", "a.example. 300 IN A 10.0.0.1")
	failing := serve(t, func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)) })
	nobody, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	old := serve(t, func(w dns.ResponseWriter, q *dns.Msg) { // knows no EDNS
		if q.IsEdns0() != nil {
			r := new(dns.Msg)
			r.SetRcodeFormatError(q)
			r.Question = nil
			w.WriteMsg(r)
			return
		}
		w.WriteMsg(z.answer(q))
	})
	_, f := follow(t, discovery.Options{Config: asking(netip.MustParseAddrPort(nobody.LocalAddr().String()), failing, old), Endpoints: named("a.example:80")})
	f.await("a.example:80=10.0.0.1:80")
}

func TestAServerThatHangsIsLeft(t *testing.T) {
	t.Parallel()
	hanging, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hanging.Close()
	z := new(zone)
	z.set("a.example. A", "a.example. 300 IN A 10.0.0.1")
	server := serve(t, func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(z.answer(q)) })
	cfg := asking(netip.MustParseAddrPort(hanging.LocalAddr().String()), server)
	cfg.DNS.Timeout = 2 * time.Second
	_, f := follow(t, discovery.Options{Config: cfg, Endpoints: named("a.example:80")})
	f.await("a.example:80=10.0.0.1:80")
}
