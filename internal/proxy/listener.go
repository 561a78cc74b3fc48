package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
)

// acceptPause is the wait after accept failed for want of descriptors or memory.
const acceptPause = 200 * time.Millisecond

// errNoDescriptor says that all descriptors are in use that connections may have.
var errNoDescriptor = errors.New("no descriptor is left for connections: raise the limit of descriptors")

// listener accepts from one of the supervisor's sockets and has its connections
// served. accept and stop are called by the generation's loop.
type listener struct {
	cfg     config.Listener
	key     string
	server  *http1.Server
	log     *slog.Logger
	notice  func() // tells the loop that a connection has ended
	metrics acceptMetrics
	queue   queueMetrics

	descriptors *descriptors // of the process; nil: there are always enough

	failing, full episode // accepting fails; there is no room

	// Owned by the generation's loop.
	fd      int           // our copy of the socket; -1: not accepting
	stopped chan struct{} // closed by stop
	loop    sync.WaitGroup

	mu     sync.Mutex
	ln     net.Listener  // the same socket in Go's netpoller; nil: not accepting
	open   int           // connections, with those that became tunnels
	turns  uint64        // how often open has changed
	serves int           // connections that the server has
	room   chan struct{} // has a value when a place may have become free
	paused bool
	resume chan struct{} // has a value when paused may have ended
}

func newListener(cfg config.Listener, key string, server *http1.Server, log *slog.Logger, r *metrics.Registry, notice func()) *listener {
	return &listener{
		cfg: cfg, key: key, server: server, log: log.With("listener", cfg.Name), notice: notice,
		metrics: newAcceptMetrics(r, cfg.Name), queue: newQueueMetrics(r, cfg.Name),
		fd: -1, room: make(chan struct{}, 1), resume: make(chan struct{}, 1),
	}
}

// accept begins to accept from fd, which the listener owns from now on.
func (l *listener) accept(fd int) error {
	// The socket is non-blocking, and os.File leaves it so: it only clears
	// O_NONBLOCK in Fd where it has set it itself.
	f := os.NewFile(uintptr(fd), l.key)
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return errors.Join(fmt.Errorf("listener %q: %w", l.cfg.Name, err), f.Close())
	}
	ln, err := net.FileListener(f)
	if err = errors.Join(err, f.Close()); err != nil {
		control.CloseAll([]int{dup})
		return fmt.Errorf("listener %q: %w", l.cfg.Name, err)
	}
	l.mu.Lock()
	l.ln = ln
	l.mu.Unlock()
	stopped := make(chan struct{})
	l.fd, l.stopped = dup, stopped
	l.loop.Go(func() { l.acceptLoop(ln, stopped) })
	return nil
}

// stop ends accepting and gives up our copies of the socket. With empty, what is in
// the queue is served first: nobody else will.
func (l *listener) stop(empty bool) {
	if l.fd < 0 {
		return
	}
	close(l.stopped)
	l.mu.Lock()
	l.ln.Close()
	l.ln = nil
	l.mu.Unlock()
	l.loop.Wait()
	for empty {
		fd, _, err := unix.Accept4(l.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err == nil && !l.descriptors.allow(fd) {
			control.CloseAll([]int{fd})
			err = errNoDescriptor
		}
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				l.log.Error("connections in the queue are lost", "err", err)
			}
			break
		}
		f := os.NewFile(uintptr(fd), "accepted")
		if conn, err := net.FileConn(f); err == nil {
			l.serve(conn)
		}
		f.Close()
	}
	control.CloseAll([]int{l.fd})
	l.fd = -1
}

func (l *listener) acceptLoop(ln net.Listener, stopped <-chan struct{}) {
	for l.awaitTurn(stopped) {
		conn, err := ln.Accept()
		switch {
		case err == nil:
			l.serve(l.settle(conn, stopped))
		case errors.Is(err, net.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded): // paused
		case errors.Is(err, unix.ECONNABORTED): // it went away in the queue
		default:
			l.awaitMeans(err, stopped)
		}
	}
}

// awaitMeans waits a moment for what err says is wanting, and says so once. It returns
// false when the listener stops.
func (l *listener) awaitMeans(err error, stopped <-chan struct{}) bool {
	l.metrics.failures.Inc()
	if l.failing.comesUp(time.Now()) {
		l.log.Error("cannot accept; connections wait in the queue", "err", err)
	}
	select {
	case <-time.After(acceptPause):
	case <-l.room: // a connection has ended
	case <-stopped:
		return false
	}
	return true
}

// settle brings conn, which was accepted, to a descriptor that connections may have.
// While there is none it waits, and so does who stands behind conn in the queue. One
// is then free below: room was made there.
func (l *listener) settle(conn net.Conn, stopped <-chan struct{}) net.Conn {
	for !l.descriptors.allowConn(conn) {
		if !l.awaitMeans(errNoDescriptor, stopped) {
			break // served where it is: nobody else will
		}
		if again, err := duplicate(conn); err == nil {
			conn.Close()
			conn = again
		}
	}
	return conn
}

// awaitTurn blocks while there is no room for a connection or accepting is paused.
// It says false when the listener stops.
func (l *listener) awaitTurn(stopped <-chan struct{}) bool {
	held := false // for want of room
	for {
		l.mu.Lock()
		full := l.fullLocked()
		paused := l.paused
		l.mu.Unlock()
		switch {
		case paused:
			select {
			case <-l.resume:
			case <-stopped:
				return false
			}
		case full:
			if !held { // room may hold a value of before, and what wakes us be gone again
				held = true
				l.countFull()
			}
			select {
			case <-l.room:
			case <-stopped:
				return false
			}
		case !l.descriptors.room():
			if !l.awaitMeans(errNoDescriptor, stopped) {
				return false
			}
		default:
			return true
		}
	}
}

// countFull counts that accepting is held up because there is no room.
func (l *listener) countFull() {
	l.metrics.limitReached.Inc()
	if l.full.comesUp(time.Now()) {
		l.log.Warn("limits.connections is reached; connections wait in the queue", "limit", l.cfg.Limits.Connections)
	}
}

// report says what of what held up accepting is over. The generation's loop calls it
// now and then.
func (l *listener) report(now time.Time) {
	if times, over := l.failing.ends(now); over {
		l.log.Info("accepting works again", "failures", times)
	}
	l.mu.Lock()
	full := l.fullLocked()
	l.mu.Unlock()
	if full { // the accept loop waits, and says nothing meanwhile
		l.full.lasts(now)
	}
	if times, over := l.full.ends(now); over {
		l.log.Info("there is room below limits.connections again", "waits", times)
	}
}

func (l *listener) fullLocked() bool {
	return l.cfg.Limits.Connections > 0 && l.open >= l.cfg.Limits.Connections
}

// pause holds accepting, or ends that.
func (l *listener) pause(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = on
	d, ok := l.ln.(interface{ SetDeadline(time.Time) error })
	switch {
	case !ok:
	case on:
		_ = d.SetDeadline(time.Unix(1, 0)) // fails only when the listener is closed
	default:
		_ = d.SetDeadline(time.Time{})
		signal(l.resume)
	}
}

// serve has the server serve conn in a goroutine that the connection owns.
func (l *listener) serve(conn net.Conn) {
	d := exchange.Downstream{Listener: l.cfg.Name, Remote: addrPort(conn.RemoteAddr()), Local: addrPort(conn.LocalAddr())}
	l.mu.Lock()
	l.open++
	l.turns++
	l.serves++
	l.mu.Unlock()
	l.descriptors.count(1)
	go func() {
		l.server.Serve(conn, d)
		l.mu.Lock()
		l.serves--
		l.mu.Unlock()
		l.leave()
		l.notice()
	}()
}

// connections is how many the server has.
func (l *listener) connections() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.serves
}

// turnover is how many connections and tunnels have begun and ended so far.
func (l *listener) turnover() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.turns
}

// enter and leave count a tunnel among what limits.connections bounds, beside the
// connection that it comes from and that ends for the server.
func (l *listener) enter() {
	l.mu.Lock()
	l.open++
	l.turns++
	l.mu.Unlock()
	l.descriptors.count(1)
}

func (l *listener) leave() {
	l.mu.Lock()
	l.open--
	l.turns++
	l.mu.Unlock()
	l.descriptors.count(-1)
	signal(l.room)
}

// signal wakes whoever waits for c, which has room for one value, now or later.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// addrPort is the zero value for a unix socket.
func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
