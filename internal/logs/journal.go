package logs

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"
)

// isJournal says whether out is the connection to systemd's journal. systemd names
// its device and inode in JOURNAL_STREAM, which is stream here, because the variable
// is inherited also by a process whose output goes elsewhere (systemd.exec(5)).
func isJournal(out io.Writer, stream string) bool {
	file, ok := out.(*os.File)
	if !ok || stream == "" {
		return false
	}
	info, err := file.Stat()
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stream == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// priorities are what the journal calls the levels (sd-daemon(3)): a level has the
// first one that it reaches.
var priorities = [...]struct {
	from   slog.Level
	prefix string
}{
	{slog.LevelError, "<3>"},
	{slog.LevelWarn, "<4>"},
	{slog.LevelInfo, "<6>"},
	{slog.LevelDebug, "<7>"}, // and what is below
}

// journalHandler has a handler for each of the priorities, which begins its lines
// with that priority.
type journalHandler [len(priorities)]slog.Handler

// newJournalHandler returns one that writes to w what handlers made by plain write.
func newJournalHandler(w io.Writer, plain func(io.Writer) slog.Handler) slog.Handler {
	var h journalHandler
	for i, p := range priorities {
		h[i] = plain(prefixed{w, p.prefix})
	}
	return &h
}

func (h *journalHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h[0].Enabled(ctx, level)
}

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	r.Time = time.Time{} // a handler leaves the zero time out
	i := 0
	for i < len(priorities)-1 && r.Level < priorities[i].from {
		i++
	}
	return h[i].Handle(ctx, r)
}

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.with(func(one slog.Handler) slog.Handler { return one.WithAttrs(attrs) })
}

func (h *journalHandler) WithGroup(name string) slog.Handler {
	return h.with(func(one slog.Handler) slog.Handler { return one.WithGroup(name) })
}

func (h *journalHandler) with(change func(slog.Handler) slog.Handler) slog.Handler {
	var changed journalHandler
	for i, one := range h {
		changed[i] = change(one)
	}
	return &changed
}

// prefixed puts prefix before every write; a handler makes one write of each line.
type prefixed struct {
	out    io.Writer
	prefix string
}

func (p prefixed) Write(line []byte) (int, error) {
	if _, err := p.out.Write(slices.Concat([]byte(p.prefix), line)); err != nil {
		return 0, err
	}
	return len(line), nil
}
