package vault

import (
	"time"

	"holdfast/internal/scavenge"
)

// tidyLook is the time between two looks whether it is time to give memory back.
const tidyLook = time.Second

// tidier gives memory back that tunnels have left, when many have come or gone. Only then
// it looks from time to time: a vault in which nothing happens does nothing. The vault's
// mu guards it.
type tidier struct {
	scavenge.Scavenger
	release func()

	changes  uint64 // tunnels that came and went, ever
	released uint64 // those at the last release
	timer    *time.Timer
}

func newTidier() tidier {
	return tidier{Scavenger: scavenge.New(time.Now()), release: scavenge.Release}
}

// turnedOverLocked notes that a tunnel has come or gone.
func (v *Vault) turnedOverLocked() {
	t := &v.tidier
	t.changes++
	if t.changes-t.released >= scavenge.Least && t.timer == nil && !v.closed {
		t.timer = time.AfterFunc(tidyLook, func() { v.tidy(time.Now()) })
	}
}

// tidy gives memory back if it is time, and otherwise looks again later.
func (v *Vault) tidy(now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := &v.tidier
	switch {
	case v.closed || t.timer == nil:
	case !t.Due(now, t.changes):
		t.timer.Reset(tidyLook)
	default:
		t.timer, t.released = nil, t.changes
		for _, g := range v.generations {
			if len(g.tunnels) == 0 { // a map keeps what it had to have once
				g.tunnels = make(map[uint64]*deposit)
			}
		}
		go t.release()
	}
}
