package config

import (
	"errors"
	"net/netip"
	"strings"
)

// Connecting is how the endpoints of a cluster are connected to.
type Connecting struct {
	Attempts      int        // how many endpoints are tried until one is connected to
	Source        netip.Addr // where connections come from; zero: as the kernel chooses
	ProxyProtocol int        // the version of the header that connections begin with; 0: they have none
}

// mostConnectAttempts is how many a request remembers that it has tried.
const mostConnectAttempts = 16

// proxyProtocols are the versions of the header, by number.
var proxyProtocols = []string{"off", "v1", "v2"}

func readConnecting(t *table, endpoints []Endpoint) Connecting {
	var c Connecting
	attempts := int64(3)
	t.integer("connect_attempts", &attempts, 1, mostConnectAttempts)
	c.Attempts = int(attempts)
	read(t, "source_address", &c.Source, sourceAddress)
	if c.Source.IsValid() {
		checkSource(t, c.Source, endpoints)
	}
	read(t, "proxy_protocol", &c.ProxyProtocol, numbered(proxyProtocols))
	return c
}

// sourceAddress is an address of this machine to connect from.
var sourceAddress = form[netip.Addr]{`an IP address of this machine like "10.0.0.1"`, func(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return netip.Addr{}, errForm
	case a.Zone() != "":
		return netip.Addr{}, errors.New("a zone is not supported")
	case a.IsUnspecified():
		return netip.Addr{}, errors.New("leave the key out for what the kernel chooses")
	case a.IsMulticast():
		return netip.Addr{}, errors.New("nothing can be sent from a multicast address")
	}
	return a.Unmap(), nil
}, func(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}}

// checkSource finds an endpoint that cannot be connected to from there. What names stand for
// is not known here.
func checkSource(t *table, source netip.Addr, endpoints []Endpoint) {
	for _, e := range endpoints {
		if strings.HasPrefix(e.Address, "unix:") {
			t.at("source_address").fail("the endpoint %s is a unix socket, to which nobody connects from an IP address", quote(e.Address))
			return
		}
		at, err := netip.ParseAddrPort(e.Address)
		if err == nil && at.Addr().Unmap().Is4() != source.Is4() {
			t.at("source_address").fail("the endpoint %s cannot be connected to from %s: one is IPv4, the other one IPv6", quote(e.Address), source)
			return
		}
	}
}

// numbered is one of a few words, whose value is its place.
func numbered(words []string) form[int] {
	f := oneOf(words...)
	return form[int]{f.is, func(s string) (int, error) {
		if _, err := f.parse(s); err != nil {
			return 0, err
		}
		for i, w := range words {
			if s == w {
				return i, nil
			}
		}
		return 0, errForm
	}, func(i int) string { return words[i] }}
}
