package tunnel

import (
	"cmp"
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/tunnel/inflight"
)

// bounds are the waits of a tunnel that ends, and of one that stalls.
type bounds struct {
	linger time.Duration // for the peers' FINs, once we close a tunnel
	flush  time.Duration // to deliver what a lost side had sent
	stall  time.Duration // without progress in that
	check  time.Duration // between two looks at a tunnel whose receiver stalls
	sweep  time.Duration // least time between two sweeps
	tidy   time.Duration // until memory that is no longer needed is given back

	vault    time.Duration // for a vault that is busy
	withdraw time.Duration // for more withdrawals to be sent together
	move     time.Duration // until a tunnel is released again that was returned
	refusals time.Duration // for more refusals to be noted together
	retry    time.Duration // until tunnels are deposited again that were refused
	absolve  time.Duration // of life until no resumed tunnel is suspected any more
}

var defaultBounds = bounds{
	linger: 5 * time.Second,
	flush:  30 * time.Second,
	stall:  5 * time.Second,
	check:  10 * time.Second,
	sweep:  250 * time.Millisecond,
	tidy:   3 * time.Second,

	vault:    250 * time.Millisecond,
	withdraw: 20 * time.Millisecond,
	move:     time.Second,
	refusals: 100 * time.Millisecond,
	retry:    30 * time.Second,
	absolve:  30 * time.Second,
}

// Loop is where tunnels are relayed.
type Loop struct {
	Poller *poller.Loop
	Store  *inflight.Store // with one buffer at least; nobody else uses it

	// Damaged says that the Store of a dead process could not be reopened, and this is
	// another one: the tunnels end as [LostInCrash] that are to be resumed there.
	Damaged bool
}

// Options are what a Set works with.
type Options struct {
	Log *slog.Logger

	// OnEnd is called once for each tunnel that has ended, after both
	// connections were closed and the tunnel has left the list; [Set.Empty]
	// waits for it. It is called for one tunnel at a time, and may write. nil is
	// allowed.
	OnEnd func(Record)

	// OnMoved is called in the same way for a tunnel that has gone elsewhere: it lives,
	// and somebody else has its connections.
	OnMoved func(Record)

	Metrics *metrics.Registry // nil: nothing is counted

	// MayHave says of a descriptor whether a tunnel may have it that moves to a loop; one
	// that may not has goroutines. nil: always.
	MayHave func(fd int) bool

	// Loops relay the tunnels of which both connections are sockets. Whoever
	// made them runs them, and stops them after the Set is empty. Without one,
	// all tunnels have goroutines.
	Loops []Loop

	// Vault keeps what the tunnels on loops need to outlive the process. nil: they do
	// not.
	Vault Vault

	Verdict Verdict // which tunnels are to be closed for what is known of their origin
}

// Set holds the tunnels of one generation. Its methods may be called concurrently, but
// apart from Start not by a loop, and never wait for a peer.
type Set struct {
	log      *slog.Logger
	mayHave  func(fd int) bool
	epoch    time.Time // of all moments
	bounds   bounds
	metrics  setMetrics
	reporter reporter

	engines  []*engine
	routines *routines
	carriers []carrier // all of them

	vault   Vault // nil: there is none
	verdict Verdict

	numbers atomic.Uint64 // the last that was given
	stands  atomic.Uint64 // the same
	total   atomic.Uint64 // tunnels that there ever were
	live    atomic.Int64
	dealt   atomic.Uint64 // pairs that were offered to the loops

	mu      sync.Mutex
	busy    int           // live tunnels, and those whose end is being reported
	empty   chan struct{} // closed when busy becomes 0; nil while nobody asked
	wakeups uint64        // of the loops, as counted so far

	incomplete []Ticket // of Deposit, which Vault.Complete was not called with
}

// A carrier moves the bytes of its tunnels and keeps them in order: what it is told
// about closing them applies to those that it was given before, and in general to those
// that it is given later as [Set] says.
type carrier interface {
	drain(by spread)
	undrain()
	closeAll(reason Reason, by spread)
	reconsider()
	abandon()

	list() []Record
	oldest() time.Time // start of the oldest tunnel; zero: there is none
	buffers() int
}

// NewSet returns an empty Set.
func NewSet(o Options) *Set {
	s := &Set{
		log:     o.Log,
		mayHave: o.MayHave,
		vault:   o.Vault,
		verdict: o.Verdict,
		epoch:   time.Now().Add(-time.Second),
		bounds:  defaultBounds,
		metrics: newSetMetrics(o.Metrics),
	}
	s.reporter = reporter{set: s, onEnd: o.OnEnd, onMoved: o.OnMoved}
	for i, l := range o.Loops {
		e := newEngine(s, l, i, o.Vault)
		s.engines = append(s.engines, e)
		s.carriers = append(s.carriers, e)
	}
	s.routines = newRoutines(s)
	s.carriers = append(s.carriers, s.routines)
	return s
}

// now returns the present moment.
func (s *Set) now() time.Duration { return s.moment(time.Now()) }

func (s *Set) moment(t time.Time) time.Duration { return t.Sub(s.epoch) }

// Start takes both connections over, begins to relay and returns at once. The
// caller must not use them any more; deadlines that it had set are removed. The
// tunnel is in the list when Start returns.
//
// A tunnel that is started while the Set drains or stops gets its share of that.
func (s *Set) Start(spec Spec) {
	if spec.Origin == nil {
		spec.Origin = new(Origin)
	}
	a := arrival{Spec: spec, number: s.numbers.Add(1), started: time.Now()}
	s.enter()
	s.total.Add(1)
	s.metrics.start()
	if !s.startOnLoop(&a) {
		a.leaveLoop()
		if a.hasTLS() { // which only a loop has
			s.fail(&a, errNoLoop)
			return
		}
		s.startInGo(&a)
	}
}

var errNoLoop = errors.New("no loop has room for it")

// fail reports a tunnel that does not come about, whose connections are to be closed or are.
func (s *Set) fail(a *arrival, err error) {
	s.log.Error("a tunnel cannot be relayed", "tunnel", a.number, "request_id", a.ID, "err", err)
	if a.hasTLS() {
		for _, fd := range a.FDs {
			reset(int32(fd))
			closeFD(int32(fd))
		}
	}
	s.live.Add(-1)
	r := a.record()
	r.Reason, r.Ended = Failed, time.Now()
	s.reporter.report([]Record{r})
}

// enter counts a tunnel that is to live here, leave one that is to live elsewhere.
func (s *Set) enter() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy++
	s.live.Add(1)
}

func (s *Set) leave() {
	s.live.Add(-1)
	s.removed()
}

// arrival is a tunnel that is about to be started.
type arrival struct {
	Spec
	number  uint64
	started time.Time
	fds     [2]int32 // of one for a loop
	foreign bool     // not both are plain TCP
}

// outOfGo says whether the connections are descriptors that Go knows nothing of.
func (a *arrival) outOfGo() bool { return a.Down == nil && a.Up == nil }

// startOnLoop gives a pair of plain TCP connections to one loop after the other. It
// returns false, with nothing changed, where none can take it.
func (s *Set) startOnLoop(a *arrival) bool {
	if a.outOfGo() {
		return s.startDescriptors(a)
	}
	d, plain := a.Down.(*net.TCPConn)
	u, both := a.Up.(*net.TCPConn)
	if !plain || !both {
		return false
	}
	e := s.reserve(s.dealt.Add(1))
	if e == nil {
		return false
	}
	if !a.detach(d, u, s.mayHave) {
		e.unreserve()
		return false
	}
	e.accept(a)
	return true
}

// startDescriptors is startOnLoop for descriptors, which are the loop's as they are.
func (s *Set) startDescriptors(a *arrival) bool {
	a.foreign = a.isForeign()
	switch {
	case a.foreign && (!a.relayable(down) || !a.relayable(up)):
		return false
	case !a.hasTLS() && s.mayHave != nil && !s.mayHave(max(a.FDs[down], a.FDs[up])):
		return false
	}
	e := s.reserve(uint64(a.Loop))
	if e == nil {
		return false
	}
	for i, fd := range a.FDs {
		a.Origin.Limits.KeepAlive.set(fd, a.About[i].KeepAlive)
		a.fds[i] = int32(fd)
	}
	if e.loop == a.On { // we are on its goroutine
		e.start(a)
		return true
	}
	a.leaveLoop()
	e.accept(a)
	return true
}

func (a *arrival) isTCP(i int) bool { return a.About[i].Plain || isTCP(a.FDs[i]) }

// leaveLoop takes the sockets off the loop that has had them before: they go to another one,
// or to none.
func (a *arrival) leaveLoop() {
	for i := range a.About {
		if h := a.About[i].Handle; h != 0 {
			a.On.Remove(h)
			a.About[i].Handle = 0
		}
	}
	a.On = nil
}

// startInGo has a tunnel relayed by goroutines.
func (s *Set) startInGo(a *arrival) {
	if a.outOfGo() {
		if err := a.enterGo(); err != nil {
			s.fail(a, err)
			return
		}
	}
	s.routines.start(a)
}

// enterGo makes connections in Go's poller of the descriptors. With an error both are
// closed.
func (a *arrival) enterGo() error {
	var errs [2]error
	for i, conn := range [...]*net.Conn{down: &a.Down, up: &a.Up} {
		f := os.NewFile(uintptr(a.FDs[i]), "tunnel")
		defer f.Close()
		*conn, errs[i] = net.FileConn(f)
	}
	err := errors.Join(errs[:]...)
	if err != nil {
		for i, conn := range [...]net.Conn{down: a.Down, up: a.Up} {
			reset(int32(a.FDs[i])) // something may not have been sent
			if conn != nil {
				conn.Close()
			}
		}
	}
	return err
}

// reserve takes a place on one loop after the other, beginning with that one; nil: none
// has room.
func (s *Set) reserve(from uint64) *engine {
	for i := range uint64(len(s.engines)) {
		if e := s.engines[(from+i)%uint64(len(s.engines))]; e.reserve() {
			return e
		}
	}
	return nil
}

// detach takes both connections out of Go's poller. It fails where there are not enough
// descriptors; nothing has changed then.
func (a *arrival) detach(d, u *net.TCPConn, mayHave func(fd int) bool) bool {
	var err error
	k := a.Origin.Limits.KeepAlive
	if a.fds[down], err = detach(d, k); err != nil {
		return false
	}
	if a.fds[up], err = detach(u, k); err != nil {
		closeFD(a.fds[down])
		return false
	}
	if mayHave != nil && !mayHave(int(max(a.fds[down], a.fds[up]))) {
		closeFD(a.fds[down])
		closeFD(a.fds[up])
		return false
	}
	d.Close()
	u.Close()
	a.Down, a.Up = nil, nil
	return true
}

// removed is called when a tunnel has ended and that was reported.
func (s *Set) removed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if s.busy == 0 && s.empty != nil {
		close(s.empty)
		s.empty = nil
	}
}

// Empty returns a channel that is closed at the first moment from now on at
// which no tunnel is left and the last one was reported. A tunnel may be started
// after that: a caller that waits for the end must know that none is under way.
func (s *Set) Empty() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy == 0 {
		done := make(chan struct{})
		close(done)
		return done
	}
	if s.empty == nil {
		s.empty = make(chan struct{})
	}
	return s.empty
}

// Drain begins to close the tunnels that have a DrainTimeout, with the reason
// [DrainLimit]: each one at the start of the drain + its DrainTimeout + its share
// of over, across which they are spread evenly with jitter. Tunnels that are
// started later take part. Others are left alone. A second call has no effect.
func (s *Set) Drain(over time.Duration) {
	by := spread{from: s.now(), over: over}
	for _, c := range s.carriers {
		c.drain(by)
	}
}

// Undrain takes Drain and [Set.Move] back for the tunnels that are still here.
func (s *Set) Undrain() {
	s.Unmove()
	for _, c := range s.carriers {
		c.undrain()
	}
}

// CloseAll closes all living tunnels, spread evenly with jitter over within, or
// at once if that is 0. A later call can only make it sooner. The connections are
// gone a few seconds after that at the latest; [Set.Empty] tells.
//
// [Stopped] is for good: tunnels that are started later are closed in the same
// way. With any other reason they are left alone.
func (s *Set) CloseAll(reason Reason, within time.Duration) {
	by := spread{from: s.now(), over: within}
	for _, c := range s.carriers {
		c.closeAll(reason, by)
	}
}

// Abandon closes the connections of all living tunnels, of which none is waited for
// any more: what the end of the process does, but so that each end is still reported.
// The reason of those that nothing has ended so far is [Stopped].
func (s *Set) Abandon() {
	for _, c := range s.carriers {
		c.abandon()
	}
}

// List returns the records of the living tunnels, oldest first.
func (s *Set) List() []Record {
	var records []Record
	for _, c := range s.carriers {
		records = append(records, c.list()...)
	}
	slices.SortFunc(records, func(a, b Record) int { return cmp.Compare(a.Number, b.Number) })
	return records
}

// Summary returns how many tunnels live and when the oldest was started (zero
// for none).
func (s *Set) Summary() (count int, oldest time.Time) {
	for _, c := range s.carriers {
		if at := c.oldest(); !at.IsZero() && (oldest.IsZero() || at.Before(oldest)) {
			oldest = at
		}
	}
	return int(s.live.Load()), oldest
}

// Total returns how many tunnels there ever were: started, resumed and taken.
func (s *Set) Total() uint64 { return s.total.Load() }
