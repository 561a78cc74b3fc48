package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"
)

// limited writes a program that runs the proxy with so many descriptors, and returns
// the configuration that names it. It is not the proxy with the race detector, which
// would make what is measured of it meaningless.
func (i *instance) limited(descriptors int) string {
	i.t.Helper()
	path := filepath.Join(i.dir, "limited-proxy")
	script := fmt.Sprintf("#!/bin/sh\nulimit -n %d\nexec %s \"$@\"\n", descriptors, program("plain/holdfast-proxy"))
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		i.t.Fatal(err)
	}
	return fmt.Sprintf("[process]\nproxy = %q\n", path)
}

// crowd is clients that all want a tunnel, whether there is room for it or not.
type crowd struct {
	t       *testing.T
	arrived sync.WaitGroup

	mu   sync.Mutex
	open []*websocket.Conn
	errs []error
}

// gather has n clients ask for tunnels at once. Each waits for as long as it takes.
func gather(t *testing.T, address string, n int) *crowd {
	c := &crowd{t: t}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(func() {
		cancel()
		c.arrived.Wait()
		c.leave(c.count())
	})
	for range n {
		c.arrived.Go(func() {
			conn, _, err := websocket.Dial(ctx, "ws://"+address+"/ws/coder", nil)
			c.mu.Lock()
			defer c.mu.Unlock()
			if err != nil {
				c.errs = append(c.errs, err)
				return
			}
			c.open = append(c.open, conn)
		})
	}
	return c
}

func (c *crowd) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// wantNoErrors fails the test for each client that was turned away.
func (c *crowd) wantNoErrors() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, err := range c.errs {
		c.t.Errorf("a client: %v", err)
	}
}

// leave closes n tunnels.
func (c *crowd) leave(n int) {
	c.mu.Lock()
	gone := c.open[:n]
	c.open = c.open[n:]
	c.mu.Unlock()
	for _, conn := range gone {
		conn.CloseNow()
	}
}

// wantEchoes has every open tunnel carry something.
func (c *crowd) wantEchoes() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := tooLong()
	defer cancel()
	for n, conn := range c.open {
		want := "tunnel " + strconv.Itoa(n)
		err := conn.Write(ctx, websocket.MessageText, []byte(want))
		var got []byte
		if err == nil {
			_, got, err = conn.Read(ctx)
		}
		if err != nil || string(got) != want {
			c.t.Errorf("%s: got %q, %v", want, got, err)
		}
	}
}

// ticks is the processor time that a process has used, in hundredths of a second.
func ticks(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// The name, which may hold anything, ends with the last parenthesis (proc(5)).
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	user, err := strconv.Atoi(fields[11])
	if err != nil {
		t.Fatal(err)
	}
	system, err := strconv.Atoi(fields[12])
	if err != nil {
		t.Fatal(err)
	}
	return user + system
}

// A generation that has no descriptors left for connections lets clients wait, turns
// nobody away who was let in, uses no processor time on it, and still does everything
// that it is told, also what needs descriptors.
func TestWhoFindsNoDescriptorWaits(t *testing.T) {
	t.Parallel()
	const limit, clients = 256, 130
	backend := newBackend(t)
	i := newInstance(t, "")
	config := i.withLogs(backend, "access.log") + i.limited(limit)
	i.write(config)
	i.start(nil)
	address := i.address("public")
	first := i.status().Generations[0].PID
	failures := func() float64 { return i.mustScrape()["holdfast_downstream_accept_failures_total{listener=public}"] }

	all := gather(t, address, clients)
	eventually(t, func() bool { return failures() > 3 }, func() string { return "accepting to be held up" })
	open := all.count()
	if most := limit / 2; open < 20 || open > most {
		t.Errorf("%d tunnels are open, of %d descriptors", open, limit)
	}
	if n := descriptors(t, first); n > limit-64 {
		t.Errorf("%d descriptors are in use, of %d: too few are left for what the supervisor sends", n, limit)
	}
	before, beforeFailures := ticks(t, first), failures()
	time.Sleep(2 * time.Second) // what is measured is what it does when nothing can be done
	if used := ticks(t, first) - before; used > 40 {
		t.Errorf("it has used %d0 ms of processor time in 2 s of waiting", used)
	}
	if n := failures() - beforeFailures; n > 60 {
		t.Errorf("it has tried %v times in 2 s to accept", n)
	}

	// Room for some is room for some.
	all.leave(10)
	eventually(t, func() bool { return all.count() >= open-2 }, func() string {
		return fmt.Sprintf("those who wait to be let in: %d tunnels were open, 10 left, %d are open", open, all.count())
	})

	// What the supervisor sends arrives, with descriptors and without.
	for _, command := range [][]string{
		{"reopen-logs"}, {"profile", "heap", "--generation", "1"}, {"log-level", "debug"}, {"log-level", "config"},
	} {
		if code, _, errs := i.holdfast(command...); code != 0 {
			t.Errorf("holdfast %s: exit code %d: %s", strings.Join(command, " "), code, errs)
		}
	}
	if s := i.status(); s.states() != "1 serving" || s.Generations[0].NotAnswering || s.Generations[0].PID != first {
		t.Errorf("generations: %s", s.states())
	}
	all.wantEchoes()

	// It finds another supervisor, and is handed to a third.
	i.succeed(i.crash())
	i.upgrade()
	all.wantEchoes()

	// The next generation has descriptors of its own: those who wait are let in.
	i.reload(config)
	all.arrived.Wait()
	all.wantNoErrors()
	s := i.wantStates("2 serving, 1 draining")
	if s.Generations[1].NotAnswering || s.Generations[1].PID != first {
		t.Errorf("the first generation: %+v", s.Generations[1])
	}
	all.wantEchoes()
	if n := strings.Count(i.log.String(), "cannot accept"); n != 1 {
		t.Errorf("that accepting is held up is said %d times", n)
	}
	if strings.Contains(i.log.String(), "cannot connect") {
		t.Error("a client was let in for which there was no connection to the upstream")
	}
}

// allow sets how many descriptors a process may have, in a way that can be taken back.
func allow(t *testing.T, pid int, resource int, most uint64) {
	t.Helper()
	var now unix.Rlimit
	err := unix.Prlimit(pid, resource, nil, &now)
	if err == nil {
		err = unix.Prlimit(pid, resource, &unix.Rlimit{Cur: min(most, now.Max), Max: now.Max}, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A supervisor that has few descriptors left does not begin what it could not end, says
// why, and keeps enough to replace a generation that dies.
func TestAReloadWithoutDescriptorsIsRefused(t *testing.T) {
	t.Parallel()
	config := simple(newBackend(t), "[reload]\nprobation = \"0s\"\n")
	i := serve(t, config)
	supervisor := i.pid
	i.wait("the supervisor to be at rest", func(s *status) bool { return descriptors(t, supervisor) < 200 })
	allow(t, supervisor, unix.RLIMIT_NOFILE, uint64(descriptors(t, supervisor)+40))
	i.wantRefused(config, 1, "descriptors are needed and ")
	for range 3 {
		i.wantRefused(config, 1, "raise the limit of descriptors")
	}
	i.wantHealth(200, 200)
	if steps := i.mustScrape()["holdfast_reload_refusals_total{step=descriptors}"]; steps != 4 {
		t.Errorf("%v refusals are counted", steps)
	}
	address := i.address("public")
	pid := i.status().Generations[0].PID
	syscall.Kill(pid, syscall.SIGKILL)
	wantAnswer(t, address)
	i.wantStates("2 serving")

	allow(t, supervisor, unix.RLIMIT_NOFILE, 1<<20)
	i.reload(config)
	i.wantStates("3 serving")
}

// On a full disk, lines of the log and records of access logs are dropped and counted.
// Nothing else happens.
func TestAFullDiskCostsLinesOnly(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	config := simple(backend, "[log]\nlevel = \"debug\"\n[[access_logs]]\npath = \"/dev/full\"\n")
	i.write(config)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	i.start(full)
	i.talkAndReload(config)
}

// As above, and then there is room again.
func TestWhatIsLoggedGoesOnWhenThereIsRoomAgain(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	i.write(i.withLogs(backend, "access.log"))
	log, err := os.OpenFile(filepath.Join(i.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	i.start(log)
	address, dropped := i.address("public"), "holdfast_access_log_dropped_total{path="+filepath.Join(i.dir, "access.log")+"}"
	wantAnswer(t, address)
	i.wantRecords("access.log", 1)

	processes := []int{i.pid, i.status().Generations[0].PID}
	for _, pid := range processes {
		allow(t, pid, unix.RLIMIT_FSIZE, 10) // whatever is beyond that, in any file
	}
	failed := "holdfast_access_log_write_errors_total{path=" + filepath.Join(i.dir, "access.log") + "}"
	for n := range 3 {
		wantAnswer(t, address)
		i.wantSeries(series{dropped: float64(n + 1), failed: float64(n + 1)}) // lines that wait together are written together
	}
	for _, to := range []string{"off", "on", "off", "on"} {
		if code, _, errs := i.holdfast("ready", to); code != 0 { // is logged
			t.Errorf("ready %s: exit code %d: %s", to, code, errs)
		}
	}
	eventually(t, func() bool { return i.mustScrape()["holdfast_supervisor_log_lines_dropped_total"] >= 4 },
		func() string { return "lines of the log to be counted as dropped" })

	for _, pid := range processes {
		allow(t, pid, unix.RLIMIT_FSIZE, unix.RLIM_INFINITY)
	}
	wantAnswer(t, address)
	i.wantRecords("access.log", 2)
	if code, _, errs := i.holdfast("ready", "off"); code != 0 {
		t.Errorf("ready off: exit code %d: %s", code, errs)
	}
	var text []byte
	eventually(t, func() bool {
		text, _ = os.ReadFile(log.Name())
		return strings.Contains(string(text), "log lines dropped") && strings.Contains(string(text), "ready=false")
	}, func() string { return "the log to go on; it says\n" + string(text) })
	if now := i.status(); now.states() != "1 serving" || now.Generations[0].PID != processes[1] {
		t.Errorf("now %s", now.states())
	}
}

// While nobody accepts, clients wait: in the queue, and when that is full, in front of
// it. All of them are served in the end.
func TestClientsWaitInFrontOfAFullQueue(t *testing.T) {
	t.Parallel()
	config := func(limits string) string {
		return fmt.Sprintf(`
[process]
proxy = %q
[[listeners]]
name = "public"
address = "127.0.0.1:0"
%s
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
redirect = { path = "/elsewhere" }
`, program("plain/holdfast-proxy"), limits)
	}
	i := serve(t, config("limits = { connections = 1 }"))
	address := i.address("public")
	queue := func() (waiting, room int) {
		all := i.mustScrape()
		return int(all["holdfast_downstream_queue_connections{listener=public}"]), int(all["holdfast_downstream_queue_limit{listener=public}"])
	}
	waiting, room := queue()
	if waiting != 0 || room < 16 {
		t.Fatalf("%d wait in a queue with room for %d", waiting, room)
	}
	clients := room + 50
	needDescriptors(t, clients+1000)

	first := dial(t, address) // whoever has the one place, and says nothing
	i.wait("the first client", func(s *status) bool { return s.Generations[0].Connections == 1 })
	var crowd sync.WaitGroup
	errs := make(chan error, clients)
	for range clients {
		crowd.Go(func() {
			c, err := net.DialTimeout("tcp", address, patience)
			if err != nil {
				errs <- err
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if answer, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 301 ") {
				errs <- fmt.Errorf("%.100q, %w", answer, err)
			}
		})
	}
	eventually(t, func() bool { waiting, _ = queue(); return waiting >= room },
		func() string { return fmt.Sprintf("the queue to be full: %d of %d", waiting, room) })
	i.reload(config("")) // nothing holds this one up
	crowd.Wait()
	close(errs)
	for err := range errs {
		t.Errorf("a client: %v", err)
	}
	if waiting, _ = queue(); waiting != 0 {
		t.Errorf("%d wait still", waiting)
	}
	first.Close()
}

// flood has n goroutines do what they can at the socket, until the test's part of it is
// over.
func flood(t *testing.T, n int, network, path string, with ...func(net.Conn)) (end func()) {
	over := make(chan struct{})
	var flooding sync.WaitGroup
	for worker := range n {
		flooding.Go(func() {
			for turn := worker; ; turn++ {
				select {
				case <-over:
					return
				default:
				}
				c, err := net.DialTimeout(network, path, time.Second)
				if err != nil { // nobody is there, or the queue is full
					time.Sleep(time.Millisecond)
					continue
				}
				c.SetDeadline(time.Now().Add(50 * time.Millisecond))
				with[turn%len(with)](c)
				c.Close()
			}
		})
	}
	end = sync.OnceFunc(func() { close(over); flooding.Wait() })
	t.Cleanup(end)
	return end
}

// Rubbish and floods at the sockets of the runtime directory keep no command out and no
// generation that looks for a supervisor, and leave nothing behind.
func TestFloodsAtTheSupervisorsDoorsStopNothing(t *testing.T) {
	t.Parallel()
	config := simple(newBackend(t), "[reload]\nprobation = \"0s\"\n")
	i := serve(t, config)
	address := i.address("public")
	before := besidesPipes(t, i.pid)

	say := func(text string) func(net.Conn) {
		return func(c net.Conn) {
			io.WriteString(c, text)
			io.Copy(io.Discard, c)
		}
	}
	nothing := func(c net.Conn) { c.Read(make([]byte, 1)) }
	files := func(c net.Conn) { // each message brings as many descriptors as it can
		fds := make([]int, 253)
		for n := range fds {
			fds[n] = int(os.Stdin.Fd())
		}
		c.(*net.UnixConn).WriteMsgUnix([]byte(`{"type":"hello"}`), unix.UnixRights(fds...), nil)
		nothing(c)
	}
	hello := fmt.Sprintf(`{"type":"hello","nonce":"%s=","hello":{"core":1,"core_min":1,"version":"x","pid":%d,"generation":1}}`,
		strings.Repeat("A", 43), os.Getpid())
	ends := []func(){
		flood(t, 8, "unixpacket", filepath.Join(i.runtime(), "control.sock"),
			nothing, files, say("rubbish"), say(`{"type":"obey","epoch":99}`), say(hello), say(strings.Repeat("x", 40_000)),
			func(c net.Conn) { io.WriteString(c, hello); say(`{"type":"proof","proof":"AAAA"}`)(c) }),
		flood(t, 8, "unix", filepath.Join(i.runtime(), "admin.sock"),
			nothing, files, say("\x16\x03\x01\x00rubbish\r\n\r\n"), say("POST /stop HTTP/1.1\r\nHost: x\r\n"),
			say("GET /"+strings.Repeat("x", 100_000)), say("POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\nxxx")),
	}
	for range 100 { // who hold places and say nothing
		if c, err := net.Dial("unix", filepath.Join(i.runtime(), "admin.sock")); err == nil {
			defer c.Close()
		}
	}

	i.reload(config)
	i.wantStates("2 serving")
	wantAnswer(t, address)
	if n := besidesPipes(t, i.pid); n > before+200 {
		t.Errorf("%d descriptors are open, %d were", n, before)
	}
	if i.mustScrape()["holdfast_rendezvous_refused_total"] == 0 {
		t.Error("nobody was refused")
	}
	old := i.crash()
	i.succeed(old)
	i.reload(config)
	i.wantStates("3 serving")
	wantAnswer(t, address)

	for _, end := range ends {
		end()
	}
	eventually(t, func() bool { return besidesPipes(t, i.pid) <= before+120 }, func() string {
		return fmt.Sprintf("descriptors to be given back: %d are open, %d were", besidesPipes(t, i.pid), before)
	})
	i.wantHealth(200, 200)
}

// What a client can make a generation hold for it is bounded, however much it sends or
// is sent and does not take: bodies and responses wait in the sockets.
func TestMemoryPerClientIsBounded(t *testing.T) {
	t.Parallel()
	const each = 100          // clients of each kind
	const bound = 128 << 10   // bytes for one, of which 64 KiB may be its head
	const endless = 256 << 20 // bytes
	over := make(chan struct{})
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		chunk := make([]byte, 64<<10)
		if r.Method == "POST" {
			<-over // takes no body
			return
		}
		for sent := 0; sent < endless; sent += len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	t.Cleanup(backend.Close)
	t.Cleanup(func() { close(over) })
	i := serve(t, simple(backend.Listener.Addr().String(), fmt.Sprintf("[process]\nproxy = %q\n", program("plain/holdfast-proxy"))))
	address, pid := i.address("public"), i.status().Generations[0].PID
	wantRunning := func(n int) {
		t.Helper()
		i.wait(fmt.Sprintf("%d connections", n), func(s *status) bool { return s.Generations[0].Connections >= n })
	}
	before, body := private(t, pid), make([]byte, 16<<20) // more than sockets hold
	for range each {
		dial(t, address).Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")) // and reads nothing
		fmt.Fprintf(dial(t, address), "GET / HTTP/1.1\r\nHost: x\r\nX: %s", strings.Repeat("x", 60<<10))
		c := dial(t, address)
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", endless)
		go c.Write(body) // ends with the connection
	}
	wantRunning(3 * each)
	// It has taken what it takes when it does nothing any more.
	used := -1
	eventually(t, func() bool {
		last := used
		used = ticks(t, pid)
		time.Sleep(200 * time.Millisecond)
		return used == last
	}, func() string { return "the generation to wait for its clients" })
	if n := (private(t, pid) - before) / (3 * each); n > bound {
		t.Errorf("%d KiB for each client", n>>10)
	} else {
		t.Logf("%d KiB for each client", n>>10)
	}
}
