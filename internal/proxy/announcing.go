package proxy

import (
	"net/netip"

	"holdfast/internal/upstream"
)

// announcement is what the PROXY header of a connection for the request says: the client
// behind proxies that we trust, with its port where that is known, and where its connection
// was taken.
func (r *request) announcement() upstream.Announcement {
	peer := r.x.Downstream().Remote
	source := netip.AddrPortFrom(peer.Addr().Unmap().WithZone(""), peer.Port())
	if r.client != source.Addr() {
		source = netip.AddrPortFrom(r.client, 0)
	}
	return upstream.Announcement{Source: source, Destination: r.x.Local()}
}
