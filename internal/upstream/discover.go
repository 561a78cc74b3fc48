package upstream

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/upstream/discovery"
)

// What a cluster waits for that has a discovery, see [Cluster.warms].
const warmEndpoints = "its endpoints"

// sourcesTime bounds how long [Clusters.Close] waits for who reads files: one that lies on
// a file system that does not answer may take for ever.
const sourcesTime = time.Second

// What is counted of discovery, as Envoy counts it.
var (
	clusterMembershipChanges = clusterCounter("membership_changes", "How often the endpoints of the cluster have changed.")
	clusterDiscoveryAttempts = clusterCounter("discovery_attempts", "Questions that were asked to find the endpoints of the cluster, or looks into its file.")
	clusterDiscoverySuccess  = clusterCounter("discovery_successes", "Questions about the endpoints of the cluster that were answered, or readings of its file that were of use.")
	clusterDiscoveryFailures = clusterCounter("discovery_failures", "Questions about the endpoints of the cluster that were not answered, or readings of its file that were of no use.")
	clusterDiscoveryEmpty    = clusterCounter("discovery_empty", "Answers about the endpoints of the cluster that have none.")
	clusterDiscoveryLeftOut  = clusterCounter("discovery_left_out", "What answers about the endpoints of the cluster had that is not used: addresses that cannot be meant, and what is too much.")
)

func newDiscoveryCounts(r *metrics.Registry, cluster string) discovery.Counts {
	return discovery.Counts{
		Attempts: r.Counter(clusterDiscoveryAttempts, cluster), Successes: r.Counter(clusterDiscoverySuccess, cluster),
		Failures: r.Counter(clusterDiscoveryFailures, cluster), Empty: r.Counter(clusterDiscoveryEmpty, cluster), LeftOut: r.Counter(clusterDiscoveryLeftOut, cluster),
	}
}

// discoveries are the sources of all clusters that have one.
type discoveries struct {
	sources []*discovery.Source
	running sync.WaitGroup
	stop    context.CancelFunc // once they run
}

// discover makes the source of a cluster that is not static, and gives the cluster what is
// known before anybody is asked.
func (c *Cluster) discover(world *discovery.World) *discovery.Source {
	last := lastOf(c.inherited())
	source := discovery.New(discovery.Options{
		Config: &c.cfg.Discovery, Endpoints: c.cfg.Endpoints, Last: last[:min(len(last), config.MostDiscovered)], World: world,
		Counts: newDiscoveryCounts(c.options.Metrics, c.Name), Log: c.options.Log.With(slog.String("cluster", c.Name)),
		Deliver: c.take, Moved: c.moved, Settled: c.warms(warmEndpoints),
	})
	c.take(source.Begin())
	return source
}

// mostPriority is that of the last host of a service, each with a priority of its own.
const mostPriority = config.MostEndpointPriority + 256

// lastOf is what another generation had found. What had left it by then is not of it.
func lastOf(s *control.ClusterState) (last []discovery.Endpoint) {
	if s == nil {
		return nil
	}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if conditionOf(e)&Left != 0 {
			continue
		}
		found := discovery.Endpoint{
			Address: e.Address, At: e.At, Addresses: e.Addresses,
			EndpointOptions: config.EndpointOptions{
				Weight:   min(max(e.Weight, 1), config.MostEndpointWeight), // as it would be believed of nobody else, either
				Priority: min(max(e.Priority, 0), mostPriority), Metadata: e.Metadata,
			},
		}
		if !e.At.IsValid() && len(e.Addresses) == 0 {
			if found.Path = placeOf(e.Address, e.At).Path; found.Path == "" {
				continue
			}
		}
		last = append(last, found)
	}
	return last
}

// inheritedAddresses are those that another generation had for a name among the endpoints of
// a static cluster.
func (c *Cluster) inheritedAddresses(address string) (places []Place) {
	for _, e := range lastOf(c.inherited()) {
		if e.Address == address && e.At.IsValid() {
			places = append(places, Place{Addr: e.At})
		}
	}
	return places
}

// knownNow is what names stand for that are not looked up: those that are known, and in a
// hurry also those that another generation knew.
func knownNow(o *Options) map[string][]netip.Addr {
	if !o.Urgent || o.Inherited == nil {
		return o.Known
	}
	known := make(map[string][]netip.Addr)
	maps.Copy(known, o.Known)
	for _, s := range o.Inherited.Clusters {
		for _, e := range lastOf(&s) {
			name, _, err := net.SplitHostPort(e.Address)
			if err == nil && e.At.IsValid() && len(o.Known[name]) == 0 && !slices.Contains(known[name], e.At.Addr()) {
				known[name] = append(known[name], e.At.Addr())
			}
		}
	}
	return known
}

// take has the cluster consist of what was found.
func (c *Cluster) take(found []discovery.Endpoint) {
	members := make([]Member, len(found))
	for i, e := range found {
		members[i] = Member{Address: e.Address, At: Place{Addr: e.At, Path: e.Path}, Addresses: e.Addresses, EndpointOptions: e.EndpointOptions}
	}
	c.SetMembers(members)
}

// moved has new connections to an endpoint go to other addresses.
func (c *Cluster) moved(address string, addresses []netip.AddrPort) {
	c.mu.Lock()
	e := c.known[identity{address: address}]
	c.mu.Unlock()
	if e != nil {
		e.addresses.Store(&addresses)
	}
}

// runSources has all be found out that is not known once and for all, also by files.
func (c *Clusters) runSources() {
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	c.running.Go(func() { c.files.Run(ctx) })
	for _, s := range c.sources {
		c.running.Go(func() { s.Run(ctx) })
	}
}

// stopSources ends that.
func (c *Clusters) stopSources() {
	if c.stop == nil {
		return
	}
	c.stop()
	over := make(chan struct{})
	go func() { c.running.Wait(); close(over) }()
	timer := time.NewTimer(sourcesTime)
	defer timer.Stop()
	select {
	case <-over:
	case <-timer.C:
	}
}

// Addresses returns where a connection to the endpoint may go, the best first: the one address
// that it is known by, or those that its name has at the moment; none for a unix socket. The
// caller must not change it.
func (e *Endpoint) Addresses() []netip.AddrPort { return *e.addresses.Load() }

// series is what an endpoint's figures go by: its address as it is configured. What was found
// in a file goes by the file's path, and what a service has by its name: nobody else makes up
// series.
func (c *Cluster) series(address string) string {
	d := &c.cfg.Discovery
	if d.By == config.ByFile {
		return d.File
	}
	service := address
	for i := range c.cfg.Endpoints {
		switch e := &c.cfg.Endpoints[i]; {
		case e.Address == address:
			return address
		case e.SRV && service == address:
			service = e.Address
		}
	}
	return service
}
