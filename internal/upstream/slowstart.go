package upstream

import "time"

// starts is what slow start goes by of one endpoint.
type starts struct {
	late  bool      // it came when the cluster had begun, in this generation or in the one before
	since time.Time // when it came late, or got well again; zero: it was always so
}

// joins says that the endpoint becomes a member. The cluster's lock is held.
func (e *Endpoint) joins() {
	id := identity{e.Address, placeOf(e.Address, e.Addr)}
	since, known := e.cluster.earlier[id]
	e.starts = starts{late: !known && (e.cluster.begun || e.cluster.earlier != nil), since: since}
	delete(e.cluster.earlier, id) // when it comes again, it comes late
}

// begins notes when the endpoint begins to get new work, unless it did when the cluster began.
// The cluster's lock is held.
func (e *Endpoint) begins(was, now Condition) {
	if was != 0 && now == 0 && (e.late || was&(Failing|Ejected) != 0) {
		e.since = time.Now()
	}
}

// HealthySince returns since when the endpoint has got work, as far as that is known to be later
// than the beginning of its cluster: what [control.EndpointState] has for the next generation.
func (e *Endpoint) HealthySince() time.Time {
	e.cluster.mu.Lock()
	defer e.cluster.mu.Unlock()
	return e.since
}

// inheritedStarts returns since when endpoints of the cluster have been well, of those that another
// generation had; nil: it did not have the cluster, or nobody starts slowly.
func (c *Cluster) inheritedStarts() map[identity]time.Time {
	if c.former == nil || c.cfg.Balancing.SlowStart == nil {
		return nil
	}
	since := make(map[identity]time.Time)
	for id, e := range c.former {
		if conditionOf(e)&Left == 0 {
			since[id] = e.HealthySince
		}
	}
	return since
}
