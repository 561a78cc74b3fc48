package tunnel_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

func TestEarlyBytesGoFirstOnBothSides(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		far, down := tcpPair(t, false)
		farther, up := tcpPair(t, false)
		down.SetDeadline(time.Now().Add(-time.Hour)) // left by a former owner
		up.SetDeadline(time.Now().Add(-time.Hour))
		spec := tunnel.Spec{DownEarly: []byte("client first"), UpEarly: []byte("server first")}
		client, server := begin(t, set, spec, [2]*net.TCPConn{far, farther}, [2]*net.TCPConn{down, up})
		write(t, client, []byte(" then this"))
		write(t, server, []byte(" and that"))
		wantBytes(t, server, "client first then this")
		wantBytes(t, client, "server first and that")
		client.CloseWrite()
		wantEOF(t, server)
		server.Close()
		wantEOF(t, client)
		record := wantEnd(t, set, e, tunnel.DownstreamClosed)
		if record.ToUp != 22 || record.ToDown != 21 {
			t.Errorf("counted %d up and %d down, want 22 and 21", record.ToUp, record.ToDown)
		}
	})
}

func TestTheRecordSaysWhoAndWhen(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		spec := tunnel.Spec{
			Origin: &tunnel.Origin{
				Listener: "l", VirtualHost: "v", Route: "r", Cluster: "c", Endpoint: "host:1",
				EndpointAddr: netip.MustParseAddrPort("192.0.2.2:2000"),
			},
			ID: "id", Client: netip.MustParseAddrPort("192.0.2.1:1000"), Tag: "the starter's own",
		}
		before := time.Now()
		client, server := open(t, set, spec)
		open(t, set, tunnel.Spec{})
		list := set.List()
		if len(list) != 2 || list[0].Number != 1 || list[1].Number != 2 {
			t.Fatalf("list is %+v", list)
		}
		if count, oldest := set.Summary(); count != 2 || !oldest.Equal(list[0].Started) {
			t.Errorf("summary is %d, %v", count, oldest)
		}
		live := list[0]
		if live.Reason != tunnel.Open || !live.Ended.IsZero() || live.Started.Before(before) {
			t.Errorf("living record is %+v", live)
		}
		server.Close()
		wantEOF(t, client)
		client.Close()
		eventually(t, "one tunnel has ended", func() bool { return len(e.all()) == 1 })
		got := e.all()[0]
		if got.Ended.Before(got.Started) {
			t.Errorf("ended %v before it was started", got.Started.Sub(got.Ended))
		}
		want := tunnel.Record{
			Origin: spec.Origin, Number: 1, ID: "id", Client: spec.Client, Tag: "the starter's own",
			Started: live.Started, Ended: got.Ended, Reason: tunnel.UpstreamClosed,
		}
		if got != want {
			t.Errorf("record is\n%+v, want\n%+v", got, want)
		}
		if n := len(set.List()); n != 1 {
			t.Errorf("%d tunnels in the list, want 1", n)
		}
	})
}

func TestAFinEndsOneDirectionOnly(t *testing.T) {
	bothWays(t, func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf) {
		write(t, a, []byte("question"))
		a.CloseWrite()
		wantBytes(t, b, "question")
		wantEOF(t, b)
		for range 3 {
			write(t, b, []byte("answer"))
			wantBytes(t, a, "answer")
		}
		b.Close()
		wantEOF(t, a)
		wantEnd(t, set, e, of.closed)
	})
}

// sideOf are the reasons when one side ends a tunnel.
type sideOf struct{ closed, reset tunnel.Reason }

// bothWays runs a test on both relays with the client as a and with the server as a.
func bothWays(t *testing.T, run func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf)) {
	onAllRelays(t, func(t *testing.T, r relay) {
		for _, test := range []struct {
			name string
			flip bool
			of   sideOf
		}{
			{"by the client", false, sideOf{tunnel.DownstreamClosed, tunnel.DownstreamReset}},
			{"by the server", true, sideOf{tunnel.UpstreamClosed, tunnel.UpstreamReset}},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				set, e := r.newSet(t)
				set.Hurry(5*time.Second, 3*time.Second, 20*time.Millisecond)
				a, b := open(t, set, tunnel.Spec{})
				if test.flip {
					a, b = b, a
				}
				run(t, set, e, a, b, test.of)
			})
		}
	})
}

func TestAResetIsPassedOn(t *testing.T) {
	bothWays(t, func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf) {
		reset(a)
		wantReset(t, b)
		wantEnd(t, set, e, of.reset)
	})
}

func TestWhatWasSentBeforeAResetIsDeliveredFirst(t *testing.T) {
	bothWays(t, func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf) {
		b.SetReadBuffer(32 << 10)
		sent := fill(t, a)
		reset(a)
		if _, ok := a.(*peer); ok { // what the kernel had sent was more than what it carried
			got, err := io.ReadAll(b)
			if n := min(len(got), len(sent)); n < len(sent)-16<<10 || !bytes.Equal(got[:n], sent[:n]) {
				t.Errorf("%d bytes arrived of %d", len(got), len(sent))
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("then there was %v, want a reset", err)
			}
			wantEnd(t, set, e, of.reset)
			return
		}
		got := readSlowly(t, b, len(sent))
		if !bytes.Equal(got, sent) {
			t.Errorf("%d bytes arrived of %d", len(got), len(sent))
		}
		wantReset(t, b)
		wantEnd(t, set, e, of.reset)
	})
}

// fill writes until nothing moves any more and everything has left a's kernel,
// and returns what was written.
func fill(t *testing.T, a tcpConn) []byte {
	t.Helper()
	var sent []byte
	block := pattern(0, 64<<10)
	eventually(t, "the sender is held back", func() bool {
		a.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := a.Write(block)
		sent = append(sent, block[:n]...)
		return err != nil
	})
	a.SetWriteDeadline(time.Now().Add(patience))
	return sent[:len(sent)-dropUnacked(t, a)]
}

// dropUnacked waits until the send queue of c is at rest and returns its size.
func dropUnacked(t *testing.T, c tcpConn) int {
	t.Helper()
	last, same := -1, 0
	eventually(t, "the send queue is at rest", func() bool {
		n := outq(t, c)
		if n == last {
			same++
		} else {
			last, same = n, 0
		}
		return n == 0 || same > 300
	})
	return last
}

func outq(t *testing.T, c tcpConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n
}

func readSlowly(t *testing.T, c net.Conn, n int) []byte {
	t.Helper()
	var got []byte
	buf := make([]byte, 5000)
	for len(got) < n {
		k, err := c.Read(buf[:min(len(buf), n-len(got))])
		got = append(got, buf[:k]...)
		if err != nil {
			t.Fatalf("read: %v after %d of %d bytes", err, len(got), n)
		}
		if len(got)%7 == 0 {
			time.Sleep(time.Millisecond) // this reader is slow; nothing is waited for
		}
	}
	return got
}

// A socket from which a FIN was read is readable for ever: no read tells that a
// reset came after it.
func TestAResetAfterAFinIsNoticedWithoutTraffic(t *testing.T) {
	bothWays(t, func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf) {
		a.CloseWrite()
		wantEOF(t, b)
		reset(a)
		// A FIN was passed on before, and a read after it returns 0 whatever
		// comes later. That b was reset shows when it writes.
		wantEnd(t, set, e, of.reset)
		eventually(t, "the other side was reset", func() bool {
			_, err := b.Write([]byte("x"))
			return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
		})
	})
}

// The error of a reset is given out once. When a write takes it, a read returns
// 0, like after a FIN.
func TestAResetThatAWriteNoticesIsNotTakenForAFin(t *testing.T) {
	bothWays(t, func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf) {
		stop := make(chan struct{})
		var writer sync.WaitGroup
		writer.Go(func() {
			for {
				if _, err := b.Write([]byte("chatter")); err != nil {
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		wantBytes(t, a, "chatter")
		reset(a)
		wantEnd(t, set, e, of.reset)
		close(stop)
		writer.Wait()
	})
}

// The FIN of one side cannot be passed on to the other, which was reset: finding
// that out must not hide the reset from the direction that reads there.
func TestAResetThatMeetsAFinOfTheOtherSideIsPassedOn(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		for range 200 {
			set, e := r.newSet(t)
			client, server := open(t, set, tunnel.Spec{})
			var both sync.WaitGroup
			both.Go(func() { server.CloseWrite() })
			both.Go(func() { reset(client) })
			both.Wait()
			wantReset(t, server)
			wantEnd(t, set, e, tunnel.DownstreamReset)
		}
	})
}

func TestAResetBehindAStalledReceiverEndsTheTunnelInBoundedTime(t *testing.T) {
	bothWays(t, func(t *testing.T, set *tunnel.Set, e *ends, a, b tcpConn, of sideOf) {
		b.SetReadBuffer(4 << 10)
		a.SetWriteDeadline(time.Now().Add(time.Second))
		for {
			if _, err := a.Write(pattern(0, 64<<10)); err != nil {
				break // held back
			}
		}
		reset(a)
		wantEnd(t, set, e, of.reset) // b never reads
	})
}

func TestAStalledReceiverBoundsWhatIsTakenFromTheSender(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, _ := r.newSet(t)
		client, server := openOver(t, set, tunnel.Spec{Origin: limited(tunnel.Limits{Buffer: 8 << 10})}, true)

		const total = 4 << 20
		var accepted atomic.Int64
		var writer sync.WaitGroup
		writer.Go(func() {
			for off := 0; off < total; off += 4096 {
				n, err := client.Write(pattern(off, 4096))
				accepted.Add(int64(n))
				if err != nil {
					t.Errorf("write: %v", err)
					return
				}
			}
			client.CloseWrite()
		})
		last, same := int64(-1), 0
		eventually(t, "the sender is held back", func() bool {
			n := accepted.Load()
			if n != last {
				last, same = n, 0
			} else {
				same++
			}
			return n > 0 && same > 200
		})
		// Four kernel buffers of 32 KiB, which the kernel doubles, and ours.
		if last > 512<<10 {
			t.Errorf("the sender got rid of %d bytes although nobody reads", last)
		}
		if n := set.Buffers(); n != 1 {
			t.Errorf("%d buffers in use, want 1", n)
		}
		got := 0
		buf := make([]byte, 32<<10)
		for {
			n, err := server.Read(buf)
			if !bytes.Equal(buf[:n], pattern(got, n)) {
				t.Fatalf("wrong bytes at %d", got)
			}
			got += n
			if err != nil {
				break
			}
		}
		writer.Wait()
		if got != total {
			t.Errorf("%d bytes arrived, want %d", got, total)
		}
	})
}

func TestAnIdleTunnelHoldsNoBuffer(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, _ := r.newSet(t)
		for range 20 {
			client, server := open(t, set, tunnel.Spec{})
			write(t, client, []byte("x"))
			wantBytes(t, server, "x")
			write(t, server, []byte("y"))
			wantBytes(t, client, "y")
		}
		eventually(t, "20 idle tunnels hold no buffer", func() bool { return set.Buffers() == 0 })
		client, server := open(t, set, tunnel.Spec{})
		client.CloseWrite()
		wantEOF(t, server)
		eventually(t, "a half-closed tunnel holds no buffer", func() bool { return set.Buffers() == 0 })
	})
}

func TestBothConnectionsGetKeepalive(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		set, _ := r.newSet(t)
		own := limited(tunnel.Limits{KeepAlive: tunnel.KeepAlive{Idle: 7 * time.Second, Interval: 3 * time.Second, Count: 2}})
		for _, test := range []struct {
			origin                *tunnel.Origin
			idle, interval, count int
		}{{nil, 60, 15, 4}, {own, 7, 3, 2}} {
			client, down := tcpPair(t, false)
			server, up := tcpPair(t, false)
			sockets := []int{second(t, down), second(t, up)}
			set.Start(tunnel.Spec{Down: down, Up: up, Origin: test.origin})
			write(t, client, []byte("x"))
			wantBytes(t, server, "x") // it has begun
			for _, fd := range sockets {
				for _, opt := range []struct{ level, name, want int }{
					{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
					{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, test.idle},
					{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, test.interval},
					{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, test.count},
					{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 0},
					{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
				} {
					if got, err := unix.GetsockoptInt(fd, opt.level, opt.name); err != nil || got != opt.want {
						t.Errorf("option %d/%d is %d (%v), want %d", opt.level, opt.name, got, err, opt.want)
					}
				}
			}
		}
	})
}

func TestClosingSendsAFinBehindPendingBytesToBothSides(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, server := open(t, set, tunnel.Spec{DownEarly: []byte("early")})
		write(t, client, []byte(" up"))
		wantBytes(t, server, "early up")
		set.CloseAll(tunnel.Operator, 0)
		wantEOF(t, server)
		wantEOF(t, client)
		// What the peers still send is taken in until they close, too: unread
		// bytes would make a reset of our close.
		write(t, client, []byte("too late"))
		write(t, server, []byte("too late"))
		if count, _ := set.Summary(); count != 1 {
			t.Error("the tunnel did not wait for its peers")
		}
		client.Close()
		server.Close()
		record := wantEnd(t, set, e, tunnel.Operator)
		if record.ToUp != 8 || record.ToDown != 0 {
			t.Errorf("counted %d up and %d down, want 8 and 0", record.ToUp, record.ToDown)
		}
	})
}

func TestClosingDeliversWhatWasTakenInFromTheSender(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, server := open(t, set, tunnel.Spec{DownEarly: pattern(0, 6<<20)}) // more than the kernel takes
		eventually(t, "the receiver holds the tunnel up", func() bool { return set.List()[0].ToUp > 0 })
		set.CloseAll(tunnel.Operator, 0)
		if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, pattern(0, 6<<20)) {
			t.Errorf("%d bytes arrived, then %v", len(got), err)
		}
		wantEOF(t, client)
		client.Close()
		server.Close()
		wantEnd(t, set, e, tunnel.Operator)
	})
}

func TestAPeerThatStallsOrIgnoresAFinDoesNotKeepATunnelThatIsClosed(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		set.Hurry(100*time.Millisecond, 100*time.Millisecond, time.Second)
		client, server := open(t, set, tunnel.Spec{DownEarly: pattern(0, 8<<20)})
		set.CloseAll(tunnel.Operator, 0)
		wantEnd(t, set, e, tunnel.Operator)
		wantEOF(t, client)
		if got, err := io.ReadAll(server); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a server that was too slow read %d bytes and then %v, want a reset", len(got), err)
		}
	})
}

func TestAPeerThatDoesNotAnswerIsCalledDead(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, down := tcpPair(t, false)
		server, up := tcpPair(t, false)
		dead := &scripted{Conn: up, fail: make(chan struct{}), err: os.NewSyscallError("read", syscall.ETIMEDOUT)}
		set.Start(tunnel.Spec{Down: down, Up: dead})
		write(t, client, []byte("hello"))
		wantBytes(t, server, "hello")
		close(dead.fail)
		wantReset(t, client)
		wantEnd(t, set, e, tunnel.DeadPeer)
	})
}

// scripted is a connection whose reads wait for fail and then fail, or panic.
type scripted struct {
	net.Conn
	fail  chan struct{}
	err   error
	panic string
}

func (s *scripted) Read([]byte) (int, error) {
	<-s.fail
	if s.panic != "" {
		panic(s.panic)
	}
	return 0, s.err
}

func TestAPanicEndsOneTunnelAndIsLogged(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	var e ends
	set := tunnel.NewSet(tunnel.Options{Log: slog.New(slog.NewTextHandler(&log, nil)), OnEnd: func(r tunnel.Record) {
		e.add(r)
		if r.Number == 1 {
			panic("reporting failed")
		}
	}})
	client, down := tcpPair(t, false)
	server, up := tcpPair(t, false)
	bad := &scripted{Conn: up, fail: make(chan struct{}), panic: "out of cheese"}
	set.Start(tunnel.Spec{Down: down, Up: bad, ID: "the-bad-one"})
	healthyClient, healthyServer := open(t, set, tunnel.Spec{})
	close(bad.fail)
	wantReset(t, client)
	server.Close()
	eventually(t, "both panics are in the log", func() bool {
		s := log.String()
		return strings.Contains(s, "out of cheese") && strings.Contains(s, "reporting failed") &&
			strings.Contains(s, "request_id=the-bad-one")
	})
	write(t, healthyClient, []byte("still here"))
	wantBytes(t, healthyServer, "still here")
	healthyClient.Close()
	healthyServer.Close()
	waitEmpty(t, set)
	if all := e.all(); len(all) != 2 || all[0].Reason != tunnel.Failed {
		t.Errorf("records are %+v", all)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestUnixSocketsAreRelayedAndHalfClosed(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		server, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		up, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		client, down := tcpPair(t, false)
		set.Start(tunnel.Spec{Down: down, Up: up})
		write(t, client, []byte("question"))
		client.CloseWrite()
		wantBytes(t, server, "question")
		wantEOF(t, server)
		eventually(t, "an idle tunnel holds no buffer", func() bool { return set.Buffers() == 0 })
		write(t, server, []byte("answer"))
		wantBytes(t, client, "answer")
		server.Close()
		wantEOF(t, client)
		wantEnd(t, set, e, tunnel.DownstreamClosed)
	})
}

func TestAUnixPeerThatIsGoneIsNoticedByAWrite(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		server, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		up, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		client, down := tcpPair(t, false)
		set.Start(tunnel.Spec{Down: down, Up: up})
		server.Close()
		wantEOF(t, client)
		write(t, client, []byte("x"))
		wantEnd(t, set, e, tunnel.UpstreamReset)
	})
}

func TestAConnectionWithoutHalfCloseEndsTheWholeTunnel(t *testing.T) {
	onBothRelays(t, func(t *testing.T, r relay) {
		set, e := r.newSet(t)
		client, down := net.Pipe()
		server, up := net.Pipe()
		set.Start(tunnel.Spec{Down: down, Up: up, UpEarly: []byte("hello")})
		wantBytes(t, client, "hello")
		client.Close()
		wantEOF(t, server)
		server.Close()
		wantEnd(t, set, e, tunnel.DownstreamClosed)
	})
}

func TestReasonsReadAsTheyAreDocumented(t *testing.T) {
	t.Parallel()
	for reason, want := range map[tunnel.Reason]string{
		tunnel.Open:             "open",
		tunnel.DownstreamClosed: "downstream closed",
		tunnel.UpstreamClosed:   "upstream closed",
		tunnel.DownstreamReset:  "downstream reset",
		tunnel.UpstreamReset:    "upstream reset",
		tunnel.IdleTimeout:      "idle timeout",
		tunnel.MaxAge:           "max age",
		tunnel.DeadPeer:         "dead peer",
		tunnel.DrainLimit:       "drain limit",
		tunnel.Operator:         "operator",
		tunnel.Stopped:          "stopped",
		tunnel.Failed:           "failed",
		tunnel.LostInCrash:      "lost in crash",
		tunnel.Quarantined:      "quarantined",
		tunnel.RouteRemoved:     "route removed",

		tunnel.EndpointRemoved:       "endpoint removed",
		tunnel.EndpointUnhealthy:     "endpoint unhealthy",
		tunnel.EndpointUnhealthy + 1: "unknown",
		255:                          "unknown",
	} {
		if got := reason.String(); got != want {
			t.Errorf("Reason(%d) is %q, want %q", reason, got, want)
		}
	}
}
