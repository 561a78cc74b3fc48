package route

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/headers"
)

// Route is what happens to the requests that it matches. It never changes.
type Route struct {
	// Route is what the configuration says. Where this type has something of the same name,
	// that is what it comes to.
	*config.Route

	// Name is the route's name in logs, status and metrics: the virtual host and the
	// name of the configuration, or what is matched, like "chat:prefix=/socket" or
	// "chat:path=/health". One with further conditions has a mark of them. It stays
	// the same when other routes come and go.
	Name        string
	VirtualHost string

	// Number is the route's place in [Table.Routes].
	Number int

	// What is changed in heads, in this order: the virtual host's, the route's. nil: nothing.
	RequestHeaders  [2]*headers.Edits
	ResponseHeaders [2]*headers.Edits

	HostFilters *config.Filters // those of its virtual host; nil: none

	Origins *Origins // of upgrades; nil means all
	CORS    *CORS    // nil means none

	pattern      pattern
	conditions   []condition   // beside the pattern
	regexRewrite *regexRewrite // nil means none
	redirect     *redirect     // nil means none
	hash         []hashPolicy
	shares       shares
}

func (r *Route) init(of *virtualHost, c *config.Route, values *dynamic.Set) {
	*r = Route{
		Route:       c,
		VirtualHost: of.name,
		HostFilters: of.filters,
		pattern:     newPattern(&c.Match),
		conditions:  newConditions(&c.Match, values),
		redirect:    newRedirect(c.Redirect),
	}
	r.Name = of.name + ":" + r.name(c.Name)
	r.shares = newShares(c.Clusters, values)
	r.act(of, c)
}

// name is the route's name in its virtual host.
func (r *Route) name(given string) string {
	if given != "" {
		return given
	}
	name := r.pattern.name()
	if len(r.conditions) > 0 {
		var all strings.Builder
		for i := range r.conditions {
			all.WriteString(r.conditions[i].text() + "\n")
		}
		name += " #" + mark(all.String())
	}
	return name
}

// mark is a short text that stands for a long one.
func mark(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:4])
}

// matches says whether the route takes a request whose path matches its pattern.
func (r *Route) matches(q *Query) bool {
	for i := range r.conditions {
		if !r.conditions[i].holds(q) {
			return false
		}
	}
	return true
}

// Cluster returns the cluster of one request. random is a number evenly spread
// over all uint64; equal numbers give equal clusters while the weights stay as they
// are. It returns "" for a redirecting route.
func (r *Route) Cluster(random uint64) string { return r.shares.choose(random) }

// Target returns the target that the upstream gets, but for a regex rewrite: see
// [Route.Rewrite]. A prefix rewrite replaces the
// matched bytes by others, and nothing else: with "/a" rewritten to "/", "/a/b?q"
// becomes "//b?q" and "/ab" becomes "/b", as in Envoy. Of a route that matches
// a whole path, the path is replaced. The query stays.
func (r *Route) Target(target string) string {
	if r.PrefixRewrite == "" {
		return target
	}
	return r.PrefixRewrite + target[len(r.pattern.text):]
}
