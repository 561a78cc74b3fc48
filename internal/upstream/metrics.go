package upstream

import (
	"net"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/upstream/balance"
)

// connectBounds are those of the histogram of connects, in seconds.
var connectBounds = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}

// What is counted of clusters. A connection that becomes a tunnel ends here when it
// does, and is counted with the tunnels from then on.
var (
	clusterEndpoints = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_endpoints",
		Help: "Endpoints of the cluster; a name with several addresses is as many.",
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"cluster"},
	})
	clusterConnections       = clusterCounter("connections", "Connections that were made to endpoints of the cluster.")
	clusterConnectionsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_connections_active",
		Help: "Open connections to endpoints of the cluster, idle ones included, without those that became tunnels.",
		Type: metrics.TypeGauge, Labels: []string{"cluster"},
	})
	clusterConnectionsClosed = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_connections_closed_total",
		Help: "Connections to endpoints of the cluster that were closed, by the side that was first: upstream or holdfast. Those that became tunnels are not among them.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "by"},
	})
	clusterConnectFailures  = clusterCounter("connect_failures", "Attempts to connect to an endpoint of the cluster that failed, those that took too long included.")
	clusterConnectTimeouts  = clusterCounter("connect_timeouts", "Attempts to connect to an endpoint of the cluster that were not answered in time.")
	clusterConnectExhausted = clusterCounter("connect_attempts_exhausted", "Requests that failed because no endpoint of the cluster that was tried could be connected to.")
	clusterNoneHealthy      = clusterCounter("none_healthy", "Requests that found no endpoint of the cluster that could be chosen.")
	clusterConnectDuration  = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_connect_duration_seconds",
		Help: "How long it took to connect to an endpoint of the cluster, where that worked.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"cluster"}, Bounds: connectBounds,
	})
	clusterConnectionDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_connection_duration_seconds",
		Help: "How long connections to endpoints of the cluster lasted, those that became tunnels until then.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"cluster"},
		Bounds: []float64{0.01, 0.1, 1, 10, 60, 300, 900, 3600, 14400, 86400},
	})
	clusterPanics   = clusterCounter("panic", "Choices of an endpoint among all of a priority, the unhealthy ones included, because too few are healthy.")
	clusterReceived = clusterCounter("received_bytes", "Bytes that were received from endpoints of the cluster, heads and framing included, without those of tunnels.")
	clusterSent     = clusterCounter("sent_bytes", "Bytes that were sent to endpoints of the cluster, heads and framing included, without those of tunnels.")

	clusterRequests       = clusterCounter("requests", "Requests that were given to an endpoint of the cluster, upgrades and repeated ones included.")
	clusterRequestsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_requests_active",
		Help: "Requests that are with an endpoint of the cluster.",
		Type: metrics.TypeGauge, Labels: []string{"cluster"},
	})
	clusterResponses = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_responses_total",
		Help: "Final response heads from endpoints of the cluster, by class of the status: 1xx is an upgrade that was agreed to.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "class"},
	})
	clusterRequestDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_request_duration_seconds",
		Help: "How long requests were with an endpoint of the cluster until its response was complete.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"cluster"}, Bounds: exchange.RequestBounds,
	})
	clusterRetries        = clusterCounter("retries", "Requests that were given to the cluster again because a kept connection had been closed under them.")
	clusterTimeouts       = clusterCounter("timeouts", "Requests that were given up because an endpoint of the cluster did not answer, or went on answering, in time.")
	clusterResets         = clusterCounter("resets", "Requests whose connection to an endpoint of the cluster ended before the response was complete.")
	clusterCancelled      = clusterCounter("cancelled", "Requests that ended on the client's side before the response of the cluster's endpoint was complete.")
	clusterProtocolErrors = clusterCounter("protocol_errors", "Responses from endpoints of the cluster that are not valid, or to another request than was made.")
	clusterTunnels        = clusterCounter("tunnels", "Tunnels that were made to endpoints of the cluster.")
	clusterTunnelsActive  = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_tunnels_active",
		Help: "Open tunnels to endpoints of the cluster.",
		Type: metrics.TypeGauge, Labels: []string{"cluster"},
	})
	clusterRelayed = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_tunnel_relayed_bytes_total",
		Help: "Bytes of tunnels to endpoints of the cluster that the socket on that side has taken: upstream or downstream.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "to"},
	})
)

// What is counted of endpoints. The label is the address as it is configured: a name
// with several addresses is one, and so are all endpoints of a file or a service; see
// [Cluster.series].
var (
	endpointConnections       = endpointCounter("connections", "Connections that were made to the endpoint.")
	endpointConnectionsActive = endpointGauge("connections_active", "Open connections to the endpoint, idle ones included, without those that became tunnels.")
	endpointConnectFailures   = endpointCounter("connect_failures", "Attempts to connect to the endpoint that failed, those that took too long included.")
	endpointRequests          = endpointCounter("requests", "Requests that were given to the endpoint, upgrades and repeated ones included.")
	endpointRequestsActive    = endpointGauge("requests_active", "Requests that are with the endpoint.")
	endpointErrors            = endpointCounter("errors", "Requests that the endpoint answered with 5xx or nonsense, too late, or not to the end.")
	endpointTunnelsActive     = endpointGauge("tunnels_active", "Open tunnels to the endpoint.")
	endpointRelayed           = metrics.Define(metrics.Desc{
		Name: "holdfast_endpoint_tunnel_relayed_bytes_total",
		Help: "Bytes of tunnels to the endpoint that the socket on that side has taken: upstream or downstream.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "endpoint", "to"},
	})
)

func clusterCounter(what, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_" + what + "_total", Help: help, Type: metrics.TypeCounter, Labels: []string{"cluster"},
	})
}

func endpointCounter(what, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_endpoint_" + what + "_total", Help: help, Type: metrics.TypeCounter, Labels: []string{"cluster", "endpoint"},
	})
}

func endpointGauge(what, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_endpoint_" + what, Help: help, Type: metrics.TypeGauge, Labels: []string{"cluster", "endpoint"},
	})
}

// clusterMetrics is what is counted of one cluster.
type clusterMetrics struct {
	connections, connectFailures, connectTimeouts, connectExhausted, noneHealthy *metrics.Counter
	closedByEndpoint, closedByUs                                                 *metrics.Counter
	requests, retries, timeouts, resets, cancelled, errors, tunnels              *metrics.Counter
	membershipChanges                                                            *metrics.Counter
	panics                                                                       *metrics.Counter
	connectionsActive, requestsActive, endpoints, healthy                        *metrics.Gauge
	connectDuration, connectionDuration, requestDuration                         *metrics.Histogram
	responses                                                                    exchange.Classes
	traffic                                                                      stream.Traffic
}

func newClusterMetrics(r *metrics.Registry, name string) clusterMetrics {
	return clusterMetrics{
		responses:          exchange.NewClasses(r, clusterResponses, name),
		endpoints:          r.Gauge(clusterEndpoints, name),
		healthy:            r.Gauge(clusterHealthy, name),
		membershipChanges:  r.Counter(clusterMembershipChanges, name),
		connections:        r.Counter(clusterConnections, name),
		connectionsActive:  r.Gauge(clusterConnectionsActive, name),
		closedByEndpoint:   r.Counter(clusterConnectionsClosed, name, "upstream"),
		closedByUs:         r.Counter(clusterConnectionsClosed, name, "holdfast"),
		connectFailures:    r.Counter(clusterConnectFailures, name),
		connectTimeouts:    r.Counter(clusterConnectTimeouts, name),
		connectExhausted:   r.Counter(clusterConnectExhausted, name),
		noneHealthy:        r.Counter(clusterNoneHealthy, name),
		connectDuration:    r.Histogram(clusterConnectDuration, name),
		connectionDuration: r.Histogram(clusterConnectionDuration, name),
		panics:             r.Counter(clusterPanics, name),
		traffic:            stream.Traffic{Received: r.Counter(clusterReceived, name), Sent: r.Counter(clusterSent, name)},
		requests:           r.Counter(clusterRequests, name),
		requestsActive:     r.Gauge(clusterRequestsActive, name),
		requestDuration:    r.Histogram(clusterRequestDuration, name),
		retries:            r.Counter(clusterRetries, name),
		timeouts:           r.Counter(clusterTimeouts, name),
		resets:             r.Counter(clusterResets, name),
		cancelled:          r.Counter(clusterCancelled, name),
		errors:             r.Counter(clusterProtocolErrors, name),
		tunnels:            r.Counter(clusterTunnels, name),
	}
}

// endpointMetrics is what is counted of one endpoint.
type endpointMetrics struct {
	connections, connectFailures, requests, errors *metrics.Counter
	connectionsActive, requestsActive              *metrics.Gauge
}

func newEndpointMetrics(r *metrics.Registry, cluster, address string) endpointMetrics {
	return endpointMetrics{
		connections:       r.Counter(endpointConnections, cluster, address),
		connectionsActive: r.Gauge(endpointConnectionsActive, cluster, address),
		connectFailures:   r.Counter(endpointConnectFailures, cluster, address),
		requests:          r.Counter(endpointRequests, cluster, address),
		requestsActive:    r.Gauge(endpointRequestsActive, cluster, address),
		errors:            r.Counter(endpointErrors, cluster, address),
	}
}

// Active is how many requests are with the cluster's endpoints, as of the last turn of each
// loop.
func (c *Cluster) Active() int64 { return c.metrics.requestsActive.Value() }

// Unserved counts a request that no endpoint was connected for: none that was tried could be, or
// none was found that could be tried.
func (c *Cluster) Unserved(tried bool) {
	if tried {
		c.metrics.connectExhausted.Inc()
	} else {
		c.metrics.noneHealthy.Inc()
	}
}

// life is an attempt to connect, and the connection that comes of it: it counts what becomes
// of them, and takes the connection out of its pool when it ends there.
type life struct {
	e     *Endpoint
	of    *waiting // counts the connection, and has who waits for one
	pool  *pool    // where the connection is kept; nil: nowhere
	conn  Conn
	since time.Time // when the attempt began; once connected, since when

	shared bool // the connection goes on when it was given away: see multiplex
}

// connected counts the connection. It comes before anybody can end it.
func (l *life) connected(conn Conn) {
	l.conn = conn
	l.e.connected()
	c, began := &l.e.cluster.metrics, l.since
	l.since = time.Now()
	c.connectDuration.Observe(int64(l.since.Sub(began)))
	c.connections.Inc()
	c.connectionsActive.Add(1)
	l.e.figures.connected(l.since.Sub(began))
	l.e.metrics.connections.Inc()
	l.e.metrics.connectionsActive.Add(1)
}

// idle keeps the connection, which carries nothing, or closes it.
func (l *life) idle(conn Conn) {
	if l.pool == nil || l.e.Conditions()&Left != 0 || !l.pool.keep(conn) {
		conn.Close()
		return
	}
	l.of.pass(l)
}

// again is idle for a connection that was given to somebody who does not need it any more.
func (l *life) again() {
	if l.conn.Alive() {
		l.idle(l.conn)
	} else {
		l.conn.Close()
	}
}

// exchange begins the next exchange, or closes the connection.
func (l *life) exchange() (exchange.Upstream, error) {
	if l.conn.Alive() {
		if up, err := l.conn.Exchange(); err == nil {
			return up, nil
		}
	}
	l.conn.Close()
	return nil, net.ErrClosed
}

// ended counts that the connection was closed, and by whom.
func (l *life) ended(byEndpoint bool) {
	if l.pool != nil {
		l.pool.remove(l.conn)
	}
	if byEndpoint {
		l.e.cluster.metrics.closedByEndpoint.Inc()
	} else {
		l.e.cluster.metrics.closedByUs.Inc()
	}
	l.over()
}

// taken counts that the connection is no longer one for requests. Whoever has it now
// counts what becomes of it: see [Endpoint.TunnelOpened] and [Endpoint.TunnelFailed].
func (l *life) taken() {
	if !l.shared {
		l.over()
	}
}

func (l *life) over() {
	c := &l.e.cluster.metrics
	c.connectionDuration.Observe(int64(time.Since(l.since)))
	c.connectionsActive.Add(-1)
	l.e.metrics.connectionsActive.Add(-1)
	l.e.figures.connections.Add(-1)
	l.of.give()
}

// connectFailed counts that there is no connection.
func (e *Endpoint) connectFailed(timeout bool) {
	e.cluster.metrics.connectFailures.Inc()
	e.metrics.connectFailures.Inc()
	e.figures.connectFails.Add(1)
	if timeout {
		e.cluster.metrics.connectTimeouts.Inc()
	}
}

// An Outcome is how a request that an endpoint was given came to its end.
type Outcome uint8

// The outcomes.
const (
	Complete     Outcome = iota // the response was relayed to its end
	BecameTunnel                // the endpoint agreed to an upgrade
	TimedOut                    // the endpoint did not answer, or go on answering, in time
	Reset                       // the connection to the endpoint ended before the response was complete
	Stale                       // the same, but the endpoint had closed it while it was kept: the request is made again
	Invalid                     // the response was not valid
	Cancelled                   // it ended on the client's side
	Discarded                   // the endpoint has answered, but the client is not to get that
)

// Call is a request that an endpoint was given, as it is counted: see [Endpoint.Begin]. It
// may be used again when it has ended.
type Call struct {
	e      *Endpoint
	loop   *stream.Loop
	began  time.Time
	failed bool
	held   *breaker // of which it has one
}

// Begin counts a request as given to the endpoint, as c, which [Endpoint.Get] and its kin have
// begun an exchange for by a. [Call.End] must follow. All is done
// on the goroutine of l, whose clock it is that counts.
func (e *Endpoint) Begin(l *stream.Loop, a *Attempt, c *Call) {
	l.Counts.Inc(e.cluster.metrics.requests)
	l.Counts.Move(e.cluster.metrics.requestsActive, 1)
	l.Counts.Inc(e.metrics.requests)
	l.Counts.Move(e.metrics.requestsActive, 1)
	sum := &e.pools[l.Index].requests
	sum.Store(sum.Load() + 1) // cheaper than to add: nobody else does
	*c = Call{e: e, loop: l, began: l.Now(), held: a.held}
	a.held = nil
}

// Answered counts the head of the final response, or a 101.
func (c *Call) Answered(status int) {
	c.loop.Counts.Inc(c.e.cluster.metrics.responses.Of(status))
	c.failed = status >= 500
	c.answered(status)
}

// End counts the request's end, once.
func (c *Call) End(o Outcome) {
	cluster, endpoint, counts := &c.e.cluster.metrics, &c.e.metrics, &c.loop.Counts
	counts.Move(cluster.requestsActive, -1)
	counts.Move(endpoint.requestsActive, -1)
	c.e.host.Add(-1)
	if c.held != nil {
		c.held.give()
	}
	c.ended(o)
	switch o {
	case Complete:
		counts.Observe(cluster.requestDuration, int64(c.loop.Now().Sub(c.began)))
	case TimedOut:
		counts.Inc(cluster.timeouts)
	case Reset, Stale:
		counts.Inc(cluster.resets)
	case Invalid:
		counts.Inc(cluster.errors)
	case Cancelled:
		counts.Inc(cluster.cancelled)
	}
	if c.failed || o == TimedOut || o == Reset || o == Stale || o == Invalid {
		counts.Inc(endpoint.errors)
	}
}

// Retried counts that a request is made again that the endpoint was given on a kept
// connection.
func (e *Endpoint) Retried() { e.cluster.metrics.retries.Inc() }

// TunnelOpened counts a tunnel that the call, which Dial has begun, became: what the limit has
// let through is the tunnel's from then on. It ends, or leaves, by [TunnelMetrics.Count] at the
// call's priority.
func (e *Endpoint) TunnelOpened(c *Call) {
	e.cluster.metrics.tunnels.Inc()
	e.Tunnels.count(1)
	c.held = nil
}

// TunnelConnected counts a tunnel of a connection that [Endpoint.Connect] has made.
func (e *Endpoint) TunnelConnected(a *Attempt) {
	e.cluster.metrics.tunnels.Inc()
	e.Tunnels.count(1)
	e.host.Add(-1) // that of the attempt
	a.held = nil
}

// TunnelDropped counts that such a connection was closed without one.
func (e *Endpoint) TunnelDropped(a *Attempt) {
	e.TunnelFailed()
	e.host.Add(-1)
	a.release()
}

// TunnelFailed counts that a connection which the endpoint gave away for a tunnel was
// closed without one.
func (e *Endpoint) TunnelFailed() { e.cluster.metrics.closedByUs.Inc() }

// TunnelMetrics is what is counted of the living tunnels to an endpoint, for the endpoint
// itself and for its cluster.
type TunnelMetrics struct {
	host         *balance.Host // which has them as its load; nil: none
	here         *atomic.Int64 // counts them for [Clusters.State]; nil: nobody shows them
	cluster      *Cluster      // nil: it is not known here
	limit        *breaker      // which counts them; nil: none
	active       []*metrics.Gauge
	ToUpstream   []*metrics.Counter // bytes that the endpoint's sockets have taken
	ToDownstream []*metrics.Counter // bytes that the clients' have
}

// newTunnelMetrics returns those of an endpoint by its address as configured, which is host
// unless that is nil.
func newTunnelMetrics(r *metrics.Registry, cluster, address string, host *balance.Host) TunnelMetrics {
	return TunnelMetrics{
		host:         host,
		active:       []*metrics.Gauge{r.Gauge(endpointTunnelsActive, cluster, address), r.Gauge(clusterTunnelsActive, cluster)},
		ToUpstream:   []*metrics.Counter{r.Counter(endpointRelayed, cluster, address, "upstream"), r.Counter(clusterRelayed, cluster, "upstream")},
		ToDownstream: []*metrics.Counter{r.Counter(endpointRelayed, cluster, address, "downstream"), r.Counter(clusterRelayed, cluster, "downstream")},
	}
}

// At is what counts those that go by the limits of a priority.
func (m TunnelMetrics) At(p config.Priority) TunnelMetrics {
	if m.cluster != nil {
		m.limit = &m.cluster.breakers[p].of[config.LimitedTunnels]
	}
	return m
}

// Count counts tunnels that have come, or with a negative n gone. None is too many: they are
// there.
func (m *TunnelMetrics) Count(n int64) {
	m.count(n)
	if m.limit != nil {
		m.limit.force(n)
	}
}

// count is Count without the limit.
func (m *TunnelMetrics) count(n int64) {
	for _, g := range m.active {
		g.Add(n)
	}
	if m.host != nil {
		m.host.Add(n)
	}
	if m.here != nil {
		m.here.Add(n)
	}
}
