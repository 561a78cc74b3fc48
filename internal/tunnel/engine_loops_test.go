package tunnel_test

import (
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/tunnel"
)

// freeze keeps a loop from doing anything until thaw is called. What is posted and what
// becomes ready meanwhile waits for it.
func freeze(l tunnel.Loop) (thaw func()) {
	frozen, done := make(chan struct{}), make(chan struct{})
	l.Poller.Post(func() { close(frozen); <-done })
	<-frozen
	return func() { close(done) }
}

func TestAPanicOnALoopEndsOneTunnel(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	var e ends
	r := relay{loops: shape{loops: 1, tunnels: 2, buffers: 4, pipes: 1}}
	set := r.newSetWith(t, tunnel.Options{Log: slog.New(slog.NewTextHandler(&log, nil)), OnEnd: e.add})
	client, server := open(t, set, tunnel.Spec{ID: "the-bad-one"})
	healthyClient, healthyServer := open(t, set, tunnel.Spec{})
	mend := set.Break()
	write(t, client, []byte("x"))
	wantReset(t, server)
	eventually(t, "it is in the log", func() bool {
		return strings.Contains(log.String(), "panic in a tunnel") && strings.Contains(log.String(), "request_id=the-bad-one")
	})
	mend()
	write(t, healthyClient, []byte("still here"))
	wantBytes(t, healthyServer, "still here")
	healthyClient.Close()
	healthyServer.Close()
	waitEmpty(t, set)
	if all := e.all(); len(all) != 2 || all[0].Reason != tunnel.Failed || all[1].Reason != tunnel.DownstreamClosed {
		t.Errorf("records are %+v", all)
	}
}

// Both sockets of a tunnel may be reported in one turn, and its slot and handles be
// another tunnel's in the next.
func TestATunnelIsNotTakenForAnotherOneThatHadItsSlot(t *testing.T) {
	t.Parallel()
	const n = 50
	r := relay{loops: shape{loops: 1, tunnels: n, buffers: 4, pipes: 1}}
	var e ends
	o := tunnel.Options{OnEnd: e.add, Loops: r.loops.start(t)}
	set := relay{}.newSetWith(t, o)
	for round := range 10 {
		var first, last [][2]tcpConn
		for range n {
			client, server := open(t, set, tunnel.Spec{ID: "first"})
			first = append(first, [2]tcpConn{client, server})
		}
		if len(set.List()) != n { // they have their slots
			t.Fatal("not all are in the list")
		}
		thaw := freeze(o.Loops[0])
		for i, pair := range first {
			write(t, pair[0], []byte("x"))
			reset(pair[i%2])
			reset(pair[1-i%2])
		}
		thaw()
		// Those for which there is no slot yet have goroutines; most have one.
		for range n {
			client, server := open(t, set, tunnel.Spec{ID: "last"})
			last = append(last, [2]tcpConn{client, server})
		}
		for i, pair := range last {
			word := fmt.Sprintf("tunnel %d", i)
			write(t, pair[0], []byte(word))
			wantBytes(t, pair[1], word)
			write(t, pair[1], []byte(word))
			wantBytes(t, pair[0], word)
		}
		eventually(t, "the first ones ended", func() bool { return len(e.all()) >= (2*round+1)*n })
		if got := len(e.all()); got != (2*round+1)*n {
			t.Fatalf("%d tunnels have ended, want %d", got, (2*round+1)*n)
		}
		for _, pair := range last {
			pair[0].Close()
			pair[1].Close()
		}
		waitEmpty(t, set)
	}
}

// The error of a reset is given out once. Here it was given to somebody else who has the
// socket, as it may have been to a predecessor.
func TestAResetWhoseErrorIsGoneIsNotTakenForAFin(t *testing.T) {
	t.Parallel()
	loops := shape{loops: 1, tunnels: 1, buffers: 4, pipes: 1}.start(t)
	var e ends
	set := relay{}.newSetWith(t, tunnel.Options{Loops: loops, OnEnd: e.add})
	client, down := tcpPair(t, false)
	server, up := tcpPair(t, false)
	duplicate := second(t, down)
	set.Start(tunnel.Spec{Down: down, Up: up})
	set.List() // it has its slot
	thaw := freeze(loops[0])
	reset(client)
	eventually(t, "the error is there to be taken", func() bool {
		errno, err := unix.GetsockoptInt(duplicate, unix.SOL_SOCKET, unix.SO_ERROR)
		return err == nil && errno == int(unix.ECONNRESET)
	})
	thaw()
	wantReset(t, server)
	wantEnd(t, set, &e, tunnel.DownstreamReset)
}

// Its receiver is gone, and its FIN is waited for all the same: a connection that is closed
// with unread bytes resets its peer, or with a duplicate elsewhere keeps it waiting.
func TestASenderWhoseTunnelIsClosedMaySayAllThatItWanted(t *testing.T) {
	t.Parallel()
	r := relay{loops: shape{loops: 1, tunnels: 1, buffers: 4, pipes: 1}}
	set, e := r.newSet(t)
	set.Hurry(5*patience, 5*patience, time.Second)
	client, down := tcpPair(t, true)
	server, up := tcpPair(t, true)
	second(t, down)
	second(t, up)
	set.Start(tunnel.Spec{Down: down, Up: up})
	sent := make(chan error)
	go func() {
		_, err := client.Write(pattern(0, 8<<20))
		sent <- err
	}()
	eventually(t, "the receiver holds the tunnel up", func() bool { return set.List()[0].ToUp > 0 })
	set.CloseAll(tunnel.Operator, 0)
	eventually(t, "the tunnel is being closed", func() bool { return set.List()[0].Reason == tunnel.Operator })
	reset(server)
	if err := <-sent; err != nil {
		t.Errorf("the sender got %v", err)
	}
	wantEOF(t, client)
	client.Close()
	wantEnd(t, set, e, tunnel.Operator)
}

func TestAPeerThatDoesNotStopIsResetInTheEnd(t *testing.T) {
	t.Parallel()
	r := relay{loops: shape{loops: 1, tunnels: 1, buffers: 4, pipes: 1}}
	set, e := r.newSet(t)
	set.Hurry(200*time.Millisecond, 200*time.Millisecond, time.Second)
	client, down := tcpPair(t, false)
	server, up := tcpPair(t, false)
	second(t, down) // what would go on listening to the client
	second(t, up)
	set.Start(tunnel.Spec{Down: down, Up: up})
	write(t, client, []byte("hello"))
	wantBytes(t, server, "hello")
	set.CloseAll(tunnel.Operator, 0)
	wantEOF(t, client)
	wantEOF(t, server)
	wantEnd(t, set, e, tunnel.Operator)
	for _, c := range []tcpConn{client, server} {
		if _, err := c.Write([]byte("x")); err == nil {
			t.Error("who writes on is not told that nobody listens")
		}
	}
}

// All that a sender has sent is there at once, so the kernel reports it once.
func TestAFlowThatUsesUpItsTurnIsCalledAgain(t *testing.T) {
	t.Parallel()
	for name, limits := range map[string]tunnel.Limits{"spliced": {}, "copied": {Buffer: 32 << 10}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const much = 5 << 20
			loops := shape{loops: 1, tunnels: 1, buffers: 4, pipes: 1}.start(t)
			set := relay{}.newSetWith(t, tunnel.Options{Loops: loops})
			client, down := tcpPair(t, false)
			server, up := tcpPair(t, false)
			for _, c := range []tcpConn{down, server} {
				if err := unix.SetsockoptInt(second(t, c), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4*much); err != nil {
					t.Skip("a receive buffer of that size is not allowed")
				}
			}
			unix.SetsockoptInt(second(t, up), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4*much)
			set.Start(tunnel.Spec{Down: down, Up: up, Origin: limited(limits)})
			set.List() // it has its slot
			thaw := freeze(loops[0])
			write(t, client, pattern(0, much))
			eventually(t, "all of it has arrived", func() bool { return outq(t, client) == 0 })
			thaw()
			for off := 0; off < much; off += 1 << 20 {
				wantBytes(t, server, string(pattern(off, 1<<20)))
			}
			client.Close()
			server.Close()
		})
	}
}

func TestALoopGoesOnWhileItsTunnelsAreListed(t *testing.T) {
	t.Parallel()
	const n = 1100 // two chunks
	needDescriptors(t, 4*n+2000)
	loops := shape{loops: 1, tunnels: n, buffers: 4, pipes: 1}.start(t)
	set := relay{}.newSetWith(t, tunnel.Options{Loops: loops})
	c := openCrowd(t, set, listenTCP(t), n)
	turns := 0 // the loop's
	done := make(chan struct{})
	loops[0].Poller.Post(func() { loops[0].Poller.AfterTurn(func() { turns++ }); close(done) })
	<-done
	look := func() (n int) {
		done := make(chan struct{})
		loops[0].Poller.Post(func() { n = turns; close(done) })
		<-done
		return n
	}
	eventually(t, "the loop is at rest", func() bool { return look() == look()-1 })
	before := look()
	set.List()
	if got := look() - before; got != 4 { // one for each chunk, the end, and the first look
		t.Errorf("%d turns, want 4", got)
	}
	stop := make(chan struct{})
	var talking sync.WaitGroup
	talking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				c.chat("hello")
			}
		}
	})
	for range 20 {
		list := set.List()
		if len(list) != n {
			t.Fatalf("%d tunnels are in the list, want %d", len(list), n)
		}
		for i, record := range list {
			if record.Number != uint64(i+1) || record.Reason != tunnel.Open {
				t.Fatalf("record %d is %+v", i, record)
			}
		}
	}
	close(stop)
	talking.Wait()
	for i := range c.clients {
		c.clients[i].Close()
		c.servers[i].Close()
	}
}

func TestWhatIsCountedIsTheSumOfTheRecords(t *testing.T) {
	t.Parallel()
	counted := metrics.NewRegistry()
	var e ends
	r := relay{loops: shape{loops: 2, tunnels: 20, buffers: 8, pipes: 2}}
	set := r.newSetWith(t, tunnel.Options{OnEnd: e.add, Metrics: counted})
	type share struct{ up, down metrics.Counter }
	shares := make([]share, 3)
	var origins []*tunnel.Origin
	for i := range shares {
		origins = append(origins, &tunnel.Origin{
			UpBytes:   []*metrics.Counter{&shares[i].up},
			DownBytes: []*metrics.Counter{&shares[i].down},
			Owner:     i,
		})
	}
	var players sync.WaitGroup
	for i := range 30 {
		client, server := open(t, set, tunnel.Spec{Origin: origins[i%3], DownEarly: pattern(0, i)})
		players.Go(func() {
			wantBytes(t, server, string(pattern(0, i)))
			for j := range 20 {
				word := string(pattern(j, 100+i*j*50))
				write(t, client, []byte(word))
				wantBytes(t, server, word)
				write(t, server, []byte(word[:1+i]))
				wantBytes(t, client, word[:1+i])
			}
			client.Close()
			wantEOF(t, server)
			server.Close()
		})
	}
	players.Wait()
	waitEmpty(t, set)
	var sums [3][2]uint64
	for _, record := range e.all() {
		sums[record.Owner.(int)][0] += record.ToUp
		sums[record.Owner.(int)][1] += record.ToDown
	}
	var all [2]uint64
	for i := range shares {
		if got := [2]uint64{shares[i].up.Value(), shares[i].down.Value()}; got != sums[i] || got[0] == 0 || got[1] == 0 {
			t.Errorf("origin %d: counted %d, the records say %d", i, got, sums[i])
		}
		all[0] += sums[i][0]
		all[1] += sums[i][1]
	}
	f := figures(counted)
	if got := [2]uint64{uint64(f["tunnel_relayed_bytes_total upstream"]), uint64(f["tunnel_relayed_bytes_total downstream"])}; got != all {
		t.Errorf("counted %d in all, the records say %d", got, all)
	}
	set.Sample()
	if figures(counted)["loop_wakeups_total"] == 0 {
		t.Error("no wake-up was counted")
	}
}

// Runs alone: it counts what the whole process has open.
func TestMemoryOfTunnelsThatAreGoneIsGivenBack(t *testing.T) {
	const n = 1000
	needDescriptors(t, 4*n+200)
	r := relay{loops: shape{loops: 1, tunnels: n, buffers: 64, pipes: 4}}
	m := newMirror(t, r.loops)
	set := relay{}.newSetWith(t, tunnel.Options{Loops: []tunnel.Loop{m.loop}})
	set.TidyAfter(50 * time.Millisecond)
	l := listenTCP(t)
	if got := set.Footprint(); got != [4]int{} {
		t.Errorf("an empty Set keeps %d", got)
	}
	blocks, files, goroutines := m.blocks(), openFiles(t), runtime.NumGoroutine()
	for range 2 {
		c := openCrowd(t, set, l, n)
		c.chat(strings.Repeat("hello", 1000))
		if got := set.Footprint(); got[0] != 1 || got[1] != n {
			t.Errorf("%d chunks and %d origins with %d tunnels", got[0], got[1], n)
		}
		for i := range c.clients {
			c.clients[i].Close()
			c.servers[i].Close()
		}
		waitEmpty(t, set)
		eventually(t, "no chunk, no origin, nothing watched or held is left", func() bool { return set.Footprint() == [4]int{} })
		// The pages of the claims, once touched, stay.
		eventually(t, "the memory file is as small as before", func() bool { return m.blocks() <= blocks+2*4096/512 })
		eventually(t, "all descriptors are closed", func() bool { return openFiles(t) <= files })
		eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= goroutines })
	}
}
