package stream

import (
	"crypto/tls"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/task"
)

// DialOptions say how a connection is made.
type DialOptions struct {
	Until   time.Time // exact to a quarter of a second; zero: as long as the kernel tries
	Owner   Owner     // it is told nothing before the connection is made
	Traffic *Traffic

	// MayHave says of a descriptor whether the connection may have it; if not, dialling
	// fails as if there were none (EMFILE). nil: always.
	MayHave func(fd int) bool

	// KeepAlive is what is set of a TCP connection.
	KeepAlive KeepAlive

	// Source is the address that a TCP connection comes from, which is of the other end's
	// family. Zero: as the kernel chooses.
	Source netip.Addr

	// First is sent before anything else: the connection is made when that was taken.
	First []byte

	// TLS, if set, is what a handshake follows with, as its client, before the connection is
	// made. It fails with a [*HandshakeError].
	TLS *tls.Config
}

// HandshakeError says that a connection was made, but the two have not agreed on TLS: in time, or
// at all.
type HandshakeError struct{ Err error }

func (e *HandshakeError) Error() string { return fmt.Sprintf("TLS handshake: %v", e.Err) }
func (e *HandshakeError) Unwrap() error { return e.Err }

// KeepAlive are the kernel's probes of a connection on which nothing moves (tcp(7)), in
// whole seconds. The zero value: none. With some, urgent bytes are in the stream like all
// others (SO_OOBINLINE): whatever the connection becomes needs no more to be set.
type KeepAlive struct {
	Idle, Interval time.Duration
	Count          int
}

// Dial connects c to a TCP address, and waits for that. It fails with
// [os.ErrDeadlineExceeded] when Until has come, and with what c was interrupted with.
// c is adopted when it succeeds, and closed when it fails.
func (l *Loop) Dial(t *task.Task, c *Conn, to netip.AddrPort, o *DialOptions) error {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := o.socket(family, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	if o.Source.IsValid() {
		if err := l.dialling.bind(fd, o.Source); err != nil {
			closeFD(int32(fd))
			return os.NewSyscallError("bind", err)
		}
	}
	o.KeepAlive.set(&l.dialling, fd)
	l.dialling.set(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // cannot fail
	return l.dial(t, c, fd, l.dialling.connect(fd, to), o)
}

// DialUnix is Dial for a unix socket. It does not wait for room in the listener's queue,
// as connect(2) does not for sockets that do not block: EAGAIN.
func (l *Loop) DialUnix(t *task.Task, c *Conn, path string, o *DialOptions) error {
	fd, err := o.socket(unix.AF_UNIX, 0)
	if err != nil {
		return err
	}
	return l.dial(t, c, fd, unix.Connect(fd, &unix.SockaddrUnix{Name: path}), o)
}

// socket returns one that the connection may have.
func (o *DialOptions) socket(family, protocol int) (fd int, err error) {
	fd, errno := socket(family, protocol)
	if errno == 0 && o.MayHave != nil && !o.MayHave(fd) {
		closeFD(int32(fd))
		errno = unix.EMFILE
	}
	if errno != 0 {
		return -1, os.NewSyscallError("socket", errno)
	}
	return fd, nil
}

// dial takes fd over, of which connect has said err.
func (l *Loop) dial(t *task.Task, c *Conn, fd int, err error, o *DialOptions) error {
	if err != nil && err != unix.EINPROGRESS {
		closeFD(int32(fd))
		return os.NewSyscallError("connect", err)
	}
	if err := l.Adopt(c, fd, nil, o.Traffic); err != nil {
		closeFD(int32(fd))
		return err
	}
	err = c.connected(t, o.Until)
	if err == nil && len(o.First) > 0 {
		err = c.Send(t, o.First, nil, nil)
	}
	if err == nil && o.TLS != nil {
		if err = c.Handshake(t, o.TLS, false); err != nil {
			err = &HandshakeError{err}
		}
	}
	if err != nil {
		c.Close()
		return err
	}
	c.Limit(time.Time{})
	c.Own(o.Owner)
	return nil
}

// connected waits until the connection is made. It is writable then, or broken.
func (c *Conn) connected(t *task.Task, until time.Time) error {
	c.Limit(until)
	err := c.await(t, poller.Writable)
	c.end()
	if err != nil {
		return err
	}
	if c.known&(poller.Error|poller.Hup) == 0 {
		return nil
	}
	errno, err := unix.GetsockoptInt(int(c.fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = unix.Errno(errno)
	}
	return os.NewSyscallError("connect", err)
}

func (k *KeepAlive) set(d *dialling, fd int) {
	if k.Idle <= 0 {
		return
	}
	// What the kernel refuses it has a value of its own for.
	d.set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle/time.Second))
	d.set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval/time.Second))
	d.set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Count)
	d.set(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	d.set(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
}
