// Package poller waits for many descriptors with few goroutines.
//
// A [Loop] is one epoll set and one goroutine. A descriptor is registered once, for
// both directions and edge-triggered, and has an owner, which is told on the loop's
// goroutine what has become ready. Whoever owns state that only ever is touched
// there needs no lock.
//
//	loop, err := poller.New()
//	go loop.Run()
//	loop.Post(func() { handle, err = loop.Add(fd, owner, 7) })
//	...
//	loop.Stop()
//
// # A turn
//
// A loop lives in turns. In each it waits, and then calls, in this order and once: the
// owners of what has become ready (256 descriptors at most), and of what is to be called
// again (16); the functions that were posted before the turn began; the timers that are
// due; and, if there was anything of that, who wants to know of the end of a turn. What
// comes up for one of these after its time has come is for a later turn. So nobody can
// keep the others from running, who takes a bounded piece of work at a time.
//
// # Waiting
//
// Go's usual way into a system call that blocks gives the processor (P) away and has to
// get one back, which costs more than a small message. A loop therefore first waits for
// 4 ms without telling the runtime, and in the ordinary way only after that. Who runs
// loops sets GOMAXPROCS to at least two more than there are loops, so that one that waits
// like this is in nobody's way. A stop of the world is not held up: the runtime's signal
// ends the wait. A goroutine that was made ready by a loop sits in the queue of its
// processor until another one steals it, so after a turn that may have done that the
// loop waits in the ordinary way at once (see [Loop.Yield]).
//
// A loop for which nothing is due and nothing becomes ready sleeps without end.
//
// # Time
//
// A loop reads the clock once a turn. A test has two ways to be quicker than that: a loop
// of [NewVirtual] has no descriptors and lives in a bubble of testing/synctest; one with
// descriptors can be given another clock with [Loop.SetClock].
package poller

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Events are what has become of a descriptor since it was last told.
type Events uint8

// The events. None of them says how much: an owner reads or writes until the kernel
// has no more (EAGAIN), or asks to be called again with [Loop.Again].
const (
	Readable Events = 1 << iota // bytes, or what Hup says
	Writable
	Hup    // the peer has sent its FIN, or the connection is broken: a read tells more than a short one did
	Error  // the connection is broken: a reset, a time-out, or what ICMP said
	Urgent // an urgent mark, at which reads stop and splice sees nothing
)

// An Owner is told what has become of its descriptors, on the loop's goroutine. It
// must not block. Owners are told apart with ==, so their type is a pointer.
//
// A panic is the owner's own business. A loop does not recover one, neither of an owner
// nor of any other function that it calls: it could not say whose state is broken.
type Owner interface {
	// Ready is called with the number that the owner gave the descriptor. No
	// events: it comes from [Loop.Again].
	Ready(index uint32, e Events)
}

// Handle names a registered descriptor of one loop, until it is removed. 0 names none.
type Handle uint32

// What a turn takes at most.
const (
	batch      = 256 // events
	againBatch = 16  // of those that asked to be called again
)

// A Loop is an epoll set and what its goroutine does. [Loop.Post], [Loop.Stop] and
// [Loop.Wakeups] are for everybody. All other methods, and those of its timers, are for
// the loop's goroutine, which is whoever has made it until it calls [Loop.Run].
type Loop struct {
	epoll  int
	wakeup int           // an eventfd
	signal chan struct{} // in place of both, of a loop without descriptors
	clock  func() time.Time

	// Owned by the loop's goroutine.
	registry  registry
	again     []registration // asked to be called again, in order
	queue     []registration // memory for those of a turn
	timers    []*Timer
	alarm     *Timer // the first of alarms; nil: there was none
	alarms    alarmHeap
	wheel     *wheel // nil: nobody has had a deadline
	afterTurn []func()
	now       time.Time
	yield     bool // a goroutine may have been made ready since the last ordinary wait
	hurry     bool // the next wait does not
	events    [batch]unix.EpollEvent
	event     unix.EpollEvent // what is registered

	wakeups atomic.Uint64

	mu       sync.Mutex
	posted   []func()
	stopped  bool
	sleeping bool // nobody has written to wakeup since the loop began to wait
}

// New returns a loop that waits to be run. It holds two descriptors, which [Loop.Run]
// closes: to get rid of a loop that was never run, stop it and run it.
func New() (*Loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("poller: %w", os.NewSyscallError("epoll_create1", err))
	}
	l := &Loop{epoll: epoll, wakeup: -1, clock: time.Now, now: time.Now()}
	if err := l.addWakeup(); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

// NewVirtual returns a loop that has no descriptors, and to which none can be added. All
// else is as usual, but it waits by Go's own means, so that a bubble of testing/synctest in
// which it is made and run sees that it is idle, and has its time go on. It holds nothing
// that Run would have to close.
func NewVirtual() *Loop {
	return &Loop{epoll: -1, wakeup: -1, signal: make(chan struct{}, 1), clock: time.Now, now: time.Now()}
}

// SetClock has the loop look at another clock, at once and in all turns to come. The loop
// still waits as long as that clock says that nothing is due, so a test that moves it posts
// something then. now is called on the loop's goroutine.
func (l *Loop) SetClock(now func() time.Time) { l.clock, l.now = now, now() }

// Run waits and calls owners, posted functions and timers until [Loop.Stop]. It then
// closes what is the loop's own; the descriptors that are still registered are their
// owners', and open.
func (l *Loop) Run() {
	defer l.close()
	for l.turn() {
	}
}

// turn waits and does all that there is to do. It returns false in the last turn.
func (l *Loop) turn() bool {
	n := l.wait()
	l.now = l.clock()
	posted, stopped := l.awake()
	did := n > 0 || l.hurry
	l.hurry = false
	for i := range l.events[:n] {
		l.dispatch(&l.events[i])
	}
	did = l.runAgain() || did
	did = l.runPosted(posted) || did
	did = l.runTimers() || did
	if did {
		for _, fn := range l.afterTurn {
			fn()
		}
	}
	return !stopped
}

// AfterTurn has fn called at the end of every turn that did something, for as long as
// the loop runs.
func (l *Loop) AfterTurn(fn func()) { l.afterTurn = append(l.afterTurn, fn) }

// Now returns the time at which the turn began.
func (l *Loop) Now() time.Time { return l.now }

// Clock returns the time as it is now, by the clock that tells the loop.
func (l *Loop) Clock() time.Time { return l.clock() }

// Wakeups returns how often the loop has returned from waiting. A look that does not
// wait, because there is something to do, is not counted.
func (l *Loop) Wakeups() uint64 { return l.wakeups.Load() }

func (l *Loop) close() error {
	l.Stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.signal != nil {
		return nil
	}
	err := unix.Close(l.epoll)
	if l.wakeup >= 0 {
		err = errors.Join(err, unix.Close(l.wakeup))
	}
	l.epoll, l.wakeup = -1, -1
	return err
}
