package proxy

import (
	"sync"
	"sync/atomic"

	"holdfast/internal/metrics"
	"holdfast/internal/route"
)

// The figures of a route take more than a kilobyte of a memory file, and a configuration may
// have a hundred thousand routes.
const (
	// mostAtStart is how many routes a configuration has of which everything that can be
	// counted is there from the start. Of more, a route's figures come with its first request.
	mostAtStart = 1000

	// mostCounted is how many routes are counted apart. What others do is counted together.
	mostCounted = 2048
)

// otherRoutes is what routes are called in metrics that are not counted apart. No virtual host
// has such a name.
const otherRoutes = "*"

// countedRoutes has the metrics of the routes. Its method may be called by any number of
// goroutines.
type countedRoutes struct {
	registry *metrics.Registry
	byNumber []atomic.Pointer[routeMetrics] // nil: the route had no request

	making sync.Mutex
	made   int           // guarded by making
	others *routeMetrics // guarded by making; nil: not made yet
}

func newCountedRoutes(r *metrics.Registry, routes []*route.Route) *countedRoutes {
	c := &countedRoutes{registry: r, byNumber: make([]atomic.Pointer[routeMetrics], len(routes))}
	if len(routes) <= mostAtStart {
		for _, r := range routes {
			c.of(r)
		}
	}
	return c
}

// of returns the metrics of a route.
func (c *countedRoutes) of(r *route.Route) *routeMetrics {
	if m := c.byNumber[r.Number].Load(); m != nil {
		return m
	}
	return c.make(r)
}

func (c *countedRoutes) make(r *route.Route) *routeMetrics {
	c.making.Lock()
	defer c.making.Unlock()
	place := &c.byNumber[r.Number]
	if m := place.Load(); m != nil {
		return m
	}
	var m *routeMetrics
	if c.made < mostCounted {
		c.made++
		own := newRouteMetrics(c.registry, r.VirtualHost, r.Name, routeFigures{r.MakesTunnels(), r.Direct != nil, r.CORS != nil})
		m = &own
	} else {
		if c.others == nil {
			all := newRouteMetrics(c.registry, otherRoutes, otherRoutes, routeFigures{true, true, true})
			c.others = &all
		}
		m = c.others
	}
	place.Store(m)
	return m
}
