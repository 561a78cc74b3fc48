package config

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// TCP is what a listener does that relays connections as they are.
type TCP struct {
	Clusters   []WeightedCluster // of connections that no route takes; nil: these are closed
	Routes     []TCPRoute        // by the server that a TLS client asks for; nil: nobody waits for what a client sends
	SNITimeout time.Duration     // until it is known which server that is
	Tunnels    Tunnels           // what the connections become
}

// TCPRoute is where the connections go that ask for certain servers.
type TCPRoute struct {
	Name        string   // unique on its listener; "" means none
	ServerNames []string // lower case: exact, "*.suffix", or "*"; each once on a listener
	Clusters    []WeightedCluster
}

// What has a meaning on listeners of one protocol only.
var (
	keysOfHTTP = []string{
		"trusted_proxies", "trusted_hops", "internal_headers", "forwarded", "request_id_in_response", "server", "path", "health_check",
		"rate_limit", "tunnel_rate_limit", "http2", "http2_websockets",
	}
	limitsOfHTTP = []string{"head_size", "head_timeout", "body_size", "body_timeout", "body_rate", "idle_timeout", "http2_streams"}
	keysOfTCP    = []string{"cluster", "weighted_clusters", "tcp_routes", "sni_timeout", "tunnels"}
)

const (
	notOfTCP  = `is about HTTP, of which a listener with protocol = "tcp" knows nothing`
	notOfHTTP = `goes with protocol = "tcp" only; where requests go is said by [[virtual_hosts.routes]]`
)

// readProtocol reads whether a listener relays connections as they are, and refuses what only
// others have.
func readProtocol(t *table) (tcp bool) {
	f := either("http", "tcp")
	read(t, "protocol", &tcp, f)
	word, ok := t.keys["protocol"].(string)
	_, err := f.parse(word)
	switch {
	case t.has("protocol") && (!ok || err != nil): // nobody knows what goes with that
		t.known = append(t.known, t.given(slices.Clone(keysOfTCP)...)...)
	case tcp:
		t.foreign(keysOfHTTP, notOfTCP)
	default:
		t.foreign(keysOfTCP, notOfHTTP)
	}
	return tcp
}

// foreign refuses keys that have no meaning here.
func (t *table) foreign(keys []string, text string) {
	for _, key := range keys {
		if t.asked(key) {
			t.at(key).fail("%s", text)
		}
	}
}

// readTCP reads what a listener has that relays connections.
func readTCP(t *table, l *Listener, refs *references) {
	l.TCP = &TCP{SNITimeout: 10 * time.Second, Tunnels: refs.tunnels}
	l.TCP.Clusters = readTCPTarget(t, refs)
	if len(t.given("cluster", "weighted_clusters", "tcp_routes")) == 0 {
		t.fail(`has no target; with protocol = "tcp" one of cluster, weighted_clusters and tcp_routes is needed`)
	}
	l.TCP.Routes = readTCPRoutes(t, refs)
	read(t, "sni_timeout", &l.TCP.SNITimeout, duration)
	if !t.has("tcp_routes") {
		t.inapplicable("sni_timeout", "nobody waits for what a client sends where there are no tcp_routes")
	}
	l.Limits.HeadTimeout = l.TCP.SNITimeout
	limits := t.table("limits")
	limits.limit("connections", &l.Limits.Connections, 1)
	limits.foreign(limitsOfHTTP, notOfTCP+"; see tunnels")
	limits.strict()
	addresses := readAddresses(t)
	l.Filters = addresses.orNone()
	if t.asked("tunnels") || !t.doc.terse {
		tunnels := t.table("tunnels")
		readTunnelKeys(tunnels, &l.TCP.Tunnels)
		tunnels.strict()
	}
}

// readDestination reads the cluster, or those that share what comes, if there are any.
func readDestination(t *table, refs *references) (clusters []WeightedCluster) {
	if n, ok := t.get("cluster"); ok {
		if name, ok := refer(n, "cluster", refs.clusterNames); ok {
			clusters = refs.alone[name]
			if !t.doc.terse {
				t.set("cluster", strconv.Quote(name))
			}
		}
	}
	if t.asked("weighted_clusters") {
		clusters = readWeightedClusters(t, refs)
	}
	return clusters
}

// readTCPTarget is readDestination where nothing else can be the target.
func readTCPTarget(t *table, refs *references) []WeightedCluster {
	if t.has("cluster") && t.has("weighted_clusters") {
		t.fail("has cluster and weighted_clusters; only one of them can be the target")
	}
	return readDestination(t, refs)
}

func readTCPRoutes(listener *table, refs *references) (routes []TCPRoute) {
	if !listener.asked("tcp_routes") {
		return nil
	}
	declared, taken := map[string]node{}, map[string]node{}
	for _, t := range listener.tables("tcp_routes") {
		var r TCPRoute
		if t.asked("name") {
			needName(t, &r.Name, declared)
		}
		r.ServerNames = readServerNames(t, taken)
		if r.Clusters = readTCPTarget(t, refs); len(t.given("cluster", "weighted_clusters")) == 0 {
			t.fail("has no target; one of cluster and weighted_clusters is needed")
		}
		t.strict()
		routes = append(routes, r)
	}
	if listener.empty("tcp_routes") {
		listener.at("tcp_routes").fail("must have at least one route; leave the key out for none")
	}
	return routes
}

func readServerNames(t *table, taken map[string]node) (names []string) {
	for _, e := range list(t, "server_names", serverName) {
		if first, twice := taken[e.value]; twice {
			e.fail("%s is listed twice (%s); a server has one route", quote(e.value), first)
			continue
		}
		taken[e.value] = e.node
		names = append(names, e.value)
	}
	if t.empty("server_names") {
		t.at("server_names").fail(`missing; must be an array with %s, or "*" for every name`, serverName.is)
	}
	return names
}

// serverName is what TLS clients ask for (RFC 6066 §3).
var serverName = form[string]{`a server's name like "example.com" or "*.example.com"`, func(s string) (string, error) {
	name, err := domain.parse(s)
	if err != nil {
		return "", err
	}
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return "", errors.New("a TLS client asks for a name, never for an address")
	}
	return name, nil
}, asIs}

// relays says whether a listener is none of virtual hosts.
func (r *references) relays(listener string) bool { return slices.Contains(r.tcp, listener) }
