package poller

import (
	"math"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// look is how long the loop waits with its processor before it waits without one. It
// must have an end: after 10 ms the runtime begins to interrupt who seems to compute,
// and would do so for ever.
const look = 4 * time.Millisecond

// Yield says that a goroutine may have been made ready in this turn. The loop then gives
// its processor away when it waits next. A turn that ran a posted function needs not be
// told.
func (l *Loop) Yield() { l.yield = true }

// Hurry says that there is more to do than this turn has done. The loop then looks once
// for events without waiting, and has a turn whatever it finds.
func (l *Loop) Hurry() { l.hurry = true }

// wait returns how many events there are; none, when there is something else to do.
func (l *Loop) wait() int {
	left := l.untilDue(l.now)
	busy := len(l.again) > 0 || l.hurry || left == 0 || !l.fallAsleep()
	if l.signal != nil {
		l.virtualWait(busy)
		return 0
	}
	if busy {
		return l.epollWait(unix.RawSyscall6, 0)
	}
	first := look
	if l.yield {
		first = 0
	}
	if n := l.epollWait(unix.RawSyscall6, min(first, left)); n > 0 {
		return n
	}
	l.yield = false
	return l.epollWait(unix.Syscall6, l.untilDue(l.clock()))
}

// virtualWait waits until something is due or was posted.
func (l *Loop) virtualWait(busy bool) {
	if busy {
		return
	}
	defer l.wakeups.Add(1)
	d := l.untilDue(l.clock())
	if d == forever {
		<-l.signal
		return
	}
	due := time.NewTimer(d)
	defer due.Stop()
	select {
	case <-l.signal:
	case <-due.C:
	}
}

// forever is a wait that only an event ends.
const forever time.Duration = math.MaxInt64

type syscall6 func(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2 uintptr, err unix.Errno)

// epollWait waits with the given kind of system call, in whole milliseconds and not
// less than d. (The Loop is on the heap and used afterwards, so events stays in place.)
func (l *Loop) epollWait(call syscall6, d time.Duration) int {
	timeout := -1
	if d != forever {
		timeout = int(min((d+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
	}
	n, _, errno := call(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&l.events)), batch, uintptr(timeout), 0, 0)
	if timeout != 0 {
		l.wakeups.Add(1)
	}
	switch errno {
	case 0:
		return int(n)
	case unix.EINTR:
		return 0
	}
	panic("poller: epoll_pwait: " + errno.Error()) // somebody has closed a descriptor that is ours
}
