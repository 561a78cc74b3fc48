package vault

import (
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/scavenge"
)

// Hurry has v lose its patience soon. It is called before anything else.
func (v *Vault) Hurry() {
	v.bounds = bounds{
		send: 200 * time.Millisecond, ask: 100 * time.Millisecond, slow: time.Minute,
		verdict: 300 * time.Millisecond, lastVerdict: 100 * time.Millisecond,
		pause: 10 * time.Millisecond, mostPause: 40 * time.Millisecond,
		patience: 300 * time.Millisecond,
	}
}

// Limit has v refuse deposits from descriptor n on, and stores from m on.
func (v *Vault) Limit(n, m int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.limits.deposits, v.limits.stores = n, m
}

// GivesAnother says whether generation n will be given another channel.
func (v *Vault) GivesAnother(n int) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	g := v.generations[n]
	return g != nil && g.lost != nil
}

// Jam has nothing closed that came from generation n, until the function is called that
// it returns.
func (v *Vault) Jam(n int) (ease func()) {
	v.mu.Lock()
	c := v.generations[n].closer
	v.mu.Unlock()
	for idle := false; !idle; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		idle, c.running = !c.running, true
		c.mu.Unlock()
	}
	return c.run
}

// Kill ends v as the death of its process would: at once, whatever was not read.
func (v *Vault) Kill() {
	v.mu.Lock()
	for _, g := range v.generations {
		if g.channel != nil && !g.channel.over {
			g.channel.over = true
			g.channel.poke()
			g.channel.conn.Close()
		}
	}
	v.mu.Unlock()
	v.Close()
}

// The whole product of states and events, refusals included.
func TestTheLifeOfADeposit(t *testing.T) {
	t.Parallel()
	const no = state(0)
	want := map[state][numEvents]state{
		//         deposited restated withdrawn asked taken   declined found  unclaimed
		absent:  {kept, waiting, absent, no, no, no, no, no},
		kept:    {kept, waiting, absent, asked, no, no, no, no},
		asked:   {no, asked, left, no, absent, kept, no, no},
		left:    {no, no, no, no, absent, absent, no, no},
		waiting: {kept, waiting, absent, asked, no, no, absent, kept},
	}
	for s := range numStates {
		for e := range numEvents {
			to, ok := s.next(e)
			if to != want[s][e] || ok != (to != no) {
				t.Errorf("%s after %s: %s, %v", s, e, to, ok)
			}
		}
	}
	if state(99).String() != "state(99)" || event(99).String() != "event(99)" {
		t.Error("what is no state or event has a name")
	}
}

// When there was no room for the descriptors of a packet, those who wait for something
// are answered nevertheless.
func TestAPacketWithoutItsDescriptors(t *testing.T) {
	t.Parallel()
	v := New(Options{Log: slog.New(slog.DiscardHandler)})
	defer v.Close()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	ours, err := control.NewVault(a)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := control.NewVault(b)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	v.Open(1, ours)
	c := v.generations[1].channel
	v.generations[1].stores = []*files{{by: v.generations[1].closer}}
	for _, p := range []struct {
		typ, answer control.VaultType
	}{
		{control.VaultDeposit, control.VaultRefused},
		{control.VaultRelease, control.VaultReturned},
	} {
		v.take(c, &control.VaultPacket{Type: p.typ, Entries: []control.VaultEntry{{Number: 7}}}, unix.EMFILE)
		got, err := theirs.Receive(0)
		if err != nil || got.Type != p.answer || len(got.Entries) != 1 || got.Entries[0].Number != 7 {
			t.Errorf("type %d: %+v, %v", p.typ, got, err)
		}
	}
	if n := v.Deposits(1); n != 0 {
		t.Errorf("%d deposits", n)
	}
	v.take(c, &control.VaultPacket{Type: control.VaultStore}, unix.EMFILE)
	if v.Has(1) {
		t.Error("a generation whose store is lost has a vault")
	}
}

// LimitsOf returns the limits below n descriptors.
func LimitsOf(n int) (deposits, stores, unclosed int) {
	l := limitsOf(n)
	return l.deposits, l.stores, l.unclosed
}

// Unclosed has at most n descriptors of a generation wait to be closed.
func (v *Vault) Unclosed(n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.limits.unclosed = n
}

// Waiting is how many descriptors of generation n wait to be closed.
func (v *Vault) Waiting(n int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.generations[n].closer.waiting()
}

// Ended has the channel of generation n end after it has lasted for so long, and returns
// after which pause there will be another.
func (v *Vault) Ended(n int, lasted time.Duration) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	g := v.generationLocked(n)
	g.stopLost()
	v.startLost(g, lasted)
	return g.pause
}

// Who has not read in time what was sent to it is asked nothing for a while.
func TestWhoDoesNotReadIsNotAsked(t *testing.T) {
	t.Parallel()
	v := New(Options{Log: slog.New(slog.DiscardHandler)})
	c := newChannel(v.generationLocked(1), nil)
	c.of.channel, c.complete = c, true
	v.Target(1)
	asks := newChannel(v.generationLocked(2), nil)
	if v.takerLocked(asks) != c {
		t.Error("it is not asked")
	}
	v.slowLocked(c, &parcel{VaultPacket: &control.VaultPacket{Type: control.VaultGone}})
	if v.takerLocked(asks) != nil {
		t.Error("it is asked, and has not read")
	}
	if c.slow = time.Now(); v.takerLocked(asks) != c {
		t.Error("it is not asked again")
	}
}

// What many tunnels have left is given back when they have gone, once, and few are no
// reason to.
func TestMemoryOfManyTunnelsIsGivenBack(t *testing.T) {
	t.Parallel()
	v := New(Options{Log: slog.New(slog.DiscardHandler)})
	defer v.Close()
	released := make(chan struct{}, 2)
	v.tidier.release = func() { released <- struct{}{} }
	comeAndGo := func(n int) (looks bool) {
		v.mu.Lock()
		defer v.mu.Unlock()
		g := v.generationLocked(1)
		for i := range n {
			d := &deposit{owner: g, number: uint64(i), state: absent, sockets: files{by: g.closer}}
			g.tunnels[d.number] = d
			v.enterLocked(d, kept)
			v.enterLocked(d, kept) // told again, which is nothing new
			v.withdrawLocked(d)
		}
		return v.tidier.timer != nil
	}
	for round := range 2 {
		if comeAndGo(scavenge.Least/2 - 1) {
			t.Errorf("round %d: it looks for what few have left", round)
		}
		if !comeAndGo(1) {
			t.Errorf("round %d: it does not look for what many have left", round)
		}
		now := time.Now()
		for looks := 0; !idle(v); looks++ {
			if looks > 60 {
				t.Fatal("nothing is given back")
			}
			now = now.Add(time.Second)
			v.tidy(now)
		}
		<-released
		v.tidier.Scavenger = scavenge.New(time.Now()) // the clock above was not this one
	}
}

// idle says whether v does not look for memory to give back.
func idle(v *Vault) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.tidier.timer == nil
}
