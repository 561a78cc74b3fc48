package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// Conn is a connection to an endpoint that carries one exchange after another.
type Conn interface {
	// Exchange begins the next exchange. It fails if the connection is closed.
	Exchange() (exchange.Upstream, error)

	// Alive says of an idle connection whether it is still open and silent.
	// Bytes that nobody asked for make it unusable. It does not block.
	Alive() bool

	// Close closes the connection, unless a tunnel took it.
	Close() error
}

// Endpoint is one address that takes requests. Its methods may be called by any
// number of goroutines.
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
	pool           pool
	metrics        endpointMetrics
}

func newEndpoint(cluster *Cluster, c *config.Cluster, address string, at place, r *metrics.Registry, network Network) *Endpoint {
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
		pool:           pool{idleTimeout: c.IdleTimeout},
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

// Get begins an exchange on the connection that became idle last, or on a new one
// if none is alive. The connection is kept afterwards if it can be. Errors are
// *[ConnectError], or ctx's cause once ctx is done. ctx bounds the connecting
// only.
func (e *Endpoint) Get(ctx context.Context) (exchange.Upstream, error) {
	for conn := e.pool.take(); conn != nil; conn = e.pool.take() {
		if up, err := conn.Exchange(); err == nil {
			return up, nil
		}
		conn.Close()
	}
	return e.Fresh(ctx)
}

// Fresh is Get on a new connection always.
func (e *Endpoint) Fresh(ctx context.Context) (exchange.Upstream, error) {
	return e.begin(ctx, e.pool.put)
}

// Dial is Fresh for upgrades: the connection carries this exchange and is never
// kept.
func (e *Endpoint) Dial(ctx context.Context) (exchange.Upstream, error) {
	return e.begin(ctx, func(c Conn) { c.Close() })
}

func (e *Endpoint) begin(ctx context.Context, idle func(Conn)) (exchange.Upstream, error) {
	conn, err := e.connect(ctx, idle)
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

func (e *Endpoint) connect(ctx context.Context, idle func(Conn)) (Conn, error) {
	network, address := "tcp", e.name
	if e.Path != "" {
		network, address = "unix", e.Path
	}
	bounded, cancel := ctx, context.CancelFunc(func() {})
	if e.connectTimeout > 0 {
		bounded, cancel = context.WithTimeout(ctx, e.connectTimeout)
	}
	defer cancel()
	life := &life{e: e, since: time.Now()}
	conn, err := e.network.Connect(bounded, network, address, Owner{
		Idle: idle, Ended: life.ended, Taken: life.taken,
		Received: e.cluster.metrics.received, Sent: e.cluster.metrics.sent,
	})
	if err == nil {
		life.connected()
		return conn, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	// The kernel has a limit of its own (ETIMEDOUT, after two minutes by default).
	timeout := isTimeout(err)
	if bounded.Err() != nil {
		timeout, err = true, fmt.Errorf("no answer within %v", e.connectTimeout)
	}
	life.failed(timeout)
	return nil, &ConnectError{Endpoint: e.String(), Timeout: timeout, Err: err}
}

func isTimeout(err error) bool {
	n, ok := errors.AsType[net.Error](err)
	return ok && n.Timeout()
}
