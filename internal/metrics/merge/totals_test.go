package merge_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"

	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
)

func TestEachMergeKindOfAGauge(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	set := func(number int, v int64) {
		r, _ := start(t, totals, number)
		for _, kind := range []metrics.Merge{metrics.Sum, metrics.Serving, metrics.Max, metrics.PerGeneration} {
			d := gauge("holdfast_x_"+strings.ReplaceAll(kind.String(), " ", "_")+"_x", kind, "zone", "area")
			r.Gauge(d, "z", "a").Set(v)
		}
	}
	set(1, 10)
	set(2, -3)
	set(3, 5)
	totals.Serve(2)
	want(t, totals, "holdfast_x_",
		`holdfast_x_sum_x{area="a",zone="z"} 12`,
		`holdfast_x_serving_x{area="a",zone="z"} -3`,
		`holdfast_x_max_x{area="a",zone="z"} 10`,
		`holdfast_x_per_generation_x{area="a",generation="1",zone="z"} 10`,
		`holdfast_x_per_generation_x{area="a",generation="2",zone="z"} -3`,
		`holdfast_x_per_generation_x{area="a",generation="3",zone="z"} 5`,
	)
	end(t, totals, 1)
	end(t, totals, 3)
	want(t, totals, "holdfast_x_",
		`holdfast_x_sum_x{area="a",zone="z"} -3`,
		`holdfast_x_serving_x{area="a",zone="z"} -3`,
		`holdfast_x_max_x{area="a",zone="z"} -3`,
		`holdfast_x_per_generation_x{area="a",generation="2",zone="z"} -3`,
	)
	totals.Serve(0)
	end(t, totals, 2)
	want(t, totals, "holdfast_")
}

func TestWhatEndedGenerationsHaveCountedStays(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	n, lat := counter("holdfast_n_total", "a"), histogram("holdfast_lat", 1, 10)
	per := counter("holdfast_per_total")
	per.Merge = metrics.PerGeneration
	for number := 1; number <= 3; number++ {
		r, _ := start(t, totals, number)
		r.Counter(n, "x").Add(uint64(number))
		r.Counter(per).Inc()
		r.Histogram(lat).Observe(int64(number * 4))
		if number < 3 {
			end(t, totals, number)
		}
	}
	want(t, totals, "holdfast_n", `holdfast_n_total{a="x"} 6`)
	want(t, totals, "holdfast_lat",
		`holdfast_lat_bucket{le="1"} 0`, `holdfast_lat_bucket{le="10"} 2`, `holdfast_lat_bucket{le="+Inf"} 3`,
		`holdfast_lat_sum 24`, `holdfast_lat_count 3`)
	want(t, totals, "holdfast_per", `holdfast_per_total{generation="3"} 1`)
}

func TestSecondsAreShownAsSeconds(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, _ := start(t, totals, 1)
	d := histogram("holdfast_d_seconds", 0.25, 1)
	d.Unit = metrics.Seconds
	r.Histogram(d).Observe(int64(500 * time.Millisecond))
	c := counter("holdfast_d_busy_seconds_total")
	c.Unit = metrics.Seconds
	r.Counter(c).Add(uint64(90 * time.Second))
	want(t, totals, "holdfast_d_",
		`holdfast_d_seconds_bucket{le="0.25"} 0`, `holdfast_d_seconds_bucket{le="1"} 1`, `holdfast_d_seconds_bucket{le="+Inf"} 1`,
		`holdfast_d_seconds_sum 0.5`, `holdfast_d_seconds_count 1`, `holdfast_d_busy_seconds_total 90`)
}

// Three generations: one has ended, one is of an older build and one of a newer one.
func TestGenerationsOfThreeBuildsMakeOneScrape(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	type build struct{ requests, changed, latency, gone *metrics.Desc }
	describe := func(labels []string, bounds ...float64) build {
		b := build{
			requests: counter("holdfast_requests_total", labels...),
			changed:  counter("holdfast_changed_total"),
			latency:  histogram("holdfast_latency_seconds", bounds...),
			gone:     gauge("holdfast_gone", metrics.Sum),
		}
		b.latency.Unit = metrics.Seconds
		return b
	}
	count := func(number int, b build, labels ...string) *metrics.Registry {
		r, _ := start(t, totals, number)
		r.Counter(b.requests, labels...).Add(100)
		r.Counter(b.changed).Add(7)
		for _, d := range []time.Duration{time.Second, 3 * time.Second, time.Minute} {
			r.Histogram(b.latency).Observe(int64(d))
		}
		return r
	}
	dead := describe([]string{"listener"}, 1, 2, 4)
	count(1, dead, "web").Gauge(dead.gone).Set(3)
	older := describe([]string{"listener", "code"}, 0.5, 3, 30)
	count(2, older, "web", "200").Gauge(older.gone).Set(4)

	serving := describe([]string{"code", "listener"}, 1, 5)
	serving.changed = gauge("holdfast_changed", metrics.Sum) // in some formats the name of the counter's family
	r, f := start(t, totals, 3)
	r.Counter(serving.requests, "200", "web").Add(100)
	r.Gauge(serving.changed).Set(50)
	r.Histogram(serving.latency).Observe(int64(time.Second))
	skipped(t, f)
	totals.Serve(3)
	end(t, totals, 1)

	want(t, totals, "holdfast_requests", `holdfast_requests_total{listener="web"} 100`, `holdfast_requests_total{code="200",listener="web"} 200`)
	want(t, totals, "holdfast_changed", `holdfast_changed 50`)
	want(t, totals, "holdfast_gone", `holdfast_gone 4`)
	want(t, totals, "holdfast_latency",
		`holdfast_latency_seconds_bucket{le="1"} 2`,    // 1 s of the dead one and of the serving one
		`holdfast_latency_seconds_bucket{le="5"} 5`,    // 3 s of the dead one; 1 s and 3 s of the older one, which says "at most 3"
		`holdfast_latency_seconds_bucket{le="+Inf"} 7`, // all that the old ones count above 4 and above 3
		`holdfast_latency_seconds_sum 129`, `holdfast_latency_seconds_count 7`)
	want(t, totals, "holdfast_metrics_conflicts",
		`holdfast_metrics_conflicts{generation="2"} 1`, `holdfast_metrics_conflicts{generation="3"} 0`)

	end(t, totals, 3)
	totals.Serve(2)
	want(t, totals, "holdfast_changed", `holdfast_changed_total 14`) // the dead one's were kept
	want(t, totals, "holdfast_metrics_conflicts", `holdfast_metrics_conflicts{generation="2"} 0`)
}

// skipped appends a record of a kind that this build does not know.
func skipped(t *testing.T, f *metrics.File) {
	t.Helper()
	used := uint64(len(readFile(t, f)))
	record := binary.NativeEndian.AppendUint32(nil, 99)
	record = binary.NativeEndian.AppendUint32(record, 16)
	write(t, f, int64(used), append(record, "anything"...))
	write(t, f, 16, binary.NativeEndian.AppendUint64(nil, used+16))
}

func TestTheDefinitionOfTheServingGenerationCounts(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	for number := 1; number <= 3; number++ {
		r, _ := start(t, totals, number)
		d := counter("holdfast_n_total")
		d.Help = fmt.Sprintf("Of %d.", number)
		r.Counter(d).Inc()
	}
	for _, c := range []struct{ serving, want int }{{1, 1}, {2, 2}, {0, 3}} {
		totals.Serve(c.serving)
		for _, f := range totals.Merge(nil, nil) {
			if f.GetName() == "holdfast_n_total" && f.GetHelp() != fmt.Sprintf("Of %d.", c.want) {
				t.Errorf("%d serves: %s", c.serving, f.GetHelp())
			}
		}
	}
	for number := 1; number <= 3; number++ {
		end(t, totals, number)
	}
	if got := string(expose(t, totals.Merge(nil, nil))); !strings.Contains(got, "Of 3.") {
		t.Errorf("all have ended:\n%s", got)
	}
}

func TestALabelThatIsEmptyIsNone(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, _ := start(t, totals, 1)
	r.Counter(counter("holdfast_n_total", "a"), "").Add(1)
	r, _ = start(t, totals, 2)
	r.Counter(counter("holdfast_n_total")).Add(2)
	want(t, totals, "holdfast_n", `holdfast_n_total 3`)
}

func TestAGenerationDoesNotSpeakForTheSupervisor(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, _ := start(t, totals, 7)
	r.Counter(counter("holdfast_reloads_total")).Add(1000)
	r.Gauge(gauge("holdfast_reloads", metrics.Sum)).Set(1000)
	r.Gauge(gauge("holdfast_generation_stale", metrics.PerGeneration)).Set(1000)
	r.Gauge(gauge("holdfast_metrics_conflicts", metrics.PerGeneration)).Set(1000)
	totals.Serve(7)
	own := metrics.NewRegistry()
	own.Counter(counter("holdfast_reloads_total")).Add(2)
	state := metrics.Family{Desc: *gauge("holdfast_state", metrics.PerGeneration, "state")}
	state.Series = []metrics.Series{{Labels: []string{"serving", "7"}, Value: 1}}
	got := values(t, totals.Merge([]int{7}, append(own.Families(), state)))
	delete(got, "holdfast_metrics_unshown_series")
	if want := map[string]float64{
		`holdfast_reloads_total`:                         2,
		`holdfast_state{generation="7",state="serving"}`: 1,
		`holdfast_generation_stale{generation="7"}`:      1,
		`holdfast_metrics_conflicts{generation="7"}`:     4,
	}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestAGenerationThatDoesNotAnswerIsStale(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	for number := 1; number <= 2; number++ {
		r, _ := start(t, totals, number)
		r.Counter(counter("holdfast_n_total")).Inc()
	}
	got := values(t, totals.Merge([]int{1, 99}, nil))
	if got[`holdfast_generation_stale{generation="1"}`] != 1 || got[`holdfast_generation_stale{generation="2"}`] != 0 || got[`holdfast_n_total`] != 2 {
		t.Errorf("got %v", got)
	}
	if _, ok := got[`holdfast_generation_stale{generation="99"}`]; ok {
		t.Error("a generation that is not there is stale")
	}
}

func TestWhatALivingGenerationTakesBackStays(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, f := start(t, totals, 1)
	c, g, h := r.Counter(counter("holdfast_n_total")), r.Gauge(gauge("holdfast_g", metrics.Sum)), r.Histogram(histogram("holdfast_h", 1))
	before := readFile(t, f)
	c.Add(5)
	g.Set(5)
	h.Observe(1)
	h.Observe(9)
	lines := []string{`holdfast_n_total 5`, `holdfast_h_bucket{le="1"} 1`, `holdfast_h_bucket{le="+Inf"} 2`, `holdfast_h_sum 10`, `holdfast_h_count 2`}
	want(t, totals, "holdfast_n", lines[0])
	write(t, f, 0, before) // all is 0 again
	want(t, totals, "holdfast_n", lines[0])
	want(t, totals, "holdfast_h", lines[1:]...)
	want(t, totals, "holdfast_g", `holdfast_g 0`, `holdfast_generation_stale{generation="1"} 0`)

	binary.NativeEndian.PutUint64(before[16:], 64) // nothing was ever registered
	write(t, f, 0, before)
	want(t, totals, "holdfast_n", lines[0])
	want(t, totals, "holdfast_g", `holdfast_generation_stale{generation="1"} 0`)
	end(t, totals, 1)
	want(t, totals, "holdfast_n", lines[0])
	want(t, totals, "holdfast_h", lines[1:]...)
}

func TestValuesThatAreTooGreatStopAtTheGreatest(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	for number := 1; number <= 3; number++ {
		r, _ := start(t, totals, number)
		r.Counter(counter("holdfast_n_total")).Add(math.MaxUint64)
		r.Gauge(gauge("holdfast_up", metrics.Sum)).Set(math.MaxInt64)
		r.Gauge(gauge("holdfast_down", metrics.Sum)).Set(math.MinInt64)
		r.Histogram(histogram("holdfast_h", 1)).Observe(math.MaxInt64)
	}
	end(t, totals, 1)
	want(t, totals, "holdfast_n", fmt.Sprintf("holdfast_n_total %v", float64(math.MaxInt64)))
	want(t, totals, "holdfast_h_sum", fmt.Sprintf("holdfast_h_sum %v", float64(math.MaxInt64)))
	want(t, totals, "holdfast_up", fmt.Sprintf("holdfast_up %v", float64(math.MaxInt64)))
	want(t, totals, "holdfast_down", fmt.Sprintf("holdfast_down %v", float64(math.MinInt64)))
}

func TestABucketThatIsTooFullStopsAtTheGreatest(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	for number := 1; number <= 2; number++ {
		r, f := start(t, totals, number)
		r.Histogram(histogram("holdfast_h", 1)).Observe(1)
		b := readFile(t, f)
		for _, cell := range []int{24, 16, 8} {
			write(t, f, int64(len(b)-cell), binary.NativeEndian.AppendUint64(nil, 1<<63))
		}
	}
	full := float64(math.MaxUint64)
	want(t, totals, "holdfast_h_bucket", fmt.Sprintf(`holdfast_h_bucket{le="1"} %v`, full), fmt.Sprintf(`holdfast_h_bucket{le="+Inf"} %v`, full))
	end(t, totals, 1)
	want(t, totals, "holdfast_h_count", fmt.Sprintf(`holdfast_h_count %v`, full))
}

func TestSeriesThatNoGenerationHasAnyMoreAreForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		totals := merge.New()
		n := counter("holdfast_n_total", "cluster")
		first, _ := start(t, totals, 1)
		for _, cluster := range []string{"stays", "goes", "returns"} {
			first.Counter(n, cluster).Inc()
		}
		second, _ := start(t, totals, 2)
		second.Counter(n, "stays").Inc()
		second.Counter(counter("holdfast_other_total", "cluster"), "goes").Inc()
		totals.Serve(2)
		time.Sleep(2 * merge.Expiry) // however long: the first one lives
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="stays"} 2`, `holdfast_n_total{cluster="goes"} 1`, `holdfast_n_total{cluster="returns"} 1`)
		end(t, totals, 1)

		time.Sleep(merge.Expiry)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="stays"} 2`, `holdfast_n_total{cluster="goes"} 1`, `holdfast_n_total{cluster="returns"} 1`)
		third, _ := start(t, totals, 3)
		third.Counter(n, "returns").Inc()
		time.Sleep(time.Second)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="stays"} 2`, `holdfast_n_total{cluster="returns"} 2`)

		// A generation that ends begins a new hour for what it had.
		end(t, totals, 3)
		time.Sleep(merge.Expiry)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="stays"} 2`, `holdfast_n_total{cluster="returns"} 2`)
		time.Sleep(time.Second)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="stays"} 2`)
		end(t, totals, 2)
		time.Sleep(merge.Expiry + 1)
		want(t, totals, "holdfast_n")
	})
}

// The hour is for series that are gone, not for the build that has counted them.
func TestWhatWasCountedWithOtherBoundsStaysWithItsSeries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		totals := merge.New()
		for number, d := range []*metrics.Desc{histogram("holdfast_h", 1, 2), histogram("holdfast_h", 1, 3)} {
			r, _ := start(t, totals, number+1)
			r.Histogram(d).Observe(2)
		}
		end(t, totals, 1)
		time.Sleep(2 * merge.Expiry)
		want(t, totals, "holdfast_h_bucket", `holdfast_h_bucket{le="1"} 0`, `holdfast_h_bucket{le="3"} 2`, `holdfast_h_bucket{le="+Inf"} 2`)
		end(t, totals, 2) // and its bounds, as the newest ones, are those that are shown
		want(t, totals, "holdfast_h_bucket", `holdfast_h_bucket{le="1"} 0`, `holdfast_h_bucket{le="3"} 2`, `holdfast_h_bucket{le="+Inf"} 2`)
		time.Sleep(2 * merge.Expiry)
		want(t, totals, "holdfast_h")
	})
}

// Nobody scrapes, and the totals do not grow with every configuration that there was;
// nor do they lose what a living generation was never asked for.
func TestExpiryNeedsNoScrape(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		totals := merge.New()
		n := counter("holdfast_n_total", "cluster")
		for number := 1; number <= 2; number++ {
			r, _ := start(t, totals, number)
			r.Counter(n, "stays").Inc()
			r.Counter(n, fmt.Sprint("of ", number)).Inc()
		}
		end(t, totals, 1)
		time.Sleep(merge.Expiry + 1)
		start(t, totals, 3)
		end(t, totals, 3)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="stays"} 2`, `holdfast_n_total{cluster="of 2"} 1`)
	})
}

func TestAFileThatIsNotValidCostsOnlyItself(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, f := start(t, totals, 1)
	r.Counter(counter("holdfast_n_total")).Inc()
	r.Gauge(gauge("up", metrics.Sum)).Set(1)
	r, _ = start(t, totals, 2)
	r.Counter(counter("holdfast_n_total")).Inc()
	want(t, totals, "holdfast_n", `holdfast_n_total 2`)
	want(t, totals, "holdfast_metrics_conflicts", `holdfast_metrics_conflicts{generation="1"} 1`, `holdfast_metrics_conflicts{generation="2"} 0`)
	want(t, totals, "up")
	write(t, f, 0, []byte("nonsense"))
	want(t, totals, "holdfast_n", `holdfast_n_total 2`)
	totals.End(1)
	want(t, totals, "holdfast_n", `holdfast_n_total 2`) // which adds it up
	if err := totals.Settle(); err == nil {
		t.Error("the end says nothing of it")
	}
	totals.End(1)
	want(t, totals, "holdfast_n", `holdfast_n_total 2`)
	if err := totals.Settle(); err != nil {
		t.Errorf("a generation has ended twice: %v", err)
	}
}

// Runs alone, with little room. A generation in the wrong hands writes other series for
// each scrape, or other definitions, and so does what is started in its place.
func TestAGenerationThatNeverStopsDefiningCostsABoundedAmount(t *testing.T) {
	merge.SetRoom(t, 200_000)
	for name, round := range map[string]func(r *metrics.Registry, round int){
		"series": func(r *metrics.Registry, round int) {
			d := counter("holdfast_hostile_total", "a")
			for i := range 100 {
				r.Counter(d, fmt.Sprint(round, i)).Inc()
			}
		},
		"definitions": func(r *metrics.Registry, round int) {
			for i := range 10 {
				r.Counter(counter(fmt.Sprintf("holdfast_hostile_%d_%d_total", round, i))).Inc()
			}
		},
	} {
		totals := merge.New()
		good, _ := start(t, totals, 1)
		good.Counter(counter("holdfast_fine_total")).Inc()
		pages := func(n int) []byte {
			r, f := start(t, merge.New(), 1)
			round(r, n)
			return readFile(t, f)
		}
		hostile := add(t, totals, 2, nil)
		for n := range 20 {
			write(t, hostile, 0, pages(n))
			totals.Merge(nil, nil)
		}
		got := values(t, totals.Merge(nil, nil))
		most := map[string]int{"series": 1000, "definitions": 60}[name]
		if len(got) > most || got[`holdfast_metrics_conflicts{generation="2"}`] == 0 {
			t.Errorf("%s: %d series, %v conflicts", name, len(got), got[`holdfast_metrics_conflicts{generation="2"}`])
		}
		if n := totals.Definitions(); n > 60 {
			t.Errorf("%s: %d definitions are kept", name, n)
		}
		if got["holdfast_fine_total"] != 1 {
			t.Errorf("%s: it takes the others' room", name)
		}

		totals.End(2)
		if totals.Settle() == nil {
			t.Errorf("%s: the end says nothing of it", name)
		}
		var said bool
		for number := 3; number < 23; number++ {
			add(t, totals, number, pages(number+100))
			totals.End(number)
			said = totals.Settle() != nil || said
		}
		if got := values(t, totals.Merge(nil, nil)); len(got) > most || !said {
			t.Errorf("%s: %d series; said: %v", name, len(got), said)
		}
	}
}

func TestEndClosesTheFile(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	_, f := start(t, totals, 1)
	end(t, totals, 1)
	if _, err := f.Families(); err == nil {
		t.Error("it is still open")
	}
}

func TestWhatIsPerGenerationInOneBuildIsNotAddedToWhatIsNotInAnother(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	per := counter("holdfast_n_total")
	per.Merge = metrics.PerGeneration
	for number, d := range []*metrics.Desc{counter("holdfast_n_total"), counter("holdfast_n_total"), per} {
		r, _ := start(t, totals, number+1)
		r.Counter(d).Inc()
	}
	end(t, totals, 1)
	want(t, totals, "holdfast_n", `holdfast_n_total{generation="3"} 1`)
	want(t, totals, "holdfast_metrics_conflicts", `holdfast_metrics_conflicts{generation="2"} 1`, `holdfast_metrics_conflicts{generation="3"} 0`)
	totals.Serve(2)
	want(t, totals, "holdfast_n", `holdfast_n_total 2`)
}

// A scrape that comes while a generation ends sees what it has counted once: never
// twice, and never not.
func TestNoScrapeSeesAnEndHalfDone(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	const generations = 60
	n := counter("holdfast_n_total")
	for number := 1; number <= generations; number++ {
		r, _ := start(t, totals, number)
		r.Counter(n).Inc()
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			for {
				if got := values(t, totals.Merge(nil, nil))["holdfast_n_total"]; got != generations {
					t.Errorf("counted %v", got)
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for number := 1; number <= generations; number++ {
		totals.Serve(number)
		totals.End(number)
		if number%2 == 0 { // otherwise a Merge adds it up
			if err := totals.Settle(); err != nil {
				t.Error(err)
			}
		}
	}
	close(done)
	wg.Wait()
}

// Whatever happens, and in whatever order, no counter and no part of a histogram ever
// decreases or is gone.
func TestNothingEverDecreases(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			neverDecreases(t, rand.New(rand.NewPCG(seed, 1)))
		})
	}
}

// register returns what counts a value.
func register(r *metrics.Registry, d *metrics.Desc, labels []string) func(int64) {
	switch d.Type {
	case metrics.TypeCounter:
		c := r.Counter(d, labels...)
		return func(v int64) { c.Add(uint64(v)) }
	case metrics.TypeGauge:
		return r.Gauge(d, labels...).Set
	}
	return r.Histogram(d, labels...).Observe
}

func neverDecreases(t *testing.T, random *rand.Rand) {
	totals := merge.New()
	// Of each metric, what builds may say; the type stays, as else it is another metric.
	builds := [][]*metrics.Desc{
		{counter("holdfast_a_total"), histogram("holdfast_h", 1, 10), counter("holdfast_b_total", "x"), gauge("holdfast_g", metrics.Sum)},
		{counter("holdfast_a_total", "x"), histogram("holdfast_h", 1, 10), counter("holdfast_b_total", "y", "x"), gauge("holdfast_g", metrics.Max)},
		{histogram("holdfast_h", 1, 10), counter("holdfast_b_total", "x", "y")},
	}
	// A build with other bounds never serves and never is the newest here: else the
	// buckets are others.
	odd := []*metrics.Desc{counter("holdfast_a_total"), histogram("holdfast_h", 2, 4, 20)}
	type running struct {
		number int
		r      *metrics.Registry
		file   *metrics.File
		descs  []*metrics.Desc
	}
	var living []running
	next := 1
	launch := func(descs []*metrics.Desc) {
		r, f := start(t, totals, next)
		for _, d := range descs { // else an older build's definition is the one that is there
			register(r, d, make([]string, len(d.Labels)))
		}
		living = append(living, running{next, r, f, descs})
		next++
	}
	launch(odd)
	launch(builds[0])
	totals.Serve(2)
	var before map[string]float64
	for range 150 {
		g := living[random.IntN(len(living))]
		switch random.IntN(10) {
		case 0:
			if len(living) < 6 {
				launch(odd)
				launch(builds[random.IntN(len(builds))])
				totals.Serve(next - 1)
			}
		case 1, 2:
			if last := len(living) - 1; last > 0 { // a crash or an end, but the newest one goes on
				i := random.IntN(last)
				end(t, totals, living[i].number)
				living = append(living[:i:i], living[i+1:]...)
			}
		case 3: // counts backwards
			b := readFile(t, g.file)
			write(t, g.file, int64(len(b)-8), make([]byte, 8))
		case 4, 5, 6:
			before = wantRisen(t, before, totals.Merge(nil, nil))
		default:
			d := g.descs[random.IntN(len(g.descs))]
			labels := make([]string, len(d.Labels))
			for i := range labels {
				labels[i] = fmt.Sprint(random.IntN(3))
			}
			register(g.r, d, labels)(random.Int64N(30))
		}
	}
	wantRisen(t, before, totals.Merge(nil, nil))
}

// A build with other bounds that serves for a while and is replaced by the one before
// leaves every bucket of that one as it was, or higher.
func TestGoingBackToTheBoundsOfAnOlderBuildLosesNothing(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	fine, coarse := histogram("holdfast_h", 1, 5, 10), histogram("holdfast_h", 1, 10)
	for number, d := range []*metrics.Desc{fine, coarse, fine} {
		r, _ := start(t, totals, number+1)
		r.Histogram(d).Observe(4)
		totals.Serve(number + 1)
		if number > 0 {
			end(t, totals, number)
		}
		totals.Merge(nil, nil)
	}
	want(t, totals, "holdfast_h",
		`holdfast_h_bucket{le="1"} 0`, `holdfast_h_bucket{le="5"} 2`, `holdfast_h_bucket{le="10"} 3`, `holdfast_h_bucket{le="+Inf"} 3`,
		`holdfast_h_sum 12`, `holdfast_h_count 3`)
}

// Of three builds are one that has ended, an older one, as it is kept in testdata, and
// the one that serves, with another label and other bounds.
func TestWhatIsMergedFollowsTheConventions(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	count := func(number int, bounds []float64, labels ...string) {
		r, _ := start(t, totals, number)
		d := histogram("holdfast_request_duration_seconds", bounds...)
		d.Unit = metrics.Seconds
		r.Histogram(d).Observe(int64(time.Second))
		r.Counter(counter("holdfast_requests_total", labels...), slices.Repeat([]string{"200"}, len(labels))...).Inc()
		r.Gauge(gauge("holdfast_connections", metrics.Sum)).Set(1)
		r.Gauge(gauge("holdfast_tunnels", metrics.PerGeneration, "cluster"), "a\"\\\nb").Set(1)
	}
	count(1, []float64{0.5, 5})
	add(t, totals, 2, olderBuild(t))
	count(3, []float64{0.1, 10}, "code", "listener")
	totals.Serve(3)
	end(t, totals, 1)
	families := totals.Merge([]int{2}, nil)
	if got := values(t, families); got[`holdfast_request_duration_seconds_count`] != 5 ||
		got[`holdfast_request_duration_seconds_bucket{le="10"}`] != 4 ||
		got[`holdfast_tunnels{cluster="web",generation="2"}`] != 1204 || got[`holdfast_metrics_conflicts{generation="2"}`] != 0 {
		t.Errorf("got %v", got)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	problems, err = promlint.New(bytes.NewReader(expose(t, families))).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	for _, f := range []expfmt.FormatType{expfmt.TypeOpenMetrics, expfmt.TypeProtoDelim, expfmt.TypeTextPlain} {
		var b bytes.Buffer
		e := expfmt.NewEncoder(&b, expfmt.NewFormat(f))
		for _, family := range families {
			if err := e.Encode(family); err != nil {
				t.Errorf("%v: %v", f, err)
			}
		}
	}
	for i := range families[1:] {
		if families[i].GetName() >= families[i+1].GetName() {
			t.Errorf("%s is before %s", families[i].GetName(), families[i+1].GetName())
		}
	}
}

// FuzzMerge: whatever a generation writes, while it lives and serves, and when it has
// ended, a scrape is one that a parser takes, with the others' values in it.
func FuzzMerge(f *testing.F) {
	totals := merge.New()
	r, file := start(f, totals, 1)
	r.Counter(counter("holdfast_n_total")).Inc()
	r.Counter(counter("holdfast_x_total", "a"), "b").Inc()
	r.Gauge(gauge("holdfast_g", metrics.PerGeneration)).Set(1)
	h := histogram("holdfast_h_seconds", 0.1, 1)
	h.Unit = metrics.Seconds
	r.Histogram(h).Observe(1)
	b := readFile(f, file)
	f.Add(b)
	for at := 64; at < len(b); at += 16 {
		bad := bytes.Clone(b)
		bad[at] ^= 0x21
		f.Add(bad)
	}
	r, file = start(f, totals, 2)
	r.Counter(counter("holdfast_fine_total")).Inc()
	good := readFile(f, file)
	f.Fuzz(func(t *testing.T, b []byte) {
		totals := merge.New()
		add(t, totals, 1, good)
		add(t, totals, 2, b[:min(len(b), metrics.Size)])
		totals.Serve(2)
		own := metrics.NewRegistry()
		own.Gauge(gauge("holdfast_own", metrics.Sum)).Set(1)
		before := wantRisen(t, nil, totals.Merge(nil, own.Families()))
		if before["holdfast_own"] != 1 {
			t.Error("the supervisor's own is not there")
		}
		totals.Serve(1)
		totals.End(2)
		after := values(t, totals.Merge(nil, own.Families()))
		if after["holdfast_fine_total"] < 1 {
			t.Errorf("got %v", after)
		}
	})
}

func BenchmarkMerge(b *testing.B) {
	totals := merge.New()
	totals.Settled(func([]byte) {})
	for number := 1; number <= 3; number++ {
		r, _ := start(b, totals, number)
		for i := range 10_000 {
			r.Counter(counterOf10000, fmt.Sprint("cluster ", i), "200").Inc()
		}
	}
	for b.Loop() {
		totals.Merge(nil, nil)
	}
}

var counterOf10000 = counter("holdfast_n_total", "cluster", "code")
