package upstream

import (
	"iter"
	"sync"
	"sync/atomic"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
)

// A cluster's circuit breakers say how much of something there may be at the same time: here,
// and in the other generations of the service together (see [Clusters.SetElsewhere]).
//
//	requests     from Get or Fresh to Call.End
//	tunnels      from Dial, to Call.End or, once it is one, to the tunnel's end
//	connections  from the attempt to connect until it is closed, or becomes a tunnel
//	pending      while a request or an upgrade waits for a connection: see waiting
//	retries      from TakeRetry to GiveRetry
//
// Requests and tunnels, and connections and tunnels, exclude each other: the descriptors that a
// cluster's endpoints need for us are as many as both of the latter limits together, and tunnels
// that stay for days leave requests their connections.
//
// All is counted whether there is a limit or not: other generations may have one, and so may
// this one in a moment.

// What is counted of circuit breakers, where there is a limit or may be one at run time.
var (
	clusterOverflows = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_overflows_total",
		Help: "Times that a limit of the cluster was reached: connections had to be waited for, retries and copies of requests were not made, and everything else was refused.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "priority", "limit"},
	})
	clusterBreakerOpen = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_circuit_breaker_open",
		Help: "Whether as much is under way, in all generations, as the limit of the cluster lets through.",
		Type: metrics.TypeGauge, Merge: metrics.Max, Labels: []string{"cluster", "priority", "limit"},
	})
	clusterPending = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_pending_active",
		Help: "Requests and upgrades that wait for a connection, where the cluster limits these.",
		Type: metrics.TypeGauge, Labels: []string{"cluster", "priority"},
	})
)

// OverflowError says that a limit of a cluster was reached. Nothing was sent.
type OverflowError struct {
	Cluster  string
	Priority config.Priority
	Limit    config.Limited
}

func (e *OverflowError) Error() string {
	return "limits." + e.Limit.String() + " of the cluster is reached in priority " + e.Priority.String()
}

// unlimited is the limit of what has none and never gets one.
var unlimited = dynamic.Fixed(config.NoLimit)

// breaker lets no more of one thing through than its limit.
type breaker struct {
	limit     *dynamic.Value // below 0: none
	here      atomic.Int64
	elsewhere atomic.Int64

	err       *OverflowError
	counted   atomic.Uint64    // overflows
	overflows *metrics.Counter // nil: there is no limit and will be none

	mu    sync.Mutex // for changes of shown, which come where it opens and closes
	shown atomic.Bool
	open  *metrics.Gauge
}

// take takes one, if the limit leaves one.
func (b *breaker) take() bool {
	for {
		most := b.limit.Load()
		if most < 0 {
			b.here.Add(1)
			return true
		}
		here := b.here.Load()
		used := here + b.elsewhere.Load()
		if used >= most {
			if !b.shown.Load() {
				b.show()
			}
			return false
		}
		if b.here.CompareAndSwap(here, here+1) {
			if used+1 >= most {
				b.show()
			}
			return true
		}
	}
}

// force takes some, or gives them back, whatever the limit is.
func (b *breaker) force(n int64) {
	b.here.Add(n)
	if b.limit.Load() >= 0 {
		b.show()
	}
}

// give gives one back.
func (b *breaker) give() {
	b.here.Add(-1)
	if b.shown.Load() {
		b.show()
	}
}

// full says whether nothing more is let through.
func (b *breaker) full() bool {
	most := b.limit.Load()
	return most >= 0 && b.here.Load()+b.elsewhere.Load() >= most
}

// show has the gauge say whether it is full. Who changes anything calls it afterwards: shown is
// set before the look, so that who gives one back meanwhile comes here, too.
func (b *breaker) show() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shown.Store(true)
	if b.full() {
		b.open.Set(1)
		return
	}
	b.shown.Store(false)
	b.open.Set(0)
}

// overflow counts that the limit was reached, and returns that as an error.
func (b *breaker) overflow() error {
	b.counted.Add(1)
	b.overflows.Inc()
	return b.err
}

// breakers are those of a cluster for one priority.
type breakers struct {
	of [config.NumLimited]breaker
	waiting
}

// init makes them of a configuration.
func (b *breakers) init(c *Cluster, p config.Priority) {
	b.connections, b.pending = &b.of[config.LimitedConnections], &b.of[config.LimitedPending]
	b.cluster, b.priority = c, p
	for i := range b.of {
		what, l := config.Limited(i), &c.cfg.Breakers[p][i]
		of := &b.of[i]
		of.limit, of.err = unlimited, &OverflowError{Cluster: c.Name, Priority: p, Limit: what}
		if !l.MayLimit() {
			continue
		}
		of.limit = c.options.Values.New(l.Key, dynamic.Count, l.Configured(), config.NoLimit, config.MostLimit)
		if what != config.LimitedPending || b.limitsConnections(c, p) {
			of.overflows = c.options.Metrics.Counter(clusterOverflows, c.Name, p.String(), what.String())
			of.open = c.options.Metrics.Gauge(clusterBreakerOpen, c.Name, p.String(), what.String())
		}
		if what == config.LimitedConnections {
			of.limit.OnChange(func() { of.show(); b.serve() })
		} else {
			of.limit.OnChange(of.show)
		}
	}
	if b.limitsConnections(c, p) {
		b.gauge = c.options.Metrics.Gauge(clusterPending, c.Name, p.String())
	}
}

func (b *breakers) limitsConnections(c *Cluster, p config.Priority) bool {
	return c.cfg.Breakers[p][config.LimitedConnections].MayLimit()
}

// admit takes one of what is limited for an attempt, which has it until it is given to a call
// or back.
func (b *breakers) admit(a *Attempt, what config.Limited) error {
	of := &b.of[what]
	if !of.take() {
		return of.overflow()
	}
	a.held = of
	return nil
}

// release gives back what an attempt has.
func (a *Attempt) release() {
	if a.held != nil {
		a.held.give()
		a.held = nil
	}
}

// LimitsConnections says whether requests of a priority may have to wait for a connection,
// because there are as many as there may be.
func (c *Cluster) LimitsConnections(p config.Priority) bool {
	return c.breakers[p].connections.limit.Load() >= 0
}

// TakeRetry takes a retry, if the limit of the cluster leaves one. [Cluster.GiveRetry] must
// follow.
func (c *Cluster) TakeRetry(p config.Priority) bool {
	b := &c.breakers[p].of[config.LimitedRetries]
	if !b.take() {
		_ = b.overflow()
		return false
	}
	return true
}

// GiveRetry gives one back.
func (c *Cluster) GiveRetry(p config.Priority) { c.breakers[p].of[config.LimitedRetries].give() }

// breakerStates returns what the breakers have, for those who look: what is limited, in use, or
// was refused.
func (c *Cluster) breakerStates() (states []control.BreakerState) {
	for p := range c.breakers {
		s := control.BreakerState{Priority: config.Priority(p).String(), Limits: make(map[string]control.BreakerUsed)}
		for what := range c.breakers[p].of {
			b := &c.breakers[p].of[what]
			used := control.BreakerUsed{
				Limit: max(b.limit.Load(), 0), Here: b.here.Load(), Elsewhere: b.elsewhere.Load(), Open: b.full(), Overflows: b.counted.Load(),
			}
			if used != (control.BreakerUsed{}) {
				s.Limits[config.Limited(what).String()] = used
			}
		}
		if len(s.Limits) > 0 {
			states = append(states, s)
		}
	}
	return states
}

// newPools returns an endpoint's pools: what is made for requests of one priority is not used by
// those of another, so that each priority has what its limit leaves it.
func (c *Cluster) newPools() (all []pool) {
	for p := range c.priorities {
		b := &c.breakers[p]
		counted := &b.idle
		if !b.limitsConnections(c, config.Priority(p)) {
			counted = nil // nobody ever waits for them: requests need not share a counter
		}
		all = append(all, newPools(len(c.loops), c.cfg.IdleTimeout, counted)...)
	}
	return all
}

// pool is where the connections of a priority are kept on a loop. One that no route has keeps
// them with the others. nil: nowhere, since each is somebody's.
func (e *Endpoint) pool(p config.Priority, loop int) *pool {
	if e.Announces() {
		return nil
	}
	i := int(p)*len(e.cluster.loops) + loop
	if i >= len(e.pools) {
		i = loop
	}
	return &e.pools[i]
}

// poolsOn yields all of a loop.
func (e *Endpoint) poolsOn(loop int) iter.Seq[*pool] {
	return func(yield func(*pool) bool) {
		for i := loop; i < len(e.pools); i += len(e.cluster.loops) {
			if !yield(&e.pools[i]) {
				return
			}
		}
	}
}

// dismiss ends the wait for connections to the endpoint.
func (e *Endpoint) dismiss() {
	for p := range e.cluster.breakers {
		e.cluster.breakers[p].waiting.dismiss(e)
	}
}
