package inflight

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// With these seals nobody can make the file shorter under a mapping, which would kill
// whoever uses it with SIGBUS, or longer, or add a seal that stops the writer.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

const (
	magic      = "HFflight"
	version    = 2
	headerSize = 48 // of what never changes
	workingAt  = 64
	suspectAt  = 72
	page       = 4096
	word       = 8
)

// The most that a file can be made for.
const (
	MaxDirections = 1 << 24
	MaxBuffers    = 1 << 16
	MaxPipes      = page / word
)

// layout is where the parts of a file are.
type layout struct {
	directions, buffers                            int
	bufferClaims, pipeClaims, counts, memory, size int // offsets
}

func newLayout(directions, buffers uint64) (l layout, err error) {
	if directions < 1 || directions > MaxDirections || buffers < 1 || buffers > MaxBuffers {
		return l, fmt.Errorf("a memory file for %d directions and %d buffers", directions, buffers)
	}
	l.directions, l.buffers = int(directions), int(buffers)
	l.bufferClaims = page
	l.pipeClaims = roundUp(l.bufferClaims+l.buffers*word, page)
	l.counts = l.pipeClaims + MaxPipes*word
	l.memory = roundUp(l.counts+l.directions*word, BufferSize)
	l.size = l.memory + l.buffers*BufferSize
	return l, nil
}

func roundUp(n, multiple int) int { return (n + multiple - 1) / multiple * multiple }

func (l layout) header() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	for _, v := range []int{version, l.directions, l.buffers, BufferSize, MaxPipes} {
		b = binary.NativeEndian.AppendUint64(b, uint64(v))
	}
	return b
}

// NewFile makes an empty memory file. It has its full size at once and costs what is
// touched. The caller closes it, or hands it to [Open].
func NewFile(directions, buffers int) (fd int, err error) {
	l, err := newLayout(uint64(directions), uint64(buffers))
	if err != nil {
		return -1, fmt.Errorf("inflight: %w", err)
	}
	fd, err = unix.MemfdCreate("holdfast in flight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, fmt.Errorf("inflight: %w", os.NewSyscallError("memfd_create", err))
	}
	if err := l.prepare(fd); err != nil {
		return -1, errors.Join(fmt.Errorf("inflight: %w", err), unix.Close(fd))
	}
	return fd, nil
}

func (l layout) prepare(fd int) error {
	if err := unix.Ftruncate(fd, int64(l.size)); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	if _, err := unix.Pwrite(fd, l.header(), 0); err != nil {
		return os.NewSyscallError("pwrite", err)
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	return os.NewSyscallError("seal", err)
}

// readLayout returns the layout of a file that somebody else may have made.
func readLayout(fd int) (l layout, err error) {
	if got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || got&seals != seals {
		return l, errors.New("not a sealed memory file")
	}
	b := make([]byte, headerSize)
	if n, err := unix.Pread(fd, b, 0); err != nil || n < headerSize || string(b[:word]) != magic {
		return l, errors.New("not a file for bytes in flight")
	}
	field := func(at int) uint64 { return binary.NativeEndian.Uint64(b[at:]) }
	if v := field(8); v != version {
		return l, fmt.Errorf("version %d of the memory file, not %d", v, version)
	}
	if l, err = newLayout(field(16), field(24)); err != nil {
		return l, err
	}
	if field(32) != BufferSize || field(40) != MaxPipes {
		return l, fmt.Errorf("a memory file with buffers of %d bytes and %d pipes", field(32), field(40))
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return l, os.NewSyscallError("fstat", err)
	}
	if stat.Size != int64(l.size) {
		return l, fmt.Errorf("a memory file of %d bytes, not %d", stat.Size, l.size)
	}
	return l, nil
}

// pagesInUse says which pages of a part of the file have a word that is not 0. Reading
// them through a mapping would give memory to each.
func pagesInUse(fd, at, words int) ([]bool, error) {
	used := make([]bool, roundUp(words*word, page)/page)
	b, zero := make([]byte, page), make([]byte, page)
	for i := range used {
		if n, err := unix.Pread(fd, b, int64(at+i*page)); err != nil || n != page {
			return nil, errors.Join(errors.New("a short memory file"), err)
		}
		used[i] = !bytes.Equal(b, zero)
	}
	return used, nil
}
