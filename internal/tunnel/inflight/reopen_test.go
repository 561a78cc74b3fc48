package inflight_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// reopen returns the Store of a file that the test has made, and another mapping of it.
func reopen(t testing.TB, killed bool, pipes []inflight.Pipe, changes ...func([]byte)) (*inflight.Store, []byte) {
	t.Helper()
	fd := handmade(t, handmadeSize, sealed, func(b []byte) {
		for _, c := range changes {
			c(b)
		}
	})
	file := mapped(t, fd)
	s, err := inflight.Reopen(fd, pipes, killed)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, file
}

const (
	firstBuffer, secondBuffer = 4096, 4096 + 8
	pipeNumber0, pipeNumber1  = 8192, 8192 + 8
)

// What cannot be is found before anything is done with the direction, and leaves nothing
// behind. Directions that nobody has, likewise.
func TestNothingThatAPredecessorHasLeftIsTrusted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		direction inflight.Direction // 100: none that there is
		changes   []func([]byte)
	}{
		"two buffers":                  {7, []func([]byte){put(firstBuffer, 8), put(secondBuffer, 8)}},
		"a buffer and a pipe":          {7, []func([]byte){put(secondBuffer, 8), put(pipeNumber0, 8)}},
		"two pipes":                    {7, []func([]byte){put(pipeNumber0, 8), put(pipeNumber1, 8)}},
		"a pipe that is none":          {7, []func([]byte){put(8192+511*8, 8)}},
		"a pipe, and one that is none": {7, []func([]byte){put(pipeNumber1, 8), put(8192+2*8, 8)}},
		"too many bytes":               {7, []func([]byte){put(firstBuffer, (inflight.BufferSize+1)<<32|8)}},
		"very many bytes":              {7, []func([]byte){put(firstBuffer, 0xffffffff<<32|8)}},
		"bytes of no direction":        {100, []func([]byte){put(firstBuffer, 5<<32)}},
		"a direction too much":         {100, []func([]byte){put(firstBuffer, 101)}},
		"the last of directions":       {100, []func([]byte){put(pipeNumber1, 0xffffffff), put(firstBuffer, 0xffffffff)}},
		"nobody's, and all of it":      {100, []func([]byte){put(firstBuffer, 1<<63), put(secondBuffer, 1<<63), put(pipeNumber0, 1<<63), put(pipeNumber1, 1<<63)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, file := reopen(t, false, newPipes(t, 2), c.changes...)
			if c.direction < 100 {
				src := inflight.Counters{Taken: at(file, firstBuffer) >> 32} // as it says
				if _, err := s.Settle(c.direction, -1, src, inflight.Counters{}); !errors.Is(err, inflight.ErrContradiction) {
					t.Errorf("settled: %v", err)
				}
				s.Surrender(c.direction)
			}
			s.Settled()
			if b, p := s.Held(); b+p != 0 {
				t.Errorf("%d buffers and %d pipes are held", b, p)
			}
			if !empty(file[4096 : 3*4096]) {
				t.Error("something is claimed")
			}
			for range 2 { // all is free, and every direction may claim it
				b := s.Buffer()
				b.Claim(7)
				b.Release()
				if s.Pipe(inflight.Direction(s.FreeBuffers())) == nil {
					t.Error("no pipe")
				}
			}
		})
	}
}

func TestReopenRefusesWhatIsNotOurs(t *testing.T) {
	t.Parallel()
	for name, fd := range map[string]int{
		"may grow":        handmade(t, handmadeSize, sealed&^unix.F_SEAL_GROW, unchanged),
		"another version": handmade(t, handmadeSize, sealed, put(8, 3)),
		"too short":       handmade(t, handmadeSize-4096, sealed, unchanged),
		"no file":         -1,
	} {
		if s, err := inflight.Reopen(fd, newPipes(t, 1), false); err == nil {
			s.Close()
			t.Errorf("%s: was opened", name)
		}
	}
	pipes := newPipes(t, 1)
	unix.SetNonblock(pipes[0].R, false)
	if s, err := inflight.Reopen(handmade(t, handmadeSize, sealed, unchanged), pipes, false); err == nil {
		s.Close()
		t.Error("a pipe that blocks was taken")
	}
}

func TestWhatIsClaimedIsHeldAndAllElseIsFree(t *testing.T) {
	t.Parallel()
	fd := newFile(t, 100, 40)
	pipes := append(inflight.NewPipes(1, 256<<10), inflight.NewPipes(3, 128<<10)...)
	var ours []inflight.Pipe // as somebody else has them
	for _, p := range pipes {
		ours = append(ours, inflight.Pipe{R: duplicate(t, p.R), W: duplicate(t, p.W)})
	}
	first := open(t, duplicate(t, fd), pipes...)
	var buffers []*inflight.Buffer
	for b := first.Buffer(); b != nil; b = first.Buffer() {
		copy(b.Bytes, bytes.Repeat([]byte{byte(len(buffers) + 1)}, inflight.BufferSize))
		buffers = append(buffers, b)
	}
	buffers[2].Claim(50)
	buffers[2].Filled(33)
	buffers[4].Claim(61)
	first.Pipe(70)
	unix.Write(first.Pipe(71).W, []byte("seven")) // the second
	unix.Write(ours[3].W, []byte("nobody's"))
	first.Mark(50, 0b101)
	full := memory(t, fd)

	s, err := inflight.Reopen(duplicate(t, fd), ours, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if b, p := s.Held(); b != 2 || p != 2 || s.FreeBuffers() != 38 {
		t.Errorf("%d buffers and %d pipes are held, %d buffers free", b, p, s.FreeBuffers())
	}
	if n := memory(t, fd); n > full-35*inflight.BufferSize {
		t.Errorf("%d bytes of %d are left", n, full)
	}
	s.Trim()
	if n := memory(t, fd); n > full-38*inflight.BufferSize {
		t.Errorf("%d bytes of %d are left after a trim", n, full)
	}
	if got := s.FD(); stat(t, got).Ino != stat(t, fd).Ino {
		t.Error("that is not its file")
	}
	if got := s.Pipes(); len(got) != 4 || got[0] != ours[0] || got[3] != ours[3] {
		t.Errorf("its pipes are %v", got)
	}

	counters := func(taken, given uint64) (src, dst inflight.Counters) {
		return inflight.Counters{Taken: taken}, inflight.Counters{Given: given}
	}
	src, dst := counters(33, 30)
	rest, err := s.Settle(50, -1, src, dst)
	if err != nil || rest.From != 30 || rest.To != 33 || rest.Buffer.Bytes[32] != 3 {
		t.Errorf("got %+v, %v", rest.Finding, err)
	}
	if s.Marks(50) != 0b101 {
		t.Errorf("the marks are %b", s.Marks(50))
	}
	src, dst = counters(6, 1)
	if rest, err = s.Settle(71, -1, src, dst); err != nil || rest.Piped != 5 || rest.Pipe.R != ours[1].R || s.Completed(71) != 1 {
		t.Errorf("got %+v, %v; completed are %d", rest.Finding, err, s.Completed(71))
	}
	if !panics(func() { s.Buffer().Claim(71) }) {
		t.Error("the direction of the pipe has claimed a buffer, too")
	}
	s.Settled()
	if b, p := s.Held(); b != 2 || p != 1 { // one of them from a moment ago
		t.Errorf("%d buffers and %d pipes are held", b, p)
	}
	s.FreePipe(rest.Pipe)
	for i, want := range []int{1, 0, 2, 3} { // what was freed last, then the largest
		p := s.Pipe(inflight.Direction(i))
		if p.R != ours[want].R {
			t.Errorf("pipe %d is %d of %v", i, p.R, ours)
		}
		if n, err := unix.Read(p.R, make([]byte, 10)); err != unix.EAGAIN {
			t.Errorf("%d bytes are in pipe %d: %v", n, i, err)
		}
	}
}

func TestWhoWasWorkedOnAtTwoDeathsInARowIsNotTouched(t *testing.T) {
	t.Parallel()
	const a, b = 5<<32 | 1, 9<<32 | 4
	for name, c := range map[string]struct {
		working, suspect uint64
		killed           bool
		want             uint64 // suspect from then on
		quarantined      bool
	}{
		"nobody":                      {0, 0, false, 0, false},
		"somebody":                    {a, 0, false, a, false},
		"another one":                 {a, b, false, a, false},
		"the same again":              {a, a, false, a, true},
		"the same, and killed":        {a, a, true, 0, false},
		"killed":                      {a, 0, true, 0, false},
		"nobody, and somebody before": {0, a, false, 0, false},
	} {
		s, file := reopen(t, c.killed, nil, put(64, c.working), put(72, c.suspect))
		if w, got := at(file, 64), at(file, 72); w != 0 || got != c.want {
			t.Errorf("%s: working %x, suspect %x", name, w, got)
		}
		slot, number, ok := s.Suspect()
		if ok != c.quarantined || ok && (slot != 0 || number != 5) {
			t.Errorf("%s: %d, %d, %v", name, slot, number, ok)
		}
		s.Absolve()
		if got := at(file, 72); got != 0 {
			t.Errorf("%s: still suspect: %x", name, got)
		}
	}
}

// A tunnel that kills whoever touches it does so twice.
func TestAPoisonousTunnelKillsTwice(t *testing.T) {
	t.Parallel()
	fd := newFile(t, 10, 1)
	s := open(t, duplicate(t, fd))
	for deaths := 1; ; deaths++ {
		s.Enter(3, 1<<32+77)
		s.Leave()
		s.Enter(4, 1<<32+78)
		var err error
		if s, err = inflight.Reopen(duplicate(t, fd), nil, false); err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		slot, number, ok := s.Suspect()
		if ok != (deaths == 2) || ok && (slot != 4 || number != 78) {
			t.Errorf("after %d deaths: %d, %d, %v", deaths, slot, number, ok)
		}
		if ok || deaths > 2 {
			return
		}
	}
}

func TestMarksStandBesideTheCount(t *testing.T) {
	t.Parallel()
	s, fd := newStore(t, 10_000, 1)
	const d = 9_999
	settle := func(n uint64) {
		t.Helper()
		if _, err := s.Settle(d, -1, inflight.Counters{Taken: n}, inflight.Counters{Given: n}); err != nil {
			t.Error(err)
		}
	}
	want := func(marks uint8, n uint64) {
		t.Helper()
		if s.Marks(d) != marks || s.Completed(d) != n {
			t.Errorf("%x, %d; want %x, %d", s.Marks(d), s.Completed(d), marks, n)
		}
	}
	start := memory(t, fd)
	settle(0)
	if n := memory(t, fd); n != start {
		t.Errorf("a direction that has done nothing takes %d bytes", n-start)
	}
	want(0, 0)
	s.Mark(d, 0xff)
	s.Trim()
	want(0xff, 0)
	s.Complete(d, 10)
	s.Complete(d, 1<<40)
	want(0xff, 1<<40+10)
	settle(1<<40 + 77)
	want(0xff, 1<<40+77)
	s.Begin(d)
	want(0, 0)
}

// Whatever is in a sealed file and in its pipes: it is refused, or all of it can be used
// once nobody has asked for what is claimed.
func FuzzReopen(f *testing.F) {
	word := binary.NativeEndian.AppendUint64
	f.Add([]byte{}, uint16(0), false)
	f.Add(word(nil, 8), uint16(firstBuffer), false)
	f.Add(word(word(nil, 5<<32|8), 8), uint16(firstBuffer), true)
	f.Add(word(nil, 1<<63|8), uint16(secondBuffer), false)
	f.Add(word(word(nil, 8), 8), uint16(pipeNumber0), false)
	f.Add(word(nil, 0xffffffff), uint16(8192+511*8), true)
	f.Add(word(word(nil, 4), 4), uint16(64), false)
	f.Add(bytes.Repeat([]byte{0xff}, 64), uint16(8), false)
	f.Add(bytes.Repeat([]byte{0xff}, 8192), uint16(4096), false)
	f.Fuzz(func(t *testing.T, data []byte, offset uint16, killed bool) {
		var changed []byte
		fd := handmade(t, handmadeSize, sealed, func(b []byte) {
			copy(b[int(offset)%len(b):], data)
			changed = b
		})
		pipes := newPipes(t, 2)
		unix.Write(pipes[1].W, data[:min(len(data), 4096)])
		s, err := inflight.Reopen(fd, pipes, killed)
		if err != nil {
			return
		}
		defer s.Close()
		if uint64(s.Directions()) != at(changed, 16) {
			t.Errorf("%d directions", s.Directions())
		}
		s.Suspect()
		for d := range inflight.Direction(min(s.Directions(), 100)) { // and others that nobody asks for
			c := inflight.Counters{Taken: at(changed, 4096), Given: at(changed, 4096), Unread: 1 << 30}
			rest, err := s.Settle(d, -1, c, c)
			switch {
			case err != nil || rest.Lost:
				s.Surrender(d)
			case rest.Buffer != nil:
				_ = rest.Buffer.Bytes[rest.From:rest.To]
				s.Free(rest.Buffer)
			case rest.Pipe != nil:
				s.FreePipe(rest.Pipe)
			}
		}
		s.Settled()
		if b, p := s.Held(); b+p != 0 {
			t.Errorf("%d buffers and %d pipes are held", b, p)
		}
		n, last := 0, inflight.Direction(s.Directions()-1)
		for b := s.Buffer(); b != nil; b = s.Buffer() {
			b.Claim(last)
			b.Bytes[inflight.BufferSize-1] = 1
			b.Release()
			n++
		}
		if n != 2 {
			t.Errorf("%d buffers", n)
		}
		for d := range inflight.Direction(min(2, s.Directions())) { // and pipes
			if got, err := unix.Read(s.Pipe(d).R, make([]byte, 1)); err != unix.EAGAIN {
				t.Errorf("%d bytes are left in a pipe: %v", got, err)
			}
		}
	})
}
