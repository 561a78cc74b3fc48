package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// socketPath returns the path of the admin socket. The kernel takes no path of
// 108 bytes or more (unix(7), sun_path).
func socketPath(runtimeDir string) (string, error) {
	path := filepath.Join(runtimeDir, "admin.sock")
	if most := len(unix.RawSockaddrUnix{}.Path) - 1; len(path) > most {
		return "", fmt.Errorf("%s: a unix socket's path has at most %d bytes; choose a shorter runtime directory", path, most)
	}
	return path, nil
}

func listenUnix(runtimeDir string) (listener, error) {
	path, err := socketPath(runtimeDir)
	if err != nil {
		return nil, err
	}
	if err := control.RemoveStale(path); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// The kernel gives the path the mode of the unbound socket, so it is never
	// open to others, whatever the umask.
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		outer := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(outer, err)
	}}
	l, err := private.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

func listenTCP(address netip.AddrPort) (listener, error) {
	var plain net.ListenConfig
	plain.SetMultipathTCP(false) // as every listening socket of this program
	l, err := plain.Listen(context.Background(), "tcp", address.String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// checkPeer lets in who may command.
func checkPeer(conn net.Conn) error {
	_, err := control.Peer(conn.(syscall.Conn))
	return err
}

// listener is a listening socket of either kind.
type listener interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

// takeOver makes a listener of a descriptor, which it closes. Unlike one that was
// opened here, it does not remove the path of a unix socket when it is closed.
func takeOver(fd int) (listener, error) {
	f := os.NewFile(uintptr(fd), "admin listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return l.(listener), nil // TCP and unix sockets are
}

// gate is a listener with a bounded number of connections, which lets in only
// whom check lets in. Where all places are taken, the connection that has gone the
// longest without a whole request gives up its own: whoever opens connections and
// says nothing keeps no health check out. Those that are being answered keep their
// places. Close also ends an Accept that waits for a place, or while the gate is held.
type gate struct {
	listener
	check   func(net.Conn) error // nil lets everybody in
	log     *slog.Logger
	closed  chan struct{}
	close   func() error
	changed chan struct{} // has an element after a guest has left or come to rest

	mu     sync.Mutex
	guests []*guest      // those that rest in the order in which they came to
	opens  chan struct{} // closed when the gate is held no more; nil: it is not held
}

func newGate(l listener, check func(net.Conn) error, log *slog.Logger) *gate {
	g := &gate{listener: l, check: check, log: log, closed: make(chan struct{}), changed: make(chan struct{}, 1)}
	g.close = sync.OnceValue(func() error {
		close(g.closed)
		return l.Close()
	})
	return g
}

func (g *gate) Close() error { return g.close() }

// hold leaves whoever comes in the kernel's queue until open.
func (g *gate) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opens == nil {
		g.opens = make(chan struct{})
		_ = g.SetDeadline(time.Unix(1, 0)) // fails for a closed one only
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opens != nil {
		_ = g.SetDeadline(time.Time{}) // fails for a closed one only
		close(g.opens)
		g.opens = nil
	}
}

// awaitOpen says false if the gate is closed before it is open.
func (g *gate) awaitOpen() bool {
	g.mu.Lock()
	opens := g.opens
	g.mu.Unlock()
	if opens == nil {
		return true
	}
	select {
	case <-opens:
		return true
	case <-g.closed:
		return false
	}
}

// Accept is called by one goroutine, that of http.Server.
func (g *gate) Accept() (net.Conn, error) {
	for {
		conn, err := g.listener.Accept()
		if errors.Is(err, os.ErrDeadlineExceeded) && g.awaitOpen() {
			continue
		}
		if err != nil {
			return nil, err
		}
		if g.check != nil {
			if err := g.check(conn); err != nil {
				g.log.Warn("admin connection refused", "err", err)
				conn.Close()
				continue
			}
		}
		c := &guest{Conn: conn, gate: g, resting: time.Now()}
		if !g.admit(c) {
			conn.Close()
			return nil, net.ErrClosed
		}
		return c, nil
	}
}

// admit waits for a place. It says false if the gate is closed before there is one.
func (g *gate) admit(c *guest) bool {
	for {
		wait := g.enter(c)
		if wait <= 0 {
			return true
		}
		select {
		case <-g.changed:
		case <-time.After(wait):
		case <-g.closed:
			return false
		}
	}
}

// enter gives c a place and returns 0, or returns after which time to try again.
func (g *gate) enter(c *guest) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.guests) == maxConnections {
		i := slices.IndexFunc(g.guests, func(o *guest) bool { return !o.busy })
		if i < 0 {
			return math.MaxInt64 // until something changes
		}
		longest := g.guests[i]
		if left := restTime - time.Since(longest.resting); left > 0 {
			return left
		}
		g.guests = slices.Delete(g.guests, i, i+1)
		longest.Conn.Close()
	}
	g.guests = append(g.guests, c)
	return 0
}

func (g *gate) leave(c *guest) {
	g.mu.Lock()
	g.guests = slices.DeleteFunc(g.guests, func(o *guest) bool { return o == c })
	g.mu.Unlock()
	g.change()
}

func (g *gate) change() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// guest is a connection that has a place at the gate, until it is closed or
// another needs the place more.
type guest struct {
	net.Conn
	gate *gate

	// Guarded by gate.mu.
	busy    bool      // a request is being answered
	resting time.Time // since when not
}

func (c *guest) Close() error {
	defer c.gate.leave(c)
	return c.Conn.Close()
}

// follow is http.Server's ConnState. A connection is called active when the head of
// a request has been read, and idle when all of the answer has been written.
func follow(conn net.Conn, state http.ConnState) {
	c := conn.(*guest)
	switch state {
	case http.StateActive:
		c.gate.mu.Lock()
		c.busy = true
		c.gate.mu.Unlock()
	case http.StateIdle:
		c.gate.rest(c)
	}
}

// rest notes that c has been answered.
func (g *gate) rest(c *guest) {
	g.mu.Lock()
	c.busy, c.resting = false, time.Now()
	if i := slices.Index(g.guests, c); i >= 0 {
		g.guests = append(slices.Delete(g.guests, i, i+1), c)
	}
	g.mu.Unlock()
	g.change()
}
