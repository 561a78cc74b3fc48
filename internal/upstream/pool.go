package upstream

import (
	"sync"
	"time"
)

// maxIdle is how many idle connections an endpoint keeps. More only lie in wait
// after a burst.
const maxIdle = 128

// pool holds an endpoint's idle connections. The one that became idle last is
// taken first, so that those which are not needed grow old and are closed.
//
// No goroutine waits beside them: one timer runs while there are any, and what an
// upstream has closed in the meantime shows when it is taken.
type pool struct {
	idleTimeout time.Duration // 0: never

	mu      sync.Mutex
	idle    []idleConn // oldest first
	closed  bool
	sweeper *time.Timer    // runs out when the oldest may have; nil while none is due
	sweeps  sync.WaitGroup // sweepers that have yet to run out or to be stopped
}

type idleConn struct {
	Conn
	since time.Time
}

// take returns a connection that is alive, or nil. It closes those it finds dead.
func (p *pool) take() Conn {
	for {
		c, ok := p.pop()
		if !ok {
			return nil
		}
		if c.Alive() {
			return c.Conn
		}
		c.Close()
	}
}

func (p *pool) pop() (c idleConn, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := len(p.idle) - 1
	if last < 0 {
		return idleConn{}, false
	}
	c = p.idle[last]
	p.idle[last] = idleConn{}
	p.idle = p.idle[:last]
	return c, true
}

func (p *pool) expired(c idleConn) bool {
	return p.idleTimeout > 0 && time.Since(c.since) >= p.idleTimeout
}

// put keeps a connection that has become idle, or closes it.
func (p *pool) put(conn Conn) {
	if !p.keep(conn) {
		conn.Close()
	}
}

func (p *pool) keep(conn Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle) >= maxIdle {
		return false
	}
	p.idle = append(p.idle, idleConn{conn, time.Now()})
	p.scheduleLocked()
	return true
}

// scheduleLocked starts the sweeper for the oldest connection, if none runs.
func (p *pool) scheduleLocked() {
	if p.idleTimeout <= 0 || p.sweeper != nil || len(p.idle) == 0 {
		return
	}
	p.sweeps.Add(1)
	p.sweeper = time.AfterFunc(time.Until(p.idle[0].since.Add(p.idleTimeout)), p.sweep)
}

// sweep closes what has been idle for too long.
func (p *pool) sweep() {
	defer p.sweeps.Done()
	for _, c := range p.takeExpired() {
		c.Close()
	}
}

func (p *pool) takeExpired() []idleConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for n < len(p.idle) && p.expired(p.idle[n]) {
		n++
	}
	expired := append([]idleConn(nil), p.idle[:n]...)
	rest := copy(p.idle, p.idle[n:])
	clear(p.idle[rest:])
	p.idle = p.idle[:rest]
	p.sweeper = nil
	if !p.closed {
		p.scheduleLocked()
	}
	return expired
}

// close closes what is idle, and makes put close what becomes idle later. It
// returns when no sweep runs any more.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	idle := p.idle
	p.idle = nil
	if p.sweeper != nil && p.sweeper.Stop() {
		p.sweeper = nil
		p.sweeps.Done()
	}
	p.mu.Unlock()
	for _, c := range idle {
		c.Close()
	}
	p.sweeps.Wait()
}
