package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// accessLogs are the opened files of a release. Its generations write to duplicates
// of them, each record with one append, so that they can share a file. The
// supervisor opens them: a generation needs no right to any path, and a crash is
// mended although a path cannot be opened any more.
type accessLogs struct {
	mu     sync.Mutex // held for moments only: no file is opened or closed under it
	files  map[string]*os.File
	closed bool
}

// open opens every file that is configured. The error is a *Refusal, and nothing is
// open then.
func (a *accessLogs) open(configured []config.AccessLog) error {
	files := make(map[string]*os.File)
	var problems []error
	for _, l := range configured {
		if l.Path == config.Stdout {
			continue // every generation has it
		}
		f, err := openAppending(l.Path, unix.O_CREAT)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		files[l.Path] = f
	}
	if len(problems) > 0 {
		return refuse("access logs", errors.Join(append(problems, closeFiles(files))...))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.files = files
	return nil
}

// reunite opens the files again of a release that came back without them. The error is a *Refusal.
func (a *accessLogs) reunite(configured []config.AccessLog) error {
	a.mu.Lock()
	has := a.files != nil
	a.mu.Unlock()
	if has {
		return nil
	}
	return a.open(configured)
}

// appendFlags are those of a file that records are appended to. Of a FIFO they let nobody
// wait for a reader: without one it cannot be opened.
const appendFlags = unix.O_APPEND | unix.O_NONBLOCK

func openAppending(path string, create int) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOCTTY|appendFlags|create, 0o640)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("open %s: it is a FIFO that nobody reads, a socket, or a device that is not there", path)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// probeAccessLogs says whether open would succeed, and makes no file. The error is a
// *Refusal.
func probeAccessLogs(configured []config.AccessLog) error {
	var problems []error
	for _, l := range configured {
		if l.Path == config.Stdout {
			continue
		}
		f, err := openAppending(l.Path, 0)
		if err == nil {
			err = f.Close()
		}
		if errors.Is(err, os.ErrNotExist) {
			err = nil
			if missing := unix.Access(filepath.Dir(l.Path), unix.W_OK|unix.X_OK); missing != nil {
				err = &os.PathError{Op: "create", Path: l.Path, Err: missing}
			}
		}
		problems = append(problems, err)
	}
	if err := errors.Join(problems...); err != nil {
		return refuse("access logs", err)
	}
	return nil
}

func (a *accessLogs) close() error {
	a.mu.Lock()
	files := a.files
	a.files, a.closed = nil, true
	a.mu.Unlock()
	return closeFiles(files)
}

func closeFiles(files map[string]*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// add puts a descriptor that came back under its path.
func (a *accessLogs) add(path string, fd int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.files == nil {
		a.files = make(map[string]*os.File)
	}
	a.files[path] = os.NewFile(uintptr(fd), path)
}

// reopen opens every path again. One that cannot be opened keeps its old file.
func (a *accessLogs) reopen() error {
	var paths []string
	a.mu.Lock()
	for path := range a.files {
		paths = append(paths, path)
	}
	a.mu.Unlock()
	var errs []error
	for _, path := range paths {
		f, err := openAppending(path, unix.O_CREAT)
		if err == nil {
			err = a.swap(path, f).Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// swap puts f in the place of a path's old file, which it returns; or f, if nobody
// needs it any more.
func (a *accessLogs) swap(path string, f *os.File) (old *os.File) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return f
	}
	old, a.files[path] = a.files[path], f
	return old
}

// duplicates returns descriptors of the files, by path, which the caller closes. A
// generation can change the flags of what it has been given, and they belong to all
// duplicates (open(2)): so they are set again.
func (a *accessLogs) duplicates() (fds map[string]int, err error) {
	fds = make(map[string]int)
	a.mu.Lock()
	defer a.mu.Unlock()
	for path, f := range a.files {
		raw, err := f.SyscallConn()
		if err == nil {
			err = errors.Join(raw.Control(func(fd uintptr) {
				if _, err = unix.FcntlInt(fd, unix.F_SETFL, appendFlags); err == nil {
					fds[path], err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
				}
			}), err)
		}
		if err != nil {
			control.CloseNamed(fds)
			return nil, fmt.Errorf("access log %s: %w", path, err)
		}
	}
	return fds, nil
}

// handLogs gives g the access logs of its release.
func (g *generation) handLogs(send sender) error {
	fds, err := g.release.logs.duplicates()
	if err != nil || len(fds) == 0 {
		return err
	}
	defer control.CloseNamed(fds)
	if err := control.SendFiles(control.TypeLogs, fds, send); err != nil {
		return err
	}
	kept := make(map[string]int)
	for path, fd := range fds {
		kept[control.KeptLog+path] = fd
	}
	return control.SendFiles(control.TypeKeep, kept, g.send)
}

// ReopenLogs implements [Commands].
func (s *Supervisor) ReopenLogs(ctx context.Context) error {
	var releases []*release
	if err := s.change(ctx, func() {
		for _, g := range s.living {
			releases = append(releases, g.release)
		}
		for _, r := range []*release{s.pinned, s.previous, s.planned} {
			if r != nil {
				releases = append(releases, r)
			}
		}
	}); err != nil {
		return err
	}
	began := time.Now()
	var problems []error
	for i, r := range releases {
		if !slices.Contains(releases[:i], r) {
			problems = append(problems, r.logs.reopen())
		}
	}
	// Who is started from now on has the new files.
	told, err := s.tellAll(ctx, "its access logs", (*generation).handLogs)
	if err = errors.Join(append(problems, err)...); err != nil {
		s.stats.reopenFailures.Inc()
		s.log.Error("access logs are not all opened again", "err", err)
		return err
	}
	s.stats.reopened.Inc()
	s.log.Info("access logs are opened again", "generations", told, "took", time.Since(began))
	return nil
}
