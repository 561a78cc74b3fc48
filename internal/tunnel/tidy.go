package tunnel

import "holdfast/internal/tunnel/inflight"

// tidySoon plans to give memory back that is no longer needed: not at once, since others
// may need it in a moment, and not again and again.
func (e *engine) tidySoon() {
	if !e.tidying {
		e.tidying = true
		e.tidier.Set(e.loop.Now().Add(e.set.bounds.tidy))
	}
}

// tidy gives back the memory of tunnels that are gone and of buffers that nobody holds.
func (e *engine) tidy() {
	e.tidying = false
	e.table.trim()
	if e.spare != nil {
		e.store.Free(e.spare)
	}
	if e.current != nil {
		e.store.Free(e.current)
	}
	e.current, e.spare = nil, nil
	e.private = nil
	e.store.Trim()
	// A map keeps what it had to have once.
	if len(e.held) == 0 {
		e.held = make(map[inflight.Direction]held)
	}
	if len(e.beyond) == 0 {
		e.beyond = make(map[inflight.Direction]beyond)
	}
	if len(e.ids) == 0 {
		e.ids = make(map[uint32]string)
	}
	if len(e.watched) == 0 {
		e.watched = nil
	}
	if len(e.partings) == 0 {
		e.partings = nil
	}
}
