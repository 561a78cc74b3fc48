package service

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// prepare makes the runtime directory and refuses one in which somebody else
// could put a socket in place of ours.
func prepare(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	info, err := os.Stat(dir) // systemd's may be a symbolic link
	if err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	switch {
	case owner != os.Geteuid():
		return fmt.Errorf("runtime directory %s: belongs to user %d, and this is user %d", dir, owner, os.Geteuid())
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("runtime directory %s: mode %04o lets others write to it; chmod go-w it", dir, info.Mode().Perm())
	}
	return nil
}

// acquire takes the lock of the runtime directory for as long as the file is open.
// It is never unlocked explicitly: that would unlock every copy of the descriptor,
// also one that another process was given. The file stays, since a lock on a file
// that was removed excludes nobody.
func acquire(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600) // Go adds O_CLOEXEC
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = flock(lock)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		holder, _ := io.ReadAll(io.LimitReader(lock, 32)) // empty while it starts
		err = fmt.Errorf("another supervisor (pid %s) runs with this runtime directory: %s", strings.TrimSpace(string(holder)), dir)
		return nil, errors.Join(err, lock.Close())
	}
	if err == nil {
		err = lock.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(lock, os.Getpid())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock: %w", err), lock.Close())
	}
	return lock, nil
}

func flock(file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if outer := raw.Control(func(fd uintptr) {
		err = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB)
	}); outer != nil {
		return outer
	}
	return err
}
