package tickets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

// How keys are kept for who comes after. Every record has the same size, so that nothing of a
// former one is left where it is written over that. All numbers are big-endian:
//
//	 0  uint8: version of the layout, 1
//	 1  uint8: 1 if the keys are condemned, otherwise 0
//	 2  uint8: how many former keys there are
//	 3  zero
//	 8  uint64: rotations
//	16  uint64: nanoseconds of the clock when the current key became that
//	24  the current key, the next one
//	88  for each former key: uint64, as above when it became one, and the key
//
// and zero up to the end. Another layout gets another version.
const (
	version    = 1
	headerSize = 24
	keySize    = len(key{})
	formerSize = 8 + keySize
	recordSize = headerSize + 2*keySize + (Used-1)*formerSize
)

// Record returns the keys as [Parse] reads them.
func (k Keys) Record() []byte {
	b := make([]byte, recordSize)
	b[0], b[2] = version, byte(len(k.former))
	if k.condemned {
		b[1] = 1
	}
	binary.BigEndian.PutUint64(b[8:], k.rotations)
	binary.BigEndian.PutUint64(b[16:], uint64(k.since))
	copy(b[headerSize:], k.current[:])
	copy(b[headerSize+keySize:], k.next[:])
	rest := b[headerSize+2*keySize:]
	for _, f := range k.former {
		binary.BigEndian.PutUint64(rest, uint64(f.since))
		copy(rest[8:], f.key[:])
		rest = rest[formerSize:]
	}
	return b
}

// Parse reads what [Keys.Record] has written, whoever has had it since. A time that is not over
// is taken for now. The error says nothing of the keys.
func Parse(b []byte, now time.Duration) (Keys, error) {
	switch {
	case len(b) == 0:
		return Keys{}, errors.New("nothing is there")
	case b[0] != version:
		return Keys{}, fmt.Errorf("layout version %d is not known", b[0])
	case len(b) != recordSize:
		return Keys{}, fmt.Errorf("%d bytes, not %d", len(b), recordSize)
	case b[1] > 1 || b[2] > Used-1 || !empty(b[3:8]):
		return Keys{}, errors.New("its header cannot be")
	}
	past := func(b []byte) time.Duration {
		return time.Duration(min(binary.BigEndian.Uint64(b), uint64(max(now, 0))))
	}
	s := &state{
		rotations: binary.BigEndian.Uint64(b[8:]), since: past(b[16:]), condemned: b[1] == 1,
		current: key(b[headerSize:][:keySize]), next: key(b[headerSize+keySize:][:keySize]),
	}
	rest := b[headerSize+2*keySize:]
	for range b[2] {
		s.former = append(s.former, former{key(rest[8:][:keySize]), past(rest)})
		rest = rest[formerSize:]
	}
	all := Keys{s}.All()
	for i, k := range all {
		if k == (key{}) || slices.Contains(all[:i], k) {
			return Keys{}, errors.New("a key is empty, or there twice")
		}
	}
	if !empty(rest) {
		return Keys{}, errors.New("something is behind the last key")
	}
	return Keys{s}, nil
}

func empty(b []byte) bool {
	return !slices.ContainsFunc(b, func(b byte) bool { return b != 0 })
}
