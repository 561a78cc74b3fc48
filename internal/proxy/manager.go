package proxy

import (
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// Manager is the HTTP connection manager: it answers exchanges by the routes, from
// the clusters' endpoints or by itself, and makes tunnels of upgrades. It
// implements [exchange.Handler] and knows no protocol. Its methods may be
// called by any number of goroutines.
//
// A request is answered by itself with 404 without a route, with the redirect of
// a redirecting route, with 503 without an endpoint that can be connected to and
// 504 if connecting took too long. Then the endpoint's answer is relayed, both
// ways at once and unbuffered. Before the head of an answer, a fault of the
// upstream is 502 (nonsense) or 503 (no answer), its delay 504, a fault in the
// client's body what the codec says; after the head, each of them cuts the
// client's connection, because a proper end would pass for a complete answer.
// How upgrades are answered stands at [request.upgrade]. A drain is the codec's: it
// knows its connections, and adds Close to what is answered on them.
type Manager struct {
	options   ManagerOptions
	listeners map[string]*side
	routes    []routeMetrics // by route.Route.Number
	buffers   sync.Pool      // of *copyBuffer
	origins   sync.Map       // of *tunnel.Origin by originKey

	noDescriptor episode // none is left to connect with

	adopting  sync.Mutex
	adoptions map[provenance]adoption // at most mostAdoptions
}

// side is what the manager knows of a listener.
type side struct {
	trusted []netip.Prefix // whose forwarding fields are believed
	metrics requestMetrics
}

// ManagerOptions are what a Manager works with.
type ManagerOptions struct {
	Routes    *route.Table
	Clusters  *upstream.Clusters
	Listeners []config.Listener // whose forwarding fields are believed
	Tunnels   TunnelStarter
	Log       *slog.Logger
	Metrics   *metrics.Registry // nil: nothing is counted
	AccessLog *accesslog.Log    // nil: nothing is recorded

	// Random chooses clusters and makes request ids. It may be called by several
	// goroutines at once. nil means the runtime's generator.
	Random func() uint64
}

// TunnelStarter takes a pair of connections over; *[tunnel.Set] does.
type TunnelStarter interface {
	Start(tunnel.Spec)
}

// copyBuffer is what one direction of a body is copied through.
type copyBuffer [32 << 10]byte

// NewManager returns a manager for these options. It starts nothing.
func NewManager(o ManagerOptions) *Manager {
	if o.Random == nil {
		o.Random = rand.Uint64
	}
	m := &Manager{options: o, listeners: make(map[string]*side, len(o.Listeners)), adoptions: make(map[provenance]adoption)}
	for _, l := range o.Listeners {
		m.listeners[l.Name] = &side{l.TrustedProxies, newRequestMetrics(o.Metrics, l.Name)}
	}
	for _, r := range o.Routes.Routes() {
		m.routes = append(m.routes, newRouteMetrics(o.Metrics, r))
	}
	m.buffers.New = func() any { return new(copyBuffer) }
	return m
}

// Requests returns how many requests there were, valid or not.
func (m *Manager) Requests() (n uint64) {
	for _, l := range m.listeners {
		n += l.metrics.requests.Value()
	}
	return n
}

// Serve implements [exchange.Handler]. It returns when nothing of the exchange is
// left: no goroutine, no upstream connection in use.
func (m *Manager) Serve(x exchange.Exchange) {
	r := newRequest(m, x)
	defer r.end()
	var outcome route.Outcome
	if r.route, outcome = m.options.Routes.Match(r.listener, r.head.Authority, r.head.Target); r.route != nil {
		r.routeMetrics = &m.routes[r.route.Number]
		r.routeMetrics.requests.Inc()
	}
	switch {
	case outcome != route.Matched:
		r.refuse(404, refusedNoRoute, outcome.String())
	case r.head.Upgrade != "":
		r.upgrade()
	case r.route.Redirects():
		r.redirect()
	default:
		r.forward()
	}
}
