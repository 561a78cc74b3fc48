package poller

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What tests see of a loop.
const (
	Batch     = batch
	ChunkSize = chunkSize
	EntrySize = unsafe.Sizeof(entry{})
)

// Turn is one turn of a loop that is not run otherwise.
func (l *Loop) Turn() bool { return l.turn() }

// FallAsleep is what a loop does before it waits.
func (l *Loop) FallAsleep() bool { return l.fallAsleep() }

// Written returns how often somebody has written to the eventfd since it was asked last.
func (l *Loop) Written() uint64 {
	var b [8]byte
	if n, _ := unix.Read(l.wakeup, b[:]); n != 8 {
		return 0
	}
	return binary.NativeEndian.Uint64(b[:])
}

// Chunks returns how many chunks of entries have memory.
func (l *Loop) Chunks() (n int) {
	for _, c := range l.registry.chunks {
		if c.entries != nil {
			n++
		}
	}
	return n
}

// Owners returns how many owners have descriptors, beside the loop itself.
func (l *Loop) Owners() (n int) {
	for _, o := range l.registry.owners[1:] {
		if o != nil {
			n++
		}
	}
	return n
}
