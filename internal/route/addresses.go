package route

import "net/netip"

// Addresses says which clients are let in by their addresses.
type Addresses struct {
	allow *networks // nil: everybody
	deny  networks
}

// NewAddresses lets those of allow in, or everybody if that is empty, but for those of deny.
func NewAddresses(allow, deny []netip.Prefix) *Addresses {
	a := &Addresses{deny: newNetworks(deny)}
	if len(allow) > 0 {
		n := newNetworks(allow)
		a.allow = &n
	}
	return a
}

// Denies says whether a client, whose address is of IPv4 or IPv6 without a zone or, on a unix
// socket, not valid, is kept out.
func (a *Addresses) Denies(client netip.Addr) bool {
	return a.deny.contain(client) || a.allow != nil && !a.allow.contain(client)
}

// networks is a set of them, of which there may be thousands.
type networks struct {
	bits4, bits6 []int // the lengths of prefixes that there are
	set          map[netip.Prefix]struct{}
	whole        bool // one of length 0 is there, of either kind
}

func newNetworks(prefixes []netip.Prefix) networks {
	n := networks{set: make(map[netip.Prefix]struct{}, len(prefixes))}
	var seen4, seen6 [129]bool
	for _, p := range prefixes {
		n.set[p.Masked()] = struct{}{}
		bits, seen := &n.bits6, &seen6
		if p.Addr().Is4() {
			bits, seen = &n.bits4, &seen4
		}
		if !seen[p.Bits()] {
			seen[p.Bits()] = true
			*bits = append(*bits, p.Bits())
		}
		n.whole = n.whole || p.Bits() == 0
	}
	return n
}

// contain says whether an address, IPv4 or IPv6 without a zone, is in one of the networks. A
// client on a unix socket, which has none, is in every network that is the whole world.
func (n *networks) contain(a netip.Addr) bool {
	if !a.IsValid() {
		return n.whole
	}
	bits := n.bits6
	if a.Is4() {
		bits = n.bits4
	}
	for _, b := range bits {
		p, err := a.Prefix(b)
		if err != nil {
			continue
		}
		if _, ok := n.set[p]; ok {
			return true
		}
	}
	return false
}
