// Package scavenge decides when a process gives memory back to the system. What many
// connections leave behind when they go, or when they become tunnels, stays with the
// process otherwise: the garbage collector runs when something is allocated, and where it
// has become quiet, nothing is.
package scavenge

import (
	"runtime"
	"runtime/debug"
	"time"
)

const (
	// Least is how many connections and tunnels must have begun or ended for memory to be
	// given back: what fewer have left is not worth a collection.
	Least = 1000

	// calm is how many of them a second may bring that still counts as quiet, and
	// calmSeconds how long that must last: longer than the loops of tunnels wait before
	// they let go of what they have room for in vain.
	calm        = 50
	calmSeconds = 4

	// Between two releases passes a while, and a long one where it is never quiet: the
	// garbage collector then runs anyway, and gives memory back by itself, but slowly.
	calmPause = 5 * time.Second
	busyPause = time.Minute
)

// Scavenger looks when it is asked to, once a second, and has no timer: a process in which
// nothing happens does nothing. One goroutine at a time may use it.
type Scavenger struct {
	wanted   bool      // however little has changed
	seen     uint64    // changes at the last look
	quiet    int       // looks in a row that found few
	released uint64    // changes at the last release
	at       time.Time // of the last release, or of the beginning
}

// New returns a Scavenger of a process that begins now.
func New(now time.Time) Scavenger { return Scavenger{at: now} }

// Want has memory given back as soon as it is quiet, however little has changed.
func (m *Scavenger) Want() { m.wanted = true }

// Due says whether it is time. changes is how many connections and tunnels have begun
// and ended so far.
func (m *Scavenger) Due(now time.Time, changes uint64) bool {
	m.quiet++
	if changes-m.seen > calm {
		m.quiet = 0
	}
	m.seen = changes
	pause := busyPause
	if m.quiet >= calmSeconds {
		pause = calmPause
	}
	if !m.wanted && changes-m.released < Least || now.Sub(m.at) < pause {
		return false
	}
	m.wanted, m.released, m.at = false, changes, now
	return true
}

// Release gives back what nobody needs, which takes a while. It collects twice: what was
// put aside for reuse, as buffers are, survives one collection (sync.Pool).
func Release() {
	runtime.GC()
	debug.FreeOSMemory()
}
