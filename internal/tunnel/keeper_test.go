package tunnel_test

import (
	"bytes"
	"errors"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
)

// keeper is what Sets are that belong to one another, and who keeps what they deposit: it
// has the tunnels of a Set that has died go on in another one, and passes on what a Set
// releases. Sets die as processes do: their loops just stop.
type keeper struct {
	t       testing.TB
	options func(*tunnel.Options) // of each Set; nil: none of its own
	hurry   func(*tunnel.Set)

	sentence tunnel.Sentence // of all tunnels that another Set goes on with

	mu     sync.Mutex
	guests []*guest // all that there ever were
	takes  *guest   // what is released; nil: nobody
	ended  []tunnel.Record
	moved  int
	work   []func() // for the keeper's goroutine
	wake   *sync.Cond
	over   bool
	worker sync.WaitGroup
}

// guest is a Set, and what is kept of it.
type guest struct {
	*keeper
	set    *tunnel.Set
	loops  []tunnel.Loop
	stores []copies
	counts *metrics.Registry

	// Guarded by keeper.mu.
	dead    bool
	kept    map[uint64]*kept
	transit map[*ticket]bool // to this one, of which it has said nothing
	calls   []string
	rounds  []tunnel.Ticket // that are complete

	// say is asked before each call: an error is returned instead, and nothing done. said
	// is called after it was done. Both may end the goroutine.
	say  func(call string) error
	said func(call string)
	mute bool // what is released is not answered

	running sync.WaitGroup
}

// copies are descriptors of what a loop has.
type copies struct {
	file  int
	pipes []inflight.Pipe
}

// kept is a deposit.
type kept struct {
	tunnel.Record
	place    tunnel.Place
	fds      [2]int // the keeper's
	released bool
}

// ticket is a tunnel on its way.
type ticket struct {
	from   *guest
	number uint64
	stand  uint64
	fds    [2]int // that were handed out
}

func newKeeper(t testing.TB) *keeper {
	k := &keeper{t: t}
	k.wake = sync.NewCond(&k.mu)
	k.worker.Go(k.run)
	t.Cleanup(k.close)
	return k
}

// run does what a Vault may not do, which must not wait.
func (k *keeper) run() {
	for {
		k.mu.Lock()
		for len(k.work) == 0 && !k.over {
			k.wake.Wait()
		}
		work := k.work
		k.work = nil
		over := k.over
		k.mu.Unlock()
		if over {
			return
		}
		for _, fn := range work {
			fn()
		}
	}
}

func (k *keeper) laterLocked(fn func()) {
	k.work = append(k.work, fn)
	k.wake.Signal()
}

// close ends all tunnels and Sets.
func (k *keeper) close() {
	k.mu.Lock()
	guests := slices.Clone(k.guests)
	k.mu.Unlock()
	for _, g := range guests {
		if g.isDead() {
			continue
		}
		g.saying(nil)
		g.set.CloseAll(tunnel.Stopped, 0)
		g.set.Abandon()
		waitEmpty(k.t, g.set)
		if n := g.set.Buffers(); n != 0 {
			k.t.Errorf("%d buffers are still out", n)
		}
		g.stop(func(l tunnel.Loop) { l.Poller.Stop() })
	}
	k.mu.Lock()
	k.over = true
	k.wake.Signal()
	k.mu.Unlock()
	k.worker.Wait()
	for _, g := range guests {
		g.closeKept()
	}
}

func (g *guest) closeKept() {
	for _, d := range g.kept {
		d.close()
	}
	for _, s := range g.stores {
		unix.Close(s.file)
		for _, p := range s.pipes {
			p.Close()
		}
	}
	g.kept, g.stores = nil, nil
}

func dup(t testing.TB, fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
	}
	return n
}

func dupPipes(t testing.TB, pipes []inflight.Pipe) (all []inflight.Pipe) {
	for _, p := range pipes {
		all = append(all, inflight.Pipe{R: dup(t, p.R), W: dup(t, p.W)})
	}
	return all
}

// guest returns a new Set, with loops of that shape.
func (k *keeper) guest(s shape) *guest {
	g := &guest{keeper: k}
	for range s.loops {
		fd, err := inflight.NewFile(2*s.tunnels, s.buffers)
		if err != nil {
			k.t.Fatal(err)
		}
		store, err := inflight.Open(fd, inflight.NewPipes(s.pipes, 1<<20))
		if err != nil {
			k.t.Fatal(err)
		}
		g.stores = append(g.stores, copies{dup(k.t, fd), dupPipes(k.t, store.Pipes())})
		g.loops = append(g.loops, tunnel.Loop{Store: store})
	}
	g.begin()
	return g
}

func (g *guest) begin() {
	for i := range g.loops {
		loop, err := poller.New()
		if err != nil {
			g.t.Fatal(err)
		}
		g.loops[i].Poller = loop
		g.running.Go(loop.Run)
	}
	g.kept, g.transit, g.counts = make(map[uint64]*kept), make(map[*ticket]bool), metrics.NewRegistry()
	o := tunnel.Options{
		Log:     slog.New(slog.NewTextHandler(faults{g.t}, &slog.HandlerOptions{Level: slog.LevelError})),
		Metrics: g.counts, Loops: g.loops, Vault: g, OnEnd: g.onEnd, OnMoved: g.onMoved,
	}
	if g.options != nil {
		g.options(&o)
	}
	g.set = tunnel.NewSet(o)
	g.set.Hurry(3*time.Second, 3*time.Second, 5*time.Millisecond)
	g.set.HurryVault(250*time.Millisecond, 2*time.Millisecond, 5*time.Millisecond)
	if g.hurry != nil {
		g.hurry(g.set)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.guests = append(g.guests, g)
}

func (g *guest) onEnd(r tunnel.Record) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.keeper.ended = append(g.keeper.ended, r)
}

func (g *guest) onMoved(r tunnel.Record) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.keeper.moved++
}

func (g *guest) isDead() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.dead
}

// stop ends the loops in some way and closes what only the Set had.
func (g *guest) stop(how func(tunnel.Loop)) {
	for _, l := range g.loops {
		how(l)
	}
	g.running.Wait()
	for _, l := range g.loops {
		l.Store.Close()
	}
}

// die stops the loops between two turns, at once, and nothing of the Set happens any more.
func (g *guest) die() {
	g.mu.Lock()
	g.dead = true
	g.mu.Unlock()
	g.stop(func(l tunnel.Loop) { l.Poller.Post(runtime.Goexit) })
	buried, declined := g.set.Bury()
	g.mu.Lock()
	defer g.mu.Unlock()
	for tk := range g.transit {
		if !buried[tk.fds[0]] && !slices.Contains(declined, tunnel.Ticket(tk)) { // its loop had not seen it yet
			unix.Close(tk.fds[0])
			unix.Close(tk.fds[1])
		}
		g.backLocked(tk)
	}
	g.transit = nil
	if g.takes == g {
		g.takes = nil
	}
}

// backLocked says that a tunnel goes on where it was.
func (g *guest) backLocked(tk *ticket) {
	if d := tk.from.kept[tk.number]; d != nil {
		d.released = false
	}
	if !tk.from.dead {
		g.laterLocked(func() { tk.from.set.Returned([]tunnel.Answer{{Number: tk.number, Stand: tk.stand}}) })
	}
}

// resume has the tunnels of a Set that is dead go on in a new one.
func (g *guest) resume(killed bool) *guest {
	g.waitForVerdicts()
	r := &guest{keeper: g.keeper, stores: g.stores}
	for _, s := range g.stores {
		store, err := inflight.Reopen(dup(g.t, s.file), dupPipes(g.t, s.pipes), killed)
		if err != nil {
			g.t.Fatal(err)
		}
		r.loops = append(r.loops, tunnel.Loop{Store: store})
	}
	r.begin()
	r.kept, g.kept, g.stores = g.kept, nil, nil
	batches := make([][]tunnel.Resumed, len(r.loops))
	for _, n := range slices.Sorted(maps.Keys(r.kept)) {
		d := r.kept[n]
		batches[d.place.Loop] = append(batches[d.place.Loop], tunnel.Resumed{
			Record: d.Record, Place: d.place, FDs: [2]int{dup(g.t, d.fds[0]), dup(g.t, d.fds[1])},
			Sentence: g.sentence,
		})
	}
	for loop, b := range batches {
		r.set.Resume(loop, b)
	}
	r.set.Resumed()
	return r
}

// waitForVerdicts waits until nobody may take a tunnel of a dead Set any more.
func (g *guest) waitForVerdicts() {
	eventually(g.t, "nothing of the dead one is on its way", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, other := range g.guests {
			for tk := range other.transit {
				if tk.from == g {
					return false
				}
			}
		}
		for _, d := range g.kept {
			if d.released {
				return false
			}
		}
		return true
	})
}

// doLocked does what a call of the Vault is for.
func (g *guest) doLocked(call string, do func()) error {
	g.calls = append(g.calls, call)
	if g.say != nil {
		if err := g.say(call); err != nil {
			return err
		}
	}
	do()
	if g.said != nil {
		g.said(call)
	}
	return nil
}

var errNobody = errors.New("nobody is there")

func (g *guest) Deposit(tunnels []tunnel.Deposit) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(tunnels) == 0 || len(tunnels) > tunnel.VaultBatch {
		g.t.Errorf("%d tunnels are deposited at once", len(tunnels))
	}
	return g.doLocked("deposit", func() {
		for _, d := range tunnels {
			g.keepLocked(d)
		}
	})
}

func (g *guest) keepLocked(d tunnel.Deposit) {
	// One that was released may have been answered, which the Set is about to hear.
	old := g.kept[d.Number]
	if old == nil && d.Stand > 0 {
		return
	}
	released := false
	if old != nil {
		released = old.released
		if old.place != d.Place {
			g.t.Errorf("tunnel %d is at %+v, and was at %+v", d.Number, d.Place, old.place)
		}
		old.close()
	}
	g.kept[d.Number] = &kept{
		Record: d.Record, place: d.Place, released: released,
		fds: [2]int{dup(g.t, d.FDs[0]), dup(g.t, d.FDs[1])},
	}
}

func (d *kept) close() {
	unix.Close(d.fds[0])
	unix.Close(d.fds[1])
}

func (g *guest) Withdraw(numbers []uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.doLocked("withdraw", func() {
		for _, n := range numbers {
			if d := g.kept[n]; d != nil {
				d.close()
				delete(g.kept, n)
			}
		}
	})
}

func (g *guest) Complete(t tunnel.Ticket) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.doLocked("complete", func() { g.rounds = append(g.rounds, t) })
}

func (g *guest) Release(tunnels []tunnel.Standing) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	held := 0
	for _, s := range tunnels {
		held += len(s.Held[0]) + len(s.Held[1])
	}
	if len(tunnels) == 0 || len(tunnels) > tunnel.VaultBatch || held > tunnel.VaultHeld {
		g.t.Errorf("%d tunnels with %d bytes are released at once", len(tunnels), held)
	}
	return g.doLocked("release", func() {
		for _, s := range tunnels {
			g.releaseLocked(s)
		}
	})
}

func (g *guest) releaseLocked(s tunnel.Standing) {
	d := g.kept[s.Number]
	if d == nil {
		g.t.Errorf("tunnel %d is released, and was not deposited", s.Number)
		return
	}
	d.released = true
	for i := range s.Held {
		s.Held[i] = bytes.Clone(s.Held[i])
		if s.Pipe[i] != 0 {
			s.Pipe[i] = dup(g.t, s.Pipe[i])
		}
	}
	if !g.mute {
		g.laterLocked(func() { g.pass(s) })
	}
}

// pass has another Set take what this one has released.
func (g *guest) pass(s tunnel.Standing) {
	g.mu.Lock()
	defer g.mu.Unlock()
	to, d := g.takes, g.kept[s.Number]
	if to == nil || to.dead || to == g || d == nil {
		for _, fd := range s.Pipe {
			if fd != 0 {
				unix.Close(fd)
			}
		}
		g.backLocked(&ticket{from: g, number: s.Number, stand: s.Stand})
		return
	}
	tk := &ticket{g, s.Number, s.Stand, [2]int{dup(g.t, d.fds[0]), dup(g.t, d.fds[1])}}
	to.transit[tk] = true
	to.set.Take([]tunnel.Arriving{{Record: d.Record, FDs: tk.fds, Standing: s, Ticket: tk, Sentence: g.sentence}})
}

func (g *guest) Taken(t tunnel.Ticket, d tunnel.Deposit) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.doLocked("taken", func() {
		tk := t.(*ticket)
		delete(g.transit, tk)
		g.keepLocked(d)
		if was := tk.from.kept[tk.number]; was != nil {
			was.close()
			delete(tk.from.kept, tk.number)
		}
		if !tk.from.dead {
			g.laterLocked(func() { tk.from.set.Gone([]uint64{tk.number}) })
		}
	})
}

func (g *guest) Declined(t tunnel.Ticket) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.doLocked("declined", func() {
		tk := t.(*ticket)
		delete(g.transit, tk)
		g.backLocked(tk)
	})
}

// count returns how often a call was made.
func (g *guest) count(call string) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.calls {
		if c == call {
			n++
		}
	}
	return n
}

// keeps returns how many tunnels of a Set are deposited.
func (g *guest) keeps() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.kept)
}

// saying sets what is asked before each call.
func (g *guest) saying(say func(call string) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.say = say
}

// dieIn has the Set's process end in the next call of that kind, before anything was done
// or after it. It returns whether there was one within that time.
func (g *guest) dieIn(call string, after bool, within time.Duration) bool {
	return g.isToDie(call, after)(within)
}

// isToDie is dieIn in two steps: what it returns waits for that.
func (g *guest) isToDie(call string, after bool) (dies func(within time.Duration) bool) {
	in := make(chan struct{})
	end := func(c string) error {
		if c == call {
			g.say, g.said = nil, nil
			g.dead = true
			close(in)
			runtime.Goexit()
		}
		return nil
	}
	g.mu.Lock()
	if after {
		g.said = func(c string) { end(c) }
	} else {
		g.say = end
	}
	g.mu.Unlock()
	return func(within time.Duration) bool {
		select {
		case <-in:
			g.die()
			return true
		case <-time.After(within):
		}
		g.mu.Lock()
		g.say, g.said = nil, nil
		dead := g.dead
		g.mu.Unlock()
		if dead {
			g.die()
		}
		return dead
	}
}

// records returns the records of all tunnels that have ended.
func (k *keeper) records() []tunnel.Record {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.ended)
}

// lasting is an origin of tunnels that are to be deposited.
func lasting(l tunnel.Limits) *tunnel.Origin {
	return &tunnel.Origin{Limits: l, SurviveCrash: true, Move: true}
}

// open starts a tunnel that is to be deposited.
func (g *guest) open(spec tunnel.Spec) (client, server tcpConn) {
	g.t.Helper()
	if spec.Origin == nil {
		spec.Origin = lasting(tunnel.Limits{})
	}
	return open(g.t, g.set, spec)
}
