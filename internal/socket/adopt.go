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

// Adopt takes over a listening socket that comes back from a process that had it: a
// generation, a predecessor, systemd's descriptor store. It believes nobody: fd must
// be what [Open] would make of cfg, apart from the port where the kernel chooses it.
// What can be set on it again is. fd is the Socket's from now on; it is closed if
// there is an error.
func Adopt(cfg config.Socket, fd int) (*Socket, error) {
	s := &Socket{cfg: cfg, fd: fd}
	if err := s.adopt(); err != nil {
		// Not s.Close: the path of a unix socket stays, with the others who have it.
		return nil, errors.Join(fmt.Errorf("listener %q: %s: what came back: %w", cfg.Name, cfg.Address.Key(), err), unix.Close(fd))
	}
	return s, nil
}

func (s *Socket) adopt() error {
	kind, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_STREAM {
		return errors.Join(errors.New("no stream socket"), err)
	}
	if _, err := unix.FcntlInt(uintptr(s.fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return err
	}
	if err := unix.SetNonblock(s.fd, true); err != nil {
		return err
	}
	switch s.cfg.Address.Network {
	case "unix":
		return s.adoptUnix()
	case "systemd":
		return unfit(s.fd)
	}
	return s.adoptTCP()
}

func (s *Socket) adoptTCP() error {
	if protocol, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || protocol != unix.IPPROTO_TCP {
		return errors.Join(errors.New("no TCP socket"), err)
	}
	want := s.cfg.Address.IP
	at, err := netip.ParseAddrPort(address(s.fd))
	if err != nil || at.Addr() != want.Addr() || at.Port() == 0 || want.Port() != 0 && at.Port() != want.Port() {
		return fmt.Errorf("a socket at %s", address(s.fd))
	}
	if want.Addr().Is6() && want.Addr().IsUnspecified() { // others have it always
		only, err := unix.GetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil || only != flag(s.cfg.IPv6Only) {
			return errors.Join(fmt.Errorf("a socket with another ipv6_only %w", ErrNeedsNewSocket), err)
		}
	}
	// A process that was killed in bindAmong has left it on.
	if err := setReusePort([]*Socket{s}, 0); err != nil {
		return err
	}
	return unix.Listen(s.fd, backlog) // refuses one that is connected; goes on with one that was shut down
}

// adoptUnix finds out whether it is this socket that the path leads to: by its name
// alone it may be another that was bound there since. What the other end of a
// connection sees as SO_PEERCRED is who called listen(2) last, and that is us if the
// connection is to this socket. The process that accepts it sees it end at once.
func (s *Socket) adoptUnix() error {
	path := s.cfg.Address.Path
	if at := address(s.fd); at != "unix:"+path {
		return fmt.Errorf("a socket at %s", at)
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return err
	}
	inode, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("a socket that nobody reaches: %w", err)
	}
	listener, err := listenerAt(path)
	switch {
	case errors.Is(err, unix.EAGAIN): // the queue is full: somebody's who listens
	case err != nil:
		return fmt.Errorf("a socket that nobody reaches: %w", err)
	case listener != os.Getpid():
		return fmt.Errorf("a socket that nobody reaches: process %d listens there", listener)
	}
	s.inode = inode
	return os.Chmod(path, fs.FileMode(s.cfg.Mode))
}

// listenerAt returns the process that has called listen(2) on the socket at path. It
// does not block.
func listenerAt(path string) (pid int, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return 0, err
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, err
	}
	return int(peer.Pid), nil
}
