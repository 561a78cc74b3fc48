package http1

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
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
				withoutTLS(t, "what was switched is used as it is")
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
			s := serve(t, limits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				switch {
				case e.Request().Upgrade != "":
					if c, head, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"}); err == nil {
						unix.Write(c.FD, head)
						c.Close(e.Loop())
					}
				case e.Request().Target == "/wait":
					awaitOver(tk, e)
				case e.Request().Target == "/read":
					readAll(tk, e)
				case e.Request().Target == "/pour":
					e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
					for data := make([]byte, 1<<20); ; {
						if err := e.Write(tk, data); err != nil {
							return
						}
					}
				case e.Request().Target == "/abort":
				default:
					respond(t, tk, e, 200, "x")
				}
			}))
			p := s.dial()
			tt.do(t, s, p)
			p.conn.Close()
			eventually(t, "the end of the connection", func() bool {
				return strings.Contains(ends(s.counted), "connections_total[] 1") && !strings.Contains(ends(s.counted), "active")
			})
			got := ""
			for end := time.Now().Add(patience); got != tt.want && time.Now().Before(end); time.Sleep(time.Millisecond) {
				got = ends(s.counted) // one number after the other
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			eventually(t, "what is said of it", func() bool { return s.ended.Load() > 0 }) // when its handler has returned
			if n := s.ended.Load(); n != 1 {
				t.Errorf("it was said %d times that a connection has ended", n)
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
		drain time.Duration // 0: none
		lasts time.Duration
		want  string
	}{
		"the idle timeout":                     {0, time.Hour, "connections_closed_total[holdfast] 1, connections_total[] 1, idle_timeouts_total[] 1"},
		"the drain":                            {time.Minute, time.Minute, "connections_closed_total[holdfast] 1, connections_drained_total[] 1, connections_total[] 1"},
		"the idle timeout within a long drain": {2 * time.Hour, time.Hour, "connections_closed_total[holdfast] 1, connections_total[] 1, idle_timeouts_total[] 1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Hour}, echo(t))
			s.dial()
			s.await(1)
			if tt.drain > 0 {
				s.Drain(tt.drain)
			}
			s.settled()
			clock.Advance(tt.lasts - time.Second)
			s.wantOpen(1)
			clock.Advance(time.Second + granularity)
			s.await(0)
			got := ""
			for end := time.Now().Add(patience); got != tt.want && time.Now().Before(end); time.Sleep(time.Millisecond) {
				got = ends(s.counted) // one number after the other
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
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
	withoutTLS(t, "it looks at the wire")
	large := strings.Repeat("x", 300<<10)
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		body, _ := readAll(tk, e)
		if err := e.Inform(tk, &exchange.Response{Status: 103}); err != nil {
			t.Error(err)
		}
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		e.Write(tk, []byte(body))
		e.Write(tk, []byte(large))
		e.Finish(tk, nil)
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
	withoutTLS(t, "it fills the socket")
	for name, tt := range map[string]struct {
		client func(*testServer, *streamtest.Clock, *peer) // once it has sent its request
		err    error
		sent   uint64
		want   string
	}{
		"it is taken": {
			func(_ *testServer, _ *streamtest.Clock, p *peer) { io.Copy(io.Discard, p.conn); p.conn.Close() }, nil, uint64(len("400 Bad Request\n")),
			"connections_closed_total[holdfast] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the client leaves": {
			func(_ *testServer, _ *streamtest.Clock, p *peer) { p.conn.Close() }, syscall.ECONNRESET, 0,
			"connections_closed_total[downstream] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the client is too slow": {
			func(_ *testServer, clock *streamtest.Clock, _ *peer) { clock.Advance(lingerTime + granularity) }, os.ErrDeadlineExceeded, 0,
			"connections_closed_total[holdfast] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
		"the server closes": {
			func(s *testServer, _ *streamtest.Clock, _ *peer) { s.Close() }, net.ErrClosed, 0,
			"connections_closed_total[holdfast] 1, connections_cut_total[] 1, connections_total[] 1, protocol_errors_total[] 1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// The first request leaves no room for the answer to the second.
			s, clock := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				e.Respond(&exchange.Response{Status: 200})
				e.Finish(tk, nil)
				clog(e)
			}))
			p := s.dial()
			p.get("/")
			const bad = "nonsense\r\n\r\n"
			p.send(bad)
			s.wantReceived(int64(len("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n" + bad)))
			if len(s.refused) > 0 {
				t.Error("nobody has taken it")
			}
			tt.client(s, clock, p)
			r := await(t, "the refusal", s.refused)
			s.await(0)
			got := ""
			for end := time.Now().Add(patience); got != tt.want && time.Now().Before(end); time.Sleep(time.Millisecond) {
				got = ends(s.counted) // one number after the other
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if !errors.Is(r.Err, tt.err) || r.Sent != tt.sent {
				t.Errorf("got %+v, want the error %v and %d bytes", r, tt.err, tt.sent)
			}
		})
	}
}
