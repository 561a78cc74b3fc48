package certfiles

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// every is how often files are looked at. Nothing waits for them, so the kernel need not
	// tell of changes, which it does not on every file system.
	every = 2 * time.Second

	// rest is how long files must have stayed as they are before they are read: a certificate
	// and its key come one after the other.
	rest = 500 * time.Millisecond
)

// Files are some that belong together. Their methods are called by one goroutine at a time.
type Files struct {
	paths []string
	read  func() error
	seen  []signature // at the last look
	taken []signature // when they were read last
}

// Watch returns files that read reads.
func Watch(paths []string, read func() error) *Files { return &Files{paths: paths, read: read} }

// Read reads them, whether they have changed or not.
func (f *Files) Read() error {
	f.seen = signaturesOf(f.paths)
	f.taken = f.seen
	err := f.read()
	if now := signaturesOf(f.paths); !slices.Equal(now, f.seen) {
		f.seen, f.taken = now, nil // it may have read some of either
	}
	return err
}

// look reads the files if they have changed and rest.
func (f *Files) look() (rests bool) {
	now := signaturesOf(f.paths)
	rests = slices.Equal(now, f.seen)
	f.seen = now
	if rests && !slices.Equal(now, f.taken) {
		_ = f.Read() // who reads has told of it
		rests = slices.Equal(f.seen, f.taken)
	}
	return rests
}

// Run looks at files, and reads those again that have changed, until ctx is done. looked is called
// after each look at all of them, and may be nil.
func Run(ctx context.Context, all []*Files, looked func()) {
	timer := time.NewTimer(rest) // what has changed since Read
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		next := every
		for _, f := range all {
			if !f.look() {
				next = rest
			}
		}
		if looked != nil {
			looked()
		}
		timer.Reset(next)
	}
}

// signature is what a file looks like from outside. Nothing can be written to it without a change
// of this, once the clock of the file system has gone on.
type signature struct {
	err          syscall.Errno // 0: it is there
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func signaturesOf(paths []string) []signature {
	all := make([]signature, len(paths))
	for i, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			all[i].err, _ = errors.AsType[syscall.Errno](err)
			continue
		}
		all[i] = signature{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
	}
	return all
}
