package task_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/poller"
	"holdfast/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const bound = 30 * time.Second

// runner makes a Runner of a function.
type runner func(*task.Task)

func (r runner) Run(t *task.Task) { r(t) }

// world is a loop that runs, and its tasks.
type world struct {
	t      testing.TB
	loop   *poller.Loop
	tasks  *task.Pool
	panics []any // the loop's
}

func start(t testing.TB) *world {
	t.Helper()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	return runOn(t, l)
}

func runOn(t testing.TB, l *poller.Loop) *world {
	w := &world{t: t, loop: l}
	w.tasks = task.NewPool(l, func(p any) { w.panics = append(w.panics, p) })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Run()
	}()
	t.Cleanup(func() {
		w.on(func() {
			if n := w.tasks.Live(); n != 0 {
				t.Errorf("%d tasks have not ended", n)
			}
			w.tasks.Trim()
		})
		l.Stop()
		<-ended
	})
	return w
}

// on runs fn on the loop and waits for it.
func (w *world) on(fn func()) {
	w.t.Helper()
	done := make(chan struct{})
	w.loop.Post(func() { defer close(done); fn() })
	w.await(done)
}

func (w *world) await(done <-chan struct{}) {
	w.t.Helper()
	select {
	case <-done:
	case <-time.After(bound):
		w.t.Fatal("it did not come")
	}
}

func TestATaskGoesOnWhereItHasWaited(t *testing.T) {
	t.Parallel()
	w := start(t)
	var said []string
	var waiting *task.Task
	go_, done := false, make(chan struct{})
	w.on(func() {
		waiting = w.tasks.Go(runner(func(t *task.Task) {
			said = append(said, "begun")
			for !go_ {
				t.Wait()
			}
			said = append(said, "gone on")
			close(done)
		}))
		said = append(said, "told to begin")
	})
	w.on(func() { waiting.Wake() }) // for nothing
	w.on(func() { go_ = true; waiting.Wake(); said = append(said, "woken") })
	w.await(done)
	w.on(func() {
		if want := []string{"told to begin", "begun", "woken", "gone on"}; !slices.Equal(said, want) {
			t.Errorf("%q, want %q", said, want)
		}
	})
}

// Tasks run in the order in which they were woken, and one that wakes the other again and
// again does not keep the loop from anything else.
func TestTasksThatWakeEachOtherLetTheLoopLive(t *testing.T) {
	t.Parallel()
	w := start(t)
	var pair [2]*task.Task
	over := false
	var turns int
	w.on(func() {
		for i := range pair {
			pair[i] = w.tasks.Go(runner(func(t *task.Task) {
				for !over {
					turns++
					pair[1-i].Wake()
					t.Wait()
				}
				pair[1-i].Wake()
			}))
		}
	})
	for range 100 {
		w.on(func() {})
	}
	w.on(func() {
		over = true
		if turns < 50 {
			t.Errorf("they ran %d times", turns)
		}
	})
	w.on(func() {})
	w.on(func() {})
}

func TestOneThatPausesLetsOthersRun(t *testing.T) {
	t.Parallel()
	w := start(t)
	var order []int
	done := make(chan struct{})
	w.on(func() {
		for i := range 2 {
			w.tasks.Go(runner(func(t *task.Task) {
				for range 3 {
					order = append(order, i)
					t.Pause()
				}
				if i == 1 {
					close(done)
				}
			}))
		}
	})
	w.await(done)
	w.on(func() {
		if want := []int{0, 1, 0, 1, 0, 1}; !slices.Equal(order, want) {
			t.Errorf("%v, want %v", order, want)
		}
	})
}

// A wake that comes too late finds a coroutine that does something else, or nothing.
func TestAWakeAfterTheEndHarmsNobody(t *testing.T) {
	t.Parallel()
	w := start(t)
	var first *task.Task
	w.on(func() { first = w.tasks.Go(runner(func(*task.Task) {})) })
	w.on(func() { first.Wake() })
	ran := 0
	w.on(func() {
		first.Wake()
		second := w.tasks.Go(runner(func(t *task.Task) {
			ran++
			t.Wait() // woken, by the one that was for the first
		}))
		if second != first {
			t.Error("the coroutine was not used again, so nothing was tested")
		}
		second.Wake()
	})
	w.on(func() { first.Wake() })
	w.on(func() {
		if ran != 1 {
			t.Errorf("it ran %d times", ran)
		}
	})
}

func TestAPanicEndsOneTask(t *testing.T) {
	t.Parallel()
	w := start(t)
	broken := errors.New("broken")
	deferred, other := false, make(chan struct{})
	w.on(func() {
		w.tasks.Go(runner(func(t *task.Task) {
			defer func() { deferred = true }()
			t.Pause()
			panic(broken)
		}))
		w.tasks.Go(runner(func(t *task.Task) {
			for range 5 {
				t.Pause()
			}
			close(other)
		}))
	})
	w.await(other)
	w.on(func() {
		if !deferred || !slices.Equal(w.panics, []any{broken}) {
			t.Errorf("deferred: %v, panics: %v", deferred, w.panics)
		}
	})
}

func TestManyTasksLeaveFewCoroutines(t *testing.T) {
	t.Parallel()
	w := start(t)
	const n = 1000
	all, over := 0, false
	var tasks []*task.Task
	w.on(func() {
		for range n {
			tasks = append(tasks, w.tasks.Go(runner(func(t *task.Task) {
				all++
				for !over {
					t.Wait()
				}
			})))
		}
	})
	w.on(func() {
		if live := w.tasks.Live(); live != n || all != n {
			t.Errorf("%d are live, %d have run", live, all)
		}
		over = true
		for _, t := range tasks {
			t.Wake()
		}
	})
}

func BenchmarkWakeAndWait(b *testing.B) {
	w := start(b)
	done := make(chan struct{})
	w.on(func() {
		w.tasks.Go(runner(func(t *task.Task) {
			for b.Loop() {
				t.Pause()
			}
			close(done)
		}))
	})
	<-done
}
