package proxy

import (
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/sni"
)

// What is counted of listeners that relay connections as they are, beside what is counted of
// the connections of every listener.
var (
	tcpRefusedTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_tcp_connections_refused_total",
		Help: "Connections to be relayed as they are that were closed before there was a tunnel, by what was in the way.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "reason"},
	})
	tcpHellosTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_tcp_hellos_total",
		Help: "What was found in the first bytes of connections that go by the server which a TLS client asks for. Only of listeners with tcp_routes.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "found"},
	})
	tcpTunnelsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_tcp_tunnels_total",
		Help: "Tunnels that were made of connections to be relayed as they are.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "route"},
	})
	tcpTunnelsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_tcp_tunnels_active",
		Help: "Open tunnels that were made of connections to be relayed as they are.",
		Type: metrics.TypeGauge, Labels: []string{"listener", "route"},
	})
	tcpRelayed = metrics.Define(metrics.Desc{
		Name: "holdfast_tcp_tunnel_relayed_bytes_total",
		Help: "Bytes of connections that are relayed as they are, as the socket on that side has taken them: upstream or downstream.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "route", "to"},
	})
)

// A tcpRefusal is why a connection has not become a tunnel.
type tcpRefusal uint8

const (
	tcpAddress     tcpRefusal = iota // the client's address is not allowed
	tcpNoRoute                       // nothing is there for what the client asks for
	tcpSlow                          // it was not known in time what that is
	tcpLarge                         // nor will it be
	tcpUnreachable                   // no endpoint could be connected to
	tcpTooSlow                       // nor in time
	tcpGone                          // the client went first
	tcpCut                           // the time of a drain or a stop was over
	tcpFault                         // ours
	numTCPRefusals
)

var tcpRefusals = [numTCPRefusals]string{
	tcpAddress:     "address denied",
	tcpNoRoute:     "no route",
	tcpSlow:        "too slow",
	tcpLarge:       "hello too large",
	tcpUnreachable: "upstream unreachable",
	tcpTooSlow:     "upstream too slow",
	tcpGone:        "cancelled",
	tcpCut:         "cut",
	tcpFault:       "fault",
}

// tcpMetrics is what is counted of one listener.
type tcpMetrics struct {
	http1.ConnectionMetrics
	refused   [numTCPRefusals]*metrics.Counter
	hellos    [sni.TooLarge + 1]*metrics.Counter // by the state; nil: nobody looks
	handshake *metrics.Histogram
	routes    []tcpRouteMetrics // by their numbers
}

// tcpRouteMetrics is what is counted of one of its routes.
type tcpRouteMetrics struct {
	routeTunnels
	tunnels *metrics.Counter
}

func newTCPMetrics(r *metrics.Registry, listener string, routes *route.TCP) tcpMetrics {
	m := tcpMetrics{
		ConnectionMetrics: http1.NewConnectionMetrics(r, listener),
		handshake:         r.Histogram(handshakeDuration, listener),
	}
	for why, name := range tcpRefusals {
		m.refused[why] = r.Counter(tcpRefusedTotal, listener, name)
	}
	if routes.BySNI {
		for state := sni.More + 1; state <= sni.TooLarge; state++ {
			m.hellos[state] = r.Counter(tcpHellosTotal, listener, state.String())
		}
	}
	for _, way := range routes.Routes() {
		m.routes = append(m.routes, tcpRouteMetrics{newTCPTunnels(r, listener, way.Name), r.Counter(tcpTunnelsTotal, listener, way.Name)})
	}
	return m
}

// newTCPTunnels returns what is counted of the living tunnels under these names, which may be
// those of a former configuration.
func newTCPTunnels(r *metrics.Registry, listener, route string) routeTunnels {
	return routeTunnels{
		active:      r.Gauge(tcpTunnelsActive, listener, route),
		relayedUp:   r.Counter(tcpRelayed, listener, route, "upstream"),
		relayedDown: r.Counter(tcpRelayed, listener, route, "downstream"),
	}
}
