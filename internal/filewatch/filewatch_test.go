package filewatch_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/filewatch"
)

// pair are two files that are of use if they say the same.
type pair struct {
	t    *testing.T
	a, b string

	reads func() // while they are read; nil: nothing

	mu    sync.Mutex
	taken []string
	said  []string
	told  chan struct{}
}

func newPair(t *testing.T) *pair {
	dir := t.TempDir()
	p := &pair{t: t, a: filepath.Join(dir, "a"), b: filepath.Join(dir, "b"), told: make(chan struct{}, 100)}
	p.write(p.a, "0")
	p.write(p.b, "0")
	return p
}

func (p *pair) write(path, text string) {
	p.t.Helper()
	p.must(os.WriteFile(path+"~", []byte(text), 0o644))
	p.must(os.Rename(path+"~", path))
}

func (p *pair) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pair) read() (take func(), err error) {
	a, err := os.ReadFile(p.a)
	b, err2 := os.ReadFile(p.b)
	if err = errors.Join(err, err2); err == nil && string(a) != string(b) {
		err = errors.New("they do not fit")
	}
	if err != nil {
		return nil, err
	}
	if p.reads != nil {
		p.reads()
	}
	return func() { p.note(&p.taken, string(a)) }, nil
}

func (p *pair) note(to *[]string, text string) {
	p.mu.Lock()
	*to = append(*to, text)
	p.mu.Unlock()
	p.told <- struct{}{}
}

// watch begins to, and stops when the test ends.
func (p *pair) watch(o filewatch.Options) *filewatch.Watcher {
	w := filewatch.New(o)
	w.Add(filewatch.Files{Paths: []string{p.a, p.b}, Read: p.read, Refuse: func(err error) { p.note(&p.said, err.Error()) }, Patience: filewatch.Patience})
	ctx, cancel := context.WithCancel(p.t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	p.t.Cleanup(func() { cancel(); <-done })
	return w
}

func (p *pair) want(taken, said string) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if got := strings.Join(p.taken, " "); got != taken {
		p.t.Errorf("taken was %q, want %q", got, taken)
	}
	if got := strings.Join(p.said, "; "); !strings.HasPrefix(got, said) || said == "" && got != "" {
		p.t.Errorf("said was %q, want %q", got, said)
	}
}

func (p *pair) wantSaid(times int) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.said) != times {
		p.t.Errorf("%q were said, want %d", p.said, times)
	}
}

func (p *pair) await(taken string) {
	p.t.Helper()
	for range 100 {
		p.mu.Lock()
		got := strings.Join(p.taken, " ")
		p.mu.Unlock()
		if got == taken {
			return
		}
		select {
		case <-p.told:
		case <-time.After(30 * time.Second):
			p.t.Fatalf("taken was %q after 30 s, want %q", got, taken)
		}
	}
}

// deaf hears nothing of the kernel, so that time may be virtual.
var deaf = filewatch.Options{Watch: func(ctx context.Context, _ []string, _ func()) { <-ctx.Done() }}

func TestTheKernelTellsOfChanges(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	p.watch(filewatch.Options{})
	for _, text := range []string{"1", "2"} {
		p.write(p.a, text)
		p.write(p.b, text)
		if text == "1" {
			p.await("1")
		}
	}
	p.await("1 2")
	p.want("1 2", "")
}

// Kubernetes has a symbolic link to a directory that is exchanged, and others into that.
func TestADirectoryBehindASymbolicLinkIsExchanged(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	dir := filepath.Dir(p.a)
	publish := func(version string) {
		d := filepath.Join(dir, ".."+version)
		p.must(os.Mkdir(d, 0o755))
		p.must(os.WriteFile(filepath.Join(d, "a"), []byte(version), 0o644))
		p.must(os.WriteFile(filepath.Join(d, "b"), []byte(version), 0o644))
		p.must(os.Symlink(".."+version, filepath.Join(dir, "..data_tmp")))
		p.must(os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	publish("1")
	for _, path := range []string{p.a, p.b} {
		p.must(os.Remove(path))
		p.must(os.Symlink(filepath.Join("..data", filepath.Base(path)), path))
	}
	p.watch(filewatch.Options{})
	publish("2")
	p.await("2")
}

func TestFilesThatComeOneAfterTheOtherAreNoFault(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.watch(deaf)
		time.Sleep(time.Second)
		p.write(p.a, "1")
		time.Sleep(filewatch.Patience + 2*time.Second) // until it is looked at, and less than the patience from there
		p.want("", "")
		p.write(p.b, "1")
		time.Sleep(10 * time.Second)
		p.want("1", "")
	})
}

func TestFilesOfNoUseAreRefusedOnceAndTakenWhenTheyAreMended(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.watch(deaf)
		time.Sleep(time.Second)
		p.write(p.a, "1")
		time.Sleep(time.Hour)
		p.want("", "they do not fit")
		p.wantSaid(1)
		p.must(os.Remove(p.a))
		time.Sleep(time.Hour)
		p.wantSaid(2)
		p.write(p.a, "0")
		time.Sleep(time.Minute)
		p.want("0", "they do not fit")
		p.wantSaid(2)
	})
}

func TestADirectoryThatAlwaysChangesPutsNothingOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.watch(filewatch.Options{Watch: func(ctx context.Context, _ []string, tell func()) {
			for ctx.Err() == nil {
				tell()
				time.Sleep(10 * time.Millisecond)
			}
		}})
		time.Sleep(time.Second)
		p.write(p.a, "1")
		p.write(p.b, "1")
		time.Sleep(time.Second)
		p.want("1", "")
	})
}

func TestFilesThatChangeWhileTheyAreReadAreNotTaken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.reads = func() {
			p.reads = nil
			p.write(p.a, "2")
			p.write(p.b, "2")
		}
		p.watch(deaf)
		time.Sleep(time.Second)
		p.write(p.a, "1")
		p.write(p.b, "1")
		time.Sleep(time.Minute)
		p.want("2", "")
	})
}

func TestNothingIsLookedAtInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		var paused atomic.Bool
		paused.Store(true)
		w := p.watch(filewatch.Options{Watch: deaf.Watch, Paused: paused.Load})
		p.write(p.a, "1")
		p.write(p.b, "1")
		time.Sleep(time.Minute)
		p.want("", "")
		paused.Store(false)
		w.Look()
		time.Sleep(time.Second)
		p.want("1", "")
	})
}

// A user has few instances of inotify, and generations that drain may be many.
func TestNothingIsAskedOfTheKernelWhilePaused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		var paused atomic.Bool
		var watches atomic.Int64
		w := p.watch(filewatch.Options{Paused: paused.Load, Watch: func(ctx context.Context, _ []string, _ func()) {
			watches.Add(1)
			<-ctx.Done()
			watches.Add(-1)
		}})
		for range 2 {
			time.Sleep(time.Second)
			synctest.Wait()
			if n := watches.Load(); n != 1 {
				t.Errorf("%d watches", n)
			}
			paused.Store(true)
			time.Sleep(time.Minute)
			synctest.Wait()
			if n := watches.Load(); n != 0 {
				t.Errorf("%d watches while it is paused", n)
			}
			paused.Store(false)
			w.Look()
		}
	})
}
