package metrics

import (
	"encoding/binary"
	"math"
	"sync/atomic"
	"unsafe"
)

// The layout is explained in the documentation of the package. Numbers have the
// byte order of the machine, which no memory file leaves.
const (
	magic   = "HFmetric"
	version = 1

	headerSize = 64 // bytes
	atVersion  = 8
	atUsed     = 16

	kindFamily = 1
	kindSeries = 2

	maxFamilies = 1 << 10 // in a file
	maxSeries   = 1 << 16
	maxMeta     = 8 << 10 // bytes of a record before its cells: more than the longest definition and the longest labels have
)

var order = binary.NativeEndian

// cells returns n cells of a memory file. The offset is a multiple of 8.
func cells(mem []byte, offset, n int) []atomic.Uint64 {
	_ = mem[offset : offset+8*n]
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&mem[offset])), n)
}

func cell(mem []byte, offset int) *atomic.Uint64 { return &cells(mem, offset, 1)[0] }

// A writer appends records to a memory file. It is not safe for concurrent use.
type writer struct {
	mem          []byte
	used         *atomic.Uint64
	families     uint32
	seriesPlaced int
}

// newWriter begins a file. What is written before the magic number is seen with it.
func newWriter(mem []byte) *writer {
	w := &writer{mem: mem, used: cell(mem, atUsed)}
	cell(mem, atVersion).Store(version)
	w.used.Store(headerSize)
	cell(mem, 0).Store(order.Uint64([]byte(magic)))
	return w
}

// family appends a definition and returns its number; false: there is no room.
func (w *writer) family(d *Desc) (uint32, bool) {
	if w.families == maxFamilies {
		return 0, false
	}
	b, _ := d.AppendBinary(nil)
	if _, ok := w.record(kindFamily, b, 0); !ok {
		return 0, false
	}
	w.families++
	return w.families - 1, true
}

// series appends a series and returns its n cells; false: there is no room.
func (w *writer) series(family uint32, labels []string, n int) ([]atomic.Uint64, bool) {
	if w.seriesPlaced == maxSeries {
		return nil, false
	}
	b := order.AppendUint32(nil, family)
	for _, l := range labels {
		b = appendString(b, l)
	}
	cells, ok := w.record(kindSeries, b, n)
	if ok {
		w.seriesPlaced++
	}
	return cells, ok
}

// record appends a record of meta, padded to a multiple of 8 bytes, and n cells.
// A reader sees it with the store of the length, or, if the process dies before,
// never.
func (w *writer) record(kind uint32, meta []byte, n int) ([]atomic.Uint64, bool) {
	start := int(w.used.Load())
	at := start + 8 + (len(meta)+7)&^7
	end := at + 8*n
	if end > len(w.mem) {
		return nil, false
	}
	order.PutUint32(w.mem[start:], kind)
	order.PutUint32(w.mem[start+4:], uint32(end-start))
	copy(w.mem[start+8:], meta)
	w.used.Store(uint64(end))
	if n == 0 {
		return nil, true
	}
	return cells(w.mem, at, n), true
}

// AppendBinary appends what the package's documentation calls a definition, without its
// head and the zeros at its end. The error is nil.
func (d *Desc) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, byte(d.Type), byte(d.Merge), byte(d.Unit), byte(len(d.Labels)), byte(len(d.Bounds)))
	b = appendString(b, d.Name)
	b = appendString(b, d.Help)
	for _, l := range d.Labels {
		b = appendString(b, l)
	}
	for _, bound := range d.Bounds {
		b = order.AppendUint64(b, math.Float64bits(bound))
	}
	return b, nil
}

func appendString(b []byte, s string) []byte {
	return append(order.AppendUint16(b, uint16(len(s))), s...)
}

// kindAndLength takes apart what a record begins with. Both are read at once, so
// that a hostile writer cannot change one of them between two looks.
func kindAndLength(head uint64) (kind uint32, length int) {
	var b [8]byte
	order.PutUint64(b[:], head)
	return order.Uint32(b[:4]), int(order.Uint32(b[4:]))
}
