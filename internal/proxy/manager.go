package proxy

import (
	"cmp"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/filter"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// Manager is the HTTP connection manager: it answers exchanges by the routes, from
// the clusters' endpoints or by itself, and makes tunnels of upgrades. It
// implements [exchange.Handler] and knows no protocol. Its methods may be
// called by any number of goroutines; an exchange is answered by tasks of its loop,
// which share nothing with those of other loops but what never changes and counters.
//
// A request is answered by itself with 404 without a route, with the redirect or the
// direct response of a route that has one, with 503 without an endpoint that can be connected to and
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
	relays    map[string]*tcpListener
	retries   map[*route.Route]*retryPolicy
	mirrors   map[*route.Route]*mirrorPolicy
	budgets   map[string]*retryBudget // by cluster
	stranger  side                    // of a listener that the configuration does not name: counts nothing
	routes    *countedRoutes
	loops     []*perLoop // by stream.Loop.Index
	hostname  string     // of this machine; "" where nobody knows
	mostKept  int64      // bytes of the tapes of one loop

	noDescriptor episode // none is left to connect with

	unready atomic.Pointer[string] // why no traffic is wanted; nil: it is

	adopting  sync.Mutex
	adoptions map[provenance]adoption // at most mostAdoptions
}

// side is what the manager knows of a listener.
type side struct {
	trusted []netip.Prefix // whose forwarding fields are believed
	edge    config.Edge
	metrics requestMetrics
	chains  []filter.Chain // by route.Route.Number; nil: no filter is configured
	health  healthChecks

	secure       bool // the listener has TLS
	certificates config.CertificateForwarding
}

// perLoop is what the manager has on one loop, whose goroutine alone touches it.
type perLoop struct {
	idle    []*request // to be used again; the last one has the warmest memory
	trimmed bool       // the loop knows that they may go
	origins map[originKey]*tunnel.Origin
	shadows shadows
	filters filters
	kept    int64 // bytes of tapes
}

// mostIdleRequests is how many requests are kept on a loop for those to come.
const mostIdleRequests = 1024

// request returns one to be used, which knows nothing yet.
func (l *perLoop) request(loop *stream.Loop) *request {
	n := len(l.idle)
	if n == 0 {
		if !l.trimmed {
			l.trimmed = true
			loop.OnTrim(func() { l.trim(loop) })
		}
		return new(request)
	}
	r := l.idle[n-1]
	l.idle[n-1] = nil
	l.idle = l.idle[:n-1]
	return r
}

// keep takes one back to which nobody points any more.
func (l *perLoop) keep(r *request) {
	loop := r.loop
	if r.filter != nil {
		l.filters.keep(r.filter)
	}
	r.transit = transit{}
	if len(l.idle) < mostIdleRequests {
		l.idle = append(l.idle, r)
	} else {
		r.forget(loop)
	}
}

// trim lets go of all.
func (l *perLoop) trim(loop *stream.Loop) {
	for _, r := range l.idle {
		r.forget(loop)
	}
	l.idle = nil
	l.filters.idle = nil
}

// ManagerOptions are what a Manager works with.
type ManagerOptions struct {
	Routes    *route.Table
	Clusters  *upstream.Clusters
	Listeners []config.Listener // whose forwarding fields are believed; and those that relay connections
	Loops     int               // how many there are; 0 means 1
	Tunnels   TunnelStarter
	Log       *slog.Logger
	Metrics   *metrics.Registry // nil: nothing is counted
	AccessLog *accesslog.Log    // nil: nothing is recorded

	// Bodies is how many bytes of request bodies may be kept at once. 0 means 1 GiB.
	Bodies int64

	// Values makes numbers that may be overridden at run time. nil: none is.
	Values *dynamic.Set

	// Random chooses clusters and makes request ids. It may be called by several
	// goroutines at once. nil means the runtime's generator.
	Random func() uint64
}

// TunnelStarter takes a pair of connections over; *[tunnel.Set] does. It is called on
// the goroutine of a loop, and must not wait.
type TunnelStarter interface {
	Start(tunnel.Spec)
}

// NewManager returns a manager for these options. It starts nothing.
func NewManager(o ManagerOptions) *Manager {
	if o.Random == nil {
		o.Random = rand.Uint64
	}
	m := &Manager{options: o, listeners: make(map[string]*side, len(o.Listeners)), relays: make(map[string]*tcpListener), adoptions: make(map[provenance]adoption)}
	m.addRelays()
	o = m.options
	chains := filter.New(filter.Options{
		Routes: o.Routes.Routes(), Listeners: o.Listeners, Clusters: o.Clusters, Values: o.Values, Metrics: o.Metrics,
	})
	for _, l := range o.Listeners {
		s := &side{trusted: l.TrustedProxies, edge: l.Edge, metrics: newRequestMetrics(o.Metrics, l.Name), chains: chains[l.Name], health: newHealthChecks(o.Metrics, &l)}
		if l.TLS != nil {
			s.secure, s.certificates = true, l.TLS.ForwardCertificate
		}
		m.listeners[l.Name] = s
	}
	m.addRetries()
	m.addMirrors()
	m.routes = newCountedRoutes(o.Metrics, o.Routes.Routes())
	m.hostname, _ = os.Hostname()
	m.mostKept = cmp.Or(o.Bodies, mostBodies) / int64(max(o.Loops, 1))
	for range max(o.Loops, 1) {
		m.loops = append(m.loops, &perLoop{origins: make(map[originKey]*tunnel.Origin)})
	}
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
// left: no task, no upstream connection in use.
func (m *Manager) Serve(t *task.Task, x exchange.Exchange) {
	own := m.loops[x.Loop().Index]
	r := own.request(x.Loop())
	r.begin(m, t, x)
	r.serve()
	own.keep(r) // not after a panic: who knows what still points to it
}

// serve answers the request: what is wrong with it is said first, then it is given a route,
// which its filters may refuse, and the route's target.
func (r *request) serve() {
	defer r.end()
	switch {
	case !r.normalise(), r.answersHealthCheck(), !r.find(), !r.act():
	case (r.head.Upgrade == "" || r.route.Direct != nil) && !r.passes(): // another upgrade asks when it is known to be a proper one
	case r.route.Direct != nil:
		r.direct()
	case r.head.Upgrade != "":
		r.upgrade()
	case r.route.Redirects():
		r.redirect()
	default:
		r.forward()
	}
}

// find chooses the route, or answers that there is none.
func (r *request) find() bool {
	var outcome route.Outcome
	q := route.Query{
		Listener: r.listener, Authority: r.head.Authority, Target: r.target, Method: r.head.Method,
		Fields: &r.head.Fields, Client: r.client, Random: r.m.options.Random,
	}
	if r.route, outcome = r.m.options.Routes.Match(&q); r.route == nil {
		r.refuse(404, refusedNoRoute, outcome.String())
		return false
	}
	r.routeMetrics = r.m.routes.of(r.route)
	r.loop.Counts.Inc(r.routeMetrics.requests)
	return true
}
