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
	forwardedPort  = "X-Forwarded-Port"
	forwarded      = "Forwarded"
	requestID      = "X-Request-Id"
	originalPath   = "X-Envoy-Original-Path"
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
	return contains(proxies, addr)
}

// identify makes head say who the client is: X-Forwarded-For with the peer's address,
// -Proto, -Host and -Port as the client used them, and X-Request-Id. It notes the client's
// address, the request's id and the scheme that the client used.
//
// What the client sent of these, and of other fields by which proxies speak about
// clients, is dropped unless its peer is trusted. From a trusted peer the address
// is appended to X-Forwarded-For, and the others stay where they are present. A
// name written with "_" for "-" is dropped from everybody: CGI-like upstreams take
// it for the real one. On a listener with TLS the client's certificate is told of, see
// [request.present].
//
// What is made stands in head.Texts.
func (r *request) identify(s *side, peer netip.AddrPort) {
	head, trusted := r.head, s.trustsPeer(peer)
	had := ""
	if s.secure {
		had = r.presented(s, trusted)
	}
	dropForwarding(&head.Fields, trusted, s.edge.InternalHeaders)
	if s.secure {
		r.present(s, had)
	}
	r.client = s.clientOf(head.Fields, peer, trusted)
	if trusted {
		r.id, r.scheme = extendForwarding(head, peer, r.m.options.Random)
	} else {
		r.id, r.scheme = setForwarding(head, peer, r.m.options.Random)
	}
	if s.edge.Forwarded {
		appendForwarded(head, peer)
	}
}

// setForwarding makes the fields where none of them is there any more.
func setForwarding(head *exchange.Request, peer netip.AddrPort, random func() uint64) (id, scheme string) {
	f := &head.Fields
	if peer.IsValid() {
		f.Add(forwardedFor, appendChain(head, peer, "", ""))
	}
	if head.Authority != "" {
		f.Add(forwardedHost, head.Authority)
	}
	f.Add(forwardedProto, head.Scheme)
	f.Add(forwardedPort, clientPort(head.Authority, head.Scheme))
	id = newID(&head.Texts, random)
	f.Add(requestID, id)
	return id, head.Scheme
}

// extendForwarding is setForwarding for a peer that is trusted.
func extendForwarding(head *exchange.Request, peer netip.AddrPort, random func() uint64) (id, scheme string) {
	f := &head.Fields
	if peer.IsValid() {
		chain, separator := listOf(*f, forwardedFor)
		f.Set(forwardedFor, appendChain(head, peer, chain, separator))
	}
	host := head.Authority
	if host != "" {
		host = setAbsent(f, forwardedHost, host)
	}
	scheme = setAbsent(f, forwardedProto, head.Scheme)
	if scheme != "http" && scheme != "https" {
		scheme = head.Scheme
	}
	setAbsent(f, forwardedPort, clientPort(host, scheme))
	id, lines := "", 0
	for _, l := range *f {
		if strings.EqualFold(l.Name, requestID) {
			id, lines = l.Value, lines+1
		}
	}
	if lines != 1 || !isRequestID(id) {
		id = newID(&head.Texts, random)
		f.Set(requestID, id)
	}
	return id, scheme
}

// dropForwarding removes what the client is not believed.
func dropForwarding(f *exchange.Fields, trusted bool, internal []string) {
	kept := 0
	for i, l := range *f {
		own, twin := isForwarding(l.Name)
		if !own && len(internal) > 0 {
			own, twin = isInternal(l.Name, internal)
		}
		if twin || own && !trusted {
			continue
		}
		if i > kept {
			(*f)[kept] = l
		}
		kept++
	}
	*f = (*f)[:kept]
}

// listOf returns what a field says in all of its lines, and what separates another element
// from that.
func listOf(f exchange.Fields, name string) (list, separator string) {
	lines := 0
	for _, l := range f {
		if strings.EqualFold(l.Name, name) {
			lines, list, separator = lines+1, l.Value, ", "
		}
	}
	if lines > 1 {
		list = strings.Join(slices.Collect(f.Values(name)), separator)
	}
	return list, separator
}

// appendChain returns a chain with an address behind it.
func appendChain(head *exchange.Request, peer netip.AddrPort, chain, separator string) string {
	var space [64]byte                                                            // the longest one has 39
	return head.Texts.Join(chain, separator, viewOf(appendAddr(space[:0], peer))) // which copies it
}

// appendAddr appends a peer's address as fields have it; nothing where there is none.
func appendAddr(b []byte, peer netip.AddrPort) []byte {
	return peer.Addr().Unmap().WithZone("").AppendTo(b)
}

// viewOf returns b as a string without a copy.
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

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
	case len(name) == len("X-Original-URL") && resembles(name, "X-Original-URL"):
	case len(name) == len("X-Rewrite-URL") && resembles(name, "X-Rewrite-URL"):
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
