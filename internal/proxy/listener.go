package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
)

// errNoDescriptor says that all descriptors are in use that connections may have.
var errNoDescriptor = errors.New("no descriptor is left for connections: raise the limit of descriptors")

// listener accepts from one of the supervisor's sockets and has its connections
// served. accept and stop are called by the generation's loop, and wait for the first of
// those that serve, which accepts. That one never waits for anybody.
type listener struct {
	cfg     config.Listener
	key     string
	loops   []*stream.Loop // the first one accepts, and all of them serve in turn
	server  server
	passes  bool // its idle connections may go to another generation
	log     *slog.Logger
	notice  func() // tells the generation's loop that the server has no connection any more
	metrics acceptMetrics
	queue   queueMetrics

	// serve has the server serve a connection, on the goroutine of the loop, serve2 one whose
	// client speaks HTTP/2 for certain (nil: nobody does), and goOn one that another server has
	// had.
	serve  func(l *stream.Loop, c stream.Passed, remote netip.AddrPort)
	serve2 func(l *stream.Loop, c stream.Passed, remote netip.AddrPort)
	goOn   func(l *stream.Loop, i http1.Idle)

	heralds     *heralds     // what reads PROXY headers; nil: there are none
	gate        *gate        // what does handshakes of TLS; nil: there are none
	descriptors *descriptors // of the process; nil: there are always enough

	failing, full episode // accepting fails; there is no room

	fd       int      // our copy of the socket; -1: not accepting. Owned by the generation's loop
	acceptor acceptor // owned by the first loop

	// For everybody.
	paused atomic.Bool
	waits  atomic.Bool   // the first loop wants to know when a connection has ended
	open   atomic.Int64  // connections, with those that became tunnels
	turns  atomic.Uint64 // how often open has changed
	serves atomic.Int64  // connections that the server has, or is about to
	dealt  atomic.Uint32 // connections that the loops were given
}

func newListener(cfg config.Listener, key string, loops []*stream.Loop, log *slog.Logger, r *metrics.Registry, notice func()) *listener {
	l := &listener{
		cfg: cfg, key: key, loops: loops, log: log.With("listener", cfg.Name), notice: notice,
		metrics: newAcceptMetrics(r, cfg.Name), queue: newQueueMetrics(r, cfg.Name),
		fd: -1, acceptor: acceptor{aside: accepted{fd: -1}, batches: make([][]accepted, len(loops))},
	}
	l.announced(r)
	return l
}

// server is what has the connections of a listener: an [http1.Server], or what relays them as
// they are. Its methods are as those of the former.
type server interface {
	Drain(idleGrace time.Duration)
	Retire(grace time.Duration)
	Resume()
	HandOver(give func(*stream.Loop, http1.Idle) bool)
	Close()
	Connections() int
	Requests() int
}

// serveBy has connections served by a server, which calls ended.
func (l *listener) serveBy(s *http1.Server) {
	l.server, l.serve, l.goOn, l.passes = s, s.Serve, s.Take, true
}

// relayBy has them relayed by one, which does the same.
func (l *listener) relayBy(s *TCPServer) { l.server, l.serve = s, s.Serve }

// accept begins to accept from fd, which does not block and which the listener owns from
// now on.
func (l *listener) accept(fd int) error {
	setOptions(fd)
	queue, _ := queueOf(fd)
	unset := int(queue)
	if !inherits(fd) {
		unset = math.MaxInt
	}
	var err error
	if !l.onFirst(func() { err = l.begin(fd, unset) }) {
		err = errLoopOver
	}
	if err != nil {
		control.CloseAll([]int{fd})
		return fmt.Errorf("listener %q: %w", l.cfg.Name, err)
	}
	l.fd = fd
	return nil
}

var errLoopOver = errors.New("the loop that accepts has ended")

// stop ends accepting and gives up our copy of the socket. With empty, what is in
// the queue is served first: nobody else will.
func (l *listener) stop(empty bool) {
	if l.fd < 0 {
		return
	}
	done := make(chan struct{})
	if l.loops[0].Post(func() { l.end(empty, done) }) {
		<-done
	}
	control.CloseAll([]int{l.fd})
	l.fd = -1
}

// onFirst calls fn on the first loop and waits for that; false: it has ended.
func (l *listener) onFirst(fn func()) bool {
	done := make(chan struct{})
	posted := l.loops[0].Post(func() {
		defer close(done)
		fn()
	})
	if posted {
		<-done
	}
	return posted
}

// pause holds accepting, or ends that. At most the connection is still accepted that just
// is.
func (l *listener) pause(on bool) {
	l.paused.Store(on)
	if !on {
		l.loops[0].Post(func() { l.happens(resumed) })
	}
}

// adopt has an idle connection served that another process has accepted. It counts as an
// accepted one does, although there may be no room for it. Any goroutine may call it.
func (l *listener) adopt(i http1.Idle) {
	n := l.deal()
	if !l.loops[n].Post(func() { l.goOn(l.loops[n], i) }) {
		l.drop(i.FD)
	}
}

// takeBack is adopt for one that did not get away, on the goroutine of its loop.
func (l *listener) takeBack(on *stream.Loop, i http1.Idle) {
	l.serves.Add(1)
	l.enter()
	l.goOn(on, i)
}

// deal counts a connection that is about to be served, and says on which loop.
func (l *listener) deal() (loop int) {
	l.serves.Add(1)
	l.enter()
	return int(l.dealt.Add(1)-1) % len(l.loops)
}

// drop closes a connection for which there is no loop any more.
func (l *listener) drop(fd int) {
	control.CloseAll([]int{fd})
	l.ended()
}

// ended is called when the server does not have a connection any more.
func (l *listener) ended() {
	last := l.serves.Add(-1) == 0
	l.leave()
	if last {
		l.notice()
	}
}

// connections is how many the server has.
func (l *listener) connections() int { return int(l.serves.Load()) }

// turnover is how many connections and tunnels have begun and ended so far.
func (l *listener) turnover() uint64 { return l.turns.Load() }

// enter and leave count a tunnel among what limits.connections bounds, beside the
// connection that it comes from and that ends for the server.
func (l *listener) enter() {
	l.open.Add(1)
	l.turns.Add(1)
	l.descriptors.count(1)
}

func (l *listener) leave() {
	l.open.Add(-1)
	l.turns.Add(1)
	l.descriptors.count(-1)
	if l.waits.Load() && l.waits.Swap(false) {
		l.loops[0].Post(func() { l.happens(left) })
	}
}

func (l *listener) isFull() bool {
	return l.cfg.Limits.Connections > 0 && l.open.Load() >= int64(l.cfg.Limits.Connections)
}

// report says what of what held up accepting is over. The generation's loop calls it
// now and then.
func (l *listener) report(now time.Time) {
	l.gate.report(now)
	if times, over := l.failing.ends(now); over {
		l.log.Info("accepting works again", "failures", times)
	}
	if l.isFull() { // the loop that accepts waits, and says nothing meanwhile
		l.full.lasts(now)
	}
	if times, over := l.full.ends(now); over {
		l.log.Info("there is room below limits.connections again", "waits", times)
	}
}

// clientKeepAlive finds out about a client that vanished without a word in two minutes. It is
// what tunnels have that are not configured otherwise, so that nothing is to be set again of
// a connection that becomes one.
var clientKeepAlive = stream.KeepAlive{Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// setOptions has the connections that come from a listening socket send at once, be
// probed while nothing is sent, and have urgent bytes in the stream: they inherit that
// (tcp(7)), so no call is needed for each. Those that are in the queue already do not. Of a
// unix socket there is nothing to set.
func setOptions(fd int) {
	for _, option := range []struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(clientKeepAlive.Idle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(clientKeepAlive.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, clientKeepAlive.Count},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
	} {
		_ = unix.SetsockoptInt(fd, option.level, option.name, option.value) // an aid
	}
}

// inherits says whether connections have all that was set of their listening socket. Those of
// one of multipath TCP, which systemd may have passed, have only a part of it.
func inherits(fd int) bool {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && protocol != unix.IPPROTO_MPTCP
}

// signal wakes whoever waits for c, which has room for one value, now or later.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
