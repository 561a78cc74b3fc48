package proxy

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/tunnel"
)

// introduceTimeout is how long an attempt to hand over a loop may take, and introducePause
// how long the wait is before the next one.
const (
	introduceTimeout = time.Second
	introducePause   = 100 * time.Millisecond
)

// candidatePatience is how long the supervisor that is to come may take no deposits:
// tunnels start later while it does.
const candidatePatience = time.Second

// errNoVault says that nobody keeps deposits at present.
var errNoVault = errors.New("no supervisor keeps tunnels")

// vault is a generation's side of the vault. It deposits tunnels with the supervisor that
// commands and, while there is one, with the candidate that may come to; it moves them
// between generations, and resumes those of a dead one.
//
// Loops call the methods of [tunnel.Vault]. The generation's loop calls connect, obeyed
// and so on, which wait for nothing. Each channel has a goroutine, see talk.
type vault struct {
	g         *generation
	ready     chan struct{} // closed when g is built
	done      chan struct{} // closed by close
	closing   sync.Once
	inherited chan *control.VaultPacket // the loops of a dead generation, for build
	talks     sync.WaitGroup

	serving atomic.Bool // tunnels of others may come

	rounds sync.Mutex // held to begin a round of deposits

	mu                             sync.RWMutex
	commander, candidate, resuming *vaultChannel // nil: there is none
	channels                       map[*vaultChannel]bool
	moving                         bool // tunnels are to move
	all                            bool // also those whose routes say "keep": a supervisor wanted that, last

	origins sync.Mutex
	from    map[uint64]control.VaultTunnel // what tunnels were before they came here, by their number here
}

// newVault returns one for a generation that is to have the loops of a dead one, stores of
// them; 0: it has its own.
func newVault(g *generation, stores int) *vault {
	return &vault{
		g: g, ready: make(chan struct{}), done: make(chan struct{}), inherited: make(chan *control.VaultPacket, stores),
		channels: make(map[*vaultChannel]bool), from: make(map[uint64]control.VaultTunnel),
	}
}

// vaultChannel is one to a supervisor.
type vaultChannel struct {
	*control.Vault
	replaces *vaultChannel // its talk is waited for
	open     atomic.Bool   // deposits may be sent
	busy     atomic.Int64  // since when it takes none, in Unix nanoseconds; 0: it takes some
	ended    chan struct{} // closed when its talk is over
	said     bool          // that something came which does not belong there; talk's
}

// try sends a packet without waiting.
func (c *vaultChannel) try(p *control.VaultPacket) error {
	if c == nil || !c.open.Load() {
		return errNoVault
	}
	err := c.TrySend(p)
	if errors.Is(err, control.ErrVaultBusy) {
		c.busy.CompareAndSwap(0, time.Now().UnixNano())
		return tunnel.ErrVaultBusy
	}
	c.busy.Store(0)
	return err
}

// retire ends a channel that another one takes the place of. What the supervisor has sent
// already is received.
func (c *vaultChannel) retire() {
	if c != nil {
		c.open.Store(false)
		_ = c.CloseRead() // it fails where the channel is closed
	}
}

// round is one time that all tunnels are deposited with a channel.
type round struct {
	*vaultChannel
	commands bool // whose supervisor does
}

// incoming is a tunnel that may go on here.
type incoming struct {
	from control.VaultTunnel
	by   *vaultChannel
}

// tell sends a packet to the supervisor that commands and to the candidate. An error says
// that it is to be sent again, to both: neither is hurt by what it knows.
func (v *vault) tell(p *control.VaultPacket) error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	err := v.commander.try(p)
	if err == tunnel.ErrVaultBusy || v.candidate == nil || !v.candidate.open.Load() {
		return err
	}
	switch other := v.candidate.try(p); {
	case other == nil:
		return nil
	case other == tunnel.ErrVaultBusy && time.Since(time.Unix(0, v.candidate.busy.Load())) < candidatePatience:
		return other
	}
	v.candidate.retire() // it gets another one when it commands
	return err
}

// parcel is memory for what loops tell with every few tunnels.
type parcel struct {
	packet  control.VaultPacket
	records []byte
}

var parcels = sync.Pool{New: func() any { return new(parcel) }}

// takeParcel returns one with a packet of so many tunnels, of which nothing is said yet.
func takeParcel(t control.VaultType, tunnels int) *parcel {
	p := parcels.Get().(*parcel)
	p.packet.Type = t
	p.packet.Entries = slices.Grow(p.packet.Entries, tunnels)[:tunnels]
	return p
}

// putBack takes a parcel back whose packet was sent, or was not.
func (p *parcel) putBack() {
	clear(p.packet.Entries) // which may be of others' memory
	p.packet.Entries, p.records = p.packet.Entries[:0], p.records[:0]
	parcels.Put(p)
}

// Deposit implements [tunnel.Vault].
func (v *vault) Deposit(tunnels []tunnel.Deposit) error {
	p := takeParcel(control.VaultDeposit, len(tunnels))
	defer p.putBack()
	p.records = slices.Grow(p.records, len(tunnels)*usualRecord)
	for i := range tunnels {
		d := &tunnels[i]
		begin := len(p.records)
		p.records = appendRecord(p.records, d)
		p.packet.Entries[i] = control.VaultEntry{Number: d.Number, From: v.fromOf(d.Number), Stand: d.Stand, Record: p.records[begin:], Files: d.FDs[:]}
	}
	return v.tell(&p.packet)
}

// Withdraw implements [tunnel.Vault].
func (v *vault) Withdraw(numbers []uint64) error {
	p := takeParcel(control.VaultWithdraw, len(numbers))
	defer p.putBack()
	for i, n := range numbers {
		p.packet.Entries[i].Number = n
	}
	return v.tell(&p.packet)
}

func numbered(t control.VaultType, numbers []uint64) *control.VaultPacket {
	p := &control.VaultPacket{Type: t, Entries: make([]control.VaultEntry, len(numbers))}
	for i, n := range numbers {
		p.Entries[i].Number = n
	}
	return p
}

// Complete implements [tunnel.Vault].
func (v *vault) Complete(t tunnel.Ticket) error {
	r := t.(round)
	p := &control.VaultPacket{Type: control.VaultComplete}
	if !r.commands {
		p.Flags = control.VaultCandidate
	}
	if err := r.try(p); err == tunnel.ErrVaultBusy {
		return err
	}
	return nil // or the channel is gone, and there is nothing to complete
}

// Release implements [tunnel.Vault]. Nothing moves while a candidate is there, so that it
// does not come to command in the middle of that.
func (v *vault) Release(tunnels []tunnel.Standing) error {
	p := &control.VaultPacket{Type: control.VaultRelease, Entries: make([]control.VaultEntry, len(tunnels))}
	for i := range tunnels {
		e := &p.Entries[i]
		e.Number, e.Stand = tunnels[i].Number, tunnels[i].Stand
		e.State, e.Files = appendState(nil, &tunnels[i])
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.candidate != nil {
		return tunnel.ErrVaultBusy
	}
	return v.commander.try(p)
}

// Taken implements [tunnel.Vault]. From its success on the tunnel is here, and is counted
// here. Only the supervisor that has asked may be told so: what became of the tunnel when
// the channel to another one had ended is known by that end.
func (v *vault) Taken(t tunnel.Ticket, d tunnel.Deposit) error {
	in := t.(incoming)
	p := &control.VaultPacket{Type: control.VaultTaken, Entries: []control.VaultEntry{{Number: d.Number, From: in.from, Record: appendRecord(nil, &d)}}}
	v.mu.RLock()
	defer v.mu.RUnlock()
	if in.by != v.commander || v.candidate != nil {
		return errNoVault
	}
	if err := in.by.try(p); err != nil {
		return err
	}
	v.origin(d.Number, in.from)
	v.arrived(d.Origin)
	return nil
}

// arrived counts a tunnel that was opened in another generation.
func (v *vault) arrived(o *tunnel.Origin) {
	v.g.manager.TunnelArrived(o)
	v.g.listener(o.Listener).enter()
}

// Declined implements [tunnel.Vault].
func (v *vault) Declined(t tunnel.Ticket) error {
	in := t.(incoming)
	return in.by.try(declining(in.from))
}

func declining(from ...control.VaultTunnel) *control.VaultPacket {
	p := &control.VaultPacket{Type: control.VaultDeclined}
	for _, f := range from {
		p.Entries = append(p.Entries, control.VaultEntry{From: f})
	}
	return p
}

// origin notes what a tunnel was before it came here; fromOf knows it, and forget does not
// any more.
func (v *vault) origin(number uint64, from control.VaultTunnel) {
	if from != (control.VaultTunnel{}) {
		v.origins.Lock()
		v.from[number] = from
		v.origins.Unlock()
	}
}

func (v *vault) fromOf(number uint64) control.VaultTunnel {
	v.origins.Lock()
	defer v.origins.Unlock()
	return v.from[number]
}

func (v *vault) forget(number uint64) {
	v.origins.Lock()
	defer v.origins.Unlock()
	delete(v.from, number)
}

// connect makes fd, which it takes over, the channel to the supervisor that commands, or
// to the candidate.
func (v *vault) connect(fd int, candidate bool) error {
	conn, err := control.NewVault(fd)
	if err != nil {
		return err
	}
	c := &vaultChannel{Vault: conn, ended: make(chan struct{})}
	v.mu.Lock()
	place := &v.commander
	if candidate {
		place = &v.candidate
	}
	c.replaces, *place = *place, c
	v.channels[c] = true
	v.mu.Unlock()
	c.replaces.retire()
	if candidate {
		v.g.tunnels.Unmove()
	}
	v.talks.Go(func() { v.talk(c) })
	return nil
}

// obeyed is called when the candidate has come to command, with a channel or without. All
// is deposited with it once more: only now it may act upon that, and so it hears how things
// stand now. Whether anything is to move is for it to say.
func (v *vault) obeyed() {
	v.mu.Lock()
	former, c, moving := v.commander, v.candidate, v.moving
	v.commander, v.candidate, v.moving = c, nil, false
	v.mu.Unlock()
	former.retire()
	if moving {
		v.g.tunnels.Unmove()
	}
	if c != nil && c.open.Load() { // otherwise that is still to come
		v.depositAll(c)
	}
}

// dropCandidate is called when the candidate will not come to command.
func (v *vault) dropCandidate() {
	v.mu.Lock()
	c := v.candidate
	v.candidate = nil
	v.mu.Unlock()
	c.retire()
	if c != nil {
		v.moveOn()
	}
}

// move has tunnels go to another generation, all of them or those that are to.
func (v *vault) move(all bool) {
	v.mu.Lock()
	v.moving, v.all = true, all
	v.mu.Unlock()
	v.moveOn()
}

// movesAll says whether all tunnels were to move when somebody said so last: the next
// supervisor is to know.
func (v *vault) movesAll() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.all
}

// moveOn does what move has asked for, unless that has to wait for a candidate.
func (v *vault) moveOn() {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.moving && v.candidate == nil {
		v.g.tunnels.Move(v.all)
	}
}

// stay takes move back.
func (v *vault) stay() {
	v.mu.Lock()
	moving := v.moving
	v.moving = false
	v.mu.Unlock()
	if moving {
		v.g.tunnels.Unmove()
	}
}

// awaitTunnels begins to wait for the tunnels of a dead generation. They come from the
// supervisor that commands.
func (v *vault) awaitTunnels() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if cap(v.inherited) == 0 || v.commander == nil {
		return errors.New("there are no loops of a dead generation here")
	}
	v.resuming = v.commander
	return nil
}

// awaits says whether more tunnels of a dead generation are to come.
func (v *vault) awaits() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.resuming != nil
}

// allCame is called when no more of them come over a channel.
func (v *vault) allCame(c *vaultChannel) {
	v.mu.Lock()
	last := v.resuming == c
	if last {
		v.resuming = nil
	}
	v.mu.Unlock()
	if last {
		v.g.tunnels.Resumed()
		v.g.notice()
	}
}

// close ends all channels and waits for whoever receives from them. It may be called
// again.
func (v *vault) close() {
	v.closing.Do(func() { close(v.done) })
	v.mu.Lock()
	for c := range v.channels {
		c.open.Store(false)
		c.Close()
	}
	v.mu.Unlock()
	v.talks.Wait()
	for {
		select {
		case p := <-v.inherited:
			p.CloseFiles()
		default:
			return
		}
	}
}
