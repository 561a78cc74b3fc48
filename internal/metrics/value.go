package metrics

import (
	"slices"
	"sync/atomic"
)

// The metrics of a series are its cells themselves, which lie in the memory file. So
// counting is one atomic addition, without a lock and without an allocation, and
// what was counted stays when the process dies at once. Their methods may be called
// concurrently, and on nil, where they do nothing.

// Counter is a value that only rises.
type Counter atomic.Uint64

// Inc adds 1.
func (c *Counter) Inc() { c.Add(1) }

// Add adds n.
func (c *Counter) Add(n uint64) {
	if c != nil {
		(*atomic.Uint64)(c).Add(n)
	}
}

// Value returns the value.
func (c *Counter) Value() uint64 {
	if c == nil {
		return 0
	}
	return (*atomic.Uint64)(c).Load()
}

// Gauge is a value that rises and falls.
type Gauge atomic.Uint64 // an int64

// Set replaces the value.
func (g *Gauge) Set(v int64) {
	if g != nil {
		(*atomic.Uint64)(g).Store(uint64(v))
	}
}

// Add adds v, which may be negative.
func (g *Gauge) Add(v int64) {
	if g != nil {
		(*atomic.Uint64)(g).Add(uint64(v))
	}
}

// Value returns the value.
func (g *Gauge) Value() int64 {
	if g == nil {
		return 0
	}
	return int64((*atomic.Uint64)(g).Load())
}

// Histogram counts values by their size.
type Histogram struct {
	bounds  []int64         // the upper ones
	buckets []atomic.Uint64 // one more
	sum     *atomic.Uint64
}

// Observe counts a value: of a metric in seconds, nanoseconds. A negative one, which
// is what a clock that was set back may give, counts as 0.
//
// The number of values is nowhere but in the buckets, so that who reads meanwhile
// never sees one that contradicts them.
func (h *Histogram) Observe(v int64) {
	if h == nil {
		return
	}
	v = max(v, 0)
	h.bucket(v).Add(1)
	h.sum.Add(uint64(v))
}

// bucket is the cell of those that are as large as v.
func (h *Histogram) bucket(v int64) *atomic.Uint64 {
	i, _ := slices.BinarySearch(h.bounds, v) // the first bound that is at least v
	return &h.buckets[i]
}
