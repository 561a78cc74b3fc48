// Package supervisor is the process that stays. It owns the listening sockets,
// starts proxy generations and hands the sockets to them, and has one of them
// serve at a time while older ones drain. It touches no byte of a client.
//
// One goroutine, the loop in [Supervisor.Run], owns all state. What takes time (a
// reload, the replacement of a crashed generation, the stop) is sequential code in
// a goroutine of its own, which reads and changes the state only through
// [Supervisor.do]. At most one of each runs.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
	"holdfast/internal/socket"
	"holdfast/internal/vault"
)

// answerTimeout bounds how long a generation may take to accept or to stop
// accepting. Both are a matter of microseconds.
const answerTimeout = 5 * time.Second

// Options are what a supervisor needs to know; all are set by the caller.
type Options struct {
	ConfigPath   string // read by every reload
	DefaultProxy string // the proxy binary where the configuration names none
	Log          *slog.Logger
	ApplyLog     func(config.Log) // called when a configuration with other log settings serves
	LogsDropped  func() uint64
	Admin        AdminSurface
	Inherited    *socket.Inherited // for listeners at "systemd:NAME"; nil: none

	// Directory is where the supervisor notes what a successor must know that meets
	// nobody, Secret what the keys of its generations are made of, and Rendezvous where
	// they come that have lost their supervisor.
	Directory  Directory
	Fresh      bool // nobody has used it before
	Secret     []byte
	Rendezvous Rendezvous

	// Store is where descriptors outlive every process of the service, and Stored what
	// was there at the start, by key. nil: there is no such place.
	Store  Store
	Stored map[string]int

	// Successor starts the process that is to take this one's place. nil: there is none.
	Successor func(context.Context) (Successor, error)

	// Predecessor is that of a candidate, nil for every other supervisor.
	Predecessor Predecessor

	// Phase is told what a service manager should know, Pulse is called every
	// PulseEvery. Both are called in the loop, so neither may block, and Pulse stops
	// when the loop is stuck. nil is allowed, and so is a PulseEvery of 0: never.
	Phase      func(Phase)
	Pulse      func()
	PulseEvery time.Duration
}

// A Phase is what the service as a whole is doing.
type Phase string

// The phases. Reloading is followed by Serving, whether the reload worked or not.
const (
	Serving   Phase = "serving"
	Reloading Phase = "reloading"
	Stopping  Phase = "stopping"
)

// Supervisor implements [Commands]. The zero value is of no use; see [New].
type Supervisor struct {
	opts    Options
	log     *slog.Logger
	started time.Time

	inbox chan func()
	ended chan struct{} // closed when the loop has ended

	// work is cancelled when the service stops; workers are what it is given to.
	work     context.Context
	stopWork context.CancelCauseFunc
	workers  sync.WaitGroup

	alive, accepting atomic.Bool // for health checks

	// switchTurn is held, by putting into it, while a generation becomes the
	// serving one.
	switchTurn chan struct{}

	// Set once.
	kernel kernel
	rounds rounds
	vault  *vault.Vault

	begun    chan struct{} // closed when what was found at the start is adopted
	arrivals chan *visitor // until then

	// Set before begun is closed, and not changed afterwards.
	stats  *stats
	totals *merge.Totals // of what generations count
	estate estate        // what is kept for a successor

	// What follows is owned by the loop.

	// Among supervisors.
	epoch        uint64
	first        uint64     // epoch, of ours
	inherited    uint64     // epoch of the supervisor whose counters we go on with; 0: none was found
	succeeded    bool       // another supervisor commands
	upgrading    *upgrading // nil: no upgrade is under way
	upgradeAsked bool       // one waits
	unnoted      bool       // what a successor has to know could not be written down

	// The generations.
	numbers  int // the last one given
	living   map[int]*generation
	visiting map[int]bool // those that are being met at the rendezvous; false: it has died meanwhile
	serving  *generation
	patience time.Duration    // resumePatience
	resuming map[int]*bequest // of dead ones, by number, whose tunnels wait for another one
	target   int              // where tunnels move to; 0: nowhere
	taker    int              // whom idle connections are given to; 0: nobody
	passed   *generation      // passed probation last; nil when it is gone
	pinned   *release         // its release; what a crash is mended with
	previous *release         // what had passed before it and was another one; what is gone back to. nil: nothing
	oom      oomRanks

	// The listening sockets, by key.
	sockets map[string]*socket.Socket // of what serves
	open    map[string]*held          // all that are open
	left    map[string]int            // descriptors that somebody has left, and nobody has wanted yet

	// What is under way.
	phase     Phase                // "": the service is starting
	process   config.Process       // as it was at the start
	reloading bool                 // one runs
	waiting   []chan reloadOutcome // for the next reload
	backing   []chan reloadOutcome // for the next rollback
	planned   *release             // of the reload under way, once it was read
	beginning bool                 // the reload under way is the start of the service
	failed    bool                 // the start did not work
	probation *probation           // nil: nobody is on probation
	switching bool                 // a ready generation is about to become the serving one
	restoring bool                 // a crash is being mended
	quiet     []chan struct{}      // closed when a change is over
	stopping  bool
	stopNow   chan struct{} // closed by the second stop, in the loop

	// What the status shows, and what was set by command.
	crashes   int    // of serving generations in a row
	lastCrash string // how the last of them came about
	last      *LastReload
	level     *slog.Level // nil: as the configuration says
	readyOff  bool
	overrides overrides

	tickets ticketing
	sharing sharing
	copies  copies
	viewing chan struct{} // held, by putting into it, while clusters are shown
}

// New returns a supervisor that Run starts.
func New(opts Options) *Supervisor {
	work, stopWork := context.WithCancelCause(context.Background())
	s := &Supervisor{
		opts: opts, log: opts.Log, started: time.Now(),
		inbox: make(chan func()), ended: make(chan struct{}), begun: make(chan struct{}),
		work: work, stopWork: stopWork,
		kernel:     realKernel(),
		arrivals:   make(chan *visitor),
		living:     make(map[int]*generation),
		sockets:    make(map[string]*socket.Socket),
		open:       make(map[string]*held),
		left:       make(map[string]int),
		visiting:   make(map[int]bool),
		resuming:   make(map[int]*bequest),
		patience:   resumePatience,
		stopNow:    make(chan struct{}),
		switchTurn: make(chan struct{}, 1),
		tickets:    newTicketing(),
		sharing:    newSharing(),
		copies:     copies{fd: -1},
		viewing:    make(chan struct{}, 1),
	}
	s.overrides.revision, s.overrides.told = 1, make(chan struct{})
	s.vault = vault.New(vault.Options{Log: opts.Log, Reserve: vaultReserve, Lost: s.onVaultLost, Changed: s.followVault})
	return s
}

// Run adopts the generations that another supervisor has left, or starts the first one,
// and serves until [Supervisor.Stop] or the end of ctx, which is a Stop too. When it
// returns, no generation lives. The error is a *Refusal if no generation could be put
// into service. It is [ErrSucceeded] where another supervisor commands the generations,
// which live on then.
func (s *Supervisor) Run(ctx context.Context) error {
	var err error
	if s.stats, err = newStats(nil); err != nil {
		return err
	}
	if s.estate, err = newEstate(); err != nil {
		return err
	}
	defer s.estate.close()
	defer s.sharing.close()
	defer s.copies.keep(-1)
	defer func() {
		if s.succeeded { // the surface is the successor's: nothing may hold up the end of ours
			go s.vault.Close()
			return
		}
		s.vault.Close()
	}()
	go s.loop()
	s.alive.Store(true)
	defer context.AfterFunc(ctx, s.Stop)()
	err = s.begin(ctx)
	switch {
	case errors.Is(err, ErrSucceeded):
		s.resign()
	case err != nil && !errors.Is(err, ErrStopping):
		s.do(func() { s.failed = true })
		s.Stop()
	}
	<-s.ended
	switch {
	case s.succeeded:
		return ErrSucceeded
	case errors.Is(err, ErrStopping):
		return nil // it was told to stop while it started
	}
	return err
}

func (s *Supervisor) loop() {
	defer close(s.ended)
	var pulse <-chan time.Time
	if s.opts.Pulse != nil && s.opts.PulseEvery > 0 {
		ticker := time.NewTicker(s.opts.PulseEvery)
		defer ticker.Stop()
		pulse = ticker.C
	}
	for {
		select {
		case f := <-s.inbox:
			if f == nil {
				return
			}
			f()
		case <-pulse:
			s.opts.Pulse()
		}
	}
}

// enter tells what the service as a whole is doing. Called in the loop.
func (s *Supervisor) enter(p Phase) {
	s.phase = p
	if s.opts.Phase != nil {
		s.opts.Phase(p)
	}
}

// do runs f in the loop and waits for it. It says false, and f has not run, if the
// loop has ended. It must not be called from the loop.
func (s *Supervisor) do(f func()) bool { return s.try(context.Background(), f) == nil }

// try is do for as long as ctx: with an error, [ErrStopping] or ctx's cause, f has not
// run and will not.
func (s *Supervisor) try(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case s.inbox <- func() { f(); close(done) }:
		<-done
		return nil
	case <-s.ended:
		return ErrStopping
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// change runs f, which changes something by command, in the loop. It fails while nobody
// may change anything, and then f has not run.
func (s *Supervisor) change(ctx context.Context, f func()) error {
	if err := s.awaitBegin(ctx); err != nil {
		return err
	}
	var refused error
	err := s.try(ctx, func() {
		switch {
		case s.stopping:
			refused = ErrStopping
		case s.upgrading != nil:
			refused = errUpgrading
		default:
			f()
		}
	})
	return errors.Join(err, refused)
}

// move changes g's state as the table says. Called in the loop.
func (s *Supervisor) move(g *generation, e event) bool {
	to, ok := g.state.next(e)
	if !ok {
		g.log.Error("event refused", "state", g.state.String(), "event", e.String())
		return false
	}
	if to != g.state {
		g.log.Info("generation is "+to.String(), "was", g.state.String())
	}
	g.state = to
	s.stateChanged()
	return true
}

// stateChanged is called when a generation has another state, or is one more. Called in
// the loop.
func (s *Supervisor) stateChanged() {
	s.noteReadiness()
	s.note()
	s.rankForOOM()
	s.retarget()
	s.spread()
	s.spreadTickets()
	s.share()
	s.askCopies()
}

// noteReadiness is called after every change of what it looks at. Called in the loop.
func (s *Supervisor) noteReadiness() {
	s.accepting.Store(s.serving != nil && !s.readyOff && !s.stopping)
}

// launch starts a generation of p's release and brings it to ready. On failure
// nothing of it is left.
func (s *Supervisor) launch(ctx context.Context, p *plan) (*generation, error) {
	r := p.release
	cause := fmt.Errorf("the proxy was not ready within %s: %w", r.config.Reload.ReadyTimeout, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(ctx, r.config.Reload.ReadyTimeout, cause)
	defer cancel()
	var g *generation
	var err error
	if !s.do(func() {
		if g, err = s.spawn(r); err == nil {
			g.file = p.overrides
		}
	}) {
		return nil, ErrStopping
	}
	if err != nil {
		return nil, err
	}
	start := s.startOf(g)
	start.Stores = s.vault.Stores(p.resumes)
	states, urgent := s.statesFor(p)
	start.Urgent = urgent
	if states >= 0 {
		defer control.CloseAll([]int{states})
	}
	copies := -1
	if urgent {
		copies = s.copiesOfLast()
	}
	if copies >= 0 {
		defer control.CloseAll([]int{copies})
	}
	provide := func() error {
		err := s.handVault(g, g.send)
		if err == nil && p.resumes != 0 {
			err = s.vault.HandStores(p.resumes, g.number)
		}
		if err == nil {
			err = s.tell(g, g.send)
		}
		if err == nil {
			err = s.tellTickets(g, g.send)
		}
		return err
	}
	if err = g.prepare(ctx, descriptors(p), start, states, copies, provide); err == nil {
		err = errors.Join(s.handLevel(g, g.send), s.handReadiness(g, g.send), s.handEstate(g))
	}
	s.do(func() {
		switch {
		case err != nil && g.state == ended: // by itself
		case err != nil:
			s.move(g, evStop)
		case !s.move(g, evReady):
			err = fmt.Errorf("generation %d ended when it was ready: %s", g.number, g.how)
		}
	})
	if err != nil {
		_ = g.kill(context.Background()) // logs what goes wrong
		return nil, err
	}
	return g, nil
}

// spawn starts the process. Called in the loop.
func (s *Supervisor) spawn(r *release) (*generation, error) {
	if s.stopping {
		return nil, ErrStopping
	}
	counts, err := metrics.NewFile()
	if err != nil {
		return nil, err
	}
	proc, ch, err := s.kernel.start(r)
	if err != nil {
		return nil, errors.Join(err, counts.Close())
	}
	s.numbers++
	g := newGeneration(s.numbers, r, proc, ch, s.log)
	g.identity = s.identityOf(proc)
	s.stats.started.Inc()
	s.enlist(g, counts)
	g.log.Info("generation is starting", "config", r.hash)
	s.hear(g)
	return g, nil
}

// enlist makes g, which counts in counts, one of the living. Called in the loop.
func (s *Supervisor) enlist(g *generation, counts *metrics.File) {
	s.living[g.number] = g
	s.numbers = max(s.numbers, g.number)
	s.countIn(g, counts)
	g.leaves = func() { s.do(func() { s.onLeaving(g) }) }
	g.copied = func() { s.do(func() { s.onCopied(g) }) }
	s.stateChanged()
	s.workers.Go(func() { s.watch(g) })
}

// countIn has what g counts added up, from now on. nil: it is not known where. Called in
// the loop.
func (s *Supervisor) countIn(g *generation, counts *metrics.File) {
	if counts == nil || g.counts != nil {
		return
	}
	if !s.totals.Add(g.number, counts) {
		return // closed: what it has counted is in the totals already
	}
	g.counts = counts
	s.deposit(countsOf(g.number), counts.FD())
}

// watch waits for g's process to end.
func (s *Supervisor) watch(g *generation) {
	how := g.proc.Wait()
	closeProcess(g.proc)
	_, heard := g.channel()
	select {
	case <-heard: // its last words too
	case <-time.After(cutOffGrace): // another process has its end of the channel
	}
	var counts *metrics.File
	s.do(func() { counts = g.counts })
	lost := lossesIn(counts) // nobody counts there any more
	s.do(func() { s.onDeath(g, how, lost) })
	s.settleTotals()
	s.do(func() { s.withdraw(countsOf(g.number)) }) // after it has become part of the totals
}

// settleTotals adds up what generations have counted that have ended.
func (s *Supervisor) settleTotals() {
	if err := s.totals.Settle(); err != nil {
		s.log.Error("what ended generations have counted cannot all be read", "err", err)
	}
}

// hear takes what g says over its channel, beside its caller.
func (s *Supervisor) hear(g *generation) {
	ch, heard := g.channel()
	s.workers.Go(func() {
		err := g.receive(ch)
		close(heard)
		s.do(func() { s.onChannelEnd(g, ch, err) })
	})
}

// onChannelEnd: a generation that breaks the protocol is cut off and asked by signal to
// finish what it has; whatever it served is served by another. One of which only the
// channel is gone has a moment to come back. Called in the loop.
func (s *Supervisor) onChannelEnd(g *generation, ch channel, violation error) {
	if now, _ := g.channel(); now != ch || g.state == ended || s.succeeded {
		return
	}
	if violation != nil {
		s.cutOff(g, violation)
		return
	}
	g.silent = !g.done.Load()
	if s.upgrading == nil { // otherwise the end of the upgrade expects it
		s.expect(g)
	}
}

// expect cuts g off if it has no channel in a while. Called in the loop.
func (s *Supervisor) expect(g *generation) {
	gone, _ := g.channel()
	s.workers.Go(func() {
		select {
		case <-g.died:
			return
		case <-s.work.Done():
			return
		case <-time.After(cutOffGrace):
		}
		s.do(func() {
			if s.visiting[g.number] {
				s.expect(g) // it is there, and about to be let in
			} else if now, _ := g.channel(); now == gone && g.state != ended && s.upgrading == nil && !s.succeeded {
				s.cutOff(g, errors.New("it has closed its control channel"))
			}
		})
	})
}

func (s *Supervisor) cutOff(g *generation, why error) {
	g.closeChannel()
	s.stats.cutOffs.Inc()
	g.log.Error("generation cut off", "err", why)
	s.onCutOff(g, why)
}

// Ready says whether new connections are welcome.
func (s *Supervisor) Ready() bool { return s.accepting.Load() }

// Alive says whether the supervisor runs.
func (s *Supervisor) Alive() bool { return s.alive.Load() }

// SetReady overrides what Ready says.
func (s *Supervisor) SetReady(ctx context.Context, ready bool) error {
	if err := s.change(ctx, func() {
		s.readyOff = !ready
		s.noteReadiness()
		s.note()
	}); err != nil {
		return err
	}
	s.log.Info("readiness was set", "ready", ready)
	s.tellReadiness(ctx)
	return nil
}

// Kill ends a generation at once.
func (s *Supervisor) Kill(ctx context.Context, number int) error {
	var g *generation
	if err := s.change(ctx, func() { g = s.living[number] }); err != nil {
		return err
	}
	if g == nil {
		return notFound(number)
	}
	g.log.Warn("generation is killed by command")
	return g.kill(ctx)
}

// newestFirst returns the living generations. Called in the loop.
func (s *Supervisor) newestFirst() []*generation {
	all := slices.Collect(maps.Values(s.living))
	slices.SortFunc(all, func(a, b *generation) int { return b.number - a.number })
	return all
}
