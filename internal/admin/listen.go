package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"holdfast/internal/socket"
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

func listenUnix(runtimeDir string) (net.Listener, error) {
	path, err := socketPath(runtimeDir)
	if err != nil {
		return nil, err
	}
	if err := socket.RemoveStale(path); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// The kernel gives the path the mode of the unbound socket, so it is never
	// open to others, whatever the umask.
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error { return unix.Fchmod(fd, 0o600) })
	}}
	return private.Listen(context.Background(), "unix", path)
}

func listenTCP(address netip.AddrPort) (net.Listener, error) {
	var plain net.ListenConfig
	plain.SetMultipathTCP(false) // as every listening socket of this program
	return plain.Listen(context.Background(), "tcp", address.String())
}

// checkPeer lets in who may command: the user of this process, and root. The
// socket's mode says the same; this holds where the mode was changed.
func checkPeer(conn net.Conn) error {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	err = control(raw, func(fd int) (err error) {
		peer, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	})
	if err != nil {
		return fmt.Errorf("peer's credentials: %w", err)
	}
	return mayCommand(peer, os.Geteuid())
}

func mayCommand(peer *unix.Ucred, self int) error {
	if peer.Uid == 0 || int(peer.Uid) == self {
		return nil
	}
	return fmt.Errorf("user %d (pid %d) is neither this service's user nor root", peer.Uid, peer.Pid)
}

// control runs f on the descriptor and returns the first error.
func control(c syscall.RawConn, f func(fd int) error) error {
	var err error
	if outer := c.Control(func(fd uintptr) { err = f(int(fd)) }); outer != nil {
		return outer
	}
	return err
}

// gate is a listener with a bounded number of connections, which lets in only
// whom check lets in. Close also ends an Accept that waits for a place.
type gate struct {
	net.Listener
	check  func(net.Conn) error // nil lets everybody in
	log    *slog.Logger
	places chan struct{}
	closed chan struct{}
	close  func() error
}

func newGate(l net.Listener, check func(net.Conn) error, log *slog.Logger) *gate {
	g := &gate{Listener: l, check: check, log: log, places: make(chan struct{}, maxConnections), closed: make(chan struct{})}
	g.close = sync.OnceValue(func() error {
		close(g.closed)
		return l.Close()
	})
	return g
}

func (g *gate) Close() error { return g.close() }

func (g *gate) Accept() (net.Conn, error) {
	select {
	case g.places <- struct{}{}:
	case <-g.closed:
		return nil, net.ErrClosed
	}
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			<-g.places
			return nil, err
		}
		if g.check != nil {
			if err := g.check(conn); err != nil {
				g.log.Warn("admin connection refused", "err", err)
				conn.Close()
				continue
			}
		}
		return &guest{Conn: conn, leave: sync.OnceFunc(func() { <-g.places })}, nil
	}
}

// guest is a connection that has a place at the gate.
type guest struct {
	net.Conn
	leave func()
}

func (g *guest) Close() error {
	defer g.leave()
	return g.Conn.Close()
}
