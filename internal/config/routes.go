package config

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

func readRoutes(host *table, refs references) []Route {
	var routes []Route
	earlier := taken{prefixes: map[string]node{}, paths: map[string]node{}}
	for _, t := range host.tables("routes") {
		r := readRoute(t, refs)
		earlier.add(r.Match, t.at("match"))
		routes = append(routes, r)
	}
	if host.empty("routes") {
		host.at("routes").fail("missing; a virtual host needs at least one [[virtual_hosts.routes]]")
	}
	return routes
}

func readRoute(t *table, refs references) Route {
	r := Route{Timeout: 15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: refs.tunnels}
	r.Match = readMatch(t)
	readTarget(t, &r, refs)
	t.boolean("websocket", &r.WebSocket)
	readRewrites(t, &r, refs)
	read(t, "timeout", &r.Timeout, durationOrOff)
	read(t, "stream_idle_timeout", &r.StreamIdleTimeout, durationOrOff)
	tunnels := t.table("tunnels")
	readTunnelKeys(tunnels, &r.Tunnels)
	tunnels.strict()
	if r.Redirect != nil {
		checkRedirect(t, r)
	} else if !r.WebSocket {
		t.inapplicable("tunnels", "this route has no tunnels; they need websocket = true")
	}
	t.strict()
	return r
}

func readMatch(route *table) Match {
	t := route.table("match")
	var m Match
	read(t, "prefix", &m.Prefix, matchPath)
	read(t, "path", &m.Path, matchPath)
	t.strict()
	switch prefix, path := t.has("prefix"), t.has("path"); {
	case prefix && path:
		t.fail("has both prefix and path; one is needed")
		return Match{}
	case !route.has("match"):
		t.fail(`missing; must be a table like { prefix = "/" } or { path = "/exact" }`)
	case t.keys != nil && len(t.keys) == 0:
		t.fail(`must have prefix or path, as in { prefix = "/" }`)
	}
	return m
}

// matchPath is a path, or the beginning of one, as clients send it.
var matchPath = form[string]{`a path like "/chat"`, func(s string) (string, error) {
	if err := checkTarget(s); err != nil {
		return "", err
	}
	if strings.Contains(s, "?") {
		return "", errors.New(`only the path is compared: it ends before the "?"`)
	}
	return s, nil
}, asIs}

// redirectPath may bring a query along.
var redirectPath = form[string]{`a path like "/new" or "/new?a=b"`, func(s string) (string, error) {
	return s, checkTarget(s)
}, asIs}

// checkTarget refuses what cannot stand in a request target (RFC 9112 §3.2).
func checkTarget(s string) error {
	const most = 4096
	switch {
	case !strings.HasPrefix(s, "/"):
		return errors.New("it does not begin with /")
	case len(s) > most:
		return fmt.Errorf("it is longer than %d bytes", most)
	case strings.Contains(s, "#"):
		return errors.New(`a client never sends "#" and what follows`)
	case strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return errors.New("spaces, control characters and letters beyond ASCII are written as %XX")
	}
	return nil
}

// readTarget reads where the requests go: exactly one of three keys.
func readTarget(t *table, r *Route, refs references) {
	if n, ok := t.get("cluster"); ok {
		if name, ok := refer(n, "cluster", refs.clusterNames); ok {
			r.Clusters = []WeightedCluster{{Cluster: name, Weight: 1}}
			t.set("cluster", strconv.Quote(name))
		}
	}
	if _, ok := t.get("weighted_clusters"); ok {
		r.Clusters = readWeightedClusters(t, refs)
	}
	if _, ok := t.get("redirect"); ok {
		r.Redirect = readRedirect(t.table("redirect"))
	}
	var given []string
	for _, key := range []string{"cluster", "weighted_clusters", "redirect"} {
		if t.has(key) {
			given = append(given, key)
		}
	}
	switch len(given) {
	case 0:
		t.fail("has no target; one of cluster, weighted_clusters and redirect is needed")
	case 1:
	default:
		t.fail("has %s; only one of them can be the target", strings.Join(given, " and "))
	}
}

// maxWeight keeps sums of weights far from any overflow.
const maxWeight = 1_000_000

func readWeightedClusters(route *table, refs references) []WeightedCluster {
	var shares []WeightedCluster
	var sum int64
	whole := true // whether the sum is known
	for _, t := range route.tables("weighted_clusters") {
		var w WeightedCluster
		if n, ok := t.get("cluster"); !ok {
			n.fail("missing; must be the name of a cluster")
		} else if name, ok := refer(n, "cluster", refs.clusterNames); ok {
			if slices.ContainsFunc(shares, func(s WeightedCluster) bool { return s.Cluster == name }) {
				n.fail("%s is listed twice; add the weights up", quote(name))
			}
			w.Cluster = name
			t.set("cluster", strconv.Quote(name))
		}
		weight := int64(-1)
		if t.integer("weight", &weight, 0, maxWeight); !t.has("weight") {
			t.at("weight").fail("missing; must be an integer from 0 to %d", maxWeight)
		}
		t.strict()
		whole = whole && weight >= 0
		sum += max(weight, 0)
		w.Weight = uint32(max(weight, 0))
		shares = append(shares, w)
	}
	switch {
	case route.empty("weighted_clusters"):
		route.at("weighted_clusters").fail("must have at least one { cluster = \"name\", weight = 1 }")
	case len(shares) > 0 && whole && sum == 0:
		route.at("weighted_clusters").fail("the weights are 0 in sum, so no cluster would get a request; one must be positive")
	}
	return shares
}

func readRedirect(t *table) *Redirect {
	r := Redirect{Status: 301}
	read(t, "scheme", &r.Scheme, oneOf("http", "https"))
	read(t, "host", &r.Host, authority)
	read(t, "path", &r.Path, redirectPath)
	if n, ok := t.get("status"); ok {
		status, _ := n.raw.(int64)
		if r.Status = int(status); !slices.Contains([]int64{301, 302, 303, 307, 308}, status) {
			n.fail("must be 301, 302, 303, 307 or 308, found %s", describe(n.raw))
		}
	}
	t.set("status", strconv.Itoa(r.Status))
	t.strict()
	if t.keys != nil && !t.has("scheme") && !t.has("host") && !t.has("path") {
		t.fail("leads back to where it came from; at least one of scheme, host and path is needed")
	}
	return &r
}

// checkRedirect refuses keys that have no meaning where we answer ourselves.
func checkRedirect(t *table, r Route) {
	if r.WebSocket {
		t.at("websocket").fail("a redirect answers every request, so no WebSocket can open; drop one of the two")
	}
	for _, key := range []string{"prefix_rewrite", "host_rewrite", "auto_host_rewrite", "timeout", "stream_idle_timeout", "tunnels"} {
		t.inapplicable(key, "has no meaning beside redirect, which sends no request to a cluster; drop one of the two")
	}
}

func readRewrites(t *table, r *Route, refs references) {
	read(t, "prefix_rewrite", &r.PrefixRewrite, matchPath)
	read(t, "host_rewrite", &r.HostRewrite, authority)
	t.boolean("auto_host_rewrite", &r.AutoHostRewrite)
	if t.has("prefix_rewrite") && r.Match.Path != "" {
		t.at("prefix_rewrite").fail("goes with match.prefix only; this route matches the whole path %q", r.Match.Path)
	}
	if !r.AutoHostRewrite {
		return
	}
	if t.has("host_rewrite") {
		t.at("auto_host_rewrite").fail("excludes host_rewrite: both say what the upstream's host is; drop one of the two")
	}
	for _, w := range r.Clusters {
		for _, e := range refs.clusters[w.Cluster].Endpoints {
			if strings.HasPrefix(e.Address, "unix:") {
				t.at("auto_host_rewrite").fail("endpoint %q of cluster %q has no host to rewrite to; use host_rewrite", e.Address, w.Cluster)
			}
		}
	}
}

// taken knows the matches of the routes so far.
type taken struct{ prefixes, paths map[string]node }

// add notes a route's match, or the problem that an earlier one leaves nothing
// to it: the first route that matches wins.
func (k taken) add(m Match, place node) {
	const text = "can never match: the route with %s %q (%s) comes first; put this one before it or drop it"
	whole := m.Prefix + m.Path // one of them is empty
	for i := range len(whole) {
		if first, ok := k.prefixes[whole[:i+1]]; ok {
			place.fail(text, "prefix", whole[:i+1], first)
			return
		}
	}
	switch first, ok := k.paths[m.Path]; {
	case ok:
		place.fail(text, "path", m.Path, first)
	case m.Path != "":
		k.paths[m.Path] = place
	case m.Prefix != "":
		k.prefixes[m.Prefix] = place
	}
}
