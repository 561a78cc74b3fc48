package streamtest_test

import (
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A connection that waits for an hour does so in no time.
func TestAClockMovesRealConnections(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	clock := streamtest.NewClock(l)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	var c stream.Conn
	streamtest.Do(l, func() { err = l.Adopt(&c, fds[0], nil, nil) })
	if err != nil {
		t.Fatal(err)
	}
	defer streamtest.Do(l, c.Close)
	err = nil
	ended := streamtest.Begin(l, func(t *task.Task) {
		c.Limit(l.Now().Add(time.Hour))
		err = c.Fill(t)
	})
	clock.Advance(59 * time.Minute)
	streamtest.Do(l, func() {
		if err != nil || l.Tasks.Live() != 1 {
			t.Errorf("it ended too early: %v", err)
		}
	})
	clock.Advance(2 * time.Minute)
	streamtest.Do(l, func() {
		if !errors.Is(err, os.ErrDeadlineExceeded) || l.Tasks.Live() != 0 {
			t.Errorf("it did not end: %v", err)
		}
	})
	<-ended
}

func TestAVirtualLoopTakesTheTimeOfItsBubble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := streamtest.NewVirtual(t)
		begin := time.Now()
		streamtest.Go(l, func(t *task.Task) { streamtest.Block(l, t, func() { time.Sleep(time.Hour) }) })
		if d := time.Since(begin); d != time.Hour {
			t.Errorf("it took %v", d)
		}
	})
}

// complaints is a test that notes what it was told, and then ends what was left.
type complaints struct {
	testing.TB
	n       int
	end     func()
	cleanup []func()
}

func (c *complaints) Helper()               {}
func (c *complaints) Failed() bool          { return c.n > 0 }
func (c *complaints) Errorf(string, ...any) { c.n++; c.end() }
func (c *complaints) Cleanup(fn func())     { c.cleanup = append(c.cleanup, fn) }

func TestItComplainsAboutWhatIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := &complaints{TB: t}
		l := streamtest.NewVirtual(c)
		over, ended := false, make(chan struct{})
		var left *task.Task
		streamtest.Do(l, func() {
			left = l.Tasks.Go(runner(func(t *task.Task) {
				defer close(ended)
				for !over {
					t.Wait()
				}
			}))
		})
		c.end = func() {
			streamtest.Do(l, func() { over = true; left.Wake() })
			<-ended
		}
		c.cleanup[0]()
		if c.n != 1 {
			t.Errorf("%d complaints", c.n)
		}
	})
}

type runner func(*task.Task)

func (r runner) Run(t *task.Task) { r(t) }

func TestABlockedTaskHoldsUpNobody(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	open, over := make(chan struct{}), false
	var blocked *task.Task
	ended := streamtest.Begin(l, func(t *task.Task) {
		blocked = t
		streamtest.Block(l, t, func() { <-open })
		over = true
	})
	for range 10 {
		streamtest.Do(l, func() { blocked.Wake() }) // which ends no Block
	}
	streamtest.Do(l, func() {
		if over {
			t.Error("it has not waited")
		}
	})
	close(open)
	<-ended
}
