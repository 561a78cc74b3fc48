package vault_test

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/vault"
)

// Generations come and go, have tunnels, move them, lose and get channels, and die at any
// moment; now and then the vault itself dies and another takes its place. At no moment
// may two generations relay a tunnel, and none may be lost.
func TestEachTunnelIsRelayedByOneWhateverHappens(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, seed)
			for range 300 {
				w.step()
			}
			w.check()
			w.end()
		})
	}
}

// world is everything that is there.
type world struct {
	t testing.TB

	mu      sync.Mutex
	random  *rand.Rand
	v       *vault.Vault
	vaults  int  // which one v is
	hurried bool // vaults lose their patience soon, and some generations forget to answer
	numbers int
	all     map[int]*actor // the living
	serving *actor
	tunnels map[*tunnel]bool // that have not ended
	burials sync.WaitGroup
	readers sync.WaitGroup

	seen map[string]int
}

// tunnel is what is true of a tunnel.
type tunnel struct {
	*line
	mu      sync.Mutex
	relayer *actor // nil: nobody
	begun   int    // how often somebody has begun to relay it
	ended   bool
	story   []string // what has happened to it, for who has to understand it
}

func (t *tunnel) tell(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.story = append(t.story, fmt.Sprintf(format, args...))
}

// actor is a generation that keeps to the protocol.
type actor struct {
	w *world
	n int

	handed chan struct{} // closed when nobody hands it anything

	attaching sync.Mutex // held while it gets a channel

	mu      sync.Mutex
	dead    bool
	resumed bool // it has got all there is to resume, or nothing is
	conn    *control.Vault
	v       int // which vault that is of
	last    uint64
	stands  uint64
	own     map[uint64]*owned
}

type owned struct {
	*tunnel
	number   uint64
	from     control.VaultTunnel
	fds      []int
	standing bool
	stand    uint64
	to       int // which vault it was released to
	begun    int // when it was released
}

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{
		t: t, random: rand.New(rand.NewPCG(seed, 6)),
		hurried: seed%2 == 1,
		all:     make(map[int]*actor), tunnels: make(map[*tunnel]bool), seen: make(map[string]int),
	}
	w.v = w.newVault()
	w.serve()
	return w
}

func (w *world) newVault() *vault.Vault {
	w.vaults++
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
	v := start(w.t, vault.Options{Log: log, Lost: w.lost})
	if w.hurried {
		v.Hurry()
	}
	return v
}

// lost gives a generation another channel that has lost its own.
func (w *world) lost(n int) {
	w.mu.Lock()
	a := w.all[n]
	w.mu.Unlock()
	if a != nil {
		w.saw("lost")
		w.reopen(a)
	}
}

func (w *world) chance(percent int) bool { return w.number(100) < percent }

func (w *world) number(below int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.random.IntN(below)
}

func (w *world) saw(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[what]++
}

// begin: a relays the tunnel from now on.
func (t *tunnel) begin(a *actor) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.relayer != nil {
		t.t.Errorf("tunnel %d is relayed by generation %d, and now by %d too: %s", t.number, t.relayer.n, a.n, strings.Join(t.story, "; "))
	}
	t.relayer = a
	t.begun++
	t.story = append(t.story, fmt.Sprintf("relayed by %d", a.n))
}

// stop: a does not relay it any more, if it did.
func (t *tunnel) stop(a *actor) (begun int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.relayer == a {
		t.relayer = nil
	}
	return t.begun
}

// launch starts a generation, which is to resume something, or nothing.
func (w *world) launch(resumes bool) *actor {
	w.mu.Lock()
	w.numbers++
	a := &actor{w: w, n: w.numbers, resumed: !resumes, handed: make(chan struct{}), own: make(map[uint64]*owned)}
	w.mu.Unlock()
	a.attach()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all[a.n] = a
	return a
}

// serve has a new generation serve.
func (w *world) serve() {
	a := w.launch(false)
	close(a.handed)
	w.v.Target(a.n)
	w.serving = a
}

// attach gives a a channel to the vault.
func (a *actor) attach() {
	a.attaching.Lock()
	defer a.attaching.Unlock()
	a.w.mu.Lock()
	v, n := a.w.v, a.w.vaults
	a.w.mu.Unlock()
	ours, theirs, err := control.Ends()
	if err != nil {
		a.w.t.Fatal(err)
	}
	conn, err := control.NewVault(ours)
	if err != nil {
		a.w.t.Fatal(err)
	}
	next, err := control.NewVault(theirs)
	if err != nil {
		a.w.t.Fatal(err)
	}
	v.Open(a.n, conn)
	runtime.Gosched() // it may do something over the channel that it has, which fails

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		next.Close()
		return
	}
	if a.conn != nil {
		a.conn.Close()
	}
	a.conn, a.v = next, n
	a.w.readers.Go(func() { a.read(next) })
	a.store()
	var batch []control.VaultEntry
	for _, o := range a.own {
		batch = append(batch, o.entry())
		o.tell("told again by %d (standing: %v) to vault %d", a.n, o.standing, n)
	}
	for batch := range slices.Chunk(batch, control.VaultBatch) {
		a.send(next, control.VaultDeposit, batch...)
	}
	a.send(next, control.VaultComplete)
}

func (a *actor) store() {
	file, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		a.w.t.Fatal(err)
	}
	defer unix.Close(file)
	_ = a.conn.Send(&control.VaultPacket{Type: control.VaultStore, Files: []int{file}}, patient)
}

func (o *owned) entry() control.VaultEntry {
	e := control.VaultEntry{Number: o.number, From: o.from, Record: []byte(fmt.Sprint(o.line.number)), Files: o.fds}
	if o.standing {
		e.Stand = o.stand
	}
	return e
}

// send says whether it is with the vault.
func (a *actor) send(conn *control.Vault, t control.VaultType, entries ...control.VaultEntry) bool {
	return conn.Send(packet(t, entries...), patient) == nil
}

// read does what the vault says.
func (a *actor) read(conn *control.Vault) {
	for {
		p, err := conn.Receive(0)
		if err != nil {
			if errors.Is(err, control.ErrProtocol) {
				a.w.t.Error(err)
			}
			return
		}
		a.mu.Lock()
		if a.dead || a.conn != conn {
			p.CloseFiles()
		} else {
			a.take(p)
		}
		a.mu.Unlock()
	}
}

func (a *actor) take(p *control.VaultPacket) {
	control.CloseAll(p.Files)
	switch p.Type {
	case control.VaultResume:
		for _, e := range p.Entries {
			o := &owned{tunnel: a.w.find(e), number: e.Number, from: e.From, fds: e.Files}
			a.last = max(a.last, e.Number)
			a.own[e.Number] = o
			o.begin(a)
		}
	case control.VaultComplete:
		a.resumed = true
	case control.VaultTake:
		for _, e := range p.Entries {
			a.asked(e)
		}
	case control.VaultGone, control.VaultReturned:
		for _, e := range p.Entries {
			a.answered(e.Number, e.Stand, p.Type == control.VaultReturned)
		}
	case control.VaultStore:
	default:
		a.w.t.Errorf("generation %d is told type %d", a.n, p.Type)
	}
}

// find returns the tunnel with these descriptors.
func (w *world) find(e control.VaultEntry) *tunnel {
	w.mu.Lock()
	defer w.mu.Unlock()
	inode := inodesOf(w.t, e.Files[:1])[0]
	for t := range w.tunnels {
		if inodesOf(w.t, t.ends[:1])[0] == inode {
			return t
		}
	}
	// It has ended, and the vault was not told yet.
	return &tunnel{line: &line{t: w.t}, ended: true, story: []string{fmt.Sprint("ended before; from ", e.From, " as ", e.Number)}}
}

// asked takes a tunnel, or not.
func (a *actor) asked(e control.VaultEntry) {
	if a.w.chance(25) {
		a.w.find(e).tell("declined by %d from %v", a.n, e.From)
		a.send(a.conn, control.VaultDeclined, control.VaultEntry{From: e.From})
		control.CloseAll(e.Files)
		a.w.saw("declined")
		return
	}
	if a.w.hurried && a.w.chance(2) {
		control.CloseAll(e.Files)
		a.w.saw("forgotten")
		return
	}
	a.last++
	o := &owned{tunnel: a.w.find(e), number: a.last, from: e.From, fds: e.Files[:2]}
	taken := control.VaultEntry{From: e.From, Number: o.number, Record: e.Record}
	if !a.send(a.conn, control.VaultTaken, taken) {
		control.CloseAll(e.Files)
		a.w.saw("not taken, since nobody heard it")
		o.tell("not taken by %d as %d: not heard", a.n, o.number)
		return
	}
	a.w.saw("taken")
	o.tell("taken by %d as %d from %v", a.n, o.number, e.From)
	o.begin(a)
	a.own[o.number] = o
}

// answered goes on with a tunnel, or lets go of it.
func (a *actor) answered(number, stand uint64, returned bool) {
	o := a.own[number]
	if o != nil && o.stand != stand {
		a.w.t.Errorf("generation %d is told what became of %d when it stood the time before", a.n, number)
		return
	}
	if o == nil || !o.standing {
		a.w.t.Errorf("generation %d is told twice what became of %d (returned: %v)", a.n, number, returned)
		return
	}
	if returned && o.to != a.v {
		// What another vault knew may be lost with a third; the kernel's counters tell.
		o.mu.Lock()
		touched := o.begun != o.tunnel.begun
		o.mu.Unlock()
		a.w.saw("returned by another vault")
		if touched {
			a.w.saw("returned, but it has gone on elsewhere")
			a.send(a.conn, control.VaultWithdraw, control.VaultEntry{Number: number})
			returned = false
		}
	}
	o.tell("answered to %d: %v", a.n, returned)
	if !returned {
		delete(a.own, number)
		control.CloseAll(o.fds)
		return
	}
	o.standing = false
	o.begin(a)
}

// step has something happen.
func (w *world) step() {
	a := w.any()
	switch n := w.number(100); {
	case n < 45:
		w.serving.open(1 + w.number(8))
	case n < 60:
		a.finish(w.number(4))
	case n < 84:
		if a != w.serving {
			a.release(1 + w.number(16))
		}
	case n < 88:
		w.reopen(a)
	case n < 92:
		w.serve()
	case n < 98:
		a.kill()
		if a == w.serving {
			w.serve()
		}
	case w.chance(30):
		w.another()
	}
}

// any returns a living generation.
func (w *world) any() *actor {
	w.mu.Lock()
	defer w.mu.Unlock()
	living := make([]int, 0, len(w.all))
	for n := range w.all {
		living = append(living, n)
	}
	slices.Sort(living)
	return w.all[living[w.random.IntN(len(living))]]
}

// open has tunnels begin.
func (a *actor) open(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	var batch []control.VaultEntry
	for range n {
		a.last++
		t := &tunnel{line: newLine(a.w.t, a.last)}
		a.w.mu.Lock()
		a.w.tunnels[t] = true
		a.w.mu.Unlock()
		o := &owned{tunnel: t, number: a.last, fds: t.fds}
		t.line.fds = nil
		a.own[a.last] = o
		batch = append(batch, o.entry())
		defer t.begin(a)
	}
	a.send(a.conn, control.VaultDeposit, batch...)
}

// some returns up to n tunnels that a relays.
func (a *actor) some(n int) (some []*owned) {
	for _, o := range a.own {
		if len(some) < n && !o.standing {
			some = append(some, o)
		}
	}
	return some
}

// finish has tunnels end.
func (a *actor) finish(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	var batch []control.VaultEntry
	for _, o := range a.some(n) {
		o.stop(a)
		o.mu.Lock()
		o.ended = true
		o.story = append(o.story, "ended by "+fmt.Sprint(a.n))
		o.mu.Unlock()
		a.w.mu.Lock()
		delete(a.w.tunnels, o.tunnel)
		a.w.mu.Unlock()
		delete(a.own, o.number)
		control.CloseAll(o.fds)
		batch = append(batch, control.VaultEntry{Number: o.number})
	}
	a.send(a.conn, control.VaultWithdraw, batch...)
}

// release has tunnels stand still until somebody says what becomes of them.
func (a *actor) release(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead || !a.resumed {
		return
	}
	some := a.some(n)
	var batch []control.VaultEntry
	for _, o := range some {
		a.stands++
		o.begun, o.to, o.standing, o.stand = o.stop(a), a.v, true, a.stands
		batch = append(batch, control.VaultEntry{Number: o.number, Stand: o.stand, State: make([]byte, 3000)})
		o.tell("released by %d as %d", a.n, o.number)
	}
	if !a.send(a.conn, control.VaultRelease, batch...) {
		for _, o := range some {
			o.standing = false
			o.begin(a)
		}
	}
}

// reopen gives a another channel to the same vault.
func (w *world) reopen(a *actor) {
	a.mu.Lock()
	may := a.resumed && !a.dead
	a.mu.Unlock()
	if may {
		w.saw("another channel")
		a.attach()
	}
}

// kill ends a's process. What it had goes on in another.
func (a *actor) kill() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dead {
		return
	}
	a.w.saw("killed")
	a.dead = true
	for _, o := range a.own {
		o.stop(a)
		o.tell("generation %d is killed, standing: %v", a.n, o.standing)
		control.CloseAll(o.fds)
	}
	a.conn.Close()
	a.w.mu.Lock()
	delete(a.w.all, a.n)
	a.w.mu.Unlock()
	a.w.burials.Go(func() {
		<-a.handed
		a.w.resume(a.n)
	})
}

// resume has the tunnels of a dead generation go on in fresh ones, of which some die
// before they have all.
func (w *world) resume(dead int) {
	left := w.v.Died(dead, false)
	for left > 0 {
		r := w.launch(true)
		var early sync.WaitGroup
		if w.chance(40) {
			w.saw("killed while it resumed")
			early.Go(r.kill)
		}
		theirs := false
		err := w.v.HandStores(dead, r.n)
		if err == nil {
			err = w.v.HandTunnels(dead, r.n)
			theirs = !errors.Is(err, vault.ErrNoChannel)
		}
		early.Wait()
		if err == nil {
			w.saw("resumed")
		} else {
			r.kill()
		}
		close(r.handed)
		if theirs {
			return // r's burial goes on, if there is one
		}
	}
	w.v.Drop(dead)
}

// another has another vault take the place of one that is dead.
func (w *world) another() {
	w.quiet()
	w.saw("another vault")
	w.v.Kill()
	w.mu.Lock()
	w.v = w.newVault()
	var living []*actor
	var expected []int
	for n, a := range w.all {
		living, expected = append(living, a), append(expected, n)
	}
	w.mu.Unlock()
	w.v.Target(w.serving.n)
	w.v.Expect(expected)
	for _, a := range living {
		if w.chance(20) {
			a.finish(2) // while nobody is there
		}
		a.attach()
		if w.chance(30) {
			a.release(5)
		}
	}
	for _, a := range living {
		eventually(w.t, "a generation does not tell what it has", func() bool {
			return w.v.Await(w.t.Context(), a.n) == nil // it may lose its channel, and get another
		})
	}
}

// quiet waits until nothing is left to be resumed.
func (w *world) quiet() {
	w.burials.Wait()
	w.mu.Lock()
	var living []*actor
	for _, a := range w.all {
		living = append(living, a)
	}
	w.mu.Unlock()
	for _, a := range living {
		eventually(w.t, "a generation has not got all", func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.resumed || a.dead
		})
	}
	w.burials.Wait()
}

// check: every tunnel is relayed, and the vault has it from whoever does.
func (w *world) check() {
	w.quiet()
	for _, a := range w.all {
		eventually(w.t, fmt.Sprintf("tunnels of generation %d were not answered", a.n), func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			for _, o := range a.own {
				if o.standing {
					return false
				}
			}
			return true
		})
	}
	for t := range w.tunnels {
		t.mu.Lock()
		if t.relayer == nil {
			w.t.Errorf("tunnel %d is lost: %s", t.number, strings.Join(t.story, "; "))
		}
		t.mu.Unlock()
	}
	sum := 0
	for _, a := range w.all {
		a.mu.Lock()
		n := len(a.own)
		for _, o := range a.own {
			if o.ended {
				w.t.Errorf("generation %d relays a tunnel that has ended: %s", a.n, strings.Join(o.story, "; "))
			}
		}
		a.mu.Unlock()
		sum += n
		eventually(w.t, fmt.Sprintf("generation %d has %d tunnels, and the vault has %d of it", a.n, n, w.v.Deposits(a.n)), func() bool {
			return w.v.Deposits(a.n) == n
		})
	}
	if sum != len(w.tunnels) {
		w.t.Errorf("%d tunnels are relayed, %d are there", sum, len(w.tunnels))
	}
	if got := w.v.Totals().Deposits; got != sum {
		w.t.Errorf("the vault has %d, want %d", got, sum)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t.Logf("%d generations, %d tunnels, %v", w.numbers, sum, w.seen)
}

// end has everything end, and waits until all descriptors are closed.
func (w *world) end() {
	for _, a := range w.all {
		a.mu.Lock()
		a.dead = true
		for _, o := range a.own {
			control.CloseAll(o.fds)
		}
		a.conn.Close()
		a.mu.Unlock()
	}
	w.readers.Wait()
	w.v.Close()
	for t := range w.tunnels {
		t.wantClosed()
	}
}
