package route_test

import (
	"net/netip"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/route"
)

func tcpRoute(name string, servers ...string) config.TCPRoute {
	return config.TCPRoute{Name: name, ServerNames: servers, Clusters: alone(name)}
}

func alone(cluster string) []config.WeightedCluster {
	return []config.WeightedCluster{{Cluster: cluster, Weight: config.Dynamic{Value: 1}}}
}

func TestAConnectionGoesByTheServerItsClientAsksFor(t *testing.T) {
	t.Parallel()
	routes := []config.TCPRoute{tcpRoute("exact", "a.example.com", "b.test"), tcpRoute("suffix", "*.example.com"), tcpRoute("longer", "*.deep.example.com")}
	any := tcpRoute("any", "*")
	for server, want := range map[string][3]string{ // as they are; with a route for every name; with a cluster for the rest
		"a.example.com":        {"exact", "exact", "exact"},
		"b.test":               {"exact", "exact", "exact"},
		"c.example.com":        {"suffix", "suffix", "suffix"},
		"x.y.example.com":      {"suffix", "suffix", "suffix"},
		"x.deep.example.com":   {"longer", "longer", "longer"},
		"deep.example.com":     {"suffix", "suffix", "suffix"},
		"example.com":          {"", "any", ""},
		"aexample.com":         {"", "any", ""},
		"a.b.test":             {"", "any", ""},
		"a":                    {"", "any", ""},
		"":                     {"", "", ""},
		"a.example.com.attack": {"", "any", ""},
	} {
		for i, cfg := range []config.TCP{{Routes: routes}, {Routes: append(routes[:3:3], any)}, {Routes: routes, Clusters: alone("rest")}} {
			got, cluster := "", ""
			r := route.NewTCP(&cfg, nil).Match(server)
			if r != nil {
				got, cluster = r.Name, r.Choose(0)
			}
			wanted := want[i]
			if i == 2 && wanted == "" {
				wanted = "rest"
			}
			if got != want[i] || cluster != wanted {
				t.Errorf("%q goes to %q by route %q of file %d, want %q by %q", server, cluster, got, i, wanted, want[i])
			}
		}
	}
}

func TestConnectionsAreHashedByTheirClientsAddress(t *testing.T) {
	t.Parallel()
	one, ok := route.HashOfClient(netip.MustParseAddr("192.0.2.1"))
	same, _ := route.HashOfClient(netip.MustParseAddr("::ffff:192.0.2.1"))
	other, _ := route.HashOfClient(netip.MustParseAddr("192.0.2.2"))
	if !ok || one != same || one == other {
		t.Errorf("%x %x %x", one, same, other)
	}
	if _, ok := route.HashOfClient(netip.Addr{}); ok {
		t.Error("a client on a unix socket has a hash")
	}
}
