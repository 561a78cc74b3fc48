package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

func openUnix(cfg config.Socket) (*Socket, error) {
	path := cfg.Address.Path
	if err := control.RemoveStale(path); err != nil {
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
