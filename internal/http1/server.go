package http1

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
)

const (
	defaultHeadSize = 64 << 10

	// A connection that we end while the client may still be sending stays open for
	// reading this long and this far: closing it with unread bytes makes the kernel
	// send a reset, which takes our last answer away from the client (RFC 9112 §9.6).
	lingerTime  = 3 * time.Second
	lingerBytes = 8 << 20

	// What is read of a request body that the handler left, to keep the connection.
	leftoverTime  = 500 * time.Millisecond
	leftoverBytes = 256 << 10

	// pipelined is how many requests of a connection are served before others have a turn.
	pipelined = 16

	// mostExchanges is how many exchanges of a loop are kept for requests to come.
	mostExchanges = 1024
)

// ServerOptions say how connections are served.
type ServerOptions struct {
	Limits   config.ListenerLimits // Connections is the acceptor's business; a HeadSize of 0 is 64 KiB
	Scheme   string                // "http" or "https": what requests report
	Listener string                // its name: what requests report
	Server   string                // how refusals name their server; "": not at all
	Handler  exchange.Handler
	Log      *slog.Logger
	Metrics  ServerMetrics
	Loops    []*stream.Loop // on which connections are served

	// HTTP2 serves a connection without TLS that begins with the preface of HTTP/2 (RFC 9113
	// §3.3), from which nothing was taken. nil: such a one is refused. Ended is then its business.
	HTTP2 func(*stream.Loop, stream.Passed, netip.AddrPort)

	// Refused is told of each request that the codec has answered itself. nil is
	// allowed. It is called on the connection's loop and must not block; the strings in a
	// Refusal are good until it returns.
	Refused func(exchange.Downstream, Refusal)

	// Ended is called once for each connection that was given to Serve or Take, when it is no
	// longer the server's: closed, switched or given away. nil is allowed. It is called on
	// the connection's loop and must not block.
	Ended func()
}

// Refusal is a request that no handler has seen: it was not valid, too large or too
// slow.
type Refusal struct {
	// Request is what could be read of the head: all of it, the request line, or
	// nothing.
	Request *exchange.Request

	Start  time.Time // when its first byte had come
	Status int       // that answers it
	Reason string    // for the log
	Sent   uint64    // bytes of the answer's body; 0 where the client did not take it

	// Err is why the answer did not leave whole, nil if it did: for [errors.Is],
	// net.ErrClosed after [Server.Close], os.ErrDeadlineExceeded for a client that did
	// not take it in time; otherwise the client has gone.
	Err error
}

// Idle is a connection between two requests that is given away.
type Idle struct {
	FD     int // does not block, and is on no loop
	Remote netip.AddrPort
	Early  []byte    // what was read of the next request
	Since  time.Time // when it became idle
}

// Server serves the connections of one listener, each on one of its loops. It accepts
// nothing: the owner of the listener calls Serve. Serve and Take are for the goroutine of
// the loop that they name; all other methods may be called by anybody. What these change
// has happened to all connections once every loop has had a turn, and to what a client
// sends afterwards in any case.
type Server struct {
	options ServerOptions
	epoch   time.Time     // what times of connections are counted from
	loops   []*serverLoop // by their index; nil: not one of ours
}

// serverLoop is what a server has on one loop. Its goroutine owns all but the figures.
type serverLoop struct {
	server *Server
	loop   *stream.Loop

	conns   *serverConn       // the first of a list
	free    []*serverExchange // of no connection
	trimmed bool              // the loop knows that they may go

	drain  time.Time // when idle connections are closed; zero while not draining
	silent bool      // no response says so
	closed bool
	give   func(*stream.Loop, Idle) bool // nil: idle connections stay

	connections, requests atomic.Int64
}

// NewServer returns a server for these options.
func NewServer(o ServerOptions) *Server {
	if o.Limits.HeadSize <= 0 {
		o.Limits.HeadSize = defaultHeadSize
	}
	if o.Refused == nil {
		o.Refused = func(exchange.Downstream, Refusal) {}
	}
	if o.Ended == nil {
		o.Ended = func() {}
	}
	s := &Server{options: o, epoch: time.Now()}
	for _, l := range o.Loops {
		for len(s.loops) <= l.Index {
			s.loops = append(s.loops, nil)
		}
		s.loops[l.Index] = &serverLoop{server: s, loop: l}
	}
	return s
}

// Serve serves a connection until it ends, unless a handler takes it with Switch. It
// takes p over, which is of this loop or on none. While the connection waits between requests, it holds neither a task nor a
// buffer. While idle connections are given away (HandOver), so is one that comes.
func (s *Server) Serve(l *stream.Loop, p stream.Passed, remote netip.AddrPort) {
	s.options.Metrics.connections.Inc()
	sl := s.loops[l.Index]
	if c := sl.serve(&p, remote, sl.now()); c != nil {
		c.offer()
	}
}

// Take is Serve for a connection that another server has given away: it was counted when it
// came, and its idle time goes on.
func (s *Server) Take(l *stream.Loop, i Idle) {
	sl := s.loops[l.Index]
	sl.serve(&stream.Passed{FD: i.FD, Early: i.Early}, i.Remote, i.Since.Sub(s.epoch))
}

// serve returns nil if the connection has ended.
func (sl *serverLoop) serve(p *stream.Passed, remote netip.AddrPort, since time.Duration) *serverConn {
	c := &serverConn{on: sl, remote: remote, began: sl.now(), idle: true, idleSince: since}
	sl.add(c)
	switch {
	case sl.closed:
	case sl.adopt(c, p):
		c.begin()
		return c
	}
	sl.remove(c, endedByUs)
	p.Close(sl.loop)
	return nil
}

// adopt takes p over, as c's.
func (sl *serverLoop) adopt(c *serverConn, p *stream.Passed) bool {
	if err := sl.loop.Resume(&c.Conn, p, c, &sl.server.options.Metrics.traffic); err != nil {
		sl.server.options.Log.Error("a connection cannot be served", "listener", sl.server.options.Listener, "err", err)
		return false
	}
	c.limitIdle()
	return true
}

// now is the time at which the turn began, since the server's epoch.
func (sl *serverLoop) now() time.Duration { return sl.loop.Now().Sub(sl.server.epoch) }

// Drain makes every response whose head is not out yet the last of its connection.
// A connection on which no request is under way, also one that has never sent any,
// stays open for idleGrace from now, and a request that comes in this time is
// served. Connections that are served from now on are treated the same.
func (s *Server) Drain(idleGrace time.Duration) {
	s.each(func(sl *serverLoop) { sl.setDrain(sl.loop.Now().Add(idleGrace), false) })
}

// Retire is Drain for a server whose connections go on elsewhere: no response says that it
// is the last one. Drain may follow.
func (s *Server) Retire(grace time.Duration) {
	s.each(func(sl *serverLoop) { sl.setDrain(sl.loop.Now().Add(grace), true) })
}

// Resume takes Drain and Retire back, for connections to which "close" was not said yet,
// and Close for those that it is given from now on.
func (s *Server) Resume() {
	s.each(func(sl *serverLoop) {
		sl.closed = false
		sl.setDrain(time.Time{}, false)
	})
}

func (sl *serverLoop) setDrain(at time.Time, silent bool) {
	sl.drain, sl.silent = at, silent
	for c := sl.conns; c != nil; c = c.next {
		if c.idle {
			c.limitIdle()
		}
	}
}

// HandOver has give called for every idle connection, and from now on for each that
// becomes idle, on its loop; so does one that has sent its next request already. Whoever
// returns true owns the descriptor; with false it stays, and is not offered again before
// another request was answered on it, or HandOver is called again. The same is true of all
// that have not been offered by then: there is no room for them either. give must not
// block. nil: connections stay where they are.
func (s *Server) HandOver(give func(*stream.Loop, Idle) bool) {
	s.each(func(sl *serverLoop) {
		sl.give = give
		for c, goes := sl.conns, true; c != nil && goes; {
			next := c.next
			goes = c.offer()
			c = next
		}
	})
}

// Close cuts every connection that the server still has, and each that it is given
// later. It does not wait. The exchanges of these connections are over with [net.ErrClosed].
func (s *Server) Close() {
	s.each(func(sl *serverLoop) {
		sl.closed = true
		sl.eachConn(func(c *serverConn) {
			if c.abort(net.ErrClosed) {
				s.options.Metrics.cut.Inc()
			}
		})
	})
}

// each has fn called on all loops.
func (s *Server) each(fn func(*serverLoop)) {
	for _, sl := range s.loops {
		if sl != nil {
			sl.loop.Post(func() { fn(sl) })
		}
	}
}

// Connections is how many connections are open, without those that were switched.
func (s *Server) Connections() (n int) {
	for _, sl := range s.loops {
		if sl != nil {
			n += int(sl.connections.Load())
		}
	}
	return n
}

// Requests is how many requests are with their handlers, switched ones included
// until the handler returns.
func (s *Server) Requests() (n int) {
	for _, sl := range s.loops {
		if sl != nil {
			n += int(sl.requests.Load())
		}
	}
	return n
}

// eachConn calls fn for every connection, which it may end.
func (sl *serverLoop) eachConn(fn func(*serverConn)) {
	for c := sl.conns; c != nil; {
		next := c.next
		fn(c)
		c = next
	}
}

func (sl *serverLoop) add(c *serverConn) {
	sl.server.options.Metrics.active.Add(1)
	sl.connections.Add(1)
	if c.next = sl.conns; c.next != nil {
		c.next.prev = c
	}
	sl.conns = c
}

// remove forgets a connection, which has ended.
func (sl *serverLoop) remove(c *serverConn, end connectionEnd) {
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		sl.conns = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	c.prev, c.next = nil, nil
	sl.connections.Add(-1)
	sl.server.options.Metrics.ended(sl.now()-c.began, end)
	if end == givenOver {
		return
	}
	if e := c.exchange; e != nil && e.handling {
		e.ended = true // it is told when the handler has made of it what it is to be
		return
	}
	sl.server.options.Ended()
}

// take returns an exchange for c.
func (sl *serverLoop) take(c *serverConn) (e *serverExchange) {
	if last := len(sl.free) - 1; last >= 0 {
		e = sl.free[last]
		sl.free[last] = nil
		sl.free = sl.free[:last]
	} else {
		e = new(serverExchange)
		if !sl.trimmed {
			sl.trimmed = true
			sl.loop.OnTrim(func() { sl.free = nil })
		}
	}
	e.c = c
	e.down = exchange.Downstream{Listener: sl.server.options.Listener, Remote: c.remote, Secure: c.Secure()}
	return e
}

// put takes an exchange back.
func (sl *serverLoop) put(e *serverExchange) {
	e.c, e.progress, e.out = nil, progress{}, bodyWriter{}
	if len(sl.free) < mostExchanges {
		sl.free = append(sl.free, e)
	}
}

var (
	errServed     = errors.New("the exchange is over")
	errClientGone = errors.New("the client has gone")
	errAborted    = errors.New("aborted by the handler")
)

// A connectionEnd is how a connection ended for the server.
type connectionEnd uint8

const (
	givenAway connectionEnd = iota // to a tunnel, or to another server
	endedByClient
	endedByUs
	givenOver // to who serves another version of HTTP
)
