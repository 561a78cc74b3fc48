package stream_test

import (
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
	"holdfast/internal/task"
)

func wantBuffered(t testing.TB, c *stream.Conn, want []byte) {
	t.Helper()
	if got := c.Buffered(); string(got) != string(want) {
		t.Errorf("%d bytes are buffered, want %d", len(got), len(want))
	}
}

// Whoever wants little gets no more, and loses nothing.
func TestReadingAPartLeavesTheRest(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	to, near := w.adopt(nil)
	far.Write(text(1, 0, 1000))
	w.run(func(t *task.Task) {
		for _, want := range []int{10, 20} { // the second one stands behind the first
			if err := c.FillUpTo(t, 10); err != nil {
				w.t.Error(err)
			}
			wantBuffered(w.t, c, text(1, 0, want))
		}
		moved, err := stream.Splice(t, c, to, 100, nil)
		wantMoved(w.t, moved, err, 100, nil)
		if err := c.FillUpTo(t, 10); err != nil {
			w.t.Error(err)
		}
		for range 2 { // the second time nothing is there
			c.More()
			wantBuffered(w.t, c, text(1, 100, 900))
		}
	})
	if got := readN(t, near, 100); got != string(text(1, 0, 100)) {
		t.Error("other bytes")
	}
}

// More says nothing of what it meets. The next Fill does, and what came before is there.
func TestMoreKeepsWhatItMeets(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		reset bool
		want  error
	}{"the end": {false, io.EOF}, "a reset": {true, unix.ECONNRESET}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t)
			c, far := w.adoptTCP(nil)
			far.Write(text(2, 0, 10))
			w.run(func(t *task.Task) {
				if err := c.Fill(t); err != nil {
					w.t.Error(err)
				}
			})
			if tt.reset {
				far.SetLinger(0)
			}
			far.Close()
			eventually(t, name, func() (told bool) {
				w.on(func() { told = c.HungUp() })
				return told
			})
			w.run(func(t *task.Task) {
				c.More()
				wantBuffered(w.t, c, text(2, 0, 10))
				if err := c.Fill(t); !errors.Is(err, tt.want) {
					w.t.Errorf("%v, want %v", err, tt.want)
				}
				c.Consume(10)
			})
		})
	}
}
