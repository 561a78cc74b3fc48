package tunnel

import (
	"time"

	"holdfast/internal/tunnel/inflight"
)

// Hurry makes a Set's waits short: those of a tunnel that ends, of one that
// stalls, and between two looks for a sender's death.
func (s *Set) Hurry(linger, stall, check time.Duration) {
	s.bounds.linger, s.bounds.stall, s.bounds.check = linger, stall, check
}

// TidyAfter has memory given back after a quiet time that is shorter than usual.
func (s *Set) TidyAfter(quiet time.Duration) { s.bounds.tidy = quiet }

// HurryVault makes the waits of a Set shorter that have to do with its vault: for one that
// is busy, for more withdrawals, and until a tunnel is released again.
func (s *Set) HurryVault(busy, withdraw, move time.Duration) {
	s.bounds.vault, s.bounds.withdraw, s.bounds.move = busy, withdraw, move
}

// HurryRefusals is for how long a Set collects refusals.
func (s *Set) HurryRefusals(pause time.Duration) { s.bounds.refusals = pause }

// HurryRetry is for how long a Set leaves tunnels alone that were refused.
func (s *Set) HurryRetry(pause time.Duration) { s.bounds.retry = pause }

// AbsolveAfter has no tunnel suspected any more after so long a life.
func (s *Set) AbsolveAfter(life time.Duration) { s.bounds.absolve = life }

// Bury closes the descriptors that a Set has for the tunnels on its loops, which have
// stopped at whatever they did: as the end of a process does. It returns those
// descriptors, and for which tunnels that were to be taken it has none any more.
func (s *Set) Bury() (sockets map[int]bool, declined []Ticket) {
	sockets = make(map[int]bool)
	for _, e := range s.engines {
		for _, t := range e.table.all() {
			for i := range t.sockets {
				closeFD(t.sockets[i].fd)
				sockets[int(t.sockets[i].fd)] = true
			}
		}
		declined = append(declined, e.courier.declines...)
	}
	return sockets, declined
}

// onLoop runs fn on the first loop and waits for it.
func (s *Set) onLoop(fn func(e *engine)) {
	done := make(chan struct{})
	e := s.engines[0]
	e.loop.Post(func() { defer close(done); fn(e) })
	<-done
}

// Break makes the next read of the first loop panic, and each one after that, until
// mend is called.
func (s *Set) Break() (mend func()) {
	var whole *inflight.Buffer
	s.onLoop(func(e *engine) {
		e.hasBuffers()
		broken := *e.current
		broken.Bytes = nil
		whole, e.current = e.current, &broken
	})
	return func() { s.onLoop(func(e *engine) { e.current = whole }) }
}

// Footprint is how much the first loop keeps: chunks of tunnels, origins, flows that are
// watched, and what is held.
func (s *Set) Footprint() (n [4]int) {
	s.onLoop(func(e *engine) {
		n = [4]int{len(e.table.chunks), len(e.origins.numbers), len(e.watched), len(e.held)}
	})
	return n
}

// Places returns the slots of the first loop that have tunnels.
func (s *Set) Places() (all []uint32) {
	s.onLoop(func(e *engine) {
		for c := range e.table.chunks {
			for n := range e.table.inChunk(c) {
				all = append(all, n)
			}
		}
	})
	return all
}

// Shares returns how many tunnels each loop has.
func (s *Set) Shares() (n []int) {
	for _, e := range s.engines {
		n = append(n, e.store.Directions()/2-int(e.free.Load()))
	}
	return n
}

// Buffers returns how many relay buffers are in use: one for each direction in which
// bytes wait for a slow receiver, unless they are in a pipe, and of tunnels that have
// goroutines, also for each in which bytes move.
func (s *Set) Buffers() (n int) {
	for _, c := range s.carriers {
		n += c.buffers()
	}
	return n
}
