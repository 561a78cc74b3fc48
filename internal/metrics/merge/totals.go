// Package merge makes one set of metrics of what all generations, the living and the
// ended ones, and the supervisor itself have counted.
//
// [Totals] owns the memory files of the living generations. [Totals.Merge] reads them
// and adds them up, each metric by its merge kind:
//
//   - A counter or a histogram is the sum over the living generations and all that
//     have ended. What a generation has counted moves from the one to the other in
//     one step that no Merge sees half done: see [Totals.End]. So what is shown never
//     decreases, over reloads and crashes. It does not even where a generation counts
//     backwards or takes a series out of its file, which only one in the wrong hands
//     does: of each living series the highest value that was read is what counts.
//   - A gauge is a figure of living generations only: their sum, the greatest one, or
//     the one of the serving generation.
//   - What is per generation is not merged. Its series carry the label generation and
//     are gone with it.
//
// Generations may be of other versions, and a generation may be hostile. Each metric
// has one definition at a time: the supervisor's, else the serving generation's,
// else that of the newest generation that has it. Other labels make other series.
// Other bounds are fitted in: a bucket is counted in the first one that reaches as far
// or further, so no value is lost and none seems smaller than it was. The buckets are
// those of the definition alone: once another build serves, series of old bounds are
// gone and those of new ones begin, while count and sum go on. What has another type is
// left out until nothing contradicts it any more, and counted in
// holdfast_metrics_conflicts.
//
// Series that no living generation has any more, because the cluster or the route that
// they were about is in no living configuration, are forgotten [Expiry] after the last
// generation that had them has ended. One that comes back before goes on.
//
// # Successors
//
// What was counted outlives the supervisor as what [Totals.Export] gives and [Restore]
// takes: of the generations that have ended all, of the living ones what was shown last.
// These hold their memory files themselves. A successor restores first, adds the files of
// those that it adopts, and only then has anything merged. What it shows is no less than
// what was shown before, also where a generation has ended when nobody looked and its file
// is gone with it, and where one has counted backwards.
package merge

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/metrics"
)

// Expiry is how long the series of ended generations are kept once no living one has
// them.
const Expiry = time.Hour

var (
	stale = metrics.Define(metrics.Desc{
		Name:  "holdfast_generation_stale",
		Help:  "Whether the generation did not answer in time, so that its figures may be old: 1 or 0.",
		Type:  metrics.TypeGauge,
		Merge: metrics.PerGeneration,
	})
	conflicts = metrics.Define(metrics.Desc{
		Name: "holdfast_metrics_conflicts",
		Help: "Metrics, series and memory files of the generation that are not shown, " +
			"because they contradict another definition, are not valid, or are too many.",
		Type:  metrics.TypeGauge,
		Merge: metrics.PerGeneration,
	})
)

// Totals knows what is counted by the living generations and what was counted by those
// that have ended. Its methods may be called concurrently.
type Totals struct {
	work   sync.Mutex // held by Merge, Settle and Export; protects ended, and of every generation what was read
	ended  account
	unsaid []error             // of what could not be kept, until Settle says it
	save   func(export []byte) // nil: nobody wants to know

	mu      sync.Mutex    // taken after work, for moments only
	living  []*generation // in the order of their numbers
	ending  []*generation // that have ended and are not in ended yet
	folded  []int         // that are in ended, or are about to be; the last ones
	serving int
}

type generation struct {
	number int
	file   *metrics.File // nil: it is known from a predecessor, and was not added yet
	seen   *account
	broken error // what is wrong with the file
	lost   int   // series that the account has no room for
}

// New returns Totals that know of nothing.
func New() *Totals { return new(Totals) }

// Settled says who is told what [Totals.Export] gives: with each Merge, before it shows it,
// and when generations have ended, before their files are closed. So once save has put it
// where a successor finds it, there is no moment at which what was shown is nowhere. A
// Merge and a Settle wait for save, which must not call the Totals.
func (t *Totals) Settled(save func(export []byte)) {
	t.work.Lock()
	defer t.work.Unlock()
	t.save = save
}

// Add says that a generation counts, or will count, in f, which belongs to the Totals
// from now on. Numbers are never used again: of a generation that is known already, or
// that has ended and is in the totals, also in those of a predecessor, the file is closed
// and nothing is counted. It does not block.
func (t *Totals) Add(number int, f *metrics.File) (taken bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	is := func(g *generation) bool { return g.number == number }
	if i := slices.IndexFunc(t.living, is); i >= 0 && t.living[i].file == nil {
		t.living[i] = &generation{number: number, file: f, seen: t.living[i].seen}
		return true
	}
	if slices.ContainsFunc(t.living, is) || slices.ContainsFunc(t.ending, is) || slices.Contains(t.folded, number) {
		f.Close()
		return false
	}
	t.enlist(&generation{number: number, file: f, seen: new(account)})
	return true
}

// enlist is called with mu held, or before the Totals are anybody's.
func (t *Totals) enlist(g *generation) {
	t.living = append(t.living, g)
	slices.SortFunc(t.living, func(a, b *generation) int { return a.number - b.number })
}

// Absent returns the numbers of generations that counted when a predecessor looked last,
// and that neither were added nor have ended since. What they had counted by then is in
// the sums. The caller says of those that do not live that they have ended.
func (t *Totals) Absent() (numbers []int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, g := range t.living {
		if g.file == nil {
			numbers = append(numbers, g.number)
		}
	}
	return numbers
}

// Absorb adds what a predecessor knew, where that is found late: from is what [Restore]
// has made of it, and must not be used any more. A generation that both know counts once.
// It waits for a Merge that is under way.
func (t *Totals) Absorb(from *Totals) {
	t.work.Lock()
	defer t.work.Unlock()
	if lost := t.ended.fold(&from.ended, 0, clock()); lost > 0 {
		t.unsaid = append(t.unsaid, fmt.Errorf("metrics of a predecessor: no room for %d series", lost))
	}
	t.mu.Lock()
	for _, number := range from.folded {
		t.remember(number)
	}
	for _, g := range from.living {
		is := func(ours *generation) bool { return ours.number == g.number }
		if !slices.ContainsFunc(t.living, is) && !slices.ContainsFunc(t.ending, is) && !slices.Contains(t.folded, g.number) {
			t.enlist(g)
		}
	}
	t.mu.Unlock()
	t.keep()
}

// Serve says which generation serves; 0: none. It does not block.
func (t *Totals) Serve(number int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.serving = number
}

// End says that the process of a generation has ended: what it has counted becomes
// part of the totals, in one step, with the next [Totals.Merge] or [Totals.Settle]. It
// does not block.
func (t *Totals) End(number int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.living, func(g *generation) bool { return g.number == number })
	if i >= 0 {
		t.ending = append(t.ending, t.living[i])
		t.living = slices.Delete(t.living, i, i+1)
	}
}

// Settle adds up what generations have counted that have ended, and closes their files.
// The error is about what could not be kept, also by a Merge before, because it was
// not valid or there was no room for it; the rest was.
//
// It waits for a Merge that is under way and takes as long as one, which is
// milliseconds, or a second if generations have filled their files.
func (t *Totals) Settle() error {
	t.work.Lock()
	defer t.work.Unlock()
	t.settle()
	err := errors.Join(t.unsaid...)
	t.unsaid = nil
	return err
}

func (t *Totals) settle() {
	t.mu.Lock()
	ending := t.ending
	t.ending = nil
	for _, g := range ending {
		t.remember(g.number)
	}
	t.mu.Unlock()
	for _, g := range ending {
		g.read()
		g.lost += t.ended.fold(g.seen, g.number, clock())
	}
	if len(ending) > 0 {
		t.keep()
	}
	for _, g := range ending {
		err := g.broken
		if g.file != nil {
			err = errors.Join(err, g.file.Close())
		}
		if g.lost > 0 {
			err = errors.Join(err, fmt.Errorf("no room for %d series", g.lost))
		}
		if err != nil {
			t.unsaid = append(t.unsaid, fmt.Errorf("metrics of generation %d: %w", g.number, err))
		}
	}
}

// remember says that a generation is in the totals. Called with mu held, or before the
// Totals are anybody's.
func (t *Totals) remember(number int) {
	t.folded = append(t.folded, number)
	t.folded = t.folded[max(0, len(t.folded)-mostFolded):]
}

// read takes over what the generation has counted by now.
func (g *generation) read() {
	if g.file == nil {
		return
	}
	families, err := g.file.Families()
	g.broken = err
	g.lost = g.seen.note(families, g.number)
}

// keep tells what a successor has to know. Called with work held.
func (t *Totals) keep() {
	if t.save != nil {
		t.save(t.export())
	}
}

// refresh adds up what has ended, reads the files of the living generations, and
// forgets what has expired.
func (t *Totals) refresh() (living []*generation, serving int) {
	t.settle()
	t.mu.Lock()
	living, serving = slices.Clone(t.living), t.serving
	t.mu.Unlock()
	for _, g := range living {
		g.read()
	}
	t.ended.expire(living, clock())
	t.keep()
	return living, serving
}

// Merge returns the metrics as they are now: what the generations count, those of
// the supervisor's own, and which of the living generations are stale, by name.
//
// In own, the series of what is per generation end with the number of the generation,
// as a label's value that is not among Desc.Labels. A generation that defines a metric
// of own is not shown with it.
//
// What is returned shares parts with other results and must not be changed.
func (t *Totals) Merge(staleGenerations []int, own []metrics.Family) []*dto.MetricFamily {
	t.work.Lock()
	defer t.work.Unlock()
	living, serving := t.refresh()

	var s scrape
	s.addOwn(own)
	s.addOwn([]metrics.Family{
		perGeneration(stale, living, func(g *generation) int {
			if slices.Contains(staleGenerations, g.number) {
				return 1
			}
			return 0
		}),
		{Desc: *conflicts}, // so that nobody else has it; its series are known below
	})
	s.addLiving(living, serving)
	s.add(&t.ended, source{})
	refused := s.resolve()
	s.addOwn([]metrics.Family{perGeneration(conflicts, living, func(g *generation) int {
		n := refused[g] + g.lost
		if g.broken != nil {
			n++
		}
		return n
	})})
	return s.merge()
}

// perGeneration returns a family of the supervisor's own with a value for each living
// generation.
func perGeneration(d *metrics.Desc, living []*generation, value func(*generation) int) metrics.Family {
	f := metrics.Family{Desc: *d}
	for _, g := range living {
		if g.file != nil {
			f.Series = append(f.Series, metrics.Series{Labels: []string{g.label()}, Value: int64(value(g))})
		}
	}
	return f
}
