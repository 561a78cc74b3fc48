package supervisor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/fence"
	"holdfast/internal/metrics"
)

// simGeneration is the process of a generation: what the proxy's control loop does,
// without a proxy but with its fence. All that it does it does at once.
type simGeneration struct {
	w       *simWorld
	name    string
	pid     int
	handles []*handle
	links   []*link // that it has open
	dead    bool

	fence     *fence.Fence
	seeking   bool          // a supervisor, at the rendezvous
	notUntil  time.Time     // when it seeks again
	patience  time.Time     // until when it waits for the candidate; zero: it does not
	commanded fence.Channel // that it has obeyed last
	lost      time.Time     // when it lost its supervisor; zero: it has one

	phase   simPhase
	bundle  control.Bundle
	wants   []string       // keys of its listeners
	sockets map[string]int // that came and are not accepted from
	accepts map[string]int
	kept    map[string]int
	hold    time.Time // do not end before
	passing           // the part that has clients
	talkingOfClusters
	tickets   [][32]byte // keys
	served    time.Time
	counts    int // the memory file; -1: none
	questions uint64

	counted *simSupervisor // who adds up what it counts, at the last standstill
	folded  bool           // it has ended, and its counts are among the totals
}

// simPhase is as in the proxy.
type simPhase int

const (
	simBuilding simPhase = iota
	simStandby
	simServing
	simDraining
	simStopping
)

// newGeneration is called with mu held.
func (w *simWorld) newGeneration() *simGeneration {
	n := len(w.generations) + 1
	g := &simGeneration{
		w: w, name: fmt.Sprintf("g%d", n), pid: 1000 + n, counts: -1,
		sockets: make(map[string]int), accepts: make(map[string]int), kept: make(map[string]int),
	}
	w.generations = append(w.generations, g)
	w.changes++
	return g
}

func (g *simGeneration) String() string {
	if g == nil {
		return "nobody"
	}
	return g.name
}

// handle gives a supervisor hold of the process. Called with mu held.
func (g *simGeneration) handle(p *simSupervisor, child bool) *handle {
	h := &handle{s: p, g: g, child: child, ended: make(chan string, 1)}
	g.handles = append(g.handles, h)
	return h
}

// told says whether the configuration tells it to misbehave.
func (g *simGeneration) told(word string) bool { return told(g.bundle, word) }

// receive does what a message says. Called with mu held.
func (g *simGeneration) receive(l *link, m *control.Message, fds []int, from sending) {
	if g.dead {
		control.CloseAll(fds)
		return
	}
	if g.fence == nil { // the bundle comes first
		if m.Type == control.TypeBundle {
			g.build(l, fds)
		}
		return
	}
	g.count()
	verdict, err := fence.Refuse, errors.New("who does not serve yet is not adopted")
	if g.phase >= simServing || m.Type != control.TypePrepare && m.Type != control.TypeAdopt {
		verdict, err = g.fence.Message(l.id, m.Type, m.Epoch)
	}
	switch verdict {
	case fence.Do:
		g.do(l, m, fds, from)
		return
	case fence.Admit:
		g.admit(l, m, fds)
	case fence.Commit:
		g.w.obeyed(g, l.s, m.Epoch)
		g.seeking, g.patience, g.lost = false, time.Time{}, time.Time{}
		g.commanded = l.id
		g.dropLinks()
		g.answer(l, m, &control.Message{Report: g.report()}, nil)
	case fence.Refuse:
		g.answer(l, m, new(control.Message), err)
	}
	control.CloseAll(fds)
}

func (g *simGeneration) answer(l *link, to, a *control.Message, err error) {
	if to.ID == 0 {
		return
	}
	a.Type, a.Re = control.TypeAnswer, to.ID
	if err != nil {
		a.Error = err.Error()
	}
	l.say(a)
}

// build is what follows the bundle.
func (g *simGeneration) build(l *link, fds []int) {
	if err := control.ReadPayload(fds[0], &g.bundle); err != nil {
		panic(err)
	}
	g.counts = fds[1]
	control.CloseAll(fds[2:]) // what the one before knew of its clusters
	g.fence = fence.New(g.bundle.Epoch)
	for _, o := range g.w.generations {
		if o != g && o.bundle.Generation == g.bundle.Generation {
			g.w.fail("6: %s and %s are both generation %d", o, g, g.bundle.Generation)
		}
	}
	g.wants = listenersOf(g.bundle)
	g.phase = simStandby
	switch {
	case g.told("dies before ready"):
		g.die("exit status 9")
	case g.told("cannot be ready"):
		l.say(&control.Message{Type: control.TypeReady, Error: "no such host"})
		g.die("exit status 1")
	default:
		l.say(&control.Message{Type: control.TypeReady})
	}
}

// do does what the supervisor says whom the generation obeys.
func (g *simGeneration) do(l *link, m *control.Message, fds []int, from sending) {
	defer func() { control.CloseAll(fds) }()
	if m.Type != control.TypeStatus && m.Type != control.TypeAdopt {
		g.w.ordered(g, m, from)
	}
	var err error
	switch m.Type {
	case control.TypeListeners:
		g.replace(g.sockets, m.Keys, fds)
		fds = nil
	case control.TypeKeep:
		g.replace(g.kept, m.Keys, fds)
		fds = nil
	case control.TypeTake, control.TypeGive:
		if err = g.connect(m.Type, fds[0]); err == nil {
			fds = nil
		}
	case control.TypeTickets:
		g.takeTickets(fds)
	case control.TypeServe:
		err = g.serve()
	case control.TypeDrain:
		g.drain(m.Within)
		g.keepClients(m.Passage)
	case control.TypeStop:
		g.stop()
	case control.TypeAdopt:
		g.handBack(l, m)
		return
	}
	g.answer(l, m, &control.Message{Status: &control.Status{Draining: g.phase >= simDraining}}, err)
}

func (g *simGeneration) replace(named map[string]int, keys []string, fds []int) {
	for i, key := range keys {
		g.drop(named, key)
		named[key] = fds[i]
	}
}

// serve begins to accept, for the first time or again.
func (g *simGeneration) serve() error {
	switch {
	case g.told("refuses to serve"):
		return errors.New("will not")
	case g.phase == simBuilding || g.phase == simStopping:
		g.dropAll(g.sockets)
		return errors.New("not possible now")
	case g.phase != simServing:
		for _, key := range g.wants {
			if fd, ok := g.sockets[key]; ok {
				g.accepts[key] = fd
				delete(g.sockets, key)
			}
		}
		if g.phase == simStandby {
			g.accept()
		}
		g.phase, g.served = simServing, time.Now()
	}
	g.dropAll(g.sockets)
	return nil
}

func (g *simGeneration) drain(hold time.Duration) {
	if g.phase == simStopping {
		return
	}
	g.dropAll(g.sockets)
	g.hold = time.Now().Add(hold)
	if g.phase == simServing {
		g.phase = simDraining
		g.dropAll(g.accepts)
	}
}

func (g *simGeneration) stop() {
	if g.phase < simServing {
		g.die("exit status 0")
		return
	}
	g.dropAll(g.sockets)
	g.dropAll(g.accepts)
	g.phase, g.hold = simStopping, time.Time{}
}

// admit opens the channel of the candidate that the supervisor brings.
func (g *simGeneration) admit(l *link, m *control.Message, fds []int) {
	g.dropLinks()
	c := g.w.at(fds[0])
	c.g, c.closedG, c.id = g, false, g.fence.Candidate()
	g.links = append(g.links, c)
	g.answer(l, m, new(control.Message), nil)
}

// handBack gives a supervisor all that it needs to command.
func (g *simGeneration) handBack(l *link, m *control.Message) {
	listeners := maps.Clone(g.sockets)
	maps.Copy(listeners, g.accepts)
	send := func(m *control.Message, fds ...int) error {
		l.say(m, fds...)
		return nil
	}
	control.SendFiles(control.TypeListeners, listeners, send)
	control.SendFiles(control.TypeKept, g.kept, send)
	g.answer(l, m, &control.Message{Report: g.report()}, nil)
}

func (g *simGeneration) report() *control.Report {
	phases := map[simPhase]control.Phase{simServing: control.PhaseServing, simDraining: control.PhaseDraining, simStopping: control.PhaseStopping}
	return &control.Report{
		Generation: g.bundle.Generation, Epoch: g.fence.Epoch(), Phase: phases[g.phase], Started: g.w.began, Served: g.served,
		Passage: g.w.passageVersion(), Clusters: g.w.clustersVersion(), Tickets: g.w.ticketsVersion(),
	}
}

// dropLinks closes the channels that can never command again.
func (g *simGeneration) dropLinks() {
	for _, l := range slices.Clone(g.links) {
		if l.id != g.fence.Commander() && l.id != g.fence.Candidate() {
			g.closeLink(l)
		}
	}
}

func (g *simGeneration) closeLink(l *link) {
	g.links = slices.DeleteFunc(g.links, func(o *link) bool { return o == l })
	l.closeG()
}

// channelEnd is called with mu held, when the supervisor's end of l is gone or when the
// generation gives up on it.
func (g *simGeneration) channelEnd(l *link) {
	if g.dead || l.closedG {
		return
	}
	g.closeLink(l)
	if g.fence == nil || g.phase < simServing {
		g.die("exit status 1")
		return
	}
	verdict := g.fence.Ended(l.id)
	if verdict != fence.Ignore && g.lost.IsZero() {
		g.lost = time.Now()
	}
	switch verdict {
	case fence.Wait:
		g.patience = time.Now().Add(time.Minute)
	case fence.Seek:
		if g.seeking, g.patience = true, (time.Time{}); l.id != fence.First && l.id != g.commanded { // one that let it in in vain
			g.notUntil = time.Now().Add(500 * time.Millisecond)
		}
	}
}

// find has it come to a supervisor at the rendezvous. Called with mu held.
func (g *simGeneration) find(p *simSupervisor) {
	id, ok := g.fence.Found()
	if !ok {
		return
	}
	g.seeking = false
	g.patience = time.Now().Add(time.Minute)
	l := g.w.connect(p, g, id)
	hello := &control.Hello{
		Core: control.Core, CoreMin: control.CoreMin, Version: "model", PID: g.pid,
		Generation: g.bundle.Generation, Epoch: g.fence.Epoch(), Passage: g.w.passageVersion(), Clusters: g.w.clustersVersion(), Tickets: g.w.ticketsVersion(),
	}
	go p.s.arrive(l, hello)
}

// seeks says whether it looks for a supervisor just now.
func (g *simGeneration) seeks() bool { return !g.dead && g.seeking && !time.Now().Before(g.notUntil) }

// impatient says whether it has waited long enough for the candidate.
func (g *simGeneration) impatient() bool {
	return !g.dead && !g.patience.IsZero() && !time.Now().Before(g.patience) && g.candidate() != nil
}

func (g *simGeneration) candidate() *link {
	for _, l := range g.links {
		if g.fence != nil && l.id == g.fence.Candidate() {
			return l
		}
	}
	return nil
}

// terminate is SIGTERM. Called with mu held.
func (g *simGeneration) terminate() {
	if g.dead {
		return
	}
	if g.phase < simServing {
		g.die("signal: terminated")
		return
	}
	g.stop()
	for _, l := range g.links {
		if l.id == g.fence.Commander() {
			l.say(&control.Message{Type: control.TypeLeaving})
		}
	}
}

// mayEnd says whether nothing is left to do. Who drains and has lost its supervisor stays
// for the next one, for a while.
func (g *simGeneration) mayEnd() bool {
	switch now := time.Now(); {
	case g.dead:
		return false
	case g.phase == simDraining:
		return !now.Before(g.hold) && !g.waitsWithClients(now) && !slices.Contains(g.w.scenario.tunnels, g.name) && (g.lost.IsZero() || now.Sub(g.lost) >= time.Minute)
	}
	return g.phase == simStopping
}

// end is its end because nothing is left to do. Called with mu held.
func (g *simGeneration) end() {
	for _, l := range g.links {
		l.say(&control.Message{Type: control.TypeDone})
	}
	g.die("exit status 0")
}

// die ends the process: its descriptors are closed, and who watches it will hear of it.
// Called with mu held.
func (g *simGeneration) die(how string) {
	if g.dead {
		return
	}
	g.dead = true
	g.w.tell("%s ends: %s", g.name, how)
	g.w.changes++
	for _, named := range []map[string]int{g.sockets, g.accepts, g.kept} {
		g.dropAll(named)
	}
	if g.counts >= 0 {
		control.CloseAll([]int{g.counts})
	}
	g.dropClients(how != "exit status 0" || g.phase == simStopping)
	for _, l := range g.links {
		l.closeG()
	}
	for i, h := range g.handles {
		if h.s.dead || g.w.over {
			offer(h.ended, how)
			continue
		}
		word := how
		if !h.child {
			word = "nobody knows how"
		}
		g.w.put(&pending{
			stream: fmt.Sprintf("%s†%s.%d", g.name, h.s.name, i+1), what: "has ended", at: h.s.name,
			reach: func() { offer(h.ended, word) },
		})
	}
}

func (g *simGeneration) drop(from map[string]int, key string) {
	if fd, ok := from[key]; ok {
		control.CloseAll([]int{fd})
		delete(from, key)
	}
}

func (g *simGeneration) dropAll(from map[string]int) {
	for key := range from {
		g.drop(from, key)
	}
}

// count counts one more question where the supervisor sees it.
func (g *simGeneration) count() {
	g.questions++
	g.w.facts.questions++
	image, at := countsImage()
	image = bytes.Clone(image)
	binary.NativeEndian.PutUint64(image[at:], g.questions)
	if _, err := unix.Pwrite(g.counts, image, 0); err != nil {
		panic(err)
	}
}

// countsImage is what a memory file begins with in which fakeQuestions is counted, and
// where in it the value stands. A generation of the model writes it without a mapping:
// those that metrics.Open makes stay for the life of the process.
var countsImage = sync.OnceValues(func() (image []byte, at int) {
	f, err := metrics.NewFile()
	if err != nil {
		panic(err)
	}
	defer f.Close()
	own, err := control.Duplicate(f.FD())
	if err != nil {
		panic(err)
	}
	r, err := metrics.Open(own)
	if err != nil {
		panic(err)
	}
	const mark = 0x1234567812345678
	r.Counter(fakeQuestions).Add(mark)
	image = make([]byte, 4<<10)
	if _, err := unix.Pread(f.FD(), image, 0); err != nil {
		panic(err)
	}
	return image, bytes.Index(image, binary.NativeEndian.AppendUint64(nil, mark))
})

// listenersOf are the keys of the listeners of a configuration.
func listenersOf(b control.Bundle) []string {
	if keys, ok := keysOf.Load(string(b.Config)); ok {
		return keys.([]string)
	}
	cfg, err := config.ParseSupervisor(b.Path, b.Config)
	if err != nil {
		panic(err)
	}
	var keys []string
	for _, l := range cfg.Listeners {
		keys = append(keys, l.Key())
	}
	keysOf.Store(string(b.Config), keys)
	return keys
}

var keysOf sync.Map
