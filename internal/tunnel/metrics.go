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
	tunnelsResumed = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_resumed_total",
		Help: "Tunnels of a process that died which went on in this one.",
		Type: metrics.TypeCounter,
	})
	recoveredFlows = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_recovered_flows_total",
		Help: "Directions of tunnels that were resumed, by what was found of them on its way: nothing, bytes in a buffer or in a pipe, or bytes that were sent and not yet taken from the sender.",
		Type: metrics.TypeCounter, Labels: []string{"found"},
	})
	tunnelsMoved = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_moved_total",
		Help: "Open tunnels that have come from another process, or gone to one: in or out.",
		Type: metrics.TypeCounter, Labels: []string{"direction"},
	})
	tunnelsDeposited = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_deposited",
		Help: "Open tunnels that would outlive this process.",
		Type: metrics.TypeGauge,
	})
	tunnelsUndeposited = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnels_undeposited",
		Help: "Open tunnels that would not outlive this process although they should, by the cause: the vault is busy or full, or nobody keeps it, bytes from before the tunnel are still to be sent, or it is not plain TCP.",
		Type: metrics.TypeGauge, Labels: []string{"cause"},
	})
	truncatedEnds = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_truncated_ends_total",
		Help: "How often a TLS peer of a tunnel has ended its direction by a FIN alone, without saying so in TLS (close_notify). It is passed on as a FIN, although somebody in between may have cut what was sent. By the side of that peer: downstream or upstream.",
		Type: metrics.TypeCounter, Labels: []string{"side"},
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

	resumed           *metrics.Counter
	recovered         [numFound]*metrics.Counter
	movedIn, movedOut *metrics.Counter
	custody           [numCustodies]*metrics.Gauge
	truncated         [2]*metrics.Counter // by the socket
}

// What is found of a flow that is resumed.
const (
	foundNothing = iota
	foundBuffer
	foundPipe
	foundPeeked
	numFound
)

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

		resumed: r.Counter(tunnelsResumed),
		recovered: [numFound]*metrics.Counter{
			foundNothing: r.Counter(recoveredFlows, "nothing"),
			foundBuffer:  r.Counter(recoveredFlows, "buffer"),
			foundPipe:    r.Counter(recoveredFlows, "pipe"),
			foundPeeked:  r.Counter(recoveredFlows, "peeked"),
		},
		movedIn:  r.Counter(tunnelsMoved, "in"),
		movedOut: r.Counter(tunnelsMoved, "out"),
		custody: [numCustodies]*metrics.Gauge{
			deposited: r.Gauge(tunnelsDeposited),
			waiting:   r.Gauge(tunnelsUndeposited, "busy"),
			refused:   r.Gauge(tunnelsUndeposited, "full"),
			absent:    r.Gauge(tunnelsUndeposited, "nobody"),
			early:     r.Gauge(tunnelsUndeposited, "early bytes"),
			notPlain:  r.Gauge(tunnelsUndeposited, "not plain TCP"),
		},
		truncated: [2]*metrics.Counter{
			down: r.Counter(truncatedEnds, "downstream"),
			up:   r.Counter(truncatedEnds, "upstream"),
		},
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

// resume and arrive count a tunnel that was started elsewhere, leave one that goes on
// there.
func (m *setMetrics) resume() {
	m.resumed.Inc()
	m.active.Add(1)
}

func (m *setMetrics) arrive() {
	m.movedIn.Inc()
	m.active.Add(1)
}

func (m *setMetrics) leave() {
	m.movedOut.Inc()
	m.active.Add(-1)
}

// found counts what was found of a flow that is resumed.
func (m *setMetrics) found(r *inflight.Rest) {
	what := foundNothing
	switch {
	case r.Buffer != nil:
		what = foundBuffer
	case r.Pipe != nil:
		what = foundPipe
	case r.Discard > 0:
		what = foundPeeked
	}
	m.recovered[what].Inc()
}

func (m *setMetrics) end(r *Record) {
	m.active.Add(-1)
	m.ended[r.Reason].Inc()
	m.duration.Observe(int64(r.Ended.Sub(r.Started)))
}

// countNotPlain counts a tunnel that cannot be deposited, if it should.
func (s *Set) countNotPlain(r *Record, n int64) {
	if s.vault != nil && r.SurviveCrash {
		s.metrics.custody[notPlain].Add(n)
	}
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
