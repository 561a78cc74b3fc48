package route

import (
	"net/netip"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
)

// TCP is where the connections of a listener go that relays them as they are. It never
// changes, apart from weights.
type TCP struct {
	BySNI bool // a client's first bytes say which route it has

	exact    map[string]*TCPRoute
	suffix   map[string]*TCPRoute // key with its dot: ".example.com"
	named    *TCPRoute            // of "*"; may be nil
	fallback *TCPRoute            // of what no server's name leads to; may be nil
	routes   []*TCPRoute
}

// TCPRoute is one way that connections may go.
type TCPRoute struct {
	Name   string // "" means none
	Number int    // among those of the listener, from 0
	shares shares
}

// NewTCP returns the routes of a listener. values are told of what may be overridden at run
// time; nil: nothing is.
func NewTCP(cfg *config.TCP, values *dynamic.Set) *TCP {
	t := &TCP{BySNI: len(cfg.Routes) > 0, exact: map[string]*TCPRoute{}, suffix: map[string]*TCPRoute{}}
	for i := range cfg.Routes {
		r := t.add(cfg.Routes[i].Name, cfg.Routes[i].Clusters, values)
		for _, name := range cfg.Routes[i].ServerNames {
			switch {
			case name == "*":
				t.named = r
			case strings.HasPrefix(name, "*."):
				t.suffix[name[1:]] = r
			default:
				t.exact[name] = r
			}
		}
	}
	if len(cfg.Clusters) > 0 {
		t.fallback = t.add("", cfg.Clusters, values)
	}
	return t
}

func (t *TCP) add(name string, clusters []config.WeightedCluster, values *dynamic.Set) *TCPRoute {
	r := &TCPRoute{Name: name, Number: len(t.routes), shares: newShares(clusters, values)}
	t.routes = append(t.routes, r)
	return r
}

// Routes returns all of them. The caller must not change the slice.
func (t *TCP) Routes() []*TCPRoute { return t.routes }

// Match returns the route of a connection whose client asks for a server, in lower case and
// without a dot at its end, or for none (""); nil: there is no route.
//
// An exact name wins over the longest "*.suffix", and that over "*".
func (t *TCP) Match(server string) *TCPRoute {
	if server == "" {
		return t.fallback
	}
	if r := t.exact[server]; r != nil {
		return r
	}
	for rest := server; ; {
		dot := strings.IndexByte(rest[1:], '.')
		if dot < 0 {
			break
		}
		rest = rest[1+dot:]
		if r := t.suffix[rest]; r != nil {
			return r
		}
	}
	if t.named != nil {
		return t.named
	}
	return t.fallback
}

// Choose returns the cluster that a random number leads to, "" if there is none.
func (r *TCPRoute) Choose(random uint64) string { return r.shares.choose(random) }

// HashOfClient is the hash of a connection by its client's address, as that of a request by a
// policy that looks at nothing else; not ok: it has none.
func HashOfClient(client netip.Addr) (hash uint64, ok bool) {
	if !client.IsValid() {
		return 0, false
	}
	address := client.Unmap().As16()
	return finish(hashBytes(hashSeed, address[:])), true
}
