package metrics

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Registry holds what one process counts. Its methods may be called concurrently,
// and on a nil Registry, which counts nothing.
type Registry struct {
	mu       sync.Mutex
	file     *writer // nil: everything is in private memory
	unshown  *Gauge
	families []*family // in the order of their registration
	byDesc   map[*Desc]*family
}

type family struct {
	desc   *Desc
	number uint32 // in the file
	placed bool   // whether it is in the file
	bounds []int64
	order  []*series
	byKey  map[string]*series
}

type series struct {
	labels    []string
	cells     []atomic.Uint64
	histogram *Histogram // of a histogram's cells
}

// NewRegistry returns a Registry in private memory.
func NewRegistry() *Registry {
	return &Registry{byDesc: make(map[*Desc]*family)}
}

// UnshownSeries is the name of the metric that every memory file has.
const UnshownSeries = "holdfast_metrics_unshown_series"

// unshown has its place because it is the first thing that goes into a memory file.
var unshown = Define(Desc{
	Name: UnshownSeries,
	Help: "Series that are counted but not shown, because the memory file of their generation is full.",
	Type: TypeGauge,
})

// Counter returns the series of d with these values of its labels. For the same
// values it is the same series. Values must come from the configuration, never from
// a client: a series is never removed. A value that is not UTF-8 is mended, one of
// more than 512 bytes is cut.
//
// It panics if d is no counter, or has another number of labels.
func (r *Registry) Counter(d *Desc, labels ...string) *Counter {
	if r == nil {
		return nil
	}
	return (*Counter)(&r.series(d, TypeCounter, labels).cells[0])
}

// Gauge is like [Registry.Counter].
func (r *Registry) Gauge(d *Desc, labels ...string) *Gauge {
	if r == nil {
		return nil
	}
	return (*Gauge)(&r.series(d, TypeGauge, labels).cells[0])
}

// Histogram is like [Registry.Counter].
func (r *Registry) Histogram(d *Desc, labels ...string) *Histogram {
	if r == nil {
		return nil
	}
	return r.series(d, TypeHistogram, labels).histogram
}

func (r *Registry) series(d *Desc, t Type, labels []string) *series {
	if d.Type != t || len(d.Labels) != len(labels) {
		panic(fmt.Sprintf("metric %s, a %v with %d labels, used as a %v with %d", d.Name, d.Type, len(d.Labels), t, len(labels)))
	}
	values := make([]string, len(labels))
	for i, v := range labels {
		values[i] = clean(v)
	}
	key := seriesKey(values)

	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.familyLocked(d)
	s := f.byKey[key]
	if s == nil {
		s = &series{labels: values, cells: r.cellsLocked(f, values)}
		if t == TypeHistogram {
			last := len(s.cells) - 1
			s.histogram = &Histogram{bounds: f.bounds, buckets: s.cells[:last], sum: &s.cells[last]}
		}
		f.byKey[key] = s
		f.order = append(f.order, s)
	}
	return s
}

// clean makes a label's value what a reader of the memory file accepts.
func clean(v string) string {
	v = strings.ToValidUTF8(v, "\uFFFD")
	if len(v) > maxValue {
		v = strings.ToValidUTF8(v[:maxValue], "") // without a rune that was cut
	}
	return v
}

func (r *Registry) familyLocked(d *Desc) *family {
	f := r.byDesc[d]
	if f != nil {
		return f
	}
	f = &family{desc: d, byKey: make(map[string]*series)}
	for _, b := range d.Bounds {
		f.bounds = append(f.bounds, d.Unit.kept(b))
	}
	if r.file != nil {
		f.number, f.placed = r.file.family(d)
	}
	r.byDesc[d] = f
	r.families = append(r.families, f)
	return f
}

// cellsLocked finds a place in the file, else in private memory.
func (r *Registry) cellsLocked(f *family, values []string) []atomic.Uint64 {
	n := f.desc.cells()
	if f.placed {
		if cells, ok := r.file.series(f.number, values, n); ok {
			return cells
		}
	}
	if r.file != nil {
		r.unshown.Add(1)
	}
	return make([]atomic.Uint64, n)
}

// Family is a metric and its values at one time.
type Family struct {
	Desc   Desc
	Series []Series
}

// Series is a value of a metric.
type Series struct {
	Labels  []string // the values of Desc.Labels, in their order
	Value   int64    // of a counter, where it is at least 0, or a gauge
	Buckets []uint64 // of a histogram: one for each bound and one above; not cumulative
	Sum     int64    // of a histogram, at least 0
}

// Families returns what was registered, with its values now, in the order of the
// registration. On a nil Registry it returns nothing.
func (r *Registry) Families() []Family {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	families := make([]Family, 0, len(r.families))
	for _, f := range r.families {
		out := Family{Desc: *f.desc}
		for _, s := range f.order {
			out.Series = append(out.Series, f.desc.read(slices.Clone(s.labels), s.cells))
		}
		families = append(families, out)
	}
	return families
}

// mostCarried is how many series that the registry does not have are carried over at most.
const mostCarried = 1 << 10

// Carry adds what a predecessor has counted to what the registry counts: counters and
// histograms that were registered here before, by their name, with the same labels and
// bounds, and of those also series that are not here yet. A gauge is what it is now, and
// is not carried. Where the families are from is not trusted: what is added is bounded.
func (r *Registry) Carry(families []Family) {
	if r == nil {
		return
	}
	room := mostCarried
	for i := range families {
		from := &families[i]
		to := r.like(&from.Desc)
		if to == nil || to.desc.Type == TypeGauge {
			continue
		}
		for _, v := range from.Series {
			if !r.has(to, v.Labels) {
				if room == 0 {
					continue
				}
				room--
			}
			r.series(to.desc, to.desc.Type, v.Labels).carry(v)
		}
	}
}

// like returns the family whose values can be added to those of d.
func (r *Registry) like(d *Desc) *family {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.families {
		same := f.desc.Name == d.Name && f.desc.Type == d.Type && f.desc.Merge == d.Merge
		if same && slices.Equal(f.desc.Labels, d.Labels) && slices.Equal(f.desc.Bounds, d.Bounds) {
			return f
		}
	}
	return nil
}

func (r *Registry) has(f *family, labels []string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return f.byKey[seriesKey(labels)] != nil
}

// carry adds the values of a series of the same metric.
func (s *series) carry(v Series) {
	values := append(slices.Clone(v.Buckets), uint64(max(v.Sum, 0)))
	if s.histogram == nil {
		values = []uint64{uint64(max(v.Value, 0))}
	}
	for i := range s.cells {
		now := min(s.cells[i].Load(), math.MaxInt64)
		s.cells[i].Add(min(values[i], math.MaxInt64-now)) // no value, whoever has written it, makes ours begin again
	}
}

// seriesKey is what tells a series from others of its family. No byte of UTF-8 is 0xff.
func seriesKey(labels []string) string { return strings.Join(labels, "\xff") }

// read returns the values in a series' cells, which may change meanwhile.
func (d *Desc) read(labels []string, cells []atomic.Uint64) Series {
	s := Series{Labels: labels}
	switch d.Type {
	case TypeCounter:
		s.Value = int64(min(cells[0].Load(), math.MaxInt64))
	case TypeGauge:
		s.Value = int64(cells[0].Load())
	case TypeHistogram:
		last := len(cells) - 1
		s.Buckets = make([]uint64, last)
		for i := range s.Buckets {
			s.Buckets[i] = cells[i].Load()
		}
		s.Sum = int64(min(cells[last].Load(), math.MaxInt64))
	}
	return s
}
