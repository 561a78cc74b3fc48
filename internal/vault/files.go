package vault

import (
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// files are descriptors that a generation has sent. They stay open while they are sent
// on: a number that was closed may be another file's by then. The vault's mu guards
// them.
type files struct {
	fds     []int
	by      *closer
	pins    int
	dropped bool
}

func (f *files) pin() { f.pins++ }

func (f *files) unpin() {
	f.pins--
	f.settle()
}

// drop closes them, as soon as they are not pinned.
func (f *files) drop() {
	f.dropped = true
	f.settle()
}

func (f *files) settle() {
	if f.dropped && f.pins == 0 {
		f.by.close(f.fds)
		f.fds = nil
	}
}

// closer closes descriptors that one generation has sent, many at a time. Nobody waits
// for it: to close a socket may block for as long as its generation wants (see
// [control.Discard]).
type closer struct {
	mu       sync.Mutex
	fds      []int
	unclosed int // those, and what run still has
	running  bool
}

// closeAfter is how long descriptors are collected. To begin with each at once costs more
// than to close it.
const closeAfter = 10 * time.Millisecond

func (c *closer) close(fds []int) {
	if len(fds) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fds = append(c.fds, fds...)
	c.unclosed += len(fds)
	if !c.running {
		c.running = true
		time.AfterFunc(closeAfter, c.run)
	}
}

func (c *closer) run() {
	for {
		c.mu.Lock()
		fds := c.fds
		c.fds = nil
		c.running = len(fds) > 0
		c.mu.Unlock()
		if len(fds) == 0 {
			return
		}
		for some := range slices.Chunk(fds, 64) {
			for _, fd := range some {
				unlinger(fd)
			}
			control.CloseAll(some)
			c.mu.Lock()
			c.unclosed -= len(some)
			c.mu.Unlock()
		}
	}
}

// waiting is how many descriptors are to be closed.
func (c *closer) waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unclosed
}

// unlinger has the close of a socket neither block nor discard what is to be sent, both
// of which SO_LINGER may be set for (socket(7)): the kernel delivers that by itself. With
// what is no socket nothing happens.
func unlinger(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
}

// reset cuts a connection at once, whoever else has its socket, and has its peer notice:
// connect(2), AF_UNSPEC. With what is no such socket nothing happens.
func reset(fd int) {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, _ = unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere))
}
