// Package filewatch notices when files have changed that are used while a process runs, and has
// them read again. Files that mean something only together, as a certificate and its key, are
// read together:
//
//	w := filewatch.New(filewatch.Options{})
//	w.Add(filewatch.Files{Paths: []string{cert, key}, Read: read, Refuse: refuse, Patience: filewatch.Patience})
//	// read them for the first time
//	w.Run(ctx)
//
// The kernel tells of changes in the directories (inotify). It tells nothing of network file
// systems, nor of symbolic links that lead elsewhere: so files are looked at from time to time, too.
package filewatch

import (
	"context"
	"path/filepath"
	"slices"
	"time"
)

const (
	// poll is how often files are looked at that nothing is heard of.
	poll = 5 * time.Second

	// rest is how long files must have stayed as they are before they are read.
	rest = 100 * time.Millisecond

	// Patience is that for files which may be replaced one after the other.
	Patience = 5 * time.Second
)

// Files are read together. Their functions are called by [Watcher.Run] alone, and by
// [Watcher.Read].
type Files struct {
	Paths []string

	// Read reads the files, and says what is wrong with them, or what is to be done with them:
	// take is called unless they have changed meanwhile, when what was read may be of two states.
	Read func() (take func(), err error)

	// Refuse hears of Read's error, once for each state of the files, when they have been of no
	// use for Patience. nil: nobody wants to know.
	Refuse   func(error)
	Patience time.Duration
}

// Options say how files are watched. What is zero is the host's own, or not wanted.
type Options struct {
	// Watch calls tell whenever something may have changed in one of the directories. It returns
	// when ctx is done, or when one of the directories is to be looked for again. nil: inotify(7).
	Watch func(ctx context.Context, directories []string, tell func())

	// Looked is called after each round of looks, which is every few seconds.
	Looked func()

	// Paused says that nothing is to be looked at for now, nor to be asked of the kernel. See [Watcher.Look].
	Paused func() bool
}

// Watcher watches files. What is not set once is Run's.
type Watcher struct {
	o     Options
	files []*watched
	soon  chan struct{} // has room for one: something may have changed
}

type watched struct {
	Files
	seen  []Signature // at the last look
	taken []Signature // when they were read last
	since time.Time   // they have been of no use, zero: they are of use, or it has been said
	err   error       // why
}

func (w *watched) look() []Signature {
	all := make([]Signature, len(w.Paths))
	for i, path := range w.Paths {
		all[i] = SignatureOf(path)
	}
	return all
}

// New returns one that watches nothing yet.
func New(o Options) *Watcher {
	if o.Watch == nil {
		o.Watch = watchDirectories
	}
	return &Watcher{o: o, soon: make(chan struct{}, 1)}
}

// Add has files watched when Run is called, which must be later. It looks at them: they are to be
// read after that for the first time, and no change is missed that comes in between.
func (w *Watcher) Add(f Files) {
	one := &watched{Files: f}
	one.seen = one.look()
	one.taken = one.seen
	w.files = append(w.files, one)
}

// Read reads all files at once, which is for the first time and before Run. What is in flux is left
// to Run.
func (w *Watcher) Read() {
	for _, f := range w.files {
		f.seen, f.taken = f.look(), nil
		f.visit(time.Now())
	}
}

// Look has the files looked at soon. Anybody may call it.
func (w *Watcher) Look() {
	select {
	case w.soon <- struct{}{}:
	default:
	}
}

// Run watches until ctx is done.
func (w *Watcher) Run(ctx context.Context) {
	if len(w.files) == 0 {
		return
	}
	directories := w.directories()
	watching := make(chan struct{})
	stop := func() {} // what watching is the end of
	begin := func() {
		stop()
		var within context.Context
		within, stop = context.WithCancel(ctx)
		stopped := make(chan struct{})
		watching = stopped
		go func() {
			defer close(stopped)
			w.o.Watch(within, directories, w.Look)
		}()
	}
	begin()
	defer func() { stop(); <-watching }()
	timer := time.NewTimer(rest) // what happened before the directories were watched is seen by a look
	defer timer.Stop()
	soon := true
	for {
		select {
		case <-w.soon:
			if !soon { // otherwise a directory that always changes would put it off for ever
				timer.Reset(rest)
				soon = true
			}
			continue
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		if w.paused() {
			stop() // there are few that the kernel has for all processes of a user
			timer.Reset(poll)
			soon = false
			continue
		}
		select {
		case <-watching:
			begin() // there may be a directory now, or it was paused
		default:
		}
		wait := w.round(time.Now())
		timer.Reset(wait)
		soon = wait <= rest
	}
}

func (w *Watcher) paused() bool { return w.o.Paused != nil && w.o.Paused() }

// round looks at all files, and returns how soon the next one is due.
func (w *Watcher) round(now time.Time) time.Duration {
	wait := poll
	for _, f := range w.files {
		wait = min(wait, f.visit(now))
	}
	if w.o.Looked != nil {
		w.o.Looked()
	}
	return wait
}

// directories are those that the files are in, each once.
func (w *Watcher) directories() (all []string) {
	for _, f := range w.files {
		for _, path := range f.Paths {
			all = append(all, filepath.Dir(path))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// visit has the files read if they have changed and rest. It returns how soon it wants to be called
// again.
func (w *watched) visit(now time.Time) time.Duration {
	seen := w.look()
	rests := slices.Equal(seen, w.seen)
	w.seen = seen
	if !rests {
		return rest
	}
	if !slices.Equal(seen, w.taken) {
		take, err := w.Read()
		if !slices.Equal(w.look(), seen) {
			return rest // what was read may be of two states
		}
		w.taken, w.err = seen, err
		switch {
		case err == nil:
			w.since = time.Time{}
			take()
		case w.since.IsZero():
			w.since = now
		}
	}
	if w.since.IsZero() {
		return poll
	}
	if left := w.Patience - now.Sub(w.since); left > 0 {
		return min(left, poll)
	}
	w.since = time.Time{}
	if w.Refuse != nil {
		w.Refuse(w.err)
	}
	return poll
}
