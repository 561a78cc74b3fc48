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

const (
	// steadyAfter is how long a generation must have served for its death to count
	// as the first in a row.
	steadyAfter = 30 * time.Second

	// The first replacement starts at once; from the second on each waits twice as
	// long as the one before.
	backOffFirst = 100 * time.Millisecond
	backOffMost  = 10 * time.Second

	// cutOffGrace is how long a process may outlive its control channel: at its
	// end the kernel closes descriptors one by one.
	cutOffGrace = 2 * time.Second
)

// onDeath notes that g's process is gone. Called in the loop.
func (s *Supervisor) onDeath(g *generation, how string) {
	was := g.state
	if g.cutOff != nil {
		how = fmt.Sprintf("%s, after it was cut off: %v", how, g.cutOff)
	}
	g.how = how
	s.move(g, evDied)
	delete(s.living, g.number)
	close(g.died)
	g.ch.Close()
	if s.passed == g {
		s.passed = nil
	}
	if p := s.probation; p != nil && p.generation == g {
		s.endProbation("crashed")
	}
	if was == serving {
		s.lost(g, "the serving generation has died: "+how)
	} else if was == draining && how != "exit status 0" {
		g.log.Error("a draining generation has died", "how", how, "tunnels", g.lastSeen.Tunnels)
	}
	s.closeUnused(g.release)
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
	if was == serving {
		s.lost(g, "the serving generation is cut off")
	}
}

// lost notes that g, which served, does not any more. Called in the loop.
func (s *Supervisor) lost(g *generation, why string) {
	s.serving = nil
	s.accepting.Store(false)
	if s.stopping {
		return
	}
	if time.Since(g.served) > steadyAfter {
		s.crashes = 0
	}
	s.crashes++
	g.log.Error(why+"; new connections wait in the listen queues", "in_a_row", s.crashes)
	s.ensureServing()
}

// ensureServing has something serve again, unless that is under way. Called in the
// loop.
func (s *Supervisor) ensureServing() {
	if s.serving != nil || s.switching || s.restoring || s.stopping || s.pinned == nil {
		return
	}
	s.restoring = true
	s.workers.Go(func() {
		s.restore(s.work)
		s.do(func() {
			s.restoring = false
			s.ensureServing()
		})
	})
}

// restore puts what passed probation last into service again: the very process
// where it still lives, or a new one of the same release. It tries until something
// serves.
func (s *Supervisor) restore(ctx context.Context) {
	for {
		var wait time.Duration
		var old *generation
		var r *release
		vacant := false
		s.do(func() {
			wait, old, r = backOff(s.crashes), s.passed, s.pinned
			vacant = s.serving == nil
		})
		if !vacant || !sleep(ctx, wait) {
			return
		}
		err := s.restoreOnce(ctx, old, r)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			return
		}
		s.log.Error("cannot replace the crashed generation; trying again", "err", err)
		s.do(func() {
			s.crashes++
			if s.passed == old {
				s.passed = nil // it could not be reinstated
			}
		})
	}
}

func (s *Supervisor) restoreOnce(ctx context.Context, old *generation, r *release) error {
	p := s.restorePlan(r)
	g, err := old, error(nil)
	if g != nil {
		if err := g.sendListeners(descriptors(p)); err != nil {
			p.abort()
			return fmt.Errorf("reinstate generation %d: %w", g.number, err)
		}
	} else if g, err = s.launch(ctx, p); err != nil {
		p.abort()
		return err
	}
	if _, err := s.relieve(ctx, g, p, true); err != nil {
		p.abort()
		return err
	}
	if old != nil {
		g.log.Warn("generation is reinstated", "config", r.hash)
	} else {
		g.log.Warn("generation replaces the crashed one", "config", r.hash)
	}
	return nil
}

// restorePlan opens again what a crashed configuration had given up. What cannot be
// opened is reported and left out: the rest is better than nothing.
func (s *Supervisor) restorePlan(r *release) *plan {
	p := &plan{release: r, sockets: make(map[string]*socket.Socket)}
	s.do(func() {
		for _, l := range r.config.Listeners {
			if o := s.sockets[l.Key()]; o != nil {
				p.sockets[l.Key()] = o
				continue
			}
			n, err := socket.Open(l, s.ownSockets(p))
			if err != nil {
				s.log.Error("a listener of the reinstated configuration is lost", "err", err)
				continue
			}
			p.sockets[l.Key()] = n
			p.added = append(p.added, l.Key())
		}
	})
	commit, abort, err := s.opts.Admin.Prepare(r.config.Admin)
	if err != nil {
		s.log.Error("the admin address of the reinstated configuration is lost", "err", err)
		commit, abort = func() {}, func() {}
	}
	p.commit = commit
	p.abort = func() {
		abort()
		p.closeAdded()
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

// descriptors are the sockets as they travel.
func descriptors(p *plan) map[string]int {
	fds := make(map[string]int, len(p.sockets))
	for key, s := range p.sockets {
		fds[key] = s.FD()
	}
	return fds
}
