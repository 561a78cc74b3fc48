package discovery_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/upstream/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// zone answers questions in memory, or not.
type zone struct {
	mu      sync.Mutex
	records map[string][]string // by "name. TYPE"
	fail    error
	hang    bool
	code    int
	asked   []string
}

func (z *zone) set(question string, records ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.records == nil {
		z.records = make(map[string][]string)
	}
	z.records[question] = records
}

func (z *zone) behave(f func()) {
	z.mu.Lock()
	defer z.mu.Unlock()
	f()
}

func (z *zone) questions() int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return len(z.asked)
}

func (z *zone) answer(q *dns.Msg) *dns.Msg {
	r := new(dns.Msg)
	r.SetReply(q)
	z.mu.Lock()
	defer z.mu.Unlock()
	question := q.Question[0].Name + " " + dns.TypeToString[q.Question[0].Qtype]
	z.asked = append(z.asked, question)
	r.Rcode = z.code
	lines, known := z.records[question]
	for _, line := range lines {
		rr, err := dns.NewRR(line)
		if err != nil {
			panic(err)
		}
		r.Answer = append(r.Answer, rr)
	}
	if !known && r.Rcode == dns.RcodeSuccess {
		soa, _ := dns.NewRR("example. 60 IN SOA ns.example. root.example. 1 1 1 1 20")
		r.Ns = append(r.Ns, soa)
	}
	return r
}

func (z *zone) exchange(ctx context.Context, network string, _ netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	z.mu.Lock()
	hang, fail := z.hang, z.fail
	z.mu.Unlock()
	if fail != nil {
		return nil, fail
	}
	if hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return z.answer(q), nil
}

// found is what a source has told.
type found struct {
	t        *testing.T
	log      bytes.Buffer
	registry *metrics.Registry

	mu      sync.Mutex
	now     []discovery.Endpoint
	changes int
	moves   int
	settled bool
	told    chan struct{}

	first string // what was known before anything was asked
}

func (f *found) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return list(f.now)
}

func list(all []discovery.Endpoint) string {
	var words []string
	for _, e := range all {
		w := e.Address + "=" + e.At.String()
		switch {
		case e.Path != "":
			w = e.Address
		case e.Addresses != nil:
			w = fmt.Sprint(e.Address, "=", e.Addresses)
		case e.Address == e.At.String():
			w = e.Address
		}
		if e.Weight > 1 || e.Priority != 0 {
			w += fmt.Sprintf("/%d/%d", e.Weight, e.Priority)
		}
		words = append(words, w)
	}
	return strings.Join(words, " ")
}

var counts = func() (all [5]*metrics.Desc) {
	for i := range all {
		all[i] = metrics.Define(metrics.Desc{Name: fmt.Sprintf("holdfast_test_%c_total", 'a'+i), Help: "Test.", Type: metrics.TypeCounter})
	}
	return all
}()

// follow has a source run until the test ends.
func follow(t *testing.T, o discovery.Options) (*discovery.Source, *found) {
	t.Helper()
	f := &found{t: t, registry: metrics.NewRegistry(), told: make(chan struct{}, 1000)}
	r := f.registry
	o.Counts = discovery.Counts{Attempts: r.Counter(counts[0]), Successes: r.Counter(counts[1]), Failures: r.Counter(counts[2]), Empty: r.Counter(counts[3]), LeftOut: r.Counter(counts[4])}
	o.Log = slog.New(slog.NewTextHandler(&f.log, nil))
	o.Deliver = func(all []discovery.Endpoint) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.now, f.changes = all, f.changes+1
		f.told <- struct{}{}
	}
	o.Moved = func(address string, addresses []netip.AddrPort) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.moves++
		f.now = slices.Clone(f.now)
		for i := range f.now {
			if f.now[i].Address == address {
				f.now[i].Addresses = addresses
			}
		}
		f.told <- struct{}{}
	}
	o.Settled = func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.settled {
			t.Error("settled twice")
		}
		f.settled = true
		f.told <- struct{}{}
	}
	s := discovery.New(o)
	f.now = s.Begin()
	f.first = f.String()
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { defer close(over); s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-over })
	return s, f
}

func (f *found) count(i int) uint64 { return f.registry.Counter(counts[i]).Value() }

// wantFirst fails where it is not this that was known to begin with.
func (f *found) wantFirst(what string) {
	f.t.Helper()
	if f.first != what {
		f.t.Errorf("begins with %q, want %q", f.first, what)
	}
}

// want fails where it is not this that was found by now, and whether all is settled.
func (f *found) want(what string, settled bool) {
	f.t.Helper()
	if got := f.String(); got != what {
		f.t.Errorf("found %q, want %q", got, what)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.settled != settled {
		f.t.Errorf("settled is %t, want %t", f.settled, settled)
	}
}

// await waits in real time for something to be found.
func (f *found) await(what string) {
	f.t.Helper()
	limit := time.After(30 * time.Second)
	for f.String() != what {
		select {
		case <-f.told:
		case <-limit:
			f.t.Fatalf("found %q, want %q; log:\n%s", f.String(), what, &f.log)
		}
	}
}

func strict() *config.Discovery {
	return &config.Discovery{By: config.ByStrictDNS, DNS: config.DNS{
		Resolvers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53")}, Family: "auto",
		MinTTL: 5 * time.Second, MaxTTL: 5 * time.Minute, Timeout: 4 * time.Second, BackoffBase: time.Second, BackoffMax: 30 * time.Second,
	}}
}

func named(addresses ...string) (all []config.Endpoint) {
	for _, a := range addresses {
		all = append(all, config.Endpoint{Address: a})
	}
	return all
}

// after lets this much time pass.
func after(d time.Duration) {
	time.Sleep(d) // virtual
	synctest.Wait()
}

func TestANameIsAskedForAgainWhenItsTimeIsOver(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		ttl      string
		from, to time.Duration // when it is asked for again
	}{
		{"the answer's", "60", 60 * time.Second, 66 * time.Second},
		{"not before the floor", "0", 5 * time.Second, 5500 * time.Millisecond},
		{"not after the ceiling", "86400", 5 * time.Minute, 330 * time.Second},
		{"of nonsense it is the floor", "4294967295", 5 * time.Second, 5500 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				z := new(zone)
				z.set("a.example. A", "a.example. "+tc.ttl+" IN A 10.0.0.2", "a.example. 300 IN A 10.0.0.1")
				if tc.ttl == "86400" {
					z.set("a.example. A", "a.example. "+tc.ttl+" IN A 10.0.0.2", "a.example. 86400 IN A 10.0.0.1")
				}
				_, f := follow(t, discovery.Options{Config: strict(), Endpoints: named("a.example:80", "10.0.0.9:80", "unix:/run/a"), World: &discovery.World{Exchange: z.exchange}})
				f.wantFirst("10.0.0.9:80 unix:/run/a")
				synctest.Wait()
				both := "a.example:80=10.0.0.1:80 a.example:80=10.0.0.2:80 10.0.0.9:80 unix:/run/a"
				f.want(both, true)
				z.set("a.example. A", "a.example. 1000 IN A 10.0.0.3", "a.example. 1000 IN A 10.0.0.2")
				after(tc.from - time.Millisecond)
				f.want(both, true)
				after(tc.to - tc.from + time.Millisecond)
				f.want("a.example:80=10.0.0.2:80 a.example:80=10.0.0.3:80 10.0.0.9:80 unix:/run/a", true)
				if f.changes != 2 {
					t.Errorf("%d changes were told, want 2", f.changes)
				}
			})
		})
	}
}

func TestAnAnswerInAnotherOrderIsNoChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z := new(zone)
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.2", "a.example. 5 IN A 10.0.0.1")
		_, f := follow(t, discovery.Options{Config: strict(), Endpoints: named("a.example:80"), World: &discovery.World{Exchange: z.exchange}})
		synctest.Wait()
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.1", "a.example. 5 IN A 10.0.0.2", "a.example. 5 IN A 10.0.0.2")
		after(time.Minute)
		if f.changes != 1 {
			t.Errorf("%d changes were told, want 1", f.changes)
		}
		if z.questions() < 8 {
			t.Errorf("only %d questions in a minute", z.questions())
		}
	})
}

func TestAFailureKeepsTheLastAnswer(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		spoil func(z *zone)
		empty bool
	}{
		{"nobody answers", func(z *zone) { z.behave(func() { z.hang = true }) }, false},
		{"nobody is there", func(z *zone) { z.behave(func() { z.fail = net.ErrClosed }) }, false},
		{"a server fails", func(z *zone) { z.behave(func() { z.code = dns.RcodeServerFailure }) }, false},
		{"a server refuses", func(z *zone) { z.behave(func() { z.code = dns.RcodeRefused }) }, false},
		{"a chain without an end", func(z *zone) {
			z.set("a.example. A", "a.example. 5 IN CNAME b.example.", "b.example. 5 IN CNAME a.example.")
		}, false},
		{"a chain that is too long", func(z *zone) {
			for i := range 30 {
				z.set(fmt.Sprintf("x%d.example. A", i), fmt.Sprintf("x%d.example. 5 IN CNAME x%d.example.", i, i+1))
			}
			z.set("a.example. A", "a.example. 5 IN CNAME x0.example.")
			z.set("x30.example. A", "x30.example. 5 IN A 10.6.6.6")
		}, false},
		{"lies alone", func(z *zone) {
			z.set("a.example. A", "a.example. 5 IN A 127.0.0.1", "a.example. 5 IN A 169.254.169.254")
		}, false},
		{"there is no such name", func(z *zone) {
			z.behave(func() { z.records, z.code = nil, dns.RcodeNameError })
		}, true},
		{"no address", func(z *zone) { z.behave(func() { z.records = nil }) }, true},
		{"records of another name", func(z *zone) { z.set("a.example. A", "b.example. 5 IN A 10.6.6.6") }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				z := new(zone)
				z.set("a.example. A", "a.example. 5 IN A 10.0.0.1")
				_, f := follow(t, discovery.Options{Config: strict(), Endpoints: named("a.example:80"), World: &discovery.World{Exchange: z.exchange}})
				synctest.Wait()
				tc.spoil(z)
				after(10 * time.Minute)
				f.want("a.example:80=10.0.0.1:80", true)
				lines := strings.Count(f.log.String(), "\n")
				if said := strings.Contains(f.log.String(), "stands for nothing"); lines != 1 || said != tc.empty || !strings.Contains(f.log.String(), "used=1") {
					t.Errorf("%d lines of log, want one:\n%s", lines, &f.log)
				}
				if failed, empty := f.count(2), f.count(3); tc.empty && (failed > 0 || empty == 0) || !tc.empty && (failed < 15 || failed > 40) {
					t.Errorf("%d failures and %d empty answers are counted in 10 minutes", failed, empty)
				}
				z.behave(func() { z.hang, z.fail, z.code = false, nil, 0 })
				z.set("a.example. A", "a.example. 5 IN A 10.0.0.2")
				after(time.Minute)
				f.want("a.example:80=10.0.0.2:80", true)
				if got := strings.Count(f.log.String(), "\n"); got != 2*lines {
					t.Errorf("%d lines of log at the end, want %d", got, 2*lines)
				}
			})
		})
	}
}

func TestAnEmptyAnswerIsTakenAtItsWordWhereThatIsWanted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z, cfg := new(zone), strict()
		cfg.DNS.RemoveEmpty = true
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.1")
		_, f := follow(t, discovery.Options{Config: cfg, Endpoints: named("a.example:80"), World: &discovery.World{Exchange: z.exchange}})
		synctest.Wait()
		z.behave(func() { z.records, z.code = nil, dns.RcodeNameError })
		after(10 * time.Second)
		f.want("", true)
		z.behave(func() { z.code = 0 })
		z.set("a.example. A", "a.example. 5 IN A 127.0.0.1") // a lie is no emptiness
		after(time.Minute)
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.1")
		after(2 * time.Minute)
		f.want("a.example:80=10.0.0.1:80", true)
	})
}

func TestFamilies(t *testing.T) {
	t.Parallel()
	const v4, v6 = "a.example:80=10.0.0.1:80", "a.example:80=[2001:db8::1]:80"
	for _, tc := range []struct {
		family     string
		has4, has6 bool
		want       string
	}{
		{"auto", true, true, v4},
		{"auto", false, true, v6},
		{"all", true, true, v4 + " " + v6},
		{"all", true, false, v4},
		{"ipv4", true, true, v4},
		{"ipv6", true, true, v6},
	} {
		synctest.Test(t, func(t *testing.T) {
			z, cfg := new(zone), strict()
			cfg.DNS.Family = tc.family
			if tc.has4 {
				z.set("a.example. A", "a.example. 5 IN A 10.0.0.1")
			}
			if tc.has6 {
				z.set("a.example. AAAA", "a.example. 5 IN AAAA 2001:db8::1")
			}
			_, f := follow(t, discovery.Options{Config: cfg, Endpoints: named("a.example:80"), World: &discovery.World{Exchange: z.exchange}})
			synctest.Wait()
			f.want(tc.want, true)
		})
	}
}

func TestAddressesThatCannotBeMeantAreLeftOut(t *testing.T) {
	t.Parallel()
	answer := func(a string) string { return "a.example. 5 IN A " + a }
	lies := []string{answer("0.0.0.0"), answer("0.1.2.3"), answer("224.0.0.1"), answer("255.255.255.255"), "a.example. 5 IN AAAA ::", "a.example. 5 IN AAAA ff02::1", "a.example. 5 IN AAAA fe80::1"}
	local := []string{answer("127.0.0.1"), answer("169.254.169.254"), "a.example. 5 IN AAAA ::1", "a.example. 5 IN AAAA ::ffff:127.0.0.5"}
	for _, tc := range []struct {
		allow bool
		want  string
	}{
		{false, "a.example:80=10.0.0.1:80"},
		{true, "a.example:80=10.0.0.1:80 a.example:80=127.0.0.1:80 a.example:80=127.0.0.5:80 a.example:80=169.254.169.254:80 a.example:80=[::1]:80"},
	} {
		synctest.Test(t, func(t *testing.T) {
			z, cfg := new(zone), strict()
			cfg.DNS.Family, cfg.DNS.Local = "all", tc.allow
			var v4, v6 []string
			for _, r := range slices.Concat(lies, local, []string{answer("10.0.0.1")}) {
				if strings.Contains(r, "AAAA") {
					v6 = append(v6, r)
				} else {
					v4 = append(v4, r)
				}
			}
			z.set("a.example. A", v4...)
			z.set("a.example. AAAA", v6...)
			_, f := follow(t, discovery.Options{Config: cfg, Endpoints: named("a.example:80"), World: &discovery.World{Exchange: z.exchange}})
			synctest.Wait()
			f.want(tc.want, true)
			if want := uint64(len(lies)); !tc.allow && f.count(4) != want+uint64(len(local)) || tc.allow && f.count(4) != want {
				t.Errorf("%d are counted as left out", f.count(4))
			}
		})
	}
}

func TestTenThousandAddressesAreTooMany(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z := new(zone)
		var records []string
		for i := range 10_000 {
			records = append(records, fmt.Sprintf("a.example. 5 IN A 10.1.%d.%d", i/250, i%250+1))
		}
		z.set("a.example. A", records...)
		_, f := follow(t, discovery.Options{Config: strict(), Endpoints: named("a.example:80", "10.0.0.1:80", "10.0.0.2:80"), World: &discovery.World{Exchange: z.exchange}})
		synctest.Wait()
		slices.Reverse(records)
		z.set("a.example. A", records...)
		after(20 * time.Second)
		if len(f.now) != config.MostDiscovered || f.changes != 1 || f.count(4) < 10_000-config.MostDiscovered {
			t.Errorf("%d endpoints, %d changes, %d left out: want %d, always the same ones", len(f.now), f.changes, f.count(4), config.MostDiscovered)
		}
	})
}

// Each host of a service may have as many addresses as a cluster endpoints. All of them together
// are no more, and no more are ever made.
func TestAServiceOfManyHostsWithManyAddressesIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z := new(zone)
		var hosts []string
		for h := range 8 {
			name := fmt.Sprintf("h%d.example.", h)
			hosts = append(hosts, "_chat._tcp.example. 300 IN SRV 10 5 9001 "+name)
			var records []string
			for i := range 2000 {
				records = append(records, fmt.Sprintf("%s 300 IN A 10.%d.%d.%d", name, h+1, i/250, i%250+1))
			}
			z.set(name+" A", records...)
		}
		z.set("_chat._tcp.example. SRV", hosts...)
		_, f := follow(t, discovery.Options{Config: strict(), Endpoints: []config.Endpoint{{Address: "_chat._tcp.example", SRV: true}}, World: &discovery.World{Exchange: z.exchange}})
		synctest.Wait()
		if len(f.now) != config.MostDiscovered || f.count(4) < 8*2000-config.MostDiscovered {
			t.Errorf("%d endpoints, %d left out", len(f.now), f.count(4))
		}
	})
}

func TestAServiceHasPrioritiesAndWeights(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z := new(zone)
		srv := "_chat._tcp.example. SRV"
		z.set(srv, "_chat._tcp.example. 5 IN SRV 20 0 9000 B.example.", "_chat._tcp.example. 300 IN SRV 10 5 9001 a.example.",
			`_chat._tcp.example. 300 IN SRV 10 5 9001 a\ b.example.`, "_chat._tcp.example. 300 IN SRV 10 5 0 a.example.")
		z.set("a.example. A", "a.example. 60 IN A 10.0.0.1", "a.example. 60 IN A 10.0.0.2")
		z.set("b.example. A", "b.example. 60 IN CNAME c.example.", "c.example. 60 IN A 10.0.0.3")
		_, f := follow(t, discovery.Options{Config: strict(), Endpoints: []config.Endpoint{{Address: "_chat._tcp.example", SRV: true}, {Address: "10.0.0.9:80"}}, World: &discovery.World{Exchange: z.exchange}})
		synctest.Wait()
		all := "a.example:9001=10.0.0.1:9001/5/0 a.example:9001=10.0.0.2:9001/5/0 b.example:9000=10.0.0.3:9000/1/1 10.0.0.9:80"
		f.want(all, true)
		z.set(srv, "_chat._tcp.example. 5 IN SRV 10 5 9001 a.example.")
		after(6 * time.Second)
		f.want("a.example:9001=10.0.0.1:9001/5/0 a.example:9001=10.0.0.2:9001/5/0 10.0.0.9:80", true)
		z.behave(func() { z.asked = nil })
		after(2 * time.Minute)
		if slices.Contains(z.asked, "b.example. A") {
			t.Error("a host that is gone is still asked for")
		}
		z.set(srv, "_chat._tcp.example. 5 IN SRV 0 0 0 .")
		after(6 * time.Second)
		f.want("a.example:9001=10.0.0.1:9001/5/0 a.example:9001=10.0.0.2:9001/5/0 10.0.0.9:80", true)
	})
}

func TestWhatWasKnownLastHoldsUntilThereIsAnAnswer(t *testing.T) {
	t.Parallel()
	at := netip.MustParseAddrPort
	last := []discovery.Endpoint{
		{Address: "a.example:80", At: at("10.0.0.1:80")},
		{Address: "x.example:9000", At: at("10.0.0.2:9000"), EndpointOptions: config.EndpointOptions{Weight: 7, Priority: 1}},
	}
	endpoints := append(named("a.example:80"), config.Endpoint{Address: "_chat._tcp.example", SRV: true})
	synctest.Test(t, func(t *testing.T) {
		z := &zone{hang: true}
		_, f := follow(t, discovery.Options{Config: strict(), Endpoints: endpoints, Last: last, World: &discovery.World{Exchange: z.exchange}})
		before := "a.example:80=10.0.0.1:80 x.example:9000=10.0.0.2:9000/7/1"
		f.want(before, false)
		after(3900 * time.Millisecond)
		f.want(before, false)
		after(10 * time.Second) // all have failed, of which something is known
		f.want(before, true)
		z.behave(func() { z.hang = false })
		z.set("a.example. A", "a.example. 60 IN A 10.0.1.1")
		z.set("_chat._tcp.example. SRV", "_chat._tcp.example. 60 IN SRV 0 0 9000 y.example.")
		z.set("y.example. A", "y.example. 60 IN A 10.0.1.2")
		after(time.Minute)
		f.want("a.example:80=10.0.1.1:80 y.example:9000=10.0.1.2:9000", true)
	})
	synctest.Test(t, func(t *testing.T) { // without that nothing is settled by a failure
		z := &zone{hang: true}
		_, f := follow(t, discovery.Options{Config: strict(), Endpoints: endpoints, World: &discovery.World{Exchange: z.exchange}})
		after(5 * time.Minute)
		f.want("", false)
	})
}

func TestANameMayBeOneEndpoint(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z, cfg := new(zone), strict()
		cfg.By = config.ByLogicalDNS
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.2", "a.example. 5 IN A 10.0.0.1")
		z.set("a.example. AAAA", "a.example. 5 IN AAAA 2001:db8::1")
		_, f := follow(t, discovery.Options{Config: cfg, Endpoints: named("a.example:80", "10.0.0.9:80"), World: &discovery.World{Exchange: z.exchange}})
		f.wantFirst("10.0.0.9:80")
		synctest.Wait()
		f.want("a.example:80=[10.0.0.2:80 10.0.0.1:80 [2001:db8::1]:80] 10.0.0.9:80", true)
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.3")
		z.behave(func() { z.records["a.example. AAAA"] = nil })
		after(6 * time.Second)
		f.want("a.example:80=[10.0.0.3:80] 10.0.0.9:80", true)
		if f.changes != 1 || f.moves != 1 {
			t.Errorf("%d changes and %d moves were told, want 1 and 1", f.changes, f.moves)
		}
	})
}

func TestWhoIsPausedAsksNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		z := new(zone)
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.1")
		s, f := follow(t, discovery.Options{Config: strict(), Endpoints: named("a.example:80"), World: &discovery.World{Exchange: z.exchange}})
		synctest.Wait()
		s.Pause(true)
		after(10 * time.Second) // the answer's time is over
		asked := z.questions()
		z.set("a.example. A", "a.example. 5 IN A 10.0.0.2")
		after(24 * time.Hour)
		if got := z.questions() - asked; got > 0 {
			t.Errorf("%d questions were asked", got)
		}
		s.Pause(false)
		synctest.Wait()
		f.want("a.example:80=10.0.0.2:80", true)
	})
}

func TestTheHostsFilesAreHonoured(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		write := func(name, text string) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			return path
		}
		z, cfg := new(zone), strict()
		cfg.DNS.Resolvers = nil
		z.set("a.corp.example. A", "a.corp.example. 5 IN A 10.0.0.1")
		z.set("b.example. A", "b.example. 5 IN A 10.0.0.2")
		var servers sync.Map
		world := &discovery.World{
			Hosts:      write("hosts", "# none\n127.0.0.7 own.example own # local\n::1 own.example\nnonsense\n"),
			ResolvConf: write("resolv.conf", "nameserver 192.0.2.1\nsearch lab.example corp.example\n"),
			Exchange: func(ctx context.Context, network string, server netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
				servers.Store(server.String(), true)
				return z.exchange(ctx, network, server, q)
			},
		}
		_, f := follow(t, discovery.Options{Config: cfg, Endpoints: named("own.example:80", "a:80", "b.example:80", "localhost:80"), World: world})
		synctest.Wait()
		f.want("own.example:80=127.0.0.7:80 a:80=10.0.0.1:80 b.example:80=10.0.0.2:80 localhost:80=127.0.0.1:80", true)
		write("hosts", "127.0.0.77 own.example\n")
		write("resolv.conf", "nameserver 192.0.2.99\nsearch corp.example\n")
		after(time.Minute)
		f.want("own.example:80=127.0.0.77:80 a:80=10.0.0.1:80 b.example:80=10.0.0.2:80 localhost:80=127.0.0.1:80", true)
		if _, ok := servers.Load("192.0.2.99:53"); !ok {
			t.Error("the resolver that is new was not asked")
		}
	})
}
