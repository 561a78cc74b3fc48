package upstream

import (
	"cmp"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"holdfast/internal/control"
)

// figures are what is counted of an endpoint for [Clusters.State]: metrics have it by the
// address as configured, which may stand for several endpoints. What is counted for each
// request is with the endpoint's pools, one a loop.
type figures struct {
	connects, connectFails, connectNanos atomic.Uint64
	connections, tunnels                 atomic.Int64
}

// connected counts a connection that took so long to make.
func (f *figures) connected(took time.Duration) {
	f.connects.Add(1)
	f.connectNanos.Add(uint64(max(took, 0)))
	f.connections.Add(1)
}

// conditionWords are what conditions are called for people.
var conditionWords = []struct {
	condition Condition
	word      string
}{
	{Unchecked, "unchecked"},
	{Failing, "failing"},
	{Ejected, "ejected"},
	{Left, "left"},
}

// Words are the conditions as people read them.
func (c Condition) Words() (words []string) {
	for _, w := range conditionWords {
		if c&w.condition != 0 {
			words = append(words, w.word)
		}
	}
	return words
}

// conditionOf is the way back: what another generation knew of an endpoint. What is not known here
// is left out.
func conditionOf(s *control.EndpointState) (c Condition) {
	for _, w := range conditionWords {
		if slices.Contains(s.Conditions, w.word) {
			c |= w.condition
		}
	}
	return c
}

// State returns what is known of all clusters, by name. Any goroutine may call it; it takes
// time with many endpoints, and holds no lock for long.
func (c *Clusters) State() *control.ClusterStates {
	all := new(control.ClusterStates)
	for _, name := range slices.Sorted(maps.Keys(c.byName)) {
		all.Clusters = append(all.Clusters, c.byName[name].state())
	}
	return all
}

func (c *Cluster) state() control.ClusterState {
	s := control.ClusterState{Name: c.Name, Policy: c.cfg.Balancing.Policy.String(), Breakers: c.breakerStates(), TLS: c.tlsState()}
	known := c.Known()
	s.Endpoints = make([]control.EndpointState, 0, len(known))
	left := 0 // where those begin that have left
	for _, e := range known {
		conditions := e.Conditions()
		if conditions&Left != 0 && e.host.Load() == 0 && e.figures.connections.Load() == 0 {
			continue // it is only not forgotten yet
		}
		if conditions&Left == 0 {
			left = len(s.Endpoints) + 1
		}
		s.Endpoints = append(s.Endpoints, e.state(conditions))
	}
	slices.SortFunc(s.Endpoints[left:], func(a, b control.EndpointState) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.Name, b.Name))
	})
	return s
}

func (e *Endpoint) state(conditions Condition) control.EndpointState {
	e.cluster.mu.Lock()
	options := e.options
	e.cluster.mu.Unlock()
	f := &e.figures
	tunnels := f.tunnels.Load()
	here := e.host.Here()
	s := control.EndpointState{
		Address: e.Address, At: e.Addr, Name: e.name,
		Weight: max(options.Weight, 1), Priority: options.Priority, Metadata: options.Metadata,
		Healthy: conditions == 0, Conditions: conditions.Words(),
		Connects: f.connects.Load(), ConnectSum: time.Duration(f.connectNanos.Load()).Seconds(), ConnectFails: f.connectFails.Load(),
		Requests: max(here-tunnels, 0), Tunnels: tunnels, Connections: f.connections.Load(),
		Elsewhere: max(e.host.Load()-here, 0),
	}
	if !e.Addr.IsValid() {
		s.Addresses = e.Addresses()
	}
	for i := range e.pools {
		s.RequestsSum += e.pools[i].requests.Load()
	}
	e.healthState(&s)
	if since := e.HealthySince(); s.Healthy && since.After(s.HealthySince) {
		s.HealthySince = since // it also begins when it comes late, or returns from an ejection
	}
	e.outlierState(&s)
	return s
}
