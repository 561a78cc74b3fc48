package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/socket"
)

type reloadOutcome struct {
	result    *ReloadResult
	err       error
	probation *probation
}

// Reload implements [Commands]. One runs at a time; everybody who asks meanwhile
// shares the next one, so that each answer is from a reload that has read the file
// after it was asked for.
func (s *Supervisor) Reload(ctx context.Context, wait bool) (*ReloadResult, error) {
	return s.replacement(ctx, &s.waiting, wait)
}

// replacement waits for the next one of those for which there is a queue: it is the loop's.
func (s *Supervisor) replacement(ctx context.Context, queue *[]chan reloadOutcome, wait bool) (*ReloadResult, error) {
	if err := s.awaitBegin(ctx); err != nil {
		return nil, err
	}
	outcome := make(chan reloadOutcome, 1)
	if err := s.try(ctx, func() {
		if s.stopping {
			s.refuseReload(outcome)
			return
		}
		*queue = append(*queue, outcome)
		s.nextReload()
	}); err != nil {
		return nil, err
	}
	select {
	case o := <-outcome:
		if o.err != nil || !wait {
			return o.result, o.err
		}
		return o.probation.wait(ctx, *o.result)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// refuseReload answers somebody who asks for a reload while the service ends. Called
// in the loop.
func (s *Supervisor) refuseReload(asked chan reloadOutcome) {
	o := reloadOutcome{err: ErrStopping}
	s.stats.reloaded(o)
	s.log.Warn("reload refused: the service is stopping")
	asked <- o
}

// nextReload starts a rollback or a reload for all who wait, unless one runs. Called in the loop.
func (s *Supervisor) nextReload() {
	if s.reloading || s.stopping || s.upgrading != nil || s.upgradeAsked || len(s.waiting)+len(s.backing) == 0 {
		return
	}
	// A rollback first: a reload that is asked for at the same time may be its end.
	replace, count, callers := s.rollback, s.stats.wentBack, s.backing
	if len(callers) > 0 {
		s.backing = nil
	} else {
		replace, count, callers = s.reload, s.stats.reloaded, s.waiting
		s.waiting = nil
	}
	s.reloading = true
	if s.phase == Serving { // otherwise the service is starting
		s.enter(Reloading)
	}
	s.workers.Go(func() {
		o := replace(s.work)
		s.do(func() {
			s.reloading, s.planned = false, nil
			if o.err == nil || !s.needless() {
				count(o)
				s.last = &LastReload{Time: time.Now()}
				if o.err != nil {
					s.last.Error = o.err.Error()
				} else if o.result.RolledBack {
					s.last.RolledBack = o.result.Previous
				}
			}
			s.beginning = false
			if s.pinned != nil && !s.stopping {
				s.enter(Serving)
			}
			s.note()
			s.settled()
		})
		for _, c := range callers {
			c <- o
		}
	})
}

// reload puts the file as it is into service. A failure before the new generation
// serves leaves everything as it was.
func (s *Supervisor) reload(ctx context.Context) reloadOutcome {
	began := time.Now()
	plan, err := s.plan(ctx)
	if err == nil {
		var o reloadOutcome
		if o, err = s.replace(ctx, plan); err == nil {
			o.result.Duration = time.Since(began)
			if o.result.Previous == 0 {
				s.log.Info("a generation serves", "serving", o.result.Generation, "config", plan.release.hash, "took", o.result.Duration)
			} else {
				s.log.Info("reloaded", "serving", o.result.Generation, "draining", o.result.Previous, "config", plan.release.hash, "took", o.result.Duration)
			}
			return o
		}
		plan.abort()
	}
	if s.work.Err() != nil {
		err = ErrStopping
	}
	what, log := "reload refused; nothing has changed", s.log
	needless := false
	s.do(func() {
		needless = s.needless()
		if s.serving == nil && s.pinned == nil {
			what = "the service cannot start"
		}
		if s.serving != nil {
			log = log.With("serving", s.serving.number, "serving_pid", s.serving.proc.PID())
		}
	})
	if needless {
		log.Info("a generation that served has come back: none is started")
	} else {
		log.Error(what, "err", err)
	}
	return reloadOutcome{err: err}
}

// needless says whether the reload under way is the start of the service, and something
// that another supervisor has left serves by now. Called in the loop.
func (s *Supervisor) needless() bool { return s.beginning && s.serving != nil }

// A plan is what a reload needs before it starts a generation.
type plan struct {
	release       *release
	sockets       map[string]*socket.Socket // of the new configuration, by key
	commit, abort func()                    // exactly one is called, abort not in the loop
	resumes       int                       // the dead generation whose tunnels it is for; 0: none
	overrides     *fileOverrides            // of the release's file, where that is another one than so far

	// Set when the plan is installed.
	added     []string // keys of the sockets that were not served before
	removed   []string // of those that it does not want any more
	probation *probation
}

// plan reads, validates, and opens what is new: steps 1 and 2.
func (s *Supervisor) plan(ctx context.Context) (*plan, error) {
	r, err := loadRelease(ctx, s.opts.ConfigPath, s.opts.DefaultProxy)
	if err != nil {
		return nil, err
	}
	p := &plan{release: r}
	if err = s.kernel.check(ctx, r); err == nil {
		s.do(func() { s.planned = r }) // logs that are rotated meanwhile are opened again
		err = r.logs.open(r.config.AccessLogs)
	}
	if err == nil {
		if r.config.Reload.MaxGenerations > 0 {
			s.refresh(ctx) // a refusal says what the others hold now
		}
		s.do(func() {
			if err = s.admit(r); err == nil {
				err = s.openSockets(p)
			}
		})
	}
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	commitAdmin, abortAdmin, err := s.opts.Admin.Prepare(r.config.Admin)
	if err != nil {
		s.do(func() { s.giveBack(p.sockets) })
		return nil, errors.Join(refuse("admin", err), r.close())
	}
	p.overrides = s.overridesOf(r)
	p.commit = commitAdmin
	p.abort = func() {
		abortAdmin()
		s.do(func() { s.giveBack(p.sockets) })
		_ = r.close() // nothing was written to its files
	}
	return p, nil
}

// admit refuses what no reload can do. Called in the loop.
func (s *Supervisor) admit(r *release) error {
	if s.needless() {
		return refuse("start", errServes)
	}
	if s.serving == nil && s.pinned == nil {
		s.process = r.config.Process // the start
	}
	if r.config.Process != s.process {
		return refuse("configuration", errors.New("[process] is read at the start of the service: restart it to change process.proxy"))
	}
	if most := r.config.Reload.MaxGenerations; most > 0 && len(s.living) >= most {
		var holders []string
		for _, g := range s.newestFirst() {
			holders = append(holders, fmt.Sprintf("generation %d is %s with %d tunnels and %d requests (pid %d)",
				g.number, g.state, g.lastSeen.Tunnels, g.lastSeen.Requests, g.proc.PID()))
		}
		return &Refusal{Step: "generations", Problems: append([]string{fmt.Sprintf("%d generations live, reload.max_generations is %d", len(s.living), most)}, holders...)}
	}
	return s.headroom(r)
}

// openSockets fills p.sockets: those that stay, and new ones. Called in the loop.
func (s *Supervisor) openSockets(p *plan) error {
	p.sockets = make(map[string]*socket.Socket)
	var problems []error
	for _, l := range p.release.config.Listeners {
		problems = append(problems, s.hold(p, l))
	}
	if err := errors.Join(problems...); err != nil {
		s.giveBack(p.sockets)
		return refuse("listeners", err)
	}
	return nil
}

// replace starts a generation and has it relieve the serving one: steps 3 to 7.
func (s *Supervisor) replace(ctx context.Context, p *plan) (reloadOutcome, error) {
	s.keepStates(ctx) // the next one begins with what this one knows now
	g, err := s.launch(ctx, p)
	if err != nil {
		return reloadOutcome{}, refuse("start", err)
	}
	old, err := s.relieve(ctx, g, p, false)
	if err != nil {
		return reloadOutcome{}, refuse("serve", err)
	}
	o := reloadOutcome{result: &ReloadResult{Generation: g.number, Added: p.added, Removed: p.removed, Probation: "pending"}, probation: p.probation}
	if old != nil {
		o.result.Previous = old.number
		if err := s.drain(old, p.removed); err != nil {
			o.result.Warnings = append(o.result.Warnings, err.Error())
		}
	}
	return o, nil
}

// relieve has g serve what p holds, in place of the serving generation, which it
// returns (nil if there is none) and which goes on accepting until it is drained.
// A restored g serves only if nothing else does. With an error nothing has
// changed, and g is gone unless it was draining before.
func (s *Supervisor) relieve(ctx context.Context, g *generation, p *plan, restored bool) (old *generation, err error) {
	s.switchTurn <- struct{}{}
	defer func() { <-s.switchTurn }()
	useless := false
	s.do(func() {
		s.switching = true
		if restored && s.serving != nil || s.needless() {
			err = errServes
		}
	})
	if err == nil {
		err = s.tell(g, g.asking(ctx)) // what has changed since it was started holds for its first request
	}
	if err == nil {
		err = s.tellTickets(g, g.asking(ctx))
	}
	if err == nil {
		s.shareNow(ctx)
		_, err = g.ask(ctx, control.Message{Type: control.TypeServe}, answerTimeout)
	}
	s.do(func() {
		s.switching = false
		if _, can := g.state.next(evServe); err == nil && !can { // it has just died, or was told to
			err = fmt.Errorf("generation %d is %s", g.number, g.state)
		}
		if err == nil {
			old, s.serving = s.serving, g
			g.served = time.Now()
			s.move(g, evServe)
			s.totals.Serve(g.number)
			s.install(p, restored)
			return
		}
		s.ensureServing()
		if g.state == ready { // never accepted
			s.move(g, evStop)
			useless = true
		}
	})
	if useless {
		_ = g.kill(context.Background()) // logs what goes wrong
	}
	return old, err
}

// install makes p what is served. Called in the loop.
func (s *Supervisor) install(p *plan, restored bool) {
	before := s.sockets
	s.sockets = p.sockets
	p.added, p.removed = missing(before, p.sockets), missing(p.sockets, before)
	for key := range p.sockets {
		if h := s.open[key]; h != nil {
			h.left = false
		}
	}
	s.depositSockets(p)
	s.giveBack(before)
	s.stats.listenersAdded.Add(uint64(len(p.added)))
	s.stats.listenersRemoved.Add(uint64(len(p.removed)))
	for _, l := range p.release.config.Listeners {
		if o := s.sockets[l.Key()]; o != nil {
			if err := o.Reconfigure(l); err != nil {
				s.log.Error("listener keeps its old mode", "err", err)
			}
		}
	}
	p.commit()
	s.opts.ApplyLog(s.logOf(p.release))
	s.installOverrides(p)
	defer s.keepBack()
	if restored || p.release == s.pinned { // nothing better is known
		s.endProbation("superseded")
		s.pass(s.serving)
		return
	}
	s.forgetLeft() // no configuration that can come back names it
	p.probation = s.beginProbation()
}

// drain tells g to stop accepting and to empty the queues of the removed
// listeners, of which it then has the last copies. One that drains already learns
// how long it must stay at hand, and wait for a passage. What goes wrong is logged too.
func (s *Supervisor) drain(g *generation, removed []string) error {
	m := control.Message{Type: control.TypeDrain, Keys: removed}
	alive := false
	s.do(func() {
		m.Within, m.Passage = s.holdOf(g), s.passageWithin(g)
		// One that serves has been reinstated since somebody wanted it to drain.
		alive = g != s.serving && (g.state == serving || g.state == draining) && s.move(g, evDrain)
	})
	if !alive {
		return nil // it has ended, or the service ends
	}
	_, err := g.ask(s.work, m, answerTimeout)
	s.shareSoon() // it takes no more
	if err != nil {
		s.do(func() { g.silent = g.state != ended })
		g.log.Error("generation has not confirmed that it accepts no more", "err", err)
	}
	return err
}
