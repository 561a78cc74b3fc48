package vault_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

// entries turns lines into what a packet says of each.
func entries(ls []*line, f func(*line) control.VaultEntry) []control.VaultEntry {
	var all []control.VaultEntry
	for _, l := range ls {
		all = append(all, f(l))
	}
	return all
}

func deposits(ls []*line) []control.VaultEntry { return entries(ls, (*line).deposit) }

func numbers(ls ...*line) (all []control.VaultEntry) {
	for _, l := range ls {
		all = append(all, control.VaultEntry{Number: l.number})
	}
	return all
}

// released says of tunnels what VaultRelease does.
func released(ls ...*line) (all []control.VaultEntry) {
	for _, l := range ls {
		all = append(all, control.VaultEntry{Number: l.number, State: []byte{byte(l.number), 's'}})
	}
	return all
}

func TestWhatADeadGenerationHadGoesOnInItsSuccessor(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a := listening(t, v, 1)
	stores := [][]uint64{a.store(0), a.store(1)}
	ls := lines(t, 40)
	for batch := range slices.Chunk(ls, control.VaultBatch) {
		a.send(control.VaultDeposit, deposits(batch)...)
	}
	a.send(control.VaultWithdraw, numbers(ls[3])...)
	a.die() // what it has sent counts, whether it was read or not
	if n := v.Died(1, true); n != 39 {
		t.Fatalf("%d tunnels are left, want 39", n)
	}
	ls[3].wantClosed()
	if n := v.Stores(1); n != 2 {
		t.Errorf("%d stores, want 2", n)
	}

	b := listening(t, v, 2)
	if err := v.HandStores(1, 2); err != nil {
		t.Fatal(err)
	}
	for i, inodes := range stores {
		p := b.want(control.VaultStore)
		if p.Loop != i || p.Flags != control.VaultKilled || !slices.Equal(inodesOf(t, p.Files), inodes) {
			t.Errorf("store %d: loop %d, flags %d, other files or order", i, p.Loop, p.Flags)
		}
		p.CloseFiles()
	}
	if v.Deposits(1) != 39 || v.Deposits(2) != 0 {
		t.Errorf("before they are handed over, %d tunnels are the dead one's, %d its successor's", v.Deposits(1), v.Deposits(2))
	}
	if err := v.HandTunnels(1, 2); err != nil {
		t.Fatal(err)
	}
	ls = slices.Delete(ls, 3, 4)
	for rest := ls; len(rest) > 0; {
		p := b.want(control.VaultResume)
		for _, e := range p.Entries {
			l := rest[0]
			if rest = rest[1:]; e.Number != l.number || string(e.Record) != string(l.deposit().Record) {
				t.Fatalf("tunnel %d with record %q, want %d", e.Number, e.Record, l.number)
			}
			l.is(e.Files)
		}
	}
	b.want(control.VaultComplete)
	if v.Deposits(1) != 0 || v.Deposits(2) != 39 || v.Stores(1) != 0 || v.Stores(2) != 2 || v.Totals().Resumed != 39 {
		t.Errorf("afterwards: %+v", v.Totals())
	}
	b.send(control.VaultWithdraw, numbers(ls...)...)
	for _, l := range ls {
		l.wantClosed()
	}
}

func TestASuccessorThatDiesHalfWayLosesNothing(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Hurry()
	a := join(t, v, 1)
	const n = 600
	ls := lines(t, n)
	for batch := range slices.Chunk(ls, control.VaultBatch) {
		entries := deposits(batch)
		for i := range entries {
			entries[i].Record = make([]byte, control.MaxVaultRecord) // so that the queue is full soon
		}
		a.send(control.VaultDeposit, entries...)
		for _, l := range batch {
			l.letGo()
		}
	}
	a.die()
	if left := v.Died(1, false); left != n {
		t.Fatalf("%d tunnels are left, want %d", left, n)
	}
	deaf(t, v, 2)
	if err := v.HandTunnels(1, 2); err == nil || errors.Is(err, vault.ErrNoChannel) {
		t.Fatalf("to hand tunnels to somebody who does not read: %v", err)
	}
	if err := v.HandTunnels(1, 3); !errors.Is(err, vault.ErrNoChannel) {
		t.Fatalf("to hand tunnels to nobody: %v", err)
	}
	c := listening(t, v, 3)
	if left := v.Died(2, false); left != n {
		t.Fatalf("%d tunnels are left, want %d", left, n)
	}
	handed := make(chan error, 1)
	go func() { handed <- v.HandTunnels(2, 3) }()
	for rest := ls; len(rest) > 0; {
		for _, e := range c.want(control.VaultResume).Entries {
			if e.Number != rest[0].number {
				t.Fatalf("tunnel %d, want %d", e.Number, rest[0].number)
			}
			rest[0].is(e.Files)
			rest = rest[1:]
		}
	}
	c.want(control.VaultComplete)
	if err := <-handed; err != nil {
		t.Fatal(err)
	}
}

// While a successor has not got everything, its word that this is all it has does not
// count.
func TestWhatASuccessorHasNotGotYetIsNotSweptAway(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Hurry()
	a := join(t, v, 1)
	ls := lines(t, 600)
	for batch := range slices.Chunk(ls, control.VaultBatch) {
		es := deposits(batch)
		for i := range es {
			es[i].Record = make([]byte, control.MaxVaultRecord)
		}
		a.send(control.VaultDeposit, es...)
	}
	a.die()
	v.Died(1, false)
	deaf(t, v, 2)
	if err := v.HandTunnels(1, 2); err == nil {
		t.Fatal("a successor that does not read was handed everything")
	}
	b := listening(t, v, 2) // it has lost its channel, and has another
	b.send(control.VaultComplete)
	b.synced()
	b.die()
	if left := v.Died(2, false); left != len(ls) {
		t.Fatalf("%d tunnels are left, want %d", left, len(ls))
	}
}

func TestASuccessorWithTunnelsOfItsOwnGetsNone(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b := join(t, v, 1), join(t, v, 2)
	ls := lines(t, 1)
	a.send(control.VaultDeposit, deposits(ls)...)
	a.die()
	if left := v.Died(1, false); left != 1 {
		t.Fatalf("%d tunnels are left, want 1", left)
	}
	own := newLine(t, 1)
	b.send(control.VaultDeposit, own.deposit())
	b.synced()
	if err := v.HandTunnels(1, 2); !errors.Is(err, vault.ErrNoChannel) {
		t.Fatalf("handed: %v", err)
	}
	b.wantEnd()
	own.wantClosed()
	if v.Deposits(1) != 1 {
		t.Errorf("%d tunnels are left, want 1", v.Deposits(1))
	}
	v.Drop(1)
	ls[0].wantClosed()
}

func TestThereIsRoomForSoManyOnly(t *testing.T) { // not parallel: it counts descriptors
	v := start(t, vault.Options{})
	ls := lines(t, 300)
	v.Limit(slices.Max(ls[299].ends)+200, 1<<20)
	a := join(t, v, 1)
	for batch := range slices.Chunk(ls, control.VaultBatch) {
		a.send(control.VaultDeposit, deposits(batch)...)
	}
	refused := map[uint64]bool{}
	for v.Deposits(1)+len(refused) < len(ls) {
		for _, e := range a.want(control.VaultRefused).Entries {
			refused[e.Number] = true
		}
	}
	if n := len(refused); n < 180 || n > 220 || v.Totals().Refused != uint64(len(refused)) {
		t.Fatalf("%d were refused, and %d counted", len(refused), v.Totals().Refused)
	}
	for _, l := range ls {
		if refused[l.number] {
			l.wantClosed()
		}
	}
	// One that was refused can be withdrawn, and to release it is answered.
	for _, l := range ls {
		if refused[l.number] {
			a.send(control.VaultRelease, released(l)...)
			a.wantNumbers(control.VaultReturned, l.number)
			a.send(control.VaultWithdraw, numbers(l)...)
			break
		}
	}
	a.synced()
}

func TestATunnelMoves(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b := join(t, v, 1), join(t, v, 2)
	v.Target(2)
	ls := lines(t, 3)
	pipe := newLine(t, 99)
	a.send(control.VaultDeposit, deposits(ls)...)
	out := released(ls...)
	out[1].Files = pipe.fds
	a.send(control.VaultRelease, out...)
	p := b.want(control.VaultTake)
	if len(p.Entries) != 3 {
		t.Fatalf("%d tunnels, want 3", len(p.Entries))
	}
	for i, e := range p.Entries {
		if e.From != ls[i].from(a) || string(e.Record) != string(ls[i].deposit().Record) || string(e.State) != string(out[i].State) {
			t.Errorf("%+v", e)
		}
		ls[i].is(e.Files[:2])
	}
	pipe.is(p.Entries[1].Files[2:])
	pipe.wantClosed() // not kept beyond

	b.send(control.VaultTaken, control.VaultEntry{From: ls[0].from(a), Number: 70, Record: []byte("of b")})
	a.wantNumbers(control.VaultGone, 1)
	b.send(control.VaultDeclined, control.VaultEntry{From: ls[1].from(a)})
	a.wantNumbers(control.VaultReturned, 2)
	b.send(control.VaultTaken, control.VaultEntry{From: ls[2].from(a), Number: 71, Record: []byte("of b, too")})
	a.wantNumbers(control.VaultGone, 3)
	if got := v.Totals(); v.Deposits(1) != 1 || v.Deposits(2) != 2 || got.Moved != 2 {
		t.Errorf("%d and %d, %+v", v.Deposits(1), v.Deposits(2), got)
	}

	b.die()
	if left := v.Died(2, false); left != 2 {
		t.Fatalf("%d tunnels are left, want 2", left)
	}
	c := listening(t, v, 3)
	if err := v.HandTunnels(2, 3); err != nil {
		t.Fatal(err)
	}
	p = c.want(control.VaultResume)
	for i, l := range []*line{ls[0], ls[2]} {
		e := p.Entries[i]
		if e.From != l.from(a) || e.Number != uint64(70+i) {
			t.Errorf("%+v", e)
		}
		l.is(e.Files)
	}
	a.wantNothing()
}

func TestWithoutATakerTunnelsStayWhereTheyAre(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b := join(t, v, 1), join(t, v, 2)
	ls := lines(t, 1)
	a.send(control.VaultDeposit, deposits(ls)...)
	for _, target := range []int{0, 1, 3} {
		v.Target(target)
		a.send(control.VaultRelease, released(ls...)...)
		a.wantNumbers(control.VaultReturned, 1)
	}
	b.die()
	v.Died(2, false)
	v.Target(2)
	a.send(control.VaultRelease, released(ls...)...)
	a.wantNumbers(control.VaultReturned, 1)
	if v.Deposits(1) != 1 {
		t.Errorf("%d deposits", v.Deposits(1))
	}
}

// moving returns two generations and a tunnel that is on its way from one to the other,
// which was asked and has said nothing.
func moving(t *testing.T, v *vault.Vault) (a, b *player, l *line) {
	t.Helper()
	a, b = join(t, v, 1), join(t, v, 2)
	v.Target(2)
	l = newLine(t, 5)
	a.send(control.VaultDeposit, l.deposit())
	a.send(control.VaultRelease, released(l)...)
	l.is(b.want(control.VaultTake).Entries[0].Files)
	return a, b, l
}

func taken(l *line, a *player, number uint64) control.VaultEntry {
	return control.VaultEntry{From: l.from(a), Number: number, Record: []byte("taken")}
}

func TestATakerThatDiesHasNotTaken(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b, _ := moving(t, v)
	b.die()
	a.wantNumbers(control.VaultReturned, 5)
	if left := v.Died(2, true); left != 0 || v.Deposits(1) != 1 {
		t.Errorf("%d tunnels are left of the taker's, %d are the other's", left, v.Deposits(1))
	}
}

func TestATakerThatDiesAfterItsWordHasTaken(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b, l := moving(t, v)
	b.send(control.VaultTaken, taken(l, a, 9))
	b.die()
	if left := v.Died(2, true); left != 1 || v.Deposits(1) != 0 {
		t.Errorf("%d tunnels are left of the taker's, %d are the other's", left, v.Deposits(1))
	}
	a.wantNumbers(control.VaultGone, 5)
	a.wantNothing()
}

func TestATunnelOfADeadGenerationBelongsToWhomeverTakesIt(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(a, b *player, l *line) (left int){
		"taken":                func(a, b *player, l *line) int { b.send(control.VaultTaken, taken(l, a, 9)); return 0 },
		"declined":             func(a, b *player, l *line) int { b.send(control.VaultDeclined, taken(l, a, 0)); return 1 },
		"the taker dies, too":  func(a, b *player, l *line) int { b.die(); return 1 },
		"taken, and dead then": func(a, b *player, l *line) int { b.send(control.VaultTaken, taken(l, a, 9)); b.die(); return 0 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := start(t, vault.Options{})
			a, b, l := moving(t, v)
			a.die()
			left := make(chan int)
			go func() { left <- v.Died(1, false) }()
			want := f(a, b, l)
			if got := <-left; got != want || v.Deposits(1) != want || v.Deposits(2) != 1-want {
				t.Errorf("%d tunnels are left, want %d; %d and %d", got, want, v.Deposits(1), v.Deposits(2))
			}
		})
	}
}

func TestATakerThatSaysNothingLosesItsChannelAndNothingElse(t *testing.T) {
	t.Parallel()
	for name, dead := range map[string]bool{"the other lives": false, "the other is dead": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lost := make(chan int, 1)
			v := start(t, vault.Options{Lost: func(n int) { lost <- n }})
			v.Hurry()
			a, b, l := moving(t, v)
			own := newLine(t, 1)
			b.send(control.VaultDeposit, own.deposit())
			if dead {
				a.die()
				if left := v.Died(1, false); left != 1 {
					t.Errorf("%d tunnels are left, want 1", left)
				}
			} else {
				a.wantNumbers(control.VaultReturned, 5)
			}
			if n := <-lost; n != 2 {
				t.Errorf("generation %d has lost its channel", n)
			}
			b.wantEnd()
			// It cannot take any more what was given back, and knows that.
			err := b.conn.Send(&control.VaultPacket{Type: control.VaultTaken, Entries: []control.VaultEntry{taken(l, a, 9)}}, patient)
			if !errors.Is(err, unix.EPIPE) {
				t.Errorf("sent: %v", err)
			}
			if v.Deposits(1) != 1 || v.Deposits(2) != 1 || v.Has(2) {
				t.Errorf("%d and %d tunnels", v.Deposits(1), v.Deposits(2))
			}
			// Until it says something again, it is asked nothing.
			b = deaf(t, v, 2)
			if !dead {
				a.send(control.VaultRelease, released(l)...)
				a.wantNumbers(control.VaultReturned, 5)
			}
			b.store(0)
			b.send(control.VaultComplete)
			if err := v.Await(t.Context(), 2); err != nil {
				t.Error(err)
			}
			if v.Deposits(2) != 0 {
				t.Errorf("%d tunnels, after it has said that it has none", v.Deposits(2))
			}
			own.wantClosed()
		})
	}
}

// Who does not read holds nobody up for longer than a moment, and does not have a second
// moment.
func TestNobodyWaitsForATakerThatDoesNotRead(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Hurry()
	a, b := join(t, v, 1), deaf(t, v, 2)
	b.store(0)
	b.send(control.VaultComplete)
	if err := v.Await(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	v.Target(2)
	ls := lines(t, 12)
	a.send(control.VaultDeposit, deposits(ls)...)
	for _, e := range released(ls...) {
		e.State = make([]byte, control.MaxVaultState) // so that the queue is full soon
		a.send(control.VaultRelease, e)
	}
	a.wantNumbers(control.VaultReturned, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
	if v.Deposits(1) != 12 {
		t.Errorf("%d deposits", v.Deposits(1))
	}
	b.die()
}

// A generation that does not read its answers still has everything done that it says, and
// gets them when it reads.
func TestAnswersWait(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Hurry()
	a := deaf(t, v, 1)
	a.store(0)
	a.send(control.VaultComplete)
	l := newLine(t, 1<<30)
	a.send(control.VaultDeposit, l.deposit())
	var all []uint64
	var sent []control.VaultEntry
	for n := range uint64(40_000) { // not deposited; more than what a queue holds
		sent = append(sent, control.VaultEntry{Number: n})
		all = append(all, n)
	}
	for batch := range slices.Chunk(sent, control.VaultBatch) {
		a.send(control.VaultRelease, batch...)
	}
	eventually(t, "the deposit is not there", func() bool { return v.Deposits(1) == 1 })
	a.listen()
	a.wantNumbers(control.VaultReturned, all...)
}

func TestAGenerationThatNeverReadsIsCutOffInTheEnd(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b := deaf(t, v, 1), join(t, v, 2)
	a.store(0)
	l := newLine(t, 1<<30)
	a.send(control.VaultDeposit, l.deposit())
	all := make([]control.VaultEntry, control.VaultBatch)
	for n := uint64(0); ; n++ {
		for i := range all {
			all[i].Number = n
		}
		err := a.conn.Send(&control.VaultPacket{Type: control.VaultRelease, Entries: all}, patient)
		if errors.Is(err, unix.EPIPE) {
			break
		}
		if err != nil || n > 1<<20 {
			t.Fatalf("after %d: %v", n, err)
		}
	}
	l.wantClosed()
	b.synced()
}

func TestAnotherChannelTakesTheFirstOnesPlace(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b := join(t, v, 1), join(t, v, 2)
	v.Target(2)
	ls := lines(t, 6)
	kept, ended, gone, going, declined, replaced := ls[0], ls[1], ls[2], ls[3], ls[4], ls[5]
	a.send(control.VaultDeposit, deposits(ls)...)
	a.send(control.VaultRelease, released(gone, going, declined)...)
	for i, e := range b.want(control.VaultTake).Entries {
		ls[2+i].is(e.Files)
	}
	b.send(control.VaultTaken, taken(gone, a, 1))
	b.send(control.VaultDeclined, taken(declined, a, 0))
	b.synced()

	// The first one was not read any more; everything is told again.
	again := listening(t, v, 1)
	if again.store(0); v.Stores(1) != 1 {
		t.Errorf("%d stores", v.Stores(1))
	}
	e := replaced.deposit()
	e.Record = []byte("other")
	again.send(control.VaultDeposit, kept.deposit(), e)
	again.send(control.VaultDeposit, gone.released(), going.released(), declined.released())
	again.wantNumbers(control.VaultGone, gone.number)
	again.wantNumbers(control.VaultReturned, declined.number)
	if v.Deposits(1) != 5 {
		t.Errorf("%d deposits, want the old ones too", v.Deposits(1))
	}
	again.send(control.VaultComplete)
	ended.wantClosed()
	if v.Deposits(1) != 4 {
		t.Errorf("%d deposits, want 4", v.Deposits(1))
	}
	b.send(control.VaultTaken, taken(going, a, 2))
	again.wantNumbers(control.VaultGone, going.number)
	again.wantNothing()
	a.wantEnd()
	if err := a.conn.Send(&control.VaultPacket{Type: control.VaultComplete}, patient); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the first channel can still be written to: %v", err)
	}

	again.die()
	v.Died(1, false)
	r := listening(t, v, 3)
	if err := v.HandTunnels(1, 3); err != nil {
		t.Fatal(err)
	}
	for _, e := range r.want(control.VaultResume).Entries {
		if e.Number == replaced.number && string(e.Record) != "other" {
			t.Errorf("the record is %q", e.Record)
		}
		ls[e.Number-1].is(e.Files)
	}
}

// What was sent over the first channel counts, although it was replaced before anybody
// read it.
func TestWhatWasSentOverTheFirstChannelCounts(t *testing.T) {
	t.Parallel()
	for range 50 {
		v := start(t, vault.Options{})
		a, b, l := moving(t, v)
		b.send(control.VaultTaken, taken(l, a, 9))
		deaf(t, v, 2)
		a.wantNumbers(control.VaultGone, 5)
	}
}

func TestATakersSecondChannelReturnsWhatItHasNotTaken(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, _, l := moving(t, v)
	b := join(t, v, 2)
	a.wantNumbers(control.VaultReturned, 5)
	// It has no part in it any more.
	b.send(control.VaultTaken, taken(l, a, 9))
	b.wantEnd()
	if v.Deposits(1) != 1 {
		t.Errorf("%d deposits", v.Deposits(1))
	}
}

func TestAWithdrawnTunnelMayStillBeTaken(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b, l := moving(t, v)
	a.send(control.VaultWithdraw, numbers(l)...)
	a.synced()
	b.send(control.VaultTaken, taken(l, a, 9))
	b.synced()
	if v.Deposits(1) != 0 || v.Deposits(2) != 1 {
		t.Errorf("%d and %d deposits", v.Deposits(1), v.Deposits(2))
	}
	a.wantNothing()

	l = newLine(t, 6)
	a.send(control.VaultDeposit, l.deposit())
	a.send(control.VaultRelease, released(l)...)
	l.is(b.want(control.VaultTake).Entries[0].Files)
	a.send(control.VaultWithdraw, numbers(l)...)
	a.synced()
	b.send(control.VaultDeclined, taken(l, a, 0))
	l.wantClosed()
	a.wantNothing()
}

func TestAwaitAndHas(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	if err := v.Await(t.Context(), 1); !errors.Is(err, vault.ErrNoChannel) || v.Has(1) {
		t.Errorf("nobody: %v", err)
	}
	a := listening(t, v, 1)
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, errors.New("enough"))
	defer cancel()
	if err := v.Await(ctx, 1); err == nil || err.Error() != "enough" || !v.Has(1) {
		t.Errorf("before it is complete: %v", err)
	}
	done := make(chan error)
	go func() { done <- v.Await(t.Context(), 1) }()
	a.send(control.VaultComplete)
	if err := <-done; err != nil {
		t.Error(err)
	}
	b := listening(t, v, 2)
	go func() { done <- v.Await(t.Context(), 2) }()
	b.die()
	if err := <-done; !errors.Is(err, vault.ErrNoChannel) || v.Has(2) {
		t.Errorf("after its end: %v", err)
	}
}

func TestSettle(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	a, b, l := moving(t, v)
	v.Target(0)
	done := make(chan error, 1)
	go func() { done <- v.Settle(t.Context()) }()
	a.synced()
	select {
	case err := <-done:
		t.Fatalf("settled: %v", err)
	default:
	}
	b.send(control.VaultDeclined, taken(l, a, 0))
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCloseLetsGoOfEverything(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	_, _, l := moving(t, v)
	deaf(t, v, 3)
	v.Close()
	l.wantClosed()
	deaf(t, v, 4)
	if v.Has(4) {
		t.Error("a closed vault has a channel")
	}
}

func TestNobodyKnowsADeadGenerationThatWasNeverThere(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	b := join(t, v, 2)
	if v.Died(1, false) != 0 || v.Stores(1) != 0 || v.Deposits(1) != 0 {
		t.Error("somebody is there")
	}
	v.Drop(1)
	if err := errors.Join(v.HandStores(1, 2), v.HandTunnels(1, 2)); err != nil {
		t.Error(err)
	}
	b.want(control.VaultComplete)
	// The dead have no channels.
	b.die()
	v.Died(2, false)
	deaf(t, v, 2)
	if err := v.HandStores(1, 2); !errors.Is(err, vault.ErrNoChannel) || v.Has(2) {
		t.Errorf("%v", err)
	}
}

// What a generation says of a tunnel that stands may meet the answer on its way. Who
// releases one has had its answer, so it waits for nothing; and the answer says to what.
func TestATunnelThatIsReleasedAnewDoesNotWait(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{1, 2})
	a := listening(t, v, 1)
	a.store(0)
	l := lines(t, 1)[0]
	a.send(control.VaultDeposit, l.released()) // 2 may have it
	again := released(l)
	again[0].Stand = 7
	a.send(control.VaultRelease, again...)
	if p := a.want(control.VaultReturned); len(p.Entries) != 1 || p.Entries[0].Number != l.number || p.Entries[0].Stand != 7 {
		t.Errorf("it was answered %+v", p.Entries)
	}
	a.send(control.VaultComplete)
	b := join(t, v, 2)
	b.synced()
	a.synced()
	a.wantNothing()
	if n := v.Deposits(1); n != 1 {
		t.Errorf("%d deposits", n)
	}
	v.Target(2)
	again[0].Stand = 8
	a.send(control.VaultRelease, again...)
	l.is(b.want(control.VaultTake).Entries[0].Files)
	b.send(control.VaultDeclined, taken(l, a, 0))
	if p := a.want(control.VaultReturned); p.Entries[0].Stand != 8 {
		t.Errorf("it was answered %+v", p.Entries)
	}
}

// What waits and has found no room is not handed on: nobody could go on with it.
func TestWhatFoundNoRoomIsNotHandedOn(t *testing.T) {
	t.Parallel()
	v := start(t, vault.Options{})
	v.Expect([]int{1, 2, 3})
	v.Limit(0, 1<<20)
	a, b := listening(t, v, 1), join(t, v, 2)
	v.Target(2)
	a.store(0)
	l := lines(t, 1)[0]
	a.send(control.VaultDeposit, l.released()) // 3 may have it
	a.wantNumbers(control.VaultRefused, l.number)
	again := released(l)
	again[0].Stand = 2
	a.send(control.VaultRelease, again...)
	a.wantNumbers(control.VaultReturned, l.number)
	a.synced()
	b.wantNothing()
	if n := v.Deposits(1); n != 0 {
		t.Errorf("%d deposits", n)
	}
}
