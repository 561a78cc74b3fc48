// Package proxy is one generation: listeners, the HTTP connection manager, and the
// drain of both.
//
// A generation is a process that the supervisor starts and commands over the
// control channel ([Run]). It opens no listening socket and no file of its own: both
// come over the channel, but for the files that clusters follow. One goroutine, the loop in [generation.run], owns its
// state. It outlives its supervisor and is adopted by another one, see adoption.go.
//
// Connections do not live there but on event loops, one for each processor (loops.go). The
// first of them accepts (accepting.go) and deals connections to all, where an
// [holdfast/internal/http1.Server] serves them in tasks and the [Manager] answers their
// requests. An upgrade becomes a tunnel of the same loop. The generation's loop tells event
// loops what to do by posting functions, and learns from them by counters and [generation.notice].
//
// What a generation that drains has goes one of three ways: requests finish, idle
// connections go to the generation that serves (handover.go), tunnels stay or move (vault.go).
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/fence"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/scavenge"
	"holdfast/internal/servertls"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
	"holdfast/internal/version"
)

const (
	// sendTimeout bounds how long we wait in front of the supervisor's queue.
	sendTimeout = 5 * time.Second

	// endMargin is how long closing takes at the most when the time to stop is
	// over, closeTime how long it takes to cut the connections that have not closed then,
	// abandonTime how long it takes to give up such tunnels, logTime how long the last
	// records of access logs may take to be written, and doneTime how long the last word
	// may wait. Together they are shorter than what the supervisor adds before it kills.
	endMargin   = 3 * time.Second
	closeTime   = 250 * time.Millisecond
	abandonTime = 250 * time.Millisecond
	logTime     = time.Second
	doneTime    = 250 * time.Millisecond
)

// ErrAbandoned ends a generation that lost the supervisor before it was ever told
// to serve.
var ErrAbandoned = errors.New("the supervisor is gone before it said serve")

// Options are what a generation has from its process.
type Options struct {
	Control   int              // its end of the control channel
	Terminate <-chan os.Signal // asks for a stop within the configured time
	Stdout    *os.File         // for an access log; the generation closes it then. nil: there is none

	// Loops is how many goroutines serve connections and relay tunnels, one for each
	// processor. Each may keep a P of the Go runtime while it waits: GOMAXPROCS is to be
	// larger by two.
	Loops int

	// Reunite finds another supervisor at the rendezvous, in one attempt, as
	// [control.Reunite] does. nil: none is sought.
	Reunite func(ctx context.Context, path string, key []byte, hello control.Hello) (*control.Conn, error)

	// Logger makes the generation's log when its configuration is known.
	Logger func(cfg config.Log, generation int) Logger
}

// Logger is the log of a generation.
type Logger struct {
	Log     *slog.Logger
	Level   *slog.LevelVar // from which on lines are written
	Dropped func() uint64  // counts the lines that were dropped
}

// generation is the whole process. Fields without a remark are set once.
type generation struct {
	cfg      *config.Config
	number   int
	started  time.Time
	stdout   *os.File
	wanted   int // loops
	log      *slog.Logger
	level    *slog.LevelVar
	dropped  func() uint64
	registry *metrics.Registry
	known    map[string][]netip.Addr // what names of endpoints stand for; see control.Learnt
	values   dynamic.Set             // what the supervisor may override

	inherited *control.ClusterStates // what the generation before knew of its clusters; nil: there was none
	urgent    bool                   // that one is dead

	runtimeKeys map[string][]string // where each key of values stands in the configuration

	ticketKeys ticketKeys

	// Set by build, which is over when the loop has had its result.
	clusters  *upstream.Clusters
	loops     *loops
	tunnels   *tunnel.Set
	manager   *Manager
	listeners []*listener
	tls       map[string]*servertls.Server // by listeners' names
	elsewhere *listener                    // stands for those of other configurations whose tunnels are here

	clusterTalk clusterTalk
	copies      copies

	vault    *vault
	handover *handover
	seek     seeking
	messages chan received
	found    chan *control.Conn // to a supervisor that was sought
	built    chan error         // once: whether everything could be made
	changed  chan struct{}      // has room for one: something ended, look again

	releaseMemory func() // set once

	profiling atomic.Bool
	work      sync.WaitGroup // what the loop has others do for it
	talks     sync.WaitGroup // who receives from channels, and who seeks one

	// Owned by the loop.
	fence     *fence.Fence // who commands
	channels  map[fence.Channel]*channel
	patience  *time.Timer         // with a supervisor that does not command yet while none does
	lost      time.Time           // when the supervisor went that another one is expected after, or zero
	kept      map[string]int      // descriptors for whoever adopts, by key
	sockets   map[string]int      // of the supervisor, by key; taken by serve
	logFiles  map[string]*os.File // of access logs, by path; taken by the first serve, nil then
	accessLog *accesslog.Log      // nil: none is configured, or nothing was recorded yet
	process   process
	phase     phase
	served    time.Time // when it began to, last
	hold      time.Time // do not end before
	beat      heartbeat
	memory    scavenge.Scavenger
	limit     *time.Timer // of the drain's streams, or of the stop
	clearing  *time.Timer // of clear
	emptyBy   time.Time   // when that is over; zero: there is no such command
	resumed   bool        // it has the tunnels of a dead generation, and never accepts
	cut       bool        // the stop's limit was reached
	over      bool        // stopped before it served
}

type phase int

const (
	building phase = iota
	standby        // could serve
	serving
	draining
	stopping
)

// received is a message, or the end of the channel where m is nil.
type received struct {
	from *channel
	m    *control.Message
	fds  []int
}

// Run is the life of a generation. It blocks until nothing is left to do, and returns
// nil then.
func Run(ctx context.Context, o Options) error {
	conn, err := control.NewConn(o.Control)
	if err != nil {
		return err
	}
	defer conn.Close()
	started := time.Now()
	hello := newHello()
	if err := conn.Send(&control.Message{Type: control.TypeHello, Hello: &hello}, sendTimeout); err != nil {
		return err
	}
	first, err := receiveBundle(conn)
	if err != nil {
		return err
	}
	bundle := first.bundle
	cfg, runtimeKeys, err := config.ParseWithKeys(bundle.Path, bundle.Config)
	if err == nil {
		err = cfg.ReadBodies()
	}
	if err != nil {
		return errors.Join(err, conn.Send(&control.Message{Type: control.TypeReady, Error: err.Error()}, sendTimeout))
	}
	logger := o.Logger(cfg.Log, bundle.Generation)
	registry, err := openRegistry(first.counts)
	if err != nil {
		logger.Log.Error("what this generation counts is not shown", "err", err)
	}
	inherited, err := inheritClusters(first.states)
	if err != nil {
		logger.Log.Error("what the generation before knew of its clusters cannot be read", "err", err)
	}
	legacy, err := inheritCopies(first.legacy)
	if err != nil {
		logger.Log.Error("the copies of files that the generation before had cannot be read", "err", err)
	}
	var known map[string][]netip.Addr
	if bundle.Learnt != nil {
		known = bundle.Learnt.Addresses
	}
	g := &generation{
		cfg: cfg, number: bundle.Generation, started: started, stdout: o.Stdout, wanted: max(o.Loops, 1),
		log: logger.Log, level: logger.Level, dropped: logger.Dropped, registry: registry, known: known, runtimeKeys: runtimeKeys,
		seek:     seeking{reunite: o.Reunite, path: bundle.Rendezvous, key: bundle.Key},
		messages: make(chan received), found: make(chan *control.Conn), built: make(chan error, 1), changed: make(chan struct{}, 1),
		inherited: inherited, urgent: bundle.Urgent, copies: newCopies(legacy),
		fence: fence.New(bundle.Epoch), channels: make(map[fence.Channel]*channel), kept: make(map[string]int),
		sockets: make(map[string]int), logFiles: make(map[string]*os.File), process: newProcess(registry),
		memory: scavenge.New(time.Now()), releaseMemory: scavenge.Release,
	}
	g.memory.Want() // of what it takes to build it
	g.vault = newVault(g, min(max(bundle.Stores, 0), mostLoops))
	g.handover = newHandover(g)
	return g.live(ctx, conn, o.Terminate)
}

func newHello() control.Hello {
	return control.Hello{Core: control.Core, CoreMin: control.CoreMin, Version: version.String(), PID: os.Getpid(), Vault: control.VaultVersion, Passage: control.PassageVersion, Runtime: control.RuntimeVersion, Clusters: control.ClustersVersion, Tickets: control.TicketsVersion, Copies: control.CopiesVersion, Clear: control.ClearVersion}
}

// beginning is what a generation has from its supervisor before it is anything. A descriptor is
// -1 where none has come.
type beginning struct {
	bundle *control.Bundle
	counts int // the memory file to count in
	states int // what the generation before knew of its clusters
	legacy int // the copies of files that a dead one had
}

// receiveBundle waits for what the generation is to run; nothing else but a legacy means
// anything before. The supervisor bounds the wait: it kills what is not ready in
// time.
func receiveBundle(conn *control.Conn) (b beginning, err error) {
	b.legacy = -1
	for {
		m, fds, err := conn.Receive()
		switch {
		case err != nil:
			return b, fmt.Errorf("wait for the bundle: %w", err)
		case m.Type == control.TypeBundle && len(fds) > 0:
			fds = append(fds, -1, -1)
			b.bundle, b.counts, b.states = new(control.Bundle), fds[1], fds[2]
			return b, control.ReadPayload(fds[0], b.bundle)
		case m.Type == control.TypeLegacy && len(fds) == 1 && b.legacy < 0:
			b.legacy = fds[0]
		default:
			control.CloseAll(fds)
		}
	}
}

// inheritClusters reads what the generation before knew of its clusters; fd -1: nothing. With
// an error there is nothing of use, which hinders nobody.
func inheritClusters(fd int) (*control.ClusterStates, error) {
	if fd < 0 {
		return nil, nil
	}
	return control.ReadClusterStates(fd)
}

// openRegistry returns a registry in the memory file counts, or, with an error if
// that is at fault, one that nobody sees.
func openRegistry(counts int) (*metrics.Registry, error) {
	if counts < 0 {
		return metrics.NewRegistry(), nil
	}
	r, err := metrics.Open(counts)
	if err != nil {
		return metrics.NewRegistry(), err
	}
	return r, nil
}

// live runs the generation with conn as the channel that commands. Everything else is
// over when the last word is said, and the channels are closed.
func (g *generation) live(ctx context.Context, conn *control.Conn, terminate <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(ctx)
	g.open(ctx, fence.First, conn)
	err := g.run(ctx, terminate)
	cancel()
	g.work.Wait()
	if err == nil {
		g.sayDone()
	}
	g.closeChannels()
	return err
}

func (g *generation) run(ctx context.Context, terminate <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.limit, g.patience, g.clearing = stoppedTimer(), stoppedTimer(), stoppedTimer()
	g.work.Go(func() { growDescriptorTable(tableSize) })
	go g.beat.watch(ctx, g.log, g.pauseAccepting)
	go func() { g.built <- g.build(ctx) }()
	defer g.close()
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		if g.finished() {
			g.log.Info("nothing is left: the generation ends")
			return nil
		}
		select {
		case err := <-g.built:
			if err := g.onBuilt(err); err != nil {
				return err
			}
		case r := <-g.messages:
			if err := g.onReceived(ctx, r); err != nil {
				return err
			}
		case conn := <-g.found:
			g.onFound(ctx, conn)
		case <-g.patience.C:
			g.losePatience()
		case e := <-g.handover.events:
			g.handover.on(e)
		case <-g.handover.patience.C:
			g.handover.losePatience()
		case <-terminate:
			g.log.Info("terminated by signal: draining", "timeout", g.cfg.Stop.Timeout)
			g.stop(g.cfg.Stop.Timeout)
			g.leave()
		case <-g.clearing.C:
			g.onCleared()
		case <-g.limit.C:
			if g.onLimit() {
				return nil
			}
		case <-g.copies.news:
			g.sayCopied()
		case <-g.changed:
		case <-g.emptied():
		case <-tick.C:
			if g.beat.tick() {
				g.log.Warn("the control loop runs again: accepting")
				g.resumeAccepting()
			}
			g.report()
			g.giveMemoryBack(time.Now())
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// stoppedTimer returns a timer that fires when it is reset.
func stoppedTimer() *time.Timer {
	t := time.NewTimer(0)
	t.Stop()
	return t
}

// build makes everything that the configuration wants: step 4 of a reload.
func (g *generation) build(ctx context.Context) error {
	if err := g.secure(); err != nil {
		return err
	}
	descriptors := newDescriptors(g.cfg)
	loops, err := g.makeLoops(ctx)
	if err != nil {
		return err
	}
	for _, s := range loops.streams {
		s.LimitPipes(max(bodyPipes/len(loops.streams), 1), descriptors.allow)
	}
	clusters, err := upstream.New(ctx, upstream.Options{
		Config: g.cfg, Known: g.known, Inherited: g.inherited, Urgent: g.urgent, Kept: g.copies.legacy, Changed: g.copies.changed, Metrics: g.registry, Loops: loops.streams,
		Values: &g.values, Log: g.log, MayHave: descriptors.allow,
	})
	if err != nil {
		return errors.Join(err, loops.stop())
	}
	g.clusters, g.loops = clusters, loops
	g.tunnels = tunnel.NewSet(tunnel.Options{
		Log: g.log, OnEnd: g.onTunnelEnd, OnMoved: g.onTunnelMoved, Metrics: g.registry, MayHave: descriptors.allow, Loops: loops.all, Vault: g.vault,
		Verdict: tunnel.Verdict{
			Of:   func(o *tunnel.Origin) tunnel.Reason { return verdict(clusters, o) },
			Over: g.cfg.Drain.CloseSpread,
		},
	})
	clusters.Watch(g.endpointChanged)
	loops.run()
	g.manager = NewManager(ManagerOptions{
		Routes: route.New(g.cfg, &g.values), Clusters: clusters, Listeners: g.cfg.HTTPListeners, Loops: len(loops.streams), Tunnels: g, Log: g.log, Metrics: g.registry,
		Values: &g.values,
	})
	for i, cfg := range g.cfg.HTTPListeners {
		l := newListener(cfg, g.cfg.Listeners[i].Key(), loops.streams, g.log, g.registry, g.notice)
		l.descriptors = descriptors
		if cfg.TCP != nil {
			l.relayBy(g.manager.NewTCPServer(cfg.Name, loops.streams, l.ended))
		} else {
			g.serveHTTP(l)
			g.handover.add(l)
		}
		g.listeners = append(g.listeners, l)
		if s := g.tls[cfg.Name]; s != nil {
			l.guard(s.Config, g.registry)
		}
	}
	g.elsewhere = &listener{descriptors: descriptors}
	clusters.Run()
	clusters.Warm(ctx)
	for _, s := range g.tls {
		s.Run()
	}
	g.copies.legacy = nil
	descriptors.built()
	return nil
}

// makeLoops makes the generation's own loops, or takes over those of a dead one.
func (g *generation) makeLoops(ctx context.Context) (*loops, error) {
	if cap(g.vault.inherited) == 0 {
		return newLoops(g.wanted, largestBuffer(g.cfg), g.log)
	}
	stores, err := g.vault.heirlooms(ctx)
	if err != nil {
		return nil, err
	}
	return inheritLoops(stores, g.log)
}

func (g *generation) onBuilt(err error) error {
	g.phase = standby
	if err != nil {
		return errors.Join(err, g.commander().Send(&control.Message{Type: control.TypeReady, Error: err.Error()}, sendTimeout))
	}
	close(g.vault.ready)
	learnt, err := control.Payload(control.Learnt{Addresses: g.clusters.Addresses()})
	if err != nil {
		return err
	}
	defer learnt.Close()
	return g.commander().Send(&control.Message{Type: control.TypeReady}, sendTimeout, int(learnt.Fd()))
}

// onReceived has the fence judge what a supervisor says. The error ends the generation.
func (g *generation) onReceived(ctx context.Context, r received) error {
	switch {
	case r.m == nil:
		return g.onChannelEnd(ctx, r.from)
	case g.phase < serving && (r.m.Type == control.TypePrepare || r.m.Type == control.TypeAdopt):
		g.refuse(r, errors.New("who does not serve yet is not adopted"))
		return nil
	}
	former := g.fence.Commander()
	switch verdict, err := g.fence.Message(r.from.id, r.m.Type, r.m.Epoch); verdict {
	case fence.Do:
		g.do(ctx, r)
	case fence.Admit:
		g.prepare(ctx, r)
	case fence.Commit:
		g.obey(r, former)
	case fence.Refuse:
		g.refuse(r, err)
	default: // of a channel that was closed meanwhile
		control.Discard(r.fds)
	}
	return nil
}

// do does what the supervisor says.
func (g *generation) do(ctx context.Context, r received) {
	switch r.m.Type {
	case control.TypeListeners:
		g.confirm(r, replace(g.sockets, r))
		return
	case control.TypeKeep:
		g.confirm(r, replace(g.kept, r))
		return
	case control.TypeLogs:
		g.confirm(r, g.takeLogs(r.m, r.fds))
		return
	case control.TypeVault:
		g.confirm(r, g.connectVault(r.fds))
		return
	case control.TypeTake:
		g.answer(r, control.Message{}, g.handover.take(r.fds))
		return
	case control.TypeGive:
		g.answer(r, control.Message{}, g.handover.give(r.fds))
		return
	case control.TypeOverride:
		g.confirm(r, g.override(r.fds))
		return
	case control.TypeTickets:
		g.confirm(r, g.ticketKeys.take(r.fds))
		return
	case control.TypeValues:
		g.sayValues(r)
	case control.TypeClusters:
		g.sayClusters(r, func() any { return g.clusters.State() })
	case control.TypeLoads:
		g.sayClusters(r, func() any { return g.clusters.Loads() })
	case control.TypeElsewhere:
		g.hearElsewhere(r)
		return
	case control.TypeCopies:
		g.sayCopies(r)
	case control.TypeCertificates:
		g.sayClusters(r, func() any { return g.certificates() })
	case control.TypeResume:
		g.answer(r, control.Message{}, g.resume())
	case control.TypeMove:
		g.answer(r, control.Message{}, g.move(r.m.All))
	case control.TypeClear:
		g.answer(r, control.Message{}, g.clear(r.m.Within))
	case control.TypeLevel:
		g.confirm(r, g.setLevel(r.m.Level))
	case control.TypeReadiness:
		g.unready(r.m.Unready)
		g.confirm(r, nil)
	case control.TypeProfile:
		g.profile(ctx, r)
	case control.TypeServe:
		g.answer(r, control.Message{}, g.serve())
	case control.TypeDrain:
		g.drain(r.m.Keys, r.m.Within, r.m.Passage)
		g.answer(r, control.Message{}, nil)
	case control.TypeStatus:
		g.answer(r, control.Message{Status: g.status()}, nil)
	case control.TypeAdopt:
		g.handBack(r)
	case control.TypeStop:
		g.stop(r.m.Within)
	default:
		if r.m.ID != 0 {
			g.answer(r, control.Message{}, fmt.Errorf("unknown message %q", r.m.Type))
		}
	}
	control.CloseAll(r.fds)
}

// confirm answers a message that may want no answer; an error is logged then.
func (g *generation) confirm(r received, err error) {
	if r.m.ID != 0 {
		g.answer(r, control.Message{}, err)
	} else if err != nil {
		g.log.Error("cannot do what the supervisor says", "message", r.m.Type, "err", err)
	}
}

// onChannelEnd: clients do not suffer from the supervisor's death. What serves goes
// on, what drains drains; what never served has nobody to live for.
func (g *generation) onChannelEnd(ctx context.Context, c *channel) error {
	c.conn.Close()
	delete(g.channels, c.id)
	if c.id == g.fence.Candidate() {
		g.vault.dropCandidate()
	}
	verdict := g.fence.Ended(c.id)
	if verdict == fence.Ignore {
		return nil
	}
	if g.phase < serving {
		return ErrAbandoned
	}
	g.onLost(ctx, verdict)
	return nil
}

// connectVault opens the vault channel that the supervisor has sent.
func (g *generation) connectVault(fds []int) error {
	if len(fds) != 1 {
		control.Discard(fds)
		return errors.New("no channel has come with it")
	}
	return g.vault.connect(fds[0], false)
}

// serve begins to accept, for the first time or again.
func (g *generation) serve() error {
	if g.resumed {
		g.dropSockets()
		return errors.New("it is there for the tunnels of a dead generation and never accepts")
	}
	switch g.phase {
	case standby:
		g.openAccessLogs()
	case draining:
		if !g.emptyBy.IsZero() {
			g.dropSockets()
			return errors.New("it was told to end all that it has")
		}
	case serving:
		g.dropSockets()
		return nil
	default:
		g.dropSockets()
		return errors.New("not possible now")
	}
	for _, l := range g.listeners {
		fd, ok := g.sockets[l.key]
		if !ok {
			g.log.Error("no socket for a listener: it does not serve", "listener", l.cfg.Name, "address", l.key)
			continue
		}
		delete(g.sockets, l.key)
		l.server.Resume()
		if err := l.accept(fd); err != nil {
			g.stopAccepting(nil)
			g.dropSockets()
			if g.phase == draining {
				g.drainServers(g.cfg.Drain.IdleGrace)
			}
			return err
		}
	}
	g.dropSockets()
	g.clusters.SetDraining(false)
	g.pauseTLS(false)
	g.vault.stay()
	g.handover.stay()
	g.tunnels.Undrain()
	g.vault.serving.Store(true)
	g.limit.Stop()
	g.phase, g.served = serving, time.Now()
	g.log.Info("serving")
	return nil
}

// dropSockets closes those that no listener wants.
func (g *generation) dropSockets() { drop(g.sockets) }

func (g *generation) status() *control.Status {
	st := &control.Status{RSS: residentBytes(), Draining: g.phase >= draining, LogsDropped: g.dropped()}
	defer g.process.sample(st)
	if g.phase == building {
		return st
	}
	for _, l := range g.listeners {
		l.queue.sample(l.fd)
		st.Connections += l.server.Connections() + l.heralds.connections() + l.gate.connections()
		st.Requests += l.server.Requests()
	}
	st.Tunnels, st.OldestTunnel = g.tunnels.Summary()
	st.TunnelsTotal, st.EmptyBy = g.tunnels.Total(), g.emptyBy
	st.RequestsTotal = g.manager.Requests()
	g.tunnels.Sample()
	return st
}

// report says which troubles are over.
func (g *generation) report() {
	if g.phase == building {
		return
	}
	for _, l := range g.listeners {
		l.report(time.Now())
	}
	g.manager.report(time.Now())
}

// giveMemoryBack does so when it is time.
func (g *generation) giveMemoryBack(now time.Time) {
	if g.phase == building {
		return
	}
	var changes uint64
	for _, l := range g.listeners {
		changes += l.turnover()
	}
	if g.memory.Due(now, changes) {
		g.work.Go(func() { // a collection takes longer than anybody waits for the loop
			g.loops.trim()
			g.releaseMemory()
		})
	}
}

// notice has the loop look whether anything is left.
func (g *generation) notice() { signal(g.changed) }

// close lets go of what keeps no client: only the end of the process follows.
func (g *generation) close() {
	g.dropSockets()
	drop(g.kept)
	if g.phase == building {
		return // what is being built belongs to another goroutine still
	}
	g.stopAccepting(nil)
	if g.clusters != nil {
		g.handover.close()
		g.cutConnections()
		g.abandonTunnels()
		g.vault.close() // the ends were told
		g.endMirrors()
		g.clusters.Close()
		g.status() // measures the last time what is only known by looking
		if err := g.loops.stop(); err != nil {
			g.log.Error("cannot let go of what tunnels had", "err", err)
		}
	}
	for _, s := range g.tls {
		s.Close()
	}
	g.closeAccessLogs()
}

// endMirrors gives copies of requests a moment to end: nobody waits for them.
func (g *generation) endMirrors() {
	within, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	g.manager.EndMirrors(within, g.loops.streams)
}

// cutConnections closes what the servers have left, and gives what it was used for a
// moment to end.
func (g *generation) cutConnections() {
	for _, l := range g.listeners {
		l.cut()
	}
	within := time.After(closeTime)
	for slices.ContainsFunc(g.listeners, func(l *listener) bool { return l.connections() > 0 }) {
		select {
		case <-g.changed:
		case <-within:
			g.log.Warn("connections are left when the process ends")
			return
		}
	}
}
