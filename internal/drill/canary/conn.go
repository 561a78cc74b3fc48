package canary

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// conn is a connection to the proxy.
type conn struct {
	*net.TCPConn
	killed atomic.Bool // the process at its other end was killed while it was open, or is about to be
	of     *conns
}

func (c *conn) Close() error {
	c.of.forget(c)
	return c.TCPConn.Close()
}

// conns are the connections to the proxy that are open, by what the proxy's process
// knows of them.
type conns struct {
	mu     sync.Mutex
	open   map[string]*conn
	killed map[string]time.Time // of which a process was told before we knew that they are open
}

// overtaken is how long before us others may know of a connection of ours.
const overtaken = 2 * time.Second

func newConns() *conns {
	return &conns{open: make(map[string]*conn), killed: make(map[string]time.Time)}
}

// seenByPeer names a connection as the process at its other end sees it: by that
// process's address and ours.
func seenByPeer(c net.Conn) string { return c.RemoteAddr().String() + " " + c.LocalAddr().String() }

func (cs *conns) dial(address string) (*conn, error) {
	nc, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return nil, err
	}
	c := &conn{TCPConn: nc.(*net.TCPConn), of: cs}
	cs.note(c)
	return c, nil
}

func (cs *conns) note(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	name := seenByPeer(c)
	cs.open[name] = c
	if at, ok := cs.killed[name]; ok && time.Since(at) < overtaken {
		c.killed.Store(true)
	}
}

func (cs *conns) forget(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.open, seenByPeer(c))
}

// killAll marks those that are open: their processes may have been killed.
func (cs *conns) killAll() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.open {
		c.killed.Store(true)
	}
}

// kill marks the connections with a process that is killed next; its sockets are named
// by its own addresses and those of the other ends.
func (cs *conns) kill(sockets []string) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	clear(cs.killed)
	for _, name := range sockets {
		if c, ok := cs.open[name]; ok {
			c.killed.Store(true)
		} else {
			cs.killed[name] = time.Now()
		}
	}
}
