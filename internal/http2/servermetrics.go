package http2

import (
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
)

// What is counted of connections of HTTP/2 beside what is of all.
var (
	connectionsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_connections_total",
		Help: "Connections of clients that speak HTTP/2, which are among all connections, too.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	connectionsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_connections_active",
		Help: "Open connections of clients that speak HTTP/2.",
		Type: metrics.TypeGauge, Labels: []string{"listener"},
	})
	streamsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_streams_total",
		Help: "Requests of clients over HTTP/2 that were valid.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	streamsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_streams_active",
		Help: "Requests over HTTP/2 that are being answered.",
		Type: metrics.TypeGauge, Labels: []string{"listener"},
	})
	resets = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_resets_total",
		Help: "Streams of HTTP/2 that were reset, by the side that did so: downstream or holdfast. Those are not counted that only say that the rest of a request's body is not needed.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "by"},
	})
	goAways = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_goaways_total",
		Help: "GOAWAY frames of HTTP/2, by the side that sent them: downstream or holdfast; and by whether they tell of an error.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "by", "error"},
	})
	floodsTotal = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_floods_total",
		Help: "Connections of HTTP/2 that were ended because their clients sent too much that is of no use, by what that was.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "kind"},
	})
	headerOverflows = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_http2_header_overflows_total",
		Help: "Requests over HTTP/2 with more than limits.head_size, or with too many fields.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
)

// ServerMetrics is what a [Server] counts. The zero value counts nothing.
type ServerMetrics struct {
	http1.ServerMetrics
	connections, streams, overflows *metrics.Counter
	active, streaming               *metrics.Gauge
	resets                          [2]*metrics.Counter    // by us, by the client
	goAways                         [2][2]*metrics.Counter // in order, or because of an error
	floods                          [numFloods]*metrics.Counter
}

// NewServerMetrics registers what the server of a listener counts, of which those of HTTP/1 are a
// part. r may be nil.
func NewServerMetrics(r *metrics.Registry, listener string, of http1.ServerMetrics) ServerMetrics {
	m := ServerMetrics{
		ServerMetrics: of,
		connections:   r.Counter(connectionsTotal, listener),
		active:        r.Gauge(connectionsActive, listener),
		streams:       r.Counter(streamsTotal, listener),
		streaming:     r.Gauge(streamsActive, listener),
		overflows:     r.Counter(headerOverflows, listener),
	}
	for i, by := range []string{"holdfast", "downstream"} {
		m.resets[i] = r.Counter(resets, listener, by)
		for j, failed := range []string{"no", "yes"} {
			m.goAways[i][j] = r.Counter(goAways, listener, by, failed)
		}
	}
	for kind := noFlood + 1; kind < numFloods; kind++ {
		m.floods[kind] = r.Counter(floodsTotal, listener, floodNames[kind])
	}
	return m
}
