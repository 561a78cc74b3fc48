package poller

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nobody owns the eventfd: that the loop wakes up is all that it is for.
type nobody struct{}

func (nobody) Ready(uint32, Events) {}

// addWakeup makes the eventfd. It is never read: it is edge-triggered like all others,
// and every write is an edge.
func (l *Loop) addWakeup() (err error) {
	l.wakeup, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("poller: %w", os.NewSyscallError("eventfd", err))
	}
	_, err = l.Add(l.wakeup, nobody{}, 0) // the first, so 0, which is nobody else's handle
	return err
}

// Post has fn called on the loop's goroutine, after all functions that were posted
// before. It returns at once. After [Loop.Stop] it returns false, and fn is not called.
func (l *Loop) Post(fn func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return false
	}
	l.posted = append(l.posted, fn)
	l.wakeLocked()
	return true
}

// Stop makes the loop end and returns at once. What was posted before is still called.
func (l *Loop) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.wakeLocked()
}

// wakeLocked ends the wait that the loop may be in, or about to be. It writes with mu
// held, so that the descriptor is not another one by then.
func (l *Loop) wakeLocked() {
	if !l.sleeping {
		return
	}
	l.sleeping = false
	if l.signal != nil {
		select {
		case l.signal <- struct{}{}:
		default: // it was told already
		}
		return
	}
	one := uint64(1)
	unix.RawSyscall(unix.SYS_WRITE, uintptr(l.wakeup), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
}

// fallAsleep says whether nothing was posted. From then on whoever posts writes to the
// eventfd, or the channel that is in its place.
func (l *Loop) fallAsleep() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sleeping = len(l.posted) == 0 && !l.stopped
	return l.sleeping
}

// awake takes what was posted.
func (l *Loop) awake() (posted []func(), stopped bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sleeping = false
	posted, l.posted = l.posted, nil
	return posted, l.stopped
}

func (l *Loop) runPosted(posted []func()) (any bool) {
	for _, fn := range posted {
		fn()
	}
	if len(posted) > 0 {
		l.Yield() // whoever posted may wait for it
	}
	return len(posted) > 0
}
