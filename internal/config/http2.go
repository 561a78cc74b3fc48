package config

import "time"

// ListenerHTTP2 is what a listener does with HTTP/2.
type ListenerHTTP2 struct {
	Enabled bool // offered by ALPN with TLS; without, it is for who begins with it (prior knowledge)

	// WebSockets are offered to clients over HTTP/2, too (RFC 8441).
	WebSockets bool
}

// readListenerHTTP2 reads what belongs to a listener that speaks HTTP.
func readListenerHTTP2(listener *table) ListenerHTTP2 {
	h := ListenerHTTP2{Enabled: listener.has("tls")}
	listener.boolean("http2", &h.Enabled)
	listener.boolean("http2_websockets", &h.WebSockets)
	if !h.Enabled {
		listener.inapplicable("http2_websockets", "the listener has no HTTP/2; that is with tls, or with http2 = true")
	}
	return h
}

// mostStreams is more than any client has under way on one connection.
const mostStreams = 10000

// readHTTP2Limits reads those of a listener's limits that are about HTTP/2.
func readHTTP2Limits(limits *table, l *ListenerLimits, h ListenerHTTP2) {
	streams := int64(l.HTTP2Streams)
	limits.integer("http2_streams", &streams, 1, mostStreams)
	l.HTTP2Streams = int(streams)
	if !h.Enabled {
		limits.inapplicable("http2_streams", "the listener has no HTTP/2; that is with TLS, or with http2 = true")
	}
}

// Protocol is what endpoints are spoken to in.
type Protocol int

// The protocols.
const (
	HTTP1      Protocol = iota
	HTTP2               // always: by ALPN with TLS, by prior knowledge without
	Negotiated          // by ALPN: HTTP/2 if the endpoint has it
)

// protocols are what a file calls them, by number.
var protocols = []string{HTTP1: "http1", HTTP2: "http2", Negotiated: "auto"}

// ClusterHTTP2 is how HTTP/2 is spoken to endpoints.
type ClusterHTTP2 struct {
	Streams      int           // most requests at once on a connection
	PingInterval time.Duration // without a frame until an endpoint is asked whether it is there; 0: never
}

// mostHTTP2Streams is how many requests a connection may be given: each may need memory, and all
// end when the connection does.
const mostHTTP2Streams = 1000

// readClusterProtocol reads the protocol of c, of which connecting and TLS are known.
func readClusterProtocol(cluster *table, c *Cluster) {
	protocol, streams := int(HTTP1), int64(100)
	read(cluster, "protocol", &protocol, numbered(protocols))
	cluster.integer("http2_streams", &streams, 1, mostHTTP2Streams)
	read(cluster, "http2_ping_interval", &c.HTTP2.PingInterval, durationOrOff)
	c.Protocol, c.HTTP2.Streams = Protocol(protocol), int(streams)
	switch {
	case c.Protocol == HTTP1:
		for _, key := range []string{"http2_streams", "http2_ping_interval"} {
			cluster.inapplicable(key, `no HTTP/2 is spoken to the endpoints unless protocol is "http2" or "auto"`)
		}
		c.HTTP2 = ClusterHTTP2{}
		return
	case c.Connecting.ProxyProtocol != 0:
		cluster.at("protocol").fail("clients share the connections then, but proxy_protocol names one client at the beginning of each")
	case c.Protocol == Negotiated && c.TLS == nil:
		cluster.at("protocol").fail(`%s is decided by ALPN, which is a part of TLS: the cluster needs tls, or protocol = "http2"`, quote("auto"))
	}
	if p := c.HTTP2.PingInterval; p > 0 && p < leastPingInterval {
		cluster.at("http2_ping_interval").fail("must be %s or more: many endpoints take more PINGs for an attack", writeDuration(leastPingInterval))
	}
}

// leastPingInterval is how often an endpoint is asked at most.
const leastPingInterval = time.Second

// checkUpgradable refuses a route for upgrades to a cluster that can have none. Which cluster a
// field of the request names, nobody knows here.
func checkUpgradable(t *table, r *Route, refs *references) {
	if !r.MakesTunnels() {
		return
	}
	for _, w := range r.Clusters {
		if c, ok := refs.clusters[w.Cluster]; ok && c.Protocol == HTTP2 && c.TLS == nil {
			key := "websocket"
			if !r.WebSocket {
				key = "upgrades"
			}
			t.at(key).fail("cluster %s has protocol = \"http2\" without tls: no connection to it can be upgraded", quote(w.Cluster))
			return
		}
	}
}
