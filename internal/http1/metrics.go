package http1

import (
	"time"

	"holdfast/internal/metrics"
	"holdfast/internal/stream"
)

// What is counted of downstream connections. One that becomes a tunnel ends here when
// it does, and is counted with the tunnels from then on. One that is given to another server
// ends here as well, and is active there.
var (
	connectionsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_total",
		Help: "Connections that were accepted from clients.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	connectionsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_active",
		Help: "Open connections of clients, without those that became tunnels.",
		Type: metrics.TypeGauge, Labels: []string{"listener"},
	})
	connectionsClosed = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_closed_total",
		Help: "Connections of clients that ended without becoming a tunnel, by the side that ended them: downstream or holdfast.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "by"},
	})
	connectionDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connection_duration_seconds",
		Help: "How long connections of clients lasted, those that became tunnels or went to another generation until then.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"listener"},
		Bounds: []float64{0.01, 0.1, 1, 10, 60, 300, 900, 3600, 14400, 86400},
	})
	connectionsDrained = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_drained_total",
		Help: "Connections of clients that were ended because their generation drains, behind a response or while idle.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	connectionsCut = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connections_cut_total",
		Help: "Connections of clients that were cut because drain.stream_timeout or stop.timeout ran out.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	idleTimeouts = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_idle_timeouts_total",
		Help: "Connections of clients that were closed because no request came within limits.idle_timeout.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	protocolErrors = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_protocol_errors_total",
		Help: "Heads and bodies of requests that are not valid HTTP/1.1.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	receivedBytes = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_received_bytes_total",
		Help: "Bytes that were received from clients, heads and framing included, without those of tunnels.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	sentBytes = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_sent_bytes_total",
		Help: "Bytes that were sent to clients, heads and framing included, without those of tunnels.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
)

// ConnectionMetrics is what is counted of a listener's connections whatever they carry. The
// zero value counts nothing.
type ConnectionMetrics struct {
	connections, closedByClient, closedByUs, cut *metrics.Counter
	active                                       *metrics.Gauge
	duration                                     *metrics.Histogram
}

// NewConnectionMetrics registers that. r may be nil.
func NewConnectionMetrics(r *metrics.Registry, listener string) ConnectionMetrics {
	return ConnectionMetrics{
		connections:    r.Counter(connectionsTotal, listener),
		active:         r.Gauge(connectionsActive, listener),
		closedByClient: r.Counter(connectionsClosed, listener, "downstream"),
		closedByUs:     r.Counter(connectionsClosed, listener, "holdfast"),
		duration:       r.Histogram(connectionDuration, listener),
		cut:            r.Counter(connectionsCut, listener),
	}
}

// Accepted counts a connection that was accepted. Closed, Cut or Switched follows.
func (m *ConnectionMetrics) Accepted() {
	m.connections.Inc()
	m.active.Add(1)
}

// Closed counts that a connection has ended, and by whom.
func (m *ConnectionMetrics) Closed(lasted time.Duration, byClient bool) {
	if byClient {
		m.ended(lasted, endedByClient)
	} else {
		m.ended(lasted, endedByUs)
	}
}

// Cut is Closed because the time of a drain or a stop was over.
func (m *ConnectionMetrics) Cut(lasted time.Duration) {
	m.cut.Inc()
	m.ended(lasted, endedByUs)
}

// Switched counts that a connection has become a tunnel.
func (m *ConnectionMetrics) Switched(lasted time.Duration) {
	m.active.Add(-1)
	m.duration.Observe(int64(lasted))
}

// ServerMetrics is what a [Server] counts. The zero value counts nothing.
type ServerMetrics struct {
	ConnectionMetrics
	drained, idleTimeouts, errors *metrics.Counter
	traffic                       stream.Traffic
}

// NewServerMetrics registers what the server of a listener counts. r may be nil.
func NewServerMetrics(r *metrics.Registry, listener string) ServerMetrics {
	return ServerMetrics{
		ConnectionMetrics: NewConnectionMetrics(r, listener),

		drained:      r.Counter(connectionsDrained, listener),
		idleTimeouts: r.Counter(idleTimeouts, listener),
		errors:       r.Counter(protocolErrors, listener),
		traffic: stream.Traffic{
			Received: r.Counter(receivedBytes, listener),
			Sent:     r.Counter(sentBytes, listener),
		},
	}
}

// ended counts the end of a connection that lasted so long.
func (m *ConnectionMetrics) ended(lasted time.Duration, end connectionEnd) {
	m.active.Add(-1)
	m.duration.Observe(int64(lasted))
	switch end {
	case endedByClient:
		m.closedByClient.Inc()
	case endedByUs:
		m.closedByUs.Inc()
	}
}
