package upstream_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

func TestMain(m *testing.M) {
	if os.Getenv(upstream.ManyEnv) != "" {
		upstream.ServeMany()
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeNetwork answers for names, and hands out fakeConns.
type fakeNetwork struct {
	names map[string][]netip.Addr
	fail  func(p *pending, address string) error

	mu    sync.Mutex
	conns []*fakeConn
}

// pending is an attempt to connect that has no answer yet.
type pending struct {
	task     *task.Task
	loop     *stream.Loop
	until    time.Time
	attempt  *upstream.Attempt
	deadline poller.Deadline
	err      error
}

// never waits until the attempt is given up.
func (p *pending) never() error {
	p.attempt.Wait(p)
	p.loop.SetDeadline(&p.deadline, p, p.until)
	defer p.loop.Forget(&p.deadline)
	for p.err == nil {
		p.task.Wait()
	}
	return p.err
}

func (p *pending) Interrupt(err error) {
	p.err = err
	p.task.Wake()
}

func (p *pending) Expire(*poller.Deadline) { p.Interrupt(os.ErrDeadlineExceeded) }

func (n *fakeNetwork) network() upstream.Network {
	return upstream.Network{
		Lookup: func(_ context.Context, name string) ([]netip.Addr, error) {
			addrs, ok := n.names[name]
			if !ok {
				return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
			}
			return addrs, nil
		},
		Connect: func(t *task.Task, l *stream.Loop, network, address string, until time.Time, a *upstream.Attempt, owner upstream.Owner) (upstream.Conn, error) {
			if n.fail != nil {
				if err := n.fail(&pending{task: t, loop: l, until: until, attempt: a}, address); err != nil {
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
func (c *fakeConn) PassOn() (stream.Passed, error) {
	if c.closed.Swap(true) {
		return stream.Passed{}, net.ErrClosed
	}
	c.owner.Taken()
	return stream.Passed{FD: 4711}, nil
}
func (c *fakeConn) Close() {
	if !c.closed.Swap(true) {
		c.owner.Ended(c.dead.Load())
	}
}

type fakeUpstream struct {
	exchange.Upstream
	conn   *fakeConn
	reused bool
}

func (u *fakeUpstream) Reused() bool { return u.reused }
func (u *fakeUpstream) Close()       { u.conn.owner.Idle(u.conn) }

// world is clusters and the loops of their connections.
type world struct {
	t     *testing.T
	loops []*stream.Loop
	*upstream.Clusters
}

// loopsFor returns n loops. They have no descriptors, and need none for fakes.
func loopsFor(t *testing.T, n int) (loops []*stream.Loop) {
	for i := range n {
		l := streamtest.NewVirtual(t)
		streamtest.Do(l, func() { l.Index = i })
		loops = append(loops, l)
	}
	return loops
}

func clusters(t *testing.T, n *fakeNetwork, loops []*stream.Loop, c ...config.Cluster) *world {
	t.Helper()
	cs, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: c}, Loops: loops, Network: n.network()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	return &world{t, loops, cs}
}

// endpoint is one of them, for requests on the first loop.
type endpoint struct {
	*upstream.Endpoint
	t     *testing.T
	loops []*stream.Loop
}

// of returns the endpoints of a cluster in the order of a round.
func (w *world) of(cluster string) (all []*endpoint) {
	w.t.Helper()
	c, ok := w.Get(cluster)
	if !ok {
		w.t.Fatalf("no cluster %q", cluster)
	}
	for _, e := range c.Members() {
		all = append(all, &endpoint{e, w.t, w.loops})
	}
	return all
}

func one(t *testing.T, n *fakeNetwork, c config.Cluster) *endpoint {
	t.Helper()
	return clusters(t, n, loopsFor(t, 1), c).of(c.Name)[0]
}

// opener is Get, Fresh or Dial of an endpoint.
type opener func(*upstream.Endpoint, *task.Task, *stream.Loop, *upstream.Attempt) (exchange.Upstream, error)

// try opens an exchange on a loop, by a task of it.
func (e *endpoint) try(open opener, loop int) (up exchange.Upstream, err error) {
	l := e.loops[loop]
	streamtest.Go(l, func(t *task.Task) { up, err = open(e.Endpoint, t, l, new(upstream.Attempt)) })
	return up, err
}

// get is Get where nothing may fail.
func (e *endpoint) get() *used {
	e.t.Helper()
	return e.open((*upstream.Endpoint).Get, 0)
}

func (e *endpoint) open(open opener, loop int) *used {
	e.t.Helper()
	up, err := e.try(open, loop)
	if err != nil {
		e.t.Fatal(err)
	}
	return &used{up.(*fakeUpstream), e.loops[loop]}
}

// used is an exchange on a loop.
type used struct {
	*fakeUpstream
	loop *stream.Loop
}

func (u *used) Close()     { streamtest.Do(u.loop, u.fakeUpstream.Close) }
func (u *used) closeConn() { streamtest.Do(u.loop, u.conn.Close) }

func web(addresses ...string) config.Cluster {
	c := config.Cluster{Name: "web", ConnectTimeout: 2 * time.Second, IdleTimeout: time.Minute}
	for _, a := range addresses {
		c.Endpoints = append(c.Endpoints, config.Endpoint{Address: a})
	}
	return c
}

func TestEndpointsOfEveryKind(t *testing.T) {
	t.Parallel()
	n := &fakeNetwork{names: map[string][]netip.Addr{"app.internal": {
		netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("::ffff:10.0.0.7"), netip.MustParseAddr("2001:db8::7")}}}
	w := clusters(t, n, loopsFor(t, 1), web("10.0.0.1:9000", "app.internal:9001", "[2001:db8::1]:9002", "unix:/run/app.sock"))
	var got []string
	for _, e := range w.of("web") {
		got = append(got, e.Address+" is "+e.String())
		e.get().Close()
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
	cs, err := upstream.New(t.Context(), upstream.Options{Network: n.network(), Config: &config.Config{Clusters: []config.Cluster{
		web("10.0.0.1:9000", "gone.internal:80", "empty.internal:81"), other}}})
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
	first, err := upstream.New(t.Context(), upstream.Options{Config: cfg, Network: n.network()})
	if err != nil {
		t.Fatal(err)
	}
	broken := new(fakeNetwork) // resolves nothing
	second, err := upstream.New(t.Context(), upstream.Options{Config: cfg, Known: first.Addresses(), Network: broken.network()})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range (&world{t: t, Clusters: second}).of("web") {
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
		_, err := upstream.New(ctx, upstream.Options{Config: &config.Config{Clusters: []config.Cluster{web(names...)}}, Network: network})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestEndpointsTakeTurns(t *testing.T) {
	t.Parallel()
	w := clusters(t, new(fakeNetwork), nil, web("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"), config.Cluster{Name: "empty"})
	c, _ := w.Get("web")
	firsts := map[string]int{}
	for range 300 {
		round := c.Round(balance.Query{})
		firsts[round.Next().Address]++
	}
	for a, n := range firsts {
		if n != 100 {
			t.Errorf("%s was first %d times of 300", a, n)
		}
	}
	seen := map[string]bool{}
	for _, e := range w.of("web") {
		if seen[e.Address] {
			t.Errorf("%s is offered twice", e.Address)
		}
		seen[e.Address] = true
	}
	if len(firsts) != 3 || len(seen) != 3 {
		t.Errorf("a request tries %v", seen)
	}
	if len(w.of("empty")) > 0 {
		t.Error("an empty cluster has an endpoint")
	}
}

func TestLastIdleConnectionIsTakenFirst(t *testing.T) {
	t.Parallel()
	n := new(fakeNetwork)
	e := one(t, n, web("10.0.0.1:1"))
	a, b := e.get(), e.get()
	if a.conn == b.conn || a.Reused() {
		t.Fatal("two exchanges at once share a connection")
	}
	a.Close()
	b.Close()
	first, second := e.get(), e.get()
	if first.conn != b.conn || second.conn != a.conn || !first.Reused() {
		t.Error("connections were not taken in reverse order")
	}
	if n.connections() != 2 {
		t.Errorf("%d connections were made", n.connections())
	}
}

func TestDeadConnectionIsClosedAndPassedOver(t *testing.T) {
	t.Parallel()
	e := one(t, new(fakeNetwork), web("10.0.0.1:1"))
	a, b := e.get(), e.get()
	a.Close()
	b.Close()
	b.conn.dead.Store(true)
	if got := e.get(); got.conn != a.conn {
		t.Error("the living one was not taken")
	}
	if !b.conn.closed.Load() {
		t.Error("the dead one was not closed")
	}
	if e.get().Reused() {
		t.Error("the dead one was taken")
	}
}

// What ends by itself gives up its place, and does so once.
func TestAnIdleConnectionThatEndsIsForgotten(t *testing.T) {
	t.Parallel()
	n := new(fakeNetwork)
	e := one(t, n, web("10.0.0.1:1"))
	var all []*used
	for range 1024 {
		all = append(all, e.get())
	}
	late := e.get()
	for _, u := range all {
		u.Close()
	}
	all[17].closeConn()
	late.Close()
	if late.conn.closed.Load() {
		t.Error("there is no room for another one")
	}
	for range 1024 {
		if u := e.get(); !u.Reused() || u.conn == all[17].conn {
			t.Fatal("one that has ended was taken, or had another one's place")
		}
	}
	if n.connections() != 1025 {
		t.Errorf("%d connections were made", n.connections())
	}
}

func TestFreshAndDialPassThePoolBy(t *testing.T) {
	t.Parallel()
	e := one(t, new(fakeNetwork), web("10.0.0.1:1"))
	idle := e.get()
	idle.Close()

	dialled := e.open((*upstream.Endpoint).Dial, 0)
	if dialled.conn == idle.conn {
		t.Error("Dial took an idle connection")
	}
	dialled.Close()
	if !dialled.conn.closed.Load() {
		t.Error("a dialled connection was kept")
	}

	fresh := e.open((*upstream.Endpoint).Fresh, 0)
	if fresh.conn == idle.conn {
		t.Error("Fresh took an idle connection")
	}
	fresh.Close()
	if e.get().conn != fresh.conn {
		t.Error("a fresh connection was not kept")
	}
}

func TestIdleConnectionsAreClosedInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const late = time.Second // that a deadline may be
		n := new(fakeNetwork)
		e := one(t, n, web("10.0.0.1:1"))
		a, b := e.get(), e.get()
		a.Close()
		time.Sleep(30 * time.Second)
		b.Close()
		time.Sleep(30*time.Second - time.Millisecond)
		if n.open() != 2 {
			t.Error("one has expired before its time")
		}
		time.Sleep(late)
		if !a.conn.closed.Load() || b.conn.closed.Load() {
			t.Error("after a minute only the first has expired")
		}
		time.Sleep(30 * time.Second)
		if !b.conn.closed.Load() {
			t.Error("the second has expired too")
		}
		e.get().Close()
		time.Sleep(time.Minute + late)
		if n.open() != 0 {
			t.Error("the deadline is not set again")
		}
	})
}

// A connection is as young as its last use, also if others have waited longer.
func TestAConnectionThatWasUsedExpiresLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := new(fakeNetwork)
		e := one(t, n, web("10.0.0.1:1"))
		a, b := e.get(), e.get()
		a.Close()
		b.Close()
		for range 10 {
			time.Sleep(30 * time.Second)
			e.get().Close()
		}
		if !a.conn.closed.Load() || b.conn.closed.Load() || n.connections() != 2 {
			t.Errorf("the one that was not used is closed: %v, the other: %v, of %d", a.conn.closed.Load(), b.conn.closed.Load(), n.connections())
		}
	})
}

func TestIdleTimeoutMayBeOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := web("10.0.0.1:1")
		c.IdleTimeout = 0
		e := one(t, new(fakeNetwork), c)
		up := e.get()
		up.Close()
		time.Sleep(1000 * time.Hour)
		if e.get().conn != up.conn {
			t.Error("the connection was not kept")
		}
	})
}

// The limit is shared out among the loops, of which each keeps its own.
func TestIdleConnectionsAreLimited(t *testing.T) {
	t.Parallel()
	for loops, want := range map[int]int{1: 1024, 2: 512, 3: 342} {
		n := new(fakeNetwork)
		e := clusters(t, n, loopsFor(t, loops), web("10.0.0.1:1")).of("web")[0]
		for loop := range loops {
			var ups []*used
			for range 1100 {
				ups = append(ups, e.open((*upstream.Endpoint).Get, loop))
			}
			for _, up := range ups {
				up.Close()
			}
			if n.open() != want*(loop+1) {
				t.Errorf("%d of %d loops keep %d idle connections, want %d each", loop+1, loops, n.open(), want)
			}
		}
	}
}

func TestALoopTakesItsOwnConnectionsOnly(t *testing.T) {
	t.Parallel()
	e := clusters(t, new(fakeNetwork), loopsFor(t, 2), web("10.0.0.1:1")).of("web")[0]
	first := e.get()
	first.Close()
	if other := e.open((*upstream.Endpoint).Get, 1); other.conn == first.conn {
		t.Error("a connection of another loop was taken")
	}
	if e.get().conn != first.conn {
		t.Error("the connection was not kept")
	}
}

func TestCloseClosesIdleConnectionsNowAndLater(t *testing.T) {
	t.Parallel()
	w := clusters(t, new(fakeNetwork), loopsFor(t, 2), web("10.0.0.1:1"))
	e := w.of("web")[0]
	idle, busy, other := e.get(), e.get(), e.open((*upstream.Endpoint).Get, 1)
	idle.Close()
	other.Close()
	w.Close()
	if !idle.conn.closed.Load() || !other.conn.closed.Load() || busy.conn.closed.Load() {
		t.Error("Close concerns idle connections, of all loops")
	}
	busy.Close()
	if !busy.conn.closed.Load() {
		t.Error("a connection was kept after Close")
	}
	w.Close()
}

func TestCloseDoesNotWaitForALoopThatWasStopped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := poller.NewVirtual()
		tasks := task.NewPool(p, func(any) {})
		l := stream.NewLoop(p, tasks, 0)
		w := clusters(t, new(fakeNetwork), []*stream.Loop{l}, web("10.0.0.1:1"))
		l.Stop()
		l.Run()
		w.Close() // the bubble would have no way out
	})
}

// Each loop has its pool and nothing else that it would have to share.
func TestThePoolsOfManyLoopsAreUsedAtOnce(t *testing.T) {
	t.Parallel()
	c := web("10.0.0.1:1")
	c.IdleTimeout = time.Microsecond // they expire among the others
	n := new(fakeNetwork)
	w := clusters(t, n, loopsFor(t, 4), c)
	e := w.of("web")[0]
	var users sync.WaitGroup
	for user := range 8 {
		l := w.loops[user%len(w.loops)]
		users.Go(func() {
			streamtest.Go(l, func(task *task.Task) {
				for range 500 {
					up, err := e.Get(task, l, new(upstream.Attempt))
					if err != nil {
						t.Error(err)
						return
					}
					task.Pause()
					up.Close()
				}
			})
		})
	}
	users.Wait()
	w.Close()
	if n.open() != 0 {
		t.Errorf("%d connections are left", n.open())
	}
}

func TestConnectErrorsTellTimeoutFromFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tests := []struct {
			name    string
			fail    func(*pending, string) error
			timeout bool
			text    string
		}{
			{"refused", func(*pending, string) error { return syscall.ECONNREFUSED }, false, "connection refused"},
			{"unreachable", func(*pending, string) error { return syscall.EHOSTUNREACH }, false, "no route to host"},
			{"no answer in time", func(p *pending, _ string) error { return p.never() }, true, "no answer within 2s"},
			{"the kernel gave up", func(*pending, string) error {
				return &net.OpError{Op: "dial", Err: syscall.ETIMEDOUT}
			}, true, "dial: connection timed out"},
		}
		for _, tt := range tests {
			_, err := one(t, &fakeNetwork{fail: tt.fail}, web("10.0.0.1:1")).try((*upstream.Endpoint).Get, 0)
			c, ok := errors.AsType[*upstream.ConnectError](err)
			if !ok || c.Timeout != tt.timeout || c.Endpoint != "10.0.0.1:1" || c.Error() != "connect to 10.0.0.1:1: "+tt.text {
				t.Errorf("%s: %v (%+v)", tt.name, err, c)
			}
		}
	})
}

// Whatever is under way, or would be later, ends with the reason that Cancel gives. It is
// no failure to connect.
func TestACancelledAttemptEndsWithItsReason(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("client gone")
		for name, open := range map[string]opener{"get": (*upstream.Endpoint).Get, "fresh": (*upstream.Endpoint).Fresh, "dial": (*upstream.Endpoint).Dial} {
			n := &fakeNetwork{fail: func(p *pending, _ string) error { return p.never() }}
			e := one(t, n, web("10.0.0.1:1"))
			var a upstream.Attempt
			l := e.loops[0]
			var err error
			ended := streamtest.Begin(l, func(t *task.Task) { _, err = open(e.Endpoint, t, l, &a) })
			time.Sleep(time.Second)
			streamtest.Do(l, func() { a.Cancel(gone); a.Cancel(errors.New("another")) })
			if <-ended; err != gone {
				t.Errorf("%s: a cancelled attempt ends with %v", name, err)
			}
			n.fail = nil
			streamtest.Go(l, func(t *task.Task) { _, err = open(e.Endpoint, t, l, &a) })
			if err != gone || n.connections() > 0 {
				t.Errorf("%s: one that was cancelled before ends with %v and %d connections", name, err, n.connections())
			}
		}
	})
}

// The real network's attempts end as well: that of a unix socket whose queue is full.
func TestARealAttemptIsCancelled(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	c := web("unix:" + path)
	c.ConnectTimeout = 0
	w := realClusters(t, nil, nil, c)
	e, l := w.of("web")[0], w.loops[0]
	up, err := e.try((*upstream.Endpoint).Dial, 0) // the queue has room for one
	if err != nil {
		t.Fatal(err)
	}
	defer streamtest.Do(l, up.Close)
	var a upstream.Attempt
	gone := errors.New("client gone")
	ended := streamtest.Begin(l, func(t *task.Task) { _, err = e.Get(t, l, &a) })
	streamtest.Do(l, func() { a.Cancel(gone) })
	if <-ended; err != gone {
		t.Errorf("a cancelled attempt ends with %v", err)
	}
}

// An attempt that has succeeded concerns its connection no longer.
func TestACancelAfterTheConnectionDoesNothing(t *testing.T) {
	t.Parallel()
	var made *pending
	e := one(t, &fakeNetwork{fail: func(p *pending, _ string) error {
		made = p
		p.attempt.Wait(p)
		return nil
	}}, web("10.0.0.1:1"))
	l := e.loops[0]
	var a upstream.Attempt
	var err error
	streamtest.Go(l, func(t *task.Task) { _, err = e.Get(t, l, &a) })
	if err != nil {
		t.Fatal(err)
	}
	streamtest.Do(l, func() { a.Cancel(errors.New("late")) })
	if made.err != nil {
		t.Errorf("the connection was interrupted: %v", made.err)
	}
}

// Who cancels in the moment in which the connection comes gets none, and leaves none.
func TestACancelTogetherWithTheConnectionClosesIt(t *testing.T) {
	t.Parallel()
	gone := errors.New("client gone")
	n := &fakeNetwork{fail: func(p *pending, _ string) error { p.attempt.Cancel(gone); return nil }}
	e := one(t, n, web("10.0.0.1:1"))
	if _, err := e.try((*upstream.Endpoint).Get, 0); err != gone || n.connections() != 1 || n.open() != 0 {
		t.Errorf("%v, and %d of %d connections are open", err, n.open(), n.connections())
	}
}

// realClusters are clusters whose connections are real, on a loop of their own.
func realClusters(t *testing.T, r *metrics.Registry, mayHave func(int) bool, c config.Cluster) *world {
	t.Helper()
	loops := []*stream.Loop{streamtest.New(t)}
	cs, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{c}}, Metrics: r, Loops: loops, MayHave: mayHave})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	return &world{t, loops, cs}
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
			// A host may say that localhost is ::1 too, where nobody listens.
			var e *endpoint
			for _, e = range realClusters(t, nil, nil, web(address)).of("web") {
				if up, err := e.try((*upstream.Endpoint).Get, 0); err == nil {
					streamtest.Do(e.loops[0], up.Close)
					break
				}
			}
			for i := range 3 {
				e.roundTrip(i > 0)
			}
			l.Close()
			_, err = e.try((*upstream.Endpoint).Fresh, 0)
			if c, ok := errors.AsType[*upstream.ConnectError](err); !ok || c.Timeout {
				t.Errorf("nobody listens: %v", err)
			}
			if want := "connect to " + e.String() + ": dial " + listen.network + " " + strings.TrimPrefix(e.String(), "unix:") + ": connect: "; !strings.HasPrefix(err.Error(), want) {
				t.Errorf("the error is %q, want %q before the reason", err, want)
			}
		})
	}
}

// A connection that is given away as it is carries what comes first, and is counted like any
// other that becomes a tunnel.
func TestAConnectionIsGivenAwayAsItIs(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := metrics.NewRegistry()
	w := realClusters(t, r, nil, web(l.Addr().String()))
	e := w.of("web")[0]
	for range 2 { // the second one with the memory of the first
		var passed stream.Passed
		streamtest.Go(e.loops[0], func(t *task.Task) {
			var a upstream.Attempt
			if passed, err = e.Connect(t, e.loops[0], &a); err == nil {
				e.TunnelConnected(&a)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		unix.Write(passed.FD, []byte("first"))
		got := make([]byte, 5)
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "first" {
			t.Errorf("got %q, %v", got, err)
		}
		streamtest.Do(e.loops[0], func() { passed.Close(e.loops[0]) })
		e.Tunnels.Count(-1)
		conn.Close()
	}
	w.Close()
	l.Close()
	streamtest.Go(e.loops[0], func(t *task.Task) { _, err = e.Connect(t, e.loops[0], new(upstream.Attempt)) })
	if _, ok := errors.AsType[*upstream.ConnectError](err); !ok {
		t.Errorf("nobody listens: %v", err)
	}
	address := e.Address
	wantFigures(t, r,
		"cluster_endpoints{web} 1", "cluster_connections_total{web} 2", "endpoint_connections_total{web,"+address+"} 2", "cluster_connect_duration_seconds{web} 2",
		"cluster_connection_duration_seconds{web} 2", "cluster_connect_failures_total{web} 1", "endpoint_connect_failures_total{web,"+address+"} 1",
		"cluster_tunnels_total{web} 2",
	)
	c, _ := w.Get("web")
	if c.SetMembers(nil); len(c.Known()) > 0 {
		t.Error("something is with the endpoint still")
	}
}

// A host that vanishes without a word is found out, and no small message waits for another.
func TestTheOptionsOfAConnection(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := realClusters(t, nil, nil, web(l.Addr().String()))
	up, err := w.of("web")[0].try((*upstream.Endpoint).Dial, 0)
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	io.WriteString(far, "HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
	fd := -1
	streamtest.Go(w.loops[0], func(t *task.Task) {
		err = up.Send(t, &exchange.Request{Method: "GET", Authority: "x", Target: "/", Upgrade: "websocket"})
		if err == nil {
			_, err = up.Receive(t)
		}
		if err == nil {
			var c stream.Passed
			c, err = up.Switch()
			c.Leave(w.loops[0])
			fd = c.FD
		}
		up.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, o := range []struct {
		name                string
		level, option, want int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"SO_OOBINLINE", unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	} {
		if got, err := unix.GetsockoptInt(fd, o.level, o.option); got != o.want || err != nil {
			t.Errorf("%s is %d, %v; want %d", o.name, got, err, o.want)
		}
	}
}

// An idle connection that its upstream closes ends at once, not when somebody wants it.
func TestWhatAnUpstreamClosesIsNotKept(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns := serve(t, l)
	e := realClusters(t, nil, nil, web(l.Addr().String())).of("web")[0]
	e.roundTrip(false)
	e.roundTrip(true)
	(<-conns).Close()
	for left := 1; left > 0; {
		streamtest.Do(e.loops[0], func() { left = e.loops[0].Conns() })
	}
	e.roundTrip(false)
}

// On a kept connection nothing is allocated that was not there before.
func TestARequestOnAKeptConnectionAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // answers whatever comes, and allocates nothing itself
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		buf, answer := make([]byte, 1<<10), []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		for err == nil {
			if _, err = conn.Read(buf); err == nil {
				_, err = conn.Write(answer)
			}
		}
	}()
	w := realClusters(t, metrics.NewRegistry(), nil, web(l.Addr().String()))
	cluster, _ := w.Get("web")
	request := &exchange.Request{Method: "GET", Scheme: "http", Authority: "x", Target: "/", Major: 1, Minor: 1}
	var attempt upstream.Attempt
	var call upstream.Call
	loop := w.loops[0]
	once := func(task *task.Task) {
		round := cluster.Round(balance.Query{})
		e := round.Next()
		up, err := e.Get(task, loop, &attempt)
		if err != nil {
			t.Error(err)
			return
		}
		defer up.Close()
		e.Begin(loop, new(upstream.Attempt), &call)
		err = up.Send(task, request)
		if err == nil {
			err = up.Finish(task, nil)
		}
		if err == nil {
			_, err = up.Receive(task)
		}
		for err == nil {
			_, err = up.Read(task)
		}
		if err != io.EOF {
			t.Error(err)
		}
		call.Answered(200)
		call.End(upstream.Complete)
	}
	var before, after runtime.MemStats
	const many = 500
	streamtest.Go(loop, func(task *task.Task) {
		for range 50 {
			once(task)
		}
		runtime.ReadMemStats(&before)
		for range many {
			once(task)
		}
		runtime.ReadMemStats(&after)
	})
	if n := after.Mallocs - before.Mallocs; n > many/2 {
		t.Errorf("%d requests have allocated %d times", many, n)
	}
}

// What connections need until they become tunnels is used again for the next ones, and only
// when nobody has it any more.
func TestConnectionsThatBecomeTunnelsShareMemory(t *testing.T) { // not parallel: it counts allocations
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf, answer := make([]byte, 1<<10), []byte("HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if _, err := conn.Read(buf); err == nil {
				conn.Write(answer)
			}
			conn.Close()
		}
	}()
	defer func() { l.Close(); <-done }()
	w := realClusters(t, metrics.NewRegistry(), nil, web(l.Addr().String()))
	e, loop := w.of("web")[0].Endpoint, w.loops[0]
	request := &exchange.Request{Method: "GET", Scheme: "http", Authority: "x", Target: "/", Major: 1, Minor: 1, Upgrade: "websocket"}
	var attempt upstream.Attempt
	begin := func(task *task.Task) exchange.Upstream {
		up, err := e.Dial(task, loop, &attempt)
		if err == nil {
			err = up.Send(task, request)
		}
		if err != nil {
			t.Error(err)
		}
		return up
	}
	tunnel := func(task *task.Task, up exchange.Upstream) {
		defer up.Close()
		_, err := up.Receive(task)
		if err != nil {
			t.Error(err)
			return
		}
		passed, err := up.Switch()
		if err != nil {
			t.Error(err)
			return
		}
		passed.Close(loop)
	}
	var before, after runtime.MemStats
	const many, most = 200, 700
	streamtest.Go(loop, func(task *task.Task) {
		for range 10 {
			one, other := begin(task), begin(task)
			tunnel(task, one)
			third := begin(task)
			tunnel(task, other)
			tunnel(task, third)
		}
		runtime.ReadMemStats(&before)
		for range many {
			tunnel(task, begin(task))
		}
		runtime.ReadMemStats(&after)
	})
	if n := (after.TotalAlloc - before.TotalAlloc) / many; n > most {
		t.Errorf("a connection has allocated %d bytes, want at most %d", n, most)
	}
}

func (e *endpoint) roundTrip(reused bool) {
	e.t.Helper()
	up, err := e.try((*upstream.Endpoint).Get, 0)
	if err != nil {
		e.t.Fatal(err)
	}
	if up.Reused() != reused {
		e.t.Errorf("reused is %v", up.Reused())
	}
	streamtest.Go(e.loops[0], func(t *task.Task) { roundTrip(e.t, t, up) })
}

// roundTrip makes one request, and closes the exchange.
func roundTrip(t *testing.T, task *task.Task, up exchange.Upstream) {
	defer up.Close()
	if err := up.Send(task, &exchange.Request{Method: "GET", Scheme: "http", Authority: "x", Target: "/", Major: 1, Minor: 1}); err != nil {
		t.Error(err)
		return
	}
	if err := up.Finish(task, nil); err != nil {
		t.Error(err)
		return
	}
	r, err := up.Receive(task)
	if err != nil || r.Status != 200 {
		t.Errorf("%+v, %v", r, err)
		return
	}
	var body []byte
	for err == nil {
		var p []byte
		p, err = up.Read(task)
		body = append(body, p...)
	}
	if err != io.EOF || string(body) != "ok" {
		t.Errorf("%q, %v", body, err)
	}
}

// serve answers each head that comes to l with a 200, and hands out the first connections.
func serve(t *testing.T, l net.Listener) <-chan net.Conn {
	var serving sync.WaitGroup
	conns := make(chan net.Conn, 10)
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case conns <- conn:
			default:
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
	return conns
}
