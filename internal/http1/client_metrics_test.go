package http1

import (
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
)

func TestAnUpstreamsConnectionSaysOnceHowItHasEnded(t *testing.T) {
	t.Parallel()
	begin := func(t *testing.T, c *testClient, r *exchange.Request) *driven {
		e, err := c.Exchange()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Send(r); err != nil {
			t.Fatal(err)
		}
		return e
	}
	answered := func(t *testing.T, c *testClient, raw string) {
		e := begin(t, c, getRequest())
		c.send(raw)
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
		end  func(t *testing.T, c *testClient)
		want string
	}{
		"it is closed":           {func(t *testing.T, c *testClient) { c.Close(); c.Close() }, "by us"},
		"its exchange is closed": {func(t *testing.T, c *testClient) { e, _ := c.Exchange(); e.Close(); e.Close(); c.Close() }, "by us"},
		"it is closed when it is idle": {func(t *testing.T, c *testClient) {
			answered(t, c, whole)
			c.Close()
		}, "by us"},
		"it is closed within a response": {func(t *testing.T, c *testClient) {
			e := begin(t, c, getRequest())
			c.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			e.Close()
		}, "by us"},
		"the response is none": {func(t *testing.T, c *testClient) {
			e := begin(t, c, getRequest())
			c.send("nonsense\r\n\r\n")
			_, err := e.Receive()
			wantErr(t, err)
			e.Close()
		}, "by us"},
		"something comes that nobody asked for": {func(t *testing.T, c *testClient) {
			c.send("x")
			eventually(t, "it is not alive", func() bool { return !c.Alive() })
			c.Close()
		}, "by us"},
		"the upstream closes it when it is idle": {func(t *testing.T, c *testClient) {
			answered(t, c, whole)
			c.conn().Close()
			eventually(t, "it is not alive", func() bool { return !c.Alive() })
			c.Close()
		}, "by the upstream"},
		"the upstream resets it when it is idle": {func(t *testing.T, c *testClient) {
			c.conn().SetLinger(0)
			c.conn().Close()
			eventually(t, "it is not alive", func() bool { return !c.Alive() })
			c.Close()
		}, "by the upstream"},
		"the upstream says something and closes it": {func(t *testing.T, c *testClient) {
			streamtest.Do(c.loop, func() { // it notices nothing before all has come
				io.WriteString(c.conn(), "HTTP/1.1 408 Request Timeout\r\n\r\n")
				c.conn().Close()
				for end := time.Now().Add(patience); !hungUp(c.Conn.conn.FD()) && time.Now().Before(end); {
					runtime.Gosched()
				}
			})
			eventually(t, "the end of the connection", func() bool { return !c.isOpen() })
			c.Close()
		}, "by the upstream"},
		"the upstream closes it instead of a response": {func(t *testing.T, c *testClient) {
			e := begin(t, c, getRequest())
			c.conn().Close()
			_, err := e.Receive()
			wantErr(t, err)
			e.Close()
		}, "by the upstream"},
		"the upstream resets it within a response": {func(t *testing.T, c *testClient) {
			e := begin(t, c, getRequest())
			c.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			c.conn().SetLinger(0)
			c.conn().Close()
			_, err := io.Copy(io.Discard, e)
			wantErr(t, err)
			e.Close()
		}, "by the upstream"},
		"the upstream ends a response so": {func(t *testing.T, c *testClient) {
			e := begin(t, c, getRequest())
			c.wantBytes("GET")
			c.send("HTTP/1.1 200 OK\r\n\r\nok")
			c.peer.conn.Close()
			if _, err := e.Receive(); err != nil {
				t.Error(err)
			}
			if _, err := io.Copy(io.Discard, e); err != nil {
				t.Error(err)
			}
			e.Close()
		}, "by the upstream"},
		"it becomes a tunnel": {func(t *testing.T, c *testClient) {
			r := getRequest()
			r.Upgrade = "websocket"
			e := begin(t, c, r)
			c.send("HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
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
			var said []string
			c := dialClientFor(t, nil, ClientOptions{
				OnEnd: func(byPeer bool) {
					if byPeer {
						said = append(said, "by the upstream")
					} else {
						said = append(said, "by us")
					}
				},
				OnSwitch: func() { said = append(said, "switched") },
			})
			tt.end(t, c)
			if !slices.Equal(said, []string{tt.want}) {
				t.Errorf("it said %q, want %q", said, tt.want)
			}
		})
	}
}

func TestEveryByteOfAnUpstreamsConnectionIsCounted(t *testing.T) {
	t.Parallel()
	registry := metrics.NewRegistry()
	traffic := &stream.Traffic{Received: registry.Counter(receivedBytes, "up"), Sent: registry.Counter(sentBytes, "up")}
	idle := make(chan *Conn, 2)
	c := dialClientFor(t, idle, ClientOptions{Traffic: traffic, OnIdle: func(c *Conn) { idle <- c }})
	counting := &countingConn{Conn: c.peer.conn}
	c.peer = newPeer(t, counting)
	body := strings.Repeat("y", 100<<10)
	for range 2 {
		e := c.begin()
		if err := e.Send(getRequest()); err != nil {
			t.Fatal(err)
		}
		for line := ""; line != "\r\n"; {
			var err error
			if line, err = c.r.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		var answering sync.WaitGroup
		answering.Go(func() { c.send("HTTP/1.1 200 OK\r\nContent-Length: 102400\r\n\r\n" + body) })
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
