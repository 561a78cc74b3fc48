package http1

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
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
)

// ServerOptions say how connections are served.
type ServerOptions struct {
	Limits  config.ListenerLimits // Connections is the acceptor's business; a HeadSize of 0 is 64 KiB
	Scheme  string                // "http" or "https": what requests report
	Handler exchange.Handler
	Log     *slog.Logger
	Metrics ServerMetrics

	// Refused is told of each request that the codec has answered itself. nil is
	// allowed. It is called by the connection's goroutine and must not block.
	Refused func(exchange.Downstream, Refusal)
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

// Server serves the connections of one listener. It starts no goroutine of its own
// and accepts nothing: the owner of the listener calls Serve. All methods may be
// called concurrently.
type Server struct {
	options  ServerOptions
	buffers  Buffers
	requests atomic.Int64

	mu     sync.Mutex
	conns  map[*serverConn]struct{}
	drain  time.Time // when idle connections are closed; zero while not draining
	closed bool
}

// NewServer returns a server for these options.
func NewServer(o ServerOptions) *Server {
	if o.Limits.HeadSize <= 0 {
		o.Limits.HeadSize = defaultHeadSize
	}
	return &Server{options: o, conns: make(map[*serverConn]struct{})}
}

// Serve serves conn until it ends, and closes it, unless a handler took it with
// Switch. It blocks. While it waits between requests it holds a goroutine, but no
// buffer if conn is a *net.TCPConn or *net.UnixConn.
func (s *Server) Serve(conn net.Conn, d exchange.Downstream) {
	m := &s.options.Metrics
	c := &serverConn{server: s, conn: conn, downstream: d, in: newReader(conn, &s.buffers, m.traffic.Received)}
	m.opened()
	began := time.Now()
	defer func() { m.ended(began, c.end) }() // which nobody changes any more
	if !s.add(c) {
		c.abort(net.ErrClosed)
		return
	}
	defer s.remove(c)
	defer c.abort(errServed)
	defer c.contain("the codec")
	for c.awaitRequest() && c.serveRequest() {
	}
}

// Drain makes every response whose head is not out yet the last of its connection.
// A connection on which no request is under way, also one that has never sent any,
// stays open for idleGrace from now, and a request that comes in this time is
// served. Connections that are served from now on are treated the same.
func (s *Server) Drain(idleGrace time.Duration) { s.setDrain(time.Now().Add(idleGrace)) }

// Resume takes Drain back, for connections to which "close" was not said yet, and
// Close for those that it is given from now on.
func (s *Server) Resume() {
	s.mu.Lock()
	s.closed = false
	s.mu.Unlock()
	s.setDrain(time.Time{})
}

func (s *Server) setDrain(at time.Time) {
	s.mu.Lock()
	s.drain = at
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		c.updateIdle()
	}
}

// Close cuts every connection that the server still has, and each that it is given
// later. It does not wait: the Serve calls return soon after. The cause with which
// the contexts of their exchanges end is [net.ErrClosed].
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		if c.abort(net.ErrClosed) {
			s.options.Metrics.cut.Inc()
		}
	}
}

// Connections is how many connections are open, without those that were switched.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Requests is how many requests are with their handlers, switched ones included
// until the handler returns.
func (s *Server) Requests() int { return int(s.requests.Load()) }

func (s *Server) add(c *serverConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.conns[c] = struct{}{}
	}
	return !s.closed
}

func (s *Server) remove(c *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// draining returns until when idle connections stay open, if they are to go.
func (s *Server) draining() (until time.Time, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drain, !s.drain.IsZero()
}

var (
	errServed     = errors.New("the exchange is over")
	errClientGone = errors.New("the client has gone")
	errAborted    = errors.New("aborted by the handler")
)

// serverConn is one downstream connection. Its Serve goroutine owns what stands
// above mu; while a watch runs, the watch owns in.
type serverConn struct {
	server     *Server
	conn       net.Conn
	downstream exchange.Downstream
	in         *reader

	mu         sync.Mutex
	idleSince  time.Time     // zero while not idle
	idleDrains bool          // what ends the idle time is the drain, not the idle timeout
	watching   chan struct{} // closed at the end of the watch; nil without one
	cancel     func(error)   // ends the context of the exchange; nil without one
	closed     bool
	switched   bool          // the connection is no longer ours
	end        connectionEnd // once closed or switched
}

// A connectionEnd is how a connection ended for the server.
type connectionEnd uint8

const (
	becameTunnel connectionEnd = iota
	endedByClient
	endedByUs
)

// awaitRequest waits for the first byte of a request. False means that none will
// come.
func (c *serverConn) awaitRequest() bool {
	if len(c.in.buffered()) > 0 {
		return true
	}
	c.setIdle(time.Now())
	err := c.in.fill()
	c.setIdle(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The deadline may have come first although a request is there. It was sent
		// while the connection was open, so it is served.
		if c.in.poll() {
			return true
		}
		c.countIdleEnd()
		return false
	}
	if err != nil {
		c.abort(errClientGone)
	}
	return err == nil
}

// countIdleEnd counts a connection on which no request came in time.
func (c *serverConn) countIdleEnd() {
	c.mu.Lock()
	drains := c.idleDrains
	c.mu.Unlock()
	if drains {
		c.server.options.Metrics.drained.Inc()
	} else {
		c.server.options.Metrics.idleTimeouts.Inc()
	}
}

func (c *serverConn) setIdle(since time.Time) {
	c.mu.Lock()
	c.idleSince = since
	c.mu.Unlock()
	c.updateIdle()
}

// updateIdle sets the time at which an idle connection is given up. It reads the
// server's state under c.mu, so that of Drain and setIdle the later one decides.
func (c *serverConn) updateIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idleSince.IsZero() || c.switched {
		return
	}
	var deadline time.Time
	if d := c.server.options.Limits.IdleTimeout; d > 0 {
		deadline = c.idleSince.Add(d)
	}
	until, draining := c.server.draining()
	c.idleDrains = draining && (deadline.IsZero() || until.Before(deadline))
	if c.idleDrains {
		deadline = until
	}
	c.conn.SetReadDeadline(deadline)
}

// serveRequest reads one request and has it answered. It says whether the
// connection goes on.
func (c *serverConn) serveRequest() bool {
	began := time.Now()
	head, err := c.readHead()
	if err == nil && c.server.options.Limits.BodySize > 0 && head.ContentLength > c.server.options.Limits.BodySize && head.Upgrade == "" {
		err = refusal(413, "a Content-Length beyond the limit")
	}
	if err != nil {
		c.refuse(err, head.Request, began)
		return false
	}
	e := c.newExchange(head)
	c.serveExchange(e)
	return e.end()
}

// readHead reads a request head and what belongs to it, within the head timeout,
// which begins now: at the first byte.
func (c *serverConn) readHead() (requestHead, error) {
	var deadline time.Time
	if d := c.server.options.Limits.HeadTimeout; d > 0 {
		deadline = time.Now().Add(d)
	}
	c.conn.SetReadDeadline(deadline)
	end, fields, err := c.findHead()
	if err != nil {
		return requestHead{}, err
	}
	head, err := parseRequest(string(c.in.buffered()[:end]), fields, c.server.options.Scheme)
	if err != nil {
		return requestHead{}, err
	}
	c.in.consume(end)
	if head.hasTail {
		for len(c.in.buffered()) < draft76Tail {
			if err := c.fillHead(); err != nil {
				return requestHead{}, err
			}
		}
		head.HeadTail = append([]byte(nil), c.in.buffered()[:draft76Tail]...)
		c.in.consume(draft76Tail)
	}
	c.conn.SetReadDeadline(time.Time{})
	return head, nil
}

// findHead reads until a whole head is buffered. One empty line before it is
// skipped (RFC 9112 §2.2).
func (c *serverConn) findHead() (end, fields int, err error) {
	scan := headScanner{limit: int(c.server.options.Limits.HeadSize)}
	skipped := false
	for {
		end, err := scan.scan(c.in.buffered())
		switch {
		case err != nil:
			return 0, 0, err
		case end > 2:
			return end, scan.lines - 1, nil
		case end == 2 && skipped:
			return 0, 0, malformed("empty lines before a request")
		case end == 2:
			c.in.consume(end)
			scan = headScanner{limit: scan.limit}
			skipped = true
			continue
		}
		if err := c.fillHead(); err != nil {
			return 0, 0, err
		}
	}
}

func (c *serverConn) fillHead() error {
	err := c.in.fill()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return refusal(408, "a head that came too slowly")
	}
	return err
}

// reasons are the phrases of the statuses that the codec answers with.
var reasons = map[int]string{
	400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
	417: "Expectation Failed", 431: "Request Header Fields Too Large", 501: "Not Implemented",
	505: "HTTP Version Not Supported",
}

// refuse answers a request that no handler sees, if there is anything to answer,
// and ends the connection so that the client can read it. head is nil if it is the
// head that is at fault.
func (c *serverConn) refuse(err error, head *exchange.Request, began time.Time) {
	status := exchange.StatusOf(err, 0)
	if status == 0 {
		c.abort(errClientGone)
		return
	}
	if status == 400 {
		c.server.options.Metrics.errors.Inc()
	}
	if head == nil {
		head = readable(c.in.buffered(), c.server.options.Scheme)
	}
	refused := Refusal{Request: head, Start: began, Status: status, Reason: err.Error()}
	c.server.options.Log.Debug("request refused", "status", status, "reason", err.Error(),
		"listener", c.downstream.Listener, "client", c.client())
	refused.Sent, refused.Err = c.sendRefusal(status)
	if refused.Err != nil && !errors.Is(refused.Err, os.ErrDeadlineExceeded) && !c.abort(errClientGone) {
		refused.Err = net.ErrClosed // it was us, before
	}
	if c.server.options.Refused != nil {
		c.server.options.Refused(c.downstream, refused)
	}
	if refused.Err == nil {
		c.linger()
	}
}

// client is the client's address for the log.
func (c *serverConn) client() string {
	if !c.downstream.Remote.IsValid() {
		return "unix"
	}
	return c.downstream.Remote.String()
}

// sendRefusal answers by ourselves. It returns how many bytes of the answer's body have
// left: none if it fails.
func (c *serverConn) sendRefusal(status int) (sent uint64, err error) {
	text := strconv.Itoa(status) + " " + reasons[status] + "\n"
	r := &exchange.Response{Status: status, Reason: reasons[status], ContentLength: int64(len(text))}
	r.Fields.Add("Content-Type", "text/plain; charset=utf-8")
	b, err := appendResponse(c.server.buffers.get(smallBuffer)[:0], r, responseFraming{length: true, close: true, date: time.Now()})
	if err != nil {
		return 0, err
	}
	b = append(b, text...)
	c.conn.SetWriteDeadline(time.Now().Add(lingerTime))
	n, err := c.conn.Write(b)
	c.server.options.Metrics.traffic.Sent.Add(uint64(n))
	c.server.buffers.put(b)
	if err != nil {
		return 0, err
	}
	return uint64(len(text)), nil
}

// linger ends the sending side and reads until the client ends its own, within
// bounds.
func (c *serverConn) linger() {
	half, ok := c.conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	c.conn.SetReadDeadline(time.Now().Add(lingerTime))
	for total := 0; total < lingerBytes; {
		n := len(c.in.buffered())
		total += n
		c.in.consume(n)
		if c.in.fill() != nil {
			return
		}
	}
}

// abort closes the connection and ends its exchange for the given reason. Later
// calls do nothing, nor does one after Switch; they return false.
func (c *serverConn) abort(reason error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.switched {
		return false
	}
	c.closed = true
	c.end = endedByUs
	if reason == errClientGone {
		c.end = endedByClient
	}
	if c.cancel != nil {
		c.cancel(reason)
	}
	c.conn.Close()
	return true
}

// contain is deferred where bytes of a client are worked on: a panic costs that
// client its connection; the others of the process go on.
func (c *serverConn) contain(who string) {
	if p := recover(); p != nil {
		c.server.options.Log.Error(who+" panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		c.abort(errAborted)
	}
}

// startWatch begins to read ahead while a request is being answered, so that its
// exchange learns when the client goes. Up to limit bytes of what the client sends
// early are kept; beyond them the watch is blind.
func (c *serverConn) startWatch(limit int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.watching != nil || c.closed || c.switched {
		return
	}
	done := make(chan struct{})
	c.watching = done
	go c.watch(limit, done)
}

func (c *serverConn) watch(limit int, done chan struct{}) {
	defer close(done)
	for len(c.in.buffered()) < limit {
		err := c.in.fill()
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			return // stopWatch
		default:
			c.abort(errClientGone)
			return
		}
	}
}

// stopWatch ends the watch and waits for its end. What it has read is buffered.
func (c *serverConn) stopWatch() {
	c.mu.Lock()
	done := c.watching
	c.watching = nil
	c.mu.Unlock()
	if done == nil {
		return
	}
	c.conn.SetReadDeadline(longAgo)
	<-done
	c.conn.SetReadDeadline(time.Time{})
}
