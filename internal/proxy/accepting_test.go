package proxy

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
)

// limit is how long a test waits for something.
const limit = 10 * time.Second

// given is a connection that the server of a test was given.
type given struct {
	at     int // the loop, by its place
	fd     int
	remote netip.AddrPort
	early  string
}

// acceptance is a listener, and what its server is given. The server serves nobody.
type acceptance struct {
	t        *testing.T
	l        *listener
	loops    []*stream.Loop
	registry *metrics.Registry
	log      logText
	given    chan given
	idle     chan struct{} // the server has no connection any more
	socket   net.Listener  // the test's; the listener gets duplicates
}

// logText is a log that is written and read at once.
type logText struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// acceptOn makes a listener with as many loops, that does not accept yet. most are the
// connections that it may have; 0: any number.
func acceptOn(t *testing.T, loops, most int) *acceptance {
	t.Helper()
	a := &acceptance{t: t, registry: metrics.NewRegistry(), given: make(chan given, 1024), idle: make(chan struct{}, 1024)}
	for range loops {
		a.loops = append(a.loops, streamtest.New(t))
	}
	cfg := config.Listener{Name: "public", Limits: config.ListenerLimits{Connections: most}}
	a.l = newListener(cfg, "public", a.loops, slog.New(slog.NewTextHandler(&a.log, nil)), a.registry, func() { a.idle <- struct{}{} })
	a.l.serve = func(l *stream.Loop, c stream.Passed, remote netip.AddrPort) {
		fd, early := c.FD, c.Early
		a.given <- given{slices.Index(a.loops, l), fd, remote, string(early)}
	}
	a.l.goOn = func(l *stream.Loop, i http1.Idle) { a.l.serve(l, stream.Passed{FD: i.FD, Early: i.Early}, i.Remote) }
	t.Cleanup(func() {
		a.l.stop(false)
		for len(a.given) > 0 {
			unix.Close((<-a.given).fd)
		}
	})
	a.listen("tcp", "127.0.0.1:0")
	return a
}

func (a *acceptance) listen(network, address string) {
	a.t.Helper()
	var err error
	if a.socket, err = net.Listen(network, address); err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { a.socket.Close() })
}

// accept has the listener accept from the socket.
func (a *acceptance) accept() {
	a.t.Helper()
	if err := a.l.accept(copyOf(a.t, a.socket)); err != nil {
		a.t.Fatal(err)
	}
}

// copyOf returns another descriptor of a listening socket.
func copyOf(t *testing.T, socket net.Listener) (fd int) {
	t.Helper()
	raw, err := socket.(syscall.Conn).SyscallConn()
	if err == nil {
		err = raw.Control(func(ours uintptr) { fd, _ = unix.FcntlInt(ours, unix.F_DUPFD_CLOEXEC, 0) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func (a *acceptance) dial() net.Conn {
	a.t.Helper()
	conn, err := net.Dial(a.socket.Addr().Network(), a.socket.Addr().String())
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(limit))
	return conn
}

// next is what the server is given next. Its descriptor is the caller's.
func (a *acceptance) next() given {
	a.t.Helper()
	return await(a.t, "the server is given a connection", a.given)
}

// end has a connection end that the server was given.
func (a *acceptance) end(g given) {
	unix.Close(g.fd)
	streamtest.Do(a.loops[g.at], a.l.ended)
}

// settle returns when the listener has done what there was to do for it.
func (a *acceptance) settle() {
	for range 3 {
		streamtest.Do(a.loops[0], func() {})
	}
}

// wantNobody fails if the server is given a connection, or was.
func (a *acceptance) wantNobody() {
	a.t.Helper()
	a.settle()
	for _, l := range a.loops {
		streamtest.Do(l, func() {})
	}
	if n := len(a.given); n > 0 {
		a.t.Errorf("the server was given %d connections", n)
	}
}

// wantQueued accepts conn from the queue, where it must be the first.
func (a *acceptance) wantQueued(conn net.Conn) {
	a.t.Helper()
	a.socket.(*net.TCPListener).SetDeadline(time.Now().Add(limit))
	got, err := a.socket.Accept()
	if err != nil {
		a.t.Fatal(err)
	}
	defer got.Close()
	if got.RemoteAddr().String() != conn.LocalAddr().String() {
		a.t.Errorf("%s is in the queue, want %s", got.RemoteAddr(), conn.LocalAddr())
	}
}

func (a *acceptance) full() uint64     { return a.registry.Counter(limitReached, "public").Value() }
func (a *acceptance) failures() uint64 { return a.registry.Counter(acceptFailures, "public").Value() }

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestConnectionsAreDealtToTheLoopsInTurn(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "unix"} {
		a := acceptOn(t, 3, 0)
		if network == "unix" {
			a.listen("unix", filepath.Join(t.TempDir(), "s"))
		}
		a.accept()
		for i := range 10 {
			conn := a.dial()
			g := a.next()
			want := addrPort(conn.LocalAddr())
			if g.at != i%3 || g.remote != want || g.early != "" {
				t.Errorf("connection %d is given as %+v, want loop %d and %v", i, g, i%3, want)
			}
			if flags, err := unix.FcntlInt(uintptr(g.fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("flags %#x, %v", flags, err)
			}
			if flags, err := unix.FcntlInt(uintptr(g.fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("flags of the descriptor %#x, %v", flags, err)
			}
			a.end(g)
		}
		if n := a.l.turnover(); n != 20 {
			t.Errorf("%d connections came and went", n)
		}
	}
}

// addrPort is the zero value for a unix socket.
func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

func TestClientsAreKnownByTheAddressThatTheyHave(t *testing.T) {
	t.Parallel()
	for want, client := range map[string]*unix.RawSockaddrAny{
		"192.0.2.1:4660":       nameOf("192.0.2.1", 0x1234, 0),
		"[2001:db8::1]:443":    nameOf("2001:db8::1", 443, 0),
		"192.0.2.2:443":        nameOf("::ffff:192.0.2.2", 443, 0),
		"[fe80::1%lo]:443":     nameOf("fe80::1", 443, 1),
		"[fe80::1%999999]:443": nameOf("fe80::1", 443, 999999),
		"invalid AddrPort":     {Addr: unix.RawSockaddr{Family: unix.AF_UNIX}},
	} {
		if got := remoteOf(client); got.String() != want {
			t.Errorf("it is known as %v, want %s", got, want)
		}
	}
}

// nameOf is an address as the kernel writes it.
func nameOf(ip string, port uint16, zone uint32) *unix.RawSockaddrAny {
	name := new(unix.RawSockaddrAny)
	port = binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
	if addr := netip.MustParseAddr(ip); addr.Is4() {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(name)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: addr.As4(), Port: port}
	} else {
		*(*unix.RawSockaddrInet6)(unsafe.Pointer(name)) = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: addr.As16(), Port: port, Scope_id: zone}
	}
	return name
}

// So are those who were in the queue before, and those of a socket of multipath TCP, who
// inherit only a part.
func TestConnectionsSendAtOnceAndAreProbed(t *testing.T) {
	t.Parallel()
	for _, multipath := range []bool{false, true} {
		var how net.ListenConfig
		how.SetMultipathTCP(multipath)
		a := acceptOn(t, 2, 0)
		a.socket.Close()
		var err error
		if a.socket, err = how.Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		defer a.socket.Close()
		for range 3 {
			a.dial()
		}
		a.accept()
		for i := range 6 {
			if i >= 3 {
				a.dial()
			}
			g := a.next()
			for _, option := range []struct {
				name        string
				level, what int
				want        int
			}{
				{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
				{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{"SO_OOBINLINE", unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
				{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
				{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
				{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
			} {
				if got, err := unix.GetsockoptInt(g.fd, option.level, option.what); err != nil || got != option.want {
					t.Errorf("multipath %v, connection %d: %s is %d, %v; want %d", multipath, i, option.name, got, err, option.want)
				}
			}
			a.end(g)
		}
	}
}

// More come at once than are accepted in a turn.
func TestACrowdIsAccepted(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 2, 0)
	const crowd = 5*acceptsATurn + 3
	for range crowd {
		a.dial()
	}
	a.accept()
	seen := make(map[netip.AddrPort]bool)
	for range crowd {
		g := a.next()
		seen[g.remote] = true
		a.end(g)
	}
	if len(seen) != crowd {
		t.Errorf("%d clients, want %d", len(seen), crowd)
	}
	a.wantNobody()
}

// Whatever the order in which connections come and go, there are never more than there
// may be, nobody is forgotten, and whoever waits for the last one is told.
func TestNobodyIsForgottenBelowTheLimit(t *testing.T) {
	t.Parallel()
	const most, clients = 5, 400
	a := acceptOn(t, 3, most)
	a.accept()
	var dialling sync.WaitGroup
	for range 4 {
		dialling.Go(func() {
			for range clients / 4 {
				if conn, err := net.Dial("tcp", a.socket.Addr().String()); err != nil {
					t.Error(err)
				} else {
					conn.Close()
				}
			}
		})
	}
	var ending sync.WaitGroup
	for range clients {
		g := a.next()
		if n := a.l.open.Load(); n > most {
			t.Errorf("%d connections at once", n)
		}
		ending.Go(func() { a.end(g) })
	}
	dialling.Wait()
	ending.Wait()
	await(t, "the last one has ended", a.idle)
	if n := a.l.connections(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

func TestALackOfRoomIsCountedOnceForEachTime(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 1, 1)
	a.accept()
	var want uint64
	wantFull := func() {
		t.Helper()
		want++
		until(t, "it finds that there is no room", func() bool { return a.full() == want })
	}
	for range 3 {
		a.l.enter() // a tunnel
		conn := a.dial()
		wantFull()
		a.l.enter() // one that follows its connection
		a.l.leave()
		a.wantNobody()
		if n := a.full(); n != want {
			t.Errorf("%d times are counted, want %d", n, want)
		}
		a.l.leave()
		g := a.next()
		if g.remote != addrPort(conn.LocalAddr()) {
			t.Errorf("it accepts %v", g.remote)
		}
		wantFull() // by that one, which is a time of its own
		a.end(g)
		a.settle()
	}
	if n := strings.Count(a.log.String(), "limits.connections is reached"); n != 1 {
		t.Errorf("%d lines:\n%s", n, a.log.String())
	}
}

func TestAPausedListenerLeavesItsQueueToOthers(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 2, 0)
	a.accept()
	for range 16 {
		a.dial()
		a.end(a.next())
		a.settle()
		a.l.pause(true)
		conn := a.dial()
		a.wantNobody()
		a.wantQueued(conn)
		waits := a.dial()
		a.wantNobody()
		a.l.pause(false)
		if g := a.next(); g.remote != addrPort(waits.LocalAddr()) {
			t.Errorf("it accepts %v", g.remote)
		} else {
			a.end(g)
		}
	}
}

// A pause may begin and end while the listener waits for something else.
func TestAPauseThatEndsWhileThereIsNoRoomLosesNobody(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 1, 1)
	a.accept()
	a.dial()
	first := a.next()
	a.dial()
	a.settle()
	a.l.pause(true)
	a.l.pause(false)
	a.wantNobody()
	a.l.pause(true)
	a.end(first)
	a.wantNobody()
	a.l.pause(false)
	a.end(a.next())
}

func TestAStopLeavesTheQueueToOthers(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 2, 1)
	a.accept()
	a.dial()
	first := a.next()
	second := a.dial() // there is no room
	a.settle()
	a.l.stop(false)
	if a.l.fd != -1 {
		t.Errorf("it has the descriptor %d", a.l.fd)
	}
	a.end(first)
	a.wantNobody()
	a.wantQueued(second)
	a.l.stop(false) // does nothing
	a.accept()
	a.dial()
	a.end(a.next())
}

// Nobody else will serve who is in the queue: neither want of room nor a pause counts, and
// it takes as many turns as there are.
func TestAQueueIsEmptiedBeyondTheLimit(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 2, 1)
	a.accept()
	a.dial()
	first := a.next()
	const waiting = 3*acceptsATurn + 1
	for range waiting {
		a.dial()
	}
	a.l.pause(true)
	a.l.stop(true)
	if n := a.l.connections(); n != waiting+1 {
		t.Errorf("there are %d connections, want %d", n, waiting+1)
	}
	a.socket.Close() // the listener has no other
	if conn, err := net.Dial("tcp", a.socket.Addr().String()); err == nil {
		conn.Close()
		t.Error("the socket is still open")
	}
	for range waiting {
		a.end(a.next())
	}
	a.end(first)
	await(t, "the last one has ended", a.idle)
}

// Others may be accepted by several loops' connections at the same time.
func TestAConnectionOfAnotherProcessIsServedBeyondTheLimit(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 2, 1)
	a.accept()
	a.dial()
	first := a.next()
	for i := range 3 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[0])
		remote := netip.MustParseAddrPort(fmt.Sprintf("192.0.2.1:%d", 1000+i))
		a.l.adopt(http1.Idle{FD: fds[1], Remote: remote, Early: []byte("GET ")})
		g := a.next()
		if want := (given{(i + 1) % 2, fds[1], remote, "GET "}); g != want {
			t.Errorf("the server is given %+v, want %+v", g, want)
		}
		defer a.end(g)
	}
	if n := a.l.connections(); n != 4 {
		t.Errorf("%d connections", n)
	}
	a.dial()
	a.end(first)
	a.wantNobody() // 3 of 1 are left
}

func TestWithoutALoopNobodyIsAccepted(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 2, 0)
	a.accept()
	for _, l := range a.loops {
		l.Stop()
		until(t, "the loop has ended", func() bool { return !l.Post(func() {}) })
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	a.l.adopt(http1.Idle{FD: fds[1]})
	if n, err := unix.Read(fds[0], make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("it is still open: %d, %v", n, err)
	}
	if n := a.l.connections(); n != 0 {
		t.Errorf("%d connections", n)
	}
	a.l.stop(true)
	if err := a.l.accept(copyOf(t, a.socket)); err == nil || a.l.fd != -1 {
		t.Errorf("it accepts: %v", err)
	}
}

func TestFailuresToAcceptAreCountedAndLoggedOnce(t *testing.T) {
	t.Parallel()
	a := acceptOn(t, 1, 0)
	clock := streamtest.NewClock(a.loops...)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0) // which does not listen
	if err != nil {
		t.Fatal(err)
	}
	if err := a.l.accept(fd); err != nil {
		t.Fatal(err)
	}
	until(t, "it fails", func() bool { return a.failures() == 1 })
	for i := range uint64(4) {
		clock.Advance(acceptPause / 2) // too soon
		if n := a.failures(); n != 1+i {
			t.Errorf("%d failures are counted, want %d", n, 1+i)
		}
		clock.Advance(2 * time.Second)
		if n := a.failures(); n != 2+i {
			t.Errorf("%d failures are counted, want %d", n, 2+i)
		}
	}
	a.l.enter()
	a.l.leave() // which may have freed what is wanting
	a.settle()
	if n := a.failures(); n != 6 {
		t.Errorf("%d failures are counted, want 6", n)
	}
	if n := strings.Count(a.log.String(), "invalid argument"); n != 1 {
		t.Errorf("%d lines:\n%s", n, a.log.String())
	}
}

// What a listener does is a matter of its state: everything else leaves it alone.
func TestAListenerLooksWhenItIsTold(t *testing.T) {
	t.Parallel()
	events := []acceptEvent{queued, left, tried, resumed}
	for state, want := range map[acceptState][]acceptEvent{
		off:      nil,
		taking:   {queued},
		resting:  {resumed},
		crowded:  {left},
		wanting:  {left, tried},
		emptying: {queued},
	} {
		for _, e := range events {
			if got := looks[state][e]; got != slices.Contains(want, e) {
				t.Errorf("in state %d event %d makes it look: %v", state, e, got)
			}
		}
	}
	if len(looks) != int(emptying)+1 {
		t.Errorf("%d states", len(looks))
	}
}
