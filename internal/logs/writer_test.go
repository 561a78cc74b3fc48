package logs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/logs"
	"holdfast/internal/metrics"
)

// Close makes an output one that a Writer can own.
func (o *output) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed++
	return nil
}

func (o *output) wantClosed(t *testing.T, times int) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed != times {
		t.Errorf("closed %d times, want %d", o.closed, times)
	}
}

func write(w io.Writer, line string) { fmt.Fprintln(w, line) }

func TestALineGoesToTheOutputOfItsTime(t *testing.T) {
	t.Parallel()
	before, after := &output{turns: make(chan struct{})}, &output{}
	w := logs.NewWriter(before, logs.Options{})
	write(w, "one")
	write(w, "two")
	w.Replace(after)
	write(w, "three")
	before.wantClosed(t, 0)
	close(before.turns)
	eventually(t, "the new output has its line", func() bool { return len(after.lines()) == 1 })
	before.wantClosed(t, 1)
	after.wantClosed(t, 0)
	closeNow(t, w)
	after.wantClosed(t, 1)
	if got := before.lines(); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("old output has %q", got)
	}
	if got := after.lines(); !slices.Equal(got, []string{"three"}) {
		t.Errorf("new output has %q", got)
	}
}

func TestAnIdleOutputIsReplacedAtOnce(t *testing.T) {
	t.Parallel()
	outs := make([]output, 10)
	w := logs.NewWriter(&outs[0], logs.Options{})
	for i := range outs[1:] {
		w.Replace(&outs[i+1])
		eventually(t, "the output before is closed", func() bool {
			outs[i].mu.Lock()
			defer outs[i].mu.Unlock()
			return outs[i].closed == 1
		})
	}
	write(w, "one")
	closeNow(t, w)
	if got := outs[len(outs)-1].lines(); !slices.Equal(got, []string{"one"}) {
		t.Errorf("the last output has %q", got)
	}
}

// Somebody may go on asking for another output while the present one is stuck.
func TestAStuckOutputKeepsOneOtherWaiting(t *testing.T) {
	t.Parallel()
	stuck := &output{turns: make(chan struct{})}
	w := logs.NewWriter(stuck, logs.Options{})
	write(w, "one")
	var later [100]output
	for i := range later {
		w.Replace(&later[i])
		write(w, fmt.Sprint(i))
	}
	last := len(later) - 1
	for i := range last {
		later[i].wantClosed(t, 1)
	}
	later[last].wantClosed(t, 0)
	close(stuck.turns)
	closeNow(t, w)
	later[last].wantClosed(t, 1)
	if got := len(later[last].lines()); got != len(later) {
		t.Errorf("the last output has %d lines, want %d", got, len(later))
	}
}

func TestNoOutputIsLeftOpenByAWriterThatIsClosed(t *testing.T) {
	t.Parallel()
	stuck, waiting, late := &output{turns: make(chan struct{})}, &output{}, &output{}
	w := logs.NewWriter(stuck, logs.Options{})
	write(w, "one")
	eventually(t, "the line is being written", func() bool { return stuck.waiting.Load() == 1 })
	w.Replace(waiting)
	write(w, "two")
	if err := w.Close(time.Millisecond); !errors.Is(err, logs.ErrUnwritten) {
		t.Fatalf("Close: %v, want ErrUnwritten", err)
	}
	if got := w.Dropped(); got != 1 {
		t.Errorf("%d lines dropped, want the one that waited", got)
	}
	w.Replace(late)
	waiting.wantClosed(t, 1)
	late.wantClosed(t, 1)
	stuck.wantClosed(t, 0)
	close(stuck.turns)
	closeNow(t, w)
	stuck.wantClosed(t, 1)
}

// tear has a Writer write half a line to a pipe, and returns the pipe's ends. The
// reader has read all that was written.
func tear(t *testing.T) (w *logs.Writer, r, again *os.File) {
	t.Helper()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	again, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", pipe.Fd()), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	pipe.Close()
	half, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", again.Fd()), os.O_WRONLY|os.O_APPEND|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	// A pipe takes 64 KiB, and then the time is over.
	if err := half.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	w = logs.NewWriter(half, logs.Options{})
	write(w, strings.Repeat("x", 100_000))
	eventually(t, "the long line is lost", func() bool { return w.Dropped() == 1 })
	if _, err := io.ReadFull(r, make([]byte, 65536)); err != nil {
		t.Fatal(err)
	}
	return w, r, again
}

func TestAFileThatIsOpenedAgainInsideALineGoesOnWithAFreshOne(t *testing.T) {
	t.Parallel()
	w, r, again := tear(t)
	w.Replace(again)
	write(w, "whole")
	closeNow(t, w)
	if got, _ := io.ReadAll(r); string(got) != "\nwhole\n" {
		t.Errorf("behind half a line there is %q", got)
	}
}

func TestANewFileBeginsWithItsFirstLine(t *testing.T) {
	t.Parallel()
	w, _, again := tear(t)
	again.Close()
	path := t.TempDir() + "/log"
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	w.Replace(file)
	write(w, "whole")
	closeNow(t, w)
	if got, _ := os.ReadFile(path); string(got) != "whole\n" {
		t.Errorf("the new file is %q", got)
	}
}

// notices keeps what a Writer's Notice was called with.
type notices struct {
	mu   sync.Mutex
	list []string
}

func (n *notices) notice(lines uint64, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.list = append(n.list, fmt.Sprint(lines, " ", err))
}

func (n *notices) want(t *testing.T, want ...string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.Equal(n.list, want) {
		t.Errorf("noticed %q, want %q", n.list, want)
	}
}

func TestAFailureIsNoticedWhenItBeginsAndWhenItIsOver(t *testing.T) {
	t.Parallel()
	out, n := &output{}, &notices{}
	w := logs.NewWriter(out, logs.Options{Notice: n.notice})
	write(w, "one")
	eventually(t, "the first line is out", func() bool { return len(out.lines()) == 1 })
	n.want(t)
	out.fail(errors.New("disk full"), 0)
	for i := range 3 {
		write(w, "lost")
		eventually(t, "the line is lost", func() bool { return w.Dropped() == uint64(i+1) })
	}
	n.want(t, "0 disk full")
	out.fail(nil, 0)
	write(w, "two")
	eventually(t, "the second line is out", func() bool { return len(out.lines()) == 2 })
	write(w, "three")
	closeNow(t, w)
	n.want(t, "0 disk full", "3 <nil>")
	if got := out.lines(); !slices.Equal(got, []string{"one", "two", "three"}) {
		t.Errorf("without a report the output is %q", got)
	}
}

func TestAQueueThatIsFullIsNoticedWhileTheOutputIsStuck(t *testing.T) {
	t.Parallel()
	out, n := &output{turns: make(chan struct{})}, &notices{}
	w := logs.NewWriter(out, logs.Options{Notice: n.notice})
	for w.Dropped() < 10 {
		write(w, strings.Repeat("x", 1000))
	}
	n.want(t, "0 lines come faster than they are written")
	close(out.turns)
	closeNow(t, w)
	n.want(t, "0 lines come faster than they are written", "10 <nil>")
}

func TestEveryLineIsCountedOnce(t *testing.T) {
	t.Parallel()
	out := &output{turns: make(chan struct{})}
	o := logs.Options{
		Lines: new(metrics.Counter), Bytes: new(metrics.Counter), Dropped: new(metrics.Counter), Errors: new(metrics.Counter),
		Queued: new(metrics.Gauge),
	}
	w := logs.NewWriter(out, o)
	line := strings.Repeat("x", 1000)
	const n = 2000
	for range n {
		write(w, line)
	}
	if got := uint64(o.Queued.Value()); o.Dropped.Value() == 0 || got+o.Dropped.Value() != n {
		t.Errorf("%d lines are dropped, %d wait of %d", o.Dropped.Value(), got, n)
	}
	out.fail(errors.New("disk full"), 1500) // one whole line of each batch
	for range 3 {
		out.turns <- struct{}{}
	}
	eventually(t, "two writes have failed", func() bool { return o.Errors.Value() >= 2 })
	out.fail(nil, 0)
	close(out.turns)
	closeNow(t, w)
	write(w, "after the end")

	if got := uint64(strings.Count(out.String(), line+"\n")); o.Lines.Value() != got {
		t.Errorf("%d lines counted, %d written", o.Lines.Value(), got)
	}
	if got := uint64(len(out.String())); o.Bytes.Value() != got {
		t.Errorf("%d bytes counted, %d written", o.Bytes.Value(), got)
	}
	if o.Dropped.Value() != w.Dropped() || o.Lines.Value()+o.Dropped.Value() != n+1 {
		t.Errorf("%d written, %d (%d) dropped of %d", o.Lines.Value(), o.Dropped.Value(), w.Dropped(), n+1)
	}
	if got := o.Queued.Value(); got != 0 {
		t.Errorf("%d lines wait in the end", got)
	}
}

// If the process dies with the output stuck, what waits is all that is neither written
// nor counted as dropped.
func TestOnlyWhatIsBeingWrittenWaitsWhenAQueueWasGivenUp(t *testing.T) {
	t.Parallel()
	out := &output{turns: make(chan struct{})}
	o := logs.Options{Lines: new(metrics.Counter), Dropped: new(metrics.Counter), Queued: new(metrics.Gauge)}
	w := logs.NewWriter(out, o)
	write(w, "being written")
	eventually(t, "the first line is being written", func() bool { return out.waiting.Load() == 1 })
	for range 100 {
		write(w, strings.Repeat("x", 1000))
	}
	if got := o.Queued.Value(); got != 101 {
		t.Errorf("%d lines wait before", got)
	}
	if err := w.Close(time.Millisecond); !errors.Is(err, logs.ErrUnwritten) {
		t.Fatalf("Close: %v, want ErrUnwritten", err)
	}
	if queued, dropped := o.Queued.Value(), o.Dropped.Value(); queued != 1 || dropped != 100 {
		t.Errorf("%d lines wait, %d are dropped", queued, dropped)
	}
	close(out.turns)
	closeNow(t, w)
	if queued, written := o.Queued.Value(), o.Lines.Value(); queued != 0 || written != 1 {
		t.Errorf("%d lines wait, %d are written in the end", queued, written)
	}
}

// Not parallel: allocations are counted for the whole process.
func TestALineCostsNoAllocation(t *testing.T) {
	var written atomic.Int64
	w := logs.NewWriter(counter{&written}, logs.Options{})
	line := append(bytes.Repeat([]byte("x"), 300), '\n')
	var n int64
	if got := testing.AllocsPerRun(1000, func() {
		w.Write(line)
		n += int64(len(line))
		for written.Load() < n {
			time.Sleep(time.Microsecond)
		}
	}); got > 0 {
		t.Errorf("%v allocations for each line", got)
	}
	closeNow(t, w)
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func (c counter) Close() error { return nil }
