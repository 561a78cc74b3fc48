package config

import (
	"strconv"
	"time"
)

func readClusters(tables []*table) []Cluster {
	var clusters []Cluster
	declared := map[string]node{}
	for _, t := range tables {
		c := Cluster{ConnectTimeout: 5 * time.Second, IdleTimeout: 60 * time.Second}
		needName(t, &c.Name, declared)
		c.Endpoints = readEndpoints(t)
		t.only("discovery", "static", "strict_dns", "logical_dns", "file")
		t.only("load_balancing", "round_robin", "least_connections", "random", "maglev")
		read(t, "connect_timeout", &c.ConnectTimeout, duration)
		read(t, "idle_timeout", &c.IdleTimeout, duration)
		c.RetryBudget = readRetryBudget(t.table("retry_budget"))
		c.Edits = readEdits(t)
		t.strict()
		clusters = append(clusters, c)
	}
	return clusters
}

func readEndpoints(cluster *table) []Endpoint {
	var endpoints []Endpoint
	var tables []*table
	seen := map[string]node{}
	for _, n := range cluster.array("endpoints") {
		t := newTable(n)
		tables = append(tables, t)
		address, ok := readEndpoint(t, &n)
		if !ok {
			continue
		}
		canonical, _ := canonicalEndpoint(address) // its form has just been checked
		if first, twice := seen[canonical]; twice {
			n.fail("%s is listed twice (%s)", quote(address), first)
			continue
		}
		seen[canonical] = n
		endpoints = append(endpoints, Endpoint{Address: address})
	}
	if cluster.empty("endpoints") {
		cluster.at("endpoints").fail("missing; must be an array with at least one %s", endpointAddress.is)
	}
	cluster.set("endpoints", tables)
	return endpoints
}

// readEndpoint reads "host:port", or t as { address = "host:port" }. n becomes the
// place of the address.
func readEndpoint(t *table, n *node) (address string, ok bool) {
	if _, isTable := n.raw.(map[string]any); !isTable {
		address, ok = understand(*n, endpointAddress)
	} else {
		if *n, ok = t.get("address"); ok {
			address, ok = understand(*n, endpointAddress)
		} else {
			n.fail("missing; must be %s", endpointAddress.is)
		}
		t.strict()
	}
	t.set("address", strconv.Quote(address))
	return address, ok
}
