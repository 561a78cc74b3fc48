package supervisor

import (
	"context"
	"fmt"
	"time"

	"holdfast/internal/control"
)

// How the idle connections of a generation that drains get to the one that serves: over a
// pair of sockets between the two, of which the supervisor keeps neither. What goes that
// way is no business of its own.

// passageMargin is how much longer than the probation of what serves a generation waits
// for its passage: an upgrade of the supervisor may come in between.
const passageMargin = 30 * time.Second

// mostPassagePause bounds the wait before a passage is tried again.
const mostPassagePause = time.Minute

// hasPassage says whether g is of a build that gives and takes idle connections as this
// one expects it.
func (g *generation) hasPassage() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.passageVersion == control.PassageVersion
}

// passageWithin says how long it may take until g, which is to drain, is given a passage;
// 0: it is not. Called in the loop.
func (s *Supervisor) passageWithin(g *generation) time.Duration {
	if s.stopping || !g.hasPassage() || s.serving != nil && !s.serving.hasPassage() {
		return 0
	}
	if p := s.probation; p != nil {
		return max(0, time.Until(p.until)) + passageMargin
	}
	return passageMargin
}

// layPassages has all that drain give their idle connections to the generation to, which
// serves; nil: nobody is to take any now. Called in the loop.
func (s *Supervisor) layPassages(to *generation) {
	taker := 0
	if to != nil && to.hasPassage() {
		taker = to.number
	}
	if taker != s.taker {
		s.taker = taker
		for _, g := range s.living {
			g.givesTo, g.passageFailures = 0, 0
		}
	}
	if taker == 0 {
		return
	}
	for _, g := range s.living {
		if g.state == draining && g.givesTo == 0 && g.hasPassage() {
			g.givesTo = taker
			s.workers.Go(func() {
				if err := s.layPassage(s.work, g, to); err != nil {
					s.layPassageAgain(g, taker, err)
				}
			})
		}
	}
}

// layPassage makes a passage. Its ends are the generations' own from then on: one that
// takes hears of the end of whoever gives, and the other way round.
func (s *Supervisor) layPassage(ctx context.Context, from, to *generation) error {
	takes, gives, err := control.Ends()
	if err != nil {
		return err
	}
	defer control.CloseAll([]int{gives})
	_, err = to.ask(ctx, control.Message{Type: control.TypeTake}, answerTimeout, takes)
	control.CloseAll([]int{takes}) // before anything is given: nobody else keeps open what nobody takes from
	if err != nil {
		return fmt.Errorf("generation %d does not take them: %w", to.number, err)
	}
	_, err = from.ask(ctx, control.Message{Type: control.TypeGive}, answerTimeout, gives)
	return err
}

// layPassageAgain does so in a while: one that has just been told to drain may not have
// heard it yet, and one that does not answer may do so later.
func (s *Supervisor) layPassageAgain(g *generation, taker int, err error) {
	var pause time.Duration
	s.do(func() {
		pause = min(moveAgainAfter<<min(g.passageFailures, 10), mostPassagePause)
		g.passageFailures++
		if g.state == draining && s.work.Err() == nil {
			g.log.Warn("generation cannot give its idle connections away; trying again", "to_generation", taker, "in", pause, "err", err)
		}
	})
	if sleep(s.work, pause) {
		s.do(func() {
			if g.givesTo == taker {
				g.givesTo = 0
				s.retarget()
			}
		})
	}
}
