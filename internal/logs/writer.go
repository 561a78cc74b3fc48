package logs

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"time"
)

const (
	// maxQueued bounds the bytes that wait to be written.
	maxQueued = 1 << 20

	// lineOverhead is what a queued line costs beside its bytes.
	lineOverhead = 64

	// maxBatch is PIPE_BUF on Linux: a write of up to that many bytes to a pipe
	// is never mixed with the writes of other processes (pipe(7)), and several
	// processes share one standard error.
	maxBatch = 4096
)

// ErrUnwritten is what [Writer.Close] returns when lines could not be written
// in time.
var ErrUnwritten = errors.New("log lines were not written in time")

// Writer is a bounded queue of lines in front of a slow or broken output.
type Writer struct {
	out    io.Writer
	report func(lines uint64) []byte // a line that says that so many are missing
	wake   chan struct{}             // holds a token when there is something to look at
	done   chan struct{}             // closed when the goroutine has ended

	mu      sync.Mutex
	queue   []entry
	size    int    // of the queue in bytes, with the overhead
	gap     uint64 // lines dropped behind the queue's end; while > 0 the queue is being worked off
	dropped uint64
	closed  bool
}

// entry is a line, or the place where lines are missing.
type entry struct {
	line    []byte
	missing uint64
}

func newWriter(out io.Writer, report func(uint64) []byte) *Writer {
	w := &Writer{
		out:    out,
		report: report,
		wake:   make(chan struct{}, 1),
		done:   make(chan struct{}),
	}
	go w.run()
	return w
}

// Write queues p, one whole line, and returns at once. It never fails: a line
// that finds no room, or comes after Close, is dropped and counted. It may be
// called concurrently.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	cost := len(p) + lineOverhead
	// Once lines are being dropped, go on until the queue is half empty: a
	// reader that is a little too slow then makes few gaps, not one per line.
	room := maxQueued
	if w.gap > 0 {
		room = maxQueued / 2
	}
	if w.closed {
		w.dropped++
		return len(p), nil
	}
	w.signal()
	if w.size+cost > room {
		w.dropped++
		w.gap++
		return len(p), nil
	}
	if w.gap > 0 {
		w.queue = append(w.queue, entry{missing: w.gap})
		w.gap = 0
	}
	w.queue = append(w.queue, entry{line: bytes.Clone(p)})
	w.size += cost
	return len(p), nil
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
// is not closed.
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
	defer w.mu.Unlock()
	for _, e := range w.queue {
		if e.line != nil {
			w.dropped++
		}
	}
	w.queue, w.size = nil, 0
	return ErrUnwritten
}

// signal wakes the goroutine; a token that is already there is enough.
func (w *Writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run writes batch after batch until the writer is closed and the queue empty.
// Each line is tried once, so an output that refuses everything costs one
// attempt per batch and never a loop.
func (w *Writer) run() {
	defer close(w.done)
	var (
		batch   []byte
		missing uint64 // lines lost since the last report that was written
		torn    bool   // the last write ended inside a line
	)
	for {
		var lines, gap uint64
		var closed bool
		batch, lines, gap, closed = w.next(batch[:0])
		missing += gap
		switch {
		case lines == 0 && gap == 0 && closed:
			return
		case lines == 0 && gap == 0:
			<-w.wake
			continue
		}
		if missing > 0 {
			if _, err := w.put(w.report(missing), &torn); err != nil {
				// The batch belongs behind the report and has no better chance.
				missing += w.lost(lines)
				continue
			}
			missing = 0
		}
		if n, err := w.put(batch, &torn); err != nil {
			missing += w.lost(min(lines, uint64(bytes.Count(batch[n:], []byte("\n")))))
		}
	}
}

// next takes lines from the queue up to a batch, or up to a gap. A gap is only
// returned at the head of the queue, with the lines behind it.
func (w *Writer) next(batch []byte) (_ []byte, lines, gap uint64, closed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	taken := 0
	for _, e := range w.queue {
		if lines > 0 && (e.missing > 0 || len(batch)+len(e.line) > maxBatch) {
			break
		}
		taken++
		gap += e.missing
		if e.line == nil {
			continue
		}
		batch = append(batch, e.line...)
		lines++
		w.size -= len(e.line) + lineOverhead
	}
	clear(w.queue[:taken])
	w.queue = w.queue[taken:]
	if len(w.queue) == 0 {
		w.queue = nil
		if lines == 0 && gap == 0 {
			gap, w.gap = w.gap, 0
		}
	}
	return batch, lines, gap, w.closed
}

// put writes p, behind a line break if the output stands inside a line. It
// returns how much of p was written.
func (w *Writer) put(p []byte, torn *bool) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if *torn {
		if _, err := w.out.Write([]byte("\n")); err != nil {
			return 0, err
		}
		*torn = false
	}
	n, err := w.out.Write(p)
	if n > 0 {
		*torn = p[n-1] != '\n'
	}
	return n, err
}

// lost counts lines that were taken from the queue but not written.
func (w *Writer) lost(lines uint64) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dropped += lines
	return lines
}
