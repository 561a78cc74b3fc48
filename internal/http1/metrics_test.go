package http1

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// ends is how connections have ended, as it is counted: every figure that is not 0,
// without bytes and durations.
func ends(r *metrics.Registry) string {
	var all []string
	for _, f := range r.Families() {
		for _, s := range f.Series {
			if s.Value != 0 && f.Desc.Unit != metrics.Seconds && !strings.Contains(f.Desc.Name, "bytes") {
				name := strings.TrimPrefix(f.Desc.Name, "holdfast_downstream_")
				all = append(all, fmt.Sprint(name, s.Labels[1:], " ", s.Value))
			}
		}
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func TestTheEndOfAConnectionIsCounted(t *testing.T) {
	t.Parallel()
	limits := config.ListenerLimits{HeadSize: 4 << 10}
	tests := []struct {
		name string
		do   func(t *testing.T, s *testServer, p *peer)
		want string
	}{
		{
			"the client closes an idle connection",
			func(t *testing.T, s *testServer, p *peer) { p.get("/"); p.want(200, "", false); p.conn.Close() },
			"connections_closed_total[downstream] 1, connections_total[] 1",
		},
		{
			"the client never says anything",
			func(t *testing.T, s *testServer, p *peer) { p.conn.Close() },
			"connections_closed_total[downstream] 1, connections_total[] 1",
		},
		{
			"the client leaves within a head",
			func(t *testing.T, s *testServer, p *peer) { p.send("GET / HT"); p.conn.Close() },
			"connections_closed_total[downstream] 1, connections_total[] 1",
		},
		{
			"the client leaves while it is being answered",
			func(t *testing.T, s *testServer, p *peer) {
				p.get("/wait")
				eventually(t, "the request", func() bool { return s.Requests() == 1 })
				p.conn.Close()
			},
			"connections_closed_total[downstream] 1, connections_total[] 1",
		},
		{
			"the client leaves in the middle of its body",
			func(t *testing.T, s *testServer, p *peer) {
				p.send("POST /read HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\nabc")
				p.conn.Close()
			},
			"connections_closed_total[downstream] 1, connections_total[] 1",
		},
		{
			"the client leaves while it is sent a response, and nobody reads from it",
			func(t *testing.T, s *testServer, p *peer) {
				p.send("POST /pour HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\n")
				if _, err := p.r.ReadString('\n'); err != nil {
					t.Error(err)
				}
			},
			"connections_closed_total[downstream] 1, connections_total[] 1",
		},
		{
			"the client wants no more",
			func(t *testing.T, s *testServer, p *peer) {
				p.send("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
				p.want(200, "", true)
				p.wantEOF()
			},
			"connections_closed_total[holdfast] 1, connections_total[] 1",
		},
		{
			"the handler leaves the response unfinished",
			func(t *testing.T, s *testServer, p *peer) { p.get("/abort"); p.wantCut() },
			"connections_closed_total[holdfast] 1, connections_total[] 1",
		},
		{
			"the head is malformed",
			func(t *testing.T, s *testServer, p *peer) {
				p.send("GET / HTTP/1.1\r\n\r\n")
				p.want(400, "", true)
				p.conn.Close()
			},
			"connections_closed_total[holdfast] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		{
			"the head is too large",
			func(t *testing.T, s *testServer, p *peer) {
				p.send("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 5<<10))
				p.want(431, "", true)
				p.conn.Close()
			},
			"connections_closed_total[holdfast] 1, connections_total[] 1",
		},
		{
			"the body is malformed",
			func(t *testing.T, s *testServer, p *peer) {
				p.send("POST /read HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\nx")
				p.wantCut()
			},
			"connections_closed_total[holdfast] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		{
			"the server drains behind a response",
			func(t *testing.T, s *testServer, p *peer) {
				eventually(t, "the connection", func() bool { return s.Connections() == 1 })
				s.Drain(time.Hour)
				p.get("/")
				p.want(200, "", true)
				p.wantEOF()
			},
			"connections_closed_total[holdfast] 1, connections_drained_total[] 1, connections_total[] 1",
		},
		{
			"the server drains, and the client wanted no more anyway",
			func(t *testing.T, s *testServer, p *peer) {
				eventually(t, "the connection", func() bool { return s.Connections() == 1 })
				s.Drain(time.Hour)
				p.send("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
				p.want(200, "", true)
				p.wantEOF()
			},
			"connections_closed_total[holdfast] 1, connections_total[] 1",
		},
		{
			"the server closes",
			func(t *testing.T, s *testServer, p *peer) {
				p.get("/wait")
				eventually(t, "the request", func() bool { return s.Requests() == 1 })
				s.Close()
				s.Close()
				p.wantCut()
			},
			"connections_closed_total[holdfast] 1, connections_cut_total[] 1, connections_total[] 1",
		},
		{
			"the connection becomes a tunnel",
			func(t *testing.T, s *testServer, p *peer) {
				p.send(upgradeRequest + "\r\n")
				if _, err := p.r.ReadString('\n'); err != nil {
					t.Error(err)
				}
			},
			"connections_total[] 1",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, limits, handlerFunc(func(e exchange.Exchange) {
				switch {
				case e.Request().Upgrade != "":
					if conn, head, _, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"}); err == nil {
						conn.Write(head)
						conn.Close()
					}
				case e.Request().Target == "/wait":
					<-e.Context().Done()
				case e.Request().Target == "/read":
					io.Copy(io.Discard, e)
				case e.Request().Target == "/pour":
					e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
					for data := make([]byte, 1<<20); ; {
						if _, err := e.Write(data); err != nil {
							return
						}
					}
				case e.Request().Target == "/abort":
				default:
					respond(t, e, 200, "x")
				}
			}))
			p := s.dial()
			tt.do(t, s, p)
			p.conn.Close()
			eventually(t, "the end of the connection", func() bool {
				return strings.Contains(ends(s.counted), "connections_total[] 1") && !strings.Contains(ends(s.counted), "active")
			})
			if got := ends(s.counted); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			lasted := uint64(0)
			for _, f := range s.counted.Families() {
				for i := range f.Series[0].Buckets {
					lasted += f.Series[0].Buckets[i]
				}
			}
			if lasted != 1 {
				t.Errorf("%d durations of connections, want 1", lasted)
			}
		})
	}
}

func TestTheEndOfAnIdleConnectionIsCountedByItsCause(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		drain bool
		want  string
	}{
		"the idle timeout": {false, "connections_closed_total[holdfast] 1, connections_total[] 1, idle_timeouts_total[] 1"},
		"the drain":        {true, "connections_closed_total[holdfast] 1, connections_drained_total[] 1, connections_total[] 1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				counted := metrics.NewRegistry()
				ours, theirs := net.Pipe()
				s := NewServer(ServerOptions{Limits: config.ListenerLimits{IdleTimeout: time.Hour}, Scheme: "http", Handler: echo(t), Log: quiet(),
					Metrics: NewServerMetrics(counted, "test")})
				var wg sync.WaitGroup
				wg.Go(func() { s.Serve(ours, exchange.Downstream{}) })
				synctest.Wait()
				if tt.drain {
					s.Drain(time.Minute)
				}
				wg.Wait()
				theirs.Close()
				if got := ends(counted); got != tt.want {
					t.Errorf("got  %s\nwant %s", got, tt.want)
				}
			})
		})
	}
}

// bytesOf returns what was received and sent.
func bytesOf(r *metrics.Registry) (received, sent int64) {
	for _, f := range r.Families() {
		switch f.Desc.Name {
		case "holdfast_downstream_received_bytes_total":
			received = f.Series[0].Value
		case "holdfast_downstream_sent_bytes_total":
			sent = f.Series[0].Value
		}
	}
	return received, sent
}

// countingConn counts at the client what passes.
type countingConn struct {
	net.Conn
	in, out int64
}

func (c *countingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.in += int64(n)
	return n, err
}

func (c *countingConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out += int64(n)
	return n, err
}

// Small and large bodies of known and unknown length, an interim response and a
// refusal take all the ways by which bytes leave and come.
func TestEveryByteOfAConnectionIsCounted(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("x", 300<<10)
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		n, _ := io.Copy(io.Discard, e)
		if err := e.Inform(&exchange.Response{Status: 103}); err != nil {
			t.Error(err)
		}
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		io.WriteString(e, large[:n])
		io.WriteString(e, large)
		e.Finish(nil)
	}))
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	c := &countingConn{Conn: conn}
	p := newPeer(t, c)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		p.send("PUT / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 307200\r\n\r\n" + large)
		p.send("PUT / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
		p.send("nonsense\r\n\r\n")
	}()
	if _, err := io.Copy(io.Discard, p.r); err != nil {
		t.Error(err)
	}
	await(t, "the client", sent)
	p.conn.Close() // not before: a client that closes within an exchange has gone
	eventually(t, "the end of the connection", func() bool { return s.Connections() == 0 })
	if received, sent := bytesOf(s.counted); received != c.out || sent != c.in {
		t.Errorf("%d bytes received and %d sent, the client has sent %d and received %d", received, sent, c.out, c.in)
	}
}

func TestARefusalTellsWhatIsKnown(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{HeadSize: 4 << 10, BodySize: 1 << 10}, echo(t))
	for name, tt := range map[string]struct {
		head                string
		status              int
		method, target, cut string // the latter of the reason
	}{
		"all of the head":       {"PUT /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9999\r\n\r\n", 413, "PUT", "/a", "a Content-Length beyond"},
		"the request line":      {"GET http://a.test/b HTTP/1.0\r\nHost: b.test\r\n\r\n", 400, "GET", "/b", "disagree"},
		"a head without an end": {"GET /c HTTP/1.1\r\nX: " + strings.Repeat("x", 5<<10), 431, "GET", "/c", "more than 4096 bytes"},
		"nothing":               {"nonsense\r\n\r\n", 400, "", "", "request line"},
		"no line":               {"GET /" + strings.Repeat("x", 5<<10), 414, "", "", "more than 4096 bytes"},
	} {
		before := time.Now()
		p := s.dial()
		p.send(tt.head)
		_, body := p.response("GET")
		p.conn.Close()
		r := await(t, "the refusal", s.refused)
		if r.Status != tt.status || r.Request.Method != tt.method || r.Request.Target != tt.target || !strings.Contains(r.Reason, tt.cut) {
			t.Errorf("%s: got %+v of %+v", name, r, r.Request)
		}
		if r.Start.Before(before) || r.Sent != uint64(len(body)) {
			t.Errorf("%s: began %v, sent %d; want after %v, and %d", name, r.Start, r.Sent, before, len(body))
		}
	}
}

// A refusal whose client does not read it is told apart by whose doing its end is.
func TestARefusalTellsWhetherItWasTaken(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		client func(s *Server, conn net.Conn) // once it has sent its request
		err    error
		sent   uint64
		want   string
	}{
		"it is taken": {
			func(_ *Server, conn net.Conn) { io.Copy(io.Discard, conn) }, nil, uint64(len("400 Bad Request\n")),
			"connections_closed_total[holdfast] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the client leaves": {
			func(_ *Server, conn net.Conn) { conn.Close() }, io.ErrClosedPipe, 0,
			"connections_closed_total[downstream] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the client leaves within it": {
			func(_ *Server, conn net.Conn) { io.ReadFull(conn, make([]byte, 20)); conn.Close() }, io.ErrClosedPipe, 0,
			"connections_closed_total[downstream] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the client is too slow": {
			func(*Server, net.Conn) { time.Sleep(lingerTime) }, os.ErrDeadlineExceeded, 0,
			"connections_closed_total[holdfast] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the server closes": {
			func(s *Server, _ net.Conn) { s.Close() }, net.ErrClosed, 0,
			"connections_closed_total[holdfast] 1, connections_cut_total[] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				counted := metrics.NewRegistry()
				ours, theirs := net.Pipe()
				var refused []Refusal
				s := NewServer(ServerOptions{Scheme: "http", Handler: echo(t), Log: quiet(), Metrics: NewServerMetrics(counted, "test"),
					Refused: func(_ exchange.Downstream, r Refusal) { refused = append(refused, r) }})
				var wg sync.WaitGroup
				wg.Go(func() { s.Serve(ours, exchange.Downstream{}) })
				io.WriteString(theirs, "nonsense\r\n\r\n")
				synctest.Wait()
				tt.client(s, theirs)
				wg.Wait()
				theirs.Close()
				if got := ends(counted); got != tt.want {
					t.Errorf("got  %s\nwant %s", got, tt.want)
				}
				if len(refused) != 1 || !errors.Is(refused[0].Err, tt.err) || refused[0].Sent != tt.sent {
					t.Errorf("got %+v, want the error %v and %d bytes", refused, tt.err, tt.sent)
				}
			})
		})
	}
}

func TestAnUpstreamsConnectionSaysOnceHowItHasEnded(t *testing.T) {
	t.Parallel()
	begin := func(t *testing.T, c *Conn, r *exchange.Request) exchange.Upstream {
		e, err := c.Exchange()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Send(r); err != nil {
			t.Fatal(err)
		}
		return e
	}
	answered := func(t *testing.T, c *Conn, p *peer, raw string) {
		e := begin(t, c, getRequest())
		p.send(raw)
		if _, err := e.Receive(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, e); err != nil {
			t.Fatal(err)
		}
		e.Close()
	}
	const whole = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	for name, tt := range map[string]struct {
		end  func(t *testing.T, c *Conn, p *peer)
		want string
	}{
		"it is closed":           {func(t *testing.T, c *Conn, p *peer) { c.Close(); c.Close() }, "by us"},
		"its exchange is closed": {func(t *testing.T, c *Conn, p *peer) { e, _ := c.Exchange(); e.Close(); e.Close(); c.Close() }, "by us"},
		"it is closed when it is idle": {func(t *testing.T, c *Conn, p *peer) {
			answered(t, c, p, whole)
			c.Close()
		}, "by us"},
		"it is closed within a response": {func(t *testing.T, c *Conn, p *peer) {
			e := begin(t, c, getRequest())
			p.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			e.Close()
		}, "by us"},
		"the response is none": {func(t *testing.T, c *Conn, p *peer) {
			e := begin(t, c, getRequest())
			p.send("nonsense\r\n\r\n")
			_, err := e.Receive()
			wantErr(t, err)
			e.Close()
		}, "by us"},
		"something comes that nobody asked for": {func(t *testing.T, c *Conn, p *peer) {
			p.send("x")
			eventually(t, "it is not alive", func() bool { return !c.Alive() })
			c.Close()
		}, "by us"},
		"the upstream closes it when it is idle": {func(t *testing.T, c *Conn, p *peer) {
			answered(t, c, p, whole)
			p.conn.Close()
			eventually(t, "it is not alive", func() bool { return !c.Alive() })
			c.Close()
		}, "by the upstream"},
		"the upstream resets it when it is idle": {func(t *testing.T, c *Conn, p *peer) {
			p.conn.(*net.TCPConn).SetLinger(0)
			p.conn.Close()
			eventually(t, "it is not alive", func() bool { return !c.Alive() })
			c.Close()
		}, "by the upstream"},
		"the upstream says something and closes it": {func(t *testing.T, c *Conn, p *peer) {
			p.send("HTTP/1.1 408 Request Timeout\r\n\r\n")
			p.conn.Close()
			eventually(t, "the end has come", c.leftByPeer)
			c.Close()
		}, "by the upstream"},
		"the upstream closes it instead of a response": {func(t *testing.T, c *Conn, p *peer) {
			e := begin(t, c, getRequest())
			p.conn.Close()
			_, err := e.Receive()
			wantErr(t, err)
			e.Close()
		}, "by the upstream"},
		"the upstream resets it within a response": {func(t *testing.T, c *Conn, p *peer) {
			e := begin(t, c, getRequest())
			p.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			p.conn.(*net.TCPConn).SetLinger(0)
			p.conn.Close()
			_, err := io.Copy(io.Discard, e)
			wantErr(t, err)
			e.Close()
		}, "by the upstream"},
		"the upstream ends a response so": {func(t *testing.T, c *Conn, p *peer) {
			e := begin(t, c, getRequest())
			p.wantBytes("GET")
			p.send("HTTP/1.1 200 OK\r\n\r\nok")
			p.conn.Close()
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			if _, err := io.Copy(io.Discard, e); err != nil {
				t.Error(err)
			}
			e.Close()
		}, "by the upstream"},
		"it becomes a tunnel": {func(t *testing.T, c *Conn, p *peer) {
			r := getRequest()
			r.Upgrade = "websocket"
			e := begin(t, c, r)
			p.send("HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			conn, _, err := e.Switch()
			if err != nil {
				t.Error(err)
			}
			e.Close()
			c.Close()
			conn.Close()
		}, "switched"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ours, theirs := tcpPair(t)
			var said []string
			c := NewClient(ours, ClientOptions{
				OnEnd: func(byPeer bool) {
					if byPeer {
						said = append(said, "by the upstream")
					} else {
						said = append(said, "by us")
					}
				},
				OnSwitch: func() { said = append(said, "switched") },
			})
			tt.end(t, c, newPeer(t, theirs))
			if !slices.Equal(said, []string{tt.want}) {
				t.Errorf("it said %q, want %q", said, tt.want)
			}
		})
	}
}

func TestEveryByteOfAnUpstreamsConnectionIsCounted(t *testing.T) {
	t.Parallel()
	ours, theirs := tcpPair(t)
	registry := metrics.NewRegistry()
	traffic := Traffic{Received: registry.Counter(receivedBytes, "up"), Sent: registry.Counter(sentBytes, "up")}
	idle := make(chan *Conn, 2)
	c := NewClient(ours, ClientOptions{Traffic: traffic, OnIdle: func(c *Conn) { idle <- c }})
	defer c.Close()
	counting := &countingConn{Conn: theirs}
	p := newPeer(t, counting)
	body := strings.Repeat("y", 100<<10)
	for range 2 {
		e, err := c.Exchange()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Send(getRequest()); err != nil {
			t.Fatal(err)
		}
		for line := ""; line != "\r\n"; {
			if line, err = p.r.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		var answering sync.WaitGroup
		answering.Go(func() { p.send("HTTP/1.1 200 OK\r\nContent-Length: 102400\r\n\r\n" + body) })
		if _, err := e.Receive(); err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, e); n != int64(len(body)) || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		answering.Wait()
		e.Finish(nil)
		e.Close()
		await(t, "the connection", idle)
	}
	if traffic.Sent.Value() != uint64(counting.in) || traffic.Received.Value() != uint64(counting.out) {
		t.Errorf("sent %d, received %d; the upstream has received %d and sent %d", traffic.Sent.Value(), traffic.Received.Value(), counting.in, counting.out)
	}
}
