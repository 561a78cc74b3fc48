package tunnel

import "holdfast/internal/metrics"

// What is counted of all tunnels of a Set.
var (
	tunnelsStarted = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_started_total",
		Help: "Tunnels that were started.",
		Type: metrics.TypeCounter,
	})
	tunnelsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_active",
		Help: "Open tunnels.",
		Type: metrics.TypeGauge,
	})
	tunnelsEnded = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_ended_total",
		Help: "Tunnels that have ended, by the first cause, as access logs name it. Those of a process that died are not among them.",
		Type: metrics.TypeCounter, Labels: []string{"reason"},
	})
	tunnelDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_duration_seconds",
		Help: "How long tunnels lasted.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds,
		Bounds: []float64{1, 10, 60, 300, 900, 3600, 10800, 21600, 43200, 86400, 172800, 345600, 604800, 1209600},
	})
	relayedBytes = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_relayed_bytes_total",
		Help: "Bytes of tunnels that the socket on that side has taken: upstream or downstream.",
		Type: metrics.TypeCounter, Labels: []string{"to"},
	})
	bufferBytes = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_buffer_bytes",
		Help: "Memory for bytes of tunnels that move, or wait for a slow receiver.",
		Type: metrics.TypeGauge,
	})
)

// setMetrics is what a [Set] counts.
type setMetrics struct {
	started                  *metrics.Counter
	active                   *metrics.Gauge
	ended                    [numReasons]*metrics.Counter
	duration                 *metrics.Histogram
	toUpstream, toDownstream *metrics.Counter
	buffers                  *metrics.Gauge
}

func newSetMetrics(r *metrics.Registry) setMetrics {
	m := setMetrics{
		started:      r.Counter(tunnelsStarted),
		active:       r.Gauge(tunnelsActive),
		duration:     r.Histogram(tunnelDuration),
		toUpstream:   r.Counter(relayedBytes, "upstream"),
		toDownstream: r.Counter(relayedBytes, "downstream"),
		buffers:      r.Gauge(bufferBytes),
	}
	for reason := Open + 1; reason < numReasons; reason++ {
		m.ended[reason] = r.Counter(tunnelsEnded, reason.String())
	}
	return m
}

// start counts a tunnel, end the end of one.
func (m *setMetrics) start() {
	m.started.Inc()
	m.active.Add(1)
}

func (m *setMetrics) end(r *Record) {
	m.active.Add(-1)
	m.ended[r.Reason].Inc()
	m.duration.Observe(int64(r.Ended.Sub(r.Started)))
}

// Sample brings those metrics up to date that do not follow by themselves.
func (s *Set) Sample() { s.metrics.buffers.Set(int64(s.Buffers()) * bufferSize) }
