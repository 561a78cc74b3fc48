package proxy

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"unsafe"

	"holdfast/internal/exchange"
)

// Fields about the client, made or kept by the manager.
const (
	forwardedFor   = "X-Forwarded-For"
	forwardedProto = "X-Forwarded-Proto"
	forwardedHost  = "X-Forwarded-Host"
	requestID      = "X-Request-Id"
)

// trusts says whether what the peer says about the client before it is believed.
//
// A peer on a unix socket has no address. It is believed only where everybody is:
// by a prefix of length 0 ("0.0.0.0/0" or "::/0").
func trusts(proxies []netip.Prefix, peer netip.AddrPort) bool {
	if !peer.IsValid() {
		return slices.ContainsFunc(proxies, func(p netip.Prefix) bool { return p.Bits() == 0 })
	}
	// A prefix never contains an address with a zone, nor IPv4 in its IPv6 clothes.
	addr := peer.Addr().Unmap().WithZone("")
	return slices.ContainsFunc(proxies, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// setForwarding makes head say who the client is: X-Forwarded-For with the peer's
// address, -Proto and -Host as the client used them, and X-Request-Id. It returns
// the request's id and the scheme that the client used.
//
// What the client sent of these, and of other fields by which proxies speak about
// clients, is dropped unless its peer is trusted. From a trusted peer the address
// is appended to X-Forwarded-For, and the others stay where they are present. A
// name written with "_" for "-" is dropped from everybody: CGI-like upstreams take
// it for the real one.
//
// What is made stands in head.Texts.
func setForwarding(head *exchange.Request, peer netip.AddrPort, trusted bool, random func() uint64) (id, scheme string) {
	f := &head.Fields
	dropForwarding(f, trusted)
	if trusted {
		return extendForwarding(head, peer, random)
	}
	// None of these fields is there any more.
	if peer.IsValid() {
		f.Add(forwardedFor, appendChain(head, peer.Addr(), "", ""))
	}
	if head.Authority != "" {
		f.Add(forwardedHost, head.Authority)
	}
	f.Add(forwardedProto, head.Scheme)
	id = newID(&head.Texts, random)
	f.Add(requestID, id)
	return id, head.Scheme
}

// extendForwarding is setForwarding for a peer that is trusted.
func extendForwarding(head *exchange.Request, peer netip.AddrPort, random func() uint64) (id, scheme string) {
	f := &head.Fields
	if peer.IsValid() {
		chain, separator := chainOf(*f)
		f.Set(forwardedFor, appendChain(head, peer.Addr(), chain, separator))
	}
	if head.Authority != "" {
		setAbsent(f, forwardedHost, head.Authority)
	}
	scheme = setAbsent(f, forwardedProto, head.Scheme)
	if scheme != "http" && scheme != "https" {
		scheme = head.Scheme
	}
	id, ok := f.Get(requestID)
	if !ok || id == "" {
		id = newID(&head.Texts, random)
		f.Set(requestID, id)
	}
	return id, scheme
}

// dropForwarding removes what the client is not believed.
func dropForwarding(f *exchange.Fields, trusted bool) {
	kept := 0
	for i, l := range *f {
		if own, twin := isForwarding(l.Name); twin || own && !trusted {
			continue
		}
		if i > kept {
			(*f)[kept] = l
		}
		kept++
	}
	*f = (*f)[:kept]
}

// chainOf returns what X-Forwarded-For says in all of its lines, and what separates another
// address from that.
func chainOf(f exchange.Fields) (chain, separator string) {
	lines := 0
	for _, l := range f {
		if strings.EqualFold(l.Name, forwardedFor) {
			lines, chain, separator = lines+1, l.Value, ", "
		}
	}
	if lines > 1 {
		chain = strings.Join(slices.Collect(f.Values(forwardedFor)), separator)
	}
	return chain, separator
}

// appendChain returns a chain with an address behind it.
func appendChain(head *exchange.Request, peer netip.Addr, chain, separator string) string {
	var space [64]byte // the longest one has 39
	text := peer.Unmap().WithZone("").AppendTo(space[:0])
	return head.Texts.Join(chain, separator, unsafe.String(unsafe.SliceData(text), len(text))) // which copies it
}

// setAbsent sets a field unless it is there, and returns its value.
func setAbsent(f *exchange.Fields, name, value string) string {
	if had, ok := f.Get(name); ok {
		return had
	}
	f.Add(name, value)
	return value
}

// isForwarding says whether a field speaks about the client or the way here, and
// whether it does so under a name that only resembles the real one.
func isForwarding(name string) (own, twin bool) {
	const shortest = len("Forwarded")
	if len(name) < shortest || lower(name[0]) != 'x' && lower(name[0]) != 'f' {
		return false, false
	}
	switch {
	case resembles(name, "X-Forwarded-"), resembles(name, "X-Envoy-"):
	case len(name) == len("Forwarded") && resembles(name, "Forwarded"):
	case len(name) == len("X-Real-IP") && resembles(name, "X-Real-IP"):
	case len(name) == len(requestID) && resembles(name, requestID):
	default:
		return false, false
	}
	return true, strings.IndexByte(name, '_') >= 0
}

// resembles says whether a name begins with another one, without case, and with "_" for
// "-".
func resembles(name, with string) bool {
	if len(name) < len(with) {
		return false
	}
	for i := range len(with) {
		a, b := name[i], with[i]
		if a != b && lower(a) != lower(b) && (a != '_' || b != '-') {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// newID returns a random UUID (version 4, RFC 9562 §5.4).
func newID(texts *exchange.Texts, random func() uint64) string {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], random())
	binary.BigEndian.PutUint64(b[8:], random())
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	var s [36]byte
	hex.Encode(s[:8], b[:4])
	hex.Encode(s[9:13], b[4:6])
	hex.Encode(s[14:18], b[6:8])
	hex.Encode(s[19:23], b[8:10])
	hex.Encode(s[24:], b[10:])
	s[8], s[13], s[18], s[23] = '-', '-', '-', '-'
	return texts.Join(unsafe.String(&s[0], len(s))) // which copies it
}
