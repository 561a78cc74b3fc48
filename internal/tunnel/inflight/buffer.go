package inflight

import "golang.org/x/sys/unix"

// BufferSize is how many bytes a buffer has.
const BufferSize = 64 << 10

// Buffer is memory of the file.
type Buffer struct {
	Bytes []byte // the first one is the first of those that were claimed
	claim claim
	used  bool // since it was trimmed
}

// Buffer returns a buffer that is free, that which was used last; nil if there is none.
func (s *Store) Buffer() *Buffer {
	b := s.freeBuffer()
	if b != nil {
		b.used = true
		s.heldBuffers.Add(1)
	}
	return b
}

func (s *Store) freeBuffer() *Buffer {
	if last := len(s.freeBuffers) - 1; last >= 0 {
		b := s.freeBuffers[last]
		s.freeBuffers = s.freeBuffers[:last]
		return b
	}
	if s.fresh == s.buffers {
		return nil
	}
	s.fresh++
	return s.newBuffer(s.fresh - 1)
}

// FreeBuffers returns how many more buffers there are.
func (s *Store) FreeBuffers() int { return len(s.freeBuffers) + s.buffers - s.fresh }

func (s *Store) newBuffer(i int) *Buffer {
	at := s.memory + i*BufferSize
	return &Buffer{
		Bytes: s.mem[at : at+BufferSize : at+BufferSize],
		claim: claim{s, &s.words(s.bufferClaims, s.buffers)[i]},
	}
}

// Claim says that what comes into the buffer from now on is of direction d. What was of
// another direction was completed.
func (b *Buffer) Claim(d Direction) { b.claim.set(d) }

// Filled says that the first n bytes of the buffer were taken from the source of the
// direction that claims it. It is called at once after the read.
func (b *Buffer) Filled(n int) {
	b.claim.word.Store(uint64(n)<<filledShift | uint64(uint32(b.claim.word.Load())))
}

// Release ends the claim: what is in the buffer is nobody's.
func (b *Buffer) Release() { b.claim.clear() }

// Free takes a buffer back and ends its claim.
func (s *Store) Free(b *Buffer) {
	b.Release()
	s.freeBuffers = append(s.freeBuffers, b)
	s.heldBuffers.Add(-1)
}

// trim gives the buffer's memory back. It reads as zeros then.
func (b *Buffer) trim() {
	if b.used && unix.Madvise(b.Bytes, unix.MADV_REMOVE) == nil {
		b.used = false
	}
}
