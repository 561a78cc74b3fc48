package config

import (
	"math"
	"slices"
	"strconv"

	"holdfast/internal/dynamic"
)

// Dynamic is a number that may be overridden while a generation runs, if it has a runtime
// key.
type Dynamic struct {
	Value int64 // a percentage in millionths of the whole: see [dynamic.Percent]
	Key   string
}

// percent reads a percentage into its value, in millionths.
func (t *table) percent(key string, dst *Dynamic) {
	if n, ok := t.get(key); ok {
		var v float64
		switch raw := n.raw.(type) {
		case int64:
			v = float64(raw)
		case float64:
			v = raw
		default:
			v = -1
		}
		if !(v >= 0 && v <= 100) { // nor NaN
			n.fail("must be a percentage from 0 to 100, found %s", describe(n.raw))
			return
		}
		dst.Value = int64(math.Round(v * dynamic.Whole / 100))
	}
	t.set(key, strconv.FormatFloat(float64(dst.Value)*100/dynamic.Whole, 'f', -1, 64))
}

// runtimeKey reads the key under which a number of the table is overridden.
func (t *table) runtimeKey(key string, dst *Dynamic) {
	read(t, key, &dst.Key, runtimeName)
	if places := t.doc.runtimeKeys[dst.Key]; dst.Key != "" && !slices.Contains(places, t.path()) {
		t.doc.runtimeKeys[dst.Key] = append(places, t.path())
	}
}

// runtimeName is the name of a runtime value.
var runtimeName = form[string]{`a name like "canary.percent"`, identifier.parse, asIs}
