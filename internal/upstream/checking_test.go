package upstream

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream/balance"
)

// patience is how long a test waits for what comes over real connections.
const patience = 30 * time.Second

// backend is an HTTP server that does as it is told, and counts.
type backend struct {
	*httptest.Server
	address     string
	handler     atomic.Pointer[http.HandlerFunc]
	requests    atomic.Int64
	connections atomic.Int64
}

func newBackend(t *testing.T) *backend { return newBackendWith(t, func(*backend) {}) }

// newBackendWith is newBackend for one that is changed before it starts, to speak TLS if it has
// some then.
func newBackendWith(t *testing.T, change func(*backend)) *backend {
	b := new(backend)
	b.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.requests.Add(1)
		(*b.handler.Load())(w, r)
	}))
	b.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			b.connections.Add(1)
		}
	}
	b.answer(200)
	if change(b); b.TLS != nil {
		b.StartTLS()
	} else {
		b.Start()
	}
	t.Cleanup(b.Close)
	b.address = b.Listener.Addr().String()
	return b
}

func (b *backend) do(fn http.HandlerFunc) { b.handler.Store(&fn) }
func (b *backend) answer(status int) {
	b.do(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
}

// raw is a server that says what it is told on each connection, and reads until its end.
func raw(t *testing.T, network, address string, talk func(net.Conn)) string {
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				talk(c)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// logged is a log that several goroutines write.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// checked is a cluster whose endpoints are checked, in a time that stands still.
type checked struct {
	*Cluster
	t     *testing.T
	all   *Clusters
	loops []*stream.Loop
	clock *streamtest.Clock
	log   *logged
	on    *metrics.Registry
}

func byHTTP() *config.EndpointCheck {
	return &config.EndpointCheck{
		HTTP:     &config.HTTPCheck{Target: "/healthz", Method: "GET", Statuses: []config.StatusRange{{From: 200, To: 299}}, Reuse: true},
		Interval: 10 * time.Second, UnhealthyInterval: 10 * time.Second, NoTrafficInterval: 10 * time.Second, Timeout: 2 * time.Second,
		UnhealthyThreshold: 3, HealthyThreshold: 2,
	}
}

func byTCP(send string, receive ...string) *config.EndpointCheck {
	c := byHTTP()
	c.HTTP, c.TCP = nil, &config.TCPCheck{Send: []byte(send)}
	for _, r := range receive {
		c.TCP.Receive = append(c.TCP.Receive, []byte(r))
	}
	return c
}

// newChecked makes a cluster of addresses, whose checks have not begun.
func newChecked(t *testing.T, o Options, check *config.EndpointCheck, addresses ...string) *checked {
	t.Helper()
	return newCheckedWith(t, o, check, func(*config.Cluster) {}, addresses...)
}

// newCheckedWith is newChecked for a cluster that is changed before.
func newCheckedWith(t *testing.T, o Options, check *config.EndpointCheck, change func(*config.Cluster), addresses ...string) *checked {
	t.Helper()
	c := &checked{t: t, log: new(logged), on: metrics.NewRegistry()}
	for i := range 2 {
		l := streamtest.New(t)
		streamtest.Do(l, func() { l.Index = i })
		c.loops = append(c.loops, l)
	}
	c.clock = streamtest.NewClock(c.loops...)
	cfg := config.Cluster{Name: "web", HealthCheck: check, WarmingTimeout: time.Hour, ConnectTimeout: time.Minute}
	for _, a := range addresses {
		cfg.Endpoints = append(cfg.Endpoints, config.Endpoint{Address: a})
	}
	change(&cfg)
	if o.Config == nil {
		o.Config = new(config.Config)
	}
	o.Config.Clusters, o.Loops, o.Metrics = []config.Cluster{cfg}, c.loops, c.on
	o.Log = slog.New(slog.NewTextHandler(c.log, nil))
	var err error
	if c.all, err = New(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.all.Close)
	c.Cluster = c.all.byName["web"]
	return c
}

// begin has the checks begin, and waits for the first round.
func (c *checked) begin() *checked {
	c.t.Helper()
	c.all.Run()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience) // the clock of the cluster stands still
	defer cancel()
	if c.all.Warm(ctx); ctx.Err() != nil {
		c.t.Fatalf("the first round did not end; the log:\n%s", c.log)
	}
	return c
}

func (c *checked) wait(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("%s did not come; the log:\n%s", what, c.log)
		}
	}
	for _, l := range c.loops {
		streamtest.Do(l, func() {}) // what a turn has changed, the next one tells the balancer
	}
}

// state is what is known of the only endpoint at an address.
func (c *checked) state(address string) (s control.EndpointState, conditions Condition) {
	for _, e := range c.Known() {
		if e.Address == address {
			e.healthState(&s)
			return s, e.Conditions()
		}
	}
	c.t.Fatalf("no endpoint %s", address)
	return s, 0
}

// ended is how many checks have ended.
func (c *checked) ended() (n uint64) {
	for _, result := range []string{"success", "failure", "network_failure"} {
		n += c.counted(result)
	}
	return n
}

func (c *checked) counted(result string) uint64 {
	return c.on.Counter(clusterChecks, "web", result).Value()
}

// round has time go on until each of n endpoints was checked once more.
func (c *checked) round(n int) {
	c.t.Helper()
	before := c.ended()
	c.clock.Advance(11 * time.Second)
	c.wait("a round of checks", func() bool { return c.ended() >= before+uint64(n) })
}

// chosen are the addresses that requests get.
func (c *checked) chosen() (all []string) {
	for range 4 {
		round := c.Round(balance.Query{})
		if e := round.Next(); e != nil && !slices.Contains(all, e.Address) {
			all = append(all, e.Address)
		}
	}
	slices.Sort(all)
	return all
}

func (c *checked) wantChosen(want ...string) {
	c.t.Helper()
	slices.Sort(want)
	if got := c.chosen(); !slices.Equal(got, want) {
		c.t.Errorf("requests get %q, want %q; the log:\n%s", got, want, c.log)
	}
}

func TestAnEndpointThatFailsItsChecksGetsNoNewWork(t *testing.T) {
	t.Parallel()
	a, b := newBackend(t), newBackend(t)
	c := newChecked(t, Options{}, byHTTP(), a.address, b.address)
	c.wantChosen() // before they were checked
	c.begin().wantChosen(a.address, b.address)
	a.answer(500)
	for range 2 {
		c.round(2)
	}
	c.wantChosen(a.address, b.address) // the threshold is three
	c.round(2)
	c.wantChosen(b.address)
	s, conditions := c.state(a.address)
	if conditions != Failing || s.Reason != "status 500" || !s.HealthySince.IsZero() || s.LastCheck.IsZero() {
		t.Errorf("conditions %b, state %+v", conditions, s)
	}
	if got := c.on.Gauge(clusterHealthy, "web").Value(); got != 1 {
		t.Errorf("%d endpoints are counted as healthy, want 1", got)
	}
	c.round(2)
	if log := c.log.String(); strings.Count(log, "fails its health checks") != 1 || !strings.Contains(log, `reason="status 500"`) || !strings.Contains(log, a.address) {
		t.Errorf("the log is\n%s", log)
	}
	a.answer(204)
	c.round(2)
	c.wantChosen(b.address)
	c.round(2)
	c.wantChosen(a.address, b.address)
	if log := c.log.String(); strings.Count(log, "passes its health checks again") != 1 {
		t.Errorf("the log is\n%s", log)
	}
	if s, _ := c.state(a.address); s.Reason != "" || s.HealthySince.IsZero() {
		t.Errorf("the state is %+v", s)
	}
	if to := c.on.Counter(clusterHealthChanges, "web", "failing").Value(); to != 1 {
		t.Errorf("%d changes to failing are counted, want 1", to)
	}
	a.answer(503)
	c.round(2)
	c.wantChosen(b.address) // at once
	if n := c.on.Counter(clusterRequests, "web").Value() + c.on.Counter(clusterConnections, "web").Value(); n != 0 {
		t.Errorf("checks were counted as %d requests and connections of the cluster", n)
	}
}

func TestWhatAnAnswerMustBe(t *testing.T) {
	t.Parallel()
	say := func(s string) func(net.Conn) {
		return func(c net.Conn) {
			buf := make([]byte, 4096)
			if _, err := c.Read(buf); err == nil {
				io.WriteString(c, s)
			}
			if strings.HasSuffix(s, "\x00") { // it ends here
				return
			}
			io.Copy(io.Discard, c)
		}
	}
	// endless sends the same for as long as somebody takes it.
	endless := func(head, body string) func(net.Conn) {
		return func(c net.Conn) {
			go io.Copy(io.Discard, c)
			for _, err := io.WriteString(c, head); err == nil; {
				_, err = io.WriteString(c, body)
			}
		}
	}
	body := func(s string) func(*config.EndpointCheck) { return func(c *config.EndpointCheck) { c.HTTP.Body = s } }
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nready"
	long := strings.Repeat("x", 100_000)
	for name, test := range map[string]struct {
		talk   func(net.Conn)
		change func(*config.EndpointCheck)
		reason string // "": it has passed
		late   bool   // the timeout must come
	}{
		"200":                   {talk: say(ok)},
		"the body":              {talk: say(ok), change: body("ready")},
		"another body":          {talk: say(ok), change: body("Ready"), reason: "the body does not have the expected text"},
		"a body in chunks":      {talk: say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nrea\r\n2\r\ndy\r\n0\r\n\r\n"), change: body("ready")},
		"a body until the end":  {talk: say("HTTP/1.0 200 OK\r\n\r\nready\x00"), change: body("ready")},
		"a long body":           {talk: say("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + long)},
		"a text too far behind": {talk: say("HTTP/1.1 200 OK\r\nContent-Length: 100005\r\n\r\n" + long + "ready"), change: body("ready"), reason: "the body does not have the expected text"},
		"an interim response":   {talk: say("HTTP/1.1 102 Processing\r\n\r\n" + ok)},
		"a redirect":            {talk: say("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), reason: "status 302"},
		"a redirect that is wanted": {talk: say("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), change: func(c *config.EndpointCheck) {
			c.HTTP.Statuses = []config.StatusRange{{From: 200, To: 200}, {From: 301, To: 308}}
		}},
		"nonsense":                   {talk: say("SSH-2.0-OpenSSH_9.9\r\n"), reason: "the answer is not valid HTTP: upstream: a malformed status line"},
		"another protocol":           {talk: say("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"), reason: "the answer is not valid HTTP: upstream: a 101 that nobody asked for"},
		"cut short":                  {talk: say("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nready\x00"), reason: "upstream: "},
		"no answer":                  {talk: func(net.Conn) {}, reason: "connection ended before the upstream answered"},
		"a head without end":         {talk: endless("HTTP/1.1 200 OK\r\n", "X: "+long[:1000]+"\r\n"), reason: "the answer is not valid HTTP: "},
		"interim responses for ever": {talk: endless("", "HTTP/1.1 100 Continue\r\n\r\n"), reason: "the answer is not valid HTTP: "},
		"a body without end":         {talk: endless("HTTP/1.1 200 OK\r\n\r\n", long)},
		"a body without end and without the text": {
			talk: endless("HTTP/1.1 200 OK\r\n\r\n", long), change: body("ready"), reason: "the body does not have the expected text",
		},
		"it hangs":             {talk: say(""), reason: "no answer within 2s", late: true},
		"it hangs in the head": {talk: say("HTTP/1.1 200 OK\r\n"), reason: "no answer within 2s", late: true},
		"it hangs in the body": {talk: say("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nready"), reason: "no answer within 2s", late: true},
		"it says so itself":    {talk: say("HTTP/1.1 200 OK\r\nHoldfast-Immediate-Health-Check-Fail: \r\nContent-Length: 0\r\n\r\n"), reason: saidSo},
		"a unix socket":        {talk: say(ok)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check := byHTTP()
			if test.change != nil {
				test.change(check)
			}
			var address string
			if name == "a unix socket" {
				path := filepath.Join(t.TempDir(), "s")
				raw(t, "unix", path, test.talk)
				address = "unix:" + path
			} else {
				address = raw(t, "tcp", "127.0.0.1:0", test.talk)
			}
			c := newChecked(t, Options{}, check, address)
			c.all.Run()
			if test.late {
				c.wait("a connection", func() bool { return c.conns() > 0 })
				c.clock.Advance(1900 * time.Millisecond)
				if n := c.ended(); n != 0 {
					t.Errorf("%d checks were over before the timeout", n)
				}
				c.clock.Advance(200 * time.Millisecond)
			}
			c.wait("the first check", func() bool { return c.ended() > 0 })
			s, conditions := c.state(address)
			if test.reason == "" && (conditions != 0 || s.Reason != "") || test.reason != "" && (conditions != Failing || !strings.HasPrefix(s.Reason, test.reason)) {
				t.Errorf("conditions %b, reason %q, want %q", conditions, s.Reason, test.reason)
			}
		})
	}
}

func TestACheckAsksForWhatIsConfigured(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	got := make(chan string, 10)
	b.do(func(_ http.ResponseWriter, r *http.Request) {
		got <- fmt.Sprintf("%s %s %s %s %s", r.Method, r.URL, r.Host, r.UserAgent(), r.Header.Get("X-Check"))
	})
	check := byHTTP()
	newChecked(t, Options{}, check, b.address).begin()
	if want := "GET /healthz " + b.address + " holdfast-health-check "; <-got != want {
		t.Errorf("want %q", want)
	}
	check = byHTTP()
	_, port, _ := net.SplitHostPort(b.address)
	fmt.Sscan(port, &check.Port)
	check.HTTP.Target, check.HTTP.Method, check.HTTP.Host = "/h?x=1", "POST", "web.internal"
	check.HTTP.Headers = []config.Header{{Name: "X-Check", Value: "1"}, {Name: "User-Agent", Value: "me"}}
	c := newChecked(t, Options{}, check, "127.0.0.1:1").begin()
	if g, want := <-got, "POST /h?x=1 web.internal me 1"; g != want {
		t.Errorf("got %q, want %q", g, want)
	}
	c.wantChosen("127.0.0.1:1") // another port is asked
}

func TestTheConnectionOfChecksIsKept(t *testing.T) {
	t.Parallel()
	for _, reuse := range []bool{true, false} {
		t.Run(fmt.Sprint(reuse), func(t *testing.T) {
			t.Parallel()
			b := newBackend(t)
			check := byHTTP()
			check.HTTP.Reuse = reuse
			c := newChecked(t, Options{}, check, b.address).begin()
			for range 4 {
				c.round(1)
			}
			want := int64(5)
			if reuse {
				want = 1
			}
			if got := b.connections.Load(); got != want {
				t.Errorf("%d connections for 5 checks, want %d", got, want)
			}
			// What the endpoint closes in between is no failure.
			b.CloseClientConnections()
			c.round(1)
			if n := c.counted("success"); n != 6 {
				t.Errorf("%d checks have passed, want 6; the log:\n%s", n, c.log)
			}
		})
	}
}

// The endpoint closes a kept connection just when the next check comes.
func TestAKeptConnectionThatIsClosedUnderACheckIsNoFailure(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	address := raw(t, "tcp", "127.0.0.1:0", func(c net.Conn) {
		buf := make([]byte, 4096)
		for i := 0; ; i++ {
			if _, err := c.Read(buf); err != nil || i == 1 {
				return // the second request has no answer
			}
			n.Add(1)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	check := byHTTP()
	check.UnhealthyThreshold = 1
	c := newChecked(t, Options{}, check, address).begin()
	for range 3 {
		c.round(1)
	}
	c.wantChosen(address)
	if got := c.counted("success"); got != 4 || n.Load() != 4 {
		t.Errorf("%d checks have passed, %d requests were answered, want 4; the log:\n%s", got, n.Load(), c.log)
	}
}

func TestWhatIsSaidByTCP(t *testing.T) {
	t.Parallel()
	redis := func(c net.Conn) {
		buf := make([]byte, 100)
		n, _ := c.Read(buf)
		if string(buf[:n]) == "PING\r\n" {
			io.WriteString(c, "+PO")
			io.WriteString(c, "NG\r\n")
		}
		io.Copy(io.Discard, c)
	}
	banner := func(c net.Conn) { io.WriteString(c, "220 mail.example.com ESMTP"); io.Copy(io.Discard, c) }
	chatter := func(c net.Conn) {
		for err := error(nil); err == nil; {
			_, err = io.WriteString(c, strings.Repeat("y\n", 5000))
		}
	}
	for name, test := range map[string]struct {
		talk   func(net.Conn)
		check  *config.EndpointCheck
		reason string
		late   bool
	}{
		"it is there":                    {talk: func(c net.Conn) { io.Copy(io.Discard, c) }, check: byTCP("")},
		"a question":                     {talk: redis, check: byTCP("PING\r\n", "+PONG")},
		"another answer":                 {talk: redis, check: byTCP("PING\r\n", "+PANG"), reason: "no answer within 2s", late: true},
		"a banner":                       {talk: banner, check: byTCP("", "220", "ESMTP")},
		"in another order":               {talk: banner, check: byTCP("", "ESMTP", "220"), reason: "no answer within 2s", late: true},
		"it ends":                        {talk: func(c net.Conn) { io.WriteString(c, "22") }, check: byTCP("", "220"), reason: "the connection ended without the expected texts"},
		"it talks for ever":              {talk: chatter, check: byTCP("", "x"), reason: "the expected texts are not among the first 64 KiB"},
		"it talks for ever, and says it": {talk: chatter, check: byTCP("", "y\n")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := raw(t, "tcp", "127.0.0.1:0", test.talk)
			c := newChecked(t, Options{}, test.check, address)
			c.all.Run()
			if test.late {
				c.wait("a connection", func() bool { return c.conns() > 0 })
				c.clock.Advance(2100 * time.Millisecond)
			}
			c.wait("the first check", func() bool { return c.ended() > 0 })
			if s, _ := c.state(address); s.Reason != test.reason {
				t.Errorf("the reason is %q, want %q", s.Reason, test.reason)
			}
		})
	}
}

func TestOneThatCannotBeConnectedToFails(t *testing.T) {
	t.Parallel()
	address := streamtest.Refusing(t)
	for _, check := range []*config.EndpointCheck{byHTTP(), byTCP("")} {
		c := newChecked(t, Options{}, check, address, "unix:"+filepath.Join(t.TempDir(), "none")).begin()
		c.wantChosen()
		if s, _ := c.state(address); !strings.Contains(s.Reason, "connection refused") || c.counted("network_failure") != 2 {
			t.Errorf("the state is %+v", s)
		}
	}
}

// hanging is a server that takes connections and says nothing.
func hanging(t *testing.T) string {
	return raw(t, "tcp", "127.0.0.1:0", func(c net.Conn) { io.Copy(io.Discard, c) })
}

func TestChecksThatHangAtTheStartDoNotMakeAClusterUnreachable(t *testing.T) {
	t.Parallel()
	a, b := newBackend(t), hanging(t)
	c := newChecked(t, Options{}, byHTTP(), a.address, b)
	c.all.Run()
	c.wait("the first check", func() bool { return c.ended() == 1 })
	c.wantChosen(a.address)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // its time is over
	c.all.Warm(ctx)
	c.wantChosen(a.address, b)
	c.wait("two connections", func() bool { return c.conns() == 2 })
	c.clock.Advance(2100 * time.Millisecond)
	c.wait("the end of the check", func() bool { return c.ended() == 2 })
	c.wantChosen(a.address)
}

func TestAGenerationWaitsForTheFirstRound(t *testing.T) {
	t.Parallel()
	a, b := newBackend(t), newBackend(t)
	release := make(chan struct{})
	b.do(func(http.ResponseWriter, *http.Request) { <-release })
	c := newChecked(t, Options{}, byHTTP(), a.address, b.address)
	c.all.Run()
	warm := make(chan struct{})
	go func() { defer close(warm); c.all.Warm(context.Background()) }()
	c.wait("the first check", func() bool { return c.ended() == 1 && b.requests.Load() == 1 })
	select {
	case <-warm:
		t.Error("warm before each endpoint was checked")
	default:
	}
	close(release)
	<-warm
	c.wait("the balancer", func() bool { return true })
	c.wantChosen(a.address, b.address)
}

// stateOf is what another generation knew.
func stateOf(address string, age time.Duration, conditions ...string) control.EndpointState {
	s := control.EndpointState{Address: address, Healthy: len(conditions) == 0, Conditions: conditions, LastCheck: time.Now().Add(-age)}
	s.At, _ = netip.ParseAddrPort(address)
	if s.Healthy {
		s.HealthySince = time.Now().Add(-time.Hour)
	} else {
		s.Reason = "status 500"
	}
	return s
}

func TestAReloadDoesNotBeginBlind(t *testing.T) {
	t.Parallel()
	well, failing, old, fresh := newBackend(t), newBackend(t), newBackend(t), newBackend(t)
	o := Options{Inherited: &control.ClusterStates{Clusters: []control.ClusterState{{Name: "web", Endpoints: []control.EndpointState{
		stateOf(well.address, time.Minute), stateOf(failing.address, time.Minute, "failing"), stateOf(old.address, time.Hour),
	}}}}}
	c := newChecked(t, o, byHTTP(), well.address, failing.address, old.address, fresh.address)
	c.wantChosen(well.address) // before anything was checked
	if s, conditions := c.state(failing.address); conditions != Failing || s.Reason != "status 500" {
		t.Errorf("conditions %b, state %+v", conditions, s)
	}
	if s, _ := c.state(well.address); time.Since(s.HealthySince) < time.Hour {
		t.Errorf("healthy since %v", s.HealthySince)
	}
	c.begin() // for what is not known
	c.wait("the balancer", func() bool { return failing.requests.Load() == 1 && c.ended() == 3 })
	c.wantChosen(well.address, old.address, fresh.address)
	if n := well.requests.Load(); n != 0 {
		t.Errorf("what was healthy was checked %d times at once", n)
	}
	c.round(4)
	c.wantChosen(well.address, failing.address, old.address, fresh.address) // it has passed twice
}

func TestNothingIsWaitedForWhereAGenerationHasDied(t *testing.T) {
	t.Parallel()
	a := hanging(t)
	c := newChecked(t, Options{Urgent: true}, byHTTP(), a)
	c.wantChosen(a)
	c.begin()
	c.wantChosen(a)
	c.wait("a connection", func() bool { return c.conns() == 1 })
	c.clock.Advance(2100 * time.Millisecond)
	c.wait("the end of the check", func() bool { return c.ended() == 1 })
	c.wantChosen()
}

func TestADrainingGenerationMakesNoChecks(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	c := newChecked(t, Options{}, byHTTP(), b.address).begin()
	c.all.SetDraining(true)
	c.wait("the end of the connection", func() bool { return c.conns() == 0 })
	c.clock.Advance(time.Hour)
	if n := b.requests.Load(); n != 1 {
		t.Errorf("%d checks, want 1 from before", n)
	}
	c.wantChosen(b.address)
	b.answer(503)
	c.all.SetDraining(false)
	c.wait("a check at once", func() bool { return c.ended() == 2 })
	c.wantChosen()
}

func TestChecksGoOnWhereTunnelsEndByThem(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	c := newChecked(t, Options{Config: &config.Config{Tunnels: config.Tunnels{CloseOnEndpointUnhealthy: true}}}, byHTTP(), b.address)
	c.begin()
	c.all.SetDraining(true)
	b.answer(503)
	c.round(1)
	c.wantChosen()
}

// conns is how many connections there are.
func (c *checked) conns() (n int) {
	for _, l := range c.loops {
		streamtest.Do(l, func() { n += l.Conns() })
	}
	return n
}

func (c *checked) member(address string) Member {
	return Member{Address: address, At: Place{Addr: netip.MustParseAddrPort(address)}}
}

func TestTheChecksOfAnEndpointEndWhenItLeaves(t *testing.T) {
	t.Parallel()
	a, b := newBackend(t), hanging(t)
	c := newChecked(t, Options{}, byHTTP(), a.address, b)
	c.all.Run()
	c.wait("two connections", func() bool { return c.ended() == 1 && c.conns() == 2 })
	c.SetMembers(nil) // in the middle of a check
	c.wait("the end of the connections", func() bool { return c.conns() == 0 })
	c.clock.Advance(time.Hour)
	if n := c.ended(); n != 1 {
		t.Errorf("%d checks have ended, want 1", n)
	}
	c.all.Warm(t.Context()) // nobody waits for who has left

	// Whoever comes back, or comes later, is nobody's before it was checked.
	c.SetMembers([]Member{c.member(a.address), c.member(b)})
	if s, conditions := c.state(b); conditions != Unchecked {
		t.Errorf("conditions %b, state %+v", conditions, s)
	}
	c.wait("the first check", func() bool { return c.ended() == 2 })
	c.wantChosen(a.address)
}

func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	a, b := newBackend(t), hanging(t)
	c := newChecked(t, Options{}, byHTTP(), a.address, b)
	c.all.Run()
	c.wait("two connections", func() bool { return c.ended() == 1 && c.conns() == 2 })
	c.all.Close()
	tasks := 0
	for _, l := range c.loops {
		streamtest.Do(l, func() { tasks += l.Tasks.Live() })
	}
	if n := c.conns(); n+tasks > 0 {
		t.Errorf("%d connections and %d tasks are left", n, tasks)
	}
	c.SetMembers([]Member{c.member(a.address)})
	if n := c.conns(); n != 0 {
		t.Errorf("%d connections after the end", n)
	}
}

func TestAResponseMaySayThatItsEndpointFails(t *testing.T) {
	t.Parallel()
	for _, field := range []string{"holdfast-immediate-health-check-fail", "X-Envoy-Immediate-Health-Check-Fail"} {
		b := newBackend(t)
		c := newChecked(t, Options{}, byHTTP(), b.address).begin()
		e := c.Members()[0]
		e.Heed(&exchange.Response{Status: 503, Fields: exchange.Fields{{Name: "X-A", Value: "1"}}})
		c.wait("nothing", func() bool { return true })
		c.wantChosen(b.address)
		for range 3 {
			resp := &exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "X-A", Value: "1"}, {Name: field, Value: "x"}, {Name: "X-B", Value: "2"}}}
			e.Heed(resp)
			if want := (exchange.Fields{{Name: "X-A", Value: "1"}, {Name: "X-B", Value: "2"}}); !slices.Equal(resp.Fields, want) {
				t.Errorf("the client gets %v", resp.Fields)
			}
		}
		c.wait("its failure", func() bool { return e.Conditions() == Failing })
		c.wantChosen()
		if s, _ := c.state(b.address); s.Reason != saidSo {
			t.Errorf("the reason is %q", s.Reason)
		}
		c.round(1)
		c.wantChosen()
		c.round(1)
		c.wantChosen(b.address)
	}
	// Without checks nobody would find out that it is well again.
	c := newChecked(t, Options{}, nil, "127.0.0.1:1").begin()
	resp := &exchange.Response{Status: 503, Fields: exchange.Fields{{Name: failField}}}
	c.Members()[0].Heed(resp)
	c.wantChosen("127.0.0.1:1")
	if len(resp.Fields) != 1 {
		t.Error("a field that is nobody's business was taken away")
	}
}

// Of what is missing here, all endpoints would fail at once.
func TestAnEndpointIsNotToBlameForOurDescriptors(t *testing.T) {
	t.Parallel()
	for _, check := range []*config.EndpointCheck{byHTTP(), byTCP("")} {
		b := newBackend(t)
		var full atomic.Bool
		if check.HTTP != nil {
			check.HTTP.Reuse = false
		}
		check.UnhealthyThreshold = 1
		c := newChecked(t, Options{MayHave: func(int) bool { return !full.Load() }}, check, b.address).begin()
		full.Store(true)
		for range 5 {
			c.clock.Advance(11 * time.Second)
		}
		c.wantChosen(b.address)
		full.Store(false)
		c.round(1)
		if n := c.ended(); n != c.counted("success") {
			t.Errorf("%d checks have ended, %d have passed", n, c.counted("success"))
		}
	}
}

func TestTheIdleConnectionsOfOneThatFailsAreClosed(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	c := newChecked(t, Options{}, nil, b.address)
	e := c.Members()[0]
	streamtest.Go(c.loops[0], func(tk *task.Task) {
		up, err := e.Get(tk, c.loops[0], new(Attempt))
		if err != nil {
			t.Error(err)
			return
		}
		defer up.Close()
		var call Call
		e.Begin(c.loops[0], new(Attempt), &call)
		defer call.End(Complete)
		if err := up.Send(tk, &exchange.Request{Method: "GET", Target: "/", Authority: "a", Scheme: "http", Major: 1, Minor: 1}); err != nil {
			t.Error(err)
		}
		if _, err := up.Receive(tk); err != nil {
			t.Error(err)
		}
		for err == nil {
			_, err = up.Read(tk)
		}
	})
	if n := c.conns(); n != 1 {
		t.Errorf("%d connections are kept, want 1", n)
	}
	e.Mark(Failing, true)
	c.wait("their end", func() bool { return c.conns() == 0 })
}

func TestATunnelIsTraffic(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	check := byHTTP()
	check.NoTrafficInterval = time.Hour
	c := newChecked(t, Options{}, check, b.address).begin()
	e := c.Members()[0]
	second := func() {
		c.clock.Advance(time.Second)
		c.clock.Advance(0)
	}
	quiet := func(n int) (checks uint64) {
		before := c.ended()
		for range n {
			second()
		}
		return c.ended() - before
	}
	e.Tunnels.Count(1)
	before := c.ended()
	for range 60 {
		second()
	}
	c.wait("checks", func() bool { return c.ended() >= before+3 })
	e.Tunnels.Count(-1)
	quiet(30) // what is under way ends
	if n := quiet(600); n > 1 {
		t.Errorf("%d checks in ten minutes without a tunnel", n)
	}
}

func TestLinesAboutHealthAreBounded(t *testing.T) {
	t.Parallel()
	l, now := lineLimit{left: mostLines}, time.Now()
	written := 0
	for range 100 {
		if ok, _ := l.take(now); ok {
			written++
		}
	}
	if written != mostLines {
		t.Errorf("%d lines at once, want %d", written, mostLines)
	}
	if ok, dropped := l.take(now.Add(time.Second)); !ok || dropped != 40 {
		t.Errorf("after a second: %t, %d lines were dropped, want 40", ok, dropped)
	}
}

// Checks connect as requests do: with a header where connections have one, which names nobody,
// and of a name with whatever addresses it has to the first of them.
func TestChecksConnectAsRequestsDo(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		check *config.EndpointCheck
		says  string
	}{
		"HTTP": {byHTTP(), "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		"TCP":  {byTCP("", "well"), "well"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			header := make(chan string, 1)
			at := raw(t, "tcp", "127.0.0.1:0", func(conn net.Conn) {
				const want = "PROXY UNKNOWN\r\n"
				got := make([]byte, len(want))
				_, _ = io.ReadFull(conn, got)
				select {
				case header <- string(got):
				default:
				}
				if string(got) == want {
					_, _ = io.WriteString(conn, tc.says)
				}
			})
			c := newChecked(t, Options{}, tc.check, "127.0.0.1:1")
			c.cfg.Connecting.ProxyProtocol = 1
			c.Members()[0].SetTargets(netip.MustParseAddrPort(at))
			c.begin()
			c.wait("the first check", func() bool { return c.ended() == 1 })
			if got := <-header; got != "PROXY UNKNOWN\r\n" {
				t.Errorf("a check began with %q", got)
			}
			c.wantChosen("127.0.0.1:1")
		})
	}
}
