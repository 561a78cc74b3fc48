package proxy

import (
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// tcpListener is what the manager knows of a listener that relays connections as they are.
type tcpListener struct {
	name      string
	cfg       *config.TCP
	routes    *route.TCP
	addresses *route.Addresses // nil: everybody may connect
	metrics   tcpMetrics
}

// addRelays takes the listeners that relay connections out of those that serve requests.
func (m *Manager) addRelays() {
	var requests []config.Listener
	for _, l := range m.options.Listeners {
		if l.TCP == nil {
			requests = append(requests, l)
			continue
		}
		t := &tcpListener{name: l.Name, cfg: l.TCP, routes: route.NewTCP(l.TCP, m.options.Values)}
		if f := l.Filters; f != nil {
			t.addresses = route.NewAddresses(f.Allow, f.Deny)
		}
		t.metrics = newTCPMetrics(m.options.Metrics, l.Name, t.routes)
		m.relays[l.Name] = t
	}
	m.options.Listeners = requests
}

// namesakeOfRelay is namesake for tunnels from a listener that relays: there must be one of the
// same name, with a route of that name if it had one.
func (m *Manager) namesakeOfRelay(p *provenance) namesake {
	t := m.relays[p.listener]
	if t == nil {
		return namesake{}
	}
	for _, r := range t.routes.Routes() {
		if brief(r.Name) == p.route {
			return namesake{name: r.Name, tunnels: &t.cfg.Tunnels}
		}
	}
	return namesake{}
}

// TCPServer relays the connections of one listener as they are: each becomes a tunnel to an
// endpoint, unless something is in the way (tcp_conn.go). It is a [server] that has nothing to
// do with drains: what is not a tunnel yet becomes one of the generation that drains.
type TCPServer struct {
	*tcpListener
	m     *Manager
	ended func()
	loops []*tcpLoop // by their index
}

// tcpLoop is what a server has on one loop. Its goroutine owns all but the figure.
type tcpLoop struct {
	*TCPServer
	loop    *stream.Loop
	conns   map[*tcpConn]struct{} // that are no tunnels yet
	closed  bool
	origins map[tcpOriginKey]*tunnel.Origin

	connections atomic.Int64
}

// tcpOriginKey is what an origin of tunnels is made for.
type tcpOriginKey struct {
	route    *route.TCPRoute
	endpoint *upstream.Endpoint
}

// NewTCPServer returns the server of a listener, which calls ended for each connection that it
// does not have any more.
func (m *Manager) NewTCPServer(listener string, loops []*stream.Loop, ended func()) *TCPServer {
	s := &TCPServer{tcpListener: m.relays[listener], m: m, ended: ended, loops: make([]*tcpLoop, len(loops))}
	for _, l := range loops {
		s.loops[l.Index] = &tcpLoop{TCPServer: s, loop: l, conns: make(map[*tcpConn]struct{}), origins: make(map[tcpOriginKey]*tunnel.Origin)}
	}
	return s
}

// Serve relays a connection. It takes p over, which is of this loop or on none.
func (s *TCPServer) Serve(l *stream.Loop, p stream.Passed, remote netip.AddrPort) {
	tl := s.loops[l.Index]
	c := &tcpConn{on: tl, remote: remote, began: l.Now(), id: s.m.newTunnelID()}
	s.metrics.Accepted()
	tl.connections.Add(1)
	tl.conns[c] = struct{}{}
	switch {
	case tl.closed:
		c.refusePassed(&p, net.ErrClosed)
	case s.addresses != nil && s.addresses.Denies(c.address()):
		c.refusePassed(&p, errDenied)
	default:
		if err := l.Resume(&c.Conn, &p, c, nil); err != nil {
			c.refusePassed(&p, err)
			return
		}
		c.begin()
	}
}

// refusePassed ends a connection that is not c's yet.
func (c *tcpConn) refusePassed(p *stream.Passed, why error) {
	resetOnClose(p.FD)
	p.Close(c.on.loop)
	c.refused(why)
}

// Drain implements [server]: there is nothing that would be idle.
func (s *TCPServer) Drain(time.Duration) {}

// Retire implements [server].
func (s *TCPServer) Retire(time.Duration) {}

// HandOver implements [server].
func (s *TCPServer) HandOver(func(*stream.Loop, http1.Idle) bool) {}

// Resume implements [server].
func (s *TCPServer) Resume() {
	s.each(func(tl *tcpLoop) { tl.closed = false })
}

// Close implements [server]: what is not a tunnel by now does not become one.
func (s *TCPServer) Close() {
	s.each(func(tl *tcpLoop) {
		tl.closed = true
		for c := range tl.conns {
			c.giveUp(net.ErrClosed)
		}
	})
}

// each has fn called on all loops.
func (s *TCPServer) each(fn func(*tcpLoop)) {
	for _, tl := range s.loops {
		tl.loop.Post(func() { fn(tl) })
	}
}

// Connections implements [server].
func (s *TCPServer) Connections() (n int) {
	for _, tl := range s.loops {
		n += int(tl.connections.Load())
	}
	return n
}

// Requests implements [server].
func (s *TCPServer) Requests() int { return 0 }

// remove forgets a connection, which has ended or become a tunnel.
func (tl *tcpLoop) remove(c *tcpConn) {
	delete(tl.conns, c)
	tl.connections.Add(-1)
	tl.ended()
}

// origin returns what all tunnels have in common that begin on the loop and go that way.
func (tl *tcpLoop) origin(c *tcpConn) *tunnel.Origin {
	key := tcpOriginKey{c.route, c.endpoint}
	if o := tl.origins[key]; o != nil {
		return o
	}
	p := provenance{listener: tl.name, route: c.route.Name, cluster: c.cluster, endpoint: c.endpoint.Address, address: c.endpoint.Addr}
	p.follow(&tl.cfg.Tunnels)
	o := newOrigin(&p, tl.metrics.routes[c.route.Number].routeTunnels, c.endpoint.Tunnels)
	tl.origins[key] = o
	return o
}
