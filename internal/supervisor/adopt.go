package supervisor

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/pidfd"
)

// adoptTimeout bounds how long a generation may take to say what it has.
const adoptTimeout = 5 * time.Second

// mostKept is how many descriptors a generation may hand back: one that was taken over
// must not use up ours.
const mostKept = 1024

// A visitor is a generation that has said what it is and has, to a supervisor that does
// not command it yet.
type visitor struct {
	number    int
	proc      process
	identity  pidfd.Identity
	ch        channel
	version   string
	report    control.Report
	release   *release
	back      *release       // what it keeps for a rollback; nil: nothing
	problem   error          // what is wrong with the release
	unknown   bool           // it was none of the living before
	counts    *metrics.File  // nil: it has none that could be read
	moved     int64          // tunnels that have gone elsewhere, under earlier supervisors
	kept      map[string]int // what is left of it
	listeners map[string]int
}

// meet asks the generation at ch what it is and has. It takes ch over, and closes it if
// there is an error.
func (s *Supervisor) meet(ch channel, number, pid int, version string) (*visitor, error) {
	v := &visitor{number: number, ch: ch, version: version, kept: make(map[string]int), listeners: make(map[string]int)}
	limit := time.AfterFunc(adoptTimeout, func() { ch.Close() })
	defer limit.Stop()
	err := fmt.Errorf("%w: a version that cannot be shown", control.ErrProtocol)
	if presentable(version) {
		err = v.interview()
	}
	if err == nil {
		v.proc, v.identity, err = s.identified(pid)
	}
	if err != nil {
		v.close()
		return nil, fmt.Errorf("generation %d (pid %d): %w", number, pid, err)
	}
	v.unpack()
	return v, nil
}

// interview takes what it hands back and its report.
func (v *visitor) interview() error {
	a, err := v.ask(control.Message{Type: control.TypeAdopt, ID: 1})
	if err != nil {
		return err
	}
	if a.Report == nil || a.Report.Generation != v.number || a.Report.Epoch > mostEpoch {
		return fmt.Errorf("%w: no report, or one that cannot be its", control.ErrProtocol)
	}
	v.report = *a.Report
	return nil
}

// ask sends m and takes what comes until its answer.
func (v *visitor) ask(m control.Message) (*control.Message, error) {
	if err := v.ch.Send(&m, sendTimeout); err != nil {
		return nil, err
	}
	for {
		a, fds, err := v.ch.Receive()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.Type, err)
		}
		switch {
		case a.Type == control.TypeAnswer && a.Re == m.ID:
			control.Discard(fds)
			if a.Error != "" {
				return nil, errors.New(oneLine(a.Error))
			}
			return a, nil
		case a.Type == control.TypeListeners:
			err = take(v.listeners, a.Keys, fds)
		case a.Type == control.TypeKept:
			err = take(v.kept, a.Keys, fds)
		default:
			control.Discard(fds)
		}
		if err != nil {
			return nil, err
		}
	}
}

// take adds descriptors to all by their keys.
func take(all map[string]int, keys []string, fds []int) error {
	if len(keys) != len(fds) || len(all)+len(fds) > mostKept {
		control.Discard(fds)
		return fmt.Errorf("%w: %d keys with %d descriptors, after %d", control.ErrProtocol, len(keys), len(fds), len(all))
	}
	for i, key := range keys {
		if old, ok := all[key]; ok {
			control.Discard([]int{old})
		}
		all[key] = fds[i]
	}
	return nil
}

// obey has it commanded over its channel by the supervisor of this epoch.
func (v *visitor) obey(epoch uint64) error {
	limit := time.AfterFunc(answerTimeout, func() { v.ch.Close() })
	defer limit.Stop()
	a, err := v.ask(control.Message{Type: control.TypeObey, ID: 2, Epoch: epoch})
	if err == nil && a.Report != nil { // something may have happened since it was met
		v.report.Phase, v.report.Served = a.Report.Phase, a.Report.Served
	}
	return err
}

// taken returns one of the descriptors that it has kept, which is the caller's then.
func (v *visitor) taken(key string) (fd int, ok bool) {
	fd, ok = v.kept[key]
	delete(v.kept, key)
	return fd, ok
}

// unpack makes a release and a memory file of what it has kept.
func (v *visitor) unpack() {
	v.release, v.problem = v.releaseKept()
	if back, err := v.releaseUnder(unknownRelease(), control.KeptBackBundle, control.KeptBackBinary); err == nil {
		v.back = back
	}
	if fd, ok := v.taken(control.KeptCounts); ok {
		counts, err := metrics.OpenFile(fd)
		if err != nil {
			v.problem = errors.Join(v.problem, err)
			return
		}
		v.counts = counts
		v.moved = lossesIn(counts).moved
	}
}

// releaseKept is what the generation was started from. With an error it is as much of
// that as there is: nothing can be started from it, but the generation can be commanded.
func (v *visitor) releaseKept() (*release, error) {
	r := unknownRelease()
	for key := range v.kept {
		if path, ok := strings.CutPrefix(key, control.KeptLog); ok {
			fd, _ := v.taken(key)
			r.logs.add(path, fd)
		}
	}
	return v.releaseUnder(r, control.KeptBundle, control.KeptBinary)
}

// releaseUnder fills r with what is kept under these keys.
func (v *visitor) releaseUnder(r *release, bundle, binary string) (*release, error) {
	fd, ok := v.taken(bundle)
	if !ok {
		return r, errors.New("it has kept no bundle")
	}
	var b control.Bundle
	if err := control.ReadPayload(fd, &b); err != nil {
		return r, fmt.Errorf("its bundle: %w", err)
	}
	cfg, err := config.ParseSupervisor(b.Path, b.Config)
	if err != nil {
		return r, err
	}
	if fd, ok = v.taken(binary); !ok {
		return r, errors.New("it has kept no binary")
	}
	r.config, r.bytes, r.path, r.hash = cfg, b.Config, b.Path, hashOf(b.Config)
	r.learnt.Store(b.Learnt)
	r.binary = os.NewFile(uintptr(fd), binaryName(fd, cfg))
	return r, nil
}

// binaryName is what a binary that came back is called: where it was, which need not be
// where it is.
func binaryName(fd int, cfg *config.Supervisor) string {
	if name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil {
		return strings.TrimSuffix(name, " (deleted)")
	}
	return cfg.Process.Proxy
}

// unknownRelease is that of a generation that cannot say what it was started from.
func unknownRelease() *release {
	cfg, err := config.ParseSupervisor("", nil)
	if err != nil {
		cfg = new(config.Supervisor) // an empty file is a valid one
	}
	return &release{config: cfg}
}

// startable says whether a generation can be started from r.
func (r *release) startable() bool { return r.binary != nil }

// close lets go of a visitor that is not taken in. It goes on, and will come again.
func (v *visitor) close() {
	go v.ch.Close() // with what was not received; see control.Discard
	v.dropRest()
}

// errStranger refuses a visitor.
var errStranger = errors.New("it is not the generation that has this number")

// arrive takes in a generation that has come to the rendezvous and proved who it is.
// It blocks for as long as nobody decides about it.
func (s *Supervisor) arrive(ch channel, hello *control.Hello) {
	if !s.mayMeet() {
		ch.Close()
		return
	}
	alone := false
	s.do(func() {
		if _, there := s.visiting[hello.Generation]; !there {
			alone, s.visiting[hello.Generation] = true, true
		}
	})
	if !alone {
		go ch.Close() // one visit at a time: it will come again
		return
	}
	defer s.do(func() { delete(s.visiting, hello.Generation) })
	v, err := s.meet(ch, hello.Generation, hello.PID, hello.Version)
	if err != nil {
		s.log.Warn("a generation has come to the rendezvous and is not adopted", "err", err)
		return
	}
	select {
	case s.arrivals <- v:
	case <-s.begun:
		s.adoptLate(v)
	case <-s.ended:
		v.close()
	}
}

// mayMeet waits while an upgrade is under way: what comes meanwhile may be for the
// successor. It says false if it is.
func (s *Supervisor) mayMeet() bool {
	for {
		var u *upgrading
		welcome := false
		s.do(func() { u, welcome = s.upgrading, !s.succeeded })
		if u == nil || !welcome {
			return welcome
		}
		select {
		case <-u.over:
		case <-s.ended:
			return false
		}
	}
}

// adoptLate takes in a generation after the start: one whose channel broke, or that
// did not run while it was waited for.
func (s *Supervisor) adoptLate(v *visitor) {
	err := s.raise(v)
	if err == nil {
		var epoch uint64
		s.do(func() { epoch = s.epoch })
		err = v.obey(epoch)
	}
	s.switchTurn <- struct{}{} // only now: who does not answer holds up nobody
	defer func() { <-s.switchTurn }()
	var g *generation
	if err == nil {
		s.inheritLate(v)
		s.do(func() {
			if err = s.knows(v); err == nil {
				g = s.takeIn(v)
				s.endAbsent() // of what was inherited late
			}
		})
	}
	if g == nil {
		s.log.Warn("a generation is not adopted", "generation", v.number, "pid", v.identity.PID, "err", err)
		v.close()
		return
	}
	s.place(v, g)
}

// inheritLate takes over what an earlier supervisor has left with v, where nobody had it
// at the start: that is so if all who had it did not run then.
func (s *Supervisor) inheritLate(v *visitor) {
	wanting := false
	s.do(func() { wanting = s.inherited == 0 && s.first > 1 }) // before the first there was none
	if !wanting {
		return
	}
	l := s.legacyFrom(fmt.Sprintf("generation %d", v.number), v.kept)
	late := false
	s.do(func() {
		if late = s.inherited == 0 && l.facts.Epoch > 0 && l.facts.Epoch < s.first; late {
			s.inherited = l.facts.Epoch
			s.numbers = max(s.numbers, l.facts.Last)
			if all := sane(l.facts.Overrides); s.overrides.command == nil && len(all) > 0 {
				s.overrides.command = all
				s.overridesChanged()
			}
		}
	})
	if !late {
		return // our own, or what we have already
	}
	s.totals.Absorb(s.restored(l.totals))
	s.carry(l.stats)
	s.log.Info("what an earlier supervisor has counted was found late", "kept_by", v.number)
}

// raise makes our epoch one that v will obey. It has obeyed a supervisor that we know
// nothing of where that is not so already: then all others hear of it, too.
func (s *Supervisor) raise(v *visitor) (err error) {
	var others []*generation
	if !s.do(func() {
		if err = s.knows(v); err != nil || v.report.Epoch < s.epoch {
			return
		}
		if v.report.Epoch-s.epoch > mostAhead {
			err = fmt.Errorf("%w: epoch %d, where ours is %d", control.ErrProtocol, v.report.Epoch, s.epoch)
			return
		}
		s.epoch = v.report.Epoch + 1
		s.note()
		others = s.newestFirst()
	}) {
		return ErrStopping
	}
	s.commandAll(others)
	return err
}

// knows says whether v is who it says it is, as far as we know. Called in the loop.
func (s *Supervisor) knows(v *visitor) error {
	g := s.living[v.number]
	lives, visits := s.visiting[v.number]
	switch {
	case s.stopping || s.succeeded:
		return ErrStopping
	case s.upgrading != nil:
		return errUpgrading // it comes again
	case visits && !lives: // what it has left is another's by now, and would be given away twice
		return fmt.Errorf("process %d: %w", v.identity.PID, os.ErrProcessDone)
	case g == nil:
		return nil
	case g.identity.PID != v.identity.PID:
		return fmt.Errorf("%w: that has pid %d", errStranger, g.identity.PID)
	case errors.Is(g.cutOff, control.ErrProtocol):
		return fmt.Errorf("it was cut off: %w", g.cutOff)
	}
	return nil
}

// commandAll commands all at once.
func (s *Supervisor) commandAll(all []*generation) {
	var commands sync.WaitGroup
	for _, g := range all {
		commands.Go(func() { s.command(g) })
	}
	commands.Wait()
}

// command has g obey our epoch once more, at the channel that it has. It blocks.
func (s *Supervisor) command(g *generation) {
	m := control.Message{Type: control.TypeObey}
	s.do(func() { m.Epoch = s.epoch })
	if _, err := g.ask(s.work, m, answerTimeout); err != nil && !errors.Is(err, errUnattached) {
		g.log.Warn("generation has not confirmed whom it obeys", "epoch", m.Epoch, "err", err)
	}
}

// takeIn makes v, which obeys, one of the living, or gives the one of its number its
// channel back. Called in the loop.
func (s *Supervisor) takeIn(v *visitor) *generation {
	g := s.living[v.number]
	known := g != nil
	v.unknown = !known
	if !known {
		g = newGeneration(v.number, v.release, v.proc, v.ch, s.log)
		g.identity, v.proc = v.identity, nil
	} else {
		go g.attach(v.ch).Close()
	}
	if !known || !g.release.startable() {
		if known {
			_ = g.release.close() // logs that came without anything else
		}
		if v.problem != nil {
			g.log.Error("generation is adopted, but none like it can be started", "err", v.problem)
		}
		g.release, v.release = v.release, nil
	}
	g.cutOff = nil // where it only had no channel
	g.movesTo, g.givesTo, g.told, g.ticketsTold = 0, 0, 0, 0
	g.crowded = true // somebody else may have told it so
	g.movesAll = g.movesAll || v.report.MovesAll
	g.started, g.served, g.silent = v.report.Started, servedSince(v.report.Served), false
	g.mu.Lock()
	g.version, g.vaultVersion, g.passageVersion, g.runtimeVersion = v.version, v.report.Vault, v.report.Passage, v.report.Runtime
	g.clustersVersion, g.ticketsVersion, g.copiesVersion = v.report.Clusters, v.report.Tickets, v.report.Copies
	g.clearVersion = v.report.Clear
	g.mu.Unlock()
	if !known {
		g.state = draining // it is placed in a moment
		g.movedBefore = v.moved
		s.enlist(g, v.counts)
	} else {
		s.countIn(g, v.counts)
	}
	if g.counts == v.counts {
		v.counts = nil
	}
	s.hear(g)
	s.stats.adopted.Inc()
	g.log.Info("generation is adopted", "phase", string(v.report.Phase), "version", v.version, "config", g.release.hash, "known", known)
	return g
}

// servedSince is a time of another process on our own clock, which does not jump.
func servedSince(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return time.Now().Add(-max(0, time.Since(t)))
}

// place gives g, which was taken in from v, its part: it serves if it did and nobody
// else does; otherwise it drains. What it has handed back and nobody wants is closed.
// s.switchTurn is held, or nothing else runs yet.
func (s *Supervisor) place(v *visitor, g *generation) {
	defer v.dropRest()
	ours, vacant := false, false
	var older *generation
	s.do(func() {
		switch {
		case v.report.Phase == control.PhaseStopping:
			s.onLeaving(g) // nobody has heard it say so
		case g.state == starting || g.state == ready:
			g.state = draining // it has served since its state was written down
		}
		ours = s.serving == g
		if s.serving != nil && s.serving.number < g.number && (v.unknown || g.state == serving) {
			older = s.serving // which was put into service in the absence of g
		}
		vacant = s.serving == nil && (g.state == serving || g.state == draining)
		s.stateChanged()
	})
	switch {
	case v.report.Phase != control.PhaseServing || ours:
	case vacant:
		s.resumeServing(v, g)
	case older != nil:
		s.relinquish(older, s.resumeServing(v, g))
	default:
		s.relinquish(g, s.unserved(v.listeners))
	}
	err := errors.Join(s.handLevel(g, g.send), s.handReadiness(g, g.send), s.handEstate(g))
	if !s.vault.Has(g.number) { // a predecessor has given it a channel to us already
		s.vault.Expect([]int{g.number}) // it may have taken tunnels before we knew it
		err = errors.Join(err, s.handVault(g, g.send))
	}
	if err != nil {
		g.log.Warn("generation cannot be told what its supervisor wants", "err", err)
	}
}

// dropRest closes what was not taken in.
func (v *visitor) dropRest() {
	dropAll(v.kept)
	dropAll(v.listeners)
	if v.counts != nil {
		_ = v.counts.Close()
	}
	for _, r := range []*release{v.release, v.back} {
		if r != nil {
			_ = r.close()
		}
	}
	if v.proc != nil {
		closeProcess(v.proc)
	}
}

// relinquish has g, which serves although another does, drain. The queues of the listeners
// that only it has are emptied.
func (s *Supervisor) relinquish(g *generation, only []string) {
	g.log.Warn("two generations serve: the older one drains")
	_ = s.drain(g, only) // logs what goes wrong
}

// unserved returns the keys of listeners that the configuration which serves has not.
func (s *Supervisor) unserved(listeners map[string]int) (keys []string) {
	s.do(func() {
		for key := range listeners {
			if s.sockets[key] == nil {
				keys = append(keys, key)
			}
		}
	})
	return keys
}

// resumeServing makes g, which serves, the serving one in our eyes too. It returns the
// keys of the listeners that are not served any more.
func (s *Supervisor) resumeServing(v *visitor, g *generation) (removed []string) {
	var there map[string]bool
	s.do(func() { there = s.leave(v.listeners) })
	// What it does not accept from, nobody would: it is not opened again.
	p := s.restorePlan(g.release, func(key string) bool { return there[key] })
	installed := false
	s.do(func() {
		if g.state == ended {
			return
		}
		s.serving, g.state = g, serving
		if s.pinned == nil {
			s.process = g.release.config.Process // as it was when the service was started
		}
		if g.served.IsZero() {
			g.served = time.Now()
		}
		s.totals.Serve(g.number)
		s.stateChanged()
		s.takeBack(v, g)
		s.install(p, true)
		installed = true
	})
	if !installed {
		p.abort()
	}
	return p.removed
}

// descriptorOf is the descriptor of f, without what [os.File.Fd] does to its flags.
func descriptorOf(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	return fd, raw.Control(func(n uintptr) { fd = int(n) })
}
