package upstream_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// h2c is a server with HTTP/2 without TLS, and counts its connections.
type h2c struct {
	*httptest.Server
	conns atomic.Int32
	left  chan struct{} // for each that has ended
}

func newH2C(t testing.TB, streams int, handler http.HandlerFunc) *h2c {
	s := &h2c{Server: httptest.NewUnstartedServer(handler), left: make(chan struct{}, 1000)}
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: streams}
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.conns.Add(1)
		case http.StateClosed:
			s.left <- struct{}{}
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// h2clusters is a cluster of that server, on two loops.
func h2clusters(t testing.TB, at string, change func(c *config.Cluster)) (*upstream.Endpoint, []*stream.Loop, *metrics.Registry) {
	t.Helper()
	c := web(at)
	c.Protocol, c.HTTP2.Streams, c.ConnectTimeout = config.HTTP2, 10, time.Minute
	if change != nil {
		change(&c)
	}
	loops := []*stream.Loop{streamtest.New(t), streamtest.New(t)}
	streamtest.Do(loops[1], func() { loops[1].Index = 1 })
	r := metrics.NewRegistry()
	cs, err := upstream.New(context.Background(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{c}}, Loops: loops, Metrics: r})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	cluster, _ := cs.Get("web")
	return cluster.Members()[0], loops, r
}

// ask makes a request and returns the answer's body.
func ask(t *task.Task, l *stream.Loop, open opener, e *upstream.Endpoint) (body string, err error) {
	var a upstream.Attempt
	up, err := open(e, t, l, &a)
	if err != nil {
		return "", err
	}
	var call upstream.Call
	e.Begin(l, &a, &call)
	defer call.End(upstream.Complete)
	defer up.Close()
	if err := up.Send(t, &exchange.Request{Method: "GET", Target: "/a", Authority: "a.test"}); err != nil {
		return "", err
	}
	if err := up.Finish(t, nil); err != nil {
		return "", err
	}
	if _, err := up.Receive(t); err != nil {
		return "", err
	}
	for {
		p, err := up.Read(t)
		body += string(p)
		if err == io.EOF {
			return body, nil
		}
		if err != nil {
			return body, err
		}
	}
}

// askMany makes so many requests at once, on all loops, and returns the errors.
func askMany(loops []*stream.Loop, n int, e *upstream.Endpoint) error {
	var mu sync.Mutex
	var errs []error
	var all []<-chan struct{}
	for i := range n {
		l := loops[i%len(loops)]
		all = append(all, streamtest.Begin(l, func(t *task.Task) {
			body, err := ask(t, l, (*upstream.Endpoint).Get, e)
			if err == nil && body != "/a" {
				err = fmt.Errorf("body %q", body)
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		}))
	}
	for _, ended := range all {
		<-ended
	}
	return errors.Join(errs...)
}

func says(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.URL.Path) }

func TestRequestsShareConnections(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ours, theirs, most int
	}{
		"as many as we allow":   {10, 250, 10},
		"as many as they allow": {100, 5, 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			gate := make(chan struct{})
			var here atomic.Int32
			s := newH2C(t, c.theirs, func(w http.ResponseWriter, r *http.Request) {
				if here.Add(1) == 100 {
					close(gate)
				}
				<-gate
				says(w, r)
			})
			e, loops, _ := h2clusters(t, s.Listener.Addr().String(), func(cl *config.Cluster) { cl.HTTP2.Streams = c.ours })
			if err := askMany(loops, 100, e); err != nil {
				t.Fatal(err)
			}
			if n := int(s.conns.Load()); n > c.most+2 || n < c.most {
				t.Errorf("%d connections, want about %d", n, c.most)
			}
			before := s.conns.Load()
			if err := askMany(loops[:1], 1, e); err != nil || s.conns.Load() != before {
				t.Errorf("another connection is made, %v", err)
			}
		})
	}
}

// Where there may be no further connection, requests wait for a stream.
func TestRequestsWaitForAStream(t *testing.T) {
	t.Parallel()
	s := newH2C(t, 250, says)
	e, loops, _ := h2clusters(t, s.Listener.Addr().String(), func(c *config.Cluster) {
		c.HTTP2.Streams = 2
		c.Breakers[0][config.LimitedConnections] = config.Limit{Set: true, Dynamic: config.Dynamic{Value: 2}}
		c.Breakers[0][config.LimitedPending] = config.Limit{Set: true, Dynamic: config.Dynamic{Value: 1000}}
	})
	if err := askMany(loops, 200, e); err != nil {
		t.Fatal(err)
	}
	if n := s.conns.Load(); n > 2 {
		t.Errorf("%d connections", n)
	}
}

func TestAnEndpointThatDoesNotSpeakHTTP2(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(says))
	t.Cleanup(s.Close)
	e, loops, _ := h2clusters(t, s.Listener.Addr().String(), nil)
	err := askMany(loops, 5, e)
	if _, ok := errors.AsType[*upstream.ConnectError](err); !ok && !strings.Contains(fmt.Sprint(err), "does not answer in HTTP/2") {
		t.Errorf("got %v", err)
	}
}

func TestAnUpgradeNeedsHTTP1(t *testing.T) {
	t.Parallel()
	s := newH2C(t, 10, says)
	e, loops, _ := h2clusters(t, s.Listener.Addr().String(), nil)
	streamtest.Go(loops[0], func(tk *task.Task) {
		_, err := e.Dial(tk, loops[0], new(upstream.Attempt))
		if _, ok := errors.AsType[*upstream.ConnectError](err); !ok {
			t.Errorf("got %v", err)
		}
	})
	if n := s.conns.Load(); n > 0 {
		t.Errorf("%d connections", n)
	}
}

// A request that is given up while it waits for a connection harms nobody.
func TestGivingUpTheWaitForAStream(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") // which answers nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	e, loops, _ := h2clusters(t, l.Addr().String(), func(c *config.Cluster) { c.ConnectTimeout = 200 * time.Millisecond })
	var a upstream.Attempt
	gone := errors.New("gone")
	ended := streamtest.Begin(loops[0], func(tk *task.Task) {
		if _, err := e.Get(tk, loops[0], &a); err != gone {
			t.Errorf("got %v", err)
		}
	})
	streamtest.Do(loops[0], func() { a.Cancel(gone) })
	<-ended
	if err := askMany(loops, 1, e); err == nil {
		t.Error("it answers")
	}
}

func BenchmarkHTTP2Requests(b *testing.B) { benchmarkRequests(b, config.HTTP2) }
func BenchmarkHTTP1Requests(b *testing.B) { benchmarkRequests(b, config.HTTP1) }

// benchmarkRequests makes requests, 16 at a time on one loop, to a server of the same process.
func benchmarkRequests(b *testing.B, p config.Protocol) {
	s := newH2C(b, 250, says)
	s.Config.Protocols.SetHTTP1(true)
	e, loops, _ := h2clusters(b, s.Listener.Addr().String(), func(c *config.Cluster) { c.Protocol, c.HTTP2.Streams = p, 100 })
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ReportAllocs()
	b.ResetTimer()
	var all []<-chan struct{}
	for range 16 {
		all = append(all, streamtest.Begin(loops[0], func(t *task.Task) {
			for left.Add(-1) >= 0 {
				if _, err := ask(t, loops[0], (*upstream.Endpoint).Get, e); err != nil {
					b.Error(err)
					return
				}
			}
		}))
	}
	for _, ended := range all {
		<-ended
	}
}

// secureConn is a connection with TLS that ends its handshake before anybody gets it. It carries
// no exchange of HTTP/1.1.
type secureConn struct {
	stream.Conn
	owner upstream.Owner
	taken bool
}

func (c *secureConn) Exchange() (exchange.Upstream, error) { return nil, errPlainOnly }
func (c *secureConn) Alive() bool                          { return true }

func (c *secureConn) PassOn() (stream.Passed, error) {
	c.taken = true
	c.owner.Taken()
	return c.Conn.PassOn(), nil
}

func (c *secureConn) Close() {
	if !c.taken && c.Conn.Open() {
		c.Conn.Close()
		c.owner.Ended(false)
	}
}

var errPlainOnly = errors.New("this would be HTTP/1.1")

// What an endpoint agrees to by ALPN decides, each time that a connection is made.
func TestALPNDecides(t *testing.T) {
	t.Parallel()
	s := httptest.NewUnstartedServer(http.HandlerFunc(says))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	var offer atomic.Value
	offer.Store([]string{"h2", "http/1.1"})
	c := web(s.Listener.Addr().String())
	c.Protocol, c.TLS, c.ConnectTimeout = config.Negotiated, new(config.ClusterTLS), time.Minute
	loops := []*stream.Loop{streamtest.New(t)}
	cs, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{c}}, Loops: loops, Network: upstream.Network{
		Connect: func(t *task.Task, l *stream.Loop, _, address string, _ time.Time, _ *upstream.Attempt, owner upstream.Owner) (upstream.Conn, error) {
			c := &secureConn{owner: owner}
			if err := l.Dial(t, &c.Conn, netip.MustParseAddrPort(address), new(stream.DialOptions)); err != nil {
				return nil, err
			}
			if err := c.Handshake(t, &tls.Config{InsecureSkipVerify: true, NextProtos: offer.Load().([]string)}, false); err != nil {
				return nil, err
			}
			return c, nil
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	cluster, _ := cs.Get("web")
	e := cluster.Members()[0]
	if err := askMany(loops, 20, e); err != nil {
		t.Fatal(err)
	}
	e.Mark(upstream.Failing, true) // its connections go
	e.Mark(upstream.Failing, false)
	offer.Store([]string{"http/1.1"})
	if err := askMany(loops, 1, e); !errors.Is(err, errPlainOnly) {
		t.Errorf("got %v", err)
	}
	offer.Store([]string{"h2", "http/1.1"})
	if err := askMany(loops, 1, e); err != nil {
		t.Errorf("HTTP/2 again: %v", err)
	}
	if err := askMany(loops, 20, e); err != nil {
		t.Error(err)
	}
}

// What is under way when connections are given up ends as it would have, and the connection with
// it; nothing new begins on that.
func TestStreamsOutliveThatTheirConnectionIsGivenUp(t *testing.T) {
	t.Parallel()
	for name, giveUp := range map[string]func(cs *upstream.Clusters, e *upstream.Endpoint){
		"the generation drains":  func(cs *upstream.Clusters, _ *upstream.Endpoint) { cs.Close() },
		"the endpoint fails":     func(_ *upstream.Clusters, e *upstream.Endpoint) { e.Mark(upstream.Failing, true) },
		"the endpoint has left":  func(cs *upstream.Clusters, _ *upstream.Endpoint) { c, _ := cs.Get("web"); c.SetMembers(nil) },
		"one after the other":    func(cs *upstream.Clusters, e *upstream.Endpoint) { e.Mark(upstream.Failing, true); cs.Close() },
		"the endpoint is ending": nil, // it says so
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n = 6
			here, goOn := make(chan struct{}, n), make(chan struct{})
			s := newH2C(t, 100, func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(200)
				w.(http.Flusher).Flush()
				here <- struct{}{}
				<-goOn
				says(w, r)
			})
			c := web(s.Listener.Addr().String())
			c.Protocol, c.ConnectTimeout = config.HTTP2, time.Minute
			loops := []*stream.Loop{streamtest.New(t)}
			cs, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{c}}, Loops: loops})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(cs.Close)
			cluster, _ := cs.Get("web")
			e := cluster.Members()[0]
			asked := make(chan error, 1)
			go func() { asked <- askMany(loops, n, e) }()
			for range n {
				<-here
			}
			stopped := make(chan error, 1)
			if giveUp == nil {
				go func() { stopped <- s.Config.Shutdown(context.Background()) }()
			} else {
				giveUp(cs, e)
				stopped <- nil
				if len(s.left) > 0 {
					t.Error("the connection is closed under them")
				}
			}
			close(goOn)
			if err := <-asked; err != nil {
				t.Error(err)
			}
			<-s.left
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			if made := s.conns.Load(); made != 1 {
				t.Errorf("%d connections", made)
			}
		})
	}
}

// An endpoint is asked whether it is there as often as that is configured.
func TestPingsOfEndpoints(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var serving sync.WaitGroup
	defer serving.Wait()
	serving.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, err = io.CopyN(io.Discard, conn, int64(len(http2.ClientPreface)))
		fr := http2.NewFramer(conn, conn)
		if err == nil {
			err = fr.WriteSettings()
		}
		for pings := 0; pings < 4 && err == nil; { // the first one has it prove what it speaks
			var f http2.Frame
			if f, err = fr.ReadFrame(); err != nil {
				break
			}
			if ping, ok := f.(*http2.PingFrame); ok {
				pings++
				err = fr.WritePing(true, ping.Data)
			}
		}
		if err != nil {
			t.Error(err)
		}
	})
	e, loops, _ := h2clusters(t, l.Addr().String(), func(c *config.Cluster) { c.HTTP2.PingInterval = time.Millisecond })
	if err := askMany(loops, 1, e); !errors.Is(err, exchange.ErrNoAnswer) { // it has ended
		t.Errorf("got %v", err)
	}
}

// Connections that carry nothing are not kept for longer than that is configured.
func TestIdleConnectionsWithHTTP2End(t *testing.T) {
	t.Parallel()
	s := newH2C(t, 100, says)
	e, loops, _ := h2clusters(t, s.Listener.Addr().String(), func(c *config.Cluster) { c.IdleTimeout = time.Millisecond })
	for {
		err := askMany(loops, 1, e)
		<-s.left // it may be before the request has begun
		if err == nil {
			break
		}
	}
}

// An endpoint that takes no requests on any connection is not connected to once more for each of
// them, with all these connections kept.
func TestConnectionsThatTakeNoRequestsAreNotKept(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	var made atomic.Int32
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			made.Add(1)
			open.Go(func() { takeNone(conn) })
		}
	}()
	t.Cleanup(func() { l.Close() })
	e, loops, _ := h2clusters(t, l.Addr().String(), nil)
	const many = 5
	for range many {
		if err := askMany(loops, 2, e); err == nil {
			t.Error("a request was answered")
		}
	}
	if n := made.Load(); n < many {
		t.Errorf("%d connections were made", n)
	}
	open.Wait() // for the end of all of them
}

// takeNone answers as a server with HTTP/2 that takes no requests, until the connection ends.
func takeNone(conn net.Conn) {
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(conn, conn)
	f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0})
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				f.WriteSettingsAck()
			}
		case *http2.PingFrame:
			f.WritePing(true, frame.Data)
		}
	}
}
