package metrics_test

import (
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"holdfast/internal/metrics"
)

func TestTheSameLabelsAreTheSameSeries(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	c := r.Counter(requests, "a", "200")
	c.Inc()
	if r.Counter(requests, "a", "200") != c || r.Counter(requests, "a", "404") == c || r.Counter(requests, "a2", "00") == c {
		t.Error("a series is not known by its labels")
	}
	if h := r.Histogram(duration, "x"); r.Histogram(duration, "x") != h {
		t.Error("a histogram was made twice")
	}
	if metrics.NewRegistry().Counter(requests, "a", "200").Value() != 0 {
		t.Error("two registries share a series")
	}
}

func TestANilRegistryCountsNothing(t *testing.T) {
	t.Parallel()
	var r *metrics.Registry
	c, g, h := r.Counter(requests, "a", "b"), r.Gauge(connections), r.Histogram(duration, "a")
	c.Inc()
	c.Add(2)
	g.Set(1)
	g.Add(1)
	h.Observe(1)
	if c.Value() != 0 || g.Value() != 0 || r.Families() != nil {
		t.Error("something was counted")
	}
}

func TestAValueIsCountedInTheFirstBucketThatReachesAsFar(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	h := r.Histogram(duration, "x")
	for _, d := range []time.Duration{0, 5 * time.Millisecond, 5*time.Millisecond + 1, 300 * time.Millisecond, 300*time.Millisecond + 1, time.Hour} {
		h.Observe(int64(d))
	}
	h.Observe(-1) // a clock that was set back
	got := find(r.Families(), duration.Name)[0]
	want := metrics.Series{Labels: []string{"x"}, Buckets: []uint64{3, 2, 1, 1}, Sum: int64(time.Hour+610*time.Millisecond) + 2}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}

	// 1.001 is not exact, and 1e9 times that is less than 1001 million.
	exact := &metrics.Desc{Name: "holdfast_test_exact_seconds", Type: metrics.TypeHistogram, Unit: metrics.Seconds, Bounds: []float64{1.001}}
	r.Histogram(exact).Observe(int64(1001 * time.Millisecond))
	if got := find(r.Families(), exact.Name)[0].Buckets; !slices.Equal(got, []uint64{1, 0}) {
		t.Errorf("got %v", got)
	}

	h = r.Histogram(size)
	for _, n := range []int64{0, 1, 2, 1 << 62} {
		h.Observe(n)
	}
	if got := find(r.Families(), size.Name)[0].Buckets; !slices.Equal(got, []uint64{1, 1, 2, 0}) {
		t.Errorf("got %v", got)
	}
}

func TestALabelIsMadeAsAReaderAcceptsIt(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	r := open(t, f)
	long := strings.Repeat("x", 511) + "ä" // the limit is in the middle of its last letter
	r.Counter(requests, "a\xffb", long).Inc()
	got := find(wantFamilies(t, f), requests.Name)
	if len(got) != 1 || got[0].Labels[0] != "a\uFFFDb" || got[0].Labels[1] != long[:511] || !utf8.ValidString(got[0].Labels[1]) {
		t.Errorf("got %+v", got)
	}
}

func TestAMetricThatIsUsedAsAnotherPanics(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	for name, use := range map[string]func(){
		"too few labels": func() { r.Counter(requests, "a") },
		"another type":   func() { r.Gauge(requests, "a", "b") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			use()
		}()
	}
}

func TestManyMayRegisterAndCountWhileOthersRead(t *testing.T) {
	t.Parallel()
	f := newFile(t)
	r := open(t, f)
	const writers, rounds = 8, 500
	done := make(chan struct{})
	var count, read sync.WaitGroup
	for range writers {
		count.Go(func() {
			for i := range rounds {
				r.Counter(requests, "a", string(rune('a'+i%20))).Inc()
				r.Histogram(duration, "x").Observe(int64(i))
				r.Gauge(connections).Add(1)
				r.Gauge(connections).Add(-1)
			}
		})
	}
	for range 2 {
		read.Go(func() {
			var before uint64
			for {
				families, err := f.Families()
				if err != nil {
					t.Error(err)
					return
				}
				var now uint64
				for _, s := range find(families, requests.Name) {
					now += uint64(s.Value)
				}
				if now < before {
					t.Errorf("%d after %d", now, before)
				}
				before = now
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	count.Wait()
	close(done)
	read.Wait()
	families := wantFamilies(t, f)
	var sum uint64
	for _, s := range find(families, requests.Name) {
		sum += uint64(s.Value)
	}
	if sum != writers*rounds || len(find(families, requests.Name)) != 20 {
		t.Errorf("counted %d in %d series", sum, len(find(families, requests.Name)))
	}
	if got := find(families, duration.Name)[0].Buckets[0]; got != writers*rounds {
		t.Errorf("observed %d", got)
	}
	if got := find(families, connections.Name)[0].Value; got != 0 {
		t.Errorf("%d connections are left", got)
	}
}

func TestCountingAllocatesNothing(t *testing.T) {
	r := open(t, newFile(t))
	c, g, h := r.Counter(requests, "a", "b"), r.Gauge(connections), r.Histogram(duration, "a")
	if n := testing.AllocsPerRun(100, func() {
		c.Inc()
		g.Add(1)
		h.Observe(int64(time.Millisecond))
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCounterInc(b *testing.B) {
	c := open(b, newFile(b)).Counter(requests, "a", "b")
	for b.Loop() {
		c.Inc()
	}
}

func BenchmarkHistogramObserve(b *testing.B) {
	h := open(b, newFile(b)).Histogram(duration, "a")
	for b.Loop() {
		h.Observe(int64(time.Second))
	}
}
