package stream

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
)

// The system calls of connections. They do not tell the Go runtime that they may block,
// which costs more than a small message: no call here waits.

// recv reads into p, which is not empty. 0 without an error is the end.
func recv(fd int32, p []byte) (n int, errno unix.Errno) {
	return poller.Again(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), poller.NoWait, 0, 0)
}

// send writes p, which is not empty.
func send(fd int32, p []byte) (n int, errno unix.Errno) {
	return poller.Again(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), poller.NoWait, 0, 0)
}

// peek copies what is there into p, which is not empty, and leaves it there as well.
func peek(fd int32, p []byte) (n int, errno unix.Errno) {
	return poller.Again(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), poller.NoWait|unix.MSG_PEEK, 0, 0)
}

// unsent returns how many bytes the kernel still has to send, or to be told of that they
// have arrived.
func unsent(fd int32) (n int32, errno unix.Errno) {
	_, errno = poller.Again(unix.SYS_IOCTL, uintptr(fd), unix.SIOCOUTQ, uintptr(unsafe.Pointer(&n)), 0, 0, 0)
	return n, errno
}

// splice moves up to n bytes to or from a pipe. 0 without an error is the end, or an urgent
// mark.
func splice(from, to int32, n int) (moved int, errno unix.Errno) {
	return poller.Again(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
}

// parts are slices that are sent one after the other. The empty ones come last.
type parts [3][]byte

func (p *parts) size() int { return len(p[0]) + len(p[1]) + len(p[2]) }

// drop takes n bytes off the front.
func (p *parts) drop(n int) {
	kept := 0
	for _, b := range *p {
		cut := min(n, len(b))
		n -= cut
		if b = b[cut:]; len(b) > 0 {
			p[kept] = b
			kept++
		}
	}
	clear(p[kept:])
}

// gather copies all into one slice.
func (p *parts) gather(to []byte) []byte {
	n := 0
	for _, b := range p {
		n += copy(to[n:], b)
	}
	return to[:n]
}

// vector is the memory of a sendmsg.
type vector struct {
	header unix.Msghdr
	parts  [len(parts{})]unix.Iovec
}

// send writes p, of which two are not empty.
func (v *vector) send(fd int32, p *parts) (n int, errno unix.Errno) {
	used := 0
	for _, b := range p {
		if len(b) > 0 {
			v.parts[used] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
			used++
		}
	}
	v.header = unix.Msghdr{Iov: &v.parts[0], Iovlen: uint64(used)}
	n, errno = poller.Again(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&v.header)), poller.NoWait, 0, 0, 0)
	*v = vector{} // it keeps nobody's memory
	return n, errno
}

func socket(family, protocol int) (fd int, errno unix.Errno) {
	return poller.Again(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, uintptr(protocol), 0, 0, 0)
}

// dialling is the memory of what makes a connection.
type dialling struct {
	value int32
	inet4 unix.RawSockaddrInet4
	inet6 unix.RawSockaddrInet6
}

// set sets an option of a socket that the connection can do without.
func (d *dialling) set(fd, level, name, value int) {
	d.value = int32(value)
	poller.Again(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&d.value)), unsafe.Sizeof(d.value), 0)
}

// bind has a TCP socket come from an address. The port is chosen when it is connected: one
// may do for many connections to different ends (ip(7), IP_BIND_ADDRESS_NO_PORT).
func (d *dialling) bind(fd int, from netip.Addr) error {
	d.set(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	at, size := d.address(netip.AddrPortFrom(from, 0))
	if _, errno := poller.Again(unix.SYS_BIND, uintptr(fd), uintptr(at), size, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// connect begins to connect a socket to a TCP address. Loopback may take as long as both
// ends of a handshake do, and still waits for nothing.
func (d *dialling) connect(fd int, to netip.AddrPort) error {
	at, size := d.address(to)
	if _, errno := poller.Again(unix.SYS_CONNECT, uintptr(fd), uintptr(at), size, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// address writes an address as the kernel takes it, where it stays until the next one.
func (d *dialling) address(to netip.AddrPort) (at unsafe.Pointer, size uintptr) {
	at, size = unsafe.Pointer(&d.inet6), unsafe.Sizeof(d.inet6)
	if a := to.Addr(); a.Is4() {
		d.inet4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port(to), Addr: a.As4()}
		at, size = unsafe.Pointer(&d.inet4), unsafe.Sizeof(d.inet4)
	} else {
		d.inet6 = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port(to), Addr: a.As16()}
	}
	return at, size
}

// port returns a port in the order of the network.
func port(a netip.AddrPort) (p uint16) {
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&p))[:], a.Port())
	return p
}

func closeFD(fd int32) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }
