package merge

import (
	"encoding/binary"
	"math"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"holdfast/internal/metrics"
)

// room bounds the memory of an account, roughly in bytes. A generation that fills its
// file fits in; one that writes other series into it for every reading does not. A
// variable for tests.
var room = 64 << 20

// An account is what one generation has counted, or all of those that have ended. Its
// counters and histograms never decrease.
type account struct {
	families map[string]*family   // by shape
	byName   map[string][]*family // the same, by Desc.Name
	size     int                  // as far as room is concerned
}

// family holds the series of a metric. Those that were counted under another type or
// with other bounds are another family.
type family struct {
	desc   metrics.Desc
	newest int // the generation with the highest number that had it
	series map[string]*series
}

type series struct {
	labels  []*dto.LabelPair // by name
	value   int64
	buckets []uint64 // not cumulative
	sum     int64
	ended   time.Duration // of the last generation that had it, by the clock, in the account of the ended
}

// shape returns the key of a family: values of one shape can be added as they are. The
// unit is not in it because it is in the name.
func shape(d *metrics.Desc) string {
	b := []byte(d.Name)
	b = append(b, 0xff, byte(d.Type), 0)
	if d.Merge == metrics.PerGeneration {
		b[len(b)-1] = 1
	}
	for _, bound := range d.Bounds {
		b = binary.BigEndian.AppendUint64(b, math.Float64bits(bound))
	}
	return string(b)
}

// family returns the family of a definition; false: it is new and there is no room.
func (a *account) family(d *metrics.Desc, generation int) (*family, bool) {
	key := shape(d)
	f := a.families[key]
	if f == nil {
		f = &family{series: make(map[string]*series)}
		if a.size+familyCost > room || len(a.families) >= mostFamilies {
			return nil, false
		}
		if a.families == nil {
			a.families, a.byName = make(map[string]*family), make(map[string][]*family)
		}
		a.families[key] = f
		a.byName[d.Name] = append(a.byName[d.Name], f)
		a.size += familyCost
	}
	if generation >= f.newest {
		f.desc, f.newest = *d, generation
	}
	return f, true
}

// mostFamilies bounds the work that definitions make. It is some times what a file may
// hold, for builds that follow each other.
const mostFamilies = 4096

// familyCost is what a family may cost at most, and seriesCost about what a series does.
const familyCost = 4 << 10

func seriesCost(key string, s *series) int {
	const overhead = 256
	return overhead + 2*len(key) + 64*len(s.labels) + 8*len(s.buckets)
}

// put adds a series that is new; false: there is no room.
func (a *account) put(f *family, key string, s *series) bool {
	cost := seriesCost(key, s)
	if a.size+cost > room {
		return false
	}
	a.size += cost
	f.series[key] = s
	return true
}

// note takes over what a living generation has counted by now, and returns how many
// series it had no room for. A value that is lower than it was keeps the one that it had.
func (a *account) note(families []metrics.Family, number int) (lost int) {
	for key, f := range a.families {
		if f.desc.Type == metrics.TypeGauge {
			a.drop(key) // a gauge is what it is now
		}
	}
	for i := range families {
		from := &families[i]
		f, ok := a.family(&from.Desc, number)
		if !ok {
			lost += len(from.Series)
			continue
		}
		names := newLabeler(&from.Desc)
		for _, v := range from.Series {
			key := names.key(v.Labels)
			s := f.series[string(key)]
			if s != nil {
				s.raise(&v)
				continue
			}
			s = &series{labels: names.pairs(v.Labels), value: v.Value, buckets: v.Buckets, sum: v.Sum}
			if !a.put(f, string(key), s) {
				lost++
			}
		}
	}
	return lost
}

// raise takes over values that are higher.
func (s *series) raise(v *metrics.Series) {
	s.value = max(s.value, v.Value)
	s.sum = max(s.sum, v.Sum)
	for i, n := range v.Buckets {
		s.buckets[i] = max(s.buckets[i], n)
	}
}

// fold adds what a generation that has ended has counted, and returns how many series
// there was no room for.
func (a *account) fold(from *account, number int, now time.Duration) (lost int) {
	for _, g := range from.families {
		if !outlives(&g.desc) {
			continue
		}
		f, ok := a.family(&g.desc, number)
		if !ok {
			lost += len(g.series)
			continue
		}
		for key, v := range g.series {
			s := f.series[key]
			if s == nil {
				s = &series{labels: v.labels, buckets: make([]uint64, len(v.buckets))}
				if !a.put(f, key, s) {
					lost++
					continue
				}
			}
			s.add(v)
		}
		a.keep(g, now)
	}
	return lost
}

// clock is the time by which series expire: CLOCK_MONOTONIC, which whoever sets the wall
// clock does not change, and which a successor reads as its predecessor did, because no
// memory file outlives the kernel. A variable for tests.
var clock = func() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err) // there is no such kernel
	}
	return time.Duration(now.Nano())
}

// outlives says whether what a generation has counted counts when it has ended.
func outlives(d *metrics.Desc) bool {
	return d.Type != metrics.TypeGauge && d.Merge != metrics.PerGeneration
}

// keep says that a generation which had these series has ended now. With other bounds
// it is the same series.
func (a *account) keep(ended *family, now time.Duration) {
	for _, f := range a.fitting(&ended.desc) {
		for key := range ended.series {
			if s := f.series[key]; s != nil {
				s.ended = now
			}
		}
	}
}

// add adds the values of a series of the same shape.
func (s *series) add(v *series) {
	s.value = add(s.value, v.value)
	s.sum = add(s.sum, v.sum)
	for i, n := range v.buckets {
		s.buckets[i] = addCount(s.buckets[i], n)
	}
}

// add and addCount stop at the greatest number instead of beginning again, as they
// would with what a hostile generation says that it has counted.
func add(a, b int64) int64 {
	switch {
	case b > 0 && a > math.MaxInt64-b:
		return math.MaxInt64
	case b < 0 && a < math.MinInt64-b:
		return math.MinInt64
	}
	return a + b
}

func addCount(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

// expire forgets the series that none of the living generations has and whose last one
// ended long ago.
func (a *account) expire(living []*generation, now time.Duration) {
	for shape, f := range a.families {
		var kept []*family
		for _, g := range living {
			kept = append(kept, g.seen.fitting(&f.desc)...)
		}
		for key, s := range f.series {
			has := func(l *family) bool { return l.series[key] != nil }
			if now-s.ended > Expiry && !slices.ContainsFunc(kept, has) {
				delete(f.series, key)
				a.size -= seriesCost(key, s)
			}
		}
		if len(f.series) == 0 {
			a.drop(shape)
		}
	}
}

// fitting returns the families whose values can be shown as those of d.
func (a *account) fitting(d *metrics.Desc) []*family {
	var out []*family
	for _, f := range a.byName[d.Name] {
		if fits(d, &f.desc) {
			out = append(out, f)
		}
	}
	return out
}

// drop forgets a family.
func (a *account) drop(shape string) {
	f := a.families[shape]
	for key, s := range f.series {
		a.size -= seriesCost(key, s)
	}
	a.size -= familyCost
	delete(a.families, shape)
	name := f.desc.Name
	a.byName[name] = slices.DeleteFunc(a.byName[name], func(other *family) bool { return other == f })
	if len(a.byName[name]) == 0 {
		delete(a.byName, name)
	}
}

// A labeler makes the labels of a family's series. Their order in the definition
// makes no difference, and a label with an empty value is none, as in Prometheus.
type labeler struct {
	names []string
	order []int // of the labels, by name
	buf   []byte
}

func newLabeler(d *metrics.Desc) *labeler {
	l := &labeler{names: d.Labels}
	for i := range l.names {
		l.order = append(l.order, i)
	}
	slices.SortFunc(l.order, func(a, b int) int { return strings.Compare(l.names[a], l.names[b]) })
	return l
}

// separator ends a name or value in a key. No byte of UTF-8 is 0xff.
var separator = []byte{0xff}

// key returns what tells a series from the others of its family. It is valid until the
// next call.
func (l *labeler) key(values []string) []byte {
	l.buf = l.buf[:0]
	for _, i := range l.order {
		if values[i] == "" {
			continue
		}
		l.buf = append(append(l.buf, l.names[i]...), separator...)
		l.buf = append(append(l.buf, values[i]...), separator...)
	}
	return l.buf
}

func (l *labeler) pairs(values []string) []*dto.LabelPair {
	var pairs []*dto.LabelPair
	for _, i := range l.order {
		if values[i] != "" {
			pairs = append(pairs, &dto.LabelPair{Name: proto.String(l.names[i]), Value: proto.String(values[i])})
		}
	}
	return pairs
}
