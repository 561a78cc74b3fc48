package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// readSockets reads what the supervisor needs to know about listeners.
func readSockets(tables []*table) []Socket {
	var sockets []Socket
	declared := map[string]node{}
	for _, t := range tables {
		s := readSocket(t, declared)
		for j, other := range sockets {
			if overlap(s, other) {
				t.at("address").fail("%s", overlapText(s, other, tables[j].at("address")))
				break
			}
		}
		sockets = append(sockets, s)
	}
	return sockets
}

func readSocket(t *table, declared map[string]node) Socket {
	var s Socket
	needName(t, &s.Name, declared)
	need(t, "address", &s.Address, listenAddress)
	isUnix := s.Address.Network == "unix"
	if isUnix {
		s.Mode = 0o660
	}
	read(t, "mode", &s.Mode, fileMode)
	t.boolean("ipv6_only", &s.IPv6Only)

	// Where the address is unfit, nothing can be said about what goes with it.
	switch {
	case s.Address == (Address{}):
	case s.Address.Network == "systemd":
		t.inapplicable("mode", "systemd opens %s; SocketMode= of its socket unit is the mode", s.Address.Key())
		t.inapplicable("ipv6_only", "systemd opens %s; BindIPv6Only= of its socket unit is this choice", s.Address.Key())
	default:
		if !isUnix {
			t.inapplicable("mode", "only a unix socket has a mode; this listener is at %s", s.Address.Key())
		}
		if !s.Address.IP.Addr().Is6() {
			t.inapplicable("ipv6_only", "only an IPv6 address has this choice; this listener is at %s", s.Address.Key())
		}
	}
	return s
}

// fileMode is written as chmod(1) takes it.
var fileMode = form[uint32]{`permissions in octal like "0660"`, func(s string) (uint32, error) {
	digits := strings.TrimPrefix(s, "0")
	n, err := strconv.ParseUint(digits, 8, 32)
	if err != nil || len(digits) != 3 {
		return 0, errForm
	}
	return uint32(n), nil
}, func(mode uint32) string { return fmt.Sprintf("%04o", mode) }}

// overlap tells whether the kernel refuses to bind both, as one address contains
// the other (ip(7), ipv6(7)). Port 0 is another port each time.
func overlap(a, b Socket) bool {
	if a.Address.Network != "tcp" || b.Address.Network != "tcp" {
		return a.Address.Network != "" && a.Address == b.Address
	}
	if a.Address.IP.Port() != b.Address.IP.Port() || a.Address.IP.Port() == 0 {
		return false
	}
	return a.Address == b.Address || covers(a, b) || covers(b, a)
}

// covers tells whether a stands for every address of a family that b's is of.
func covers(a, b Socket) bool {
	all, one := a.Address.IP.Addr(), b.Address.IP.Addr()
	return all.IsUnspecified() && (all.Is4() == one.Is4() || all.Is6() && !a.IPv6Only)
}

func overlapText(s, other Socket, place node) string {
	if s.Address == other.Address {
		return fmt.Sprintf("%s is already the address of listener %q (%s)", s.Address.Key(), other.Name, place)
	}
	hint := "use one of them, or another port"
	if s.Address.IP.Addr().Is4() != other.Address.IP.Addr().Is4() {
		hint = "[::] takes IPv4 too unless it has ipv6_only = true"
	}
	return fmt.Sprintf("listener %q at %s overlaps listener %q at %s (%s); %s",
		s.Name, s.Address.Key(), other.Name, other.Address.Key(), place, hint)
}

// readListeners reads what the proxy needs to know about listeners, behind
// readSockets, and ends their tables.
func readListeners(tables []*table, refs *references) []Listener {
	var listeners []Listener
	for _, t := range tables {
		listeners = append(listeners, readListener(t, refs))
	}
	return listeners
}

func readListener(t *table, refs *references) Listener {
	var l Listener
	l.Name, _ = t.keys["name"].(string)
	relays := readProtocol(t)
	l.ReceivedProxy = readReceivedProxy(t)
	l.TLS = readListenerTLS(t)
	if relays {
		readTCP(t, &l, refs)
		t.strict()
		return l
	}
	for _, e := range list(t, "trusted_proxies", network) {
		l.TrustedProxies = append(l.TrustedProxies, e.value)
	}
	readEdge(t, &l)
	l.HTTP2 = readListenerHTTP2(t)
	l.Limits = readListenerLimits(t.table("limits"), l.HTTP2)
	l.HealthCheck = readHealthCheck(t, l.Path)
	l.Filters = readListenerFilters(t)
	t.strict()
	return l
}

func readListenerLimits(t *table, http2 ListenerHTTP2) ListenerLimits {
	l := ListenerLimits{
		HeadSize:    64 << 10,
		HeadTimeout: 10 * time.Second,
		BodyTimeout: 60 * time.Second,
		BodyRate:    64,
		IdleTimeout: 60 * time.Second,

		HTTP2Streams: 100,
	}
	t.limit("connections", &l.Connections, 1)
	read(t, "head_size", &l.HeadSize, sizeBetween(1, 1))
	read(t, "head_timeout", &l.HeadTimeout, duration)
	read(t, "body_size", &l.BodySize, sizeOrUnlimited)
	read(t, "body_timeout", &l.BodyTimeout, duration)
	read(t, "body_rate", &l.BodyRate, rate)
	read(t, "idle_timeout", &l.IdleTimeout, duration)
	readHTTP2Limits(t, &l, http2)
	t.strict()
	return l
}

// network is a range of IP addresses, or a single one.
var network = form[netip.Prefix]{`a network like "10.0.0.0/8" or an address like "::1"`, parseNetwork, netip.Prefix.String}

func parseNetwork(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return netip.Prefix{}, errors.New("a zone is not supported")
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return netip.Prefix{}, errForm
	case p.Addr().Is4In6():
		return netip.Prefix{}, errors.New("write it as an IPv4 network")
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("the network of this size is %q", p.Masked())
	}
	return p, nil
}
