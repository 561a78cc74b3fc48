package upstream

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// Conn is a connection to an endpoint that carries one exchange after another. It lives on
// one loop, whose goroutine does all with it.
type Conn interface {
	// Exchange begins the next exchange. It fails if the connection is closed.
	Exchange() (exchange.Upstream, error)

	// Alive says of an idle connection whether it is still open and silent.
	// Bytes that nobody asked for make it unusable. It does not block.
	Alive() bool

	// Close closes the connection, unless a tunnel took it.
	Close()
}

// Endpoint is one address that takes requests. Its methods may be called on any loop.
type Endpoint struct {
	Cluster string         // the name of its cluster
	Address string         // as configured
	Addr    netip.AddrPort // where it is; zero for a unix socket
	Path    string         // of a unix socket

	Tunnels TunnelMetrics // of those to it

	name           string // see String
	cluster        *Cluster
	connectTimeout time.Duration
	network        Network
	pools          []pool // one a loop
	metrics        endpointMetrics
}

func newEndpoint(cluster *Cluster, c *config.Cluster, address string, at place, r *metrics.Registry, loops int, network Network) *Endpoint {
	name := "unix:" + at.path
	if at.path == "" {
		name = at.addr.String()
	}
	return &Endpoint{
		Cluster:        c.Name,
		Address:        address,
		Addr:           at.addr,
		Path:           at.path,
		Tunnels:        NewTunnelMetrics(r, c.Name, address),
		name:           name,
		cluster:        cluster,
		connectTimeout: c.ConnectTimeout,
		network:        network,
		pools:          newPools(loops, c.IdleTimeout),
		metrics:        newEndpointMetrics(r, c.Name, address),
	}
}

// ConnectError says that an endpoint could not be connected to. Nothing was sent.
type ConnectError struct {
	Endpoint string // as [Endpoint.String] has it
	Timeout  bool   // there was no answer in time, from our clock or the kernel's
	Err      error
}

func (e *ConnectError) Error() string { return "connect to " + e.Endpoint + ": " + e.Err.Error() }
func (e *ConnectError) Unwrap() error { return e.Err }

// String names the endpoint for logs: the address in numbers, or the path.
func (e *Endpoint) String() string { return e.name }

// Attempt is one attempt to connect, which may be given up while it waits. The zero value
// is ready, and it may be used for one attempt after the other until it was cancelled.
type Attempt struct {
	err   error
	waits Interrupter
}

// An Interrupter is what waits for a connection: Interrupt has that fail with err. It is
// a *http1.Conn, or what a test has in its place.
type Interrupter interface{ Interrupt(err error) }

// Cancel has the attempt that is under way, and every later one, fail with err. It is
// called on the loop's goroutine, and does not wait.
func (a *Attempt) Cancel(err error) {
	if a.err != nil {
		return
	}
	a.err = err
	if a.waits != nil {
		a.waits.Interrupt(err)
	}
}

// Err returns what the attempt was cancelled with, or nil.
func (a *Attempt) Err() error { return a.err }

// Wait says what is to be interrupted when the attempt is cancelled, for [Network.Connect];
// nil: nothing any more.
func (a *Attempt) Wait(i Interrupter) { a.waits = i }

// Get begins an exchange on the connection of l that became idle last, or on a new one
// if none is alive, for which it waits. The connection is kept afterwards if it can be.
// Errors are *[ConnectError], or what a was cancelled with.
func (e *Endpoint) Get(t *task.Task, l *stream.Loop, a *Attempt) (exchange.Upstream, error) {
	if a.err != nil {
		return nil, a.err
	}
	p := &e.pools[l.Index]
	for conn := p.take(); conn != nil; conn = p.take() {
		if up, err := conn.Exchange(); err == nil {
			return up, nil
		}
		conn.Close()
	}
	return e.begin(t, l, a, p)
}

// Fresh is Get on a new connection always.
func (e *Endpoint) Fresh(t *task.Task, l *stream.Loop, a *Attempt) (exchange.Upstream, error) {
	return e.begin(t, l, a, &e.pools[l.Index])
}

// Dial is Fresh for upgrades: the connection carries this exchange and is never
// kept.
func (e *Endpoint) Dial(t *task.Task, l *stream.Loop, a *Attempt) (exchange.Upstream, error) {
	return e.begin(t, l, a, nil)
}

func (e *Endpoint) begin(t *task.Task, l *stream.Loop, a *Attempt, p *pool) (exchange.Upstream, error) {
	conn, err := e.connect(t, l, a, p)
	if err != nil {
		return nil, err
	}
	up, err := conn.Exchange()
	if err != nil {
		conn.Close()
		return nil, &ConnectError{Endpoint: e.String(), Err: err}
	}
	return up, nil
}

// connect makes a connection, which is kept in p afterwards; nil: nowhere.
func (e *Endpoint) connect(t *task.Task, l *stream.Loop, a *Attempt, p *pool) (Conn, error) {
	if a.err != nil {
		return nil, a.err
	}
	network, address := "tcp", e.name
	if e.Path != "" {
		network, address = "unix", e.Path
	}
	var until time.Time
	if e.connectTimeout > 0 {
		until = l.Now().Add(e.connectTimeout)
	}
	if p != nil {
		p.loop = l
	}
	life := &life{e: e, pool: p, since: time.Now()}
	conn, err := e.network.Connect(t, l, network, address, until, a, Owner{
		Idle: life.idle, Ended: life.ended, Taken: life.taken, Traffic: &e.cluster.metrics.traffic,
	})
	a.Wait(nil)
	switch {
	case err == nil:
		life.connected(conn)
		if a.err == nil {
			return conn, nil
		}
		conn.Close() // both have come at once
		return nil, a.err
	case a.err != nil:
		return nil, a.err
	}
	// The kernel has a limit of its own (ETIMEDOUT, after two minutes by default).
	timeout := isTimeout(err)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("no answer within %v", e.connectTimeout)
	}
	life.failed(timeout)
	return nil, &ConnectError{Endpoint: e.String(), Timeout: timeout, Err: err}
}

func isTimeout(err error) bool {
	n, ok := errors.AsType[net.Error](err)
	return ok && n.Timeout()
}
