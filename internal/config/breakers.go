package config

import (
	"math"
	"slices"
	"strconv"
)

// Priority is which of a cluster's circuit breakers a route's requests and tunnels go by.
type Priority uint8

// The priorities.
const (
	PriorityDefault Priority = iota
	PriorityHigh
	NumPriorities
)

var priorities = [NumPriorities]string{PriorityDefault: "default", PriorityHigh: "high"}

func (p Priority) String() string { return priorities[p] }

// A Limited is what a circuit breaker limits, in one priority of a cluster.
type Limited uint8

// What is limited.
const (
	LimitedConnections Limited = iota // open ones, without those that became tunnels
	LimitedTunnels                    // open ones, and upgrades that may become one
	LimitedPending                    // requests that wait for a connection
	LimitedRequests                   // that are with the cluster, without upgrades
	LimitedRetries                    // that are under way
	NumLimited
)

// LimitedKeys are what a file calls them, and figures, too.
var LimitedKeys = [NumLimited]string{
	LimitedConnections: "connections",
	LimitedTunnels:     "tunnels",
	LimitedPending:     "pending",
	LimitedRequests:    "requests",
	LimitedRetries:     "retries",
}

func (l Limited) String() string { return LimitedKeys[l] }

// Breakers are what a cluster is given at the most at the same time, by the priority. The zero
// value limits nothing.
type Breakers [NumPriorities]Limits

// Limits are those of one priority.
type Limits [NumLimited]Limit

// Limit is how many there may be. The zero value is no limit.
type Limit struct {
	Dynamic      // NoLimit in an override: there is none
	Set     bool // Value is the limit
}

// NoLimit is what runtime values have for no limit.
const NoLimit = -1

// Configured is the limit as a runtime value has it.
func (l *Limit) Configured() int64 {
	if !l.Set {
		return NoLimit
	}
	return l.Value
}

// MayLimit says whether there is a limit, or may be one by an override.
func (l *Limit) MayLimit() bool { return l.Set || l.Key != "" }

// MostLimit is the highest limit that can be written.
const MostLimit = math.MaxInt32

// defaultPending is how many requests may wait for a connection where a limit has them wait.
const defaultPending = 1024

// readBreakers reads the limits of a cluster.
func readBreakers(cluster *table) (b Breakers) {
	t := cluster.table("limits")
	var stem string
	read(t, "runtime_prefix", &stem, runtimeStem)
	readLimitsOf(t, &b[PriorityDefault], stem)
	high := t.table("high")
	if stem != "" {
		stem += "." + priorities[PriorityHigh]
	}
	readLimitsOf(high, &b[PriorityHigh], stem)
	high.strict()
	t.strict()
	return b
}

// readLimitsOf reads those of one priority, whose runtime keys begin with a stem; "": they have
// none.
func readLimitsOf(t *table, of *Limits, stem string) {
	for what, key := range LimitedKeys {
		l := &of[what]
		least := int64(1)
		switch Limited(what) {
		case LimitedPending:
			if of[LimitedConnections].MayLimit() { // nobody waits otherwise
				l.Set, l.Value = true, defaultPending
			}
			least = 0
		case LimitedRetries:
			least = 0
		}
		if t.most(key, l, least); stem == "" {
			continue
		}
		l.Key = stem + "." + key
		if places := t.doc.runtimeKeys[l.Key]; !slices.Contains(places, t.path()) {
			t.doc.runtimeKeys[l.Key] = append(places, t.path())
		}
	}
}

// most reads how many there may be, or the word for no limit.
func (t *table) most(key string, dst *Limit, least int64) {
	if n, ok := t.get(key); ok {
		v, ok := n.raw.(int64)
		switch {
		case n.raw == "off":
			dst.Set, dst.Value = false, 0
		case ok && v >= least && v <= MostLimit:
			dst.Set, dst.Value = true, v
		default:
			n.fail(`must be an integer from %d to %d, or "off", found %s`, least, MostLimit, describe(n.raw))
			return
		}
	}
	if t.doc.terse {
		return
	}
	if dst.Set {
		t.set(key, strconv.FormatInt(dst.Value, 10))
	} else {
		t.set(key, strconv.Quote("off"))
	}
}

// runtimeStem is what runtime keys begin with: with what follows they are no longer than a
// name may be.
var runtimeStem = form[string]{`a name like "web.limits" of at most 100 characters`, func(s string) (string, error) {
	if len(s) > 100 {
		return "", errForm
	}
	return identifier.parse(s)
}, asIs}

// readPriority reads which limits of its clusters a route's requests go by.
func readPriority(t *table, r *Route) {
	high := false
	if read(t, "priority", &high, priorityForm); high {
		r.Priority = PriorityHigh
	}
}

var priorityForm = either(priorities[PriorityDefault], priorities[PriorityHigh])

// UsesPriority says whether any route is of that priority.
func (c *Config) UsesPriority(p Priority) bool {
	return slices.ContainsFunc(c.VirtualHosts, func(h VirtualHost) bool {
		return slices.ContainsFunc(h.Routes, func(r Route) bool { return r.Priority == p })
	})
}
