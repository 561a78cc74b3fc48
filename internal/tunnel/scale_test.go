package tunnel_test

import (
	"fmt"
	"maps"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// Runs alone: it counts what the whole process has open.
func TestThousandsOfTunnelsLeaveNothingBehind(t *testing.T) {
	for _, test := range []struct {
		relay relay
		n     int // 2 goroutines each, where the race detector knows 8,128
	}{{onLoops, 4000}, {onGoroutines, 1000}} {
		t.Run(test.relay.name, func(t *testing.T) {
			r := test.relay
			if r.onLoops() {
				r.loops = shape{loops: 2, tunnels: test.n/2 + 1, buffers: 64, pipes: 4}
			}
			needDescriptors(t, 4*test.n+200)
			set, e := r.newSet(t)
			l := listenTCP(t) // opens the descriptors of Go's poller, too
			files, goroutines := openFiles(t), runtime.NumGoroutine()
			c := openCrowd(t, set, l, test.n)
			c.chat("ping")
			c.chat("pong")
			if n, _ := set.Summary(); n != test.n || len(set.List()) != test.n {
				t.Errorf("%d tunnels, %d of them in the list, want %d", n, len(set.List()), test.n)
			}
			want := c.leave(set)
			waitEmpty(t, set)
			got := make(map[tunnel.Reason]int)
			for _, record := range e.all() {
				got[record.Reason]++
				if record.ToUp != 8 || record.ToDown != 8 {
					t.Errorf("%d and %d bytes were counted, want 8 and 8", record.ToUp, record.ToDown)
				}
			}
			if !maps.Equal(got, want) {
				t.Errorf("tunnels ended by %v, want %v", got, want)
			}
			eventually(t, "no buffer is held", func() bool { return set.Buffers() == 0 })
			eventually(t, "all descriptors are closed", func() bool { return openFiles(t) <= files })
			eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= goroutines })
		})
	}
}

// needDescriptors skips a test where the process may not have so many.
func needDescriptors(t testing.TB, n int) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur >= uint64(n) {
		return
	}
	why := fmt.Sprintf("%d descriptors are allowed, %d needed (ulimit -n)", limit.Cur, n)
	if os.Getenv("HOLDFAST_TEST_REQUIRE_TOOLS") == "1" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func listenTCP(t testing.TB) *net.TCPListener {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// crowd is the clients and servers of many tunnels.
type crowd struct {
	t                testing.TB
	clients, servers []*net.TCPConn
}

// openCrowd starts n tunnels, over connections to l.
func openCrowd(t testing.TB, set *tunnel.Set, l *net.TCPListener, n int) *crowd {
	t.Helper()
	c := &crowd{t: t}
	deadline := time.Now().Add(6 * patience)
	connect := func() (far, near *net.TCPConn) {
		far, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { far.Close() })
		if near, err = l.AcceptTCP(); err != nil {
			t.Fatal(err)
		}
		far.SetDeadline(deadline)
		return far, near
	}
	for range n {
		client, down := connect()
		server, up := connect()
		c.clients, c.servers = append(c.clients, client), append(c.servers, server)
		set.Start(tunnel.Spec{Down: down, Up: up})
	}
	return c
}

// chat sends a few bytes through all tunnels, first up and then down.
func (c *crowd) chat(word string) {
	c.t.Helper()
	for _, way := range [][2][]*net.TCPConn{{c.clients, c.servers}, {c.servers, c.clients}} {
		for _, from := range way[0] {
			write(c.t, from, []byte(word))
		}
		for _, to := range way[1] {
			wantBytes(c.t, to, word)
		}
	}
}

// ways are those in which a tunnel can end: what its peers do, and what they see then.
var ways = []struct {
	reason tunnel.Reason
	begin  func(client, server *net.TCPConn)
	finish func(t testing.TB, client, server *net.TCPConn)
}{
	{
		tunnel.DownstreamReset,
		func(client, _ *net.TCPConn) { reset(client) },
		func(t testing.TB, _, server *net.TCPConn) { wantReset(t, server) },
	},
	{
		tunnel.UpstreamReset,
		func(_, server *net.TCPConn) { reset(server) },
		func(t testing.TB, client, _ *net.TCPConn) { wantReset(t, client) },
	},
	{
		tunnel.DownstreamClosed,
		func(client, _ *net.TCPConn) { client.CloseWrite() },
		func(t testing.TB, client, server *net.TCPConn) {
			wantEOF(t, server)
			server.Close()
			wantEOF(t, client)
		},
	},
	{
		tunnel.UpstreamClosed,
		func(_, server *net.TCPConn) { server.CloseWrite() },
		func(t testing.TB, client, server *net.TCPConn) {
			wantEOF(t, client)
			client.Close()
			wantEOF(t, server)
		},
	},
	{
		tunnel.Operator,
		func(_, _ *net.TCPConn) {}, // the operator comes when all others have gone
		func(t testing.TB, client, server *net.TCPConn) { wantEOF(t, client); wantEOF(t, server) },
	},
}

// leave ends all tunnels, in all ways in turn, and returns how many ended in which.
func (c *crowd) leave(set *tunnel.Set) map[tunnel.Reason]int {
	c.t.Helper()
	count := make(map[tunnel.Reason]int)
	for i := range c.clients {
		way := &ways[i%len(ways)]
		way.begin(c.clients[i], c.servers[i])
		count[way.reason]++
	}
	finish := func(operators bool) {
		for i := range c.clients {
			way := &ways[i%len(ways)]
			if (way.reason == tunnel.Operator) == operators {
				way.finish(c.t, c.clients[i], c.servers[i])
				c.clients[i].Close()
				c.servers[i].Close()
			}
		}
	}
	finish(false)
	eventually(c.t, "only the operator's tunnels are left", func() bool {
		n, _ := set.Summary()
		return n == count[tunnel.Operator]
	})
	set.CloseAll(tunnel.Operator, 0)
	finish(true)
	return count
}
