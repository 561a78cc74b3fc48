package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/pidfd"
	"holdfast/internal/runtimedir"
)

// simSupervisor is the process of a supervisor, with everything that the real one is
// given by its process: it is its kernel, its runtime directory and its rendezvous.
type simSupervisor struct {
	w    *simWorld
	name string
	s    *Supervisor // nil: a candidate that does not know yet what it inherits
	dead bool        // killed, or ended by itself
	err  error       // of Run, if it has ended by itself

	links []*link
	meets bool          // at the rendezvous
	holds bool          // back what is asked of it: nobody sees its counters
	heir  *succession   // to whom it hands over
	of    *succession   // from whom it has taken over
	gone  chan struct{} // closed when it is dead
}

func (p *simSupervisor) String() string {
	if p == nil {
		return "nobody"
	}
	return p.name
}

// newSupervisor makes a process that does not do anything yet. Called with mu held.
func (w *simWorld) newSupervisor() *simSupervisor {
	p := &simSupervisor{w: w, name: fmt.Sprintf("s%d", len(w.supervisors)+1), gone: make(chan struct{})}
	w.supervisors = append(w.supervisors, p)
	w.changes++
	w.tell("%s starts", p.name)
	return p
}

// boot has a process be a supervisor. Called with mu held.
func (p *simSupervisor) boot() {
	o := Options{
		ConfigPath: filepath.Join(p.w.place.dir, "a.toml"), DefaultProxy: filepath.Join(p.w.place.dir, "proxy"), Admin: noAdmin{},
		Log:      slog.New(&simLog{p: p}),
		ApplyLog: func(config.Log) {}, LogsDropped: func() uint64 { return 0 },
		Directory: p, Rendezvous: p, Secret: []byte("secret"), Successor: p.successor, Fresh: p.w.saved == nil,
	}
	if p.of != nil {
		o.Predecessor = p.of
	}
	p.s = New(o)
	p.s.kernel = kernel{start: p.start, check: p.check, identify: p.identify, find: p.find, ends: p.newEnds, channel: p.openEnd, uptime: p.w.uptime}
	go func() {
		err := p.s.Run(context.Background())
		p.exit(err)
	}()
}

// exit is the end of a process of which Run has returned: the kernel closes everything.
func (p *simSupervisor) exit(err error) {
	w := p.w
	s := p.s
	for n := range s.living {
		s.totals.End(n)
	}
	if s.totals != nil {
		s.totals.Settle()
	}
	if s.stats != nil {
		s.stats.file.Close()
	}
	for _, o := range s.open {
		o.Close()
	}
	dropAll(s.left)
	w.mu.Lock()
	if !p.dead {
		w.tell("%s ends: %v", p.name, err)
		p.err = err
		p.die()
	}
	w.mu.Unlock()
}

// die severs the process from the world. Called with mu held.
func (p *simSupervisor) die() {
	w := p.w
	p.dead, p.meets = true, false
	close(p.gone)
	w.changes++
	w.giveUp(func(o *pending) bool { return o.at == p.name })
	for _, l := range p.links {
		l.closeS()
	}
	for _, g := range w.generations {
		for _, h := range g.handles {
			if h.s == p {
				offer(h.ended, "its supervisor is dead")
			}
		}
	}
	p.heir.predecessorEnded()
	p.of.candidateEnded()
}

// freeze gives everybody who has a duplicate of p's memory files a copy instead, as they
// are: what is left of a killed supervisor goes on writing to its own. Called with mu
// held.
func (p *simSupervisor) freeze() {
	s := p.s
	if s == nil || s.estate.facts == nil {
		return
	}
	copies := make(map[uint64]int)
	for _, fd := range []int{s.estate.facts.FD(), s.estate.totals.FD(), s.estate.tickets.FD(), s.stats.file.FD()} {
		copies[inode(fd)] = copyOf(fd)
	}
	replace := func(fd int) {
		if c, ok := copies[inode(fd)]; ok {
			if err := unix.Dup3(c, fd, unix.O_CLOEXEC); err != nil {
				panic(err)
			}
		}
	}
	for _, g := range p.w.generations {
		for _, fd := range g.kept {
			replace(fd)
		}
	}
	for _, o := range p.w.pending {
		for _, fd := range o.fds {
			replace(fd)
		}
	}
	if p.heir != nil {
		for _, fd := range p.heir.given {
			replace(fd)
		}
	}
	for _, fd := range copies {
		unix.Close(fd)
	}
}

// copyOf returns a memory file with the content and the seals of another.
func copyOf(fd int) int {
	var st unix.Stat_t
	c, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	err = errors.Join(err, unix.Fstat(fd, &st), unix.Ftruncate(c, st.Size))
	for at := int64(0); err == nil && at < st.Size; {
		var end int64
		if at, err = unix.Seek(fd, at, unix.SEEK_DATA); err != nil {
			err = nil // only a hole follows
			break
		}
		end, err = unix.Seek(fd, at, unix.SEEK_HOLE)
		data := make([]byte, end-at)
		if err == nil {
			_, err = unix.Pread(fd, data, at)
		}
		if err == nil {
			_, err = unix.Pwrite(c, data, at)
		}
		at = end
	}
	seals, e := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err = errors.Join(err, e); err == nil {
		_, err = unix.FcntlInt(uintptr(c), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		panic(err)
	}
	return c
}

// kill ends a supervisor as kill -9 does. Its goroutines are left, and nothing that they
// do has an effect any more; they are told to stop, so that they close what they hold.
// Called with mu held.
func (p *simSupervisor) kill() {
	p.freeze()
	p.die()
	p.end()
}

// end has the goroutines of a supervisor end.
func (p *simSupervisor) end() {
	if p.s == nil {
		return
	}
	go func() {
		p.s.Stop()
		p.s.Stop() // at once
	}()
}

var errDead = errors.New("this supervisor is dead")

// start is exec, for the kernel.
func (p *simSupervisor) start(r *release) (process, channel, error) {
	w := p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.dead || w.over {
		return nil, nil, errDead
	}
	g := w.newGeneration()
	w.tell("%s starts %s", p.name, g.name)
	w.startedBy(p, g)
	l := w.connect(p, g, 1)
	l.say(&control.Message{Type: control.TypeHello, Hello: &control.Hello{
		Core: control.Core, CoreMin: control.CoreMin, Version: "model", PID: g.pid, Passage: w.passageVersion(), Clusters: w.clustersVersion(), Tickets: w.ticketsVersion(),
	}})
	return g.handle(p, true), l, nil
}

// check stands for the proxy binary that is asked about a configuration.
func (p *simSupervisor) check(_ context.Context, r *release) error {
	if strings.Contains(string(r.bytes), "#! check refuses\n") {
		return &Refusal{Step: "configuration", Problems: []string{"a mistake"}}
	}
	return nil
}

func (p *simSupervisor) identify(pid int) (pidfd.Identity, error) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if p.w.process(pid) == nil {
		return pidfd.Identity{}, os.ErrProcessDone
	}
	return pidfd.Identity{PID: pid, Start: uint64(pid)}, nil
}

func (p *simSupervisor) find(id pidfd.Identity) (process, error) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	g := p.w.process(id.PID)
	if g == nil || p.dead || p.w.over {
		return nil, os.ErrProcessDone
	}
	return g.handle(p, false), nil
}

// process returns the living generation with a process's number. Called with mu held.
func (w *simWorld) process(pid int) *simGeneration {
	for _, g := range w.generations {
		if g.pid == pid && !g.dead {
			return g
		}
	}
	return nil
}

func (p *simSupervisor) newEnds() (ours, theirs int, err error) {
	w := p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.newLink()
	l.endS, ours = w.travel(l)
	l.endG, theirs = w.travel(l)
	l.closedS, l.closedG = true, true // until somebody opens them
	w.travellers = append(w.travellers, l)
	return ours, theirs, nil
}

// openEnd makes a descriptor of a supervisor's end a channel.
func (p *simSupervisor) openEnd(fd int) (channel, error) {
	w := p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	defer control.CloseAll([]int{fd})
	l := w.at(fd)
	if p.dead || w.over {
		return nil, errDead
	}
	l.s, l.closedS = p, false
	p.links = append(p.links, l)
	return l, nil
}

// LoadState and SaveState make it a [Directory], of which there is one in the world.
func (p *simSupervisor) LoadState() (*runtimedir.State, error) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	return p.w.saved, nil
}

func (p *simSupervisor) SaveState(s *runtimedir.State) error {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if !p.dead && !p.w.over {
		saved := *s
		saved.Generations = slices.Clone(s.Generations)
		p.w.saved = &saved
	}
	return nil
}

// Serve, Path and Refused make it a [Rendezvous]; the handshake is not part of the model.
func (p *simSupervisor) Serve(ctx context.Context, _ func(int) []byte, _ *slog.Logger, _ func(*control.Conn, *control.Hello)) {
	set := func(meets bool) {
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		p.meets = meets && !p.dead
		p.w.changes++
	}
	set(true)
	<-ctx.Done()
	set(false)
}

func (p *simSupervisor) Path() string    { return "control.sock" }
func (p *simSupervisor) Refused() uint64 { return 0 }

// succession is the channel between a supervisor and its candidate, with what tableflip
// does between the two. It is both a [Successor] and a [Predecessor].
type succession struct {
	w        *simWorld
	old, new *simSupervisor
	toOld    chan word
	toNew    chan word

	// What the candidate has inherited. given are the descriptors, wherever they are now.
	estate *control.Estate
	fds    map[string]int
	given  []int
}

// word is a message between the two.
type word struct {
	name string
	err  error
}

// The limits are those of internal/service.
const (
	simPrepareTimeout  = 10 * time.Second
	simCommitTimeout   = 5 * time.Second
	simFarewellTimeout = 10 * time.Second
)

// successor starts a candidate.
func (p *simSupervisor) successor(ctx context.Context) (Successor, error) {
	w := p.w
	w.mu.Lock()
	if p.dead || w.over {
		w.mu.Unlock()
		return nil, errDead
	}
	u := &succession{w: w, old: p, toOld: make(chan word, 16), toNew: make(chan word, 16)}
	u.new = w.newSupervisor()
	u.new.of, p.heir = u, u
	u.tellOld(word{name: "hello"})
	w.mu.Unlock()
	if err := u.await(ctx, "hello", simPrepareTimeout); err != nil {
		return nil, errors.Join(err, u.Discard())
	}
	return u, nil
}

// tellOld and tellNew are called with mu held.
func (u *succession) tellOld(v word) {
	if !u.old.dead && !u.w.over {
		u.w.put(&pending{
			stream: fmt.Sprintf("%s⇒%s", u.new, u.old), what: v.name, at: u.old.name,
			reach: func() { u.toOld <- v },
		})
	}
}

func (u *succession) tellNew(v word) {
	if !u.new.dead && !u.w.over {
		u.w.put(&pending{
			stream: fmt.Sprintf("%s⇒%s", u.old, u.new), what: v.name, at: u.new.name,
			reach: func() { u.toNew <- v },
		})
	}
}

const gone = "gone"

// candidateEnded and predecessorEnded are called with mu held.
func (u *succession) candidateEnded() {
	if u != nil {
		dropAll(u.fds)
		u.tellOld(word{name: gone})
		offer(u.toNew, word{name: gone})
	}
}

func (u *succession) predecessorEnded() {
	if u != nil {
		if u.new.s == nil && !u.new.dead { // it has nothing to wait for
			u.w.giveUp(func(p *pending) bool { return p.at == u.new.name })
			u.w.put(&pending{stream: fmt.Sprintf("%s⇒%s", u.old, u.new), what: "gone", at: u.new.name, reach: u.new.die})
			return
		}
		u.tellNew(word{name: gone})
		offer(u.toOld, word{name: gone})
	}
}

// await waits for what the candidate says next.
func (u *succession) await(ctx context.Context, name string, within time.Duration) error {
	select {
	case v := <-u.toOld:
		switch {
		case v.err != nil:
			return v.err
		case v.name != name:
			return fmt.Errorf("the candidate is %s, and not %s", v.name, name)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(within):
		return fmt.Errorf("the candidate has not said %s within %s", name, within)
	}
}

// Offer implements [Successor].
func (u *succession) Offer(ctx context.Context, estate *control.Estate, fds map[string]int) error {
	w := u.w
	w.mu.Lock()
	given := make(map[string]int)
	var all []int
	for key, fd := range fds {
		d, err := control.Duplicate(fd)
		if err != nil {
			w.fail("5: %s hands over %s, which is not open: %v", u.old, key, err)
			continue
		}
		given[key] = d
		all = append(all, d)
	}
	if u.new.dead || u.old.dead || w.over {
		control.CloseAll(all)
	} else {
		w.put(&pending{
			stream: fmt.Sprintf("%s⇒%s", u.old, u.new), what: "estate", at: u.new.name, fds: all,
			reach: func() {
				u.estate, u.fds, u.given = estate, given, all
				u.new.boot()
			},
		})
	}
	w.mu.Unlock()
	return u.await(ctx, "prepared", simPrepareTimeout)
}

// Commit implements [Successor].
func (u *succession) Commit(ctx context.Context) error {
	u.w.mu.Lock()
	u.old.holds = true
	if !u.old.dead {
		u.tellNew(word{name: "commit"})
	}
	u.w.mu.Unlock()
	return u.await(ctx, "ready", simCommitTimeout)
}

// Farewell implements [Successor].
func (u *succession) Farewell(context.Context) {
	u.w.mu.Lock()
	defer u.w.mu.Unlock()
	if !u.old.dead {
		u.tellNew(word{name: "farewell"})
	}
}

// Discard implements [Successor].
func (u *succession) Discard() error {
	u.w.mu.Lock()
	u.old.holds = false
	if !u.new.dead && !u.old.dead {
		u.w.put(&pending{stream: u.old.name + "↯" + u.new.name, what: sigkill, at: u.new.name, reach: u.new.kill})
	}
	u.w.mu.Unlock()
	select {
	case <-u.new.gone:
	case <-u.old.gone:
	}
	return nil
}

func (u *succession) PID() int        { return 2000 }
func (u *succession) Version() string { return "model" }

// Estate implements [Predecessor].
func (u *succession) Estate() (*control.Estate, map[string]int) {
	fds := u.fds
	u.fds = nil
	return u.estate, fds
}

// Prepared implements [Predecessor].
func (u *succession) Prepared() error {
	u.w.mu.Lock()
	u.tellOld(word{name: "prepared"})
	u.w.mu.Unlock()
	if v := <-u.toNew; v.name != "commit" {
		return errors.New("the predecessor is gone, or goes on by itself")
	}
	return nil
}

// Refuse implements [Predecessor].
func (u *succession) Refuse(err error) {
	u.w.mu.Lock()
	defer u.w.mu.Unlock()
	u.tellOld(word{"refuses", err})
}

// Committed implements [Predecessor].
func (u *succession) Committed() error {
	u.w.mu.Lock()
	u.tellOld(word{name: "ready"})
	u.w.mu.Unlock()
	v := word{name: "late"}
	select {
	case v = <-u.toNew:
	case <-time.After(simFarewellTimeout):
	}
	if v.name != "farewell" && u.w.scenario.supervised {
		return errors.New("the service manager may not know this process")
	}
	return nil
}
