package supervisor

import (
	"context"
	"errors"
	"os"
	"time"

	"holdfast/internal/control"
)

// Rollback implements [Commands]. It has its turn with reloads, and everybody who asks
// meanwhile shares it.
func (s *Supervisor) Rollback(ctx context.Context, wait bool) (*ReloadResult, error) {
	return s.replacement(ctx, &s.backing, wait)
}

// rollback puts what passed probation before what serves into service again. A failure
// before that serves leaves everything as it was.
func (s *Supervisor) rollback(ctx context.Context) reloadOutcome {
	began := time.Now()
	p, err := s.planBack(ctx)
	if err == nil {
		var o reloadOutcome
		if o, err = s.putBack(ctx, p); err == nil {
			o.result.Duration = time.Since(began)
			s.log.Warn("rolled back", "serving", o.result.Generation, "draining", o.result.Previous, "config", p.release.hash, "took", o.result.Duration)
			return o
		}
		p.abort()
	}
	if s.work.Err() != nil {
		err = ErrStopping
	}
	s.log.Error("rollback refused; nothing has changed", "err", err)
	return reloadOutcome{err: err}
}

// back returns what a rollback would put into service; nil: nothing. It is what has passed
// probation last, or where that serves, what has before it. Called in the loop.
func (s *Supervisor) back() *release {
	if s.serving == nil || s.pinned == nil {
		return nil
	}
	if !s.serving.release.same(s.pinned) {
		return s.pinned
	}
	return s.previous
}

// same says whether generations of both are alike: they have the same configuration and the
// same program.
func (r *release) same(other *release) bool {
	if r == other {
		return true
	}
	if r.hash != other.hash || !r.startable() || !other.startable() {
		return false
	}
	ours, err := r.binary.Stat()
	theirs, wrong := other.binary.Stat()
	return err == nil && wrong == nil && os.SameFile(ours, theirs)
}

// The reasons for which nothing can be put back.
var (
	errNothingServes = errors.New("nothing serves: what has crashed is being replaced")
	errNoPrevious    = errors.New("there is nothing to go back to: no other configuration or program has passed probation before what serves")
)

// planBack opens what the release listens at that is to serve again.
func (s *Supervisor) planBack(ctx context.Context) (*plan, error) {
	s.refresh(ctx) // a refusal says what the others hold now
	p := new(plan)
	var err error
	if !s.do(func() {
		switch p.release = s.back(); {
		case s.serving == nil:
			err = refuse("rollback", errNothingServes)
		case p.release == nil || !p.release.startable():
			err = refuse("rollback", errNoPrevious)
		default:
			if err = s.admit(p.release); err == nil {
				err = s.openSockets(p)
			}
		}
	}) {
		return nil, ErrStopping
	}
	if err != nil {
		return nil, err
	}
	abort := func() { s.do(func() { s.giveBack(p.sockets) }) }
	if err := p.release.logs.reunite(p.release.config.AccessLogs); err != nil {
		abort()
		return nil, err
	}
	commitAdmin, abortAdmin, err := s.opts.Admin.Prepare(p.release.config.Admin)
	if err != nil {
		abort()
		return nil, refuse("admin", err)
	}
	p.overrides = s.overridesOf(p.release)
	p.commit = commitAdmin
	p.abort = func() { abortAdmin(); abort() }
	return p, nil
}

// putBack has the release of p serve: by the newest of its generations that still drains, or by
// one that is started.
func (s *Supervisor) putBack(ctx context.Context, p *plan) (reloadOutcome, error) {
	s.keepStates(ctx)
	var old, from *generation
	s.do(func() { from = s.serving; old = s.survivor(p.release) })
	g := old
	err := errNothingServes
	if old != nil {
		if err = s.reinstate(ctx, old, p, false); err != nil {
			old.log.Warn("a generation does not serve again: another of its kind is started", "err", err)
		}
	}
	if err != nil {
		if g, err = s.launch(ctx, p); err != nil {
			return reloadOutcome{}, refuse("start", err)
		}
		if from, err = s.relieve(ctx, g, p, false); err != nil {
			return reloadOutcome{}, refuse("serve", err)
		}
	}
	o := reloadOutcome{result: &ReloadResult{Generation: g.number, Added: p.added, Removed: p.removed, Probation: "pending"}, probation: p.probation}
	if p.probation == nil {
		o.result.Probation = "passed"
	}
	if from != nil {
		o.result.Previous, o.result.RolledBack = from.number, true
		if err := s.drain(from, p.removed); err != nil {
			o.result.Warnings = append(o.result.Warnings, err.Error())
		}
	}
	return o, nil
}

// survivor returns the newest generation of a release that has served, drains, and answers; nil:
// there is none. One that was started for the tunnels of another serves nobody. Called in the loop.
func (s *Supervisor) survivor(r *release) *generation {
	for _, g := range s.newestFirst() {
		if g.state == draining && !g.silent && !g.served.IsZero() && g.lastSeen.EmptyBy.IsZero() && (g.release == r || g.release.same(r)) {
			return g
		}
	}
	return nil
}

// keepBack has the generation that serves keep what a rollback needs, for a successor of this
// supervisor. Called in the loop.
func (s *Supervisor) keepBack() {
	if g, r := s.toKeep(); r != nil && !s.stopping {
		s.workers.Go(func() { s.handBack(g) })
	}
}

// toKeep returns what the generation that serves is to keep and does not; nil: nothing. Called in
// the loop.
func (s *Supervisor) toKeep() (*generation, *release) {
	g, r := s.serving, s.back()
	if g == nil || r == nil || r == g.keepsBack || !r.startable() {
		return nil, nil
	}
	return g, r
}

// handBack hands g what it is to keep for a rollback by now.
func (s *Supervisor) handBack(g *generation) {
	g.handingBack.Lock() // what is sent last is what holds
	defer g.handingBack.Unlock()
	var to *generation
	var r *release
	s.do(func() { to, r = s.toKeep() })
	if to != g {
		return
	}
	if err := g.keepRelease(r); err != nil {
		g.log.Warn("what a rollback needs is not kept for another supervisor", "err", err)
		return
	}
	s.do(func() { g.keepsBack = r })
}

func (g *generation) keepRelease(r *release) error {
	bundle, err := r.bundle(control.Bundle{})
	if err != nil {
		return err
	}
	defer bundle.Close()
	binary, err := descriptorOf(r.binary)
	if err != nil {
		return err
	}
	return control.SendFiles(control.TypeKeep, map[string]int{control.KeptBackBundle: int(bundle.Fd()), control.KeptBackBinary: binary}, g.send)
}

// takeBack makes what v has kept for a rollback ours, where nothing better is known. Called in
// the loop.
func (s *Supervisor) takeBack(v *visitor, g *generation) {
	if v.back == nil || s.previous != nil {
		return
	}
	s.previous, v.back = v.back, nil
	g.keepsBack = s.previous
}
