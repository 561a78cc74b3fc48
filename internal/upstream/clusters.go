// Package upstream holds the clusters of a generation: their endpoints, how one is
// chosen, how it is connected to, and the idle connections that are kept for
// the next request.
//
//	round := cluster.Round()
//	for e := round.Next(); e != nil; e = round.Next() {
//		up, err := e.Get(t, loop, &attempt)
//		...
//	}
//
// Connections live on the loop that made them, and each loop keeps its own idle ones:
// what a request has to do with them is done by tasks of its loop, without a lock. So one
// that is idle on another loop is of no use to a request, and a generation may keep as many
// times what one pool would need as it has loops, within the most of an endpoint.
//
// An idle connection has itself as its owner ([stream.Owner]): whatever comes closes it, which
// takes it out of its pool. So the kernel need not be asked about one before it is used.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// maxLookups is how many names are resolved at the same time.
const maxLookups = 16

// Clusters are all clusters of one configuration.
type Clusters struct {
	byName    map[string]*Cluster
	addresses map[string][]netip.Addr
	loops     []*stream.Loop
}

// Cluster is a named group of endpoints. Its methods may be called on any loop.
type Cluster struct {
	Name        string
	RetryBudget config.RetryBudget // which who retries keeps to

	endpoints []*Endpoint
	next      atomic.Uint64 // where the next request begins its round
	metrics   clusterMetrics
}

// Network is the outside world as this package reaches it.
type Network struct {
	// Lookup returns every address of a name.
	Lookup func(ctx context.Context, name string) ([]netip.Addr, error)

	// Connect opens a connection to an address of network "tcp" or "unix" that lives on
	// l, and waits for that. It fails with [os.ErrDeadlineExceeded] when until has come,
	// unless that is zero, and with what a is cancelled with.
	Connect func(t *task.Task, l *stream.Loop, network, address string, until time.Time, a *Attempt, owner Owner) (Conn, error)
}

// Owner is what a connection has to tell whoever has made it, on its loop's goroutine.
// None of the functions waits.
type Owner struct {
	// Idle takes the connection over whenever an exchange has ended and it can
	// carry another.
	Idle func(Conn)

	// Ended or Taken is called, once: when the connection was closed, and whether the
	// endpoint was first to do so; or when it was given away to become a tunnel. An idle
	// connection may end by itself.
	Ended func(byEndpoint bool)
	Taken func()

	Traffic *stream.Traffic // counts its bytes
}

// NewOn is [New] on another network, for tests.
func NewOn(ctx context.Context, cfg *config.Config, known map[string][]netip.Addr, r *metrics.Registry, loops []*stream.Loop, network Network) (*Clusters, error) {
	addresses, failures := resolve(ctx, network, known, names(cfg))
	all := &Clusters{byName: make(map[string]*Cluster, len(cfg.Clusters)), addresses: addresses, loops: loops}
	var errs []error
	for i := range cfg.Clusters {
		c := &Cluster{Name: cfg.Clusters[i].Name, RetryBudget: cfg.Clusters[i].RetryBudget, metrics: newClusterMetrics(r, cfg.Clusters[i].Name)}
		all.byName[c.Name] = c
		for _, e := range cfg.Clusters[i].Endpoints {
			endpoints, err := expand(e.Address, addresses, failures)
			if err != nil {
				errs = append(errs, fmt.Errorf("cluster %q: endpoint %q: %w", c.Name, e.Address, err))
			}
			for _, at := range endpoints {
				c.endpoints = append(c.endpoints, newEndpoint(c, &cfg.Clusters[i], e.Address, at, r, len(loops), network))
			}
		}
		c.metrics.endpoints.Set(int64(len(c.endpoints)))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return all, nil
}

// Get returns the cluster of that name.
func (c *Clusters) Get(name string) (cluster *Cluster, ok bool) {
	cluster, ok = c.byName[name]
	return cluster, ok
}

// All yields every cluster.
func (c *Clusters) All() iter.Seq[*Cluster] { return maps.Values(c.byName) }

// Addresses returns what the names of endpoints stand for, as New takes it. The
// caller must not change it.
func (c *Clusters) Addresses() map[string][]netip.Addr { return c.addresses }

// Close closes every idle connection, and from now on every connection as it
// becomes idle. Those in use are not touched, and new ones may still be made.
// It returns when every loop has done so. It may be called by any goroutine but those of
// the loops. A loop that was stopped before keeps its idle connections open.
func (c *Clusters) Close() {
	var closing sync.WaitGroup
	for i, l := range c.loops {
		closing.Add(1)
		if !l.Post(func() { defer closing.Done(); c.closeOn(i) }) {
			closing.Done()
		}
	}
	closing.Wait()
}

// closeOn is Close for the connections of one loop, on its goroutine.
func (c *Clusters) closeOn(loop int) {
	for _, cluster := range c.byName {
		for _, e := range cluster.endpoints {
			e.pools[loop].close()
		}
	}
}

// Round returns every endpoint once, in the order in which a request should try
// them. Each begins one endpoint further than the one before (round robin).
func (c *Cluster) Round() Round {
	if len(c.endpoints) == 0 {
		return Round{}
	}
	first := (c.next.Add(1) - 1) % uint64(len(c.endpoints))
	return Round{endpoints: c.endpoints, at: int(first), left: len(c.endpoints)}
}

// Again has a round return every endpoint once more, in the same order from where it has
// stopped: what was not tried comes before what was. Without endpoints it begins as [Cluster.Round].
func (c *Cluster) Again(r *Round) {
	if r.left = len(r.endpoints); r.left == 0 {
		*r = c.Round()
	}
}

// Round is the order in which one request tries the endpoints of a cluster. The zero value
// has none.
type Round struct {
	endpoints []*Endpoint
	at, left  int
}

// Next returns the next endpoint, or nil if there is none that was not returned yet.
func (r *Round) Next() *Endpoint {
	if r.left == 0 {
		return nil
	}
	e := r.endpoints[r.at]
	r.left--
	if r.at++; r.at == len(r.endpoints) {
		r.at = 0
	}
	return e
}

// place is where an endpoint is: a TCP address, or the path of a unix socket.
type place struct {
	addr netip.AddrPort
	path string
}

// expand turns an endpoint as configured into the places that it stands for.
func expand(address string, addresses map[string][]netip.Addr, failures map[string]error) ([]place, error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return []place{{path: path}}, nil
	}
	if addr, err := netip.ParseAddrPort(address); err == nil {
		return []place{{addr: addr}}, nil
	}
	name, portText, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := parsePort(portText)
	if err != nil {
		return nil, err
	}
	if err := failures[name]; err != nil {
		return nil, err
	}
	var places []place
	for _, a := range addresses[name] {
		places = append(places, place{addr: netip.AddrPortFrom(a, port)})
	}
	return places, nil
}

func parsePort(s string) (uint16, error) {
	p, err := netip.ParseAddrPort("0.0.0.0:" + s)
	if err != nil {
		return 0, fmt.Errorf("invalid port %q", s)
	}
	return p.Port(), nil
}

// names returns the names among the endpoints, each once.
func names(cfg *config.Config) []string {
	seen := make(map[string]bool)
	var names []string
	for _, c := range cfg.Clusters {
		for _, e := range c.Endpoints {
			if strings.HasPrefix(e.Address, "unix:") {
				continue
			}
			name, _, err := net.SplitHostPort(e.Address)
			if err != nil || seen[name] {
				continue
			}
			if _, err := netip.ParseAddr(name); err == nil {
				continue
			}
			seen[name] = true
			names = append(names, name)
		}
	}
	return names
}

// resolve looks those names up that are not known, some at a time. A name is in one
// of the two maps.
func resolve(ctx context.Context, network Network, known map[string][]netip.Addr, names []string) (map[string][]netip.Addr, map[string]error) {
	var (
		mu        sync.Mutex
		addresses = make(map[string][]netip.Addr)
		failures  = make(map[string]error)
		turns     = make(chan struct{}, maxLookups)
		lookups   sync.WaitGroup
	)
	for _, name := range names {
		if at := known[name]; len(at) > 0 {
			mu.Lock()
			addresses[name] = at
			mu.Unlock()
			continue
		}
		turns <- struct{}{}
		lookups.Go(func() {
			defer func() { <-turns }()
			found, err := network.Lookup(ctx, name)
			found = canonical(found)
			if err == nil && len(found) == 0 {
				err = errors.New("the name has no address")
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failures[name] = err
			} else {
				addresses[name] = found
			}
		})
	}
	lookups.Wait()
	return addresses, failures
}

// canonical unmaps IPv4-mapped addresses and drops repeated ones.
func canonical(addrs []netip.Addr) []netip.Addr {
	seen := make(map[netip.Addr]bool)
	var out []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); !seen[a] {
			seen[a] = true
			out = append(out, a)
		}
	}
	return out
}
