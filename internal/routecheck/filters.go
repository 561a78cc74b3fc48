package routecheck

import (
	"fmt"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/route"
)

// passed is a filter on a request's way, by the key that configures it.
type passed struct {
	Name  string `json:"name"`
	Of    string `json:"of"` // where that key stands
	About string `json:"about,omitempty"`
}

func (p *passed) text() string {
	s := p.Name + " of " + p.Of
	if p.About != "" {
		s += ": " + p.About
	}
	return s
}

// pass lists the filters that concern the request, in the order of package filter, and decides
// what can be decided: the rest depends on what others have sent, on chance, or on a service.
func (o *outcome) pass(r *route.Route, q *request, upgrade bool) {
	places := []struct {
		name string
		*config.Filters
	}{
		{"listener " + q.listener.Name, q.listener.Filters},
		{"virtual host " + r.VirtualHost, r.HostFilters},
		{"the route", r.Filters},
	}
	add := func(of, name, about string) { o.Filters = append(o.Filters, passed{name, of, about}) }
	for _, p := range places {
		if p.Filters == nil {
			continue
		}
		if len(p.Deny) > 0 {
			add(p.name, "deny", "")
		}
		if len(p.Allow) > 0 {
			add(p.name, "allow", "")
		}
		if route.NewAddresses(p.Allow, p.Deny).Denies(q.client) {
			who := "the client's address"
			if !q.client.IsValid() {
				who = "a client without an address"
			}
			o.answered(403, who+" is not allowed on "+p.name)
			return
		}
	}
	for _, p := range places {
		switch {
		case p.Filters == nil:
		case upgrade && p.TunnelRateLimit != nil:
			add(p.name, "tunnel_rate_limit", aboutRate(p.TunnelRateLimit))
		case !upgrade && p.RateLimit != nil:
			add(p.name, "rate_limit", aboutRate(p.RateLimit))
		}
	}
	if f := r.Filters; f != nil && f.Fault != nil {
		add("the route", "fault", aboutFault(f.Fault))
	}
	if f := r.Filters; f != nil && f.Authorize != nil && (!upgrade || f.Authorize.Upgrades) {
		add("the route or its virtual host", "authorize", "asks cluster "+f.Authorize.Cluster)
	}
}

func aboutRate(l *config.RateLimit) string {
	s := fmt.Sprintf("%d per %s", l.Requests.Value, l.Per)
	if l.ByClient {
		s += " for each client"
	}
	return s
}

func aboutFault(f *config.Fault) string {
	var about []string
	if f.Delay.Duration > 0 {
		about = append(about, fmt.Sprintf("delays %s by %s", percent(share(f.Delay.Percent)), f.Delay.Duration))
	}
	if f.Abort.Percent != (config.Dynamic{}) {
		about = append(about, fmt.Sprintf("answers %s with %d", percent(share(f.Abort.Percent)), f.Abort.Status))
	}
	s := strings.Join(about, ", ")
	if len(f.Headers) == 0 {
		return s
	}
	var names []string
	for _, h := range f.Headers {
		names = append(names, h.Name)
	}
	return s + ", of those with " + strings.Join(names, " and ")
}

// share is a percentage of the configuration as a part of 1.
func share(d config.Dynamic) float64 { return float64(d.Value) / dynamic.Whole }
