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
		whole, e.current = e.current, new(inflight.Buffer)
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
