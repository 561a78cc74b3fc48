package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Read stores in v what was written last: the bytes themselves if it is a *[]byte, else
// what they say as JSON. It returns how many writes there have been. After an error v is
// of no use.
//
// fd stays the caller's. Whoever has made the file, the work is bounded by its size, of
// which no more is read than may be written, and cannot fault.
func Read(fd int, v any) (sequence uint64, err error) {
	sequence, content, err := read(fd, v)
	if err != nil {
		return 0, fmt.Errorf("ledger: %w", err)
	}
	if b, ok := v.(*[]byte); ok {
		*b = content
		return sequence, nil
	}
	if err := json.Unmarshal(content, v); err != nil {
		return 0, fmt.Errorf("ledger: %w", err)
	}
	return sequence, nil
}

func read(fd int, v any) (uint64, []byte, error) {
	size, err := slotSizeOf(fd)
	if err != nil {
		return 0, nil, err
	}
	r := reader{fd: fd, slotSize: size, most: MostJSON}
	if _, ok := v.(*[]byte); ok {
		r.most = MostBytes
	}
	// The file lies still once its maker is gone. While that one writes, it may overtake
	// the reader, which begins again.
	const tries = 10
	for range tries {
		sequence, content, err := r.newest()
		if !errors.Is(err, errChecksum) {
			return sequence, content, err
		}
	}
	return 0, nil, errChecksum
}

// slotSizeOf checks that a file is one of ours and returns the size of its slots. Seals
// are something that only memory files have, so none of the reads below blocks.
func slotSizeOf(fd int) (int64, error) {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return 0, errors.New("not a sealed memory file")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	var head [headerSize]byte
	if err := readAt(fd, head[:], 0); err != nil {
		return 0, err
	}
	if string(head[:8]) != magic {
		return 0, errors.New("not a file of ours")
	}
	if v := order.Uint64(head[8:]); v != version {
		return 0, fmt.Errorf("layout version %d is not known", v)
	}
	size := order.Uint64(head[16:])
	const least, most = slotHeader, 1 << 30 // another build may have made it of another size
	if size < least || size > most || size%8 != 0 || stat.Size != headerSize+2*int64(size) {
		return 0, fmt.Errorf("slots of %d bytes in a file of %d", size, stat.Size)
	}
	return int64(size), nil
}

var (
	errEmpty    = errors.New("nothing was written")
	errChecksum = errors.New("the checksum does not fit")
)

type reader struct {
	fd       int
	slotSize int64
	most     int
}

// newest returns what the slot with the higher sequence number holds. While it does not
// fit its checksum, because the maker writes there again, the other slot holds what is
// newer still.
func (r *reader) newest() (uint64, []byte, error) {
	var heads [2][slotHeader]byte
	for i := range heads {
		if err := readAt(r.fd, heads[i][:], headerSize+int64(i)*r.slotSize); err != nil {
			return 0, nil, err
		}
	}
	newest := int64(0)
	if order.Uint64(heads[1][:]) > order.Uint64(heads[0][:]) {
		newest = 1
	}
	head := heads[newest]
	sequence, length := order.Uint64(head[:]), order.Uint64(head[8:])
	switch {
	case sequence == 0:
		return 0, nil, errEmpty
	case length > uint64(r.slotSize-slotHeader) || length > uint64(r.most):
		return 0, nil, fmt.Errorf("a content of %d bytes", length)
	}
	content := make([]byte, length)
	if err := readAt(r.fd, content, headerSize+newest*r.slotSize+slotHeader); err != nil {
		return 0, nil, err
	}
	if slotHead(sequence, content) != head {
		return 0, nil, errChecksum
	}
	return sequence, content, nil
}

func readAt(fd int, b []byte, at int64) error {
	for len(b) > 0 {
		n, err := unix.Pread(fd, b, at)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("pread", err)
		case n == 0:
			return errors.New("it is too short")
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}
