package inflight_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// The test kills relays at any moment and goes on as a successor does, from nothing but
// what the documentation of the package says. Each relay is a process of its own and
// moves bytes in all three ways, under back-pressure.

const (
	crashLegs    = 4
	crashBuffers = crashLegs + 1
	crashPipes   = 2

	firstPipe = 5
	firstLeg  = firstPipe + 2*crashPipes
)

// leg is one direction in the relay.
type leg struct {
	d        inflight.Direction
	src, dst int

	buffer   *inflight.Buffer // with bytes for a slow receiver, from..to
	from, to int
	pipe     *inflight.LoopPipe
	piped    int
}

// relay is the child: what an engine does, without its care for anything but bytes.
type relay struct {
	store   *inflight.Store
	current *inflight.Buffer
	random  *rand.Rand
}

func relayUntilKilled() {
	seed, _ := strconv.Atoi(os.Getenv("HOLDFAST_TEST_SEED"))
	var pipes []inflight.Pipe
	for i := range crashPipes {
		pipes = append(pipes, inflight.Pipe{R: firstPipe + 2*i, W: firstPipe + 2*i + 1})
	}
	store, err := inflight.Open(3, pipes)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	r := relay{store, store.Buffer(), rand.New(rand.NewPCG(uint64(seed), 1))}
	var legs [crashLegs]leg
	for i := range legs {
		legs[i] = leg{d: inflight.Direction(i), src: firstLeg + 2*i, dst: firstLeg + 2*i + 1}
	}
	os.Stdout.Write([]byte("started"))
	for {
		moved := false
		for i := range legs {
			moved = r.move(&legs[i]) || moved
		}
		if !moved {
			exitIfAlone()
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// exitIfAlone ends the child of a test that has ended.
func exitIfAlone() {
	fds := []unix.PollFd{{Fd: 1}}
	if unix.Poll(fds, 0); fds[0].Revents&unix.POLLERR != 0 {
		os.Exit(1)
	}
}

func (r *relay) move(l *leg) bool {
	switch {
	case l.buffer != nil:
		return r.sendRest(l)
	case l.pipe != nil:
		return r.empty(l)
	}
	return [...]func(*leg) bool{r.copy, r.peek, r.splice}[r.random.IntN(3)](l)
}

func (r *relay) copy(l *leg) bool {
	r.current.Claim(l.d)
	n := receive(l.src, r.current.Bytes[:1+r.random.IntN(inflight.BufferSize)], 0)
	if n == 0 {
		return false
	}
	l.buffer, l.from, l.to = r.current, 0, n
	r.sendRest(l)
	if l.buffer != nil {
		r.current = r.store.Buffer() // there is one for each leg, and one
	}
	return true
}

// sendRest sends a part, as if the receiver took no more.
func (r *relay) sendRest(l *leg) bool {
	n := send(l.dst, l.buffer.Bytes[l.from:l.to-r.random.IntN(l.to-l.from)])
	if l.from += n; l.from == l.to {
		r.store.Complete(l.d, l.to)
		if l.buffer != r.current {
			r.store.Free(l.buffer)
		}
		l.buffer = nil
	}
	return n > 0
}

func (r *relay) peek(l *leg) bool {
	r.current.Claim(l.d)
	b := r.current.Bytes[:1+r.random.IntN(inflight.BufferSize)]
	n := send(l.dst, b[:receive(l.src, b, unix.MSG_PEEK)])
	if n > 0 {
		receive(l.src, b[:n], unix.MSG_TRUNC)
		r.store.Complete(l.d, n)
	}
	return n > 0
}

func (r *relay) splice(l *leg) bool {
	r.current.Release()
	if l.pipe = r.store.Pipe(l.d); l.pipe == nil {
		return false
	}
	l.piped = splice(l.src, l.pipe.W, 1<<20)
	r.empty(l)
	return true
}

func (r *relay) empty(l *leg) bool {
	n := 0
	if l.piped > 0 {
		n = splice(l.pipe.R, l.dst, l.piped-r.random.IntN(l.piped))
		r.store.Complete(l.d, n)
	}
	if l.piped -= n; l.piped == 0 {
		r.store.FreePipe(l.pipe)
		l.pipe = nil
	}
	return n > 0
}

func receive(fd int, b []byte, flags int) int {
	n, _, _ := unix.Recvfrom(fd, b, flags|unix.MSG_DONTWAIT)
	return max(n, 0)
}

func send(fd int, b []byte) int {
	n, _ := unix.SendmsgN(fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return max(n, 0)
}

func splice(from, to, most int) int {
	n, _ := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	return max(int(n), 0)
}

// supervisor holds what outlives a relay, and does what a successor does.
type supervisor struct {
	t     *testing.T
	fd    int
	file  []byte // its own mapping
	pipes []inflight.Pipe
	legs  [crashLegs]watched
	found struct{ unsent, undiscarded, piped int }
}

type watched struct {
	src, dst      int
	taken0, sent0 int64 // what the kernel had counted before
}

func TestASuccessorLosesNothing(t *testing.T) {
	t.Parallel()
	kills := 40
	if testing.Short() {
		kills = 10
	}
	s := &supervisor{t: t, fd: newFile(t, 2*crashLegs, crashBuffers), pipes: newPipes(t, crashPipes)}
	defer func() {
		for _, p := range s.pipes {
			p.Close()
		}
	}()
	mem, err := unix.Mmap(s.fd, 0, size(t, s.fd), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	s.file = mem

	var clients, sinks []net.Conn
	for i := range s.legs {
		client, src := connected(t)
		sink, dst := connected(t)
		unix.SetsockoptInt(dst, unix.SOL_SOCKET, unix.SO_SNDBUF, 30_000*(i+1))
		s.legs[i] = watched{src: src, dst: dst, taken0: taken(src), sent0: sent(dst)}
		clients, sinks = append(clients, client), append(sinks, sink)
	}
	var traffic sync.WaitGroup
	var stop atomic.Bool
	for i := range s.legs {
		traffic.Go(func() { produce(clients[i], uint64(i), &stop) })
		traffic.Go(func() { consume(t, sinks[i], uint64(i)) })
	}
	random := rand.New(rand.NewPCG(3, 4))
	for i := range kills {
		pid := s.start(i)
		time.Sleep(time.Duration(random.IntN(8000)) * time.Microsecond) // dies at any moment
		s.kill(pid)
		s.recover()
		if t.Failed() {
			break
		}
	}
	t.Logf("%d kills; found: %+v; %d MB", kills, s.found, s.completed()>>20)
	stop.Store(true)
	pid := s.start(kills)
	for deadline := time.Now().Add(30 * time.Second); !t.Failed() && !s.idle(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("the last relay does not come to an end")
		}
	}
	s.kill(pid)
	for i, l := range s.legs {
		unix.Shutdown(l.dst, unix.SHUT_WR)
		unix.Shutdown(l.src, unix.SHUT_RDWR)
		if t.Failed() { // and nobody knows what is left
			clients[i].Close()
			sinks[i].Close()
		}
	}
	traffic.Wait()
}

// start starts a relay and waits until it relays.
func (s *supervisor) start(seed int) (pid int) {
	s.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { r.Close() }) // which ends a relay that is left
	defer w.Close()
	files := []uintptr{0, w.Fd(), 2, uintptr(s.fd), 2}
	for _, p := range s.pipes {
		files = append(files, uintptr(p.R), uintptr(p.W))
	}
	for _, l := range s.legs {
		files = append(files, uintptr(l.src), uintptr(l.dst))
	}
	env := append(os.Environ(), childEnv+"=relay", "HOLDFAST_TEST_SEED="+strconv.Itoa(seed))
	pid, _, err = syscall.StartProcess("/proc/self/exe", os.Args[:1], &syscall.ProcAttr{Env: env, Files: files})
	if err != nil {
		s.t.Fatal(err)
	}
	r.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := r.Read(make([]byte, 10)); err != nil {
		s.kill(pid)
		s.t.Fatalf("the relay has not started: %v", err)
	}
	return pid
}

// kill kills a relay and waits until it is dead.
func (s *supervisor) kill(pid int) {
	syscall.Kill(pid, syscall.SIGKILL)
	var status syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(pid, &status, 0, nil); err != syscall.EINTR {
			break
		}
	}
	if status.Signal() != syscall.SIGKILL {
		s.t.Errorf("a relay has ended by itself: %v", status)
	}
}

// counters returns C, W and T of a direction.
func (s *supervisor) counters(d int) (c, w, t int64) {
	l := s.legs[d]
	return taken(l.src) - l.taken0, sent(l.dst) - l.sent0, int64(s.word(s.counts() + 8*d).Load())
}

func (s *supervisor) counts() int { return 3 * 4096 }

func (s *supervisor) word(offset int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&s.file[offset]))
}

// recover does what a successor does before it relays.
func (s *supervisor) recover() {
	claimed := map[int]bool{}
	claims := func(offset, n int, each func(i, d int)) {
		for i := range n {
			claim := s.word(offset + 8*i)
			v := claim.Load()
			if v == 0 {
				continue
			}
			d := int(v - 1)
			if claimed[d] {
				s.t.Errorf("direction %d has two claims", d)
			}
			claimed[d] = true
			each(i, d)
			c, w, _ := s.counters(d)
			if c != w {
				s.t.Errorf("direction %d: %d bytes taken, %d sent", d, c, w)
			}
			s.word(s.counts() + 8*d).Store(uint64(c))
			claim.Store(0)
		}
	}
	claims(4096, crashBuffers, s.recoverBuffer)
	claims(2*4096, crashPipes, s.recoverPipe)
	for d := range s.legs {
		if c, w, t := s.counters(d); c != w || w != t {
			s.t.Errorf("direction %d (claimed: %v): %d bytes taken, %d sent, %d completed", d, claimed[d], c, w, t)
		}
	}
}

func (s *supervisor) recoverBuffer(i, d int) {
	c, w, t := s.counters(d)
	switch {
	case c > w:
		s.found.unsent++
		if w < t || c-t > inflight.BufferSize {
			s.t.Errorf("direction %d: %d bytes taken, %d sent, %d completed", d, c, w, t)
			return
		}
		buffer := s.file[65536*(1+i):]
		s.fill(d, func() int { n := send(s.legs[d].dst, buffer[w-t:c-t]); w += int64(n); return int(c - w) })
	case w > c:
		s.found.undiscarded++
		if n := receive(s.legs[d].src, make([]byte, w-c), unix.MSG_TRUNC); n != int(w-c) {
			s.t.Errorf("%d bytes discarded, not %d", n, w-c)
		}
	}
}

func (s *supervisor) recoverPipe(i, d int) {
	left := func() int { n, _ := unix.IoctlGetInt(s.pipes[i].R, unix.TIOCINQ); return n }
	if left() > 0 {
		s.found.piped++
		s.fill(d, func() int { splice(s.pipes[i].R, s.legs[d].dst, 1<<20); return left() })
	}
}

// fill calls put until nothing is left, and waits for the receiver in between.
func (s *supervisor) fill(d int, put func() (left int)) {
	for deadline := time.Now().Add(30 * time.Second); put() > 0; {
		unix.Poll([]unix.PollFd{{Fd: int32(s.legs[d].dst), Events: unix.POLLOUT}}, 1000)
		if time.Now().After(deadline) {
			s.t.Errorf("the receiver of direction %d takes no more", d)
			return
		}
	}
}

// idle says whether all that has come was delivered.
func (s *supervisor) idle() bool {
	for d, l := range s.legs {
		inq, _ := unix.IoctlGetInt(l.src, unix.SIOCINQ)
		outq, _ := unix.IoctlGetInt(l.dst, unix.SIOCOUTQ)
		if c, w, t := s.counters(d); c != w || w != t || inq+outq != 0 {
			return false
		}
	}
	return true
}

func (s *supervisor) completed() (n uint64) {
	for d := range s.legs {
		n += s.word(s.counts() + 8*d).Load()
	}
	return n
}

// taken returns how many bytes were taken from the queue of a socket.
func taken(fd int) int64 {
	return settled(fd, unix.SIOCINQ, func(i *unix.TCPInfo, queue int) int64 { return int64(i.Bytes_received) - int64(queue) })
}

// sent returns how many bytes were put into the queue of a socket.
func sent(fd int) int64 {
	return settled(fd, unix.SIOCOUTQ, func(i *unix.TCPInfo, queue int) int64 { return int64(i.Bytes_acked) + int64(queue) })
}

// settled looks at a socket until nothing changes meanwhile.
func settled(fd int, queue uint, value func(*unix.TCPInfo, int) int64) int64 {
	for {
		before, err1 := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		n, err2 := unix.IoctlGetInt(fd, queue)
		after, err3 := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err1 != nil || err2 != nil || err3 != nil {
			panic(fmt.Sprint(err1, err2, err3))
		}
		if before.Bytes_received == after.Bytes_received && before.Bytes_acked == after.Bytes_acked {
			return value(after, n)
		}
	}
}

// connected returns both ends of a connection, one of them as a descriptor. Which is
// which does not matter.
func connected(t *testing.T) (a net.Conn, b int) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	raw, err := accepted.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { b = duplicate(t, int(fd)) })
	t.Cleanup(func() { unix.Close(b) })
	return a, b
}

// stream is bytes of which each says where it is.
func stream(seed uint64) []byte {
	b := make([]byte, 1_000_003)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(b)
	return b
}

func produce(c net.Conn, seed uint64, stop *atomic.Bool) {
	b, random := stream(seed), rand.New(rand.NewPCG(seed, 5))
	for at := 0; !stop.Load(); {
		n := min(1+random.IntN(100_000), len(b)-at)
		if n, _ = c.Write(b[at : at+n]); n == 0 {
			return
		}
		at = (at + n) % len(b)
	}
}

func consume(t *testing.T, c net.Conn, seed uint64) {
	want, got, random := stream(seed), make([]byte, 200_000), rand.New(rand.NewPCG(seed, 6))
	for at, total := 0, 0; ; {
		n, err := c.Read(got[:min(1+random.IntN(len(got)), len(want)-at)])
		if !bytes.Equal(got[:n], want[at:at+n]) {
			t.Errorf("direction %d: other bytes after %d", seed, total)
			io.Copy(io.Discard, c)
			return
		}
		if err != nil {
			return
		}
		total += n
		at = (at + n) % len(want)
		time.Sleep(time.Duration(random.IntN(500)) * time.Microsecond) // a slow receiver
	}
}
