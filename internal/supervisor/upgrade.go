package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/runtimedir"
	"holdfast/internal/version"
)

// errUpgrading refuses what would change something while a candidate learns how things
// are.
var errUpgrading = errors.New("an upgrade of the supervisor is under way: ask again when it is over")

// upgrading is an upgrade that is under way. From its beginning to its end no other
// change is: what comes meanwhile waits, or is refused.
type upgrading struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	over   chan struct{} // closed at its end

	// committing: the candidate may command already. What happens to generations is its
	// business then, unless it comes to nothing after all.
	committing bool
}

type upgradeOutcome struct {
	result *UpgradeResult
	err    error
}

// Upgrade implements [Commands].
func (s *Supervisor) Upgrade(ctx context.Context) (*UpgradeResult, error) {
	if err := s.awaitBegin(ctx); err != nil {
		return nil, err
	}
	u, err := s.beginUpgrade(ctx)
	if err != nil {
		return nil, err
	}
	outcome := make(chan upgradeOutcome, 1)
	s.workers.Go(func() {
		result, err := s.upgrade(u)
		outcome <- upgradeOutcome{result, err}
		if err == nil {
			s.resign()
		}
	})
	select {
	case o := <-outcome:
		return o.result, o.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// beginUpgrade waits until no other change is under way, and keeps the next one off.
func (s *Supervisor) beginUpgrade(ctx context.Context) (u *upgrading, err error) {
	asked := false
	defer func() {
		if asked && u == nil {
			s.do(func() {
				s.upgradeAsked = false
				s.settled()
			})
		}
	}()
	for {
		var wait chan struct{}
		if gone := s.try(ctx, func() {
			unresumed := s.unresumed()
			switch {
			case s.stopping:
				err = ErrStopping
			case s.opts.Successor == nil:
				err = refuse("upgrade", errors.New("this supervisor cannot be upgraded"))
			case s.upgrading != nil || s.upgradeAsked && !asked:
				err = refuse("upgrade", errors.New("another upgrade is under way"))
			case unresumed != 0:
				err = refuse("upgrade", fmt.Errorf("tunnels of generation %d, which has died, are not resumed yet: see the log", unresumed))
			case s.reloading || s.restoring || len(s.resuming) > 0:
				asked, s.upgradeAsked = true, true
				wait = make(chan struct{})
				s.quiet = append(s.quiet, wait)
			case s.serving == nil:
				err = refuse("upgrade", errors.New("no generation serves"))
			default:
				asked, s.upgradeAsked = false, false
				u = &upgrading{over: make(chan struct{})}
				u.ctx, u.cancel = context.WithCancelCause(s.work)
				s.upgrading = u
				s.retarget() // nothing is on its way from one to another when the successor asks
			}
		}); gone != nil {
			return nil, gone
		}
		if wait == nil {
			return u, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// settled is called when a change is over: the next one begins. Called in the loop.
func (s *Supervisor) settled() {
	for _, w := range s.quiet {
		close(w)
	}
	s.quiet = nil
	s.ensureServing()
	s.nextReload()
}

// upgrade has a new process take this one's place. With an error this one commands, as
// before.
func (s *Supervisor) upgrade(u *upgrading) (*UpgradeResult, error) {
	began := time.Now()
	s.log.Info("upgrading the supervisor")
	err := s.headroomForUpgrade()
	var successor Successor
	if err == nil {
		successor, err = s.opts.Successor(u.ctx)
	}
	if err == nil {
		if err = s.handOver(u, successor); err != nil {
			if dead := successor.Discard(); dead != nil {
				s.log.Error("the candidate is not dead for certain", "pid", successor.PID(), "err", dead)
			}
		}
	}
	if err != nil {
		if cause := context.Cause(u.ctx); cause != nil {
			err = cause // it was given up
		}
		s.reclaim(u)
		u.cancel(nil) // nobody waits for it any more
		s.stats.upgradesRefused.Inc()
		s.log.Error("upgrade refused; nothing has changed", "err", err)
		if errors.Is(err, ErrStopping) {
			return nil, ErrStopping
		}
		return nil, refuse("upgrade", err)
	}
	s.do(func() { s.succeeded = true })
	successor.Farewell(context.WithoutCancel(u.ctx))
	result := &UpgradeResult{PID: successor.PID(), Version: successor.Version(), Previous: version.String(), Duration: time.Since(began)}
	s.log.Info("upgraded: another supervisor commands", "successor_pid", result.PID, "version", result.Version, "took", result.Duration)
	return result, nil
}

// headroomForUpgrade says whether there are descriptors for channels to the candidate
// and the generations.
func (s *Supervisor) headroomForUpgrade() (err error) {
	s.do(func() { err = freeDescriptors(surfaceDescriptors + generationDescriptors + 2*len(s.living)) })
	return err
}

// handOver gives the successor all that it needs, and then the command.
func (s *Supervisor) handOver(u *upgrading, successor Successor) error {
	err := s.vault.Settle(u.ctx) // nothing is released to anybody since the upgrade began
	if err != nil {
		return err
	}
	estate, fds, err := s.offer(u.ctx)
	defer closeEnds(fds)
	if err == nil {
		err = successor.Offer(u.ctx, estate, descriptorsOf(fds))
	}
	if err == nil {
		s.do(func() { u.committing = true })
		err = context.Cause(u.ctx) // what was offered may not be so any more
	}
	if err == nil {
		err = successor.Commit(u.ctx)
	}
	return err
}

// An offered descriptor is one of those for the successor.
type offered struct {
	fd   int
	ours bool // only made to be handed over
}

func closeEnds(fds map[string]offered) {
	for _, o := range fds {
		if o.ours {
			control.CloseAll([]int{o.fd})
		}
	}
}

func descriptorsOf(fds map[string]offered) map[string]int {
	all := make(map[string]int, len(fds))
	for key, o := range fds {
		all[key] = o.fd
	}
	return all
}

// The keys of channels to generations, with the number behind.
const (
	estateGeneration = "generation "
	estateVault      = "vault "
)

// offer gathers what a successor gets, and prepares the generations for it.
func (s *Supervisor) offer(ctx context.Context) (*control.Estate, map[string]offered, error) {
	estate := new(control.Estate)
	fds := make(map[string]offered)
	for key, fd := range s.files() {
		fds[key] = offered{fd: fd}
	}
	var all []*generation
	var serving *generation
	s.do(func() {
		estate.Epoch, estate.Last = s.epoch+1, s.numbers
		all, serving = s.newestFirst(), s.serving
		if s.probation != nil {
			s.log.Info("the probation that is under way counts as passed once the successor commands")
		}
		for _, g := range all {
			estate.Generations = append(estate.Generations, control.EstateGeneration{Number: g.number, PID: g.identity.PID, State: g.state.String(), Version: g.versionNow()})
		}
		for key, h := range s.open {
			fds[storedListener+key] = offered{fd: h.FD()}
		}
	})
	var mu sync.Mutex
	var preparing sync.WaitGroup
	var failed error
	for _, g := range all {
		preparing.Go(func() {
			ends, err := s.prepareFor(ctx, g, estate.Epoch)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				for i, end := range ends {
					fds[[]string{estateGeneration, estateVault}[i]+strconv.Itoa(g.number)] = offered{end, true}
				}
			case g == serving:
				failed = fmt.Errorf("the serving generation cannot be handed over: %w", err)
			case s.vault.Deposits(g.number) > 0: // if it died before the successor has others, they would be lost
				failed = fmt.Errorf("generation %d, which has tunnels, cannot be handed over now: %w", g.number, err)
			default:
				g.log.Warn("generation cannot be handed over now; it will look for the successor itself", "err", err)
			}
		})
	}
	preparing.Wait()
	return estate, fds, failed
}

// prepareFor gives g another channel, on which a supervisor of the epoch may adopt it,
// and another vault channel if it knows what that is. It returns that one's ends.
func (s *Supervisor) prepareFor(ctx context.Context, g *generation, epoch uint64) (ends []int, err error) {
	wanted := 1
	if g.keepsTunnels() {
		wanted = 2
	}
	var theirs []int
	defer func() { control.CloseAll(theirs) }()
	for range wanted {
		a, b, err := s.kernel.ends()
		if err != nil {
			control.CloseAll(ends)
			return nil, err
		}
		ends, theirs = append(ends, a), append(theirs, b)
	}
	if _, err = g.ask(ctx, control.Message{Type: control.TypePrepare, Epoch: epoch}, answerTimeout, theirs...); err != nil {
		control.CloseAll(ends)
		return nil, err
	}
	return ends, nil
}

// reclaim ends an upgrade that came to nothing. The candidate is dead, but some
// generations may have obeyed it: those come to the rendezvous, all others hear at once
// whom they obey.
func (s *Supervisor) reclaim(u *upgrading) {
	var all []*generation
	s.do(func() {
		s.epoch += 2 // the candidate's was the next
		s.upgrading = nil
		s.note()
		for _, g := range s.newestFirst() {
			g.movesTo = 0 // it may have obeyed the candidate, and have forgotten
			ch, heard := g.channel()
			if ch == (unattached{}) {
				continue // it was absent before, and may be for as long as it likes
			}
			select {
			case <-heard:
				s.expect(g)
			default:
				all = append(all, g)
			}
		}
		close(u.over)
		s.retarget()
	})
	s.commandAll(all)
	s.do(func() {
		if s.upgrading == nil {
			s.settled()
		}
	})
}

// resign ends the loop and leaves everything as it is: another supervisor commands.
func (s *Supervisor) resign() {
	s.do(func() {
		s.succeeded = true
		s.accepting.Store(false)
		s.alive.Store(false)
		s.stopWork(ErrSucceeded)
		for _, g := range s.living {
			g.closeChannel()
		}
		for _, c := range slices.Concat(s.waiting, s.backing) {
			c <- reloadOutcome{err: ErrSucceeded}
		}
		s.waiting, s.backing = nil, nil
		if s.upgrading != nil {
			close(s.upgrading.over)
			s.upgrading = nil
		}
	})
	s.endLoop()
}

// endLoop ends the loop, once.
func (s *Supervisor) endLoop() {
	select {
	case s.inbox <- nil:
	case <-s.ended:
	}
}

// succeed takes the place of a predecessor that lives and helps. The error is always
// [ErrSucceeded]: whoever commands, it is not this one.
func (s *Supervisor) succeed() error {
	p := s.opts.Predecessor
	estate, fds := p.Estate()
	in, err := s.inherit(estate, fds)
	if err == nil {
		// Whoever upgrades must be able to reload afterwards.
		_, err = s.checkFile()
	}
	if err != nil {
		s.log.Error("this supervisor cannot succeed", "err", err)
		p.Refuse(err)
	} else if err = p.Prepared(); err != nil {
		s.log.Warn("this supervisor is not wanted any more", "err", err)
	}
	if err != nil {
		for _, v := range in.visitors {
			v.close()
		}
		dropAll(fds)
		return ErrSucceeded
	}
	in.legacy = s.legacyFrom("the predecessor", fds)
	s.takeOver(in)
	s.do(func() {
		for _, g := range estate.Generations {
			if s.living[g.Number] == nil && s.resuming[g.Number] == nil {
				s.mournUnmet(g.Number)
			}
		}
	})
	dropAll(fds)
	s.stats.upgradesDone.Inc()
	if s.opts.Rendezvous != nil {
		s.workers.Go(s.meetAtRendezvous)
	}
	if err := p.Committed(); err != nil {
		s.log.Error("this supervisor leaves the generations to another one", "err", err)
		return ErrSucceeded
	}
	return nil
}

// inherit meets every generation that the predecessor hands over. It changes nothing.
func (s *Supervisor) inherit(estate *control.Estate, fds map[string]int) (*inheritance, error) {
	in := &inheritance{epoch: estate.Epoch, counts: make(map[int]*metrics.File)}
	listeners := takeListeners(fds)
	s.do(func() {
		s.numbers = max(s.numbers, estate.Last)
		s.leave(listeners)
	})
	var mu sync.Mutex
	var meetings sync.WaitGroup
	var refusal error
	deposits := make(map[int]int) // ends of vault channels
	for _, g := range estate.Generations {
		fd, there := takeKey(fds, estateGeneration+strconv.Itoa(g.Number))
		if end, keeps := takeKey(fds, estateVault+strconv.Itoa(g.Number)); keeps {
			deposits[g.Number] = end
		}
		meetings.Go(func() {
			v, err := s.meetOffered(g, fd, there)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				in.visitors = append(in.visitors, v)
				if g.State == serving.String() && v.problem != nil {
					refusal = fmt.Errorf("what serves cannot be taken over: %w", v.problem)
				}
			case g.State == serving.String():
				refusal = err
			default:
				s.log.Warn("a generation is not handed over; it is adopted when it comes", "err", err)
				if id, err := s.kernel.identify(g.PID); err == nil {
					in.absent = append(in.absent, runtimedir.Generation{Number: g.Number, Identity: id, State: g.State})
				}
			}
		})
	}
	meetings.Wait()
	s.expectDeposits(in)
	for generation, fd := range deposits {
		meetings.Go(func() { s.awaitDeposits(generation, fd) })
	}
	meetings.Wait()
	return in, refusal
}

func takeKey(fds map[string]int, key string) (fd int, there bool) {
	fd, there = fds[key]
	delete(fds, key)
	return fd, there
}

func (s *Supervisor) meetOffered(g control.EstateGeneration, fd int, there bool) (*visitor, error) {
	if !there {
		return nil, fmt.Errorf("generation %d has no channel for us", g.Number)
	}
	ch, err := s.kernel.channel(fd)
	if err != nil {
		return nil, err
	}
	return s.meet(ch, g.Number, g.PID, g.Version)
}
