package upstream

import (
	"net/netip"

	"holdfast/internal/control"
)

// OutlierState is what a generation tells of an endpoint as an outlier.
func (e *Endpoint) OutlierState(to *control.EndpointState) { e.outlierState(to) }

// PlaceOf is the place of a TCP address.
func PlaceOf(address string) Place { return Place{Addr: netip.MustParseAddrPort(address)} }
