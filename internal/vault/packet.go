package vault

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// mostLoops is how many loops a generation may have.
const mostLoops = 1024

// take does what a packet says that came over c. err is what was wrong with its receipt:
// that there was no room for its descriptors, or there is no packet.
func (v *Vault) take(c *channel, p *control.VaultPacket, err error) {
	v.mu.Lock()
	switch {
	case p == nil || (err != nil && !errors.Is(err, unix.EMFILE)):
		v.violatedLocked(c, err)
	case !c.broken || isVerdict(p.Type):
		if err := v.obeyLocked(c, p, err != nil); err != nil {
			v.violatedLocked(c, err)
		}
	}
	v.mu.Unlock()
	if p != nil {
		c.discard(untaken(p))
		v.changed()
	}
}

// discard closes what came over c, and waits for nothing.
func (c *channel) discard(fds []int) {
	if c.stuck {
		control.Discard(fds)
	} else {
		c.of.closer.close(fds)
	}
}

// isVerdict says whether a packet of the type has a part in who relays a tunnel, which is
// so whatever else its generation does.
func isVerdict(t control.VaultType) bool {
	return t == control.VaultTaken || t == control.VaultDeclined
}

// isNews says whether nobody waits for what is done with a packet of the type.
func isNews(t control.VaultType) bool {
	return t == control.VaultDeposit || t == control.VaultWithdraw
}

// untaken returns the descriptors of a packet that nobody has taken.
func untaken(p *control.VaultPacket) []int {
	fds := p.Files
	for i := range p.Entries {
		fds = append(fds, p.Entries[i].Files...)
	}
	return fds
}

// takes says what may come of each type: how many tunnels, and with how many descriptors
// each.
var takes = map[control.VaultType]struct{ tunnels, least, most int }{
	control.VaultStore:    {0, 0, 0},
	control.VaultDeposit:  {control.VaultBatch, 2, 2},
	control.VaultWithdraw: {control.MaxVaultNumbers, 0, 0},
	control.VaultComplete: {0, 0, 0},
	control.VaultRelease:  {control.VaultBatch, 0, 2},
	control.VaultTaken:    {control.VaultBatch, 0, 0},
	control.VaultDeclined: {control.MaxVaultNumbers, 0, 0},
}

// obeyLocked does what p says. An error is that p breaks the protocol. With cut, what p
// had of descriptors is lost.
func (v *Vault) obeyLocked(c *channel, p *control.VaultPacket, cut bool) error {
	may, ok := takes[p.Type]
	if !ok || len(p.Entries) > may.tunnels || (len(p.Files) > 0 && p.Type != control.VaultStore) {
		return fmt.Errorf("type %d with %d tunnels and %d descriptors", p.Type, len(p.Entries), len(p.Files))
	}
	for i := range p.Entries {
		if n := len(p.Entries[i].Files); n > may.most || (n < may.least && !cut) {
			return fmt.Errorf("type %d: a tunnel with %d descriptors", p.Type, n)
		}
	}
	switch p.Type {
	case control.VaultStore:
		return v.storeLocked(c, p)
	case control.VaultDeposit:
		return v.depositLocked(c, p)
	case control.VaultWithdraw:
		return v.endedLocked(c.of, p)
	case control.VaultComplete:
		v.completeLocked(c, p.Flags)
		return nil
	case control.VaultRelease:
		return v.releaseLocked(c, p, cut)
	case control.VaultTaken:
		return v.takenLocked(c, p)
	default: // VaultDeclined
		return v.declineLocked(c, p)
	}
}

// storeLocked keeps the memory file and pipes of a loop.
func (v *Vault) storeLocked(c *channel, p *control.VaultPacket) error {
	g := c.of
	switch {
	case g.heir:
		return nil // it has them from here
	case p.Loop > len(g.stores) || p.Loop >= mostLoops:
		return fmt.Errorf("loop %d after %d", p.Loop, len(g.stores))
	case !room(p.Files, v.limits.stores):
		v.log.Error("no descriptors are left for what a generation has in flight: its tunnels are not kept until there are", "of_generation", g.number)
		c.broken = true
		c.end()
		v.emptyLocked(g)
		return nil
	case len(p.Files)%2 != 1:
		return fmt.Errorf("a loop with %d descriptors", len(p.Files))
	}
	f := &files{fds: p.Files, by: g.closer}
	p.Files = nil
	if p.Loop < len(g.stores) {
		g.stores[p.Loop].drop()
		g.stores[p.Loop] = f
	} else {
		g.stores = append(g.stores, f)
	}
	return nil
}

// room says whether descriptors that have come are below a limit, and may be kept.
func room(fds []int, limit int) bool {
	return len(fds) > 0 && slices.Max(fds) < limit
}

// depositLocked keeps tunnels.
func (v *Vault) depositLocked(c *channel, p *control.VaultPacket) error {
	if len(c.of.stores) == 0 {
		return errors.New("a deposit without a store")
	}
	for i := range p.Entries {
		if err := v.depositOneLocked(c, &p.Entries[i]); err != nil {
			return err
		}
	}
	v.decideLocked()
	return nil
}

func (v *Vault) depositOneLocked(c *channel, e *control.VaultEntry) error {
	g, ev := c.of, evDeposited
	restated := e.Stand != 0
	if restated {
		ev = evRestated
	}
	if _, ok := g.moved[e.Number]; ok && restated {
		v.answerLocked(c, control.VaultGone, e.Number, e.Stand)
		return nil
	} else if ok {
		return fmt.Errorf("tunnel %d is deposited, which another generation has", e.Number)
	}
	d := g.tunnels[e.Number]
	if d == nil {
		d = &deposit{owner: g, number: e.Number, state: absent, sockets: files{by: g.closer}}
	}
	to, ok := d.state.next(ev)
	if !ok {
		return fmt.Errorf("tunnel %d, which is %s, is %s", e.Number, d.state, ev)
	}
	if len(d.sockets.fds) == 0 && room(e.Files, v.limits.deposits) { // those of a tunnel never change
		d.sockets.fds = slices.Clone(e.Files)
		e.Files = nil
	}
	d.record, d.from, d.via = slices.Clone(e.Record), e.From, c
	if restated {
		d.stand = e.Stand
	}
	g.tunnels[e.Number] = d
	if to == waiting && g.told {
		to = kept // it can be with nobody else
		v.returnLocked(c, e.Number, e.Stand)
	}
	v.enterLocked(d, to)
	if len(d.sockets.fds) == 0 {
		v.refuseLocked(d)
	}
	return nil
}

// refuseLocked: there is no room for d. If it waits for an answer, it does so without
// being kept.
func (v *Vault) refuseLocked(d *deposit) {
	if v.totals.Refused == 0 {
		v.log.Warn("too few descriptors for the vault: some tunnels will not outlive their process", "of_generation", d.owner.number, "most", v.limits.deposits)
	}
	v.totals.Refused++
	v.answerLocked(d.via, control.VaultRefused, d.number, 0)
	if d.state == kept {
		v.withdrawLocked(d)
	}
}

// endedLocked lets go of tunnels.
func (v *Vault) endedLocked(g *generation, p *control.VaultPacket) error {
	for i := range p.Entries {
		if d := g.tunnels[p.Entries[i].Number]; d != nil && !v.withdrawLocked(d) {
			return fmt.Errorf("tunnel %d is withdrawn twice", d.number)
		}
	}
	return nil
}

// completeLocked: what was not deposited over c is not there any more.
func (v *Vault) completeLocked(c *channel, flags uint8) {
	g := c.of
	c.complete = true
	if flags&control.VaultCandidate == 0 {
		g.told = true
		for _, d := range g.tunnels {
			if d.via != c && !g.handing && d.state != left {
				v.withdrawLocked(d)
			}
		}
		v.decideLocked()
	}
	v.tellLocked()
}

// releaseLocked has the target asked to take tunnels. Whatever is wrong with some of
// them, the rest counts.
func (v *Vault) releaseLocked(c *channel, p *control.VaultPacket, cut bool) (wrong error) {
	g, to := c.of, v.takerLocked(c)
	var parcels []*parcel
	for i := range p.Entries {
		e := &p.Entries[i]
		d := g.tunnels[e.Number]
		_, gone := g.moved[e.Number]
		switch {
		case gone:
			wrong = fmt.Errorf("tunnel %d is released, which another generation has", e.Number)
		case d != nil && !d.releasable():
			wrong = fmt.Errorf("tunnel %d, which is %s, is released", e.Number, d.state)
		case d == nil || to == nil || cut || len(d.sockets.fds) == 0: // without a deposit nothing can be handed on
			if d != nil {
				v.enterLocked(d, kept)
			}
			v.returnLocked(c, e.Number, e.Stand)
			if d != nil && len(d.sockets.fds) == 0 { // there was no room for it
				v.withdrawLocked(d)
			}
		default:
			d.stand = e.Stand
			parcels = addTake(parcels, d, e)
			v.enterLocked(d, asked)
		}
	}
	for _, p := range parcels {
		v.askLocked(to, p)
	}
	return wrong
}

// releasable says whether d may be released: its generation relays it. One that waits is
// relayed, too, if its generation says so: it has had an answer, and what it said before
// of the standing that this was about has met that on its way.
func (d *deposit) releasable() bool {
	_, ok := d.state.next(evAsked)
	return ok
}

// takerLocked returns the channel of whoever may be asked to take what came over c; nil:
// nobody.
func (v *Vault) takerLocked(c *channel) *channel {
	to := v.openLocked(v.target)
	if to == nil || !to.complete || to.of == c.of || c.over || time.Now().Before(to.slow) {
		return nil
	}
	return to
}

// addTake adds d, which is released with e, to the last parcel, or to one more.
func addTake(parcels []*parcel, d *deposit, e *control.VaultEntry) []*parcel {
	take := control.VaultEntry{
		From:   d.name(),
		Record: d.record,
		State:  slices.Clone(e.State),
		Files:  slices.Concat(d.sockets.fds, e.Files),
	}
	if n := len(parcels); n == 0 || !parcels[n-1].Takes(&take) {
		parcels = append(parcels, &parcel{VaultPacket: &control.VaultPacket{Type: control.VaultTake}, by: d.owner.closer})
	}
	p := parcels[len(parcels)-1]
	p.Entries = append(p.Entries, take)
	p.tunnels = append(p.tunnels, d)
	p.files = append(p.files, e.Files...)
	e.Files = nil
	d.sockets.pin()
	return parcels
}

// askLocked has p, which is of VaultTake, sent over c.
func (v *Vault) askLocked(c *channel, p *parcel) {
	if !c.queueLocked(p) {
		for _, d := range p.tunnels {
			v.declinedLocked(d)
		}
		p.done()
		return
	}
	if len(c.asked) == 0 {
		v.watchLocked(c)
	}
	for _, d := range p.tunnels {
		d.to = c
		c.asked[d.name()] = d
	}
}

// returnLocked tells c's generation that its tunnel goes on where it is.
func (v *Vault) returnLocked(c *channel, number, stand uint64) {
	v.totals.Returned++
	v.answerLocked(c, control.VaultReturned, number, stand)
}

// declinedLocked: nobody has taken d.
func (v *Vault) declinedLocked(d *deposit) {
	to, _ := d.state.next(evDeclined)
	d.to = nil
	if to == kept {
		v.returnLocked(d.via, d.number, d.stand)
	}
	v.enterLocked(d, to)
}

// verdictLocked returns the tunnel that was sent over c and is from there. It has its
// verdict.
func (v *Vault) verdictLocked(c *channel, from control.VaultTunnel) (*deposit, error) {
	d := c.asked[from]
	if d == nil {
		return nil, fmt.Errorf("a verdict on tunnel %d of generation %d, which was not asked for", from.Number, from.Generation)
	}
	delete(c.asked, from)
	v.watchLocked(c)
	v.tellLocked()
	return d, nil
}

// declineLocked gives tunnels back. Whatever is wrong with some of them, the rest counts.
func (v *Vault) declineLocked(c *channel, p *control.VaultPacket) (wrong error) {
	for i := range p.Entries {
		d, err := v.verdictLocked(c, p.Entries[i].From)
		if err != nil {
			wrong = err
			continue
		}
		v.declinedLocked(d)
	}
	return wrong
}

// takenLocked makes tunnels those of c's generation. Whatever is wrong with some of them,
// the rest counts.
func (v *Vault) takenLocked(c *channel, p *control.VaultPacket) (wrong error) {
	for i := range p.Entries {
		e := &p.Entries[i]
		d, err := v.verdictLocked(c, e.From)
		if err == nil {
			err = v.movedLocked(c, d, e)
		}
		if err != nil {
			wrong = err
		}
	}
	return wrong
}

// movedLocked makes d, which is asked or left, e of c's generation, which relays it. With
// an error it is not kept there.
func (v *Vault) movedLocked(c *channel, d *deposit, e *control.VaultEntry) error {
	was, from := d.owner, d.name()
	if d.state == asked {
		v.answerLocked(d.via, control.VaultGone, d.number, d.stand)
	}
	was.moved[d.number] = struct{}{}
	delete(was.tunnels, d.number)
	v.totals.Moved++
	to := c.of
	_, gone := to.moved[e.Number]
	if c.broken || gone || to.tunnels[e.Number] != nil {
		d.sockets.drop()
		return fmt.Errorf("a tunnel is taken as %d, which is another", e.Number)
	}
	d.owner, d.number, d.from = to, e.Number, from
	d.record, d.state, d.via, d.to = slices.Clone(e.Record), kept, c, nil
	to.tunnels[d.number] = d
	return nil
}
