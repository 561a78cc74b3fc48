package tunnel_test

import (
	"io"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/tunnel"
)

// A loop's turns are counted here, on its goroutine. So nothing depends on how fast
// this machine is.

// ping is a tunnel in which one byte is sent whenever the last one has come.
type ping struct {
	client, relayed, server int // sockets; relayed is the one that the loop reads
	waiting                 bool
	ready                   int // turns that have ended since the byte was there to be read
	most, rounds            int
}

func newPing(t testing.TB, set *tunnel.Set) *ping {
	t.Helper()
	client, down := tcpPair(t, false)
	server, up := tcpPair(t, false)
	p := &ping{client: second(t, client), relayed: second(t, down), server: second(t, server)}
	set.Start(tunnel.Spec{Down: down, Up: up})
	return p
}

// turn is called at the end of each turn.
func (p *ping) turn() {
	var b [1]byte
	if p.waiting {
		if n, _, _ := unix.Recvfrom(p.server, b[:], unix.MSG_DONTWAIT); n == 1 {
			p.most = max(p.most, p.ready)
			p.waiting, p.ready = false, 0
			p.rounds++
		}
	}
	if !p.waiting {
		p.waiting = unix.Sendto(p.client, b[:], unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil) == nil
	}
	if n, err := unix.IoctlGetInt(p.relayed, unix.SIOCINQ); err == nil && n > 0 || p.ready > 0 {
		p.ready++
	}
}

func TestABulkTunnelLeavesEachTurnToTheOthers(t *testing.T) {
	t.Parallel()
	counted := metrics.NewRegistry()
	loops := shape{loops: 1, tunnels: 16, buffers: 4, pipes: 2}.start(t)
	set := onLoops.newSetWith(t, tunnel.Options{Loops: loops, Metrics: counted})

	// Two tunnels are full in both directions. Their bytes are counted by themselves.
	var bulk metrics.Counter
	var players sync.WaitGroup
	t.Cleanup(players.Wait)
	for range 2 {
		o := &tunnel.Origin{UpBytes: []*metrics.Counter{&bulk}, DownBytes: []*metrics.Counter{&bulk}}
		client, server := open(t, set, tunnel.Spec{Origin: o})
		for _, c := range []tcpConn{client, server} {
			t.Cleanup(func() { c.Close() })
			players.Go(func() { io.Copy(io.Discard, c) })
			players.Go(func() {
				for block := make([]byte, 1<<20); ; {
					if _, err := c.Write(block); err != nil {
						return
					}
				}
			})
		}
	}
	var pings []*ping
	for range 8 {
		pings = append(pings, newPing(t, set))
	}

	done := make(chan struct{})
	var turns, full, mostBytes, before uint64
	finished := false
	turn := func() {
		if finished {
			return
		}
		now := bulk.Value()
		if turns == 0 {
			before = now
		}
		mostBytes = max(mostBytes, now-before)
		if now > before {
			full++
		}
		before = now
		turns++
		least := pings[0].rounds
		for _, p := range pings {
			p.turn()
			least = min(least, p.rounds)
		}
		if least >= 200 && full >= 200 {
			finished = true
			close(done)
		}
	}
	loops[0].Poller.Post(func() { loops[0].Poller.AfterTurn(turn) })
	select {
	case <-done:
	case <-time.After(patience):
		loops[0].Poller.Post(func() { finished = true; close(done) })
		<-done
		t.Errorf("the chatty tunnels are not served")
	}
	t.Logf("%d turns, %d of them with bulk; %d KiB of it at most", turns, full, mostBytes>>10)
	// Two tunnels, two directions, a MiB of each and what the last read took beyond it.
	if most := uint64(2 * 2 * (1<<20 + 64<<10)); mostBytes > most {
		t.Errorf("%d bytes of bulk in one turn, want %d at most", mostBytes, most)
	}
	for i, p := range pings {
		t.Logf("tunnel %d: %d rounds, %d turns at most", i, p.rounds, p.most)
		if p.most > 3 {
			t.Errorf("tunnel %d waited for %d turns", i, p.most)
		}
	}
}

func TestAnIdleEngineMakesNoWakeUps(t *testing.T) {
	t.Parallel()
	const n = 1000
	needDescriptors(t, 4*n+2000)
	loops := shape{loops: 2, tunnels: n, buffers: 8, pipes: 2}.start(t)
	set := onLoops.newSetWith(t, tunnel.Options{Loops: loops})
	set.Hurry(time.Second, time.Second, 50*time.Millisecond)
	c := openCrowd(t, set, listenTCP(t), n)
	c.chat("hello")
	wakeups := func() (n uint64) {
		for _, l := range loops {
			n += l.Poller.Wakeups()
		}
		return n
	}
	last, since := wakeups(), time.Now()
	eventually(t, "nothing wakes a loop up any more", func() bool {
		if now := wakeups(); now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) > 4*time.Second // longer than memory is kept for what may come
	})
	c.chat("still here?")
	for i := range c.clients {
		c.clients[i].Close()
		c.servers[i].Close()
	}
}
