package proxy

import (
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// What is counted of listeners.
var (
	acceptFailures = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_accept_failures_total",
		Help: "Failures to accept a connection, for want of descriptors or memory. The connection waits in the queue.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	limitReached = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_connection_limit_reached_total",
		Help: "Times that accepting was held up because limits.connections connections and tunnels were open.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
)

// What is counted of requests, by the listener that they came in on.
var (
	requestsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_requests_total",
		Help: "Requests, those included that were refused because they are not valid.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	requestsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_requests_active",
		Help: "Requests that are being answered, without tunnels.",
		Type: metrics.TypeGauge, Labels: []string{"listener"},
	})
	responsesTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_responses_total",
		Help: "Responses that were begun, by class of the status: 1xx is an upgrade that became a tunnel.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "class"},
	})
	requestDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_request_duration_seconds",
		Help: "How long it took until a response was complete, without upgrades that became tunnels.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"listener"}, Bounds: exchange.RequestBounds,
	})
	requestsRefused = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_requests_refused_total",
		Help: "Requests that were answered with an error of our own, by what was wrong.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "reason"},
	})
	requestsCut = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_requests_cut_total",
		Help: "Requests whose response was not begun or not completed, by the side that ended it: downstream, or holdfast, also for a fault of the upstream.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "by"},
	})
	responsesEarly = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_responses_early_total",
		Help: "Responses of upstreams that came before the request was complete.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	upgradesTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_upgrades_total",
		Help: "Requests to change to WebSocket, or another protocol that their route takes, by what became of them.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "outcome"},
	})
	handshakeDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_tunnel_handshake_duration_seconds",
		Help: "How long it took until there was a tunnel, from a request to change to WebSocket, or from the beginning of a connection that is relayed as it is.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"listener"}, Bounds: exchange.RequestBounds,
	})
)

// What is counted of routes.
var (
	routeRequests  = routeCounter("requests", "Requests that the route matched, upgrades included.")
	routeResponses = metrics.Define(metrics.Desc{
		Name: "holdfast_route_responses_total",
		Help: "Responses that were begun, by class of the status: 1xx is an upgrade that became a tunnel.",
		Type: metrics.TypeCounter, Labels: []string{"virtual_host", "route", "class"},
	})
	routeDuration = metrics.Define(metrics.Desc{
		Name: "holdfast_route_request_duration_seconds",
		Help: "How long it took until a response was complete, without upgrades that became tunnels.",
		Type: metrics.TypeHistogram, Unit: metrics.Seconds, Labels: []string{"virtual_host", "route"}, Bounds: exchange.RequestBounds,
	})
	routeRedirects     = routeCounter("redirects", "Requests that the route redirected.")
	routeDirect        = routeCounter("direct_responses", "Requests that the route answered with its direct response. Only of routes that have one.")
	routePreflights    = routeCounter("cors_preflights", "Questions of browsers before a request of another origin's page that the route answered. Only of routes with cors.")
	routeTimeouts      = routeCounter("timeouts", "Requests that were not answered within the route's timeout, or an upgrade within its tunnels.handshake_timeout.")
	routeIdleTimeouts  = routeCounter("stream_idle_timeouts", "Requests of which no byte moved within the route's stream_idle_timeout.")
	routeTunnelsTotal  = routeCounter("tunnels", "Tunnels that were made of requests that the route matched.")
	routeTunnelsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_route_tunnels_active",
		Help: "Open tunnels that were made of requests that the route matched.",
		Type: metrics.TypeGauge, Labels: []string{"virtual_host", "route"},
	})
	routeRelayed = metrics.Define(metrics.Desc{
		Name: "holdfast_route_tunnel_relayed_bytes_total",
		Help: "Bytes of tunnels that were made of requests that the route matched, as the socket on that side has taken them: upstream or downstream. Only of routes for WebSocket.",
		Type: metrics.TypeCounter, Labels: []string{"virtual_host", "route", "to"},
	})
)

func routeCounter(what, help string) *metrics.Desc {
	return metrics.Define(metrics.Desc{
		Name: "holdfast_route_" + what + "_total", Help: help,
		Type: metrics.TypeCounter, Labels: []string{"virtual_host", "route"},
	})
}

// A refusal is what was wrong with a request that we have answered ourselves with an
// error.
type refusal uint8

const (
	refusedMalformed refusal = iota
	refusedPath              // it cannot be normalised
	refusedWebSocket
	refusedNoRoute
	refusedNoCluster // the field that names it names none
	refusedOrigin    // of the page that asks for an upgrade
	refusedSlow      // the client's head or body did not come in time
	refusedBodySize
	refusedHeadSize
	refusedUnsupported
	refusedUnreachable  // no endpoint could be connected to
	refusedClosed       // the upstream's connection ended before its answer was begun
	refusedInvalid      // the upstream's answer was not valid
	refusedUpstreamSlow // the upstream did not take the connection, or answer, in time
	refusedAddress
	refusedRate
	refusedFault // on purpose
	refusedUnauthorized
	refusedAuthorization // the authorization service could not be asked
	refusedOverload      // too much is kept of the bodies of requests, or a limit of the cluster was reached
	numRefusals
)

var refusals = [numRefusals]string{
	refusedMalformed:     "malformed",
	refusedPath:          "path",
	refusedWebSocket:     "WebSocket not enabled",
	refusedNoRoute:       "no route",
	refusedNoCluster:     "no cluster",
	refusedOrigin:        "origin not allowed",
	refusedSlow:          "too slow",
	refusedBodySize:      "body too large",
	refusedHeadSize:      "head too large",
	refusedUnsupported:   "unsupported",
	refusedUnreachable:   "upstream unreachable",
	refusedClosed:        "upstream closed",
	refusedInvalid:       "upstream invalid",
	refusedUpstreamSlow:  "upstream too slow",
	refusedAddress:       "address denied",
	refusedRate:          "rate limited",
	refusedFault:         "fault injected",
	refusedUnauthorized:  "unauthorized",
	refusedAuthorization: "authorization failed",
	refusedOverload:      "overload",
}

// codecRefusals are those of a codec, by the status that it answers with or asks for.
var codecRefusals = map[int]refusal{
	400: refusedMalformed,
	408: refusedSlow,
	413: refusedBodySize,
	414: refusedHeadSize,
	417: refusedUnsupported,
	431: refusedHeadSize,
	501: refusedUnsupported,
	505: refusedUnsupported,
}

// An upgradeOutcome is what became of an upgrade that had a route.
type upgradeOutcome uint8

const (
	upgraded      upgradeOutcome = iota // a tunnel
	notEnabled                          // the route is not for that protocol
	foreignOrigin                       // the route is not for the page that asks
	malformed                           // the request announced a body
	unreachable                         // no endpoint could be connected to
	rejected                            // the upstream has answered with something else
	invalid                             // the upstream's answer was not valid
	tooSlow                             // there was no answer within the handshake's timeout
	cancelled                           // the client went first, or its connection was cut
	broken                              // the upstream's connection ended before it answered
	filtered                            // a filter has answered
	overflowed                          // a limit of the cluster was reached
	numUpgradeOutcomes
)

var upgradeOutcomes = [numUpgradeOutcomes]string{
	upgraded:      "tunnel",
	notEnabled:    "not enabled",
	foreignOrigin: "origin not allowed",
	malformed:     "malformed",
	unreachable:   "upstream unreachable",
	rejected:      "rejected",
	invalid:       "upstream invalid",
	tooSlow:       "upstream too slow",
	cancelled:     "cancelled",
	broken:        "upstream closed",
	filtered:      "filtered",
	overflowed:    "overload",
}

// acceptMetrics is what is counted of accepting on a listener. The zero value counts
// nothing.
type acceptMetrics struct {
	failures, limitReached *metrics.Counter
}

func newAcceptMetrics(r *metrics.Registry, listener string) acceptMetrics {
	return acceptMetrics{failures: r.Counter(acceptFailures, listener), limitReached: r.Counter(limitReached, listener)}
}

// requestMetrics is what is counted of the requests of a listener. The zero value
// counts nothing.
type requestMetrics struct {
	requests, early, cutByClient, cutByUs *metrics.Counter
	active                                *metrics.Gauge
	duration, handshake                   *metrics.Histogram
	responses                             exchange.Classes
	refused                               [numRefusals]*metrics.Counter
	upgrades                              [numUpgradeOutcomes]*metrics.Counter
}

func newRequestMetrics(r *metrics.Registry, listener string) requestMetrics {
	m := requestMetrics{
		requests:    r.Counter(requestsTotal, listener),
		active:      r.Gauge(requestsActive, listener),
		responses:   exchange.NewClasses(r, responsesTotal, listener),
		duration:    r.Histogram(requestDuration, listener),
		cutByClient: r.Counter(requestsCut, listener, "downstream"),
		cutByUs:     r.Counter(requestsCut, listener, "holdfast"),
		early:       r.Counter(responsesEarly, listener),
		handshake:   r.Histogram(handshakeDuration, listener),
	}
	for why, name := range refusals {
		m.refused[why] = r.Counter(requestsRefused, listener, name)
	}
	for outcome, name := range upgradeOutcomes {
		m.upgrades[outcome] = r.Counter(upgradesTotal, listener, name)
	}
	return m
}

// routeMetrics is what is counted of one route. The zero value counts nothing.
type routeMetrics struct {
	routeTunnels
	requests, redirects, timeouts, idleTimeouts, tunnels *metrics.Counter
	direct, preflights                                   *metrics.Counter // nil: the route has none
	duration                                             *metrics.Histogram
	responses                                            exchange.Classes
}

func newRouteMetrics(r *metrics.Registry, virtualHost, name string, has routeFigures) routeMetrics {
	m := routeMetrics{
		routeTunnels: routeTunnels{active: r.Gauge(routeTunnelsActive, virtualHost, name)},
		requests:     r.Counter(routeRequests, virtualHost, name),
		responses:    exchange.NewClasses(r, routeResponses, virtualHost, name),
		duration:     r.Histogram(routeDuration, virtualHost, name),
		redirects:    r.Counter(routeRedirects, virtualHost, name),
		timeouts:     r.Counter(routeTimeouts, virtualHost, name),
		idleTimeouts: r.Counter(routeIdleTimeouts, virtualHost, name),
		tunnels:      r.Counter(routeTunnelsTotal, virtualHost, name),
	}
	if has.tunnels {
		m.routeTunnels = newRouteTunnels(r, virtualHost, name)
	}
	if has.direct {
		m.direct = r.Counter(routeDirect, virtualHost, name)
	}
	if has.cors {
		m.preflights = r.Counter(routePreflights, virtualHost, name)
	}
	return m
}

// routeFigures are those that only some routes have.
type routeFigures struct{ tunnels, direct, cors bool }

// routeTunnels is what is counted of the living tunnels of a route.
type routeTunnels struct {
	active                 *metrics.Gauge
	relayedUp, relayedDown *metrics.Counter // bytes; nil: the route makes none
}

// newRouteTunnels returns what is counted under the name of a route, which may be one of a
// former configuration.
func newRouteTunnels(r *metrics.Registry, virtualHost, name string) routeTunnels {
	return routeTunnels{
		active:      r.Gauge(routeTunnelsActive, virtualHost, name),
		relayedUp:   r.Counter(routeRelayed, virtualHost, name, "upstream"),
		relayedDown: r.Counter(routeRelayed, virtualHost, name, "downstream"),
	}
}

// since is how long ago t was, as histograms of seconds take it.
func since(t time.Time) int64 { return int64(time.Since(t)) }
