package systemd

import (
	"fmt"
	"time"
)

// relief is the change of the process that systemd takes for the service.
type relief struct {
	pid   int
	until time.Time
	done  chan error // has room for the outcome
}

// Relieve has systemd take process pid for the service instead of this one: it watches
// that one, and believes it alone. systemd must have done so before this process ends,
// or it takes the service for over; so this waits, but no longer than within. What was
// noted before is said first, and nothing any more after it.
//
// After an error it is not known whom systemd believes.
func (n *Notifier) Relieve(pid int, within time.Duration) error {
	if n == nil {
		return nil
	}
	r := &relief{pid: pid, until: time.Now().Add(within), done: make(chan error, 1)}
	n.mu.Lock()
	n.relief = r
	n.mu.Unlock()
	n.nudge()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case err := <-r.done:
		return err
	case <-timer.C:
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.relief == r { // before it is still something that cannot be said
		n.relief = nil
	}
	return fmt.Errorf("systemd has not taken process %d for the service within %s", pid, within)
}

// hand does what Relieve asks for.
func (n *Notifier) hand() {
	n.mu.Lock()
	r := n.relief
	n.relief = nil
	if r != nil {
		n.silent = true
	}
	n.mu.Unlock()
	if r == nil {
		return
	}
	n.line.until = r.until
	// READY=1: whatever this process has begun is over.
	err := n.line.send(fmt.Sprintf("MAINPID=%d\nREADY=1", r.pid))
	if err == nil {
		err = n.line.barrier()
	}
	r.done <- err
}
