package supervisor

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// simFacts are what the world knows about a run and no supervisor has to.
type simFacts struct {
	configured map[string]uint64  // inodes of the listening sockets of the configuration that serves, by key
	questions  uint64             // that generations have counted
	shown      map[string]float64 // counters, by name and labels
	lossy      bool               // some of that is lost with those who knew it
	commander  *simSupervisor     // whom a generation has obeyed last
	since      int                // after how many moves
	served     bool               // something has
	asked      int                // reloads and upgrades that have not returned
	done       int                // those that were done
	stopped    bool               // by command
	tickets    [32]byte           // the key that a ticket was made with last
	used       cost
}

// view is what a supervisor believes.
type view struct {
	begun, commands bool
	serving         int               // 0: nothing
	living          map[int]belief    // by number
	sockets         map[string]uint64 // inodes of what is configured, by key
	has             []uint64          // inodes of the listening sockets that it has
}

type belief struct {
	pid     int
	state   state
	counted bool // what it counts is added up
}

// see reads what p's loop owns. Called while the world stands still.
func (p *simSupervisor) see() (v view) {
	if p.s == nil {
		return v
	}
	v.living, v.sockets = make(map[int]belief), make(map[string]uint64)
	p.s.do(func() {
		s := p.s
		select {
		case <-s.begun:
			v.begun = true
		default:
		}
		v.commands = v.begun && !s.succeeded && !s.stopping
		if s.serving != nil {
			v.serving = s.serving.number
		}
		for n, g := range s.living {
			v.living[n] = belief{g.proc.PID(), g.state, g.counts != nil}
		}
		for key, o := range s.sockets {
			v.sockets[key] = inode(o.FD())
		}
		for _, h := range s.open {
			v.has = appendListening(v.has, h.FD())
		}
		for _, fd := range s.left {
			v.has = appendListening(v.has, fd)
		}
	})
	return v
}

// pulse is a number that changes when something does. Called while the world stands
// still, with mu held.
func (w *simWorld) pulse() int {
	sum := w.changes
	add := func(n int) { sum = sum*31 + n }
	flag := func(b bool) { add(map[bool]int{true: 1}[b]) }
	for _, p := range w.alive() {
		if p.s == nil {
			continue
		}
		p.s.do(func() {
			s := p.s
			for _, g := range s.living {
				sum += g.number * (1 + int(g.state)) * 1000003
			}
			add(s.crashes)
			flag(s.probation != nil)
			flag(s.switching)
			flag(s.restoring)
			flag(s.reloading)
			flag(s.upgrading != nil)
		})
	}
	for _, g := range w.generations {
		flag(g.mayEnd())
		flag(g.impatient())
		flag(g.seeks())
	}
	return sum
}

// inode identifies a file, whoever has it; 0: it is not open.
func inode(fd int) uint64 {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0
	}
	return st.Ino
}

func appendListening(inodes []uint64, fd int) []uint64 {
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on != 1 {
		return inodes
	}
	return append(inodes, inode(fd))
}

// holders returns who has which listening socket. Called with mu held.
func (w *simWorld) holders(views map[*simSupervisor]view) map[uint64][]string {
	by := make(map[uint64][]string)
	note := func(inodes []uint64, who string) {
		for _, ino := range inodes {
			by[ino] = append(by[ino], who)
		}
	}
	for p, v := range views {
		note(v.has, p.name)
	}
	for _, g := range w.generations {
		for _, named := range []map[string]int{g.accepts, g.sockets} {
			for _, fd := range named {
				note(appendListening(nil, fd), g.name)
			}
		}
	}
	for _, p := range w.pending {
		for _, fd := range p.fds {
			note(appendListening(nil, fd), "a message")
		}
	}
	return by
}

// servingNow returns the newest generation that accepts. Called with mu held.
func (w *simWorld) servingNow() (newest *simGeneration) {
	for _, g := range w.generations {
		if !g.dead && g.phase == simServing {
			newest = g
		}
	}
	return newest
}

// views returns what the supervisors that live believe, and the one that commands in
// its own eyes, nil if none does. Called with mu held.
func (w *simWorld) views() (all map[*simSupervisor]view, commands *simSupervisor) {
	all = make(map[*simSupervisor]view)
	for _, p := range w.alive() {
		v := p.see()
		all[p] = v
		if v.commands && commands != nil {
			w.fail("6: both %s and %s command", commands, p)
		}
		if v.commands {
			commands = p
		}
	}
	return all, commands
}

// check looks at the invariants that hold at every standstill. After a move that was
// made on another run already only what the world has to know is noted.
func (w *simWorld) check(last string, again bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.facts.stopped || w.violation != "" {
		return
	}
	views, p := w.views()
	w.noteSockets(views, p)
	changed := w.noteCounts(views, p)
	if changed || strings.HasPrefix(last, "kill ") {
		w.checkCounters(p)
	}
	if !again {
		w.checkSockets(views, p)
		w.checkClients()
	}
	before := w.facts.tickets
	w.checkTickets()
	w.checkTicketsKept(before)
}

// noteSockets notes what is configured. Called with mu held.
func (w *simWorld) noteSockets(views map[*simSupervisor]view, p *simSupervisor) {
	now := views[p].sockets
	if g := w.servingNow(); p == nil && g != nil && w.facts.served { // as it was told last
		now = make(map[string]uint64)
		for key, fd := range g.accepts {
			now[key] = inode(fd)
		}
	}
	if len(now) == 0 {
		return
	}
	for key, ino := range now {
		if was, ok := w.facts.configured[key]; ok && was != ino {
			w.fail("1: %s is another socket than before", key)
		}
	}
	w.facts.configured, w.facts.served = now, true
}

// checkSockets is invariant 1. Called with mu held.
func (w *simWorld) checkSockets(views map[*simSupervisor]view, p *simSupervisor) {
	holders := w.holders(views)
	for key, ino := range w.facts.configured {
		if len(holders[ino]) > 0 {
			continue
		}
		if p != nil || w.servingNow() != nil || w.facts.used.faults < 2 {
			w.fail("1: nobody has the listening socket %s any more", key)
		}
		w.facts.configured = nil // all who had it were killed
		return
	}
}

// noteCounts notes whether counts are lost that nobody has seen, because nobody lives any
// more who had them. It says whether anything has changed. Called with mu held.
func (w *simWorld) noteCounts(views map[*simSupervisor]view, p *simSupervisor) (changed bool) {
	for _, g := range w.generations {
		var by *simSupervisor
		for p, v := range views {
			if b := v.living[g.bundle.Generation]; b.counted && b.pid == g.pid && v.begun {
				by = p
			}
		}
		changed = changed || g.counted != by
		w.facts.lossy = w.facts.lossy || g.dead && by != nil && len(views) > 1 // another one may not hear of it
		g.folded = g.folded || g.dead && g.counted != nil && !g.counted.dead && by == nil
		g.counted = by
		if !g.dead || g.folded || by != nil || g.questions == 0 {
			continue
		}
		w.facts.lossy = true
	}
	if p == nil && !slices.ContainsFunc(w.generations, func(g *simGeneration) bool { return g.kept[control.KeptTotals] != 0 }) {
		// Nobody lives who has any of it: what is started now is another service.
		w.facts.shown, w.facts.lossy, w.facts.served, w.facts.configured = nil, true, false, nil
		w.facts.tickets = [32]byte{}
	}
	return changed
}

// late says whether a generation lives that keeps what an earlier supervisor knew, and
// that p did not wait for: it adds that up when it comes. Called with mu held.
func (w *simWorld) late(p *simSupervisor) bool {
	return w.facts.used.delays > 0 && slices.ContainsFunc(w.generations, func(g *simGeneration) bool {
		return !g.dead && g.kept[control.KeptTotals] != 0 && g.counted != p
	})
}

// checkCounters is invariant 7. Called with mu held.
func (w *simWorld) checkCounters(p *simSupervisor) {
	if p == nil || p.holds || w.late(p) {
		return
	}
	now := make(map[string]float64)
	for _, f := range p.s.totals.Merge(nil, p.s.stats.families()) {
		if f.GetType() != dto.MetricType_COUNTER {
			continue
		}
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetName() + "=" + l.GetValue()
			}
			now[name] = m.GetCounter().GetValue()
		}
	}
	for name, before := range w.facts.shown {
		if now[name] < before {
			w.fail("7: %s was %v and is %v", name, before, now[name])
		}
	}
	if shown := now[fakeQuestions.Name]; shown > float64(w.facts.questions) {
		w.fail("7: %v questions are shown, and there were %d", shown, w.facts.questions)
	}
	w.facts.shown = now
}

// checkEnd looks at what must be when nothing happens any more.
func (w *simWorld) checkEnd() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.violation != "" {
		return
	}
	if w.facts.asked > 0 {
		w.fail("2: somebody who has asked for a change has no answer")
	}
	alive := w.alive()
	last := w.supervisors[len(w.supervisors)-1]
	switch views, p := w.views(); {
	case p != nil:
		if len(alive) != 1 {
			w.fail("6: %d supervisors live: %v", len(alive), alive)
		}
		w.checkServing(p, views)
		w.checkPassed()
		w.checkClusters()
		w.checkCounters(p)
		if shown := w.facts.shown[fakeQuestions.Name]; shown != float64(w.facts.questions) && !w.facts.lossy {
			w.fail("7: %v questions are shown, and there were %d", shown, w.facts.questions)
		}
	case len(alive) > 0:
		w.fail("6: %v lives and does not command", alive)
	case !w.facts.stopped && w.facts.served:
		w.fail("6: no supervisor lives: %v", last.err)
	case w.facts.used.faults == 0: // otherwise `stop --orphans` is for what has survived
		for _, g := range w.generations {
			if !g.dead {
				w.fail("6: %s has survived the end of the service", g)
			}
		}
	}
}

// truths are what a supervisor should believe of a generation.
var truths = map[simPhase]state{
	simBuilding: starting, simStandby: ready, simServing: serving, simDraining: draining, simStopping: stopping,
}

// checkServing is invariant 6, at the end. Called with mu held.
func (w *simWorld) checkServing(p *simSupervisor, views map[*simSupervisor]view) {
	v := views[p]
	var serving []*simGeneration
	for _, g := range w.generations {
		if g.dead {
			continue
		}
		b, known := v.living[g.bundle.Generation]
		delete(v.living, g.bundle.Generation)
		if !known || b.pid != g.pid {
			w.fail("6: %s lives and %s does not know it", g, p)
			continue
		}
		if truth := truths[g.phase]; b.state != truth {
			w.fail("6: %s is %s, and %s believes that it is %s", g, truth, p, b.state)
		}
		switch g.phase {
		case simServing:
			serving = append(serving, g)
			got := make(map[string]uint64)
			for key, fd := range g.accepts {
				got[key] = inode(fd)
			}
			if v.serving != g.bundle.Generation {
				w.fail("6: %s serves, and %s does not think so", g, p)
			} else if !maps.Equal(got, w.facts.configured) {
				w.fail("1: %s accepts from %v, and what is configured is %v", g, got, w.facts.configured)
			}
		case simBuilding, simStandby:
			w.fail("6: %s is neither used nor ended", g)
		}
	}
	for n := range v.living {
		w.fail("6: %s believes that generation %d lives", p, n)
	}
	if len(serving) != 1 {
		w.fail("6: %d generations serve: %v", len(serving), serving)
	}
	configured := slices.Collect(maps.Values(w.facts.configured))
	for ino, who := range w.holders(views) {
		if !slices.Contains(configured, ino) {
			w.fail("1: %v still have a listening socket that no configuration wants", who)
		}
	}
}

// startedBy is called when p starts g: invariant 6, nothing is started twice. Called
// with mu held.
func (w *simWorld) startedBy(p *simSupervisor, g *simGeneration) {
	if w.facts.commander == nil {
		w.facts.commander = p
	}
	if q := w.facts.commander; q != p && !q.dead && !w.facts.stopped {
		w.fail("6: %s starts %s, and it is %s that generations obey", p, g, q)
	}
	if w.facts.asked > 0 || w.facts.used.delays > 0 {
		return // for a reload; or to be found too late is as good as not at all
	}
	if o := w.servingNow(); o != nil && !w.leaves(o) {
		w.fail("6: %s starts %s although %s serves", p, g, o)
	}
}

// leaves says whether g is about to hear that it serves no more. Called with mu held.
func (w *simWorld) leaves(g *simGeneration) bool {
	return slices.ContainsFunc(w.pending, func(p *pending) bool {
		return p.at == g.name && (strings.HasPrefix(p.what, "drain") || strings.HasPrefix(p.what, "stop") || p.what == "SIGTERM")
	})
}

// obeyed is called when g obeys p. Called with mu held.
func (w *simWorld) obeyed(g *simGeneration, p *simSupervisor, epoch uint64) {
	w.tell("    %s obeys %s, epoch %d", g, p, epoch)
	if w.facts.commander != p {
		w.facts.commander, w.facts.since = p, w.moved
	}
}

// ordered is called when g does what somebody says who commands it: nobody does who has
// said it after another supervisor commanded, and lives. Called with mu held.
func (w *simWorld) ordered(g *simGeneration, m *control.Message, from sending) {
	if c := w.facts.commander; c != from.by && !c.dead && from.when > w.facts.since {
		w.fail("6: %s does what %s says (%s), although %s commands already", g, from.by, m.Type, c)
	}
}

// ask has somebody ask p for a change: invariant 2, one that is refused changes nothing.
func (w *simWorld) ask(p *simSupervisor, name string, change func(context.Context) error) {
	w.mu.Lock()
	w.facts.asked++
	before, was := w.facts, w.servingNow()
	w.mu.Unlock()
	go func() {
		err := change(context.Background())
		w.mu.Lock()
		defer w.mu.Unlock()
		w.facts.asked--
		w.changes++
		_, refused := errors.AsType[*Refusal](err)
		switch {
		case p.dead: // nobody hears the answer
		case errors.Is(err, ErrSucceeded): // asked again, it is the successor that answers
			w.commands = append([]string{name}, w.commands...)
		case err == nil:
			w.tell("%s is done", name)
			w.facts.done++
		default:
			w.tell("%s: %v", name, err)
			// Of two delays the second may keep a generation away that has obeyed a candidate:
			// it is replaced, as any that is slower than it is waited for.
			if now := w.servingNow(); refused && w.facts.used.delays < 2 && was != nil && now != was && w.facts.used.faults == before.used.faults && w.facts.done == before.done && !w.facts.stopped {
				w.fail("2: %s was refused, and it is %s that serves, not %s", name, now, was)
			}
		}
	}()
}
