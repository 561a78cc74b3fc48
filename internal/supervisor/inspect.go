package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/logs"
)

// Config implements [Commands].
func (s *Supervisor) Config(ctx context.Context, file bool) (string, error) {
	r, err := s.releaseToShow(ctx, file)
	if err != nil {
		return "", err
	}
	defer r.close()
	return r.effective(ctx)
}

// releaseToShow returns what serves, with a binary of its own: a reload may close
// the other one meanwhile. Or it reads the file.
func (s *Supervisor) releaseToShow(ctx context.Context, file bool) (*release, error) {
	if file {
		return loadRelease(ctx, s.opts.ConfigPath, s.opts.DefaultProxy)
	}
	var shown *release
	err := errors.New("nothing has served yet")
	if gone := s.try(ctx, func() {
		now := s.pinned
		if s.serving != nil {
			now = s.serving.release
		}
		if now == nil {
			return
		}
		var fd int
		if fd, err = control.DuplicateOf(now.binary); err == nil {
			shown = &release{config: now.config, bytes: now.bytes, path: now.path, hash: now.hash, binary: os.NewFile(uintptr(fd), now.binary.Name())}
		}
	}); gone != nil {
		return nil, gone
	}
	return shown, err
}

// levelName is what a level is called, "" where none is set.
func levelName(l *slog.Level) string {
	if l == nil {
		return ""
	}
	return strings.ToLower(l.String())
}

// SetLogLevel implements [Commands].
func (s *Supervisor) SetLogLevel(ctx context.Context, level string) error {
	var set *slog.Level
	if level != "config" {
		known, err := logs.ParseLevel(level)
		if err != nil {
			return fmt.Errorf("%w; \"config\" takes it from the configuration", err)
		}
		set = &known
	}
	if err := s.change(ctx, func() {
		s.level = set
		s.note()
		if s.serving != nil {
			s.opts.ApplyLog(s.logOf(s.serving.release))
		}
	}); err != nil {
		return err
	}
	s.log.Warn("the log level was set by command", "level", level)
	_, err := s.tellAll(ctx, "the log level", s.handLevel)
	return err
}

// tellAll has every living generation told something, and waits until it has
// confirmed that; told is how many there are. One that is starting cannot confirm
// anything yet.
func (s *Supervisor) tellAll(ctx context.Context, what string, tell func(*generation, sender) error) (told int, err error) {
	by := make(map[*generation]sender)
	if err := s.try(ctx, func() {
		for _, g := range s.living {
			if ch, _ := g.channel(); ch == (unattached{}) {
				continue // it is told when it is adopted
			}
			by[g] = g.asking(ctx)
			if g.state == starting {
				by[g] = g.send
			}
		}
	}); err != nil {
		return 0, err
	}
	errs := make(chan error)
	for g, send := range by {
		go func() {
			err := tell(g, send)
			if err != nil {
				err = fmt.Errorf("generation %d has not confirmed %s: %w", g.number, what, err)
			}
			errs <- err
		}()
	}
	var all []error
	for range by {
		all = append(all, <-errs)
	}
	return len(by), errors.Join(all...)
}

// logOf is what r says about the log, with the level that was set by command. Called
// in the loop.
func (s *Supervisor) logOf(r *release) config.Log {
	l := r.config.Log
	if s.level != nil {
		l.Level = *s.level
	}
	return l
}

// handLevel tells g at which level to log.
func (s *Supervisor) handLevel(g *generation, send sender) error {
	m := &control.Message{Type: control.TypeLevel}
	s.do(func() { m.Level = strings.ToLower(s.logOf(g.release).Level.String()) })
	return send(m)
}

// profileMargin is how much longer than the time that it covers a profile may take.
const profileMargin = 10 * time.Second

// Profile implements [Commands].
func (s *Supervisor) Profile(ctx context.Context, number int, name string, over time.Duration) ([]byte, error) {
	var g *generation
	if err := s.try(ctx, func() { g = s.living[number] }); err != nil {
		return nil, err
	}
	if g == nil {
		return nil, notFound(number)
	}
	a, err := g.question(ctx, control.Message{Type: control.TypeProfile, Profile: name, Within: over}, over+profileMargin)
	if err != nil {
		return nil, err
	}
	if len(a.fds) != 1 {
		control.Discard(a.fds)
		return nil, fmt.Errorf("generation %d has no profile %q", number, name)
	}
	return control.ReadBytes(a.fds[0], control.MaxPayload)
}
