package filter

import (
	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/upstream"
)

// Options are what filters are made with.
type Options struct {
	Routes    []*route.Route // in the order of their numbers
	Listeners []config.Listener
	Clusters  *upstream.Clusters
	Values    *dynamic.Set      // nil: nobody overrides anything
	Metrics   *metrics.Registry // nil: nothing is counted
}

// New returns the chains of each listener, by number of the route; nil for one without any
// filter.
func New(o Options) map[string][]Chain {
	b := builder{
		Options: o, made: make(map[*config.Filters]*kinds), chains: make(map[key]Chain),
	}
	all := make(map[string][]Chain)
	for i := range o.Listeners {
		l := &o.Listeners[i]
		for _, r := range o.Routes {
			chain := b.chain(l, r)
			if len(chain) == 0 {
				continue
			}
			if all[l.Name] == nil {
				all[l.Name] = make([]Chain, len(o.Routes))
			}
			all[l.Name][r.Number] = chain
		}
	}
	return all
}

// builder makes every filter once: those of a listener are in the chains of all of its
// routes, and count them all.
type builder struct {
	Options
	made   map[*config.Filters]*kinds
	chains map[key]Chain
}

// key is what a chain is made of.
type key struct{ listener, host, route *config.Filters }

// numKinds is how many kinds of filters there are.
const numKinds = 5

// kinds are the filters of one place, in the order of the chain; nil: there is none.
type kinds [numKinds]Filter

func (b *builder) chain(l *config.Listener, r *route.Route) Chain {
	k := key{l.Filters, r.HostFilters, r.Filters}
	if chain, ok := b.chains[k]; ok {
		return chain
	}
	places := [...]*kinds{
		b.kinds(l.Filters, r, "listener", l.Name),
		b.kinds(r.HostFilters, r, "virtual_host", r.VirtualHost),
		b.kinds(r.Filters, r, "route", r.Name),
	}
	var chain Chain
	for kind := range numKinds {
		for _, place := range places {
			if place != nil && place[kind] != nil {
				chain = append(chain, place[kind])
			}
		}
	}
	b.chains[k] = chain
	return chain
}

// kinds returns the filters of a place, which is one of those that lead to a route.
func (b *builder) kinds(f *config.Filters, r *route.Route, scope, name string) *kinds {
	if f == nil {
		return nil
	}
	if k := b.made[f]; k != nil {
		return k
	}
	k := new(kinds)
	if len(f.Allow) > 0 || len(f.Deny) > 0 {
		k[0] = newAddresses(f, b.Metrics.Counter(addressesDenied, scope, name))
	}
	if f.RateLimit != nil {
		k[1] = newRateLimit(f.RateLimit, false, &b.Options, scope, name)
	}
	if f.TunnelRateLimit != nil {
		k[2] = newRateLimit(f.TunnelRateLimit, true, &b.Options, scope, name)
	}
	if f.Fault != nil {
		k[3] = newFault(f.Fault, &b.Options, r)
	}
	if f.Authorize != nil {
		k[4] = newAuthorization(f.Authorize, &b.Options, r)
	}
	b.made[f] = k
	return k
}
