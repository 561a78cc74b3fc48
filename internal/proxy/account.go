package proxy

import (
	"errors"
	"net"
	"os"
	"strconv"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/accesslog/flags"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// account is what a request leaves behind: in the metrics, and in the access log.
type account struct {
	metrics      *requestMetrics // of its listener
	routeMetrics *routeMetrics   // nil: no route matches
	call         upstream.Call   // the last one
	called       bool            // an endpoint was given the request

	began        time.Time
	upstreamTime time.Duration // to the head of the final response; only for the access log
	received     uint64        // bytes of the body
	sent         uint64        // bytes of the response's body

	flags      flags.Set
	reason     string // why we answered by ourselves, or did not complete the response
	responded  bool   // the final response was begun
	complete   bool   // it was sent to its end
	clientLeft bool   // it was not, and that is the client's doing
	switched   bool   // the request became a tunnel

	healthCheck bool // it was one, which we have answered
}

// side returns what is known of a listener.
func (m *Manager) side(listener string) *side {
	if s := m.listeners[listener]; s != nil {
		return s
	}
	return &m.stranger
}

// open counts a request.
func (r *request) open(s *side) {
	r.metrics, r.began = &s.metrics, r.loop.Now()
	r.metrics.requests.Inc()
	r.loop.Counts.Move(r.metrics.active, 1)
}

// settle counts and records how the request has ended. A tunnel was recorded when it
// was opened.
func (r *request) settle() {
	counts := &r.loop.Counts
	counts.Move(r.metrics.active, -1)
	if r.switched {
		return
	}
	took := r.loop.Clock().Sub(r.began) // what the turn had to do meanwhile is in it
	switch {
	case r.complete:
		counts.Observe(r.metrics.duration, int64(took))
		if r.routeMetrics != nil {
			counts.Observe(r.routeMetrics.duration, int64(took))
		}
	case r.clientLeft:
		counts.Inc(r.metrics.cutByClient)
	default:
		counts.Inc(r.metrics.cutByUs)
		if r.reason == "" { // a panic
			r.reason = errFault.Error()
			r.flag(flags.LocalReset)
		}
	}
	if r.m.options.AccessLog != nil {
		record := r.record(took)
		r.m.options.AccessLog.Request(&record)
	}
}

// begins counts a response that is begun. It comes before anything of it is sent, and at
// once for the listener: whoever has an answer finds it counted there, also when the process
// is killed meanwhile.
func (r *request) begins(status int) {
	r.status, r.responded = status, true
	r.metrics.responses.Of(status).Inc()
	if r.routeMetrics != nil {
		r.loop.Counts.Inc(r.routeMetrics.responses.Of(status))
	}
}

// record is the request as the access log has it, when it took so long.
func (r *request) record(took time.Duration) accesslog.Record {
	record := accesslog.Record{
		Start:        r.began,
		Duration:     took,
		Upstream:     r.upstreamTime,
		RequestID:    r.id,
		Listener:     r.listener,
		Cluster:      r.cluster,
		Client:       r.x.Downstream().Remote,
		Method:       r.head.Method,
		Scheme:       r.scheme,
		Authority:    r.authority,
		Target:       r.original,
		Protocol:     protocol(r.head),
		Received:     r.received,
		Sent:         r.sent,
		Reason:       r.reason,
		Flags:        r.flags,
		ForwardedFor: r.forwardedFor,
		HealthCheck:  r.healthCheck,
		TLS:          agreementOf(r.x.Downstream().Secure).tls(),

		ClientAddress: r.client,

		RequestFields:  r.logged.ofRequest(r.m.options.AccessLog, r.head),
		ResponseFields: r.logged.response,
	}
	if r.responded {
		record.Status = r.status
	}
	if r.route != nil {
		record.VirtualHost, record.Route = r.route.VirtualHost, r.route.Name
	}
	if r.endpoint != nil {
		record.Endpoint = r.endpoint.Address
	}
	record.UserAgent, _ = r.head.Fields.Get("User-Agent")
	record.Referer, _ = r.head.Fields.Get("Referer")
	return record
}

// protocol is the version that the client spoke, "" where that is not known.
func protocol(r *exchange.Request) string {
	switch {
	case r.Major == 0:
		return ""
	case r.Major == 1 && r.Minor == 1: // in almost every case
		return "HTTP/1.1"
	}
	return "HTTP/" + strconv.Itoa(r.Major) + "." + strconv.Itoa(r.Minor)
}

// outcome says how a request that an endpoint was given has ended with this error, or
// without one although it is not complete: by a panic, for which no endpoint can.
func (r *request) outcome(err error) upstream.Outcome {
	if r.cause != nil && err != nil {
		switch r.cause {
		case errResponseTimeout, errHandshakeTimeout, errIdleUpstream:
			return upstream.TimedOut
		}
		return upstream.Cancelled
	}
	_, gone := errors.AsType[goneError](err)
	switch {
	case r.switched:
		return upstream.BecameTunnel
	case r.complete:
		return upstream.Complete
	case err == nil, gone:
		return upstream.Cancelled
	case err == errDiscarded, err == errUnauthorized:
		return upstream.Discarded
	case err == errTryTimeout:
		return upstream.TimedOut
	case isInvalid(err):
		return upstream.Invalid
	}
	return upstream.Reset
}

// upgradeOutcome says what has become of an upgrade that was tried, as far as the
// upstream and this error are concerned: no answer of our own was given yet.
func (r *request) upgradeOutcome(err error) upgradeOutcome {
	switch {
	case r.switched:
		return upgraded
	case r.responded:
		return rejected
	case isOverflow(err):
		return overflowed
	case !r.called && r.cause == nil:
		return unreachable
	}
	switch r.outcome(err) {
	case upstream.TimedOut:
		return tooSlow
	case upstream.Invalid:
		return invalid
	case upstream.Cancelled:
		return cancelled
	case upstream.Discarded:
		return filtered
	}
	return broken
}

// Refused counts and records a request that the codec of a listener has answered.
func (m *Manager) Refused(d exchange.Downstream, f http1.Refusal) {
	s := m.side(d.Listener)
	s.metrics.requests.Inc()
	s.metrics.responses.Of(f.Status).Inc()
	s.metrics.refused[codecRefusals[f.Status]].Inc()
	switch {
	case f.Err == nil:
		s.metrics.duration.Observe(since(f.Start))
	case errors.Is(f.Err, net.ErrClosed), errors.Is(f.Err, os.ErrDeadlineExceeded):
		s.metrics.cutByUs.Inc()
	default:
		s.metrics.cutByClient.Inc()
	}
	record := accesslog.Record{
		Start:     f.Start,
		Duration:  time.Since(f.Start),
		Listener:  d.Listener,
		Client:    d.Remote,
		Method:    f.Request.Method,
		Scheme:    f.Request.Scheme,
		Authority: f.Request.Authority,
		Target:    f.Request.Target,
		Protocol:  protocol(f.Request),
		Status:    f.Status,
		Sent:      f.Sent,
		Reason:    f.Reason,
		Flags:     flagsOfRefusal(&f),
		TLS:       agreementOf(d.Secure).tls(),

		ClientAddress: s.clientOf(f.Request.Fields, d.Remote, s.trustsPeer(d.Remote)),
		RequestFields: new(logged).ofRequest(m.options.AccessLog, f.Request),
	}
	m.options.AccessLog.Request(&record)
}

// tunnelOpened counts and records that the request became a tunnel. What it returns
// is the tunnel's tag: its record in the access log, nil without one.
func (r *request) tunnelOpened() any {
	took := r.loop.Clock().Sub(r.began)
	r.switched = true
	r.begins(r.status)
	r.metrics.handshake.Observe(int64(took))
	r.routeMetrics.tunnels.Inc()
	r.routeMetrics.active.Add(1)
	r.endpoint.TunnelOpened(&r.call)
	if r.m.options.AccessLog == nil {
		return nil
	}
	record := r.record(took)
	return r.m.options.AccessLog.TunnelOpened(&record)
}

// TunnelArrived counts that a tunnel which was opened in another generation lives here. It
// ends, or leaves, like one that the manager has started.
func (m *Manager) TunnelArrived(o *tunnel.Origin) { o.Owner.(*tunnelOwner).count(1) }

// TunnelLeft counts that a tunnel lives elsewhere.
func (m *Manager) TunnelLeft(o *tunnel.Origin) { o.Owner.(*tunnelOwner).count(-1) }

// TunnelEnded counts and records the end of a tunnel.
func (m *Manager) TunnelEnded(r *tunnel.Record) {
	m.TunnelLeft(r.Origin)
	record, _ := r.Tag.(*accesslog.Tunnel)
	m.options.AccessLog.TunnelClosed(record, accesslog.End{
		At:           r.Ended,
		Duration:     r.Ended.Sub(r.Started),
		ToUpstream:   r.ToUp,
		ToDownstream: r.ToDown,
		Reason:       r.Reason.String(),
		Flags:        flagsOfEnd[r.Reason],
	})
}
