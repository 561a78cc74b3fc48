package vault

import (
	"errors"
	"io"
	"math"
	"os"
	"time"

	"holdfast/internal/control"
)

// bounds are those of a vault's waits.
type bounds struct {
	// send and ask are how long a packet may wait in front of a full queue. Tunnels stand
	// still for the latter, and go on where they are then.
	send, ask time.Duration

	// slow is how long nobody is asked to take anything who had such a queue.
	slow time.Duration

	// verdict is how long a generation that was asked may say nothing at all. Then its
	// channel is ended, which is a verdict. It is lastVerdict for tunnels of the dead.
	verdict, lastVerdict time.Duration

	// pause is how long the first generation without a channel is left so, and mostPause
	// the one that loses one after the other.
	pause, mostPause time.Duration

	// patience is how long a generation that may know of tunnels may be without a channel,
	// until others' need not wait for it; and how long with one, until it gets another, if
	// they wait: its word that this is all may have been lost.
	patience time.Duration
}

var usual = bounds{
	send: 2 * time.Second, ask: 500 * time.Millisecond, slow: 10 * time.Second,
	verdict: 5 * time.Second, lastVerdict: 2 * time.Second,
	pause: time.Second, mostPause: 30 * time.Second,
	patience: 10 * time.Second,
}

const (
	// mostQueued is how many packets may wait for a generation that does not read.
	mostQueued = 128

	// newsPause is how long news gather before the next are received. A packet that was sent
	// is as good as one that was received; but it keeps descriptors on their way, of which
	// there may be so many as one process may have (unix(7)).
	newsPause = 8 * time.Millisecond
)

// channel is a channel to a generation. The vault's mu guards what is not set once.
type channel struct {
	of   *generation
	conn *control.Vault

	opened time.Time
	over   bool          // nothing is sent any more
	broken bool          // and nothing that comes counts, but verdicts
	banned bool          // its generation has broken the protocol, and is given no other
	stuck  bool          // its closer is not waited for any more; only of read
	done   chan struct{} // closed when it was read to its end, and all was done

	complete bool        // VaultComplete has come
	overdue  *time.Timer // looks whether it has

	// asked are the tunnels that were sent here to be taken, by where they are, and have
	// no verdict; answerBy is when there must be one, which watch sees to.
	asked    map[control.VaultTunnel]*deposit
	answerBy time.Time
	watch    *time.Timer

	queue   []*parcel
	wake    chan struct{} // has room for one: there is something in the queue, or it is over
	slow    time.Time     // until then nobody asks
	written chan struct{} // closed when nothing is written any more
}

func newChannel(g *generation, conn *control.Vault) *channel {
	return &channel{
		of: g, conn: conn, opened: time.Now(), done: make(chan struct{}),
		asked: make(map[control.VaultTunnel]*deposit),
		wake:  make(chan struct{}, 1), written: make(chan struct{}),
	}
}

// parcel is a packet on its way, and what belongs to it.
type parcel struct {
	*control.VaultPacket
	tunnels []*deposit // of VaultTake; pinned
	files   []int      // that are closed when it was sent
	by      *closer    // who closes them
}

// end has nothing sent over c any more, in either direction. What its generation has sent
// is still read, and then c is done. Called with the vault's mu held.
func (c *channel) end() {
	if c.over {
		return
	}
	c.over = true
	_ = c.conn.CloseRead() // an error is that the other side is gone
	c.poke()
}

// poke has the writer look.
func (c *channel) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// read does what c's generation says until that ends, once that has come to an end over
// the channel before.
func (v *Vault) read(c, before *channel) {
	if before != nil {
		<-before.done
	}
	v.work.Go(func() { v.write(c) })
	gather := time.Duration(0)
	for {
		p, err := c.conn.Receive(gather)
		if err != nil && !errors.Is(err, control.ErrProtocol) {
			if !errors.Is(err, io.EOF) {
				v.log.Error("a vault channel cannot be read", "of_generation", c.of.number, "err", err)
			}
			break
		}
		if gather = 0; p != nil && isNews(p.Type) {
			gather = newsPause
		}
		v.take(c, p, err)
		v.awaitCloser(c)
	}
	v.finish(c)
}

// awaitCloser waits while too many descriptors that c's generation has sent are to be
// closed: what is not received cannot pile up here. If none of them can be, the channel is
// ended; and nobody waits before the end of one that is.
func (v *Vault) awaitCloser(c *channel) {
	least, deadline := math.MaxInt, time.Time{}
	for ; !c.stuck; time.Sleep(closeAfter) {
		n := c.of.closer.waiting()
		if n <= v.limits.unclosed {
			return
		}
		if n < least {
			least, deadline = n, time.Now().Add(v.bounds.send)
		}
		v.mu.Lock()
		if time.Now().After(deadline) {
			v.violatedLocked(c, errors.New("what it has sent cannot be closed"))
		}
		c.stuck = c.over
		v.mu.Unlock()
	}
}

// finish: nothing more will come over c.
func (v *Vault) finish(c *channel) {
	v.mu.Lock()
	g := c.of
	c.end()
	c.overdue.Stop()
	for from, d := range c.asked {
		delete(c.asked, from)
		v.declinedLocked(d)
	}
	if c.watch != nil {
		c.watch.Stop()
	}
	if g.channel == c {
		g.channel = nil
		if !c.banned {
			v.startWaiting(g)
			v.startLost(g, time.Since(c.opened))
		}
	}
	v.decideLocked()
	v.tellLocked()
	v.mu.Unlock()
	c.conn.Close() // whatever is being sent fails
	<-c.written
	close(c.done)
	v.changed()
}

// startLost has g given another channel after a pause. The one it had has lasted for so
// long.
func (v *Vault) startLost(g *generation, lasted time.Duration) {
	if v.closed || g.dead || v.opts.Lost == nil {
		return
	}
	if g.pause = min(2*g.pause, v.bounds.mostPause); g.pause == 0 || lasted > v.bounds.mostPause {
		g.pause = v.bounds.pause
	}
	var t *time.Timer
	t = time.AfterFunc(g.pause, func() {
		v.mu.Lock()
		still := g.lost == t
		if still {
			g.lost = nil
			v.work.Add(1) // Close does not wait yet: it stops this before
		}
		v.mu.Unlock()
		if still {
			defer v.work.Done()
			v.opts.Lost(g.number)
		}
	})
	g.lost = t
}

func (g *generation) stopLost() {
	if g.lost != nil {
		g.lost.Stop()
		g.lost = nil
	}
}

// violatedLocked: c's generation has broken the protocol.
func (v *Vault) violatedLocked(c *channel, why error) {
	if c.banned {
		return
	}
	v.log.Error("a generation has broken the vault protocol: its tunnels are not kept any more", "of_generation", c.of.number, "err", why)
	c.broken, c.banned = true, true
	c.end()
	v.emptyLocked(c.of)
}

// write sends what is queued for c.
func (v *Vault) write(c *channel) {
	defer close(c.written)
	for {
		p, over := v.nextParcel(c)
		switch {
		case over:
			return
		case p == nil:
			<-c.wake
		default:
			v.deliver(c, p)
		}
	}
}

// nextParcel takes what is to be sent next. Once c is over, it lets go of everything.
func (v *Vault) nextParcel(c *channel) (p *parcel, over bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if c.over {
		for _, p := range c.queue {
			p.done()
		}
		c.queue = nil
		return nil, true
	}
	if len(c.queue) == 0 {
		return nil, false
	}
	p, c.queue = c.queue[0], c.queue[1:]
	return p, false
}

// deliver sends p. An answer is tried until c is over; a question goes back if it cannot
// be sent at once, and those behind it too.
func (v *Vault) deliver(c *channel, p *parcel) {
	within := v.bounds.send
	if p.Type == control.VaultTake {
		within = v.bounds.ask
	}
	err := c.conn.Send(p.VaultPacket, within)
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case err == nil:
		p.done()
	case errors.Is(err, os.ErrDeadlineExceeded):
		v.slowLocked(c, p)
	default: // the other side is gone, or does not want to hear
		p.done()
		c.end()
	}
}

// slowLocked: c's generation does not read, p could not be sent.
func (v *Vault) slowLocked(c *channel, p *parcel) {
	c.slow = time.Now().Add(v.bounds.slow)
	queue := append([]*parcel{p}, c.queue...)
	c.queue = nil
	for _, p := range queue {
		if p.Type != control.VaultTake {
			c.queue = append(c.queue, p)
			continue
		}
		for _, d := range p.tunnels {
			if c.asked[d.name()] == d {
				delete(c.asked, d.name())
				v.declinedLocked(d)
			}
		}
		p.done()
	}
	v.tellLocked()
}

// done lets go of what p has needed. Called with the vault's mu held.
func (p *parcel) done() {
	for _, d := range p.tunnels {
		d.sockets.unpin()
	}
	if p.by != nil {
		p.by.close(p.files)
	}
}

// queueLocked has p sent. It says false if it never will be.
func (c *channel) queueLocked(p *parcel) bool {
	if c.over || len(c.queue) >= mostQueued {
		return false
	}
	c.queue = append(c.queue, p)
	c.poke()
	return true
}

// answerLocked tells c's generation what became of a tunnel. After another channel has
// taken c's place it asks again over that one.
func (v *Vault) answerLocked(c *channel, t control.VaultType, number, stand uint64) {
	if c.over {
		return
	}
	var last *parcel
	if n := len(c.queue); n > 0 && c.queue[n-1].Type == t && len(c.queue[n-1].Entries) < control.MaxVaultNumbers {
		last = c.queue[n-1]
	} else {
		last = &parcel{VaultPacket: &control.VaultPacket{Type: t}}
		if !c.queueLocked(last) {
			v.violatedLocked(c, errors.New("it does not read"))
			return
		}
	}
	last.Entries = append(last.Entries, control.VaultEntry{Number: number, Stand: stand})
}

// watchLocked sees to it that there is a verdict within a time.
func (v *Vault) watchLocked(c *channel) {
	c.answerBy = time.Now().Add(v.bounds.verdict)
	if c.watch == nil {
		c.watch = time.AfterFunc(v.bounds.verdict, func() { v.onSilence(c) })
	} else {
		c.watch.Reset(v.bounds.verdict)
	}
}

func (v *Vault) onSilence(c *channel) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !c.over && len(c.asked) > 0 && !time.Now().Before(c.answerBy) {
		v.silentLocked(c)
	}
}

// silentLocked: c's generation does not say whether it takes what it was asked to.
func (v *Vault) silentLocked(c *channel) {
	v.log.Error("a generation does not say whether it takes tunnels: its vault channel is ended", "of_generation", c.of.number, "tunnels", len(c.asked))
	c.end()
}

// onOverdue looks for c's generation to have said all that others wait for.
func (v *Vault) onOverdue(c *channel) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case c.over || c.complete || c.of.told: // nobody waits for it
	case len(v.waiting) == 0:
		c.overdue.Reset(v.bounds.patience)
	default:
		v.log.Error("a generation does not say that its tunnels are complete: its vault channel is ended", "of_generation", c.of.number, "waiting", len(v.waiting))
		c.end()
	}
}
