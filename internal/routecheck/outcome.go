package routecheck

import (
	"fmt"
	"net/netip"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/route"
)

// request is what is asked about.
type request struct {
	method, scheme, authority string
	target                    string // normalised
	upgrade                   string // "" or the protocol, in lower case
	fields                    exchange.Fields
	client                    netip.Addr // not valid: it has none
	listener                  *config.Listener
}

// outcome is one thing that may become of it.
type outcome struct {
	Share    float64   `json:"share"`             // of 1
	Route    string    `json:"route,omitempty"`   // "": there is none
	Filters  []passed  `json:"filters,omitempty"` // on the way, in their order
	Status   int       `json:"status,omitempty"`  // of an answer of our own
	Why      string    `json:"why,omitempty"`     // that status
	Location string    `json:"location,omitempty"`
	Clusters []portion `json:"clusters,omitempty"`
	Hash     string    `json:"hash,omitempty"`   // hexadecimal, "by chance" of a cookie to be made, or "none"
	Target   string    `json:"target,omitempty"` // that the upstream gets
	Host     string    `json:"host,omitempty"`   // that the upstream gets; "" beside a target: that of the endpoint
	Upgrade  string    `json:"upgrade,omitempty"`
	Tunnel   bool      `json:"tunnel,omitempty"` // it may become one
	Retry    string    `json:"retry,omitempty"`
	Mirror   *portion  `json:"mirror,omitempty"`
}

// answered makes the outcome an answer of our own.
func (o *outcome) answered(status int, why string) { o.Status, o.Why = status, why }

// outcomeOf is what a route does with a request, in the order in which it does so.
func (c *checker) outcomeOf(chance route.Chance, q *request) (o outcome) {
	r := chance.Route
	o = outcome{Share: chance.Share, Route: r.Name}
	upgrade := q.upgrade != "" && (q.upgrade == "websocket" || r.Upgrades(q.upgrade))
	if q.upgrade != "" && !upgrade {
		o.Upgrade = fmt.Sprintf("the route has none to %q: an ordinary request", q.upgrade)
	}
	if r.CORS != nil && !upgrade {
		if page, asks := r.CORS.Page(q.method, q.fields); asks {
			o.answered(200, "which tells a browser what pages of "+page+" may do (cors)")
			return o
		}
	}
	if upgrade && r.Direct == nil {
		switch {
		case r.Redirects(), !r.Upgrades(q.upgrade):
			o.answered(403, "the route is not for WebSocket")
			return o
		case !r.MayComeFrom(q.fields):
			o.answered(403, "the route's origins do not have the request's")
			return o
		}
	}
	if o.pass(r, q, upgrade && r.Direct == nil); o.Status != 0 {
		return o
	}
	switch {
	case r.Direct != nil:
		o.answered(r.Direct.Status, "the route's direct_response")
	case r.Redirects():
		status, location, ok := r.Redirect(q.scheme, q.authority, q.target)
		switch {
		case ok:
			o.Status, o.Location = status, location
		case q.authority == "":
			o.answered(400, "a redirect needs a host, the request has none")
		default:
			o.answered(400, "the redirect's regex_rewrite makes no path of the request's")
		}
	default:
		c.send(&o, r, q, upgrade)
	}
	return o
}

// send says where the request goes, and as what.
func (c *checker) send(o *outcome, r *route.Route, q *request, upgrade bool) {
	target, ok := r.Rewrite(q.target)
	switch {
	case !ok:
		o.answered(400, "the route's regex_rewrite makes no path of the request's")
		return
	case !q.listener.Path.Permits(q.target, target):
		o.answered(400, fmt.Sprintf("the path has a dot segment once it is rewritten, to %q", target))
		return
	}
	host := ""
	if r.HostRewriteHeader != "" {
		if host, _ = q.fields.Get(r.HostRewriteHeader); host != "" && !http1.IsAuthority(host) {
			o.answered(400, fmt.Sprintf("%s, the route's host_rewrite_header, holds no host", r.HostRewriteHeader))
			return
		}
	}
	clusters := r.Shares()
	if r.ClusterHeader != "" {
		name, has := q.fields.Get(r.ClusterHeader)
		switch {
		case !has:
			o.answered(404, fmt.Sprintf("the request has no %s, the route's cluster_header", r.ClusterHeader))
		case !c.isCluster(name):
			o.answered(404, fmt.Sprintf("%s, the route's cluster_header, names no cluster", r.ClusterHeader))
		}
		if o.Status != 0 {
			return
		}
		clusters = []route.Share{{Cluster: name, Share: 1}}
	}
	if r.HasHash() {
		hash, made, ok := r.Hash(q.fields, q.client, func() uint64 { return 0 })
		switch {
		case len(made) > 0:
			o.Hash = "by chance"
		case !ok:
			o.Hash = "none"
		default:
			if o.Hash = fmt.Sprintf("%016x", hash); r.SplitByHash {
				clusters = []route.Share{{Cluster: r.Cluster(route.Spread(hash)), Share: 1}}
			}
		}
	}
	for _, s := range clusters {
		o.Clusters = append(o.Clusters, portion(s))
	}
	o.Target, o.Host, o.Tunnel = target, q.authority, upgrade
	switch {
	case host != "":
		o.Host = host
	case r.HostRewrite != "":
		o.Host = r.HostRewrite
	case r.AutoHostRewrite:
		o.Host = ""
	}
	if !upgrade {
		o.also(r)
	}
}

func (c *checker) isCluster(name string) bool {
	for i := range c.cfg.Clusters {
		if c.cfg.Clusters[i].Name == name {
			return true
		}
	}
	return false
}

// also says what else becomes of an ordinary request.
func (o *outcome) also(r *route.Route) {
	if r.Retry != nil {
		o.Retry = fmt.Sprintf("%s, at most %d times", r.Retry.On, r.Retry.Attempts.Value)
	}
	if r.Mirror != nil {
		o.Mirror = &portion{r.Mirror.Cluster, share(r.Mirror.Percent)}
	}
}
