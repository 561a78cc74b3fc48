package ledger_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/ledger"
)

type facts struct {
	Epoch uint64 `json:"epoch"`
	Name  string `json:"name"`
}

func newFile(t testing.TB) *ledger.File {
	t.Helper()
	f, err := ledger.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func write(t testing.TB, f *ledger.File, v any) {
	t.Helper()
	if err := f.Write(v); err != nil {
		t.Fatal(err)
	}
}

func TestWhatWasWrittenLastIsRead(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	for i := uint64(1); i <= 5; i++ {
		want := facts{Epoch: i, Name: strings.Repeat("x", int(10-i))}
		write(t, f, want)
		var got facts
		sequence, err := ledger.Read(f.FD(), &got)
		if err != nil || got != want || sequence != i {
			t.Errorf("got %+v, %d, %v", got, sequence, err)
		}
	}
	for i, want := range [][]byte{[]byte("not JSON"), bytes.Repeat([]byte{7}, ledger.MostJSON+1), {}} {
		write(t, f, want)
		var got []byte
		sequence, err := ledger.Read(f.FD(), &got)
		if err != nil || !bytes.Equal(got, want) || sequence != uint64(i+6) {
			t.Errorf("got %d bytes, %d, %v", len(got), sequence, err)
		}
	}
}

// Whoever has only a duplicate reads on when the maker is gone.
func TestTheContentOutlivesItsMaker(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	write(t, f, facts{Epoch: 7})
	dup, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	for range 2 {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	var got facts
	if _, err := ledger.Read(dup, &got); err != nil || got.Epoch != 7 {
		t.Errorf("got %+v, %v", got, err)
	}
	if err := f.Write(got); !errors.Is(err, os.ErrClosed) {
		t.Errorf("written after Close: %v", err)
	}
}

func TestWhatCannotBeWrittenChangesNothing(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	write(t, f, facts{Epoch: 1})
	for name, v := range map[string]any{
		"not JSON":       func() {},
		"too much JSON":  strings.Repeat("x", ledger.MostJSON),
		"too many bytes": make([]byte, ledger.MostBytes+1),
	} {
		if err := f.Write(v); err == nil {
			t.Errorf("%s: written", name)
		}
		var got facts
		if sequence, err := ledger.Read(f.FD(), &got); err != nil || got.Epoch != 1 || sequence != 1 {
			t.Errorf("%s: got %+v, %d, %v", name, got, sequence, err)
		}
	}
	write(t, f, make([]byte, ledger.MostBytes))
	var got []byte
	if _, err := ledger.Read(f.FD(), &got); err != nil || len(got) != ledger.MostBytes {
		t.Errorf("the longest content: %d bytes, %v", len(got), err)
	}
}

func TestAFileThatNobodyHasWrittenIsAnError(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	var v facts
	if _, err := ledger.Read(f.FD(), &v); err == nil || !strings.Contains(err.Error(), "nothing was written") {
		t.Errorf("got %v", err)
	}
}

// A reader beside a maker that writes all the time sees nothing that was not written,
// and nothing older than before.
func TestReadingWhileItIsWritten(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	write(t, f, pattern(1))
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			last := uint64(0)
			for {
				select {
				case <-done:
					return
				default:
				}
				var b []byte
				sequence, err := ledger.Read(f.FD(), &b)
				if err != nil && strings.Contains(err.Error(), "checksum") {
					continue // overtaken too often
				}
				if err != nil || sequence < last || !bytes.Equal(b, pattern(sequence)) {
					t.Errorf("after %d: %d, %d bytes, %v", last, sequence, len(b), err)
					return
				}
				last = sequence
			}
		})
	}
	for i := uint64(2); i < 1000; i++ {
		write(t, f, pattern(i))
	}
	close(done)
	readers.Wait()
}

const longest = 300_000

// noise is what all contents are parts of.
var noise = sync.OnceValue(func() []byte {
	b := make([]byte, 2*longest)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
})

// pattern is a content of its own for each sequence number, of any length.
func pattern(sequence uint64) []byte {
	return noise()[sequence*8191%longest:][:sequence*7919%longest]
}

// Nobody but who has made the file can change it, with whatever descriptor and in
// whatever way.
func TestOnlyTheMakerWrites(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	write(t, f, facts{Epoch: 1})
	opened, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.FD()), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(opened)
	dup, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	const length = 4096
	for name, fd := range map[string]int{"duplicate": dup, "opened again": opened, "itself": f.FD()} {
		mem, err := unix.Mmap(fd, 0, length, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		for way, attempt := range map[string]func() error{
			"mapped writable": func() error {
				mem, err := unix.Mmap(fd, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err == nil {
					err = errors.Join(unix.Munmap(mem))
				}
				return err
			},
			"made writable":  func() error { return unix.Mprotect(mem, unix.PROT_READ|unix.PROT_WRITE) },
			"pages removed":  func() error { return unix.Madvise(mem, unix.MADV_REMOVE) },
			"written":        func() error { _, err := unix.Pwrite(fd, []byte("x"), 70); return err },
			"cut":            func() error { return unix.Ftruncate(fd, 0) },
			"grown":          func() error { return unix.Ftruncate(fd, 1<<40) },
			"a hole punched": func() error { return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, length) },
			"sealed":         func() error { return addSeals(fd, unix.F_SEAL_WRITE) },
			"cut when opened": func() error {
				fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR|unix.O_TRUNC|unix.O_CLOEXEC, 0)
				if err == nil {
					err = errors.Join(unix.Close(fd))
				}
				return err
			},
		} {
			if err := attempt(); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
				t.Errorf("%s, %s: %v", name, way, err)
			}
		}
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	}
	write(t, f, facts{Epoch: 2})
	var got facts
	if _, err := ledger.Read(dup, &got); err != nil || got.Epoch != 2 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func addSeals(fd, seals int) error {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	return err
}

const allSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_FUTURE_WRITE

// memory returns a memory file that holds b.
func memory(t testing.TB, b []byte, seals int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(len(b))); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, b, 0); err != nil {
		t.Fatal(err)
	}
	if err := addSeals(fd, seals); err != nil {
		t.Fatal(err)
	}
	return fd
}

var order = binary.NativeEndian

// handmade is a file as the documentation of the package describes it.
func handmade(size int, slots ...[]byte) []byte {
	b := make([]byte, 64+2*size)
	copy(b, "HFledger")
	order.PutUint64(b[8:], 1)
	order.PutUint64(b[16:], uint64(size))
	for i, slot := range slots {
		copy(b[64+i*size:64+(i+1)*size], slot)
	}
	return b
}

func slot(sequence uint64, content string) []byte {
	b := order.AppendUint64(nil, sequence)
	b = order.AppendUint64(b, uint64(len(content)))
	sum := crc32.Checksum(append(bytes.Clone(b), content...), crc32.MakeTable(crc32.Castagnoli))
	return append(order.AppendUint64(b, uint64(sum)), content...)
}

// Another build reads what is documented, with slots of any size.
func TestAFileOfAnotherBuildIsRead(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"both":        handmade(64, slot(4, `{"epoch":4}`), slot(5, `{"epoch":5,"newer":[1]}`)),
		"the first":   handmade(4096, slot(5, `{"epoch":5}`)),
		"the second":  handmade(48, nil, slot(5, `{"epoch":5}`)),
		"interrupted": handmade(48, slot(0, `{"epoch":6}`), slot(5, `{"epoch":5}`)),
	} {
		var got facts
		if sequence, err := ledger.Read(memory(t, b, allSeals), &got); err != nil || sequence != 5 || got.Epoch != 5 {
			t.Errorf("%s: got %+v, %d, %v", name, got, sequence, err)
		}
	}
	f := newFile(t)
	write(t, f, facts{Epoch: 5})
	head := make([]byte, 64)
	if _, err := unix.Pread(f.FD(), head, 0); err != nil {
		t.Fatal(err)
	}
	size := int(order.Uint64(head[16:]))
	want := slot(1, `{"epoch":5,"name":""}`)
	got := make([]byte, len(want))
	if _, err := unix.Pread(f.FD(), got, int64(64+size)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) || !bytes.Equal(head, handmade(size)[:64]) {
		t.Errorf("the layout is not what is documented: %q, %q", head, got)
	}
}

func TestNonsenseIsAnError(t *testing.T) {
	t.Parallel()
	good := handmade(64, slot(1, `{"epoch":5}`), slot(2, `{"epoch":6}`))
	change := func(at int, to ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], to)
		return b
	}
	const second = 64 + 64
	for name, c := range map[string]struct {
		b     []byte
		seals int
		want  string
	}{
		"can be cut":           {good, allSeals &^ unix.F_SEAL_SHRINK, "not a sealed memory file"},
		"can grow":             {good, allSeals &^ unix.F_SEAL_GROW, "not a sealed memory file"},
		"can be written":       {good, allSeals &^ unix.F_SEAL_FUTURE_WRITE, "not a sealed memory file"},
		"can be sealed":        {good, allSeals &^ unix.F_SEAL_SEAL, "not a sealed memory file"},
		"nothing":              {nil, allSeals, "too short"},
		"a header only":        {good[:64], allSeals, "slots of"},
		"another file":         {change(0, 'h'), allSeals, "not a file of ours"},
		"another layout":       {change(8, 2), allSeals, "version 2"},
		"slots of nothing":     {change(16, 0), allSeals, "slots of 0"},
		"slots of odd size":    {change(16, 63), allSeals, "slots of 63"},
		"slots too large":      {change(16, 72), allSeals, "slots of 72"},
		"slots far too large":  {change(16, bytes.Repeat([]byte{0xff}, 8)...), allSeals, "slots of"},
		"content too long":     {change(second+8, 41), allSeals, "content of 41"},
		"content far too long": {change(second+8, bytes.Repeat([]byte{0xff}, 8)...), allSeals, "content of"},
		"content changed":      {change(second+30, 'x'), allSeals, "checksum"},
		"length changed":       {change(second+8, 5), allSeals, "checksum"},
		"not JSON":             {handmade(64, slot(1, "{")), allSeals, "JSON"},
		"other JSON":           {handmade(64, slot(1, `{"epoch":"five"}`)), allSeals, "json"},
	} {
		fd := memory(t, c.b, c.seals)
		var got facts
		if _, err := ledger.Read(fd, &got); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			t.Errorf("%s: the descriptor is closed", name)
		}
	}
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	for _, fd := range []int{-1, pipe[0]} {
		var got []byte
		if _, err := ledger.Read(fd, &got); err == nil {
			t.Error("read from what is no file")
		}
	}
}

// What somebody else has made does not have us fill our memory: JSON becomes many times
// as much as it is.
func TestLongJSONIsNotRead(t *testing.T) {
	t.Parallel()
	long := "[" + strings.Repeat("{},", ledger.MostJSON/3) + "{}]"
	fd := memory(t, handmade((len(long)+31)&^7, slot(1, long)), allSeals)
	var got []facts
	if _, err := ledger.Read(fd, &got); err == nil {
		t.Errorf("read %d", len(got))
	}
	var b []byte
	if _, err := ledger.Read(fd, &b); err != nil || len(b) != len(long) {
		t.Errorf("as bytes: %d, %v", len(b), err)
	}
}

func FuzzRead(f *testing.F) {
	good := handmade(64, slot(1, `{"epoch":5}`), slot(2, `{"epoch":6}`))
	f.Add(good)
	f.Add(handmade(24))
	f.Add([]byte{})
	f.Add(handmade(48, slot(0, `{"epoch":6}`), slot(1<<63, `[1,2]`)))
	for at := 0; at < len(good); at += 8 {
		bad := bytes.Clone(good)
		bad[at] ^= 0x41
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		fd := memory(t, b, allSeals)
		var raw []byte
		first, err := ledger.Read(fd, &raw)
		if err == nil && (first == 0 || len(raw) > len(b)) {
			t.Errorf("%d, %d bytes", first, len(raw))
		}
		var v facts
		second, jsonErr := ledger.Read(fd, &v)
		if jsonErr == nil && (err != nil || first != second) {
			t.Errorf("as bytes: %d, %v; as JSON: %d", first, err, second)
		}
	})
}
