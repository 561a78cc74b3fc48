package tunnel

import (
	"errors"
	"time"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel/inflight"
)

// mover has the tunnels of an engine go on elsewhere, a batch at a time.
type mover struct {
	wanted bool // Set.Move was called
	all    bool // also tunnels whose origin does not want it
	timer  *poller.Timer
	at     uint32        // the slot that the search has come to
	again  time.Duration // from its end to the next one, for tunnels that may go later; 0: there are none

	refusal struct { // of deposits
		pause time.Duration // before the next try
		until time.Duration // the moment of that
	}

	stopper *poller.Timer // for those that stand still when the Set is stopped

	standing map[uint64]standing // by the number: released, and nobody has answered
}

// standing is a tunnel that stands still until it is known whether it goes on elsewhere.
type standing struct {
	slot  uint32
	stand uint64 // as in [Standing]

	// redeposited: whom it was released to is not who will answer. It may have gone on
	// elsewhere, and even ended there, without anybody left who knows.
	redeposited bool
}

// Pauses of a mover.
const (
	afterDeposit     = 20 * time.Millisecond // for a tunnel that is deposited first
	whileBusy        = 20 * time.Millisecond
	mostRefusalPause = 30 * time.Second
)

// retry has another search follow after that time at the latest.
func (m *mover) retry(after time.Duration) {
	if m.again == 0 || after < m.again {
		m.again = after
	}
}

// refused is called when there was no room for deposits: what is to move is deposited
// again after longer and longer pauses.
func (m *mover) refused(now, pause time.Duration) {
	r := &m.refusal
	r.pause = min(max(2*r.pause, pause), mostRefusalPause)
	r.until = now + r.pause
}

// searchPiece is how many slots a turn looks at for tunnels that can move.
const searchPiece = 4 * chunkSize

// Move has tunnels go on elsewhere: those whose Origin says so, or all. Each stands still
// from [Vault.Release] to [Set.Gone] or [Set.Returned]; one that was returned is released
// again, some time later. What ends by itself meanwhile, or cannot move, stays.
func (s *Set) Move(all bool) {
	for _, e := range s.engines {
		e.loop.Post(func() {
			if e.courier.vault != nil {
				e.mover.wanted, e.mover.all = true, all
				e.moveSoon(0)
			}
		})
	}
}

// Unmove takes Move back. Tunnels that were released already may still go.
func (s *Set) Unmove() {
	for _, e := range s.engines {
		e.loop.Post(func() { e.mover.wanted = false })
	}
}

// Gone says that tunnels that were released go on elsewhere. Other numbers are ignored.
func (s *Set) Gone(numbers []uint64) {
	answers := make([]Answer, len(numbers)) // to whichever Stand: it is over for good
	for i, n := range numbers {
		answers[i].Number = n
	}
	s.answer(answers, (*engine).gone)
}

// Returned says that tunnels go on here that were released and still stand as they did then,
// which their Stand tells. Others are ignored: where supervisors change, an answer may come
// twice, and the second one after the tunnel was released again.
func (s *Set) Returned(answers []Answer) { s.answer(answers, (*engine).returned) }

// Answer is one to a tunnel that was released. A Stand of 0 is whichever it is.
type Answer struct{ Number, Stand uint64 }

func (s *Set) answer(answers []Answer, do func(*engine, standing, *slot)) {
	for _, e := range s.engines {
		e.loop.Post(func() {
			any := false
			for _, a := range answers {
				number := a.Number
				if st, ok := e.mover.standing[number]; ok && (a.Stand == 0 || a.Stand == st.stand) {
					delete(e.mover.standing, number)
					do(e, st, e.table.at(st.slot))
					any = true
				}
			}
			if any {
				e.moveOn()
			}
		})
	}
}

// moveSoon has the search for tunnels that can move go on.
func (e *engine) moveSoon(pause time.Duration) {
	if e.mover.wanted {
		e.mover.timer.Set(e.loop.Now().Add(pause))
	}
}

// moveOn releases the next batch, after the last was answered.
func (e *engine) moveOn() {
	m := &e.mover
	if !m.wanted || len(m.standing) > 0 || e.courier.absent {
		return
	}
	batch, next := e.findMovable()
	switch err := e.offer(batch); {
	case errors.Is(err, ErrVaultBusy):
		e.moveSoon(whileBusy)
	case err != nil:
		e.moveSoon(e.set.bounds.move)
	case int(next) < len(e.table.chunks)*chunkSize:
		m.at = next
		if len(batch) == 0 {
			e.moveSoon(0)
		}
	case len(batch) > 0:
		m.at = next
	default:
		m.at = 0
		if m.again > 0 {
			e.moveSoon(m.again)
		}
		m.again = 0
	}
}

// findMovable returns the slots of tunnels that can move now, from where the last search
// has come to, and where this one has.
func (e *engine) findMovable() (batch []uint32, next uint32) {
	end := min(int(e.mover.at)+searchPiece, len(e.table.chunks)*chunkSize)
	bytes := 0
	for next = e.mover.at; int(next) < end && len(batch) < VaultBatch; next++ {
		if !e.table.taken(next) {
			continue
		}
		t := e.table.at(next)
		if !t.lives() || !e.mayMove(next, t) {
			continue
		}
		if bytes += e.heldBytes(next, t); bytes > VaultHeld {
			break
		}
		batch = append(batch, next)
	}
	return batch, next
}

// mayMove says whether a tunnel can move now, and plans another search if it may later.
func (e *engine) mayMove(n uint32, t *slot) bool {
	m := &e.mover
	if t.reason != Open || !e.toMove(t) {
		return false
	}
	switch {
	case t.custody == deposited:
		return true
	case t.custody == waiting, t.custody == arriving, e.holdsEarly(n, t),
		t.custody == refused && e.now() < m.refusal.until:
		m.retry(e.set.bounds.move)
	default:
		e.depositSoon(n, t)
		m.retry(afterDeposit)
	}
	return false
}

// toMove says whether a tunnel is to go on elsewhere. It uses pipes no more: who takes it
// may have none, while there is room for a buffer nearly always.
func (e *engine) toMove(t *slot) bool {
	return e.mover.wanted && !t.foreign && (e.mover.all || e.origins.used[t.origin].Move)
}

// heldBytes returns how many bytes of a tunnel are in buffers.
func (e *engine) heldBytes(n uint32, t *slot) (bytes int) {
	for from := range t.flows {
		if t.flows[from].holds {
			h := e.held[key(n, from)]
			bytes += h.to - h.from
		}
	}
	return bytes
}

// offer releases tunnels. With an error they go on.
func (e *engine) offer(batch []uint32) error {
	if len(batch) == 0 {
		return nil
	}
	all := make([]Standing, len(batch))
	for i, n := range batch {
		t := e.table.at(n)
		e.halt(t)
		st := standing{slot: n, stand: e.set.stands.Add(1)}
		e.mover.standing[t.number] = st
		all[i] = e.stand(n, t)
		all[i].Stand = st.stand
	}
	err := e.courier.vault.Release(all)
	if err == nil {
		return nil
	}
	for _, n := range batch {
		t := e.table.at(n)
		delete(e.mover.standing, t.number)
		e.goOn(n, t)
	}
	return err
}

// stand describes a tunnel that stands still.
func (e *engine) stand(n uint32, t *slot) Standing {
	s := Standing{Number: t.number, Idle: e.now() - t.active, ClosedFirst: t.closed}
	for i := range t.sockets {
		s.FinSent[i], s.Ended[i] = t.sockets[i].finSent, t.sockets[i].ended
	}
	for from := range t.flows {
		s.Moved[from] = t.flows[from].moved
		if !t.flows[from].holds {
			continue
		}
		h := e.held[key(n, from)]
		if h.pipe != nil {
			s.Pipe[from], s.Piped[from] = h.pipe.R, h.left
		} else {
			s.Held[from] = h.buffer.Bytes[h.from:h.to]
		}
	}
	return s
}

// goOn has a tunnel go on of which something may be on its way to the peers.
func (e *engine) goOn(n uint32, t *slot) {
	for from := range t.flows {
		e.watchFlow(n, t, from)
	}
	e.wake(n, t)
}

// gone lets go of a tunnel that lives on elsewhere.
func (e *engine) gone(st standing, t *slot) {
	e.ended = append(e.ended, e.letGo(st.slot, t))
	e.freeSlot(st.slot)
}

// letGo takes out a tunnel that somebody else has, with all that it holds.
func (e *engine) letGo(n uint32, t *slot) Record {
	for from := range t.flows {
		e.drop(n, t, from)
		closeFD(t.sockets[from].fd)
	}
	return e.vacate(n, t)
}

// returned has a tunnel go on that nobody else wanted, and plans to try again.
func (e *engine) returned(st standing, t *slot) {
	if st.redeposited && !e.untouched(st.slot, t) {
		e.withdraw(st.slot, e.letGo(st.slot, t)) // whoever answers does not know that it is gone
		return
	}
	e.mover.retry(e.set.bounds.move)
	e.goOn(st.slot, t)
}

// untouched says whether the kernel has counted no more for a tunnel than was counted
// here: nobody else has relayed it.
func (e *engine) untouched(n uint32, t *slot) bool {
	b := e.table.base(n)
	for i := range t.sockets {
		s := &t.sockets[i]
		c, err := inflight.Look(int(s.fd))
		if err != nil || !c.Gone && c.FinSent != s.finSent {
			return false
		}
		c = c.Since(b.taken[i], b.given[1-i])
		taken, _ := e.flown(n, t, i)
		_, given := e.flown(n, t, 1-i)
		fins := uint64(0) // that count as bytes
		if c.Gone {
			fins = 1
		}
		if c.Taken-taken > fins || c.Given-given > fins {
			return false
		}
	}
	return true
}

// stopStanding gives up the tunnels that stand still: nobody waits for answers any more.
// What another Set has taken lives on there, so nothing is done to the connections but
// that they are closed.
func (e *engine) stopStanding() {
	for _, st := range e.mover.standing {
		t := e.table.at(st.slot)
		t.reason = Stopped
		r := e.letGo(st.slot, t)
		r.Ended = time.Now()
		e.withdraw(st.slot, r)
	}
}
