package metrics

import (
	"sync/atomic"
	"unsafe"
)

// A Batch counts for one goroutine, and adds what it has counted to the metrics with Flush.
// Threads that add to the same metrics take the memory away from each other, which costs
// more than ten times the addition: who handles thousands of events per second collects them
// for a moment first. The zero value is ready.
//
// It keeps few numbers, in places that the addresses of cells point to. If two cells point to
// the same place, the first one's number is added at once.
type Batch struct {
	sums [1 << batchBits]sum
	used []uint16 // places that were taken since the last Flush
}

// batchBits is chosen so that those some 30 cells that a request changes rarely meet.
const batchBits = 9

type sum struct {
	cell *atomic.Uint64 // nil: the place is free
	n    uint64
}

// Inc adds 1 to a counter.
func (b *Batch) Inc(c *Counter) { b.Add(c, 1) }

// Add adds n to a counter.
func (b *Batch) Add(c *Counter, n uint64) {
	if c != nil {
		b.add((*atomic.Uint64)(c), n)
	}
}

// Move adds v, which may be negative, to a gauge.
func (b *Batch) Move(g *Gauge, v int64) {
	if g != nil {
		b.add((*atomic.Uint64)(g), uint64(v))
	}
}

// Observe counts a value as [Histogram.Observe] does.
func (b *Batch) Observe(h *Histogram, v int64) {
	if h != nil {
		v = max(v, 0)
		b.add(h.bucket(v), 1)
		b.add(h.sum, uint64(v))
	}
}

func (b *Batch) add(cell *atomic.Uint64, n uint64) {
	place := placeOf(cell)
	s := &b.sums[place]
	switch s.cell {
	case cell:
		s.n += n
		return
	case nil:
		b.used = append(b.used, place)
	default:
		s.add()
	}
	*s = sum{cell, n}
}

// placeOf spreads addresses, of which many follow each other, by Fibonacci hashing.
func placeOf(cell *atomic.Uint64) uint16 {
	return uint16(uint64(uintptr(unsafe.Pointer(cell))) * 0x9e3779b97f4a7c15 >> (64 - batchBits))
}

// add makes the sum known. That of a gauge is often 0.
func (s *sum) add() {
	if s.n != 0 {
		s.cell.Add(s.n)
	}
}

// Flush adds what was counted since the last Flush.
func (b *Batch) Flush() {
	for _, place := range b.used {
		s := &b.sums[place]
		s.add()
		*s = sum{}
	}
	b.used = b.used[:0]
}
