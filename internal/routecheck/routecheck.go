// Package routecheck answers questions about the routes of a configuration: what becomes of a
// request and why, and whether requests get what a file expects. What it says it asks of the
// very table that requests are matched by.
package routecheck

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/exchange"
	"holdfast/internal/route"
)

// Answer answers a question about cfg, as far as it can be understood.
func Answer(cfg *config.Config, q *control.RouteQuestion) *control.RouteAnswer {
	c := checker{cfg, route.New(cfg, nil)}
	if q.Tests != nil {
		return c.test(q)
	}
	f, err := c.ask(&config.RouteTest{
		Method: q.Method, URL: q.URL, Headers: q.Headers, Listener: q.Listener, Client: q.Client, Upgrade: q.Upgrade,
	})
	if err != nil {
		return &control.RouteAnswer{Wrong: []string{err.Error()}}
	}
	if q.JSON {
		return &control.RouteAnswer{Text: encode(f)}
	}
	return &control.RouteAnswer{Text: f.text()}
}

// checker asks a table.
type checker struct {
	cfg   *config.Config
	table *route.Table
}

// finding is what becomes of a request. Its names in JSON are a promise to scripts.
type finding struct {
	Method      string     `json:"method"`
	URL         string     `json:"url"`
	Listener    string     `json:"listener"`
	Normal      string     `json:"normalised,omitempty"` // the target, where that is another one
	VirtualHost string     `json:"virtual_host,omitempty"`
	Domain      string     `json:"domain,omitempty"` // that has led to it
	Outcomes    []outcome  `json:"outcomes"`         // one of them, by chance
	Routes      []notTaken `json:"routes_not_taken,omitempty"`
	Hosts       []notTaken `json:"virtual_hosts_not_taken,omitempty"`

	early bool // it is answered before any route is looked for
}

// portion is a cluster's part of a route's requests.
type portion struct {
	Cluster string  `json:"cluster"`
	Share   float64 `json:"share"` // of 1
}

// notTaken is a route or a virtual host, with the first reason.
type notTaken struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// ask finds out what becomes of the request of a test. The error is about that.
func (c *checker) ask(t *config.RouteTest) (*finding, error) {
	q, err := c.request(t)
	if err != nil {
		return nil, err
	}
	f := &finding{Method: t.Method, URL: t.URL, Listener: q.listener.Name}
	received := q.target
	if q.target, err = q.listener.Path.Normalise(received); err != nil {
		f.before(400, err.Error())
		return f, nil
	}
	if q.target != received {
		f.Normal = q.target
	}
	if q.upgrade != "websocket" && q.listener.HealthCheck.Concerns(q.method, q.target) {
		f.before(200, "the listener's health_check, or 503 while no traffic is wanted")
		return f, nil
	}
	asked := &route.Query{
		Listener: q.listener.Name, Authority: q.authority, Target: q.target, Method: q.method, Fields: q.fields, Client: q.client,
	}
	e := c.table.Explain(asked)
	f.VirtualHost = e.VirtualHost
	for _, chance := range e.Chances {
		f.Outcomes = append(f.Outcomes, c.outcomeOf(chance, q))
	}
	if e.Rest > 0 {
		why := route.NoRoute.String()
		if e.Outcome == route.NoVirtualHost {
			why = e.Outcome.String()
		}
		f.Outcomes = append(f.Outcomes, outcome{Share: e.Rest, Status: 404, Why: why})
	}
	for _, m := range e.Missed {
		f.Routes = append(f.Routes, notTaken{m.Route.Name, m.Why})
	}
	domain, nearly := c.table.ExplainHost(asked)
	f.Domain = domain
	for _, n := range nearly {
		f.Hosts = append(f.Hosts, notTaken{n.Name, n.Why})
	}
	return f, nil
}

// before says that the request is answered before any route is looked for.
func (f *finding) before(status int, why string) {
	f.early = true
	f.Outcomes = []outcome{{Share: 1, Status: status, Why: why}}
}

// request understands the request of a test. Its target is the one received.
func (c *checker) request(t *config.RouteTest) (q *request, err error) {
	q = &request{method: t.Method}
	if q.scheme, q.authority, q.target, err = split(t.URL); err != nil {
		return nil, err
	}
	for _, h := range t.Headers {
		name, value, err := config.SplitHeader(h)
		if err != nil {
			return nil, fmt.Errorf("header %q: %w", h, err)
		}
		q.fields = append(q.fields, exchange.Field{Name: name, Value: value})
	}
	if t.Client != "" {
		client, err := netip.ParseAddr(t.Client)
		if err != nil {
			return nil, fmt.Errorf("the client %q is no address", t.Client)
		}
		q.client = client.Unmap().WithZone("")
	}
	if t.Upgrade != "" {
		if q.upgrade, err = config.ParseUpgrade(t.Upgrade); err != nil {
			return nil, fmt.Errorf("%q is no protocol that a route could have in its upgrades", t.Upgrade)
		}
		if t.Method != "GET" {
			return nil, fmt.Errorf("no upgrade is %s: it is GET", t.Method)
		}
	}
	q.listener, err = c.listener(t.Listener)
	return q, err
}

// listener returns the one that is meant.
func (c *checker) listener(name string) (*config.Listener, error) {
	var names []string
	for i := range c.cfg.HTTPListeners {
		l := &c.cfg.HTTPListeners[i]
		if l.TCP != nil {
			if l.Name == name {
				return nil, fmt.Errorf("the listener %q relays connections as they are: no request has a route there", name)
			}
			continue
		}
		if names = append(names, l.Name); name == "" || name == l.Name {
			return l, nil
		}
	}
	if len(names) == 0 {
		return nil, errors.New("no listener takes requests: all of them relay connections as they are")
	}
	return nil, fmt.Errorf("there is no listener %q; there are %s", name, strings.Join(names, ", "))
}

// split takes a URL apart as it would come: nothing is decoded or tidied up. A path alone is a
// request without a host.
func split(url string) (scheme, authority, target string, err error) {
	scheme, rest, absolute := strings.Cut(url, "://")
	switch {
	case strings.HasPrefix(url, "/") || url == "*":
		return "http", "", url, check(url)
	case !absolute, scheme != "http" && scheme != "https":
		return "", "", "", fmt.Errorf("%q is no URL like http://example.com/path", url)
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	if authority, target = rest[:end], rest[end:]; !strings.HasPrefix(target, "/") {
		target = "/" + target
	}
	if authority == "" || strings.Contains(authority, "@") {
		return "", "", "", fmt.Errorf("%q has no host that a request could have", url)
	}
	return scheme, authority, target, check(url)
}

// check refuses what no client can send.
func check(url string) error {
	if strings.ContainsFunc(url, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '#' }) {
		return fmt.Errorf("%q is not as clients send it: #, spaces, control characters and letters beyond ASCII are written as %%XX", url)
	}
	return nil
}

// encode writes JSON for people, too.
func encode(v any) string {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("routecheck: %v", err)) // of strings and numbers
	}
	return string(b) + "\n"
}
