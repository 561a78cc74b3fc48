package discovery

import (
	"context"
	"errors"
	"io/fs"
	"reflect"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
)

const (
	// filePoll is how often a file is looked at that nothing is heard of: the kernel tells of
	// changes in its directory, but not on network file systems, nor behind symbolic links
	// that lead elsewhere, nor of a directory that is not there yet.
	filePoll = 5 * time.Second

	// fileRest is how long a file must have stayed as it is before it is read.
	fileRest = 100 * time.Millisecond
)

// signature is what a file looks like from outside. Nothing can be written to it without a
// change of this, once the clock of the file system has gone on.
type signature struct {
	known        bool
	err          syscall.Errno // 0: it is there
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func signatureOf(path string) signature {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		errno, _ := errors.AsType[syscall.Errno](err)
		return signature{known: true, err: errno}
	}
	return signature{known: true, dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// file finds the endpoints of a cluster in a file. All is done by the goroutine of run.
type file struct {
	s       *Source
	told    []Endpoint
	seen    signature // at the last look
	taken   signature // when it was read last
	problem string    // of the last time, "" for none
	settled bool
}

func newFile(s *Source) *file { return &file{s: s, told: s.o.Last} }

// begin reads the file at once: whoever writes it had the time to do so.
func (f *file) begin() []Endpoint {
	f.seen = signatureOf(f.s.o.Config.File)
	if found, ok := f.read(); ok {
		f.told, f.settled = found, true
	}
	return f.told
}

func (f *file) run(ctx context.Context) {
	path := f.s.o.Config.File
	watch := f.s.o.World.Watch
	if watch == nil {
		watch = watchDirectory
	}
	changed := make(chan struct{}, 1)
	watching := make(chan struct{})
	begin := func() {
		stopped := make(chan struct{})
		watching = stopped
		go func() {
			defer close(stopped)
			watch(ctx, path, func() {
				select {
				case changed <- struct{}{}:
				default:
				}
			})
		}()
	}
	begin()
	defer func() { <-watching }()
	if f.settled || len(f.told) > 0 {
		f.settled = true
		f.s.o.Settled()
	}
	// What happened before the directory was watched is seen by a look.
	timer := time.NewTimer(fileRest)
	defer timer.Stop()
	for {
		select {
		case <-changed:
			timer.Reset(fileRest)
			continue
		case <-f.s.resumed:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		select {
		case <-watching:
			begin() // there may be a directory now
		default:
		}
		timer.Reset(filePoll)
		if f.s.paused.Load() {
			continue
		}
		if rests := f.look(); !rests {
			timer.Reset(fileRest)
		}
	}
}

// look reads the file if it has changed and rests.
func (f *file) look() (rests bool) {
	now := signatureOf(f.s.o.Config.File)
	rests = now == f.seen
	f.seen = now
	if !rests || now == f.taken {
		return rests
	}
	found, ok := f.read()
	if !ok {
		return f.taken == now
	}
	if !reflect.DeepEqual(found, f.told) {
		f.told = found
		f.s.o.Deliver(found)
	}
	if !f.settled {
		f.settled = true
		f.s.o.Settled()
	}
	return true
}

// read reads the file as it was seen. It says false where that is of no use.
func (f *file) read() (found []Endpoint, ok bool) {
	path := f.s.o.Config.File
	f.s.o.Counts.Attempts.Inc()
	data, err := config.ReadEndpoints(path)
	if signatureOf(path) != f.seen {
		return nil, false // another one, which is looked at next
	}
	f.taken = f.seen
	var endpoints []config.Endpoint
	if err == nil {
		endpoints, err = config.ParseEndpoints(path, data)
	}
	if err != nil {
		f.s.o.Counts.Failures.Inc()
		f.tellProblem(path, err)
		return nil, false
	}
	f.s.o.Counts.Successes.Inc()
	if len(endpoints) == 0 {
		f.s.o.Counts.Empty.Inc()
	}
	if f.problem != "" {
		f.problem = ""
		f.s.o.Log.Info("the file with a cluster's endpoints is of use again", "path", path)
	}
	found = []Endpoint{}
	for _, e := range endpoints {
		found = append(found, fixed(e))
	}
	return found, true
}

// tellProblem logs what is wrong, unless that was known.
func (f *file) tellProblem(path string, err error) {
	problem := err.Error()
	if errors.Is(err, fs.ErrNotExist) {
		problem = "it is not there"
	}
	if problem == f.problem {
		return
	}
	f.problem = problem
	f.s.o.Log.Warn("the file with a cluster's endpoints is of no use: what it said before holds", "path", path, "err", problem)
}
