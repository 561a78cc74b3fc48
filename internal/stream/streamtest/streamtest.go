// Package streamtest has loops for tests.
//
//	l := streamtest.New(t)
//	streamtest.Do(l, func() { err = l.Adopt(c, fd, owner, nil) })
//	streamtest.Go(l, func(t *task.Task) { err = c.Fill(t) })
//
// What is about time takes none with a [Clock], or with [NewVirtual] in a bubble of
// testing/synctest.
package streamtest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// bound is how long what a test has left behind may take to end.
const bound = 10 * time.Second

// New returns a loop that runs until the test ends. By then its connections and tasks must
// have ended, or do so soon; a task that panics fails the test.
func New(t testing.TB) *stream.Loop {
	t.Helper()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	return run(t, l)
}

// NewVirtual is New for a loop without descriptors, whose time is that of the bubble in
// which it is called.
func NewVirtual(t testing.TB) *stream.Loop { return run(t, poller.NewVirtual()) }

func run(t testing.TB, p *poller.Loop) *stream.Loop {
	tasks := task.NewPool(p, func(value any) { t.Errorf("a task has panicked: %v", value) })
	l := stream.NewLoop(p, tasks, 0)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Run()
	}()
	t.Cleanup(func() {
		if conns, live := settle(t, l); !t.Failed() && conns+live > 0 {
			t.Errorf("%d connections and %d tasks are left", conns, live)
		}
		do(l, func() {
			tasks.Trim()
			l.Trim()
		})
		l.Stop()
		<-ended
	})
	return l
}

// settle waits until nothing is left on a loop, and returns what is.
func settle(t testing.TB, l *stream.Loop) (conns, live int) {
	for end := time.Now().Add(bound); ; time.Sleep(time.Millisecond) {
		ok := do(l, func() { conns, live = l.Conns(), l.Tasks.Live() })
		if !ok || conns+live == 0 || t.Failed() || time.Now().After(end) {
			return conns, live
		}
	}
}

// Do calls fn on the goroutine of a loop and returns when it has returned and its turn is
// over: what was counted is known. Like all that runs there it must not end the test
// (FailNow), which would end the loop.
func Do(l *stream.Loop, fn func()) {
	if !do(l, fn) || !do(l, func() {}) {
		panic("streamtest: the loop has ended")
	}
}

func do(l *stream.Loop, fn func()) bool {
	done := make(chan struct{})
	if !l.Post(func() { defer close(done); fn() }) {
		return false
	}
	<-done
	return true
}

// runner makes a [task.Runner] of a function.
type runner func(*task.Task)

func (r runner) Run(t *task.Task) { r(t) }

// Go runs fn as a task of a loop and returns when it has ended.
func Go(l *stream.Loop, fn func(*task.Task)) { <-Begin(l, fn) }

// Begin is Go without waiting: the channel is closed when fn has ended.
func Begin(l *stream.Loop, fn func(*task.Task)) (ended <-chan struct{}) {
	done := make(chan struct{})
	Do(l, func() {
		l.Tasks.Go(runner(func(t *task.Task) { defer close(done); fn(t) }))
	})
	return done
}

// Block has a task wait until fn has returned, which a goroutine of its own calls while the
// loop goes on: for fakes that do what tasks must not.
func Block(l *stream.Loop, t *task.Task, fn func()) {
	done := false
	go func() {
		fn()
		l.Post(func() {
			done = true
			t.Wake()
		})
	}()
	for !done {
		t.Wait()
	}
}

// A Clock is the time of loops with descriptors, which stands still but for Advance.
type Clock struct {
	loops []*stream.Loop

	mu  sync.Mutex
	now time.Time
}

// NewClock sets the clock of loops that run. It begins with the present.
func NewClock(loops ...*stream.Loop) *Clock {
	c := &Clock{loops: loops, now: time.Now()}
	for _, l := range loops {
		Do(l, func() { l.SetClock(c.Now) })
	}
	return c
}

// Now returns the time. It may be called by everybody.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Advance moves the time on, and returns when the loops have told all whose time has come
// and the tasks that were woken by that wait again. Deadlines are late by up to a quarter
// of a second, so a test goes beyond them by that.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.mu.Unlock()
	for _, l := range c.loops {
		Do(l, func() {}) // before the timers of its turn
		Do(l, func() {}) // after the tasks of that turn
	}
}

// Refusing returns an address at which whoever connects is refused until the test ends: its
// port is taken, so that no other test comes to listen there meanwhile.
func Refusing(t testing.TB) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint("127.0.0.1:", at.(*unix.SockaddrInet4).Port)
}
