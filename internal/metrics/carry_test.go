package metrics_test

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
)

// newOwnFile returns a Registry that counts in a file of its own, and a duplicate of
// that file's descriptor, which is all that is left of the two in a successor.
func newOwnFile(t *testing.T) (*metrics.Registry, int) {
	t.Helper()
	f, r, err := metrics.NewOwnFile()
	if err != nil {
		t.Fatal(err)
	}
	dup, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return r, dup
}

func openFile(t *testing.T, fd int) *metrics.File {
	t.Helper()
	f, err := metrics.OpenFile(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func TestASuccessorReadsWhatWasCounted(t *testing.T) {
	t.Parallel()
	r, dup := newOwnFile(t)
	r.Counter(requests, "a", "200").Add(3)
	r.Histogram(duration, "x").Observe(5)
	f := openFile(t, dup)
	if got, want := wantFamilies(t, f), r.Families(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	r.Counter(requests, "a", "200").Inc() // the predecessor lives yet
	if got := find(wantFamilies(t, f), requests.Name); len(got) != 1 || got[0].Value != 4 {
		t.Errorf("got %+v", got)
	}
}

func TestNobodyElseCountsInAnOwnFile(t *testing.T) {
	t.Parallel()
	r, dup := newOwnFile(t)
	if _, err := unix.Pwrite(dup, make([]byte, 64), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("written: %v", err)
	}
	if mem, err := unix.Mmap(dup, 0, metrics.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
		t.Errorf("mapped: %v, %v", err, unix.Munmap(mem))
	}
	for _, size := range []int64{0, metrics.Size + 1} {
		if err := unix.Ftruncate(dup, size); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncated to %d: %v", size, err)
		}
	}
	r.Gauge(connections).Set(7)
	if got := find(wantFamilies(t, openFile(t, dup)), connections.Name); len(got) != 1 || got[0].Value != 7 {
		t.Errorf("got %+v", got)
	}
}

// A successor takes over with a fresh registry, several times in a row.
func TestCarryGoesOnFromAPredecessor(t *testing.T) {
	t.Parallel()
	var previous []metrics.Family
	for life := int64(1); life <= 3; life++ {
		r, dup := newOwnFile(t)
		r.Counter(requests, "a", "200")
		h := r.Histogram(duration, "x")
		r.Gauge(connections)
		r.Carry(previous)
		if got := find(r.Families(), connections.Name)[0].Value; got != 0 {
			t.Errorf("life %d: a gauge is carried: %d", life, got)
		}
		r.Counter(requests, "a", "200").Add(2)
		r.Counter(requests, "new", fmt.Sprint(life)).Inc()
		r.Gauge(connections).Set(9)
		h.Observe(10)
		h.Observe(math.MaxInt32)

		previous = wantFamilies(t, openFile(t, dup))
		counted := make(map[string]int64)
		for _, s := range find(previous, requests.Name) {
			counted[s.Labels[0]+s.Labels[1]] = s.Value
		}
		want := map[string]int64{"a200": 2 * life}
		for i := int64(1); i <= life; i++ {
			want[fmt.Sprint("new", i)] = 1
		}
		if !reflect.DeepEqual(counted, want) {
			t.Errorf("life %d: got %v, want %v", life, counted, want)
		}
		got := find(previous, duration.Name)[0]
		if got.Buckets[0] != uint64(life) || got.Sum != life*(10+math.MaxInt32) {
			t.Errorf("life %d: got %+v", life, got)
		}
	}
}

func TestWhatIsAnotherMetricIsNotCarried(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	r.Counter(requests, "a", "200")
	r.Histogram(duration, "x")
	before := r.Families()
	change := func(d *metrics.Desc, f func(*metrics.Desc)) metrics.Desc {
		c := *d
		f(&c)
		return c
	}
	buckets := make([]uint64, len(duration.Bounds)+1)
	for i := range buckets {
		buckets[i] = 1
	}
	r.Carry([]metrics.Family{
		{Desc: change(requests, func(d *metrics.Desc) { d.Name = "holdfast_of_a_generation_total" }), Series: []metrics.Series{{Labels: []string{"a", "200"}, Value: 1}}},
		{Desc: change(requests, func(d *metrics.Desc) { d.Type = metrics.TypeGauge }), Series: []metrics.Series{{Labels: []string{"a", "200"}, Value: 1}}},
		{Desc: change(requests, func(d *metrics.Desc) { d.Merge = metrics.PerGeneration }), Series: []metrics.Series{{Labels: []string{"a", "200"}, Value: 1}}},
		{Desc: change(requests, func(d *metrics.Desc) { d.Labels = []string{"code"} }), Series: []metrics.Series{{Labels: []string{"200"}, Value: 1}}},
		{Desc: change(duration, func(d *metrics.Desc) { d.Bounds = []float64{1} }), Series: []metrics.Series{{Labels: []string{"x"}, Buckets: []uint64{1, 1}, Sum: 2}}},
	})
	if got := r.Families(); !reflect.DeepEqual(got, before) {
		t.Errorf("got %+v", got)
	}
	r.Carry([]metrics.Family{{Desc: *duration, Series: []metrics.Series{{Labels: []string{"x"}, Buckets: buckets, Sum: 2}}}})
	if got := find(r.Families(), duration.Name)[0]; !reflect.DeepEqual(got.Buckets, buckets) || got.Sum != 2 {
		t.Errorf("got %+v", got)
	}
	var none *metrics.Registry
	none.Carry(before)
}

// What a predecessor has left may have been made by somebody else.
func TestCarryIsBounded(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	c := r.Counter(requests, "a", "200")
	r.Histogram(duration, "x")
	c.Add(5)
	many := metrics.Family{Desc: *requests}
	for i := range 5000 {
		many.Series = append(many.Series, metrics.Series{Labels: []string{"hostile", fmt.Sprint(i)}, Value: 1})
	}
	many.Series = append(many.Series, metrics.Series{Labels: []string{"a", "200"}, Value: math.MaxInt64})
	buckets := make([]uint64, len(duration.Bounds)+1)
	for i := range buckets {
		buckets[i] = math.MaxUint64
	}
	full := metrics.Family{Desc: *duration, Series: []metrics.Series{{Labels: []string{"x"}, Buckets: buckets, Sum: math.MaxInt64}}}
	for range 3 {
		r.Carry([]metrics.Family{many, full})
	}
	if n := len(find(r.Families(), requests.Name)); n > 1+3*1024 {
		t.Errorf("%d series are carried", n)
	}
	if c.Value() != math.MaxInt64 {
		t.Errorf("the value is %d", c.Value())
	}
	got := find(r.Families(), duration.Name)[0]
	if got.Buckets[0] != math.MaxInt64 || got.Sum != math.MaxInt64 {
		t.Errorf("got %+v", got)
	}
}
