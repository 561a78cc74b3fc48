package metrics

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
)

// Type is what a metric is in the exposition format.
type Type uint8

// The types.
const (
	TypeCounter Type = iota
	TypeGauge
	TypeHistogram
)

func (t Type) String() string {
	switch t {
	case TypeCounter:
		return "counter"
	case TypeGauge:
		return "gauge"
	case TypeHistogram:
		return "histogram"
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Merge is how the values of several generations become one.
type Merge uint8

// The ways to merge. Counters and histograms know Sum and PerGeneration only.
const (
	Sum           Merge = iota // of the living ones; of a counter or histogram, also of those that have ended
	Serving                    // the value of the serving generation
	Max                        // the greatest value of a living one
	PerGeneration              // not merged: a series for each living one, with the label generation
)

func (m Merge) String() string {
	switch m {
	case Sum:
		return "sum"
	case Serving:
		return "serving"
	case Max:
		return "max"
	case PerGeneration:
		return "per generation"
	}
	return fmt.Sprintf("merge %d", uint8(m))
}

// Unit is what values are counted in.
type Unit uint8

// The units.
const (
	None    Unit = iota
	Seconds      // kept as nanoseconds, shown as seconds
)

// Shown returns a value as it is shown.
func (u Unit) Shown(v float64) float64 {
	if u == Seconds {
		return v / 1e9
	}
	return v
}

// kept returns a bound as values are kept: a value is at most the one where it is at
// most the other.
func (u Unit) kept(bound float64) int64 {
	if u == Seconds {
		bound = math.Round(bound * 1e9)
	}
	if bound >= math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(math.Floor(bound))
}

// Desc is the definition of a metric. It is not changed after [Define].
type Desc struct {
	Name   string // holdfast_…, of a counter …_total, in seconds …_seconds or …_seconds_total
	Help   string
	Type   Type
	Merge  Merge
	Unit   Unit
	Labels []string  // names; the label generation is not among them, see [PerGeneration]
	Bounds []float64 // of a histogram, the upper ones, rising, in the unit that is shown, without +Inf
}

// Family returns the name without the suffix that a counter has. Formats differ in
// which of the two names a family, so no two metrics may have the same.
func (d *Desc) Family() string { return strings.TrimSuffix(d.Name, "_total") }

// What a definition and a series may have. The reader of a memory file holds
// whoever has written it to these limits.
const (
	maxName   = 128 // bytes, also of the name of a label
	maxHelp   = 512
	maxLabels = 8
	maxValue  = 512 // bytes of a label's value
	maxBounds = 64
)

var (
	nameGrammar  = regexp.MustCompile(`^holdfast_[a-z0-9_]+$`)
	labelGrammar = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

	// Suffixes that the parts of a family have in an exposition format: a metric with
	// one could pass itself off as a part of another.
	reservedSuffixes = []string{"_bucket", "_count", "_created", "_sum"}

	// Labels that are added to what was counted.
	reservedLabels = []string{"generation", "le", "quantile"}
)

// Check returns what is wrong with a definition. It holds for our own as for one
// that was read from a memory file.
func (d *Desc) Check() error {
	switch {
	case len(d.Name) > maxName || !nameGrammar.MatchString(d.Name):
		return errors.New("the name is not of the form holdfast_…")
	case slices.ContainsFunc(reservedSuffixes, func(s string) bool { return strings.HasSuffix(d.Name, s) }):
		return errors.New("the name ends like a part of a histogram")
	case (d.Type == TypeCounter) != strings.HasSuffix(d.Name, "_total"):
		return errors.New("the names of counters, and no others, end in _total")
	case (d.Unit == Seconds) != strings.HasSuffix(d.Family(), "_seconds"):
		return errors.New("the names of metrics in seconds, and no others, end in _seconds or _seconds_total")
	case d.Help == "" || len(d.Help) > maxHelp || !utf8.ValidString(d.Help):
		return fmt.Errorf("the help text is not UTF-8 of 1 to %d bytes", maxHelp)
	case d.Type > TypeHistogram || d.Merge > PerGeneration || d.Unit > Seconds:
		return fmt.Errorf("a %v with merge kind %q in unit %d is not known", d.Type, d.Merge, d.Unit)
	case d.Type != TypeGauge && (d.Merge == Serving || d.Merge == Max):
		return fmt.Errorf("a %v cannot have the merge kind %q", d.Type, d.Merge)
	}
	return cmp.Or(d.checkLabels(), d.checkBounds())
}

func (d *Desc) checkLabels() error {
	if len(d.Labels) > maxLabels {
		return fmt.Errorf("%d labels are too many (%d)", len(d.Labels), maxLabels)
	}
	for i, l := range d.Labels {
		switch {
		case len(l) > maxName || !labelGrammar.MatchString(l):
			return errors.New("the name of a label is not valid")
		case slices.Contains(reservedLabels, l):
			return fmt.Errorf("the label %q is reserved", l)
		case slices.Contains(d.Labels[:i], l):
			return fmt.Errorf("the label %q is there twice", l)
		}
	}
	return nil
}

func (d *Desc) checkBounds() error {
	if d.Type != TypeHistogram {
		if len(d.Bounds) > 0 {
			return errors.New("only a histogram has bounds")
		}
		return nil
	}
	if len(d.Bounds) == 0 || len(d.Bounds) > maxBounds {
		return fmt.Errorf("a histogram has 1 to %d bounds", maxBounds)
	}
	for i, b := range d.Bounds {
		// The comparison is written so that NaN fails it.
		if !(b >= 0 && b <= math.MaxFloat64) || i > 0 && b <= d.Bounds[i-1] {
			return errors.New("the bounds do not rise, or are not finite")
		}
	}
	return nil
}

// cells is how many values a series has: of a histogram, a bucket for each bound,
// the one above the last and the sum.
func (d *Desc) cells() int {
	if d.Type == TypeHistogram {
		return len(d.Bounds) + 2
	}
	return 1
}

var catalogue struct {
	mu       sync.Mutex
	byFamily map[string]*Desc
}

// Define adds a metric to the catalogue. It is called for a package's variables; a
// definition that is not valid, or that is there already, is a mistake of ours and
// panics. What it returns serves any number of registries.
func Define(d Desc) *Desc {
	if err := d.Check(); err != nil {
		panic(fmt.Sprintf("metric %s: %v", d.Name, err))
	}
	catalogue.mu.Lock()
	defer catalogue.mu.Unlock()
	if catalogue.byFamily == nil {
		catalogue.byFamily = make(map[string]*Desc)
	}
	if catalogue.byFamily[d.Family()] != nil {
		panic(fmt.Sprintf("metric %s: is defined twice", d.Name))
	}
	catalogue.byFamily[d.Family()] = &d
	return &d
}

// Catalogue returns every metric that the program defines, by name.
func Catalogue() []*Desc {
	catalogue.mu.Lock()
	defer catalogue.mu.Unlock()
	return slices.SortedFunc(maps.Values(catalogue.byFamily), func(a, b *Desc) int { return strings.Compare(a.Name, b.Name) })
}
