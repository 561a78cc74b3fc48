package tunnel_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/metrics"
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

// choices decide what a schedule is: random numbers, or the bytes of a fuzzer.
type choices interface{ IntN(n int) int }

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
	head   int // of those, the first ones, which are no bytes of the tunnel; of a server
	writes []int
	pauses []time.Duration // before each write, and before the end
	asleep time.Duration   // before the first read
	reads  []int           // sizes, in turn
	stalls []time.Duration // before each of the first reads, in turn
	ending ending
	small  bool // kernel buffers
	plain  bool // the relay sees no more than a net.Conn
}

// schedule is what happens to some tunnels of one Set.
type schedule struct {
	relay   relay
	limits  tunnel.Limits
	tunnels []pair
	closing time.Duration // until the operator closes all of them; 0: never

	// kept: other descriptors of the relay's sockets are open, like those of a
	// supervisor.
	kept bool

	moves bool // the tunnels do not stay in one Set
}

type pair struct{ down, up script }

func pause(c choices) time.Duration {
	if c.IntN(3) < 2 {
		return 0
	}
	return time.Duration(c.IntN(3000)) * time.Microsecond
}

func newSchedule(c choices, r relay) schedule {
	s := schedule{relay: r, limits: tunnel.Limits{
		Buffer: int64(1 + c.IntN(128<<10)),
		// Rarely a reset is lost: the kernel has dropped what came before it. Then
		// probes find it out.
		KeepAlive: tunnel.KeepAlive{Idle: time.Second, Interval: time.Second, Count: 3},
	}}
	if r.onLoops() {
		s.relay.loops = shape{loops: 1 + c.IntN(2), tunnels: 4, buffers: 1 + c.IntN(5), pipes: c.IntN(3)}
		s.kept = c.IntN(4) == 3
	}
	for range 1 + c.IntN(3) {
		bulk := c.IntN(5) == 4
		p := pair{newScript(c, bulk), newScript(c, bulk)}
		if s.kept { // only loops end a connection by more than a close
			p.down.plain, p.up.plain = false, false
		}
		p.up.head = c.IntN(min(p.up.early, 400) + 1)
		s.tunnels = append(s.tunnels, p)
	}
	if c.IntN(8) == 7 {
		s.closing = time.Duration(1+c.IntN(20)) * time.Millisecond
	}
	return s
}

func newScript(c choices, bulk bool) script {
	s := script{small: c.IntN(3) == 2, plain: c.IntN(8) == 7}
	if bulk {
		s.bulk(c)
	} else {
		s.chat(c)
	}
	for range len(s.writes) + 1 {
		s.pauses = append(s.pauses, pause(c))
	}
	for range s.reads {
		s.stalls = append(s.stalls, pause(c))
	}
	if c.IntN(4) == 3 {
		s.asleep = time.Duration(c.IntN(50)) * time.Millisecond
	}
	switch c.IntN(6) {
	case 5:
		s.ending = resetAtOnce
	case 4:
		s.ending = finReset
	}
	return s
}

// chat is few bytes at a time, and readers that may be slow.
func (s *script) chat(c choices) {
	if c.IntN(3) == 2 {
		s.early = c.IntN(100 << 10)
	}
	for range c.IntN(12) {
		s.writes = append(s.writes, 1+c.IntN(1<<c.IntN(17)))
	}
	for range 1 + c.IntN(5) {
		s.reads = append(s.reads, 1+c.IntN(1<<(8+c.IntN(9))))
	}
}

// bulk is megabytes at a time: reads fill the relay's buffers.
func (s *script) bulk(c choices) {
	most := 2 << 20
	if s.small {
		most /= 8 // or it takes long
	}
	if c.IntN(4) == 3 {
		s.early = c.IntN(3 << 20)
	}
	for range c.IntN(5) {
		s.writes = append(s.writes, 1+c.IntN(most))
	}
	for range 1 + c.IntN(3) {
		s.reads = append(s.reads, 32<<10+c.IntN(96<<10))
	}
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
func (s *script) play(c tcpConn) (o outcome) {
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

func (s *script) read(c net.Conn, stop <-chan struct{}) (got int, corrupt, err error) {
	time.Sleep(s.asleep)
	buf := make([]byte, 1<<17)
	for i := 0; ; i++ {
		if i < 500 {
			time.Sleep(s.stalls[i%len(s.stalls)])
		}
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
	onBothRelays(t, func(t *testing.T, r relay) {
		seeds := make([]uint64, 150)
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
		for range 8 {
			workers.Go(func() {
				for seed := range next {
					t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
						s := newSchedule(rand.New(rand.NewPCG(seed, 1)), r)
						s.run(t)
						if t.Failed() {
							t.Logf("again with -run '^%s$' -seed %d", t.Name(), seed)
						}
					})
				}
			})
		}
		for _, seed := range seeds {
			next <- seed
		}
		close(next)
		workers.Wait()
	})
}

// run plays a schedule and compares with the model.
func (s *schedule) run(t *testing.T) {
	aborts := abortsForMemory(t)
	counted := metrics.NewRegistry()
	var e ends
	set := s.relay.newSetWith(t, tunnel.Options{OnEnd: e.add, Metrics: counted})
	set.Hurry(3*time.Second, 3*time.Second, 5*time.Millisecond)
	saw := make([]struct{ client, server outcome }, len(s.tunnels))
	var players sync.WaitGroup
	for i := range s.tunnels {
		p := &s.tunnels[i]
		client, server := p.start(t, set, s, i)
		players.Go(func() { saw[i].client = p.down.play(client) })
		players.Go(func() { saw[i].server = p.up.play(server) })
	}
	if s.closing > 0 {
		time.Sleep(s.closing)
		set.CloseAll(tunnel.Operator, 0)
	}
	players.Wait()
	select {
	case <-set.Empty():
	case <-time.After(patience):
		t.Errorf("tunnels do not end: %+v", set.List())
		for i, p := range s.tunnels {
			t.Logf("%+v\nclient %+v\n%+v\nserver %+v\n%+v", *s, p.down, saw[i].client, p.up, saw[i].server)
		}
		return
	}
	var mistakes []string
	var toUp, toDown uint64
	for _, record := range e.all() {
		i := record.Tag.(int)
		m := model{schedule: s, pair: &s.tunnels[i], client: saw[i].client, server: saw[i].server, record: record}
		mistakes = append(mistakes, m.check()...)
		toUp, toDown = toUp+record.ToUp, toDown+record.ToDown
	}
	if mistakes != nil && abortsForMemory(t) != aborts {
		t.Skip("the kernel has run out of memory for TCP and cut connections")
	}
	for _, m := range mistakes {
		t.Error(m)
	}
	if n := len(e.all()); n != len(s.tunnels) {
		t.Errorf("%d tunnels were reported, want %d", n, len(s.tunnels))
	}
	all := figures(counted)
	if up, down := all["tunnel_relayed_bytes_total upstream"], all["tunnel_relayed_bytes_total downstream"]; up != int64(toUp) || down != int64(toDown) {
		t.Errorf("%d bytes up and %d down are counted in all, %d and %d of each", up, down, toUp, toDown)
	}
}

// abortsForMemory is how many connections the kernel has cut since there was no memory
// for them (tcp_mem of tcp(7)): whoever else moves much data on this machine has a part
// in that.
func abortsForMemory(t testing.TB) (n string) {
	t.Helper()
	text, err := os.ReadFile("/proc/net/netstat")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n") // names, and below them values
	for i, name := range strings.Fields(lines[0]) {
		if name == "TCPAbortOnMemory" {
			n = strings.Fields(lines[1])[i]
		}
	}
	return n
}

// start starts one of the tunnels and returns its client and its server.
func (p *pair) start(t *testing.T, set *tunnel.Set, s *schedule, i int) (client, server tcpConn) {
	client, down := tcpPair(t, p.down.small)
	server, up := tcpPair(t, p.up.small)
	if s.kept {
		second(t, down)
		second(t, up)
	}
	spec := tunnel.Spec{
		Down: down, Up: up, Origin: limited(s.limits), Tag: i,
		Head: pattern(0, p.up.head), DownEarly: pattern(0, p.down.early), UpEarly: pattern(p.up.head, p.up.early-p.up.head),
	}
	if p.down.plain {
		spec.Down = plain{down}
	}
	if p.up.plain {
		spec.Up = plain{up}
	}
	set.Start(spec)
	return client, server
}
