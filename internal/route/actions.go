package route

import (
	"slices"

	"holdfast/internal/config"
	"holdfast/internal/headers"
)

// act takes over what the route does besides sending requests somewhere.
func (r *Route) act(of *virtualHost, c *config.Route) {
	own := newHeadEdits(c.Edits)
	r.RequestHeaders = [...]*headers.Edits{of.edits.Request, own.Request}
	r.ResponseHeaders = [...]*headers.Edits{of.edits.Response, own.Response}
	if c.Origins != nil {
		r.Origins = newOrigins(c.Origins)
	}
	r.CORS = newCORS(c.CORS)
	r.regexRewrite = newRegexRewrite(c.RegexRewrite)
	r.hash = newHashPolicies(c.HashPolicy)
}

// Upgrades says whether the route takes upgrades to a protocol, in lower case.
func (r *Route) Upgrades(to string) bool {
	return r.WebSocket && to == "websocket" || slices.Contains(r.Route.Upgrades, to)
}

// HeadEdits are what is changed in heads of requests and responses; nil means nothing.
type HeadEdits struct{ Request, Response *headers.Edits }

func newHeadEdits(c config.Edits) HeadEdits {
	return HeadEdits{compile(c.RequestHeaders), compile(c.ResponseHeaders)}
}

// ClusterEdits returns what is changed on the way to and from the endpoints of a cluster,
// after all that routes change.
func (t *Table) ClusterEdits(cluster string) HeadEdits { return t.clusters[cluster] }

func clusterEdits(clusters []config.Cluster) map[string]HeadEdits {
	var all map[string]HeadEdits
	for i := range clusters {
		c := &clusters[i]
		e := newHeadEdits(c.Edits)
		if e == (HeadEdits{}) {
			continue
		}
		if all == nil {
			all = make(map[string]HeadEdits)
		}
		all[c.Name] = e
	}
	return all
}

// compile returns nil for what changes nothing.
func compile(h *config.Headers) *headers.Edits {
	if h == nil || len(h.Remove)+len(h.Set)+len(h.Add) == 0 {
		return nil
	}
	return &headers.Edits{Remove: h.Remove, Set: compileLines(h.Set), Add: compileLines(h.Add)}
}

func compileLines(lines []config.Header) []headers.Line {
	var compiled []headers.Line
	for _, l := range lines {
		value, err := headers.Parse(l.Value)
		if err != nil {
			panic("route: a value that config has not validated: " + err.Error())
		}
		compiled = append(compiled, headers.Line{Name: l.Name, Value: value})
	}
	return compiled
}
