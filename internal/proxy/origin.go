package proxy

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// provenance is what the tunnels of one listener, route and endpoint have in common, by
// the names of the configuration in which they were opened. Unlike an origin it can go to
// another generation.
type provenance struct {
	listener, virtualHost, route, cluster, endpoint string

	address netip.AddrPort // the endpoint's; zero for a unix socket, and for a name with whatever addresses it has
	limits  tunnel.Limits

	surviveCrash, move, closeRemoved bool // as in config.Tunnels
	endpointPolicy
}

// tunnelOwner is what the manager keeps of an origin.
type tunnelOwner struct {
	active       *metrics.Gauge // of the route
	endpoint     upstream.TunnelMetrics
	closeRemoved bool
	endpointPolicy
}

// count counts tunnels that have come, or with a negative n gone.
func (o *tunnelOwner) count(n int64) {
	o.active.Add(n)
	o.endpoint.Count(n)
}

// follow gives the tunnels the limits of a route, and what becomes of them.
func (p *provenance) follow(c *config.Tunnels) {
	p.limits = tunnel.Limits{
		IdleTimeout: c.IdleTimeout, MaxAge: c.MaxAge, DrainTimeout: c.DrainTimeout, Buffer: c.Buffer, KeepAlive: tunnel.KeepAlive(c.KeepAlive),
	}
	p.surviveCrash, p.move, p.closeRemoved = c.SurviveCrash, c.MoveOnReload, c.CloseOnRouteRemoved
	p.endpointPolicy = endpointPolicyOf(c)
}

func newOrigin(p *provenance, r routeTunnels, e upstream.TunnelMetrics) *tunnel.Origin {
	return &tunnel.Origin{
		Listener: p.listener, VirtualHost: p.virtualHost, Route: p.route, Cluster: p.cluster, Endpoint: p.endpoint,
		EndpointAddr: p.address,
		Limits:       p.limits,
		SurviveCrash: p.surviveCrash,
		Move:         p.move,
		UpBytes:      append(e.ToUpstream[:len(e.ToUpstream):len(e.ToUpstream)], r.relayedUp),
		DownBytes:    append(e.ToDownstream[:len(e.ToDownstream):len(e.ToDownstream)], r.relayedDown),
		Owner:        &tunnelOwner{r.active, e, p.closeRemoved, p.endpointPolicy},
	}
}

// provenanceOf is the way back.
func provenanceOf(o *tunnel.Origin) provenance {
	owner := o.Owner.(*tunnelOwner)
	return provenance{
		listener: o.Listener, virtualHost: o.VirtualHost, route: o.Route, cluster: o.Cluster, endpoint: o.Endpoint,
		address: o.EndpointAddr,
		limits:  o.Limits, surviveCrash: o.SurviveCrash, move: o.Move,
		closeRemoved: owner.closeRemoved, endpointPolicy: owner.endpointPolicy,
	}
}

// originKey is what an origin of tunnels is made for.
type originKey struct {
	listener string
	route    *route.Route
	endpoint *upstream.Endpoint
}

// mostOrigins is how many a loop remembers. Tunnels keep theirs.
const mostOrigins = 10_000

// origin returns what all tunnels like the request's have in common that begin on its
// loop.
func (m *Manager) origin(r *request) *tunnel.Origin {
	key := originKey{r.listener, r.route, r.endpoint}
	origins := m.loops[r.loop.Index].origins
	if o := origins[key]; o != nil {
		return o
	}
	p := provenance{
		listener: r.listener, virtualHost: r.route.VirtualHost, route: r.route.Name,
		cluster: r.cluster, endpoint: r.endpoint.Address, address: r.endpoint.Addr,
	}
	p.follow(&r.route.Tunnels)
	if len(origins) >= mostOrigins {
		clear(origins) // endpoints come and go
	}
	o := newOrigin(&p, r.routeMetrics.routeTunnels, r.endpoint.Tunnels.At(r.route.Priority))
	origins[key] = o
	return o
}

// mostAdoptions is how many provenances are told apart in figures.
const mostAdoptions = 1000

// adoption is what a tunnel of another generation is here.
type adoption struct {
	origin *tunnel.Origin
	closes bool // it is to be closed, since the configuration has no place for it
}

// adopt says what tunnels of another generation are here. They go by the configuration
// that is here as far as it knows their route, as one for WebSocket, and their cluster.
// Otherwise they keep what they had; what the route says becomes of them then, or said
// where it is gone, too, holds. They are counted under their names in any case: nothing
// that was open is gone because its configuration is. Only so many names are, though: who
// makes up one after the other does not fill the memory that figures are in.
func (m *Manager) adopt(p provenance) adoption {
	m.adopting.Lock()
	defer m.adopting.Unlock()
	if a, ok := m.adoptions[p]; ok {
		return a
	}
	was := p
	route := m.namesake(&p)
	_, known := m.options.Clusters.Get(p.cluster)
	switch {
	case route.tunnels != nil && known:
		p.route = route.name // which may be longer than what travels
		p.follow(route.tunnels)
	case route.tunnels != nil:
		p.closeRemoved, p.endpointPolicy = route.tunnels.CloseOnRouteRemoved, endpointPolicyOf(route.tunnels)
	}
	closes := p.closeRemoved && (route.tunnels == nil || !known)
	if len(m.adoptions) >= mostAdoptions {
		return adoption{newOrigin(&p, routeTunnels{}, upstream.TunnelMetrics{}), closes}
	}
	endpoint := m.options.Clusters.Tunnels(p.cluster, p.endpoint, p.address).At(route.priority)
	figures := newRouteTunnels
	if p.relayed() {
		figures = func(r *metrics.Registry, _, route string) routeTunnels { return newTCPTunnels(r, p.listener, route) }
	}
	o := newOrigin(&p, figures(m.options.Metrics, p.virtualHost, p.route), endpoint)
	m.adoptions[was] = adoption{o, closes}
	return m.adoptions[was]
}

// relayed says whether the tunnels come from a listener that relays connections as they are:
// every virtual host has a name.
func (p *provenance) relayed() bool { return p.virtualHost == "" }

// namesake is what the configuration says of the tunnels of a route. The zero value: it has none
// of that name.
type namesake struct {
	name     string
	tunnels  *config.Tunnels
	priority config.Priority
}

// namesake returns the route for upgrades that is called the same. Where there is no virtual
// host, it is that of the listener.
func (m *Manager) namesake(p *provenance) namesake {
	if p.relayed() {
		return m.namesakeOfRelay(p)
	}
	r := m.options.Routes.Named(p.virtualHost, func(r *route.Route) bool {
		return r.MakesTunnels() && brief(r.Name) == p.route
	})
	if r == nil {
		return namesake{}
	}
	return namesake{r.Name, &r.Tunnels, r.Priority}
}

// mostName is how long a name may be that travels.
const mostName = 256

// brief is a name as it travels: one that is too long is cut, and stays one of its own.
func brief(name string) string {
	if len(name) <= mostName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	mark := "~" + hex.EncodeToString(sum[:8])
	return name[:mostName-len(mark)] + mark
}
