package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// staged is a service with one upstream that the test plays itself.
func staged(t *testing.T, config func(up string) string) *stage {
	t.Helper()
	up := newUpstream(t)
	i := serve(t, config(up.addr))
	return &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
}

// health asks one of the health checks on the command socket.
func (i *instance) health(path string) int {
	i.t.Helper()
	resp, err := i.admin(path)
	if err != nil {
		i.t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	return resp.StatusCode
}

// admin asks the command socket for a path.
func (i *instance) admin(path string) (*http.Response, error) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(i.runtime(), "admin.sock"))
		},
	}}
	return client.Get("http://localhost" + path)
}

func (i *instance) wantHealth(healthy, ready int) {
	i.t.Helper()
	if h, r := i.health("/healthz"), i.health("/readyz"); h != healthy || r != ready {
		i.t.Errorf("/healthz says %d, /readyz %d; want %d and %d", h, r, healthy, ready)
	}
}

func TestReadinessIsTheOperators(t *testing.T) {
	t.Parallel()
	config := simple(newBackend(t), "[reload]\nprobation = \"0s\"\n")
	i := serve(t, config)
	i.wantHealth(200, 200)
	if code, _, errs := i.holdfast("ready", "off"); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	i.reload(config + "# changed\n")
	i.wantHealth(200, 503)
	wantAnswer(t, i.address("public"))
	if code, _, errs := i.holdfast("ready", "on"); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	i.wantHealth(200, 200)
}

func TestSIGHUPReloads(t *testing.T) {
	t.Parallel()
	config := simple(newBackend(t), "[reload]\nprobation = \"0s\"\n")
	i := serve(t, config)
	i.write(config + "# changed\n")
	if !i.status().FileDiffers {
		t.Error("the status does not say that the file differs")
	}
	i.signal(syscall.SIGHUP)
	if s := i.wantStates("2 serving"); s.FileDiffers {
		t.Error("the status says that the file still differs")
	}
}

// With --wait the answer is about the probation too: here the new generation is
// killed in it, and the old process serves again.
func TestReloadWaitTellsOfACrash(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, simple(backend, ""))
	old := i.pids()[0]
	i.write(simple(backend, "[reload]\nprobation = \"1h\"\n"))
	type answer struct {
		code int
		errs string
	}
	answered := make(chan answer, 1)
	go func() {
		code, _, errs := i.holdfast("reload", "--wait")
		answered <- answer{code, errs}
	}()
	s := i.wantStates("2 serving, 1 draining")
	syscall.Kill(s.Generations[0].PID, syscall.SIGKILL)
	if a := <-answered; a.code != 1 || !strings.Contains(a.errs, "generation 2 crashed in its probation") {
		t.Errorf("exit code %d: %s", a.code, a.errs)
	}
	if s := i.wantStates("1 serving"); s.Generations[0].PID != old || !s.FileDiffers {
		t.Errorf("process %d serves, want %d; the file differs: %v", s.Generations[0].PID, old, s.FileDiffers)
	}
	wantAnswer(t, i.address("public"))
	if code, out, errs := i.holdfast("kill", "--generation", "1"); code != 0 {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	i.wantStates("3 serving")
}

// A terminal's Ctrl-C, and whatever else is sent to the wrong process, ends no tunnel.
func TestSignalsThatAreNotMeantForAGenerationDoNothing(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, "") })
	client, server, _ := s.tunnel("/ws")
	pid := s.service.pids()[0]
	if group, err := syscall.Getpgid(pid); err != nil || group != pid {
		t.Errorf("it is in the process group %d, %v; want its own, %d", group, err, pid)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE} {
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		wantTunnel(client, server)
	}
	if st := s.service.wantStates("1 serving"); st.Generations[0].PID != pid {
		t.Errorf("process %d serves, want %d", st.Generations[0].PID, pid)
	}
}

// What `holdfast status` promises to show, by the names that programs read.
func TestTheStatusShowsWhatAGenerationHolds(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, "") })
	s.tunnel("/ws")
	client := s.dial()
	client.send(s.get("/"))
	s.up.accept(t).head()
	s.service.wait("a request and a tunnel", func(st *status) bool {
		return st.Generations[0].Requests == 1 && st.Generations[0].Tunnels == 1
	})
	_, out, _ := s.service.holdfast("status", "--json")
	var st struct {
		ConfigHash  string           `json:"config_hash"`
		Generations []map[string]any `json:"generations"`
	}
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		t.Fatal(err)
	}
	g := st.Generations[0]
	for _, key := range []string{"version", "started", "oldest_tunnel"} {
		if g[key] == nil || g[key] == "" {
			t.Errorf("no %s in %v", key, g)
		}
	}
	if rss, _ := g["rss_bytes"].(float64); rss < 1<<20 || g["config_hash"] != st.ConfigHash || st.ConfigHash == "" {
		t.Errorf("rss_bytes is %v, config_hash %v of %q", g["rss_bytes"], g["config_hash"], st.ConfigHash)
	}
}

// stop.delay is the load balancer's time: /readyz is negative, and everybody is let in.
// A second signal waits for nothing.
func TestStopDelayAndASecondSignal(t *testing.T) {
	t.Parallel()
	s := staged(t, func(up string) string { return simple(up, "[stop]\ndelay = \"1h\"\ntimeout = \"1h\"\n") })
	i := s.service
	client, server, _ := s.tunnel("/ws")
	pids := i.pids()
	i.signal(syscall.SIGTERM)
	i.wait("the stop to begin", func(st *status) bool { return st.Stopping && !st.Ready })
	i.wantHealth(200, 503)
	other := s.dial()
	other.send(s.get("/new"))
	up := s.up.accept(t)
	up.head()
	up.send(answer(200, "let in"))
	other.want(200, "let in")
	wantTunnel(client, server)
	i.signal(syscall.SIGTERM)
	i.awaitEnd()
	if code := i.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, pid := range pids {
		if !i.gone(pid) {
			t.Errorf("process %d has survived", pid)
		}
	}
	client.wantClosed()
	server.wantClosed()
}

// Nobody who is connected notices that the supervisor was killed, and neither does
// who comes then. What the operations page says ends the orphan; a service starts again.
func TestAGenerationOutlivesAKilledSupervisor(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	i := newInstance(t, simple(up.addr, "[stop]\ntimeout = \"0s\"\n"))
	log, err := os.Create(filepath.Join(i.dir, "log")) // with a pipe the orphan would keep our end of it busy
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	i.start(log)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	client, server, _ := s.tunnel("/ws")
	orphan := i.pids()[0]
	t.Cleanup(func() {
		if runs(orphan) { // the number may be somebody else's by now
			syscall.Kill(orphan, syscall.SIGKILL)
		}
	})
	i.signal(syscall.SIGKILL)
	i.awaitEnd()
	wantTunnel(client, server)
	other := s.dial()
	other.send(s.get("/new"))
	fresh := up.accept(t)
	fresh.head()
	fresh.send(answer(200, "served"))
	other.want(200, "served")

	syscall.Kill(orphan, syscall.SIGTERM)
	client.wantClosed()
	// Whether it has ended is for its new parent to know; what it held is free.
	eventually(t, func() bool {
		c, err := net.DialTimeout("tcp", s.addresses["public"], patience)
		if err == nil {
			c.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}, func() string { return "the orphan's listener to be closed" })
	i.start(nil)
	i.wantStates("2 serving") // numbers are never given again
}

// A listener that becomes another one on the same port: who waits in the old queue is
// served, whoever comes is let in, and names mean nothing to the sockets.
func TestListenersChangeUnderThoseWhoWait(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	config := func(listeners ...[2]string) string {
		var b strings.Builder
		b.WriteString("[reload]\nprobation = \"0s\"\n")
		for _, l := range listeners {
			fmt.Fprintf(&b, "[[listeners]]\nname = %q\naddress = %q\nlimits = { connections = 1 }\n", l[0], l[1])
		}
		for _, l := range listeners {
			fmt.Fprintf(&b, "[[virtual_hosts]]\nname = %q\nlisteners = [%q]\ndomains = [\"*\"]\n", l[0], l[0])
			fmt.Fprintf(&b, "[[virtual_hosts.routes]]\nmatch = { path = \"/who\" }\nredirect = { path = \"/%s\" }\n", l[0])
			b.WriteString("[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\ncluster = \"backend\"\n")
		}
		fmt.Fprintf(&b, "[[clusters]]\nname = \"backend\"\nendpoints = [%q]\n", backend)
		return b.String()
	}
	i := serve(t, config([2]string{"a", "0.0.0.0:0"}, [2]string{"b", "[::1]:0"}))
	_, portA, _ := net.SplitHostPort(i.address("a"))
	v4, v6 := "127.0.0.1:"+portA, i.address("b")

	served := dialWire(t, "tcp", v4) // the only one that is let in
	served.send(request("GET /x HTTP/1.1", "Host: x"))
	served.want(200, "hello /x")
	var waiting []*wire
	for n := range 5 {
		w := dialWire(t, "tcp", v4)
		w.send(request(fmt.Sprintf("GET /%d HTTP/1.1", n), "Host: x"))
		waiting = append(waiting, w)
	}
	i.reload(config([2]string{"a", v4}, [2]string{"b", v6}))
	for n, w := range waiting {
		w.wantLast(200, fmt.Sprintf("hello /%d", n))
	}
	served.close()

	wantServedBy := func(address, name string) {
		t.Helper()
		w := dialWire(t, "tcp", address)
		w.send(request("GET /who HTTP/1.1", "Host: x", "Connection: close"))
		if r := w.reply("GET"); r.Header.Get("Location") != "http://x/"+name {
			t.Errorf("%s: got %d to %q, want listener %s", address, r.StatusCode, r.Header.Get("Location"), name)
		}
	}
	wantServedBy(v4, "a")
	wantServedBy(v6, "b")
	i.write(config([2]string{"b", v4}, [2]string{"a", v6}))
	if code, out, errs := i.holdfast("reload"); code != 0 || strings.Contains(out, "opened") || strings.Contains(out, "closed") {
		t.Errorf("swapping names: exit code %d\n%s%s", code, out, errs)
	}
	wantServedBy(v4, "b")
	wantServedBy(v6, "a")

	i.reload(config([2]string{"b", v4}))
	i.wait("the listener to be gone", func(st *status) bool { return len(st.Listeners) == 1 })
	if c, err := net.DialTimeout("tcp", v6, patience); err == nil {
		c.Close()
		t.Errorf("%s still accepts", v6)
	}
	wantServedBy(v4, "b")
}
