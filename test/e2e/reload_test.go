package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"
)

// The main promise: whatever is open stays open and whole, whatever is asked for is
// answered, while the service is reloaded again and again.
func TestNothingIsLostOverManyReloads(t *testing.T) {
	t.Parallel()
	const tunnels, reloads = 100, 25
	up := newBackend(t)
	config := func(n int) string {
		return fmt.Sprintf(`
[reload]
probation = "100ms"
[drain]
idle_grace = "2s"
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { path = "/generation-%d" }
redirect = { path = "/elsewhere" }
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "backend"
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "backend"
[[clusters]]
name = "backend"
endpoints = [%q]
idle_timeout = "1s" # nothing may be left of it in the end
`, n, up)
	}
	i := serve(t, config(0))
	address := i.address("public")
	supervisorFDs := besidesPipes(t, i.cmd.Process.Pid)

	load := startLoad(t, address, tunnels)
	for n := range reloads {
		i.reload(config(n + 1))
		load.awaitProgress()
		wantRedirect(t, address, fmt.Sprintf("/generation-%d", n+1))
	}
	load.stop()
	load.report()

	s := i.wait("one generation", func(s *status) bool { return len(s.Generations) == 1 })
	if s.Generations[0].Number != reloads+1 {
		t.Errorf("generation %d serves, want %d", s.Generations[0].Number, reloads+1)
	}
	// What the serving generation knows of its clusters is kept from the first moment on, but
	// perhaps not yet when we have counted. The program that a rollback would put into service is
	// held from the first reload on.
	supervisorFDs += 2
	eventually(t, func() bool { return besidesPipes(t, i.cmd.Process.Pid) <= supervisorFDs }, func() string {
		return fmt.Sprintf("the supervisor's descriptors to be %d again; now %d", supervisorFDs, besidesPipes(t, i.cmd.Process.Pid))
	})
	if held, has := pipes(t, i.cmd.Process.Pid), pipes(t, s.Generations[0].PID); held > has {
		t.Errorf("the supervisor keeps %d ends of pipes, the only generation has %d", held, has)
	}
	eventually(t, func() bool { return sockets(t, s.Generations[0].PID) <= sockets(t, i.cmd.Process.Pid)+8 }, func() string {
		return fmt.Sprintf("the proxy's sockets to go; now %d", sockets(t, s.Generations[0].PID))
	})
}

func wantRedirect(t *testing.T, address, path string) {
	t.Helper()
	c := dial(t, address)
	defer c.Close()
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path)
	answer, _ := io.ReadAll(c)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 301 ") {
		t.Errorf("%s: the new configuration does not serve: %.200q", path, answer)
	}
}

// newBackend serves WebSocket echoes with two libraries, ordinary answers, and a
// stream. It returns its address.
func newBackend(t *testing.T) string {
	mux := http.NewServeMux()
	mux.HandleFunc("/ws/coder", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(1 << 20)
		for {
			kind, data, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), kind, data) != nil {
				return
			}
		}
	})
	up := gorilla.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}
	mux.HandleFunc("/ws/gorilla", func(w http.ResponseWriter, r *http.Request) {
		c, err := up.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer c.Close()
		for {
			kind, data, err := c.ReadMessage()
			if err != nil || c.WriteMessage(kind, data) != nil {
				return
			}
		}
	})
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		io.Copy(h, r.Body)
		fmt.Fprintf(w, "%x", h.Sum(nil))
	})
	// Lines with running numbers, as fast as they are asked for by time.
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for n := range 100 {
			fmt.Fprintf(w, "%d\n", n)
			w.(http.Flusher).Flush()
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			}
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello "+r.URL.Path) })
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// load is clients of all kinds that talk without a pause and note every fault.
type load struct {
	t       *testing.T
	ctx     context.Context // done: finish what is under way
	finish  context.CancelFunc
	clients sync.WaitGroup

	echoed, answered, streamed, opened atomic.Int64

	mu     sync.Mutex
	faults []string
}

// startLoad starts the clients and waits until each tunnel is open.
func startLoad(t *testing.T, address string, tunnels int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{t: t, ctx: ctx, finish: cancel}
	t.Cleanup(l.stop)
	var open sync.WaitGroup
	open.Add(tunnels)
	for n := range tunnels {
		l.clients.Go(func() {
			var err error
			if n%2 == 0 {
				err = l.coder(address, uint64(n), open.Done)
			} else {
				err = l.gorilla(address, uint64(n), open.Done)
			}
			if err != nil {
				l.fault("tunnel %d: %v", n, err)
			}
		})
	}
	open.Wait()
	kept := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4}, Timeout: patience}
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	for n := range 4 {
		l.clients.Go(func() { l.requests(kept, address, uint64(n)) })
	}
	for n := range 2 {
		l.clients.Go(func() { l.requests(fresh, address, uint64(100+n)) })
		l.clients.Go(func() { l.streams(fresh, address) })
	}
	l.clients.Go(func() { l.tunnelsThatComeAndGo(address) })
	t.Cleanup(kept.CloseIdleConnections)
	return l
}

func (l *load) fault(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.faults) < 50 {
		l.faults = append(l.faults, fmt.Sprintf(format, args...))
	}
}

// awaitProgress waits until every kind of traffic has moved on.
func (l *load) awaitProgress() {
	l.t.Helper()
	echoed, answered := l.echoed.Load(), l.answered.Load()
	eventually(l.t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.faults) > 0 || l.echoed.Load() > echoed+200 && l.answered.Load() > answered+20
	}, func() string { return "traffic to go on" })
}

// stop lets every client finish what it has begun, and close.
func (l *load) stop() {
	l.finish()
	l.clients.Wait()
}

// report fails the test for every fault. The figures are for the eye.
func (l *load) report() {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t.Logf("%d messages echoed, %d requests answered, %d lines streamed, %d tunnels opened on the way",
		l.echoed.Load(), l.answered.Load(), l.streamed.Load(), l.opened.Load())
	for _, f := range l.faults {
		l.t.Error(f)
	}
}

// faultsOfTunnels yields what went wrong on the tunnels that were open first.
func (l *load) faultsOfTunnels() iter.Seq[string] {
	return func(yield func(string) bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, f := range l.faults {
			if strings.HasPrefix(f, "tunnel ") && !yield(f) {
				return
			}
		}
	}
}

// message is the nth message of a conversation: its bytes depend on their place, so
// that a lost, doubled or swapped one shows.
func message(r *rand.Rand) []byte {
	b := make([]byte, 0, 2048)
	for range 1 + r.IntN(cap(b)/8) {
		b = binary.NativeEndian.AppendUint64(b, r.Uint64())
	}
	return b
}

// tooLong bounds one round trip of a tunnel.
func tooLong() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

func (l *load) coder(address string, seed uint64, opened func()) error {
	once := sync.OnceFunc(opened)
	defer once()
	ctx, cancel := tooLong()
	c, _, err := websocket.Dial(ctx, "ws://"+address+"/ws/coder", nil)
	cancel()
	if err != nil {
		return err
	}
	defer c.CloseNow()
	once()
	r := rand.New(rand.NewPCG(seed, 1))
	for l.ctx.Err() == nil {
		want := message(r)
		ctx, cancel := tooLong()
		err := c.Write(ctx, websocket.MessageBinary, want)
		var got []byte
		if err == nil {
			_, got, err = c.Read(ctx)
		}
		cancel()
		if err != nil {
			return err
		}
		if string(got) != string(want) {
			return fmt.Errorf("sent %d bytes, got %d other ones", len(want), len(got))
		}
		l.echoed.Add(1)
		pace(r)
	}
	return c.Close(websocket.StatusNormalClosure, "")
}

func (l *load) gorilla(address string, seed uint64, opened func()) error {
	once := sync.OnceFunc(opened)
	defer once()
	d := gorilla.Dialer{HandshakeTimeout: patience}
	c, _, err := d.Dial("ws://"+address+"/ws/gorilla", nil)
	if err != nil {
		return err
	}
	defer c.Close()
	once()
	r := rand.New(rand.NewPCG(seed, 2))
	for l.ctx.Err() == nil {
		want := message(r)
		c.SetReadDeadline(time.Now().Add(patience))
		if err := c.WriteMessage(gorilla.BinaryMessage, want); err != nil {
			return err
		}
		_, got, err := c.ReadMessage()
		if err != nil {
			return err
		}
		if string(got) != string(want) {
			return fmt.Errorf("sent %d bytes, got %d other ones", len(want), len(got))
		}
		l.echoed.Add(1)
		pace(r)
	}
	return nil
}

// pace keeps a hundred clients from using the whole machine up.
func pace(r *rand.Rand) { time.Sleep(time.Duration(5+r.IntN(20)) * time.Millisecond) }

// requests posts bodies and checks that the answer is about these.
func (l *load) requests(client *http.Client, address string, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 3))
	for l.ctx.Err() == nil {
		body := message(r)
		want := fmt.Sprintf("%x", sha256.Sum256(body))
		resp, err := client.Post("http://"+address+"/sum", "application/octet-stream", strings.NewReader(string(body)))
		if err != nil {
			l.fault("request: %v", err)
			return
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 || string(got) != want {
			l.fault("request: %d %.100q, %v", resp.StatusCode, got, err)
			return
		}
		l.answered.Add(1)
		pace(r)
	}
}

// streams reads streaming answers, which outlast reloads, to their ends.
func (l *load) streams(client *http.Client, address string) {
	for l.ctx.Err() == nil {
		resp, err := client.Get("http://" + address + "/stream")
		if err != nil {
			l.fault("stream: %v", err)
			return
		}
		lines := bufio.NewScanner(resp.Body)
		n := 0
		for lines.Scan() && lines.Text() == fmt.Sprint(n) {
			n++
			l.streamed.Add(1)
		}
		resp.Body.Close()
		if n != 100 || lines.Err() != nil {
			l.fault("stream: ended after %d lines of 100: %v", n, lines.Err())
			return
		}
	}
}

// tunnelsThatComeAndGo opens tunnels while the generations change.
func (l *load) tunnelsThatComeAndGo(address string) {
	for seed := uint64(1000); l.ctx.Err() == nil; seed++ {
		ctx, cancel := tooLong()
		c, _, err := websocket.Dial(ctx, "ws://"+address+"/ws/coder", nil)
		if err == nil {
			if err = c.Write(ctx, websocket.MessageText, []byte("x")); err == nil {
				_, _, err = c.Read(ctx)
			}
			c.Close(websocket.StatusNormalClosure, "")
		}
		cancel()
		if err != nil {
			l.fault("a new tunnel: %v", err)
			return
		}
		l.opened.Add(1)
		time.Sleep(5 * time.Millisecond)
	}
}

// descriptors counts what a process has open.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	return len(opened(t, pid))
}

// sockets counts a process's sockets.
func sockets(t *testing.T, pid int) int {
	t.Helper()
	return openedAs(t, pid, "socket:")
}

// besidesPipes counts what a process has open that is no pipe: how many pipes a generation
// gets is a matter of what other programs of the same user have just then.
func besidesPipes(t *testing.T, pid int) int {
	t.Helper()
	return descriptors(t, pid) - pipes(t, pid)
}

// pipes counts a process's ends of pipes.
func pipes(t *testing.T, pid int) int {
	t.Helper()
	return openedAs(t, pid, "pipe:")
}

func openedAs(t *testing.T, pid int, kind string) int {
	n := 0
	for _, f := range opened(t, pid) {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name())); strings.HasPrefix(to, kind) {
			n++
		}
	}
	return n
}

func opened(t *testing.T, pid int) []os.DirEntry {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return all
}
