package tunnel_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tunnel"
)

// onSidesWithTLS runs a test with TLS on either side of a tunnel and on both.
func onSidesWithTLS(t *testing.T, run func(t *testing.T, r relay, sides [2]bool)) {
	t.Parallel()
	for name, sides := range map[string][2]bool{"client": {true, false}, "server": {false, true}, "both": {true, true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, relay{loops: onLoopsOverTLS.loops}, sides)
		})
	}
}

// secure has the tunnels of a set have TLS on some sides.
func secure(t testing.TB, set *tunnel.Set, sides [2]bool) {
	secured.Store(set, &securer{loop: streamtest.New(t), sides: sides})
	t.Cleanup(func() { secured.Delete(set) })
}

// What is sent arrives, whatever the pieces, in both directions at once, and behind it the end.
func TestMuchIsRelayedOverTLS(t *testing.T) {
	onSidesWithTLS(t, func(t *testing.T, r relay, sides [2]bool) {
		set, e := r.newSet(t)
		secure(t, set, sides)
		client, server := openOver(t, set, tunnel.Spec{}, true)
		const total = 3 << 20
		var all sync.WaitGroup
		for _, c := range []tcpConn{client, server} {
			all.Go(func() {
				for off, size := 0, 1; off < total; off, size = off+size, size%50000*3+1 {
					if _, err := c.Write(pattern(off, min(size, total-off))); err != nil {
						t.Errorf("write: %v", err)
						return
					}
				}
				c.CloseWrite()
			})
			all.Go(func() {
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, pattern(0, total)) {
					t.Errorf("%d bytes came, and then %v", len(got), err)
				}
			})
		}
		all.Wait()
		waitEmpty(t, set)
		if end := e.all()[0]; end.ToUp != total || end.ToDown != total {
			t.Errorf("%d bytes to the server and %d to the client were counted", end.ToUp, end.ToDown)
		}
	})
}

// A peer that sends each byte in a record of its own does not have the loop to itself until all of
// them were passed on: a turn is measured by the work.
func TestTinyRecordsLeaveEachTurnToTheOthers(t *testing.T) {
	t.Parallel()
	loops := shape{loops: 1, tunnels: 16, buffers: 4, pipes: 2}.start(t)
	set := onLoops.newSetWith(t, tunnel.Options{Loops: loops})
	secure(t, set, [2]bool{true, false})
	var moved metrics.Counter
	client, server := openOver(t, set, tunnel.Spec{Origin: &tunnel.Origin{UpBytes: []*metrics.Counter{&moved}, DownBytes: []*metrics.Counter{&moved}}}, true)

	const records = 2000
	var mostAtOnce, before uint64
	blocked, sent := make(chan struct{}), make(chan struct{})
	loops[0].Poller.Post(func() {
		loops[0].Poller.AfterTurn(func() {
			now := moved.Value()
			mostAtOnce, before = max(mostAtOnce, now-before), now
		})
		close(blocked)
		<-sent
	})
	<-blocked
	p := client.(*peer)
	var all []byte
	p.raw.batch = &all
	for range records {
		if _, err := p.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.raw.Conn.Write(all); err != nil {
		t.Fatal(err)
	}
	p.raw.batch = nil
	close(sent)
	if _, err := io.ReadFull(server, make([]byte, records)); err != nil {
		t.Fatal(err)
	}
	got := make(chan uint64)
	loops[0].Poller.Post(func() { got <- mostAtOnce })
	if most := <-got; most == 0 || most > records/2 {
		t.Errorf("%d of %d records were passed on in one turn", most, records)
	}
}

// While one receiver does not read, its sender is held back, and the other direction goes on.
// What was held is delivered then, and the end behind it, said as TLS says it.
func TestAStalledReceiverHoldsOneDirectionOverTLS(t *testing.T) {
	onSidesWithTLS(t, func(t *testing.T, r relay, sides [2]bool) {
		set, _ := r.newSet(t)
		secure(t, set, sides)
		client, server := openOver(t, set, tunnel.Spec{}, true)
		sent := make(chan int, 1)
		stop := make(chan struct{})
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					server.CloseWrite()
					sent <- n
					return
				default:
				}
				k, err := server.Write(pattern(n, 10000))
				n += k
				if err != nil {
					t.Errorf("write: %v", err)
				}
			}
		}()
		last, same := uint64(0), 0
		eventually(t, "the sender is held back", func() bool {
			n := set.List()[0].ToDown
			if same++; n != last {
				last, same = n, 0
			}
			return n > 0 && same > 200
		})
		if n := set.Buffers(); n != 1 {
			t.Errorf("%d buffers are held, want 1", n)
		}
		for range 10 {
			write(t, client, []byte("meanwhile"))
			wantBytes(t, server, "meanwhile")
		}
		close(stop)
		got, err := io.ReadAll(client)
		if n := <-sent; err != nil || !bytes.Equal(got, pattern(0, n)) {
			t.Errorf("%d bytes of %d came, and then %v", len(got), n, err)
		}
		client.Close()
	})
}

// What a peer of TLS says of the end is what the other one is told.
func TestTheEndOfTLSIsPassedOn(t *testing.T) {
	for _, test := range []struct {
		name      string
		end       func(*peer)
		told      func(testing.TB, net.Conn)
		reason    tunnel.Reason
		truncated int64
	}{
		{"close_notify is a FIN, and nothing else of the connection has to end", func(p *peer) { p.tls.CloseWrite() }, wantEOF, tunnel.DownstreamClosed, 0},
		{"a FIN alone is one, and counted", func(p *peer) { p.TCPConn.CloseWrite() }, wantEOF, tunnel.DownstreamClosed, 1},
		{"a FIN within a record is a reset", func(p *peer) {
			p.TCPConn.Write([]byte{23, 3, 3, 0, 100, 1, 2, 3})
			p.TCPConn.CloseWrite()
		}, wantReset, tunnel.DownstreamReset, 0},
		{"what is no TLS is a reset", func(p *peer) { p.TCPConn.Write(bytes.Repeat([]byte("x"), 100)) }, wantReset, tunnel.DownstreamReset, 0},
		{"a record that somebody has changed is a reset", func(p *peer) {
			p.TCPConn.Write(append([]byte{23, 3, 3, 0, 100}, make([]byte, 100)...))
		}, wantReset, tunnel.DownstreamReset, 0},
		{"a reset is a reset", func(p *peer) { reset(p) }, wantReset, tunnel.DownstreamReset, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var e ends
			counted := metrics.NewRegistry()
			set := onLoopsOverTLS.newSetWith(t, tunnel.Options{OnEnd: e.add, Metrics: counted})
			client, server := open(t, set, tunnel.Spec{})
			write(t, client, []byte("before"))
			wantBytes(t, server, "before")
			test.end(client.(*peer))
			test.told(t, server)
			if test.reason == tunnel.DownstreamClosed { // half-closed
				write(t, server, []byte("the rest"))
				wantBytes(t, client, "the rest")
			}
			server.Close()
			if test.reason == tunnel.DownstreamClosed {
				wantCloseNotify(t, client.(*peer))
			}
			wantEnd(t, set, &e, test.reason)
			if n := figures(counted)["tunnel_truncated_ends_total downstream"]; n != test.truncated {
				t.Errorf("%d truncated ends were counted, want %d", n, test.truncated)
			}
		})
	}
}

// A tunnel that is closed tells TLS so: a stream that just stopped could be one that somebody cut.
func TestATunnelThatIsClosedTellsTLSSo(t *testing.T) {
	onSidesWithTLS(t, func(t *testing.T, r relay, sides [2]bool) {
		set, e := r.newSet(t)
		secure(t, set, sides)
		client, server := open(t, set, tunnel.Spec{UpEarly: []byte("hello")})
		wantBytes(t, client, "hello")
		set.CloseAll(tunnel.Operator, 0)
		for i, c := range []tcpConn{client, server} {
			if p, ok := c.(*peer); ok != sides[i] {
				t.Fatal("TLS is where it should not be")
			} else if ok {
				wantCloseNotify(t, p)
				continue
			}
			wantEOF(t, c)
		}
		client.Close()
		server.Close()
		wantEnd(t, set, e, tunnel.Operator)
	})
}

// wantCloseNotify checks that the end is said in TLS, and then by a FIN.
func wantCloseNotify(t testing.TB, p *peer) {
	t.Helper()
	wantEOF(t, p)
	if p.raw.fin.Load() {
		t.Error("there was a FIN without close_notify")
	}
	wantEOF(t, p.TCPConn)
}

// A tunnel with TLS has no place in a vault, is counted as one that has none, and stays where it is
// when others move.
func TestATunnelWithTLSIsNeitherDepositedNorMoved(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(roomy)
	secure(t, g.set, [2]bool{true, false})
	client, server := open(t, g.set, tunnel.Spec{Origin: lasting(tunnel.Limits{})})
	write(t, client, []byte("hello"))
	wantBytes(t, server, "hello")
	if n := figures(g.counts)["tunnels_undeposited not plain TCP"]; n != 1 {
		t.Errorf("%d tunnels are shown as not plain TCP", n)
	}
	g.set.Move(true)
	g.set.Deposit(1)
	for range 20 {
		write(t, server, []byte("still here"))
		wantBytes(t, client, "still here")
	}
	if n := figures(g.counts)["tunnels_deposited"]; n != 0 {
		t.Errorf("%d tunnels are deposited", n)
	}
	client.Close()
	server.Close()
	waitEmpty(t, g.set)
	if n := figures(g.counts)["tunnels_undeposited not plain TCP"]; n != 0 {
		t.Errorf("%d tunnels are still shown as not plain TCP", n)
	}
}

// Where no loop has room a tunnel with TLS does not come about.
func TestATunnelWithTLSNeedsALoop(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	var e ends
	set := relay{}.newSetWith(t, tunnel.Options{Log: slog.New(slog.NewTextHandler(&log, nil)), OnEnd: e.add})
	secure(t, set, [2]bool{true, false})
	client, server := open(t, set, tunnel.Spec{})
	wantReset(t, client.(*peer).TCPConn)
	wantReset(t, server)
	wantEnd(t, set, &e, tunnel.Failed)
	if !strings.Contains(log.String(), "no loop has room") {
		t.Errorf("the log says %s", log.String())
	}
}

// The two ends of a pair tell each other of resets, which unix sockets have not.
func TestAPairTellsOfResets(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		for _, byPeer := range []bool{true, false} {
			set, e := r.newSet(t)
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(fds[1]), "pair")
			far, err := net.FileConn(f)
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			server, up := raw(t, "tcp")
			resets := new(stream.Resets)
			set.Start(tunnel.Spec{FDs: [2]int{fds[0], up}, Resets: [2]*stream.Resets{resets}})
			write(t, far, []byte("hello"))
			wantBytes(t, server, "hello")
			if byPeer {
				write(t, far, []byte("last"))
				resets.ByPeer.Store(true)
				far.Close()
				wantBytes(t, server, "last")
				wantReset(t, server)
				wantEnd(t, set, e, tunnel.DownstreamReset)
				continue
			}
			reset(server.(*net.TCPConn))
			wantEOF(t, far)
			wantEnd(t, set, e, tunnel.UpstreamReset)
			if !resets.ByTunnel.Load() {
				t.Error("nobody has told of the reset")
			}
		}
	})
}

// Runs alone: it looks at the memory of the whole process. A goroutine of each direction has a
// stack of some kilobytes, and would read into a buffer.
func TestAnIdleTunnelWithTLSCostsLittle(t *testing.T) {
	const warm, n, most = 50, 400, 9 << 10
	for name, sides := range map[string][2]bool{"client": {true, false}, "both": {true, true}} {
		t.Run(name, func(t *testing.T) {
			needDescriptors(t, 4*(warm+n)+200)
			r := relay{loops: shape{loops: 2, tunnels: warm + n, buffers: 8, pipes: 2}}
			set, _ := r.newSet(t)
			s := &securer{loop: streamtest.New(t), sides: sides}
			var fars []*net.TCPConn
			type pair struct{ far, near *net.TCPConn }
			var pairs []pair
			for range 2 * (warm + n) {
				far, near := tcpPair(t, false)
				pairs = append(pairs, pair{far, near})
			}
			large := pattern(0, 16<<10)
			var specs []tunnel.Spec
			prepare := func() {
				var spec tunnel.Spec
				for i, secure := range sides {
					far, near := pairs[0].far, pairs[0].near
					pairs = pairs[1:]
					if !secure {
						spec.FDs[i] = duplicate(t, near)
						near.Close()
						fars = append(fars, far)
						continue
					}
					p, passed := s.secure(t, far, near, i == 0)
					write(t, p, large) // what was needed for it is not kept
					spec.FDs[i], spec.Secure[i] = passed.FD, passed.Secure
					p.tls, p.raw = nil, nil // what the peers have is not counted
					fars = append(fars, far)
				}
				specs = append(specs, spec)
			}
			for range warm {
				prepare()
			}
			goroutines := runtime.NumGoroutine()
			before := inUse(s.loop)
			for range n {
				prepare()
			}
			withoutTunnels := inUse(s.loop) - before
			for _, spec := range specs {
				set.Start(spec)
			}
			eventually(t, "all have passed on what came first", func() bool {
				for _, c := range fars {
					c.SetReadDeadline(time.Now())
					io.Copy(io.Discard, c)
				}
				for _, r := range set.List() {
					if int(r.ToUp) < len(large) {
						return false
					}
				}
				return len(set.List()) == warm+n
			})
			after := inUse(s.loop)
			if g := runtime.NumGoroutine(); g > goroutines+5 {
				t.Errorf("%d goroutines more", g-goroutines)
			}
			each := (int(after) - int(before)) / n
			t.Logf("%d bytes for each tunnel, %d of them TLS", each, withoutTunnels/n)
			if each > most {
				t.Errorf("%d bytes for each tunnel, want %d at most", each, most)
			}
			runtime.KeepAlive(fars)
		})
	}
}

// inUse is the memory of what is alive.
func inUse(l *stream.Loop) uint64 {
	streamtest.Do(l, l.Trim)
	debug.FreeOSMemory()
	debug.FreeOSMemory() // pools are empty after the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
