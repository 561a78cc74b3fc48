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
	tables := host.tables("routes")
	routes := make([]Route, len(tables)) // no larger than it is: many are kept
	var earlier taken
	var names places
	for i, t := range tables {
		readRoute(t, &routes[i], &refs, &names, &earlier)
	}
	if host.empty("routes") {
		host.at("routes").fail("missing; a virtual host needs at least one [[virtual_hosts.routes]]")
	}
	return routes
}

func readRoute(t *table, r *Route, refs *references, names *places, earlier *taken) {
	*r = Route{Timeout: 15 * time.Second, StreamIdleTimeout: 5 * time.Minute, Tunnels: refs.tunnels}
	readRouteName(t, &r.Name, names)
	r.Match = readMatch(t, earlier)
	readTarget(t, r, refs)
	readUpgrades(t, r)
	checkUpgradable(t, r, refs)
	readRewrites(t, r, refs)
	read(t, "timeout", &r.Timeout, durationOrOff)
	read(t, "stream_idle_timeout", &r.StreamIdleTimeout, durationOrOff)
	read(t, "request_buffer", &r.RequestBuffer, bufferedSize)
	r.Retry = readRetry(t, r.Timeout)
	r.Mirror = readMirror(t, refs)
	readLimits(t, r)
	readPriority(t, r)
	r.Edits = readEdits(t)
	r.CORS = readCORS(t)
	r.HashPolicy = readHashPolicy(t)
	if t.asked("tunnels") || !t.doc.terse {
		tunnels := t.table("tunnels")
		readTunnelKeys(tunnels, &r.Tunnels)
		tunnels.strict()
	}
	if key, itself := r.answersItself(); itself {
		checkOwnAnswer(t, r, key)
	} else if !r.MakesTunnels() {
		t.inapplicable("tunnels", "this route has no tunnels; they need websocket = true or upgrades")
	}
	r.Filters = readRouteFilters(t, r.MakesTunnels(), refs)
	t.strict()
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

// readTarget reads where the requests go: exactly one of a few keys.
func readTarget(t *table, r *Route, refs *references) {
	r.Clusters = readDestination(t, refs)
	readSplit(t, r)
	read(t, "cluster_header", &r.ClusterHeader, askedField)
	if t.asked("redirect") {
		r.Redirect = readRedirect(t.table("redirect"), r.Match)
	}
	if t.asked("direct_response") {
		r.Direct = readDirectResponse(t)
	}
	given := t.given("cluster", "weighted_clusters", "cluster_header", "redirect", "direct_response")
	switch len(given) {
	case 0:
		t.fail("has no target; one of cluster, weighted_clusters, cluster_header, redirect and direct_response is needed")
	case 1:
	default:
		t.fail("has %s; only one of them can be the target", strings.Join(given, " and "))
	}
}

// MaxWeight keeps sums of weights far from any overflow.
const MaxWeight = 1_000_000

func readWeightedClusters(route *table, refs *references) []WeightedCluster {
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
		if t.integer("weight", &weight, 0, MaxWeight); !t.has("weight") {
			t.at("weight").fail("missing; must be an integer from 0 to %d", MaxWeight)
		}
		t.runtimeKey("runtime_key", &w.Weight)
		t.strict()
		whole = whole && weight >= 0
		w.Weight.Value = max(weight, 0)
		sum += w.Weight.Value
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

func readRewrites(t *table, r *Route, refs *references) {
	read(t, "prefix_rewrite", &r.PrefixRewrite, matchPath)
	if r.RegexRewrite = readRegexRewrite(t, "regex_rewrite"); t.has("prefix_rewrite") && t.has("regex_rewrite") {
		t.at("regex_rewrite").fail("excludes prefix_rewrite: both say what the upstream's path is; drop one of the two")
	}
	readHostRewrites(t, r)
	t.boolean("auto_host_rewrite", &r.AutoHostRewrite)
	if t.has("prefix_rewrite") && r.Match.Path != "" {
		t.at("prefix_rewrite").fail("goes with match.prefix only; this route matches the whole path %q", r.Match.Path)
	}
	if t.has("prefix_rewrite") && r.Match.Regex != nil {
		t.at("prefix_rewrite").fail("goes with match.prefix only; this route matches the whole path with a regex")
	}
	if !r.AutoHostRewrite {
		return
	}
	if t.has("host_rewrite_header") {
		t.at("auto_host_rewrite").fail("excludes host_rewrite_header: both say what the upstream's host is; drop one of the two")
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
