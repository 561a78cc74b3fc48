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

// ownSeals are those of a file that only the process counts in that has made it: nobody
// can map it for writing, or write to it, from then on (Linux 5.1).
const ownSeals = seals | unix.F_SEAL_FUTURE_WRITE

// File is the reading side of a memory file that a generation counts in. The process
// that writes may be anybody: it can write nonsense, and nothing else.
//
// Its methods may be called concurrently.
type File struct {
	mu  sync.RWMutex
	fd  int
	mem []byte // read only; nil after Close
}

// NewFile makes an empty memory file, for somebody else to count in. The caller closes
// it.
func NewFile() (*File, error) {
	fd, err := create()
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	f, err := seal(fd, seals)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("metrics: %w", err), unix.Close(fd))
	}
	return f, nil
}

// NewOwnFile makes a memory file for the calling process alone to count in, and returns
// the Registry that does. Whoever is handed its descriptor can read it with [OpenFile],
// also when the process is gone, and change nothing. The caller closes the File; the
// Registry keeps its mapping as long as the process lives.
func NewOwnFile() (*File, *Registry, error) {
	fd, err := create()
	if err != nil {
		return nil, nil, fmt.Errorf("metrics: %w", err)
	}
	mem, err := unix.Mmap(fd, 0, Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("metrics: mmap: %w", err), unix.Close(fd))
	}
	f, err := seal(fd, ownSeals)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("metrics: %w", err), unix.Munmap(mem), unix.Close(fd))
	}
	return f, newFileRegistry(mem), nil
}

func create() (fd int, err error) {
	fd, err = unix.MemfdCreate("holdfast metrics", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	if err := unix.Ftruncate(fd, Size); err != nil {
		return -1, errors.Join(os.NewSyscallError("ftruncate", err), unix.Close(fd))
	}
	return fd, nil
}

// seal returns the File of a memory file that has its size.
func seal(fd, seals int) (*File, error) {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, os.NewSyscallError("seal", err)
	}
	mem, err := unix.Mmap(fd, 0, Size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return &File{fd: fd, mem: mem}, nil
}

// OpenFile returns the reading side of a memory file that somebody else has made: a
// supervisor before this one, as a rule, but what hands the descriptor over may say so
// of any. It takes fd over, also when it fails.
func OpenFile(fd int) (*File, error) {
	mem, err := mapFile(fd, unix.PROT_READ)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("metrics: %w", err), unix.Close(fd))
	}
	return &File{fd: fd, mem: mem}, nil
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
	mem, err := mapFile(fd, unix.PROT_READ|unix.PROT_WRITE)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	if used := cell(mem, atUsed).Load(); used != 0 {
		return nil, errors.Join(errors.New("metrics: the memory file is in use"), unix.Munmap(mem))
	}
	return newFileRegistry(mem), nil
}

func newFileRegistry(mem []byte) *Registry {
	r := NewRegistry()
	r.file = newWriter(mem)
	r.unshown = r.Gauge(unshown)
	return r
}

// mapFile maps a memory file that may be anybody's. Sealed as it is, no access can fault.
func mapFile(fd, prot int) ([]byte, error) {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return nil, errors.New("not a sealed memory file")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	// An older or newer supervisor may have made it of another size.
	const least, most = 64 << 10, 64 << 20
	if stat.Size < least || stat.Size > most {
		return nil, fmt.Errorf("a memory file of %d bytes", stat.Size)
	}
	mem, err := unix.Mmap(fd, 0, int(stat.Size), prot, unix.MAP_SHARED)
	return mem, os.NewSyscallError("mmap", err)
}
