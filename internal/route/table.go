// Package route decides where a request goes: listener, host and path lead to a
// [Route] of an immutable [Table]. It does no I/O and keeps no state, so any
// number of goroutines may ask the same table.
//
// Matching is on the path exactly as it was received. Nothing is decoded, no
// slashes are merged and no dot segments are resolved, neither before matching
// nor on the way to the upstream: what was matched is what is sent. A route is
// therefore a choice of destination and no access control; "/a/../admin" matches
// the prefix "/a", and it is the upstream that makes something else of it.
package route

import (
	"net/netip"
	"strings"

	"holdfast/internal/config"
)

// Outcome says how a match ended.
type Outcome int

const (
	Matched       Outcome = iota
	NoVirtualHost         // no virtual host of the listener has the request's domain
	NoRoute               // the virtual host has no route for the path
)

var outcomes = [...]string{
	Matched:       "matched",
	NoVirtualHost: "no virtual host",
	NoRoute:       "no route",
}

func (o Outcome) String() string { return outcomes[o] }

// Table holds every virtual host and route of one configuration.
type Table struct {
	listeners map[string]*domains
	routes    []*Route
}

// domains are one listener's virtual hosts by the domain that leads to them.
type domains struct {
	exact    map[string]*virtualHost
	suffix   map[string]*virtualHost // key with its dot: ".example.com"
	longest  int                     // length of the longest suffix
	fallback *virtualHost            // of "*"; may be nil
}

type virtualHost struct{ routes []*Route }

// New builds the table of cfg, which config has validated.
func New(cfg *config.Config) *Table {
	t := &Table{listeners: make(map[string]*domains)}
	for i := range cfg.VirtualHosts {
		c := &cfg.VirtualHosts[i]
		vh := &virtualHost{}
		for j := range c.Routes {
			r := newRoute(c.Name, &c.Routes[j])
			r.Number = len(t.routes)
			vh.routes = append(vh.routes, r)
			t.routes = append(t.routes, r)
		}
		for _, listener := range c.Listeners {
			d := t.listeners[listener]
			if d == nil {
				d = &domains{exact: map[string]*virtualHost{}, suffix: map[string]*virtualHost{}}
				t.listeners[listener] = d
			}
			for _, domain := range c.Domains {
				d.add(domain, vh)
			}
		}
	}
	return t
}

func (d *domains) add(domain string, vh *virtualHost) {
	switch {
	case domain == "*":
		d.fallback = vh
	case strings.HasPrefix(domain, "*."):
		suffix := host(domain[1:])
		d.suffix[suffix] = vh
		d.longest = max(d.longest, len(suffix))
	default:
		d.exact[host(domain)] = vh
	}
}

// Routes returns all routes in the order of the configuration. The caller must not
// change the slice.
func (t *Table) Routes() []*Route { return t.routes }

// Match finds the route of a request by the name of the listener that it came
// in on, its authority and its target. The route is nil unless the outcome is
// [Matched].
//
// Of the virtual hosts an exact domain wins over the longest "*.suffix", and that
// over "*". The port is not looked at, letters compare without case, one trailing
// dot does not count, and an IPv6 address matches in any of its spellings. An
// empty authority (HTTP/1.0) matches "*" only. Of the virtual host's routes the
// first that matches wins. The target "*" (of OPTIONS) matches no route.
func (t *Table) Match(listener, authority, target string) (*Route, Outcome) {
	d := t.listeners[listener]
	if d == nil {
		return nil, NoVirtualHost
	}
	vh := d.find(host(authority))
	if vh == nil {
		return nil, NoVirtualHost
	}
	path := pathOf(target)
	for _, r := range vh.routes {
		if r.matches(path) {
			return r, Matched
		}
	}
	return nil, NoRoute
}

func (d *domains) find(host string) *virtualHost {
	if vh := d.exact[host]; vh != nil {
		return vh
	}
	// From the longest suffix that may be there to the shortest. A host made of
	// thousands of dots costs no more than the configured lengths.
	for i := max(1, len(host)-d.longest); i < len(host); i++ {
		if host[i] != '.' {
			continue
		}
		if vh := d.suffix[host[i:]]; vh != nil {
			return vh
		}
	}
	return d.fallback
}

// host returns the part of an authority that domains are compared with: without
// port and trailing dot, in lower case, IPv6 addresses in their canonical form.
func host(authority string) string {
	if strings.HasPrefix(authority, "[") {
		return addressLiteral(authority)
	}
	h, _, _ := strings.Cut(authority, ":")
	return lower(strings.TrimSuffix(h, "."))
}

// addressLiteral returns "" for what is no address, so that it matches "*" only.
func addressLiteral(authority string) string {
	literal, _, closed := strings.Cut(authority[1:], "]")
	addr, err := netip.ParseAddr(literal)
	if err != nil || !closed {
		return ""
	}
	return "[" + addr.String() + "]"
}

// lower lowers ASCII letters only. strings.ToLower would also turn the Kelvin sign
// into a "k" and so let a host pass for another one.
func lower(s string) string {
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' {
			b := []byte(s)
			for j := i; j < len(b); j++ {
				if c := b[j]; 'A' <= c && c <= 'Z' {
					b[j] = c + 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

// pathOf returns target without its query.
func pathOf(target string) string {
	path, _, _ := strings.Cut(target, "?")
	return path
}
