package supervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/filewatch"
)

// Runtime values: numbers of the configuration that are overridden while generations run, by a
// file and, above that, by command. What they mean, only generations know. Here is who is told
// what: every generation all overrides, again and again until it has confirmed the newest.

// overrides are what holds in place of configured numbers. Owned by the loop.
type overrides struct {
	command map[string]float64 // never changed, but replaced
	file    fileOverrides

	revision uint64        // grows with every change
	told     chan struct{} // closed when a generation has confirmed something or has another state

	watched string // path of the file that is watched; "": none is
	unwatch context.CancelFunc
}

// fileOverrides are what a file says.
type fileOverrides struct {
	path    string // "": there is none
	values  map[string]float64
	problem string              // why what it says now does not hold; "": it does
	taken   filewatch.Signature // what the file looked like then
}

// with returns what holds with the file's overrides in the place of ours. nil: with ours.
func (o *overrides) with(file *fileOverrides) map[string]float64 {
	if file == nil {
		file = &o.file
	}
	all := make(map[string]float64, len(o.command)+len(file.values))
	maps.Copy(all, file.values)
	maps.Copy(all, o.command)
	return all
}

// overridable says whether g is of a build that knows what overrides are.
func (g *generation) overridable() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.runtimeVersion == control.RuntimeVersion
}

// overridesChanged has every generation hear of a change. Called in the loop.
func (s *Supervisor) overridesChanged() {
	s.overrides.revision++
	s.note()
	s.spread()
}

// spread has those generations hear of overrides that have not yet. One that is starting is
// told before it is ready, one without a channel when it is adopted. Called in the loop.
func (s *Supervisor) spread() {
	close(s.overrides.told)
	s.overrides.told = make(chan struct{})
	if s.succeeded || s.stopping {
		return
	}
	for _, g := range s.living {
		if !g.telling && s.untold(g, s.overrides.revision) {
			g.telling = true
			s.workers.Go(func() { s.tellUntilTold(g) })
		}
	}
}

// untold says whether g could be told of a revision, and has not been. Called in the loop.
func (s *Supervisor) untold(g *generation, revision uint64) bool {
	ch, _ := g.channel()
	return g.state != starting && g.state != ended && ch != (unattached{}) && g.told < revision && g.overridable()
}

// tellUntilTold ends when g has confirmed what holds, or cannot be told any more.
func (s *Supervisor) tellUntilTold(g *generation) {
	for attempt := 2; ; attempt++ {
		err := s.tell(g, g.asking(s.work))
		again := false
		s.do(func() {
			again = s.untold(g, s.overrides.revision) && !s.succeeded && !s.stopping
			g.telling = again
			if err == nil {
				close(s.overrides.told)
				s.overrides.told = make(chan struct{})
			}
		})
		switch {
		case !again:
			return
		case err == nil:
			attempt = 1 // something has changed meanwhile
			continue
		case attempt == 2:
			g.log.Warn("generation has not confirmed which runtime values are overridden; it is told again", "err", err)
		}
		if !sleep(s.work, backOff(attempt)) {
			return
		}
	}
}

// tell sends g all overrides that hold. Nobody else does so meanwhile, so that none comes after
// a later one.
func (s *Supervisor) tell(g *generation, send sender) error {
	if !g.overridable() {
		return nil
	}
	g.overriding.Lock()
	defer g.overriding.Unlock()
	var all control.Overrides
	var revision uint64
	current := false
	s.do(func() {
		revision = s.overrides.revision
		current = g.told == revision
		all.Values = s.overrides.with(g.file)
	})
	if current {
		return nil
	}
	payload, err := control.Payload(all)
	if err != nil {
		return err
	}
	defer payload.Close()
	if err := send(&control.Message{Type: control.TypeOverride}, int(payload.Fd())); err != nil {
		return err
	}
	s.do(func() { g.told = max(g.told, revision) })
	return nil
}

// awaitTold waits until every generation that can be told of a revision has confirmed it.
func (s *Supervisor) awaitTold(ctx context.Context, revision uint64) error {
	over := time.NewTimer(answerTimeout)
	defer over.Stop()
	for {
		var next chan struct{}
		var silent []string
		if err := s.try(ctx, func() {
			next = s.overrides.told
			for _, g := range s.newestFirst() {
				if s.untold(g, revision) {
					silent = append(silent, fmt.Sprintf("generation %d", g.number))
				}
			}
		}); err != nil || len(silent) == 0 {
			return err
		}
		select {
		case <-next:
		case <-over.C:
			return fmt.Errorf("%s has not confirmed it: %w", strings.Join(silent, " and "), ErrUnanswered)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Override implements [Commands].
func (s *Supervisor) Override(ctx context.Context, values map[string]float64) (*OverrideResult, error) {
	if len(values) == 0 {
		return nil, refuse(stepRuntime, errors.New("no key is given"))
	}
	if err := s.awaitBegin(ctx); err != nil {
		return nil, err
	}
	known, _ := s.askValues(ctx)
	result := new(OverrideResult)
	var problems []error
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if err := errors.Join(config.CheckRuntimeKey(key), config.CheckOverride(values[key])); err != nil {
			problems = append(problems, fmt.Errorf("%q: %w", oneLine(key), err))
			continue
		}
		v, ok := known[key]
		if !ok {
			result.Warnings = append(result.Warnings, unknownKey(key))
		} else if err := v.admits(values[key]); err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", key, err))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, refuse(stepRuntime, err)
	}
	revision, err := s.changeOverrides(ctx, func() error {
		all := maps.Clone(s.overrides.command)
		if all == nil {
			all = make(map[string]float64)
		}
		maps.Copy(all, values)
		if len(all) > config.MaxOverrides {
			return refuse(stepRuntime, fmt.Errorf("%d keys would be overridden by command; at most %d can be", len(all), config.MaxOverrides))
		}
		s.overrides.command = all
		s.overridesChanged()
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		s.log.Warn("a runtime value was set by command", "key", key, "value", values[key])
	}
	return result, s.awaitTold(ctx, revision)
}

// ResetOverrides implements [Commands].
func (s *Supervisor) ResetOverrides(ctx context.Context, key string) (*OverrideResult, error) {
	result := new(OverrideResult)
	revision, err := s.changeOverrides(ctx, func() error {
		_, set := s.overrides.command[key]
		switch {
		case key == "":
			result.Reset = slices.Sorted(maps.Keys(s.overrides.command))
			s.overrides.command = nil
		case set:
			result.Reset = []string{key}
			s.overrides.command = maps.Clone(s.overrides.command)
			delete(s.overrides.command, key)
		default:
			return refuse(stepRuntime, fmt.Errorf("%q is not set by command", oneLine(key)))
		}
		for _, key := range result.Reset {
			if v, still := s.overrides.file.values[key]; still {
				result.Warnings = append(result.Warnings, fmt.Sprintf("%s is %s now, as %s says", key, plain(v), s.overrides.file.path))
			}
		}
		if len(result.Reset) > 0 {
			s.overridesChanged()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Warn("runtime values were reset by command", "keys", result.Reset)
	return result, s.awaitTold(ctx, revision)
}

// changeOverrides has the overrides changed in the loop, unless change refuses. It returns
// their revision from then on.
func (s *Supervisor) changeOverrides(ctx context.Context, change func() error) (revision uint64, err error) {
	var refused error
	if err := s.change(ctx, func() {
		refused = change()
		revision = s.overrides.revision
	}); err != nil {
		return 0, err
	}
	return revision, refused
}

// stepRuntime is what a Refusal names whose command would override something.
const stepRuntime = "runtime values"

func unknownKey(key string) string {
	return fmt.Sprintf("no generation knows %s: it holds for those to come", key)
}

// apply restores what an earlier supervisor knew, as far as that can be. Called in the loop.
func (o *overrides) apply(f *facts) {
	o.command = sane(f.Overrides)
	o.file = fileOverrides{path: f.OverridesFile, values: sane(f.FileOverrides)}
	o.revision++
}

// sane returns those overrides that can be: a generation may have handed them back that was
// taken over.
func sane(all map[string]float64) map[string]float64 {
	if len(all) > config.MaxOverrides {
		return nil
	}
	maps.DeleteFunc(all, func(key string, v float64) bool {
		return config.CheckRuntimeKey(key) != nil || config.CheckOverride(v) != nil
	})
	return all
}
