package logs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/logs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// output is a writer whose reader can be stopped and broken.
type output struct {
	mu    sync.Mutex
	text  bytes.Buffer
	calls int
	most  int           // bytes of one write
	turns chan struct{} // if set, each write waits for one
	short int           // bytes that a failing write takes nevertheless
	err   error

	closed  int          // times
	waiting atomic.Int32 // writes that have begun
}

func (o *output) Write(p []byte) (int, error) {
	o.waiting.Add(1)
	if o.turns != nil {
		<-o.turns
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls++
	o.most = max(o.most, len(p))
	if o.err != nil {
		n := min(o.short, len(p))
		o.text.Write(p[:n])
		return n, o.err
	}
	return o.text.Write(p)
}

func (o *output) fail(err error, short int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.err, o.short = err, short
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func (o *output) lines() []string {
	text := strings.TrimSuffix(o.String(), "\n")
	if text == "" {
		return nil
	}
	return strings.Split(text, "\n")
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func closeNow(t *testing.T, w *logs.Writer) {
	t.Helper()
	if err := w.Close(20 * time.Second); err != nil {
		t.Fatalf("Close: %v", err)
	}
}

func TestLinesComeOutInOrderWithTheAttributesOfTheProgram(t *testing.T) {
	t.Parallel()
	var out output
	log, w := logs.New(&out, slog.LevelInfo, "json", slog.Int("generation", 7))
	const n = 5000
	for i := range n {
		log.Info("line", "i", i)
		if i%500 == 0 {
			eventually(t, "the queue is worked off", func() bool { return len(out.lines()) == i+1 })
		}
	}
	closeNow(t, w)
	lines := out.lines()
	if len(lines) != n || w.Dropped() != 0 {
		t.Fatalf("%d lines, %d dropped; want %d, 0", len(lines), w.Dropped(), n)
	}
	for i, line := range lines {
		var got struct{ I, Generation int }
		if err := json.Unmarshal([]byte(line), &got); err != nil || got.I != i || got.Generation != 7 {
			t.Fatalf("line %d is %q (%v)", i, line, err)
		}
	}
}

func TestTheLevelChangesAtRunTime(t *testing.T) {
	t.Parallel()
	var out output
	var level slog.LevelVar
	log, w := logs.New(&out, &level, "text")
	log.Debug("before")
	level.Set(slog.LevelDebug)
	log.Debug("after")
	closeNow(t, w)
	if s := out.String(); strings.Contains(s, "before") || !strings.Contains(s, "after") {
		t.Errorf("log is %q", s)
	}
}

func TestDurationsHaveTheirUnitInBothFormats(t *testing.T) {
	t.Parallel()
	for format, want := range map[string][]string{
		"text": {"with=1.5s", "took=36.6ms", "in.group=2m0s", "any=1h0m0s"},
		"json": {`"with":"1.5s"`, `"took":"36.6ms"`, `"in":{"group":"2m0s"}`, `"any":"1h0m0s"`},
	} {
		var out output
		log, w := logs.New(&out, slog.LevelInfo, format, slog.Duration("with", 1500*time.Millisecond))
		log.Info("m", "took", 36600*time.Microsecond, slog.Group("in", "group", 2*time.Minute), slog.Any("any", time.Hour))
		closeNow(t, w)
		for _, part := range want {
			if got := out.String(); !strings.Contains(got, part) {
				t.Errorf("%s is not in the %s line %s", part, format, got)
			}
		}
	}
}

func TestConcurrentWritersNeverMixInsideALine(t *testing.T) {
	t.Parallel()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	text := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(r)
		text <- b
	}()
	log, w := logs.New(pipe, slog.LevelInfo, "text")
	var writers sync.WaitGroup
	const goroutines, each = 8, 100
	for g := range goroutines {
		writers.Go(func() {
			filler := strings.Repeat(string(rune('a'+g)), 50+g*100)
			for range each {
				log.Info("m", "v", filler)
			}
		})
	}
	writers.Wait()
	closeNow(t, w)
	pipe.Close()
	lines := strings.Split(strings.TrimSuffix(string(<-text), "\n"), "\n")
	r.Close()
	if len(lines) != goroutines*each {
		t.Fatalf("%d lines, want %d", len(lines), goroutines*each)
	}
	for _, line := range lines {
		_, v, ok := strings.Cut(line, " v=")
		if !ok || v == "" || strings.Count(v, v[:1]) != len(v) {
			t.Fatalf("mixed line %q", line)
		}
	}
}

func TestAPipeThatNobodyReadsHoldsUpNothing(t *testing.T) {
	t.Parallel()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	log, w := logs.New(pipe, slog.LevelInfo, "text")
	const n = 4000
	filler := strings.Repeat("x", 1000)
	logged := make(chan struct{})
	go func() {
		for i := range n {
			log.Info("m", "i", i, "filler", filler)
		}
		close(logged)
	}()
	select {
	case <-logged:
	case <-time.After(20 * time.Second):
		t.Fatal("logging waits for the reader")
	}
	if w.Dropped() < n/2 || w.Dropped() >= n {
		t.Errorf("%d of %d lines of 1 kB dropped, want what is beyond 1 MiB", w.Dropped(), n)
	}
	start := time.Now()
	if err := w.Close(50 * time.Millisecond); !errors.Is(err, logs.ErrUnwritten) {
		t.Errorf("Close: %v, want ErrUnwritten", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("Close took %v", took)
	}
	log.Info("after close") // must not block or panic
	r.Close()               // lets the writing goroutine go
	closeNow(t, w)
	pipe.Close()
}

func TestAReaderThatWakesUpLearnsWhereLinesAreMissingAndHowMany(t *testing.T) {
	t.Parallel()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	log, w := logs.New(pipe, slog.LevelInfo, "json", slog.Int("pid", 42))
	const n = 3000
	filler := strings.Repeat("x", 1000)
	for i := range n {
		log.Info("m", "i", i, "filler", filler)
	}
	dropped := w.Dropped()

	text := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(r)
		text <- b
	}()
	closeNow(t, w)
	pipe.Close()

	accounted, gaps, reported := account(t, string(<-text))
	if dropped == 0 || reported != dropped || w.Dropped() != dropped || accounted != n || gaps != 1 {
		t.Errorf("dropped %d, then %d; reported %d in %d gaps; accounted for %d of %d",
			dropped, w.Dropped(), reported, gaps, accounted, n)
	}
}

// account checks that lines numbered by "i" follow each other, with reports
// exactly where some are missing.
func account(t *testing.T, text string) (next, gaps int, reported uint64) {
	t.Helper()
	for line := range strings.Lines(text) {
		var got struct {
			Msg   string
			I     int
			Pid   int
			Lines uint64
		}
		if err := json.Unmarshal([]byte(line), &got); err != nil || got.Pid != 42 {
			t.Fatalf("line %q: %v", line, err)
		}
		if got.Msg == "log lines dropped" {
			reported += got.Lines
			next += int(got.Lines)
			gaps++
			continue
		}
		if got.I != next {
			t.Fatalf("line %d where %d was due: the report is not where the gap is", got.I, next)
		}
		next++
	}
	return next, gaps, reported
}

func TestAReaderThatIsALittleTooSlowMakesFewGaps(t *testing.T) {
	t.Parallel()
	out := &output{turns: make(chan struct{})}
	log, w := logs.New(out, slog.LevelInfo, "json", slog.Int("pid", 42))
	filler := strings.Repeat("x", 1000)
	n := 0
	for range 1500 { // once full: one batch of three lines is written for each six that come
		for range 6 {
			log.Info("m", "i", n, "filler", filler)
			n++
		}
		if w.Dropped() > 0 {
			out.turns <- struct{}{}
		}
	}
	close(out.turns)
	closeNow(t, w)
	accounted, gaps, reported := account(t, out.String())
	if accounted != n || reported != w.Dropped() || gaps < 2 || gaps > 12 {
		t.Errorf("%d dropped, %d reported in %d gaps; accounted for %d of %d", w.Dropped(), reported, gaps, accounted, n)
	}
	if out.most > 4096 {
		t.Errorf("a write of %d bytes is more than a pipe keeps together", out.most)
	}
}

func TestAReaderThatIsGoneCostsOneAttemptPerBatch(t *testing.T) {
	t.Parallel()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	log, w := logs.New(pipe, slog.LevelInfo, "text")
	for range 100 {
		log.Info("nobody hears this")
	}
	eventually(t, "all lines are counted as dropped", func() bool { return w.Dropped() == 100 })
	closeNow(t, w)
	pipe.Close()

	out := &output{err: io.ErrClosedPipe}
	log, w = logs.New(out, slog.LevelInfo, "text")
	for i := range 10 {
		log.Info("nobody hears this")
		eventually(t, "the line is counted", func() bool { return w.Dropped() == uint64(i+1) })
	}
	closeNow(t, w)
	if out.calls > 10 {
		t.Errorf("%d attempts to write 10 lines, one after the other", out.calls)
	}
}

func TestAnOutputThatWorksAgainGetsTheNumberAndAWholeLine(t *testing.T) {
	t.Parallel()
	out := &output{}
	log, w := logs.New(out, slog.LevelInfo, "text")
	log.Info("one")
	eventually(t, "the first line is out", func() bool { return len(out.lines()) == 1 })
	out.fail(errors.New("disk full"), 5)
	log.Info("two")
	eventually(t, "the second is lost", func() bool { return w.Dropped() == 1 })
	out.fail(nil, 0)
	log.Info("three")
	closeNow(t, w)

	lines := out.lines()
	want := []string{"msg=one", "time=", `msg="log lines dropped" lines=1`, "msg=three"}
	if len(lines) != len(want) {
		t.Fatalf("log is %q", lines)
	}
	for i := range want {
		if !strings.Contains(lines[i], want[i]) {
			t.Errorf("line %d is %q, want it to contain %q", i, lines[i], want[i])
		}
	}
	if w.Dropped() != 1 {
		t.Errorf("Dropped is %d, want 1", w.Dropped())
	}
}

func TestALineLargerThanTheQueueIsDroppedAndReported(t *testing.T) {
	t.Parallel()
	out := &output{}
	log, w := logs.New(out, slog.LevelInfo, "text")
	log.Info(strings.Repeat("x", 2<<20))
	eventually(t, "the gap is reported without another line", func() bool {
		return strings.Contains(out.String(), "lines=1")
	})
	closeNow(t, w)
	if w.Dropped() != 1 || len(out.lines()) != 1 {
		t.Errorf("%d dropped, log is %d lines", w.Dropped(), len(out.lines()))
	}
}

func TestNothingFromOutsideForgesALine(t *testing.T) {
	t.Parallel()
	forged := "x\ntime=2026-01-01T00:00:00Z level=ERROR msg=forged\r\n{\"msg\":\"forged\"}\u2028\u0085\x00\x1b[2J\v\f\xff\""
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			var out output
			log, w := logs.New(&out, slog.LevelInfo, format)
			log.Info("as a value", "v", forged)
			log.Info("as an error", "v", errors.New(forged))
			log.Info("as a key", forged, 1)
			log.Info("in a group", slog.Group(forged, "a", 1))
			log.Info("as bytes", "v", []byte(forged))
			log.Info("as something else", "v", struct{ S fmt.Stringer }{stringer(forged)})
			log.Info(forged)
			closeNow(t, w)
			if got := strings.Count(out.String(), "\n"); got != 7 {
				t.Errorf("7 records made %d lines:\n%s", got, out.String())
			}
			for _, line := range out.lines() {
				for _, r := range line {
					if r < ' ' || r == '\u2028' || format == "text" && r == '\u0085' {
						t.Errorf("character %U in %q", r, line)
					}
				}
				if format == "json" && !json.Valid([]byte(line)) {
					t.Errorf("not JSON: %q", line)
				}
				if format == "text" && !strings.HasPrefix(line, "time=") {
					t.Errorf("not a line of ours: %q", line)
				}
			}
		})
	}
}

type stringer string

func (s stringer) String() string { return string(s) }
