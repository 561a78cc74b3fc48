// Package task runs sequential code on the goroutine of a loop: code that reads, waits,
// writes and waits again, of which thousands are under way at once, and that costs neither
// a goroutine to be woken nor a lock.
//
//	tasks := task.NewPool(loop, onPanic)
//	tasks.Go(runner)            // runner.Run(t) begins in this turn of the loop
//
//	func (r *reading) Run(t *task.Task) {
//		for !r.conn.readable {
//			r.conn.reader = t   // whoever makes it readable calls t.Wake
//			t.Wait()
//		}
//		...
//	}
//
// A task is a coroutine: while it runs, nothing else of its loop does, and it goes on only
// where it waits. To wake one and to wait takes some 65 ns. What blocks in Go's sense, as a
// channel, a file or a name that is looked up, would stop the whole loop: it is for a
// goroutine, which posts what comes of it.
//
// # Order
//
// Tasks run at the end of a turn, in the order in which they were begun or woken. Those
// that are woken by others meanwhile run in the next turn, which then comes at once.
package task

import (
	"iter"

	"holdfast/internal/poller"
)

// mostIdle is how many coroutines are kept for tasks to come: to make one costs more than
// a small request.
const mostIdle = 1024

// A Runner is what a task does.
type Runner interface {
	// Run is called on the loop's goroutine, and may call Wait of its task.
	Run(*Task)
}

// Pool has the tasks of one loop. All is done on the loop's goroutine.
type Pool struct {
	loop    *poller.Loop
	onPanic func(value any)

	ready, running []*Task // to be run; memory for those of a turn
	idle           []*Task // coroutines without a task; the last one has the warmest stack
	live           int     // tasks that have begun, or are about to
}

// NewPool returns the tasks of a loop. onPanic is called when one has panicked, within its
// deferred functions; that ends the task and nothing else. After the loop has ended
// nothing may be begun.
func NewPool(l *poller.Loop, onPanic func(value any)) *Pool {
	p := &Pool{loop: l, onPanic: onPanic}
	l.AfterTurn(p.run)
	return p
}

// Live is how many tasks have begun and not ended.
func (p *Pool) Live() int { return p.live }

// Go begins a task. It runs when what is under way on the loop has ended or waits.
func (p *Pool) Go(r Runner) *Task {
	var t *Task
	if n := len(p.idle); n > 0 {
		t = p.idle[n-1]
		p.idle[n-1] = nil
		p.idle = p.idle[:n-1]
	} else {
		t = p.newTask()
	}
	t.runner = r
	p.live++
	t.Wake()
	return t
}

// Trim ends the coroutines that are kept for tasks to come. It is called on the loop's
// goroutine, not by a task, and for the last time when all tasks have ended.
func (p *Pool) Trim() {
	for _, t := range p.idle {
		t.stop()
	}
	p.idle = nil
}

// run runs what is ready.
func (p *Pool) run() {
	if len(p.ready) == 0 {
		return
	}
	p.running, p.ready = p.ready, p.running[:0]
	for i, t := range p.running {
		p.running[i] = nil
		t.queued = false
		if t.runner != nil { // otherwise somebody woke a task that had ended
			t.resume()
		}
	}
	if len(p.ready) > 0 {
		p.loop.Hurry()
	}
}

// Task is one coroutine, and what it is just used for.
type Task struct {
	pool   *Pool
	runner Runner
	queued bool // in pool.ready

	resume func() (struct{}, bool)
	stop   func()
	yield  func(struct{}) bool
}

func (p *Pool) newTask() *Task {
	t := &Task{pool: p}
	t.resume, t.stop = iter.Pull(t.life)
	return t
}

// life runs one task after the other, until it is one too many or is stopped.
func (t *Task) life(yield func(struct{}) bool) {
	t.yield = yield
	for {
		t.runOne()
		t.runner = nil
		t.pool.live--
		if len(t.pool.idle) >= mostIdle {
			return
		}
		t.pool.idle = append(t.pool.idle, t)
		if !yield(struct{}{}) {
			return
		}
	}
}

func (t *Task) runOne() {
	defer func() {
		if p := recover(); p != nil {
			t.pool.onPanic(p)
		}
	}()
	t.runner.Run(t)
}

// Wait returns after somebody has called Wake, which may have been before, and for another
// reason: whoever waits looks whether it has come, and waits again otherwise. It is called
// by the task itself.
func (t *Task) Wait() {
	if !t.yield(struct{}{}) {
		panic("task: the loop has ended while a task waits")
	}
}

// Wake has a task go on that waits, or will. It returns at once.
func (t *Task) Wake() {
	if !t.queued {
		t.queued = true
		t.pool.ready = append(t.pool.ready, t)
	}
}

// Pause lets others run: a task that never has to wait must not be the only one.
func (t *Task) Pause() {
	t.Wake()
	t.Wait()
}
