package proxy

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// answers is a handler that answers at once.
type answers struct{}

func (answers) Serve(t *task.Task, e exchange.Exchange) {
	if e.Respond(&exchange.Response{Status: 200}) == nil {
		_ = e.Finish(t, nil)
	}
}

// hold has l accept from a new socket, but for want of room only once its queue is
// emptied.
func hold(t *testing.T, l *listener) net.Listener {
	t.Helper()
	socket, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	l.enter()
	if err := l.accept(copyOf(t, socket)); err != nil {
		t.Fatal(err)
	}
	return socket
}

// A client that came from an emptied queue before the servers knew of the drain kept
// its connection, for which nobody was left to answer but a process that ends.
func TestWhoComesFromAnEmptiedQueueHearsThatItsAnswerIsTheLast(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*generation){
		"by a drain": func(g *generation) { g.drain([]string{"a"}, 0, 0) },
		"by a stop":  func(g *generation) { g.stop(time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log := slog.New(slog.DiscardHandler)
			cfg := new(config.Config)
			cfg.Drain.IdleGrace = time.Hour
			g := &generation{
				vault: newVault(nil, 0), clusters: new(upstream.Clusters),
				cfg: cfg, log: log, phase: serving, changed: make(chan struct{}, 1), sockets: map[string]int{},
				tunnels: tunnel.NewSet(tunnel.Options{Log: log}), limit: time.NewTimer(time.Hour),
			}
			g.handover = newHandover(g)
			for _, key := range []string{"a", "b"} {
				loops := []*stream.Loop{streamtest.New(t)} // its own
				cfg := config.Listener{Name: key, Limits: config.ListenerLimits{Connections: 1}}
				l := newListener(cfg, key, loops, log, nil, g.notice)
				l.serveBy(http1.NewServer(http1.ServerOptions{Scheme: "http", Handler: answers{}, Log: log, Loops: loops, Ended: l.ended}))
				g.listeners = append(g.listeners, l)
			}
			waiting, other := g.listeners[0], g.listeners[1]
			socket := hold(t, waiting)
			hold(t, other)
			conn, err := net.Dial("tcp", socket.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")

			// The other listener takes its time until the client has its answer.
			answered := make(chan string, 1)
			other.loops[0].Post(func() {
				buf := make([]byte, 1<<10)
				n, _ := io.ReadAtLeast(conn, buf, 1) // an answer is one write
				answered <- string(buf[:n])
			})
			end(g)
			if got := <-answered; !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.Contains(got, "Connection: close\r\n") {
				t.Errorf("got %q", got)
			}
			conn.Close()
			for waiting.connections() > 0 {
				<-g.changed
			}
		})
	}
}
