package supervisor

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/filewatch"
)

// overridesPoll is how often the file with overrides is looked at. It is believed when two
// looks in a row have found the same: then it was not written to in between. The kernel could
// tell of changes as well (inotify), but not behind symbolic links that are exchanged, nor on
// network file systems, nor of a directory that is not there yet; a look costs 2 µs.
const overridesPoll = 250 * time.Millisecond

// watchedFile is a file with overrides that is looked at again and again.
type watchedFile struct {
	path  string
	seen  filewatch.Signature // at the last look
	taken filewatch.Signature // when it was read last
}

// look says whether there is news, and what the file says then. A file that is not there
// overrides nothing.
func (f *watchedFile) look() (values map[string]float64, err error, news bool) {
	now := filewatch.SignatureOf(f.path)
	rests := now == f.seen
	f.seen = now
	if !rests || now == f.taken {
		return nil, nil, false
	}
	values, err = readOverrides(f.path)
	if filewatch.SignatureOf(f.path) != now {
		return nil, nil, false // another one, which is seen next
	}
	f.taken = now
	return values, err, true
}

func readOverrides(path string) (map[string]float64, error) {
	data, err := config.ReadOverrides(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return config.ParseOverrides(path, data)
}

// overridesOf returns what the file of r says, where that is another one than so far, and nil
// otherwise. If it cannot be read it overrides nothing.
func (s *Supervisor) overridesOf(r *release) *fileOverrides {
	path, same := r.config.Runtime.File, false
	s.do(func() { same = s.overrides.file.path == path })
	if same {
		return nil
	}
	f := &fileOverrides{path: path}
	if path == "" {
		return f
	}
	f.taken = filewatch.SignatureOf(path)
	var err error
	if f.values, err = readOverrides(path); err != nil {
		f.problem = err.Error()
	}
	return f
}

// installOverrides has the file of what p serves followed. Called in the loop.
func (s *Supervisor) installOverrides(p *plan) {
	o := &s.overrides
	path := p.release.config.Runtime.File
	for _, g := range s.living {
		g.file = nil
	}
	if o.file.path != path {
		o.file = fileOverrides{path: path} // it is read in a moment
		if p.overrides != nil {
			o.file = *p.overrides
			s.tellOfFile(o.file.taken, o.file.problem)
		}
		s.overridesChanged()
	}
	if o.watched == path || s.stopping {
		return
	}
	if o.unwatch != nil {
		o.unwatch()
		o.unwatch = nil
	}
	o.watched = path
	if path == "" {
		return
	}
	var ctx context.Context
	ctx, o.unwatch = context.WithCancel(s.work)
	f := &watchedFile{path: path, taken: o.file.taken}
	s.workers.Go(func() { s.watchOverrides(ctx, f) })
}

// watchOverrides has what the file says hold, from now on until ctx ends.
func (s *Supervisor) watchOverrides(ctx context.Context, f *watchedFile) {
	for sleep(ctx, overridesPoll) {
		values, err, news := f.look()
		if !news {
			continue
		}
		taken := false
		s.do(func() { taken = s.takeFile(ctx, f, values, err) })
		if !taken {
			f.taken = filewatch.Signature{} // once more
		}
	}
}

// takeFile has the file say something else from now on. It says false if that must wait.
// Called in the loop.
func (s *Supervisor) takeFile(ctx context.Context, f *watchedFile, values map[string]float64, problem error) bool {
	if s.upgrading != nil {
		return false // what is set now might be lost
	}
	o := &s.overrides
	if ctx.Err() != nil || s.succeeded || o.file.path != f.path {
		return true
	}
	o.file.taken, o.file.problem = f.taken, ""
	if problem != nil {
		o.file.problem = problem.Error()
	}
	s.tellOfFile(f.taken, o.file.problem)
	if problem != nil || maps.Equal(values, o.file.values) {
		return true
	}
	o.file.values = values
	s.log.Info("the file with runtime values overrides others now", "path", f.path, "keys", len(values))
	s.overridesChanged()
	return true
}

// tellOfFile counts and logs what has been read. Called in the loop.
func (s *Supervisor) tellOfFile(taken filewatch.Signature, problem string) {
	switch {
	case problem != "":
		s.stats.overridesRefused.Inc()
		s.log.Error("the file with runtime values is of no use: what it said before holds", "err", problem)
	case taken.IsThere():
		s.stats.overridesLoaded.Inc()
	}
}
