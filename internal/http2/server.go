package http2

import (
	"errors"
	"io"
	"log"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/stream"
)

const (
	// defaultStreams is how many requests a connection may have at once.
	defaultStreams = 100

	// A client may have sent so much of bodies that nobody has read, on one stream and on all.
	streamWindow     = 256 << 10
	connectionWindow = 1 << 20
)

// ServerOptions say how connections are served. They are those of [http1.ServerOptions].
type ServerOptions struct {
	Limits   config.ListenerLimits // a HeadSize of 0 is 64 KiB, HTTP2Streams of 0 are 100
	Scheme   string
	Listener string
	Server   string
	Handler  exchange.Handler
	Log      *slog.Logger
	Metrics  ServerMetrics
	Loops    []*stream.Loop

	// Connect says that clients may ask for other protocols (RFC 8441). A handler gets such a
	// request as [exchange.Request] with Upgrade.
	Connect bool

	Refused func(exchange.Downstream, http1.Refusal) // a request that is malformed has the status 400, which nobody has sent
	Ended   func()
}

// Server serves connections of one listener, each on one of its loops, as an [http1.Server] does.
// A connection is used by goroutines; what becomes of its requests is done on its loop.
//
// A drain tells clients at once that no more requests are to be sent, and serves those that come
// until the idle grace is over; then the connection ends with its last request.
type Server struct {
	options ServerOptions
	epoch   time.Time
	errors  *log.Logger
	loops   []*serverLoop // by their index; nil: not one of ours

	finish time.Duration // [finishTime], but in tests

	connections, requests atomic.Int64
}

// serverLoop is what a server has on one loop. Its goroutine owns it.
type serverLoop struct {
	server *Server
	loop   *stream.Loop
	conns  map[*serverConn]struct{}
	drain  time.Time // when connections are told finally; zero while not draining
	closed bool
}

// NewServer returns a server for these options.
func NewServer(o ServerOptions) *Server {
	if o.Limits.HeadSize <= 0 {
		o.Limits.HeadSize = http1.DefaultHeadSize
	}
	if o.Limits.HTTP2Streams <= 0 {
		o.Limits.HTTP2Streams = defaultStreams
	}
	if o.Refused == nil {
		o.Refused = func(exchange.Downstream, http1.Refusal) {}
	}
	if o.Ended == nil {
		o.Ended = func() {}
	}
	s := &Server{options: o, epoch: time.Now(), errors: log.New(io.Discard, "", 0), finish: finishTime}
	for _, l := range o.Loops {
		for len(s.loops) <= l.Index {
			s.loops = append(s.loops, nil)
		}
		s.loops[l.Index] = &serverLoop{server: s, loop: l, conns: make(map[*serverConn]struct{})}
	}
	return s
}

// Serve serves a connection until it ends. It takes p over, which is of this loop or on none, and
// begins with the client's preface.
func (s *Server) Serve(l *stream.Loop, p stream.Passed, remote netip.AddrPort) {
	s.options.Metrics.Accepted()
	s.loops[l.Index].serve(&p, remote)
}

// Continue is Serve for a connection that another server has had, and counted.
func (s *Server) Continue(l *stream.Loop, p stream.Passed, remote netip.AddrPort) {
	s.options.Metrics.Continued()
	s.loops[l.Index].serve(&p, remote)
}

func (sl *serverLoop) serve(p *stream.Passed, remote netip.AddrPort) {
	s := sl.server
	s.connections.Add(1)
	s.options.Metrics.connections.Inc()
	s.options.Metrics.active.Add(1)
	c := newServerConn(sl, remote, p.Secure)
	if err := c.begin(p); err != nil {
		s.options.Log.Error("a connection cannot be served", "listener", s.options.Listener, "err", err)
		c.over(false)
		return
	}
	sl.conns[c] = struct{}{}
	if !sl.drain.IsZero() {
		c.drain()
	}
}

// Drain ends connections when their requests have, and from idleGrace on takes no more.
func (s *Server) Drain(idleGrace time.Duration) {
	s.each(func(sl *serverLoop) {
		sl.drain = sl.loop.Now().Add(idleGrace)
		for c := range sl.conns {
			c.drain()
		}
	})
}

// Retire is Drain: no other generation can go on with a connection.
func (s *Server) Retire(grace time.Duration) { s.Drain(grace) }

// Resume takes Drain back for connections that are served from now on, and Close. Who was told
// that no more requests are to be sent sends none.
func (s *Server) Resume() {
	s.each(func(sl *serverLoop) { sl.drain, sl.closed = time.Time{}, false })
}

// HandOver does nothing: no connection can go elsewhere.
func (s *Server) HandOver(func(*stream.Loop, http1.Idle) bool) {}

// Close cuts every connection that the server still has, and each that it is given later. It does
// not wait. The exchanges of these connections are over with [net.ErrClosed].
func (s *Server) Close() {
	s.each(func(sl *serverLoop) {
		sl.closed = true
		for c := range sl.conns {
			c.cut()
		}
	})
}

func (s *Server) each(fn func(*serverLoop)) {
	for _, sl := range s.loops {
		if sl != nil {
			sl.loop.Post(func() { fn(sl) })
		}
	}
}

// Connections is how many connections are open.
func (s *Server) Connections() int { return int(s.connections.Load()) }

// Requests is how many requests are with their handlers.
func (s *Server) Requests() int { return int(s.requests.Load()) }

var (
	errClientGone   = errors.New("the client has gone")
	errAborted      = errors.New("aborted by the handler")
	errResponded    = errors.New("the response head was sent already")
	errNotResponded = errors.New("no response head was sent yet")
	errStopped      = errors.New("the rest of the request body was given up")
	errNoSwitch     = errors.New("a connection of HTTP/2 cannot be given up")
	errTooMuch      = errors.New("more body bytes than announced")
	errTooLittle    = errors.New("fewer body bytes than announced")
	errNoBody       = errors.New("a body where none may be")
)
