// Package admin is the surface through which a running supervisor is seen and
// commanded: HTTP over [supervisor.Commands], and its client.
//
// It is always there on a unix socket in the runtime directory, for the user of
// the service and root only. A configuration may add a TCP address, which shows
// what monitoring needs and changes nothing unless it says so.
//
//	surface := admin.New(log)
//	sup := supervisor.New(supervisor.Options{Admin: surface, …})
//	err := surface.Start(runtimeDir, sup)
//	… sup.Run(ctx) …
//	surface.CloseListeners()
//	surface.Close()
//
// A surface that is to take the place of another process's has its listening sockets
// ([Server.Inherit]) and accepts nothing from them before [Server.Open]; the other one
// gives them up by [Server.Leave]. Whoever connects in between waits.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/supervisor"
)

const (
	// headTimeout and maxHead bound what a peer can hold before it has asked anything.
	headTimeout = 5 * time.Second
	maxHead     = 8 << 10 // net/http adds 4 KiB to it

	idleTimeout  = 30 * time.Second // of a connection between two requests
	writeTimeout = 10 * time.Second // of an answer, from its first byte to its last

	// askTimeout bounds how long a supervisor that is stuck keeps a caller, except
	// where waiting is what the caller asked for.
	askTimeout = 5 * time.Second

	// maxConnections is the most at once, on the socket and on the address each.
	// More wait in the kernel's queue.
	maxConnections = 64

	// restTime is how long a connection without a request keeps its place although
	// another waits for one: a peer that has just come needs a moment to say what it
	// wants.
	restTime = 250 * time.Millisecond

	// closeTimeout bounds how long Close lets answers be written.
	closeTimeout = 3 * time.Second
)

// Server is the admin surface. It implements [supervisor.AdminSurface].
type Server struct {
	log  *slog.Logger
	open sync.WaitGroup

	closing sync.Once
	ending  chan struct{} // closed by Close

	stopping sync.Once // by a POST without now

	// Set once by Start.
	cmds   supervisor.Commands
	unix   *endpoint
	scrape http.Handler

	left atomic.Bool // another process has the sockets

	mu        sync.Mutex
	tcp       *endpoint      // nil: off
	inherited map[string]int // descriptors by key that nothing has used yet
	held      bool           // nothing is accepted
	closed    bool           // no endpoint comes any more
}

// endpoint is a listening socket and the HTTP server on it.
type endpoint struct {
	listener *gate
	http     *http.Server

	// Of TCP only.
	address netip.AddrPort               // as configured; the zero value is the unix socket
	rules   atomic.Pointer[config.Admin] // as the last configuration says; never nil
}

// New returns a server that Start starts.
func New(log *slog.Logger) *Server {
	return &Server{log: log, ending: make(chan struct{})}
}

// Start opens the socket in the runtime directory and answers on it from then on.
// The caller holds the lock of that directory: a socket there on which nobody
// listens is taken for a dead supervisor's and replaced. After an error nothing is
// left to close.
func (s *Server) Start(runtimeDir string, cmds supervisor.Commands) error {
	listener, err := s.takeInherited(keyUnix)
	if listener == nil && err == nil {
		listener, err = listenUnix(runtimeDir)
	}
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	s.cmds, s.scrape = cmds, scrapeHandler(cmds, s.log)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unix = &endpoint{listener: newGate(listener, checkPeer, s.log)}
	s.serve(s.unix)
	return nil
}

// Prepare implements [supervisor.AdminSurface]. Neither commit nor abort blocks.
// It is called between Start and Close. A reload and the mending of a crash may
// overlap: what is committed last holds.
func (s *Server) Prepare(cfg config.Admin) (commit, abort func(), err error) {
	s.mu.Lock()
	now := s.tcp
	s.mu.Unlock()
	switch {
	case !cfg.HTTP.IsValid():
		return func() { s.swap(nil) }, func() {}, nil
	case now != nil && now.address == cfg.HTTP:
		return func() { s.keep(now, cfg) }, func() {}, nil
	}
	next, err := s.listen(cfg)
	if err != nil {
		if now != nil && now.address.Port() == cfg.HTTP.Port() && errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w: %s is still open and overlaps; turn admin.http off with one reload, then on again with the next", err, now.address)
		}
		return nil, nil, fmt.Errorf("admin.http: %w", err)
	}
	return func() { s.swap(next) }, func() { next.listener.Close() }, nil
}

func (s *Server) listen(cfg config.Admin) (*endpoint, error) {
	listener, err := s.takeInherited(keyTCP(cfg.HTTP))
	if listener == nil && err == nil {
		listener, err = listenTCP(cfg.HTTP)
	}
	if err != nil {
		return nil, err
	}
	e := &endpoint{listener: newGate(listener, nil, s.log), address: cfg.HTTP}
	e.rules.Store(&cfg)
	return e, nil
}

// keep leaves the TCP endpoint as it is, but for what may be done there. One that
// another commit has put away meanwhile is opened again.
func (s *Server) keep(e *endpoint, cfg config.Admin) {
	s.mu.Lock()
	still := s.tcp == e
	s.mu.Unlock()
	if still {
		e.rules.Store(&cfg)
		return
	}
	again, err := s.listen(cfg)
	if err != nil {
		s.log.Error("the admin address is lost until the next reload", "address", cfg.HTTP.String(), "err", err)
		return
	}
	s.swap(again)
}

// swap puts next in the place of the TCP endpoint. The old one ends in the background.
func (s *Server) swap(next *endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.tcp; old != nil {
		old.listener.Close()
		s.open.Go(old.finish)
		s.log.Info("admin address closed", "address", old.listener.Addr().String())
	}
	s.tcp = nil
	if next == nil {
		return
	}
	if s.closed {
		next.listener.Close()
		return
	}
	s.tcp = next
	s.serve(next)
	actions := next.rules.Load().AllowActions
	s.log.Info("admin address open", "address", next.listener.Addr().String(), "actions", actions)
	if actions && !next.address.Addr().IsLoopback() {
		s.log.Warn("whoever reaches the admin address can command this service", "address", next.listener.Addr().String())
	}
}

// serve is called with mu held.
func (s *Server) serve(e *endpoint) {
	if s.held {
		e.listener.hold()
	}
	e.http = &http.Server{
		Handler:                      s.handler(e),
		ReadHeaderTimeout:            headTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHead,
		DisableGeneralOptionsHandler: true,
		ConnState:                    follow,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.open.Go(func() {
		if err := e.http.Serve(e.listener); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.log.Error("admin surface ended", "address", e.listener.Addr().String(), "err", err)
		}
	})
}

// finish waits for the answers that are on their way, and cuts those that take too long.
func (e *endpoint) finish() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if e.http.Shutdown(ctx) != nil {
		e.http.Close()
	}
}

// CloseListeners removes the socket and closes the address: from here on a
// command finds that no supervisor runs. Open connections are left to Close, so
// that what must happen before a caller hears of the end can happen in between.
func (s *Server) CloseListeners() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.unix.listener.Close()
	if s.tcp != nil {
		s.tcp.listener.Close()
	}
}

// Leave is CloseListeners where another process has the same sockets and goes on: the
// path stays, and whoever waits for the end of the service learns that it has not come.
func (s *Server) Leave() {
	s.left.Store(true)
	setRemovesPath(s.unix.listener, false)
	s.CloseListeners()
}

// Close tells those who wait for the end of the service that it has come, and
// returns when every answer is written, cut after a few seconds at most. The
// supervisor has ended before: what is asked of it still is refused by itself.
// Closing again only waits.
func (s *Server) Close() {
	s.CloseListeners()
	s.closing.Do(func() {
		close(s.ending)
		s.open.Go(s.unix.finish)
		s.mu.Lock()
		if s.tcp != nil {
			s.open.Go(s.tcp.finish)
		}
		s.mu.Unlock()
		s.open.Wait()
	})
}
