package supervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
	"holdfast/internal/runtimedir"
)

// reuniteTimeout is how long the start waits for generations that live and have not
// come. They look for a supervisor at least twice a second.
const reuniteTimeout = 5 * time.Second

// unknownTimeout is how long it waits where nobody knows whether any live.
const unknownTimeout = 2 * time.Second

// begin adopts what another supervisor has left, and has something serve. With an error
// nothing does, or, if it is [ErrSucceeded], others command.
func (s *Supervisor) begin(ctx context.Context) (err error) {
	if s.opts.Predecessor != nil {
		err = s.succeed()
	} else {
		s.resume(ctx)
	}
	if err != nil {
		return err
	}
	serves := false
	s.do(func() {
		if serves = s.serving != nil; serves {
			s.forgetLeft()
			s.enter(Serving)
		}
	})
	close(s.begun)
	s.do(func() {
		s.retarget()
		if serves && !s.stopping { // a stop waits for workers: those that it can know of
			s.workers.Go(s.complain)
		}
	})
	if serves {
		return nil
	}
	return s.startServing(ctx)
}

// hasBegun says whether what was found at the start is adopted, for certain.
func (s *Supervisor) hasBegun() bool {
	select {
	case <-s.begun:
		return true
	default:
		return false
	}
}

// awaitBegin waits until what was found at the start is adopted.
func (s *Supervisor) awaitBegin(ctx context.Context) error {
	select {
	case <-s.begun:
		return nil
	case <-s.ended:
		return ErrStopping
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// startServing puts the file into service. While generations live that another
// supervisor has left, it does not give up: they have clients.
func (s *Supervisor) startServing(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		s.do(func() { s.beginning = true })
		_, err := s.Reload(ctx, false)
		mended, orphans := false, 0
		s.do(func() {
			orphans = len(s.living)
			if err != nil {
				s.fallBack()
			}
			mended = err == nil || s.serving != nil || s.pinned != nil
			s.ensureServing() // with what an adopted generation was started from, where there is one
		})
		switch {
		case mended:
			return nil
		case orphans == 0 || errors.Is(err, ErrStopping):
			return err
		}
		s.log.Error("nothing serves, but generations of another supervisor live; trying again", "generations", orphans, "err", err)
		if !sleep(s.work, backOff(attempt+1)) {
			return ErrStopping
		}
		s.do(func() { mended = s.serving != nil }) // one of them has come
		if mended {
			return nil
		}
	}
}

// complain says what is wrong with the configuration file, which nobody has asked for
// to be put into service.
func (s *Supervisor) complain() {
	serves := ""
	s.do(func() { serves = s.hash() })
	hash, err := s.checkFile()
	switch {
	case s.work.Err() != nil:
	case err != nil:
		s.log.Error("what served is adopted and serves on, but the configuration file would be refused", "err", err)
	case hash != serves:
		s.log.Warn("what served is adopted and serves on; the configuration file is another one: reload puts it into service")
	}
}

// checkFile does what a reload of the file as it is would begin with, and returns its
// hash. It changes nothing.
func (s *Supervisor) checkFile() (hash string, err error) {
	r, err := loadRelease(s.work, s.opts.ConfigPath, s.opts.DefaultProxy)
	if err != nil {
		return "", err
	}
	defer r.close()
	return r.hash, s.kernel.check(s.work, r)
}

// An inheritance is all that a supervisor finds of an earlier one.
type inheritance struct {
	legacy
	epoch    uint64 // that it is to have at least
	visitors []*visitor
	absent   []runtimedir.Generation // that live and have not come
	counts   map[int]*metrics.File   // what generations count in that do not come, by number
}

// resume adopts what a supervisor has left that did not end in order.
func (s *Supervisor) resume(ctx context.Context) {
	var in inheritance
	state, wait := s.remembered()
	in.epoch = state.Epoch + 1
	stored := s.sortStored(&in)
	in.legacy = s.legacyFrom("the service manager", stored)
	trusted := in.facts.Epoch > 0 // no generation could have put it there
	expected, doubtful := s.expected(state)
	if doubtful {
		wait = unknownTimeout
	}
	if s.opts.Rendezvous != nil {
		s.workers.Go(s.meetAtRendezvous)
	}
	in.visitors = s.gather(ctx, expected, wait)
	most := uint64(mostEpoch)
	if state.Epoch > 0 {
		most = state.Epoch + mostAhead
	}
	s.believe(&in, in.visitors, trusted, most)
	if wait == 0 && (in.facts.Last > state.Last || in.facts.Epoch > state.Epoch) {
		s.log.Warn("what another supervisor has written down is out of date; generations are adopted as they come", "last", state.Last, "known_last", in.facts.Last)
		more := s.gather(ctx, nil, unknownTimeout)
		for _, v := range more {
			delete(expected, v.number)
		}
		s.believe(&in, more, trusted, most)
		in.visitors = append(in.visitors, more...)
	}
	for _, g := range expected {
		in.absent = append(in.absent, g.Generation)
	}
	in.epoch = max(in.epoch, in.facts.Epoch+1)
	s.expectDeposits(&in)
	s.takeOver(&in)
	dropAll(stored)
}

// believe learns from the visitors which epoch is taken, and where nothing better is
// known, what a supervisor has left with them. One of an epoch above most will not obey,
// nor is it believed anything.
func (s *Supervisor) believe(in *inheritance, visitors []*visitor, trusted bool, most uint64) {
	for _, v := range visitors {
		if v.report.Epoch > most {
			continue
		}
		in.epoch = max(in.epoch, v.report.Epoch+1)
		if l := s.legacyFrom(fmt.Sprintf("generation %d", v.number), v.kept); !trusted && l.facts.Epoch > in.facts.Epoch && l.facts.Epoch <= most {
			in.legacy = l
		}
	}
}

// remembered is what is written down in the runtime directory, and how long to wait for
// generations that nothing is written about.
func (s *Supervisor) remembered() (state *runtimedir.State, wait time.Duration) {
	if s.opts.Directory == nil {
		return new(runtimedir.State), 0
	}
	state, err := s.opts.Directory.LoadState()
	if err != nil {
		s.log.Error("what another supervisor has written down is of no use; generations are adopted as they come", "err", err)
	}
	if s.opts.Fresh && (err != nil || state != nil && len(state.Generations) > 0) {
		s.log.Error("the secret of the runtime directory was lost: generations that live cannot prove who they are, and are not adopted; end them by `holdfast kill`")
	}
	if state == nil {
		state = new(runtimedir.State)
		if !s.opts.Fresh {
			wait = unknownTimeout
		}
	}
	s.do(func() { s.numbers = max(s.numbers, state.Last) })
	return state, wait
}

// sortStored takes out of the store what is not an estate's. Listening sockets are left
// to us, memory files of generations are in's.
func (s *Supervisor) sortStored(in *inheritance) (estate map[string]int) {
	estate = maps.Clone(s.opts.Stored)
	in.counts = make(map[int]*metrics.File)
	listeners := takeListeners(estate)
	for key, fd := range estate {
		n, ok := strings.CutPrefix(key, storedCounts)
		if !ok {
			continue
		}
		delete(estate, key)
		number, err := strconv.Atoi(n)
		f, bad := metrics.OpenFile(fd)
		if err = errors.Join(err, bad); err != nil {
			s.log.Error("what a generation has counted cannot be read", "key", key, "err", err)
			s.withdraw(key)
			continue
		}
		in.counts[number] = f
	}
	s.do(func() { s.leave(listeners) })
	return estate
}

// legacyFrom reads an estate, whose descriptors stay its owner's.
func (s *Supervisor) legacyFrom(whose string, fds map[string]int) legacy {
	l, err := legacyIn(fds, s.kernel.uptime())
	if err != nil {
		s.log.Error("the ledger of another supervisor cannot be read", "kept_by", whose, "err", err)
	}
	return l
}

// An expected generation is one that was alive when its state was written down, and is.
type expected struct {
	runtimedir.Generation
	process process
}

// expected returns the generations of state that live, by number. It is doubtful where
// other processes have numbers that are in it.
func (s *Supervisor) expected(state *runtimedir.State) (alive map[int]*expected, doubtful bool) {
	alive = make(map[int]*expected)
	for _, g := range state.Generations {
		p, err := s.kernel.find(g.Identity)
		if err == nil {
			alive[g.Number] = &expected{g, p}
			continue
		}
		now, none := s.kernel.identify(g.PID)
		reused := none == nil && now.Start != g.Start
		doubtful = doubtful || reused
		s.log.Warn("a generation of another supervisor is gone", "of_generation", g.Number, "of_pid", g.PID, "number_is_reused", reused, "err", err)
	}
	return alive, doubtful
}

// meetAtRendezvous takes in whoever comes there until the service ends.
func (s *Supervisor) meetAtRendezvous() {
	key := func(generation int) []byte { return control.GenerationKey(s.opts.Secret, generation) }
	s.opts.Rendezvous.Serve(s.work, key, s.log, func(c *control.Conn, hello *control.Hello) { s.arrive(c, hello) })
}

// gather waits until those that are expected, by number, have arrived or are gone, for
// no longer than a while, and in any case for as long as wait. What is left in expected
// has not come.
func (s *Supervisor) gather(ctx context.Context, expected map[int]*expected, wait time.Duration) (all []*visitor) {
	gone := make(chan int)
	over := make(chan struct{})
	defer close(over)
	for n, g := range expected {
		defer closeProcess(g.process)
		go func() {
			g.process.Wait()
			select {
			case gone <- n:
			case <-over:
			}
		}()
	}
	limit, least := time.NewTimer(reuniteTimeout), time.NewTimer(wait)
	defer limit.Stop()
	defer least.Stop()
	waited := wait == 0
	for len(expected) > 0 || !waited {
		select {
		case <-least.C:
			waited = true
		case v := <-s.arrivals:
			if g := expected[v.number]; g != nil && g.PID != v.identity.PID {
				s.log.Warn("a generation is not adopted", "generation", v.number, "pid", v.identity.PID, "err", errStranger)
				v.close()
				continue
			}
			if i := slices.IndexFunc(all, func(o *visitor) bool { return o.number == v.number }); i >= 0 {
				all[i].close() // it has come once more
				all = slices.Delete(all, i, i+1)
			}
			all = append(all, v)
			delete(expected, v.number)
		case n := <-gone:
			delete(expected, n)
		case <-limit.C:
			return all
		case <-s.work.Done():
			return all
		case <-ctx.Done():
			return all
		}
	}
	return all
}

// takeOver makes what was found ours: the facts first, then the generations, the newest
// one first, so that of two that serve it stays.
func (s *Supervisor) takeOver(in *inheritance) {
	totals := s.restored(in.totals)
	totals.Settled(s.keepTotals)
	s.keepTotals(totals.Export()) // before anybody keeps ours in the place of theirs
	s.carry(in.stats)
	keys, lost := s.ticketsOf(in)
	s.do(func() {
		s.totals = totals
		s.apply(in.legacy)
		s.takeTickets(keys, lost)
		s.epoch = max(s.epoch, in.epoch)
		s.first, s.inherited = s.epoch, in.facts.Epoch
		if err := s.noteFacts(); err != nil {
			s.log.Error("what a successor has to know cannot be written down", "err", err)
		}
		s.depositEstate()
	})
	slices.SortFunc(in.visitors, func(a, b *visitor) int { return b.number - a.number })
	var commands sync.WaitGroup
	refused := make([]error, len(in.visitors))
	for i, v := range in.visitors {
		commands.Go(func() { refused[i] = v.obey(in.epoch) })
	}
	commands.Wait()
	for i, v := range in.visitors {
		if refused[i] != nil {
			s.log.Warn("a generation does not obey", "generation", v.number, "pid", v.identity.PID, "err", refused[i])
			in.absent = append(in.absent, runtimedir.Generation{Number: v.number, Identity: v.identity, State: stateOf(v.report.Phase).String()})
			if v.counts != nil && in.counts[v.number] == nil {
				in.counts[v.number], v.counts = v.counts, nil
			}
			v.close() // it will come again, if it lives
			continue
		}
		var g *generation
		if s.do(func() { g = s.takeIn(v) }); g != nil {
			s.place(v, g)
		}
	}
	var folded []int
	s.do(func() {
		for _, g := range in.absent {
			s.enlistAbsent(g)
		}
		folded = s.addCounts(in.counts)
		s.endAbsent()
		s.note()
	})
	s.settleTotals()
	s.do(func() {
		for _, number := range folded {
			s.withdraw(countsOf(number))
		}
	})
}

// fallBack has the newest of those that were adopted put into service where nothing
// serves and the configuration file does not help. While one that served lives and has
// not come, the addresses are its. Called in the loop.
func (s *Supervisor) fallBack() {
	if s.serving != nil || s.pinned != nil {
		return
	}
	for _, g := range s.living {
		if g.state == serving {
			return
		}
	}
	for _, g := range s.newestFirst() {
		if g.state == draining && g.release.startable() {
			s.process = g.release.config.Process
			s.pass(g)
			return
		}
	}
}

// restored are the totals that an earlier supervisor has exported; of nothing, empty ones.
func (s *Supervisor) restored(export []byte) *merge.Totals {
	totals, err := merge.Restore(export)
	if err != nil {
		s.log.Error("what ended generations have counted is lost in part", "err", err)
	}
	return totals
}

// endAbsent has what generations had counted that live no more become part of the totals.
// Called in the loop.
func (s *Supervisor) endAbsent() {
	for _, number := range s.totals.Absent() {
		if s.living[number] == nil {
			s.totals.End(number)
		}
	}
}

// carry goes on counting where an earlier supervisor has stopped. The descriptor stays
// its owner's.
func (s *Supervisor) carry(fd int) {
	if fd < 0 {
		return
	}
	dup, err := control.Duplicate(fd)
	if err == nil {
		var f *metrics.File
		if f, err = metrics.OpenFile(dup); err == nil {
			families, bad := f.Families()
			s.stats.carry(families)
			err = errors.Join(bad, f.Close())
		}
	}
	if err != nil {
		s.log.Error("what an earlier supervisor has counted cannot all be read", "err", err)
	}
}

func stateOf(p control.Phase) state {
	switch p {
	case control.PhaseServing:
		return serving
	case control.PhaseStopping:
		return stopping
	}
	return draining
}

// enlistAbsent makes a generation one of the living that has not come: it is known by
// its process alone, until it does. Called in the loop.
func (s *Supervisor) enlistAbsent(of runtimedir.Generation) {
	if s.living[of.Number] != nil {
		return
	}
	p, err := s.kernel.find(of.Identity)
	if err != nil {
		return // it has ended meanwhile
	}
	g := newGeneration(of.Number, unknownRelease(), p, unattached{}, s.log)
	g.identity, g.started, g.silent = of.Identity, time.Time{}, true
	g.state = stateNamed(of.State)
	close(g.heard)
	s.enlist(g, nil)
	g.log.Warn("generation lives and does not answer; it is adopted when it does", "state", g.state.String())
}

// addCounts adds up what generations have counted that handed nothing back. It returns
// those that have ended, which become part of the totals. Called in the loop.
func (s *Supervisor) addCounts(files map[int]*metrics.File) (folded []int) {
	for number, f := range files {
		s.numbers = max(s.numbers, number)
		if g := s.living[number]; g == nil {
			s.totals.Add(number, f)
			s.totals.End(number)
			folded = append(folded, number)
		} else if g.counts == nil {
			s.countIn(g, f)
		} else {
			_ = f.Close() // it is the same file
		}
	}
	return folded
}
