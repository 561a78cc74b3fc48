// Package dynamic has runtime values: numbers of the configuration, such as fractions,
// weights and limits, that operators may override while a generation runs.
//
// A file gives a number a runtime key. Whoever uses the number asks its [Value] each time,
// which costs one load; whoever has heard of overrides gives all of them to the [Set].
package dynamic

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// Unit is what a value counts.
type Unit uint8

const (
	Count   Unit = iota // whole things
	Percent             // a percentage; the value is in millionths of the whole
)

func (u Unit) String() string {
	if u == Percent {
		return "percent"
	}
	return "count"
}

// millionths are how many of a percent's value are one percent.
const millionths = 10_000

// Whole is 100 percent.
const Whole = 100 * millionths

// Value is a number that may be overridden. Its methods may be called by any number of
// goroutines.
type Value struct {
	key         string
	unit        Unit
	configured  int64
	least, most int64
	now         atomic.Int64
	changed     atomic.Pointer[func()]
}

// Fixed returns a value that nobody overrides.
func Fixed(n int64) *Value {
	v := &Value{configured: n}
	v.now.Store(n)
	return v
}

// Load returns the number that holds now.
func (v *Value) Load() int64 { return v.now.Load() }

// Hits says whether a number evenly spread over all uint64 falls within the percentage that
// holds now.
func (v *Value) Hits(random uint64) bool { return random%Whole < uint64(v.now.Load()) }

// OnChange has fn called when another number holds from now on. Overrides wait for it: it must
// not wait for anything, nor touch the set.
func (v *Value) OnChange(fn func()) { v.changed.Store(&fn) }

// apply makes an override hold, as far as it is within bounds, or without one what is
// configured.
func (v *Value) apply(override float64, overridden bool) {
	n := v.configured
	if overridden {
		if v.unit == Percent {
			override *= millionths
		}
		n = int64(math.Round(min(max(override, float64(v.least)), float64(v.most))))
	}
	if changed := v.changed.Load(); v.now.Swap(n) != n && changed != nil {
		(*changed)()
	}
}

// Set is all the values of a generation that have a runtime key. The zero value is ready.
// A nil *Set makes values that nobody overrides.
type Set struct {
	mu        sync.Mutex
	values    []*Value
	overrides map[string]float64
}

// New returns a value that is overridden under a key, unless that is "", and never beyond its
// bounds. Several values may have one key.
func (s *Set) New(key string, unit Unit, configured, least, most int64) *Value {
	v := Fixed(configured)
	if s == nil || key == "" {
		return v
	}
	v.key, v.unit, v.least, v.most = key, unit, least, most
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = append(s.values, v)
	override, overridden := s.overrides[key]
	v.apply(override, overridden)
	return v
}

// Shown is what the values of one key are.
type Shown struct {
	Key         string
	Unit        Unit      // of the first of them
	Configured  []float64 // each number once, in the order in which they were made; a percentage in percent
	Now         []float64 // the same of what holds now
	Least, Most float64   // the widest bounds that one of them has
}

// Values returns what the values of each key are, in the order in which keys came up. Of each
// key it shows at most so many different numbers.
func (s *Set) Values(most int) (all []Shown) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index := make(map[string]int, len(s.values))
	for _, v := range s.values {
		i, known := index[v.key]
		if !known {
			i = len(all)
			index[v.key] = i
			all = append(all, Shown{Key: v.key, Unit: v.unit, Least: v.unit.written(v.least), Most: v.unit.written(v.most)})
		}
		k := &all[i]
		k.Configured = addOnce(k.Configured, v.unit.written(v.configured), most)
		k.Now = addOnce(k.Now, v.unit.written(v.now.Load()), most)
		k.Least, k.Most = min(k.Least, v.unit.written(v.least)), max(k.Most, v.unit.written(v.most))
	}
	return all
}

func addOnce(all []float64, v float64, most int) []float64 {
	if len(all) == most || slices.Contains(all, v) {
		return all
	}
	return append(all, v)
}

// written is a value as people write it.
func (u Unit) written(v int64) float64 {
	if u == Percent {
		return float64(v) / millionths
	}
	return float64(v)
}

// Apply has these overrides hold, and no others, for the values that are there and for those
// to come. Who loads two values meanwhile may see one changed and the other not yet. Keys that
// no value has do nothing. The map must not change any more.
func (s *Set) Apply(overrides map[string]float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.overrides = overrides
	for _, v := range s.values {
		override, overridden := overrides[v.key]
		v.apply(override, overridden)
	}
}
