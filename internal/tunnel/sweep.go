package tunnel

import "time"

// sweepPiece is how many chunks a sweep looks at in one turn.
const sweepPiece = 4

// sweep closes what is due and gives up what has used up its time, a piece in each turn.
func (e *engine) sweep() {
	if e.sweepAt == 0 {
		e.sweeps.begin()
	}
	now := e.now()
	end := min(e.sweepAt+sweepPiece, len(e.table.chunks))
	for ; e.sweepAt < end; e.sweepAt++ {
		for n, t := range e.table.inChunk(e.sweepAt) {
			e.sweepOne(n, t, now)
		}
	}
	if e.sweepAt < len(e.table.chunks) {
		e.sweeper.Set(e.loop.Now())
		return
	}
	e.sweepAt = 0
	e.sweeps.end(now, e.set.bounds.sweep)
}

func (e *engine) sweepOne(n uint32, t *slot, now time.Duration) {
	if t.still { // it is looked at when it goes on
		return
	}
	e.store.Enter(n, t.number)
	defer e.finish(n, t)
	if t.reason == Open {
		l := e.limits(t)
		switch at, reason := t.due(l, t.active); {
		case at == 0:
		case at > now:
			e.sweeps.seen(max(at, now+l.slack(reason)))
		default:
			e.cut(n, t, reason)
			e.pump(n, t, down)
			e.pump(n, t, up)
		}
	}
	if at := e.endBound(t); at != 0 && at <= now {
		e.giveUp(n, t)
	}
}
