package task_test

import (
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/poller"
	"holdfast/internal/task"
)

// waking is a deadline that wakes a task.
type waking struct {
	poller.Deadline
	t    *task.Task
	come bool
}

func (w *waking) Expire(*poller.Deadline) { w.come = true; w.t.Wake() }

// On a loop without descriptors tasks live in a bubble of synctest: one that waits is idle,
// be it for a deadline or for a goroutine.
func TestTasksInABubble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := runOn(t, poller.NewVirtual())
		begin := time.Now()
		var waited, slept time.Duration
		done := make(chan struct{})
		w.loop.Post(func() {
			w.tasks.Go(runner(func(t *task.Task) {
				defer close(done)
				d := &waking{t: t}
				w.loop.SetDeadline(&d.Deadline, d, w.loop.Now().Add(time.Hour))
				for !d.come {
					t.Wait()
				}
				waited = time.Since(begin)
				over := false
				go func() {
					time.Sleep(time.Hour)
					w.loop.Post(func() { over = true; t.Wake() })
				}()
				for !over {
					t.Wait()
				}
				slept = time.Since(begin) - waited
			}))
		})
		synctest.Wait() // it waits
		<-done
		if waited < time.Hour || waited > time.Hour+time.Second || slept != time.Hour {
			t.Errorf("it waited %v and slept %v", waited, slept)
		}
	})
}
