package proxy

import (
	"holdfast/internal/config"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// endpointPolicy is what becomes of tunnels for what is known of their endpoint.
type endpointPolicy struct {
	closeLeft      bool // when its cluster does not have it any more
	closeUnhealthy bool // while it is not fit for new work
}

func endpointPolicyOf(c *config.Tunnels) endpointPolicy {
	return endpointPolicy{closeLeft: c.CloseOnEndpointRemoved, closeUnhealthy: c.CloseOnEndpointUnhealthy}
}

// verdict says whether the tunnels of an origin are to be closed, by what clusters know of their
// endpoint. That goes by its names: they may be of another generation, whose cluster is not
// here; then nothing is known. Nor does it say anything that the endpoint was not checked yet.
func verdict(clusters *upstream.Clusters, o *tunnel.Origin) tunnel.Reason {
	owner, ok := o.Owner.(*tunnelOwner)
	if !ok || owner.endpointPolicy == (endpointPolicy{}) {
		return tunnel.Open
	}
	now, known := clusters.Conditions(o.Cluster, o.Endpoint, o.EndpointAddr)
	switch {
	case !known:
	case now&upstream.Left != 0 && owner.closeLeft:
		return tunnel.EndpointRemoved
	case now&unhealthy != 0 && owner.closeUnhealthy:
		return tunnel.EndpointUnhealthy
	}
	return tunnel.Open
}

// unhealthy is what makes an endpoint unfit for new work: not that its first check has not
// ended, nor that it has left.
const unhealthy = upstream.Failing | upstream.Ejected

// endpointChanged is called by the clusters.
func (g *generation) endpointChanged(_ *upstream.Endpoint, was, now upstream.Condition) {
	const matters = unhealthy | upstream.Left
	if was&matters != now&matters {
		g.tunnels.Reconsider()
	}
}
