// Package filewatch notices when files have changed that are used while a process runs, and has
// them read again. Files that mean something only together, as a certificate and its key, are
// read together:
//
//	w := filewatch.New([]filewatch.Files{{Paths: []string{cert, key}, Take: take, Refuse: refuse}}, filewatch.World{})
//	// read them for the first time
//	w.Run(ctx)
//
// The kernel tells of changes in the directories (inotify). It tells nothing of network file
// systems, nor of symbolic links that lead elsewhere: so files are looked at from time to time, too.
package filewatch

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// poll is how often files are looked at that nothing is heard of.
	poll = 5 * time.Second

	// rest is how long files must have stayed as they are before they are read.
	rest = 100 * time.Millisecond

	// Patience is how long files may be of no use until that is a fault: they may be replaced one
	// after the other.
	Patience = 5 * time.Second
)

// Files are read together. Their functions are called by [Watcher.Run] alone.
type Files struct {
	Paths []string

	// Take reads the files. With an error nothing has changed; it is called again when the files
	// have.
	Take func() error

	// Refuse hears of Take's error when the files have been of no use for [Patience], once for
	// each state of theirs.
	Refuse func(error)
}

// World is the outside. What is zero is the host's own.
type World struct {
	// Watch calls tell whenever something may have changed in one of the directories. It returns
	// when ctx is done, or when one of the directories is to be looked for again.
	Watch func(ctx context.Context, directories []string, tell func())
}

// Watcher watches files. What is not set once is Run's.
type Watcher struct {
	world World
	files []watched
	looks func() // after each round of looks; nil: nobody wants to know
}

type watched struct {
	Files
	seen  []signature // at the last look
	taken []signature // when they were read last
	since time.Time   // they have been of no use, zero: they are of use, or it has been said
	err   error       // why
}

// signature is what a file looks like from outside. Nothing can be written to it without a change
// of this, once the clock of the file system has gone on.
type signature struct {
	err          syscall.Errno // 0: it is there
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func signatureOf(path string) signature {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		errno, _ := errors.AsType[syscall.Errno](err)
		return signature{err: errno}
	}
	return signature{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

func (w *watched) look() []signature {
	all := make([]signature, len(w.Paths))
	for i, path := range w.Paths {
		all[i] = signatureOf(path)
	}
	return all
}

// New looks at the files, which are to be read after that for the first time: no change is
// missed that comes in between. looked, where it is not nil, is called by Run after each look at
// all of them, which is every few seconds.
func New(files []Files, world World, looked func()) *Watcher {
	w := &Watcher{world: world, looks: looked}
	if w.world.Watch == nil {
		w.world.Watch = watchDirectories
	}
	for _, f := range files {
		one := watched{Files: f}
		one.seen = one.look()
		one.taken = one.seen
		w.files = append(w.files, one)
	}
	return w
}

// Run watches until ctx is done.
func (w *Watcher) Run(ctx context.Context) {
	if len(w.files) == 0 {
		return
	}
	directories := w.directories()
	changed := make(chan struct{}, 1)
	watching := make(chan struct{})
	begin := func() {
		stopped := make(chan struct{})
		watching = stopped
		go func() {
			defer close(stopped)
			w.world.Watch(ctx, directories, func() {
				select {
				case changed <- struct{}{}:
				default:
				}
			})
		}()
	}
	begin()
	defer func() { <-watching }()
	timer := time.NewTimer(rest) // what happened before the directories were watched is seen by a look
	defer timer.Stop()
	soon := true
	for {
		select {
		case <-changed:
			if !soon { // otherwise a directory that always changes would put it off for ever
				timer.Reset(rest)
				soon = true
			}
			continue
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		select {
		case <-watching:
			begin() // there may be a directory now
		default:
		}
		wait := poll
		now := time.Now()
		for i := range w.files {
			wait = min(wait, w.files[i].visit(now))
		}
		if w.looks != nil {
			w.looks()
		}
		timer.Reset(wait)
		soon = wait <= rest
	}
}

// directories are those that the files are in, each once.
func (w *Watcher) directories() (all []string) {
	for i := range w.files {
		for _, path := range w.files[i].Paths {
			all = append(all, directoryOf(path))
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
		err := w.Take()
		if !slices.Equal(w.look(), seen) {
			return rest // what was read may be of two states
		}
		w.taken, w.err = seen, err
		if err != nil && w.since.IsZero() {
			w.since = now
		}
	}
	if w.err == nil {
		w.since = time.Time{}
		return poll
	}
	if w.since.IsZero() {
		return poll
	}
	if left := Patience - now.Sub(w.since); left > 0 {
		return left
	}
	w.since = time.Time{}
	w.Refuse(w.err)
	return poll
}
