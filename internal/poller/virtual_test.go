package poller_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/poller"
)

// runVirtual returns a loop without descriptors that runs, for a test in a bubble.
func runVirtual(t testing.TB) *poller.Loop {
	l := poller.NewVirtual()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Run()
	}()
	t.Cleanup(func() { l.Stop(); <-ended })
	return l
}

func TestAVirtualLoopWaitsInNoTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := runVirtual(t)
		begin := time.Now()
		var late, never expirer
		on(t, l, func() {
			l.SetDeadline(&late.d, &late, l.Now().Add(time.Hour))
			l.SetDeadline(&never.d, &never, l.Now().AddDate(5000, 0, 0))
			l.NewTimer(func() { late.timer = l.Now() }).Set(l.Now().Add(time.Minute))
		})
		time.Sleep(59 * time.Minute)
		synctest.Wait() // it is idle
		before := l.Wakeups()
		on(t, l, func() {
			if got := late.timer.Sub(begin); got != time.Minute || !late.at.IsZero() {
				t.Errorf("the timer after %v, the deadline at %v", got, late.at)
			}
		})
		if n := l.Wakeups() - before; n != 1 {
			t.Errorf("a posted function woke it %d times", n)
		}
		time.Sleep(2 * time.Minute)
		on(t, l, func() {
			if got := late.at.Sub(begin); got < time.Hour || got > time.Hour+time.Second {
				t.Errorf("the deadline came after %v", got)
			}
			if !never.at.IsZero() {
				t.Error("the deadline of somebody who lives for ever has come")
			}
			l.Forget(&never.d)
		})
	})
}

// expirer notes when it was told.
type expirer struct {
	d         poller.Deadline
	timer, at time.Time
}

func (e *expirer) Expire(*poller.Deadline) { e.at = time.Now() }

func TestAVirtualLoopTakesNoDescriptor(t *testing.T) {
	t.Parallel()
	near, _ := pair(t)
	l := poller.NewVirtual()
	if h, err := l.Add(near, &recorder{}, 1); err == nil || h != 0 {
		t.Errorf("%d, %v", h, err)
	}
	l.Stop()
	l.Run()
	if l.Post(func() {}) {
		t.Error("it has been stopped")
	}
}

// A test with real descriptors moves the time and posts something.
func TestALoopGoesByItsClock(t *testing.T) {
	t.Parallel()
	l := run(t)
	start := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	var past atomic.Int64
	var e expirer
	on(t, l, func() {
		l.SetClock(func() time.Time { return start.Add(time.Duration(past.Load())) })
		if !l.Now().Equal(start) {
			t.Errorf("it is %v", l.Now())
		}
		l.SetDeadline(&e.d, &e, start.Add(time.Hour))
	})
	on(t, l, func() {})
	past.Store(int64(59 * time.Minute))
	on(t, l, func() {})
	on(t, l, func() {
		if !e.at.IsZero() {
			t.Error("told too early")
		}
	})
	past.Store(int64(61 * time.Minute))
	on(t, l, func() {})
	on(t, l, func() {
		if e.at.IsZero() {
			t.Error("not told")
		}
	})
}
