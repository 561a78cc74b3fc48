package inflight

import (
	"fmt"

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
func Look(fd int) (Counters, error) {
	outq, err1 := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	info, err2 := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	events, err3 := poll(fd)
	if err := firstOf(err1, err2, err3); err != nil {
		return Counters{}, err
	}
	if outq == 0 && events == 0 {
		// All had been acknowledged before, and nothing has come until after: the
		// counts have not moved, nor has the state.
		return counters(info, 0, 0), nil
	}
	return lookTwice(fd, info)
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

// poll returns what is to be said of a socket, apart from that it may be written to.
func poll(fd int) (events int16, err error) {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
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
