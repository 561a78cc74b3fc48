package poller

import "golang.org/x/sys/unix"

// NoWait are the flags of every recv and send on a loop: no waiting, no SIGPIPE.
const NoWait = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL

// Again makes a system call that does not wait, until no signal comes between. n is 0 with an
// error. The Go runtime is not told that it may block, which costs more than a small message.
// What an argument points to is on the heap, since a stack may move on the way to the kernel.
//
//go:uintptrescapes
func Again(trap, a1, a2, a3, a4, a5, a6 uintptr) (n int, errno unix.Errno) {
	for {
		r, _, errno := unix.RawSyscall6(trap, a1, a2, a3, a4, a5, a6)
		switch errno {
		case 0:
			return int(r), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
