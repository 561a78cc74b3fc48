package upstream

import (
	"net"
	"net/netip"
	"time"

	"holdfast/internal/poller"
	"holdfast/internal/task"
)

// How an endpoint is connected to that has several addresses (RFC 8305, "happy eyeballs"): one
// address after the other, the families in turns, without waiting for long that one answers.
// The first connection wins, and the others are given up at once.
const (
	// raceDelay is how long an address is alone before the next one is tried as well
	// (RFC 8305 §5, Connection Attempt Delay).
	raceDelay = 250 * time.Millisecond

	// mostRacing is how many are tried at the same time: each has a descriptor.
	mostRacing = 4
)

// interleave returns the addresses in the order in which they are tried: the families in
// turns, IPv6 first, each in the order that it came in (RFC 8305 §4). With a source only
// those are among them that can be connected to from there.
func interleave(addrs []netip.AddrPort, source netip.Addr) []netip.AddrPort {
	var families [2][]netip.AddrPort
	for _, a := range addrs {
		family := 0
		if a.Addr().Unmap().Is4() {
			family = 1
		}
		if source.IsValid() && source.Is4() != (family == 1) {
			continue
		}
		families[family] = append(families[family], a)
	}
	all := make([]netip.AddrPort, 0, len(addrs))
	for i := range addrs {
		for _, f := range families {
			if i < len(f) {
				all = append(all, f[i])
			}
		}
	}
	return all
}

// race is an attempt to connect to one of several addresses. The task that wants the
// connection has begun it and waits; each address has a task of its own.
type race struct {
	dial    dial
	waits   *task.Task
	runners map[*runner]struct{} // under way
	alone   poller.Alarm         // the time in which the last address is alone
	rung    bool
	over    bool // nobody waits any more

	won  Conn
	to   netip.AddrPort // where
	last error          // what an address has failed with
}

// runner is one address.
type runner struct {
	race    *race
	to      netip.AddrPort
	attempt Attempt
}

// race connects to the first of the addresses that answers, and waits for that.
func (d dial) race(t *task.Task, a *Attempt, addrs []netip.AddrPort) (Conn, netip.AddrPort, error) {
	r := &race{dial: d, waits: t, runners: make(map[*runner]struct{})}
	a.Wait(r)
	defer r.end()
	for a.err == nil && r.won == nil {
		switch {
		case len(addrs) > 0 && r.mayBegin() && !r.late():
			r.begin(addrs[0])
			addrs = addrs[1:]
		case len(r.runners) == 0:
			return nil, netip.AddrPort{}, r.last
		default:
			t.Wait()
		}
	}
	if r.won == nil {
		return nil, netip.AddrPort{}, a.err
	}
	d.of.give() // the attempt's: the connection has its own
	// It is the caller's to close where the attempt was cancelled at the same time.
	return r.won, r.to, nil
}

// mayBegin says whether it is the next address' turn.
func (r *race) mayBegin() bool {
	return len(r.runners) == 0 || r.rung && len(r.runners) < mostRacing
}

// late says that one was tried, and that there is no time for another.
func (r *race) late() bool {
	return r.last != nil && !r.dial.until.IsZero() && !r.dial.loop.Now().Before(r.dial.until)
}

// begin tries an address.
func (r *race) begin(to netip.AddrPort) {
	c := &runner{race: r, to: to}
	r.runners[c] = struct{}{}
	r.rung = false
	l := r.dial.loop
	l.SetAlarm(&r.alone, l.Now().Add(raceDelay), r.ring)
	l.Tasks.Go(c)
}

// ring has the next address tried as well.
func (r *race) ring() {
	r.rung = true
	r.waits.Wake()
}

// Interrupt implements [Interrupter]: the attempt was cancelled.
func (r *race) Interrupt(error) { r.waits.Wake() }

// end gives up all that are still under way. Their tasks end soon.
func (r *race) end() {
	r.over = true
	r.dial.loop.DropAlarm(&r.alone)
	for c := range r.runners {
		c.attempt.Cancel(net.ErrClosed)
	}
}

// Run implements [task.Runner].
func (c *runner) Run(t *task.Task) {
	err := error(net.ErrClosed) // by a panic, or given up before it began
	var conn Conn
	defer func() { c.race.ended(c, conn, err) }()
	if c.attempt.err == nil {
		conn, err = c.race.dial.one(t, &c.attempt, "tcp", c.to.String())
	}
	if err == nil {
		c.race.dial.of.more() // each gives back one when it ends
	}
}

// ended notes what has become of an address.
func (r *race) ended(c *runner, conn Conn, err error) {
	delete(r.runners, c)
	switch {
	case err == nil && (r.over || r.won != nil):
		conn.Close()
	case err == nil:
		r.won, r.to = conn, c.to
	default:
		r.last, r.rung = err, true // the next one need not wait
	}
	if !r.over {
		r.waits.Wake()
	}
}
