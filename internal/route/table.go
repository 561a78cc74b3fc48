// Package route decides where a request goes: listener, host, path and what else a
// route asks for lead to a [Route] of an immutable [Table]. It does no I/O and keeps no
// state, so any number of goroutines may ask the same table. Only the percentages of
// fractions may change while it is used.
//
// Matching is on the path exactly as it is given: what was matched is what is sent.
// Nothing is decoded, merged or resolved here. That was done before, by
// [holdfast/internal/urlpath], where the listener does not say otherwise, so that
// a path that a route guards has no other spelling.
package route

import (
	"net/netip"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
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
	hosts     map[string]*virtualHost // by name
	cfg       *config.Config
	clusters  map[string]HeadEdits // nil: no cluster has any
}

// domains are one listener's virtual hosts by the domain that leads to them.
type domains struct {
	exact    map[string]*virtualHost
	suffix   map[string]*virtualHost // key with its dot: ".example.com"
	longest  int                     // length of the longest suffix
	fallback *virtualHost            // of "*"; may be nil
}

type virtualHost struct {
	name    string
	edits   HeadEdits
	filters *config.Filters
	routes  []Route // side by side, as they are looked at
}

// New builds the table of cfg, which config has validated. values are told of what may be
// overridden at run time; nil: nothing is.
func New(cfg *config.Config, values *dynamic.Set) *Table {
	t := &Table{listeners: make(map[string]*domains), hosts: make(map[string]*virtualHost, len(cfg.VirtualHosts)), cfg: cfg, clusters: clusterEdits(cfg.Clusters)}
	n := 0
	for i := range cfg.VirtualHosts {
		n += len(cfg.VirtualHosts[i].Routes)
	}
	t.routes = make([]*Route, 0, n)
	for i := range cfg.VirtualHosts {
		c := &cfg.VirtualHosts[i]
		vh := &virtualHost{name: c.Name, edits: newHeadEdits(c.Edits), filters: c.Filters, routes: make([]Route, len(c.Routes))}
		t.hosts[c.Name] = vh
		for j := range c.Routes {
			r := &vh.routes[j]
			r.init(vh, &c.Routes[j], values)
			r.Number = len(t.routes)
			t.routes = append(t.routes, r)
		}
		for _, listener := range c.Listeners {
			d := t.listeners[listener]
			if d == nil {
				d = newDomains()
				t.listeners[listener] = d
			}
			for _, domain := range c.Domains {
				d.add(domain, vh)
			}
		}
	}
	return t
}

func newDomains() *domains {
	return &domains{exact: map[string]*virtualHost{}, suffix: map[string]*virtualHost{}}
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

// Named returns the route of a virtual host with a name for which is says so, or nil.
func (t *Table) Named(virtualHost string, is func(*Route) bool) *Route {
	vh := t.hosts[virtualHost]
	if vh == nil {
		return nil
	}
	for i := range vh.routes {
		if is(&vh.routes[i]) {
			return &vh.routes[i]
		}
	}
	return nil
}

// Match finds the route of a request. It is nil unless the outcome is [Matched].
//
// Of the virtual hosts an exact domain wins over the longest "*.suffix", and that
// over "*". The port is not looked at, letters compare without case, one trailing
// dot does not count, and an IPv6 address matches in any of its spellings. An
// empty authority (HTTP/1.0) matches "*" only. Of the virtual host's routes the
// first wins whose pattern matches the path and whose conditions hold. The target
// "*" (of OPTIONS) matches no route.
func (t *Table) Match(q *Query) (*Route, Outcome) {
	vh := t.find(q)
	if vh == nil {
		return nil, NoVirtualHost
	}
	path := pathOf(q.Target)
	if !isPath(path) {
		return nil, NoRoute
	}
	for i := range vh.routes {
		if r := &vh.routes[i]; r.pattern.matches(path) && r.matches(q) {
			return r, Matched
		}
	}
	return nil, NoRoute
}

// isPath is false of "*", which a regex could match.
func isPath(path string) bool { return strings.HasPrefix(path, "/") }

// find returns the virtual host of a request, or nil.
func (t *Table) find(q *Query) *virtualHost {
	if d := t.listeners[q.Listener]; d != nil {
		return d.find(host(q.Authority))
	}
	return nil
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
