package admin_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
	"holdfast/internal/config"
	"holdfast/internal/supervisor"
)

func TestTheSocketIsForItsUserOnly(t *testing.T) {
	old := syscall.Umask(0)
	s := begin(t, &admintest.Supervisor{})
	syscall.Umask(old)
	info, err := os.Stat(s.socket())
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, want 0600", info.Mode().Perm())
	}
}

func TestWhatIsInThePlaceOfTheSocket(t *testing.T) {
	t.Parallel()
	start := func(dir string) (*admin.Server, error) {
		s := admin.New(slog.New(slog.DiscardHandler))
		return s, s.Start(dir, &admintest.Supervisor{})
	}
	t.Run("a socket of a dead supervisor is replaced", func(t *testing.T) {
		dir := shortDir(t)
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/admin.sock", Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		dead.Close()
		s, err := start(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		want(t, client(t, "unix", dir+"/admin.sock"), "GET /healthz", 200, "ok")
	})
	t.Run("a socket on which somebody listens stays", func(t *testing.T) {
		living := begin(t, &admintest.Supervisor{})
		if _, err := start(living.dir); err == nil || !strings.Contains(err.Error(), "another process listens") {
			t.Errorf("error is %v", err)
		}
		want(t, client(t, "unix", living.socket()), "GET /healthz", 200, "ok")
	})
	t.Run("a file is not touched", func(t *testing.T) {
		dir := shortDir(t)
		if err := os.WriteFile(dir+"/admin.sock", []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := start(dir); err == nil || !strings.Contains(err.Error(), "is no socket") {
			t.Errorf("error is %v", err)
		}
		if text, _ := os.ReadFile(dir + "/admin.sock"); string(text) != "mine" {
			t.Errorf("the file has %q", text)
		}
	})
	t.Run("a path that the kernel would not take is refused in words", func(t *testing.T) {
		dir := shortDir(t) + "/" + strings.Repeat("d", 100)
		if _, err := start(dir); err == nil || !strings.Contains(err.Error(), "at most 107 bytes") {
			t.Errorf("error is %v", err)
		}
	})
}

func TestRequestsThatAreAnsweredByTheSurfaceItself(t *testing.T) {
	t.Parallel()
	fake := &admintest.Supervisor{}
	c := client(t, "unix", begin(t, fake).socket())
	for _, test := range []struct {
		what string
		code int
		text string
	}{
		{"GET /", 404, "POST /reload"},
		{"GET /favicon.ico", 404, "GET  /status"},
		{"GET /reload", 405, "/reload takes POST"},
		{"DELETE /status", 405, "/status takes GET"},
		{"OPTIONS /reload", 405, "/reload takes POST"},
		{"HEAD /status", 200, ""},
		{"POST /reload?wait=perhaps", 400, "?wait= takes true or false"},
		{"POST /stop?now=perhaps", 400, "?now= takes true or false"},
		{"POST /stop?wait=perhaps", 400, "?wait= takes true or false"},
		{"POST /ready", 400, "?on=true or ?on=false"},
		{"POST /ready?on=perhaps", 400, "?on= takes true or false"},
		{"POST /kill", 400, "?generation=N"},
		{"POST /kill?generation=0", 400, "?generation=N"},
		{"POST /kill?generation=all", 400, "?generation=N"},
		{"GET /move?generation=1", 405, "/move takes POST"},
		{"POST /move", 400, "?generation=N"},
		{"POST /move?generation=-1", 400, "?generation=N"},
		{"POST /log-level", 400, "?level= with one of debug, info, warn, error, config"},
		{"POST /log-level?level=loud", 400, "?level="},
		{"GET /reopen-logs", 405, "/reopen-logs takes POST"},
		{"GET /config?file=perhaps", 400, "?file= takes true or false"},
		{"POST /debug/pprof/heap", 405, "/debug/pprof/ takes GET"},
		{"GET /debug/pprof", 404, "GET  /debug/pprof/"},
		{"GET /debug/pprof/none", 404, "Unknown profile"},
		{"GET /debug/pprof/profile?seconds=61", 400, "?seconds= takes a number from 1 to 60"},
		{"GET /debug/pprof/profile?seconds=0", 400, "?seconds="},
		{"GET /debug/pprof/profile?seconds=9223372037", 400, "?seconds="},
		{"GET /debug/pprof/heap?generation=0", 400, "?generation=N"},
		{"GET /debug/pprof/heap?generation=1&seconds=5", 400, "only profile and trace"},
	} {
		want(t, c, test.what, test.code, test.text)
	}
	if calls := fake.Calls(); len(calls) > 0 {
		t.Errorf("the supervisor was told %q", calls)
	}
}

func TestABodyIsRefusedAndNotRead(t *testing.T) {
	t.Parallel()
	fake := &admintest.Supervisor{}
	c := client(t, "unix", begin(t, fake).socket())
	reader, writer := io.Pipe() // a body that never comes
	defer writer.Close()
	request, err := http.NewRequestWithContext(t.Context(), "POST", "http://localhost/reload", reader)
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != 400 || len(fake.Calls()) > 0 {
		t.Errorf("got %d, and the supervisor was told %q", response.StatusCode, fake.Calls())
	}
}

func TestAHeadHasABound(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	conn, err := net.Dial("unix", s.socket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	line := "X-Line: " + strings.Repeat("x", 1000) + "\r\n"
	if _, err = io.WriteString(conn, "GET /status HTTP/1.1\r\nHost: localhost\r\n"); err != nil {
		t.Fatal(err)
	}
	for err == nil { // until it is cut off
		_, err = io.WriteString(conn, line)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a head without an end is read without an end")
	}
}

// connect opens a connection to the socket and sends text.
func (s *surface) connect(t *testing.T, text string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", s.socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	return conn
}

// answered says whether something comes within a time, rather than nothing or the end.
func answered(c net.Conn, within time.Duration) bool {
	c.SetReadDeadline(time.Now().Add(within))
	_, err := c.Read(make([]byte, 1))
	return err == nil
}

const healthCheck = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

func TestConnectionsBeyondTheBoundWaitForAPlace(t *testing.T) {
	t.Parallel()
	for name, field := range map[string]string{
		"of one that then rests": "",
		"of one that then ends":  "Connection: close\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked, release := make(chan struct{}), make(chan struct{})
			s := begin(t, &admintest.Supervisor{OnKill: func(int) error {
				asked <- struct{}{}
				<-release
				return nil
			}})
			for range 64 {
				s.connect(t, "POST /kill?generation=1 HTTP/1.1\r\nHost: localhost\r\n"+field+"\r\n")
				<-asked
			}
			waiting := s.connect(t, healthCheck)
			if answered(waiting, 500*time.Millisecond) {
				t.Fatal("connection 65 was answered beside 64 others")
			}
			release <- struct{}{}
			if !answered(waiting, limit) {
				t.Error("connection 65 was not answered although a place was free")
			}
			close(release)
		})
	}
}

func TestWhoAsksNothingGivesUpItsPlace(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"silent":                 "",
		"half a head":            "GET /healthz HTTP/1.1\r\nHost: localh",
		"answered and kept open": healthCheck,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := begin(t, &admintest.Supervisor{})
			var held []net.Conn
			for range 64 {
				c := s.connect(t, text)
				if text == healthCheck && !answered(c, limit) {
					t.Fatal("one of the first was not answered")
				}
				held = append(held, c)
			}
			// Half a head is cut after 5 s anyway, an idle connection after 30 s.
			soon := time.Now().Add(4 * time.Second)
			if !answered(s.connect(t, healthCheck), time.Until(soon)) {
				t.Fatal("connection 65 was not answered")
			}
			cut := make(chan bool, len(held))
			for _, c := range held {
				go func() {
					c.SetReadDeadline(time.Now().Add(time.Second)) // it has happened by now, or does not
					_, err := io.Copy(io.Discard, c)
					cut <- !errors.Is(err, os.ErrDeadlineExceeded)
				}()
			}
			given := 0
			for range held {
				if <-cut {
					given++
				}
			}
			if given != 1 {
				t.Errorf("%d connections have given up their places, want 1", given)
			}
		})
	}
}

// Many health checks at once are no attack: each gets its answer.
func TestABurstIsAnswered(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	var all []net.Conn
	for range 200 {
		all = append(all, s.connect(t, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
	}
	for i, c := range all {
		if !answered(c, limit) {
			t.Fatalf("connection %d was not answered", i)
		}
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	status := func(s supervisor.Status, err error) func(context.Context) (*supervisor.Status, error) {
		return func(context.Context) (*supervisor.Status, error) { return &s, err }
	}
	for name, test := range map[string]struct {
		fake *admintest.Supervisor
		what string
		code int
		text string
	}{
		"alive":       {&admintest.Supervisor{}, "GET /healthz", 200, "ok\n"},
		"not alive":   {&admintest.Supervisor{Dead: true}, "GET /healthz", 503, "dead\n"},
		"ready":       {&admintest.Supervisor{}, "GET /readyz", 200, "ok\n"},
		"not started": {&admintest.Supervisor{NotReady: true}, "GET /readyz", 503, "starting\n"},
		"turned off":  {&admintest.Supervisor{NotReady: true, OnStatus: status(supervisor.Status{ReadyOff: true}, nil)}, "GET /readyz", 503, "off\n"},
		"stopping":    {&admintest.Supervisor{NotReady: true, OnStatus: status(supervisor.Status{ReadyOff: true, Stopping: true}, nil)}, "GET /readyz", 503, "stopping\n"},
		"stopped":     {&admintest.Supervisor{NotReady: true, OnStatus: status(supervisor.Status{}, supervisor.ErrStopping)}, "GET /readyz", 503, "stopping\n"},
		"stuck":       {&admintest.Supervisor{NotReady: true, OnStatus: status(supervisor.Status{}, errors.New("x"))}, "GET /readyz", 503, "stuck\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want(t, client(t, "unix", begin(t, test.fake).socket()), test.what, test.code, test.text)
		})
	}
}

// open puts an admin address into service as a reload does, and returns where it is.
func (s *surface) open(t *testing.T, cfg config.Admin) string {
	t.Helper()
	commit, _, err := s.Prepare(cfg)
	if err != nil {
		t.Fatal(err)
	}
	commit()
	found := regexp.MustCompile(`msg="admin address open" address=(\S+)`).FindAllStringSubmatch(s.log.String(), -1)
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1][1]
}

var anyPort = netip.MustParseAddrPort("127.0.0.1:0")

func TestWhatTCPMayDo(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		actions bool
		what    string
		fields  []string
		code    int
		text    string
	}{
		"seeing is allowed":                                {false, "GET /status", nil, 200, "generations"},
		"seeing by address is allowed":                     {false, "GET /status", []string{"Host: 192.0.2.1:9901"}, 200, ""},
		"seeing by IPv6 address is allowed":                {false, "GET /status", []string{"Host: [2001:db8::1]:9901"}, 200, ""},
		"seeing by IPv6 address without port is allowed":   {false, "GET /status", []string{"Host: [::1]"}, 200, ""},
		"localhost is allowed":                             {false, "GET /status", []string{"Host: LOCALHOST:9901"}, 200, ""},
		"a name is refused":                                {false, "GET /status", []string{"Host: rebound.example.com:9901"}, 403, "Host header"},
		"a name that looks like an address is refused":     {false, "GET /status", []string{"Host: 127.0.0.1.example.com"}, 403, "Host header"},
		"a name below localhost is refused":                {false, "GET /status", []string{"Host: localhost.example.com"}, 403, "Host header"},
		"changing is refused":                              {false, "POST /reload", []string{"Holdfast-Action: 1"}, 403, "admin.allow_actions is false"},
		"changing without the header is refused":           {true, "POST /reload", nil, 403, "Holdfast-Action: 1"},
		"changing by name is refused":                      {true, "POST /reload", []string{"Holdfast-Action: 1", "Host: rebound.example.com"}, 403, "Host header"},
		"changing with everything is allowed":              {true, "POST /reload", []string{"Holdfast-Action: 1"}, 200, "generation"},
		"seeing by a name of the configuration is allowed": {false, "GET /status", []string{"Host: Metrics.Internal:9901"}, 200, ""},
		"a name below one of the configuration is refused": {false, "GET /status", []string{"Host: x.metrics.internal"}, 403, "admin.hosts"},
		"scraping is allowed":                              {false, "GET /metrics", nil, 200, "process_cpu_seconds_total"},
		"scraping by a name is refused":                    {false, "GET /metrics", []string{"Host: rebound.example.com:9901"}, 403, "Host header"},
		"setting the log level is refused":                 {false, "POST /log-level?level=debug", []string{"Holdfast-Action: 1"}, 403, "admin.allow_actions is false"},
		"setting the log level may be allowed":             {true, "POST /log-level?level=debug", []string{"Holdfast-Action: 1"}, 200, "ok"},
		"seeing runtime values is allowed":                 {false, "GET /runtime", nil, 200, "values"},
		"setting a runtime value is refused":               {false, "POST /runtime/set?key=a&value=1", []string{"Holdfast-Action: 1"}, 403, "admin.allow_actions is false"},
		"setting a runtime value may be allowed":           {true, "POST /runtime/set?key=a&value=1", []string{"Holdfast-Action: 1"}, 200, "{}"},
		"setting one needs a POST":                         {true, "GET /runtime/set?key=a&value=1", []string{"Holdfast-Action: 1"}, 405, "takes POST"},
		"resetting a runtime value is refused":             {false, "POST /runtime/reset", []string{"Holdfast-Action: 1"}, 403, "admin.allow_actions is false"},
		"opening logs again is refused":                    {false, "POST /reopen-logs", []string{"Holdfast-Action: 1"}, 403, "admin.allow_actions is false"},
		"the configuration is not shown":                   {true, "GET /config", []string{"Holdfast-Action: 1"}, 404, "no such path"},
		"profiles are not shown":                           {true, "GET /debug/pprof/", []string{"Holdfast-Action: 1"}, 404, "no such path"},
		"no profile is taken":                              {true, "GET /debug/pprof/profile?seconds=1", []string{"Holdfast-Action: 1"}, 404, "no such path"},
		"no profile of a generation is taken":              {true, "GET /debug/pprof/heap?generation=1", []string{"Holdfast-Action: 1"}, 404, "no such path"},
		"a preflight request of a browser gets no answer":  {true, "OPTIONS /reload", []string{"Origin: http://evil.example"}, 405, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fake := &admintest.Supervisor{}
			s := begin(t, fake)
			at := s.open(t, config.Admin{HTTP: anyPort, AllowActions: test.actions, Hosts: []string{"metrics.internal"}})
			want(t, client(t, "tcp", at), test.what, test.code, test.text, test.fields...)
			if told := len(fake.Calls()) > 0; told != (test.code == 200 && strings.HasPrefix(test.what, "POST")) {
				t.Errorf("the supervisor was told %q", fake.Calls())
			}
		})
	}
}

func TestAHealthCheckOverHTTP10NeedsNoHost(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	conn, err := net.Dial("tcp", s.open(t, config.Admin{HTTP: anyPort}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	fmt.Fprint(conn, "GET /readyz HTTP/1.0\r\n\r\n")
	if answer, _ := io.ReadAll(conn); !strings.HasPrefix(string(answer), "HTTP/1.0 200") {
		t.Errorf("answer is %q", answer)
	}
}

func TestTheAddressFollowsTheConfiguration(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	first := s.open(t, config.Admin{HTTP: anyPort})
	c := client(t, "tcp", first)
	want(t, c, "POST /reload", 403, "allow_actions", "Holdfast-Action: 1")

	// The same address: the socket stays, the permission and the names follow.
	want(t, c, "GET /healthz", 403, "admin.hosts", "Host: metrics.internal")
	if again := s.open(t, config.Admin{HTTP: anyPort, AllowActions: true, Hosts: []string{"metrics.internal"}}); again != first {
		t.Fatalf("the same address was opened again at %s", again)
	}
	want(t, c, "POST /reload", 200, "", "Holdfast-Action: 1", "Host: metrics.internal")

	// Another one takes over.
	second := s.open(t, config.Admin{HTTP: netip.MustParseAddrPort("127.0.0.2:0")})
	want(t, client(t, "tcp", second), "GET /healthz", 200, "ok")
	wantRefused(t, first)

	// Off.
	s.open(t, config.Admin{})
	wantRefused(t, second)
	want(t, client(t, "unix", s.socket()), "GET /healthz", 200, "ok")
}

func TestAnAnswerUnderWayOutlivesItsAddress(t *testing.T) {
	t.Parallel()
	asked, release := make(chan struct{}), make(chan struct{})
	fake := &admintest.Supervisor{OnReload: func(context.Context, bool) (*supervisor.ReloadResult, error) {
		close(asked)
		<-release
		return &supervisor.ReloadResult{Generation: 7}, nil
	}}
	s := begin(t, fake)
	at := s.open(t, config.Admin{HTTP: anyPort, AllowActions: true})
	done := make(chan struct{})
	go func() {
		defer close(done)
		want(t, client(t, "tcp", at), "POST /reload", 200, `"generation": 7`, "Holdfast-Action: 1")
	}()
	<-asked
	s.open(t, config.Admin{}) // the reload that is under way turns it off
	close(release)
	<-done
}

func TestAReloadThatIsAbortedLeavesTheAddressAsItWas(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	first := s.open(t, config.Admin{HTTP: anyPort})
	free := freePort(t)
	_, abort, err := s.Prepare(config.Admin{HTTP: free, AllowActions: true})
	if err != nil {
		t.Fatal(err)
	}
	abort()
	if _, err := net.Dial("tcp", free.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the new address is still open: %v", err)
	}
	want(t, client(t, "tcp", first), "GET /healthz", 200, "ok")
	want(t, client(t, "tcp", first), "POST /reload", 403, "", "Holdfast-Action: 1")
}

func TestAnAddressThatCannotBeOpenedIsRefusedInWords(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, _, err = s.Prepare(config.Admin{HTTP: netip.MustParseAddrPort(taken.Addr().String())})
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.HasPrefix(err.Error(), "admin.http: ") {
		t.Errorf("error is %v", err)
	}

	own := freePort(t)
	s.open(t, config.Admin{HTTP: own})
	_, _, err = s.Prepare(config.Admin{HTTP: netip.AddrPortFrom(netip.IPv4Unspecified(), own.Port())})
	if err == nil || !strings.Contains(err.Error(), "turn admin.http off with one reload") {
		t.Errorf("error is %v", err)
	}
}

func TestAnOpenCommandAddressIsWarnedOf(t *testing.T) {
	t.Parallel()
	for address, warned := range map[string]bool{"0.0.0.0:0": true, "127.0.0.1:0": false} {
		s := begin(t, &admintest.Supervisor{})
		s.open(t, config.Admin{HTTP: netip.MustParseAddrPort(address), AllowActions: true})
		if got := strings.Contains(s.log.String(), "can command this service"); got != warned {
			t.Errorf("%s: warned %t, want %t", address, got, warned)
		}
	}
}

func TestCommandsAreLogged(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	want(t, client(t, "unix", s.socket()), "POST /kill?generation=4", 200, "killed")
	if !strings.Contains(s.log.String(), `command="/kill?generation=4" from="admin socket"`) {
		t.Errorf("log is %s", s.log)
	}
}

func TestAStopIsGivenOnceUnlessItIsUrgent(t *testing.T) {
	t.Parallel()
	t.Run("two callers are one stop", func(t *testing.T) {
		fake := &admintest.Supervisor{}
		c := client(t, "unix", begin(t, fake).socket())
		want(t, c, "POST /stop", 200, "stopping")
		want(t, c, "POST /stop", 200, "stopping")
		if calls := fake.Calls(); !slices.Equal(calls, []string{"stop"}) {
			t.Errorf("the supervisor was told %q", calls)
		}
	})
	t.Run("a stop that a signal has begun is not hurried", func(t *testing.T) {
		fake := &admintest.Supervisor{OnStatus: func(context.Context) (*supervisor.Status, error) {
			return &supervisor.Status{Stopping: true}, nil
		}}
		want(t, client(t, "unix", begin(t, fake).socket()), "POST /stop", 200, "stopping")
		if calls := fake.Calls(); len(calls) > 0 {
			t.Errorf("the supervisor was told %q", calls)
		}
	})
	t.Run("now is both stops", func(t *testing.T) {
		fake := &admintest.Supervisor{}
		want(t, client(t, "unix", begin(t, fake).socket()), "POST /stop?now=1", 200, "stopping")
		if calls := fake.Calls(); !slices.Equal(calls, []string{"stop", "stop"}) {
			t.Errorf("the supervisor was told %q", calls)
		}
	})
}

func wantRefused(t *testing.T, address string) {
	t.Helper()
	eventually(t, "connections to "+address+" are refused", func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// freePort is an address of this test's own: nobody else in 127.0.0.0/8 chooses it.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.3:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// A reload and the mending of a crash may be under way at once.
func TestWhatIsCommittedLastHoldsWhenTwoOverlap(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{})
	address := freePort(t)
	s.open(t, config.Admin{HTTP: address})
	keep, _, err := s.Prepare(config.Admin{HTTP: address})
	if err != nil {
		t.Fatal(err)
	}
	s.open(t, config.Admin{}) // the other one turns it off meanwhile
	keep()
	want(t, client(t, "tcp", address.String()), "GET /healthz", 200, "ok")
}
