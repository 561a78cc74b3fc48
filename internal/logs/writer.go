package logs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"holdfast/internal/metrics"
)

const (
	// maxQueued bounds the bytes that wait to be written. Their buffers may take
	// twice as much, since a line is never divided between two.
	maxQueued = 1 << 20

	// maxBatch is PIPE_BUF on Linux: a write of up to that many bytes to a pipe
	// is never mixed with the writes of other processes (pipe(7)), and several
	// processes share one output. A file that is open for appending keeps a write
	// of any size together.
	maxBatch = 4096
)

// ErrUnwritten is what [Writer.Close] returns when lines could not be written
// in time.
var ErrUnwritten = errors.New("log lines were not written in time")

var errFull = errors.New("lines come faster than they are written")

// Options are what a [Writer] does beside writing. Every part may be left out.
type Options struct {
	// Report returns a line that says that so many lines are missing. It is
	// written where they are missing.
	Report func(lines uint64) []byte

	// Notice is called with an error when writing begins to fail or lines begin to
	// find no room, and without one when a write has worked after so many lines were
	// lost, unless Report has reported them. Whoever writes lines calls it, so it
	// must not block; calls may be concurrent.
	Notice func(lines uint64, err error)

	Lines   *metrics.Counter // written
	Bytes   *metrics.Counter // written
	Dropped *metrics.Counter // lines that never were
	Errors  *metrics.Counter // writes that failed
	Queued  *metrics.Gauge   // lines that are none of these yet: they wait, or are being written
}

// Writer is a bounded queue of lines in front of a slow or broken output.
type Writer struct {
	options Options       // set once
	wake    chan struct{} // holds a token when there is something to look at
	done    chan struct{} // closed when the goroutine has ended

	// Owned by the goroutine.
	out     io.WriteCloser
	missing uint64 // lines lost since the last report or notice
	torn    bool   // the last write ended inside a line
	failing bool   // the last write failed

	mu         sync.Mutex
	head, tail *batch // the queue
	turn       *batch // the one in the queue that brings another output, if any
	size       int    // bytes in the queue
	gap        uint64 // lines dropped behind the queue's end; while > 0 the queue is being worked off
	dropped    uint64
	closed     bool
}

// batch is a queued write: whole lines, of at most maxBatch bytes together unless a
// single one is longer.
type batch struct {
	out     io.WriteCloser // where this batch and all behind it go; nil: where the one before went
	missing uint64         // lines that were dropped before these
	lines   uint64
	text    []byte
	next    *batch
}

// batches are empty ones, so that a line costs no allocation.
var batches = sync.Pool{New: func() any { return &batch{text: make([]byte, 0, maxBatch)} }}

func newBatch() *batch { return batches.Get().(*batch) }

// free gives a batch up that is no longer queued.
func (b *batch) free() {
	if cap(b.text) > maxBatch {
		return // a long line is rare, and its buffer would stay
	}
	*b = batch{text: b.text[:0]}
	batches.Put(b)
}

// NewWriter returns a Writer in front of out, which it owns from now on. It starts
// a goroutine; [Writer.Close] ends it.
func NewWriter(out io.WriteCloser, options Options) *Writer {
	w := &Writer{
		options: options,
		wake:    make(chan struct{}, 1),
		done:    make(chan struct{}),
		out:     out,
	}
	go w.run()
	return w
}

// Write queues p, one whole line, and returns at once; p is the caller's again then.
// It never fails: a line that finds no room, or comes after Close, is dropped and
// counted. It may be called concurrently.
func (w *Writer) Write(p []byte) (int, error) {
	if w.enqueue(p) {
		w.notice(0, errFull)
	}
	return len(p), nil
}

// enqueue says whether p is the first of the lines that find no room.
func (w *Writer) enqueue(p []byte) (full bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	cost := len(p)
	// Once lines are being dropped, go on until the queue is half empty: a
	// reader that is a little too slow then makes few gaps, not one per line.
	room := maxQueued
	if w.gap > 0 {
		room = maxQueued / 2
	}
	if w.closed {
		w.dropLocked(1)
		return false
	}
	w.signal()
	if w.size+cost > room {
		w.dropLocked(1)
		w.gap++
		return w.gap == 1
	}
	if w.tail == nil || w.gap > 0 || len(w.tail.text)+len(p) > maxBatch {
		b := w.pushLocked()
		b.missing, w.gap = w.gap, 0
	}
	w.tail.text = append(w.tail.text, p...)
	w.tail.lines++
	w.size += cost
	w.options.Queued.Add(1)
	return false
}

// Replace has all lines that come from now on written to out, which the Writer owns
// from now on too. The output before is closed when the lines before are written.
// Where an earlier Replace still waits for that, out takes its place, so that a stuck
// output never keeps more than one waiting.
func (w *Writer) Replace(out io.WriteCloser) {
	w.mu.Lock()
	unused := out
	switch {
	case w.closed:
	case w.turn != nil:
		unused, w.turn.out = w.turn.out, out
	default:
		unused = nil
		w.turn = w.pushLocked()
		w.turn.out = out
		w.signal()
	}
	w.mu.Unlock()
	if unused != nil {
		_ = unused.Close() // nothing was written to it
	}
}

// Dropped returns how many lines were never written.
func (w *Writer) Dropped() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped
}

// Close writes what is queued, for at most within, and ends the writer; lines
// that come later are dropped. It returns [ErrUnwritten] when time ran out: what
// is left has been dropped then, and the goroutine ends once the write in which
// it is stuck returns, which may be never. Closing again only waits. The output
// is closed when the goroutine ends.
func (w *Writer) Close(within time.Duration) error {
	w.mu.Lock()
	w.closed = true
	w.signal()
	w.mu.Unlock()

	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-w.done:
		return nil
	case <-timer.C:
	}
	w.mu.Lock()
	var unused io.WriteCloser
	if w.turn != nil {
		unused = w.turn.out
	}
	for b := w.head; b != nil; b = b.next {
		w.dropLocked(b.lines)
		w.options.Queued.Add(-int64(b.lines))
	}
	w.head, w.tail, w.turn = nil, nil, nil
	w.size = 0
	w.mu.Unlock()
	if unused != nil {
		_ = unused.Close() // nothing was written to it
	}
	return ErrUnwritten
}

// signal wakes the goroutine; a token that is already there is enough.
func (w *Writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *Writer) pushLocked() *batch {
	b := newBatch()
	if w.tail == nil {
		w.head = b
	} else {
		w.tail.next = b
	}
	w.tail = b
	return b
}

func (w *Writer) dropLocked(lines uint64) {
	w.dropped += lines
	w.options.Dropped.Add(lines)
}

// run writes batch after batch until the writer is closed and the queue empty.
// Each line is tried once, so an output that refuses everything costs one
// attempt per batch and never a loop.
func (w *Writer) run() {
	defer close(w.done)
	defer func() { _ = w.out.Close() }() // its writes have said what was to be said
	for {
		b, closed := w.next()
		switch {
		case b == nil && closed:
			return
		case b == nil:
			<-w.wake
			continue
		}
		w.write(b)
		w.options.Queued.Add(-int64(b.lines)) // now that they are counted as written or dropped
		b.free()
	}
}

// next takes the first batch from the queue. Where the queue is empty and lines are
// missing behind it, it is one without lines; nil means that there is nothing.
func (w *Writer) next() (b *batch, closed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.head != nil:
		b = w.head
		w.head = b.next
		if w.head == nil {
			w.tail = nil
		}
		if w.turn == b {
			w.turn = nil
		}
		w.size -= len(b.text)
	case w.gap > 0:
		b = newBatch()
		b.missing, w.gap = w.gap, 0
	}
	return b, w.closed
}

// write tries b once, behind the report of what is missing before it.
func (w *Writer) write(b *batch) {
	if b.out != nil {
		w.change(b.out)
	}
	w.missing += b.missing
	if w.missing > 0 && w.options.Report != nil {
		if _, err := w.put(w.options.Report(w.missing)); err != nil {
			// The batch belongs behind the report and has no better chance.
			w.lost(b.lines)
			return
		}
		w.missing = 0
	}
	n, err := w.put(b.text)
	lost := uint64(0)
	if err != nil {
		lost = min(b.lines, uint64(bytes.Count(b.text[n:], []byte("\n"))))
		w.lost(lost)
	}
	w.options.Lines.Add(b.lines - lost)
	if w.missing > 0 && !w.failing {
		w.notice(w.missing, nil)
		w.missing = 0
	}
}

// change goes over to another output.
func (w *Writer) change(out io.WriteCloser) {
	// What is new may be the file that it was, opened again.
	w.torn = w.torn && sameFile(w.out, out)
	_ = w.out.Close() // its writes have said what was to be said
	w.out = out
}

func sameFile(a, b io.WriteCloser) bool {
	f, isFile := a.(*os.File)
	g, areFiles := b.(*os.File)
	if !isFile || !areFiles {
		return false
	}
	before, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := g.Stat()
	return err == nil && os.SameFile(before, now)
}

// put writes p, behind a line break if the output stands inside a line. It
// returns how much of p was written.
func (w *Writer) put(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if w.torn {
		if _, err := w.attempt([]byte("\n")); err != nil {
			return 0, err
		}
	}
	return w.attempt(p)
}

// attempt is one write, whose outcome it keeps.
func (w *Writer) attempt(p []byte) (int, error) {
	n, err := w.out.Write(p)
	if n > 0 {
		w.torn = p[n-1] != '\n'
		w.options.Bytes.Add(uint64(n))
	}
	if err != nil {
		w.options.Errors.Inc()
		if !w.failing {
			w.notice(0, err)
		}
	}
	w.failing = err != nil
	return n, err
}

func (w *Writer) notice(lines uint64, err error) {
	if w.options.Notice != nil {
		w.options.Notice(lines, err)
	}
}

// lost counts lines that were taken from the queue but not written.
func (w *Writer) lost(lines uint64) {
	w.missing += lines
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dropLocked(lines)
}
