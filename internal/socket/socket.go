// Package socket opens the listening sockets of a configuration and knows what can
// be changed on one that is open.
//
// A [Socket] is a plain descriptor: nobody here accepts from it, so it stays out
// of Go's network poller, and it crosses to another process by SCM_RIGHTS. It is
// always non-blocking; every process that has it shares that flag.
package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
)

// backlog is cut by the kernel to net.core.somaxconn.
const backlog = 65535

// ErrNeedsNewSocket is wrapped by what [Socket.CanBecome] refuses.
var ErrNeedsNewSocket = errors.New("needs a new socket")

// Socket is an open listening socket. Its methods must not run concurrently.
type Socket struct {
	cfg   config.Socket
	fd    int
	inode fs.FileInfo // of a unix socket's path, to unlink no other's
}

// Open opens the socket that cfg describes. ours are those that are open already:
// where one of them overlaps (0.0.0.0:80 with 127.0.0.1:80) both are let in on
// the port, which no other process is. One that systemd keeps is taken from inherited.
func Open(cfg config.Socket, ours []*Socket, inherited *Inherited) (*Socket, error) {
	s, err := open(cfg, ours, inherited)
	if err != nil {
		return nil, fmt.Errorf("listener %q: %s: %w", cfg.Name, cfg.Address.Key(), err)
	}
	return s, nil
}

func open(cfg config.Socket, ours []*Socket, inherited *Inherited) (*Socket, error) {
	switch cfg.Address.Network {
	case "unix":
		return openUnix(cfg)
	case "systemd":
		return inherited.open(cfg)
	}
	return openTCP(cfg, ours)
}

// newSocket makes a socket and sets it up; a plain TCP one, where Go's net would
// make Multipath TCP.
func newSocket(family int, cfg config.Socket) (*Socket, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	return &Socket{cfg: cfg, fd: fd}, nil
}

func openTCP(cfg config.Socket, ours []*Socket) (*Socket, error) {
	ip := cfg.Address.IP
	family := unix.AF_INET
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(ip.Port()), Addr: as4(ip.Addr())}
	if ip.Addr().Is6() {
		family = unix.AF_INET6
		to = &unix.SockaddrInet6{Port: int(ip.Port()), Addr: ip.Addr().As16()}
	}
	s, err := newSocket(family, cfg)
	if err != nil {
		return nil, err
	}
	// A port in TIME_WAIT of connections that are over can be taken again.
	err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil && family == unix.AF_INET6 {
		err = unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, flag(cfg.IPv6Only))
	}
	if err == nil {
		err = s.bindAmong(to, ours)
	}
	if err != nil {
		return nil, errors.Join(explain(err), unix.Close(s.fd))
	}
	return s, nil
}

// bindAmong binds and listens. The kernel refuses a wildcard beside a specific
// address unless both sockets have SO_REUSEPORT. Only while binding beside one of
// our own do they have it: left on, it would let a second supervisor of the same
// user take half of the connections without anybody noticing.
func (s *Socket) bindAmong(to unix.Sockaddr, ours []*Socket) error {
	err := s.bindListen(to)
	if !errors.Is(err, unix.EADDRINUSE) {
		return err
	}
	beside := overlapping(s.cfg, ours)
	if len(beside) == 0 {
		return err
	}
	all := append(beside, s)
	defer setReusePort(all, 0)
	if err := setReusePort(all, 1); err != nil {
		return err
	}
	return s.bindListen(to)
}

func (s *Socket) bindListen(to unix.Sockaddr) error {
	if err := unix.Bind(s.fd, to); err != nil {
		return err
	}
	return unix.Listen(s.fd, backlog)
}

func setReusePort(all []*Socket, on int) error {
	for _, s := range all {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, on); err != nil {
			return fmt.Errorf("SO_REUSEPORT: %w", err)
		}
	}
	return nil
}

// overlapping returns those of ours that have the port on another address, or had it
// chosen by the kernel.
func overlapping(cfg config.Socket, ours []*Socket) []*Socket {
	var beside []*Socket
	for _, o := range ours {
		if o.cfg.Address.Network == "tcp" && o.cfg.Address != cfg.Address && o.port() == cfg.Address.IP.Port() {
			beside = append(beside, o)
		}
	}
	return beside
}

// port is that of a TCP socket.
func (s *Socket) port() uint16 {
	at, _ := netip.ParseAddrPort(s.Address())
	return at.Port()
}

// explain adds what the person can do.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("another process has taken it (%w)", err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("not permitted: a port below 1024 needs the capability CAP_NET_BIND_SERVICE (%w)", err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("this machine has no such address (%w)", err)
	}
	return err
}

func as4(a netip.Addr) [4]byte {
	if a.Is4() {
		return a.As4()
	}
	return [4]byte{}
}

func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

// FD returns the descriptor; the socket keeps owning it.
func (s *Socket) FD() int { return s.fd }

// Listen makes the socket listen if it does not. shutdown(2) in one of the processes
// that have it stops it for all of them. A TCP socket that was bound to a port keeps it
// and can go on; a unix one cannot.
func (s *Socket) Listen() error {
	if s.cfg.Address.Network == "systemd" && listens(s.fd) {
		return nil // with the Backlog= of its unit
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return fmt.Errorf("listener %q: %s: listen: %w", s.cfg.Name, s.cfg.Address.Key(), err)
	}
	return nil
}

// Config returns what the socket was opened with, or last reconfigured to.
func (s *Socket) Config() config.Socket { return s.cfg }

// Address returns where the socket is bound: for port 0, with the port that the
// kernel chose; for one of systemd's, where its unit has bound it.
func (s *Socket) Address() string { return address(s.fd) }

// address is where fd is bound, in the canonical form.
func address(fd int) string {
	at, err := unix.Getsockname(fd)
	switch at := at.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(at.Addr), uint16(at.Port)).String()
	case *unix.SockaddrUnix:
		return "unix:" + at.Name
	}
	return fmt.Sprintf("unknown (%v)", err)
}

// CanBecome says whether the open socket can be what cfg, of the same key, wants:
// the name and a unix socket's mode can change, anything else cannot.
func (s *Socket) CanBecome(cfg config.Socket) error {
	if s.cfg.IPv6Only != cfg.IPv6Only {
		return fmt.Errorf("listener %q: %s: changing ipv6_only %w: remove the listener in one reload and add it in the next",
			cfg.Name, cfg.Address.Key(), ErrNeedsNewSocket)
	}
	return nil
}

// Reconfigure makes the socket what cfg wants, where CanBecome allows it.
func (s *Socket) Reconfigure(cfg config.Socket) error {
	if cfg.Address.Network == "unix" && cfg.Mode != s.cfg.Mode {
		if err := os.Chmod(cfg.Address.Path, fs.FileMode(cfg.Mode)); err != nil {
			return fmt.Errorf("listener %q: %w", cfg.Name, err)
		}
	}
	s.cfg = cfg
	return nil
}

// Close gives up this process's share. While another process has a duplicate the
// socket goes on listening there. A unix socket's path is removed, unless it is
// somebody else's by now.
func (s *Socket) Close() error {
	var err error
	if s.inode != nil {
		if now, lerr := os.Lstat(s.cfg.Address.Path); lerr == nil && os.SameFile(now, s.inode) {
			err = os.Remove(s.cfg.Address.Path)
		}
	}
	return errors.Join(err, unix.Close(s.fd))
}
