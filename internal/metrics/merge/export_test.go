package merge

import (
	"testing"
	"time"
)

// Clock is what the program has series expire by, and SetClock replaces it for all tests.
var Clock = clock

func SetClock(c func() time.Duration) { clock = c }

// SetRoom makes accounts smaller for a test that runs alone.
func SetRoom(t *testing.T, bytes int) {
	before := room
	room = bytes
	t.Cleanup(func() { room = before })
}

// Definitions returns how many definitions of living generations are kept.
func (t *Totals) Definitions() int {
	n := 0
	for _, g := range t.living {
		n += len(g.seen.families)
	}
	return n
}
