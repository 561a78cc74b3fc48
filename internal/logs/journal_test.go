package logs_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/logs"
)

// journal returns the end of a stream that journald would read, and the other one,
// of which stream is what systemd says in JOURNAL_STREAM.
func journal(t *testing.T) (reader, out *os.File, stream string) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	reader, out = os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "out")
	t.Cleanup(func() { reader.Close(); out.Close() })
	var stat syscall.Stat_t
	if err := syscall.Fstat(fds[1], &stat); err != nil {
		t.Fatal(err)
	}
	return reader, out, fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// read returns the lines of a log that has ended.
func read(t *testing.T, reader, out *os.File) []string {
	t.Helper()
	out.Close()
	text, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func TestTheJournalGetsPrioritiesAndNoTime(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			reader, out, stream := journal(t)
			t.Setenv("JOURNAL_STREAM", stream)
			log, w := logs.New(out, slog.LevelDebug-4, format, slog.Int("pid", 42))
			log = log.With("time", "of an attribute").WithGroup("g")
			levels := []slog.Level{slog.LevelError + 4, slog.LevelError, slog.LevelWarn, slog.LevelInfo + 2, slog.LevelInfo, slog.LevelDebug, slog.LevelDebug - 4}
			for _, level := range levels {
				log.Log(context.Background(), level, "m", "v", 1)
			}
			closeNow(t, w)
			lines := read(t, reader, out)
			want := []string{"<3>", "<3>", "<4>", "<6>", "<6>", "<7>", "<7>"}
			if len(lines) != len(want) {
				t.Fatalf("log is %q", lines)
			}
			for i, line := range lines {
				text, ok := strings.CutPrefix(line, want[i])
				if !ok {
					t.Errorf("%v is %q, want it to begin with %s", levels[i], line, want[i])
				}
				wantText := fmt.Sprintf(`level=%v msg=m pid=42 time="of an attribute" g.v=1`, levels[i])
				if format == "json" {
					wantText = fmt.Sprintf(`{"level":"%v","msg":"m","pid":42,"time":"of an attribute","g":{"v":1}}`, levels[i])
				}
				if text != wantText {
					t.Errorf("got  %s\nwant %s", text, wantText)
				}
			}
		})
	}
}

func TestTheReportOfDroppedLinesHasItsPriorityToo(t *testing.T) {
	reader, out, stream := journal(t)
	t.Setenv("JOURNAL_STREAM", stream)
	log, w := logs.New(out, slog.LevelInfo, "json")
	for w.Dropped() == 0 {
		log.Info(strings.Repeat("x", 1000))
	}
	text := make(chan string)
	go func() {
		all, _ := io.ReadAll(reader)
		text <- string(all)
	}()
	closeNow(t, w)
	out.Close()
	var reports int
	for line := range strings.Lines(<-text) {
		if !strings.Contains(line, "log lines dropped") {
			continue
		}
		reports++
		if object, ok := strings.CutPrefix(line, "<3>"); !ok || !json.Valid([]byte(object)) || strings.Contains(line, `"time"`) {
			t.Errorf("report is %q", line)
		}
	}
	if reports != 1 {
		t.Errorf("%d reports, want 1", reports)
	}
}

// JOURNAL_STREAM is inherited also by a process whose output was redirected.
func TestWhatIsNotTheJournalGetsTimesAndNoPriorities(t *testing.T) {
	_, _, other := journal(t)
	for _, stream := range []string{"", other, "0:0", "nonsense"} {
		reader, out, _ := journal(t)
		t.Setenv("JOURNAL_STREAM", stream)
		log, w := logs.New(out, slog.LevelInfo, "text")
		log.Info("m")
		closeNow(t, w)
		if lines := read(t, reader, out); len(lines) != 1 || !strings.HasPrefix(lines[0], "time=") {
			t.Errorf("JOURNAL_STREAM=%q: log is %q", stream, lines)
		}
	}
}

func TestLevelsHaveOneNameEach(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	} {
		if got, err := logs.ParseLevel(name); got != want || err != nil {
			t.Errorf("%q is %v (%v), want %v", name, got, err, want)
		}
	}
	for _, name := range []string{"", "INFO", "warning", "info+1", " info"} {
		if _, err := logs.ParseLevel(name); err == nil {
			t.Errorf("%q is a level", name)
		}
	}
}
