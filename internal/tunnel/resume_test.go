package tunnel_test

import (
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// settled waits until a Set has deposited all that it has.
func (g *guest) settled() {
	g.t.Helper()
	eventually(g.t, "all is deposited", func() bool {
		n, _ := g.set.Summary()
		return figures(g.counts)["tunnels_deposited"] == int64(n)
	})
}

// succeed has the process of a Set die and another one go on.
func (g *guest) succeed() *guest {
	g.t.Helper()
	g.settled()
	g.die()
	r := g.resume(true)
	for _, l := range r.loops { // all are resumed then
		freeze(l)()
	}
	return r
}

// What a tunnel is does not change by the death of its process.
func TestATunnelThatIsResumedIsTheSame(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(shape{loops: 2, tunnels: 8, buffers: 4, pipes: 1})
	for range 3 {
		g.open(tunnel.Spec{})
	}
	client, server := g.open(tunnel.Spec{ID: "its id", Tag: "its tag", DownEarly: []byte("early")})
	write(t, client, []byte(" bird"))
	wantBytes(t, server, "early bird")
	before := g.set.List()
	r := g.succeed().succeed()
	after := r.set.List()
	for i := range before {
		before[i].Started = before[i].Started.Round(0)
	}
	for i := range after {
		after[i].Started = after[i].Started.Round(0)
	}
	if !slices.Equal(before, after) {
		t.Errorf("before the death\n%+v\nand after\n%+v", before, after)
	}
	n, oldest := r.set.Summary()
	if n != 4 || !oldest.Equal(before[0].Started) || r.set.Total() != 4 {
		t.Errorf("%d tunnels of %d, the oldest of %v", n, r.set.Total(), oldest)
	}
	another, _ := r.open(tunnel.Spec{})
	if l := r.set.List(); len(l) != 5 || l[4].Number != 5 {
		t.Errorf("one that is started then is in %+v", l)
	}
	another.Close()
	write(t, server, []byte("and back"))
	wantBytes(t, client, "and back")
	client.Close()
	wantEOF(t, server)
	server.Close()
	eventually(t, "its end is reported", func() bool {
		for _, e := range k.records() {
			if e.ID == "its id" && e.Tag == "its tag" && e.ToUp == 10 && e.ToDown == 8 && e.Reason == tunnel.DownstreamClosed {
				return true
			}
		}
		return false
	})
}

// What waits for a slow receiver is in a buffer, a pipe or the sender's socket, and goes
// on from there. Each time the Set dies something else is on its way.
func TestWhatIsInFlightIsDeliveredAfterADeath(t *testing.T) {
	t.Parallel()
	for where, s := range map[string]shape{
		"buffer": {loops: 1, tunnels: 4, buffers: 4},
		"pipe":   {loops: 1, tunnels: 4, buffers: 4, pipes: 2},
		"socket": {loops: 1, tunnels: 4, buffers: 1},
	} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			k := newKeeper(t)
			g := k.guest(s)
			client, down := tcpPair(t, false)
			server, up := tcpPair(t, false)
			for _, c := range []tcpConn{client, down, server, up} {
				c.SetReadBuffer(200 << 10)
				c.SetWriteBuffer(200 << 10)
			}
			g.set.Start(tunnel.Spec{Down: down, Up: up, Origin: lasting(tunnel.Limits{}), DownEarly: pattern(0, 1000)})
			sent := 1000
			fill := func() {
				more := pattern(sent, 4<<20)
				client.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
				n, err := client.Write(more)
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("it could be written to: %v", err)
				}
				sent += n
			}
			fill()
			got, found := 0, int64(0)
			b := make([]byte, 300<<10)
			for range 8 {
				g = g.succeed()
				found += figures(g.counts)["tunnel_recovered_flows_total "+where]
				n, err := io.ReadFull(server, b)
				if err != nil || string(b) != string(pattern(got, n)) {
					t.Fatalf("wrong bytes after %d, or %v", got, err)
				}
				got += n
				fill()
			}
			if where != "socket" && found == 0 {
				t.Errorf("nothing was ever found in a %s", where)
			}
			client.CloseWrite()
			g = g.succeed()
			rest, err := io.ReadAll(server)
			if err != nil || string(rest) != string(pattern(got, sent-got)) {
				t.Errorf("%d bytes came of %d, %v", got+len(rest), sent, err)
			}
			g = g.succeed() // half-closed
			write(t, server, []byte("good bye"))
			wantBytes(t, client, "good bye")
			server.Close()
			wantEOF(t, client)
			waitEmpty(t, g.set)
			if all := k.records(); len(all) != 1 || all[0].Reason != tunnel.DownstreamClosed || all[0].ToUp != uint64(sent) || all[0].ToDown != 8 {
				t.Errorf("%d bytes were sent, records are %+v", sent, all)
			}
		})
	}
}

// What happens to the peers while nobody relays is seen by the successor, and ends that
// were on their way go on, each with its reason.
func TestEndsGoOnAfterADeath(t *testing.T) {
	t.Parallel()
	stuffed := func(t *testing.T, client tcpConn) int { return len(overfill(t, client)) }
	for _, test := range []struct {
		name   string
		before func(t *testing.T, g *guest, client, server tcpConn) (waiting int)
		dead   func(t *testing.T, client, server tcpConn)
		after  func(t *testing.T, client, server tcpConn, waiting int)
		want   tunnel.Reason
	}{
		{
			name: "both close meanwhile",
			dead: func(t *testing.T, client, server tcpConn) {
				write(t, server, []byte("last"))
				server.CloseWrite()
				client.CloseWrite()
			},
			after: func(t *testing.T, client, server tcpConn, _ int) {
				wantBytes(t, client, "last")
				wantEOF(t, client)
				wantEOF(t, server)
			},
			want: tunnel.DownstreamClosed, // nobody saw who was first
		},
		{
			name: "the server closed before",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				server.CloseWrite()
				wantEOF(t, client)
				return 0
			},
			dead:  func(t *testing.T, client, server tcpConn) { client.CloseWrite() },
			after: func(t *testing.T, client, server tcpConn, _ int) { wantEOF(t, server) },
			want:  tunnel.UpstreamClosed,
		},
		{
			name: "the client resets meanwhile",
			dead: func(t *testing.T, client, server tcpConn) { write(t, client, []byte("last")); reset(client) },
			after: func(t *testing.T, client, server tcpConn, _ int) {
				wantBytes(t, server, "last")
				wantReset(t, server)
			},
			want: tunnel.DownstreamReset,
		},
		{
			name: "the client has reset before, and the server is slow",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				n := stuffed(t, client)
				reset(client)
				eventually(t, "it is known", func() bool { l := g.set.List(); return len(l) == 1 && l[0].Reason == tunnel.DownstreamReset })
				return n
			},
			dead: func(t *testing.T, client, server tcpConn) {},
			after: func(t *testing.T, client, server tcpConn, n int) {
				got, err := io.Copy(io.Discard, server)
				if int(got) > n || !isReset(err) {
					t.Errorf("%d of %d bytes came, and then %v", got, n, err)
				}
			},
			want: tunnel.DownstreamReset,
		},
		{
			name: "the server resets while bytes wait for it",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				write(t, server, []byte("last"))
				wantBytes(t, client, "last")
				return stuffed(t, client)
			},
			dead: func(t *testing.T, client, server tcpConn) { reset(server) },
			after: func(t *testing.T, client, server tcpConn, _ int) {
				if _, err := io.Copy(io.Discard, client); !isReset(err) {
					t.Errorf("the client read %v", err)
				}
			},
			want: tunnel.UpstreamReset,
		},
		{
			name: "the operator closes it, and the server is slow",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				n := stuffed(t, client)
				g.set.CloseAll(tunnel.Operator, 0)
				wantEOF(t, client)
				return n
			},
			dead: func(t *testing.T, client, server tcpConn) { server.CloseWrite(); client.CloseWrite() },
			after: func(t *testing.T, client, server tcpConn, n int) {
				if got, err := io.Copy(io.Discard, server); err != nil && !isReset(err) || int(got) > n {
					t.Errorf("%d of %d bytes came, and then %v", got, n, err)
				}
			},
			want: tunnel.Operator,
		},
		{
			name: "the operator closes it",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				g.set.CloseAll(tunnel.Operator, 0)
				wantEOF(t, client)
				wantEOF(t, server)
				return 0
			},
			dead: func(t *testing.T, client, server tcpConn) { client.CloseWrite(); server.CloseWrite() },
			want: tunnel.Operator,
		},
		{
			name: "it has ended, and was not withdrawn",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				g.saying(func(string) error { return tunnel.ErrVaultBusy })
				server.Close()
				wantEOF(t, client)
				client.Close()
				eventually(t, "the vault was asked", func() bool { return g.count("withdraw") > 0 })
				return 0
			},
			want: tunnel.UpstreamClosed,
		},
		{
			name: "it was reset, and was not withdrawn",
			before: func(t *testing.T, g *guest, client, server tcpConn) int {
				g.saying(func(string) error { return tunnel.ErrVaultBusy })
				reset(server)
				wantReset(t, client)
				eventually(t, "the vault was asked", func() bool { return g.count("withdraw") > 0 })
				return 0
			},
			want: tunnel.UpstreamReset,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			k := newKeeper(t)
			k.hurry = func(s *tunnel.Set) {
				s.Hurry(time.Second, time.Second, time.Second)
				s.HurryVault(time.Minute, 0, 0)
			}
			g := k.guest(roomy)
			client, down := tcpPair(t, true)
			server, up := tcpPair(t, true)
			g.set.Start(tunnel.Spec{Down: down, Up: up, Origin: lasting(tunnel.Limits{})})
			g.settled()
			waiting := 0
			if test.before != nil {
				waiting = test.before(t, g, client, server)
			}
			g.die()
			if test.dead != nil {
				test.dead(t, client, server)
			}
			r := g.resume(true)
			if test.after != nil {
				test.after(t, client, server, waiting)
			}
			client.Close()
			server.Close()
			waitEmpty(t, r.set)
			if all := k.records(); len(all) != 1 || all[0].Reason != test.want {
				t.Errorf("want %q, records are %+v", test.want, all)
			}
		})
	}
}

func isReset(err error) bool { return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) }

// poke changes words of the memory file of a Set that is dead.
func (g *guest) poke(at int, word uint64) {
	g.t.Helper()
	b := binary.NativeEndian.AppendUint64(nil, word)
	if n, err := unix.Pwrite(g.stores[0].file, b, int64(at)); n != len(b) || err != nil {
		g.t.Fatal(err)
	}
}

// A tunnel of which nobody can say where it was is cut, on both sides. The others live.
func TestATunnelWhoseRemainsContradictThemselvesIsCut(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	k := newKeeper(t)
	k.options = func(o *tunnel.Options) { o.Log = slog.New(slog.NewTextHandler(&log, nil)) }
	g := k.guest(roomy)
	client, server := g.open(tunnel.Spec{ID: "the-bad-one"})
	others := [2]net.Conn{}
	others[0], others[1] = g.open(tunnel.Spec{})
	for _, c := range []net.Conn{client, others[0]} {
		write(t, c, []byte("x"))
	}
	for _, s := range []net.Conn{server, others[1]} {
		wantBytes(t, s, "x")
	}
	g.settled()
	g.die()
	g.poke(counts, 1_000_000) // so many bytes were never given
	r := g.resume(true)
	wantReset(t, client)
	wantReset(t, server)
	write(t, others[0], []byte("y"))
	wantBytes(t, others[1], "y")
	eventually(t, "it is reported", func() bool { return len(k.records()) == 1 })
	if last := k.records()[0]; last.Reason != tunnel.LostInCrash || last.ID != "the-bad-one" {
		t.Errorf("it is %+v", last)
	}
	if !strings.Contains(log.String(), "request_id=the-bad-one") || r.keeps() != 1 {
		t.Errorf("%d are kept, and the log is %s", r.keeps(), &log)
	}
}

// Nobody goes on with a tunnel that has no place.
func TestATunnelWithoutAPlaceIsCut(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	k.options = func(o *tunnel.Options) { o.Log = slog.New(slog.DiscardHandler) }
	g := k.guest(roomy)
	first, server := g.open(tunnel.Spec{})
	second, _ := g.open(tunnel.Spec{})
	third, _ := g.open(tunnel.Spec{})
	g.settled()
	g.die()
	g.kept[1].place.Slot = 2 // the third's
	g.kept[2].place.Slot = 1 << 30
	r := g.resume(true)
	write(t, server, []byte("x"))
	wantBytes(t, first, "x")
	wantReset(t, second)
	wantReset(t, third)
	eventually(t, "two are reported", func() bool { return len(k.records()) == 2 })
	for _, e := range k.records() {
		if e.Reason != tunnel.LostInCrash {
			t.Errorf("one ended as %q", e.Reason)
		}
	}
	if n, _ := r.set.Summary(); n != 1 {
		t.Errorf("%d live", n)
	}
}

// The tunnel that two processes in a row have died of is cut before anything is done with
// it. Nothing is held against it after a death from outside, or a long life.
func TestATunnelThatKillsItsProcessesIsQuarantined(t *testing.T) {
	t.Parallel()
	const working = 64 // in the file's header
	for _, test := range []struct {
		name        string
		second      bool // death from outside
		life        time.Duration
		quarantined bool
	}{
		{"twice", false, time.Hour, true},
		{"killed the second time", true, time.Hour, false},
		{"after a long life", false, 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			k := newKeeper(t)
			k.options = func(o *tunnel.Options) { o.Log = slog.New(slog.DiscardHandler) }
			k.hurry = func(s *tunnel.Set) { s.AbsolveAfter(test.life) }
			g := k.guest(roomy)
			bad, server := g.open(tunnel.Spec{})
			good, _ := g.open(tunnel.Spec{})
			write(t, bad, []byte("poison"))
			wantBytes(t, server, "poison")
			g.settled()
			g.die()
			g.poke(working, 1<<32|1) // the tunnel with number 1, in the first slot
			r := g.resume(false)
			write(t, bad, []byte("more"))
			wantBytes(t, server, "more")
			if test.life == 0 {
				eventually(t, "nobody is suspected", func() bool { return r.word(72) == 0 })
			}
			r.settled()
			r.die()
			r.poke(working, 1<<32|1)
			write(t, bad, []byte("more"))
			last := r.resume(test.second)
			if test.quarantined {
				wantReset(t, bad)
				wantReset(t, server)
				eventually(t, "it is reported", func() bool { return len(k.records()) == 1 })
				if e := k.records()[0]; e.Reason != tunnel.Quarantined || e.Number != 1 {
					t.Errorf("it is %+v", e)
				}
			} else {
				wantBytes(t, server, "more")
			}
			good.Close()
			_ = last
		})
	}
}

// word returns a word of the memory file of a Set.
func (g *guest) word(at int) uint64 {
	b := make([]byte, 8)
	if n, err := unix.Pread(g.stores[0].file, b, int64(at)); n != len(b) || err != nil {
		g.t.Error(err)
	}
	return binary.NativeEndian.Uint64(b)
}

// All buffers but one may be held when a process dies in the middle of a copy: there is
// always one left to relay the others with.
func TestASuccessorHasABufferWhenAllAreHeld(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	g := k.guest(shape{loops: 1, tunnels: 12, buffers: 3})
	var slow []tcpConn
	for range 4 {
		client, down := tcpPair(t, true)
		_, up := tcpPair(t, true)
		g.set.Start(tunnel.Spec{Down: down, Up: up, Origin: lasting(tunnel.Limits{})})
		overfill(t, client)
		slow = append(slow, client)
	}
	client, server := g.open(tunnel.Spec{DownEarly: []byte("x")})
	for range 4 {
		wantBytes(t, server, "x")
		if n := g.set.Buffers(); n > 1 {
			t.Errorf("%d of 3 buffers are held by flows", n)
		}
		g = g.succeed()
		write(t, client, []byte("x"))
	}
	wantBytes(t, server, "x")
	for _, c := range slow {
		reset(c)
	}
}

// A tunnel that is closed since the configuration has no place for it goes within the
// time that was said.
func TestAResumedTunnelMayBeToldToEnd(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	k.sentence = tunnel.Sentence{Ends: tunnel.RouteRemoved, Within: 50 * time.Millisecond}
	g := k.guest(roomy)
	client, server := g.open(tunnel.Spec{})
	r := g.succeed()
	wantEOF(t, client)
	wantEOF(t, server)
	client.Close()
	server.Close()
	waitEmpty(t, r.set)
	if all := k.records(); len(all) != 1 || all[0].Reason != tunnel.RouteRemoved {
		t.Errorf("records are %+v", all)
	}
}
