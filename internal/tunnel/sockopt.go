package tunnel

import (
	"errors"
	"net"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
)

// The system calls of the loops. They do not tell the Go runtime that they may block,
// which costs more than a small message: no call here waits, and none moves more than a
// megabyte.

// recv reads into p, which is not empty. 0 without an error is the end: a FIN, or a
// reset whose error was taken before.
func recv(fd int32, p []byte, flags uintptr) (n int, errno unix.Errno) {
	return poller.Again(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), poller.NoWait|flags, 0, 0)
}

// send writes p, which is not empty.
func send(fd int32, p []byte) (n int, errno unix.Errno) {
	return poller.Again(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), poller.NoWait, 0, 0)
}

// splice moves up to n bytes between a socket and a pipe.
func splice(from, to int32, n int) (moved int, errno unix.Errno) {
	return poller.Again(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
}

// tee copies up to n bytes from a pipe to an empty one, and says how many.
func tee(from, to int32, n int) (copied int) {
	copied, _ = poller.Again(unix.SYS_TEE, uintptr(from), uintptr(to), uintptr(n), unix.SPLICE_F_NONBLOCK, 0, 0)
	return copied
}

// sendFin ends the direction towards the peer.
func sendFin(fd int32) unix.Errno {
	_, errno := poller.Again(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0, 0, 0, 0)
	return errno
}

// hangUp ends both directions, whoever else has the socket: close alone would end
// nothing while there are duplicates. What is in the send queue is still delivered.
func hangUp(fd int32) { poller.Again(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_RDWR, 0, 0, 0, 0) }

// reset cuts the connection, whoever else has the socket, so that the peer notices that
// the stream was cut. Bytes that the kernel still holds are discarded.
func reset(fd int32) {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	poller.Again(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere), 0, 0, 0)
}

// closeFD gives up the descriptor.
func closeFD(fd int32) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func getsockopt(fd int32, level, name int, value unsafe.Pointer, size uintptr) unix.Errno {
	length := uint32(size)
	_, errno := poller.Again(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	return errno
}

// takeError takes the error that the kernel holds for the socket, 0 for none.
func takeError(fd int32) unix.Errno {
	var value int32
	if errno := getsockopt(fd, unix.SOL_SOCKET, unix.SO_ERROR, unsafe.Pointer(&value), unsafe.Sizeof(value)); errno != 0 {
		return errno
	}
	return unix.Errno(value)
}

// tcpInfo asks the kernel about the connection.
func tcpInfo(fd int32, info *unix.TCPInfo) unix.Errno {
	return getsockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(info), unsafe.Sizeof(*info))
}

// unacked returns how many bytes of the send queue the peer has not acknowledged.
func unacked(fd int32) int {
	var n int32
	if _, errno := poller.Again(unix.SYS_IOCTL, uintptr(fd), unix.SIOCOUTQ, uintptr(unsafe.Pointer(&n)), 0, 0, 0); errno != 0 {
		return 0
	}
	return int(n)
}

// A prober is the memory of isBroken. The zero value is ready.
type prober struct {
	poll   unix.PollFd
	noTime unix.Timespec
}

// isBroken reports what the kernel says of a connection without a read, where no read
// tells: a read returns 0 for ever after a FIN, and also after a reset whose error a
// write has taken.
//
// failed is a pending error: it was reset or timed out. hungUp means that both directions
// have ended (Linux tcp_poll), which without a FIN of ours only a reset can do.
func (p *prober) isBroken(fd int32) (failed, hungUp bool) {
	p.poll = unix.PollFd{Fd: fd}
	n, errno := poller.Again(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p.poll)), 1, uintptr(unsafe.Pointer(&p.noTime)), 0, 0, 0)
	if errno != 0 || n == 0 {
		return false, false
	}
	return p.poll.Revents&unix.POLLERR != 0, p.poll.Revents&unix.POLLHUP != 0
}

// isDead says whether an error means that the peer was waited for in vain. A connection
// that gave up has ETIMEDOUT, or what ICMP had said about the peer meanwhile (Linux
// tcp_write_err).
func isDead(errno unix.Errno) bool {
	return errno == unix.ETIMEDOUT || errno == unix.EHOSTUNREACH || errno == unix.ENETUNREACH
}

// detach takes a connection out of Go's poller: it returns a duplicate of the
// descriptor. conn is still to be closed. It fails for what only looks like TCP: of
// multipath TCP not all is true that is said here.
func detach(conn *net.TCPConn, k KeepAlive) (fd int32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	control := raw.Control(func(old uintptr) {
		if !isTCP(int(old)) {
			err = errNotTCP
			return
		}
		var n int
		if n, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			k.set(n, KeepAlive{})
			// Of Go's own it is so. splice has no MSG_DONTWAIT: it asks the
			// open file description.
			err = unix.SetNonblock(n, true)
		}
		fd = int32(n)
	})
	return fd, errors.Join(control, err)
}

var errNotTCP = errors.New("not a TCP socket")

// adopt makes sure that a socket which another process has had is what detach makes. It
// does not block from now on, for nobody.
func adopt(fd int) error {
	if !isTCP(fd) {
		return errNotTCP
	}
	return unix.SetNonblock(fd, true)
}

// isTCP says whether a descriptor is a socket of plain TCP.
func isTCP(fd int) bool {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && protocol == unix.IPPROTO_TCP
}

// set gives a connection its patience. TCP_USER_TIMEOUT is not set on purpose: it also
// kills a peer that is alive but does not read (zero window).
//
// Urgent bytes (tcp(7), SO_OOBINLINE) are like all others: the kernel would take them
// out of the stream and give them to nobody, and a count of what was taken would be wrong.
//
// All of this is an aid: where it fails, the tunnel lives on without. What has been set of it
// before is not set again; of a connection with the zero value, nothing has.
func (k KeepAlive) set(fd int, has KeepAlive) {
	k = k.orDefault()
	on := 0
	if has != (KeepAlive{}) {
		on = 1
	}
	for _, option := range [...]struct{ level, name, value, had int }{
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(k.Idle), seconds(has.Idle)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(k.Interval), seconds(has.Interval)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Count, has.Count},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1, on},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1, on},
	} {
		if option.value != option.had {
			unix.SetsockoptInt(fd, option.level, option.name, option.value)
		}
	}
}

func seconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }
