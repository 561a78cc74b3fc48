package proxy

import (
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// switches is a handler that looks, once it has the connection, whether its generation
// would end.
type switches struct {
	g     *generation
	found chan error
}

func (h switches) Serve(_ *task.Task, x exchange.Exchange) {
	p, _, err := x.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
	if err != nil {
		h.found <- err
		return
	}
	defer p.Close(x.Loop())
	// Here the manager makes its records, and then starts the tunnel.
	select {
	case <-h.g.changed:
		err = fmt.Errorf("the generation is told that something has ended")
	default:
		if h.g.finished() {
			err = fmt.Errorf("the generation would end")
		}
	}
	h.found <- err
}

// The last connection of a generation becomes a tunnel: there is no moment between.
func TestAGenerationDoesNotEndBeforeATunnelBegins(t *testing.T) {
	t.Parallel()
	g := passer(t)
	h := switches{g, make(chan error, 1)}
	l := newListener(config.Listener{Name: "a"}, "key", g.loops.streams, g.log, nil, g.notice)
	l.serveBy(http1.NewServer(http1.ServerOptions{Scheme: "http", Handler: h, Log: g.log, Loops: g.loops.streams, Ended: l.ended}))
	g.listeners = []*listener{l}
	g.handover.add(l)
	fmt.Fprint(g.connect(t), "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
	select {
	case err := <-h.found:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("no request has come")
	}
}

// An urgent mark on an idle connection is no request: it holds nothing, and is given away.
func TestAnUrgentMarkHoldsNothing(t *testing.T) {
	t.Parallel()
	g := passer(t)
	c := g.connect(t)
	sendUrgent(t, c)
	on := g.loops.streams[0]
	inLoop := func(fn func()) {
		done := make(chan struct{})
		on.Post(func() { fn(); close(done) })
		<-done
	}
	live := -1
	for end := time.Now().Add(10 * time.Second); live != 0 && time.Now().Before(end); {
		inLoop(func() { live = on.Tasks.Live() })
	}
	offered := make(chan struct{}, 4)
	g.listeners[0].server.HandOver(func(*stream.Loop, http1.Idle) bool { offered <- struct{}{}; return false })
	inLoop(func() {})
	if live != 0 || len(offered) != 1 {
		t.Errorf("%d tasks live, %d connections were offered", live, len(offered))
	}
	g.listeners[0].server.HandOver(nil)
}

func sendUrgent(t *testing.T, c net.Conn) {
	t.Helper()
	r, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	outer := r.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
	if outer != nil || err != nil {
		t.Fatal(outer, err)
	}
}
