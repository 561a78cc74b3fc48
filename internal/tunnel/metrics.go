package tunnel

import (
	"holdfast/internal/metrics"
	"holdfast/internal/tunnel/inflight"
)

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
		Help: "Memory for bytes of tunnels that wait for a slow receiver, or just move. What the kernel holds is not included.",
		Type: metrics.TypeGauge,
	})
	pipesInUse = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_pipes",
		Help: "Pipes through which the kernel moves bytes of tunnels right now, or in which they wait for a slow receiver.",
		Type: metrics.TypeGauge,
	})
	loopWakeups = metrics.Define(metrics.Desc{
		Name: "holdfast_loop_wakeups_total",
		Help: "How often the loops that relay tunnels have returned from waiting. Loops for which there is nothing to do are not woken.",
		Type: metrics.TypeCounter,
	})
)

// setMetrics is what a [Set] counts.
type setMetrics struct {
	started                  *metrics.Counter
	active                   *metrics.Gauge
	ended                    [numReasons]*metrics.Counter
	duration                 *metrics.Histogram
	toUpstream, toDownstream *metrics.Counter
	buffers, pipes           *metrics.Gauge
	wakeups                  *metrics.Counter
}

func newSetMetrics(r *metrics.Registry) setMetrics {
	m := setMetrics{
		started:      r.Counter(tunnelsStarted),
		active:       r.Gauge(tunnelsActive),
		duration:     r.Histogram(tunnelDuration),
		toUpstream:   r.Counter(relayedBytes, "upstream"),
		toDownstream: r.Counter(relayedBytes, "downstream"),
		buffers:      r.Gauge(bufferBytes),
		pipes:        r.Gauge(pipesInUse),
		wakeups:      r.Counter(loopWakeups),
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
func (s *Set) Sample() {
	memory := s.routines.buffers() * bufferSize
	inPipes, wakeups := 0, uint64(0)
	for _, e := range s.engines {
		memory += e.buffers() * inflight.BufferSize
		_, pipes := e.store.Held()
		inPipes += pipes
		wakeups += e.loop.Wakeups()
	}
	s.metrics.buffers.Set(int64(memory))
	s.metrics.pipes.Set(int64(inPipes))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metrics.wakeups.Add(wakeups - s.wakeups)
	s.wakeups = wakeups
}
