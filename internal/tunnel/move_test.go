package tunnel_test

import (
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// heir returns another Set, which takes what the others release.
func (k *keeper) heir(s shape) *guest {
	g := k.guest(s)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.takes = g
	return g
}

func (k *keeper) hasMoved(n int) {
	k.t.Helper()
	eventually(k.t, "all have moved", func() bool { k.mu.Lock(); defer k.mu.Unlock(); return k.moved == n })
}

// What a tunnel is does not change when it goes on elsewhere, and nobody takes it for one
// that has ended.
func TestATunnelThatMovesIsTheSame(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	a := k.guest(shape{loops: 2, tunnels: 60, buffers: 4, pipes: 1})
	var pairs [][2]tcpConn
	for range 50 {
		client, server := a.open(tunnel.Spec{})
		pairs = append(pairs, [2]tcpConn{client, server})
	}
	client, server := a.open(tunnel.Spec{ID: "its id", Tag: "its tag", DownEarly: []byte("early")})
	wantBytes(t, server, "early")
	server.CloseWrite()
	wantEOF(t, client)
	stays, other := a.open(tunnel.Spec{Origin: &tunnel.Origin{SurviveCrash: true}})
	started := a.set.List()[50].Started
	b := k.heir(shape{loops: 2, tunnels: 60, buffers: 4, pipes: 1})
	a.set.Move(false)
	k.hasMoved(51)
	if n, _ := a.set.Summary(); n != 1 || len(k.records()) != 0 {
		t.Errorf("%d stay, and ended have %v", n, k.records())
	}
	i := slices.IndexFunc(b.set.List(), func(r tunnel.Record) bool { return r.ID == "its id" })
	if r := b.set.List()[i]; r.Tag != "its tag" || !r.Started.Equal(started) || r.ToUp != 5 {
		t.Errorf("it is %+v there", r)
	}
	for _, p := range append(pairs, [2]tcpConn{stays, other}) {
		write(t, p[0], []byte("ping"))
		wantBytes(t, p[1], "ping")
		write(t, p[1], []byte("pong"))
		wantBytes(t, p[0], "pong")
	}
	client.CloseWrite()
	wantEOF(t, server)
	eventually(t, "its end is reported", func() bool { return len(k.records()) == 1 })
	if r := k.records()[0]; r.ID != "its id" || r.Reason != tunnel.UpstreamClosed || r.ToUp != 5 {
		t.Errorf("it ended as %+v", r)
	}
	if all := figures(b.counts); all["tunnels_moved_total in"] != 51 || all["tunnels_active"] != 50 || all["tunnels_started_total"] != 0 {
		t.Errorf("counted: %v", all)
	}
	if all := figures(a.counts); all["tunnels_moved_total out"] != 51 || all["tunnels_active"] != 1 || all["tunnels_deposited"] != 1 {
		t.Errorf("counted: %v", all)
	}
	a.set.Move(true)
	k.hasMoved(52)
	waitEmpty(t, a.set)
}

// What waits for slow receivers in both directions moves with a tunnel, and may find other
// room there than it had.
func TestWhatIsInFlightMoves(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		from, to shape
		limit    int64
	}{
		{"buffers to buffers", shape{loops: 1, tunnels: 4, buffers: 6}, shape{loops: 1, tunnels: 4, buffers: 6}, 0},
		{"pipes to pipes", shape{loops: 1, tunnels: 4, buffers: 6, pipes: 2}, shape{loops: 1, tunnels: 4, buffers: 6, pipes: 2}, 0},
		{"pipes to buffers", shape{loops: 1, tunnels: 4, buffers: 6, pipes: 2}, shape{loops: 1, tunnels: 4, buffers: 6}, 64 << 10},
		{"nothing", shape{loops: 1, tunnels: 4, buffers: 2}, shape{loops: 1, tunnels: 4, buffers: 2}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			k := newKeeper(t)
			g := k.guest(test.from)
			client, server := g.open(tunnel.Spec{Origin: lasting(tunnel.Limits{Buffer: test.limit})})
			up, down := len(overfill(t, client)), len(overfill(t, server))
			for range 2 {
				last := g
				g = k.heir(test.to)
				last.set.Move(true)
				waitEmpty(t, last.set)
			}
			client.CloseWrite()
			server.CloseWrite()
			for c, n := range map[tcpConn]int{server: up, client: down} {
				if got, err := io.ReadAll(c); err != nil || string(got) != string(pattern(0, n)) {
					t.Errorf("%d of %d bytes came, or others, and then %v", len(got), n, err)
				}
			}
			waitEmpty(t, g.set)
			if all := k.records(); len(all) != 1 || all[0].ToUp != uint64(up) || all[0].ToDown != uint64(down) {
				t.Errorf("%d and %d bytes were sent, records are %+v", up, down, all)
			}
		})
	}
}

// A tunnel that nobody takes goes on where it is, and moves when there is room.
func TestATunnelThatNobodyTakesGoesOn(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	a := k.guest(roomy)
	client, server := a.open(tunnel.Spec{})
	b := k.heir(shape{loops: 1, tunnels: 1, buffers: 4})
	in, _ := b.open(tunnel.Spec{}) // it is full
	eventually(t, "it is full", func() bool { return b.keeps() == 1 })
	a.set.Move(true)
	eventually(t, "it was declined again and again", func() bool { return b.count("declined") > 2 })
	write(t, client, []byte("x"))
	wantBytes(t, server, "x")
	if l := a.set.List(); len(l) != 1 || l[0].ToUp != 1 {
		t.Errorf("it is %+v", l)
	}
	in.Close()
	b.set.CloseAll(tunnel.Operator, 0)
	k.hasMoved(1)
	write(t, client, []byte("y"))
	wantBytes(t, server, "y")
}

// narrow starts a tunnel whose sockets take little, so that much is held by the relay.
func (g *guest) narrow() (client, server tcpConn) {
	g.t.Helper()
	client, down := tcpPair(g.t, false)
	server, up := tcpPair(g.t, false)
	for _, c := range []tcpConn{client, down, server, up} {
		c.SetReadBuffer(200 << 10)
		c.SetWriteBuffer(200 << 10)
	}
	g.set.Start(tunnel.Spec{Down: down, Up: up, Origin: lasting(tunnel.Limits{})})
	return client, server
}

// stuff sends in one go what the tunnel takes.
func stuff(t testing.TB, c tcpConn) (sent int) {
	t.Helper()
	p := pattern(0, 8<<20)
	c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n, err := c.Write(p)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("all was taken, or %v", err)
	}
	return n
}

// Who takes a tunnel may have no pipe for it. So one that is to move uses none.
func TestATunnelThatIsToMoveUsesNoPipe(t *testing.T) {
	t.Parallel()
	for _, moves := range []bool{false, true} {
		k := newKeeper(t)
		a := k.guest(roomy)
		client, _ := a.narrow()
		a.settled()
		if moves {
			a.set.Move(true)
			freeze(a.loops[0])()
		}
		stuff(t, client)
		if _, pipes := a.loops[0].Store.Held(); pipes > 0 == moves {
			t.Errorf("it is to move: %t; it holds %d pipes", moves, pipes)
		}
	}
}

// Who cannot say that it has taken a tunnel leaves it alone.
func TestATunnelIsNotTakenWithoutAWord(t *testing.T) {
	t.Parallel()
	for _, mood := range []error{tunnel.ErrVaultBusy, errNobody} {
		k := newKeeper(t)
		a := k.guest(roomy)
		client, server := a.narrow()
		sent := stuff(t, client)
		k.hurry = func(s *tunnel.Set) { s.HurryVault(5*time.Millisecond, 0, 0) }
		b := k.heir(roomy)
		b.saying(func(call string) error {
			if call == "taken" {
				return mood
			}
			return nil
		})
		a.set.Move(true)
		eventually(t, "it was declined", func() bool { return b.count("declined") > 1 })
		wantBytes(t, server, string(pattern(0, sent/2)))
		if n, _ := a.set.Summary(); n != 1 {
			t.Errorf("%d tunnels are left", n)
		}
		b.saying(nil)
		k.hasMoved(1)
		waitEmpty(t, a.set)
		wantBytes(t, server, string(pattern(sent/2, sent-sent/2)))
	}
}

// A tunnel that stands still when its Set is stopped may be another one's. If nobody
// answers it is given up, and nothing is done to it.
func TestAStopGivesUpWhatStandsStill(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	k.hurry = func(s *tunnel.Set) { s.Hurry(50*time.Millisecond, time.Second, time.Second) }
	a := k.guest(roomy)
	client, server := a.open(tunnel.Spec{})
	a.settled()
	a.mute = true
	a.set.Move(true)
	eventually(t, "it was released", func() bool { return a.count("release") == 1 })
	write(t, client, []byte("x"))
	a.set.CloseAll(tunnel.Operator, 0) // which is for when it goes on
	freeze(a.loops[0])()
	if n, _ := a.set.Summary(); n != 1 {
		t.Error("it was closed, wherever it is")
	}
	a.set.CloseAll(tunnel.Stopped, time.Hour)
	waitEmpty(t, a.set)
	if all := k.records(); len(all) != 1 || all[0].Reason != tunnel.Stopped || a.keeps() != 0 {
		t.Errorf("%d are kept, records are %+v", a.keeps(), all)
	}
	server.Close()
}

// The answer may come after the stop.
func TestAStopLeavesAloneWhatAnotherHasTaken(t *testing.T) {
	t.Parallel()
	for _, stop := range []func(*tunnel.Set){
		func(s *tunnel.Set) { s.CloseAll(tunnel.Stopped, 0) },
		func(s *tunnel.Set) { s.Abandon() },
	} {
		k := newKeeper(t)
		a := k.guest(roomy)
		b := k.heir(roomy)
		client, server := a.open(tunnel.Spec{})
		a.settled()
		late := make(chan struct{})
		b.mu.Lock()
		b.say = func(call string) error {
			if call == "taken" {
				k.laterLocked(func() { <-late }) // and only then the answer
			}
			return nil
		}
		b.mu.Unlock()
		a.set.Move(true)
		eventually(t, "it was taken", func() bool { return b.count("taken") == 1 })
		stop(a.set)
		freeze(a.loops[0])()
		write(t, client, []byte("x"))
		wantBytes(t, server, "x")
		close(late)
		waitEmpty(t, a.set)
		write(t, client, []byte("y"))
		wantBytes(t, server, "y")
	}
}

// What has become of a socket in another process is not trusted: a loop must not block.
func TestATakenSocketDoesNotBlock(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	a, b := k.guest(roomy), k.heir(roomy)
	client, server := a.narrow()
	a.settled()
	a.mu.Lock()
	fd := a.kept[1].fds[1]
	unix.SetNonblock(fd, false)
	a.mu.Unlock()
	isBlocking := func(g *guest) bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, d := range g.kept {
			fd = d.fds[1]
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		return err != nil || flags&unix.O_NONBLOCK == 0
	}
	a.set.Move(true)
	k.hasMoved(1)
	if isBlocking(b) {
		t.Error("the socket of a tunnel that was taken blocks")
	}
	b.settled()
	b.die()
	unix.SetNonblock(fd, false)
	r := b.resume(true)
	write(t, client, []byte("x"))
	wantBytes(t, server, "x")
	if isBlocking(r) {
		t.Error("the socket of a tunnel that was resumed blocks")
	}
}

// What there is no room for is deposited again, so that it can move, but not all the time.
func TestATunnelThatIsRefusedAgainAndAgainIsLeftInPeace(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	k.hurry = func(s *tunnel.Set) {
		s.HurryVault(time.Second, time.Millisecond, 50*time.Millisecond)
		s.HurryRefusals(0)
	}
	a := k.guest(roomy)
	k.heir(roomy)
	client, server := a.open(tunnel.Spec{})
	a.settled()
	a.set.Refused([]uint64{1})
	eventually(t, "it is known", func() bool { return figures(a.counts)["tunnels_undeposited full"] == 1 })
	a.saying(func(call string) error {
		if call == "deposit" {
			k.laterLocked(func() { a.set.Refused([]uint64{1}) })
			return nil
		}
		return tunnel.ErrVaultBusy // until the refusal is known
	})
	begun := time.Now()
	a.set.Move(true)
	eventually(t, "it was deposited again", func() bool { return a.count("deposit") >= 5 })
	if took := time.Since(begun); took < (50+100+200)*time.Millisecond {
		t.Errorf("four deposits took %v", took)
	}
	write(t, client, []byte("x"))
	wantBytes(t, server, "x")
	a.saying(nil)
	a.set.Deposit(1) // there is room
	k.hasMoved(1)
}

// One that another keeper returns, who does not know what became of it, is looked at
// first: it may have gone on elsewhere.
func TestATunnelThatWasTouchedDoesNotGoOnHere(t *testing.T) {
	t.Parallel()
	for _, touched := range []bool{false, true} {
		k := newKeeper(t)
		a := k.guest(roomy)
		client, down := tcpPair(t, false)
		server, up := tcpPair(t, false)
		fd := second(t, up)
		a.set.Start(tunnel.Spec{Down: down, Up: up, Origin: lasting(tunnel.Limits{})})
		write(t, client, []byte("x"))
		wantBytes(t, server, "x")
		a.settled()
		a.mute = true
		a.set.Move(true)
		eventually(t, "it was released", func() bool { return a.count("release") == 1 })
		a.set.Unmove()
		if touched { // somebody else relays it
			if _, err := unix.Write(fd, []byte("y")); err != nil {
				t.Fatal(err)
			}
			wantBytes(t, server, "y")
		}
		a.set.Deposit(1)
		eventually(t, "it was deposited again", func() bool { return a.count("complete") == 1 })
		a.set.Returned([]tunnel.Answer{{Number: 1}, {Number: 2}, {Number: 3}})
		if touched {
			k.hasMoved(1)
			waitEmpty(t, a.set)
			if a.keeps() != 0 {
				t.Error("it is still deposited")
			}
			server.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if _, err := server.Read(make([]byte, 1)); err == nil || isReset(err) || err == io.EOF {
				t.Errorf("the server read %v", err)
			}
			continue
		}
		write(t, server, []byte("y"))
		wantBytes(t, client, "y")
	}
}

// A tunnel that a configuration has no place for is taken, and closed in good time.
func TestATakenTunnelMayBeToldToEnd(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	k.sentence = tunnel.Sentence{Ends: tunnel.RouteRemoved, Within: 50 * time.Millisecond}
	a := k.guest(roomy)
	client, server := a.open(tunnel.Spec{})
	b := k.heir(roomy)
	a.set.Move(true)
	wantEOF(t, client)
	wantEOF(t, server)
	client.Close()
	server.Close()
	waitEmpty(t, b.set)
	if all := k.records(); len(all) != 1 || all[0].Reason != tunnel.RouteRemoved {
		t.Errorf("records are %+v", all)
	}
}

// An answer that is about the time before does not have a tunnel go on that was released
// again: somebody else may be about to take it.
func TestAnAnswerToAnEarlierReleaseIsIgnored(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	a := k.guest(roomy)
	client, server := a.open(tunnel.Spec{})
	a.settled()
	a.mute = true
	a.set.Move(true)
	for stand := uint64(1); stand <= 2; stand++ {
		eventually(t, "it was released", func() bool { return uint64(a.count("release")) == stand })
		a.set.Returned([]tunnel.Answer{{Number: 1, Stand: stand + 1}, {Number: 1, Stand: stand - 1 + 100}})
		write(t, client, []byte("x"))
		server.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if n, err := server.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it has gone on: %d bytes, %v", n, err)
		}
		server.SetReadDeadline(time.Time{})
		if stand == 2 {
			a.set.Unmove()
		}
		a.set.Returned([]tunnel.Answer{{Number: 1, Stand: stand}})
		wantBytes(t, server, "x")
	}
	a.mute = false
}
