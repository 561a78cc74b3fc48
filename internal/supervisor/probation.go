package supervisor

import (
	"context"
	"time"
)

// holdMargin is how much longer than the probation its fallback stays at hand: the
// crash may come at the last moment.
const holdMargin = 2 * time.Second

// A probation is the time after a reload in which a crash of the new generation
// puts back what passed last.
type probation struct {
	generation *generation
	fallback   *generation // what passed last; drains, but stays at hand meanwhile. nil: it is gone
	until      time.Time
	over       chan struct{} // closed when result is set
	result     string
}

// wait completes a reload's result when its probation has ended.
func (p *probation) wait(ctx context.Context, result ReloadResult) (*ReloadResult, error) {
	if p == nil { // it had passed before
		return &result, nil
	}
	select {
	case <-p.over:
		result.Probation = p.result
		return &result, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// beginProbation puts the serving generation on probation. One that was still on
// it is superseded: it will never be the fallback. The very first generation has
// passed: there is nothing better to put back. Called in the loop.
func (s *Supervisor) beginProbation() *probation {
	g := s.serving
	if s.pinned == nil {
		p := &probation{generation: g, over: make(chan struct{}), result: "passed"}
		close(p.over)
		s.pass(g)
		return p
	}
	s.endProbation("superseded")
	length := g.release.config.Reload.Probation
	p := &probation{generation: g, fallback: s.passed, until: time.Now().Add(length), over: make(chan struct{})}
	s.probation = p
	for _, o := range s.living {
		if o.state == draining && (o == p.fallback || o.hasPassage()) { // it has more time
			s.workers.Go(func() { _ = s.drain(o, nil) }) // logs what goes wrong
		}
	}
	s.workers.Go(func() {
		select {
		case <-time.After(length):
			s.do(func() {
				if s.probation == p {
					s.pass(g)
					s.endProbation("passed")
					g.log.Info("generation has passed probation")
				}
			})
		case <-p.over:
		case <-s.work.Done():
			s.do(func() {
				if s.probation == p {
					s.endProbation("superseded")
				}
			})
		}
	})
	return p
}

// pass makes g what is put back, and its release what crashes are mended with.
// Called in the loop.
func (s *Supervisor) pass(g *generation) {
	s.passed = g
	s.pin(g.release)
	s.retarget()
}

// endProbation tells everybody who waits. Called in the loop.
func (s *Supervisor) endProbation(result string) {
	if p := s.probation; p != nil {
		s.probation = nil
		p.result = result
		s.stats.probations[result].Inc()
		close(p.over)
		s.retarget()
	}
}

// holdOf says how long g must not end although nothing is left of it. Called in
// the loop.
func (s *Supervisor) holdOf(g *generation) time.Duration {
	if p := s.probation; p != nil && p.fallback == g {
		return time.Until(p.until) + holdMargin
	}
	return 0
}

// pin makes r what a crash is mended with; nil, at the end: nothing. Called in the loop.
func (s *Supervisor) pin(r *release) {
	old, before := s.pinned, s.previous
	s.pinned = r
	switch {
	case r == nil:
		s.previous = nil
	case old != nil && !old.same(r):
		s.previous = old
	}
	s.closeUnused(old)
	s.closeUnused(before)
	s.keepBack()
}

// closeUnused closes what a release holds open from which nothing can be started any
// more. Called in the loop.
func (s *Supervisor) closeUnused(r *release) {
	if r == nil || r == s.pinned || r == s.previous {
		return
	}
	for _, g := range s.living {
		if g.release == r {
			return
		}
	}
	for _, b := range s.resuming {
		if b.release == r {
			return
		}
	}
	go func() { // a file system may keep it waiting
		if err := r.close(); err != nil {
			s.log.Error("close what an old configuration held open", "err", err)
		}
	}()
}
