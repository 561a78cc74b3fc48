package servertls

import (
	"errors"
	"os"
	"syscall"
)

// openKeyLog opens the file for secrets, if there is to be one. Nobody else may read it, not even
// what others have put in its place.
func (s *Server) openKeyLog() error {
	path := s.o.Config.KeyLog
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = errors.New("it is no regular file")
	case info.Mode().Perm()&0o077 != 0:
		err = errors.New("others may read it or write to it; chmod 600, or remove it")
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s.keyLog = f
	return nil
}
