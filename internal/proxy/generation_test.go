package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
)

// commander is a supervisor that says what the test wants, with one generation,
// which runs in this process, and the endpoint behind it.
type commander struct {
	t         *testing.T
	conn      *control.Conn
	socket    net.Listener // ours; the generation gets duplicates
	conns     chan *wire   // at the endpoint
	answers   chan *control.Message
	payloads  chan int // descriptors beside answers
	counts    *metrics.File
	bundled   []int // descriptors that come with the bundle
	lastID    uint64
	ended     chan error // what the generation's Run has returned
	leaving   chan struct{}
	done      chan struct{} // closed: it has said so
	terminate chan os.Signal
	log       syncBuffer
	dropped   atomic.Uint64 // lines of the generation's log
	received  sync.WaitGroup

	file       string // the configuration
	number     int    // of the generation
	stores     int    // in the bundle
	rendezvous string // in the bundle
	reunite    func(ctx context.Context, path string, key []byte, hello control.Hello) (*control.Conn, error)

	// run starts the generation with its end of the control channel.
	run func(fd int) (end func())

	beforeReady func() // nil: nothing is to be done

	hello   *control.Hello
	fails   bool   // it cannot be built
	failure string // why
}

const askPage = "GET / HTTP/1.1\nHost: a.example\n\n"

// syncBuffer is a log that is written and read at once.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// command starts a generation and brings it to ready. more are keys of sections:
// "[drain]\nidle_grace = …".
func command(t *testing.T, limits, more string, options ...func(*commander)) *commander {
	t.Helper()
	c := newCommander(t, options)
	c.conns = make(chan *wire, 16)
	endpoint, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			conn, err := endpoint.Accept()
			if err != nil {
				return
			}
			c.conns <- newWire(t, conn)
		}
	})
	t.Cleanup(func() { endpoint.Close(); accepting.Wait() })
	if c.socket, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.socket.Close() })

	file := fmt.Sprintf(`%s
[[listeners]]
name = "public"
address = %q
%s
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/socket" }
websocket = true
cluster = "web"
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "web"
[[clusters]]
name = "web"
endpoints = [%q]
`, more, c.socket.Addr(), limits, endpoint.Addr())
	c.start(file)
	return c
}

func newCommander(t *testing.T, options []func(*commander)) *commander {
	t.Helper()
	c := &commander{t: t, number: 1, answers: make(chan *control.Message, 16), payloads: make(chan int, 16),
		ended: make(chan error, 1), leaving: make(chan struct{}, 1), done: make(chan struct{}), terminate: make(chan os.Signal, 1)}
	counts, err := metrics.NewFile()
	if err != nil {
		t.Fatal(err)
	}
	c.counts, c.bundled, c.run = counts, []int{counts.FD()}, c.runHere
	t.Cleanup(func() { counts.Close() })
	for _, o := range options {
		o(c)
	}
	return c
}

// another starts the next generation, of the same configuration unless an option changes
// that.
func (c *commander) another(options ...func(*commander)) *commander {
	c.t.Helper()
	next := newCommander(c.t, append([]func(*commander){func(next *commander) { next.file, next.number = c.file, c.number+1 }}, options...))
	next.conns, next.socket = c.conns, c.socket
	next.start(next.file)
	return next
}

// alone has the bundle sent without memory to count in.
func alone(c *commander) { c.bundled = nil }

func (c *commander) start(file string) {
	c.t.Helper()
	c.file = file
	ours, theirs, err := control.Pair()
	if err != nil {
		c.t.Fatal(err)
	}
	c.conn = ours
	c.t.Cleanup(func() { ours.Close() })
	fd, err := unix.FcntlInt(theirs.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	theirs.Close()
	if err != nil {
		c.t.Fatal(err)
	}
	end := c.run(fd)
	c.t.Cleanup(func() {
		end() // and with it what we receive
		c.received.Wait()
	})
	c.hello = c.hear(control.TypeHello).Hello
	bundle, err := control.Payload(control.Bundle{
		Path: "a.toml", Config: []byte(file), Generation: c.number, Epoch: 1, Rendezvous: c.rendezvous, Key: []byte("key"), Stores: c.stores,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	defer bundle.Close()
	c.say(&control.Message{Type: control.TypeBundle}, append([]int{int(bundle.Fd())}, c.bundled...)...)
	c.handOver()
	if c.beforeReady != nil {
		c.beforeReady()
	}
	if c.failure = c.hear(control.TypeReady).Error; (c.failure != "") != c.fails {
		c.t.Fatalf("it is ready but for %q", c.failure)
	}
	c.received.Go(func() {
		for {
			m, fds, err := ours.Receive()
			if err != nil {
				return
			}
			c.sort(m, fds)
		}
	})
}

// sort has a message wait for whoever wants it.
func (c *commander) sort(m *control.Message, fds []int) {
	if len(fds) == 1 {
		c.payloads <- fds[0]
	} else {
		control.CloseAll(fds)
	}
	switch m.Type {
	case control.TypeAnswer:
		c.answers <- m
	case control.TypeLeaving:
		c.leaving <- struct{}{}
	case control.TypeDone:
		close(c.done)
	}
}

// runHere has the generation run in this process.
func (c *commander) runHere(fd int) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		c.ended <- proxy.Run(ctx, proxy.Options{Control: fd, Terminate: c.terminate, Reunite: c.reunite, Logger: func(cfg config.Log, _ int) proxy.Logger {
			level := new(slog.LevelVar)
			log := slog.New(slog.NewTextHandler(&c.log, &slog.HandlerOptions{Level: level}))
			return proxy.Logger{Log: log, Level: level, Dropped: c.dropped.Load}
		}})
	})
	return func() {
		cancel()
		running.Wait()
	}
}

func (c *commander) say(m *control.Message, fds ...int) {
	c.t.Helper()
	if err := c.conn.Send(m, bound, fds...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *commander) hear(want control.Type) *control.Message {
	c.t.Helper()
	m, fds, err := c.conn.Receive()
	control.CloseAll(fds)
	if err != nil || m.Type != want {
		c.t.Fatalf("got %+v, %v; want %s", m, err, want)
	}
	return m
}

// handOver gives the generation the listening socket.
func (c *commander) handOver() {
	c.t.Helper()
	raw, err := c.socket.(*net.TCPListener).SyscallConn()
	if err != nil {
		c.t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		c.say(&control.Message{Type: control.TypeListeners, Keys: []string{c.socket.Addr().String()}}, int(fd))
	})
}

// ask waits for the answer.
func (c *commander) ask(m control.Message) *control.Message {
	c.t.Helper()
	c.lastID++
	m.ID = c.lastID
	c.say(&m)
	select {
	case a := <-c.answers:
		if a.Re != m.ID || a.Error != "" {
			c.t.Errorf("%s was answered by %+v", m.Type, a)
		}
		return a
	case <-time.After(bound):
		c.t.Fatalf("%s is not answered", m.Type)
		return nil
	}
}

func (c *commander) serve() { c.t.Helper(); c.ask(control.Message{Type: control.TypeServe}) }

// drain has the generation stay for hold at the least.
func (c *commander) drain(hold time.Duration, removed ...string) {
	c.t.Helper()
	c.ask(control.Message{Type: control.TypeDrain, Within: hold, Keys: removed})
}

func (c *commander) status() *control.Status {
	c.t.Helper()
	return c.ask(control.Message{Type: control.TypeStatus}).Status
}

// wantCounted compares a figure.
// wantCounted waits for a figure: what a loop counts is added at the end of its turn, of
// which nobody tells.
func (c *commander) wantCounted(name string, want int64) {
	c.t.Helper()
	for end := time.Now().Add(bound); ; time.Sleep(time.Millisecond) {
		got := c.figures()[name]
		if got == want {
			return
		}
		if time.Now().After(end) {
			c.t.Errorf("%s is %d, want %d", name, got, want)
			return
		}
	}
}

func (c *commander) dial() *wire {
	c.t.Helper()
	conn, err := net.Dial("tcp", c.socket.Addr().String())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return newWire(c.t, conn)
}

// endpoint waits for the next connection at the endpoint.
func (c *commander) endpoint() *wire {
	c.t.Helper()
	select {
	case w := <-c.conns:
		c.t.Cleanup(func() { w.Close() })
		return w
	case <-time.After(bound):
		c.t.Fatal("nobody connects to the endpoint")
		return nil
	}
}

// exchange makes a request on a connection and returns the head of the answer.
func (c *commander) exchange(w *wire) string {
	c.t.Helper()
	w.say(askPage)
	return c.answer(w)
}

// answer is what the endpoint does with a request that is on its way.
func (c *commander) answer(w *wire) string {
	c.t.Helper()
	server := c.endpoint()
	server.head()
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	return w.head()
}

// tunnel opens one and returns its ends.
func (c *commander) tunnel() (client, server *wire) {
	c.t.Helper()
	client = c.dial()
	client.say(askSocket)
	server = c.endpoint()
	server.head()
	server.say("HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\n\n")
	client.wantHead("101")
	return client, server
}

// carries says something in both directions of a tunnel.
func carries(client, server *wire) {
	client.t.Helper()
	client.say("up\n")
	server.want("up\n")
	server.say("down\n")
	client.want("down\n")
}

// wait returns the error with which the generation has ended.
func (c *commander) wait() error {
	c.t.Helper()
	select {
	case err := <-c.ended:
		return err
	case <-time.After(bound):
		c.t.Fatal("the generation does not end")
		return nil
	}
}

// lives fails if the generation has ended. It answers, so its loop has looked.
func (c *commander) lives() {
	c.t.Helper()
	c.status()
	select {
	case err := <-c.ended:
		c.t.Fatalf("the generation has ended: %v", err)
	default:
	}
}

func TestADrainLeavesTunnelsAlone(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	c.drain(0)
	carries(client, server)
	c.lives()
	if st := c.status(); st.Tunnels != 1 || !st.Draining {
		t.Errorf("got %+v", st)
	}
	client.closeWrite()
	if got := server.rest(); got != "" {
		t.Errorf("the server got %q", got)
	}
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	c.wantCounted("tunnels_ended_total{downstream closed}", 1)
}

func TestTheEndOfATunnelIsALineForWhoLooksForIt(t *testing.T) {
	for level, want := range map[string]int{"info": 0, "debug": 1} {
		c := command(t, "", "")
		c.ask(control.Message{Type: control.TypeLevel, Level: level})
		c.serve()
		client, server := c.tunnel()
		carries(client, server)
		client.closeWrite()
		server.rest()
		server.Close()
		c.drain(0)
		if err := c.wait(); err != nil {
			t.Error(err)
		}
		log := c.log.String()
		if n := strings.Count(log, "tunnel closed"); n != want {
			t.Errorf("%d lines at the level %s, want %d", n, level, want)
		}
		if want == 1 && !containsAll(log, "request_id=", "reason=\"downstream closed\"", "route=\"all:prefix=/socket\"", "received_bytes=4", "sent_bytes=6") {
			t.Errorf("the line does not say what has ended:\n%s", log)
		}
	}
}

func containsAll(s string, words ...string) bool {
	return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(s, w) })
}

func TestADrainingGenerationTakesNoConnection(t *testing.T) {
	c := command(t, "", "[drain]\nidle_grace = \"1h\"\n")
	c.serve()
	idle := c.dial()
	c.exchange(idle)
	c.drain(0)
	late := c.dial() // waits in the queue, which we hold
	for range 3 {
		if n := c.status().Connections; n != 1 {
			t.Errorf("%d connections, want the idle one", n)
		}
	}
	c.socket.(*net.TCPListener).SetDeadline(time.Now().Add(bound))
	conn, err := c.socket.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, want := conn.RemoteAddr().String(), late.LocalAddr().String(); got != want {
		t.Errorf("accepted %s, want %s", got, want)
	}
	// The idle one has its grace, and its last answer says so.
	idle.SetReadDeadline(time.Now().Add(time.Second)) // the grace is exact to a quarter of one
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the idle connection: %v, want it to stay open", err)
	}
	idle.SetReadDeadline(time.Now().Add(bound))
	if head := c.exchange(idle); !strings.Contains(head, "Connection: close\n") {
		t.Errorf("got %s", head)
	}
	idle.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

func TestAGenerationEmptiesTheQueueOfARemovedListener(t *testing.T) {
	c := command(t, "limits = { connections = 1 }", "")
	c.serve()
	first := c.dial()
	c.exchange(first)
	queued := c.dial() // waits: the first one is all that the limit allows
	queued.say(askPage)
	key := c.socket.Addr().String()
	c.socket.Close() // the generation has the last copy
	c.drain(0, key)
	if head := c.answer(queued); !strings.Contains(head, "200 OK") || !strings.Contains(head, "Connection: close\n") {
		t.Errorf("got %s", head)
	}
	queued.Close()
	first.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

// queued is how many connections wait to be accepted.
func (c *commander) queued() (n int) {
	c.t.Helper()
	c.withSocket(func(fd int) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			c.t.Error(err)
			return
		}
		n = int(info.Unacked) // of a listening socket that is its queue (tcp_get_info in the kernel)
	})
	return n
}

func TestConnectionsBeyondTheLimitWait(t *testing.T) {
	c := command(t, "limits = { connections = 2 }", "")
	c.serve()
	client, server := c.tunnel()     // counts too
	for c.status().Connections > 0 { // the codec lets go of it a moment later
	}
	second, third := c.dial(), c.dial()
	third.say(askPage) // nobody reads it
	eventually(t, "nobody is accepted any more, and one is in the queue", func() bool {
		return c.figures()["downstream_connection_limit_reached_total{public}"] > 0 && c.queued() == 1
	})
	c.exchange(second)
	if n, queued := c.status().Connections, c.queued(); n != 1 || queued != 1 {
		t.Errorf("%d connections beside the tunnel, %d in the queue", n, queued)
	}
	client.Close()
	server.rest()
	server.Close()
	if head := c.answer(third); !strings.Contains(head, "200 OK") {
		t.Errorf("got %s", head)
	}
}

func TestAReinstatedGenerationServesAgain(t *testing.T) {
	c := command(t, "", "[drain]\nclose_spread = \"0s\"\nstream_timeout = \"1s\"\n[tunnels]\ndrain_timeout = \"1s\"\n")
	c.serve()
	c.drain(time.Hour)
	c.lives() // although it holds nothing
	c.handOver()
	c.serve()
	client, server := c.tunnel()
	// Both limits would be reached a second from the drain.
	client.SetReadDeadline(time.Now().Add(1500 * time.Millisecond))
	if _, err := client.in.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the tunnel of a generation that serves was closed: %v", err)
	}
	client.SetDeadline(time.Now().Add(bound))
	carries(client, server)
	if st := c.status(); st.Draining {
		t.Errorf("got %+v", st)
	}
}

func TestTheStreamTimeoutCutsResponsesAndNoTunnels(t *testing.T) {
	c := command(t, "", "[drain]\nstream_timeout = \"100ms\"\n")
	c.serve()
	client, server := c.tunnel()
	reader := c.dial()
	reader.say(askPage)
	stream := c.endpoint()
	stream.head()
	stream.say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1\nx\n")
	reader.wantHead("200 OK")
	c.drain(0)
	if rest := reader.rest(); strings.Contains(rest, "0\r\n\r\n") {
		t.Errorf("the response looks whole: %q", rest)
	}
	carries(client, server)
}

func TestAGenerationThatNeverServedEndsWithTheSupervisor(t *testing.T) {
	c := command(t, "", "")
	c.conn.Close()
	if err := c.wait(); !errors.Is(err, proxy.ErrAbandoned) {
		t.Errorf("got %v", err)
	}
}

func TestAServingGenerationOutlivesTheSupervisor(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	c.conn.Close()
	for !strings.Contains(c.log.String(), "the supervisor is gone") {
		select {
		case err := <-c.ended:
			t.Fatalf("it has ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	carries(client, server)
	c.exchange(c.dial())
}

func TestAStopEmptiesTheQueuesAndFinishesWhatIsThere(t *testing.T) {
	c := command(t, "limits = { connections = 1 }", "")
	c.serve()
	first := c.dial()
	c.exchange(first)
	queued := c.dial()
	queued.say(askPage)
	c.socket.Close()
	c.say(&control.Message{Type: control.TypeStop, Within: time.Hour})
	if head := c.answer(queued); !strings.Contains(head, "200 OK") {
		t.Errorf("got %s", head)
	}
	queued.Close()
	first.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

func TestAStopClosesWhatIsLeftWhenItsTimeIsOver(t *testing.T) {
	c := command(t, "", "")
	c.serve()
	client, server := c.tunnel()
	c.say(&control.Message{Type: control.TypeStop, Within: 50 * time.Millisecond})
	if up, down := server.rest(), client.rest(); up != "" || down != "" {
		t.Errorf("the server got %q, the client %q", up, down)
	}
	server.Close()
	client.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	c.wantCounted("tunnels_ended_total{stopped}", 1)
}
