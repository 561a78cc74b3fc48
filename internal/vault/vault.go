// Package vault keeps what the tunnels of generations need to outlive them: for each loop
// of a generation its memory file and pipes, for each tunnel two sockets and a record. It
// looks into none of that, knows no processes, and touches no byte of a client.
//
//	v := vault.New(vault.Options{Log: log, Reserve: 256})
//	v.Open(7, conn)                  // what generation 7 deposits is kept
//	...
//	if v.Died(7, killed) > 0 {       // its process is gone, for certain
//		v.Open(9, conn)              // a fresh one, which makes its loops of the old one's
//		v.HandStores(7, 9)
//		v.HandTunnels(7, 9)          // and goes on with its tunnels
//	}
//
// # One description
//
// Of each tunnel there is one description at any time, and so one process at most that
// relays it: that of its deposit's owner. What a generation has sent over its channel
// counts as done when sendmsg has succeeded, since what was sent is received here, also
// when the sender is dead; and when a channel is ended from here, then so that what was
// not sent before cannot be sent any more ([control.Vault.CloseRead]).
//
// So a tunnel that a generation has released belongs to it until VaultTaken has come
// from the one that was asked, and to that one from then on; and the end of its channel
// says of all the others that they were not taken. Nobody has to guess what a dead
// generation had in mind.
//
// # An earlier vault
//
// Generations outlive the supervisor, but the vault does not: its successor is told
// everything again, also what was released and not answered. It answers such a tunnel
// when all generations have told what they have: it is gone if one of them says that it
// has come from there, and returned if nobody does.
//
// # Who is trusted
//
// A generation names tunnels of its own by number, and others' only if they were sent to
// it. One that breaks the protocol loses its channel and its deposits; its tunnels live
// on. One that does not read, or does not answer, delays nobody but those who wait for
// it, and those for a bounded time. What nobody can check is what an earlier vault was
// told: see above.
package vault

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// Options are what a vault needs to know. Its functions are called beside everything else
// and must not block; they may call the vault.
type Options struct {
	Log *slog.Logger

	// Reserve is how many descriptors below the limit are not for the vault.
	Reserve int

	// Changed is called when a count may have changed. nil: nobody wants to know.
	Changed func()

	// Lost is called some time after the channel of a living generation has ended, whoever
	// has ended it, unless the generation has broken the protocol: it should be given
	// another. The time grows while channels do not last. nil: it is not.
	Lost func(generation int)
}

// ErrNoChannel says that a generation has no open channel.
var ErrNoChannel = errors.New("the generation has no vault channel")

// Vault is the vault. Its methods may be called concurrently, and do not wait unless
// they say so.
type Vault struct {
	opts   Options
	log    *slog.Logger
	limits limits
	bounds bounds

	work sync.WaitGroup // what reads and writes channels

	mu          sync.Mutex // guards all that follows, and is held while nothing is sent, received or closed
	closed      bool
	generations map[int]*generation
	target      int
	waiting     map[control.VaultTunnel]*deposit // in that state
	totals      Totals
	tidier      tidier
	news        chan struct{} // closed and made anew when something has happened that somebody may wait for
}

// limits are those of descriptors: what has a number from there on is not kept.
type limits struct {
	deposits int

	// stores leaves room for what the next generation has in flight, when deposits have
	// taken all there is: without, it and those after it would have no vault.
	stores int

	// unclosed is how many of a generation may wait to be closed.
	unclosed int
}

// limitsOf returns the limits below a number of descriptors.
func limitsOf(n int) limits {
	spare := min(1024, n/8)
	return limits{deposits: n - spare, stores: n, unclosed: spare / 2}
}

// Totals are the counts of a vault.
type Totals struct {
	Deposits int // now

	// Ever.
	Refused  uint64 // deposits of which there was no room
	Moved    uint64 // tunnels that were taken
	Returned uint64 // tunnels that were released, and not taken
	Resumed  uint64 // tunnels of dead generations that were handed on
}

// generation is what the vault has of one.
type generation struct {
	number  int
	channel *channel // nil: none
	closer  *closer

	stores  []*files // of each loop
	tunnels map[uint64]*deposit
	moved   map[uint64]struct{} // its tunnels that other generations have taken

	// told: it has said once to this vault what it has, or no earlier vault can have known
	// it. Until then that may know better.
	told     bool
	patience *time.Timer // how long it may take until it has a channel; nil: nobody waits for that

	lost  *time.Timer   // until it should be given another channel; nil: it has one, or gets none
	pause time.Duration // how long that was the last time

	dead, killed bool // its process is gone, and was killed
	heir         bool // its stores are those of a dead one
	handing      bool // it has not got all yet that it has inherited
}

// deposit is a tunnel.
type deposit struct {
	owner   *generation
	number  uint64
	from    control.VaultTunnel // where it was before
	record  []byte              // never changed, only replaced
	sockets files               // without any: it waits for an answer only
	via     *channel            // over which its owner has last told of it, and is answered
	to      *channel            // of whoever was asked to take it
	state   state
	stand   uint64 // of its release, as its generation counts these
}

func (d *deposit) name() control.VaultTunnel {
	return control.VaultTunnel{Generation: d.owner.number, Number: d.number}
}

// New returns an empty vault.
func New(o Options) *Vault {
	limit := unix.Rlimit{Cur: math.MaxInt32}
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) // cannot fail
	return &Vault{
		opts: o, log: o.Log,
		limits:      limitsOf(int(min(limit.Cur, math.MaxInt32)) - o.Reserve),
		bounds:      usual,
		generations: make(map[int]*generation),
		waiting:     make(map[control.VaultTunnel]*deposit),
		news:        make(chan struct{}),
		tidier:      newTidier(),
	}
}

// Open begins to read a generation's channel, and takes it over. An earlier one is read
// to its end before; what was deposited there stays until the generation has deposited
// all it has over the new one.
func (v *Vault) Open(number int, conn *control.Vault) {
	v.mu.Lock()
	defer v.mu.Unlock()
	g := v.generationLocked(number)
	if v.closed || g.dead {
		conn.Close()
		return
	}
	g.stopWaiting()
	g.stopLost()
	before := g.channel
	g.channel = newChannel(g, conn)
	if before != nil {
		before.end()
	}
	c := g.channel
	c.overdue = time.AfterFunc(v.bounds.patience, func() { v.onOverdue(c) })
	v.work.Go(func() { v.read(c, before) })
}

// generationLocked returns the generation of that number.
func (v *Vault) generationLocked(number int) *generation {
	g := v.generations[number]
	if g == nil {
		g = &generation{number: number, told: true, closer: new(closer), tunnels: make(map[uint64]*deposit), moved: make(map[uint64]struct{})}
		v.generations[number] = g
	}
	return g
}

// openLocked returns a generation's channel if that can be sent over.
func (v *Vault) openLocked(number int) *channel {
	if g := v.generations[number]; g != nil && g.channel != nil && !g.channel.over {
		return g.channel
	}
	return nil
}

// Has says whether a generation has an open channel.
func (v *Vault) Has(generation int) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.openLocked(generation) != nil
}

// Await waits until a generation has said over its channel that all is deposited. The
// error is [ErrNoChannel] if that channel has ended, or ctx's cause.
func (v *Vault) Await(ctx context.Context, generation int) error {
	var c *channel
	waitErr := v.wait(ctx, func() bool {
		c = v.openLocked(generation)
		return c == nil || c.complete
	})
	if c == nil {
		return ErrNoChannel
	}
	return waitErr
}

// wait waits until is says true, which is called with mu held.
func (v *Vault) wait(ctx context.Context, is func() bool) error {
	for {
		v.mu.Lock()
		done, news := is(), v.news
		v.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// tellLocked wakes those who wait.
func (v *Vault) tellLocked() {
	close(v.news)
	v.news = make(chan struct{})
}

// Target says which generation is asked to take what others release. 0: none.
func (v *Vault) Target(generation int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.target = generation
}

// Settle waits until no tunnel is on its way from one generation to another. With no
// target that stays so.
func (v *Vault) Settle(ctx context.Context) error {
	return v.wait(ctx, func() bool {
		for _, g := range v.generations {
			for _, d := range g.tunnels {
				if d.to != nil {
					return false
				}
			}
		}
		return true
	})
}

// Expect says which generations have lived before this vault: what they have to tell is
// waited for. It is to be called before the first [Vault.Open], and changes nothing for
// one that is known already.
func (v *Vault) Expect(generations []int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, number := range generations {
		if v.generations[number] == nil {
			g := v.generationLocked(number)
			g.told = false
			v.startWaiting(g)
		}
	}
}

// Without says that a living generation has nothing to do with the vault.
func (v *Vault) Without(generation int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if g := v.generations[generation]; g != nil {
		g.stopWaiting()
		g.stopLost()
		v.decideLocked()
	}
}

// Deposits is how many tunnels of a generation are kept.
func (v *Vault) Deposits(generation int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	if g := v.generations[generation]; g != nil {
		return len(g.tunnels)
	}
	return 0
}

// MovedFrom is how many tunnels of a generation others have taken.
func (v *Vault) MovedFrom(generation int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	if g := v.generations[generation]; g != nil {
		return len(g.moved)
	}
	return 0
}

// Totals returns the counts.
func (v *Vault) Totals() Totals {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := v.totals
	for _, g := range v.generations {
		t.Deposits += len(g.tunnels)
	}
	return t
}

// changed tells that counts have changed. mu is not held.
func (v *Vault) changed() {
	if v.opts.Changed != nil {
		v.opts.Changed()
	}
}

// Close ends all channels, waits until what was sent over them is read, and lets go of
// everything.
func (v *Vault) Close() {
	v.mu.Lock()
	v.closed = true
	if v.tidier.timer != nil {
		v.tidier.timer.Stop()
	}
	for _, g := range v.generations {
		g.stopWaiting()
		g.stopLost()
		if g.channel != nil {
			g.channel.end()
		}
	}
	v.mu.Unlock()
	v.work.Wait()
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, g := range v.generations {
		v.emptyLocked(g)
	}
	clear(v.generations)
	v.tellLocked()
}

// emptyLocked lets go of what there is of g. What another generation was asked to take
// may still be taken.
func (v *Vault) emptyLocked(g *generation) {
	for _, d := range g.tunnels {
		if d.state != left {
			v.withdrawLocked(d)
		}
	}
	for _, f := range g.stores {
		f.drop()
	}
	g.stores, g.heir = nil, false
}

// withdrawLocked lets go of d, if nobody was asked to take it. It says false if d was
// withdrawn already.
func (v *Vault) withdrawLocked(d *deposit) bool {
	to, ok := d.state.next(evWithdrawn)
	if ok {
		v.enterLocked(d, to)
	}
	return ok
}

// enterLocked changes d's state.
func (v *Vault) enterLocked(d *deposit, to state) {
	delete(v.waiting, d.name())
	if d.state == absent || to == absent {
		v.turnedOverLocked()
	}
	d.state = to
	switch to {
	case waiting:
		v.waiting[d.name()] = d
	case absent:
		delete(d.owner.tunnels, d.number)
		d.sockets.drop()
	}
}

// sorted returns the numbers of g's tunnels in order, which is that of their beginning.
func (g *generation) sorted() []uint64 {
	numbers := make([]uint64, 0, len(g.tunnels))
	for n := range g.tunnels {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	return numbers
}
