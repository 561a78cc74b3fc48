package config

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"holdfast/internal/dynamic"
)

// Balancing is how a cluster's requests and tunnels are dealt out to its endpoints. The zero
// value is in turns, without a panic threshold.
type Balancing struct {
	Policy     Policy
	TableSize  int        // of Maglev, a prime; 0 is DefaultTableSize
	PanicBelow Dynamic    // the healthy share of a tier, in millionths, below which all of it is used; 0: off
	SlowStart  *SlowStart // nil: off
}

// A Policy is how one of several endpoints is chosen.
type Policy uint8

// The policies.
const (
	RoundRobin Policy = iota
	LeastConnections
	PowerOfTwo
	Random
	Maglev
)

var policies = []string{"round_robin", "least_connections", "power_of_two", "random", "maglev"}

// String returns the word of a configuration.
func (p Policy) String() string { return policies[p] }

// SlowStart has an endpoint that came, or got well again, begin with little.
type SlowStart struct {
	Window      time.Duration // after which it has its whole weight
	Aggression  float64       // how much earlier than evenly, in the time between, it has most of it
	LeastWeight int64         // millionths of its weight that it begins with
}

// DefaultTableSize is the size of a table of Maglev, and MostTableSize the largest.
const (
	DefaultTableSize = 65537
	MostTableSize    = 1_000_003
)

// The most that endpoints may have.
const (
	MostEndpointWeight   = 65535 // as an SRV record
	MostEndpointPriority = 127
	MostMetadata         = 64 // entries
)

func readBalancing(cluster *table) Balancing {
	b := Balancing{PanicBelow: Dynamic{Value: dynamic.Whole / 2}}
	read(cluster, "load_balancing", &b.Policy, form[Policy]{alternatives(policies), func(s string) (Policy, error) {
		word, err := oneOf(policies...).parse(s)
		return Policy(max(0, slices.Index(policies, word))), err
	}, Policy.String})
	readTableSize(cluster, &b)
	readPanic(cluster, &b.PanicBelow)
	b.SlowStart = readSlowStart(cluster, b.Policy)
	return b
}

func readTableSize(cluster *table, b *Balancing) {
	size := int64(DefaultTableSize)
	cluster.integer("maglev_table_size", &size, 2, MostTableSize)
	switch {
	case b.Policy != Maglev:
		cluster.inapplicable("maglev_table_size", `has a meaning only with load_balancing = "maglev"`)
		return
	case !isPrime(size):
		cluster.at("maglev_table_size").fail("must be a prime, found %d; the next one is %d", size, nextPrime(size))
	}
	b.TableSize = int(size)
}

func isPrime(n int64) bool {
	for d := int64(2); d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return n > 1
}

func nextPrime(n int64) int64 {
	for !isPrime(n) {
		n++
	}
	return n
}

// readPanic reads a percentage, or the word for never.
func readPanic(cluster *table, dst *Dynamic) {
	const key = "panic_threshold"
	if n, ok := cluster.get(key); ok && n.raw == "off" {
		dst.Value = 0
	} else if _, word := n.raw.(string); word {
		n.fail(`must be a percentage from 0 to 100, or "off", found %s`, describe(n.raw))
	} else {
		cluster.percent(key, dst)
	}
	if dst.Value == 0 {
		cluster.unset(key)
		cluster.set(key, `"off"`)
	}
	cluster.runtimeKey("panic_runtime_key", dst)
}

// readSlowStart reads how endpoints of a cluster begin, nil if there is no difference.
func readSlowStart(cluster *table, policy Policy) *SlowStart {
	if !cluster.asked("slow_start") {
		return nil
	}
	t := cluster.table("slow_start")
	if t.keys == nil {
		return nil // it is something else, which was said
	}
	s := &SlowStart{Window: 30 * time.Second, Aggression: 1, LeastWeight: dynamic.Whole / 10}
	read(t, "window", &s.Window, duration)
	if n, ok := t.get("aggression"); ok {
		v, ok := number(n.raw)
		if !ok || !(v >= 0.1 && v <= 10) { // nor NaN
			n.fail("must be a number from 0.1 to 10, found %s", describe(n.raw))
		} else {
			s.Aggression = v
		}
	}
	t.set("aggression", writeFloat(s.Aggression))
	least := Dynamic{Value: s.LeastWeight}
	t.percent("min_weight_percent", &least)
	if s.LeastWeight = least.Value; s.LeastWeight == 0 {
		t.at("min_weight_percent").fail("must be above 0: an endpoint begins with it")
	}
	t.strict()
	if policy == Random || policy == Maglev {
		cluster.inapplicable("slow_start", "has no meaning with load_balancing = %q", policy)
	}
	return s
}

// writeFloat writes a number that remains one with a fraction.
func writeFloat(v float64) string {
	s := strconv.FormatFloat(v, 'f', -1, 64)
	if v == math.Trunc(v) {
		s += ".0"
	}
	return s
}

// readEndpointOptions reads what an endpoint may have besides its address.
func readEndpointOptions(t *table) EndpointOptions {
	o := EndpointOptions{Weight: 1}
	t.integer("weight", &o.Weight, 1, MostEndpointWeight)
	priority := int64(0)
	t.integer("priority", &priority, 0, MostEndpointPriority)
	o.Priority = int(priority)
	o.Metadata = readMetadata(t)
	return o
}

// readMetadata reads a table of names and texts, which mean nothing to the proxy.
func readMetadata(endpoint *table) map[string]string {
	const key = "metadata"
	if !endpoint.asked(key) {
		return nil
	}
	n := endpoint.at(key)
	values, isTable := n.raw.(map[string]any)
	if !isTable {
		n.fail(`must be a table like { zone = "a" }, found %s`, describe(n.raw))
		return nil
	}
	if len(values) > MostMetadata {
		n.fail("has %d entries; at most %d are allowed", len(values), MostMetadata)
	}
	t := newTable(n)
	metadata := make(map[string]string, len(values))
	var written []string
	for _, name := range slices.Sorted(maps.Keys(values)) {
		place := t.at(name)
		if _, err := identifier.parse(name); err != nil {
			place.fail("must be %s, found %s", identifier.is, quote(name))
			continue
		}
		if value, ok := understand(place, metadataValue); ok {
			metadata[name] = value
			written = append(written, keyPath("", name)+" = "+strconv.Quote(value))
		}
	}
	endpoint.set(key, "{ "+strings.Join(written, ", ")+" }")
	return metadata
}

var metadataValue = form[string]{"a text of up to 256 printable characters", func(s string) (string, error) {
	if utf8.RuneCountInString(s) > 256 || printable(s) != s {
		return "", errForm
	}
	return s, nil
}, asIs}
