package http1

import "sync"

// The sizes of pooled buffers. A usual head fits the smallest; the largest is the
// most that is held of early bytes.
const (
	smallBuffer  = 4 << 10
	mediumBuffer = 16 << 10
	largeBuffer  = 64 << 10
)

// Buffers is a cache of read and write buffers that connections share. The zero
// value is ready; it may be used by many goroutines and must not be copied. A
// connection holds a buffer only while it has bytes to keep.
type Buffers struct {
	small, medium, large sync.Pool // of pointers to arrays, so that putting one back allocates nothing
}

// get returns a buffer of n or more bytes; its length is its capacity.
func (b *Buffers) get(n int) []byte {
	switch {
	case n <= smallBuffer:
		if p, ok := b.small.Get().(*[smallBuffer]byte); ok {
			return p[:]
		}
		return make([]byte, smallBuffer)
	case n <= mediumBuffer:
		if p, ok := b.medium.Get().(*[mediumBuffer]byte); ok {
			return p[:]
		}
		return make([]byte, mediumBuffer)
	case n <= largeBuffer:
		if p, ok := b.large.Get().(*[largeBuffer]byte); ok {
			return p[:]
		}
		return make([]byte, largeBuffer)
	}
	return make([]byte, n)
}

// put takes back what get gave, or anything that grew out of it.
func (b *Buffers) put(p []byte) {
	p = p[:cap(p)]
	switch cap(p) {
	case smallBuffer:
		b.small.Put((*[smallBuffer]byte)(p))
	case mediumBuffer:
		b.medium.Put((*[mediumBuffer]byte)(p))
	case largeBuffer:
		b.large.Put((*[largeBuffer]byte)(p))
	}
}
