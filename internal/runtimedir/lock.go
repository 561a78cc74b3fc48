package runtimedir

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockPatience is how long a lock that is held is tried for, every lockPause.
const (
	lockPatience = 200 * time.Millisecond
	lockPause    = 5 * time.Millisecond
)

// Lock is what the one supervisor of a runtime directory holds, for as long as it
// or anybody with a duplicate of the descriptor lives. It is never unlocked
// explicitly: that would unlock every duplicate.
type Lock struct{ file *os.File }

// HeldError says that another supervisor has the lock.
type HeldError struct {
	PID  string // of it, "" while it starts
	Path string // of the runtime directory
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("another supervisor (pid %s) runs with this runtime directory: %s", e.PID, e.Path)
}

// Lock takes the lock, or returns a *HeldError. Whoever has it is the only one who
// writes to the directory: what others have left half done is removed. The file stays
// for ever, since a lock on a file that was removed excludes nobody.
func (d *Dir) Lock() (*Lock, error) {
	file, err := os.OpenFile(d.file("lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600) // Go adds O_CLOEXEC
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	l := &Lock{file}
	err = flock(file)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, errors.Join(&HeldError{PID: l.signature(), Path: d.path}, file.Close())
	}
	if err == nil {
		err = l.Sign()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock: %w", err), file.Close())
	}
	d.tidy()
	return l, nil
}

// InheritLock takes over a duplicate of the descriptor of a predecessor's lock, also
// when it fails. The file goes on saying the predecessor's number until Sign.
func InheritLock(fd int, d *Dir) (*Lock, error) {
	file := os.NewFile(uintptr(fd), "lock")
	if file == nil {
		return nil, fmt.Errorf("inherit the lock: no descriptor %d", fd)
	}
	ours, err := file.Stat()
	if err == nil {
		var there os.FileInfo
		if there, err = os.Lstat(d.file("lock")); err == nil && !os.SameFile(ours, there) {
			err = errors.New("it is another file's")
		}
	}
	if err == nil {
		err = flock(file) // one that is held by the same open file already
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("inherit the lock: descriptor %d: %w", fd, err), file.Close())
	}
	return &Lock{file}, nil
}

// Sign writes the number of this process into the file, for those who find it locked.
func (l *Lock) Sign() error {
	text := fmt.Sprintln(os.Getpid())
	if _, err := l.file.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	return l.file.Truncate(int64(len(text)))
}

func (l *Lock) signature() string {
	text, _ := io.ReadAll(io.NewSectionReader(l.file, 0, 32)) // empty while its holder starts
	return strings.TrimSpace(string(text))
}

// FD is the descriptor, for a successor. It stays l's.
func (l *Lock) FD() int {
	fd := -1
	if raw, err := l.file.SyscallConn(); err == nil {
		raw.Control(func(n uintptr) { fd = int(n) }) // an error is that it is closed
	}
	return fd
}

// Close gives the lock up, unless somebody has a duplicate.
func (l *Lock) Close() error { return l.file.Close() }

// flock waits a moment: what a killed supervisor was just starting has duplicates of all
// its descriptors, until it executes its program.
func flock(file *os.File) error {
	for give := time.Now().Add(lockPatience); ; time.Sleep(lockPause) {
		if err := tryFlock(file); !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(give) {
			return err
		}
	}
}

func tryFlock(file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if outer := raw.Control(func(fd uintptr) {
		err = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB)
	}); outer != nil {
		return outer
	}
	return err
}
