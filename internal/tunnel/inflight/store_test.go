package inflight_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// at is a word of a file, where the documentation says.
func at(file []byte, offset int) uint64 { return binary.NativeEndian.Uint64(file[offset:]) }

// The layout by its bytes: another build reads what this one has left behind. Whoever
// changes it changes its version.
func TestTheLayoutIsWhatAnotherBuildExpects(t *testing.T) {
	t.Parallel()
	pipes := newPipes(t, 2)
	// 1,000 directions and 600 buffers take two pages each, so that the parts are not
	// one page each by accident.
	s, fd := newStore(t, 1000, 600, pipes...)
	file := mapped(t, fd)

	header := new(bytes.Buffer)
	header.WriteString("HFflight")
	for _, v := range []uint64{2, 1000, 600, 65536, 512} {
		binary.Write(header, binary.NativeEndian, v)
	}
	if got := file[:4096]; !bytes.Equal(got[:48], header.Bytes()) || !empty(got[48:]) {
		t.Errorf("the header is\n%q\nwant\n%q", got[:64], header.Bytes())
	}
	const (
		bufferClaims = 4096
		pipeClaims   = bufferClaims + 2*4096
		counts       = pipeClaims + 4096
		buffers      = 65536
	)
	if got, want := len(file), buffers+600*65536; got != want {
		t.Fatalf("the file has %d bytes, want %d", got, want)
	}
	if !empty(file[4096:buffers]) {
		t.Fatal("a new file is not empty")
	}

	first, second := s.Buffer(), s.Buffer()
	second.Claim(999)
	second.Filled(6)
	copy(second.Bytes, "second")
	copy(first.Bytes, "first")
	first.Claim(0)
	s.Pipe(7)
	s.Pipe(8)
	s.Complete(3, 1<<40)
	s.Complete(999, 5)
	s.Complete(999, 6)
	s.Mark(999, inflight.MarkLost)
	s.Mark(998, inflight.MarkFin|1)
	s.Mark(998, 2)
	s.Enter(499, 1<<40+0x12345678)
	want := map[int]uint64{
		64:           0x12345678<<32 | 499 + 1,
		bufferClaims: 0 + 1, bufferClaims + 8: 6<<32 | 999 + 1,
		pipeClaims: 7 + 1, pipeClaims + 8: 8 + 1,
		counts + 3*8: 1 << 40, counts + 998*8: 0b01000011 << 56, counts + 999*8: 0b10000000<<56 | 11,
	}
	for offset := 48; offset < buffers; offset += 8 {
		if got := at(file, offset); got != want[offset] {
			t.Errorf("at %d is %d, want %d", offset, got, want[offset])
		}
	}
	if got := string(file[buffers : buffers+5]); got != "first" {
		t.Errorf("the first buffer begins with %q", got)
	}
	if got := string(file[buffers+65536 : buffers+65536+6]); got != "second" {
		t.Errorf("the second buffer begins with %q", got)
	}
}

func empty(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// Whatever is claimed, read and counted is in the file when the call returns, and so is that
// it is not any more.
func TestClaimsAndCountsAreSeenByOthers(t *testing.T) {
	t.Parallel()
	s, fd := newStore(t, 10, 2, newPipes(t, 1)...)
	file := mapped(t, fd)
	const bufferClaim, pipeClaim, count = 4096, 8192, 12288 + 5*8
	want := func(b, p, n uint64) {
		t.Helper()
		if gotB, gotP, gotN := at(file, bufferClaim), at(file, pipeClaim), at(file, count); gotB != b || gotP != p || gotN != n {
			t.Errorf("claims are %d and %d, and the count %d; want %d, %d, %d", gotB, gotP, gotN, b, p, n)
		}
		if got := s.Completed(5); got != n {
			t.Errorf("completed are %d, want %d", got, n)
		}
	}
	want(0, 0, 0)
	b := s.Buffer()
	want(0, 0, 0)
	b.Claim(5)
	want(6, 0, 0)
	b.Filled(7)
	want(7<<32|6, 0, 0)
	b.Filled(100)
	want(100<<32|6, 0, 0)
	b.Release()
	want(0, 0, 0)
	s.Complete(5, 100)
	want(0, 0, 100)
	b.Claim(4)
	b.Filled(inflight.BufferSize)
	want(inflight.BufferSize<<32|5, 0, 100)
	b.Claim(4) // once more, with nothing read so far
	want(5, 0, 100)
	b.Filled(1)
	b.Claim(5)
	want(6, 0, 100)
	b.Release()
	b.Release()
	want(0, 0, 100)
	p := s.Pipe(5)
	want(0, 6, 100)
	s.Complete(5, 1)
	want(0, 6, 101)
	s.FreePipe(p)
	want(0, 0, 101)
	b.Claim(5)
	want(6, 0, 101)
	s.Free(b)
	want(0, 0, 101)
	s.Begin(5)
	want(0, 0, 0)
}

func TestADirectionHasOneClaim(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t, 200, 3, newPipes(t, 2)...)
	a, b := s.Buffer(), s.Buffer()
	a.Claim(100)
	a.Filled(10)
	a.Claim(100) // is the same claim
	for name, again := range map[string]func(){
		"another buffer": func() { b.Claim(100) },
		"a pipe":         func() { s.Pipe(100) },
	} {
		if !panics(again) {
			t.Errorf("%s was claimed, too", name)
		}
	}
	if buffers, pipes := s.Held(); buffers != 2 || pipes != 0 {
		t.Errorf("%d buffers and %d pipes are held", buffers, pipes)
	}
	b.Claim(36) // the same bit of another word
	a.Claim(101)
	b.Claim(100)
	b.Release()
	p := s.Pipe(100)
	if !panics(func() { b.Claim(100) }) || !panics(func() { s.Pipe(100) }) {
		t.Error("the direction of a pipe claimed something else")
	}
	s.FreePipe(p)
	b.Claim(100)
	s.Free(b)
	if s.Buffer().Claim(100); !panics(func() { a.Claim(200) }) {
		t.Error("a direction that does not exist claimed a buffer")
	}
}

func TestBuffersAndPipesRunOut(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t, 10, 2, newPipes(t, 2)...)
	a, b := s.Buffer(), s.Buffer()
	if a == nil || b == nil || s.FreeBuffers() != 0 || s.Buffer() != nil {
		t.Fatal("not two buffers")
	}
	p, q := s.Pipe(1), s.Pipe(2)
	if p == nil || q == nil || s.Pipe(3) != nil {
		t.Fatal("not two pipes")
	}
	if buffers, pipes := s.Held(); buffers != 2 || pipes != 2 {
		t.Errorf("%d buffers and %d pipes are held", buffers, pipes)
	}
	s.Free(a)
	s.FreePipe(p)
	if n := s.FreeBuffers(); n != 1 {
		t.Errorf("%d buffers are free", n)
	}
	if buffers, pipes := s.Held(); buffers != 1 || pipes != 1 {
		t.Errorf("%d buffers and %d pipes are held", buffers, pipes)
	}
	if got := s.Buffer(); got != a {
		t.Error("the free buffer was not taken")
	}
	if got := s.Pipe(3); got != p { // for which nothing was left behind by the failure
		t.Error("the free pipe was not taken")
	}
	if s.Buffer() != nil || s.Pipe(4) != nil {
		t.Error("something was there twice")
	}
}

// What was used last is in the processor's cache, and what was never used has no memory.
func TestTheBufferThatWasUsedLastComesFirst(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t, 10, 100)
	a, b, c := s.Buffer(), s.Buffer(), s.Buffer()
	s.Free(b)
	s.Free(a)
	s.Free(c)
	for i, want := range []*inflight.Buffer{c, a, b} {
		if got := s.Buffer(); got != want {
			t.Errorf("buffer %d is another one", i)
		}
	}
}

func TestBuffersDoNotOverlap(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t, 10, 5)
	var all []*inflight.Buffer
	for b := s.Buffer(); b != nil; b = s.Buffer() {
		if len(b.Bytes) != 64<<10 || cap(b.Bytes) != 64<<10 {
			t.Errorf("a buffer has %d bytes", len(b.Bytes))
		}
		for i := range b.Bytes {
			b.Bytes[i] = byte(len(all) + 1)
		}
		all = append(all, b)
	}
	if len(all) != 5 {
		t.Fatalf("%d buffers", len(all))
	}
	for i, b := range all {
		if n := bytes.Count(b.Bytes, []byte{byte(i + 1)}); n != len(b.Bytes) {
			t.Errorf("only %d bytes of buffer %d are its own", n, i)
		}
	}
}

func TestTrimGivesMemoryBack(t *testing.T) {
	t.Parallel()
	const directions, buffers = 100_000, 50
	s, fd := newStore(t, directions, buffers)
	start := memory(t, fd)
	if start > 8192 {
		t.Errorf("a file that is not used takes %d bytes", start)
	}
	for d := range inflight.Direction(directions) { // tunnels that begin and are idle
		s.Begin(d)
		if n := s.Completed(d); n != 0 {
			t.Fatalf("%d are completed", n)
		}
	}
	if n := memory(t, fd); n > start {
		t.Errorf("counts that are 0 take %d bytes", n-start)
	}

	var held []*inflight.Buffer
	for b := s.Buffer(); b != nil; b = s.Buffer() {
		clear(b.Bytes[:copy(b.Bytes, bytes.Repeat([]byte("x"), len(b.Bytes)))-10])
		held = append(held, b)
	}
	for d := range inflight.Direction(directions) {
		s.Complete(d, 1)
	}
	full := memory(t, fd)
	if full < buffers*inflight.BufferSize+directions*8 {
		t.Fatalf("a file that is used takes %d bytes", full)
	}
	s.Trim()
	if n := memory(t, fd); n != full {
		t.Errorf("of what is in use %d bytes were given back", full-n)
	}
	for _, b := range held[1:] {
		s.Free(b)
	}
	for d := range inflight.Direction(directions) {
		if d != 77 {
			s.Begin(d)
		}
	}
	s.Trim()
	// The page of the header, of the claims, of one count and the memory of one buffer.
	if n := memory(t, fd); n > inflight.BufferSize+3*4096 {
		t.Errorf("%d bytes are left", n)
	}
	if got := held[0].Bytes[inflight.BufferSize-1]; got != 'x' {
		t.Errorf("a buffer in use has lost its bytes: %q", got)
	}
	if got := s.Completed(77); got != 1 {
		t.Errorf("a count that is not 0 was lost: %d", got)
	}

	// What was given back can be used again, and given back again.
	trimmed := memory(t, fd)
	b := s.Buffer()
	b.Bytes[0] = 'y'
	s.Complete(5000, 3)
	if got := s.Completed(5000); got != 3 || memory(t, fd) == trimmed {
		t.Errorf("%d completed", got)
	}
	s.Free(b)
	s.Begin(5000)
	s.Trim()
	if n := memory(t, fd); n > trimmed {
		t.Errorf("%d bytes more than before", n-trimmed)
	}
}

// A count that a predecessor has left goes on, until a new tunnel begins.
func TestCountsAreContinued(t *testing.T) {
	t.Parallel()
	fd := newFile(t, 2000, 1)
	first, err := inflight.Open(duplicate(t, fd), nil)
	if err != nil {
		t.Fatal(err)
	}
	first.Complete(1500, 7)
	first.Complete(1501, 8)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	s := open(t, duplicate(t, fd))
	s.Begin(1501)
	s.Complete(1500, 1)
	if a, b := s.Completed(1500), s.Completed(1501); a != 8 || b != 0 {
		t.Errorf("completed are %d and %d", a, b)
	}
}

func TestAFileIsSealed(t *testing.T) {
	t.Parallel()
	fd := newFile(t, 10, 1)
	for _, n := range []int{0, size(t, fd) - 1, size(t, fd) + 1} {
		if err := unix.Ftruncate(fd, int64(n)); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncated to %d: %v", n, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("another seal: %v", err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("inherited by whatever is executed: %x, %v", flags, err)
	}
}

func TestImpossibleSizesAreRefused(t *testing.T) {
	t.Parallel()
	for _, c := range [][2]int{{0, 1}, {1, 0}, {-1, 1}, {1, -1}, {inflight.MaxDirections + 1, 1}, {1, inflight.MaxBuffers + 1}} {
		if fd, err := inflight.NewFile(c[0], c[1]); err == nil {
			unix.Close(fd)
			t.Errorf("a file for %d directions and %d buffers was made", c[0], c[1])
		}
	}
	s, _ := newStore(t, inflight.MaxDirections, inflight.MaxBuffers) // costs nothing
	if got := s.Directions(); got != inflight.MaxDirections {
		t.Errorf("%d directions", got)
	}
}

const sealed = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// handmade returns a file as the documentation describes it, but for what the test wants
// to be different.
func handmade(t testing.TB, size, seals int, change func(file []byte)) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 4*4096)
	copy(head, "HFflight")
	for i, v := range []uint64{2, 100, 2, 65536, 512} {
		binary.NativeEndian.PutUint64(head[8+8*i:], v)
	}
	change(head)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, head[:min(size, len(head))], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return fd
}

const handmadeSize = 65536 + 2*65536

func unchanged([]byte) {}

func put(offset int, v uint64) func([]byte) {
	return func(b []byte) { binary.NativeEndian.PutUint64(b[offset:], v) }
}

func TestOnlyAFileThatIsSoundAndIdleIsOpened(t *testing.T) {
	t.Parallel()
	s, err := inflight.Open(handmade(t, handmadeSize, sealed, unchanged), nil)
	if err != nil {
		t.Fatalf("a sound one: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		size, seals int
		change      func([]byte)
		want        string
	}{
		"may shrink":       {seals: sealed &^ unix.F_SEAL_SHRINK, want: "sealed"},
		"may grow":         {seals: sealed &^ unix.F_SEAL_GROW, want: "sealed"},
		"may be sealed":    {seals: sealed &^ unix.F_SEAL_SEAL, want: "sealed"},
		"cannot be mapped": {seals: sealed | unix.F_SEAL_WRITE, want: "mmap"},
		"empty":            {size: -handmadeSize, want: "not a file"},
		"a page less":      {size: -4096, want: "bytes, not"},
		"a page more":      {size: 4096, want: "bytes, not"},
		"no magic":         {change: func(b []byte) { b[7] = 'T' }, want: "not a file"},
		"another version":  {change: put(8, 1), want: "version 1"},
		"no directions":    {change: put(16, 0), want: "0 directions"},
		"many directions":  {change: put(16, 1<<63+100), want: "directions"},
		"more directions":  {change: put(16, 100_000), want: "bytes, not"},
		"no buffers":       {change: put(24, 0), want: "0 buffers"},
		"more buffers":     {change: put(24, 3), want: "bytes, not"},
		"many buffers":     {change: put(24, 1<<48+2), want: "buffers"},
		"other buffers":    {change: put(32, 32768), want: "32768 bytes"},
		"more pipes":       {change: put(40, 1024), want: "1024 pipes"},
		"a buffer claimed": {change: put(4096+8, 1), want: "in flight"},
		"a pipe claimed":   {change: put(8192, 100), want: "in flight"},
	} {
		seals, change := c.seals, c.change
		if seals == 0 {
			seals = sealed
		}
		if change == nil {
			change = unchanged
		}
		fd := handmade(t, handmadeSize+c.size, seals, change)
		if s, err := inflight.Open(fd, nil); err == nil {
			s.Close()
			t.Errorf("%s: was opened", name)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[1])
	if _, err := inflight.Open(pipe[0], nil); err == nil {
		t.Error("a pipe was opened as a file")
	}
}

// Not parallel: it counts the descriptors of the process.
func TestAStoreClosesWhatItWasGiven(t *testing.T) {
	before := descriptors(t)
	fd, err := inflight.NewFile(10, 1)
	if err != nil {
		t.Fatal(err)
	}
	s, err := inflight.Open(fd, newPipes(t, 3))
	if err != nil {
		t.Fatal(err)
	}
	s.Pipe(1)
	s.Buffer().Claim(2)
	if n := descriptors(t); n != before+7 {
		t.Errorf("%d descriptors for a file and three pipes", n-before)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors are left", n-before)
	}
	if _, err := inflight.Open(handmade(t, handmadeSize, sealed, put(8, 1)), newPipes(t, 3)); err == nil {
		t.Error("opened")
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors are left of a file that was refused", n-before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Not parallel: it counts what the process allocates.
func TestNothingIsAllocatedForAMessage(t *testing.T) {
	s, _ := newStore(t, 10, 3, newPipes(t, 1)...)
	s.Free(s.Buffer())
	if n := testing.AllocsPerRun(1000, func() {
		b := s.Buffer()
		s.Enter(0, 1)
		b.Claim(1)
		b.Filled(5)
		b.Release()
		s.Complete(1, 5)
		s.Free(b)
		s.FreePipe(s.Pipe(2))
		s.Leave()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// What a message costs beside its system calls, and of what that is made.
func BenchmarkMessage(b *testing.B) {
	s, _ := newStore(b, 10, 2)
	buffer := s.Buffer()
	for _, c := range []struct {
		name string
		do   func()
	}{
		{"whole", func() {
			s.Enter(1, 77)
			buffer.Claim(3)
			buffer.Filled(64)
			buffer.Release()
			s.Complete(3, 64)
			s.Leave()
		}},
		{"Enter and Leave", func() { s.Enter(1, 77); s.Leave() }},
		{"Claim and Release", func() { buffer.Claim(3); buffer.Release() }},
		{"Filled", func() { buffer.Filled(64) }},
		{"Complete", func() { s.Complete(3, 64) }},
		{"Mark", func() { s.Mark(3, inflight.MarkFin) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				c.do()
			}
		})
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add([]byte("HFflight"), uint16(0))
	f.Add([]byte{2}, uint16(8))
	f.Add([]byte{200}, uint16(16))
	f.Add([]byte{1}, uint16(16))
	f.Add(bytes.Repeat([]byte{0xff}, 64), uint16(8))
	f.Add([]byte{1}, uint16(4096))
	f.Add([]byte{1}, uint16(8192+4095))
	f.Add(bytes.Repeat([]byte{0xff}, 16), uint16(3*4096))
	f.Fuzz(func(t *testing.T, data []byte, offset uint16) {
		var changed []byte
		fd := handmade(t, handmadeSize, sealed, func(b []byte) {
			copy(b[int(offset)%len(b):], data)
			changed = b
		})
		s, err := inflight.Open(fd, nil)
		if err != nil {
			return
		}
		defer s.Close()
		if !empty(changed[4096:12288]) {
			t.Error("a file was opened in which something is claimed")
		}
		// All that it says it has can be used.
		n, last := 0, inflight.Direction(s.Directions()-1)
		for b := s.Buffer(); b != nil; b = s.Buffer() {
			b.Claim(last)
			b.Bytes[inflight.BufferSize-1] = 1
			b.Release()
			n++
		}
		s.Complete(last, 1)
		if n != 2 || uint64(s.Directions()) != at(changed, 16) || s.Completed(last) == 0 {
			t.Errorf("%d buffers, %d directions, %d completed", n, s.Directions(), s.Completed(last))
		}
	})
}
