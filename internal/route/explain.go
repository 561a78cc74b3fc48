package route

import (
	"fmt"
	"slices"
	"strings"
)

// Explanation is what becomes of a request, and why. Where chance decides it has everything
// that may become of it.
type Explanation struct {
	Outcome     Outcome // Matched: one of Chances, unless Rest is all
	VirtualHost string  // "" if there is none
	Chances     []Chance
	Rest        float64 // the share for which no route is left
	Missed      []Miss  // the routes before the last chance that do not match, in their order
}

// Chance is a route that the request may get.
type Chance struct {
	Route *Route
	Share float64 // of 1
}

// Miss is a route that does not match, with the first thing that it asks for in vain.
type Miss struct {
	Route *Route
	Why   string
}

// NearHost is a virtual host that could have been found.
type NearHost struct{ Name, Why string }

// Explain says what [Table.Match] does, and why. It may take its time. The query's Random is
// not asked.
func (t *Table) Explain(q *Query) Explanation {
	e := Explanation{Rest: 1}
	found := t.find(q)
	if found == nil {
		e.Outcome = NoVirtualHost
		return e
	}
	e.VirtualHost = found.name
	path := pathOf(q.Target)
	for i := range found.routes {
		r := &found.routes[i]
		switch share, why := r.chance(q, path); {
		case why != "":
			e.Missed = append(e.Missed, Miss{r, why})
		default:
			e.Chances = append(e.Chances, Chance{r, e.Rest * share})
			e.Rest *= 1 - share
		}
		if e.Rest == 0 {
			break
		}
	}
	if len(e.Chances) == 0 {
		e.Outcome = NoRoute
	}
	return e
}

// chance returns which share of such requests that come to the route it takes, or why it takes
// none.
func (r *Route) chance(q *Query, path string) (share float64, why string) {
	if !isPath(path) {
		return 0, fmt.Sprintf("%q is no path", path)
	}
	if !r.pattern.matches(path) {
		return 0, r.pattern.miss(path)
	}
	share = 1
	for i := range r.conditions {
		switch c := &r.conditions[i]; {
		case c.kind == onChance && c.fraction.Load() > 0:
			share *= c.share()
		case c.kind == onChance, !c.holds(q):
			return 0, c.miss(q)
		}
	}
	return share, ""
}

// ExplainHost says which domain has led a request to its virtual host, "" if there is none, and
// which virtual hosts have one for it, too, and are not asked.
func (t *Table) ExplainHost(q *Query) (domain string, nearly []NearHost) {
	name, found := host(q.Authority), t.find(q)
	for i := range t.cfg.VirtualHosts {
		vh := &t.cfg.VirtualHosts[i]
		d := best(vh.Domains, name)
		switch {
		case d == "":
		case found != nil && found.name == vh.Name:
			domain = d
		case found == nil, !slices.Contains(vh.Listeners, q.Listener):
			nearly = append(nearly, NearHost{vh.Name, fmt.Sprintf("has %q, but is on listener %s and not on %s", d, strings.Join(vh.Listeners, ", "), q.Listener)})
		default:
			nearly = append(nearly, NearHost{vh.Name, fmt.Sprintf("has %q; that of %s is more exact", d, found.name)})
		}
	}
	return domain, nearly
}

// best returns the domain that leads a name to a virtual host with these, or "".
func best(domains []string, name string) (found string) {
	d := newDomains()
	for i := range domains {
		d.add(domains[i], &virtualHost{name: domains[i]})
	}
	if vh := d.find(name); vh != nil {
		return vh.name
	}
	return ""
}

// Share is a cluster's part of a route's requests.
type Share struct {
	Cluster string
	Share   float64 // of 1
}

// Shares returns the clusters that a request of the route may go to, by the weights that hold
// now; none of a route that answers by itself, or has its cluster from a header.
func (r *Route) Shares() []Share {
	var shares []Share
	for cluster, part := range r.shares.parts() {
		shares = append(shares, Share{cluster, part})
	}
	return shares
}
