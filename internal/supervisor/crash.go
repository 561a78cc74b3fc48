package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"holdfast/internal/socket"
)

// steadyAfter is how long a generation must have served for its death to count as the
// first in a row.
var steadyAfter = steadyTime(steadyOverride)

// steadyOverride is set by the linker, for tests that kill without a pause:
// -X holdfast/internal/supervisor.steadyOverride=100ms
var steadyOverride string

func steadyTime(text string) time.Duration {
	if d, err := time.ParseDuration(text); err == nil {
		return d
	}
	return 30 * time.Second
}

const (
	// The first replacement starts at once; from the second on each waits twice as
	// long as the one before.
	backOffFirst = 100 * time.Millisecond
	backOffMost  = 10 * time.Second

	// cutOffGrace is how long a process may live without a control channel: at its
	// end the kernel closes descriptors one by one, and one that lives looks for its
	// supervisor at the rendezvous.
	cutOffGrace = 3 * time.Second
)

// onDeath notes that g's process is gone, and lost with it. Called in the loop.
func (s *Supervisor) onDeath(g *generation, how string, lost losses) {
	was := g.state
	if g.done.Load() {
		how = endedWell // of a process that is not our child nobody tells us how it ended
	}
	if g.cutOff != nil {
		how = fmt.Sprintf("%s, after it was cut off: %v", how, g.cutOff)
	}
	g.how, g.lost = how, lost
	s.move(g, evDied)
	delete(s.living, g.number)
	if s.visiting[g.number] {
		s.visiting[g.number] = false
	}
	s.totals.End(g.number)
	close(g.died)
	g.closeChannel()
	s.stats.recordsLost.Add(uint64(lost.records))
	if g.diedEarly(was) {
		s.stats.deaths[was].Inc()
		if s.serving != g && was != starting && was != ready { // that is for others to say
			g.log.Error("a "+was.String()+" generation has died", "how", how, "tunnels", lost.tunnels)
		}
	}
	s.discount(g, "the serving generation has died: "+how)
	s.mourn(g, lost)
	s.closeUnused(g.release)
	s.note()
}

// endedWell is how a generation ends that has nothing left to do.
const endedWell = "exit status 0"

// diedEarly says of a process that is gone whether it had more to do in the state that
// it was in. What drains or stops may end by itself, and then says so by its exit
// status; what stops may be killed by us.
func (g *generation) diedEarly(was state) bool {
	switch was {
	case draining:
		return g.how != endedWell
	case stopping:
		return g.how != endedWell && !g.killed.Load()
	}
	return true
}

// onLeaving has another generation serve in the place of one that ends by itself.
// Called in the loop.
func (s *Supervisor) onLeaving(g *generation) {
	if g.state == ended || g.state == stopping {
		return
	}
	s.move(g, evStop)
	s.discount(g, "the serving generation was told by a signal to end")
}

// discount has g, which is ending, never pass a probation nor be reinstated, and be
// replaced if it served; why is for that case. Called in the loop.
func (s *Supervisor) discount(g *generation, why string) {
	if s.serving == g {
		s.lost(g, why)
	}
	if s.passed == g {
		s.passed = nil
	}
	if p := s.probation; p != nil && p.generation == g {
		s.endProbation("crashed")
	}
}

// onCutOff ends a generation whose control channel is gone, as gently as can be
// without it: one that may hold connections drains by signal. Called in the loop.
func (s *Supervisor) onCutOff(g *generation, why error) {
	if g.state == ended || g.state == stopping {
		return
	}
	sig, was := syscall.SIGTERM, g.state
	if was == starting || was == ready {
		sig = syscall.SIGKILL
	}
	g.silent, g.cutOff = true, why
	s.move(g, evStop)
	if err := g.proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		g.log.Error("cannot signal", "signal", sig.String(), "err", err)
	}
	s.discount(g, "the serving generation is cut off")
}

// lost notes that g, which served, does not any more. Called in the loop.
func (s *Supervisor) lost(g *generation, why string) {
	s.serving = nil
	s.totals.Serve(0)
	s.noteReadiness()
	if s.stopping {
		return
	}
	if time.Since(g.served) > steadyAfter {
		s.crashes = 0
	}
	s.crashes++
	s.lastCrash = why
	if s.upgrading != nil { // it comes first that something serves
		s.upgrading.cancel(errors.New(why))
	}
	g.log.Error(why+"; new connections wait in the listen queues", "in_a_row", s.crashes, "tunnels", g.lost.tunnels)
	s.ensureServing()
}

// ensureServing has something serve again, unless that is under way. Called in the
// loop.
func (s *Supervisor) ensureServing() {
	if s.serving != nil || s.switching || s.restoring || s.stopping || s.upgrading != nil || s.pinned == nil {
		return
	}
	s.restoring = true
	s.workers.Go(func() {
		s.restore(s.work)
		s.do(func() {
			s.restoring = false
			s.settled()
		})
	})
}

// restore puts what passed probation last into service again: the very process
// where it still lives, or a new one of the same release. It tries until something
// serves.
func (s *Supervisor) restore(ctx context.Context) {
	if s.awaitBegin(ctx) != nil { // who may still be discarded leaves it to its predecessor
		return
	}
	for {
		var wait time.Duration
		s.do(func() { wait = backOff(s.crashes) })
		if !sleep(ctx, wait) {
			return
		}
		var old *generation
		var r *release
		vacant := false
		s.do(func() { old, r, vacant = s.passed, s.pinned, s.serving == nil })
		if !vacant {
			return
		}
		err := s.restoreOnce(ctx, old, r)
		if err == nil || errors.Is(err, errServes) || ctx.Err() != nil {
			return
		}
		s.stats.replacementFailures.Inc()
		s.log.Error("cannot replace the crashed generation; trying again", "err", err)
		s.do(func() {
			s.crashes++
			s.lastCrash = "cannot replace the crashed generation: " + err.Error()
			if s.passed == old {
				s.passed = nil // it could not be reinstated
			}
		})
	}
}

// errServes says that a reload has mended a crash before a restore could.
var errServes = errors.New("another generation serves meanwhile")

// restoreOnce has old serve again, or a new generation of r where old is nil.
func (s *Supervisor) restoreOnce(ctx context.Context, old *generation, r *release) error {
	p := s.restorePlan(r, func(string) bool { return true })
	var err error
	if old != nil {
		if err = s.reinstate(ctx, old, p, true); err == nil {
			s.stats.reinstated.Inc()
		}
	} else {
		err = s.replaceCrashed(ctx, p)
	}
	if err != nil {
		p.abort()
	}
	return err
}

// reinstate has g, which drains, serve again. With an error it is told to drain
// once more: it may hear of all this only when it wakes up, and it must let go of
// the sockets. restored is that of relieve.
func (s *Supervisor) reinstate(ctx context.Context, g *generation, p *plan, restored bool) error {
	err := g.sendListeners(descriptors(p))
	if err == nil {
		_, err = s.relieve(ctx, g, p, restored)
	}
	if err != nil {
		s.workers.Go(func() { _ = s.drain(g, nil) }) // logs what goes wrong
		return fmt.Errorf("reinstate generation %d: %w", g.number, err)
	}
	g.log.Warn("generation is reinstated", "config", p.release.hash)
	return nil
}

// replaceCrashed has a new generation of p's release serve.
func (s *Supervisor) replaceCrashed(ctx context.Context, p *plan) error {
	g, err := s.launch(ctx, p)
	if err == nil {
		_, err = s.relieve(ctx, g, p, true)
	}
	if err != nil {
		return err
	}
	s.stats.replaced.Inc()
	g.log.Warn("generation replaces the crashed one", "config", p.release.hash)
	return nil
}

// restorePlan opens again what a crashed configuration had given up, as far as it is
// wanted, by key. What cannot be opened is reported and left out: the rest is better
// than nothing.
func (s *Supervisor) restorePlan(r *release, wanted func(key string) bool) *plan {
	p := &plan{release: r, sockets: make(map[string]*socket.Socket)}
	s.do(func() {
		for _, l := range r.config.Listeners {
			if !wanted(l.Key()) {
				s.log.Error("a listener of the configuration has no socket", "listener", l.Name, "key", l.Key())
			} else if err := s.hold(p, l); err != nil {
				s.log.Error("a listener of the reinstated configuration is lost", "err", err)
			}
		}
	})
	commit, abort, err := s.opts.Admin.Prepare(r.config.Admin)
	if err != nil {
		s.log.Error("the admin address of the reinstated configuration is lost", "err", err)
		commit, abort = func() {}, func() {}
	}
	p.overrides = s.overridesOf(r)
	p.commit = commit
	p.abort = func() {
		abort()
		s.do(func() { s.giveBack(p.sockets) })
	}
	return p
}

// backOff is the pause before the next replacement after so many crashes in a row.
func backOff(crashes int) time.Duration {
	if crashes < 2 {
		return 0
	}
	return min(backOffFirst<<min(crashes-2, 20), backOffMost)
}

// sleep says false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
