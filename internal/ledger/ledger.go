// Package ledger is a memory file in which a supervisor leaves to its successor what
// only supervisors know.
//
// Its maker writes ([File.Write]), as often as something changes. All others hold
// duplicates of its descriptor, generations for example, which do not look into it, so
// it lives as long as any of them. Whoever is handed such a duplicate reads what was
// written last ([Read]), when the maker is gone.
//
//   - The maker may be killed at any moment, also within a Write: then what was there
//     before is read.
//   - Nobody but the maker can write it, ever: the kernel refuses that to everybody else
//     who has the descriptor. A successor makes a file of its own.
//   - That says nothing of who the maker is. A reader believes no file more than the one
//     who handed it over; whatever is in it, reading it is safe and bounded.
//
// # Layout
//
// All numbers have the machine's byte order. After the header are two slots, which are
// written in turn, so that the one with what was written before stays whole. The one with
// the higher sequence number counts.
//
//	 0  magic: the 8 bytes HFledger
//	 8  uint64: version of the layout, 1
//	16  uint64: the size of a slot in bytes, a multiple of 8
//	24  zero up to 64
//	64  two slots
//
// The sequence number of a slot is written last:
//
//	 0  uint64: how many writes there have been with this one; 0: nothing is here
//	 8  uint64: length of the content
//	16  uint64: CRC-32C of the two numbers before it and the content
//	24  content
//
// A file with another version of the layout is not read. Sizes may differ.
package ledger

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What can be written. JSON is short because a reader's memory may be many times as
// much as what somebody else has made of it. What was never written costs nothing.
const (
	MostBytes = 80 << 20
	MostJSON  = 1 << 20
)

const (
	magic      = "HFledger"
	version    = 1
	headerSize = 64
	slotHeader = 24
	slotSize   = slotHeader + MostBytes
)

// With these seals the file keeps its size, and only mappings that were there before
// can be written to: F_SEAL_FUTURE_WRITE (Linux 5.1) refuses any other, and write(2).
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_FUTURE_WRITE

var (
	order = binary.NativeEndian
	table = crc32.MakeTable(crc32.Castagnoli)
)

// File is the writing side. Its methods may be called concurrently.
type File struct {
	fd int

	mu       sync.Mutex
	mem      []byte // nil after Close
	sequence uint64 // of what was written last
}

// New makes a file in which nothing is written yet. The caller closes it.
func New() (*File, error) {
	fd, err := unix.MemfdCreate("holdfast ledger", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("ledger: memfd_create: %w", err)
	}
	f := &File{fd: fd}
	if err := f.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("ledger: %w", err), f.Close())
	}
	return f, nil
}

func (f *File) prepare() error {
	const size = headerSize + 2*slotSize
	if err := unix.Ftruncate(f.fd, size); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	mem, err := unix.Mmap(f.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	f.mem = mem
	copy(mem, magic)
	order.PutUint64(mem[8:], version)
	order.PutUint64(mem[16:], slotSize)
	_, err = unix.FcntlInt(uintptr(f.fd), unix.F_ADD_SEALS, seals)
	return os.NewSyscallError("seal", err)
}

// FD returns the descriptor, to be given to others. It belongs to the File.
func (f *File) FD() int { return f.fd }

// Write replaces the content: by v itself if it is a []byte of at most [MostBytes], else
// by v as JSON, of at most [MostJSON] bytes. If it fails, the content is what it was.
func (f *File) Write(v any) error {
	content, err := encode(v)
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mem == nil {
		return fmt.Errorf("ledger: %w", os.ErrClosed)
	}
	f.sequence++
	slot := f.mem[headerSize+slotSize*int(f.sequence%2):][:slotSize]
	head := slotHead(f.sequence, content)
	copy(slot[slotHeader:], content)
	copy(slot[8:slotHeader], head[8:])
	(*atomic.Uint64)(unsafe.Pointer(&slot[0])).Store(f.sequence)
	return nil
}

func encode(v any) ([]byte, error) {
	if b, ok := v.([]byte); ok {
		return b, tooLong(len(b), MostBytes)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return b, tooLong(len(b), MostJSON)
}

func tooLong(length, most int) error {
	if length > most {
		return fmt.Errorf("%d bytes are too many (%d)", length, most)
	}
	return nil
}

// slotHead returns what a slot with this content begins with.
func slotHead(sequence uint64, content []byte) (head [slotHeader]byte) {
	order.PutUint64(head[:], sequence)
	order.PutUint64(head[8:], uint64(len(content)))
	sum := crc32.Update(crc32.Checksum(head[:16], table), table, content)
	order.PutUint64(head[16:], uint64(sum))
	return head
}

// Close gives the memory back, once nobody else has the file.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return nil
	}
	var err error
	if f.mem != nil {
		err = unix.Munmap(f.mem)
	}
	err = errors.Join(err, unix.Close(f.fd))
	f.mem, f.fd = nil, -1
	return err
}
