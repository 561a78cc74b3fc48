package poller_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
)

func TestAnOwnerIsToldWhatHasBecomeOfItsDescriptors(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	a, farA := pair(t)
	b, farB := pair(t)
	add(t, l, a, o, 10)
	add(t, l, b, o, 20)
	step(l)
	o.want(t, call{10, poller.Writable}, call{20, poller.Writable})
	write(t, farB, "x")
	step(l)
	o.want(t, call{20, poller.Readable | poller.Writable})
	write(t, farA, "x")
	unix.Shutdown(farA, unix.SHUT_WR)
	step(l)
	o.want(t, call{10, poller.Readable | poller.Writable | poller.Hup})
}

func TestAnOwnerIsToldAFinFromAReset(t *testing.T) {
	t.Parallel()
	const fin = poller.Readable | poller.Writable | poller.Hup
	for name, c := range map[string]struct {
		linger int
		want   poller.Events
	}{
		"FIN": {linger: -1, want: fin},
		"RST": {linger: 0, want: fin | poller.Error},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, o := newLoop(t), new(recorder)
			near, far := tcpPair(t)
			add(t, l, near, o, 1)
			step(l)
			o.want(t, call{1, poller.Writable})
			far.SetLinger(c.linger)
			far.Close()
			until(t, l, func() bool { return len(o.calls) > 0 })
			o.want(t, call{1, c.want})
		})
	}
}

// A pipe says only EPOLLHUP when its writer has gone.
func TestWhatHasEndedIsReadable(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	add(t, l, fds[0], o, 1)
	unix.Close(fds[1])
	step(l)
	o.want(t, call{1, poller.Readable | poller.Hup})
}

func TestAnEdgeIsToldOnce(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	near, far := pair(t)
	add(t, l, near, o, 1)
	step(l)
	o.calls = nil
	write(t, far, "x")
	step(l)
	step(l)
	o.want(t, call{1, poller.Readable | poller.Writable})
	write(t, far, "y") // more is another edge, although x was not read
	step(l)
	o.want(t, call{1, poller.Readable | poller.Writable})
}

// The registration reports what is there already: whoever takes a connection over
// with bytes in its queue is told of them.
func TestWhatIsReadyBeforeItIsAddedIsTold(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	near, far := pair(t)
	write(t, far, "x")
	add(t, l, near, o, 1)
	step(l)
	o.want(t, call{1, poller.Readable | poller.Writable})
}

func TestNothingIsToldOfWhatWasRemovedInTheSameBatch(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	const n = 10
	var handles []poller.Handle
	for i := range uint32(n) {
		near, _ := pair(t)
		handles = append(handles, add(t, l, near, o, i))
	}
	o.then = func(c call) {
		for i, h := range handles {
			if uint32(i) != c.index {
				l.Remove(h)
			}
		}
	}
	step(l)
	step(l)
	if len(o.calls) != 1 {
		t.Errorf("the owner was told %v", o.calls)
	}
}

// A descriptor that comes into the place of one that was removed has nothing to do
// with the events that the batch still holds for that.
func TestAnEventOfAFormerDescriptorIsDropped(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	first, removed, added := new(recorder), new(recorder), new(recorder)
	a, farA := pair(t)
	b, farB := pair(t)
	c, _ := pair(t)
	add(t, l, a, first, 1)
	handle := add(t, l, b, removed, 2)
	step(l)
	removed.calls = nil
	var reused poller.Handle
	first.then = func(call) {
		l.Remove(handle)
		reused = add(t, l, c, added, 3)
		added.want(t)
	}
	write(t, farA, "x")
	write(t, farB, "x")
	step(l)
	removed.want(t)
	added.want(t) // that of the same batch would be Readable
	if reused != handle {
		t.Fatalf("handle %d was taken and not %d, so nothing was tested", reused, handle)
	}
	step(l)
	added.want(t, call{3, poller.Writable})
}

func TestAnotherOwnerIsToldAfterPass(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	was, is := new(recorder), new(recorder)
	near, far := pair(t)
	h := add(t, l, near, was, 1)
	step(l)
	was.calls = nil
	l.Pass(h, is, 7)
	step(l)
	is.want(t) // nothing is told again
	write(t, far, "x")
	l.Again(h)
	step(l)
	is.want(t, call{7, poller.Readable | poller.Writable}, call{7, 0})
	was.want(t)
	if n := l.Owners(); n != 1 {
		t.Errorf("%d owners have descriptors", n)
	}
}

func TestOwnersWithoutDescriptorsAreForgotten(t *testing.T) {
	t.Parallel()
	l := newLoop(t)
	near, _ := pair(t)
	for i := range 100_000 {
		o := new(recorder)
		l.Remove(add(t, l, near, o, 1))
		if n := l.Owners(); n != 0 {
			t.Fatalf("%d owners after %d", n, i)
		}
		if i == 1000 && testing.Short() {
			break
		}
	}
}

// What can be ready at once is more than a turn takes, so that no turn is endless.
func TestABatchIsBounded(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	const n = poller.Batch + 10
	for i := range uint32(n) {
		add(t, l, duplicate(t), o, i)
	}
	var perTurn []int
	last := 0
	l.AfterTurn(func() { perTurn, last = append(perTurn, len(o.calls)-last), len(o.calls) })
	until(t, l, func() bool { return len(o.calls) == n })
	if perTurn[0] > poller.Batch || perTurn[0] < poller.Batch/2 {
		t.Errorf("calls per turn: %v", perTurn)
	}
}

// duplicate returns a descriptor of something that is always writable.
func duplicate(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestWhatCannotBeAddedLeavesNothing(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := l.Add(int(f.Fd()), o, 1); !errors.Is(err, unix.EPERM) {
		t.Errorf("a regular file: %v", err)
	}
	near, _ := pair(t)
	h := add(t, l, near, o, 1)
	if _, err := l.Add(near, new(recorder), 2); !errors.Is(err, unix.EEXIST) {
		t.Errorf("the same again: %v", err)
	}
	l.Remove(h)
	if n := l.Owners(); n != 0 {
		t.Errorf("%d owners", n)
	}
	if again := add(t, l, near, o, 1); again != h {
		t.Errorf("handle %d was not freed: got %d", h, again)
	}
}

// An owner that uses a handle that it has not is told so at once, before it takes
// another's descriptor out, or the loop's own.
func TestAHandleThatIsNotInUseIsRefused(t *testing.T) {
	t.Parallel()
	l, o := newLoop(t), new(recorder)
	near, _ := pair(t)
	h := add(t, l, near, o, 1)
	l.Remove(h)
	for _, h := range []poller.Handle{0, h, h + 1, 3 * poller.ChunkSize} {
		for name, use := range map[string]func(){
			"Remove": func() { l.Remove(h) },
			"Again":  func() { l.Again(h) },
			"Pass":   func() { l.Pass(h, o, 1) },
		} {
			if !panics(use) {
				t.Errorf("%s(%d) was accepted", name, h)
			}
		}
	}
}

func panics(fn func()) (yes bool) {
	defer func() { yes = recover() != nil }()
	fn()
	return false
}

func TestEntriesAreSmallAndGivenBack(t *testing.T) {
	t.Parallel()
	if poller.EntrySize != 16 {
		t.Errorf("an entry has %d bytes", poller.EntrySize)
	}
	l, o := newLoop(t), new(recorder)
	const n = 4 * poller.ChunkSize
	fds := make([]int, n)
	handles := map[poller.Handle]int{}
	for i := range fds {
		fds[i] = duplicate(t)
		handles[add(t, l, fds[i], o, uint32(i))] = i
	}
	if len(handles) != n || l.Chunks() != 5 {
		t.Errorf("%d handles in %d chunks", len(handles), l.Chunks())
	}
	// With every other one gone there are still all chunks, of which the lower
	// halves are taken first.
	for h := range handles {
		if h%2 == 0 {
			l.Remove(h)
		}
	}
	for h, i := range handles {
		if h%2 == 0 {
			if got := add(t, l, fds[i], o, uint32(i)); got > n+1 || got%2 != 0 {
				t.Fatalf("handle %d was taken", got)
			}
		}
	}
	for h := range handles {
		l.Remove(h)
	}
	if l.Chunks() != 1 { // with the loop's own descriptor
		t.Errorf("%d chunks are left", l.Chunks())
	}
}
