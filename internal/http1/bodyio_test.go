package http1

import (
	"cmp"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// bodyWire is a connection on a loop, and its other end in the hands of a test.
type bodyWire struct {
	loop *stream.Loop
	ours stream.Conn
	peer net.Conn
	raw  syscall.RawConn // the peer's
	buf  [64 << 10]byte
}

// newBodyWire connects a wire on which, as on TCP, only the order of bytes counts.
func newBodyWire(t testing.TB) *bodyWire {
	t.Helper()
	return newBodyWireOf(t, unix.SOCK_STREAM)
}

func newBodyWireOf(t testing.TB, kind int) *bodyWire {
	t.Helper()
	w := &bodyWire{loop: streamtest.New(t)}
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "peer")
	w.peer, err = net.FileConn(f)
	f.Close()
	streamtest.Do(w.loop, func() { err = cmp.Or(err, w.loop.Adopt(&w.ours, fds[0], nil, nil)) })
	if err != nil {
		t.Fatal(err)
	}
	if w.raw, err = w.peer.(syscall.Conn).SyscallConn(); err != nil {
		t.Fatal(err)
	}
	w.peer.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() {
		w.peer.Close()
		streamtest.Do(w.loop, w.ours.Close)
	})
	return w
}

// run runs fn as a task.
func (w *bodyWire) run(fn func(*task.Task)) { streamtest.Go(w.loop, fn) }

// arrived returns what is there at the other end, for each time that it is read.
func (w *bodyWire) arrived() (sends []string) {
	w.raw.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Recvfrom(int(fd), w.buf[:], unix.MSG_DONTWAIT)
			if n <= 0 || err != nil {
				return
			}
			sends = append(sends, string(w.buf[:n]))
		}
	})
	return sends
}

// framed is a message as it goes out: a head, and pieces of a body in its framing. This
// is the only place that knows how the encoder is driven.
func (w *bodyWire) framed(t testing.TB, head []byte, kind bodyKind, length int64, pieces []string, trailers exchange.Fields) string {
	t.Helper()
	out := bodyWriter{out: &w.ours, held: head, kind: kind, left: length}
	var s strings.Builder
	take := func() { s.WriteString(strings.Join(w.arrived(), "")) }
	var err error
	w.run(func(t *task.Task) {
		for _, p := range pieces {
			if err = out.write(t, []byte(p)); err != nil {
				return
			}
			take()
		}
		err = out.finish(t, trailers)
		take()
	})
	if err != nil {
		t.Fatalf("send: %v", err)
	}
	return s.String()
}

// read is a body as a reader gives it out.
type bodyRead struct {
	pieces []string
	err    error
}

func (r *bodyRead) content() string { return strings.Join(r.pieces, "") }

// readAll reads until an error.
func (w *bodyWire) readAll(b *bodyReader) (r bodyRead) {
	w.run(func(t *task.Task) {
		for r.err == nil {
			var p []byte
			if p, r.err = b.read(t); r.err == nil {
				r.pieces = append(r.pieces, string(p))
			}
		}
	})
	return r
}

func (w *bodyWire) send(t testing.TB, s string) {
	t.Helper()
	if _, err := io.WriteString(w.peer, s); err != nil {
		t.Fatal(err)
	}
}

func (w *bodyWire) closeWrite() { w.peer.(*net.UnixConn).CloseWrite() }

// TestChunksAreReadTogether: however small the chunks are, what is there is one piece, and
// what is behind the body is left alone.
func TestChunksAreReadTogether(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	w.send(t, "5\r\nhello\r\n1;x=y\r\n,\r\n001\r\n \r\n5\r\nworld\r\n0\r\nETag: v\r\nX-Dropped: v\r\n\r\nGET /")
	b := bodyReader{in: &w.ours, dec: decoderFor(-1)}
	got := w.readAll(&b)
	if got.err != io.EOF || len(got.pieces) != 1 || got.content() != "hello, world" {
		t.Errorf("got %q, %v", got.pieces, got.err)
	}
	if rest := string(w.ours.Buffered()); rest != "GET /" || b.total != 12 || len(b.dec.trailers) != 1 {
		t.Errorf("rest %q, total %d, trailers %v", rest, b.total, b.dec.trailers)
	}
	if again := w.readAll(&b); again.err != io.EOF || again.pieces != nil {
		t.Errorf("behind the end: %q, %v", again.pieces, again.err)
	}
}

// TestBodiesThatEnd: content and how it ends, by the way that it is framed.
func TestBodiesThatEnd(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, sent string
		dec        bodyDecoder
		limit      int64
		content    string
		err        error
		status     int
	}{
		{"none", "GET /", decoderFor(0), 0, "", io.EOF, 0},
		{"a length", "helloGET /", decoderFor(5), 0, "hello", io.EOF, 0},
		{"a length that does not come", "hell", decoderFor(5), 0, "hell", io.ErrUnexpectedEOF, 0},
		{"chunks", "5\r\nhello\r\n0\r\n\r\n", decoderFor(-1), 0, "hello", io.EOF, 0},
		{"chunks that end within one", "5\r\nhel", decoderFor(-1), 0, "hel", io.ErrUnexpectedEOF, 0},
		{"chunks without a last one", "5\r\nhello\r\n", decoderFor(-1), 0, "hello", io.ErrUnexpectedEOF, 0},
		{"chunks that end within trailers", "5\r\nhello\r\n0\r\nETag: x\r\n", decoderFor(-1), 0, "hello", io.ErrUnexpectedEOF, 0},
		{"the end of the connection", "hello\r\n0\r\n\r\n", bodyDecoder{kind: untilClose}, 0, "hello\r\n0\r\n\r\n", io.EOF, 0},
		{"nothing until the end of the connection", "", bodyDecoder{kind: untilClose}, 0, "", io.EOF, 0},
		{"a bad chunk behind good ones", "5\r\nhello\r\n1\r\n!\r\nx\r\n", decoderFor(-1), 0, "hello!", nil, 400},
		{"a length at the limit", "hello", decoderFor(5), 5, "hello", io.EOF, 0},
		{"chunks at the limit", "3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", decoderFor(-1), 5, "hello", io.EOF, 0},
		{"chunks beyond the limit", "3\r\nhel\r\n3\r\nlo!\r\n0\r\n\r\n", decoderFor(-1), 5, "", nil, 413},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newBodyWire(t)
			w.send(t, tt.sent)
			w.closeWrite()
			b := bodyReader{in: &w.ours, dec: tt.dec, limit: tt.limit}
			got := w.readAll(&b)
			if got.content() != tt.content || exchange.StatusOf(got.err, 0) != tt.status || tt.status == 0 && got.err != tt.err {
				t.Errorf("got %q, %v", got.pieces, got.err)
			}
			if again := w.readAll(&b); again.err != got.err || again.pieces != nil {
				t.Errorf("again: %q, %v", again.pieces, again.err)
			}
		})
	}
}

// TestBodiesAtEverySplit: what is read does not depend on how the bytes come.
func TestBodiesAtEverySplit(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	var b bodyReader
	for _, raw := range []string{
		"5\r\nhello\r\nA;x=\"y\"\r\n0\r\n\r\nabcde\r\n000\r\nETag: v\r\nX-Dropped: v\r\nDigest: w\r\n\r\n",
		"1\r\na\r\n1\r\nb\r\n0\r\n\r\n",
	} {
		whole := decoderFor(-1)
		want, _, _ := decode(&whole, raw, len(raw))
		for split := 1; split < len(raw); split++ {
			b.begin(&w.ours, decoderFor(-1), 0)
			w.send(t, raw[:split])
			w.run(func(t *task.Task) {
				for len(w.ours.Buffered()) < split {
					if w.ours.Fill(t) != nil {
						return
					}
				}
			})
			var got bodyRead
			ended := streamtest.Begin(w.loop, func(t *task.Task) {
				for got.err == nil {
					var p []byte
					p, got.err = b.read(t)
					got.pieces = append(got.pieces, string(p))
				}
			})
			streamtest.Do(w.loop, func() {}) // it waits by now
			w.send(t, raw[split:])
			<-ended
			if got.content() != want || got.err != io.EOF || !equalFields(b.dec.trailers, whole.trailers) {
				t.Errorf("%q split at %d: %q, %v, trailers %q", raw, split, got.pieces, got.err, b.dec.trailers)
			}
		}
	}
}

func equalFields(a, b exchange.Fields) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestBodiesThatComeTooSlowly(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	clock := streamtest.NewClock(w.loop)
	b := bodyReader{in: &w.ours, dec: decoderFor(5)}
	w.send(t, "hel")
	var first, second bodyRead
	ended := streamtest.Begin(w.loop, func(t *task.Task) {
		p, err := b.read(t)
		first = bodyRead{[]string{string(p)}, err}
		w.ours.Limit(w.loop.Now().Add(time.Second))
		p, err = b.read(t)
		second = bodyRead{[]string{string(p)}, err}
	})
	streamtest.Do(w.loop, func() {})
	clock.Advance(2 * time.Second)
	<-ended
	if first.content() != "hel" || first.err != nil || exchange.StatusOf(second.err, 0) != 408 {
		t.Errorf("got %+v, then %+v", first, second)
	}
}

func TestReadsThatAreInterrupted(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	b := bodyReader{in: &w.ours, dec: decoderFor(5)}
	why := errors.New("why")
	var err error
	ended := streamtest.Begin(w.loop, func(t *task.Task) { _, err = b.read(t) })
	streamtest.Do(w.loop, func() { w.ours.Interrupt(why) })
	if <-ended; err != why {
		t.Errorf("got %v", err)
	}
}

// TestReady: it promises nothing of what may be framing only, and takes nothing away.
func TestReady(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, sent string
		dec        bodyDecoder
		want       bool
		content    string
	}{
		{"nothing", "", decoderFor(5), false, ""},
		{"content", "h", decoderFor(5), true, "h"},
		{"no body", "", decoderFor(0), true, ""},
		{"a part of a chunk-size", "5", decoderFor(-1), false, ""},
		{"a chunk-size", "5\r\n", decoderFor(-1), false, ""},
		{"a chunk-size and content", "5\r\nh", decoderFor(-1), true, "h"},
		{"a last chunk without its end", "0\r\n", decoderFor(-1), false, ""},
		{"the end of chunks", "0\r\n\r\n", decoderFor(-1), true, ""},
		{"a mistake", "x", decoderFor(-1), true, ""},
		{"a bad trailer", "0\r\nHost: b\r\n\r\n", decoderFor(-1), true, ""},
		{"content until the end of the connection", "h", bodyDecoder{kind: untilClose}, true, "h"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newBodyWire(t)
			b := bodyReader{in: &w.ours, dec: tt.dec}
			w.send(t, tt.sent)
			var first, second bool
			var content []byte
			w.run(func(t *task.Task) {
				for len(w.ours.Buffered()) < len(tt.sent) {
					if w.ours.Fill(t) != nil {
						return
					}
				}
				first, second = b.ready(), b.ready()
				if tt.want {
					content, _ = b.read(t)
				}
			})
			if first != tt.want || second != tt.want || string(content) != tt.content {
				t.Errorf("ready %v, then %v, content %q", first, second, content)
			}
		})
	}
}

// TestSends: what leaves together, on a wire that keeps sends apart.
func TestSends(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("x", 4<<10)
	tests := []struct {
		name string
		w    bodyWriter
		do   func(*task.Task, *bodyWriter) error
		want []string
	}{
		{"a head and content", bodyWriter{kind: byLength, left: 5}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head "...)
			return cmp.Or(w.write(t, []byte("hello")), w.finish(t, nil))
		}, []string{"head hello"}},
		{"a head and much content", bodyWriter{kind: byLength, left: 4 << 10}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head "...)
			return cmp.Or(w.write(t, []byte(large)), w.finish(t, nil))
		}, []string{"head " + large}},
		{"content alone", bodyWriter{kind: byLength, left: 10}, func(t *task.Task, w *bodyWriter) error {
			return cmp.Or(w.write(t, []byte("hello")), w.write(t, nil), w.write(t, []byte("world")), w.finish(t, nil))
		}, []string{"hello", "world"}},
		{"chunks", bodyWriter{kind: byChunks}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head "...)
			return cmp.Or(w.write(t, []byte("hello")), w.write(t, []byte(large)), w.finish(t, exchange.Fields{{Name: "ETag", Value: "v"}}))
		}, []string{"head 5\r\nhello\r\n", "1000\r\n" + large + "\r\n", "0\r\nETag: v\r\n\r\n"}},
		{"chunks that are held", bodyWriter{kind: byChunks}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head "...)
			if !w.hold([]byte("hello")) || !w.hold([]byte("world!")) || w.hold(nil) || w.hold([]byte(large)) {
				return errors.New("held otherwise")
			}
			return w.finish(t, nil)
		}, []string{"head 5\r\nhello\r\n6\r\nworld!\r\n0\r\n\r\n"}},
		{"content that is held", bodyWriter{kind: byLength, left: 10}, func(t *task.Task, w *bodyWriter) error {
			if !w.hold([]byte("hello")) || w.complete() || w.hold([]byte("world!")) {
				return errors.New("held otherwise")
			}
			return cmp.Or(w.write(t, []byte("world")), w.finish(t, nil))
		}, []string{"helloworld"}},
		{"nothing of an answer to HEAD is held", bodyWriter{kind: byChunks, discard: true}, func(t *task.Task, w *bodyWriter) error {
			if w.hold([]byte("hello")) {
				return errors.New("held")
			}
			return w.finish(t, nil)
		}, nil},
		{"a flush before", bodyWriter{kind: byChunks}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head "...)
			return cmp.Or(w.flush(t), w.flush(t), w.write(t, []byte("hello")))
		}, []string{"head ", "5\r\nhello\r\n"}},
		{"an end alone", bodyWriter{kind: byChunks}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head "...)
			return w.finish(t, nil)
		}, []string{"head 0\r\n\r\n"}},
		{"until the end of the connection", bodyWriter{kind: untilClose}, func(t *task.Task, w *bodyWriter) error {
			return cmp.Or(w.write(t, []byte("hello")), w.finish(t, nil))
		}, []string{"hello"}},
		{"an answer to HEAD", bodyWriter{kind: byLength, left: 3, discard: true}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head"...)
			return cmp.Or(w.write(t, []byte("hello")), w.finish(t, nil))
		}, []string{"head"}},
		{"what is held and given up", bodyWriter{kind: byLength, left: 5}, func(t *task.Task, w *bodyWriter) error {
			w.held = append(w.take(), "head"...)
			w.release()
			return w.flush(t)
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wire := newBodyWireOf(t, unix.SOCK_SEQPACKET)
			tt.w.out = &wire.ours
			var err error
			wire.run(func(t *task.Task) { err = tt.do(t, &tt.w) })
			got := wire.arrived()
			if err != nil || strings.Join(got, "|") != strings.Join(tt.want, "|") {
				t.Errorf("got %.100q, %v", got, err)
			}
		})
	}
}

// TestBuffersAreGivenBack: whatever becomes of what was held.
func TestBuffersAreGivenBack(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	w.run(func(task *task.Task) {
		for name, end := range map[string]func(*bodyWriter) error{
			"sent":     func(out *bodyWriter) error { return out.flush(task) },
			"written":  func(out *bodyWriter) error { return out.write(task, []byte("x")) },
			"finished": func(out *bodyWriter) error { return out.finish(task, nil) },
			"given up": func(out *bodyWriter) error { out.release(); out.release(); return nil },
		} {
			out := bodyWriter{out: &w.ours, kind: byChunks}
			first := append(out.take(), "head"...)
			out.held = first
			err := end(&out)
			if again := append(out.take(), 'x'); err != nil || &again[0] != &first[0] {
				t.Errorf("%s: %v, another buffer", name, err)
			} else {
				w.loop.Release(again)
			}
		}
	})
}

func TestWritesThatAreRefused(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	tests := []struct {
		name string
		w    bodyWriter
		do   func(*task.Task, *bodyWriter) error
		want error
	}{
		{"a body where none may be", bodyWriter{}, func(t *task.Task, w *bodyWriter) error { return w.write(t, []byte("x")) }, errNoBody},
		{"too much", bodyWriter{kind: byLength, left: 1}, func(t *task.Task, w *bodyWriter) error { return w.write(t, []byte("xy")) }, errTooMuch},
		{"too little", bodyWriter{kind: byLength, left: 1}, func(t *task.Task, w *bodyWriter) error { return w.finish(t, nil) }, errTooLittle},
	}
	for _, tt := range tests {
		tt.w.out = &w.ours
		var err error
		w.run(func(t *task.Task) { err = tt.do(t, &tt.w) })
		if err != tt.want || tt.w.failed {
			t.Errorf("%s: %v, failed %v", tt.name, err, tt.w.failed)
		}
	}
	if got := w.arrived(); got != nil {
		t.Errorf("sent %q", got)
	}
	w.peer.Close()
	gone := bodyWriter{out: &w.ours, kind: byChunks}
	var err error
	w.run(func(t *task.Task) { err = gone.write(t, []byte("x")) })
	if !errors.Is(err, unix.EPIPE) || !gone.failed || gone.complete() {
		t.Errorf("to nobody: %v, failed %v", err, gone.failed)
	}
}

// TestWritingToASlowPeer: a writer waits, and nothing is lost of what its caller uses for
// something else meanwhile.
func TestWritingToASlowPeer(t *testing.T) {
	t.Parallel()
	w := newBodyWire(t)
	out := bodyWriter{out: &w.ours, kind: byChunks}
	var want strings.Builder
	var pieces [][]byte
	for i := range 40 {
		pieces = append(pieces, []byte(strings.Repeat(string(rune('a'+i%26)), 1+i*1000)))
		want.Write(pieces[i])
	}
	var err error
	ended := streamtest.Begin(w.loop, func(t *task.Task) {
		for _, p := range pieces {
			if err = out.write(t, p); err != nil {
				return
			}
			clear(p)
		}
		err = out.finish(t, nil)
		w.ours.CloseWrite()
	})
	raw, readErr := io.ReadAll(w.peer)
	<-ended
	d := decoderFor(-1)
	var got strings.Builder
	for len(raw) > 0 && !d.done() {
		content, n, err := d.next(raw, len(raw))
		if err != nil {
			t.Fatal(err)
		}
		got.Write(content)
		raw = raw[n:]
	}
	if err != nil || readErr != nil || got.String() != want.String() || !d.done() || len(raw) > 0 {
		t.Errorf("write %v, read %v; %d bytes, want %d, and %d behind them", err, readErr, got.Len(), want.Len(), len(raw))
	}
}
