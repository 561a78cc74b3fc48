package proxy

import (
	"net/netip"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
)

// trustsPeer says whether what the peer says about the client before it is believed.
func (s *side) trustsPeer(peer netip.AddrPort) bool {
	return s.edge.TrustedHops > 0 || trusts(s.trusted, peer)
}

// clientOf returns the address of the client: the peer's own, or, behind proxies that are
// trusted, the one that they say they were connected to from. It is the zero value where
// nobody knows one. Fields are those that the peer has sent.
//
// What it returns shares no memory with the fields.
func (s *side) clientOf(fields exchange.Fields, peer netip.AddrPort, trusted bool) netip.Addr {
	client := peer.Addr().Unmap().WithZone("")
	if !trusted {
		return client
	}
	chain := chain{fields: fields}
	for hop := 1; hop <= config.MaxHops; hop++ {
		addr, ok := chain.last()
		if !ok {
			break // who is trusted has said no more
		}
		client = addr
		if hop == s.edge.TrustedHops || s.edge.TrustedHops == 0 && !contains(s.trusted, addr) {
			break
		}
	}
	return client
}

// chain is X-Forwarded-For, in all of its lines, on the way from its end to its begin.
type chain struct {
	fields exchange.Fields
	line   string
	within bool // there is something left of the line
}

// last takes the last element off. It is not ok where there is none, or one that is no
// address.
func (c *chain) last() (addr netip.Addr, ok bool) {
	for !c.within {
		n := len(c.fields) - 1
		if n < 0 {
			return netip.Addr{}, false
		}
		if l := &c.fields[n]; strings.EqualFold(l.Name, forwardedFor) {
			c.line, c.within = l.Value, true
		}
		c.fields = c.fields[:n]
	}
	comma := strings.LastIndexByte(c.line, ',')
	element := c.line[comma+1:]
	if c.within = comma >= 0; c.within {
		c.line = c.line[:comma]
	}
	return parseHop(strings.Trim(element, " \t"))
}

// parseHop reads an address, as proxies write it: alone, in brackets, or with a port.
func parseHop(s string) (addr netip.Addr, ok bool) {
	const longest = len("[0000:0000:0000:0000:0000:ffff:255.255.255.255]:65535")
	if s == "" || len(s) > longest {
		return addr, false
	}
	port := ""
	if inner, bracketed := strings.CutPrefix(s, "["); bracketed {
		if s, port, ok = strings.Cut(inner, "]"); !ok || !strings.Contains(s, ":") {
			return addr, false
		}
	} else if colon := strings.IndexByte(s, ':'); colon >= 0 && colon == strings.LastIndexByte(s, ':') {
		s, port = s[:colon], s[colon:]
	}
	if port != "" && (port[0] != ':' || !isPort(port[1:])) {
		return addr, false
	}
	addr, err := netip.ParseAddr(s)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, false
	}
	return addr.Unmap(), true
}

func isPort(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != "" && len(s) <= len("65535")
}

// contains says whether an address, without a zone and not of IPv4 in IPv6, is in one of
// these networks.
func contains(networks []netip.Prefix, addr netip.Addr) bool {
	for _, n := range networks {
		if n.Contains(addr) {
			return true
		}
	}
	return false
}

// isInternal says whether a field is one of those that only trusted proxies may send, and
// whether its name only resembles the one that is meant: some upstreams take "_" and "-" for
// the same.
func isInternal(name string, patterns []string) (own, twin bool) {
	for _, p := range patterns {
		part := name
		if known, begins := strings.CutSuffix(p, "*"); begins {
			p, part = known, name[:min(len(name), len(known))]
		}
		if alike(part, p) {
			return true, !strings.EqualFold(part, p)
		}
	}
	return false, false
}

// alike says whether two names are the same without case, and with "_" and "-" for each other.
func alike(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		x, y := lower(a[i]), lower(b[i])
		if x != y && (x != '_' || y != '-') && (x != '-' || y != '_') {
			return false
		}
	}
	return true
}

// clientPort returns the port that a client used: that of an authority, or the scheme's.
func clientPort(authority, scheme string) string {
	if colon := strings.LastIndexByte(authority, ':'); colon >= 0 && isPort(authority[colon+1:]) {
		return authority[colon+1:]
	}
	if scheme == "https" {
		return "443"
	}
	return "80"
}

// appendForwarded makes the element of Forwarded that speaks about the peer (RFC 7239 §4),
// behind those that are there.
func appendForwarded(head *exchange.Request, peer netip.AddrPort) {
	f := &head.Fields
	had, separator := listOf(*f, forwarded)
	var space [64]byte // the longest address has 39
	node, open, end := viewOf(appendAddr(space[:0], peer)), "for=", ";host=\""
	switch {
	case node == "":
		node = "unknown" // §6.2
	case strings.IndexByte(node, ':') >= 0:
		open, end = `for="[`, `]";host="` // §6
	}
	// A host has a colon more often than not, and never what would have to be escaped.
	f.Set(forwarded, head.Texts.Join(had, separator, open, node, end, head.Authority, `";proto=`, head.Scheme))
}

// isRequestID says whether a request may go by an id that a trusted peer has sent: it is
// in logs, and in as many answers as there are programs behind.
func isRequestID(id string) bool {
	const longest = 128
	for i := range len(id) {
		if id[i] <= ' ' || id[i] >= 0x7f {
			return false
		}
	}
	return id != "" && len(id) <= longest
}

// normalise gives the target its one spelling, before anything is matched with it. false
// means that it has none, and that the request is answered.
func (r *request) normalise() bool {
	path := &r.edge.Path
	normal, err := path.IsNormal(r.target)
	if !normal && err == nil {
		var b []byte
		if b, err = path.Append(r.head.Texts.Make(len(r.target)), r.target); err == nil {
			r.target = viewOf(b)
			r.head.Target = r.target
			setAbsent(&r.head.Fields, originalPath, r.original)
		}
	}
	if err != nil {
		r.refuse(400, refusedPath, err.Error())
		return false
	}
	return true
}

// introduce says in a response's head who we are, and which request it is about.
func (r *request) introduce(resp *exchange.Response) {
	f := &resp.Fields
	switch server := &r.edge.Server; server.Action {
	case config.PassServer:
	case config.DropServer:
		f.Del("Server")
	case config.OverwriteServer:
		f.Set("Server", server.Name)
	case config.AppendServer:
		setAbsent(f, "Server", server.Name)
	}
	if r.edge.RequestIDInResponse {
		f.Set(requestID, r.id)
	}
}
