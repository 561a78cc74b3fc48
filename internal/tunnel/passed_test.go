package tunnel_test

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel"
)

// former is who has had two sockets on a loop before they became a tunnel.
type former struct {
	t       *testing.T
	loop    *poller.Loop
	fds     [2]int
	handles [2]poller.Handle
	events  [2]poller.Events
	told    int
}

func (f *former) Ready(i uint32, e poller.Events) {
	f.events[i] |= e
	f.told++
}

// on calls fn on the loop, after all that it can be told so far.
func (f *former) on(fn func()) {
	f.t.Helper()
	done := make(chan struct{})
	if !f.loop.Post(func() { defer close(done); fn() }) {
		f.t.Fatal("the loop has ended")
	}
	select {
	case <-done:
	case <-time.After(patience):
		f.t.Fatal("the loop does not answer")
	}
}

// register returns the peers of two sockets that are on a loop, which says that they can be
// written to.
func register(t *testing.T, l *poller.Loop) (f *former, client, server net.Conn) {
	t.Helper()
	f = &former{t: t, loop: l}
	client, f.fds[0] = raw(t, "tcp")
	server, f.fds[1] = raw(t, "tcp")
	f.on(func() {
		for i, fd := range f.fds {
			var err error
			if f.handles[i], err = l.Add(fd, f, uint32(i)); err != nil {
				t.Error(err)
			}
		}
	})
	eventually(t, "the loop tells of both", func() (both bool) {
		f.on(func() { both = f.events[0] != 0 && f.events[1] != 0 })
		return both
	})
	return f, client, server
}

// start has a tunnel started as its former owner does who has read nothing.
func (f *former) start(s *tunnel.Set, spec tunnel.Spec) {
	f.t.Helper()
	f.on(func() {
		spec.FDs, spec.On = f.fds, f.loop
		for i := range spec.About {
			spec.About[i] = tunnel.About{Plain: true, Handle: f.handles[i], Events: f.events[i]}
		}
		f.told = 0
		s.Start(spec)
	})
}

func (f *former) wantNothingTold() {
	f.t.Helper()
	f.on(func() {
		if f.told != 0 {
			f.t.Errorf("the former owner was told %d times more", f.told)
		}
	})
}

// Sockets that are on the loop of their tunnel already stay there, and nothing of what the
// loop tells is lost: neither what it has told its former owner, nor what it tells while the
// tunnel waits for the vault.
func TestATunnelOfSocketsThatAreOnItsLoop(t *testing.T) {
	t.Parallel()
	nothing := func(*testing.T, net.Conn) {}
	some := func(text string) func(*testing.T, net.Conn) {
		return func(t *testing.T, c net.Conn) { write(t, c, []byte(text)) }
	}
	fin := func(t *testing.T, c net.Conn) { closeWrite(t, c) }
	abort := func(t *testing.T, c net.Conn) { reset(c.(*net.TCPConn)) }
	for name, test := range map[string]struct {
		before, meanwhile func(*testing.T, net.Conn)
		want              string
		reason            tunnel.Reason
	}{
		"all comes later":            {nothing, nothing, "", tunnel.Open},
		"bytes before the start":     {some("before "), nothing, "before ", tunnel.Open},
		"bytes before the deposit":   {nothing, some("meanwhile "), "meanwhile ", tunnel.Open},
		"both":                       {some("before "), some("meanwhile "), "before meanwhile ", tunnel.Open},
		"the end before the start":   {fin, nothing, "", tunnel.DownstreamClosed},
		"the end before the deposit": {some("before"), fin, "before", tunnel.DownstreamClosed},
		"a reset before the start":   {abort, nothing, "", tunnel.DownstreamReset},
		"a reset before the deposit": {some("before"), abort, "before", tunnel.DownstreamReset},
	} {
		for _, waits := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ", with a vault"}[waits], func(t *testing.T) {
				t.Parallel()
				k := newKeeper(t)
				k.hurry = func(s *tunnel.Set) { s.HurryVault(time.Hour, 0, 0) }
				g := k.guest(roomy)
				busy := waits
				g.saying(func(string) error { // with the guest's lock
					if busy {
						return tunnel.ErrVaultBusy
					}
					return nil
				})
				f, client, server := register(t, g.loops[0].Poller)
				test.before(t, client)
				f.on(func() {}) // the former owner knows
				spec := tunnel.Spec{Origin: lasting(tunnel.Limits{}), UpEarly: []byte("hello")}
				if !waits {
					spec.Origin = nil
				}
				f.start(g.set, spec)
				test.meanwhile(t, client)
				f.on(func() {}) // the tunnel knows
				g.saying(nil)
				if test.reason != tunnel.DownstreamReset {
					wantBytes(t, client, "hello")
				}
				if test.want != "" {
					wantBytes(t, server, test.want)
				}
				switch test.reason {
				case tunnel.Open:
					write(t, client, []byte("and then"))
					wantBytes(t, server, "and then")
					write(t, server, []byte("and back"))
					wantBytes(t, client, "and back")
					closeWrite(t, client)
					wantEOF(t, server)
					server.Close()
				case tunnel.DownstreamClosed:
					wantEOF(t, server)
					write(t, server, []byte("the rest"))
					wantBytes(t, client, "the rest")
					server.Close()
				default:
					wantReset(t, server)
				}
				waitEmpty(t, g.set)
				f.wantNothingTold()
				want := test.reason
				if want == tunnel.Open {
					want = tunnel.DownstreamClosed
				}
				if all := k.records(); len(all) != 1 || all[0].Reason != want {
					t.Errorf("it ended as %v", all)
				}
			})
		}
	}
}

// Where the loop has no room for the tunnel, its sockets leave it.
func TestSocketsLeaveALoopThatHasNoRoom(t *testing.T) {
	t.Parallel()
	o := tunnel.Options{Loops: shape{loops: 2, tunnels: 1, buffers: 4, pipes: 1}.start(t)}
	set := relay{}.newSetWith(t, o)
	for _, want := range [][2]int{{1, 0}, {1, 1}, {1, 1}} {
		f, client, server := register(t, o.Loops[0].Poller)
		f.start(set, tunnel.Spec{})
		write(t, client, []byte("hello"))
		wantBytes(t, server, "hello")
		write(t, server, []byte("hello back"))
		wantBytes(t, client, "hello back")
		f.wantNothingTold()
		if got := [2]int(set.Shares()); got != want {
			t.Errorf("the loops have %v, want %v", got, want)
		}
	}
}

// What a socket is known to have is not set again, and all else is.
func TestWhatASocketHasIsNotSetAgain(t *testing.T) {
	t.Parallel()
	set, _ := onLoops.newSet(t)
	for name, test := range map[string]struct {
		limits tunnel.Limits
		has    tunnel.KeepAlive
		want   [4]int // of what nothing was set at all
	}{
		"nothing is known":         {tunnel.Limits{}, tunnel.KeepAlive{}, [4]int{60, 4, 1, 1}},
		"the default":              {tunnel.Limits{}, tunnel.DefaultKeepAlive, [4]int{7200, 9, 0, 0}},
		"another count":            {tunnel.Limits{KeepAlive: tunnel.KeepAlive{Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 5}}, tunnel.DefaultKeepAlive, [4]int{7200, 5, 0, 0}},
		"another idle time":        {tunnel.Limits{KeepAlive: tunnel.KeepAlive{Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 4}}, tunnel.DefaultKeepAlive, [4]int{30, 9, 0, 0}},
		"its own, of this one too": {tunnel.Limits{KeepAlive: tunnel.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 1}}, tunnel.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 1}, [4]int{7200, 9, 0, 0}},
	} {
		_, down := raw(t, "tcp")
		_, up := raw(t, "tcp")
		for _, fd := range []int{down, up} { // whatever the machine's are
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 7200)
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9)
		}
		about := tunnel.About{KeepAlive: test.has}
		set.Start(tunnel.Spec{FDs: [2]int{down, up}, Origin: limited(test.limits), About: [2]tunnel.About{about, about}})
		for _, fd := range []int{down, up} {
			var got [4]int
			for i, option := range [...][2]int{
				{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}, {unix.IPPROTO_TCP, unix.TCP_KEEPCNT},
				{unix.SOL_SOCKET, unix.SO_KEEPALIVE}, {unix.SOL_SOCKET, unix.SO_OOBINLINE},
			} {
				got[i], _ = unix.GetsockoptInt(fd, option[0], option[1])
			}
			if got != test.want {
				t.Errorf("%s: idle time, count, SO_KEEPALIVE and SO_OOBINLINE are %v, want %v", name, got, test.want)
			}
		}
	}
}
