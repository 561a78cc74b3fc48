package upstream

import "net/netip"

// SetTargets has the endpoint stand for these addresses, as one of logical_dns does; none: for
// its own one alone.
func (e *Endpoint) SetTargets(addrs ...netip.AddrPort) {
	e.Addr = netip.AddrPort{}
	if len(addrs) == 0 {
		e.Addr = netip.MustParseAddrPort(e.name)
	}
	e.addresses.Store(&addrs)
}

// Connections is how many connections the limit of the endpoint's cluster counts here.
func (e *Endpoint) Connections() int64 {
	return e.cluster.breakers[0].connections.here.Load()
}
