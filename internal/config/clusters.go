package config

import (
	"strconv"
	"time"
)

// readClusters reads the clusters of a generation that has so long to become ready.
func readClusters(tables []*table, ready time.Duration) []Cluster {
	var clusters []Cluster
	declared := map[string]node{}
	for _, t := range tables {
		c := Cluster{ConnectTimeout: 5 * time.Second, IdleTimeout: 60 * time.Second}
		needName(t, &c.Name, declared)
		c.Endpoints = readEndpoints(t)
		c.Discovery = readDiscovery(t)
		c.Balancing = readBalancing(t)
		c.HealthCheck = readEndpointCheck(t)
		c.Outliers = readOutliers(t)
		readWarming(t, &c.WarmingTimeout, ready)
		read(t, "connect_timeout", &c.ConnectTimeout, duration)
		c.Connecting = readConnecting(t, c.Endpoints)
		c.TLS = readClusterTLS(t, c.Endpoints)
		readClusterProtocol(t, &c)
		read(t, "idle_timeout", &c.IdleTimeout, duration)
		c.RetryBudget = readRetryBudget(t.table("retry_budget"))
		c.Breakers = readBreakers(t)
		c.Edits = readEdits(t)
		t.strict()
		clusters = append(clusters, c)
	}
	return clusters
}

// readWarming reads how long a generation waits for a cluster, within what it has itself.
func readWarming(t *table, dst *time.Duration, ready time.Duration) {
	*dst = min(15*time.Second, ready/2).Truncate(shortest)
	read(t, "warming_timeout", dst, durationOrZero)
	if t.has("warming_timeout") && *dst >= ready {
		t.at("warming_timeout").fail("a generation that waits so long is given up: reload.ready_timeout is %s", writeDuration(ready))
	}
}

func readEndpoints(cluster *table) []Endpoint {
	var endpoints []Endpoint
	var tables []*table
	seen := map[string]node{}
	for _, n := range cluster.array("endpoints") {
		t := newTable(n)
		tables = append(tables, t)
		e, ok := readEndpoint(t, &n)
		if !ok {
			continue
		}
		canonical, err := canonicalEndpoint(e.Address) // an address's form has just been checked
		if e.SRV = err != nil; e.SRV {                 // it has no port
			canonical = e.Address
		}
		if first, twice := seen[canonical]; twice {
			n.fail("%s is listed twice (%s)", quote(e.Address), first)
			continue
		}
		seen[canonical] = n
		endpoints = append(endpoints, e)
	}
	cluster.set("endpoints", tables)
	return endpoints
}

// readEndpoint reads "host:port", or t as { address = "host:port" } or { srv = "_service._tcp.name" }
// with what else an endpoint may have. n becomes the place of the address.
func readEndpoint(t *table, n *node) (e Endpoint, ok bool) {
	_, isTable := n.raw.(map[string]any)
	if !isTable {
		e.Address, ok = understand(*n, endpointAddress)
	} else if t.asked("srv") {
		e.Address, ok = readService(t, n)
		e.EndpointOptions = readEndpointOptions(t)
		t.strict()
		return e, ok
	} else if *n, ok = t.get("address"); ok {
		e.Address, ok = understand(*n, endpointAddress)
	} else {
		n.fail("missing; must be %s", endpointAddress.is)
	}
	t.set("address", strconv.Quote(e.Address))
	e.EndpointOptions = readEndpointOptions(t)
	if isTable {
		t.strict()
	}
	return e, ok
}
