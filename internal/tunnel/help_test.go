package tunnel_test

import (
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tunnel"
)

var seed = flag.Uint64("seed", 0, "run only the schedule with this seed")

func TestMain(m *testing.M) {
	becomeRelay()
	goleak.VerifyTestMain(m)
}

// patience bounds every wait of a test.
const patience = 30 * time.Second

// ends collects the records of tunnels that ended.
type ends struct {
	mu      sync.Mutex
	records []tunnel.Record
}

func (e *ends) add(r tunnel.Record) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.records = append(e.records, r)
}

func (e *ends) all() []tunnel.Record {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]tunnel.Record(nil), e.records...)
}

// relay is one of the ways in which tunnels are relayed. What a peer sees of a tunnel
// is the same for all.
type relay struct {
	name   string
	loops  shape // none: a pair of goroutines for each tunnel
	buffer int   // bytes of a relay buffer
	tls    bool  // to the client
}

var (
	onGoroutines   = relay{name: "goroutines", buffer: 32 << 10}
	onLoopsOverTLS = relay{name: "TLS on loops", buffer: 64 << 10, loops: shape{loops: 2, tunnels: 32, buffers: 8, pipes: 2}, tls: true}
	onLoops        = relay{name: "loops", buffer: 64 << 10, loops: shape{loops: 2, tunnels: 8, buffers: 8, pipes: 2}}
)

// onBothRelays runs a test once for each relay.
func onBothRelays(t *testing.T, run func(t *testing.T, r relay)) {
	t.Parallel()
	onRelays(t, run, onLoops, onGoroutines)
}

// onAllRelays is onBothRelays and once more with TLS to the client.
func onAllRelays(t *testing.T, run func(t *testing.T, r relay)) {
	t.Parallel()
	onRelays(t, run, onLoops, onGoroutines, onLoopsOverTLS)
}

func onRelays(t *testing.T, run func(t *testing.T, r relay), relays ...relay) {
	for _, r := range relays {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			run(t, r)
		})
	}
}

// newSet returns a Set whose tunnels must have ended by the end of the test.
func (r relay) newSet(t testing.TB) (*tunnel.Set, *ends) {
	t.Helper()
	e := new(ends)
	return r.newSetWith(t, tunnel.Options{OnEnd: e.add}), e
}

// newSetWith is newSet with options of the caller's.
func (r relay) newSetWith(t testing.TB, o tunnel.Options) *tunnel.Set {
	t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(faults{t}, &slog.HandlerOptions{Level: slog.LevelError}))
	}
	if o.Loops == nil {
		o.Loops = r.loops.start(t)
	}
	s := tunnel.NewSet(o)
	if r.tls {
		secured.Store(s, &securer{loop: streamtest.New(t), sides: [2]bool{true, false}})
		t.Cleanup(func() { secured.Delete(s) })
	}
	t.Cleanup(func() {
		s.CloseAll(tunnel.Stopped, 0)
		waitEmpty(t, s)
		if n := s.Buffers(); n != 0 {
			t.Errorf("%d buffers are still out", n)
		}
	})
	return s
}

// faults fails a test by what is logged.
type faults struct{ testing.TB }

func (f faults) Write(line []byte) (int, error) {
	f.Errorf("logged: %s", line)
	return len(line), nil
}

// newSet is the one of goroutines: what runs on a fake clock needs it.
func newSet(t testing.TB) (*tunnel.Set, *ends) {
	t.Helper()
	return onGoroutines.newSet(t)
}

func waitEmpty(t testing.TB, s *tunnel.Set) {
	t.Helper()
	select {
	case <-s.Empty():
	case <-time.After(patience):
		t.Fatalf("tunnels are left: %+v", s.List())
	}
}

// wantEnd waits for the only tunnel to end and checks why it did.
func wantEnd(t testing.TB, s *tunnel.Set, e *ends, want tunnel.Reason) tunnel.Record {
	t.Helper()
	waitEmpty(t, s)
	all := e.all()
	if len(all) != 1 {
		t.Fatalf("%d tunnels ended, want 1", len(all))
	}
	if all[0].Reason != want {
		t.Errorf("reason is %q, want %q", all[0].Reason, want)
	}
	return all[0]
}

// tcpPair returns both ends of a connection over loopback. small makes the
// kernel's buffers small, but not smaller than loopback's segments of 64 KiB: then
// it is the kernel's timers that one measures.
func tcpPair(t testing.TB, small bool) (far, near *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	far, near = c.(*net.TCPConn), a.(*net.TCPConn)
	if small {
		for _, c := range []*net.TCPConn{far, near} {
			c.SetReadBuffer(32 << 10)
			c.SetWriteBuffer(16 << 10)
		}
	}
	t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(6 * patience))
	return far, near
}

// second returns another descriptor of the same socket. While it is open, a close
// of the first tells the peer nothing.
func second(t testing.TB, c syscall.Conn) (fd int) {
	t.Helper()
	fd = duplicate(t, c)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// duplicate is second for a caller who closes it.
func duplicate(t testing.TB, c syscall.Conn) (fd int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(raw.Control(func(first uintptr) {
		fd, err = unix.FcntlInt(first, unix.F_DUPFD_CLOEXEC, 0)
	}), err); err != nil {
		t.Fatal(err)
	}
	return fd
}

// open starts a tunnel and returns its client and its server.
func open(t testing.TB, s *tunnel.Set, spec tunnel.Spec) (client, server tcpConn) {
	t.Helper()
	return openOver(t, s, spec, false)
}

// openOver is open with the kernel's buffers as in tcpPair.
func openOver(t testing.TB, s *tunnel.Set, spec tunnel.Spec, small bool) (client, server tcpConn) {
	t.Helper()
	c, down := tcpPair(t, small)
	u, up := tcpPair(t, small)
	return begin(t, s, spec, [2]*net.TCPConn{c, u}, [2]*net.TCPConn{down, up})
}

// openKept is open with a second descriptor of each of the relay's sockets.
func openKept(t testing.TB, s *tunnel.Set, spec tunnel.Spec) (client, server tcpConn) {
	t.Helper()
	client, down := tcpPair(t, false)
	server, up := tcpPair(t, false)
	second(t, down)
	second(t, up)
	spec.Down, spec.Up = down, up
	s.Start(spec)
	return client, server
}

// limited is an origin of which only the limits matter.
func limited(l tunnel.Limits) *tunnel.Origin { return &tunnel.Origin{Limits: l} }

func write(t testing.TB, c net.Conn, p []byte) {
	t.Helper()
	if n, err := c.Write(p); err != nil {
		t.Fatalf("write: %v after %d of %d bytes", err, n, len(p))
	}
}

// wantBytes reads exactly want.
func wantBytes(t testing.TB, c net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("read %q (%v), want %q", got[:n], err, want)
	}
}

func wantEOF(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes and %v, want a FIN", n, err)
	}
}

func wantReset(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes and %v, want a reset", n, err)
	}
}

func reset(c interface{ SetLinger(int) error }) {
	c.SetLinger(0)
	if p, ok := c.(*peer); ok {
		c = p.TCPConn // nothing is said by TLS
	}
	c.(io.Closer).Close()
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// memConn is one end of a connection in memory that can be half-closed, for
// tests on a fake clock.
type memConn struct {
	net.Conn // what is read
	out      net.Conn
}

func (c memConn) Write(p []byte) (int, error)        { return c.out.Write(p) }
func (c memConn) CloseWrite() error                  { return c.out.Close() }
func (c memConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
func (c memConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}
func (c memConn) Close() error { return errors.Join(c.Conn.Close(), c.out.Close()) }

func memPair() (far, near memConn) {
	a, b := net.Pipe()
	c, d := net.Pipe()
	return memConn{a, c}, memConn{d, b}
}

// memOpen starts a tunnel in memory whose peers answer a FIN with a FIN.
func memOpen(s *tunnel.Set, spec tunnel.Spec) (client, server memConn) {
	client, down := memPair()
	server, up := memPair()
	spec.Down, spec.Up = down, up
	s.Start(spec)
	return client, server
}

// polite reads until the FIN and closes.
func polite(conns ...memConn) {
	for _, c := range conns {
		go func() {
			io.Copy(io.Discard, c)
			c.Close()
		}()
	}
}

// plain hides everything of a connection but what any net.Conn with half-close has.
type plain struct{ net.Conn }

func (p plain) CloseWrite() error { return p.Conn.(*net.TCPConn).CloseWrite() }

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
