package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/clienttls"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http2"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// How HTTP/2 is spoken to endpoints. A connection is made on a loop, as every one, and leaves that
// when it is known to have TLS or none: then it belongs to all loops, whose requests are its
// streams. Those of an endpoint are used in the order in which they were made, so that few are
// needed; another one is made for requests that find no room.
//
// With protocol "auto" ALPN decides, each time that a connection is made. What it has said last
// is what is expected the next time.

// What is counted of clusters with HTTP/2.
var (
	clusterHTTP2Connections       = clusterCounter("http2_connections", "Connections to endpoints of the cluster that speak HTTP/2; they are among holdfast_cluster_connections_total.")
	clusterHTTP2ConnectionsActive = clusterHTTP2Gauge("connections", "Open connections to endpoints of the cluster that speak HTTP/2; they are among holdfast_cluster_connections_active.")
	clusterHTTP2StreamsActive     = clusterHTTP2Gauge("streams", "Open streams on the HTTP/2 connections to endpoints of the cluster.")
	clusterHTTP2GoAways           = clusterCounter("http2_goaways", "HTTP/2 GOAWAY frames from endpoints of the cluster.")
	clusterHTTP2PingTimeouts      = clusterCounter("http2_ping_timeouts", "HTTP/2 connections to endpoints of the cluster that were closed because a PING was not answered.")
	clusterHTTP2Floods            = clusterCounter("http2_floods", "HTTP/2 connections that were closed because endpoints of the cluster sent too many frames without content.")
	clusterHTTP2Resets            = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_http2_resets_total",
		Help: "HTTP/2 streams to endpoints of the cluster that were reset, by the side that did so: upstream or holdfast.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "by"},
	})
)

func clusterHTTP2Gauge(what, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_http2_" + what + "_active", Help: help, Type: metrics.TypeGauge, Labels: []string{"cluster"},
	})
}

var (
	errPlain     = errors.New("the endpoint speaks HTTP/1.1")
	errNoUpgrade = errors.New("the cluster's protocol is HTTP/2 without TLS, which has no upgrades")
	errNobody    = errors.New("nobody waits for the connection any more")
)

// freshFor is how long a connection is a fresh one, for requests that the one before has failed
// under: they are many at once, and need not have one each.
const freshFor = time.Second

// mostDials is how many connections to an endpoint are made at the same time at most.
const mostDials = 16

// multiplexing is what a cluster has for HTTP/2.
type multiplexing struct {
	client      *http2.Client // nil: it does not speak it
	connections *metrics.Counter
	active      *metrics.Gauge
}

func newMultiplexing(c *Cluster, r *metrics.Registry) multiplexing {
	if c.cfg.Protocol == config.HTTP1 {
		return multiplexing{}
	}
	return multiplexing{
		connections: r.Counter(clusterHTTP2Connections, c.Name),
		active:      r.Gauge(clusterHTTP2ConnectionsActive, c.Name),
		client: http2.NewClient(http2.ClientOptions{
			Streams: c.streamsEach(), IdleTimeout: c.cfg.IdleTimeout, PingInterval: c.cfg.HTTP2.PingInterval,
			Counts: http2.ClientCounts{
				Traffic:      c.metrics.traffic,
				GoAways:      r.Counter(clusterHTTP2GoAways, c.Name),
				ResetsByPeer: r.Counter(clusterHTTP2Resets, c.Name, "upstream"),
				ResetsByUs:   r.Counter(clusterHTTP2Resets, c.Name, "holdfast"),
				PingTimeouts: r.Counter(clusterHTTP2PingTimeouts, c.Name),
				Floods:       r.Counter(clusterHTTP2Floods, c.Name),
				Streams:      r.Gauge(clusterHTTP2StreamsActive, c.Name),
			},
		}),
	}
}

// streamsEach is how many requests a connection of the cluster carries at most.
func (c *Cluster) streamsEach() int {
	if c.cfg.HTTP2.Streams > 0 {
		return c.cfg.HTTP2.Streams
	}
	return http2.DefaultStreams
}

// streams are an endpoint's HTTP/2 connections for one priority, and who waits for one.
type streams struct {
	e       *Endpoint
	counted *atomic.Int64 // as that of a pool

	mu      sync.Mutex
	conns   []*shared // that take requests
	dials   []*sharing
	waiters []*streamWaiter // in the order in which they came
	closed  bool            // a connection is closed when it carries nothing
}

// newStreams returns those of an endpoint, for each priority that is used.
func (e *Endpoint) newStreams() []*streams {
	c := e.cluster
	if c.multiplexing.client == nil {
		return nil
	}
	all := make([]*streams, c.priorities)
	for p := range all {
		all[p] = &streams{e: e}
		if b := &c.breakers[p]; b.limitsConnections(c, config.Priority(p)) {
			all[p].counted = &b.idle
		}
	}
	return all
}

// shared is an HTTP/2 connection.
type shared struct {
	*http2.ClientConn
	in   *streams
	life *life
	to   netip.AddrPort
	made time.Time
	idle bool // it carries nothing, and counts as that; owned by in.mu
}

// sharing is a connection that is being made. It has a task of its own, since several requests
// wait for it.
type sharing struct {
	in      *streams
	loop    *stream.Loop
	attempt Attempt
	stuck   bool // it waits until there may be one more connection; owned by in.mu
}

// streamWaiter is a request that waits for a stream. All but what it is for is owned by in.mu.
type streamWaiter struct {
	in    *streams
	task  *task.Task
	loop  *stream.Loop
	fresh bool

	pending *breaker // that counts it; nil: none does
	over    bool
	up      exchange.Upstream
	to      netip.AddrPort
	err     error
}

// shares says whether requests are expected to be streams.
func (e *Endpoint) shares() bool {
	return e.streams != nil && !e.Announces() && !e.plain.Load()
}

// streamsOf returns those for a priority. One that no route has shares with the others.
func (e *Endpoint) streamsOf(p config.Priority) *streams {
	if int(p) >= len(e.streams) {
		p = 0
	}
	return e.streams[p]
}

// share is Get, or Fresh, for a stream. It fails with errPlain if there is none, but a
// connection with HTTP/1.1 may be had.
func (e *Endpoint) share(t *task.Task, l *stream.Loop, a *Attempt, fresh bool) (exchange.Upstream, error) {
	s := e.streamsOf(a.Priority)
	s.mu.Lock()
	if up, to := s.beginLocked(l, fresh); up != nil {
		s.mu.Unlock()
		a.remote = to
		return up, nil
	}
	me := &streamWaiter{in: s, task: t, loop: l, fresh: fresh}
	if s.stuckLocked() {
		of := &e.cluster.breakers[a.Priority]
		if !of.pending.take() {
			s.mu.Unlock()
			return nil, of.pending.overflow()
		}
		me.pending = of.pending
	}
	s.waiters = append(s.waiters, me)
	s.dialLocked(l, a.Priority)
	s.mu.Unlock()
	a.Wait(me)
	for !me.isOver() {
		t.Wait()
	}
	a.Wait(nil)
	switch {
	case a.err == nil && me.err == nil:
		a.remote = me.to
		return me.up, nil
	case a.err == nil:
		return nil, me.err
	case me.up != nil:
		me.up.Close()
	}
	return nil, a.err
}

func (w *streamWaiter) isOver() bool {
	w.in.mu.Lock()
	defer w.in.mu.Unlock()
	return w.over
}

// Interrupt implements [Interrupter].
func (w *streamWaiter) Interrupt(err error) {
	s := w.in
	s.mu.Lock()
	if !w.over {
		s.waiters = slices.DeleteFunc(s.waiters, func(o *streamWaiter) bool { return o == w })
		s.endLocked(w, nil, netip.AddrPort{}, err)
	}
	s.mu.Unlock()
}

// endLocked ends the wait of one who is not among the waiters any more.
func (s *streams) endLocked(w *streamWaiter, up exchange.Upstream, to netip.AddrPort, err error) {
	w.over, w.up, w.to, w.err = true, up, to, err
	if w.pending != nil {
		w.pending.give()
	}
	w.loop.Post(w.task.Wake) // a loop that was stopped has no tasks
	if len(s.waiters) == 0 {
		for _, d := range s.dials {
			if d.stuck {
				d.loop.Post(func() { d.attempt.Cancel(errNobody) })
			}
		}
	}
}

// stuckLocked says whether connections have to be waited for.
func (s *streams) stuckLocked() bool {
	return slices.ContainsFunc(s.dials, func(d *sharing) bool { return d.stuck })
}

// beginLocked begins a stream, or returns nil.
func (s *streams) beginLocked(l *stream.Loop, fresh bool) (exchange.Upstream, netip.AddrPort) {
	for _, c := range s.conns {
		if fresh && time.Since(c.made) > freshFor {
			continue
		}
		if up, ok := c.Exchange(l, fresh); ok {
			s.idleLocked(c, false)
			return up, c.to
		}
	}
	return nil, netip.AddrPort{}
}

// idleLocked notes whether a connection carries nothing.
func (s *streams) idleLocked(c *shared, idle bool) {
	if c.idle == idle {
		return
	}
	c.idle = idle
	if s.counted == nil {
		return
	}
	if idle {
		s.counted.Add(1)
	} else {
		s.counted.Add(-1)
	}
}

// dialLocked has as many connections be made as those who wait need.
func (s *streams) dialLocked(l *stream.Loop, p config.Priority) {
	each := s.e.cluster.streamsEach()
	for len(s.dials) < mostDials && len(s.waiters) > len(s.dials)*each {
		d := &sharing{in: s, loop: l}
		d.attempt.Priority, d.attempt.shared = p, true
		s.dials = append(s.dials, d)
		if !l.Post(func() { l.Tasks.Go(d) }) {
			s.dials = s.dials[:len(s.dials)-1] // nothing waits on a loop that was stopped
			return
		}
	}
}

// Run implements [task.Runner].
func (d *sharing) Run(t *task.Task) {
	err := error(net.ErrClosed) // by a panic
	var conn *shared
	defer func() { d.in.made(d, conn, err) }()
	e, w := d.in.e, &d.in.e.cluster.breakers[d.attempt.Priority].waiting
	d.sticks(w.connections.full())
	_, err = w.acquire(t, d.loop, &d.attempt, e, nil)
	d.sticks(false)
	if err != nil {
		return
	}
	var made Conn
	if made, err = e.connect(t, d.loop, &d.attempt, nil, clienttls.Requests); err == nil {
		conn, err = e.multiplex(t, d.loop, &d.attempt, made)
	}
}

func (d *sharing) sticks(stuck bool) {
	d.in.mu.Lock()
	defer d.in.mu.Unlock()
	d.stuck = stuck
}

// made ends a dial.
func (s *streams) made(d *sharing, c *shared, err error) {
	s.mu.Lock()
	s.dials = slices.DeleteFunc(s.dials, func(o *sharing) bool { return o == d })
	switch {
	case err == errPlain:
		s.failLocked(len(s.waiters), err)
	case err == errNobody: // who has come since has another one made
	case err != nil:
		s.failLocked(len(s.waiters)-len(s.dials)*s.e.cluster.streamsEach(), err)
	default:
		s.addLocked(c)
		had := len(s.waiters)
		if s.serveLocked(); had > 0 && had == len(s.waiters) {
			s.failLocked(had, &ConnectError{Endpoint: s.e.String(), Err: http2.ErrNoStreams})
		}
	}
	if len(s.waiters) > 0 {
		s.dialLocked(s.waiters[0].loop, d.attempt.Priority)
	}
	s.mu.Unlock()
	if c != nil {
		s.look(c)
	}
}

// addLocked has a new connection be used, unless it has ended already: another one would do no
// better, so who waits fails then.
func (s *streams) addLocked(c *shared) {
	if c.Usable() {
		s.conns = append(s.conns, c)
		s.idleLocked(c, true)
	}
}

// failLocked fails the first n who wait.
func (s *streams) failLocked(n int, err error) {
	for ; n > 0 && len(s.waiters) > 0; n-- {
		w := s.waiters[0]
		s.waiters = slices.Delete(s.waiters, 0, 1)
		s.endLocked(w, nil, netip.AddrPort{}, err)
	}
}

// serveLocked gives streams to those who wait.
func (s *streams) serveLocked() {
	for len(s.waiters) > 0 {
		w := s.waiters[0]
		up, to := s.beginLocked(w.loop, w.fresh)
		if up == nil {
			return
		}
		s.waiters = slices.Delete(s.waiters, 0, 1)
		s.endLocked(w, up, to, nil)
	}
}

// room is told that a stream of a connection has ended.
func (s *streams) room(c *shared) {
	s.mu.Lock()
	s.serveLocked()
	s.mu.Unlock()
	s.look(c)
}

// look notes whether a connection is idle, and closes one that nobody wants.
func (s *streams) look(c *shared) {
	s.mu.Lock()
	unwanted := false
	if slices.Contains(s.conns, c) && c.Active() == 0 {
		s.idleLocked(c, true)
		unwanted = s.closed || s.e.Conditions()&Left != 0
	}
	s.mu.Unlock()
	if unwanted {
		c.Retire()
	}
}

// remove forgets a connection that takes no more.
func (s *streams) remove(c *shared) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = slices.DeleteFunc(s.conns, func(o *shared) bool { return o == c })
	s.idleLocked(c, false)
	if len(s.waiters) > 0 {
		s.dialLocked(s.waiters[0].loop, config.Priority(slices.Index(s.e.streams, s)))
	}
}

// retire has no connection be used any more that is there: each is closed when it carries
// nothing.
func (s *streams) retire() {
	s.mu.Lock()
	conns := slices.Clone(s.conns)
	s.mu.Unlock()
	for _, c := range conns {
		c.Retire()
	}
}

// close closes what is idle, and from now on each connection as it becomes idle.
func (s *streams) close() {
	s.mu.Lock()
	s.closed = true
	conns := slices.Clone(s.conns)
	s.mu.Unlock()
	for _, c := range conns {
		s.look(c)
	}
}

// makeRoom closes a connection that carries nothing, if there is one.
func (s *streams) makeRoom() bool {
	s.mu.Lock()
	i := slices.IndexFunc(s.conns, func(c *shared) bool { return c.idle })
	if i < 0 {
		s.mu.Unlock()
		return false
	}
	c := s.conns[i]
	s.mu.Unlock()
	c.Retire()
	return true
}

// isHTTP2 says whether a new connection of the cluster speaks HTTP/2.
func (e *Endpoint) isHTTP2(conn Conn) bool {
	switch e.cluster.cfg.Protocol {
	case config.HTTP1:
		return false
	case config.HTTP2:
		return true // it would not have been made if ALPN had another one
	}
	s, ok := conn.(interface{ Secure() *stream.Secure })
	return ok && s.Secure() != nil && s.Secure().State().NegotiatedProtocol == "h2"
}

// multiplex makes an HTTP/2 connection of one that [Endpoint.connect] has made for that. Where it
// speaks HTTP/1.1, it is kept as one of these: errPlain.
func (e *Endpoint) multiplex(t *task.Task, l *stream.Loop, a *Attempt, made Conn) (*shared, error) {
	raw := made.(lived)
	if !e.isHTTP2(raw.Conn) {
		e.plain.Store(true)
		raw.life.shared, raw.life.pool = false, e.pool(a.Priority, l.Index)
		raw.life.pool.loop = l
		raw.life.idle(raw.Conn)
		return nil, errPlain
	}
	e.plain.Store(false)
	raw.life.pool = nil
	c := &shared{in: e.streamsOf(a.Priority), life: raw.life, to: a.remote, made: time.Now()}
	counts := &e.cluster.multiplexing
	counts.active.Add(1)
	conn, err := e.speak(t, l, a, raw.Conn, http2.Owner{
		Room:    func() { c.in.room(c) },
		Leaving: func() { c.in.remove(c) },
		Ended: func(byPeer bool) {
			counts.active.Add(-1)
			c.in.remove(c)
			c.life.ended(byPeer)
		},
	}, a.until)
	if err != nil && a.err != nil {
		return nil, a.err
	}
	if err != nil {
		timeout := errors.Is(err, context.DeadlineExceeded)
		e.connectFailed(timeout)
		e.notConnected(err)
		return nil, &ConnectError{Endpoint: e.String(), Timeout: timeout, Err: err}
	}
	counts.connections.Inc()
	c.ClientConn = conn
	return c, nil
}

// speak begins HTTP/2 on a connection, and waits until the endpoint has answered. It takes conn
// over. owner is told of the end also where that comes before there is anything.
func (e *Endpoint) speak(t *task.Task, l *stream.Loop, a *Attempt, conn Conn, owner http2.Owner, until time.Time) (*http2.ClientConn, error) {
	passed, err := conn.PassOn()
	if err != nil {
		conn.Close()
		owner.Ended(false)
		return nil, err
	}
	secure := passed.Secure != nil
	var on stream.Conn
	if err := l.Resume(&on, &passed, nil, nil); err != nil {
		passed.Close(l)
		owner.Ended(false)
		return nil, err
	}
	outside, err := on.Blocking()
	if err != nil {
		owner.Ended(false)
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	if !until.IsZero() {
		ctx, cancel = context.WithTimeout(context.Background(), until.Sub(l.Now()))
	}
	defer cancel()
	a.Wait(cancels(cancel))
	defer a.Wait(nil)
	var speaks *http2.ClientConn
	over := false
	go func() {
		c, err2 := e.cluster.multiplexing.client.Begin(ctx, outside, secure, owner)
		l.Post(func() {
			speaks, err, over = c, err2, true
			t.Wake()
		})
	}()
	for !over {
		t.Wait()
	}
	if err == nil && a.err != nil {
		speaks.Close()
		return nil, a.err
	}
	return speaks, err
}

// cancels is an [Interrupter].
type cancels context.CancelFunc

func (c cancels) Interrupt(error) { c() }

// lived is a connection of which somebody else says when its life ends.
type lived struct {
	Conn
	life *life
}

// convert is what begin does with a new connection that speaks HTTP/2 where that was not
// expected.
func (e *Endpoint) convert(t *task.Task, l *stream.Loop, a *Attempt, made Conn) (exchange.Upstream, error) {
	c, err := e.multiplex(t, l, a, made)
	if err != nil {
		return nil, err
	}
	s := c.in
	s.mu.Lock()
	s.addLocked(c)
	up, _ := s.beginLocked(l, true)
	s.serveLocked()
	s.mu.Unlock()
	s.look(c)
	if up == nil {
		return nil, &ConnectError{Endpoint: e.String(), Err: http2.ErrNoStreams}
	}
	return up, nil
}

// probeConn is an HTTP/2 connection for checks.
type probeConn struct {
	*http2.ClientConn
	loop *stream.Loop
}

// Exchange implements [Conn].
func (c probeConn) Exchange() (exchange.Upstream, error) {
	if up, ok := c.ClientConn.Exchange(c.loop, false); ok {
		return up, nil
	}
	return nil, net.ErrClosed
}

// Alive implements [Conn].
func (c probeConn) Alive() bool { return c.Usable() }

// PassOn implements [Conn].
func (c probeConn) PassOn() (stream.Passed, error) { return stream.Passed{FD: -1}, errNoUpgrade }
