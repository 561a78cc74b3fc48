package inflight_test

import (
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

func look(t testing.TB, fd int) inflight.Counters {
	t.Helper()
	c, err := inflight.Look(fd)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// await looks at a socket until it is as wanted.
func await(t testing.TB, fd int, what string, wanted func(inflight.Counters) bool) inflight.Counters {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		c := look(t, fd)
		if wanted(c) {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatalf("never %s: %+v", what, c)
		}
	}
}

func gone(c inflight.Counters) bool        { return c.Gone }
func finReceived(c inflight.Counters) bool { return c.FinReceived }

func unread(n int) func(inflight.Counters) bool {
	return func(c inflight.Counters) bool { return c.Unread == n }
}

// The ways in which a connection comes to be as it is. All have in common that the peer
// has sent 10 bytes of which 4 were read, and was sent 7.
func TestCountersAreOfBytesWhateverBecomesOfAConnection(t *testing.T) {
	t.Parallel()
	type counters = inflight.Counters
	fin := func(fd int) { unix.Shutdown(fd, unix.SHUT_WR) }
	drain := func(t *testing.T, peer net.Conn, n int) {
		t.Helper()
		peer.SetReadDeadline(time.Now().Add(30 * time.Second))
		for b := make([]byte, 100); n > 0; {
			got, err := peer.Read(b[:n])
			if err != nil {
				t.Fatal(err)
			}
			n -= got
		}
	}
	for name, c := range map[string]struct {
		happens func(t *testing.T, peer *net.TCPConn, fd int)
		until   func(counters) bool
		want    counters
	}{
		"nothing": {
			func(*testing.T, *net.TCPConn, int) {}, unread(6), counters{Taken: 4, Given: 7, Unread: 6},
		},
		"all was read": {
			func(t *testing.T, _ *net.TCPConn, fd int) { receive(fd, make([]byte, 10), 0) },
			unread(0), counters{Taken: 10, Given: 7},
		},
		"bytes were peeked at": {
			func(t *testing.T, _ *net.TCPConn, fd int) { receive(fd, make([]byte, 10), unix.MSG_PEEK) },
			unread(6), counters{Taken: 4, Given: 7, Unread: 6},
		},
		"the peer has ended": {
			func(t *testing.T, peer *net.TCPConn, _ int) { peer.CloseWrite() },
			finReceived, counters{Taken: 4, Given: 7, Unread: 6, FinReceived: true},
		},
		"the peer has ended, and all but the end was read": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				receive(fd, make([]byte, 6), 0)
				peer.CloseWrite()
			},
			finReceived, counters{Taken: 10, Given: 7, FinReceived: true},
		},
		"the peer has ended, and its end was read": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				peer.CloseWrite()
				await(t, fd, "at its end", finReceived)
				receive(fd, make([]byte, 100), 0)
				receive(fd, make([]byte, 100), 0)
			},
			finReceived, counters{Taken: 10, Given: 7, FinReceived: true},
		},
		"we have ended": {
			func(t *testing.T, _ *net.TCPConn, fd int) { fin(fd) },
			unread(6), counters{Taken: 4, Given: 7, Unread: 6, FinSent: true},
		},
		"both have ended, we first, and the peer is there": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				fin(fd)
				drain(t, peer, 7)
				peer.CloseWrite()
			},
			gone, counters{Taken: 4 + 1, Given: 7 + 1, Unread: 6, Gone: true},
		},
		"both have ended, the peer first": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				drain(t, peer, 7)
				peer.CloseWrite()
				await(t, fd, "at its end", finReceived)
				fin(fd)
			},
			gone, counters{Taken: 4 + 1, Given: 7 + 1, Unread: 6, Gone: true},
		},
		"both have ended, and all was read": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				peer.CloseWrite()
				await(t, fd, "at its end", finReceived)
				receive(fd, make([]byte, 100), 0)
				receive(fd, make([]byte, 100), 0)
				fin(fd)
			},
			gone, counters{Taken: 10 + 1, Given: 7 + 1, Gone: true},
		},
		"the peer has reset it": {
			func(t *testing.T, peer *net.TCPConn, fd int) { peer.SetLinger(0); peer.Close() },
			gone, counters{Taken: 4, Given: 7, Unread: 6, Gone: true, Failed: true},
		},
		"the peer has reset it, and the error was taken": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				peer.SetLinger(0)
				peer.Close()
				await(t, fd, "gone", gone)
				unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			},
			gone, counters{Taken: 4, Given: 7, Unread: 6, Gone: true},
		},
		"the peer has reset it after its end": {
			func(t *testing.T, peer *net.TCPConn, fd int) {
				peer.CloseWrite()
				await(t, fd, "at its end", finReceived)
				peer.SetLinger(0)
				peer.Close()
			},
			gone, counters{Taken: 4 + 1, Given: 7, Unread: 6, Gone: true, Failed: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			peer, fd := connected(t)
			peer.Write(make([]byte, 3)) // of which nothing is to be seen
			await(t, fd, "there", unread(3))
			receive(fd, make([]byte, 3), 0)
			send(fd, make([]byte, 1))
			peer.Read(make([]byte, 1))
			start := await(t, fd, "idle", func(c counters) bool { return c.Unread == 0 })

			peer.Write(make([]byte, 10))
			await(t, fd, "there", unread(10))
			receive(fd, make([]byte, 4), 0)
			send(fd, make([]byte, 7))
			c.happens(t, peer, fd)
			await(t, fd, "so", c.until)
			if got := look(t, fd).Since(start.Taken, start.Given); got != c.want {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
		})
	}
}

// A FIN that waits behind bytes that the peer does not read is not one of them.
func TestAFinThatIsNotAcknowledgedIsNotCounted(t *testing.T) {
	t.Parallel()
	for name, ends := range map[string]func(peer *net.TCPConn, fd int){
		"ours":           func(_ *net.TCPConn, fd int) { unix.Shutdown(fd, unix.SHUT_WR) },
		"ours, then its": func(peer *net.TCPConn, fd int) { unix.Shutdown(fd, unix.SHUT_WR); peer.CloseWrite() },
		"its, then ours": func(peer *net.TCPConn, fd int) {
			peer.CloseWrite()
			await(t, fd, "at its end", finReceived)
			unix.Shutdown(fd, unix.SHUT_WR)
		},
	} {
		peer, fd := connected(t)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 100_000)
		peer.SetReadBuffer(100_000)
		start := look(t, fd)
		given := 0
		for n := 1; n > 0; given += n {
			n = send(fd, make([]byte, 1_000_000))
		}
		ends(peer, fd)
		c := await(t, fd, "ended", func(c inflight.Counters) bool { return c.FinSent && (name == "ours" || c.FinReceived) })
		want := inflight.Counters{Given: uint64(given), FinSent: true, FinReceived: name != "ours"}
		if got := c.Since(start.Taken, start.Given); got != want {
			t.Errorf("%s: got  %+v\nwant %+v", name, got, want)
		}
	}
}

// What we have reset ourselves has counters that say nothing, and says so, although the
// error was taken.
func TestASocketThatWeHaveResetHasFailed(t *testing.T) {
	t.Parallel()
	peer, fd := connected(t)
	peer.Write(make([]byte, 10))
	await(t, fd, "there", unread(10))
	disconnect(fd)
	unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if c := look(t, fd); !c.Gone || !c.Failed || c.Unread != 0 {
		t.Errorf("it is %+v", c)
	}
}

// A look takes no error away from whoever is to learn of it.
func TestALookTakesNothing(t *testing.T) {
	t.Parallel()
	peer, fd := connected(t)
	peer.Write(make([]byte, 10))
	await(t, fd, "there", unread(10))
	peer.SetLinger(0)
	peer.Close()
	await(t, fd, "gone", gone)
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || unix.Errno(errno) != unix.ECONNRESET {
		t.Errorf("%v, %v", unix.Errno(errno), err)
	}
	if n := receive(fd, make([]byte, 100), 0); n != 10 {
		t.Errorf("%d bytes are left", n)
	}
}

// While nobody reads or writes a socket its counters stand still, whatever the peer does:
// sending, acknowledging, ending.
func TestCountersStandStillWhileThePeerGoesOn(t *testing.T) {
	t.Parallel()
	for range 30 {
		peer, fd := connected(t)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20)
		given := send(fd, make([]byte, 100_000))
		want := look(t, fd)
		var traffic sync.WaitGroup
		traffic.Go(func() {
			for range 20 {
				peer.Write(make([]byte, 500))
				for got := 0; got < given/20; {
					n, err := peer.Read(make([]byte, given/20-got))
					if err != nil {
						t.Error(err)
						return
					}
					got += n
				}
			}
			peer.CloseWrite()
		})
		for ended := false; !ended; {
			c := look(t, fd)
			if c.Taken != want.Taken || c.Given != want.Given {
				t.Errorf("taken %d and given %d more: %+v", c.Taken-want.Taken, c.Given-want.Given, c)
				break
			}
			ended = c.FinReceived
		}
		traffic.Wait()
	}
}

func TestOnlyTCPCanBeLookedAt(t *testing.T) {
	t.Parallel()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	for _, fd := range []int{fds[0], newFile(t, 1, 1), -1} {
		if c, err := inflight.Look(fd); err == nil {
			t.Errorf("%+v", c)
		}
	}
}

func BenchmarkLook(b *testing.B) {
	for name, prepare := range map[string]func(peer net.Conn, fd int){
		"idle":   func(net.Conn, int) {},
		"unread": func(peer net.Conn, _ int) { peer.Write(make([]byte, 1)) },
		"unacked": func(_ net.Conn, fd int) {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<20)
			send(fd, make([]byte, 8<<20))
		},
	} {
		b.Run(name, func(b *testing.B) {
			peer, fd := connected(b)
			prepare(peer, fd)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := inflight.Look(fd); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
