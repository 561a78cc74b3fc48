package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
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
	mu    sync.Mutex // held while descriptors are sent, so that none is closed under way
	files map[string]*os.File
}

// open opens every file that is configured. The error is a *Refusal, and nothing is
// open then.
func (a *accessLogs) open(configured []config.AccessLog) error {
	a.files = make(map[string]*os.File)
	var problems []error
	for _, l := range configured {
		if l.Path == config.Stdout {
			continue // every generation has it
		}
		f, err := openAppending(l.Path)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		a.files[l.Path] = f
	}
	if len(problems) == 0 {
		return nil
	}
	return refuse("access logs", errors.Join(append(problems, a.close())...))
}

// openAppending opens a file that records are appended to, and makes it if it is not
// there. It does not wait for a reader of a FIFO: without one it fails.
func openAppending(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0o640)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("open %s: nobody reads this FIFO", path)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (a *accessLogs) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, f := range a.files {
		errs = append(errs, f.Close())
	}
	a.files = nil
	return errors.Join(errs...)
}

// reopen opens every path again. One that cannot be opened keeps its old file.
func (a *accessLogs) reopen() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for path, old := range a.files {
		f, err := openAppending(path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		a.files[path] = f
		errs = append(errs, old.Close())
	}
	return errors.Join(errs...)
}

// send hands duplicates of the files to a generation, by path.
func (a *accessLogs) send(g *generation) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.files) == 0 {
		return nil
	}
	fds := make(map[string]int, len(a.files))
	for path, f := range a.files {
		raw, err := f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[path] = int(fd) }) // stays open: mu is held
		}
		if err != nil {
			return err
		}
	}
	return g.sendDescriptors(control.TypeLogs, fds)
}

// ReopenLogs implements [Commands].
func (s *Supervisor) ReopenLogs(ctx context.Context) error {
	var all []*generation
	var releases []*release
	if err := s.try(ctx, func() {
		all = s.newestFirst()
		for _, g := range all {
			releases = append(releases, g.release)
		}
		if s.pinned != nil {
			releases = append(releases, s.pinned)
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
	results := make(chan error)
	for _, g := range all {
		go func() {
			err := g.release.logs.send(g)
			if err != nil {
				err = fmt.Errorf("generation %d goes on with its old access logs: %w", g.number, err)
			}
			results <- err
		}()
	}
	for range all {
		problems = append(problems, <-results)
	}
	err := errors.Join(problems...)
	if err != nil {
		s.stats.reopenFailures.Inc()
		s.log.Error("access logs are not all opened again", "err", err)
		return err
	}
	s.stats.reopened.Inc()
	s.log.Info("access logs are opened again", "generations", len(all), "took", time.Since(began))
	return ctx.Err()
}
