package proxy_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/http2"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
	"holdfast/internal/upstream"
)

// bound is far more than anything here takes.
const bound = 20 * time.Second

// wire is one end of a connection over which a test speaks in bytes.
type wire struct {
	t *testing.T
	net.Conn
	in *bufio.Reader
}

func newWire(t *testing.T, conn net.Conn) *wire {
	conn.SetDeadline(time.Now().Add(bound))
	return &wire{t, conn, bufio.NewReader(conn)}
}

func (w *wire) say(format string, args ...any) {
	w.t.Helper()
	if _, err := fmt.Fprintf(w, strings.ReplaceAll(format, "\n", "\r\n"), args...); err != nil {
		w.t.Errorf("say: %v", err)
	}
}

// head reads up to an empty line and returns it without carriage returns.
func (w *wire) head() string {
	w.t.Helper()
	var head strings.Builder
	for !strings.HasSuffix(head.String(), "\n\n") {
		line, err := w.in.ReadString('\n')
		if err != nil {
			w.t.Errorf("after %q: %v", head.String(), err)
			return head.String()
		}
		head.WriteString(strings.TrimSuffix(line, "\r\n") + "\n")
	}
	return head.String()
}

func (w *wire) want(text string) {
	w.t.Helper()
	text = strings.ReplaceAll(text, "\n", "\r\n")
	got := make([]byte, len(text))
	if n, err := io.ReadFull(w.in, got); err != nil || string(got) != text {
		w.t.Errorf("got %q (%v), want %q", got[:n], err, text)
	}
}

// rest reads to the end, whatever the end is.
func (w *wire) rest() string {
	b, _ := io.ReadAll(w.in)
	return string(b)
}

func (w *wire) closeWrite() { w.Conn.(*net.TCPConn).CloseWrite() }

// wantHead reads a head and looks for parts of it.
func (w *wire) wantHead(parts ...string) {
	w.t.Helper()
	head := w.head()
	for _, p := range parts {
		if !strings.Contains(head, p) {
			w.t.Errorf("no %q in\n%s", p, head)
		}
	}
}

// site is the whole way of a request: server codec, manager, client codec, and an
// endpoint that the test plays.
type site struct {
	t       *testing.T
	loop    *stream.Loop // of all but the test
	address string
	conns   chan *wire // at the endpoint
	counted *metrics.Registry
	records records

	server *http1.Server

	// grpc is the endpoint, in HTTP/2, which clients speak as well; nil: the test is, in HTTP/1.1.
	grpc http.Handler

	unrecorded bool // there is no access log
	limits     config.ListenerLimits
	idle       time.Duration // the stream_idle_timeout
	change     func(*config.Route)

	starting func() // is called before a tunnel is started; nil: nothing
	*tunnel.Set
}

// Start implements [proxy.TunnelStarter].
func (s *site) Start(spec tunnel.Spec) {
	if s.starting != nil {
		s.starting()
	}
	s.Set.Start(spec)
}

func newSite(t *testing.T, options ...func(*site)) *site {
	store := newStore(t) // is closed when the loop has ended
	s := &site{t: t, loop: streamtest.New(t), conns: make(chan *wire, 16), counted: metrics.NewRegistry()}
	s.limits = config.ListenerLimits{HeadSize: 8 << 10, BodySize: 1 << 30}
	for _, o := range options {
		o(s)
	}
	protocol, endpoint := config.HTTP1, ""
	if s.grpc != nil {
		protocol, endpoint = config.HTTP2, serveHTTP2(t, s.grpc)
	} else {
		endpoint = s.listen(func(conn net.Conn) { s.conns <- newWire(t, conn) })
	}
	everything := to("/", "web")
	everything.StreamIdleTimeout = s.idle
	if s.change != nil {
		s.change(&everything)
	}
	cfg := &config.Config{
		HTTPListeners: []config.Listener{{Name: "public"}},
		VirtualHosts: []config.VirtualHost{{Name: "site", Listeners: []string{"public"}, Domains: []string{"*"},
			Routes: []config.Route{webSocket("/socket", "web"), everything}}},
		Clusters: []config.Cluster{{Name: "web", Protocol: protocol, ConnectTimeout: bound, IdleTimeout: bound,
			RetryBudget: config.RetryBudget{MinConcurrency: 100}, Endpoints: []config.Endpoint{{Address: endpoint}}}},
	}
	loops := []*stream.Loop{s.loop}
	clusters, err := upstream.New(t.Context(), upstream.Options{Config: cfg, Metrics: s.counted, Loops: loops})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clusters.Close)
	log := slog.New(slog.DiscardHandler)
	var manager *proxy.Manager
	s.Set = s.tunnels(store, tunnel.Options{Log: log, OnEnd: func(r tunnel.Record) { manager.TunnelEnded(&r) }, Metrics: s.counted})
	var access *accesslog.Log
	if !s.unrecorded {
		access = s.records.open(t, s.counted)
	}
	manager = proxy.NewManager(proxy.ManagerOptions{
		Routes: route.New(cfg, nil), Clusters: clusters, Listeners: cfg.HTTPListeners, Tunnels: s, Log: log,
		Metrics: s.counted, AccessLog: access,
	})
	s.server = http1.NewServer(http1.ServerOptions{
		Scheme: "http", Listener: "public", Handler: manager, Log: log, Loops: loops, Limits: s.limits,
		Metrics: http1.NewServerMetrics(s.counted, "public"), Refused: manager.Refused,
	})
	serve := s.server.Serve
	if s.grpc != nil {
		counts := http1.NewServerMetrics(s.counted, "two")
		two := http2.NewServer(http2.ServerOptions{
			Scheme: "http", Listener: "public", Handler: manager, Log: log, Loops: loops, Limits: s.limits,
			Metrics: http2.NewServerMetrics(s.counted, "two", counts), Refused: manager.Refused,
		})
		serve = two.Serve
		t.Cleanup(func() {
			two.Close()
			eventually(t, "all connections have ended", func() bool { return two.Connections() == 0 && two.Requests() == 0 })
		})
	}
	s.address = s.listen(func(conn net.Conn) {
		fd, remote := descriptor(t, conn), addrPort(conn.RemoteAddr())
		s.loop.Post(func() { serve(s.loop, stream.Passed{FD: fd}, remote) })
	})
	t.Cleanup(s.server.Close)
	return s
}

// newStore returns what a loop has for tunnels, until the end of the test.
func newStore(t *testing.T) *inflight.Store {
	fd, err := inflight.NewFile(64, 16)
	if err != nil {
		t.Fatal(err)
	}
	store, err := inflight.Open(fd, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// tunnels are relayed by the same loop.
func (s *site) tunnels(store *inflight.Store, o tunnel.Options) (set *tunnel.Set) {
	o.Loops = []tunnel.Loop{{Poller: s.loop.Loop, Store: store}}
	streamtest.Do(s.loop, func() { set = tunnel.NewSet(o) })
	s.t.Cleanup(func() {
		set.CloseAll(tunnel.Stopped, 0)
		select {
		case <-set.Empty():
		case <-time.After(bound):
			s.t.Error("tunnels do not end")
		}
	})
	return set
}

// descriptor takes the socket of a connection out of Go's poller.
func descriptor(t *testing.T, conn net.Conn) (fd int) {
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err == nil {
		err = raw.Control(func(of uintptr) { fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) })
	}
	if err != nil {
		t.Error(err)
	}
	return fd
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// listen serves each connection in a goroutine of its own until the test ends.
func (s *site) listen(serve func(net.Conn)) (address string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { serve(conn) })
		}
	})
	s.t.Cleanup(func() { l.Close(); serving.Wait() })
	return l.Addr().String()
}

func (s *site) client() *wire {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return newWire(s.t, conn)
}

// endpoint waits for the next connection at the endpoint.
func (s *site) endpoint() *wire {
	s.t.Helper()
	select {
	case w := <-s.conns:
		s.t.Cleanup(func() { w.Close() })
		return w
	case <-time.After(bound):
		s.t.Fatal("nobody connects to the endpoint")
		return nil
	}
}

const askSocket = "GET /socket HTTP/1.1\nHost: a.example\nConnection: keep-alive, Upgrade\nUpgrade: WebSocket\nSec-WebSocket-Key: k\n\n"

func TestSocketsKeepAliveAndTrailers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("POST /x?y HTTP/1.1\nHost: a.example\nTransfer-Encoding: chunked\nX-Forwarded-For: 6.6.6.6\n\n3\none\n0\nETag: 1\n\n")
	u := s.endpoint()
	u.wantHead("POST /x?y HTTP/1.1\n", "Host: a.example\n", "X-Forwarded-For: 127.0.0.1\n", "Transfer-Encoding: chunked\n")
	u.want("3\none\n0\nETag: 1\n\n")
	u.say("HTTP/1.1 103 Early Hints\nLink: </a>\n\nHTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n3\ntwo\n0\nETag: 2\n\n")
	c.wantHead("HTTP/1.1 103 Early Hints\n", "Link: </a>\n")
	c.wantHead("HTTP/1.1 200 OK\n", "Transfer-Encoding: chunked\n")
	c.want("3\ntwo\n0\nETag: 2\n\n")

	c.say("GET /again HTTP/1.1\nHost: a.example\n\n")
	u.wantHead("GET /again HTTP/1.1\n") // on the same connection
	u.say("HTTP/1.1 204 No Content\n\n")
	c.wantHead("HTTP/1.1 204 No Content\n")
}

func TestSocketsEventStream(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("GET /events HTTP/1.1\nHost: a.example\n\n")
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 200 OK\nContent-Type: text/event-stream\n\n")
	c.wantHead("HTTP/1.1 200 OK\n", "Content-Type: text/event-stream\n")
	u.say("data: 1")
	c.want("7\ndata: 1\n")
	u.say("data: 2")
	c.want("7\ndata: 2\n")
	u.Close()
	c.want("0\n\n")
}

func TestSocketsEarlyResponse(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("POST / HTTP/1.1\nHost: a.example\nContent-Length: 1000000000\n\n")
	var sending sync.WaitGroup
	sending.Go(func() {
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	defer sending.Wait()
	defer c.Close()
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 413 Content Too Large\nContent-Length: 8\n\ntoo much")
	c.wantHead("HTTP/1.1 413 Content Too Large\n")
	c.want("too much")
}

// Bodies go both ways at once, of many exchanges on the same loop: nobody gets the bytes of
// another.
func TestSocketsBodiesBothWaysAtOnce(t *testing.T) {
	t.Parallel()
	const exchanges, size = 8, 1 << 20
	s := newSite(t)
	var all sync.WaitGroup
	defer all.Wait()
	for i := range exchanges {
		body := make([]byte, size+i)
		rand.NewChaCha8([32]byte{byte(i)}).Read(body)
		c := s.client()
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n", len(body))
		u := s.endpoint()
		u.wantHead("POST / ")
		all.Go(func() { // the endpoint sends back what it gets
			fmt.Fprintf(u, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", len(body))
			if n, err := io.CopyN(u.Conn, u.in, int64(len(body))); err != nil {
				t.Errorf("the endpoint got %d bytes of %d: %v", n, len(body), err)
			}
		})
		all.Go(func() { c.Write(body) })
		all.Go(func() {
			c.wantHead("HTTP/1.1 200 OK\n")
			got := make([]byte, len(body))
			if n, err := io.ReadFull(c.in, got); err != nil || !bytes.Equal(got, body) {
				t.Errorf("the client got %d bytes, %v; equal: %v", n, err, bytes.Equal(got, body))
			}
		})
	}
}

func TestSocketsAClientThatGoesTakesItsUpstreamAlong(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ request, answer string }{
		"before the answer": {"GET / HTTP/1.1\nHost: a.example\n\n", ""},
		"within the answer": {"GET / HTTP/1.1\nHost: a.example\n\n", "HTTP/1.1 200 OK\nContent-Length: 10\n\nhalf"},
		"within its body":   {"POST / HTTP/1.1\nHost: a.example\nContent-Length: 10\n\nhalf", ""},
		"as an upgrade":     {askSocket, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			c := s.client()
			io.WriteString(c, strings.ReplaceAll(tt.request, "\n", "\r\n"))
			u := s.endpoint()
			u.head()
			if tt.answer != "" {
				io.WriteString(u, strings.ReplaceAll(tt.answer, "\n", "\r\n"))
				c.wantHead("200 OK")
				c.want("half")
			}
			c.Conn.(*net.TCPConn).SetLinger(0)
			c.Close()
			if got := u.rest(); strings.TrimPrefix(got, "half") != "" {
				t.Errorf("the endpoint got %q", got)
			}
			eventually(t, "it is counted and recorded", func() bool {
				got := figures(s.counted)
				return got["downstream_requests_cut_total{public,downstream}"] == 1 && got["access_log_records_total{"+s.records.path+"}"] == 1
			})
			wantRecord(t, s.records.read(t)[0], map[string]any{"event": "request", "reason": "the client has gone"})
		})
	}
}

func TestSocketsResponseCutShort(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("GET / HTTP/1.1\nHost: a.example\n\n")
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n3\nabc\n")
	u.Close()
	c.wantHead("HTTP/1.1 200 OK\n")
	if got := c.rest(); got != "3\r\nabc\r\n" {
		t.Errorf("the client got %q: no end should follow", got)
	}
}

func TestSocketsKeptConnectionThatWasClosed(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("GET /1 HTTP/1.1\nHost: a.example\n\n")
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	c.wantHead("200 OK")
	c.say("GET /2 HTTP/1.1\nHost: a.example\n\n")
	u.wantHead("GET /2") // it goes out on the kept connection, which ends without an answer
	u.Close()
	u = s.endpoint()
	u.wantHead("GET /2")
	u.say("HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	c.wantHead("200 OK")

	c.say("POST /3 HTTP/1.1\nHost: a.example\nContent-Length: 0\n\n")
	u.wantHead("POST /3")
	u.Close()
	c.wantHead("503 Service Unavailable")
}

func TestSocketsTunnel(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say(askSocket + "early client bytes")
	u := s.endpoint()
	u.wantHead("GET /socket HTTP/1.1\n", "Upgrade: websocket\n", "Connection: Upgrade\n", "Sec-WebSocket-Key: k\n")
	u.say("HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Accept: a\n\nearly server bytes")
	c.wantHead("HTTP/1.1 101 Switching Protocols\n", "Upgrade: websocket\n", "Sec-WebSocket-Accept: a\n")
	c.want("early server bytes")
	u.want("early client bytes")
	c.closeWrite()
	if got := u.rest(); got != "" {
		t.Errorf("the endpoint got %q", got)
	}
	u.say("still here")
	u.Close()
	if got := c.rest(); got != "still here" {
		t.Errorf("the client got %q", got)
	}
	eventually(t, "the tunnel has ended", func() bool { return figures(s.counted)["route_tunnels_active{site,site:prefix=/socket}"] == 0 })
}

func TestSocketsRefusedUpgradeSmugglesNothing(t *testing.T) {
	t.Parallel()
	const smuggled = "GET /admin HTTP/1.1\nHost: a.example\n\n"
	tests := []struct{ name, target, answer, want string }{
		{"by the upstream", "/socket", "HTTP/1.1 200 OK\nContent-Length: 2\n\nno", "HTTP/1.1 200 OK\r\n"},
		{"by a 101 of another kind", "/socket", "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: foo\n\n", "HTTP/1.1 502 Bad Gateway\r\n"},
		{"by the route", "/plain", "", "HTTP/1.1 403 Forbidden\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			c := s.client()
			c.say(strings.Replace(askSocket, "/socket", tt.target, 1) + smuggled)
			if tt.answer != "" {
				u := s.endpoint()
				u.head()
				u.say("%s", strings.ReplaceAll(tt.answer, "\n", "\r\n"))
				if got := u.rest(); got != "" {
					t.Errorf("behind the refused upgrade the endpoint got %q", got)
				}
			}
			got := c.rest()
			if !strings.HasPrefix(got, tt.want) || !strings.Contains(got, "Connection: close\r\n") || strings.Count(got, "HTTP/1.1") != 1 {
				t.Errorf("the client got %q", got)
			}
			if len(s.conns) > 0 {
				t.Error("something went upstream on another connection")
			}
		})
	}
}

// Until the tunnel has begun, which is when it is deposited, nothing tells the client of it:
// it would be one that ends with this process.
func TestAClientHearsOfItsTunnelWhenThatIsDeposited(t *testing.T) {
	t.Parallel()
	about, goOn := make(chan struct{}), make(chan struct{})
	s := newSite(t, func(s *site) {
		s.starting = func() {
			close(about)
			<-goOn
		}
	})
	c := s.client()
	c.say(askSocket)
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\n\nearly")
	<-about
	c.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
	if n, err := c.Conn.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the client has got %d bytes, %v", n, err)
	}
	c.SetReadDeadline(time.Now().Add(bound))
	close(goOn)
	c.wantHead("HTTP/1.1 101 Switching Protocols\n", "Upgrade: websocket\n")
	c.want("early")
}
