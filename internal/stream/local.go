package stream

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// LocalAddr returns the TCP address that a connection was made to, on this side; zero for a unix
// socket.
func LocalAddr(fd int) netip.AddrPort {
	at, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}
	}
	switch at := at.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(at.Addr).Unmap(), uint16(at.Port))
	}
	return netip.AddrPort{}
}
