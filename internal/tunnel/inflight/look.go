package inflight

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Counters is what the kernel says of a TCP socket. The two counts begin somewhere: only
// differences mean anything.
type Counters struct {
	Taken  uint64 // bytes that were taken from its receive queue
	Given  uint64 // bytes that were put into its send queue
	Unread int    // bytes in its receive queue

	FinSent     bool // our FIN was sent, and is not counted
	FinReceived bool // the peer's FIN has come, and is not counted

	// Gone: there is no connection any more, since both FINs were acknowledged, or since
	// it was reset or given up. FINs cannot be seen then, and are counted. Failed: it was
	// not the former. One that is not Failed may have had an error that was taken.
	Gone   bool
	Failed bool
}

// Since returns the counters less what they were before two directions: the one from the
// socket, and the one to it.
func (c Counters) Since(taken, given uint64) Counters {
	c.Taken -= taken
	c.Given -= given
	return c
}

// tcpClose is TCP_CLOSE of linux/include/net/tcp_states.h.
const tcpClose = 7

// finsIn says by the state which FINs a connection has seen.
var finsIn = [...]struct{ sent, received bool }{
	4:  {sent: true},                 // FIN_WAIT1
	5:  {sent: true},                 // FIN_WAIT2
	6:  {sent: true, received: true}, // TIME_WAIT
	8:  {received: true},             // CLOSE_WAIT
	9:  {sent: true, received: true}, // LAST_ACK
	11: {sent: true, received: true}, // CLOSING
	12: {},
}

// Look returns the counters of a socket as they are at one moment. It takes nothing from
// it, not even an error. Nobody else may use the socket meanwhile.
func Look(fd int) (Counters, error) { return new(Looker).Look(fd) }

// A Looker is the memory of looks, for who has many: the zero value is ready. Its system
// calls do not tell the Go runtime that they may block, which none does.
type Looker struct {
	info   unix.TCPInfo
	size   uint32
	poll   unix.PollFd
	noTime unix.Timespec
}

// Look is [Look].
func (l *Looker) Look(fd int) (Counters, error) {
	events, err := l.ask(fd)
	if err != nil {
		return Counters{}, err
	}
	if l.info.Unacked == 0 && l.info.Notsent_bytes == 0 && events == 0 {
		// All had been acknowledged when it was counted, and nothing has come until
		// after: the counts have not moved, nor has the state.
		return counters(&l.info, 0, 0), nil
	}
	return lookTwice(fd, &l.info)
}

// ask asks for the state and the counts of a socket, and then what is to be said of it. (The
// Looker is on the heap and used afterwards, so what is pointed to stays in place.)
func (l *Looker) ask(fd int) (events int16, err error) {
	l.size = uint32(unsafe.Sizeof(l.info))
	_, _, err1 := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_INFO, uintptr(unsafe.Pointer(&l.info)), uintptr(unsafe.Pointer(&l.size)), 0)
	l.poll = unix.PollFd{Fd: int32(fd), Events: interesting}
	for {
		_, _, err2 := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&l.poll)), 1, uintptr(unsafe.Pointer(&l.noTime)), 0, 0, 0)
		switch {
		case err2 == unix.EINTR:
		case err1 != 0:
			return 0, firstOf(err1)
		case err2 != 0:
			return 0, firstOf(err2)
		default:
			return l.poll.Revents, nil
		}
	}
}

// lookTwice looks until nothing has changed between two looks. The kernel reads the state
// before the counts, and does not stop the network meanwhile.
func lookTwice(fd int, before *unix.TCPInfo) (Counters, error) {
	for {
		inq, err1 := unix.IoctlGetInt(fd, unix.SIOCINQ)
		outq, err2 := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		info, err3 := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		events, err4 := poll(fd)
		if err := firstOf(err1, err2, err3, err4); err != nil {
			return Counters{}, err
		}
		if info.State == before.State && info.Bytes_received == before.Bytes_received && info.Bytes_acked == before.Bytes_acked {
			c := counters(info, inq, outq)
			// A FIN would be counted. (What we have reset ourselves has counts of 0.)
			c.Failed = c.Gone && (events&unix.POLLERR != 0 || info.Bytes_received == 0)
			return c, nil
		}
		before = info
	}
}

func counters(info *unix.TCPInfo, inq, outq int) Counters {
	c := Counters{
		Taken:  info.Bytes_received - uint64(inq),
		Given:  info.Bytes_acked + uint64(outq),
		Unread: inq,
		Gone:   info.State == tcpClose,
	}
	if int(info.State) < len(finsIn) {
		fins := finsIn[info.State]
		c.FinSent, c.FinReceived = fins.sent, fins.received
	}
	if c.FinReceived {
		c.Taken--
	}
	if c.FinSent {
		c.Given--
	}
	return c
}

// interesting is what is asked of a socket, beside what poll(2) always tells.
const interesting = unix.POLLIN | unix.POLLRDHUP

// poll returns what is to be said of a socket, apart from that it may be written to.
func poll(fd int) (events int16, err error) {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: interesting}}
	for {
		if _, err = unix.Poll(p[:], 0); err != unix.EINTR {
			return p[0].Revents, err
		}
	}
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return fmt.Errorf("inflight: look at a socket: %w", err)
		}
	}
	return nil
}
