package upstream

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/upstream/balance"
)

// Place is where an endpoint is: a TCP address, or the path of a unix socket.
type Place struct {
	Addr netip.AddrPort
	Path string
}

// String is the place as logs have it.
func (p Place) String() string {
	if p.Path != "" {
		return unixPrefix + p.Path
	}
	return p.Addr.String()
}

const unixPrefix = "unix:"

// placeOf is where an endpoint is that was connected to at that address; zero for a unix socket.
func placeOf(address string, at netip.AddrPort) Place {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return Place{Path: path}
	}
	return Place{Addr: at}
}

// Member is an endpoint of a cluster as its discovery has it. Address and At together are what
// it is known by.
type Member struct {
	Address string // as configured, or as whoever is asked has it
	At      Place
	config.EndpointOptions

	// Addresses are those of one that is known by Address alone, with a zero At: a name,
	// whatever addresses it has.
	Addresses []netip.AddrPort
}

// identity is what an endpoint is known by as long as anything is with it.
type identity struct {
	address string
	at      Place
}

// A Condition is why an endpoint gets no new work. An endpoint may have several.
type Condition uint32

// The conditions.
const (
	Unchecked Condition = 1 << iota // the first health check has not ended
	Failing                         // health checks fail, or the endpoint said so itself
	Ejected                         // what it did with requests makes it an outlier
	Left                            // the cluster does not have it any more
)

// membership is what a cluster consists of. The lock is held for changes alone, not for
// choices, and nobody waits while holding it.
type membership struct {
	mu       sync.Mutex
	known    map[identity]*Endpoint // members, and what was one while something is with it
	members  []*Endpoint            // in the order of the discovery
	found    bool                   // SetMembers was called
	balancer *balance.Balancer

	begun   bool                   // there were members once
	earlier map[identity]time.Time // since when they have been well, of those that this still matters for
}

// SetMembers replaces what the cluster consists of. An endpoint that stays is the same one.
// One that has left gets no new work, and its idle connections are closed. Any goroutine may
// call it but those of the loops: with consistent hashing it may compute for some milliseconds.
func (c *Cluster) SetMembers(members []Member) {
	c.mu.Lock()
	now := make([]*Endpoint, 0, len(members))
	stays := make(map[*Endpoint]bool, len(members))
	for i := range members {
		e := c.endpoint(identity{members[i].Address, members[i].At})
		if stays[e] {
			continue
		}
		stays[e] = true
		e.options = members[i].EndpointOptions
		if members[i].At == (Place{}) {
			e.addresses.Store(&members[i].Addresses)
		}
		now = append(now, e)
	}
	var changes []change
	for _, e := range c.members {
		if !stays[e] {
			changes = append(changes, e.mark(Left|e.health.unknown(), true))
		}
	}
	for _, e := range now {
		if e.Conditions()&Left != 0 {
			e.joins()
			changes = append(changes, e.mark(Left, false))
		}
	}
	if len(changes) > 0 && c.cfg.Discovery.By != config.Static {
		c.metrics.membershipChanges.Inc()
	}
	c.members, c.found = now, true
	c.begun = c.begun || len(now) > 0
	c.checkMembers()
	for id, e := range c.known {
		if !stays[e] && !e.kept && e.host.Load() == 0 {
			delete(c.known, id)
		}
	}
	c.rebalance()
	c.metrics.endpoints.Set(int64(len(now)))
	c.mu.Unlock()
	c.tell(changes)
	c.balancer.Settle()
}

// endpoint returns the endpoint that is known by id, or makes one that has Left, to begin with.
// c.mu is held.
func (c *Cluster) endpoint(id identity) *Endpoint {
	e := c.known[id]
	if e == nil {
		e = newEndpoint(c, id)
		c.known[id] = e
	}
	return e
}

// Members returns the endpoints that the cluster has at the moment, which the caller must not
// change. Any goroutine may call it.
func (c *Cluster) Members() []*Endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clip(c.members)
}

// Known returns the members, and what was one and has something still.
func (c *Cluster) Known() []*Endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.Clone(c.members)
	for _, e := range c.known {
		if e.Conditions()&Left != 0 {
			all = append(all, e)
		}
	}
	return all
}

// rebalance has requests choose by what the members are now. c.mu is held.
func (c *Cluster) rebalance() {
	members := make([]balance.Member, 0, len(c.members))
	for _, e := range c.members {
		members = append(members, balance.Member{
			Host: &e.host, Weight: max(e.options.Weight, 1), Priority: e.options.Priority, Healthy: e.Conditions() == 0, Since: e.since,
		})
	}
	c.balancer.Set(members)
	var healthy int64
	for _, m := range members {
		if m.Healthy {
			healthy++
		}
	}
	c.metrics.healthy.Set(healthy)
}

// change is what became of an endpoint's conditions.
type change struct {
	e        *Endpoint
	was, now Condition
}

// mark changes a condition. c.mu is held.
func (e *Endpoint) mark(c Condition, on bool) change {
	was := Condition(e.conditions.Load())
	now := was &^ c
	if on {
		now |= c
	}
	e.conditions.Store(uint32(now))
	e.begins(was, now)
	return change{e, was, now}
}

// Mark says whether a condition holds for the endpoint from now on. It returns whether that is
// new. Any goroutine may call it; it does not wait.
func (e *Endpoint) Mark(c Condition, on bool) bool {
	e.cluster.mu.Lock()
	changed := e.mark(c, on)
	if changed.was != changed.now {
		e.cluster.rebalance()
	}
	e.cluster.mu.Unlock()
	if changed.was == changed.now {
		return false
	}
	e.cluster.tell([]change{changed})
	return true
}

// Conditions returns why the endpoint gets no new work; 0: it does.
func (e *Endpoint) Conditions() Condition { return Condition(e.conditions.Load()) }

// tell does what follows from changes, without the lock.
func (c *Cluster) tell(changes []change) {
	for _, ch := range changes {
		if gone := ch.now &^ ch.was; gone&(Left|Failing) != 0 {
			ch.e.closeIdle()
			ch.e.dismiss()
		}
		if c.watch != nil {
			c.watch(ch.e, ch.was, ch.now)
		}
	}
}

// closeIdle closes the idle connections of all loops, some time.
func (e *Endpoint) closeIdle() {
	for i, l := range e.cluster.loops {
		for p := range e.poolsOn(i) {
			l.Post(p.empty)
		}
	}
	for _, s := range e.streams {
		s.retire()
	}
}

// Tunnels returns what counts the tunnels to an endpoint by its names, which may be of another
// configuration: its tunnels may live on. Where the cluster is known, they count as its load.
func (c *Clusters) Tunnels(cluster, address string, at netip.AddrPort) TunnelMetrics {
	known, ok := c.byName[cluster]
	if !ok {
		return newTunnelMetrics(c.registry, cluster, address, nil)
	}
	known.mu.Lock()
	defer known.mu.Unlock()
	e := known.endpoint(identity{address, placeOf(address, at)})
	e.kept = true // its tunnels may come any time
	return e.Tunnels
}

// Conditions returns why an endpoint gets no new work, by its names, which may be of another
// configuration. Not known is what belongs to no cluster here, or to one that has not found its
// members so far. A member by another name is the same endpoint if it is at the same place.
func (c *Clusters) Conditions(cluster, address string, at netip.AddrPort) (now Condition, known bool) {
	in, ok := c.byName[cluster]
	if !ok {
		return 0, false
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.found {
		return 0, false
	}
	id := identity{address, placeOf(address, at)}
	now = Left
	if e := in.known[id]; e != nil {
		now = e.Conditions()
	}
	if now&Left != 0 {
		for _, e := range in.members {
			if (Place{e.Addr, e.Path}) == id.at {
				return e.Conditions(), true
			}
		}
	}
	return now, true
}
