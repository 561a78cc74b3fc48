package http1

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// patience bounds every wait of a test that should end at once.
const patience = 10 * time.Second

type handlerFunc func(exchange.Exchange)

func (f handlerFunc) Serve(e exchange.Exchange) { f(e) }

// respond answers with a body of known length.
func respond(t *testing.T, e exchange.Exchange, status int, body string) {
	t.Helper()
	r := &exchange.Response{Status: status, Reason: "Because", ContentLength: int64(len(body))}
	if err := e.Respond(r); err != nil {
		t.Errorf("respond: %v", err)
		return
	}
	if _, err := io.WriteString(e, body); err != nil {
		t.Errorf("write: %v", err)
	}
	if err := e.Finish(nil); err != nil {
		t.Errorf("finish: %v", err)
	}
}

// echo answers with method, target and body of the request.
func echo(t *testing.T) handlerFunc {
	return func(e exchange.Exchange) {
		body, err := io.ReadAll(e)
		if err != nil {
			t.Errorf("read the request: %v", err)
		}
		respond(t, e, 200, e.Request().Method+" "+e.Request().Target+" "+string(body))
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// testServer serves on a loopback socket for as long as the test runs.
type testServer struct {
	*Server
	t       *testing.T
	addr    string
	counted *metrics.Registry
	refused chan Refusal
}

func serve(t *testing.T, limits config.ListenerLimits, h exchange.Handler) *testServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	counted, refused := metrics.NewRegistry(), make(chan Refusal, 100)
	s := NewServer(ServerOptions{Limits: limits, Scheme: "http", Handler: h, Log: quiet(),
		Metrics: NewServerMetrics(counted, "test"), Refused: func(_ exchange.Downstream, r Refusal) { refused <- r }})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { s.Serve(conn, exchange.Downstream{Listener: "test"}) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		s.Close()
		wg.Wait()
		if n := s.Connections(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		if n := s.Requests(); n != 0 {
			t.Errorf("%d requests are left", n)
		}
	})
	return &testServer{Server: s, t: t, addr: l.Addr().String(), counted: counted, refused: refused}
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
	return newPeer(s.t, conn)
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

func (p *peer) closeWrite() { p.conn.(*net.TCPConn).CloseWrite() }

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
