package upstream

import (
	"cmp"
	"maps"
	"slices"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/upstream/balance"
)

// mostLoad is what is believed of another generation, and of all of them: far more than there
// can be, and sums of it and of what is here stay numbers.
const mostLoad = 1 << 40

// Loads returns what there is here of what other generations have to know: the requests and
// tunnels of each endpoint, and what the circuit breakers count. It leaves out what is zero.
// Any goroutine may call it; it does not wait.
func (c *Clusters) Loads() *control.Loads {
	all := new(control.Loads)
	for _, name := range slices.Sorted(maps.Keys(c.byName)) {
		if load := c.byName[name].load(); load.Endpoints != nil || load.Used != nil {
			all.Clusters = append(all.Clusters, load)
		}
	}
	return all
}

// load is that of one cluster.
func (c *Cluster) load() control.ClusterLoad {
	load := control.ClusterLoad{Name: c.Name}
	for _, e := range c.Known() {
		if n := e.host.Here(); n > 0 {
			load.Endpoints = append(load.Endpoints, control.EndpointLoad{Address: e.Address, At: e.Addr, Load: n})
		}
	}
	slices.SortFunc(load.Endpoints, func(a, b control.EndpointLoad) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), a.At.Compare(b.At))
	})
	for p := range c.breakers {
		var used map[string]int64
		for what := range c.breakers[p].of {
			if n := c.breakers[p].of[what].here.Load(); n > 0 {
				if used == nil {
					used = make(map[string]int64)
				}
				used[config.Limited(what).String()] = n
			}
		}
		if used != nil {
			load.Used = append(load.Used, control.BreakerLoad{Priority: config.Priority(p).String(), Used: used})
		}
	}
	return load
}

// elsewhere is what other generations have with one cluster.
type elsewhere struct {
	hosts map[*balance.Host]int64
	used  [config.NumPriorities][config.NumLimited]int64
}

// SetElsewhere says what each other living generation has with the clusters, and replaces all
// that it said before: what is not in it is gone. What is not known here is left out: clusters,
// endpoints, limits, and numbers that nobody can have. It neither keeps nor changes anything of
// the map. Only one goroutine may call it at a time; it does not wait.
func (c *Clusters) SetElsewhere(generations map[int]*control.Loads) {
	all := make(map[*Cluster]*elsewhere)
	for _, loads := range generations {
		if loads == nil {
			continue
		}
		for i := range loads.Clusters {
			cluster, known := c.byName[loads.Clusters[i].Name]
			if !known {
				continue
			}
			if all[cluster] == nil {
				all[cluster] = &elsewhere{hosts: make(map[*balance.Host]int64)}
			}
			cluster.addElsewhere(all[cluster], &loads.Clusters[i])
		}
	}
	for _, cluster := range c.byName {
		cluster.setElsewhere(all[cluster])
	}
}

// addElsewhere adds what one generation has.
func (c *Cluster) addElsewhere(to *elsewhere, load *control.ClusterLoad) {
	c.mu.Lock()
	for i := range load.Endpoints {
		l := &load.Endpoints[i]
		if e := c.known[identity{l.Address, placeOf(l.Address, l.At)}]; e != nil {
			to.hosts[&e.host] = addLoad(to.hosts[&e.host], l.Load)
		}
	}
	c.mu.Unlock()
	for i := range load.Used {
		for p := range to.used {
			if config.Priority(p).String() != load.Used[i].Priority {
				continue
			}
			for what := range to.used[p] {
				n := &to.used[p][what]
				*n = addLoad(*n, load.Used[i].Used[config.Limited(what).String()])
			}
		}
	}
}

// addLoad adds a number that somebody else has said.
func addLoad(sum, n int64) int64 { return min(sum+min(max(n, 0), mostLoad), mostLoad) }

// setElsewhere makes that hold; nil is nothing.
func (c *Cluster) setElsewhere(now *elsewhere) {
	if now == nil {
		now = new(elsewhere)
	}
	c.mu.Lock()
	for _, e := range c.known {
		e.host.SetElsewhere(now.hosts[&e.host])
	}
	c.mu.Unlock()
	for p := range c.breakers {
		for what := range c.breakers[p].of {
			b := &c.breakers[p].of[what]
			if b.elsewhere.Swap(now.used[p][what]) != now.used[p][what] {
				b.show()
			}
		}
		c.breakers[p].serve()
	}
}
