package tunnel_test

import (
	"bytes"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// raw returns a connection of which Go's poller knows only the far end.
func raw(t testing.TB, network string) (far net.Conn, near int) {
	t.Helper()
	family, name := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if network == "unix" {
		family, name = unix.AF_UNIX, &unix.SockaddrUnix{Name: t.TempDir() + "/s"}
	}
	l, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := unix.Bind(l, name); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(l, 1); err != nil {
		t.Fatal(err)
	}
	address := "/"
	switch at, _ := unix.Getsockname(l); at := at.(type) {
	case *unix.SockaddrInet4:
		address = (&net.TCPAddr{IP: at.Addr[:], Port: at.Port}).String()
	case *unix.SockaddrUnix:
		address = at.Name
	}
	if far, err = net.Dial(network, address); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(6 * patience))
	if near, _, err = unix.Accept4(l, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	return far, near
}

// openRaw starts a tunnel of descriptors and returns its client and its server.
func openRaw(t testing.TB, s *tunnel.Set, spec tunnel.Spec) (client, server net.Conn) {
	t.Helper()
	client, spec.FDs[0] = raw(t, "tcp")
	server, spec.FDs[1] = raw(t, "tcp")
	s.Start(spec)
	return client, server
}

func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

func TestATunnelOfDescriptorsIsRelayedLikeAnyOther(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		for _, networks := range [][2]string{{"tcp", "tcp"}, {"tcp", "unix"}, {"unix", "tcp"}, {"unix", "unix"}} {
			set, e := r.newSet(t)
			client, down := raw(t, networks[0])
			server, up := raw(t, networks[1])
			set.Start(tunnel.Spec{
				FDs: [2]int{down, up}, Head: []byte("head "), DownEarly: []byte("client first "), UpEarly: []byte("server first "),
			})
			write(t, client, []byte("then this"))
			wantBytes(t, server, "client first then this")
			write(t, server, []byte("then that"))
			wantBytes(t, client, "head server first then that")
			onLoop := 0
			for _, n := range set.Shares() {
				onLoop += n
			}
			if (onLoop == 1) != r.onLoops() {
				t.Errorf("%v: loops have %d tunnels", networks, onLoop)
			}
			closeWrite(t, client)
			wantEOF(t, server)
			write(t, server, []byte("the rest"))
			wantBytes(t, client, "the rest")
			server.Close()
			wantEOF(t, client)
			end := wantEnd(t, set, e, tunnel.DownstreamClosed)
			if end.ToUp != 22 || end.ToDown != 30 {
				t.Errorf("%v: %d bytes to the server, %d to the client", networks, end.ToUp, end.ToDown)
			}
		}
	})
}

// The descriptors are the loop's as they are, and have what every tunnel has.
func TestALoopTakesTheDescriptorsThemselves(t *testing.T) {
	t.Parallel()
	set, _ := onLoops.newSet(t)
	_, down := raw(t, "tcp")
	_, up := raw(t, "tcp")
	cookie := func(fd int) uint64 {
		t.Helper()
		n, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := [2]uint64{cookie(down), cookie(up)}
	set.Start(tunnel.Spec{FDs: [2]int{down, up}, Origin: limited(tunnel.Limits{KeepAlive: tunnel.KeepAlive{Idle: time.Hour, Interval: time.Minute, Count: 3}})})
	if len(set.List()) != 1 { // the loop has had it
		t.Fatal("it is not in the list")
	}
	if after := [2]uint64{cookie(down), cookie(up)}; after != before {
		t.Error("the descriptors are of other sockets")
	}
	for _, fd := range []int{down, up} {
		for _, option := range []struct{ level, name, want int }{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {unix.SOL_SOCKET, unix.SO_OOBINLINE, 1}, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 3600},
		} {
			if got, err := unix.GetsockoptInt(fd, option.level, option.name); err != nil || got != option.want {
				t.Errorf("option %d is %d, %v; want %d", option.name, got, err, option.want)
			}
		}
	}
}

func TestATunnelOfDescriptorsIsOnTheLoopThatItPrefersWhileThatHasRoom(t *testing.T) {
	t.Parallel()
	r := relay{loops: shape{loops: 3, tunnels: 2, buffers: 2, pipes: 1}}
	set, _ := r.newSet(t)
	for i, want := range [][3]int{{0, 1, 0}, {0, 2, 0}, {0, 2, 1}, {0, 2, 2}, {1, 2, 2}, {2, 2, 2}, {2, 2, 2}} {
		openRaw(t, set, tunnel.Spec{Loop: 1})
		if got := [3]int(set.Shares()); got != want {
			t.Errorf("after %d tunnels the loops have %v, want %v", i+1, got, want)
		}
	}
	if n := len(set.List()); n != 7 {
		t.Errorf("%d tunnels, want 7: the last one has goroutines", n)
	}
}

func TestDescriptorsThatATunnelMayNotHaveAreMoved(t *testing.T) {
	t.Parallel()
	r := relay{loops: shape{loops: 1, tunnels: 4, buffers: 4, pipes: 1}}
	asked := -1
	set := r.newSetWith(t, tunnel.Options{MayHave: func(fd int) bool { asked = fd; return false }})
	client, down := raw(t, "tcp")
	server, up := raw(t, "tcp")
	set.Start(tunnel.Spec{FDs: [2]int{down, up}})
	if asked != max(down, up) {
		t.Errorf("asked for %d of %d and %d", asked, down, up)
	}
	write(t, client, []byte("hello"))
	wantBytes(t, server, "hello")
	if n := set.Shares(); n[0] != 0 {
		t.Error("a loop has it")
	}
}

// A loop may start tunnels, on itself and on others.
func TestATunnelIsStartedOnALoop(t *testing.T) {
	t.Parallel()
	r := relay{loops: shape{loops: 2, tunnels: 2, buffers: 4, pipes: 1}}
	o := tunnel.Options{Loops: r.loops.start(t)}
	set := relay{}.newSetWith(t, o)
	type pair struct{ client, server net.Conn }
	pairs := make(chan pair, 6)
	for range cap(pairs) { // for the last two, no loop has room
		var p pair
		var fds [2]int
		p.client, fds[0] = raw(t, "tcp")
		p.server, fds[1] = raw(t, "tcp")
		o.Loops[0].Poller.Post(func() {
			set.Start(tunnel.Spec{FDs: fds})
			pairs <- p
		})
	}
	for range cap(pairs) {
		select {
		case p := <-pairs:
			write(t, p.client, []byte("hello"))
			wantBytes(t, p.server, "hello")
		case <-time.After(patience):
			t.Fatal("Start waits")
		}
	}
	if got := [2]int(set.Shares()); got != [2]int{2, 2} {
		t.Errorf("the loops have %v", got)
	}
}

// What cannot be relayed at all is cut, and that is reported.
func TestATunnelThatCannotBeRelayedIsCut(t *testing.T) {
	t.Parallel()
	for bad := range 2 {
		var log lockedBuffer
		var e ends
		set := onLoops.newSetWith(t, tunnel.Options{Log: slog.New(slog.NewTextHandler(&log, nil)), OnEnd: e.add})
		peer, fd := raw(t, "tcp")
		event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK) // which is no socket
		if err != nil {
			t.Fatal(err)
		}
		fds := [2]int{fd, fd}
		fds[bad] = event
		set.Start(tunnel.Spec{FDs: fds, ID: "the-bad-one", UpEarly: bytes.Repeat([]byte("x"), 100)})
		wantReset(t, peer)
		wantEnd(t, set, &e, tunnel.Failed)
		if n, _ := set.Summary(); n != 0 {
			t.Errorf("%d tunnels live", n)
		}
		if !strings.Contains(log.String(), "a tunnel cannot be relayed") || !strings.Contains(log.String(), "the-bad-one") {
			t.Errorf("the log says %s", log.String())
		}
	}
}
