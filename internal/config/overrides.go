package config

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
)

// The bounds of a file with overrides, and of what may be overridden at all.
const (
	maxOverridesSize = 256 << 10
	MaxOverrides     = 1000
	maxOverride      = 1e12 // beyond every number of a configuration, and exact as a float64
	maxMistakes      = 20   // that are reported of such a file
)

// errTorn is what a file is refused with that somebody may still be writing.
var errTorn = errors.New("the last line has no end: it may be half written")

// ReadOverrides returns the content of a file with overrides. What never ends is cut off, and
// what is no file is refused without waiting for anybody.
func ReadOverrides(path string) ([]byte, error) {
	return readWatched(path, maxOverridesSize, fmt.Sprintf("%d KiB", maxOverridesSize>>10))
}

// ParseOverrides reads a file with overrides: TOML with nothing but numbers, whose keys, with
// those of the tables above them and dots in between, are runtime keys. The error joins one
// [*Problem] for each mistake, as that of [Parse] does, but not more than are of use.
func ParseOverrides(name string, data []byte) (map[string]float64, error) {
	if len(data) > 0 && data[len(data)-1] != '\n' {
		return nil, fmt.Errorf("%s: %w", name, errTorn)
	}
	doc, root, err := open(name, data)
	if err != nil {
		return nil, err
	}
	o := overrides{values: map[string]float64{}, places: map[string]node{}}
	o.read("", root)
	if len(o.values) > MaxOverrides {
		root.fail("has %d numbers; at most %d can be overridden", len(o.values), MaxOverrides)
	}
	if more := len(doc.problems) - maxMistakes; more > 0 {
		doc.problems = append(doc.problems[:maxMistakes], &Problem{File: name, Line: math.MaxInt32, Text: fmt.Sprintf("and %d mistakes more", more)})
	}
	if err := doc.err(); err != nil {
		return nil, err
	}
	return o.values, nil
}

// overrides are what has been read of such a file.
type overrides struct {
	values map[string]float64
	places map[string]node
}

func (o *overrides) read(above string, t *table) {
	for _, key := range slices.Sorted(maps.Keys(t.keys)) {
		n, name := t.at(key), above+key
		if _, isTable := n.raw.(map[string]any); isTable {
			o.read(name+".", newTable(n))
			continue
		}
		if CheckRuntimeKey(name) != nil {
			n.fail("is no runtime key: it must be %s", identifier.is)
			continue
		}
		v, ok := number(n.raw)
		if !ok {
			n.fail("must be a number from %g to %g, found %s", -maxOverride, maxOverride, describe(n.raw))
			continue
		}
		if first, twice := o.places[name]; twice {
			n.fail("%s is there twice (%s)", quote(name), first)
			continue
		}
		o.values[name], o.places[name] = v, n
	}
}

func number(raw any) (v float64, ok bool) {
	switch raw := raw.(type) {
	case int64:
		v = float64(raw)
	case float64:
		v = raw
	default:
		return 0, false
	}
	return v, CheckOverride(v) == nil
}

// CheckRuntimeKey says whether a runtime value can have this name.
func CheckRuntimeKey(key string) error {
	if _, err := identifier.parse(key); err != nil {
		return fmt.Errorf("a runtime key is %s", identifier.is)
	}
	return nil
}

// CheckOverride says whether any runtime value could be set to this.
func CheckOverride(v float64) error {
	if !(math.Abs(v) <= maxOverride) { // nor NaN
		return fmt.Errorf("a runtime value is a number from %g to %g", -maxOverride, maxOverride)
	}
	return nil
}
