package proxy

import "sync"

// turns has so many handshakes of a listener go on at once, whatever loops they are on. Others
// wait for their turn in the order in which they came.
type turns struct {
	most    int // 0: any number
	metrics *gateMetrics

	mu          sync.Mutex
	busy        int
	first, last *guest
}

// A turn is what a guest has of them.
type turn uint8

const (
	noTurn turn = iota
	waitsForTurn
	hasTurn
)

func (q *turns) init(most int, m *gateMetrics) { q.most, q.metrics = most, m }

// take says whether w may begin. Otherwise it waits, and begins on its loop when it may.
func (q *turns) take(w *guest) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.most <= 0 || q.busy < q.most {
		q.busy++
		w.turn = hasTurn
		q.metrics.active.Add(1)
		return true
	}
	w.turn = waitsForTurn
	if w.ahead = q.last; w.ahead != nil {
		w.ahead.behind = w
	} else {
		q.first = w
	}
	q.last = w
	q.metrics.queued.Inc()
	q.metrics.waiting.Add(1)
	return false
}

// leave ends what w has of them: the next one may have its turn then.
func (q *turns) leave(w *guest) {
	if next := q.release(w); next != nil {
		next.Loop().Post(func() {
			if next.stage == inLine && next.Open() { // it has not gone meanwhile
				next.begin()
			}
		})
	}
}

// release returns whose turn it is then.
func (q *turns) release(w *guest) (next *guest) {
	q.mu.Lock()
	defer q.mu.Unlock()
	had := w.turn
	if had == waitsForTurn {
		q.remove(w)
	}
	if w.turn = noTurn; had != hasTurn {
		return nil
	}
	if next = q.first; next == nil {
		q.busy--
		q.metrics.active.Add(-1)
		return nil
	}
	q.remove(next)
	next.turn = hasTurn
	return next
}

// remove takes one out of those that wait.
func (q *turns) remove(w *guest) {
	if w.ahead != nil {
		w.ahead.behind = w.behind
	} else {
		q.first = w.behind
	}
	if w.behind != nil {
		w.behind.ahead = w.ahead
	} else {
		q.last = w.ahead
	}
	w.ahead, w.behind = nil, nil
	q.metrics.waiting.Add(-1)
}
