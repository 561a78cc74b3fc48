package vault_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

// connection returns two connections over which an end of each is a tunnel's, as they are
// in a generation, and the other ends.
func connection(t *testing.T) (fds []int, peers [2]*net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for i := range peers {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		peers[i] = c.(*net.TCPConn)
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		f, err := s.(*net.TCPConn).File()
		s.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		fds = append(fds, int(f.Fd()))
	}
	return fds, peers
}

// established is TCP_ESTABLISHED of the kernel.
const established = 1

// Peers of tunnels that nobody can resume learn that these were cut, also if another
// process has their sockets.
func TestWhatIsCutIsReset(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a := join(t, v, 1)
	fds, peers := connection(t) // which stay open here
	a.send(control.VaultDeposit, control.VaultEntry{Number: 1, Files: fds})
	a.synced()
	v.Cut(1)
	if v.Cut(2); v.Deposits(1) != 1 {
		t.Fatal("tunnels of a living generation were let go of")
	}
	if info, err := unix.GetsockoptTCPInfo(fds[0], unix.SOL_TCP, unix.TCP_INFO); err != nil || info.State != established {
		t.Fatalf("those of a living generation were cut: %v", err)
	}
	a.die()
	if left := v.Died(1, false); left != 1 {
		t.Fatalf("%d tunnels are left, want 1", left)
	}
	v.Cut(1)
	for i, p := range peers {
		_ = p.SetDeadline(time.Now().Add(patient))
		if n, err := p.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("peer %d: %d bytes, %v", i, n, err)
		}
	}
	if v.Deposits(1) != 0 || v.Stores(1) != 0 {
		t.Errorf("%d tunnels and %d stores are left", v.Deposits(1), v.Stores(1))
	}
}

// What is cut is let go of, whatever it is.
func TestWhatIsCutIsClosed(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a := join(t, v, 1)
	l := newLine(t, 1)
	a.send(control.VaultDeposit, l.deposit())
	a.die()
	v.Died(1, false)
	v.Cut(1)
	l.wantClosed()
}

// A generation that this vault has seen from its beginning can know of no earlier vault's
// tunnels, so nobody waits for its word; nor does one that resumes tunnels ever say it.
func TestNobodyWaitsForTheWordOfAnHeir(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{3, 7})
	dead := join(t, v, 7)
	l := newLine(t, 1)
	dead.send(control.VaultDeposit, l.deposit())
	dead.die()
	if left := v.Died(7, false); left != 1 {
		t.Fatalf("%d tunnels are left, want 1", left)
	}
	heir := listening(t, v, 9)
	if err := errors.Join(v.HandStores(7, 9), v.HandTunnels(7, 9)); err != nil {
		t.Fatal(err)
	}
	late, released := listening(t, v, 3), newLine(t, 5)
	late.store(0)
	late.send(control.VaultDeposit, released.released())
	late.send(control.VaultComplete)
	late.wantNumbers(control.VaultReturned, 5)
	heir.want(control.VaultStore).CloseFiles()
	heir.want(control.VaultResume).CloseFiles()
	heir.want(control.VaultComplete)
	if !v.Has(9) {
		t.Error("the heir has no channel")
	}
}

// An heir keeps its channel while others are waited for, although it never says that this
// is all.
func TestAnHeirIsNotOverdue(t *testing.T) {
	t.Parallel()
	lost := make(chan int, 8)
	v := start(t, vault.Options{Lost: func(n int) { lost <- n }})
	v.Hurry()
	v.Expect([]int{1, 2})
	heir := listening(t, v, 9)
	a, b := listening(t, v, 1), listening(t, v, 2)
	a.store(0)
	a.send(control.VaultDeposit, newLine(t, 1).released())
	a.send(control.VaultComplete)
	if n := <-lost; n != 2 {
		t.Errorf("generation %d has lost its channel", n)
	}
	b.wantEnd()
	if !v.Has(9) {
		t.Error("the heir has no channel")
	}
	heir.wantNothing()
}

// Deposits leave room for the stores of those who come after them.
func TestAFullVaultHasRoomForStores(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Limit(0, 1<<20)
	a := join(t, v, 1)
	l := newLine(t, 1)
	a.send(control.VaultDeposit, l.deposit())
	a.wantNumbers(control.VaultRefused, 1)
	if v.Stores(1) != 1 || !v.Has(1) {
		t.Error("there is no room for a store")
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	for n, want := range map[int][3]int{
		20_000 - 256: {20_000 - 256 - 1024, 20_000 - 256, 512},
		1024 - 256:   {768 - 96, 768, 48},
		1 << 31:      {1<<31 - 1024, 1 << 31, 512},
	} {
		if d, s, u := vault.LimitsOf(n); [3]int{d, s, u} != want {
			t.Errorf("%d: %d, %d, %d, want %d", n, d, s, u, want)
		}
	}
}

// A generation for whose stores there is no room gets another channel, until there is.
func TestWhoseStoresAreRefusedIsGivenAnotherChannel(t *testing.T) {
	t.Parallel()
	lost := make(chan int, 8)
	v := start(t, vault.Options{Lost: func(n int) { lost <- n }})
	v.Hurry()
	v.Limit(0, 0)
	for range 3 {
		a := listening(t, v, 1)
		a.store(0)
		a.wantEnd()
		if n := <-lost; n != 1 {
			t.Errorf("generation %d has lost its channel", n)
		}
	}
	v.Limit(1<<20, 1<<20)
	a := join(t, v, 1)
	l := newLine(t, 1)
	a.send(control.VaultDeposit, l.deposit())
	a.synced()
	if v.Deposits(1) != 1 {
		t.Errorf("%d deposits", v.Deposits(1))
	}
}

// Whoever has ended the channel of a living generation, it gets another.
func TestWhoHangsUpIsGivenAnotherChannel(t *testing.T) {
	t.Parallel()
	lost := make(chan int, 8)
	v := start(t, vault.Options{Lost: func(n int) { lost <- n }})
	v.Hurry()
	join(t, v, 1).die()
	if n := <-lost; n != 1 {
		t.Errorf("generation %d has lost its channel", n)
	}
	join(t, v, 1).synced()
}

// Who hangs up again and again is made to wait for longer and longer.
func TestChannelsThatDoNotLastAreGivenSlowly(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{Lost: func(int) {}})
	v.Hurry()
	want := []time.Duration{10, 20, 40, 40}
	for i, ms := range want {
		if got := v.Ended(1, 0); got != ms*time.Millisecond {
			t.Errorf("after %d: %s, want %d ms", i+1, got, ms)
		}
	}
	if got := v.Ended(1, time.Minute); got != 10*time.Millisecond {
		t.Errorf("after one that has lasted: %s", got)
	}
}

// Nobody else gets one.
func TestWhoIsNotGivenAnotherChannel(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(v *vault.Vault, a *player){
		"dead":         func(v *vault.Vault, a *player) { a.die(); v.Died(1, false) },
		"has another":  func(v *vault.Vault, a *player) { listening(a.t, v, 1).listenEnd(a) },
		"has no vault": func(v *vault.Vault, a *player) { a.die(); a.gone(); v.Without(1) },
		"it is closed": func(v *vault.Vault, a *player) { v.Close() },
		"dead since":   func(v *vault.Vault, a *player) { a.die(); a.gone(); v.Died(1, false) },
		"came by itself": func(v *vault.Vault, a *player) {
			a.die()
			a.gone()
			listening(a.t, v, 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := start(t, vault.Options{Lost: func(n int) { t.Errorf("generation %d would be given another channel", n) }})
			f(v, join(t, v, 1))
			if v.GivesAnother(1) {
				t.Error("it would be given another channel")
			}
		})
	}
}

// gone waits until the vault has seen the end of the channel.
func (p *player) gone() {
	p.t.Helper()
	eventually(p.t, "the channel has not ended", func() bool { return p.v.GivesAnother(p.n) })
}

// listenEnd waits until the channel has ended whose place p's has taken.
func (p *player) listenEnd(before *player) {
	p.t.Helper()
	before.wantEnd()
	p.synced() // the first was read to its end
}

// A socket is closed at once, and what it has to send is sent, whatever its generation
// has set.
func TestALingeringSocketIsClosedAtOnceAndDiscardsNothing(t *testing.T) {
	t.Parallel()
	for name, seconds := range map[string]int32{"an hour": 3600, "no time": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := start(t, vault.Options{})
			a := join(t, v, 1)
			fds, peers := connection(t)
			sent := 0
			for block := make([]byte, 1<<20); ; {
				n, err := unix.SendmsgN(fds[0], block, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
				if err != nil {
					break
				}
				sent += n
			}
			if err := unix.SetsockoptLinger(fds[0], unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: seconds}); err != nil {
				t.Fatal(err)
			}
			a.send(control.VaultDeposit, control.VaultEntry{Number: 1, Files: fds})
			a.synced()
			// The last descriptor is the vault's. Close would block here, too.
			null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(null)
			for _, fd := range fds {
				if err := unix.Dup3(null, fd, unix.O_CLOEXEC); err != nil {
					t.Fatal(err)
				}
			}
			a.send(control.VaultWithdraw, control.VaultEntry{Number: 1})
			l := newLine(t, 2)
			a.send(control.VaultDeposit, l.deposit())
			a.send(control.VaultWithdraw, numbers(l)...)
			l.wantClosed()
			_ = peers[0].SetDeadline(time.Now().Add(patient))
			if n, err := io.Copy(io.Discard, peers[0]); err != nil || int(n) != sent {
				t.Errorf("%d bytes of %d have come, %v", n, sent, err)
			}
		})
	}
}

// Of a generation whose descriptors cannot be closed, few are received: then its queue
// fills, and in the end it loses its channel.
func TestDescriptorsThatCannotBeClosedDoNotPileUp(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Hurry()
	v.Unclosed(100)
	a, b := join(t, v, 1), join(t, v, 2)
	ease := v.Jam(1)
	l := newLine(t, 1<<30)
	a.send(control.VaultDeposit, l.deposit())
	useless := make([]control.VaultEntry, control.VaultBatch)
	for i := range useless {
		useless[i] = l.deposit()
	}
	var err error
	for n := 0; err == nil; n++ {
		if n > 100_000 {
			t.Fatal("it sends, and sends")
		}
		err = a.conn.Send(packet(control.VaultDeposit, useless...), patient)
	}
	if !errors.Is(err, unix.EPIPE) {
		t.Errorf("sent: %v", err)
	}
	a.wantEnd()
	if n := v.Waiting(1); n > 100+2*control.VaultBatch+10 {
		t.Errorf("%d descriptors wait to be closed", n)
	}
	b.synced()
	ease()
	l.wantClosed()
	if v.GivesAnother(1) {
		t.Error("it is given another channel")
	}
}

// Nobody waits for such a generation when it is dead.
func TestADeathDoesNotWaitForWhatCannotBeClosed(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Unclosed(10)
	a := join(t, v, 1)
	ease := v.Jam(1)
	defer ease()
	l := newLine(t, 7)
	a.send(control.VaultDeposit, l.deposit())
	for range 20 {
		a.send(control.VaultDeposit, l.deposit())
	}
	a.die()
	done := make(chan int)
	go func() { done <- v.Died(1, false) }()
	select {
	case left := <-done:
		if left != 1 {
			t.Errorf("%d tunnels are left, want 1", left)
		}
	case <-time.After(patient):
		t.Fatal("the death is waited for")
	}
}

// A loop's files that are deposited once more take the place of the first.
func TestAStoreThatIsReplacedIsClosed(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, l := listening(t, v, 1), newLine(t, 1)
	if err := a.conn.Send(&control.VaultPacket{Type: control.VaultStore, Files: l.fds[:1]}, patient); err != nil {
		t.Fatal(err)
	}
	a.store(0)
	l.wantClosed()
	if v.Stores(1) != 1 {
		t.Errorf("%d stores", v.Stores(1))
	}
}
