package load

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// interesting is what every connection is registered for, once: edge-triggered, so
// that no system call is spent on changing it.
const interesting = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET

// lost is what the kernel says of a connection that has gone.
const lost = unix.EPOLLERR | unix.EPOLLHUP

// rawWait is how long a wait keeps Go's scheduler waiting too, which costs least while
// messages come and go. A longer one tells the scheduler.
const rawWait = 2 * time.Millisecond

// A poll is an epoll instance, for one goroutine.
type poll struct {
	fd     int
	events [256]unix.EpollEvent
	due    []unix.EpollEvent // what stopped before it had read or written everything
	spare  []unix.EpollEvent
}

func newPoll() (*poll, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return &poll{fd: fd}, nil
}

func (p *poll) close() { unix.Close(p.fd) }

// add registers a descriptor; its events carry id and generation.
func (p *poll) add(fd int, events uint32, id, generation int32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: id, Pad: generation})
}

// again makes the next wait return e once more: for whoever stops before the kernel
// said that there is nothing left, so that others have their turn.
func (p *poll) again(e unix.EpollEvent) { p.due = append(p.due, e) }

// wait waits for events until a time from now. It calls handle for each. A negative
// time is for ever.
func (p *poll) wait(d time.Duration, handle func(unix.EpollEvent)) error {
	due := p.due
	p.due, p.spare = p.spare[:0], due
	if len(due) > 0 {
		d = 0
	}
	n, err := p.kernel(d)
	if err != nil {
		return err
	}
	for _, e := range p.events[:n] {
		handle(e)
	}
	for _, e := range due {
		handle(e)
	}
	return nil
}

func (p *poll) kernel(d time.Duration) (int, error) {
	first := d
	if d < 0 || d > rawWait {
		first = rawWait
	}
	ts := unix.NsecToTimespec(int64(first))
	n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)), uintptr(unsafe.Pointer(&ts)), 0, 0)
	if e == 0 && n == 0 && first != d {
		rest := &ts
		if d < 0 {
			rest = nil
		} else {
			ts = unix.NsecToTimespec(int64(d - first))
		}
		n, _, e = unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)), uintptr(unsafe.Pointer(rest)), 0, 0)
	}
	switch e {
	case 0:
		return int(n), nil
	case unix.EINTR:
		return 0, nil
	}
	return 0, e
}

// recv and send move bytes without blocking; errno is EAGAIN where nothing moves. With
// MSG_TRUNC, recv throws bytes away instead of copying them.
func recv(fd int, b []byte, flags int) (int, syscall.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(unix.MSG_DONTWAIT|flags), 0, 0)
	return int(n), e
}

func send(fd int, b []byte) (int, syscall.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}
