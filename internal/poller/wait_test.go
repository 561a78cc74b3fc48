package poller_test

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
)

func TestPostedFunctionsRunInOrder(t *testing.T) {
	t.Parallel()
	l := run(t)
	const n = 1000
	var got []int
	for i := range n {
		if !l.Post(func() { got = append(got, i) }) {
			t.Fatal("not taken")
		}
	}
	on(t, l, func() {})
	on(t, l, func() {
		if len(got) != n {
			t.Errorf("%d functions were called", len(got))
		}
		for i, g := range got {
			if i != g {
				t.Fatalf("function %d came as number %d", g, i)
			}
		}
	})
}

func TestWhatIsPostedBeforeRunIsCalled(t *testing.T) {
	t.Parallel()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	called := false
	l.Post(func() { called = true })
	l.Post(l.Stop)
	l.Run()
	if !called {
		t.Error("it was not called")
	}
}

// The loop's own goroutine may post, and does not wait for itself.
func TestTheLoopPostsToItself(t *testing.T) {
	t.Parallel()
	l := run(t)
	done := make(chan struct{})
	l.Post(func() {
		called := false
		l.Post(func() { called = true })
		if called {
			t.Error("called at once")
		}
		l.Post(func() {
			if !called {
				t.Error("not in order")
			}
			close(done)
		})
	})
	wantClosed(t, done, "the function")
}

// No wake-up is lost, whatever the loop is about to do: each goroutine posts its next
// function only after the last one was called, so one that is not called is a hang. In
// between come events, so that the loop waits in both of its ways.
func TestNoPostIsLost(t *testing.T) {
	t.Parallel()
	l := run(t)
	near, far := pair(t)
	o := &recorder{then: func(call) { readAll(near) }}
	on(t, l, func() { add(t, l, near, o, 1) })
	const posters, rounds = 4, 3000
	var called atomic.Int64
	var wg sync.WaitGroup
	for p := range posters {
		wg.Go(func() {
			done := make(chan struct{}, 1)
			for i := range rounds {
				if (p+i)%3 == 0 {
					unix.Write(far, []byte("x"))
				}
				if !l.Post(func() { called.Add(1); done <- struct{}{} }) {
					t.Error("not taken")
					return
				}
				select {
				case <-done:
				case <-time.After(bound):
					t.Error("a function was not called")
					return
				}
				if i%7 == 0 {
					runtime.Gosched()
				}
			}
		})
	}
	wg.Wait()
	if n := called.Load(); n != posters*rounds && !t.Failed() {
		t.Errorf("%d calls", n)
	}
}

func TestOnlyTheFirstPostToASleepingLoopIsASystemCall(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	for _, want := range []uint64{0, 1, 0} {
		for range 3 {
			l.Post(func() {})
		}
		if n := l.Written(); n != want {
			t.Errorf("%d writes for three functions, want %d", n, want)
		}
		l.Turn()
		if want == 0 && !l.FallAsleep() {
			t.Fatal("something is left to do")
		}
	}
}

func TestStopEndsRunAfterWhatWasPosted(t *testing.T) {
	t.Parallel()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	var ran, ended bool
	turns := 0
	l.AfterTurn(func() { turns++ })
	l.Post(func() { ran = true })
	l.Stop()
	l.Stop()
	if l.Post(func() { ended = true }) {
		t.Error("a function was taken after the stop")
	}
	l.Run()
	if !ran || ended || turns != 1 {
		t.Errorf("ran %v, ran after the stop %v, turns %d", ran, ended, turns)
	}
	if l.Post(func() {}) {
		t.Error("a function was taken after the end")
	}
	l.Stop()
}

// Whoever is told that its function was taken can rely on it, also when a loop ends
// that has much to do.
func TestWhatWasTakenIsCalledWhenTheLoopEndsUnderLoad(t *testing.T) {
	t.Parallel()
	for range 20 {
		l, err := poller.New()
		if err != nil {
			t.Fatal(err)
		}
		near, far := pair(t)
		o := new(recorder)
		h := add(t, l, near, o, 1)
		o.then = func(call) { l.Again(h); readAll(near); unix.Write(far, []byte("x")); o.calls = nil }
		ended := make(chan struct{})
		go func() { defer close(ended); l.Run() }()
		var taken, called atomic.Int64
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for l.Post(func() { called.Add(1) }) {
					taken.Add(1)
				}
			})
		}
		for called.Load() < 100 {
			runtime.Gosched()
		}
		l.Stop()
		wantClosed(t, ended, "the end of Run")
		wg.Wait()
		if taken.Load() != called.Load() {
			t.Fatalf("%d functions were taken and %d called", taken.Load(), called.Load())
		}
	}
}

// Not parallel: it counts the descriptors of the process.
func TestALoopClosesItsDescriptorsAndNoOthers(t *testing.T) {
	near, _ := pair(t)
	before := descriptors(t)
	for range 20 {
		l, err := poller.New()
		if err != nil {
			t.Fatal(err)
		}
		add(t, l, near, new(recorder), 1)
		if n := descriptors(t); n != before+2 {
			t.Fatalf("a loop has %d descriptors", n-before)
		}
		l.Stop()
		l.Run()
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors more than before", n-before)
	}
	if _, err := unix.FcntlInt(uintptr(near), unix.F_GETFD, 0); err != nil {
		t.Errorf("an owner's descriptor: %v", err)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestATimerCallsOnceAndNotTooEarly(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	called := 0
	at := time.Now().Add(20 * time.Millisecond)
	l.NewTimer(func() {
		called++
		if l.Now().Before(at) {
			t.Errorf("%v too early", at.Sub(l.Now()))
		}
	}).Set(at)
	until(t, l, func() bool { return called > 0 })
	step(l)
	if called != 1 {
		t.Errorf("%d calls", called)
	}
}

// The loop neither sleeps for ever with a timer set nor looks all the time: a turn or two
// wait until it is due.
func TestALoopSleepsUntilATimerIsDue(t *testing.T) {
	t.Parallel()
	for _, d := range []time.Duration{100 * time.Microsecond, 1500 * time.Microsecond, 20 * time.Millisecond} {
		l := newLoop(t)
		called, turns := false, 0
		l.NewTimer(func() { called = true }).Set(time.Now().Add(d))
		for !called {
			l.Turn()
			turns++
		}
		if turns > 10 {
			t.Errorf("%d turns in %v", turns, d)
		}
	}
}

func TestATimerIsSetAnewAndNotAtAll(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	now := time.Now()
	soon := now.Add(20 * time.Millisecond)
	var earlier, later, last bool
	postponed := l.NewTimer(func() {
		later = true
		if l.Now().Before(soon) {
			t.Errorf("%v too early", soon.Sub(l.Now()))
		}
	})
	never := l.NewTimer(func() { t.Error("called, although it is not set any more") })
	advanced := l.NewTimer(func() { earlier = true })
	postponed.Set(now.Add(time.Millisecond))
	postponed.Set(soon)
	never.Set(now.Add(time.Millisecond))
	never.Set(time.Time{})
	advanced.Set(now.Add(time.Hour))
	advanced.Set(soon)
	l.NewTimer(func() { last = true }).Set(soon.Add(time.Millisecond))
	until(t, l, func() bool { return last })
	if !earlier || !later {
		t.Errorf("the earlier one was called: %v; the later one: %v", earlier, later)
	}
}

// A timer that sets itself for a time that has passed comes once in a turn, and so is
// not in the way of the rest.
func TestATimerSetsItself(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	n := 0
	var timer *poller.Timer
	timer = l.NewTimer(func() { n++; timer.Set(l.Now()) })
	timer.Set(l.Now())
	for i := range 10 {
		if n != i {
			t.Fatalf("%d calls in %d turns", n, i)
		}
		l.Turn() // which does not wait
	}
}

// A loop with descriptors and timers has been busy, and then nothing happens.
func TestAnIdleLoopMakesNoWakeups(t *testing.T) {
	t.Parallel()
	l := run(t)
	var far [10]int
	told := make(chan struct{})
	o := &recorder{then: func(c call) {
		if c.e&poller.Readable != 0 && c.index == uint32(len(far)-1) {
			close(told)
		}
	}}
	on(t, l, func() {
		for i := range far {
			var near int
			near, far[i] = pair(t)
			add(t, l, near, o, uint32(i))
		}
		l.NewTimer(func() {}).Set(time.Now().Add(time.Hour))
		l.NewTimer(func() {}).Set(time.Time{})
	})
	for i := range far {
		write(t, far[i], "x")
	}
	wantClosed(t, told, "the last event")
	const window = 100 * time.Millisecond
	for _, c := range []struct {
		after string
		most  uint64
	}{
		{"an event", 1}, // the look that finds nothing
		{"that", 0},
		{"that, too", 0},
	} {
		before := l.Wakeups()
		observe(window)
		if n := l.Wakeups() - before; n > c.most {
			t.Errorf("%d wake-ups in %v after %s, want %d", n, window, c.after, c.most)
		}
	}
}

// observe waits for what must not happen.
func observe(d time.Duration) { <-time.After(d) }

// A loop that keeps its processor while it waits keeps it for 4 ms. So with a single
// processor a goroutine that the loop has made ready comes only when the loop gives it
// away, because it was told or because something was posted: otherwise each round has a
// look that ends without an event.
//
// Not parallel: it changes the number of processors.
func TestAGoroutineThatIsMadeReadyRunsAtOnce(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l := run(t)
	near, far := pair(t)
	asked := make(chan struct{})
	o := new(recorder)
	o.then = func(call) {
		if readAll(near) != "" {
			asked <- struct{}{}
			l.Yield()
		}
	}
	on(t, l, func() { add(t, l, near, o, 1) })
	const rounds = 50
	before := l.Wakeups()
	for range rounds {
		write(t, far, "x")
		wantClosed(t, asked, "the event")
	}
	if n := l.Wakeups() - before; n > rounds+rounds/2 {
		t.Errorf("%d wake-ups for %d events", n, rounds)
	}
	before = l.Wakeups()
	for range rounds {
		on(t, l, func() {})
	}
	if n := l.Wakeups() - before; n > rounds+rounds/2 {
		t.Errorf("%d wake-ups for %d posted functions", n, rounds)
	}
}

// Loops that wait without telling the runtime do not hold up a stop of the world.
func TestGarbageCollectionIsNotHeldUp(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		l := run(t)
		near, far := pair(t)
		o := &recorder{}
		o.then = func(call) { readAll(near); o.calls = nil }
		on(t, l, func() { add(t, l, near, o, 1) })
		wg.Go(func() {
			tick := time.NewTicker(time.Millisecond) // so that the loop is always in its look
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					unix.Write(far, []byte("x"))
				}
			}
		})
	}
	const collections = 50
	start := time.Now()
	for range collections {
		runtime.GC()
	}
	if d := time.Since(start); d > bound {
		t.Errorf("%d collections took %v", collections, d)
	}
	close(stop)
	wg.Wait()
}

// BenchmarkRoundTrip is a message to a loop and back, the other end of which is a
// thread that blocks.
func BenchmarkRoundTrip(b *testing.B) {
	l := run(b)
	near, far := pair(b)
	if err := unix.SetNonblock(far, false); err != nil {
		b.Fatal(err)
	}
	o := &echo{fd: near}
	on(b, l, func() { add(b, l, near, o, 1) })
	var buf [64]byte
	b.ReportAllocs()
	for b.Loop() {
		unix.Write(far, buf[:])
		unix.Read(far, buf[:])
	}
}

type echo struct{ fd int }

func (o *echo) Ready(uint32, poller.Events) {
	var buf [64]byte
	if n, _ := unix.Read(o.fd, buf[:]); n > 0 {
		unix.Write(o.fd, buf[:n])
	}
}
