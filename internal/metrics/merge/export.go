package merge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"holdfast/internal/metrics"
)

// An export begins with the 8 bytes HFtotals and the version of its layout, a uint64, and
// goes on with records, as a memory file has them: a uint32 for the kind, a uint32 for
// the length with this head, and what the kind says. All numbers have the machine's byte
// order. Records of another kind are skipped.
//
//	folded: an int64 for each generation that is in the totals, the last ones, in the
//	        order in which they have ended
//	family: int64: the number of the newest generation that had it; a definition as in
//	        a memory file. The labels in it mean nothing
//	generation: int64: its number. What follows is what it has counted, as was read last
//	        while it lived; what comes before the first one is of all that have ended
//	series: of the family before it. int64: when the last generation that had it has
//	        ended, in nanoseconds of CLOCK_MONOTONIC; int64: value, or of a histogram
//	        the sum; a uint64 for each bucket; name and value of each label by name, each
//	        with a byte 0xff behind it
const (
	exportMagic   = "HFtotals"
	exportVersion = 1

	kindFolded = 1
	kindFamily = 2
	kindSeries = 3
	kindLiving = 4
)

// mostFolded is how many numbers of ended generations are kept: many times as many as
// can still be about in files that a successor is handed.
const mostFolded = 1024

// mostLiving is how many living generations are restored at most.
const mostLiving = 256

// Grace is for how long nothing that was restored expires, since the generations that
// have it come back one after the other.
const Grace = 5 * time.Minute

var order = binary.NativeEndian

// Export returns what was counted, for [Restore]: by the generations that have ended, and
// by the living ones as it was read last. It waits for a Merge that is under way.
func (t *Totals) Export() []byte {
	t.work.Lock()
	defer t.work.Unlock()
	return t.export()
}

// export is never longer than room and an eighth: what is exported of an account takes
// fewer bytes than its size says, and living generations are left out that there is no
// place for.
func (t *Totals) export() []byte {
	t.mu.Lock()
	living := slices.Clone(t.living)
	folded := slices.Clone(t.folded)
	t.mu.Unlock()
	b := order.AppendUint64([]byte(exportMagic), exportVersion)
	b = appendRecord(b, kindFolded, func(b []byte) []byte {
		for _, number := range folded {
			b = order.AppendUint64(b, uint64(number))
		}
		return b
	})
	b = t.ended.append(b)
	for _, g := range living {
		if len(b)+g.seen.size > room+room/8 {
			continue
		}
		b = appendRecord(b, kindLiving, func(b []byte) []byte { return order.AppendUint64(b, uint64(g.number)) })
		b = g.seen.append(b)
	}
	return b
}

func (a *account) append(b []byte) []byte {
	for _, f := range a.families {
		if !outlives(&f.desc) {
			continue
		}
		b = appendRecord(b, kindFamily, func(b []byte) []byte {
			b, _ = f.desc.AppendBinary(order.AppendUint64(b, uint64(f.newest)))
			return b
		})
		for key, s := range f.series {
			b = appendRecord(b, kindSeries, func(b []byte) []byte { return s.append(b, key, f.desc.Type) })
		}
	}
	return b
}

func appendRecord(b []byte, kind uint32, body func([]byte) []byte) []byte {
	start := len(b)
	b = body(append(b, make([]byte, 8)...))
	order.PutUint32(b[start:], kind)
	order.PutUint32(b[start+4:], uint32(len(b)-start))
	return b
}

func (s *series) append(b []byte, key string, t metrics.Type) []byte {
	b = order.AppendUint64(b, uint64(s.ended))
	value := s.value
	if t == metrics.TypeHistogram {
		value = s.sum
	}
	b = order.AppendUint64(b, uint64(value))
	for _, n := range s.buckets {
		b = order.AppendUint64(b, n)
	}
	return append(b, key...)
}

// Restore returns Totals that go on from what Totals of another process have exported.
// Series expire when they would have there, but not within [Grace].
//
// The Totals are of use in any case; the error says what is not in them, and why. Whoever
// has made the data, the work is bounded, and what is taken is valid and held to the limits
// of what a generation may write. No data, where there was no predecessor, is no mistake.
func Restore(data []byte) (*Totals, error) {
	r := restorer{totals: New(), now: clock(), names: make(map[string][]string)}
	r.account = &r.totals.ended
	err := r.restore(data)
	if r.lost > 0 {
		err = errors.Join(err, fmt.Errorf("%d series are not valid, not known or too many", r.lost))
	}
	if err != nil {
		err = fmt.Errorf("metrics: totals of a predecessor: %w", err)
	}
	return r.totals, err
}

type restorer struct {
	totals  *Totals
	now     time.Duration
	account *account            // of the families that follow; nil: they are left out
	family  *family             // of the series that follow; nil: they are left out
	size    int                 // of all accounts before this one
	lost    int                 // series that are left out
	names   map[string][]string // of labels, by how they are written one after the other; nil: they are not valid
	buf     []byte
	values  []string
}

func (r *restorer) restore(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	if len(data) < len(exportMagic)+8 || string(data[:len(exportMagic)]) != exportMagic {
		return errors.New("they are none")
	}
	data = data[len(exportMagic):]
	if v := order.Uint64(data); v != exportVersion {
		return fmt.Errorf("layout version %d is not known", v)
	}
	data = data[8:]
	for len(data) > 0 {
		if len(data) < 8 {
			return errors.New("a record is cut")
		}
		kind, length := order.Uint32(data), order.Uint32(data[4:])
		if length < 8 || uint64(length) > uint64(len(data)) {
			return fmt.Errorf("a record of %d bytes", length)
		}
		r.record(kind, data[8:length])
		data = data[length:]
	}
	return nil
}

func (r *restorer) record(kind uint32, body []byte) {
	switch kind {
	case kindFolded:
		for ; len(body) >= 8; body = body[8:] {
			r.totals.remember(int(order.Uint64(body)))
		}
	case kindLiving:
		r.account, r.family = r.newGeneration(body), nil
	case kindFamily:
		r.family = r.newFamily(body)
	case kindSeries:
		if !r.series(body) {
			r.lost++
		}
	}
}

// newGeneration returns the account of a generation, nil for one that is not valid.
func (r *restorer) newGeneration(body []byte) *account {
	if len(body) < 8 {
		return nil
	}
	number := int(order.Uint64(body))
	is := func(g *generation) bool { return g.number == number }
	if slices.Contains(r.totals.folded, number) || slices.ContainsFunc(r.totals.living, is) || len(r.totals.living) == mostLiving {
		return nil
	}
	if r.account != nil {
		r.size += r.account.size
	}
	g := &generation{number: number, seen: new(account)}
	r.totals.enlist(g)
	return g.seen
}

// newFamily returns nil for one that is not valid, that ended generations leave nothing of,
// or that there is no room for.
func (r *restorer) newFamily(body []byte) *family {
	if r.account == nil || len(body) < 8 {
		return nil
	}
	newest := int(order.Uint64(body))
	var d metrics.Desc
	if err := d.UnmarshalBinary(body[8:]); err != nil || newest < 0 || !outlives(&d) || r.full() {
		return nil
	}
	f, _ := r.account.family(&d, newest)
	return f
}

func (r *restorer) series(body []byte) bool {
	f := r.family
	if f == nil {
		return false
	}
	s := &series{}
	if f.desc.Type == metrics.TypeHistogram {
		s.buckets = make([]uint64, len(f.desc.Bounds)+1)
	}
	if len(body) < 16+8*len(s.buckets) {
		return false
	}
	ended, value := time.Duration(order.Uint64(body)), int64(order.Uint64(body[8:]))
	s.ended = min(max(ended, r.now-Expiry+Grace), r.now)
	if f.desc.Type == metrics.TypeHistogram {
		s.sum = value
	} else {
		s.value = value
	}
	body = body[16:]
	for i := range s.buckets {
		s.buckets[i] = order.Uint64(body)
		body = body[8:]
	}
	key := string(body)
	ok := value >= 0 && f.series[key] == nil
	if ok {
		s.labels, ok = r.labels(body)
	}
	return ok && r.account.put(f, key, s)
}

// full says whether all accounts together have grown beyond what an export makes of them.
// None begins another family then.
func (r *restorer) full() bool { return r.size+r.account.size > 2*room }

// labels takes apart what [labeler.key] has made.
func (r *restorer) labels(key []byte) ([]*dto.LabelPair, bool) {
	r.buf, r.values = r.buf[:0], r.values[:0]
	for len(key) > 0 {
		name, rest, ok := bytes.Cut(key, separator)
		value, rest, ok2 := bytes.Cut(rest, separator)
		if !ok || !ok2 || len(value) == 0 || !metrics.ValidValue(string(value)) {
			return nil, false
		}
		r.buf = append(append(r.buf, name...), separator...)
		r.values = append(r.values, string(value))
		key = rest
	}
	names, known := r.names[string(r.buf)]
	if !known {
		names = labelNames(string(r.buf))
		r.names[string(r.buf)] = names
	}
	if len(names) != len(r.values) {
		return nil, false
	}
	var pairs []*dto.LabelPair
	for i, name := range names {
		pairs = append(pairs, &dto.LabelPair{Name: proto.String(name), Value: proto.String(r.values[i])})
	}
	return pairs, true
}

// labelNames returns nil if names are not in order or not what labels may be called.
func labelNames(joined string) []string {
	names := strings.Split(joined, string(separator))
	names = names[:len(names)-1]
	d := metrics.Desc{Name: "holdfast_any", Help: "Any.", Type: metrics.TypeGauge, Labels: names}
	if !slices.IsSorted(names) || d.Check() != nil {
		return nil
	}
	return names
}
