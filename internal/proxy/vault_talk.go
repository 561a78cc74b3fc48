package proxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/tunnel"
)

// What goes over a vault channel besides what loops send: how a generation introduces
// itself there, and what the supervisor says. Each channel has a goroutine of its own.

// talk is the life of a channel. It introduces the generation and then does what the
// supervisor says, until either has ended the channel.
func (v *vault) talk(c *vaultChannel) {
	defer v.hangUp(c)
	if c.replaces != nil { // what it has brought comes first
		<-c.replaces.ended
		c.replaces = nil
	}
	if err := v.introduce(c); err != nil {
		v.g.log.Error("cannot tell the supervisor what keeps tunnels", "err", err)
		return
	}
	for {
		p, err := c.Receive(0)
		if err != nil && !errors.Is(err, control.ErrProtocol) {
			return
		}
		if err != nil {
			v.complain(c, "err", err)
		}
		if p != nil {
			v.handle(c, p)
		}
	}
}

// introduce hands over the loops of the generation, and begins to deposit. One that is to
// have the loops of a dead generation is known already.
func (v *vault) introduce(c *vaultChannel) error {
	if !v.built() && cap(v.inherited) > 0 {
		c.open.Store(true)
		return nil
	}
	select {
	case <-v.ready:
	case <-v.done:
		return nil
	}
	for i, loop := range v.g.loops.all {
		files := []int{loop.Store.FD()}
		for _, pipe := range loop.Store.Pipes() {
			files = append(files, pipe.R, pipe.W)
		}
		if err := v.insist(c, &control.VaultPacket{Type: control.VaultStore, Loop: i, Files: files}); err != nil {
			return err
		}
	}
	v.depositAll(c)
	return nil
}

// insist sends a packet, as often as there is no room for it.
func (v *vault) insist(c *vaultChannel, p *control.VaultPacket) error {
	for said := false; ; {
		err := c.Send(p, introduceTimeout)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if !said {
			said = true
			v.g.log.Warn("the supervisor cannot be told yet what keeps tunnels; trying again", "err", err)
		}
		select {
		case <-time.After(introducePause):
		case <-v.done:
			return nil
		}
	}
}

func (v *vault) built() bool {
	select {
	case <-v.ready:
		return true
	default:
		return false
	}
}

// depositAll has all tunnels deposited with a supervisor that knows of none, or that has
// come to command.
func (v *vault) depositAll(c *vaultChannel) {
	v.rounds.Lock() // so that the last round says what holds last
	defer v.rounds.Unlock()
	v.mu.RLock()
	commands, wanted := c == v.commander, c == v.commander || c == v.candidate
	if wanted {
		c.open.Store(true)
	}
	v.mu.RUnlock()
	if wanted {
		v.g.tunnels.Deposit(round{c, commands})
	}
}

// hangUp lets go of a channel.
func (v *vault) hangUp(c *vaultChannel) {
	c.open.Store(false)
	c.Close()
	v.mu.Lock()
	delete(v.channels, c)
	if v.commander == c {
		v.commander = nil
	}
	candidate := v.candidate == c
	if candidate {
		v.candidate = nil
	}
	v.mu.Unlock()
	v.allCame(c)
	if candidate {
		v.moveOn()
	}
	close(c.ended)
}

// complain says once for each channel that what has come there does not belong there.
func (v *vault) complain(c *vaultChannel, attrs ...any) {
	if !c.said {
		c.said = true
		v.g.log.Warn("what the supervisor says about tunnels is not understood; more of that will not be logged", attrs...)
	}
}

// handle does what a supervisor says. A candidate has nothing to say.
func (v *vault) handle(c *vaultChannel, p *control.VaultPacket) {
	v.mu.RLock()
	commands, resumes := c == v.commander, c == v.resuming
	v.mu.RUnlock()
	switch t := p.Type; {
	case t == control.VaultStore && v.inherit(p):
		return
	case t == control.VaultResume && resumes:
		v.resume(c, p)
		return
	case t == control.VaultComplete && resumes:
		v.allCame(c)
	case t == control.VaultTake && commands:
		v.take(c, p)
		return
	case t == control.VaultRefused && commands && v.built():
		v.g.tunnels.Refused(numbersOf(p))
	case t == control.VaultGone && commands && v.built():
		v.gone(numbersOf(p))
	case t == control.VaultReturned && commands && v.built():
		v.g.tunnels.Returned(answersOf(p))
	case commands || resumes:
		v.complain(c, "type", int(t))
	}
	p.CloseFiles()
}

func answersOf(p *control.VaultPacket) []tunnel.Answer {
	answers := make([]tunnel.Answer, len(p.Entries))
	for i := range p.Entries {
		answers[i] = tunnel.Answer{Number: p.Entries[i].Number, Stand: p.Entries[i].Stand}
	}
	return answers
}

func numbersOf(p *control.VaultPacket) []uint64 {
	numbers := make([]uint64, len(p.Entries))
	for i := range p.Entries {
		numbers[i] = p.Entries[i].Number
	}
	return numbers
}

// gone: tunnels are elsewhere. A candidate that has them as ours is told, too.
func (v *vault) gone(numbers []uint64) {
	v.g.tunnels.Gone(numbers)
	v.mu.RLock()
	c := v.candidate
	v.mu.RUnlock()
	if c != nil && c.open.Load() && c.Send(numbered(control.VaultWithdraw, numbers), candidatePatience) != nil {
		c.retire()
	}
}

// take has tunnels of another generation go on here, or says of each one that it does not.
func (v *vault) take(c *vaultChannel, p *control.VaultPacket) {
	var arriving []tunnel.Arriving
	var declined []control.VaultTunnel
	for i := range p.Entries {
		e := &p.Entries[i]
		if a, err := v.arriving(c, e); err == nil {
			arriving = append(arriving, a)
			continue
		}
		control.Discard(e.Files)
		declined = append(declined, e.From)
	}
	control.Discard(p.Files)
	if len(arriving) > 0 {
		v.g.tunnels.Take(arriving)
	}
	if len(declined) > 0 {
		_ = c.Send(declining(declined...), sendTimeout) // who does not take it sees the end
	}
}

// arriving makes a tunnel of what came.
func (v *vault) arriving(c *vaultChannel, e *control.VaultEntry) (tunnel.Arriving, error) {
	if !v.serving.Load() || len(e.Files) < 2 {
		return tunnel.Arriving{}, errNoVault
	}
	r, err := parseRecord(e.Record)
	if err != nil {
		return tunnel.Arriving{}, err
	}
	s, err := parseState(e.State, e.Files[2:])
	if err != nil {
		return tunnel.Arriving{}, err
	}
	who, ends := v.adopt(r)
	return tunnel.Arriving{Record: who, FDs: [2]int(e.Files), Standing: s, Ticket: incoming{e.From, c}, Sentence: ends}, nil
}

// adopt says what a tunnel is here.
func (v *vault) adopt(r *record) (tunnel.Record, tunnel.Sentence) {
	a := v.g.manager.adopt(r.provenance)
	who := tunnel.Record{Origin: a.origin, ID: r.id, Client: r.client, Started: r.started}
	if r.tag != nil {
		who.Tag = r.tag
	}
	if a.closes {
		return who, tunnel.Sentence{Ends: tunnel.RouteRemoved, Within: v.g.cfg.Drain.CloseSpread}
	}
	return who, tunnel.Sentence{}
}

// resume has tunnels of a dead generation go on here. Of one of which nothing is understood
// the connections are closed: the supervisor lets go of what is withdrawn.
func (v *vault) resume(c *vaultChannel, p *control.VaultPacket) {
	resumed := make([][]tunnel.Resumed, len(v.g.loops.all))
	var lost []uint64
	for i := range p.Entries {
		e := &p.Entries[i]
		r, err := parseRecord(e.Record)
		if err != nil || len(e.Files) != 2 || e.Number == 0 || r.place.Loop >= len(resumed) {
			lost = append(lost, e.Number)
			control.Discard(e.Files)
			continue
		}
		who, ends := v.adopt(r)
		who.Number = e.Number
		v.origin(e.Number, e.From)
		v.arrived(who.Origin)
		resumed[r.place.Loop] = append(resumed[r.place.Loop], tunnel.Resumed{Record: who, FDs: [2]int(e.Files), Place: r.place, Sentence: ends})
	}
	control.Discard(p.Files)
	for loop, tunnels := range resumed {
		if len(tunnels) > 0 {
			v.g.tunnels.Resume(loop, tunnels)
		}
	}
	if len(lost) > 0 {
		v.g.log.Error("tunnels of a dead generation cannot be resumed", "tunnels", len(lost))
		_ = c.Send(numbered(control.VaultWithdraw, lost), sendTimeout) // who does not take it sees the end
	}
}

// inherit takes a loop of a dead generation over. It returns false, with the packet
// untouched, if none is missing.
func (v *vault) inherit(p *control.VaultPacket) bool {
	if v.built() {
		return false
	}
	select {
	case v.inherited <- p:
		return true
	default:
		return false
	}
}

// heirlooms waits for the loops of a dead generation. They are the caller's.
func (v *vault) heirlooms(ctx context.Context) ([]*control.VaultPacket, error) {
	var all []*control.VaultPacket
	for range cap(v.inherited) {
		select {
		case p := <-v.inherited:
			all = append(all, p)
		case <-ctx.Done():
			for _, p := range all {
				p.CloseFiles()
			}
			return nil, fmt.Errorf("the loops of a dead generation: %w", context.Cause(ctx))
		}
	}
	return all, nil
}
