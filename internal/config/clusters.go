package config

import "time"

func readClusters(tables []*table) []Cluster {
	var clusters []Cluster
	declared := map[string]node{}
	for _, t := range tables {
		c := Cluster{ConnectTimeout: 5 * time.Second, IdleTimeout: 60 * time.Second}
		needName(t, &c.Name, declared)
		var discovery, balancing string
		read(t, "discovery", &discovery, only("static", "strict_dns", "logical_dns", "file"))
		read(t, "load_balancing", &balancing, only("round_robin", "least_connections", "random", "maglev"))
		c.Endpoints = readEndpoints(t)
		read(t, "connect_timeout", &c.ConnectTimeout, duration)
		read(t, "idle_timeout", &c.IdleTimeout, duration)
		t.strict()
		clusters = append(clusters, c)
	}
	return clusters
}

func readEndpoints(cluster *table) []Endpoint {
	var endpoints []Endpoint
	seen := map[string]node{}
	for _, n := range cluster.array("endpoints") {
		address, ok := readEndpoint(&n)
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
	return endpoints
}

// readEndpoint reads "host:port" or { address = "host:port" }. n becomes the
// place of the address.
func readEndpoint(n *node) (string, bool) {
	if _, isTable := n.raw.(map[string]any); !isTable {
		return understand(*n, endpointAddress)
	}
	t := newTable(*n)
	address, ok := "", false
	if *n, ok = t.get("address"); ok {
		address, ok = understand(*n, endpointAddress)
	} else {
		n.fail("missing; must be %s", endpointAddress.is)
	}
	t.strict()
	return address, ok
}
