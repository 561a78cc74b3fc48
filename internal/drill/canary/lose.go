package canary

import (
	"math"
	"net"

	"golang.org/x/sys/unix"
)

// losses is the part of the segments that is lost: one of so many.
const losses = 100

// Where a classic filter finds a random number, as if it were in the packet
// (SKF_AD_OFF and SKF_AD_RANDOM of linux/filter.h).
const randomWord = -0x1000 + 56

// lose has the kernel drop some of the segments that arrive for c, data and
// acknowledgements, which then have to be sent again: with a filter, which anybody may
// attach to a socket of his own (socket(7), SO_ATTACH_FILTER).
func lose(c *net.TCPConn) error {
	random := int32(randomWord)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: uint32(random)},
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, Jf: 1, K: math.MaxUint32 - math.MaxUint32/losses},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: math.MaxUint32},
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	outer := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	})
	if outer != nil {
		return outer
	}
	return err
}
