package vault_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

// Each breaks the protocol, at a channel over which a store and tunnel 1 were deposited,
// and tunnel 2 was released and not answered. Tunnel 3 has gone to another generation.
var violations = map[string]func(l *line) *control.VaultPacket{
	"a type for generations":        func(*line) *control.VaultPacket { return packet(control.VaultGone) },
	"another type for generations":  func(*line) *control.VaultPacket { return packet(control.VaultResume) },
	"a deposit with one descriptor": func(l *line) *control.VaultPacket { return packet(control.VaultDeposit, with(l.deposit(), 1)) },
	"a deposit with none":           func(l *line) *control.VaultPacket { return packet(control.VaultDeposit, with(l.deposit(), 0)) },
	"a withdrawal with descriptors": func(l *line) *control.VaultPacket { return packet(control.VaultWithdraw, l.deposit()) },
	"a release with too many": func(l *line) *control.VaultPacket {
		e := l.deposit()
		e.Files = append(e.Files, e.Files[0])
		return packet(control.VaultRelease, e)
	},
	"too large a batch": func(*line) *control.VaultPacket {
		return packet(control.VaultRelease, make([]control.VaultEntry, control.VaultBatch+1)...)
	},
	"descriptors of no tunnel": func(l *line) *control.VaultPacket {
		p := packet(control.VaultComplete)
		p.Files = l.fds
		return p
	},
	"a loop out of turn": func(l *line) *control.VaultPacket {
		return &control.VaultPacket{Type: control.VaultStore, Loop: 2, Files: l.fds[:1]}
	},
	"a loop with half a pipe": func(l *line) *control.VaultPacket {
		return &control.VaultPacket{Type: control.VaultStore, Loop: 1, Files: l.fds}
	},
	"a verdict that nobody has asked for": func(*line) *control.VaultPacket {
		return packet(control.VaultTaken, control.VaultEntry{From: control.VaultTunnel{Generation: 2, Number: 1}, Number: 9})
	},
	"a refusal that nobody has asked for": func(*line) *control.VaultPacket {
		return packet(control.VaultDeclined, control.VaultEntry{From: control.VaultTunnel{Generation: 1, Number: 2}})
	},
	"a tunnel that is released twice": func(*line) *control.VaultPacket {
		return packet(control.VaultRelease, control.VaultEntry{Number: 2})
	},
	"a tunnel that goes on, and was released": func(l *line) *control.VaultPacket {
		e := l.deposit()
		e.Number = 2
		return packet(control.VaultDeposit, e)
	},
	"a tunnel that has gone": func(l *line) *control.VaultPacket {
		e := l.deposit()
		e.Number = 3
		return packet(control.VaultDeposit, e)
	},
	"the release of a tunnel that has gone": func(l *line) *control.VaultPacket {
		return packet(control.VaultRelease, control.VaultEntry{Number: 3})
	},
}

func packet(t control.VaultType, entries ...control.VaultEntry) *control.VaultPacket {
	return &control.VaultPacket{Type: t, Entries: entries}
}

func with(e control.VaultEntry, files int) control.VaultEntry {
	e.Files = e.Files[:files]
	return e
}

func TestWhoBreaksTheProtocolLosesItsChannelAndDepositsAndNothingElse(t *testing.T) {
	t.Parallel()
	for name, violation := range violations {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := start(t, vault.Options{Lost: func(n int) { t.Errorf("generation %d would be given another channel", n) }})
			a, b := join(t, v, 1), join(t, v, 2)
			v.Target(2)
			ls := lines(t, 3)
			a.send(control.VaultDeposit, deposits(ls)...)
			a.send(control.VaultRelease, released(ls[1], ls[2])...)
			for i, e := range b.want(control.VaultTake).Entries {
				ls[1+i].is(e.Files)
			}
			b.send(control.VaultTaken, taken(ls[2], a, 8))
			a.wantNumbers(control.VaultGone, 3)
			own := newLine(t, 1)
			b.send(control.VaultDeposit, own.deposit())

			l := newLine(t, 50)
			if err := a.conn.Send(violation(l), patient); err != nil {
				t.Fatal(err)
			}
			a.wantEnd()
			l.wantClosed()
			ls[0].wantClosed()
			if err := a.conn.Send(packet(control.VaultComplete), patient); !errors.Is(err, unix.EPIPE) {
				t.Errorf("it can still send: %v", err)
			}
			// What it had released is the other's to take.
			b.send(control.VaultTaken, taken(ls[1], a, 9))
			b.synced()
			if v.Deposits(1) != 0 || v.Deposits(2) != 3 {
				t.Errorf("%d and %d deposits", v.Deposits(1), v.Deposits(2))
			}
			b.die()
			if left := v.Died(2, false); left != 3 {
				t.Errorf("%d tunnels are left of the other", left)
			}
			if v.GivesAnother(1) {
				t.Error("it would be given another channel")
			}
		})
	}
}

func TestADepositNeedsAStore(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a := listening(t, v, 1)
	l := newLine(t, 1)
	a.send(control.VaultDeposit, l.deposit())
	a.wantEnd()
	l.wantClosed()
}

// Only who was asked can take, whatever others know of it.
func TestNobodyTakesWhatAnotherWasAsked(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b, l := moving(t, v)
	c := join(t, v, 3)
	c.send(control.VaultTaken, taken(l, a, 9))
	c.wantEnd()
	a.wantNothing()
	b.send(control.VaultTaken, taken(l, a, 9))
	a.wantNumbers(control.VaultGone, 5)
	if v.Deposits(2) != 1 {
		t.Errorf("%d deposits", v.Deposits(2))
	}
}

// What it has said of others' tunnels before its channel was ended counts; it may have
// acted on it.
func TestAViolatorsWordOnTunnelsCounts(t *testing.T) {
	t.Parallel()
	for range 50 {
		v := start(t, vault.Options{})
		a, b, l := moving(t, v)
		b.send(control.VaultGone)
		err := b.conn.Send(packet(control.VaultTaken, taken(l, a, 9)), patient)
		switch {
		case err == nil:
			a.wantNumbers(control.VaultGone, 5)
		case errors.Is(err, unix.EPIPE):
			a.wantNumbers(control.VaultReturned, 5)
		default:
			t.Fatal(err)
		}
		b.wantEnd()
		if v.Deposits(2) != 0 {
			t.Errorf("%d deposits", v.Deposits(2))
		}
	}
}

// A number that its taker has already is no reason to give the tunnel back.
func TestATunnelThatIsTakenAsAnotherIsGone(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b, l := moving(t, v)
	own := newLine(t, 9)
	b.send(control.VaultDeposit, own.deposit())
	b.send(control.VaultTaken, taken(l, a, 9))
	a.wantNumbers(control.VaultGone, 5)
	b.wantEnd()
	l.wantClosed()
	own.wantClosed()
}

// A predecessor's vault has died with some tunnels released and not answered. What became
// of them the others know.
func TestAnotherVaultAnswersWhatTheFirstHasLeft(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{1, 2, 3, 4})
	a, b := listening(t, v, 1), listening(t, v, 2)
	ls := lines(t, 4)
	a.store(0)
	a.send(control.VaultDeposit, ls[0].deposit(), ls[1].released(), ls[2].released(), ls[3].released())
	a.send(control.VaultComplete)
	if err := v.Await(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	b.store(0)
	came := ls[1].deposit()
	came.From, came.Number = ls[1].from(a), 71
	b.send(control.VaultDeposit, came)
	b.send(control.VaultComplete)
	if err := v.Await(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	a.wantNothing() // generations 3 and 4 may know more
	a.send(control.VaultWithdraw, numbers(ls[3])...)
	a.synced()
	v.Without(4)

	c := listening(t, v, 3)
	c.store(0)
	came = ls[2].deposit()
	came.From, came.Number = ls[2].from(a), 1
	c.send(control.VaultDeposit, came)
	a.wantNothing()
	c.send(control.VaultComplete)
	a.wantNumbers(control.VaultGone, 2, 3)
	if v.Deposits(1) != 1 || v.Deposits(2) != 1 || v.Deposits(3) != 1 {
		t.Errorf("%d, %d and %d deposits", v.Deposits(1), v.Deposits(2), v.Deposits(3))
	}
	// And from now on it knows by itself.
	again := listening(t, v, 1)
	again.store(0)
	again.send(control.VaultDeposit, ls[0].released(), ls[1].released())
	again.wantNumbers(control.VaultReturned, 1)
	again.wantNumbers(control.VaultGone, 2)
	again.wantNothing()
}

func TestAnotherVaultReturnsWhatNobodyHas(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(t *testing.T, v *vault.Vault){
		"all have told":          func(t *testing.T, v *vault.Vault) { join(t, v, 2) },
		"the other is dead":      func(t *testing.T, v *vault.Vault) { v.Died(2, false) },
		"it has no vault":        func(t *testing.T, v *vault.Vault) { v.Without(2) },
		"it does not come":       func(t *testing.T, v *vault.Vault) {},
		"it dies while it tells": func(t *testing.T, v *vault.Vault) { listening(t, v, 2).die(); v.Died(2, false) },
		"it breaks the protocol": func(t *testing.T, v *vault.Vault) { listening(t, v, 2).send(control.VaultGone) },
		"it leaves":              func(t *testing.T, v *vault.Vault) { listening(t, v, 2).die() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := start(t, vault.Options{})
			v.Hurry()
			v.Expect([]int{1, 2})
			a := listening(t, v, 1)
			ls := lines(t, 1)
			a.store(0)
			a.send(control.VaultDeposit, ls[0].released())
			a.send(control.VaultComplete)
			f(t, v)
			a.wantNumbers(control.VaultReturned, 1)
			if v.Deposits(1) != 1 {
				t.Errorf("%d deposits", v.Deposits(1))
			}
		})
	}
}

// Who may have a tunnel is not passed over; if it does not say that this is all, it gets
// another channel to say so.
func TestNothingIsReturnedThatALivingGenerationMayHave(t *testing.T) {
	t.Parallel()
	lost := make(chan int, 1)
	v := start(t, vault.Options{Lost: func(n int) { lost <- n }})
	v.Hurry()
	v.Expect([]int{1, 2})
	a, b := listening(t, v, 1), listening(t, v, 2)
	l := newLine(t, 1)
	a.store(0)
	a.send(control.VaultDeposit, l.released())
	a.send(control.VaultComplete)
	b.store(0)
	if n := <-lost; n != 2 {
		t.Errorf("generation %d has lost its channel", n)
	}
	b.wantEnd()
	b = listening(t, v, 2)
	a.synced()
	a.wantNothing()
	b.store(0)
	came := l.deposit()
	came.From = l.from(a)
	b.send(control.VaultDeposit, came)
	b.send(control.VaultComplete)
	a.wantNumbers(control.VaultGone, 1)
}

// A supervisor that is about to take over is told everything, and answers nothing: what
// it is told may change until it is obeyed.
func TestACandidatesVaultAnswersNothing(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{1})
	a := listening(t, v, 1)
	ls := lines(t, 3)
	a.store(0)
	a.send(control.VaultDeposit, ls[0].deposit(), ls[1].released(), ls[2].released())
	if err := a.conn.Send(&control.VaultPacket{Type: control.VaultComplete, Flags: control.VaultCandidate}, patient); err != nil {
		t.Fatal(err)
	}
	if err := v.Await(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	a.send(control.VaultDeposit, ls[1].deposit()) // it was returned by the one that is obeyed
	a.synced()
	a.wantNothing()
	a.send(control.VaultDeposit, ls[0].released(), ls[1].deposit(), ls[2].released())
	a.send(control.VaultComplete)
	a.wantNumbers(control.VaultReturned, 1, 3)
	a.wantNothing()
}

func TestADeadGenerationsTunnelThatAnotherMayHaveIsNotResumed(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Hurry()
	v.Expect([]int{1, 2})
	a, _ := listening(t, v, 1), listening(t, v, 2)
	ls := lines(t, 2)
	a.store(0)
	a.send(control.VaultDeposit, ls[0].deposit(), ls[1].released())
	a.send(control.VaultComplete)
	a.die()
	if left := v.Died(1, false); left != 1 {
		t.Errorf("%d tunnels are left, want 1", left)
	}
	ls[1].wantClosed()
}

func TestADeadGenerationsTunnelThatNobodyElseHasIsResumed(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{1, 2})
	a := listening(t, v, 1)
	ls := lines(t, 2)
	a.store(0)
	a.send(control.VaultDeposit, ls[0].deposit(), ls[1].released())
	a.die()
	join(t, v, 2)
	if left := v.Died(1, false); left != 2 {
		t.Errorf("%d tunnels are left, want 2", left)
	}
}

// A tunnel for which there is no room waits for its answer nevertheless: it stands still.
func TestATunnelWithoutRoomIsAnswered(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{1, 2})
	a := listening(t, v, 1)
	a.store(0)
	a.synced()
	v.Limit(0, 0)
	l := newLine(t, 1)
	a.send(control.VaultDeposit, l.released())
	a.wantNumbers(control.VaultRefused, 1)
	a.send(control.VaultComplete)
	l.wantClosed()
	a.wantNothing()
	listening(t, v, 2).send(control.VaultComplete)
	a.wantNumbers(control.VaultReturned, 1)
	if v.Deposits(1) != 0 {
		t.Errorf("%d deposits", v.Deposits(1))
	}
}
