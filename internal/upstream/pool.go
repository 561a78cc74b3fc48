package upstream

import (
	"slices"
	"sync/atomic"
	"time"

	"holdfast/internal/poller"
	"holdfast/internal/stream"
)

// maxIdle is how many idle connections an endpoint keeps, on all loops together. Each costs a
// descriptor and a few hundred bytes; one that is made anew costs more than a request. What a
// burst has left goes after the cluster's idle timeout.
const maxIdle = 1024

// pool holds an endpoint's idle connections of one loop. The one that became idle last is
// taken first, so that those which are not needed grow old and are closed. Only the loop's
// goroutine uses it.
//
// Besides, the endpoint's requests on the loop are counted there.
//
// One deadline is set while there are any. A connection that its upstream closes meanwhile
// ends by itself, and is removed.
type pool struct {
	loop        *stream.Loop  // known once a connection was made on it
	idleTimeout time.Duration // 0: never
	most        int

	idle    []idleConn    // oldest first
	counted *atomic.Int64 // what is idle in all pools of a priority; nil: nobody needs to know
	closed  bool
	sweeper poller.Deadline // comes when the oldest connection may have expired

	requests atomic.Uint64 // that the endpoint was given on this loop, which alone changes it
}

type idleConn struct {
	Conn
	since time.Time
}

// newPools returns one for each of n loops, which share out what an endpoint may keep.
func newPools(n int, idleTimeout time.Duration, counted *atomic.Int64) []pool {
	pools := make([]pool, n)
	for i := range pools {
		pools[i].idleTimeout = idleTimeout
		pools[i].most = (maxIdle + n - 1) / n
		pools[i].counted = counted
	}
	return pools
}

// count counts idle connections that have come, or with a negative n gone.
func (p *pool) count(n int) {
	if p.counted != nil {
		p.counted.Add(int64(n))
	}
}

// take returns a connection that is alive, or nil. It closes those it finds dead. In a nil pool
// there is none.
func (p *pool) take() Conn {
	for p != nil {
		last := len(p.idle) - 1
		if last < 0 {
			return nil
		}
		c := p.idle[last].Conn
		p.idle[last] = idleConn{}
		p.idle = p.idle[:last]
		p.count(-1)
		if c.Alive() {
			return c
		}
		c.Close()
	}
	return nil
}

// keep takes a connection that has become idle, if there is room.
func (p *pool) keep(conn Conn) bool {
	if p.closed || len(p.idle) >= p.most {
		return false
	}
	p.idle = append(p.idle, idleConn{conn, p.loop.Now()})
	p.count(1)
	if len(p.idle) == 1 {
		p.schedule()
	}
	return true
}

// remove forgets a connection that has ended, if it is idle.
func (p *pool) remove(conn Conn) {
	for i := range p.idle {
		if p.idle[i].Conn == conn {
			p.idle = slices.Delete(p.idle, i, i+1)
			p.count(-1)
			return
		}
	}
}

// schedule has the oldest connection looked at when it may have expired. If that is taken
// meanwhile, the look is too early for the next one, and harms nobody.
func (p *pool) schedule() {
	if p.idleTimeout > 0 && len(p.idle) > 0 {
		p.loop.SetDeadline(&p.sweeper, p, p.idle[0].since.Add(p.idleTimeout))
	}
}

// Expire implements [poller.Expirer]: it closes what has been idle for too long.
func (p *pool) Expire(*poller.Deadline) {
	now := p.loop.Now()
	for len(p.idle) > 0 && now.Sub(p.idle[0].since) >= p.idleTimeout {
		c := p.idle[0].Conn
		p.idle = slices.Delete(p.idle, 0, 1)
		p.count(-1)
		c.Close()
	}
	p.schedule()
}

// empty closes what is idle.
func (p *pool) empty() {
	idle := p.idle
	p.idle = nil
	p.count(-len(idle))
	for _, c := range idle {
		c.Close()
	}
}

// close closes what is idle, and has keep refuse what becomes idle later.
func (p *pool) close() {
	p.closed = true
	p.empty()
	if p.loop != nil {
		p.loop.Forget(&p.sweeper)
	}
}
