package http1

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/tlstest"
)

// patience bounds every wait of a test that should end at once.
const patience = 10 * time.Second

type handlerFunc func(*task.Task, exchange.Exchange)

func (f handlerFunc) Serve(tk *task.Task, e exchange.Exchange) { f(tk, e) }

// source is whatever a body is read from.
type source interface {
	Read(*task.Task) ([]byte, error)
}

// readAll reads a body to its end.
func readAll(tk *task.Task, body source) (string, error) {
	var all []byte
	for {
		p, err := body.Read(tk)
		all = append(all, p...)
		switch err {
		case nil:
		case io.EOF:
			return string(all), nil
		default:
			return string(all), err
		}
	}
}

// respond answers with a body of known length.
func respond(t *testing.T, tk *task.Task, e exchange.Exchange, status int, body string) {
	t.Helper()
	r := &exchange.Response{Status: status, Reason: "Because", ContentLength: int64(len(body))}
	if err := e.Respond(r); err != nil {
		t.Errorf("respond: %v", err)
		return
	}
	if err := e.Write(tk, []byte(body)); err != nil {
		t.Errorf("write: %v", err)
	}
	if err := e.Finish(tk, nil); err != nil {
		t.Errorf("finish: %v", err)
	}
}

// echo answers with method, target and body of the request.
func echo(t *testing.T) handlerFunc {
	return func(tk *task.Task, e exchange.Exchange) {
		body, err := readAll(tk, e)
		if err != nil {
			t.Errorf("read the request: %v", err)
		}
		respond(t, tk, e, 200, e.Request().Method+" "+e.Request().Target+" "+body)
	}
}

// watching waits for the end of an exchange.
type watching struct {
	tk  *task.Task
	err error
}

func (w *watching) ExchangeOver(err error) {
	w.err = err
	w.tk.Wake()
}

// awaitOver waits until an exchange is over, and returns why.
func awaitOver(tk *task.Task, e exchange.Exchange) error {
	w := &watching{tk: tk}
	e.OnOver(w)
	for w.err == nil {
		tk.Wait()
	}
	return w.err
}

// runner makes a task of a function.
type runner func(*task.Task)

func (r runner) Run(tk *task.Task) { r(tk) }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// overTLS has all tests of servers and clients use TLS where they know nothing of it, but those
// that look at what is on the wire. See TestAllAgainOverTLS.
var overTLS = os.Getenv("HTTP1_TEST_OVER_TLS") != ""

// sides are the configurations of both sides, made once: the tests have no secrets.
var sides = sync.OnceValues(func() (server, client *tls.Config) {
	a := tlstest.NewAuthority(onlyFails{})
	leaf := a.Leaf([]string{"a.test"}).Certificate
	return &tls.Config{Certificates: []tls.Certificate{leaf}}, &tls.Config{RootCAs: a.Pool(), ServerName: "a.test"}
})

// onlyFails is whoever makes what many tests use.
type onlyFails struct{ testing.TB }

func (onlyFails) Helper()           {}
func (onlyFails) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

// withoutTLS skips a test when all are over TLS.
func withoutTLS(t testing.TB, why string) {
	if overTLS {
		t.Skip("not over TLS: " + why)
	}
}

// shook is a connection over which nothing but TLS has gone.
func (s *testServer) shook(fd int, remote netip.AddrPort) {
	server, _ := sides()
	c := new(stream.Conn)
	streamtest.Do(s.loop, func() {
		if err := s.loop.Adopt(c, fd, nil, nil); err != nil {
			s.t.Error(err)
			return
		}
		s.loop.Tasks.Go(runner(func(tk *task.Task) {
			c.Limit(s.loop.Now().Add(patience))
			if c.Handshake(tk, server, true) == nil {
				c.Limit(time.Time{})
				s.Serve(s.loop, c.PassOn(), remote)
			}
		}))
	})
}

// testServer serves on a loopback socket for as long as the test runs.
type testServer struct {
	*Server
	t       *testing.T
	loop    *stream.Loop
	addr    string
	counted *metrics.Registry
	refused chan Refusal
	ended   atomic.Int64 // how often it was said that a connection has ended
}

func serve(t *testing.T, limits config.ListenerLimits, h exchange.Handler) *testServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &testServer{t: t, loop: streamtest.New(t), addr: l.Addr().String(), counted: metrics.NewRegistry(), refused: make(chan Refusal, 100)}
	s.Server = NewServer(ServerOptions{
		Limits: limits, Scheme: "http", Listener: "test", Handler: h, Log: quiet(), Loops: []*stream.Loop{s.loop},
		Metrics: NewServerMetrics(s.counted, "test"), Refused: s.noteRefusal, Ended: func() { s.ended.Add(1) },
	})
	var accepting sync.WaitGroup
	accepting.Go(func() { s.accept(l) })
	t.Cleanup(func() {
		l.Close()
		accepting.Wait()
		s.Close()
		eventually(t, "the end of all connections", func() bool { return s.Connections() == 0 && s.Requests() == 0 })
	})
	return s
}

// noteRefusal keeps a refusal, whose strings are good during the call only.
func (s *testServer) noteRefusal(_ exchange.Downstream, r Refusal) {
	r.Request = &exchange.Request{Method: strings.Clone(r.Request.Method), Target: strings.Clone(r.Request.Target)}
	s.refused <- r
}

func (s *testServer) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		fd := release(s.t, conn)
		if overTLS {
			s.shook(fd, conn.RemoteAddr().(*net.TCPAddr).AddrPort())
			continue
		}
		streamtest.Do(s.loop, func() { s.Serve(s.loop, stream.Passed{FD: fd}, conn.RemoteAddr().(*net.TCPAddr).AddrPort()) })
	}
}

// release takes a socket from Go's poller.
func release(t *testing.T, conn net.Conn) (fd int) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err == nil {
		raw.Control(func(ours uintptr) { fd, err = unix.FcntlInt(ours, unix.F_DUPFD_CLOEXEC, 0) })
	}
	if err != nil {
		t.Error(err)
	}
	conn.Close()
	return fd
}

// clocked is serve with a clock that only the test moves.
func clocked(t *testing.T, limits config.ListenerLimits, h exchange.Handler) (*testServer, *streamtest.Clock) {
	t.Helper()
	s := serve(t, limits, h)
	return s, streamtest.NewClock(s.loop)
}

// granularity is how late a deadline may be, with some more.
const granularity = 300 * time.Millisecond

// wantReceived waits until the server has read so many bytes.
func (s *testServer) wantReceived(n int64) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("%d bytes of %d", func() int64 { r, _ := bytesOf(s.counted); return r }(), n), func() bool { received, _ := bytesOf(s.counted); return received >= n })
	s.settled()
}

// settled waits until the server has done what it can.
func (s *testServer) settled() {
	for range 2 { // the first may be in the midst of a turn
		streamtest.Do(s.loop, func() {})
	}
}

// wantOpen fails when not just so many connections are open.
func (s *testServer) wantOpen(n int) {
	s.t.Helper()
	s.settled()
	if got := s.Connections(); got != n {
		s.t.Errorf("%d connections are open, want %d", got, n)
	}
}

// peer is the other end of a connection in the hands of a test.
type peer struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func newPeer(t *testing.T, conn net.Conn) *peer {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return &peer{t: t, conn: conn, r: bufio.NewReader(conn)}
}

func (s *testServer) dial() *peer {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	return newPeer(s.t, secured(s.t, conn, false))
}

// secured is a connection over which TLS goes, if all tests are over TLS.
func secured(t *testing.T, conn net.Conn, server bool) net.Conn {
	t.Helper()
	if !overTLS {
		return conn
	}
	conn.SetDeadline(time.Now().Add(patience))
	ours, theirs := sides()
	c := &securedPeer{tls.Client(conn, theirs)}
	if server {
		c = &securedPeer{tls.Server(conn, ours)}
	}
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	return c
}

// securedPeer has what tests use of a TCP connection.
type securedPeer struct{ *tls.Conn }

func (p *securedPeer) tcp() *net.TCPConn { return p.NetConn().(*net.TCPConn) }

// tcp is the connection below TLS, if there is any.
func (p *peer) tcp() *net.TCPConn {
	if c, ok := p.conn.(*securedPeer); ok {
		return c.tcp()
	}
	return p.conn.(*net.TCPConn)
}

func (p *securedPeer) CloseWrite() error {
	p.Conn.CloseWrite()
	return p.tcp().CloseWrite()
}

func (p *peer) send(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.conn, s); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// get sends a request without a body.
func (p *peer) get(target string) {
	p.t.Helper()
	p.send("GET " + target + " HTTP/1.1\r\nHost: a.test\r\n\r\n")
}

// response reads a response as net/http sees it, with its whole body.
func (p *peer) response(method string) (*http.Response, string) {
	p.t.Helper()
	r, err := http.ReadResponse(p.r, &http.Request{Method: method})
	if err != nil {
		p.t.Fatalf("read the response: %v", err)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Fatalf("read the response's body: %v", err)
	}
	return r, string(body)
}

// want reads a response and compares status, body, and whether it is the last one.
func (p *peer) want(status int, body string, last bool) *http.Response {
	p.t.Helper()
	r, got := p.response("GET")
	if r.StatusCode != status || r.Close != last || body != "" && got != body {
		p.t.Errorf("got %d %q, last %v; want %d %q, last %v", r.StatusCode, got, r.Close, status, body, last)
	}
	return r
}

// wantBytes reads exactly these bytes.
func (p *peer) wantBytes(want string) {
	p.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(p.r, got)
	if err != nil || string(got) != want {
		p.t.Errorf("got %q, error %v; want %q", got[:n], err, want)
	}
}

// wantEOF expects a proper end and nothing before it.
func (p *peer) wantEOF() {
	p.t.Helper()
	if rest, err := io.ReadAll(p.r); len(rest) > 0 || err != nil {
		p.t.Errorf("got %q, error %v; want the end", rest, err)
	}
}

// wantCut expects the connection to end, properly or not.
func (p *peer) wantCut() {
	p.t.Helper()
	if _, err := io.Copy(io.Discard, p.r); errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Errorf("the connection stays open: %v", err)
	}
}

func (p *peer) closeWrite() { p.conn.(interface{ CloseWrite() error }).CloseWrite() }

// await waits for something that another goroutine does.
func await[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("waited too long for %s", what)
	}
	return v
}

// eventually waits for a condition that nobody signals.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

func lines(s ...string) string { return strings.Join(s, "\r\n") + "\r\n" }

// await waits until just so many connections are open.
func (s *testServer) await(n int) {
	s.t.Helper()
	eventually(s.t, "connections", func() bool { return s.Connections() == n })
	s.settled()
}

func tcpPair(t *testing.T) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if theirs, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

func remoteOf(c net.Conn) netip.AddrPort { return c.RemoteAddr().(*net.TCPAddr).AddrPort() }
