package metrics

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Size is how many bytes a memory file has. Those that were never written cost
// nothing.
const Size = 16 << 20

// With these seals nobody can make the file shorter under a mapping, which would
// kill the reader with SIGBUS, or longer, which would cost memory, or add a seal that
// stops the writer.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// File is the reading side of a memory file that a generation counts in. The process
// that writes may be anybody: it can write nonsense, and nothing else.
//
// Its methods may be called concurrently.
type File struct {
	mu  sync.RWMutex
	fd  int
	mem []byte // read only; nil after Close
}

// NewFile makes an empty memory file. The caller closes it.
func NewFile() (*File, error) {
	fd, err := unix.MemfdCreate("holdfast metrics", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("metrics: memfd_create: %w", err)
	}
	f := &File{fd: fd}
	if err := f.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("metrics: %w", err), unix.Close(fd))
	}
	return f, nil
}

func (f *File) prepare() error {
	if err := unix.Ftruncate(f.fd, Size); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	if _, err := unix.FcntlInt(uintptr(f.fd), unix.F_ADD_SEALS, seals); err != nil {
		return os.NewSyscallError("seal", err)
	}
	mem, err := unix.Mmap(f.fd, 0, Size, unix.PROT_READ, unix.MAP_SHARED)
	f.mem = mem
	return os.NewSyscallError("mmap", err)
}

// FD returns the descriptor, to be sent to the generation. It belongs to the File.
func (f *File) FD() int { return f.fd }

// Families returns what the file holds now. Whatever has been written into it, the
// work is bounded and what is returned is valid. What is not valid is left out; the
// error says so, and comes beside the families that are.
func (f *File) Families() ([]Family, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.mem == nil {
		return nil, fmt.Errorf("metrics: %w", os.ErrClosed)
	}
	return read(f.mem)
}

// Close gives the memory back, once nobody else has the file. It waits for a
// [File.Families] that is under way.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mem == nil {
		return nil
	}
	err := errors.Join(unix.Munmap(f.mem), unix.Close(f.fd))
	f.mem = nil
	return err
}

// Open returns a Registry that counts in a memory file that nobody has counted in
// before. It takes fd over, also when it fails, and keeps the mapping as long as the
// process lives.
func Open(fd int) (*Registry, error) {
	mem, err := mapForWriting(fd)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	if used := cell(mem, atUsed).Load(); used != 0 {
		return nil, errors.Join(errors.New("metrics: the memory file is in use"), unix.Munmap(mem))
	}
	r := NewRegistry()
	r.file = newWriter(mem)
	r.unshown = r.Gauge(unshown)
	return r, nil
}

func mapForWriting(fd int) ([]byte, error) {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return nil, errors.New("not a sealed memory file")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	// An older or newer supervisor may have made it of another size.
	const least, most = 64 << 10, 1 << 30
	if stat.Size < least || stat.Size > most {
		return nil, fmt.Errorf("a memory file of %d bytes", stat.Size)
	}
	mem, err := unix.Mmap(fd, 0, int(stat.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return mem, os.NewSyscallError("mmap", err)
}
