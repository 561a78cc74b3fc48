package config

import (
	"errors"
	"slices"
	"strings"

	"holdfast/internal/urlpath"
)

// references is what the rest of a file offers to virtual hosts.
type references struct {
	listeners    declared
	tcp          []string // other listeners, which have no virtual hosts
	clusterNames declared
	clusters     map[string]Cluster
	alone        map[string][]WeightedCluster // each cluster by itself, as almost all routes have one
	tunnels      Tunnels                      // what routes start from
	authorize    *Authorize                   // as the virtual host has it
	paths        map[string]urlpath.Policy    // of listeners
}

// declared are the names of a kind of thing. Many thousand routes may refer to one of many.
type declared struct {
	names []string // in the order of the file
	has   map[string]bool
}

func (d *declared) add(name string) {
	if d.has == nil {
		d.has = map[string]bool{}
	}
	d.names = append(d.names, name)
	d.has[name] = true
}

func referencesTo(c *Config) references {
	refs := references{clusters: map[string]Cluster{}, alone: map[string][]WeightedCluster{}, tunnels: c.Tunnels, paths: map[string]urlpath.Policy{}}
	for _, cl := range c.Clusters {
		refs.clusterNames.add(cl.Name)
		refs.clusters[cl.Name] = cl
		refs.alone[cl.Name] = []WeightedCluster{{Cluster: cl.Name, Weight: Dynamic{Value: 1}}}
	}
	return refs
}

func (r *references) addListeners(listeners []Listener) {
	for _, l := range listeners {
		if l.TCP != nil {
			r.tcp = append(r.tcp, l.Name)
			continue
		}
		r.listeners.add(l.Name)
		r.paths[l.Name] = l.Path
	}
}

func readVirtualHosts(tables []*table, refs references) []VirtualHost {
	var hosts []VirtualHost
	declared := map[string]node{}
	claims := map[claim]owner{}
	for _, t := range tables {
		var h VirtualHost
		needName(t, &h.Name, declared)
		h.Listeners = readHostListeners(t, &refs)
		h.Domains = readDomains(t, h, claims)
		h.Edits = readEdits(t)
		h.Filters, refs.authorize = readHostFilters(t, &refs)
		h.Routes = readRoutes(t, refs)
		checkSpelling(t, h.Routes, refs.pathsOf(h.Listeners))
		t.strict()
		hosts = append(hosts, h)
	}
	return hosts
}

// pathsOf returns how these listeners spell paths.
func (r references) pathsOf(listeners []string) (policies []urlpath.Policy) {
	for _, name := range listeners {
		policies = append(policies, r.paths[name])
	}
	return policies
}

func readHostListeners(t *table, refs *references) []string {
	all := refs.listeners
	if !t.asked("listeners") {
		if len(all.names) == 0 && len(refs.tcp) > 0 {
			t.fail("is of no use: no listener takes requests, as all of them have protocol = \"tcp\"")
		}
		t.set("listeners", quoteAll(all.names))
		return slices.Clone(all.names)
	}
	var listeners []string
	for _, n := range t.array("listeners") {
		if name, ok := n.raw.(string); ok && refs.relays(name) {
			n.fail("listener %s has protocol = \"tcp\": it relays connections as they are and has no virtual hosts", quote(name))
			continue
		}
		name, ok := refer(n, "listener", all)
		switch {
		case !ok:
		case slices.Contains(listeners, name):
			n.fail("%s is listed twice", quote(name))
		default:
			listeners = append(listeners, name)
		}
	}
	if t.empty("listeners") {
		t.at("listeners").fail("must name a listener; leave the key out for all of them")
	}
	t.set("listeners", quoteAll(listeners))
	return listeners
}

// refer reads a name that must be declared elsewhere.
func refer(n node, kind string, all declared) (string, bool) {
	name, ok := n.raw.(string)
	if !ok {
		n.fail("must be the name of a %s, found %s", kind, describe(n.raw))
		return "", false
	}
	if !all.has[name] {
		n.fail("there is no %s named %s; %s", kind, quote(name), suggest(name, all.names))
		return "", false
	}
	return name, true
}

// claim is a domain on a listener: at most one virtual host can have it, its owner.
type claim struct{ listener, domain string }

type owner struct {
	host  *table
	name  string
	place *node
}

func readDomains(t *table, h VirtualHost, claims map[claim]owner) []string {
	var domains []string
	for _, e := range list(t, "domains", domain) {
		domains = append(domains, e.value)
		for _, l := range h.Listeners {
			c := claim{l, e.value}
			first, taken := claims[c]
			if taken && first.host == t {
				e.fail("%s is listed twice (%s)", quote(e.value), first.place)
				break
			}
			if taken {
				e.fail("virtual hosts %q (%s) and %q both have %s on listener %q; one of them must give it up",
					first.name, first.place, h.Name, quote(e.value), l)
				break
			}
			claims[c] = owner{t, h.Name, &e.node}
		}
	}
	if t.empty("domains") {
		t.at("domains").fail(`missing; must be an array with %s, or "*" for every host`, domain.is)
	}
	return domains
}

// domain is what a virtual host answers for, compared without the port.
var domain = form[string]{`a host like "example.com" or "*.example.com"`, func(s string) (string, error) {
	if s == "*" {
		return s, nil
	}
	suffix, wild := strings.CutPrefix(s, "*.")
	if strings.Contains(suffix, "*") {
		return "", errors.New(`a star stands alone or in front, as in "*.example.com"`)
	}
	host, port, err := splitAuthority(suffix)
	switch {
	case err != nil:
		return "", err
	case port != "":
		return "", errors.New("a domain has no port; it matches hosts on any")
	case wild && host[0] == '[':
		return "", errors.New("a star goes with a name, not with an address")
	case wild:
		host = "*." + host
	}
	return host, nil
}, asIs}
