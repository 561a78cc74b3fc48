package vault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/control"
)

// startWaiting: g may know of tunnels, and has no channel.
func (v *Vault) startWaiting(g *generation) {
	if v.closed || g.told || g.dead || g.channel != nil || g.patience != nil {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(v.bounds.patience, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if g.patience == t {
			g.patience = nil
			v.decideLocked()
		}
	})
	g.patience = t
}

func (g *generation) stopWaiting() {
	if g.patience != nil {
		g.patience.Stop()
		g.patience = nil
	}
}

// mayKnow says whether g has still to tell what it has.
func (g *generation) mayKnow() bool {
	return !g.told && !g.dead && (g.channel != nil || g.patience != nil)
}

// decideLocked answers the tunnels that were released to an earlier vault, when
// everybody has told what they have.
func (v *Vault) decideLocked() {
	if len(v.waiting) == 0 {
		return
	}
	for _, g := range v.generations {
		if g.mayKnow() {
			return
		}
	}
	for _, g := range v.generations {
		for _, d := range g.tunnels {
			if w := v.waiting[d.from]; w != nil && w.owner != g {
				v.foundLocked(w)
			}
		}
	}
	for _, d := range v.waiting {
		to, _ := d.state.next(evUnclaimed)
		v.enterLocked(d, to)
		v.returnLocked(d.via, d.number, d.stand)
		if len(d.sockets.fds) == 0 { // there was no room for it
			v.withdrawLocked(d)
		}
	}
	v.tellLocked()
}

// foundLocked: another generation has d since before this vault.
func (v *Vault) foundLocked(d *deposit) {
	to, _ := d.state.next(evFound)
	v.enterLocked(d, to)
	d.owner.moved[d.number] = struct{}{}
	v.answerLocked(d.via, control.VaultGone, d.number, d.stand)
}

// Died says that the process of a generation is gone for certain, and whether it was
// killed from outside. It waits until what the generation had sent is read, and it is
// certain which of its tunnels have gone elsewhere, which is a matter of a few seconds at
// most. It returns how many are left.
func (v *Vault) Died(number int, killed bool) (tunnels int) {
	v.mu.Lock()
	g := v.generations[number]
	if g == nil {
		v.mu.Unlock()
		return 0
	}
	g.dead, g.killed = true, killed
	g.stopWaiting()
	g.stopLost()
	c := g.channel
	if c != nil {
		c.end()
	}
	v.mu.Unlock()
	if c != nil {
		<-c.done
	}
	v.mu.Lock()
	v.decideLocked()
	v.mu.Unlock()
	v.awaitVerdicts(g)
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(g.tunnels)
}

// awaitVerdicts waits until g's tunnels are g's or somebody else's. Who does not say which
// loses its channel, and nobody gets one that others than this vault know more about.
func (v *Vault) awaitVerdicts(g *generation) {
	ctx, cancel := context.WithTimeout(context.Background(), v.bounds.lastVerdict)
	defer cancel()
	err := v.wait(ctx, func() bool { return !g.undecided() })
	if err == nil {
		return
	}
	var silent []*channel
	v.mu.Lock()
	for _, d := range g.tunnels {
		switch {
		case d.state == waiting:
			v.log.Error("a tunnel of a dead generation is given up: who else may have it does not say so", "of_generation", g.number)
			v.withdrawLocked(d)
		case d.to != nil && !slices.Contains(silent, d.to):
			silent = append(silent, d.to)
			if !d.to.over {
				v.silentLocked(d.to)
			}
		}
	}
	v.mu.Unlock()
	for _, c := range silent {
		<-c.done
	}
}

func (g *generation) undecided() bool {
	for _, d := range g.tunnels {
		if d.state != kept {
			return true
		}
	}
	return false
}

// Stores is how many loops a generation had.
func (v *Vault) Stores(generation int) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	if g := v.generations[generation]; g != nil {
		return len(g.stores)
	}
	return 0
}

// HandStores sends a successor what a dead generation's loops had in flight, so that it
// can make its own of that. It waits until it is sent. Whether there is an error or not,
// which is [ErrNoChannel] if the successor has none, all is still the dead one's.
func (v *Vault) HandStores(dead, successor int) error {
	v.mu.Lock()
	c := v.openLocked(successor)
	g := v.generations[dead]
	if c == nil || g == nil {
		v.mu.Unlock()
		if c == nil {
			return ErrNoChannel
		}
		return nil // it has left nothing
	}
	stores, flags := slices.Clone(g.stores), uint8(0)
	if g.killed {
		flags = control.VaultKilled
	}
	for _, f := range stores {
		f.pin()
	}
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, f := range stores {
			f.unpin()
		}
	}()
	for i, f := range stores {
		p := &control.VaultPacket{Type: control.VaultStore, Flags: flags, Loop: i, Files: f.fds}
		if err := c.conn.Send(p, v.bounds.send); err != nil {
			return fmt.Errorf("hand loop %d to generation %d: %w", i, successor, err)
		}
	}
	return nil
}

// HandTunnels makes the tunnels and stores of a dead generation, of which [Vault.Died] has
// returned, those of its successor, and sends it the tunnels in the order of their
// numbers. It waits until that is done. If the error is [ErrNoChannel] nothing was
// changed. After any other they are the successor's, which has to be ended: it may have
// any part of them.
func (v *Vault) HandTunnels(dead, successor int) error {
	v.mu.Lock()
	c := v.openLocked(successor)
	if c != nil && len(c.of.tunnels) > 0 {
		v.violatedLocked(c, errors.New("it has deposited tunnels of its own, and is to resume another's"))
		c = nil
	}
	if c == nil {
		v.mu.Unlock()
		return ErrNoChannel
	}
	v.inheritLocked(v.generations[dead], c.of)
	numbers := c.of.sorted()
	v.mu.Unlock()
	v.changed()
	for batch := range slices.Chunk(numbers, control.VaultBatch) {
		if err := v.hand(c, batch); err != nil {
			return fmt.Errorf("hand tunnels to generation %d: %w", successor, err)
		}
	}
	if err := c.conn.Send(&control.VaultPacket{Type: control.VaultComplete}, v.bounds.send); err != nil {
		return fmt.Errorf("hand tunnels to generation %d: %w", successor, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	c.of.handing = false
	v.totals.Resumed += uint64(len(numbers))
	return nil
}

// inheritLocked makes what a dead generation has left that of its heir, which has nothing
// but what it may have said of the same stores. nil: nothing was left.
func (v *Vault) inheritLocked(dead, heir *generation) {
	if dead == nil {
		return
	}
	v.emptyLocked(heir)
	heir.heir, heir.handing = true, true
	heir.stores, heir.tunnels = dead.stores, dead.tunnels
	for _, d := range heir.tunnels {
		d.owner, d.via = heir, heir.channel
	}
	delete(v.generations, dead.number)
}

// hand sends tunnels, as far as they are still there, over c to their owner.
func (v *Vault) hand(c *channel, numbers []uint64) error {
	p := &parcel{VaultPacket: &control.VaultPacket{Type: control.VaultResume}}
	v.mu.Lock()
	for _, n := range numbers {
		if d := c.of.tunnels[n]; d != nil {
			p.Entries = append(p.Entries, control.VaultEntry{Number: n, From: d.from, Record: d.record, Files: d.sockets.fds})
			p.tunnels = append(p.tunnels, d)
			d.sockets.pin()
		}
	}
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		p.done()
	}()
	return c.conn.Send(p.VaultPacket, v.bounds.send)
}

// Drop lets go of what a dead generation has left.
func (v *Vault) Drop(generation int) {
	v.mu.Lock()
	if g := v.generations[generation]; g != nil && g.dead {
		v.emptyLocked(g)
		delete(v.generations, generation)
		v.decideLocked()
	}
	v.mu.Unlock()
	v.changed()
}

// Cut is [Vault.Drop] for tunnels that nobody can resume: it resets their connections,
// whoever else has them. If they were only closed, their peers would take what was cut
// off for the proper end of a stream. It waits until that is done, for a moment at most.
func (v *Vault) Cut(generation int) {
	v.mu.Lock()
	g := v.generations[generation]
	if g == nil || !g.dead {
		v.mu.Unlock()
		return
	}
	var cut []*deposit
	for _, d := range g.tunnels {
		if d.state == kept { // nobody else was asked to take it
			d.sockets.pin()
			cut = append(cut, d)
		}
	}
	v.mu.Unlock()
	done := make(chan struct{})
	go func() { // a socket that another process is busy with may have it wait
		defer close(done)
		for _, d := range cut {
			for _, fd := range d.sockets.fds {
				reset(fd)
			}
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, d := range cut {
			d.sockets.unpin()
		}
	}()
	select {
	case <-done:
	case <-time.After(v.bounds.send):
		v.log.Error("the tunnels of a dead generation are not cut in time", "of_generation", generation)
	}
	v.Drop(generation)
}
