package supervisor

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/socket"
	"holdfast/internal/vault"
)

// What becomes of the tunnels of a generation that dies, and how those of one that drains
// get to the one that serves. What a tunnel is, only generations know; what is kept of
// them, package vault does.

// vaultReserve is how many descriptors deposits leave for everything else.
const vaultReserve = 256

// When tunnels are cut that nobody goes on with, so that their peers learn of it instead of
// waiting for ever: when a process has come to an end by itself for so many times in a row,
// soon after it had them, or when none could be started for so long.
const (
	mostDeaths     = 12
	resumePatience = 10 * time.Minute
)

// A bequest is what a dead generation has left until another one has it.
type bequest struct {
	release *release
	failing bool // the last attempt has failed
}

// expectDeposits tells the vault which generations another supervisor has left, before any
// of them has said which tunnels it has.
func (s *Supervisor) expectDeposits(in *inheritance) {
	var all []int
	for _, v := range in.visitors {
		all = append(all, v.number)
	}
	for _, g := range in.absent {
		all = append(all, g.Number)
	}
	s.vault.Expect(all)
}

// handVault gives g a vault channel, if it knows what that is. Tunnels of a generation
// without one end with it.
func (s *Supervisor) handVault(g *generation, send sender) error {
	if !g.keepsTunnels() {
		s.vault.Without(g.number)
		return nil
	}
	ours, theirs, err := s.kernel.ends()
	if err != nil {
		return err
	}
	defer control.CloseAll([]int{theirs})
	conn, err := control.NewVault(ours)
	if err != nil {
		return err
	}
	s.vault.Open(g.number, conn)
	return send(&control.Message{Type: control.TypeVault}, theirs)
}

// onVaultLost gives a generation another vault channel whose own had to be closed.
func (s *Supervisor) onVaultLost(number int) {
	go s.do(func() {
		if g := s.living[number]; g != nil && g.state != stopping && !s.stopping && !s.succeeded {
			s.workers.Go(func() {
				if err := s.handVault(g, g.send); err != nil {
					g.log.Warn("generation cannot be given another vault channel", "err", err)
				}
			})
		}
	})
}

// keepsTunnels says whether g is of a build whose tunnels the vault can keep.
func (g *generation) keepsTunnels() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.vaultVersion == control.VaultVersion
}

// mourn is called when g is gone, and what it had with it. The tunnels that it had deposited
// are resumed by another generation, apart from one that ended as it should: what is left
// of that has ended, too. Called in the loop.
func (s *Supervisor) mourn(g *generation, lost losses) {
	if !g.keepsTunnels() && s.vault.Deposits(g.number) == 0 {
		s.vault.Without(g.number)
		s.stats.tunnelsLost.Add(uint64(lost.tunnels))
		return
	}
	bereft := g.how != endedWell && !s.stopping
	if bereft && s.upgrading != nil && !s.upgrading.committing && s.vault.Deposits(g.number) > 0 {
		s.upgrading.cancel(errors.New("tunnels of a generation that has died are to be resumed first"))
	}
	s.resuming[g.number] = &bequest{release: g.release}
	s.workers.Go(func() {
		left := s.vault.Died(g.number, endedFromOutside(g.how))
		lost.moved -= g.movedBefore
		s.stats.tunnelsLost.Add(lost.tunnelsFor(left, s.vault.MovedFrom(g.number)))
		if bereft && left > 0 {
			s.resumeTunnels(g, left)
		}
		s.vault.Drop(g.number)
		s.do(func() {
			delete(s.resuming, g.number)
			s.closeUnused(g.release)
			if len(s.resuming) == 0 {
				s.settled()
			}
		})
	})
}

// bereft is how many tunnels have no process at present. Called in the loop.
func (s *Supervisor) bereft() (tunnels int) {
	for number := range s.resuming {
		tunnels += s.vault.Deposits(number)
	}
	return tunnels
}

// endedFromOutside says whether nothing that the process did itself can have ended it, as
// far as is known: then no tunnel is suspected.
func endedFromOutside(how string) bool {
	return how == "signal: "+syscall.SIGKILL.String() || how == endedUnseen
}

// mournUnmet is mourn for a generation of which only the vault knows: it has died between
// its deposits and its adoption. Called in the loop.
func (s *Supervisor) mournUnmet(number int) {
	g := &generation{number: number, release: unknownRelease(), how: endedUnseen, vaultVersion: control.VaultVersion, log: s.log.With("of_generation", number)}
	s.mourn(g, losses{})
}

// resumeTunnels tries until another generation has the tunnels that dead has left, or the
// service ends. Meanwhile their peers wait. A supervisor that may still be discarded does
// not begin: its predecessor would do the same.
func (s *Supervisor) resumeTunnels(dead *generation, tunnels int) {
	failures, deaths, patience := 0, 0, time.Duration(0)
	s.do(func() {
		failures, patience = dead.bequests, s.patience
		_, deaths = dead.bequeaths()
	})
	var since time.Time // the first attempt
	for ; deaths < mostDeaths && (since.IsZero() || time.Since(since) < patience); failures++ {
		if s.awaitBegin(s.work) != nil || !sleep(s.work, backOff(failures)) || s.awaitUpgrade() != nil {
			return
		}
		began := time.Now()
		if since.IsZero() {
			since = began
		}
		heir, err := s.resumeOnce(s.work, dead)
		if err == nil {
			s.stats.resumed.Inc()
			heir.log.Warn("generation resumes the tunnels of one that has died", "of_dead_generation", dead.number, "tunnels", tunnels, "took", time.Since(began))
			return
		}
		if s.work.Err() != nil {
			return
		}
		s.stats.resumeFailures.Inc()
		dead.log.Error("its tunnels cannot be resumed; trying again", "tunnels", tunnels, "err", err)
		s.do(func() {
			s.resuming[dead.number].failing = true
			s.refuseUpgrade()
		})
	}
	dead.log.Error("its tunnels cannot be resumed: they are cut", "tunnels", tunnels, "attempts", failures)
	s.stats.tunnelsLost.Add(uint64(tunnels))
	s.vault.Cut(dead.number)
}

// refuseUpgrade lets one that waits begin, which is refused while an attempt fails: not
// even a reload would go on otherwise. Called in the loop.
func (s *Supervisor) refuseUpgrade() {
	if s.upgradeAsked {
		s.settled()
	}
}

// unresumed says whose tunnels cannot be resumed at present; 0: nobody's. Called in the
// loop.
func (s *Supervisor) unresumed() int {
	for number, b := range s.resuming {
		if b.failing {
			return number
		}
	}
	return 0
}

// resumeOnce starts a generation of the release of dead, which never accepts, and gives
// it the tunnels. Without an error they are its: should it die, that is the next case.
func (s *Supervisor) resumeOnce(ctx context.Context, dead *generation) (*generation, error) {
	p := &plan{sockets: make(map[string]*socket.Socket), resumes: dead.number}
	s.do(func() {
		if p.release = dead.release; !p.release.startable() {
			p.release = s.pinned
		}
	})
	if p.release == nil {
		return nil, errors.New("there is nothing to start a generation from")
	}
	heir, err := s.launch(ctx, p)
	if err != nil {
		return nil, err
	}
	s.do(func() {
		heir.bequests, heir.deaths = dead.bequeaths()
	})
	if err = s.bequeath(ctx, dead, heir); err != nil {
		_ = heir.kill(context.Background()) // logs what goes wrong
		return nil, err
	}
	return heir, nil
}

// bequeaths returns how many generations in a row, with g the last of them, have died soon,
// and of how many that was their own doing. Called in the loop.
func (g *generation) bequeaths() (bequests, deaths int) {
	switch {
	case time.Since(g.started) >= steadyAfter:
		return 0, 0
	case endedFromOutside(g.how):
		return g.bequests + 1, g.deaths
	}
	return g.bequests + 1, g.deaths + 1
}

// bequeath gives the tunnels of dead to heir. With an error they are still dead's.
func (s *Supervisor) bequeath(ctx context.Context, dead, heir *generation) error {
	if _, err := heir.ask(ctx, control.Message{Type: control.TypeResume}, answerTimeout); err != nil {
		return err
	}
	drains := false
	s.do(func() { drains = s.move(heir, evDrain) })
	if !drains {
		return fmt.Errorf("generation %d has ended", heir.number)
	}
	err := s.vault.HandTunnels(dead.number, heir.number)
	if err == nil || errors.Is(err, vault.ErrNoChannel) {
		return err
	}
	heir.log.Error("generation does not take the tunnels that it is to resume", "err", err)
	_ = heir.kill(context.Background()) // logs what goes wrong
	return nil                          // they are the heir's: its death is the next case
}

// moveAgainAfter is how long a generation is left alone that could not be told to move.
const moveAgainAfter = time.Second

// retarget has the tunnels that draining generations release, and their idle connections,
// go to the generation that serves, once it has passed probation. A supervisor that may
// still be discarded has none move: its predecessor would not know where they are. Called
// in the loop.
func (s *Supervisor) retarget() {
	to := s.serving
	if to != s.passed || !s.hasBegun() || s.upgrading != nil || s.stopping {
		to = nil
	}
	s.layPassages(to)
	target := 0
	if to != nil && to.keepsTunnels() {
		target = to.number
	}
	if target != s.target {
		s.target = target
		s.vault.Target(target)
	}
	if target == 0 {
		return
	}
	for _, g := range s.living {
		if g.state == draining && g.movesTo != target && g.keepsTunnels() {
			g.movesTo = target
			all := g.movesAll
			s.workers.Go(func() {
				// One that has just been told to drain may not have heard it yet.
				if s.askToMove(s.work, g, all) != nil && sleep(s.work, moveAgainAfter) {
					s.do(func() {
						g.movesTo = 0
						s.retarget()
					})
				}
			})
		}
	}
}

// askToMove tells g to release tunnels: those that are configured so, or all.
func (s *Supervisor) askToMove(ctx context.Context, g *generation, all bool) error {
	_, err := g.ask(ctx, control.Message{Type: control.TypeMove, All: all}, answerTimeout)
	if err != nil {
		g.log.Warn("generation cannot be told to move its tunnels", "err", err)
	}
	if errors.Is(err, errSilent) {
		return fmt.Errorf("%w: %w", ErrUnanswered, err)
	}
	return err
}

// MoveTunnels implements [Commands].
func (s *Supervisor) MoveTunnels(ctx context.Context, number int) error {
	var g *generation
	var refused error
	if err := s.change(ctx, func() {
		g = s.living[number]
		switch {
		case g == nil:
			refused = notFound(number)
		case g == s.serving:
			refused = fmt.Errorf("generation %d serves: tunnels are moved from one that drains", number)
		case g.state != draining:
			refused = fmt.Errorf("generation %d is %s", number, g.state)
		case s.probation != nil:
			refused = fmt.Errorf("generation %d, which serves, is on probation until %s", s.serving.number, s.probation.until.Format(time.TimeOnly))
		case s.target == 0:
			refused = errors.New("no generation serves that could take them")
		case !g.keepsTunnels():
			refused = fmt.Errorf("generation %d is of a build whose tunnels cannot be moved", number)
		default:
			g.movesAll = true
		}
	}); err != nil {
		return err
	}
	if refused != nil {
		return refused
	}
	return s.askToMove(ctx, g, true)
}

// depositsTimeout bounds how long a candidate waits until a generation has deposited its
// tunnels once more. What comes later is deposited, too, but until then dies with it.
const depositsTimeout = 5 * time.Second

// awaitDeposits opens the vault channel of a generation that a predecessor hands over, and
// waits until all of its tunnels are deposited here, too: then there is no moment in which
// it may not die.
func (s *Supervisor) awaitDeposits(generation, fd int) {
	conn, err := control.NewVault(fd)
	if err == nil {
		s.vault.Open(generation, conn)
		ctx, cancel := context.WithTimeout(s.work, depositsTimeout)
		defer cancel()
		err = s.vault.Await(ctx, generation)
	}
	if err != nil {
		s.log.Warn("a generation has not deposited its tunnels with its next supervisor in time", "of_generation", generation, "err", err)
	}
}
