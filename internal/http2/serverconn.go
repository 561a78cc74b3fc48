//lint:file-ignore SA1019 the library that comes with Go leads each connection through a listener
// of its own and has no say over single ones: this is the same code, with the connections ours.

package http2

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
)

// serverConn is one connection of a client. Goroutines of the library use it, and its loop knows
// of it.
type serverConn struct {
	on     *serverLoop
	remote netip.AddrPort
	local  netip.AddrPort
	secure *stream.Secure
	began  time.Time
	wire   *wire
	hs     *http.Server // whose shutdown the library drains the connection by

	// The loop's.
	exchanges map[*serverExchange]struct{}
	drains    drainState
	held      int
	final     poller.Deadline

	ours   atomic.Bool // we have ended it
	wasCut atomic.Bool // because time was over

	mu      sync.Mutex
	streams map[uint32]*serverHead
}

// A drainState is how far the end of a connection is.
type drainState uint8

const (
	notDraining drainState = iota
	holding                // it waits for the end of what holds it
	noticed                // the client is told that no more requests are to be sent
	concluded              // it is told which was the last one
)

func newServerConn(sl *serverLoop, remote netip.AddrPort, secure *stream.Secure) *serverConn {
	return &serverConn{
		on: sl, remote: remote, secure: secure, began: sl.loop.Now(),
		exchanges: make(map[*serverExchange]struct{}), streams: make(map[uint32]*serverHead),
	}
}

// begin has the connection leave its loop and be served.
func (c *serverConn) begin(p *stream.Passed) error {
	sl, s := c.on, c.on.server
	var passed stream.Conn
	if err := sl.loop.Resume(&passed, p, nil, nil); err != nil {
		p.Close(sl.loop)
		return err
	}
	conn, err := passed.Blocking()
	if err != nil {
		return err
	}
	if sl.closed {
		go conn.Close()
		return net.ErrClosed
	}
	if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		c.local = a.AddrPort()
	}
	limits := &s.options.Limits
	c.wire = newWire(conn, c, s.options.Scheme, limits.HeadSize, limits.HeadTimeout)
	c.wire.connects = s.options.Connect
	// Each has its own, by which it alone is drained.
	c.hs = &http.Server{MaxHeaderBytes: int(limits.HeadSize), ErrorLog: s.errors, Handler: c}
	h2 := &http2.Server{
		MaxConcurrentStreams: uint32(limits.HTTP2Streams), MaxReadFrameSize: maxFrame, MaxDecoderHeaderTableSize: maxTable, IdleTimeout: limits.IdleTimeout,
		MaxUploadBufferPerStream: streamWindow, MaxUploadBufferPerConnection: connectionWindow,
	}
	if err := http2.ConfigureServer(c.hs, h2); err != nil {
		conn.Close()
		return err
	}
	var served net.Conn = c.wire
	if c.secure != nil {
		served = secureWire{c.wire, c.secure}
	}
	go c.serve(h2, served)
	return nil
}

// secureWire lets the library see whether what was agreed on is good enough for HTTP/2 (RFC 9113
// §9.2).
type secureWire struct {
	*wire
	secure *stream.Secure
}

func (w secureWire) ConnectionState() tls.ConnectionState { return w.secure.State() }

// serve is the goroutine of a connection.
func (c *serverConn) serve(h2 *http2.Server, conn net.Conn) {
	c.contained(func() {
		h2.ServeConn(conn, &http2.ServeConnOpts{Context: context.Background(), BaseConfig: c.hs, Handler: c})
	})
	conn.Close()
	if !c.on.loop.Post(func() { c.over(true) }) {
		c.on.server.connections.Add(-1)
	}
}

// contained keeps a panic of the library from other connections, as net/http does.
func (c *serverConn) contained(serve func()) {
	defer func() {
		if p := recover(); p != nil {
			c.on.server.options.Log.Error("a connection of HTTP/2 panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	serve()
}

// over is called when the connection has ended.
func (c *serverConn) over(served bool) {
	sl, m := c.on, &c.on.server.options.Metrics
	delete(sl.conns, c)
	sl.loop.Forget(&c.final)
	c.drains = concluded
	for e := range c.exchanges {
		e.endWith(errClientGone)
	}
	if c.held == 0 {
		sl.server.connections.Add(-1)
	}
	m.active.Add(-1)
	switch lasted := sl.loop.Now().Sub(c.began); {
	case c.wasCut.Load():
		m.Cut(lasted)
	default:
		m.Closed(lasted, served && !c.ours.Load())
	}
	sl.server.options.Ended()
}

// cut closes the connection.
func (c *serverConn) cut() {
	for e := range c.exchanges {
		e.endWith(net.ErrClosed)
	}
	if c.held > 0 || c.wasCut.Swap(true) { // what is held goes on until its tunnels have ended
		return
	}
	c.ours.Store(true)
	c.wire.hurry(time.Now().Add(farewell))
	go c.wire.Close() // which may say goodbye in TLS
}

// drain tells the client that the connection is about to end. It may send requests until it has
// heard of that.
func (c *serverConn) drain() {
	switch {
	case c.drains >= noticed:
	case c.held > 0:
		c.drains = holding
	default:
		c.drains = noticed
		c.ours.Store(true)
		c.on.server.options.Metrics.Drained()
		go c.notice()
		c.on.loop.SetDeadline(&c.final, c, c.on.drain)
	}
}

// notice is the first of two GOAWAY: every request is served that comes (RFC 9113 §6.8).
func (c *serverConn) notice() {
	var p [8]byte
	binary.BigEndian.PutUint32(p[:], math.MaxInt32)
	c.goAway(false, http2.ErrCodeNo)
	c.wire.inject(appendFrame(nil, http2.FrameGoAway, 0, 0, p[:]))
}

// Expire implements [poller.Expirer]: no more requests are served than those that have come.
func (c *serverConn) Expire(*poller.Deadline) {
	if c.held > 0 {
		c.drains = holding
		return
	}
	c.drains = concluded
	go c.conclude()
}

func (c *serverConn) conclude() {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	_ = c.hs.Shutdown(ctx)
}

// hold keeps the connection from being drained while something is on it that lasts, of which
// clients would take a GOAWAY for the end. release follows. Both are for the loop's goroutine.
func (c *serverConn) hold() {
	if c.held++; c.held == 1 {
		c.on.server.connections.Add(-1) // it is its tunnels'
	}
}

func (c *serverConn) release() {
	if c.held--; c.held > 0 {
		return
	}
	c.on.server.connections.Add(1)
	if _, lives := c.on.conns[c]; !lives {
		c.on.server.connections.Add(-1) // it has ended before
		return
	}
	if c.on.closed {
		c.cut()
		return
	}
	if c.drains == holding {
		c.drains = notDraining
		if !c.on.drain.IsZero() {
			c.drain()
		}
	}
}

// opened implements [wireOwner].
func (c *serverConn) opened(id uint32, h *serverHead) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[id] = h
	return len(c.streams) <= 5*c.on.server.options.Limits.HTTP2Streams+100
}

// find implements [wireOwner].
func (c *serverConn) find(id uint32) *serverHead {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[id]
}

// start returns the request of a stream that a handler is to answer, or nil: it was reset, or is
// malformed.
func (c *serverConn) start(id uint32) *serverHead {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.streams[id]
	if h == nil || h.dropped {
		return nil
	}
	h.started = true
	return h
}

// finish forgets a stream.
func (c *serverConn) finish(id uint32) {
	c.mu.Lock()
	h := c.streams[id]
	delete(c.streams, id)
	c.mu.Unlock()
	if h == nil || !h.resetAs {
		c.wire.forget(id)
	}
}

// unstarted forgets a stream that no handler has, and says whether it had begun only now.
func (c *serverConn) unstarted(id uint32) (early bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.streams[id]
	if h == nil {
		return false
	}
	if !h.started {
		delete(c.streams, id)
	}
	return time.Since(h.began) < earlyReset
}

// resetByClient implements [wireOwner].
func (c *serverConn) resetByClient(id uint32) bool {
	c.on.server.options.Metrics.resets[1].Inc()
	return c.unstarted(id)
}

// resetByUs implements [wireOwner].
func (c *serverConn) resetByUs(id uint32, code http2.ErrCode) {
	if code != http2.ErrCodeNo {
		c.on.server.options.Metrics.resets[0].Inc()
	}
	c.unstarted(id)
}

// goAway implements [wireOwner].
func (c *serverConn) goAway(byClient bool, code http2.ErrCode) {
	by, failed := 0, 0
	if byClient {
		by = 1
	} else {
		c.ours.Store(true)
	}
	if code != http2.ErrCodeNo {
		failed = 1
	}
	c.on.server.options.Metrics.goAways[by][failed].Inc()
}

// flooded implements [wireOwner].
func (c *serverConn) flooded(kind flood) {
	o := &c.on.server.options
	o.Metrics.floods[kind].Inc()
	o.Log.Debug("a connection is ended that sends too much of no use", "kind", floodNames[kind], "listener", o.Listener, "client", c.client())
}

// malformed implements [wireOwner].
func (c *serverConn) malformed(h *serverHead, err error) {
	c.on.server.options.Metrics.Malformed()
	if h != nil && c.drop(h) {
		c.refused(h, 400, err, 0, nil)
	}
}

// drop has no handler get a request, and says whether none has it.
func (c *serverConn) drop(h *serverHead) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	h.dropped = true
	return !h.started
}

// received and sent implement [wireOwner].
func (c *serverConn) received(n int) { c.on.server.options.Metrics.Received(n) }
func (c *serverConn) sent(n int)     { c.on.server.options.Metrics.Sent(n) }

// client is the client's address for the log.
func (c *serverConn) client() string {
	if !c.remote.IsValid() {
		return "unix"
	}
	return c.remote.String()
}

func (c *serverConn) downstream() exchange.Downstream {
	return exchange.Downstream{Listener: c.on.server.options.Listener, Remote: c.remote, Secure: c.secure}
}

// refused tells of a request that no handler has seen.
func (c *serverConn) refused(h *serverHead, status int, why error, sent uint64, err error) {
	o := &c.on.server.options
	o.Log.Debug("request refused", "status", status, "reason", why.Error(), "listener", o.Listener, "client", c.client())
	request := h.Request
	c.on.loop.Post(func() {
		o.Refused(c.downstream(), http1.Refusal{Request: &request, Start: h.began, Status: status, Reason: why.Error(), Sent: sent, Err: err})
	})
}

// ServeHTTP implements [http.Handler] for the library: r stands in for the request that the wire
// has read.
func (c *serverConn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, _ := strconv.ParseUint(r.URL.Path[1:], 10, 32)
	h := c.start(uint32(id))
	if h == nil {
		panic(http.ErrAbortHandler)
	}
	defer c.finish(uint32(id))
	if h.protocol != "" {
		h.asUpgrade()
	}
	if h.refusal == nil && h.ContentLength > 0 && c.on.server.options.Limits.BodySize > 0 && h.ContentLength > c.on.server.options.Limits.BodySize {
		h.refusal = http1.Refuse(413, "a Content-Length beyond the limit")
	}
	if h.refusal != nil {
		c.refuse(w, h)
		return
	}
	newServerExchange(c, uint32(id), h, w, r).answer()
}

// refuse answers a request that no handler sees.
func (c *serverConn) refuse(w http.ResponseWriter, h *serverHead) {
	o := &c.on.server.options
	status := exchange.StatusOf(h.refusal, 500)
	switch status {
	case 400:
		o.Metrics.Malformed()
	case 431:
		o.Metrics.overflows.Inc()
	}
	text := fmt.Sprintf("%d %s\n", status, http1.Reason(status))
	header := w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("Content-Length", strconv.Itoa(len(text)))
	if o.Server != "" {
		header.Set("Server", o.Server)
	}
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(c.on.server.finish)) // the client may take nothing
	w.WriteHeader(status)
	n, err := w.Write([]byte(text))
	if err == nil {
		err = control.Flush()
	}
	if err != nil {
		n, err = 0, errClientGone
	}
	c.refused(h, status, h.refusal, uint64(n), err)
}
