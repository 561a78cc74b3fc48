package stream_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const bound = 30 * time.Second

type runner func(*task.Task)

func (r runner) Run(t *task.Task) { r(t) }

// world is a loop that runs.
type world struct {
	t    testing.TB
	loop *stream.Loop
}

func start(t testing.TB) *world {
	t.Helper()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	tasks := task.NewPool(l, func(p any) { t.Errorf("panic: %v", p) })
	w := &world{t: t, loop: stream.NewLoop(l, tasks, 3)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Run()
	}()
	t.Cleanup(func() {
		w.on(func() {
			if n, live := w.loop.Conns(), tasks.Live(); n != 0 || live != 0 {
				t.Errorf("%d connections and %d tasks are left", n, live)
			}
			if free, made := w.loop.Pipes(); free != made {
				t.Errorf("%d of %d pipes did not come back", made-free, made)
			}
			w.loop.Trim()
			tasks.Trim()
		})
		l.Stop()
		<-ended
	})
	return w
}

// on runs fn on the loop and waits for it.
func (w *world) on(fn func()) {
	w.t.Helper()
	done := make(chan struct{})
	w.loop.Post(func() { defer close(done); fn() })
	w.await(done)
}

func (w *world) await(done <-chan struct{}) {
	w.t.Helper()
	select {
	case <-done:
	case <-time.After(bound):
		w.t.Fatal("it did not come")
	}
}

// run runs fn as a task and waits for its end.
func (w *world) run(fn func(*task.Task)) {
	w.t.Helper()
	w.await(w.begin(fn))
}

func (w *world) begin(fn func(*task.Task)) <-chan struct{} {
	done := make(chan struct{})
	w.loop.Post(func() {
		w.loop.Tasks.Go(runner(func(t *task.Task) { defer close(done); fn(t) }))
	})
	return done
}

// adopt returns a connection on the loop, and its other end.
func (w *world) adopt(owner stream.Owner) (*stream.Conn, *net.UnixConn) {
	w.t.Helper()
	c, fd := w.adoptOne(owner)
	f := os.NewFile(uintptr(fd), "far")
	defer f.Close()
	far, err := net.FileConn(f)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(bound))
	return c, far.(*net.UnixConn)
}

// adoptRaw is adopt for a test that must not allocate.
func (w *world) adoptRaw(owner stream.Owner) (c *stream.Conn, far int) {
	w.t.Helper()
	c, far = w.adoptOne(owner)
	w.t.Cleanup(func() { unix.Close(far) })
	return c, far
}

func (w *world) adoptOne(owner stream.Owner) (c *stream.Conn, far int) {
	w.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	c = new(stream.Conn)
	w.on(func() { err = w.loop.Adopt(c, fds[0], owner, nil) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.on(c.Close) })
	return c, fds[1]
}

func TestWhatIsSentComes(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	w.run(func(t *task.Task) {
		if err := c.Send(t, []byte("head "), nil, []byte("body")); err != nil {
			w.t.Error(err)
		}
		c.CloseWrite()
	})
	if b, err := io.ReadAll(far); string(b) != "head body" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	done := w.begin(func(t *task.Task) {
		for _, want := range []string{"one", "onetwo"} {
			if err := c.Fill(t); err != nil || string(c.Buffered()) != want {
				w.t.Errorf("%q, %v, want %q", c.Buffered(), err, want)
			}
			if want == "one" {
				far.Write([]byte("two"))
			}
		}
		c.Consume(4)
		if err := c.Fill(t); err != io.EOF || string(c.Buffered()) != "wo" || !c.HungUp() {
			w.t.Errorf("%q, %v", c.Buffered(), err)
		}
	})
	far.Write([]byte("one"))
	w.on(func() {})
	for closed := false; !closed; {
		w.on(func() { closed = len(c.Buffered()) >= 2 && c.Buffered()[0] == 'w' })
		if closed {
			far.CloseWrite()
		}
	}
	w.await(done)
}

// pattern is different at each place.
func pattern(seed byte, from, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		at := from + i
		b[i] = seed ^ byte(at) ^ byte(at>>8) ^ byte(at>>16)
	}
	return b
}

// Many connections of one loop are relayed to each other at once, by tasks that take and
// send pieces of random sizes: no byte of one is another's, whoever has the buffer.
func TestNobodyGetsTheBytesOfAnother(t *testing.T) {
	t.Parallel()
	w := start(t)
	const pairs, size = 12, 1 << 20
	ends := make(chan error, 2*pairs)
	var relays []<-chan struct{}
	for i := range pairs {
		in, far := w.adopt(nil)
		out, near := w.adopt(nil)
		random := rand.New(rand.NewPCG(uint64(i), 1))
		seed := byte(i * 17)
		relays = append(relays, w.begin(func(t *task.Task) {
			relay(t, in, out, random)
			out.CloseWrite()
		}))
		go func() {
			random := rand.New(rand.NewPCG(uint64(i), 2))
			var err error
			for from := 0; from < size && err == nil; {
				n := min(1+random.IntN(1<<random.IntN(17)), size-from)
				_, err = far.Write(pattern(seed, from, n))
				from += n
			}
			far.CloseWrite()
			ends <- err
		}()
		go func() {
			random := rand.New(rand.NewPCG(uint64(i), 3))
			at := 0
			for {
				b := make([]byte, 1+random.IntN(1<<random.IntN(17)))
				n, err := near.Read(b)
				if !bytes.Equal(b[:n], pattern(seed, at, n)) {
					ends <- errors.New("bytes of another")
					return
				}
				if at += n; err != nil {
					if err == io.EOF && at == size {
						err = nil
					}
					ends <- err
					return
				}
			}
		}()
	}
	for range 2 * pairs {
		if err := <-ends; err != nil {
			t.Error(err)
		}
	}
	for _, done := range relays {
		w.await(done)
	}
}

// relay passes on what comes, in pieces, some of which it keeps for the next time.
func relay(t *task.Task, in, out *stream.Conn, random *rand.Rand) {
	for {
		err := in.Fill(t)
		if err != nil && err != io.EOF {
			return
		}
		for len(in.Buffered()) > 0 && (err == io.EOF || random.IntN(4) > 0) {
			b := in.Buffered()[:1+random.IntN(len(in.Buffered()))]
			in.Consume(len(b))
			cut := random.IntN(len(b) + 1)
			if out.Send(t, b[:cut/2], b[cut/2:cut], b[cut:]) != nil {
				return
			}
		}
		if err == io.EOF {
			return
		}
	}
}

func TestWaitingEndsWithTheDeadline(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	w.run(func(t *task.Task) {
		c.Limit(w.loop.Now().Add(time.Millisecond))
		if err := c.Fill(t); !errors.Is(err, os.ErrDeadlineExceeded) {
			w.t.Errorf("a read: %v", err)
		}
		c.Limit(time.Time{})
	})
	far.Write([]byte("x"))
	w.run(func(t *task.Task) {
		if err := c.Fill(t); err != nil {
			w.t.Errorf("after it was taken back: %v", err)
		}
		c.Limit(w.loop.Now().Add(time.Millisecond))
		if err := c.Send(t, make([]byte, 8<<20), nil, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
			w.t.Errorf("a send: %v", err)
		}
	})
}

func TestAnInterruptWakesBothSides(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, _ := w.adopt(nil)
	why := errors.New("why")
	reads := w.begin(func(t *task.Task) {
		if err := c.Fill(t); err != why {
			w.t.Errorf("a read: %v", err)
		}
	})
	sends := w.begin(func(t *task.Task) {
		if err := c.Send(t, make([]byte, 8<<20), nil, nil); err != why {
			w.t.Errorf("a send: %v", err)
		}
	})
	w.on(func() {})
	w.on(func() { c.Interrupt(why); c.Interrupt(errors.New("another")) })
	w.await(reads)
	w.await(sends)
	w.run(func(t *task.Task) {
		if err := c.Fill(t); err != why {
			w.t.Errorf("later: %v", err)
		}
	})
}

func TestACloseEndsWhatWaits(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	done := w.begin(func(t *task.Task) {
		if err := c.Fill(t); err != net.ErrClosed {
			w.t.Errorf("a read: %v", err)
		}
	})
	w.on(func() {})
	w.on(func() { c.Close(); c.Close() })
	w.await(done)
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the peer: %v", err)
	}
}

// owner notes what it was told.
type owner struct{ ready, expired chan bool }

func newOwner() *owner { return &owner{make(chan bool, 100), make(chan bool, 100)} }

func (o *owner) Ready(c *stream.Conn)   { o.ready <- c.HungUp() }
func (o *owner) Expired(c *stream.Conn) { o.expired <- c.HungUp() }

func TestTheOwnerIsToldWhatNobodyWaitsFor(t *testing.T) {
	t.Parallel()
	w := start(t)
	o := newOwner()
	c, far := w.adopt(o)
	far.Write([]byte("x"))
	if hup := <-o.ready; hup {
		t.Error("hung up")
	}
	w.on(func() { c.Limit(time.Now()) })
	<-o.expired
	w.run(func(t *task.Task) {
		c.Fill(t)
		c.Consume(1)
		far.Write([]byte("y")) // somebody waits for that
		c.Fill(t)
		c.Consume(1)
	})
	far.Close()
	if hup := <-o.ready; !hup {
		t.Error("not hung up")
	}
	if len(o.ready)+len(o.expired) > 0 {
		t.Error("it was told more")
	}
}

// Whoever has read ahead gives what is left along.
func TestWhatWasReadGoesAlong(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	other, _ := w.adopt(nil)
	far.Write([]byte("head and more"))
	w.run(func(t *task.Task) {
		c.Fill(t)
		c.Consume(5)
	})
	w.on(func() {
		fd, early := c.Detach()
		defer unix.Close(fd)
		if string(early) != "and more" || c.Open() {
			t.Errorf("%q, open: %v", early, c.Open())
		}
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			t.Error(err)
		}
	})
	w.on(other.Close)
}

func TestDial(t *testing.T) {
	t.Parallel()
	w := start(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := ln.Addr().(*net.TCPAddr).AddrPort()
	path := filepath.Join(t.TempDir(), "s")
	un, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer un.Close()
	options := func() *stream.DialOptions { return &stream.DialOptions{Until: w.loop.Now().Add(bound)} }
	w.run(func(t *task.Task) {
		var c, u stream.Conn
		if err := w.loop.Dial(t, &c, at, options()); err != nil || !c.Open() {
			w.t.Errorf("tcp: %v", err)
		}
		c.Close()
		if err := w.loop.DialUnix(t, &u, path, options()); err != nil || !u.Open() {
			w.t.Errorf("unix: %v", err)
		}
		wantIdle(w.t, &u)
		u.Close()
		o := options()
		o.MayHave = func(int) bool { return false }
		if err := w.loop.Dial(t, &c, at, o); !errors.Is(err, unix.EMFILE) || c.Open() {
			w.t.Errorf("without a descriptor: %v", err)
		}
	})
	ln.Close()
	w.run(func(t *task.Task) {
		var c stream.Conn
		if err := w.loop.Dial(t, &c, at, options()); !errors.Is(err, unix.ECONNREFUSED) || c.Open() {
			w.t.Errorf("nobody listens: %v", err)
		}
	})
}

// Where nothing answers, the deadline ends the attempt: the queue of a listener is full.
func TestADialEndsWithItsDeadline(t *testing.T) {
	t.Parallel()
	w := start(t)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port))
	w.run(func(t *task.Task) {
		var all [4]stream.Conn
		late := 0
		for i := range all {
			err := w.loop.Dial(t, &all[i], at, &stream.DialOptions{Until: time.Now().Add(300 * time.Millisecond)})
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				late++
			case err != nil:
				w.t.Error(err)
			}
		}
		if late == 0 {
			w.t.Error("no attempt was ended")
		}
		for i := range all {
			all[i].Close()
		}
	})
}

func TestAConnectionIsSmall(t *testing.T) {
	t.Parallel()
	if size := unsafe.Sizeof(stream.Conn{}); size > 96 {
		t.Errorf("it has %d bytes", size)
	} else {
		t.Logf("%d bytes", size)
	}
}

// wantIdle fails unless connections have nothing but themselves.
func wantIdle(t testing.TB, all ...*stream.Conn) {
	t.Helper()
	for i, c := range all {
		if c.Working() {
			t.Errorf("connection %d has memory that it needs for work", i)
		}
	}
}

// A connection for which nothing is under way has none of what it needs for that, however
// it came to it.
func TestAParkedConnectionHasNothing(t *testing.T) {
	t.Parallel()
	w := start(t)
	o := newOwner()
	c, far := w.adopt(o)
	other, farOther := w.adopt(o)
	full := make([]byte, fill(c))
	sends := w.begin(func(t *task.Task) {
		if err := c.Send(t, []byte("ping"), nil, nil); err != nil {
			w.t.Error(err)
		}
	})
	w.run(func(t *task.Task) {
		b := private(t, w, c, other, far, farOther, "ping")
		if !c.Working() {
			w.t.Error("nothing is under way, with bytes that were not consumed")
		}
		c.Consume(2)
		c.Consume(len(b) - 2)
		wantIdle(w.t, other)
		if !c.Working() {
			w.t.Error("nothing is under way, with a task that waits")
		}
	})
	readN(t, far, len(full)+4)
	w.await(sends)
	w.run(func(t *task.Task) {
		c.Limit(w.loop.Now())
		if err := c.Fill(t); !errors.Is(err, os.ErrDeadlineExceeded) {
			w.t.Error(err)
		}
		wantIdle(w.t, c, other)
		c.Limit(time.Time{})
		c.Preload([]byte("early"))
		if b := c.Buffered(); string(b) != "early" {
			w.t.Errorf("%q", b)
		}
		c.Consume(5)
		wantIdle(w.t, c)
	})
	waits := w.begin(func(t *task.Task) { c.Fill(t) })
	w.on(func() {})
	w.on(func() { c.Close() })
	w.await(waits)
	far.Close()
	farOther.Close()
	w.run(func(t *task.Task) {
		if err := other.Fill(t); err != io.EOF {
			w.t.Error(err)
		}
		wantIdle(w.t, c, other)
	})
}

// One who waits for a connection that is closed, and becomes another one before he is told,
// has nothing to do with the new one.
func TestAConnectionThatIsUsedAgain(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, _ := w.adopt(nil)
	spare, far := w.adopt(nil)
	fill(c)
	var waits []<-chan struct{}
	for _, call := range []func(*task.Task) error{
		func(t *task.Task) error { return c.Fill(t) },
		func(t *task.Task) error { return c.Send(t, []byte("x"), nil, nil) },
	} {
		waits = append(waits, w.begin(func(t *task.Task) {
			if err := call(t); err != net.ErrClosed {
				w.t.Errorf("it ended with %v", err)
			}
		}))
	}
	w.on(func() {})
	far.Write([]byte("new"))
	w.on(func() {
		c.Close()
		fd, _ := spare.Detach()
		if err := w.loop.Adopt(c, fd, nil, nil); err != nil {
			t.Error(err)
		}
	})
	reads := w.begin(func(t *task.Task) {
		if err := c.Fill(t); err != nil || string(c.Buffered()) != "new" {
			w.t.Errorf("%q, %v", c.Buffered(), err)
		}
	})
	for _, done := range append(waits, reads) {
		w.await(done)
	}
}

// A deadline that comes while the task does something else is not forgotten.
func TestADeadlineComesThoughNobodyWaits(t *testing.T) {
	t.Parallel()
	w := start(t)
	clock := streamtest.NewClock(w.loop)
	c, _ := w.adopt(nil)
	w.on(func() { c.Limit(w.loop.Now().Add(time.Second)) })
	clock.Advance(2 * time.Second)
	w.run(func(t *task.Task) {
		if err := c.Fill(t); !errors.Is(err, os.ErrDeadlineExceeded) {
			w.t.Error(err)
		}
		if !c.Quiet() {
			w.t.Error("nothing has come")
		}
	})
}

// A request in steady state allocates nothing, whether it waits or not, and whoever has the
// buffer.
func TestReadingAndSendingAllocatesNothing(t *testing.T) { // not parallel: it counts allocations
	w := start(t)
	c, far := w.adoptRaw(newOwner())
	other, farOther := w.adoptRaw(nil)
	slow, farSlow := w.adoptRaw(nil)
	ping, b, full := []byte("ping"), make([]byte, 64<<10), fill(slow)
	var drains *task.Task
	over := false
	drained := w.begin(func(t *task.Task) {
		for drains = t; !over; t.Wait() {
			for n := 1; n > 0; {
				n, _ = unix.Read(farSlow, b)
			}
		}
	})
	cycle := func(t *task.Task) {
		unix.Write(far, ping)
		unix.Write(farOther, ping)
		c.Fill(t)
		other.Fill(t) // which has the first one save what it has
		other.Consume(4)
		p := c.Buffered()
		c.Consume(4)
		c.Send(t, p[:1], p[1:2], p[2:])
		for all := 0; all < full; {
			n, _ := unix.Write(slow.FD(), b[:min(4096, full-all)])
			all += max(n, 0)
			if n < 0 {
				break
			}
		}
		drains.Wake()
		slow.Send(t, ping, p, ping) // waits
		unix.Read(far, b)
	}
	var n float64
	w.run(func(t *task.Task) {
		n = testing.AllocsPerRun(1000, func() { cycle(t) })
		over = true
		drains.Wake()
	})
	w.await(drained)
	if n > 0 {
		t.Errorf("%v allocations", n)
	}
	w.on(func() { wantIdle(t, c, other, slow) })
}
