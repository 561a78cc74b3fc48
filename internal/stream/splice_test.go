package stream_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// adoptTCP is adopt for a TCP connection.
func (w *world) adoptTCP(traffic *stream.Traffic) (*stream.Conn, *net.TCPConn) {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	defer ln.Close()
	far, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(bound))
	near, err := ln.Accept()
	if err != nil {
		w.t.Fatal(err)
	}
	defer near.Close()
	raw, err := near.(*net.TCPConn).SyscallConn()
	if err != nil {
		w.t.Fatal(err)
	}
	var fd int
	raw.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		w.t.Fatal(err)
	}
	c := new(stream.Conn)
	w.on(func() { err = w.loop.Adopt(c, fd, nil, traffic) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.on(c.Close) })
	return c, far.(*net.TCPConn)
}

// halfConn is what tests need of the other end.
type halfConn interface {
	net.Conn
	CloseWrite() error
}

func (w *world) adoptAny(tcp bool) (*stream.Conn, halfConn) {
	w.t.Helper()
	if tcp {
		return w.adoptTCP(nil)
	}
	return w.adopt(nil)
}

func wantMoved(t testing.TB, moved int64, err error, wantMoved int64, wantErr error) {
	t.Helper()
	if moved != wantMoved || !errors.Is(err, wantErr) {
		t.Errorf("%d bytes, %v; want %d, %v", moved, err, wantMoved, wantErr)
	}
}

// all is what tests send, made once: byte by byte takes long with the race detector.
var all = sync.OnceValue(func() []byte { return pattern(0, 0, 9<<20) })

// text is n bytes of what stands at a place in what is sent for a seed.
func text(seed byte, from, n int) []byte { return all()[int(seed)*4099+from:][:n] }

// feed writes the text of a seed in pieces of random sizes, and ends the direction.
func feed(far halfConn, seed byte, size int, random *rand.Rand) error {
	for from := 0; from < size; {
		n := min(1+random.IntN(1<<random.IntN(18)), size-from)
		if _, err := far.Write(text(seed, from, n)); err != nil {
			return err
		}
		from += n
	}
	return far.CloseWrite()
}

// drain reads it in such pieces up to the end.
func drain(far net.Conn, seed byte, size int, random *rand.Rand) error {
	for at := 0; ; {
		b := make([]byte, 1+random.IntN(1<<random.IntN(18)))
		n, err := far.Read(b)
		if !bytes.Equal(b[:n], text(seed, at, n)) {
			return fmt.Errorf("other bytes at %d", at)
		}
		if at += n; err != nil {
			if err == io.EOF && at == size {
				return nil
			}
			return fmt.Errorf("%d of %d bytes: %w", at, size, err)
		}
	}
}

// alternate passes size bytes on, some of them by Splice and some by Fill and Send, and
// then expects the end.
func alternate(t *task.Task, from, to *stream.Conn, size int, random *rand.Rand) error {
	for left := int64(size); left > 0; {
		n := min(1+random.Int64N(1<<random.IntN(21)), left)
		if random.IntN(3) > 0 {
			moved, err := stream.Splice(t, from, to, n, nil)
			if moved != n || err != nil {
				return fmt.Errorf("%d of %d bytes: %w", moved, n, err)
			}
		} else {
			if len(from.Buffered()) == 0 {
				if err := from.Fill(t); err != nil {
					return err
				}
			}
			b := from.Buffered()[:1+random.IntN(int(min(n, int64(len(from.Buffered())))))]
			from.Consume(len(b))
			if err := to.Send(t, b, nil, nil); err != nil {
				return err
			}
			n = int64(len(b))
		}
		left -= n
	}
	if moved, err := stream.Splice(t, from, to, 1, nil); moved != 0 || err != io.EOF {
		return fmt.Errorf("at the end: %d, %w", moved, err)
	}
	return to.CloseWrite()
}

// Whatever is asked for, in whatever pieces it comes and is taken, all arrives and nothing
// else.
func TestWhatIsSplicedArrives(t *testing.T) {
	t.Parallel()
	w := start(t)
	const pairs, size = 24, 3 << 20
	ends := make(chan error, 3*pairs)
	for i := range pairs {
		from, far := w.adoptAny(i%4 < 2)
		to, near := w.adoptAny(i%2 == 0)
		w.on(func() {
			for _, c := range []*stream.Conn{from, to} {
				if i%3 > 0 { // it is often full
					unix.SetsockoptInt(c.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096)
				}
			}
		})
		random := func(of uint64) *rand.Rand { return rand.New(rand.NewPCG(uint64(i), of)) }
		seed := byte(i * 11)
		// With an error each closes what it has, so that the others end, too.
		end := func(err error, close func()) {
			if err != nil {
				close()
			}
			ends <- err
		}
		go func() { end(feed(far, seed, size, random(1)), func() { far.Close() }) }()
		go func() { end(drain(near, seed, size, random(2)), func() { near.Close() }) }()
		w.begin(func(t *task.Task) {
			end(alternate(t, from, to, size, random(3)), func() { from.Close(); to.Close() })
		})
	}
	for range 3 * pairs {
		if err := <-ends; err != nil {
			t.Error(err)
		}
	}
	w.on(func() {
		if _, made := w.loop.Pipes(); made == 0 {
			t.Error("no pipe was used")
		}
	})
}

// progress is what it was told.
type progress struct {
	took, gave int64
	awaiting   int
	refusal    error // of what comes after the first byte
}

func (p *progress) Awaiting() { p.awaiting++ }

func (p *progress) Took(n int) error {
	if p.refusal != nil && p.took > 0 {
		return p.refusal
	}
	p.took += int64(n)
	return nil
}

func (p *progress) Gave(n int) { p.gave += int64(n) }

func TestWhatIsSplicedIsCounted(t *testing.T) {
	t.Parallel()
	for _, pipes := range []bool{true, false} {
		w := start(t)
		in := &stream.Traffic{Received: new(metrics.Counter)}
		out := &stream.Traffic{Sent: new(metrics.Counter)}
		from, far := w.adoptTCP(in)
		to, near := w.adoptTCP(out)
		const size = 1 << 20
		if !pipes {
			w.on(w.loop.WithoutPipes)
		}
		go feed(far, 1, size, rand.New(rand.NewPCG(1, 1)))
		done := w.begin(func(t *task.Task) {
			from.Fill(t) // some of it is buffered
			var told progress
			moved, err := stream.Splice(t, from, to, size-100, &told)
			if told.took != moved || told.gave != moved {
				w.t.Errorf("progress was told %+v, of %d bytes", told, moved)
			}
			if pipes {
				wantIdle(w.t, from, to)
			}
			wantMoved(w.t, moved, err, size-100, nil)
			moved, err = stream.Splice(t, from, to, 200, nil)
			wantMoved(w.t, moved, err, 100, io.EOF)
			wantIdle(w.t, from, to)
			to.CloseWrite()
		})
		if err := drain(near, 1, size, rand.New(rand.NewPCG(1, 2))); err != nil {
			t.Error(err)
		}
		w.await(done)
		if r, s := in.Received.Value(), out.Sent.Value(); r != size || s != size {
			t.Errorf("%d bytes received, %d sent", r, s)
		}
		if !pipes {
			w.on(w.loop.WithPipes)
		}
	}
}

// Whoever gives somebody time for what he sends knows when that begins, and may refuse what
// has come too late.
func TestASpliceTellsThatItWaits(t *testing.T) {
	t.Parallel()
	for _, pipes := range []bool{true, false} {
		w := start(t)
		from, far := w.adoptTCP(nil)
		to, near := w.adoptTCP(nil)
		if !pipes {
			w.on(w.loop.WithoutPipes)
		}
		told := progress{refusal: errors.New("too late")}
		ended := w.begin(func(t *task.Task) {
			moved, err := stream.Splice(t, from, to, 100, &told)
			wantMoved(w.t, moved, err, 1, told.refusal)
			if _, ok := errors.AsType[*stream.ReadError](err); !ok {
				w.t.Errorf("not the reader: %v", err)
			}
			wantIdle(w.t, from, to)
			to.CloseWrite()
		})
		waits := func(gave int64, times int) {
			t.Helper()
			eventually(t, fmt.Sprintf("%d bytes, and %d waits", gave, times), func() (ok bool) {
				w.on(func() { ok = told.gave == gave && told.awaiting >= times })
				return ok
			})
		}
		waits(0, 1)
		far.Write([]byte("x"))
		readN(t, near, 1)
		waits(1, 2)
		far.Write([]byte("y"))
		w.await(ended)
		if b, err := io.ReadAll(near); len(b) > 0 || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		w.on(func() {
			if !pipes {
				w.loop.WithPipes()
			} else if _, made := w.loop.Pipes(); made > 0 {
				t.Error("a pipe with bytes is kept")
			}
		})
	}
}

// Each that is slow to take its bytes holds a pipe. The others do without, and nobody waits
// for anybody else.
func TestSlowOnesHoldNobodyUp(t *testing.T) {
	t.Parallel()
	w := start(t)
	const slow, size = stream.MostPipes + 4, 2 << 20
	var ends []net.Conn
	var splices []<-chan struct{}
	begin := func() net.Conn {
		from, far := w.adopt(nil)
		to, near := w.adopt(nil)
		go feed(far, 3, size, rand.New(rand.NewPCG(3, 1)))
		splices = append(splices, w.begin(func(t *task.Task) {
			moved, err := stream.Splice(t, from, to, size, nil)
			wantMoved(w.t, moved, err, size, nil)
			to.CloseWrite()
		}))
		return near
	}
	for range slow {
		ends = append(ends, begin())
	}
	eventually(t, "all pipes are in use", func() (all bool) {
		w.on(func() {
			free, made := w.loop.Pipes()
			all = free == 0 && made == stream.MostPipes
		})
		return all
	})
	if err := drain(begin(), 3, size, rand.New(rand.NewPCG(3, 2))); err != nil {
		t.Errorf("one that is quick: %v", err)
	}
	for _, near := range ends {
		if err := drain(near, 3, size, rand.New(rand.NewPCG(3, 2))); err != nil {
			t.Error(err)
		}
	}
	for _, done := range splices {
		w.await(done)
	}
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what + ": it did not come")
		}
	}
}

// What a splice has taken from one side reaches the other, whatever ends it: a side that
// cannot be read is told apart from one that cannot be written.
func TestASpliceSaysWhichSideHasFailed(t *testing.T) {
	t.Parallel()
	const size = 16 << 20
	why := errors.New("why")
	for name, tt := range map[string]struct {
		fails func(w *world, clock *streamtest.Clock, from, to *stream.Conn, far, near *net.TCPConn)
		reads bool
		want  error
	}{
		"the sender resets": {func(_ *world, _ *streamtest.Clock, _, _ *stream.Conn, far, _ *net.TCPConn) {
			far.SetLinger(0)
			far.Close()
		}, true, unix.ECONNRESET},
		"the sender is too slow": {func(w *world, clock *streamtest.Clock, from, _ *stream.Conn, _, _ *net.TCPConn) {
			w.on(func() { from.Limit(w.loop.Now().Add(time.Minute)) })
			clock.Advance(2 * time.Minute)
		}, true, os.ErrDeadlineExceeded},
		"the sender is interrupted": {func(w *world, _ *streamtest.Clock, from, _ *stream.Conn, _, _ *net.TCPConn) {
			w.on(func() { from.Interrupt(why) })
		}, true, why},
		"the sender's side is closed": {func(w *world, _ *streamtest.Clock, from, _ *stream.Conn, _, _ *net.TCPConn) {
			w.on(from.Close)
		}, true, net.ErrClosed},
		"the receiver resets": {func(_ *world, _ *streamtest.Clock, _, _ *stream.Conn, _, near *net.TCPConn) {
			near.SetLinger(0)
			near.Close()
		}, false, unix.ECONNRESET},
		"the receiver is too slow": {func(w *world, clock *streamtest.Clock, _, to *stream.Conn, _, _ *net.TCPConn) {
			w.on(func() { to.Limit(w.loop.Now().Add(time.Minute)) })
			clock.Advance(2 * time.Minute)
		}, false, os.ErrDeadlineExceeded},
		"the receiver is interrupted": {func(w *world, _ *streamtest.Clock, _, to *stream.Conn, _, _ *net.TCPConn) {
			w.on(func() { to.Interrupt(why) })
		}, false, why},
		"the receiver's side is closed": {func(w *world, _ *streamtest.Clock, _, to *stream.Conn, _, _ *net.TCPConn) {
			w.on(to.Close)
		}, false, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t)
			clock := streamtest.NewClock(w.loop)
			from, far := w.adoptTCP(nil)
			to, near := w.adoptTCP(nil)
			var moved int64
			var err error
			ended := w.begin(func(t *task.Task) { moved, err = stream.Splice(t, from, to, size, nil) })
			if tt.reads {
				const some = 300000
				far.Write(pattern(7, 0, some))
				if readN(t, near, some) != string(pattern(7, 0, some)) {
					t.Error("other bytes")
				}
				w.on(func() {})
				tt.fails(w, clock, from, to, far, near)
				w.await(ended)
				if _, ok := errors.AsType[*stream.ReadError](err); !ok {
					t.Errorf("not the reader: %v", err)
				}
				wantMoved(t, moved, err, some, tt.want)
				return
			}
			go far.Write(make([]byte, size))
			eventually(t, "it is full", func() (full bool) {
				w.on(func() {
					free, made := w.loop.Pipes()
					full = made == 1 && free == 0
				})
				return full
			})
			tt.fails(w, clock, from, to, far, near)
			w.await(ended)
			if _, ok := errors.AsType[*stream.WriteError](err); !ok || !errors.Is(err, tt.want) {
				t.Errorf("%v", err)
			}
			far.Close()
			w.on(func() {
				if _, made := w.loop.Pipes(); made != 0 {
					t.Error("a pipe with bytes is kept")
				}
			})
			if name == "the receiver resets" {
				return
			}
			w.on(to.Close)
			if n, _ := io.Copy(io.Discard, near); n != moved {
				t.Errorf("%d bytes were said to be moved, %d came", moved, n)
			}
		})
	}
}

// What stands in a pipe when its sender is interrupted arrives all the same.
func TestWhatIsInThePipeArrives(t *testing.T) {
	t.Parallel()
	for _, pipes := range []bool{true, false} {
		w := start(t)
		if !pipes {
			w.on(w.loop.WithoutPipes)
		}
		why := errors.New("why")
		from, far := w.adoptTCP(nil)
		to, near := w.adoptTCP(nil)
		// Little fits between the two.
		const size = 8 << 20
		near.SetReadBuffer(64 << 10)
		var moved int64
		ended := w.begin(func(t *task.Task) {
			var err error
			moved, err = stream.Splice(t, from, to, size, nil)
			if _, ok := errors.AsType[*stream.ReadError](err); !ok || !errors.Is(err, why) {
				w.t.Error(err)
			}
			to.CloseWrite()
		})
		go func() {
			for at := 0; at < size; at += 1 << 20 {
				if _, err := far.Write(text(9, at, 1<<20)); err != nil {
					return
				}
			}
		}()
		eventually(t, "it is full", func() (full bool) {
			w.on(func() { full = to.Working() && !to.Writable() })
			return full
		})
		w.on(func() { from.Interrupt(why) })
		b, err := io.ReadAll(near)
		w.await(ended)
		if err != nil || int64(len(b)) != moved || !bytes.Equal(b, text(9, 0, len(b))) {
			t.Errorf("%d bytes, %v; %d were said to be moved", len(b), err, moved)
		}
		far.Close()
		if !pipes {
			w.on(w.loop.WithPipes)
		}
	}
}

// An urgent mark stops a read of the kernel, and its splice for good. The byte itself is
// nobody's.
func TestAnUrgentMarkStopsNothing(t *testing.T) {
	t.Parallel()
	for name, move := range map[string]func(t *task.Task, from, to *stream.Conn) error{
		"Splice": func(t *task.Task, from, to *stream.Conn) error {
			_, err := stream.Splice(t, from, to, 6, nil)
			return err
		},
		"Fill": func(t *task.Task, from, to *stream.Conn) error {
			for len(from.Buffered()) < 6 {
				if err := from.Fill(t); err != nil {
					return err
				}
			}
			return to.Send(t, from.Buffered(), nil, nil)
		},
	} {
		w := start(t)
		from, far := w.adoptTCP(nil)
		to, near := w.adoptTCP(nil)
		raw, err := far.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		far.Write([]byte("abc"))
		raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
		if err != nil {
			t.Fatal(err)
		}
		far.Write([]byte("def"))
		w.on(func() {}) // all of it stands in one read, and nothing comes any more
		done := w.begin(func(t *task.Task) {
			if err := move(t, from, to); err != nil {
				w.t.Error(err)
			}
		})
		if s := readN(t, near, 6); s != "abcdef" {
			t.Errorf("%s: %q", name, s)
		}
		w.await(done)
	}
}

// Splices of what is always there let others run.
func TestASpliceLetsOthersRun(t *testing.T) {
	t.Parallel()
	w := start(t)
	from, far := w.adopt(nil)
	to, near := w.adopt(nil)
	const size = 100
	far.Write(pattern(1, 0, size))
	over, ran := false, 0
	others := w.begin(func(t *task.Task) {
		for ; !over; ran++ {
			t.Pause()
		}
	})
	w.run(func(t *task.Task) {
		defer func() { over = true }()
		for before := ran; ran < before+2; { // the connection is readable by then
			t.Pause()
		}
		before := ran
		for range size {
			moved, err := stream.Splice(t, from, to, 1, nil)
			wantMoved(w.t, moved, err, 1, nil)
		}
		if n := ran - before; n < 10 {
			w.t.Errorf("others ran %d times", n)
		}
	})
	readN(t, near, size)
	w.await(others)
}

func TestSplicingAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	w := start(t)
	from, far := w.adoptRaw(nil)
	to, near := w.adoptRaw(nil)
	const size = 64 << 10
	b := make([]byte, size)
	var n float64
	w.run(func(t *task.Task) {
		n = testing.AllocsPerRun(500, func() {
			unix.Write(far, b)
			if moved, err := stream.Splice(t, from, to, size, nil); moved != size || err != nil {
				w.t.Error(moved, err)
			}
			for got := 0; got < size; {
				n, err := unix.Read(near, b)
				if err != nil {
					w.t.Error(err)
				}
				got += n
			}
		})
	})
	if n > 0 {
		t.Errorf("%v allocations", n)
	}
}
