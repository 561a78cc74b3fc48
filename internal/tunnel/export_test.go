package tunnel

import "time"

// Hurry makes a Set's waits short: those of a tunnel that ends, of one that
// stalls, and between two looks for a sender's death.
func (s *Set) Hurry(linger, stall, check time.Duration) {
	s.bounds.linger, s.bounds.stall, s.bounds.check = linger, stall, check
}
