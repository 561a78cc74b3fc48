package inflight_test

import (
	"bytes"
	"encoding/json"
	"errors"
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

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

// The test kills relays at any moment, also while they recover what the last one has left.
// Each relay is a process of its own and moves bytes in all three ways, under
// back-pressure; it passes ends and resets on. Peers check every byte.

const (
	crashTunnels = 5
	crashBuffers = 2*crashTunnels + 1
	crashPipes   = 2

	firstPipe   = 4
	firstSocket = firstPipe + 2*crashPipes
)

// crashEnv and seedEnv tell a relay what it cannot know.
const (
	crashEnv = "HOLDFAST_TEST_TUNNELS" // JSON, a []vaulted
	seedEnv  = "HOLDFAST_TEST_SEED"
)

// vaulted is what a successor is told of a tunnel.
type vaulted struct {
	Slot         inflight.Direction
	Taken, Given [2]uint64 // by the direction
}

// What a relay says: each is a byte. Those in between are of what it has found.
const (
	saysReopening = 'r'
	saysStarted   = 's'
	saysBuffer    = 'b'
	saysPipe      = 'p'
	saysDiscarded = 'd'
	saysReset     = 'x'
	saysLost      = 'l'
)

func say(what byte) { os.Stdout.Write([]byte{what}) }

// relay is the child: what an engine does, without its care for anything but bytes.
type relay struct {
	store   *inflight.Store
	current *inflight.Buffer
	random  *rand.Rand
	tunnels []*relayed
}

type relayed struct {
	fds  [2]int
	legs [2]leg
	over bool
}

// leg is one direction, from the socket of the same number.
type leg struct {
	d        inflight.Direction
	src, dst int
	ended    bool // its end was passed on

	buffer   *inflight.Buffer // with bytes for a slow receiver, from..to
	from, to int
	pipe     *inflight.LoopPipe
	piped    int
}

func relayUntilKilled() {
	seed, _ := strconv.Atoi(os.Getenv(seedEnv))
	r := relay{random: rand.New(rand.NewPCG(uint64(seed), 1))}
	if err := r.resume(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	say(saysStarted)
	for {
		moved := false
		for _, t := range r.tunnels {
			for i := range t.legs {
				moved = !t.over && r.move(t, &t.legs[i]) || moved
			}
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

// resume finds out how far the predecessor has come.
func (r *relay) resume() (err error) {
	var tunnels []vaulted
	if err := json.Unmarshal([]byte(os.Getenv(crashEnv)), &tunnels); err != nil {
		return err
	}
	var pipes []inflight.Pipe
	for i := range crashPipes {
		pipes = append(pipes, inflight.Pipe{R: firstPipe + 2*i, W: firstPipe + 2*i + 1})
	}
	say(saysReopening)
	if r.store, err = inflight.Reopen(3, pipes, true); err != nil {
		return err
	}
	for i, v := range tunnels {
		t := &relayed{fds: [2]int{firstSocket + 2*i, firstSocket + 2*i + 1}}
		if err := r.settle(t, v); err != nil {
			return err
		}
		r.tunnels = append(r.tunnels, t)
	}
	r.store.Settled()
	r.current = r.store.Buffer()
	return nil
}

func (r *relay) settle(t *relayed, v vaulted) error {
	var now [2]inflight.Counters
	for i, fd := range t.fds {
		c, err := inflight.Look(fd)
		if err != nil {
			return err
		}
		now[i] = c.Since(v.Taken[i], v.Given[1-i])
	}
	lost := false
	for i := range t.legs {
		l := &t.legs[i]
		*l = leg{d: 2*v.Slot + inflight.Direction(i), src: t.fds[i], dst: t.fds[1-i]}
		rest, err := r.store.Settle(l.d, l.src, now[i], now[1-i])
		if err != nil {
			return err
		}
		l.buffer, l.from, l.to, l.pipe, l.piped = rest.Buffer, rest.From, rest.To, rest.Pipe, rest.Piped
		l.ended = now[1-i].FinSent || now[1-i].Gone // by both FINs, or the tunnel is over
		lost = lost || rest.Lost
		tell(rest)
	}
	// Of a client that was reset the server may still get what is there.
	if lost || now[1].Gone && r.reset(t, 1) || now[0].Gone && now[1].Gone && r.reset(t, 0) {
		r.cut(t)
	}
	return nil
}

func tell(rest inflight.Rest) {
	for what, found := range map[byte]bool{
		saysBuffer: rest.Buffer != nil, saysPipe: rest.Pipe != nil, saysDiscarded: rest.Discard > 0, saysReset: rest.Reset, saysLost: rest.Lost,
	} {
		if found {
			say(what)
		}
	}
}

// reset says whether a socket is gone without both FINs.
func (r *relay) reset(t *relayed, i int) bool {
	c, err := inflight.Look(t.fds[i])
	d := t.legs[0].d + inflight.Direction(i)
	return err != nil || c.Gone && (c.Failed || r.store.Marks(d)&inflight.MarkLost != 0 || r.store.Marks(d^1)&inflight.MarkFin == 0)
}

// cut resets both ends, and then gives up what they were still to get.
func (r *relay) cut(t *relayed) {
	t.over = true
	disconnect(t.fds[0])
	disconnect(t.fds[1])
	for i := range t.legs {
		l := &t.legs[i]
		r.store.Surrender(l.d)
		if l.buffer != nil {
			r.store.Free(l.buffer)
		}
		if l.pipe != nil {
			r.store.FreePipe(l.pipe)
		}
	}
}

func (r *relay) move(t *relayed, l *leg) bool {
	switch {
	case l.buffer != nil:
		return r.sendRest(t, l)
	case l.pipe != nil:
		return r.empty(t, l)
	case l.ended:
		return false
	}
	return [...]func(*relayed, *leg) bool{r.copy, r.peek, r.splice}[r.random.IntN(3)](t, l)
}

// take reads; 0 may have been the end.
func (r *relay) take(t *relayed, l *leg, b []byte, flags int) int {
	n, _, err := unix.Recvfrom(l.src, b, flags|unix.MSG_DONTWAIT)
	switch {
	case n > 0:
		return n
	case err == nil:
		r.end(t, l)
	default:
		r.failed(t, l.d, err)
	}
	return 0
}

// end passes the end of a source on, or that it was reset and somebody has taken the error.
func (r *relay) end(t *relayed, l *leg) {
	if r.reset(t, int(l.d&1)) {
		r.cut(t)
		return
	}
	r.store.Mark(l.d, inflight.MarkFin)
	if err := unix.Shutdown(l.dst, unix.SHUT_WR); err != nil {
		r.cut(t)
	}
	l.ended = true
}

// failed ends a tunnel whose source of direction d has an error, which was taken.
func (r *relay) failed(t *relayed, d inflight.Direction, err error) {
	if err != nil && err != unix.EAGAIN && err != unix.EINTR {
		r.store.Mark(d, inflight.MarkLost)
		r.cut(t)
	}
}

// put says how many bytes the receiver has taken. If it is lost, the tunnel is over.
func (r *relay) put(t *relayed, l *leg, n int, err error) int {
	if n <= 0 {
		r.failed(t, l.d^1, err)
	}
	return max(n, 0)
}

func (r *relay) copy(t *relayed, l *leg) bool {
	r.current.Claim(l.d)
	n := r.take(t, l, r.current.Bytes[:1+r.random.IntN(inflight.BufferSize)], 0)
	if n == 0 {
		r.current.Release()
		return false
	}
	r.current.Filled(n)
	l.buffer, l.from, l.to = r.current, 0, n
	r.current = nil
	r.sendRest(t, l)
	if r.current == nil {
		r.current = r.store.Buffer() // there is one for each leg, and one
	}
	return true
}

// sendRest sends a part, as if the receiver took no more.
func (r *relay) sendRest(t *relayed, l *leg) bool {
	p := l.buffer.Bytes[l.from : l.to-r.random.IntN(l.to-l.from)]
	n, err := unix.SendmsgN(l.dst, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	n = r.put(t, l, n, err)
	if l.from += n; l.from == l.to {
		r.store.Free(l.buffer)
		r.store.Complete(l.d, l.to)
		l.buffer = nil
	}
	return n > 0
}

func (r *relay) peek(t *relayed, l *leg) bool {
	r.current.Claim(l.d)
	b := r.current.Bytes[:1+r.random.IntN(inflight.BufferSize)]
	n := r.take(t, l, b, unix.MSG_PEEK)
	if n > 0 {
		sent, err := unix.SendmsgN(l.dst, b[:n], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		n = r.put(t, l, sent, err)
	}
	if n > 0 {
		receive(l.src, b[:n], unix.MSG_TRUNC)
	}
	r.current.Release()
	r.store.Complete(l.d, n)
	return n > 0
}

func (r *relay) splice(t *relayed, l *leg) bool {
	r.current.Release()
	if l.pipe = r.store.Pipe(l.d); l.pipe == nil {
		return false
	}
	n, err := unix.Splice(l.src, nil, l.pipe.W, nil, 1<<20, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	if n <= 0 {
		r.store.FreePipe(l.pipe)
		l.pipe = nil
		r.failed(t, l.d, err) // an end is for a read to find
		return false
	}
	l.piped = int(n)
	r.empty(t, l)
	return true
}

func (r *relay) empty(t *relayed, l *leg) bool {
	n, err := unix.Splice(l.pipe.R, nil, l.dst, nil, l.piped-r.random.IntN(l.piped), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	moved := r.put(t, l, int(n), err)
	if moved == 0 {
		return false
	}
	r.store.Complete(l.d, moved)
	if l.piped -= moved; l.piped == 0 {
		r.store.FreePipe(l.pipe)
		l.pipe = nil
	}
	return true
}

// supervisor holds what outlives a relay.
type supervisor struct {
	t       *testing.T
	file    int
	pipes   []inflight.Pipe
	tunnels [crashTunnels]*watched
	made    int // of all tunnels
	random  *rand.Rand
	stop    atomic.Bool
	said    map[byte]int
}

// watched is a tunnel with both peers.
type watched struct {
	vaulted
	fds   [2]int
	peers [2]*net.TCPConn
	kind  kind

	produced [2]chan produced // by the direction, in the end
	reset    atomic.Bool      // by a peer
	ended    atomic.Bool      // both directions have
}

// produced is what became of a sender.
type produced struct {
	sent int
	err  error // it was reset, and has taken the error: its peer's reader sees an end then
}

// kind is what the peers of a tunnel do.
type kind struct {
	name    string
	budgets [2]int // how much the client and the server send, on average
	message int    // the most in one write
	small   bool   // the kernel's buffers
	slow    bool   // both read slowly
	resets  bool   // the client ends by a reset
}

var kinds = []kind{
	{name: "bulk", budgets: [2]int{30 << 20, 30 << 20}, message: 200_000},
	{name: "half-closed", budgets: [2]int{1 << 10, 10 << 20}, message: 50_000},
	{name: "slow and half-closed", budgets: [2]int{4 << 20, 1 << 10}, message: 100_000, small: true, slow: true},
	{name: "messages", budgets: [2]int{1 << 20, 1 << 20}, message: 300},
	{name: "reset", budgets: [2]int{1 << 20, 10 << 20}, message: 100_000, resets: true},
	{name: "slow", budgets: [2]int{4 << 20, 4 << 20}, message: 100_000, small: true, slow: true},
	{name: "short", budgets: [2]int{1, 1}, message: 10},
}

func TestASuccessorLosesNothing(t *testing.T) {
	t.Parallel()
	kills := 60
	if testing.Short() {
		kills = 20
	}
	if n, err := strconv.Atoi(os.Getenv("HOLDFAST_TEST_KILLS")); err == nil {
		kills = n
	}
	s := &supervisor{t: t, file: newFile(t, 1<<20, crashBuffers), pipes: newPipes(t, crashPipes), random: rand.New(rand.NewPCG(3, 4)), said: map[byte]int{}}
	defer func() {
		for _, p := range s.pipes {
			p.Close()
		}
	}()
	var traffic sync.WaitGroup
	for i := range s.tunnels {
		s.tunnels[i] = s.newTunnel(&traffic)
	}
	began := time.Now()
	for i := 0; i < kills && !t.Failed(); i++ {
		r := s.start(i)
		if s.random.IntN(3) > 0 {
			r.await(saysStarted)
			time.Sleep(time.Duration(s.random.IntN(8000)) * time.Microsecond) // dies at any moment
		} else {
			r.await(saysReopening)
			time.Sleep(time.Duration(s.random.IntN(400)) * time.Microsecond) // dies while it recovers
		}
		r.kill()
		for i, w := range s.tunnels {
			if w.ended.Load() {
				w.close()
				s.tunnels[i] = s.newTunnel(&traffic)
			}
		}
	}
	t.Logf("%d kills of relays of %d tunnels (%v)", kills, s.made, time.Since(began))
	s.stop.Store(true)
	last := s.start(kills)
	for deadline := time.Now().Add(60 * time.Second); !t.Failed() && !s.over(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("the last relay does not come to an end")
		}
	}
	last.kill()
	t.Logf("they found: %d times a buffer, %d a pipe, %d bytes that were sent already, %d resets, %d times what cannot be known",
		s.said[saysBuffer], s.said[saysPipe], s.said[saysDiscarded], s.said[saysReset], s.said[saysLost])
	for _, w := range s.tunnels {
		w.reset.Store(true) // nobody complains any more
		w.close()
	}
	traffic.Wait()
}

func (s *supervisor) over() bool {
	for _, w := range s.tunnels {
		if !w.ended.Load() {
			return false
		}
	}
	return true
}

// newTunnel makes one with peers that use it. Each has a slot that none had before.
func (s *supervisor) newTunnel(traffic *sync.WaitGroup) *watched {
	w := &watched{kind: kinds[s.made%len(kinds)]}
	w.Slot = inflight.Direction(s.made)
	s.made++
	for i := range w.fds {
		w.peers[i], w.fds[i] = connected(s.t)
		if w.kind.small {
			unix.SetsockoptInt(w.fds[i], unix.SOL_SOCKET, unix.SO_SNDBUF, 30_000)
			w.peers[i].SetReadBuffer(100_000)
		}
		c := look(s.t, w.fds[i])
		w.Taken[i], w.Given[1-i] = c.Taken, c.Given
	}
	var busy sync.WaitGroup
	for i := range w.peers {
		w.produced[i] = make(chan produced, 1)
	}
	for i := range w.peers {
		seed := uint64(2*w.Slot) + uint64(i)
		budget := 1 + s.random.IntN(2*w.kind.budgets[i])
		busy.Go(func() { s.produce(w, i, seed, budget) })
		busy.Go(func() { s.consume(w, i, seed) })
	}
	traffic.Go(func() { busy.Wait(); w.ended.Store(true) })
	return w
}

func (w *watched) close() {
	for i := range w.fds {
		w.peers[i].Close()
	}
}

// process is a relay.
type process struct {
	s    *supervisor
	pid  int
	says *os.File
}

func (s *supervisor) start(seed int) process {
	s.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	defer w.Close()
	files := []uintptr{0, w.Fd(), 2, uintptr(s.file)}
	for _, p := range s.pipes {
		files = append(files, uintptr(p.R), uintptr(p.W))
	}
	var tunnels []vaulted
	for _, w := range s.tunnels {
		tunnels = append(tunnels, w.vaulted)
		files = append(files, uintptr(w.fds[0]), uintptr(w.fds[1]))
	}
	told, err := json.Marshal(tunnels)
	if err != nil {
		s.t.Fatal(err)
	}
	env := append(os.Environ(), childEnv+"=relay", crashEnv+"="+string(told), seedEnv+"="+strconv.Itoa(seed))
	pid, _, err := syscall.StartProcess("/proc/self/exe", os.Args[:1], &syscall.ProcAttr{Env: env, Files: files})
	if err != nil {
		s.t.Fatal(err)
	}
	return process{s, pid, r}
}

// await waits until a relay has said something.
func (p process) await(what byte) {
	p.says.SetReadDeadline(time.Now().Add(30 * time.Second))
	for b := []byte{0}; b[0] != what; p.s.said[b[0]]++ {
		if _, err := p.says.Read(b); err != nil {
			p.s.t.Errorf("a relay does not say %q: %v", what, err)
			return
		}
	}
}

// kill kills a relay and waits until it is dead.
func (p process) kill() {
	syscall.Kill(p.pid, syscall.SIGKILL)
	var status syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(p.pid, &status, 0, nil); err != syscall.EINTR {
			break
		}
	}
	if status.Signal() != syscall.SIGKILL {
		p.s.t.Errorf("a relay has ended by itself: %v", status)
	}
	rest, _ := io.ReadAll(p.says)
	for _, b := range rest {
		p.s.said[b]++
	}
	p.says.Close()
}

// stream is bytes of which each says where it is.
func stream(seed uint64) []byte {
	b := make([]byte, 1_000_003)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// produce sends what one direction carries, and ends it.
func (s *supervisor) produce(w *watched, i int, seed uint64, budget int) {
	b, random, c := stream(seed), rand.New(rand.NewPCG(seed, 5)), w.peers[i]
	sent := 0
	var failure error
	defer func() { w.produced[i] <- produced{sent, failure} }()
	for at := 0; sent < budget && !s.stop.Load(); at = sent % len(b) {
		n, err := c.Write(b[at : at+min(1+random.IntN(w.kind.message), len(b)-at)])
		sent += n
		if failure = err; err != nil {
			s.complain(w, i, fmt.Errorf("after %d bytes: %w", sent, err))
			return
		}
	}
	if w.kind.resets && i == 0 {
		w.reset.Store(true)
		c.SetLinger(0)
		c.Close()
		return
	}
	c.CloseWrite()
}

func (s *supervisor) complain(w *watched, i int, err error) {
	if !w.reset.Load() {
		s.t.Errorf("%s, direction %d: %v", w.kind.name, i, err)
	}
}

// consume checks what one direction carries, and how it ends.
func (s *supervisor) consume(w *watched, i int, seed uint64) {
	want, got, random, c := stream(seed), make([]byte, 200_000), rand.New(rand.NewPCG(seed, 6)), w.peers[1-i]
	for total := 0; ; {
		at := total % len(want)
		n, err := c.Read(got[:min(1+random.IntN(len(got)), len(want)-at)])
		if !bytes.Equal(got[:n], want[at:at+n]) {
			s.t.Errorf("%s, direction %d: other bytes after %d", w.kind.name, i, total)
			return
		}
		total += n
		switch {
		case errors.Is(err, io.EOF):
			s.checkEnd(w, i, total)
			return
		case err != nil:
			s.complain(w, i, fmt.Errorf("after %d bytes: %w", total, err))
			return
		}
		if w.kind.slow {
			time.Sleep(time.Duration(random.IntN(500)) * time.Microsecond)
		}
	}
}

// checkEnd is called when the receiver of a direction has read an end.
func (s *supervisor) checkEnd(w *watched, i, total int) {
	p := w.whatIsProduced(i)
	switch {
	case !w.kind.resets || i == 1:
		if total == p.sent {
			return
		}
	case w.whatIsProduced(1).err != nil: // the server's writer has taken the error of its socket
		return
	}
	s.t.Errorf("%s, direction %d: ended after %d of %d bytes", w.kind.name, i, total, p.sent)
}

func (w *watched) whatIsProduced(i int) produced {
	p := <-w.produced[i]
	w.produced[i] <- p
	return p
}
