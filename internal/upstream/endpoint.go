package upstream

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"holdfast/internal/clienttls"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/upstream/balance"
	"holdfast/internal/upstream/outlier"
)

// Conn is a connection to an endpoint that carries one exchange after another. It lives on
// one loop, whose goroutine does all with it.
type Conn interface {
	// Exchange begins the next exchange. It fails if the connection is closed.
	Exchange() (exchange.Upstream, error)

	// Alive says of an idle connection whether it is still open and silent.
	// Bytes that nobody asked for make it unusable. It does not block.
	Alive() bool

	// PassOn gives up a connection that carries nothing, for a tunnel: its socket is still
	// on the loop, and the caller's.
	PassOn() (stream.Passed, error)

	// Close closes the connection, unless a tunnel took it.
	Close()
}

// Endpoint is one address that takes requests. Its methods may be called on any loop.
type Endpoint struct {
	Cluster string         // the name of its cluster
	Address string         // as configured
	Addr    netip.AddrPort // where it is; zero for a unix socket, and for a name with whatever addresses it has
	Path    string         // of a unix socket

	Tunnels TunnelMetrics // of those to it

	name       string // see String
	cluster    *Cluster
	options    config.EndpointOptions           // owned by cluster.mu
	kept       bool                             // it stays known, whatever becomes of it; owned by cluster.mu
	starts                                      // owned by cluster.mu
	addresses  atomic.Pointer[[]netip.AddrPort] // see Addresses
	host       balance.Host
	health     *endpointHealth // nil: it is not checked
	conditions atomic.Uint32   // Condition; changed with cluster.mu
	outlier    *outlier.Host   // nil: it is not looked after
	peer       *clienttls.Peer // nil: it is not spoken to by TLS
	pools      []pool          // one a loop, for each priority that is used: see pool
	streams    []*streams      // one for each priority that is used; nil: HTTP/2 is not spoken
	plain      atomic.Bool     // ALPN has said HTTP/1.1 last
	figures    figures
	metrics    endpointMetrics
}

// newEndpoint returns one that is no member.
func newEndpoint(c *Cluster, id identity) *Endpoint {
	e := &Endpoint{
		Cluster: c.Name,
		Address: id.address,
		Addr:    id.at.Addr,
		Path:    id.at.Path,
		name:    id.at.String(),
		cluster: c,
		pools:   c.newPools(),
		metrics: newEndpointMetrics(c.options.Metrics, c.Name, c.series(id.address)),
	}
	e.streams = e.newStreams()
	var addresses []netip.AddrPort
	if e.Addr.IsValid() {
		addresses = append(addresses, e.Addr)
	} else if e.Path == "" {
		e.name = e.Address
	}
	e.addresses.Store(&addresses)
	e.host.Key, e.host.Of = e.Address+" "+e.name, e
	if c.tls != nil {
		e.peer = c.tls.Peer(e.Address)
	}
	e.Tunnels = newTunnelMetrics(c.options.Metrics, c.Name, c.series(id.address), &e.host)
	e.Tunnels.here = &e.figures.tunnels
	e.Tunnels.cluster = c
	e.Tunnels = e.Tunnels.At(config.PriorityDefault)
	var begins Condition
	e.health, begins = newEndpointHealth(e)
	e.conditions.Store(uint32(Left | begins))
	c.outliers.watch(e)
	return e
}

// ConnectError says that an endpoint could not be connected to. Nothing was sent.
type ConnectError struct {
	Endpoint string // as [Endpoint.String] has it
	Timeout  bool   // there was no answer in time, from our clock or the kernel's
	Err      error
}

func (e *ConnectError) Error() string { return "connect to " + e.Endpoint + ": " + e.Err.Error() }
func (e *ConnectError) Unwrap() error { return e.Err }

// errNowhere is why a name cannot be connected to of which no address is known.
var errNowhere = errors.New("the name has no address")

// String names the endpoint for logs: the address in numbers, the path, or
// the name of one that has whatever addresses that has.
func (e *Endpoint) String() string { return e.name }

// Attempt is one attempt to connect, which may be given up while it waits. The zero value
// is ready, and it may be used for one attempt after the other until it was cancelled.
type Attempt struct {
	// Announcement is what the connection's PROXY header says, if it has one: see
	// [Endpoint.Announces].
	Announcement Announcement

	// Priority says which limits of the cluster hold.
	Priority config.Priority

	err     error
	waits   Interrupter
	held    *breaker       // of which one was taken for the exchange; nil: none
	source  netip.Addr     // see Source
	header  []byte         // see Header
	tls     *tls.Config    // see TLS
	resumed bool           // see Resumed
	remote  netip.AddrPort // see Remote
	shared  bool           // the connection is to be one that requests share
	until   time.Time      // when it is to be made; zero: any time
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

// Source is the address that the connection is to come from, for [Network.Connect]; zero: as
// the kernel chooses.
func (a *Attempt) Source() netip.Addr { return a.source }

// Header is what is to be sent first on the connection, for [Network.Connect], which does so
// before it returns; nil: nothing.
func (a *Attempt) Header() []byte { return a.header }

// TLS is what a handshake is to follow with after that, for [Network.Connect], which does so
// before it returns; nil: there is none. Where it fails the error has a [*stream.HandshakeError].
func (a *Attempt) TLS() *tls.Config { return a.tls }

// Resumed says that the handshake has gone on with a session of before, for [Network.Connect].
func (a *Attempt) Resumed() { a.resumed = true }

// Remote is the address to which the last attempt that succeeded has connected; zero for a unix
// socket, and where no connection was made.
func (a *Attempt) Remote() netip.AddrPort { return a.remote }

// Get begins an exchange on the connection of l that became idle last, or on a new one
// if none is alive, for which it waits. The connection is kept afterwards if it can be.
// Errors are *[ConnectError], *[OverflowError], or what a was cancelled with. Begin must follow
// if there is none.
func (e *Endpoint) Get(t *task.Task, l *stream.Loop, a *Attempt) (exchange.Upstream, error) {
	if err := e.admit(a, config.LimitedRequests); err != nil {
		return nil, err
	}
	a.remote = netip.AddrPort{}
	if e.shares() {
		up, err := e.share(t, l, a, false)
		if err != errPlain {
			e.takeBack(a, &err)
			return up, err
		}
	}
	p := e.pool(a.Priority, l.Index)
	for conn := p.take(); conn != nil; conn = p.take() {
		if up, err := conn.Exchange(); err == nil {
			return up, nil
		}
		conn.Close()
	}
	return e.begin(t, l, a, p, p)
}

// Fresh is Get on a new connection always.
func (e *Endpoint) Fresh(t *task.Task, l *stream.Loop, a *Attempt) (exchange.Upstream, error) {
	if err := e.admit(a, config.LimitedRequests); err != nil {
		return nil, err
	}
	if e.shares() {
		up, err := e.share(t, l, a, true)
		if err != errPlain {
			e.takeBack(a, &err)
			return up, err
		}
	}
	return e.begin(t, l, a, e.pool(a.Priority, l.Index), nil)
}

// Dial is Fresh for upgrades: the connection carries this exchange and is never
// kept.
func (e *Endpoint) Dial(t *task.Task, l *stream.Loop, a *Attempt) (exchange.Upstream, error) {
	if c := e.cluster.cfg; c.Protocol == config.HTTP2 && c.TLS == nil {
		return nil, &ConnectError{Endpoint: e.String(), Err: errNoUpgrade}
	}
	if err := e.admit(a, config.LimitedTunnels); err != nil {
		return nil, err
	}
	return e.begin(t, l, a, nil, nil)
}

// admit begins an exchange, which counts as the endpoint's load until Call.End, if the cluster's
// limit leaves one.
func (e *Endpoint) admit(a *Attempt, what config.Limited) error {
	if a.err != nil {
		return a.err
	}
	if err := e.cluster.breakers[a.Priority].admit(a, what); err != nil {
		return err
	}
	e.host.Add(1)
	return nil
}

// Connect makes a connection that carries no exchange, for a tunnel of which no byte is looked
// at. It counts as one from the attempt on: [Endpoint.TunnelConnected] or
// [Endpoint.TunnelDropped] must follow where there is no error. Errors are as those of Get.
func (e *Endpoint) Connect(t *task.Task, l *stream.Loop, a *Attempt) (_ stream.Passed, err error) {
	none := stream.Passed{FD: -1}
	if err := e.admit(a, config.LimitedTunnels); err != nil {
		return none, err
	}
	defer e.takeBack(a, &err)
	if _, err := e.cluster.breakers[a.Priority].acquire(t, l, a, e, nil); err != nil {
		return none, err
	}
	conn, err := e.connect(t, l, a, nil, clienttls.Bytes)
	if err != nil {
		return none, err
	}
	passed, err := conn.PassOn()
	if err != nil {
		conn.Close()
		e.notConnected(err)
		return none, &ConnectError{Endpoint: e.String(), Err: err}
	}
	return passed, nil
}

// takeBack has what admit has counted not be counted any more where there is an error.
func (e *Endpoint) takeBack(a *Attempt, err *error) {
	if *err != nil {
		e.host.Add(-1)
		a.release()
	}
}

// begin is Get without a kept connection, but for one of from that becomes idle while it waits
// for there to be one more. What admit has counted is not counted any more if it fails.
func (e *Endpoint) begin(t *task.Task, l *stream.Loop, a *Attempt, to, from *pool) (_ exchange.Upstream, err error) {
	defer e.takeBack(a, &err)
	for {
		kept, err := e.cluster.breakers[a.Priority].acquire(t, l, a, e, from)
		if err != nil {
			return nil, err
		}
		if kept != nil {
			if up, err := kept.exchange(); err == nil {
				return up, nil
			}
			continue // it has ended just now
		}
		a.shared = to != nil && e.streams != nil && !e.Announces() // it may turn out to be one
		purpose := clienttls.Upgrades
		if a.shared {
			purpose = clienttls.Requests
		}
		conn, err := e.connect(t, l, a, to, purpose)
		if err != nil {
			return nil, err
		}
		if a.shared {
			a.shared = false
			if raw := conn.(lived); e.isHTTP2(raw.Conn) {
				return e.convert(t, l, a, conn)
			}
			conn.(lived).life.shared = false
			conn = conn.(lived).Conn
		}
		up, err := conn.Exchange()
		if err != nil {
			conn.Close()
			e.notConnected(err)
			return nil, &ConnectError{Endpoint: e.String(), Err: err}
		}
		return up, nil
	}
}

// connect makes a connection, which is kept in p afterwards; nil: nowhere. There may be one more
// on entry, which is counted until the connection has ended, or is not made.
func (e *Endpoint) connect(t *task.Task, l *stream.Loop, a *Attempt, p *pool, purpose clienttls.Purpose) (Conn, error) {
	a.remote = netip.AddrPort{}
	d := dial{e: e, shared: a.shared, of: &e.cluster.breakers[a.Priority].waiting, loop: l, pool: p, header: e.Header(a.Announcement), purpose: purpose}
	if e.cluster.cfg.ConnectTimeout > 0 {
		d.until = l.Now().Add(e.cluster.cfg.ConnectTimeout)
	}
	a.until = d.until
	if p != nil {
		p.loop = l
	}
	conn, to, err := d.connect(t, a)
	a.Wait(nil)
	if err != nil {
		d.of.give()
	}
	switch {
	case err == nil && a.err == nil:
		a.remote = to
		return conn, nil
	case err == nil:
		conn.Close() // both have come at once
		return nil, a.err
	case a.err != nil:
		return nil, a.err
	}
	// The kernel has a limit of its own (ETIMEDOUT, after two minutes by default).
	timeout := isTimeout(err)
	if errors.Is(err, os.ErrDeadlineExceeded) && !isHandshake(err) {
		err = fmt.Errorf("no answer within %v", e.cluster.cfg.ConnectTimeout)
	}
	e.connectFailed(timeout)
	e.notConnected(err)
	return nil, &ConnectError{Endpoint: e.String(), Timeout: timeout, Err: err}
}

// dial is what all addresses of an endpoint have in common that is connected to.
type dial struct {
	e      *Endpoint
	of     *waiting // what counts the connection
	loop   *stream.Loop
	pool   *pool // where the connection is kept; nil: nowhere
	until  time.Time
	header []byte

	shared  bool              // the connection is a lived one
	purpose clienttls.Purpose // what is agreed on by TLS
}

// connect connects to wherever the endpoint is, and says where that was; a unix socket is
// nowhere.
func (d dial) connect(t *task.Task, a *Attempt) (Conn, netip.AddrPort, error) {
	e, source := d.e, d.e.cluster.cfg.Connecting.Source
	switch {
	case e.Path != "":
		conn, err := d.one(t, a, "unix", e.Path)
		return conn, netip.AddrPort{}, err
	case e.Addr.IsValid():
		if source.IsValid() && source.Is4() != e.Addr.Addr().Unmap().Is4() {
			return nil, netip.AddrPort{}, sourceError{source, e.Addr.Addr()}
		}
		conn, err := d.one(t, a, "tcp", e.name)
		return conn, e.Addr, err
	}
	all := e.Addresses()
	if len(all) == 0 {
		return nil, netip.AddrPort{}, errNowhere
	}
	fit := interleave(all, source)
	if len(fit) == 0 {
		return nil, netip.AddrPort{}, sourceError{source, all[0].Addr()}
	}
	if len(fit) == 1 {
		conn, err := d.one(t, a, "tcp", fit[0].String())
		return conn, fit[0], err
	}
	return d.race(t, a, fit)
}

// sourceError says that nobody can connect from an address of one family to another's.
type sourceError struct{ source, to netip.Addr }

func (e sourceError) Error() string {
	return fmt.Sprintf("the cluster's source_address %v and %v are of two families", e.source, e.to)
}

// one connects to one address.
func (d dial) one(t *task.Task, a *Attempt, network, address string) (Conn, error) {
	a.source, a.header = d.e.cluster.cfg.Connecting.Source, d.header
	if err := d.e.secure(a, d.purpose); err != nil {
		return nil, err
	}
	life := &life{e: d.e, of: d.of, pool: d.pool, since: time.Now(), shared: d.shared}
	conn, err := d.e.cluster.options.Network.Connect(t, d.loop, network, address, d.until, a, Owner{
		Idle: life.idle, Ended: life.ended, Taken: life.taken, Traffic: &d.e.cluster.metrics.traffic,
	})
	if err = d.e.secured(a, err); err != nil {
		return nil, err
	}
	life.connected(conn)
	if d.shared {
		return lived{conn, life}, nil
	}
	return conn, nil
}

func isTimeout(err error) bool {
	n, ok := errors.AsType[net.Error](err)
	return ok && n.Timeout()
}
