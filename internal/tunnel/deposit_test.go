package tunnel_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// roomy is the shape of loops in which a few tunnels find all that they want.
var roomy = shape{loops: 1, tunnels: 40, buffers: 8, pipes: 2}

// unread returns how many bytes wait to be read from a socket.
func unread(t testing.TB, fd int) int {
	t.Helper()
	n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	if err != nil {
		t.Error(err)
	}
	return n
}

// Nothing of a tunnel is passed on before the vault has it, whatever waits to be.
func TestATunnelIsDepositedBeforeItsFirstByte(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	client, down := tcpPair(t, false)
	server, up := tcpPair(t, false)
	write(t, client, []byte(" and more"))
	write(t, server, []byte(" and back"))
	clientFD, serverFD := second(t, client), second(t, server)
	tries := 0
	g.saying(func(call string) error {
		if call != "deposit" {
			return nil
		}
		if n, m := unread(t, clientFD), unread(t, serverFD); n != 0 || m != 0 {
			t.Errorf("before the deposit %d bytes went to the client, %d to the server", n, m)
		}
		if tries++; tries < 5 {
			return tunnel.ErrVaultBusy
		}
		return nil
	})
	g.set.Start(tunnel.Spec{
		Down: down, Up: up, Origin: lasting(tunnel.Limits{}),
		DownEarly: []byte("early"), UpEarly: []byte("from the server"),
	})
	wantBytes(t, server, "early and more")
	wantBytes(t, client, "from the server and back")
	if n := g.count("deposit"); n != 5 || g.keeps() != 1 {
		t.Errorf("%d calls, %d tunnels are kept", n, g.keeps())
	}
	eventually(t, "all is counted", func() bool { return figures(g.counts)["tunnel_relayed_bytes_total upstream"] == 14 })
	wantFigures(t, g.counts, map[string]int64{
		"tunnels_started_total": 1, "tunnels_active": 1, "tunnels_deposited": 1,
		"tunnel_relayed_bytes_total upstream": 14, "tunnel_relayed_bytes_total downstream": 24,
		"tunnel_pipes": 0,
	})
}

// Tunnels that are started together are deposited together.
func TestDepositsTravelTogether(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	thaw := freeze(g.loops[0])
	for range 33 {
		g.open(tunnel.Spec{})
	}
	thaw()
	eventually(t, "all are deposited", func() bool { return g.keeps() == 33 })
	if n := g.count("deposit"); n != 3 {
		t.Errorf("33 deposits took %d calls, want 3", n)
	}
}

// A vault that stays busy holds a tunnel up for a moment only. It has the tunnel as soon
// as there is room.
func TestABusyVaultDelaysATunnelForAMoment(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	k.hurry = func(s *tunnel.Set) { s.HurryVault(50*time.Millisecond, 0, 0) }
	g := k.guest(roomy)
	g.saying(func(string) error { return tunnel.ErrVaultBusy })
	client, server := g.open(tunnel.Spec{DownEarly: []byte("early ")})
	write(t, client, []byte("bytes"))
	wantBytes(t, server, "early bytes")
	if g.keeps() != 0 || figures(g.counts)["tunnels_undeposited busy"] != 1 {
		t.Errorf("%d are kept, %v", g.keeps(), figures(g.counts))
	}
	g.saying(nil)
	eventually(t, "it is deposited", func() bool { return g.keeps() == 1 })
	g.die()
	r := g.resume(true)
	write(t, client, []byte("still"))
	wantBytes(t, server, "still")
	if r.keeps() != 1 {
		t.Error("it was withdrawn")
	}
}

// Without anybody to keep it a tunnel begins at once. When somebody is there all tunnels
// are deposited, also in the middle of what they do.
func TestTunnelsAreDepositedWhenSomebodyIsThere(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(shape{loops: 2, tunnels: 100, buffers: 8, pipes: 2})
	g.saying(func(string) error { return errNobody })
	var pairs [][2]tcpConn
	for range 150 {
		client, server := g.open(tunnel.Spec{})
		pairs = append(pairs, [2]tcpConn{client, server})
	}
	slow, server := g.open(tunnel.Spec{})
	sent := overfill(t, slow) // it holds something, and has passed on much
	if n := g.count("deposit"); n > 2 {
		t.Errorf("the vault was asked %d times though nobody was there", n)
	}
	if n := figures(g.counts)["tunnels_undeposited nobody"]; n != 151 {
		t.Errorf("%d are counted as not deposited", n)
	}
	g.saying(nil)
	g.set.Deposit("first")
	g.set.Deposit("second")
	eventually(t, "both rounds are complete", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return slices.Contains(g.rounds, tunnel.Ticket("first")) && slices.Contains(g.rounds, tunnel.Ticket("second"))
	})
	if g.keeps() != 151 {
		t.Errorf("%d tunnels are kept", g.keeps())
	}
	if all := figures(g.counts); all["tunnels_deposited"] != 151 || all["tunnels_undeposited nobody"] != 0 {
		t.Errorf("counted: %v", all)
	}
	g.die()
	g.resume(true)
	for i, p := range pairs {
		write(t, p[i%2], []byte("x"))
		wantBytes(t, p[1-i%2], "x")
	}
	wantBytes(t, server, string(sent))
}

// What was read before the tunnel began is where a successor finds it, if it is not too
// much.
func TestEarlyBytesOutliveTheProcess(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	for _, after := range []bool{true, false} {
		g := k.guest(roomy)
		client, down := tcpPair(t, false)
		server, up := tcpPair(t, false)
		dies := g.isToDie("deposit", after)
		g.set.Start(tunnel.Spec{
			Down: down, Up: up, Origin: lasting(tunnel.Limits{}),
			DownEarly: pattern(0, 64<<10), UpEarly: []byte("from the server"),
		})
		if !dies(patience) {
			t.Fatal("it is not deposited")
		}
		r := g.resume(true)
		if !after { // nobody has it
			if _, err := server.Read(make([]byte, 1)); err == nil {
				t.Error("a tunnel that was not deposited goes on")
			}
			continue
		}
		write(t, client, pattern(64<<10, 10))
		wantBytes(t, server, string(pattern(0, 64<<10+10)))
		wantBytes(t, client, "from the server")
		if all := figures(r.counts); all["tunnel_recovered_flows_total buffer"] != 2 || all["tunnels_resumed_total"] != 1 {
			t.Errorf("counted: %v", all)
		}
		client.Close()
		wantEOF(t, server)
		server.Close()
		waitEmpty(t, r.set)
		if last := k.records(); len(last) != 1 || last[0].ToUp != 64<<10+10 || last[0].ToDown != 15 {
			t.Errorf("records are %+v", last)
		}
	}
}

// Of what does not fit into a buffer nobody else would know. So the tunnel is deposited
// when that is on its way.
func TestATunnelWithManyEarlyBytesIsDepositedAfterThem(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	client, down := tcpPair(t, true)
	server, up := tcpPair(t, true)
	early := pattern(0, 4<<20)
	g.set.Start(tunnel.Spec{Down: down, Up: up, Origin: lasting(tunnel.Limits{}), DownEarly: early, UpEarly: []byte("x")})
	wantBytes(t, client, "x")
	write(t, client, pattern(len(early), 100))
	if figures(g.counts)["tunnels_undeposited early bytes"] != 1 || g.keeps() != 0 {
		t.Errorf("%d are kept, %v", g.keeps(), figures(g.counts))
	}
	wantBytes(t, server, string(early))
	eventually(t, "it is deposited", func() bool { return g.keeps() == 1 })
	g.die()
	g.resume(true)
	wantBytes(t, server, string(pattern(len(early), 100)))
	write(t, server, []byte("yes"))
	wantBytes(t, client, "yes")
}

// An end is reported after it is certain that nobody goes on with the tunnel.
func TestATunnelIsWithdrawnBeforeItsEndIsReported(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	client, server := g.open(tunnel.Spec{})
	eventually(t, "it is deposited", func() bool { return g.keeps() == 1 })
	tries := 0
	g.saying(func(call string) error {
		if call != "withdraw" || len(k.ended) > 0 {
			t.Errorf("%s after %d reports", call, len(k.ended))
		}
		if tries++; tries < 5 {
			return tunnel.ErrVaultBusy
		}
		return nil
	})
	client.Close()
	wantEOF(t, server)
	server.Close()
	waitEmpty(t, g.set)
	if tries != 5 || g.keeps() != 0 || len(k.records()) != 1 {
		t.Errorf("%d calls, %d are kept, records are %+v", tries, g.keeps(), k.records())
	}
}

// A vault that stays busy, or is gone, holds up no report for long. It is told in the end.
func TestAnEndIsReportedThoughTheVaultIsBusy(t *testing.T) {
	t.Parallel()
	for _, mood := range []error{tunnel.ErrVaultBusy, errNobody} {
		k := newKeeper(t)
		k.hurry = func(s *tunnel.Set) { s.HurryVault(20*time.Millisecond, 0, 0) }
		g := k.guest(roomy)
		client, server := g.open(tunnel.Spec{})
		eventually(t, "it is deposited", func() bool { return g.keeps() == 1 })
		g.saying(func(string) error { return fmt.Errorf("not now: %w", mood) })
		client.Close()
		wantEOF(t, server)
		server.Close()
		waitEmpty(t, g.set)
		if len(k.records()) != 1 || g.keeps() != 1 {
			t.Errorf("%d are kept, records are %+v", g.keeps(), k.records())
		}
		g.saying(nil)
		if errors.Is(mood, tunnel.ErrVaultBusy) {
			eventually(t, "it is withdrawn", func() bool { return g.keeps() == 0 })
		}
	}
}

// Until it was withdrawn, a successor may look for a tunnel at its place.
func TestAPlaceIsNobodysUntilItsTunnelIsWithdrawn(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	client, server := g.open(tunnel.Spec{})
	eventually(t, "it is deposited", func() bool { return g.keeps() == 1 })
	g.saying(func(call string) error {
		if call == "withdraw" {
			return tunnel.ErrVaultBusy
		}
		return nil
	})
	client.Close()
	wantEOF(t, server)
	server.Close()
	eventually(t, "it has ended", func() bool { n, _ := g.set.Summary(); return n == 0 })
	freeze(g.loops[0])()
	g.open(tunnel.Spec{DownEarly: []byte("x")})
	eventually(t, "the next one has a place", func() bool { return len(g.set.List()) == 1 })
	if places := g.set.Places(); !slices.Equal(places, []uint32{1}) {
		t.Errorf("its place is %v", places)
	}
	g.saying(nil)
	eventually(t, "the place is free", func() bool { return g.set.Shares()[0] == 1 })
	g.open(tunnel.Spec{})
	eventually(t, "both have a place", func() bool { return len(g.set.List()) == 2 })
	if places := g.set.Places(); !slices.Equal(places, []uint32{0, 1}) {
		t.Errorf("the places are %v", places)
	}
}

// Many ends in one turn are withdrawn with few calls.
func TestWithdrawalsTravelTogether(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	for range 40 {
		g.open(tunnel.Spec{})
	}
	eventually(t, "all are deposited", func() bool { return g.keeps() == 40 })
	g.set.Abandon()
	waitEmpty(t, g.set)
	if n := g.count("withdraw"); n != 1 || g.keeps() != 0 {
		t.Errorf("%d calls, %d are kept", n, g.keeps())
	}
}

func TestSomeTunnelsAreNotDeposited(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	client, server := g.open(tunnel.Spec{Origin: &tunnel.Origin{}, DownEarly: []byte("early")})
	wantBytes(t, server, "early")
	c, down := tcpPair(t, false)
	s, up := tcpPair(t, false)
	g.set.Start(tunnel.Spec{Down: plain{down}, Up: up, Origin: lasting(tunnel.Limits{})})
	write(t, c, []byte("x"))
	wantBytes(t, s, "x")
	g.set.Deposit(1)
	eventually(t, "the round is complete", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return len(g.rounds) == 1 })
	if g.keeps() != 0 || g.count("deposit") != 0 || figures(g.counts)["tunnels_undeposited not plain TCP"] != 1 {
		t.Errorf("%d are kept, %v", g.keeps(), figures(g.counts))
	}
	for _, c := range []tcpConn{client, server, c, s} {
		c.Close()
	}
	waitEmpty(t, g.set)
	if all := figures(g.counts); g.count("withdraw") != 0 || all["tunnels_undeposited not plain TCP"] != 0 {
		t.Errorf("%d withdrawals, %v", g.count("withdraw"), all)
	}
}

// Who has no room for a tunnel is asked again later, and whoever comes next is at once.
func TestATunnelThatWasRefusedLivesOn(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	client, server := g.open(tunnel.Spec{})
	eventually(t, "it is deposited", func() bool { return g.keeps() == 1 })
	g.set.Refused([]uint64{1, 2, 99})
	eventually(t, "it is known", func() bool { return figures(g.counts)["tunnels_undeposited full"] == 1 })
	write(t, client, []byte("x"))
	wantBytes(t, server, "x")
	if n := g.count("deposit"); n != 1 {
		t.Errorf("the vault was asked %d times", n)
	}
	g.set.Deposit(1)
	eventually(t, "it is deposited again", func() bool { return g.count("complete") == 1 })
	if n := figures(g.counts)["tunnels_deposited"]; n != 1 {
		t.Errorf("%d are counted", n)
	}
	g.set.HurryRetry(time.Millisecond)
	for n := 3; n < 6; n++ {
		g.set.Refused([]uint64{1})
		eventually(t, "it is offered again", func() bool { return g.count("deposit") == n })
	}
	write(t, client, []byte("y"))
	wantBytes(t, server, "y")
	if n := figures(g.counts)["tunnels_deposited"]; n != 1 {
		t.Errorf("%d are counted", n)
	}
}

// A client is told that there is a tunnel only when that would outlive its process, and
// what tells it is not counted as a byte of the tunnel.
func TestTheHeadOfTheAnswerWaitsForTheDeposit(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	g.set.HurryVault(patience, time.Millisecond, time.Millisecond)
	g.saying(func(string) error { return tunnel.ErrVaultBusy })
	client, server := g.open(tunnel.Spec{Head: []byte("yes "), UpEarly: []byte("and ")})
	eventually(t, "the vault is asked", func() bool { return g.count("deposit") > 1 })
	client.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := client.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the client has got %d bytes before: %v", n, err)
	}
	client.SetReadDeadline(time.Time{})
	g.saying(nil)
	wantBytes(t, client, "yes and ")
	write(t, server, []byte("more"))
	wantBytes(t, client, "more")
	if r := g.set.List()[0]; r.ToDown != 8 || r.ToUp != 0 {
		t.Errorf("counted are %d and %d", r.ToDown, r.ToUp)
	}
	r := g.succeed()
	write(t, server, []byte("!"))
	wantBytes(t, client, "!")
	if r := r.set.List()[0]; r.ToDown != 9 || r.ToUp != 0 {
		t.Errorf("counted are %d and %d after a death", r.ToDown, r.ToUp)
	}
	if n := figures(g.counts)["tunnel_relayed_bytes_total downstream"]; n != 8 {
		t.Errorf("%d bytes are counted in all", n)
	}
}

// The answer comes from the next process if this one dies when it has deposited the
// tunnel and not sent the answer.
func TestTheHeadOfTheAnswerSurvives(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	for range 20 {
		g := k.guest(roomy)
		dies := g.isToDie("deposit", true)
		client, server := g.open(tunnel.Spec{Head: []byte("yes "), UpEarly: []byte("and ")})
		if !dies(patience) {
			t.Fatal("it has not died")
		}
		r := g.resume(true)
		wantBytes(t, client, "yes and ")
		write(t, server, []byte("more"))
		wantBytes(t, client, "more")
		if r := r.set.List(); len(r) != 1 || r[0].ToDown != 8 {
			t.Errorf("counted are %+v", r)
		}
		client.Close()
		server.Close()
		waitEmpty(t, r.set)
	}
}

// A new round after a busy time, and while tunnels come and go.
func TestARoundReachesAllTunnels(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(shape{loops: 2, tunnels: 600, buffers: 8})
	var clients []tcpConn
	for range 500 {
		client, _ := g.open(tunnel.Spec{})
		clients = append(clients, client)
	}
	eventually(t, "all are deposited", func() bool { return g.keeps() == 500 })
	for round := range 5 {
		g.mu.Lock()
		for n, d := range g.kept {
			d.close()
			delete(g.kept, n)
		}
		calls := 0
		g.say = func(string) error {
			if calls++; calls%3 == 0 {
				return tunnel.ErrVaultBusy
			}
			return nil
		}
		g.mu.Unlock()
		g.set.Deposit(round)
		for _, c := range clients[round*10 : round*10+10] {
			c.Close()
			client, _ := g.open(tunnel.Spec{})
			clients = append(clients, client)
		}
		eventually(t, "the round is complete", func() bool {
			g.mu.Lock()
			defer g.mu.Unlock()
			return slices.Contains(g.rounds, tunnel.Ticket(round))
		})
		eventually(t, "all that live are kept", func() bool {
			g.mu.Lock()
			kept := len(g.kept)
			g.mu.Unlock()
			n, _ := g.set.Summary()
			return kept == n
		})
	}
}

// A tunnel that was refused and was released is not relayed because it is tried again: it
// may be somebody else's by now.
func TestATunnelThatStandsIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	a := k.guest(roomy)
	client, server := a.open(tunnel.Spec{})
	a.settled()
	a.set.HurryRetry(time.Millisecond)
	a.mute = true
	a.set.Move(true)
	eventually(t, "it was released", func() bool { return a.count("release") == 1 })
	a.set.Unmove()
	a.set.Deposit(1) // with another keeper, who has no room
	eventually(t, "it was deposited again", func() bool { return a.count("complete") == 1 })
	a.set.Refused([]uint64{1})
	eventually(t, "it is known", func() bool { return figures(a.counts)["tunnels_undeposited full"] == 1 })
	write(t, client, []byte("x"))
	server.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := server.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it has gone on: %d bytes, %v", n, err)
	}
	server.SetReadDeadline(time.Time{})
	a.set.Returned([]tunnel.Answer{{Number: 1, Stand: 1}})
	wantBytes(t, server, "x")
	eventually(t, "it is tried again", func() bool { return figures(a.counts)["tunnels_deposited"] == 1 })
	a.mute = false
}
