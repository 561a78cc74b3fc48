package merge

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"holdfast/internal/metrics"
)

const generationLabel = "generation"

// A scrape makes one answer of several accounts. Sources are added in the order in
// which their definitions count.
type scrape struct {
	sources map[string][]source // by Desc.Family
}

// source is what somebody has counted of one metric.
type source struct {
	family     *family
	generation *generation // nil: the supervisor's own, or of ended ones
	own        bool
	serving    bool
}

func (s *scrape) add(a *account, from source) {
	if s.sources == nil {
		s.sources = make(map[string][]source)
	}
	shapes := slices.SortedFunc(maps.Keys(a.families), func(x, y string) int {
		return cmp.Or(a.families[y].newest-a.families[x].newest, strings.Compare(x, y))
	})
	for _, shape := range shapes {
		from.family = a.families[shape]
		name := from.family.desc.Family()
		s.sources[name] = append(s.sources[name], from)
	}
}

// addOwn adds what the supervisor counts.
func (s *scrape) addOwn(families []metrics.Family) {
	var a account
	families = slices.Clone(families)
	for i := range families {
		if d := &families[i].Desc; d.Merge == metrics.PerGeneration {
			d.Labels = append(slices.Clone(d.Labels), generationLabel)
		}
	}
	a.note(families, 0)
	s.add(&a, source{own: true})
}

// addLiving adds what the living generations count, the serving one first, then from the
// newest to the oldest.
func (s *scrape) addLiving(living []*generation, serving int) {
	for _, g := range living {
		if g.number == serving {
			s.add(g.seen, source{generation: g, serving: true})
		}
	}
	for _, g := range slices.Backward(living) {
		if g.number != serving {
			s.add(g.seen, source{generation: g})
		}
	}
}

// resolve leaves, of each metric, the sources that can be shown as its first one defines
// it. It returns how many families of each living generation cannot.
func (s *scrape) resolve() map[*generation]int {
	refused := make(map[*generation]int)
	for name, sources := range s.sources {
		first := sources[0]
		s.sources[name] = slices.DeleteFunc(sources, func(from source) bool {
			if first.own == from.own && fits(&first.family.desc, &from.family.desc) {
				return false
			}
			if from.generation != nil {
				refused[from.generation]++
			}
			return true
		})
	}
	return refused
}

// fits returns whether values of one definition can be shown as those of another of
// the same family.
func fits(as, from *metrics.Desc) bool {
	return as.Type == from.Type && (as.Merge == metrics.PerGeneration) == (from.Merge == metrics.PerGeneration)
}

// merge returns the metrics by name, and the series of each in an order that stays.
func (s *scrape) merge() []*dto.MetricFamily {
	var out []*dto.MetricFamily
	for _, sources := range s.sources {
		d := &sources[0].family.desc
		merged := make(map[string]*series)
		for _, from := range sources {
			for key, v := range from.family.series {
				mergeSeries(merged, d, from, key, v)
			}
		}
		if len(merged) == 0 {
			continue
		}
		f := &dto.MetricFamily{Name: proto.String(d.Name), Help: proto.String(d.Help), Type: exposed[d.Type].Enum()}
		for _, key := range slices.Sorted(maps.Keys(merged)) {
			f.Metric = append(f.Metric, merged[key].metric(d))
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// mergeSeries merges a series of a source into those of the metric that d defines. Only
// what is summed has sources that have ended.
func mergeSeries(merged map[string]*series, d *metrics.Desc, from source, key string, v *series) {
	switch {
	case d.Merge == metrics.PerGeneration && !from.own:
		key, v = from.generation.mark(key, v)
	case d.Merge == metrics.Serving && !from.own && !from.serving:
		return
	}
	s := merged[key]
	if s == nil {
		s = &series{labels: v.labels}
		if d.Type == metrics.TypeHistogram {
			s.buckets = make([]uint64, len(d.Bounds)+1)
		}
		if d.Merge == metrics.Max {
			s.value = v.value
		}
		merged[key] = s
	}
	if d.Merge == metrics.Max {
		s.value = max(s.value, v.value)
		return
	}
	s.value = add(s.value, v.value)
	s.sum = add(s.sum, v.sum)
	for i, n := range v.buckets {
		to := len(d.Bounds) // above all of them
		if bounds := from.family.desc.Bounds; i < len(bounds) {
			to, _ = slices.BinarySearch(d.Bounds, bounds[i]) // the first that reaches as far
		}
		s.buckets[to] = addCount(s.buckets[to], n)
	}
}

// mark returns a series with the label of its generation.
func (g *generation) mark(key string, v *series) (string, *series) {
	marked := *v
	marked.labels = append(slices.Clone(v.labels), &dto.LabelPair{Name: proto.String(generationLabel), Value: proto.String(g.label())})
	slices.SortFunc(marked.labels, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	return key + g.label(), &marked
}

func (g *generation) label() string { return strconv.Itoa(g.number) }

var exposed = map[metrics.Type]dto.MetricType{
	metrics.TypeCounter:   dto.MetricType_COUNTER,
	metrics.TypeGauge:     dto.MetricType_GAUGE,
	metrics.TypeHistogram: dto.MetricType_HISTOGRAM,
}

// metric returns a series in the form in which it is exposed.
func (s *series) metric(d *metrics.Desc) *dto.Metric {
	m := &dto.Metric{Label: s.labels}
	switch value := proto.Float64(d.Unit.Shown(float64(s.value))); d.Type {
	case metrics.TypeCounter:
		m.Counter = &dto.Counter{Value: value}
	case metrics.TypeGauge:
		m.Gauge = &dto.Gauge{Value: value}
	case metrics.TypeHistogram:
		m.Histogram = s.histogram(d)
	}
	return m
}

func (s *series) histogram(d *metrics.Desc) *dto.Histogram {
	h := &dto.Histogram{SampleSum: proto.Float64(d.Unit.Shown(float64(s.sum)))}
	var count uint64
	for i, n := range s.buckets {
		count = addCount(count, n)
		if i < len(d.Bounds) {
			h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: proto.Float64(d.Bounds[i]), CumulativeCount: proto.Uint64(count)})
		}
	}
	h.SampleCount = proto.Uint64(count)
	return h
}
