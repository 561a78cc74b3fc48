package tunnel_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/internal/tunnel"
)

// pattern returns n bytes of an endless stream, from an offset on, in which no
// two places nearby look alike.
func pattern(off, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		x := uint32(off+i) * 2654435761
		p[i] = byte(x >> 24)
	}
	return p
}

// ending is how an end of a tunnel leaves it.
type ending int

const (
	fin         ending = iota // a FIN, and it reads until the other's
	finReset                  // a FIN, and some time later a reset
	resetAtOnce               // a reset after the last write, whatever is on its way
)

// script is what one end does. Pauses are part of the schedule: they shape it,
// and nothing is waited for by them.
type script struct {
	early  int // bytes that were read before the tunnel began
	writes []int
	pauses []time.Duration // before each write, and before the end
	reads  []int           // sizes, in turn
	stalls []time.Duration // before each read, in turn
	ending ending
	small  bool // kernel buffers
	plain  bool // the relay sees no more than a net.Conn
}

func randomScript(r *rand.Rand) script {
	pause := func() time.Duration {
		if r.IntN(3) > 0 {
			return 0
		}
		return time.Duration(r.IntN(3000)) * time.Microsecond
	}
	s := script{small: r.IntN(3) == 0, plain: r.IntN(5) == 0}
	if r.IntN(3) == 0 {
		s.early = r.IntN(100 << 10)
	}
	for range r.IntN(12) {
		s.writes = append(s.writes, 1+r.IntN(1<<r.IntN(17)))
		s.pauses = append(s.pauses, pause())
	}
	s.pauses = append(s.pauses, pause())
	for range 1 + r.IntN(5) {
		s.reads = append(s.reads, 1+r.IntN(1<<(8+r.IntN(9))))
		s.stalls = append(s.stalls, pause())
	}
	switch r.IntN(6) {
	case 0:
		s.ending = resetAtOnce
	case 1:
		s.ending = finReset
	}
	return s
}

// outcome is what one end saw.
type outcome struct {
	wrote    int // bytes that its kernel took, early ones included
	got      int // bytes that it read
	readErr  error
	writeErr error
	corrupt  error
}

// play runs a script on an end of a tunnel.
func (s script) play(c *net.TCPConn) (o outcome) {
	defer c.Close()
	o.wrote = s.early
	stop := make(chan struct{}) // a reset of our own is about to come
	var both sync.WaitGroup
	both.Go(func() { o.got, o.corrupt, o.readErr = s.read(c, stop) })
	both.Go(func() {
		for i, n := range s.writes {
			time.Sleep(s.pauses[i])
			k, err := c.Write(pattern(o.wrote, n))
			o.wrote += k
			if err != nil {
				o.writeErr = err
				return
			}
		}
		time.Sleep(s.pauses[len(s.writes)])
		if s.ending != resetAtOnce {
			o.writeErr = c.CloseWrite()
		}
		if s.ending == finReset {
			time.Sleep(s.pauses[0])
		}
		if s.ending != fin {
			close(stop)
			reset(c)
		}
	})
	both.Wait()
	return o
}

func (s script) read(c net.Conn, stop <-chan struct{}) (got int, corrupt, err error) {
	buf := make([]byte, 1<<17)
	for i := 0; ; i++ {
		time.Sleep(s.stalls[i%len(s.stalls)])
		n, err := c.Read(buf[:s.reads[i%len(s.reads)]])
		if !bytes.Equal(buf[:n], pattern(got, n)) {
			return got, fmt.Errorf("wrong bytes between %d and %d", got, got+n), nil
		}
		got += n
		if err == io.EOF {
			return got, nil, nil
		}
		if err != nil {
			select {
			case <-stop:
				return got, nil, nil
			default:
			}
			return got, nil, err
		}
	}
}

// TestRandomSchedules drives tunnels with random writes, stalls, half-closes,
// resets and kernel buffers, and compares with a model of two byte streams: what
// arrives is what was sent, or a prefix of it where a reset cut the stream, and a
// stream that was cut never looks complete.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	seeds := make([]uint64, 300)
	for i := range seeds {
		seeds[i] = rand.Uint64()
	}
	if *seed != 0 {
		seeds = []uint64{*seed}
	}
	if testing.Short() {
		seeds = seeds[:min(50, len(seeds))]
	}
	next := make(chan uint64)
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for seed := range next {
				for _, mistake := range runSchedule(t, seed) {
					t.Errorf("%s (again with -seed %d)", mistake, seed)
				}
			}
		})
	}
	for _, seed := range seeds {
		next <- seed
	}
	close(next)
	workers.Wait()
}

func runSchedule(t *testing.T, seed uint64) (mistakes []string) {
	r := rand.New(rand.NewPCG(seed, 1))
	down, up := randomScript(r), randomScript(r)
	limits := tunnel.Limits{Buffer: int64(1 + r.IntN(64<<10))}
	set, e := newSet(t)
	set.Hurry(5*time.Second, 5*time.Second, 5*time.Millisecond)

	client, downConn := tcpPair(t, down.small)
	server, upConn := tcpPair(t, up.small)
	spec := tunnel.Spec{
		Down: downConn, Up: upConn, Origin: limited(limits),
		DownEarly: pattern(0, down.early), UpEarly: pattern(0, up.early),
	}
	if down.plain {
		spec.Down = plain{downConn}
	}
	if up.plain {
		spec.Up = plain{upConn}
	}
	set.Start(spec)
	var c, s outcome
	var ends sync.WaitGroup
	ends.Go(func() { c = down.play(client) })
	ends.Go(func() { s = up.play(server) })
	ends.Wait()
	select {
	case <-set.Empty():
	case <-time.After(patience):
		return []string{fmt.Sprintf("the tunnel does not end: %+v; client %+v %+v, server %+v %+v", set.List(), down, c, up, s)}
	}

	m := model{record: e.all()[0]}
	m.check("upstream", down, up, c, s, m.record.ToUp)
	m.check("downstream", up, down, s, c, m.record.ToDown)
	m.checkReason(down, up)
	if m.mistakes != nil {
		m.mistakes = append(m.mistakes, fmt.Sprintf("client %+v %+v, server %+v %+v, %+v", down, c, up, s, m.record))
	}
	return m.mistakes
}

type model struct {
	record   tunnel.Record
	mistakes []string
}

func (m *model) wrong(format string, args ...any) {
	m.mistakes = append(m.mistakes, fmt.Sprintf(format, args...))
}

// check compares one direction: what "from" sent and what "to" got.
func (m *model) check(name string, from, to script, sent, got outcome, counted uint64) {
	if got.corrupt != nil {
		m.wrong("%s: %v", name, got.corrupt)
	}
	if got.got > sent.wrote {
		m.wrong("%s: %d bytes arrived of %d", name, got.got, sent.wrote)
	}
	if uint64(got.got) > counted || counted > uint64(sent.wrote) {
		m.wrong("%s: %d bytes sent, %d counted, %d arrived", name, sent.wrote, counted, got.got)
	}
	nobodyResets := from.ending == fin && to.ending == fin
	if nobodyResets && (sent.writeErr != nil || got.readErr != nil) {
		m.wrong("%s: errors without a cause: write %v, read %v", name, sent.writeErr, got.readErr)
	}
	if nobodyResets && (got.got != sent.wrote || counted != uint64(sent.wrote)) {
		m.wrong("%s: %d bytes sent, %d counted, %d arrived", name, sent.wrote, counted, got.got)
	}
	// A receiver that did not leave and saw no error took the stream for
	// complete. A plain net.Conn cannot be reset, and when a write takes the
	// error of its reset, a read cannot be told from one of a FIN.
	if from.plain || to.plain || to.ending != fin || got.readErr != nil || got.writeErr != nil {
		return
	}
	if from.ending == resetAtOnce || got.got != sent.wrote {
		m.wrong("%s: a stream that was cut after %d of %d bytes looks complete", name, got.got, sent.wrote)
	}
}

func (m *model) checkReason(down, up script) {
	allowed := []tunnel.Reason{tunnel.DownstreamClosed, tunnel.UpstreamClosed}
	if down.ending == resetAtOnce || up.ending == resetAtOnce {
		allowed = nil
	}
	if down.ending != fin {
		allowed = append(allowed, tunnel.DownstreamReset)
	}
	if up.ending != fin {
		allowed = append(allowed, tunnel.UpstreamReset)
	}
	// A plain connection shows a reset that a write noticed as a FIN.
	if down.plain || up.plain {
		allowed = append(allowed, tunnel.DownstreamClosed, tunnel.UpstreamClosed)
	}
	if !slices.Contains(allowed, m.record.Reason) {
		m.wrong("reason is %q, want one of %v", m.record.Reason, allowed)
	}
}
