package tunnel

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// Take has tunnels go on here that another Set has released. For each one the Vault is
// told that it was taken, before anything of it is moved, or that it was declined.
func (s *Set) Take(tunnels []Arriving) {
	for i := range tunnels {
		a := &tunnels[i]
		if a.Origin == nil {
			a.Origin = new(Origin)
		}
		if !s.take(a) {
			a.closePipes()
			a.closeSockets()
			s.decline(a.Ticket)
		}
	}
}

// take gives a tunnel to a loop that has room for it.
func (s *Set) take(a *Arriving) bool {
	if s.mayHave != nil && !s.mayHave(max(a.FDs[down], a.FDs[up])) {
		return false
	}
	e := s.reserve(s.dealt.Add(1))
	if e == nil {
		return false
	}
	s.enter()
	if e.loop.Post(func() { e.take(a) }) {
		return true
	}
	e.unreserve()
	s.leave()
	return false
}

// decline says of a tunnel that it does not go on here.
func (s *Set) decline(t Ticket) {
	if len(s.engines) > 0 { // which does it until the vault has room
		e := s.engines[0]
		if e.loop.Post(func() { e.courier.declines = append(e.courier.declines, t) }) {
			return
		}
	}
	s.vault.Declined(t)
}

func (a *Arriving) closePipes() {
	for _, fd := range a.Pipe {
		if fd != 0 {
			closeFD(int32(fd))
		}
	}
}

func (a *Arriving) closeSockets() {
	for _, fd := range a.FDs { // no more than that: they are others', too
		closeFD(int32(fd))
	}
}

// arrived is a tunnel of which the vault does not know yet that it goes on here.
type arrived struct {
	errand
	ticket Ticket
}

// take gives a tunnel of another Set its place, where it stands still until the vault
// knows.
func (e *engine) take(a *Arriving) {
	defer a.closePipes()
	n, t := e.table.take()
	a.Record.Number = e.set.numbers.Add(1)
	e.enter(n, t, &a.Record, [2]int32{int32(a.FDs[down]), int32(a.FDs[up])})
	e.forget(n)
	e.entrust(t, arriving)
	e.schedule.join(&t.dates, e.limits(t))
	e.sentence(t, &a.Sentence)
	e.judge(t)
	e.settleIn(n, t, &a.Standing)
	sound := adopt(a.FDs[down]) == nil && adopt(a.FDs[up]) == nil
	if sound && !e.schedule.stopping && e.load(n, t, &a.Standing) {
		if _, ok := e.baseline(n, t); ok {
			e.courier.arrivals = append(e.courier.arrivals, arrived{errand{n, t.number, e.now()}, a.Ticket})
			return
		}
	}
	e.turnAway(n, t)
	e.courier.declines = append(e.courier.declines, a.Ticket)
}

// sentence has a tunnel closed, as its Set was told.
func (e *engine) sentence(t *slot, s *Sentence) {
	if s.Ends == Open {
		return
	}
	t.condemn(spread{from: e.now(), over: s.Within}.at(0), s.Ends)
}

// settleIn gives a tunnel the state that it had elsewhere.
func (e *engine) settleIn(n uint32, t *slot, s *Standing) {
	t.active = e.now() - s.Idle
	if t.closed = s.ClosedFirst; t.closed != Open {
		e.markClosed(n, t)
	}
	for i := range t.sockets {
		t.sockets[i].finSent, t.sockets[i].ended = s.FinSent[i], s.Ended[i]
		t.flows[i].moved = s.Moved[i]
		if s.FinSent[1-i] {
			t.flows[i].phase = finished
			e.store.Mark(key(n, i), inflight.MarkFin)
		}
		e.limits(t).KeepAlive.set(int(t.sockets[i].fd), KeepAlive{})
	}
}

// load takes over what a tunnel holds. It returns false where there is no room for that.
func (e *engine) load(n uint32, t *slot, s *Standing) bool {
	for from := range t.flows {
		if len(s.Held[from]) > 0 && !e.put(n, t, from, s.Held[from]) ||
			s.Piped[from] > 0 && !e.tee(n, t, from, int32(s.Pipe[from]), s.Piped[from]) {
			return false
		}
	}
	return true
}

// tee takes over what is in a pipe, and leaves it there: until the vault knows that the
// tunnel is here, it may have to go on elsewhere.
func (e *engine) tee(n uint32, t *slot, from int, pipe int32, bytes int) bool {
	d := key(n, from)
	if p := e.store.Pipe(d); p != nil {
		if tee(pipe, int32(p.W), bytes) == bytes {
			e.hold(&t.flows[from], d, held{pipe: p, left: bytes})
			return true
		}
		e.store.FreePipe(p) // it has fewer pages
	}
	if bytes > inflight.BufferSize {
		return false
	}
	for _, p := range inflight.NewPipes(1, mostSpliced) {
		defer p.Close()
		b := make([]byte, bytes)
		if tee(pipe, int32(p.W), bytes) == bytes && readAll(p.R, b) {
			return e.put(n, t, from, b)
		}
	}
	return false
}

func readAll(fd int, b []byte) bool {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		if err != nil || n == 0 {
			return false
		}
		b = b[n:]
	}
	return true
}

// turnAway forgets about a tunnel that does not go on here, without a trace.
func (e *engine) turnAway(n uint32, t *slot) {
	e.letGo(n, t)
	e.freeSlot(n)
	e.set.removed()
}

// sendTaken tells the vault which tunnels are here, and has them go on.
func (e *engine) sendTaken() error {
	c := &e.courier
	for len(c.arrivals) > 0 {
		a := c.arrivals[0]
		t := e.table.find(a.slot, a.number)
		if t != nil {
			b, _ := e.baseline(a.slot, t)
			err := c.vault.Taken(a.ticket, e.newDeposit(a.slot, t, &b))
			if errors.Is(err, ErrVaultBusy) {
				return err
			}
			if err == nil {
				e.welcome(a.slot, t)
			} else {
				e.turnAway(a.slot, t)
				t = nil
			}
		}
		if t == nil {
			c.declines = append(c.declines, a.ticket)
		}
		c.arrivals = c.arrivals[1:]
	}
	c.arrivals = nil
	return nil
}

// welcome has a tunnel go on of which the vault knows that it is here.
func (e *engine) welcome(n uint32, t *slot) {
	e.set.metrics.arrive()
	e.set.total.Add(1)
	e.entrust(t, deposited)
	e.goOn(n, t)
}

// sendDeclined tells the vault what does not go on here. Who waits for it is told in the
// end.
func (e *engine) sendDeclined() error {
	c := &e.courier
	for len(c.declines) > 0 {
		if err := c.vault.Declined(c.declines[0]); errors.Is(err, ErrVaultBusy) {
			return err
		}
		c.declines = c.declines[1:]
	}
	c.declines = nil
	return nil
}

// loseArrivals turns tunnels away that wait for the vault since that moment or before.
func (e *engine) loseArrivals(since time.Duration) {
	c := &e.courier
	for len(c.arrivals) > 0 && c.arrivals[0].since <= since {
		if t := e.table.find(c.arrivals[0].slot, c.arrivals[0].number); t != nil {
			e.turnAway(c.arrivals[0].slot, t)
		}
		c.declines = append(c.declines, c.arrivals[0].ticket)
		c.arrivals = c.arrivals[1:]
	}
}
