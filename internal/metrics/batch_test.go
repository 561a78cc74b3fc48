package metrics_test

import (
	"fmt"
	"slices"
	"testing"

	"holdfast/internal/metrics"
)

// More cells than a batch has places for, so that many meet.
func TestABatchLosesNothing(t *testing.T) {
	const many = 3000
	r := metrics.NewRegistry()
	gauge, counters := r.Gauge(connections), make([]*metrics.Counter, many)
	for i := range counters {
		counters[i] = r.Counter(requests, "a", fmt.Sprint(i))
	}
	var b metrics.Batch
	for round := range 3 {
		for i, c := range counters {
			b.Add(c, uint64(i))
			b.Inc(c)
			b.Move(gauge, -2)
			b.Move(gauge, 1)
		}
		b.Flush()
		for i, c := range counters {
			if got, want := c.Value(), uint64((round+1)*(i+1)); got != want {
				t.Fatalf("after round %d counter %d is %d, not %d", round, i, got, want)
			}
		}
		if got, want := gauge.Value(), int64(-many*(round+1)); got != want {
			t.Fatalf("after round %d the gauge is %d, not %d", round, got, want)
		}
	}
	if allocs := testing.AllocsPerRun(10, func() {
		for _, c := range counters {
			b.Inc(c)
		}
		b.Flush()
	}); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestABatchIsKnownAfterItsFlush(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	c, h := r.Counter(requests, "a", "200"), r.Histogram(duration, "a")
	var b metrics.Batch
	b.Inc(c)
	if c.Value() != 0 {
		t.Error("it was added before the flush, as if nothing were collected")
	}
	for _, v := range []int64{-5, 5e6, 1e9, 3e9} {
		b.Observe(h, v)
	}
	b.Flush()
	b.Flush() // adds nothing twice
	of := r.Families()[1].Series[0]
	if c.Value() != 1 || !slices.Equal(of.Buckets, []uint64{2, 0, 1, 1}) || of.Sum != 4_005_000_000 {
		t.Errorf("after the flush: %d, %v, %d", c.Value(), of.Buckets, of.Sum)
	}
}

// Who has no metrics counts nothing.
func TestABatchOfNothing(t *testing.T) {
	t.Parallel()
	var b metrics.Batch
	b.Inc(nil)
	b.Move(nil, 1)
	b.Observe(nil, 1)
	b.Flush()
}
