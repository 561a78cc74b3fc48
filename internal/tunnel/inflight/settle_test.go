package inflight_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// scene is a tunnel, of which the direction from the client to the server is looked at,
// and the store of one process after the other. A process that dies just leaves.
type scene struct {
	t              *testing.T
	client, server *net.TCPConn
	src, dst       int
	base           [2]inflight.Counters
	file           int
	pipe           inflight.Pipe

	store  *inflight.Store
	buffer *inflight.Buffer
	bytes  []byte // of it that are not sent yet
	piped  *inflight.LoopPipe
}

const (
	forth = inflight.Direction(6)
	back  = inflight.Direction(7)
)

func newScene(t *testing.T) *scene {
	s := &scene{t: t, file: newFile(t, 10, 2), pipe: newPipes(t, 1)[0]}
	t.Cleanup(func() { s.pipe.Close() })
	s.client, s.src = connected(t)
	s.server, s.dst = connected(t)
	s.base = [2]inflight.Counters{look(t, s.src), look(t, s.dst)}
	s.open(inflight.Open)
	return s
}

func (s *scene) open(how func(int, []inflight.Pipe) (*inflight.Store, error)) {
	s.t.Helper()
	var err error
	s.store, err = how(duplicate(s.t, s.file), []inflight.Pipe{{R: duplicate(s.t, s.pipe.R), W: duplicate(s.t, s.pipe.W)}})
	if err != nil {
		s.t.Fatal(err)
	}
}

// die leaves everything as it is, for a successor.
func (s *scene) die() {
	s.store.Close()
	s.buffer, s.bytes, s.piped = nil, nil, nil
	s.open(func(fd int, pipes []inflight.Pipe) (*inflight.Store, error) { return inflight.Reopen(fd, pipes, true) })
}

// settle is what a successor does with both directions.
func (s *scene) settle() inflight.Rest {
	s.t.Helper()
	src, dst := look(s.t, s.src), look(s.t, s.dst)
	src = src.Since(s.base[0].Taken, s.base[0].Given)
	dst = dst.Since(s.base[1].Taken, s.base[1].Given)
	rest, err := s.store.Settle(forth, s.src, src, dst)
	if err == nil {
		_, err = s.store.Settle(back, s.dst, dst, src)
	}
	if err != nil {
		s.t.Fatalf("%v; %+v, %+v", err, src, dst)
	}
	if rest.Buffer != nil {
		s.buffer, s.bytes = rest.Buffer, rest.Buffer.Bytes[rest.From:rest.To]
	}
	s.piped = rest.Pipe
	return rest
}

// Steps of a relay.

func (s *scene) claim() { s.buffer = s.store.Buffer(); s.buffer.Claim(forth) }

func (s *scene) read(n int) func() {
	return func() {
		if receive(s.src, s.buffer.Bytes[:n], 0) != n {
			s.t.Errorf("not %d bytes were read", n)
		}
		s.bytes = s.buffer.Bytes[:n]
	}
}

func (s *scene) peek(n int) func() {
	return func() {
		receive(s.src, s.buffer.Bytes[:n], unix.MSG_PEEK)
		s.bytes = s.buffer.Bytes[:n]
	}
}

func (s *scene) fill(n int) func()  { return func() { s.buffer.Filled(n) } }
func (s *scene) count(n int) func() { return func() { s.store.Complete(forth, n) } }
func (s *scene) free()              { s.store.Free(s.buffer) }
func (s *scene) freePipe()          { s.store.FreePipe(s.piped) }
func (s *scene) claimPipe()         { s.piped = s.store.Pipe(forth) }

func (s *scene) give(n int) func() {
	return func() {
		if send(s.dst, s.bytes[:n]) != n {
			s.t.Errorf("not %d bytes were sent", n)
		}
		s.bytes = s.bytes[n:]
	}
}

func (s *scene) discard(n int) func() {
	return func() { receive(s.src, make([]byte, n), unix.MSG_TRUNC) }
}

func (s *scene) spliceIn(n int) func() {
	return func() { splice(s.src, s.piped.W, n) }
}

func (s *scene) spliceOut(n int) func() {
	return func() { splice(s.piped.R, s.dst, n) }
}

// steps are all that a relay does, with the 100 bytes that are there.
func (s *scene) steps() []func() {
	return []func(){
		s.claim, s.read(20), s.fill(20), s.give(20), s.free, s.count(20),
		s.claim, s.peek(20), s.give(10), s.discard(4), s.discard(6), s.free, s.count(10),
		s.claimPipe, s.spliceIn(30), s.spliceOut(10), s.count(10), s.spliceOut(20), s.count(20), s.freePipe,
		s.claim, s.read(10), s.fill(10), s.give(3), s.give(7), s.free, s.count(10),
		s.claim, s.peek(30), s.give(30), s.discard(30), s.free, s.count(30),
		s.claim,
	}
}

// finish sends what a successor has found, and what the source still has.
func (s *scene) finish(rest inflight.Rest) {
	switch {
	case s.buffer != nil:
		s.give(len(s.bytes))()
		s.free()
		s.count(rest.To)()
	case s.piped != nil:
		s.spliceOut(rest.Piped)()
		s.count(rest.Piped)()
		s.freePipe()
	}
	b := make([]byte, 1000)
	n := receive(s.src, b, 0)
	send(s.dst, b[:n])
	unix.Shutdown(s.dst, unix.SHUT_WR)
}

// What may have become of the source, and whether that is a reset.
var fates = map[string]struct {
	happens func(*scene)
	until   func(inflight.Counters) bool
	reset   bool
	wiped   bool // what the source had is not there any more
}{
	"alive":       {func(*scene) {}, func(inflight.Counters) bool { return true }, false, false},
	"half-closed": {func(s *scene) { s.client.CloseWrite() }, finReceived, false, false},
	"gone by both FINs": {func(s *scene) {
		s.store.Mark(back, inflight.MarkFin)
		unix.Shutdown(s.src, unix.SHUT_WR)
		s.client.CloseWrite()
	}, gone, false, false},
	"reset": {func(s *scene) { s.client.SetLinger(0); s.client.Close() }, gone, true, false},
	"reset after its FIN": {func(s *scene) {
		s.client.CloseWrite()
		await(s.t, s.src, "at its end", finReceived)
		s.client.SetLinger(0)
		s.client.Close()
	}, gone, true, false},
	"reset after our FIN": {func(s *scene) {
		s.store.Mark(back, inflight.MarkFin)
		unix.Shutdown(s.src, unix.SHUT_WR)
		s.client.SetLinger(0)
		s.client.Close()
	}, gone, true, false},
	"reset after our FIN, and that is known": {func(s *scene) {
		s.store.Mark(back, inflight.MarkFin)
		unix.Shutdown(s.src, unix.SHUT_WR)
		s.client.SetLinger(0)
		s.client.Close()
		await(s.t, s.src, "gone", gone)
		s.store.Mark(forth, inflight.MarkLost)
		unix.GetsockoptInt(s.src, unix.SOL_SOCKET, unix.SO_ERROR)
	}, gone, true, false},
	"reset, and the error was taken": {func(s *scene) {
		s.client.SetLinger(0)
		s.client.Close()
		await(s.t, s.src, "gone", gone)
		unix.GetsockoptInt(s.src, unix.SOL_SOCKET, unix.SO_ERROR)
	}, gone, true, false},
	"reset by us": {func(s *scene) { disconnect(s.src) }, gone, true, true},
}

// The truth is found with real sockets, whatever a relay was doing and whatever has become
// of the source; also by a successor of the successor.
func TestSuccessorsSettleWhatARelayHasLeft(t *testing.T) {
	t.Parallel()
	want := pattern(100)
	for fate, f := range fates {
		for step := range len(new(scene).steps()) + 1 {
			t.Run(fmt.Sprintf("%s/%d", fate, step), func(t *testing.T) {
				t.Parallel()
				s := newScene(t)
				s.client.Write(want)
				await(t, s.src, "there", unread(len(want)))
				steps := s.steps()
				for _, step := range steps[:step] {
					step()
				}
				f.happens(s)
				await(t, s.src, "so", f.until)

				s.die()
				rest := s.settle()
				if !rest.Lost {
					s.die()
					again := s.settle()
					rest.Discard = 0 // has been done
					rest.Buffer, rest.Pipe = again.Buffer, again.Pipe
					if again != rest {
						t.Errorf("the second successor finds %+v, the first %+v", again.Finding, rest.Finding)
					}
				}
				if half := rest.To - rest.From; half > 1 && !rest.Lost {
					s.give(half / 2)()
					s.die()
					rest = s.settle()
				}
				if rest.Reset != f.reset {
					t.Errorf("the source was reset: %v", rest.Reset)
				}
				if rest.Lost {
					if !f.reset {
						t.Error("what is in flight is lost")
					}
					disconnect(s.dst)
					s.store.Surrender(forth)
				} else {
					s.finish(rest)
				}
				s.check(want, rest.Lost || f.wiped)
			})
		}
	}
}

// check says whether the server gets the stream, or a beginning of it, and nothing is
// left of the direction.
func (s *scene) check(want []byte, beginning bool) {
	s.t.Helper()
	s.server.SetReadDeadline(time.Now().Add(30 * time.Second))
	var got bytes.Buffer
	got.ReadFrom(s.server)
	if p := got.Bytes(); !bytes.HasPrefix(want, p) || len(p) < len(want) && !beginning {
		s.t.Errorf("the server got\n%v", p)
	}
	s.store.Settled()
	if b, p := s.store.Held(); b+p != 0 {
		s.t.Errorf("%d buffers and %d pipes are held", b, p)
	}
	if !empty(mapped(s.t, s.file)[4096 : 3*4096]) {
		s.t.Error("something is claimed")
	}
	if s.store.FreeBuffers() != 2 || s.store.Pipe(0) == nil {
		s.t.Error("not two buffers and a pipe are free")
	}
	if n, _ := unix.IoctlGetInt(s.pipe.R, unix.TIOCINQ); n != 0 {
		s.t.Errorf("%d bytes are in the pipe", n)
	}
}

// What contradicts itself remains claimed until the receiver was reset.
func TestAContradictionIsKeptUntilItIsSurrendered(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.client.Write(make([]byte, 100))
	await(t, s.src, "there", unread(100))
	s.claim()
	s.read(20)()
	s.fill(21)()
	for range 2 {
		s.die()
		if _, err := s.store.Settle(forth, s.src, s.counters(0), s.counters(1)); !errors.Is(err, inflight.ErrContradiction) {
			t.Errorf("settled: %v", err)
		}
		if b, _ := s.store.Held(); b != 1 || s.store.FreeBuffers() != 1 {
			t.Errorf("%d buffers are held, %d free", b, s.store.FreeBuffers())
		}
	}
	disconnect(s.dst)
	s.store.Surrender(forth)
	if b, _ := s.store.Held(); b != 0 || s.store.FreeBuffers() != 2 {
		t.Errorf("%d buffers are held, %d free", b, s.store.FreeBuffers())
	}
	s.check(nil, true)
}

func (s *scene) counters(i int) inflight.Counters {
	s.t.Helper()
	return look(s.t, [2]int{s.src, s.dst}[i]).Since(s.base[i].Taken, s.base[i].Given)
}

// What was sent of bytes that are not there any more cannot be discarded.
func TestAPeekAtBytesThatAreNotThereIsAContradiction(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.client.Write(make([]byte, 100))
	await(t, s.src, "there", unread(100))
	s.claim()
	s.peek(100)()
	s.give(100)()
	s.die()
	src, dst := s.counters(0), s.counters(1)
	receive(s.src, make([]byte, 90), 0)
	if _, err := s.store.Settle(forth, s.src, src, dst); err == nil {
		t.Error("settled")
	}
}
