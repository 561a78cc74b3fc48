package http1

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// TestAllAgainOverTLS runs what matters most of the other tests once more, over TLS. With
// HTTP1_TEST_OVER_TLS=1 all that can be are.
func TestAllAgainOverTLS(t *testing.T) {
	t.Parallel()
	if overTLS {
		t.Skip("it is again")
	}
	const matters = "TestCorpus|TestServe|TestAClient|TestPipelin|TestNoRequest|TestExpect|TestHandlerLearns|TestIdle|TestAnAnswer|TestUpstream|TestAnUpstream|TestTheEndOf|TestAnswerWhile|TestReuse|TestFeedingTheServer"
	c := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^("+matters+")")
	c.Env = append(os.Environ(), "HTTP1_TEST_OVER_TLS=1")
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// held holds back what is written behind a hello, while it is to, and sends it with what follows.
type held struct {
	net.Conn
	holds, hello bool
	b            []byte
}

func (h *held) Write(p []byte) (int, error) {
	h.b = append(h.b, p...)
	if h.holds && h.hello {
		return len(p), nil
	}
	b := h.b
	h.b, h.hello = nil, true
	_, err := h.Conn.Write(b)
	return len(p), err
}

// secureServer serves with TLS, and returns its end and a client's raw connection.
func secureServer(t *testing.T, limits config.ListenerLimits, h handlerFunc) (*testServer, *held, *tls.Conn, *streamtest.Clock) {
	t.Helper()
	s, clock := clocked(t, limits, h)
	server, client := sides()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	theirs, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	theirs.SetDeadline(time.Now().Add(patience))
	ours, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	fd := release(t, ours)
	c := new(stream.Conn)
	streamtest.Do(s.loop, func() {
		if err := s.loop.Adopt(c, fd, nil, nil); err != nil {
			t.Error(err)
		}
		s.loop.Tasks.Go(runner(func(tk *task.Task) {
			if err := c.Handshake(tk, server, true); err != nil {
				t.Error(err)
				return
			}
			s.Serve(s.loop, c.PassOn(), remoteOf(theirs))
		}))
	})
	raw := &held{Conn: theirs}
	return s, raw, tls.Client(raw, client), clock
}

const aRequest = "GET /a HTTP/1.1\r\nHost: a.test\r\n\r\n"

// A request that has come with the end of the handshake is answered: the kernel does not tell of
// it any more. So are two in one record.
func TestARequestInTheHandshakesLastFlight(t *testing.T) {
	t.Parallel()
	if overTLS {
		t.Skip("it has TLS of its own")
	}
	s, raw, conn, _ := secureServer(t, noLimits, echo(t))
	raw.holds = true
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	raw.holds = false
	io.WriteString(conn, aRequest+aRequest)
	p := newPeer(t, conn)
	p.want(200, "GET /a ", false)
	p.want(200, "GET /a ", false)
	s.wantOpen(1)
	p.get("/b")
	p.want(200, "GET /b ", false)
	io.WriteString(conn, "\r\n") // nothing
	p.get("/c")
	p.want(200, "GET /c ", false)
}

// What is no request does not keep an idle connection, however much of it there is.
func TestAPartOfARecordIsNoRequest(t *testing.T) {
	t.Parallel()
	if overTLS {
		t.Skip("it has TLS of its own")
	}
	s, raw, conn, clock := secureServer(t, config.ListenerLimits{IdleTimeout: time.Minute}, echo(t))
	p := newPeer(t, conn)
	p.get("/a")
	p.want(200, "GET /a ", false)
	clock.Advance(50 * time.Second)
	raw.Conn.Write([]byte{23, 3, 3, 1, 0, 'x'})
	s.settled()
	streamtest.Do(s.loop, func() { // which has told of no more when the time has come
		raw.Conn.Write([]byte("x"))
		s.loop.SetClock(func() time.Time { return clock.Now().Add(10*time.Second + granularity) })
	})
	s.await(0)
}

// A request that comes while the one before is answered is read to see whether the connection
// can be parked, which it cannot then.
func TestARequestThatComesBehindAnAnswer(t *testing.T) {
	t.Parallel()
	if overTLS {
		t.Skip("it has TLS of its own")
	}
	var conn *tls.Conn
	_, _, conn, _ = secureServer(t, noLimits, func(tk *task.Task, e exchange.Exchange) {
		respond(t, tk, e, 200, e.Request().Target)
		if e.Request().Target == "/a" {
			io.WriteString(conn, strings.Replace(aRequest, "/a", "/b", 1))
			tk.Pause()
			tk.Pause() // it was told of by then
		}
	})
	p := newPeer(t, conn)
	p.get("/a")
	p.want(200, "/a", false)
	p.want(200, "/b", false)
}

// A client that is idle and ends its direction in TLS alone has gone, too.
func TestCloseNotifyEndsAnIdleConnection(t *testing.T) {
	t.Parallel()
	if overTLS {
		t.Skip("it has TLS of its own")
	}
	s, _, conn, _ := secureServer(t, noLimits, echo(t))
	p := newPeer(t, conn)
	p.get("/a")
	p.want(200, "GET /a ", false)
	conn.CloseWrite()
	s.await(0)
	p.wantEOF()
}

// secureClient is a client over TLS with its upstream.
func secureClient(t *testing.T, change func(*tls.Config)) (*testClient, *net.TCPConn) {
	t.Helper()
	server, client := sides()
	server, client = server.Clone(), client.Clone()
	client.ClientSessionCache = tls.NewLRUClientSessionCache(1) // or no ticket is sent
	if change != nil {
		change(server)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	loop, idle := streamtest.New(t), make(chan *Conn, 100)
	c := NewClient(ClientOptions{OnIdle: func(c *Conn) { idle <- c }})
	dialled := streamtest.Begin(loop, func(tk *task.Task) {
		err = c.Dial(tk, loop, addrOf(l), &stream.DialOptions{TLS: client, Until: time.Now().Add(patience)})
	})
	raw, failed := l.Accept()
	if failed != nil {
		t.Fatal(failed)
	}
	late := &held{Conn: raw, holds: true} // tickets
	conn := tls.Server(late, server)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	<-dialled
	late.holds = false
	late.Write(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { streamtest.Do(loop, c.Close) })
	return &testClient{Conn: c, peer: newPeer(t, conn), loop: loop, idle: idle}, raw.(*net.TCPConn)
}

// The tickets that come behind the handshake, and later ones, leave a connection alive.
func TestTicketsLeaveAnIdleConnectionAlive(t *testing.T) {
	t.Parallel()
	// A server that asks for a certificate sends them behind the handshake.
	c, _ := secureClient(t, func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert })
	for range 2 {
		streamtest.Do(c.loop, func() {})
	}
	for range 3 {
		if !c.Alive() {
			t.Fatal("it is not alive")
		}
		e := c.begin()
		if err := e.Send(getRequest()); err != nil {
			t.Fatal(err)
		}
		c.wantBytes("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
		c.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if _, err := e.Receive(); err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(e); string(body) != "ok" || err != nil {
			t.Fatalf("%q, %v", body, err)
		}
		e.Close()
		if !c.isIdle() {
			t.Error("it was not handed back")
		}
	}
	c.send("x") // is nobody's
	eventually(t, "the end", func() bool { return !c.isOpen() })
}

// A body that ends with its connection is whole if the end was said in TLS, and otherwise cut.
// One that says its own end is whole in any case.
func TestTheEndOfABodyOverTLS(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		head  string
		end   func(*tls.Conn, *net.TCPConn)
		whole bool
	}{
		"said":              {"", func(c *tls.Conn, raw *net.TCPConn) { c.Close() }, true},
		"half-closed":       {"", func(c *tls.Conn, raw *net.TCPConn) { c.CloseWrite() }, true},
		"not said":          {"", func(c *tls.Conn, raw *net.TCPConn) { raw.Close() }, false},
		"length, not said":  {"Content-Length: 2\r\n", func(c *tls.Conn, raw *net.TCPConn) { raw.Close() }, true},
		"too short, though": {"Content-Length: 3\r\n", func(c *tls.Conn, raw *net.TCPConn) { c.Close() }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, raw := secureClient(t, nil)
			e := c.begin()
			if err := e.Send(getRequest()); err != nil {
				t.Fatal(err)
			}
			c.wantBytes("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
			c.send("HTTP/1.1 200 OK\r\n" + tt.head + "\r\nok")
			tt.end(c.peer.conn.(*tls.Conn), raw)
			if _, err := e.Receive(); err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(e)
			if string(body) != "ok" || (err == nil) != tt.whole || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%q, %v", body, err)
			}
			e.Close()
		})
	}
}

// TestIdleMemoryOfTLS: an idle connection keeps what crypto/tls does, and no buffer of ours.
func TestIdleMemoryOfTLS(t *testing.T) {
	if overTLS {
		t.Skip("it has TLS of its own")
	}
	// Not parallel: it measures the heap.
	for _, tt := range []struct {
		name    string
		request string
		most    int64
	}{
		{"small", aRequest, 9 << 10},
		{"a full record", "POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 16000\r\n\r\n" + strings.Repeat("x", 16000), 18 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				readAll(tk, e)
				respond(t, tk, e, 200, "x")
			}))
			heap := func() int64 {
				streamtest.Do(s.loop, s.loop.Trim)
				var m runtime.MemStats
				runtime.GC()
				runtime.GC() // the second one empties the pools
				runtime.ReadMemStats(&m)
				return int64(m.HeapAlloc + m.StackInuse)
			}
			server, client := sides()
			const n = 100
			var raws []net.Conn
			one := func() {
				ours, theirs := tcpPair(t)
				t.Cleanup(func() { theirs.Close() })
				theirs.SetDeadline(time.Now().Add(patience))
				fd, c := release(t, ours), new(stream.Conn)
				streamtest.Begin(s.loop, func(tk *task.Task) {
					if err := s.loop.Adopt(c, fd, nil, nil); err != nil {
						t.Error(err)
					}
					if err := c.Handshake(tk, server, true); err != nil {
						t.Error(err)
					}
					s.Serve(s.loop, c.PassOn(), netip.AddrPort{})
				})
				conn := tls.Client(theirs, client)
				io.WriteString(conn, tt.request)
				if r, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || r.StatusCode != 200 {
					t.Errorf("%v, %v", r, err)
				}
				raws = append(raws, theirs) // and nothing of the client's TLS
			}
			for range 10 {
				one()
			}
			before := heap()
			for range n {
				one()
			}
			eventually(t, "idle connections", func() bool { return s.Requests() == 0 })
			got := (heap() - before) / n
			t.Logf("%d bytes for each, with the client's socket", got)
			if got > tt.most {
				t.Errorf("%d bytes for each, want at most %d", got, tt.most)
			}
			runtime.KeepAlive(raws)
		})
	}
}
