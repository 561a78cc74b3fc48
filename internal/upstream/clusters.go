// Package upstream holds the clusters of a generation: their endpoints, how one is
// chosen, how it is connected to, and the idle connections that are kept for
// the next request.
//
//	round := cluster.Round(query)
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
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/clienttls"
	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/filewatch"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/upstream/balance"
	"holdfast/internal/upstream/discovery"
	"holdfast/internal/upstream/health"
)

// maxLookups is how many names are resolved at the same time.
const maxLookups = 16

// Clusters are all clusters of one configuration.
type Clusters struct {
	byName    map[string]*Cluster
	addresses map[string][]netip.Addr
	loops     []*stream.Loop
	registry  *metrics.Registry
	log       *slog.Logger

	files         *filewatch.Watcher // those of the clusters' TLS
	closesRemoved bool               // see [config.Config.ClosesRemoved]
	discoveries
}

// Cluster is a named group of endpoints. Its methods may be called on any loop.
type Cluster struct {
	Name        string
	RetryBudget config.RetryBudget // which who retries keeps to

	membership
	warming    warming
	checking   checking
	tls        *clienttls.Client                  // nil: its endpoints are spoken to without
	tlsFailure atomic.Pointer[control.TLSFailure] // the last handshake that has failed; nil: none has
	cfg        *config.Cluster
	options    *Options
	loops      []*stream.Loop
	watch      func(e *Endpoint, was, now Condition) // nil: nobody does
	metrics    clusterMetrics

	priorities int // for which connections are kept: see newPools
	breakers   [config.NumPriorities]breakers
	former     map[identity]*control.EndpointState // of another generation; nil: it did not have the cluster
	outliers   *outliers                           // nil: none are looked for

	multiplexing multiplexing
}

// Options are what clusters are made of.
type Options struct {
	Config *config.Config

	// Known is what names among the endpoints stand for, where that is known: they are not
	// looked up to begin with.
	Known map[string][]netip.Addr

	// Inherited is what another generation of the same service knew last, in its own
	// configuration; nil: there was none.
	Inherited *control.ClusterStates

	// Urgent says that whoever is to be relieved is dead: nothing is waited for that is
	// known by Inherited.
	Urgent bool

	// Kept are the contents of files as the dead one has used them last, by path, and Changed hears
	// that others are used; nil: there are none, and nobody wants to know.
	Kept    map[string][]byte
	Changed func()

	Metrics *metrics.Registry // nil: nothing is counted
	Loops   []*stream.Loop    // all on which there will be requests: the number of each is its place
	Values  *dynamic.Set      // makes numbers that may be overridden at run time; nil: none is
	Log     *slog.Logger      // nil: nothing is logged
	Network Network

	// Discovery is the world that endpoints are found in; nil: the host's.
	Discovery *discovery.World

	states  map[string]*control.ClusterState // Inherited, by name
	warming *metrics.Gauge                   // of clusters
	checks  []*health.Loop                   // by the loop
	checked *atomic.Uint32                   // endpoints that were dealt to these

	// MayHave says of a descriptor whether a connection may have it, and connecting fails
	// as if there were none (EMFILE) where it may not; nil: always.
	MayHave func(fd int) bool
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

// newOn is [New] on the network of o.
func newOn(ctx context.Context, o Options) (*Clusters, error) {
	cfg := o.Config
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.warming = o.Metrics.Gauge(clustersWarming)
	o.checks, o.checked = newCheckLoops(o.Loops), new(atomic.Uint32)
	o.states = statesByName(o.Inherited)
	addresses, failures := resolve(ctx, o.Network, knownNow(&o), names(cfg))
	all := &Clusters{byName: make(map[string]*Cluster, len(cfg.Clusters)), addresses: addresses, closesRemoved: cfg.ClosesRemoved(), loops: o.Loops, registry: o.Metrics, log: o.Log}
	world := o.Discovery
	if world == nil {
		world = new(discovery.World)
	}
	all.files = filewatch.New(filewatch.Options{Watch: world.Watch, Looked: all.lookedAtFiles})
	var errs []error
	for i := range cfg.Clusters {
		c := newCluster(&cfg.Clusters[i], &o)
		if err := c.secure(all.files); err != nil {
			errs = append(errs, err)
		}
		all.byName[c.Name] = c
		if c.cfg.Discovery.By != config.Static {
			all.sources = append(all.sources, c.discover(world))
			continue
		}
		var members []Member
		for _, e := range c.cfg.Endpoints {
			places, err := expand(e.Address, addresses, failures)
			if err != nil {
				places = c.inheritedAddresses(e.Address)
			}
			if err != nil && len(places) > 0 {
				o.Log.Warn("a name of a cluster cannot be resolved: what it stood for last is used", "cluster", c.Name, "name", e.Address, "err", err)
			} else if err != nil {
				errs = append(errs, fmt.Errorf("cluster %q: endpoint %q: %w", c.Name, e.Address, err))
			}
			for _, at := range places {
				members = append(members, Member{Address: e.Address, At: at, EndpointOptions: e.EndpointOptions})
			}
		}
		c.SetMembers(members)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return all, nil
}

func newCluster(cfg *config.Cluster, o *Options) *Cluster {
	c := &Cluster{
		Name: cfg.Name, RetryBudget: cfg.RetryBudget, cfg: cfg, options: o, loops: o.Loops,
		metrics:    newClusterMetrics(o.Metrics, cfg.Name),
		priorities: 1,
	}
	c.former = formerEndpoints(c.inherited())
	panicBelow := cfg.Balancing.PanicBelow
	c.membership = membership{
		known:   make(map[identity]*Endpoint),
		earlier: c.inheritedStarts(),
		balancer: balance.New(&cfg.Balancing, balance.Options{
			PanicBelow: o.Values.New(panicBelow.Key, dynamic.Percent, panicBelow.Value, 0, dynamic.Whole),
			Panics:     c.metrics.panics,
		}),
	}
	if o.Config.UsesPriority(config.PriorityHigh) {
		c.priorities = int(config.NumPriorities)
	}
	for p := range c.breakers {
		c.breakers[p].init(c, config.Priority(p))
	}
	c.multiplexing = newMultiplexing(c, o.Metrics)
	c.outliers = newOutliers(c, o)
	c.checking = newChecking(c)
	return c
}

// Watch has fn told of every change of what keeps an endpoint from new work, of all clusters.
// It is called before anything runs, and fn by any goroutine: it must not wait.
func (c *Clusters) Watch(fn func(e *Endpoint, was, now Condition)) {
	for _, cluster := range c.byName {
		cluster.watch = fn
	}
}

// Run begins what goes on by itself until Close: discovery, health checks and the watch over
// files. The loops run by then.
func (c *Clusters) Run() {
	c.runSources()
	c.runChecks()
	for _, cluster := range c.byName {
		cluster.outliers.run()
	}
}

// Warm waits until each cluster knows its endpoints and has checked their health once, as far
// as that is configured, or the time for that is over, or ctx is done.
func (c *Clusters) Warm(ctx context.Context) {
	c.warm(ctx)
	c.endWarming()
}

// SetDraining says whether the generation drains: there are no new requests then, but for a
// few, and nothing is found out that concerns these alone.
func (c *Clusters) SetDraining(on bool) {
	c.drainChecks(on)
	for _, cluster := range c.byName {
		if cluster.tls != nil {
			cluster.tls.Quiet(on)
		}
	}
	on = on && !c.closesRemoved // tunnels that it keeps end by what is found out
	for _, s := range c.sources {
		s.Pause(on)
	}
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
	c.stopSources()
	for _, cluster := range c.byName {
		cluster.outliers.close()
	}
	c.closeChecks()
	c.closeStreams()
	var closing sync.WaitGroup
	for i, l := range c.loops {
		closing.Add(1)
		if !l.Post(func() { defer closing.Done(); c.closeOn(i) }) {
			closing.Done()
		}
	}
	closing.Wait()
}

// closeStreams is Close for connections that belong to no loop.
func (c *Clusters) closeStreams() {
	for _, cluster := range c.byName {
		for _, e := range cluster.Known() {
			for _, s := range e.streams {
				s.close()
			}
		}
	}
}

// closeOn is Close for the connections of one loop, on its goroutine.
func (c *Clusters) closeOn(loop int) {
	for _, cluster := range c.byName {
		for _, e := range cluster.Known() {
			for p := range e.poolsOn(loop) {
				p.close()
			}
		}
	}
}

// mostTried is how many endpoints a round remembers.
const mostTried = 16

// Round is the order in which one request tries the endpoints of a cluster. The zero value
// has none.
type Round struct {
	cluster *Cluster
	query   balance.Query
	tried   [mostTried]*Endpoint // the last ones that were returned
	returns int                  // in tried
	since   int                  // of them before the round was begun again
}

// Round returns the endpoints that a request should try, each once, as the cluster balances
// requests.
func (c *Cluster) Round(q balance.Query) Round { return Round{cluster: c, query: q} }

// Again has a round return every endpoint once more: what was not tried comes before what was.
// Without a cluster it begins as [Cluster.Round].
func (c *Cluster) Again(r *Round, q balance.Query) {
	if r.cluster != c {
		r.cluster, r.returns = c, 0 // and not all of it, which is large
	}
	r.query = q
	if drop := r.returns - mostTried/2; drop > 0 { // those long ago
		copy(r.tried[:], r.tried[drop:r.returns])
		r.returns -= drop
	}
	r.since = r.returns
}

// Next returns the next endpoint, or nil if there is none that was not returned yet. Its load is
// counted as soon as it is connected to, which must follow at once.
func (r *Round) Next() *Endpoint {
	if r.cluster == nil || r.returns == len(r.tried) {
		return nil
	}
	h := r.cluster.balancer.Pick(r.query)
	if h != nil && slices.Contains(r.tried[:r.returns], h.Of.(*Endpoint)) {
		h = r.cluster.balancer.Other(r.query, r.rank)
	}
	if h == nil {
		return nil
	}
	e := h.Of.(*Endpoint)
	r.tried[r.returns] = e
	r.returns++
	return e
}

// rank says how soon an endpoint is to be tried: 0 is one that was not, then come those that
// were before the round was begun again, by how long ago that was; negative: not any more.
func (r *Round) rank(h *balance.Host) int {
	for i := r.returns - 1; i >= 0; i-- {
		if r.tried[i] == h.Of.(*Endpoint) {
			if i >= r.since {
				return -1
			}
			return i + 1
		}
	}
	return 0
}

// expand turns an endpoint as configured into the places that it stands for.
func expand(address string, addresses map[string][]netip.Addr, failures map[string]error) ([]Place, error) {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return []Place{{Path: path}}, nil
	}
	if addr, err := netip.ParseAddrPort(address); err == nil {
		return []Place{{Addr: addr}}, nil
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
	var places []Place
	for _, a := range addresses[name] {
		places = append(places, Place{Addr: netip.AddrPortFrom(a, port)})
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

// names returns the names among the endpoints that are looked up once, each once.
func names(cfg *config.Config) []string {
	seen := make(map[string]bool)
	var names []string
	for _, c := range cfg.Clusters {
		if c.Discovery.By != config.Static {
			continue
		}
		for _, e := range c.Endpoints {
			if strings.HasPrefix(e.Address, unixPrefix) {
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
