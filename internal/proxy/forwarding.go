package proxy

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"

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
func setForwarding(head *exchange.Request, peer netip.AddrPort, trusted bool, random func() uint64) (id, scheme string) {
	f := &head.Fields
	*f = slices.DeleteFunc(*f, func(l exchange.Field) bool {
		own, twin := isForwarding(l.Name)
		return twin || own && !trusted
	})
	if peer.IsValid() {
		address := peer.Addr().Unmap().WithZone("").String()
		chain := slices.Collect(f.Values(forwardedFor))
		f.Set(forwardedFor, strings.Join(append(chain, address), ", "))
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
		id = newID(random)
		f.Set(requestID, id)
	}
	return id, scheme
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
	if len(name) < shortest {
		return false, false
	}
	if strings.IndexByte(name, '_') >= 0 {
		own, _ = isForwarding(strings.ReplaceAll(name, "_", "-"))
		return own, own
	}
	switch {
	case hasPrefixFold(name, "X-Forwarded-"), hasPrefixFold(name, "X-Envoy-"),
		strings.EqualFold(name, "Forwarded"), strings.EqualFold(name, "X-Real-IP"), strings.EqualFold(name, requestID):
		return true, false
	}
	return false, false
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// newID returns a random UUID (version 4, RFC 9562 §5.4).
func newID(random func() uint64) string {
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
	return string(s[:])
}
