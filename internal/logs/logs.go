// Package logs writes the log of a program without ever making it wait.
//
//	logger, writer := logs.New(os.Stderr, level, "text", slog.Int("pid", os.Getpid()))
//	defer writer.Close(time.Second)
//
// Whoever reads a log may be slow, stuck or gone, and none of that may hold up
// a connection. So a log call only puts its line into a bounded queue, and one
// goroutine writes the queue out. Lines that find no room are dropped and
// counted, and the log itself says where, and how many: "log lines dropped".
//
// Where the output is systemd's journal, a line begins with its priority and has no
// time, which the journal has itself (see journal.go).
package logs

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
)

// New returns a logger that writes to out through the [Writer] beside it. format
// is "json"; anything else means text. level is asked for every record, so that
// a [slog.LevelVar] changes it at run time. attrs are on every line.
//
// The handlers of slog quote what they write: a value, key or message with a
// line break in it cannot end its line or forge another one.
//
// New starts the writer's goroutine; [Writer.Close] ends it. out stays open.
func New(out io.Writer, level slog.Leveler, format string, attrs ...slog.Attr) (*slog.Logger, *Writer) {
	plain := func(w io.Writer) slog.Handler {
		options := &slog.HandlerOptions{Level: level}
		if format == "json" {
			options.ReplaceAttr = durationInWords
			return slog.NewJSONHandler(w, options).WithAttrs(attrs)
		}
		return slog.NewTextHandler(w, options).WithAttrs(attrs)
	}
	handler := plain
	if isJournal(out, os.Getenv("JOURNAL_STREAM")) {
		handler = func(w io.Writer) slog.Handler { return newJournalHandler(w, plain) }
	}
	w := NewWriter(keptOpen{out}, Options{Report: func(lines uint64) []byte {
		var line bytes.Buffer
		slog.New(handler(&line)).Error("log lines dropped", "lines", lines)
		return line.Bytes()
	}})
	return slog.New(handler(w)), w
}

// durationInWords has the JSON format write "36.6ms", as the text format does, where
// slog writes nanoseconds without saying so.
func durationInWords(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

// keptOpen is an output that belongs to somebody else.
type keptOpen struct{ io.Writer }

func (keptOpen) Close() error { return nil }

// ParseLevel returns the level that the configuration and the commands call name:
// "debug", "info", "warn" or "error".
func ParseLevel(name string) (slog.Level, error) {
	switch name {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf(`a log level is "debug", "info", "warn" or "error", not %q`, name)
}
