package upstream

import (
	"errors"
	"sync"
	"sync/atomic"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// errDismissed is what a wait ends with for a connection to an endpoint that is no member any more,
// or not well.
var errDismissed = errors.New("the endpoint has left its cluster, or fails its health checks")

// mostPassed is how often whoever waits longest is passed over by one for whom a connection
// would not have to be closed and another one made.
const mostPassed = 16

// mostLooked is how many of those who wait are looked at for that.
const mostLooked = 32

// waiting are the requests that wait until there may be one more connection, in the order in
// which they came. They are of any loop, and so are those who end their wait:
//
//	a connection was closed, or became a tunnel         the first one makes its own
//	one became idle                                     it goes to one who can use it, or is closed for the first one
//	one is idle, of another loop or endpoint            it is closed
//	there are fewer elsewhere, or the limit was raised  as many as may be make their own
//	the endpoint left or fails, or he was cancelled     it fails
//
// No wake-up is lost. Who waits counts in pending before he looks whether there is a connection
// to be had, and whoever makes one possible (gives one back, or has one idle) has done that
// before he looks whether anybody waits. So one of the two sees the other.
type waiting struct {
	cluster              *Cluster
	priority             config.Priority
	connections, pending *breaker
	gauge                *metrics.Gauge // of those who wait
	idle                 atomic.Int64   // connections, of all loops and endpoints; 0 where there never is a limit

	mu         sync.Mutex
	first      *waiter
	last       *waiter
	passed     int  // how often the first one was
	reclaiming bool // some loop is about to close what is idle there
	visited    int  // loops that have done so since somebody came to wait
}

// A waiter is one who waits. All but its state is set once, or guarded by the lock.
type waiter struct {
	of         *waiting
	next, prev *waiter
	e          *Endpoint
	task       *task.Task
	loop       *stream.Loop
	pool       *pool // whose connections it can use; nil: it needs a new one
	state      atomic.Uint32
	life       *life // of the connection that it was given; nil: it is to make one
}

// What became of a waiter.
const (
	waits     = iota
	served    // there is a connection for it, or may be one
	dismissed // its endpoint has left, or fails
	gaveUp    // it was cancelled
)

// acquire waits until there may be one more connection, which is counted then, or returns one
// that has become idle. p is whose connections it can be; nil: it must be a new one.
func (w *waiting) acquire(t *task.Task, l *stream.Loop, a *Attempt, e *Endpoint, p *pool) (*life, error) {
	if w.pending.here.Load() == 0 && w.connections.take() {
		return nil, nil
	}
	if w.pending.here.Load() == 0 && w.makeRoom(l.Index) && w.connections.take() {
		return nil, nil
	}
	if !w.pending.take() {
		_ = w.connections.overflow()
		return nil, w.pending.overflow()
	}
	me := &waiter{of: w, e: e, task: t, loop: l, pool: p}
	if !w.join(me) {
		return nil, nil
	}
	_ = w.connections.overflow()
	w.reclaim()
	a.Wait(me)
	for me.state.Load() == waits {
		t.Wait()
	}
	a.Wait(nil)
	switch {
	case me.state.Load() == dismissed:
		return nil, &ConnectError{Endpoint: e.String(), Err: errDismissed}
	case a.err == nil:
		return me.life, nil
	case me.state.Load() == served && me.life != nil:
		me.life.again()
	case me.state.Load() == served:
		w.give()
	}
	return nil, a.err
}

// give gives back one connection, for who waits next.
func (w *waiting) give() {
	w.connections.give()
	if w.pending.here.Load() > 0 {
		w.serve()
	}
}

// more counts one more connection, which is there already.
func (w *waiting) more() { w.connections.force(1) }

// join has one wait who counts in pending, unless it is its turn.
func (w *waiting) join(me *waiter) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first == nil && w.connections.take() {
		w.pending.give()
		return false
	}
	w.gauge.Add(1)
	if me.prev = w.last; me.prev == nil {
		w.first = me
	} else {
		me.prev.next = me
	}
	w.last = me
	return true
}

// leaveLocked ends the wait of one, once.
func (w *waiting) leaveLocked(one *waiter, became uint32) {
	if one.prev == nil {
		w.first, w.passed = one.next, 0
	} else {
		one.prev.next = one.next
	}
	if one.next == nil {
		w.last = one.prev
	} else {
		one.next.prev = one.prev
	}
	one.next, one.prev = nil, nil
	w.pending.give()
	w.gauge.Add(-1)
	one.state.Store(became)
}

// serve has as many make a connection as the limit leaves.
func (w *waiting) serve() {
	if w.pending.here.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.first != nil && w.connections.take() {
		one := w.first
		w.leaveLocked(one, served)
		if !one.loop.Post(one.task.Wake) { // its loop was stopped, and its task with it
			w.connections.give()
		}
	}
}

// Interrupt implements [Interrupter].
func (one *waiter) Interrupt(error) {
	one.of.mu.Lock()
	if one.state.Load() == waits {
		one.of.leaveLocked(one, gaveUp)
	}
	one.of.mu.Unlock()
	one.task.Wake()
}

// dismiss ends the wait for connections to an endpoint.
func (w *waiting) dismiss(e *Endpoint) {
	if w.pending.here.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for one := w.first; one != nil; {
		next := one.next
		if one.e == e {
			w.leaveLocked(one, dismissed)
			one.loop.Post(one.task.Wake)
		}
		one = next
	}
}

// pass has a connection go on that has become idle, and was kept, if anybody waits. It is
// called on its loop's goroutine.
func (w *waiting) pass(l *life) {
	if w.pending.here.Load() == 0 {
		return
	}
	w.mu.Lock()
	none, to := w.first == nil, w.heirLocked(l.pool)
	if to != nil {
		l.pool.remove(l.conn)
		to.life = l
		w.leaveLocked(to, served)
	}
	w.mu.Unlock()
	switch {
	case to != nil:
		to.task.Wake()
	case !none:
		l.conn.Close() // so the first one makes its own
	}
}

// heirLocked returns who can use a connection of a pool: whoever waits longest, but for the
// first one who is not passed over too often.
func (w *waiting) heirLocked(p *pool) *waiter {
	for one, n := w.first, 0; one != nil && n < mostLooked; one, n = one.next, n+1 {
		if one.pool != p {
			continue
		}
		if one != w.first {
			if w.passed == mostPassed {
				return nil
			}
			w.passed++
		}
		return one
	}
	return nil
}

// reclaim has idle connections closed for those who wait: one loop after the other looks for
// them, until nobody waits, none is idle, or all have looked since somebody came.
func (w *waiting) reclaim() {
	if w.idle.Load() == 0 {
		return
	}
	w.mu.Lock()
	begin := !w.reclaiming
	w.reclaiming, w.visited = true, 0
	w.mu.Unlock()
	if begin {
		w.reclaimFrom(0)
	}
}

// reclaimFrom goes on with a loop, or the next one that runs.
func (w *waiting) reclaimFrom(loop int) {
	loops := w.cluster.loops
	for {
		if n := loop % len(loops); loops[n].Post(func() { w.reclaimOn(n) }) || !w.visit() {
			return
		}
		loop++
	}
}

// reclaimOn closes what is idle on one loop, on its goroutine, for those who wait.
func (w *waiting) reclaimOn(loop int) {
	for w.pending.here.Load() > 0 && w.makeRoom(loop) {
	}
	if w.visit() {
		w.reclaimFrom(loop + 1)
	}
}

// makeRoom closes one connection that is idle on a loop, on its goroutine, if there is one.
func (w *waiting) makeRoom(loop int) bool {
	if w.idle.Load() == 0 {
		return false
	}
	for _, e := range w.cluster.Known() {
		if p := e.pool(w.priority, loop); p != nil && len(p.idle) > 0 {
			conn := p.idle[0].Conn
			p.remove(conn)
			conn.Close()
			return true
		}
		if e.streams != nil && e.streamsOf(w.priority).makeRoom() {
			return true
		}
	}
	return false
}

// visit notes that a loop was looked at, and says whether another one has to be.
func (w *waiting) visit() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.visited++
	w.reclaiming = w.first != nil && w.idle.Load() > 0 && w.visited < len(w.cluster.loops)
	return w.reclaiming
}
