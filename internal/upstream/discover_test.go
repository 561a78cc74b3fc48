package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream/balance"
	"holdfast/internal/upstream/discovery"
)

// answers are what names stand for, by "name. TYPE". Without any nobody answers.
type answers struct {
	mu      sync.Mutex
	records map[string][]string
	asked   int
}

func (a *answers) set(records map[string][]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.records = records
}

func (a *answers) exchange(_ context.Context, _ string, _ netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if a.records == nil {
		return nil, errors.New("nobody is there")
	}
	r := new(dns.Msg).SetReply(q)
	kind := dns.TypeToString[q.Question[0].Qtype]
	for _, data := range a.records[q.Question[0].Name+" "+kind] {
		rr, err := dns.NewRR(q.Question[0].Name + " 5 IN " + kind + " " + data)
		if err != nil {
			return nil, err
		}
		r.Answer = append(r.Answer, rr)
	}
	return r, nil
}

// finding is a cluster "web" of that discovery.
func finding(by config.DiscoveryKind, endpoints ...config.Endpoint) *config.Config {
	return &config.Config{Clusters: []config.Cluster{{
		Name: "web", Endpoints: endpoints, WarmingTimeout: 15 * time.Second,
		Discovery: config.Discovery{By: by, DNS: config.DNS{
			Resolvers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53")}, Family: "auto",
			MinTTL: 5 * time.Second, MaxTTL: time.Minute, Timeout: time.Second, BackoffBase: time.Second, BackoffMax: 30 * time.Second,
		}},
	}}}
}

// begin makes clusters that run until the test ends.
func begin(t *testing.T, a *answers, o Options) (*Clusters, *Cluster) {
	t.Helper()
	o.Discovery = &discovery.World{Exchange: a.exchange}
	if o.Metrics == nil {
		o.Metrics = metrics.NewRegistry()
	}
	cs, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	cs.Run()
	t.Cleanup(cs.Close)
	c, _ := cs.Get("web")
	return cs, c
}

func membersOf(c *Cluster) string {
	var all []string
	for _, e := range c.Members() {
		all = append(all, e.Address+" "+e.String())
	}
	return strings.Join(all, ", ")
}

func wantMembers(t *testing.T, c *Cluster, want string) {
	t.Helper()
	if got := membersOf(c); got != want {
		t.Errorf("the cluster has %q, want %q", got, want)
	}
}

func TestAClusterConsistsOfWhatItsNameHas(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := new(answers)
		a.set(map[string][]string{"a.example. A": {"10.0.0.1", "10.0.0.2"}})
		cs, c := begin(t, a, Options{Config: finding(config.ByStrictDNS, config.Endpoint{Address: "a.example:80"})})
		began := time.Now()
		cs.Warm(t.Context())
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v until it was warm", took)
		}
		wantMembers(t, c, "a.example:80 10.0.0.1:80, a.example:80 10.0.0.2:80")
		first, stays := c.Members()[0], c.Members()[1]
		first.host.Add(1) // a tunnel
		a.set(map[string][]string{"a.example. A": {"10.0.0.2", "10.0.0.3"}})
		time.Sleep(6 * time.Second)
		synctest.Wait()
		wantMembers(t, c, "a.example:80 10.0.0.2:80, a.example:80 10.0.0.3:80")
		if c.Members()[0] != stays {
			t.Error("an endpoint that stays is another one now")
		}
		if first.Conditions()&Left == 0 || first.host.Load() != 1 {
			t.Error("the endpoint that is gone has not left, or lost its tunnel")
		}
		round := c.Round(balance.Query{})
		for e := round.Next(); e != nil; e = round.Next() {
			if e == first {
				t.Error("an endpoint that has left gets work")
			}
		}
		if got := c.metrics.membershipChanges.Value(); got != 2 {
			t.Errorf("%d changes are counted, want 2", got)
		}

		cs.SetDraining(true)
		time.Sleep(10 * time.Second)
		asked := a.asked
		time.Sleep(time.Hour)
		if a.asked != asked {
			t.Errorf("who drains has asked %d questions", a.asked-asked)
		}
		a.set(map[string][]string{"a.example. A": {"10.0.0.4"}})
		cs.SetDraining(false)
		synctest.Wait()
		wantMembers(t, c, "a.example:80 10.0.0.4:80")
	})
}

func TestWhatTheGenerationBeforeKnewHoldsWhileNobodyAnswers(t *testing.T) {
	t.Parallel()
	at := netip.MustParseAddrPort
	inherited := &control.ClusterStates{Clusters: []control.ClusterState{{Name: "other"}, {Name: "web", Endpoints: []control.EndpointState{
		{Address: "a.example:80", At: at("10.0.0.1:80")},
		{Address: "a.example:80", At: at("10.0.0.9:80"), Conditions: []string{"left"}},
		{Address: "x.example:90", At: at("10.0.0.3:90"), Weight: 3, Priority: 1},
		{Address: "unix:/run/a"},
		{Address: "b.example:80", Addresses: []netip.AddrPort{at("10.0.0.4:80")}},
	}}}}
	a := config.Endpoint{Address: "a.example:80"}
	for _, tc := range []struct {
		name   string
		cfg    *config.Config
		urgent bool
		want   string
		waits  time.Duration // at most
	}{
		{"every address", finding(config.ByStrictDNS, a), false, "a.example:80 10.0.0.1:80", 3 * time.Second},
		{"in a hurry", finding(config.ByStrictDNS, a), true, "a.example:80 10.0.0.1:80", 0},
		{"a service", finding(config.ByStrictDNS, a, config.Endpoint{Address: "_x._tcp.example", SRV: true}), false, "a.example:80 10.0.0.1:80, x.example:90 10.0.0.3:90, unix:/run/a unix:/run/a, b.example:80 b.example:80", 3 * time.Second},
		{"one endpoint", finding(config.ByLogicalDNS, config.Endpoint{Address: "b.example:80"}), false, "b.example:80 b.example:80", 3 * time.Second},
		{"a file", func() *config.Config {
			cfg := finding(config.ByFile)
			cfg.Clusters[0].Discovery.File = "/nonexistent/web.toml"
			return cfg
		}(), true, "a.example:80 10.0.0.1:80, x.example:90 10.0.0.3:90, unix:/run/a unix:/run/a, b.example:80 b.example:80", 0},
		{"looked up once", finding(config.Static, a), false, "a.example:80 10.0.0.1:80", 0},
		{"looked up once, in a hurry", finding(config.Static, a), true, "a.example:80 10.0.0.1:80", 0},
		{"nothing is known", finding(config.ByStrictDNS, config.Endpoint{Address: "new.example:80"}), false, "", 15 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				lookups := 0
				network := Network{Lookup: func(context.Context, string) ([]netip.Addr, error) {
					lookups++
					return nil, &net.DNSError{Err: "no such host", IsNotFound: true}
				}}
				o := Options{Config: tc.cfg, Inherited: inherited, Urgent: tc.urgent, Network: network}
				o.Discovery = &discovery.World{Exchange: new(answers).exchange, Watch: func(ctx context.Context, _ []string, _ func()) { <-ctx.Done() }}
				cs, err := New(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				cs.Run()
				defer cs.Close()
				c, _ := cs.Get("web")
				began := time.Now()
				cs.Warm(t.Context())
				if took := time.Since(began); took > tc.waits || tc.waits == 15*time.Second && took != tc.waits {
					t.Errorf("waited %v, want at most %v", took, tc.waits)
				}
				wantMembers(t, c, tc.want)
				if tc.urgent && lookups > 0 {
					t.Error("a name was looked up in a hurry")
				}
				time.Sleep(time.Hour)
				wantMembers(t, c, tc.want)
			})
		})
	}
}

func TestANameThatIsOneEndpointIsConnectedToWhereItIsNow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := new(answers)
		a.set(map[string][]string{"a.example. A": {"10.0.0.1"}})
		var connected []string
		l := streamtest.NewVirtual(t)
		o := Options{Config: finding(config.ByLogicalDNS, config.Endpoint{Address: "a.example:80"}), Loops: []*stream.Loop{l}, Network: Network{
			Connect: func(_ *task.Task, _ *stream.Loop, network, address string, _ time.Time, _ *Attempt, _ Owner) (Conn, error) {
				connected = append(connected, network+" "+address)
				return nil, errors.New("refused")
			},
		}}
		o.Discovery = &discovery.World{Exchange: a.exchange}
		cs, err := New(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer cs.stopSources()
		cs.Run()
		cs.Warm(t.Context())
		c, _ := cs.Get("web")
		e := c.Members()[0]
		connect := func() { streamtest.Go(l, func(t *task.Task) { e.Get(t, l, new(Attempt)) }) }
		connect()
		a.set(map[string][]string{"a.example. A": {"10.0.0.2", "10.0.0.1"}})
		time.Sleep(6 * time.Second)
		synctest.Wait()
		connect()
		if want := "[tcp 10.0.0.1:80 tcp 10.0.0.2:80 tcp 10.0.0.1:80]"; fmt.Sprint(connected) != want {
			t.Errorf("connected to %v, want %s", connected, want)
		}
		if c.Members()[0] != e || e.Conditions() != 0 || e.Addr.IsValid() || len(e.Addresses()) != 2 || e.String() != "a.example:80" {
			t.Errorf("the endpoint is %v at %v with %v, want the same one without an address of its own", e, e.Addr, e.Addresses())
		}
		tunnels := cs.Tunnels("web", "a.example:80", netip.AddrPort{}) // as one that moved here has it
		tunnels.Count(1)
		if e.host.Load() != 1 {
			t.Error("a tunnel to the name is not its load")
		}
	})
}

func TestFiguresAreNotNamedByAnswers(t *testing.T) {
	t.Parallel()
	service := config.Endpoint{Address: "_x._tcp.example", SRV: true}
	file := finding(config.ByFile)
	file.Clusters[0].Discovery.File = "/etc/web.toml"
	for _, tc := range []struct {
		cfg           *config.Config
		address, want string
	}{
		{finding(config.Static, config.Endpoint{Address: "a:80"}), "a:80", "a:80"},
		{finding(config.Static, config.Endpoint{Address: "a:80"}), "of-another-configuration:80", "of-another-configuration:80"},
		{finding(config.ByStrictDNS, config.Endpoint{Address: "a:80"}, service), "a:80", "a:80"},
		{finding(config.ByStrictDNS, config.Endpoint{Address: "a:80"}, service), "host.example:9000", "_x._tcp.example"},
		{file, "10.0.0.1:80", "/etc/web.toml"},
	} {
		c := newCluster(&tc.cfg.Clusters[0], &Options{Config: tc.cfg})
		if got := c.series(tc.address); got != tc.want {
			t.Errorf("%s is counted as %s, want %s", tc.address, got, tc.want)
		}
	}
}
