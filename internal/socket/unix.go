package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
)

func openUnix(cfg config.Socket) (*Socket, error) {
	path := cfg.Address.Path
	if err := RemoveStale(path); err != nil {
		return nil, err
	}
	s, err := newSocket(unix.AF_UNIX, cfg)
	if err != nil {
		return nil, err
	}
	if err := s.bindPath(path); err != nil {
		return nil, errors.Join(explain(err), s.Close())
	}
	return s, nil
}

// bindPath makes the path with its mode from the first moment on: the kernel gives
// it the mode of the unbound socket, less the umask, which Chmod then makes up for.
func (s *Socket) bindPath(path string) error {
	if err := unix.Fchmod(s.fd, s.cfg.Mode); err != nil {
		return fmt.Errorf("mode: %w", err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	var err error
	if s.inode, err = os.Lstat(path); err != nil {
		return err
	}
	if err := os.Chmod(path, fs.FileMode(s.cfg.Mode)); err != nil {
		return err
	}
	return unix.Listen(s.fd, backlog)
}

// RemoveStale removes a unix socket that nobody listens on: what a process that was
// killed has left. Only a refused connection proves that; anything else at the path
// is an error. It does not block.
func RemoveStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("the path exists and is no socket")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%w: another process listens there", unix.EADDRINUSE)
	}
	return os.Remove(path)
}
