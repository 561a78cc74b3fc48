package tunnel

import (
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"holdfast/internal/poller"
)

// custody says how a tunnel stands with the vault.
type custody uint8

const (
	unattended custody = iota // it is not to be deposited
	waiting                   // it is to be, as soon as the vault has room
	deposited
	early    // it is to be, after bytes from before its beginning, of which no successor would know
	absent   // nobody was there
	refused  // there was no room
	arriving // the vault has it, and is still to be told that it goes on here
	notPlain // it should be, and cannot (foreign.go)
	numCustodies
)

// entrust changes how a tunnel stands with the vault.
func (e *engine) entrust(t *slot, c custody) {
	e.set.metrics.custody[t.custody].Add(-1)
	e.set.metrics.custody[c].Add(1)
	t.custody = c
}

// base is what the kernel's counters of a tunnel are counted from, as in [Place].
type base struct {
	taken, given, moved [2]uint64
}

// smallBase is the base of nearly every tunnel: what went over its connections before is
// the head of a request and its answer. Below 0 it is where bytes go to the client that were
// never taken from the server, as the head of our answer.
type smallBase struct {
	taken, given, moved [2]int32
}

// small returns b as a smallBase, and whether it is one.
func (b *base) small() (s smallBase, ok bool) {
	for i := range 2 {
		s.taken[i], s.given[i], s.moved[i] = int32(b.taken[i]), int32(b.given[i]), int32(b.moved[i])
	}
	return s, s.whole() == *b
}

func (s *smallBase) whole() (b base) {
	for i := range 2 {
		b.taken[i], b.given[i], b.moved[i] = uint64(s.taken[i]), uint64(s.given[i]), uint64(s.moved[i])
	}
	return b
}

// courier is what an engine has to tell the vault. It is told at the end of a turn.
type courier struct {
	vault Vault // nil: there is none
	loop  int   // the engine's, as a [Place] has it

	absent bool          // nobody is there
	quiet  time.Duration // the vault is busy: the moment of the next try
	pause  time.Duration // before that
	timer  *poller.Timer

	withdrawals []errand
	departed    []Record  // ends that are reported after their withdrawals
	arrivals    []arrived // tunnels that the vault is to be told are here
	declines    []Ticket
	deposits    []errand
	round       *round
	roundAt     uint32 // the slot that the round has come to
	complete    *round // of which all engines are through, which is to be said; nil: none

	refusals map[uint64]bool // numbers that are still to be found
	refuser  *poller.Timer
	retrier  *poller.Timer // until tunnels are offered again that were refused

	batch   []Deposit // memory for one of each
	numbers []uint64
}

// errand is to be done for a tunnel that may have ended meanwhile.
type errand struct {
	slot   uint32
	number uint64
	since  time.Duration // the moment of the first try
}

// round deposits all tunnels once, for all calls of [Set.Deposit] of which that was not
// done so far.
type round struct {
	tickets []Ticket
	engines atomic.Int32 // that are not through
}

// What a turn does for a round, and the most that is withdrawn at once.
const (
	roundPiece   = 64
	withdrawMost = 1024
)

// Pauses between two tries when the vault is busy.
const (
	firstVaultPause = 2 * time.Millisecond
	mostVaultPause  = 50 * time.Millisecond
)

// deposits says whether a tunnel is to be deposited by itself.
func (e *engine) deposits(t *slot) bool {
	return e.courier.vault != nil && !t.foreign && e.origins.used[t.origin].SurviveCrash
}

// depositFirst has a tunnel deposited before anything of it is moved. It returns false if
// that is not to be waited for.
func (e *engine) depositFirst(n uint32, t *slot) bool {
	switch {
	case !e.deposits(t):
		return false
	case e.courier.absent:
		e.entrust(t, absent)
		return false
	case e.holdsEarly(n, t):
		e.entrust(t, early)
		return false
	}
	e.depositSoon(n, t)
	return true
}

func (e *engine) depositSoon(n uint32, t *slot) {
	e.entrust(t, waiting)
	e.courier.deposits = append(e.courier.deposits, errand{n, t.number, e.now()})
}

// depositLate has a tunnel deposited that was started without, once its early bytes are
// out.
func (e *engine) depositLate(n uint32, t *slot) {
	switch {
	case e.holdsEarly(n, t):
	case e.courier.absent:
		e.entrust(t, absent)
	default:
		e.depositSoon(n, t)
	}
}

// holdsEarly says whether something of a tunnel is where no successor finds it.
func (e *engine) holdsEarly(n uint32, t *slot) bool {
	for from := range t.flows {
		if t.flows[from].holds && e.held[key(n, from)].early != nil {
			return true
		}
	}
	return false
}

// baseline returns what the kernel's counters of a tunnel are counted from: what they are
// now, less what they have counted of it. It is found out once, and only of a tunnel that
// neither ends nor has bytes that nobody would find.
func (e *engine) baseline(n uint32, t *slot) (b base, ok bool) {
	if t.based {
		return e.table.base(n), true
	}
	if t.reason != Open || e.holdsEarly(n, t) {
		return b, false
	}
	for i := range t.sockets {
		c, err := e.looker.Look(int(t.sockets[i].fd))
		if err != nil || c.Gone {
			return b, false
		}
		taken, _ := e.flown(n, t, i)
		_, given := e.flown(n, t, 1-i)
		b.taken[i], b.given[1-i] = c.Taken-taken, c.Given-given
		b.moved[1-i] = t.flows[1-i].moved - given
	}
	e.table.setBase(n, b)
	return b, true
}

// flown returns how many bytes a flow has taken and given, of those that the store knows.
func (e *engine) flown(n uint32, t *slot, from int) (taken, given uint64) {
	taken = e.store.Completed(key(n, from))
	given = taken
	if t.flows[from].holds {
		h := e.held[key(n, from)]
		taken += uint64(h.to + h.left)
		given += uint64(h.from)
	}
	return taken, given
}

// tellVault tells the vault what there is to tell.
func (e *engine) tellVault() {
	c := &e.courier
	if c.idle() || e.now() < c.quiet {
		return
	}
	err := e.tell()
	switch {
	case err == nil:
		c.pause = 0
		if c.round != nil {
			c.timer.Set(e.loop.Now())
		} else if len(c.withdrawals) > 0 {
			c.timer.Set(e.set.epoch.Add(c.withdrawals[0].since + e.set.bounds.withdraw))
		}
	case errors.Is(err, ErrVaultBusy):
		c.pause = min(max(2*c.pause, firstVaultPause), mostVaultPause)
		c.quiet = e.now() + c.pause
		c.timer.Set(e.set.epoch.Add(c.quiet))
		e.loseVaultPatience()
	default:
		e.missVault()
	}
}

// idle says whether there is nothing to tell.
func (c *courier) idle() bool {
	return len(c.withdrawals)+len(c.declines)+len(c.deposits)+len(c.arrivals) == 0 && c.round == nil && c.complete == nil
}

// tell tells the vault one thing after the other. Withdrawals come first: a place is
// another tunnel's only when it was withdrawn.
func (e *engine) tell() error {
	for _, what := range [...]func() error{e.sendWithdrawals, e.sendDeposits, e.sendTaken, e.sendDeclined, e.sendRound} {
		if err := what(); err != nil {
			return err
		}
	}
	return nil
}

// withdraw has the vault give up what it has of a tunnel that has ended, and the end
// reported after that.
func (e *engine) withdraw(n uint32, r Record) {
	c := &e.courier
	c.withdrawals = append(c.withdrawals, errand{n, r.Number, e.now()})
	c.departed = append(c.departed, r)
}

// sendWithdrawals withdraws tunnels that have ended, and has their ends reported after
// that: one that were reported before it might go on after a crash, and end once more. It
// waits a little for more of them: nothing needs their places so soon.
func (e *engine) sendWithdrawals() error {
	c := &e.courier
	const enough = 64
	all := c.withdrawals
	if n := len(all); n == 0 || n < enough && e.now() < c.withdrawals[0].since+e.set.bounds.withdraw {
		return nil
	}
	for len(c.withdrawals) > 0 {
		some := c.withdrawals[:min(len(c.withdrawals), withdrawMost)]
		c.numbers = c.numbers[:0]
		for _, w := range some {
			c.numbers = append(c.numbers, w.number)
		}
		if err := c.vault.Withdraw(c.numbers); err != nil {
			return err
		}
		e.withdrawn(some)
		c.withdrawals = c.withdrawals[len(some):]
	}
	c.withdrawals = reuse(all)
	e.reportDeparted()
	return nil
}

// withdrawn is called when nobody will go on with tunnels any more that have ended. Until
// then their places are not another one's.
func (e *engine) withdrawn(all []errand) {
	for _, w := range all {
		if w.slot == nobody { // it has had no place
			e.unreserve()
			continue
		}
		e.freeSlot(w.slot)
	}
}

func (e *engine) reportDeparted() {
	c := &e.courier
	e.ended = append(e.ended, c.departed...)
	c.departed = reuse(c.departed)
}

// mostReused is how many elements of a list keep their memory.
const mostReused = 256

// reuse returns the memory of a list for the next one. Nobody may have a part of it.
func reuse[T any](list []T) []T {
	if cap(list) > mostReused {
		return nil
	}
	clear(list)
	return list[:0]
}

// sendDeposits deposits the tunnels that wait for it, and has those relayed that stand
// still until then.
func (e *engine) sendDeposits() error {
	c := &e.courier
	all := c.deposits
	for len(c.deposits) > 0 {
		n := 0
		for ; n < len(c.deposits) && len(c.batch) < VaultBatch; n++ {
			d := &c.deposits[n]
			if t := e.table.find(d.slot, d.number); t != nil {
				e.pack(d.slot, t)
			}
		}
		if err := e.sendBatch(); err != nil {
			return err
		}
		sent := c.deposits[:n]
		c.deposits = c.deposits[n:]
		for _, d := range sent {
			e.beginDeposited(d)
		}
	}
	c.deposits = reuse(all)
	return nil
}

// beginDeposited has a tunnel relayed that has waited for its deposit. One that stands still since
// it was released is for somebody else to say what becomes of it.
func (e *engine) beginDeposited(d errand) {
	t := e.table.find(d.slot, d.number)
	if t == nil || !t.still {
		return
	}
	if _, released := e.mover.standing[t.number]; !released {
		e.wake(d.slot, t)
	}
}

// pack puts a tunnel into the batch that is deposited next. One of which nobody could say
// where it is is left alone.
func (e *engine) pack(n uint32, t *slot) {
	if b, ok := e.baseline(n, t); ok {
		e.courier.batch = append(e.courier.batch, e.newDeposit(n, t, &b))
	} else {
		e.entrust(t, unattended)
	}
}

func (e *engine) newDeposit(n uint32, t *slot, b *base) Deposit {
	st, released := e.mover.standing[t.number]
	if released {
		st.redeposited = true
		e.mover.standing[t.number] = st
	}
	return Deposit{
		Record: e.record(n, t),
		FDs:    [2]int{int(t.sockets[down].fd), int(t.sockets[up].fd)},
		Place:  Place{Loop: e.courier.loop, Slot: n, Taken: b.taken, Given: b.given, Moved: b.moved},
		Stand:  st.stand,
	}
}

// sendBatch deposits the batch.
func (e *engine) sendBatch() error {
	c := &e.courier
	if len(c.batch) == 0 {
		return nil
	}
	defer func() { clear(c.batch); c.batch = c.batch[:0] }()
	if err := c.vault.Deposit(c.batch); err != nil {
		return err
	}
	for i := range c.batch {
		e.entrust(e.table.at(c.batch[i].Place.Slot), deposited)
	}
	return nil
}

// sendRound deposits a piece of all tunnels, and says so after the last.
func (e *engine) sendRound() error {
	c := &e.courier
	for sent := 0; c.round != nil && sent < roundPiece; sent += VaultBatch {
		next := e.packRound()
		if err := e.sendBatch(); err != nil {
			return err
		}
		c.roundAt = next
		if int(next) >= len(e.table.chunks)*chunkSize {
			if c.round.engines.Add(-1) == 0 {
				c.complete = c.round
			}
			c.round = nil
		}
	}
	for c.complete != nil {
		left := c.complete.tickets
		if len(left) == 0 {
			c.complete = nil
			break
		}
		if err := c.vault.Complete(left[0]); err != nil {
			return err
		}
		e.set.completed(left[0])
		c.complete.tickets = left[1:]
	}
	return nil
}

// packRound fills the batch with tunnels from roundAt on, and returns the slot after
// them.
func (e *engine) packRound() (next uint32) {
	c := &e.courier
	for next = c.roundAt; int(next) < len(e.table.chunks)*chunkSize && len(c.batch) < VaultBatch; {
		if e.table.chunks[next/chunkSize].used == 0 {
			next += chunkSize - next%chunkSize
			continue
		}
		if t := e.table.at(next); t.lives() {
			e.packAgain(next, t)
		}
		next++
	}
	return next
}

// packAgain packs a tunnel that the vault may have had already.
func (e *engine) packAgain(n uint32, t *slot) {
	switch t.custody {
	case absent:
		if e.holdsEarly(n, t) {
			e.entrust(t, early)
			return
		}
		e.pack(n, t)
	case deposited, refused:
		e.pack(n, t)
	}
}

// loseVaultPatience has go on what has waited for a busy vault for too long. The vault
// is still told as soon as it has room.
func (e *engine) loseVaultPatience() {
	c := &e.courier
	since := e.now() - e.set.bounds.vault
	for _, d := range c.deposits {
		if d.since <= since {
			e.beginDeposited(d)
		}
	}
	if len(c.departed) > 0 && c.withdrawals[0].since <= since {
		e.reportDeparted()
	}
	e.loseArrivals(since)
}

// missVault is called when nobody is there: nothing is told until somebody is.
func (e *engine) missVault() {
	c := &e.courier
	c.absent = true
	e.withdrawn(c.withdrawals)
	c.withdrawals = nil
	e.reportDeparted()
	deposits := c.deposits
	c.deposits, c.round, c.complete = nil, nil, nil
	for _, d := range deposits {
		t := e.table.find(d.slot, d.number)
		if t == nil {
			continue
		}
		e.entrust(t, absent)
		e.beginDeposited(d)
	}
	e.loseArrivals(e.now())
	c.declines = nil
}

// Deposit has all tunnels deposited, since somebody is there who knows of none, and then
// calls [Vault.Complete] with the ticket. A call while the work for another one is under
// way begins it again, for both.
func (s *Set) Deposit(t Ticket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.incomplete = append(s.incomplete, t)
	r := &round{tickets: slices.Clone(s.incomplete)}
	r.engines.Store(int32(len(s.engines)))
	for _, e := range s.engines {
		e.loop.Post(func() {
			c := &e.courier
			c.absent, c.quiet, c.pause = false, 0, 0
			c.round, c.roundAt, c.complete = r, 0, nil
			clear(c.refusals)
			e.mover.refusal.pause, e.mover.refusal.until = 0, 0
			e.moveSoon(0)
		})
	}
}

// completed notes that a call of Deposit was answered.
func (s *Set) completed(t Ticket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.incomplete, t); i >= 0 {
		s.incomplete = slices.Delete(s.incomplete, i, i+1)
	}
}

// Refused says that there is no room for tunnels that were deposited. Numbers of others
// are ignored.
func (s *Set) Refused(numbers []uint64) {
	for _, e := range s.engines {
		e.loop.Post(func() {
			c := &e.courier
			if c.refusals == nil {
				c.refusals = make(map[uint64]bool)
				c.refuser.Set(e.loop.Now().Add(e.set.bounds.refusals))
			}
			for _, n := range numbers {
				c.refusals[n] = true
			}
		})
	}
}

// noteRefused finds the tunnels that were refused, a while after the first, since there
// may be many and it looks at all.
func (e *engine) noteRefused() {
	any := false
	for _, t := range e.table.all() {
		if t.custody == deposited && e.courier.refusals[t.number] {
			e.entrust(t, refused)
			any = true
		}
	}
	e.courier.refusals = nil
	if any {
		e.mover.refused(e.now(), e.set.bounds.move)
		e.courier.retrier.Set(e.loop.Now().Add(e.set.bounds.retry))
	}
}

// retryRefused deposits tunnels again that were refused: there may be room by now.
func (e *engine) retryRefused() {
	again := false
	for n, t := range e.table.all() {
		switch {
		case t.custody != refused || t.parting:
		case t.still: // it was released, and is told of with every round
			again = true
		default:
			e.depositSoon(n, t)
		}
	}
	if again {
		e.courier.retrier.Set(e.loop.Now().Add(e.set.bounds.retry))
	}
}
