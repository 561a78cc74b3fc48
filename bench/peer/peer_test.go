package peer

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/bench/load"
	"holdfast/bench/proc"
	"holdfast/internal/config"
)

// The test binary is one of the two smallest proxies when it is told to be.
func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == "role" {
		serve := map[string]func(string, string) error{"httputil": ServeHTTPUtil, "iocopy": ServeIOCopy}[os.Args[2]]
		fmt.Fprintln(os.Stderr, serve(os.Args[3], os.Args[4]))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func site(dir string) Site {
	return Site{Dir: dir, Listen: "127.0.0.1:8001", Secure: "127.0.0.1:8443", Upstream: "127.0.1.1:9001", Tunnels: 1000, Cores: 2, Revision: 3}
}

// What each configuration looks like stands in testdata, to be read by people who ask
// whether the comparison is fair.
func TestConfigurations(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, k := range slices.Concat(Kinds(), VaultKinds(), TLSKinds()) {
		if k.files == nil {
			continue
		}
		for _, f := range k.files(site("/site")) {
			name := filepath.Join("testdata", k.Name, filepath.Base(f.Name))
			seen[name] = true
			want, err := os.ReadFile(name)
			if err != nil {
				t.Error(err)
			}
			// nginx is told its workers' user where it is started by root.
			if got := strings.Replace(f.Text, "user root;\n", "", 1); got != string(want) {
				t.Errorf("%s is now\n%s", name, got)
			}
		}
	}
	all, err := filepath.Glob("testdata/*/*")
	if err != nil || len(all) != len(seen) {
		t.Errorf("testdata has %q, %v, and configurations are %v", all, err, seen)
	}
}

func TestConfigurationsSayWhatTheyAreTold(t *testing.T) {
	t.Parallel()
	for _, k := range slices.Concat(Kinds(), VaultKinds(), TLSKinds()) {
		dir := t.TempDir()
		s := site(dir)
		if err := k.write(s); err != nil {
			t.Fatal(err)
		}
		said := strings.Join(k.arguments(Program{Path: "/bin/program"}, s), " ")
		if !strings.HasPrefix(said, "/bin/program ") {
			t.Errorf("%s is started by %s", k.Name, said)
		}
		if k.files != nil {
			for _, f := range k.files(s) {
				said += f.Text
			}
		}
		told := []string{s.Listen, s.Upstream}
		if k.Reloads() {
			told = append(told, RevisionPath, "/revision-3")
		}
		for _, word := range told {
			if !strings.Contains(said, word) {
				t.Errorf("%s is not told %s:\n%s", k.Name, word, said)
			}
		}
	}
}

func TestHoldfastTakesItsConfiguration(t *testing.T) {
	t.Parallel()
	for kind, survives := range map[*Kind]bool{vault: true, noVault: false} {
		f := kind.files(site("/site"))[0]
		parsed, err := config.Parse(f.Name, []byte(f.Text))
		if err != nil {
			t.Error(err)
		} else if parsed.Tunnels.SurviveCrash != survives {
			t.Errorf("%s is configured with %+v", kind.Name, parsed.Tunnels)
		}
	}
	f := holdfast.files(site("/site"))[0]
	if _, err := config.Parse(f.Name, []byte(f.Text)); err != nil {
		t.Error(err)
	}
}

// Programs of the machine read their configurations, as far as they are there.
func TestInstalledProgramsTakeTheirConfigurations(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		kind  *Kind
		check string
	}{{haproxy, "-c"}, {nginx, "-t"}} {
		program, err := c.kind.Find(Finder{})
		if err != nil {
			t.Logf("%s: %v", c.kind.Name, err)
			continue
		}
		if program.Version == "" || strings.ContainsAny(program.Version, " \n") {
			t.Errorf("%s has the version %q", c.kind.Name, program.Version)
		}
		s := site(t.TempDir())
		if err := c.kind.write(s); err != nil {
			t.Fatal(err)
		}
		args := append(c.kind.arguments(program, s)[1:], c.check)
		if out, err := exec.Command(program.Path, args...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", c.kind.Name, err, out)
		}
	}
}

// upstream answers as the load's does, at the end of the request.
func upstream(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "ok\n")
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func start(t *testing.T, k *Kind) *Instance {
	t.Helper()
	program, err := k.Find(Finder{Self: os.Args[0]})
	if err != nil {
		t.Fatal(err)
	}
	s := site(t.TempDir())
	s.Upstream = upstream(t)
	i, err := Start(k, program, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Stop(); err != nil {
			t.Error(err)
		}
	})
	return i
}

func TestSmallProxiesServeAndComeBackAfterACrash(t *testing.T) {
	t.Parallel()
	for _, k := range []*Kind{httputilProxy, ioCopy} {
		i := start(t, k)
		before := i.Relays()
		if len(before) != 1 || !slices.Equal(before, i.All()) {
			t.Errorf("%s: processes %v, of which relay %v", k.Name, i.All(), before)
		}
		if err := i.Crash(); err != nil {
			t.Fatal(err)
		}
		if err := i.WaitReady(); err != nil {
			t.Fatal(err)
		}
		if after := i.Relays(); len(after) != 1 || slices.Equal(after, before) {
			t.Errorf("%s: processes %v after the crash of %v", k.Name, after, before)
		}
	}
}

// Each end is passed on by itself: an upstream that answers at the end of what it is
// sent still can.
func TestIOCopyPassesOnEnds(t *testing.T) {
	t.Parallel()
	i := start(t, ioCopy)
	conn, err := net.Dial("tcp", i.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	// The body has no length: it goes as far as the connection.
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello", load.PagePath)
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(all), "HTTP/1.1 ") {
		t.Errorf("got %q, %v", all, err)
	}
}

// What has processes below it is ended with all of them, even those that do not listen.
func TestStopLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	stubborn := &Kind{Name: "stubborn", arguments: func(Program, Site) []string {
		return []string{"sh", "-c", `sh -c 'trap "" TERM; echo ready; while :; do sleep 1; done' & wait`}
	}}
	i := &Instance{Kind: stubborn, site: Site{Dir: t.TempDir()}}
	if err := i.run(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for i.Log() != "ready" && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	family := proc.Family(i.main.PID())
	if len(family) < 2 {
		t.Fatalf("started %+v, and the log says %q", family, i.Log())
	}
	if err := i.Stop(); err != nil {
		t.Error(err)
	}
	for _, p := range family {
		for now, ok := proc.Find(p.PID); ok && now.Started == p.Started && !now.Ended; now, ok = proc.Find(p.PID) {
			if ctx.Err() != nil {
				t.Fatalf("%+v is left", now)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func TestMissingProgramIsNamedByItsPackage(t *testing.T) {
	t.Parallel()
	if p, err := installed("no-such-proxy", nil, "-v"); err == nil || !strings.Contains(err.Error(), "Debian's package no-such-proxy") {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestStartSaysWhyNot(t *testing.T) {
	t.Parallel()
	broken := &Kind{Name: "broken", arguments: func(Program, Site) []string { return []string{"sh", "-c", "echo no luck >&2; exit 3"} }}
	i, err := Start(broken, Program{}, site(t.TempDir()))
	if err == nil || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("got %v, %v", i, err)
	}
}

func TestMaxTunnels(t *testing.T) {
	t.Parallel()
	two, err := holdfast.MaxTunnels()
	six, err2 := ioCopy.MaxTunnels()
	if err != nil || err2 != nil || two < 1 || six >= two {
		t.Errorf("%d (%v) with two descriptors each, %d (%v) with six", two, err, six, err2)
	}
}
