package route

import (
	"strings"
	"time"

	"holdfast/internal/config"
)

// Route is what happens to the requests that it matches. It never changes.
type Route struct {
	// Name is the route's name in logs and status: the virtual host and what is
	// matched, like "chat:prefix=/socket" or "chat:path=/health". It stays the
	// same when routes before it come and go.
	Name        string
	VirtualHost string

	// Number is the route's place in [Table.Routes].
	Number int

	WebSocket       bool
	HostRewrite     string // "" means none
	AutoHostRewrite bool

	Timeout           time.Duration // as in config.Route
	StreamIdleTimeout time.Duration // as in config.Route
	Tunnels           config.Tunnels

	prefix        string // set unless path is
	path          string
	prefixRewrite string
	redirect      *config.Redirect
	shares        []share
	total         uint64 // of all weights
}

// share is a cluster's part of a route: the numbers below upTo that are not below
// the upTo of the share before it.
type share struct {
	cluster string
	upTo    uint64
}

func newRoute(vhost string, c *config.Route) *Route {
	r := &Route{
		VirtualHost:       vhost,
		WebSocket:         c.WebSocket,
		HostRewrite:       c.HostRewrite,
		AutoHostRewrite:   c.AutoHostRewrite,
		Timeout:           c.Timeout,
		StreamIdleTimeout: c.StreamIdleTimeout,
		Tunnels:           c.Tunnels,
		prefix:            c.Match.Prefix,
		path:              c.Match.Path,
		prefixRewrite:     c.PrefixRewrite,
		redirect:          c.Redirect,
	}
	if r.path != "" {
		r.Name = vhost + ":path=" + r.path
	} else {
		r.Name = vhost + ":prefix=" + r.prefix
	}
	for _, wc := range c.Clusters {
		if wc.Weight == 0 {
			continue
		}
		r.total += uint64(wc.Weight)
		r.shares = append(r.shares, share{wc.Cluster, r.total})
	}
	return r
}

// matches compares bytes: the prefix "/socket" matches "/sockets" too, as it does
// in Envoy.
func (r *Route) matches(path string) bool {
	if r.path != "" {
		return path == r.path
	}
	return strings.HasPrefix(path, r.prefix)
}

// Cluster returns the cluster of one request. random is a number evenly spread
// over all uint64; equal numbers give equal clusters. It returns "" for a
// redirecting route.
func (r *Route) Cluster(random uint64) string {
	if r.total == 0 {
		return ""
	}
	n := random % r.total
	for _, s := range r.shares {
		if n < s.upTo {
			return s.cluster
		}
	}
	panic("route: the last share does not reach the total")
}

// Target returns the target that the upstream gets. A prefix rewrite replaces the
// matched bytes by others, and nothing else: with "/a" rewritten to "/", "/a/b?q"
// becomes "//b?q" and "/ab" becomes "/b", as in Envoy. Of a route that matches
// a whole path, the path is replaced. The query stays.
func (r *Route) Target(target string) string {
	if r.prefixRewrite == "" {
		return target
	}
	return r.prefixRewrite + target[max(len(r.prefix), len(r.path)):]
}

// Redirects says whether the route answers by itself with a redirect.
func (r *Route) Redirects() bool { return r.redirect != nil }

// Redirect returns the status and the Location of a redirecting route's answer to
// a request. ok is false if the request names no host and the route does not
// either: a Location without a host would leave it to the target which host
// that is ("//elsewhere.example").
//
// When the scheme changes and the host stays, the old scheme's default port is
// dropped, for it would be wrong under the new one.
func (r *Route) Redirect(scheme, authority, target string) (status int, location string, ok bool) {
	to := r.redirect
	if to.Host != "" {
		authority = to.Host
	} else if to.Scheme != "" && to.Scheme != scheme {
		authority = strings.TrimSuffix(authority, defaultPort[scheme])
	}
	if to.Scheme != "" {
		scheme = to.Scheme
	}
	if to.Path != "" {
		target = to.Path
	}
	return to.Status, scheme + "://" + authority + target, authority != ""
}

var defaultPort = map[string]string{"http": ":80", "https": ":443"}
