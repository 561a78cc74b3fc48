package supervisor

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
)

func makeStats(t *testing.T, previous []metrics.Family) *stats {
	t.Helper()
	st, err := newStats(previous)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.file.Close() })
	return st
}

// left is what a successor reads of stats, which it has nothing of but a duplicate of
// the file's descriptor.
func left(t *testing.T, st *stats) []metrics.Family {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(st.file.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := metrics.OpenFile(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	families, err := f.Families()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// A supervisor is followed by another, and that one by a third: what is counted goes on.
func TestStatsGoOnInASuccessor(t *testing.T) {
	t.Parallel()
	first := makeStats(t, nil)
	first.reloaded(reloadOutcome{result: &ReloadResult{Duration: time.Second}})
	first.reloaded(reloadOutcome{err: refuse("listeners", errors.New("taken"))})
	first.deaths[serving].Inc()
	first.adopted.Add(3)
	first.upgradesDone.Inc()
	first.upgradesRefused.Inc()
	first.logLinesDropped.follow(7)
	first.strangers.follow(8)

	second := makeStats(t, left(t, first))
	if got, want := second.families(), first.families(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	third := makeStats(t, nil)
	third.carry(left(t, second)) // when it finds them later
	third.reloaded(reloadOutcome{result: &ReloadResult{Duration: time.Second}})
	third.logLinesDropped.follow(2) // its own, from 0
	if third.done.Value() != 2 || third.refused.Value() != 1 || third.refusals["listeners"].Value() != 1 ||
		third.logLinesDropped.counter.Value() != 9 || third.strangers.counter.Value() != 8 {
		t.Errorf("got %+v", third.families())
	}
}

// The last reload is the service's, not the supervisor's.
func TestTheLastReloadIsKnownToASuccessor(t *testing.T) {
	t.Parallel()
	first := makeStats(t, nil)
	first.reloaded(reloadOutcome{result: &ReloadResult{}})
	second := makeStats(t, left(t, first))
	if second.lastOK.Value() != 1 || second.last.Value() != first.last.Value() || second.lastDone.Value() != first.last.Value() {
		t.Errorf("got %+v", second.families())
	}
	third := makeStats(t, nil)
	third.reloaded(reloadOutcome{err: refuse("listeners", errors.New("taken"))})
	third.carry(left(t, second))
	if third.lastOK.Value() != 0 || third.lastDone.Value() != 0 {
		t.Error("a reload of a predecessor counts as the last one, after one of ours")
	}
}

// What begins at 0 again is not taken for something that has decreased.
func TestAFollowerNeverDecreases(t *testing.T) {
	t.Parallel()
	f := follower{counter: metrics.NewRegistry().Counter(logLinesDropped)}
	for _, c := range []struct{ total, want uint64 }{{0, 0}, {3, 3}, {3, 3}, {1, 3}, {5, 5}} {
		if f.follow(c.total); f.counter.Value() != c.want {
			t.Errorf("%d of the other: %d, want %d", c.total, f.counter.Value(), c.want)
		}
	}
}

// Every memory file has a metric about itself. That of the generations is the one to show.
func TestTheFileOfTheStatsDoesNotSpeakForGenerations(t *testing.T) {
	t.Parallel()
	st := makeStats(t, nil)
	f, r, err := metrics.NewOwnFile()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, family := range r.Families() {
		if family.Desc.Name != metrics.UnshownSeries {
			t.Errorf("a file has %s", family.Desc.Name)
		}
	}
	totals := merge.New()
	totals.Add(1, f)
	for _, family := range totals.Merge(nil, st.families()) {
		switch name := family.GetName(); name {
		case "holdfast_metrics_conflicts":
			if n := family.Metric[0].GetGauge().GetValue(); n != 0 {
				t.Errorf("%v conflicts", n)
			}
		case metrics.UnshownSeries:
			return
		}
	}
	t.Error("what the generation says of its file is not shown")
}

// rendezvousOf is a Rendezvous where nobody comes but those that are refused.
type rendezvousOf uint64

func (r rendezvousOf) Serve(ctx context.Context, _ func(int) []byte, _ *slog.Logger, _ func(*control.Conn, *control.Hello)) {
	<-ctx.Done()
}
func (r rendezvousOf) Path() string    { return "" }
func (r rendezvousOf) Refused() uint64 { return uint64(r) }

func TestWhatIsCountedElsewhereIsShown(t *testing.T) {
	w := prepare(t, base)
	w.s.opts.LogsDropped = func() uint64 { return 12 }
	w.s.opts.Rendezvous, w.s.opts.Secret, w.s.opts.Fresh = rendezvousOf(5), []byte("secret"), true
	w.run()
	w.wantServing(1)
	for range 2 {
		w.wantSeries(w.scrape(), map[string]float64{
			"holdfast_supervisor_log_lines_dropped_total":        12,
			"holdfast_rendezvous_refused_total":                  5,
			"holdfast_generations_adopted_total":                 0,
			"holdfast_supervisor_upgrades_total{result=done}":    0,
			"holdfast_supervisor_upgrades_total{result=refused}": 0,
		})
	}
	epoch := w.scrape()["holdfast_supervisor_epoch"]
	w.s.do(func() {
		if epoch != float64(w.s.epoch) || epoch == 0 {
			t.Errorf("epoch %v is shown, %d is", epoch, w.s.epoch)
		}
		w.s.epoch = math.MaxUint64
		if got := valueOf(w.s.gauges(), supervisorEpoch); got != math.MaxInt64 {
			t.Errorf("the greatest epoch is shown as %d", got)
		}
		w.s.epoch = uint64(epoch)
	})
}

func valueOf(families []metrics.Family, d *metrics.Desc) int64 {
	for _, f := range families {
		if f.Desc.Name == d.Name {
			return f.Series[0].Value
		}
	}
	return -1
}
