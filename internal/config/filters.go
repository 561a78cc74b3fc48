package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/headers"
	"holdfast/internal/urlpath"
)

// Filters are what a request must pass before its target. Nil stands for none.
type Filters struct {
	Allow, Deny     []netip.Prefix // of clients; an empty Allow is everybody
	RateLimit       *RateLimit     // of ordinary requests; nil: none
	TunnelRateLimit *RateLimit     // of upgrades; nil: none

	// Of routes only.
	Fault     *Fault     // nil: none
	Authorize *Authorize // its own, or that of its virtual host; nil: none
}

// RateLimit is a bucket of tokens, of which a request takes one.
type RateLimit struct {
	Requests Dynamic       // tokens that come back in the time Per
	Per      time.Duration // more than 0
	Burst    int64         // how many there are room for
	ByClient bool          // each client address has a bucket of its own
}

// Fault is what is done to requests on purpose.
type Fault struct {
	Headers   []FaultHeader // a request must have all of them
	Delay     FaultDelay
	Abort     FaultAbort
	MaxActive Dynamic // delays at once
}

// FaultHeader is a field that a request must have.
type FaultHeader struct {
	Name  string
	Value string // "": any
}

// FaultDelay holds requests up.
type FaultDelay struct {
	Percent  Dynamic
	Duration time.Duration
}

// FaultAbort answers requests.
type FaultAbort struct {
	Percent Dynamic
	Status  int
}

// Authorize asks a service by HTTP whether a request may pass.
type Authorize struct {
	Cluster         string
	PathPrefix      string // before the path of the request; "" means none
	Timeout         time.Duration
	FailOpen        bool     // a request passes when the service cannot say
	RequestHeaders  []string // of the request, that the service gets
	UpstreamHeaders []string // of the service's answer, that the upstream gets; never the client's own
	ClientHeaders   []string // of the service's refusal, that the client gets
	Upgrades        bool     // upgrades must be allowed, too
}

// HealthCheck is a path at which a listener says whether it wants traffic.
type HealthCheck struct{ Path string }

// Concerns says whether a request, which is no upgrade, asks that. Nil stands for no path.
func (h *HealthCheck) Concerns(method, target string) bool {
	if h == nil || method != "GET" && method != "HEAD" {
		return false
	}
	rest, ok := strings.CutPrefix(target, h.Path)
	return ok && (rest == "" || rest[0] == '?')
}

// MaxRate bounds rates and bursts, MaxDelays the requests that are held up at once.
const (
	MaxRate   = 1_000_000_000
	MaxDelays = 1_000_000
)

// readListenerFilters reads what all requests of a listener must pass.
func readListenerFilters(t *table) *Filters {
	f := readAddresses(t)
	readRateLimits(t, &f)
	return f.orNone()
}

// readHostFilters reads what all requests of a virtual host must pass. What it says of
// authorization its routes inherit.
func readHostFilters(t *table, refs *references) (*Filters, *Authorize) {
	f := readAddresses(t)
	return f.orNone(), readAuthorize(t, nil, refs)
}

// readRouteFilters reads what the requests of a route must pass besides.
func readRouteFilters(t *table, tunnels bool, refs *references) *Filters {
	f := readAddresses(t)
	readRateLimits(t, &f)
	if !tunnels {
		t.inapplicable("tunnel_rate_limit", "this route has no tunnels; they need websocket = true or upgrades")
	}
	f.Fault = readFault(t)
	f.Authorize = readAuthorize(t, refs.authorize, refs)
	return f.orNone()
}

// orNone returns nil for no filters at all.
func (f *Filters) orNone() *Filters {
	if len(f.Allow) == 0 && len(f.Deny) == 0 && f.RateLimit == nil && f.TunnelRateLimit == nil && f.Fault == nil && f.Authorize == nil {
		return nil
	}
	some := *f // by itself: what is almost always none stays on the stack
	return &some
}

func readAddresses(t *table) (f Filters) {
	f.Allow = readNetworks(t, "allow")
	f.Deny = readNetworks(t, "deny")
	return f
}

// readNetworks reads networks, of which an array must have one: nobody knows whether none at
// all would mean everybody or nobody.
func readNetworks(t *table, key string) (networks []netip.Prefix) {
	if !t.asked(key) {
		return nil
	}
	for _, e := range list(t, key, network) {
		networks = append(networks, e.value)
	}
	if t.empty(key) {
		t.at(key).fail(`must have %s; leave the key out for none, or write "0.0.0.0/0" and "::/0" for all`, network.is)
	}
	return networks
}

func readRateLimits(t *table, f *Filters) {
	f.RateLimit = readRateLimit(t, "rate_limit", "requests")
	f.TunnelRateLimit = readRateLimit(t, "tunnel_rate_limit", "tunnels")
}

// readRateLimit reads a bucket, in which things are counted.
func readRateLimit(parent *table, key, things string) *RateLimit {
	if !parent.asked(key) {
		return nil
	}
	t := parent.table(key)
	l := RateLimit{Per: time.Second}
	if t.integer(things, &l.Requests.Value, 1, MaxRate); t.keys != nil && !t.has(things) {
		t.at(things).fail("missing; must be an integer from 1 to %d", MaxRate)
	}
	read(t, "per", &l.Per, ratePeriod)
	l.Burst = l.Requests.Value
	t.integer("burst", &l.Burst, 1, MaxRate)
	read(t, "key", &l.ByClient, either("none", "client"))
	t.runtimeKey("runtime_key", &l.Requests)
	t.strict()
	return &l
}

// ratePeriod is the time in which a bucket fills up to its rate.
var ratePeriod = form[time.Duration]{`a duration from "1ms" to "24h"`, func(s string) (time.Duration, error) {
	d, err := positive(s)
	if err == nil && d > 24*time.Hour {
		err = errForm
	}
	return d, err
}, writeDuration}

func readFault(route *table) *Fault {
	if !route.asked("fault") {
		return nil
	}
	t := route.table("fault")
	f := Fault{Abort: FaultAbort{Status: 503}, MaxActive: Dynamic{Value: 100}}
	for _, h := range t.tables("headers") {
		f.Headers = append(f.Headers, readFaultHeader(h))
	}
	if t.asked("delay") {
		d := t.table("delay")
		needPercent(d, &f.Delay.Percent)
		need(d, "duration", &f.Delay.Duration, duration)
		d.strict()
	}
	if t.asked("abort") {
		a := t.table("abort")
		needPercent(a, &f.Abort.Percent)
		status := int64(f.Abort.Status)
		a.integer("status", &status, 400, 599)
		f.Abort.Status = int(status)
		a.strict()
	}
	t.integer("max_active", &f.MaxActive.Value, 1, MaxDelays)
	t.runtimeKey("runtime_key", &f.MaxActive)
	t.strict()
	if t.keys != nil && !t.has("delay") && !t.has("abort") {
		t.fail("does nothing; delay or abort is needed")
	}
	return &f
}

func readFaultHeader(t *table) (h FaultHeader) {
	need(t, "name", &h.Name, passedName)
	read(t, "value", &h.Value, form[string]{"the value of a header field", func(s string) (string, error) {
		if s == "" {
			return "", errors.New("leave the key out for any value")
		}
		return s, nil
	}, asIs})
	t.strict()
	return h
}

// needPercent reads how many of the requests it is for.
func needPercent(t *table, dst *Dynamic) {
	if t.percent("percent", dst); t.keys != nil && !t.has("percent") {
		t.at("percent").fail("missing; must be a percentage from 0 to 100")
	}
	t.runtimeKey("runtime_key", dst)
}

// readAuthorize reads who is asked about requests: nobody, whom the virtual host says, or
// somebody else.
func readAuthorize(parent *table, inherited *Authorize, refs *references) *Authorize {
	a := inherited
	if n, ok := parent.get("authorize"); ok {
		switch word, _ := n.raw.(string); {
		case word == "off" && inherited == nil:
			n.fail(`"off" has no meaning here: the virtual host has no authorize`)
		case word == "off":
			a = nil
			parent.set("authorize", `"off"`)
		default:
			a = readAuthorization(parent.table("authorize"), refs)
		}
	}
	upgrades := a == nil || a.Upgrades
	if a != nil && a == inherited && !parent.has("authorize_upgrades") {
		parent.get("authorize_upgrades") // it is known, and inherited
		return a
	}
	parent.boolean("authorize_upgrades", &upgrades)
	if a == nil {
		parent.inapplicable("authorize_upgrades", "needs authorize beside it")
		return nil
	}
	own := *a
	own.Upgrades = upgrades
	return &own
}

func readAuthorization(t *table, refs *references) *Authorize {
	a := Authorize{Timeout: 250 * time.Millisecond, Upgrades: true}
	if n, ok := t.get("cluster"); !ok {
		if t.keys != nil {
			n.fail("missing; must be the name of a cluster")
		}
	} else if name, ok := refer(n, "cluster", refs.clusterNames); ok {
		a.Cluster = name
		t.set("cluster", strconv.Quote(name))
	}
	read(t, "path_prefix", &a.PathPrefix, matchPath)
	read(t, "timeout", &a.Timeout, duration)
	read(t, "on_error", &a.FailOpen, either("deny", "allow"))
	a.RequestHeaders = readFieldNames(t, "request_headers", "Authorization")
	a.UpstreamHeaders = readFieldNames(t, "upstream_headers")
	a.ClientHeaders = readFieldNames(t, "client_headers", "Location", "WWW-Authenticate")
	t.strict()
	return &a
}

// readFieldNames reads names of header fields, each once.
func readFieldNames(t *table, key string, fallback ...string) (names []string) {
	if !t.has(key) {
		t.get(key)
		t.set(key, quoteAll(fallback))
		return fallback
	}
	for _, e := range list(t, key, passedName) {
		if slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, e.value) }) {
			e.fail("%s is listed twice", quote(e.value))
			continue
		}
		names = append(names, e.value)
	}
	return names
}

// passedName is the name of a header field whose value means the same at the next hop.
var passedName = form[string]{`the name of a header field like "X-User"`, func(s string) (string, error) {
	const most = 256
	switch {
	case !isToken(s):
		return "", errForm
	case len(s) > most:
		return "", fmt.Errorf("it is longer than %d bytes", most)
	case headers.OfCodec(s):
		return "", errOfOneHop
	}
	return s, nil
}, asIs}

var errOfOneHop = errors.New("that field is about one connection, and made anew for each")

func readHealthCheck(listener *table, paths urlpath.Policy) *HealthCheck {
	if !listener.asked("health_check") {
		return nil
	}
	t := listener.table("health_check")
	var h HealthCheck
	if read(t, "path", &h.Path, matchPath); t.keys != nil && !t.has("path") {
		t.at("path").fail("missing; must be %s", matchPath.is)
	}
	checkMatched(t, "path", "", []urlpath.Policy{paths})
	t.strict()
	return &h
}
