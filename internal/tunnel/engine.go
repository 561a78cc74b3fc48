package tunnel

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel/inflight"
)

// engine relays the tunnels of one loop. All that is not said to be for everybody is
// owned by the loop's goroutine, so nothing is locked and no message costs an atomic
// operation but those for a successor; what others want they post.
type engine struct {
	set   *Set
	loop  *poller.Loop
	store *inflight.Store

	table    table
	ids      map[uint32]string // of those that are no UUID, by the slot
	origins  origins
	schedule schedule

	// What the flows hold.
	current *inflight.Buffer // what is read into; nil: not needed since memory was given back
	spare   *inflight.Buffer // takes its place when it stays with a flow
	held    map[inflight.Direction]held

	// Of foreign tunnels.
	beyond  map[inflight.Direction]beyond // by the socket
	private *[bufferSize]byte             // what is read into; nil: not needed since memory was given back

	sweeps    sweeps
	sweeper   *poller.Timer
	sweepAt   int // the chunk that a sweep under way looks at next
	watcher   *poller.Timer
	watching  bool                 // the watcher is set
	watched   []inflight.Direction // flows whose bytes may not have arrived
	watchAt   int                  // how many of them a look under way has before it
	info      unix.TCPInfo
	looker    inflight.Looker
	prober    prober
	partings  []parting
	departer  *poller.Timer
	departing time.Duration // the moment that the departer is set to; 0: it is not
	tidier    *poller.Timer
	tidying   bool // the tidier is set
	damaged   bool // what is to be resumed here is lost

	turn  uint32   // counts the loop's turns
	ended []Record // in this turn, or moved

	courier  courier
	mover    mover
	absolver *poller.Timer

	// For everybody.
	free  atomic.Int64 // slots that nobody has or waits for
	first atomic.Int64 // when the oldest tunnel was started, in Unix nanoseconds; 0: there is none
	holds atomic.Int64 // buffers in held

	reconsidering atomic.Bool // the verdicts are about to be asked for again
}

// newEngine returns the engine of the loop with that place in [Options].
func newEngine(s *Set, l Loop, place int, v Vault) *engine {
	e := &engine{
		set:     s,
		loop:    l.Poller,
		store:   l.Store,
		table:   newTable(),
		origins: newOrigins(&s.metrics, &s.verdict),
		ids:     make(map[uint32]string),
		held:    make(map[inflight.Direction]held),
		beyond:  make(map[inflight.Direction]beyond),
		courier: courier{vault: v, loop: place},
		mover:   mover{standing: make(map[uint64]standing)},
		damaged: l.Damaged,
	}
	e.free.Store(int64(l.Store.Directions() / 2))
	e.loop.Post(e.begin)
	return e
}

// begin is the first that the loop does for the engine.
func (e *engine) begin() {
	e.sweeper = e.loop.NewTimer(e.sweep)
	e.sweeps.set = func(at time.Duration) { e.sweeper.Set(e.set.epoch.Add(at)) }
	e.watcher = e.loop.NewTimer(e.watch)
	e.departer = e.loop.NewTimer(e.depart)
	e.tidier = e.loop.NewTimer(e.tidy)
	e.courier.timer = e.loop.NewTimer(func() {}) // the end of the turn does it
	e.courier.refuser = e.loop.NewTimer(e.noteRefused)
	e.courier.retrier = e.loop.NewTimer(e.retryRefused)
	e.mover.timer = e.loop.NewTimer(e.moveOn)
	e.mover.stopper = e.loop.NewTimer(e.stopStanding)
	e.absolver = e.loop.NewTimer(e.store.Absolve)
	e.loop.AfterTurn(e.afterTurn)
}

// now returns the moment at which the turn began.
func (e *engine) now() time.Duration { return e.set.moment(e.loop.Now()) }

// afterTurn makes known what happened in a turn, in the order in which others may ask.
func (e *engine) afterTurn() {
	e.store.Leave()
	e.tellVault()
	e.turn++
	e.origins.flush()
	if len(e.ended) > 0 {
		if e.set.reporter.report(e.ended) {
			e.loop.Yield()
		}
		e.ended = reuse(e.ended)
	}
}

// reserve takes a place for a tunnel that is about to be accepted. Any goroutine may
// call it.
func (e *engine) reserve() bool {
	if e.free.Add(-1) < 0 {
		e.free.Add(1)
		return false
	}
	return true
}

func (e *engine) unreserve() { e.free.Add(1) }

// accept takes over a tunnel for which a place was reserved. Any goroutine may call it.
func (e *engine) accept(a *arrival) {
	e.first.CompareAndSwap(0, a.started.UnixNano())
	later := *a // what is started at once needs no memory of its own

	if !e.loop.Post(func() { e.start(&later) }) { // the loop was stopped too early
		e.forgo(a.record(), a.fds, Stopped)
	}
}

// forgo cuts a tunnel for which a place was reserved that it does not get. Any goroutine
// may call it.
func (e *engine) forgo(r Record, fds [2]int32, reason Reason) {
	e.sever(&r, fds, reason)
	e.unreserve()
	e.set.reporter.report([]Record{r})
}

// dismiss ends a tunnel that cannot go on here at all, and has the vault give it up. It is
// called on the loop.
func (e *engine) dismiss(r Record, fds [2]int32, reason Reason) {
	e.sever(&r, fds, reason)
	if e.courier.vault == nil {
		e.unreserve()
		e.ended = append(e.ended, r)
		return
	}
	e.withdraw(nobody, r)
}

// sever ends the connections of a tunnel that has no slot.
func (e *engine) sever(r *Record, fds [2]int32, reason Reason) {
	for _, fd := range fds {
		reset(fd) // something may not have been sent
		closeFD(fd)
	}
	r.Reason, r.Ended = reason, time.Now()
	e.set.live.Add(-1)
}

// start begins to relay, once the vault has the tunnel if it is to have it. It may be called
// by whoever is on the loop's goroutine, but for the engine.
func (e *engine) start(a *arrival) {
	n, t := e.table.take()
	defer e.finish(n, t)
	r := a.record()
	e.enter(n, t, &r, a.fds)
	e.takeOver(n, t, a)
	if a.foreign {
		e.enterForeign(n, t, a)
	}
	e.forget(n)
	e.schedule.join(&t.dates, e.limits(t))
	e.judge(t)
	e.holdEarly(n, t, down, a.DownEarly)
	e.holdEarly(n, t, up, a.upEarly())
	t.flows[up].moved = -uint64(len(a.Head)) // which is not counted
	if !e.depositFirst(n, t) {
		e.wake(n, t)
	}
}

// enter gives a slot its tunnel, which stands still so far.
func (e *engine) enter(n uint32, t *slot, r *Record, fds [2]int32) {
	for i := range t.sockets {
		t.sockets[i] = socket{fd: fds[i]}
	}
	t.number = r.Number
	t.started = e.set.moment(r.Started)
	t.active = t.started
	t.still = true
	t.origin = e.origins.take(r.Origin)
	*e.table.label(n) = label{tag: r.Tag, client: r.Client, started: r.Started}
	e.setID(n, t, r.ID)
	e.table.join(n)
	e.publishOldest()
}

// takeOver has the loop tell the engine of sockets that it has told another owner of.
func (e *engine) takeOver(n uint32, t *slot, a *arrival) {
	for i := range t.sockets {
		s, about := &t.sockets[i], &a.About[i]
		if about.Handle == 0 {
			continue
		}
		e.loop.Pass(about.Handle, e, 2*n+uint32(i))
		s.handle, s.writable = about.Handle, true // or else a send tells
		s.note(about.Events)
	}
}

// wake has a tunnel relayed that stood still, beginning with what it holds and what has
// become ready meanwhile.
func (e *engine) wake(n uint32, t *slot) {
	defer e.finish(n, t)
	e.store.Enter(n, t.number)
	if !e.register(n, t) {
		return
	}
	for i := range t.sockets {
		if t.sockets[i].failed {
			e.failNow(n, t, i)
		}
	}
	for from := range t.flows {
		if t.flows[from].holds || t.sockets[from].readable {
			e.pump(n, t, from)
		}
	}
}

// register puts the sockets of a tunnel that stood still on the loop, which tells what
// they are ready for. Those that it has not left are there already.
func (e *engine) register(n uint32, t *slot) bool {
	t.still = false
	for i := range t.sockets {
		s := &t.sockets[i]
		if s.handle != 0 {
			continue
		}
		h, err := e.loop.Add(int(s.fd), e, 2*n+uint32(i))
		if err != nil {
			e.set.log.Error("a tunnel cannot be relayed", "tunnel", t.number, "request_id", e.id(n, t), "err", err)
			e.abort(n, t)
			return false
		}
		s.handle, s.readable, s.writable, s.hup = h, s.secure, true, false
	}
	due, _ := t.due(e.limits(t), t.active)
	e.sweeps.by(due)
	return true
}

// halt takes the sockets of a tunnel off the loop: nothing becomes of it until wake.
func (e *engine) halt(t *slot) {
	t.still = true
	for i := range t.sockets {
		s := &t.sockets[i]
		e.loop.Remove(s.handle)
		s.handle = 0
		e.unwatchFlow(&t.flows[i])
	}
}

// publishOldest makes known which tunnel is the oldest now.
func (e *engine) publishOldest() {
	at := int64(0)
	if n := e.table.oldest; n != nobody {
		at = e.table.label(n).started.UnixNano()
	}
	if e.first.Load() != at {
		e.first.Store(at)
	}
}

func (e *engine) limits(t *slot) *Limits { return &e.origins.used[t.origin].Limits }

// Ready is called by the loop: something has become of a socket, or a flow from it did
// not come to its end in the last turn.
func (e *engine) Ready(index uint32, events poller.Events) {
	n, i := index/2, int(index%2)
	t := e.table.at(n)
	s := &t.sockets[i]
	unblocked := !s.writable && events&poller.Writable != 0
	s.note(events)
	if t.still { // wake looks at it
		return
	}
	e.store.Enter(n, t.number)
	defer e.finish(n, t)
	if s.failed || s.hup && e.givenUpByPeer(n, t, i) {
		e.failNow(n, t, i)
	}
	if s.secure && events&poller.Writable != 0 {
		e.sendOwed(n, t, i)
	}
	e.pump(n, t, i)
	if unblocked {
		e.pump(n, t, 1-i)
	}
}

// note notes what the loop has told.
func (s *socket) note(e poller.Events) {
	s.readable = s.readable || e&poller.Readable != 0
	s.writable = s.writable || e&poller.Writable != 0
	s.urgent = s.urgent || e&poller.Urgent != 0
	s.hup = s.hup || e&poller.Hup != 0
	s.failed = s.failed || e&poller.Error != 0
}

// failNow is fail for what the loop has told.
func (e *engine) failNow(n uint32, t *slot, i int) {
	t.sockets[i].failed = false
	e.fail(n, t, i)
}

// finish, deferred, brings the end of a tunnel forward that the handling of its sockets
// has led to. A panic in that handling ends this tunnel only.
func (e *engine) finish(n uint32, t *slot) {
	if p := recover(); p != nil {
		e.set.logPanic(p, t.number, e.id(n, t))
		e.abort(n, t)
		return
	}
	switch {
	case t.number == 0 || t.reason == Open || t.parting:
	case t.flows[down].phase == over && t.flows[up].phase == over && !t.owesFin():
		e.part(n, t)
	default:
		e.sweeps.by(e.endBound(t))
	}
}

// record returns the record of a living tunnel as it stands.
func (e *engine) record(n uint32, t *slot) Record {
	l := e.table.label(n)
	return Record{
		Origin:  e.origins.used[t.origin].Origin,
		Number:  t.number,
		ID:      e.id(n, t),
		Client:  l.client,
		Tag:     l.tag,
		Started: l.started,
		ToUp:    t.flows[down].counted(),
		ToDown:  t.flows[up].counted(),
		Reason:  t.reason,
	}
}

// upEarly is what goes to the client before anything is read from the server.
func (a *arrival) upEarly() []byte {
	if len(a.Head) == 0 {
		return a.UpEarly
	}
	return append(a.Head[:len(a.Head):len(a.Head)], a.UpEarly...)
}

// record returns the record of a tunnel that moved nothing so far.
func (a *arrival) record() Record {
	return Record{Origin: a.Origin, Number: a.number, ID: a.ID, Client: a.Client, Tag: a.Tag, Started: a.started}
}

// list asks the loop for one chunk after the other, so that it goes on relaying while
// many tunnels are listed.
func (e *engine) list() []Record {
	var records []Record
	part := make(chan []Record, 1)
	for c := 0; ; c++ {
		posted := e.loop.Post(func() {
			if c >= len(e.table.chunks) {
				close(part)
				return
			}
			var some []Record
			for n, t := range e.table.inChunk(c) {
				if t.custody != arriving {
					some = append(some, e.record(n, t))
				}
			}
			part <- some
		})
		if !posted {
			return records
		}
		some, more := <-part
		if !more {
			return records
		}
		records = append(records, some...)
	}
}

func (e *engine) oldest() (at time.Time) {
	if n := e.first.Load(); n != 0 {
		at = time.Unix(0, n)
	}
	return at
}

func (e *engine) buffers() int { return int(e.holds.Load()) }

// all yields what the schedule deals with, the oldest tunnel first.
func (e *engine) all(yield func(*dates, *Limits) bool) {
	for _, t := range e.table.all() {
		if !yield(&t.dates, e.limits(t)) {
			return
		}
	}
}

func (e *engine) drain(by spread) {
	e.loop.Post(func() {
		e.schedule.drain(by, e.all)
		e.sweeps.by(by.from)
	})
}

func (e *engine) undrain() { e.loop.Post(func() { e.schedule.undrain(e.all) }) }

func (e *engine) closeAll(reason Reason, by spread) {
	e.loop.Post(func() {
		e.schedule.closeAll(reason, by, e.table.used, e.all)
		e.sweeps.by(by.from)
		if reason == Stopped { // those that stand still may not be here any more
			e.mover.wanted = false
			e.mover.stopper.Set(e.loop.Now().Add(e.set.bounds.linger))
		}
	})
}

func (e *engine) abandon() {
	e.loop.Post(func() {
		now := e.set.now()
		e.stopStanding()
		for n, t := range e.table.all() {
			if t.custody == arriving {
				e.turnAway(n, t)
				continue
			}
			if at, reason := t.due(e.limits(t), t.active); at != 0 && at <= now {
				e.cut(n, t, reason) // a sweep was about to
			}
			e.cut(n, t, Stopped)
			e.giveUp(n, t)
			e.release(n, t)
		}
		e.partings = e.partings[:0]
	})
}
