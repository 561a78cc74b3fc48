package upstream_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/upstream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeNetwork answers for names, and hands out fakeConns.
type fakeNetwork struct {
	names map[string][]netip.Addr
	fail  func(ctx context.Context, address string) error

	mu    sync.Mutex
	conns []*fakeConn
}

func (n *fakeNetwork) network() upstream.Network {
	return upstream.Network{
		Lookup: func(_ context.Context, name string) ([]netip.Addr, error) {
			addrs, ok := n.names[name]
			if !ok {
				return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
			}
			return addrs, nil
		},
		Connect: func(ctx context.Context, network, address string, owner upstream.Owner) (upstream.Conn, error) {
			if n.fail != nil {
				if err := n.fail(ctx, address); err != nil {
					return nil, err
				}
			}
			c := &fakeConn{address: network + " " + address, owner: owner}
			n.mu.Lock()
			defer n.mu.Unlock()
			n.conns = append(n.conns, c)
			return c, nil
		},
	}
}

func (n *fakeNetwork) connections() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns)
}

func (n *fakeNetwork) open() (open int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		if !c.closed.Load() {
			open++
		}
	}
	return open
}

// fakeConn is a connection whose exchanges end with Close.
type fakeConn struct {
	address string
	owner   upstream.Owner
	used    bool
	dead    atomic.Bool
	closed  atomic.Bool
}

func (c *fakeConn) Exchange() (exchange.Upstream, error) {
	if c.closed.Load() {
		return nil, net.ErrClosed
	}
	u := &fakeUpstream{conn: c, reused: c.used}
	c.used = true
	return u, nil
}
func (c *fakeConn) Alive() bool { return !c.dead.Load() && !c.closed.Load() }
func (c *fakeConn) Close() error {
	if !c.closed.Swap(true) {
		c.owner.Ended(c.dead.Load())
	}
	return nil
}

type fakeUpstream struct {
	exchange.Upstream
	conn   *fakeConn
	reused bool
}

func (u *fakeUpstream) Reused() bool { return u.reused }
func (u *fakeUpstream) Close() error { u.conn.owner.Idle(u.conn); return nil }

func clusters(t *testing.T, n *fakeNetwork, c ...config.Cluster) *upstream.Clusters {
	t.Helper()
	cs, err := upstream.NewOn(t.Context(), &config.Config{Clusters: c}, nil, nil, n.network())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	return cs
}

func cluster(t *testing.T, n *fakeNetwork, c config.Cluster) *upstream.Cluster {
	t.Helper()
	got, ok := clusters(t, n, c).Get(c.Name)
	if !ok {
		t.Fatalf("no cluster %q", c.Name)
	}
	return got
}

func one(t *testing.T, n *fakeNetwork, c config.Cluster) *upstream.Endpoint {
	t.Helper()
	return slices.Collect(cluster(t, n, c).Endpoints())[0]
}

func web(addresses ...string) config.Cluster {
	c := config.Cluster{Name: "web", ConnectTimeout: 2 * time.Second, IdleTimeout: time.Minute}
	for _, a := range addresses {
		c.Endpoints = append(c.Endpoints, config.Endpoint{Address: a})
	}
	return c
}

func begin(t *testing.T, e *upstream.Endpoint) *fakeUpstream {
	t.Helper()
	up, err := e.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return up.(*fakeUpstream)
}

func TestEndpointsOfEveryKind(t *testing.T) {
	t.Parallel()
	n := &fakeNetwork{names: map[string][]netip.Addr{"app.internal": {
		netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("::ffff:10.0.0.7"), netip.MustParseAddr("2001:db8::7")}}}
	c := cluster(t, n, web("10.0.0.1:9000", "app.internal:9001", "[2001:db8::1]:9002", "unix:/run/app.sock"))
	var got []string
	for e := range c.Endpoints() {
		got = append(got, e.Address+" is "+e.String())
		up, err := e.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		up.Close()
	}
	want := []string{
		"10.0.0.1:9000 is 10.0.0.1:9000",
		"app.internal:9001 is 10.0.0.7:9001",
		"app.internal:9001 is [2001:db8::7]:9001",
		"[2001:db8::1]:9002 is [2001:db8::1]:9002",
		"unix:/run/app.sock is unix:/run/app.sock",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if a := n.conns[4].address; a != "unix /run/app.sock" {
		t.Errorf("connected to %q", a)
	}
}

func TestEveryUnresolvedNameIsReported(t *testing.T) {
	t.Parallel()
	n := &fakeNetwork{names: map[string][]netip.Addr{"empty.internal": nil}}
	other := web("gone.internal:1")
	other.Name = "other"
	cs, err := upstream.NewOn(t.Context(), &config.Config{Clusters: []config.Cluster{
		web("10.0.0.1:9000", "gone.internal:80", "empty.internal:81"), other}}, nil, nil, n.network())
	if cs != nil || err == nil {
		t.Fatalf("got %v, %v", cs, err)
	}
	for _, want := range []string{
		`cluster "web": endpoint "gone.internal:80": `, `cluster "web": endpoint "empty.internal:81": `,
		`cluster "other": endpoint "gone.internal:1": `,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
}

func TestKnownNamesAreNotAskedForAgain(t *testing.T) {
	t.Parallel()
	cfg := &config.Config{Clusters: []config.Cluster{web("app.internal:80")}}
	n := &fakeNetwork{names: map[string][]netip.Addr{"app.internal": {netip.MustParseAddr("10.0.0.7")}}}
	first, err := upstream.NewOn(t.Context(), cfg, nil, nil, n.network())
	if err != nil {
		t.Fatal(err)
	}
	broken := new(fakeNetwork) // resolves nothing
	second, err := upstream.NewOn(t.Context(), cfg, first.Addresses(), nil, broken.network())
	if err != nil {
		t.Fatal(err)
	}
	c, _ := second.Get("web")
	for e := range c.Endpoints() {
		if got := e.String(); !strings.Contains(got, "10.0.0.7") {
			t.Errorf("got %s", got)
		}
	}
}

func TestLookupsAreBoundedByTheContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		network := new(fakeNetwork).network()
		network.Lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		var names []string
		for _, l := range "abcdefghijklmnopqrstuvwxyz" {
			names = append(names, string(l)+".internal:80")
		}
		start := time.Now()
		_, err := upstream.NewOn(ctx, &config.Config{Clusters: []config.Cluster{web(names...)}}, nil, nil, network)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestEndpointsTakeTurns(t *testing.T) {
	t.Parallel()
	c := cluster(t, new(fakeNetwork), web("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"))
	firsts := map[string]int{}
	for range 300 {
		for e := range c.Endpoints() {
			firsts[e.Address]++
			break
		}
	}
	for a, n := range firsts {
		if n != 100 {
			t.Errorf("%s was first %d times of 300", a, n)
		}
	}
	seen := map[string]bool{}
	for e := range c.Endpoints() {
		seen[e.Address] = true
	}
	if len(firsts) != 3 || len(seen) != 3 {
		t.Errorf("a request tries %v", seen)
	}
	for range cluster(t, new(fakeNetwork), web()).Endpoints() {
		t.Error("an empty cluster has an endpoint")
	}
}

func TestLastIdleConnectionIsTakenFirst(t *testing.T) {
	t.Parallel()
	n := new(fakeNetwork)
	e := one(t, n, web("10.0.0.1:1"))
	a, b := begin(t, e), begin(t, e)
	if a.conn == b.conn || a.Reused() {
		t.Fatal("two exchanges at once share a connection")
	}
	a.Close()
	b.Close()
	first, second := begin(t, e), begin(t, e)
	if first.conn != b.conn || second.conn != a.conn || !first.Reused() {
		t.Error("connections were not taken in reverse order")
	}
	if n.connections() != 2 {
		t.Errorf("%d connections were made", n.connections())
	}
}

func TestDeadConnectionIsClosedAndPassedOver(t *testing.T) {
	t.Parallel()
	n := new(fakeNetwork)
	e := one(t, n, web("10.0.0.1:1"))
	a, b := begin(t, e), begin(t, e)
	a.Close()
	b.Close()
	b.conn.dead.Store(true)
	if got := begin(t, e); got.conn != a.conn {
		t.Error("the living one was not taken")
	}
	if !b.conn.closed.Load() {
		t.Error("the dead one was not closed")
	}
	if begin(t, e).Reused() {
		t.Error("the dead one was taken")
	}
}

func TestFreshAndDialPassThePoolBy(t *testing.T) {
	t.Parallel()
	e := one(t, new(fakeNetwork), web("10.0.0.1:1"))
	idle := begin(t, e)
	idle.Close()

	up, err := e.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dialled := up.(*fakeUpstream)
	if dialled.conn == idle.conn {
		t.Error("Dial took an idle connection")
	}
	dialled.Close()
	if !dialled.conn.closed.Load() {
		t.Error("a dialled connection was kept")
	}

	up, err = e.Fresh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fresh := up.(*fakeUpstream)
	if fresh.conn == idle.conn {
		t.Error("Fresh took an idle connection")
	}
	fresh.Close()
	if begin(t, e).conn != fresh.conn {
		t.Error("a fresh connection was not kept")
	}
}

func TestIdleConnectionsAreClosedInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := new(fakeNetwork)
		e := one(t, n, web("10.0.0.1:1"))
		a, b := begin(t, e), begin(t, e)
		a.Close()
		time.Sleep(30 * time.Second)
		b.Close()
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if !a.conn.closed.Load() || b.conn.closed.Load() {
			t.Error("after a minute only the first has expired")
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if !b.conn.closed.Load() {
			t.Error("the second has expired too")
		}
		begin(t, e).Close()
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if n.open() != 0 {
			t.Error("the timer does not start again")
		}
	})
}

func TestIdleTimeoutMayBeOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := web("10.0.0.1:1")
		c.IdleTimeout = 0
		e := one(t, new(fakeNetwork), c)
		up := begin(t, e)
		up.Close()
		time.Sleep(1000 * time.Hour)
		if begin(t, e).conn != up.conn {
			t.Error("the connection was not kept")
		}
	})
}

func TestIdleConnectionsAreLimited(t *testing.T) {
	t.Parallel()
	n := new(fakeNetwork)
	e := one(t, n, web("10.0.0.1:1"))
	var ups []*fakeUpstream
	for range 200 {
		ups = append(ups, begin(t, e))
	}
	for _, up := range ups {
		up.Close()
	}
	if n.open() != 128 {
		t.Errorf("%d idle connections are open", n.open())
	}
}

func TestCloseClosesIdleConnectionsNowAndLater(t *testing.T) {
	t.Parallel()
	n := new(fakeNetwork)
	cs := clusters(t, n, web("10.0.0.1:1"))
	c, _ := cs.Get("web")
	e := slices.Collect(c.Endpoints())[0]
	idle, busy := begin(t, e), begin(t, e)
	idle.Close()
	cs.Close()
	if !idle.conn.closed.Load() || busy.conn.closed.Load() {
		t.Error("Close concerns idle connections")
	}
	busy.Close()
	if !busy.conn.closed.Load() {
		t.Error("a connection was kept after Close")
	}
	cs.Close()
}

func TestThePoolIsSafeForManyAtOnce(t *testing.T) {
	t.Parallel()
	c := web("10.0.0.1:1")
	c.IdleTimeout = time.Microsecond // the sweeper runs among the others
	n := new(fakeNetwork)
	cs := clusters(t, n, c)
	got, _ := cs.Get("web")
	e := slices.Collect(got.Endpoints())[0]
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for range 500 {
				up, err := e.Get(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				up.Close()
			}
		})
	}
	users.Wait()
	cs.Close()
	if n.open() != 0 {
		t.Errorf("%d connections are left", n.open())
	}
}

func TestConnectErrorsTellTimeoutFromFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		never := func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		tests := []struct {
			name    string
			fail    func(context.Context, string) error
			timeout bool
		}{
			{"refused", func(context.Context, string) error { return syscall.ECONNREFUSED }, false},
			{"unreachable", func(context.Context, string) error { return syscall.EHOSTUNREACH }, false},
			{"no answer in time", never, true},
			{"the kernel gave up", func(context.Context, string) error {
				return &net.OpError{Op: "dial", Err: syscall.ETIMEDOUT}
			}, true},
		}
		for _, tt := range tests {
			_, err := one(t, &fakeNetwork{fail: tt.fail}, web("10.0.0.1:1")).Get(t.Context())
			c, ok := errors.AsType[*upstream.ConnectError](err)
			if !ok || c.Timeout != tt.timeout || c.Endpoint != "10.0.0.1:1" {
				t.Errorf("%s: %v (%+v)", tt.name, err, c)
			}
		}

		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("client gone")
		time.AfterFunc(time.Second, func() { cancel(gone) })
		if _, err := one(t, &fakeNetwork{fail: never}, web("10.0.0.1:1")).Dial(ctx); err != gone {
			t.Errorf("a cancelled attempt ends with %v", err)
		}
	})
}

func TestRealConnections(t *testing.T) {
	t.Parallel()
	unixPath := filepath.Join(t.TempDir(), "s")
	for _, listen := range []struct{ network, address string }{{"tcp", "127.0.0.1:0"}, {"unix", unixPath}} {
		t.Run(listen.network, func(t *testing.T) {
			t.Parallel()
			l, err := net.Listen(listen.network, listen.address)
			if err != nil {
				t.Fatal(err)
			}
			serve(t, l)
			address := l.Addr().String()
			if listen.network == "unix" {
				address = "unix:" + address
			} else {
				address = strings.Replace(address, "127.0.0.1", "localhost", 1)
			}
			cs, err := upstream.New(t.Context(), &config.Config{Clusters: []config.Cluster{web(address)}}, nil, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(cs.Close)
			c, _ := cs.Get("web")
			// A host may say that localhost is ::1 too, where nobody listens.
			var e *upstream.Endpoint
			for e = range c.Endpoints() {
				if up, err := e.Get(t.Context()); err == nil {
					up.Close()
					break
				}
			}
			for i := range 3 {
				up, err := e.Get(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if up.Reused() != (i > 0) {
					t.Errorf("request %d: reused is %v", i, up.Reused())
				}
				roundTrip(t, up)
				up.Close()
			}
			l.Close()
			_, err = e.Fresh(t.Context())
			if c, ok := errors.AsType[*upstream.ConnectError](err); !ok || c.Timeout {
				t.Errorf("nobody listens: %v", err)
			}
		})
	}
}

func roundTrip(t *testing.T, up exchange.Upstream) {
	t.Helper()
	if err := up.Send(&exchange.Request{Method: "GET", Scheme: "http", Authority: "x", Target: "/", Major: 1, Minor: 1}); err != nil {
		t.Fatal(err)
	}
	if err := up.Finish(nil); err != nil {
		t.Fatal(err)
	}
	r, err := up.Receive()
	if err != nil || r.Status != 200 {
		t.Fatalf("%+v, %v", r, err)
	}
	if body, err := io.ReadAll(up); err != nil || string(body) != "ok" {
		t.Fatalf("%q, %v", body, err)
	}
}

// serve answers each head that comes to l with a 200.
func serve(t *testing.T, l net.Listener) {
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				var head []byte
				buf := make([]byte, 1)
				for {
					if _, err := conn.Read(buf); err != nil {
						return
					}
					if head = append(head, buf[0]); strings.HasSuffix(string(head), "\r\n\r\n") {
						head = nil
						io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
					}
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
}
