package proxy

import (
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tunnel"
)

// passer is a generation of which the test is the loop.
func passer(t *testing.T) *generation {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	g := &generation{
		vault: newVault(nil, 0), cfg: new(config.Config), log: log, phase: draining, changed: make(chan struct{}, 1),
		tunnels: tunnel.NewSet(tunnel.Options{Log: log}), registry: metrics.NewRegistry(),
		loops: &loops{streams: []*stream.Loop{streamtest.New(t)}},
	}
	g.handover = newHandover(g)
	l := newListener(config.Listener{Name: "a"}, "key", g.loops.streams, log, nil, g.notice)
	l.serveBy(http1.NewServer(http1.ServerOptions{Scheme: "http", Handler: answers{}, Log: log, Loops: g.loops.streams, Ended: l.ended}))
	g.listeners = []*listener{l}
	g.handover.add(l)
	t.Cleanup(g.handover.close)
	return g
}

// connect has a client that is idle.
func (g *generation) connect(t *testing.T) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	client.SetDeadline(time.Now().Add(20 * time.Second))
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	fd, err := control.DuplicateOf(server.(*net.TCPConn))
	if err != nil {
		t.Fatal(err)
	}
	g.listeners[0].adopt(http1.Idle{FD: fd, Since: time.Now()})
	return client
}

func wantEnd(t *testing.T, client net.Conn) {
	t.Helper()
	if rest, err := io.ReadAll(client); len(rest) > 0 || err != nil {
		t.Errorf("got %q, %v; want a proper end", rest, err)
	}
}

// Nobody waits for ever: not when whoever takes the connections is gone and no other one
// comes, and not when it says nothing.
func TestConnectionsAreNotKeptForATakerThatDoesNotCome(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*generation, *control.Passage){
		"it is gone": func(g *generation, p *control.Passage) {
			if err := p.SendKeys([]string{"key"}); err != nil {
				t.Error(err)
			}
			g.handover.on(<-g.handover.events)
			if g.handover.gives == nil || !g.handover.gives.begun {
				t.Error("nothing is given")
			}
			p.Close()
			g.handover.on(<-g.handover.events)
		},
		"it says nothing": func(*generation, *control.Passage) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := passer(t)
			g.handover.least = 10 * time.Millisecond
			a, b, err := control.Ends()
			if err != nil {
				t.Fatal(err)
			}
			p, err := control.NewPassage(b)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if err := g.handover.give([]int{a}); err != nil {
				t.Fatal(err)
			}
			end(g, p)
			client := g.connect(t)
			<-g.handover.patience.C
			g.handover.losePatience()
			wantEnd(t, client)
		})
	}
}

// Connections that no server has are none that are gone.
func TestAGenerationDoesNotEndWithConnectionsOnTheirWay(t *testing.T) {
	t.Parallel()
	g := passer(t)
	if !g.finished() {
		t.Fatal("something is left")
	}
	g.handover.pending.Add(1)
	if g.finished() {
		t.Error("it ends although connections are not sent")
	}
	g.handover.pending.Add(-1)
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(a)
	g.phase = serving
	if err := g.handover.take([]int{b}); err != nil {
		t.Fatal(err)
	}
	g.phase = draining
	if g.finished() {
		t.Error("it ends although connections may have been given")
	}
	g.handover.stopTaking()
	g.handover.on(<-g.handover.events)
	if !g.finished() {
		t.Error("it does not end")
	}
}

// What is kept free of descriptors is not for connections of others either.
func TestAConnectionIsDeclinedForWhichThereIsNoDescriptor(t *testing.T) {
	t.Parallel()
	g := passer(t)
	g.phase = serving
	d := &descriptors{limit: func() uint64 { return 2 }}
	d.measure()
	g.listeners[0].descriptors = d
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	p, err := control.NewPassage(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.handover.take([]int{b}); err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	if err := p.TrySend([]control.Passed{{Key: "key", FD: fds[0]}}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fds[0])
	p.Close()
	g.handover.on(<-g.handover.events)
	counts := g.handover.metrics[g.listeners[0]]
	if n := counts.declined.Value(); n != 1 || counts.received.Value() != 0 {
		t.Errorf("%d were declined, and %d received", n, counts.received.Value())
	}
	unix.SetNonblock(fds[1], false)
	unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20})
	if n, err := unix.Read(fds[1], make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("it is not closed: %d, %v", n, err)
	}
}

// What a listener at the same address has relayed before, or is to relay now, is no idle
// connection of HTTP.
func TestAListenerThatRelaysTakesNoIdleConnections(t *testing.T) {
	t.Parallel()
	g := passer(t)
	g.phase = serving
	l := newListener(config.Listener{Name: "b"}, "relays", g.loops.streams, g.log, nil, g.notice)
	l.relayBy(new(TCPServer))
	g.listeners = append(g.listeners, l)
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	p, err := control.NewPassage(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.handover.take([]int{a}); err != nil {
		t.Fatal(err)
	}
	if keys, err := p.ReceiveKeys(); err != nil || len(keys) != 1 || keys[0] != "key" {
		t.Errorf("it takes those of %v, %v", keys, err)
	}
	p.Close()
	g.handover.on(<-g.handover.events)
}
