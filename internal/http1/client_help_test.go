package http1

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// testClient is a Conn with its upstream in the hands of the test, whose methods may be
// called by the test's goroutine.
type testClient struct {
	*Conn
	*peer
	loop *stream.Loop
	idle chan *Conn
}

func dialClient(t *testing.T) *testClient {
	t.Helper()
	idle := make(chan *Conn, 100)
	return dialClientFor(t, idle, ClientOptions{OnIdle: func(c *Conn) { idle <- c }})
}

// dialClientFor connects a client over TCP, on a loop of its own.
func dialClientFor(t *testing.T, idle chan *Conn, o ClientOptions) *testClient {
	t.Helper()
	return dialOn(t, streamtest.New(t), NewClient(o), idle)
}

// dialAgain renews the client, which was switched, and connects it to another upstream.
func (c *testClient) dialAgain(t *testing.T) *testClient {
	t.Helper()
	streamtest.Do(c.loop, func() { c.Renew(nil) })
	return dialOn(t, c.loop, c.Conn, c.idle)
}

func dialOn(t *testing.T, loop *stream.Loop, c *Conn, idle chan *Conn) *testClient {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o := &stream.DialOptions{Until: time.Now().Add(patience)}
	if overTLS {
		_, o.TLS = sides()
	}
	dialled := streamtest.Begin(loop, func(t *task.Task) { err = c.Dial(t, loop, addrOf(l), o) })
	theirs, failed := l.Accept()
	if failed != nil {
		t.Fatal(failed)
	}
	theirs = secured(t, theirs, true)
	<-dialled
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { streamtest.Do(loop, c.Close) })
	return &testClient{Conn: c, peer: newPeer(t, theirs), loop: loop, idle: idle}
}

func addrOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

// begin begins an exchange.
func (c *testClient) begin() *driven {
	c.t.Helper()
	e, err := c.Exchange()
	if err != nil {
		c.t.Fatal(err)
	}
	return e
}

// Exchange, Alive and Close are those of the Conn.
func (c *testClient) Exchange() (*driven, error) {
	var up exchange.Upstream
	var err error
	streamtest.Do(c.loop, func() { up, err = c.Conn.Exchange() })
	return &driven{t: c.t, loop: c.loop, up: up}, err
}

func (c *testClient) Alive() (alive bool) {
	streamtest.Do(c.loop, func() { alive = c.Conn.Alive() })
	return alive
}

func (c *testClient) Close() { streamtest.Do(c.loop, c.Conn.Close) }

// isOpen says whether the connection has its descriptor.
func (c *testClient) isOpen() (open bool) {
	streamtest.Do(c.loop, func() { open = c.Conn.conn.Open() })
	return open
}

// isIdle says whether the connection was handed back.
func (c *testClient) isIdle() bool {
	select {
	case <-c.idle:
		return true
	default:
		return false
	}
}

func (c *testClient) conn() *net.TCPConn { return c.peer.tcp() }

// driven is an exchange with an upstream that the test's goroutine, or another one, drives:
// each call is a task. What it returns is the test's own. It is an io.Reader and an io.Writer.
type driven struct {
	t    *testing.T
	loop *stream.Loop
	up   exchange.Upstream
	rest []byte // read and not handed out
	err  error  // behind that
}

func (d *driven) Send(r *exchange.Request) (err error) {
	streamtest.Go(d.loop, func(t *task.Task) { err = d.up.Send(t, r) })
	return err
}

func (d *driven) Write(p []byte) (n int, err error) {
	streamtest.Go(d.loop, func(t *task.Task) { err = d.up.Write(t, p) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *driven) Finish(trailers exchange.Fields) (err error) {
	streamtest.Go(d.loop, func(t *task.Task) { err = d.up.Finish(t, trailers) })
	return err
}

func (d *driven) Receive() (head *exchange.Response, err error) {
	streamtest.Go(d.loop, func(t *task.Task) {
		if head, err = d.up.Receive(t); head != nil {
			head = ownResponse(head)
		}
	})
	return head, err
}

func (d *driven) Read(p []byte) (int, error) {
	for len(d.rest) == 0 && d.err == nil {
		streamtest.Go(d.loop, func(t *task.Task) {
			var b []byte
			b, d.err = d.up.Read(t)
			d.rest = bytes.Clone(b)
		})
	}
	n := copy(p, d.rest)
	if d.rest = d.rest[n:]; n == 0 {
		return 0, d.err
	}
	return n, nil
}

// Switch returns the connection as one of package net.
func (d *driven) Switch() (conn net.Conn, early []byte, err error) {
	var c stream.Passed
	streamtest.Do(d.loop, func() {
		c, err = d.up.Switch()
		c.Leave(d.loop)
	})
	if err != nil {
		return nil, nil, err
	}
	return connOf(d.t, c.FD), c.Early, nil
}

func (d *driven) ready() (ready bool) {
	streamtest.Do(d.loop, func() { ready = d.up.Ready() })
	return ready
}

func (d *driven) Reused() (reused bool) {
	streamtest.Do(d.loop, func() { reused = d.up.Reused() })
	return reused
}

func (d *driven) Close() { streamtest.Do(d.loop, d.up.Close) }

// connOf makes a descriptor one of package net.
func connOf(t testing.TB, fd int) net.Conn {
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// ownResponse copies a head that is borrowed.
func ownResponse(r *exchange.Response) *exchange.Response {
	own := *r
	own.Reason, own.Upgrade = strings.Clone(r.Reason), strings.Clone(r.Upgrade)
	own.Fields = nil
	for _, f := range r.Fields {
		own.Fields.Add(strings.Clone(f.Name), strings.Clone(f.Value))
	}
	return &own
}

// socketPair returns two ends that do not block.
func socketPair(t testing.TB) (a, b int) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fds[0], fds[1]
}

// adoptClient returns a client on l whose connection is one end of a socket pair, and the
// other end.
func adoptClient(t testing.TB, l *stream.Loop, o ClientOptions) (c *Conn, theirs int) {
	t.Helper()
	c = NewClient(o)
	ours, theirs := socketPair(t)
	var err error
	streamtest.Do(l, func() { err = c.connected(l, l.Adopt(&c.conn, ours, nil, o.Traffic)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { streamtest.Do(l, c.Close) })
	return c, theirs
}

// sendPieces sends one piece after the other, each when the peer has taken the one before,
// as far as that takes them.
func sendPieces(t *task.Task, c *stream.Conn, pieces []string) {
	for _, p := range pieces {
		if c.Send(t, []byte(p), nil, nil) != nil {
			return
		}
		for left := 1; left > 0 && !c.HungUp(); t.Pause() {
			var err error
			if left, err = unix.IoctlGetInt(c.FD(), unix.SIOCOUTQ); err != nil {
				return
			}
		}
	}
}
