package config

import "net/netip"

// ReceivedProxy is what a listener does with PROXY headers, by which proxies before it say
// whose a connection is.
type ReceivedProxy struct {
	Mode    ProxyMode
	Trusted []netip.Prefix // who is believed; not empty unless Mode is ProxyOff
}

// ProxyMode says whether connections begin with a header.
type ProxyMode int

// The modes.
const (
	ProxyOff      ProxyMode = iota // none is expected: it is what any other bytes are
	ProxyOptional                  // those of who is trusted may
	ProxyRequired                  // all do, and only who is trusted may connect
)

func readReceivedProxy(t *table) ReceivedProxy {
	var mode int
	read(t, "proxy_protocol", &mode, numbered([]string{"off", "optional", "required"}))
	p := ReceivedProxy{Mode: ProxyMode(mode)}
	for _, e := range list(t, "proxy_protocol_trusted", network) {
		p.Trusted = append(p.Trusted, e.value)
	}
	switch {
	case p.Mode == ProxyOff:
		t.inapplicable("proxy_protocol_trusted", `nobody's header is read unless proxy_protocol is "required" or "optional"`)
	case t.empty("proxy_protocol_trusted"):
		t.at("proxy_protocol_trusted").fail("missing; must be an array with at least one network like \"10.0.0.0/8\": whose header is believed")
	}
	return p
}
