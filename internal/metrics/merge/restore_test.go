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
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
)

func restore(t testing.TB, export []byte) *merge.Totals {
	t.Helper()
	totals, err := merge.Restore(export)
	if err != nil {
		t.Fatal(err)
	}
	return totals
}

// adopt adds a generation whose file another Totals has, as a successor does.
func adopt(t testing.TB, totals *merge.Totals, number int, f *metrics.File) *metrics.File {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	own, err := metrics.OpenFile(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	totals.Add(number, own)
	return own
}

func TestASuccessorGoesOnFromWhatWasExported(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	n, lat := counter("holdfast_n_total", "a", "b"), histogram("holdfast_lat_seconds", 1, 10)
	lat.Unit = metrics.Seconds
	other := histogram("holdfast_lat_seconds", 2)
	other.Unit = metrics.Seconds
	per := counter("holdfast_per_total")
	per.Merge = metrics.PerGeneration
	for number := 1; number <= 3; number++ {
		r, _ := start(t, totals, number)
		r.Counter(n, "wéb", "").Add(5)
		r.Counter(n, "", "").Add(1)
		r.Counter(n, "x", fmt.Sprint(number)).Add(7)
		r.Histogram(lat).Observe(int64(3 * time.Second))
		r.Counter(per).Inc()
		r.Gauge(gauge("holdfast_g", metrics.Sum)).Set(1)
		if number == 2 {
			r, _ = start(t, totals, 10)
			r.Histogram(other).Observe(int64(time.Second))
			end(t, totals, 10)
		}
		end(t, totals, number)
	}
	before := values(t, totals.Merge(nil, nil))
	if before[`holdfast_n_total{a="wéb"}`] != 15 || before[`holdfast_lat_seconds_count`] != 4 {
		t.Errorf("got %v", before)
	}
	for range 3 { // one after the other
		totals = restore(t, totals.Export())
		if got := values(t, totals.Merge(nil, nil)); !reflect.DeepEqual(got, before) {
			t.Errorf("got  %v\nwant %v", got, before)
		}
	}
	r, _ := start(t, totals, 4)
	r.Counter(n, "wéb", "").Add(5)
	end(t, totals, 4)
	want(t, totals, `holdfast_n_total{a="wéb`, `holdfast_n_total{a="wéb"} 20`)
}

func TestWithoutAPredecessorThereIsNothing(t *testing.T) {
	t.Parallel()
	for _, export := range [][]byte{nil, merge.New().Export()} {
		want(t, restore(t, export), "holdfast_")
	}
}

// Whoever scrapes, kills the supervisor and scrapes again never sees less.
func TestNothingDecreasesOverLivesOfSupervisors(t *testing.T) {
	t.Parallel()
	for seed := range uint64(10) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			neverDecreasesOverLives(t, rand.New(rand.NewPCG(seed, 2)))
		})
	}
}

func neverDecreasesOverLives(t *testing.T, random *rand.Rand) {
	descs := []*metrics.Desc{counter("holdfast_a_total"), counter("holdfast_b_total", "x"), histogram("holdfast_h", 1, 10), gauge("holdfast_g", metrics.Sum)}
	var (
		kept   []byte // what a successor finds
		living = make(map[int]*metrics.Registry)
		all    = make(map[int]*metrics.File) // also of ended ones, as a service manager may have them
		next   = 1
		before map[string]float64
	)
	for range 6 { // lives of supervisors
		totals := restore(t, kept)
		totals.Settled(func(export []byte) { kept = slices.Clone(export) })
		stored := random.IntN(2) == 0
		for _, number := range random.Perm(next) {
			f := all[number]
			if f != nil && (stored || living[number] != nil) {
				adopt(t, totals, number, f)
			}
			if living[number] == nil { // it has ended, perhaps when nobody has noticed
				totals.End(number)
			}
		}
		for range 60 {
			switch k := random.IntN(12); {
			case k == 0 || len(living) == 0:
				r, f := start(t, totals, next)
				living[next], all[next] = r, dupOf(t, f)
				totals.Serve(next)
				next++
			case k == 1:
				for number := range living {
					delete(living, number)
					if random.IntN(4) > 0 { // otherwise the supervisor is killed before it notices
						totals.End(number)
					}
					break
				}
			case k < 5:
				before = wantRisen(t, before, totals.Merge(nil, nil))
			default:
				for _, r := range living {
					d := descs[random.IntN(len(descs))]
					labels := make([]string, len(d.Labels))
					for i := range labels {
						labels[i] = fmt.Sprint(random.IntN(3))
					}
					register(r, d, labels)(random.Int64N(30))
					break
				}
			}
		}
		before = wantRisen(t, before, totals.Merge(nil, nil))
	}
}

func dupOf(t *testing.T, f *metrics.File) *metrics.File {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(f.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dup, err := metrics.OpenFile(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dup.Close() })
	return dup
}

// The successor knows before anybody has seen it, and before a file is closed.
func TestWhatIsShownIsKeptBefore(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	n := counter("holdfast_n_total")
	var kept float64
	var f *metrics.File
	totals.Settled(func(export []byte) {
		kept = values(t, restore(t, export).Merge(nil, nil))["holdfast_n_total"]
		if _, err := f.Families(); err != nil && kept == 0 {
			t.Errorf("the file is closed already: %v", err)
		}
	})
	for number := 1; number <= 6; number++ {
		var r *metrics.Registry
		r, f = start(t, totals, number)
		r.Counter(n).Inc()
		kept = -1
		switch number % 3 {
		case 0: // it lives
			want(t, totals, "holdfast_n", fmt.Sprintf("holdfast_n_total %d", number))
		case 1:
			end(t, totals, number)
		case 2:
			totals.End(number)
			want(t, totals, "holdfast_n", fmt.Sprintf("holdfast_n_total %d", number))
		}
		if kept != float64(number) {
			t.Errorf("%v of %d was kept", kept, number)
		}
	}
}

// A generation that lived when a predecessor looked last counts with what it had then,
// until it is back, and for good if it has ended.
func TestWhoIsAbsentCounts(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	n, per := counter("holdfast_n_total"), counter("holdfast_per_total")
	per.Merge = metrics.PerGeneration
	registries := make(map[int]*metrics.Registry)
	files := make(map[int]*metrics.File)
	for number := 1; number <= 3; number++ {
		r, f := start(t, totals, number)
		r.Counter(n).Add(10)
		r.Counter(per).Inc()
		r.Gauge(gauge("holdfast_g", metrics.Sum)).Set(1)
		registries[number], files[number] = r, dupOf(t, f)
	}
	totals.Serve(3)
	totals.Merge(nil, nil)
	for _, r := range registries {
		r.Counter(n).Inc() // what nobody has seen
	}
	for range 2 {
		totals = restore(t, totals.Export())
		want(t, totals, "holdfast_", `holdfast_n_total 30`)
		if got := totals.Absent(); !slices.Equal(got, []int{1, 2, 3}) {
			t.Errorf("absent: %v", got)
		}
	}
	adopt(t, totals, 3, files[3])
	want(t, totals, "holdfast_n", `holdfast_n_total 31`)
	end(t, totals, 1)
	want(t, totals, "holdfast_n", `holdfast_n_total 31`)
	if got := totals.Absent(); !slices.Equal(got, []int{2}) {
		t.Errorf("absent: %v", got)
	}
	late := adopt(t, totals, 1, files[1])
	if _, err := late.Families(); err == nil {
		t.Error("one that has ended is added")
	}
	totals = restore(t, totals.Export())
	if got := totals.Absent(); !slices.Equal(got, []int{2, 3}) {
		t.Errorf("absent: %v", got)
	}
	adopt(t, totals, 2, files[2])
	want(t, totals, "holdfast_n", `holdfast_n_total 32`)
	want(t, totals, "holdfast_g", `holdfast_g 1`, `holdfast_generation_stale{generation="2"} 0`)
}

// Also what a generation in the wrong hands has counted and takes back.
func TestASuccessorKnowsTheHighestValue(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, f := start(t, totals, 1)
	c := r.Counter(counter("holdfast_n_total"))
	before := readFile(t, f)
	c.Add(5)
	totals.Merge(nil, nil)
	write(t, f, 0, before)
	dup := dupOf(t, f)
	totals = restore(t, totals.Export())
	adopt(t, totals, 1, dup)
	want(t, totals, "holdfast_n", `holdfast_n_total 5`)
}

func TestAGenerationIsCountedOnce(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	n := counter("holdfast_n_total")
	r, f := start(t, totals, 1)
	r.Counter(n).Add(5)
	dup := dupOf(t, f)

	again := adopt(t, totals, 1, dup) // it lives
	totals.End(1)
	ending := adopt(t, totals, 1, dup)
	want(t, totals, "holdfast_n", `holdfast_n_total 5`)
	ended := adopt(t, totals, 1, dup)
	want(t, totals, "holdfast_n", `holdfast_n_total 5`)
	totals = restore(t, totals.Export())
	restored := adopt(t, totals, 1, dup)
	totals.End(1)
	want(t, totals, "holdfast_n", `holdfast_n_total 5`)
	totals = restore(t, totals.Export())
	twice := adopt(t, totals, 1, dup)
	want(t, totals, "holdfast_n", `holdfast_n_total 5`)
	for i, f := range []*metrics.File{again, ending, ended, restored, twice} {
		if _, err := f.Families(); err == nil {
			t.Errorf("file %d is open", i)
		}
	}
}

// What a predecessor knew is found when others count already.
func TestWhatIsFoundLateIsAdded(t *testing.T) {
	t.Parallel()
	n := counter("holdfast_n_total")
	earlier := merge.New()
	var files []*metrics.File
	for number := 1; number <= 3; number++ {
		r, f := start(t, earlier, number)
		r.Counter(n).Add(10)
		files = append(files, dupOf(t, f))
	}
	end(t, earlier, 1)
	earlier.Merge(nil, nil)

	totals := merge.New()
	r, _ := start(t, totals, 4)
	r.Counter(n).Add(100)
	adopt(t, totals, 3, files[2])
	totals.Absorb(restore(t, earlier.Export()))
	want(t, totals, "holdfast_n", `holdfast_n_total 130`)
	if got := totals.Absent(); !slices.Equal(got, []int{2}) {
		t.Errorf("absent: %v", got)
	}
	adopt(t, totals, 2, files[1])
	adopt(t, totals, 1, files[0])
	want(t, totals, "holdfast_n", `holdfast_n_total 130`)
	want(t, restore(t, totals.Export()), "holdfast_n", `holdfast_n_total 130`)
}

// The numbers of the last ones that have ended are known, and an old one that lives on
// is none of them.
func TestTheNumbersThatAreKnownAreTheLastOnes(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	n := counter("holdfast_n_total")
	r, f := start(t, totals, 1)
	r.Counter(n).Add(5)
	dup := dupOf(t, f)
	for number := 2; number <= 1200; number++ {
		add(t, totals, number, nil)
		end(t, totals, number)
	}
	export := totals.Export()
	if len(export) > 9000 {
		t.Errorf("the export of nothing but numbers has %d bytes", len(export))
	}
	totals = restore(t, export)
	for number := 1200 - 1023; number <= 1200; number++ {
		if _, err := adopt(t, totals, number, dup).Families(); err == nil {
			t.Fatalf("%d has ended and is added", number)
		}
	}
	adopt(t, totals, 1, dup)
	want(t, totals, "holdfast_n", `holdfast_n_total 5`)
}

// A series expires when it would have without a successor.
func TestExpiryGoesOnInASuccessor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		totals := merge.New()
		r, _ := start(t, totals, 1)
		r.Counter(counter("holdfast_n_total")).Inc()
		end(t, totals, 1)
		for range 5 {
			time.Sleep(merge.Expiry / 6)
			totals = restore(t, totals.Export())
		}
		want(t, totals, "holdfast_n", `holdfast_n_total 1`)
		time.Sleep(merge.Expiry / 6)
		want(t, totals, "holdfast_n", `holdfast_n_total 1`)
		time.Sleep(time.Nanosecond)
		want(t, totals, "holdfast_n")
	})
}

// What living generations have does not expire because they come back one after the
// other, however long ago others with the same series have ended.
func TestNothingExpiresBeforeGenerationsAreBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		totals := merge.New()
		n := counter("holdfast_n_total", "cluster")
		r, _ := start(t, totals, 1)
		r.Counter(n, "both").Inc()
		r.Counter(n, "gone").Inc()
		r, f := start(t, totals, 2)
		r.Counter(n, "both").Inc()
		end(t, totals, 1)
		time.Sleep(100 * merge.Expiry)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="both"} 2`)
		dup := dupOf(t, f)

		export := totals.Export()
		totals = restore(t, export[:bytes.Index(export, record(4, words(2)))]) // its predecessor has never looked
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="both"} 1`)
		time.Sleep(merge.Grace)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="both"} 1`)
		adopt(t, totals, 2, dup)
		time.Sleep(100 * merge.Expiry)
		want(t, totals, "holdfast_n", `holdfast_n_total{cluster="both"} 2`)
		end(t, totals, 2)
		time.Sleep(merge.Expiry + 1)
		want(t, totals, "holdfast_n")
	})
}

// A time that has not come yet, which only another machine or a hostile hand writes, is
// now.
func TestATimeInTheFutureIsNow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, ended := range []int64{math.MaxInt64, math.MinInt64, time.Now().Add(1000 * time.Hour).UnixNano()} {
			totals := restore(t, handmadeExport(anExportedSeries(ended, 7)))
			want(t, totals, "holdfast_n", `holdfast_n_total 7`)
			time.Sleep(merge.Expiry + 1)
			want(t, totals, "holdfast_n")
		}
	})
}

// The clock is one that two processes read alike and that nobody sets.
func TestTheClockIsTheKernels(t *testing.T) {
	t.Parallel()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	if d := merge.Clock() - time.Duration(now.Nano()); d < 0 || d > time.Minute {
		t.Errorf("it differs by %v", d)
	}
}

var order = binary.NativeEndian

// handmadeExport is an export as the package describes it.
func handmadeExport(records ...[]byte) []byte {
	return slices.Concat(append([][]byte{[]byte("HFtotals"), order.AppendUint64(nil, 1)}, records...)...)
}

func record(kind uint32, body ...[]byte) []byte {
	all := slices.Concat(body...)
	b := order.AppendUint32(nil, kind)
	b = order.AppendUint32(b, uint32(8+len(all)))
	return append(b, all...)
}

func words(values ...int64) (b []byte) {
	for _, v := range values {
		b = order.AppendUint64(b, uint64(v))
	}
	return b
}

func familyRecord(d *metrics.Desc) []byte {
	b, _ := d.AppendBinary(words(1))
	return record(2, b)
}

func anExportedSeries(ended, value int64) []byte {
	return append(familyRecord(counter("holdfast_n_total")), record(3, words(ended, value))...)
}

func TestWhatIsDocumentedIsWhatIsExported(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	r, _ := start(t, totals, 9)
	r.Counter(counter("holdfast_n_total", "b", "a"), "2", "1").Add(5)
	end(t, totals, 9)
	export := totals.Export()
	label := []byte("a\xff1\xffb\xff2\xff")
	at := len(export) - len(label) - 16
	head := handmadeExport(record(1, words(9)))
	d := counter("holdfast_n_total", "b", "a")
	definition, _ := d.AppendBinary(words(9))
	if want := slices.Concat(head, record(2, definition), record(3, export[at:at+8], words(5), label)); !bytes.Equal(export, want) {
		t.Errorf("got  %q\nwant %q", export, want)
	}
}

func TestWhatIsNotValidIsNotRestored(t *testing.T) {
	t.Parallel()
	label := func(s string) []byte {
		return append(familyRecord(counter("holdfast_n_total")), record(3, words(1, 7), []byte(s))...)
	}
	good := append(familyRecord(counter("holdfast_good_total")), record(3, words(1, 5))...)
	per := counter("holdfast_n_total")
	per.Merge = metrics.PerGeneration
	unknown := counter("holdfast_n_total")
	unknown.Type = 77
	negative, _ := counter("holdfast_n_total").AppendBinary(words(-1))
	for name, c := range map[string]struct {
		bad []byte
		err string
	}{
		"a gauge":              {append(familyRecord(gauge("holdfast_n", metrics.Sum)), record(3, words(1, 7))...), "1 series"},
		"of one generation":    {append(familyRecord(per), record(3, words(1, 7))...), "1 series"},
		"of an unknown type":   {append(familyRecord(unknown), record(3, words(1, 7))...), "1 series"},
		"of no generation":     {append(record(2, negative), record(3, words(1, 7))...), "1 series"},
		"a cut definition":     {append(record(2, words(1)), record(3, words(1, 7))...), "1 series"},
		"an empty definition":  {append(record(2), record(3, words(1, 7))...), "1 series"},
		"a value below 0":      {append(familyRecord(counter("holdfast_n_total")), record(3, words(1, -7))...), "1 series"},
		"a sum below 0":        {append(familyRecord(histogram("holdfast_n", 1)), record(3, words(1, -7, 1, 1))...), "1 series"},
		"too few buckets":      {append(familyRecord(histogram("holdfast_n", 1)), record(3, words(1, 7, 1))...), "1 series"},
		"too many buckets":     {append(familyRecord(histogram("holdfast_n", 1)), record(3, words(1, 7, 1, 1, 1))...), "1 series"},
		"no value":             {append(familyRecord(counter("holdfast_n_total")), record(3, words(1))...), "1 series"},
		"twice":                {append(anExportedSeries(1, 7), record(3, words(1, 7))...), "1 series"},
		"a bare label":         {label("a"), "1 series"},
		"a label without end":  {label("a\xffb"), "1 series"},
		"an empty value":       {label("a\xff\xff"), "1 series"},
		"a value too long":     {label("a\xff" + strings.Repeat("x", 513) + "\xff"), "1 series"},
		"a bad name":           {label("A\xffb\xff"), "1 series"},
		"a reserved name":      {label("le\xff1\xff"), "1 series"},
		"no name":              {label("\xffb\xff"), "1 series"},
		"a name twice":         {label("a\xffb\xffa\xffc\xff"), "1 series"},
		"names out of order":   {label("b\xff1\xffa\xff2\xff"), "1 series"},
		"too many labels":      {label("a\xff1\xffb\xff1\xffc\xff1\xffd\xff1\xffe\xff1\xfff\xff1\xffg\xff1\xffh\xff1\xffi\xff1\xff"), "1 series"},
		"no family":            {record(3, words(1, 7)), ""},
		"odd numbers":          {record(1, []byte("odd")), ""},
		"another kind":         {record(9, []byte("whatever")), ""},
		"a short generation":   {append(record(4, []byte("x")), anExportedSeries(1, 7)...), "1 series"},
		"a generation twice":   {slices.Concat(record(4, words(3)), record(4, words(3)), anExportedSeries(1, 7)), "1 series"},
		"one that has ended":   {slices.Concat(record(1, words(3)), record(4, words(3)), anExportedSeries(1, 7)), "1 series"},
		"a record of nothing":  {order.AppendUint64(nil, 0), "a record of"},
		"a record without end": {append(order.AppendUint32(nil, 2), 0xff, 0xff, 0xff, 0xff), "a record of"},
		"half a head":          {[]byte("half"), "cut"},
	} {
		if name == "no family" {
			c.bad, c.err = handmadeExport(c.bad, good), "1 series"
		} else {
			c.bad = handmadeExport(good, c.bad)
		}
		totals, err := merge.Restore(c.bad)
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want %q", name, err, c.err)
		}
		got := values(t, totals.Merge(nil, nil))
		delete(got, "holdfast_n_total") // the first of two
		if !reflect.DeepEqual(got, map[string]float64{"holdfast_good_total": 5}) {
			t.Errorf("%s: got %v", name, got)
		}
	}
	for name, data := range map[string][]byte{
		"another file":   append([]byte("HFmetric"), handmadeExport(good)[8:]...),
		"another layout": append([]byte("HFtotals\x02"), handmadeExport(good)[9:]...),
		"a short one":    []byte("HFtotals"),
	} {
		totals, err := merge.Restore(data)
		if err == nil {
			t.Errorf("%s: restored", name)
		}
		want(t, totals, "holdfast_")
	}
}

// Runs alone, with little room.
func TestARestoredAccountIsBounded(t *testing.T) {
	merge.SetRoom(t, 200_000)
	series := familyRecord(counter("holdfast_n_total"))
	for i := range 5000 {
		series = append(series, record(3, words(1, 1), fmt.Appendf(nil, "a\xff%0400d\xff", i))...)
	}
	var families []byte
	for i := range 5000 {
		families = append(families, familyRecord(counter(fmt.Sprintf("holdfast_n_%d_total", i)))...)
		families = append(families, record(3, words(1, 1))...)
	}
	var generations []byte
	for i := range int64(20) {
		generations = append(append(generations, record(4, words(i+1))...), series...)
	}
	for name, records := range map[string][]byte{"series": series, "families": families, "generations": generations} {
		totals, err := merge.Restore(handmadeExport(records))
		if err == nil {
			t.Errorf("%s: all were restored", name)
		}
		sum := 0.0
		for _, v := range values(t, totals.Merge(nil, nil)) {
			sum += v // of 1 for each series of each generation
		}
		if sum > 2500 || sum == 0 {
			t.Errorf("%s: %v series", name, sum)
		}
		again := restore(t, totals.Export()) // what there was room for there is room for again
		if got, want := len(again.Export()), len(totals.Export()); got != want {
			t.Errorf("%s: exports of %d and %d bytes", name, want, got)
		}
		const less = 100_000
		merge.SetRoom(t, less)
		if got := len(totals.Export()); name == "generations" && got > less+less/8 {
			t.Errorf("%s: an export of %d bytes", name, got)
		}
		merge.SetRoom(t, 200_000)
	}
}

func TestFewGenerationsAreAbsent(t *testing.T) {
	t.Parallel()
	var many []byte
	for i := range int64(5000) {
		many = append(many, record(4, words(i+1))...)
	}
	if n := len(restore(t, handmadeExport(many)).Absent()); n > 256 {
		t.Errorf("%d generations", n)
	}
}

// FuzzRestore: whatever the bytes are, a scrape is one that a parser takes, nothing in it
// decreases, and what is exported again is what was restored.
func FuzzRestore(f *testing.F) {
	totals := merge.New()
	r, _ := start(f, totals, 1)
	r.Counter(counter("holdfast_n_total")).Inc()
	r.Counter(counter("holdfast_x_total", "a", "b"), "c", "d").Inc()
	h := histogram("holdfast_h_seconds", 0.1, 1)
	h.Unit = metrics.Seconds
	r.Histogram(h).Observe(1)
	end(f, totals, 1)
	good := totals.Export()
	f.Add(good)
	f.Add([]byte{})
	f.Add(good[:16])
	f.Add(append(bytes.Clone(good), record(9, []byte("unknown"))...))
	for at := 0; at < len(good); at += 8 {
		bad := bytes.Clone(good)
		bad[at] ^= 0x21
		f.Add(bad)
		f.Add(good[:at])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		totals, _ := merge.Restore(b)
		before := wantRisen(t, nil, totals.Merge(nil, nil))
		r, _ := start(t, totals, 1<<30)
		r.Counter(counter("holdfast_fine_total")).Inc()
		r.Counter(counter("holdfast_n_total")).Inc()
		before = wantRisen(t, before, totals.Merge(nil, nil))
		end(t, totals, 1<<30)
		before = wantRisen(t, before, totals.Merge(nil, nil))
		wantRisen(t, before, restore(t, totals.Export()).Merge(nil, nil))
	})
}
