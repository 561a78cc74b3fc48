package stream_test

import (
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// within says whether two slices share memory.
func within(a, b []byte) bool {
	at := func(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }
	return at(a) < at(b)+uintptr(cap(b)) && at(b) < at(a)+uintptr(cap(a))
}

// private has c read text into a buffer of its own, which is what becomes of it when
// another connection reads.
func private(t *task.Task, w *world, c, other *stream.Conn, far, farOther net.Conn, text string) []byte {
	far.Write([]byte(text))
	c.Fill(t)
	farOther.Write([]byte("x"))
	other.Fill(t)
	other.Consume(len(other.Buffered()))
	if string(c.Buffered()) != text {
		w.t.Errorf("%q was read", c.Buffered())
	}
	return c.Buffered()
}

// Whoever has consumed all, or closed the connection, has a part of its buffer still: it
// is nobody else's until something is read or the task waits.
func TestABufferHasOneOwner(t *testing.T) {
	t.Parallel()
	w := start(t)
	for _, give := range []struct {
		name string
		up   func(*stream.Conn)
	}{
		{"consumed", func(c *stream.Conn) { c.Consume(len(c.Buffered())) }},
		{"closed", (*stream.Conn).Close},
		{"detached", func(c *stream.Conn) {
			fd, early := c.Detach()
			unix.Close(fd)
			copy(early, "another's")
		}},
	} {
		c, far := w.adopt(nil)
		other, farOther := w.adopt(nil)
		w.run(func(t *task.Task) {
			b := private(t, w, c, other, far, farOther, "mine alone")
			give.up(c)
			for range 100 {
				if p := w.loop.Buffer(len(b)); within(p, b) {
					w.t.Errorf("%s: somebody else has it", give.name)
				} else {
					copy(p, "another's ")
				}
			}
			if string(b) != "mine alone" {
				w.t.Errorf("%s: it became %q", give.name, b)
			}
			farOther.Write([]byte("y"))
			other.Fill(t) // from now on it is free
			other.Consume(1)
			if p := w.loop.Buffer(len(b)); !within(p, b) {
				w.t.Errorf("%s: it was not used again", give.name)
			} else {
				w.loop.Release(p)
			}
		})
	}
}

// Send takes a buffer for what is left, which is not the one that it sends from.
func TestWhatWasConsumedCanBeSent(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	other, farOther := w.adopt(nil)
	out, near := w.adopt(nil)
	head, body := string(pattern(9, 0, 3000)), string(pattern(5, 0, 60000))
	full := fill(out)
	done := w.begin(func(t *task.Task) {
		b := private(t, w, c, other, far, farOther, body)
		c.Consume(len(b))
		if err := out.Send(t, []byte(head), b, []byte("tail")); err != nil {
			w.t.Error(err)
		}
	})
	w.on(func() {})
	if got := readN(t, near, full); len(got) != full {
		t.Errorf("%d bytes", len(got))
	}
	if got := readN(t, near, len(head)+len(body)+4); got != head+body+"tail" {
		t.Error("something else was sent")
	}
	w.await(done)
}

// fill sends until the kernel takes no more, and returns how much it has taken.
func fill(c *stream.Conn) (all int) {
	for p := make([]byte, 4096); ; {
		n, err := unix.Write(c.FD(), p)
		if err != nil {
			return all
		}
		all += n
	}
}

func readN(t testing.TB, from io.Reader, n int) string {
	t.Helper()
	p := make([]byte, n)
	n, err := io.ReadFull(from, p)
	if err != nil {
		t.Error(err)
	}
	return string(p[:n])
}

func TestThreePartsAreSentInOrder(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	want := ""
	all := [...]string{"", "one ", "two ", "three "}
	w.run(func(t *task.Task) {
		for i := range len(all) * len(all) * len(all) {
			var p [3][]byte
			for k, n := range []int{i % 4, i / 4 % 4, i / 16} {
				p[k] = []byte(all[n])
				want += all[n]
			}
			if err := c.Send(t, p[0], p[1], p[2]); err != nil {
				w.t.Error(err)
			}
		}
	})
	if got := readN(t, far, len(want)); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestQuiet(t *testing.T) {
	t.Parallel()
	w := start(t)
	want := func(c *stream.Conn, want bool, when string) {
		t.Helper()
		w.on(func() {
			if c.Quiet() != want {
				t.Errorf("%s: quiet: %v", when, !want)
			}
		})
	}
	c, far := w.adopt(nil)
	want(c, true, "at first")
	far.Write([]byte("12"))
	w.run(func(t *task.Task) { c.Fill(t) })
	want(c, false, "with something buffered")
	w.on(func() { c.Consume(2) })
	want(c, true, "when all was consumed")
	far.Write([]byte("3"))
	w.on(func() {}) // the event comes in this turn or before
	want(c, false, "with something that was not read")
	w.on(func() {
		// Somebody else reads it, as one who has the descriptor in another process.
		unix.Read(c.FD(), make([]byte, 1))
		if !c.Readable() || !c.Quiet() || c.Readable() {
			t.Error("it did not look")
		}
	})
	far.CloseWrite()
	w.on(func() {})
	want(c, false, "at the end")
	w.on(c.Close)
	want(c, false, "closed")
	interrupted, _ := w.adopt(nil)
	w.on(func() { interrupted.Interrupt(os.ErrClosed) })
	want(interrupted, false, "interrupted")
}

func TestTheDateIsMadeOnceASecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { // in which it is midnight, 2000-01-01
		l := streamtest.NewVirtual(t)
		var first, same, second string
		streamtest.Do(l, func() { first = l.Date() })
		time.Sleep(900 * time.Millisecond)
		streamtest.Do(l, func() { same = l.Date() })
		time.Sleep(100 * time.Millisecond)
		streamtest.Do(l, func() { second = l.Date() })
		if first != "Sat, 01 Jan 2000 00:00:00 GMT" || second != "Sat, 01 Jan 2000 00:00:01 GMT" {
			t.Errorf("%q, then %q", first, second)
		}
		if unsafe.StringData(first) != unsafe.StringData(same) {
			t.Errorf("it was made again: %q", same)
		}
	})
}
