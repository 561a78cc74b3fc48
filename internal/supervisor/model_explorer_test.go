package supervisor

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// scenario is what is explored: what is done, and how much may go wrong.
type scenario struct {
	name       string
	commands   []string // done in this order, each at any moment after the one before
	tunnels    []string // generations whose tunnels never end
	clients    bool     // each generation that serves gets one, which stays and sends nothing
	clusters   bool     // generations tell each other of their clusters
	tickets    bool     // generations share ticket keys
	supervised bool     // there is a service manager
	depth      int      // how much goes wrong on one path
}

// move is something that may happen next.
type move struct {
	name string
	at   string // the component that it concerns; "" is all
	cost
	do func()
}

const (
	// A change of the world that takes longer than patient does not come any more: no
	// timer of a supervisor or a generation is longer.
	patient = 2 * time.Minute
	slow    = 20 * time.Second
	most    = 500 // moves on a path

	timePasses = "time passes"
	sigkill    = "SIGKILL"
)

// moves returns what may happen next; the first is what happens if all goes well.
func (w *simWorld) moves() (all []move) {
	w.mu.Lock()
	defer w.mu.Unlock()
	add := func(name, at string, c cost, do func()) {
		all = append(all, move{name, at, c, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.tell("%s", name)
			do()
		}})
	}
	late := func() cost { return cost{delays: min(len(all), 1)} }
	for _, p := range w.due() {
		add(p.stream+" "+p.what, p.at, late(), func() {
			w.pending = slices.DeleteFunc(w.pending, func(o *pending) bool { return o == p })
			p.reach()
		})
	}
	alive := w.alive()
	for _, g := range w.generations {
		for _, p := range alive {
			if g.seeks() && p.meets {
				add(g.name+" finds "+p.name, "", late(), func() { g.find(p) })
			}
		}
		if g.impatient() {
			add(g.name+" gives its candidate up", g.name, late(), func() { g.channelEnd(g.candidate()) })
		}
		if g.mayEnd() {
			add(g.name+" has nothing left to do", g.name, late(), g.end)
		}
	}
	moving := late()
	if len(alive) == 0 && w.mayRestart() {
		add("restart", "", cost{}, func() { w.newSupervisor().boot() })
	}
	if p := w.asked(); p != nil && len(w.commands) > 0 {
		all = append(all, move{w.commands[0], p.name, moving, func() { w.command(p) }})
	}
	if !slices.ContainsFunc(w.pending, func(p *pending) bool { return p.what == sigkill }) { // that takes no time
		all = append(all, move{timePasses, "", moving, nil})
	}
	for _, g := range w.generations {
		if !g.dead {
			add("kill "+g.name, g.name, cost{faults: 1}, func() { g.die("signal: killed") })
		}
	}
	for _, p := range alive {
		add("kill "+p.name, "", cost{faults: 1}, p.kill)
	}
	return all
}

// mayRestart says whether a supervisor would be started again. Called with mu held.
func (w *simWorld) mayRestart() bool {
	_, refused := errors.AsType[*Refusal](w.supervisors[len(w.supervisors)-1].err)
	return !w.facts.stopped && !refused
}

// asked is the supervisor that a command reaches, nil if there is none. Called with mu
// held.
func (w *simWorld) asked() (one *simSupervisor) {
	for _, p := range w.alive() {
		if p.s != nil {
			p.s.do(func() {
				if one == nil && !p.s.succeeded {
					one = p
				}
			})
		}
	}
	return one
}

// command does the next thing of the scenario.
func (w *simWorld) command(p *simSupervisor) {
	w.mu.Lock()
	name := w.commands[0]
	w.commands = w.commands[1:]
	w.changes++
	w.tell("%s is told: %s", p, name)
	w.mu.Unlock()
	verb, config, _ := strings.Cut(name, " ")
	switch verb {
	case "reload":
		w.place.write(config)
		w.ask(p, name, func(ctx context.Context) error { _, err := p.s.Reload(ctx, false); return err })
	case "rollback":
		w.ask(p, name, func(ctx context.Context) error { _, err := p.s.Rollback(ctx, false); return err })
	case "upgrade":
		w.ask(p, name, func(ctx context.Context) error { _, err := p.s.Upgrade(ctx); return err })
	case "rotate":
		w.sleep(p)
	case "stop":
		w.mu.Lock()
		w.facts.stopped = true
		w.mu.Unlock()
		p.s.Stop()
	default:
		panic("no such command: " + name)
	}
}

// simConfigs are the configurations by name: the hosts of the addresses that they listen
// at, and what they tell a generation.
var simConfigs = map[string]struct {
	hosts []int
	told  string
}{
	"A": {hosts: []int{1, 2}},
	"B": {hosts: []int{1, 3}},

	"that is not ready":      {[]int{1, 4}, "cannot be ready"},
	"that dies":              {[]int{1}, "dies before ready"},
	"that refuses to serve":  {[]int{1, 4}, "refuses to serve"},
	"that the proxy refuses": {[]int{1, 4}, "check refuses"},
	"that nobody can read":   {nil, ""},
}

// place is where the worlds of one worker are, one after the other: a folder, and
// addresses that nobody else uses.
type place struct {
	dir  string
	net  string // of the addresses; the last byte is the host
	port int
}

// newPlace makes one. A network of 127.0.0.0/8 is taken by the number of the process, and
// the port is not one that the kernel gives to whoever wants any.
func newPlace(t *testing.T, number int) *place {
	t.Helper()
	p := &place{dir: t.TempDir(), net: fmt.Sprintf("127.%d.%d.%d", 1+os.Getpid()>>8%250, os.Getpid()&0xff, number*16)}
	if err := os.WriteFile(filepath.Join(p.dir, "proxy"), nil, 0o700); err != nil {
		t.Fatal(err)
	}
	for p.port = 20000; p.port < 20100; p.port++ {
		if l, err := net.Listen("tcp", p.address(1)); err == nil {
			l.Close()
			return p
		}
	}
	t.Fatal("no port is free")
	return nil
}

func (p *place) address(host int) string {
	a := netip.MustParseAddr(p.net).As4()
	a[3] += byte(host)
	return netip.AddrPortFrom(netip.AddrFrom4(a), uint16(p.port)).String()
}

// write puts a configuration in the place of the one before.
func (p *place) write(config string) {
	c, ok := simConfigs[config]
	if !ok {
		panic("no such configuration: " + config)
	}
	text := "nonsense"
	if c.hosts != nil {
		text = "[reload]\nready_timeout = \"10s\"\nprobation = \"10s\"\n[stop]\ntimeout = \"5s\"\n#! " + c.told + "\n"
		for _, h := range c.hosts {
			text += fmt.Sprintf("[[listeners]]\nname = \"l%d\"\naddress = %q\n", h, p.address(h))
		}
	}
	if err := os.WriteFile(filepath.Join(p.dir, "a.toml"), []byte(text), 0o600); err != nil {
		panic(err)
	}
}

// deviation is a move of a path that is not the first of those that are possible.
type deviation struct {
	at   int // how many moves came before
	move string
}

// branch is a path that was not gone yet: up to its last deviation.
type branch struct {
	path  []deviation
	trace uint64 // where it leads
	cost
}

// cost is what went wrong on a path.
type cost struct{ faults, delays int }

func (c cost) sum() int { return c.faults + c.delays }

func (c cost) and(o cost) cost { return cost{c.faults + o.faults, c.delays + o.delays} }

func (c cost) within(o cost) bool { return c.faults <= o.faults && c.delays <= o.delays }

// outcome is what came of a run.
type outcome struct {
	moves     int
	branches  []branch
	violation string
	story     []string
	diverged  bool // the run was not what it had been before
	pruned    bool // it came where another run had been
}

// run goes a path and on from there, always by the first move, until nothing happens
// any more or it comes where another run has been.
func (e *explorer) run(t *testing.T, at *place, b branch, telling bool) (o outcome) {
	var w *simWorld
	defer func() {
		if r := recover(); r != nil { // synctest's: goroutines wait for each other
			o.violation, o.story = fmt.Sprint("something does not end: ", r), w.story
		}
	}()
	synctest.Test(t, func(*testing.T) {
		w = newSimWorld(e.scenario, at, telling)
		w.place.write("A")
		w.newSupervisor().boot()
		w.standStill()
		w.walk(e, b, &o)
		o.violation, o.story = w.violation, w.story
		w.finish()
	})
	if err := at.free(); err != nil && o.violation == "" {
		o.violation = "1: who has ended still listens: " + err.Error()
	}
	return o
}

// free waits until the first address is: the last close of a socket may be under way.
func (p *place) free() error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		l, err := net.Listen("tcp", p.address(1))
		if err == nil {
			return l.Close()
		}
		if time.Now().After(deadline) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

func (w *simWorld) walk(e *explorer, b branch, o *outcome) {
	trace := traces{}
	left := b.path
	for ; w.violation == ""; o.moves++ {
		all := w.moves()
		made := &all[0]
		deviates := len(left) > 0 && left[0].at == o.moves
		if deviates {
			i := slices.IndexFunc(all, func(m move) bool { return m.name == left[0].move })
			if i < 0 {
				o.diverged = true
				return
			}
			made, left = &all[i], left[1:]
		} else if len(left) == 0 {
			for i := range all[1:] {
				m := &all[i+1]
				c := w.facts.used.and(m.cost)
				if c.sum() <= e.depth {
					path := append(slices.Clip(b.path), deviation{o.moves, m.name})
					o.branches = append(o.branches, branch{path, trace.with(m).sum(), c})
				}
			}
		}
		trace = trace.with(made)
		if len(left) == 0 {
			if deviates && trace.sum() != b.trace {
				o.diverged = true
				return
			}
			if !e.fresh(trace.sum(), w.facts.used.and(made.cost)) && !w.telling {
				o.pruned = true
				return
			}
		}
		switch changed := w.make(made, made == &all[0], len(left) > 0); {
		case changed:
		case made == &all[0]:
			w.checkEnd()
			return
		case deviates && len(left) == 0: // what can happen next could have happened before
			o.pruned = true
			return
		}
		if o.moves > most {
			w.fail("nothing comes to rest")
		}
	}
}

// make makes a move. It says whether anything has changed: time may pass in vain.
func (w *simWorld) make(m *move, first, again bool) (changed bool) {
	w.moved++
	w.facts.used = w.facts.used.and(m.cost)
	changed = true
	switch {
	case m.name != timePasses:
		m.do()
	case first:
		changed = w.elapse(patient)
	default:
		changed = w.elapse(slow)
	}
	w.standStill()
	w.check(m.name, again)
	return changed
}

// traces are what has happened to each component, in its order. What a component does
// depends on nothing else: two paths with the same traces lead to the same world,
// whatever the order between components was.
type traces map[string]uint64

func (t traces) with(m *move) traces {
	next := maps.Clone(t)
	if next == nil {
		next = traces{}
	}
	mix := func(c string) {
		h := fnv.New64a()
		fmt.Fprint(h, t[c], m.name)
		next[c] = h.Sum64()
	}
	if m.at == "" {
		mix("clock")
		for c := range t {
			mix(c)
		}
	} else {
		mix(m.at)
	}
	return next
}

func (t traces) sum() uint64 {
	var sum uint64
	for c, v := range t {
		h := fnv.New64a()
		fmt.Fprint(h, c, v)
		sum ^= h.Sum64()
	}
	return sum
}

// explorer goes all paths of a scenario, those on which less goes wrong first.
type explorer struct {
	scenario *scenario
	depth    int
	until    time.Time // when to stop, with what was found by then

	mu       sync.Mutex
	seen     map[uint64][]cost // what runs have come through
	queue    [][]branch        // by the sum of their costs
	busy     int               // runs under way
	idle     *sync.Cond
	found    *branch // on which an invariant was violated
	how      string
	runs     int
	moves    int
	diverged int
}

func newExplorer(sc *scenario) *explorer {
	e := &explorer{scenario: sc, depth: number("HOLDFAST_MODEL_DEPTH", sc.depth), until: time.Now().Add(longest), seen: make(map[uint64][]cost)}
	e.queue = make([][]branch, e.depth+1)
	e.idle = sync.NewCond(&e.mu)
	e.queue[0] = []branch{{}}
	return e
}

// knows is called with mu held.
func (e *explorer) knows(trace uint64, c cost) bool {
	return slices.ContainsFunc(e.seen[trace], func(o cost) bool { return o.within(c) })
}

// fresh says whether no run has come through a world at the same or a lower cost, and
// notes that one has.
func (e *explorer) fresh(trace uint64, c cost) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.knows(trace, c) {
		return false
	}
	e.seen[trace] = append(e.seen[trace], c)
	return true
}

// next returns a path to go; ok is false if there is none and none can come.
func (e *explorer) next() (b branch, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		if e.found != nil || time.Now().After(e.until) {
			return branch{}, false
		}
		for i, q := range e.queue {
			for len(q) > 0 {
				b, q = q[0], q[1:]
				e.queue[i] = q
				if len(b.path) == 0 || !e.knows(b.trace, b.cost) {
					e.busy++
					return b, true
				}
			}
		}
		if e.busy == 0 {
			return branch{}, false
		}
		e.idle.Wait()
	}
}

// took notes what came of a run.
func (e *explorer) took(b branch, o outcome) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.idle.Broadcast()
	e.busy--
	e.runs++
	e.moves += o.moves
	if o.diverged {
		e.diverged++
	}
	for _, n := range o.branches {
		e.queue[n.sum()] = append(e.queue[n.sum()], n)
	}
	if o.violation != "" && (e.found == nil || b.sum() < e.found.sum()) {
		e.found, e.how = &b, o.violation
	}
}

// explore goes all paths of a scenario, and fails with the story of the first on which
// an invariant does not hold.
func explore(t *testing.T, sc *scenario) {
	t.Helper()
	e := newExplorer(sc)
	began := time.Now()
	t.Run("paths", func(t *testing.T) {
		for n := range workers {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				at := newPlace(t, n)
				for b, ok := e.next(); ok; b, ok = e.next() {
					e.took(b, e.run(t, at, b, false))
				}
			})
		}
	})
	left := 0
	for _, q := range e.queue {
		left += len(q)
	}
	t.Logf("%s: %d runs, %d worlds, %d moves, in %s; %d runs diverged, %d branches left",
		sc.name, e.runs, len(e.seen), e.moves, time.Since(began).Round(time.Millisecond), e.diverged, left)
	if e.found == nil {
		return
	}
	e.seen = make(map[uint64][]cost)
	o := e.run(t, newPlace(t, 0), *e.found, true)
	t.Errorf("%s\nafter %v (once more: %q):\n%s", e.how, e.found.path, o.violation, strings.Join(o.story, "\n"))
}

// How far to explore, unless HOLDFAST_MODEL_DEPTH says another depth for all scenarios.
const workers = 2

var longest = time.Duration(number("HOLDFAST_MODEL_SECONDS", 60)) * time.Second // a scenario

func number(variable string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(variable)); err == nil {
		return n
	}
	return otherwise
}
