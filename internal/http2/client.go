//lint:file-ignore SA1019 the library that comes with Go leads each connection through a listener
// of its own and has no say over single ones: this is the same code, with the connections ours.

package http2

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
)

const (
	// DefaultStreams is how many exchanges a connection carries at once unless somebody says
	// otherwise: what RFC 9113 §6.5.2 wants to be the least.
	DefaultStreams = 100

	// upstreamWindow is how much of a body a peer may send before anybody has read of it, and so
	// the memory that a response needs whose client is slow. A connection's window is that of
	// all its streams: were it less, a few slow clients would hold up all others.
	upstreamWindow = 256 << 10
	mostWindow     = 64 << 20

	// pingTimeout is how long a peer may take to answer that it is there, and to take a byte of
	// what it is sent.
	pingTimeout = 15 * time.Second
)

// ClientCounts are what is counted of connections to upstreams; nil counters count nothing.
type ClientCounts struct {
	Traffic      stream.Traffic
	GoAways      *metrics.Counter // connections that the peer has ended by a GOAWAY
	ResetsByPeer *metrics.Counter // streams
	ResetsByUs   *metrics.Counter
	PingTimeouts *metrics.Counter // connections
	Floods       *metrics.Counter
	Streams      *metrics.Gauge // that are open
}

// ClientOptions say how connections to upstreams are used. The zero value is ready.
type ClientOptions struct {
	Streams      int           // most exchanges at once on a connection; 0: DefaultStreams
	IdleTimeout  time.Duration // after which a connection closes itself that carries none; 0: never
	PingInterval time.Duration // for which nothing comes until the peer is asked whether it is there; 0: it is not asked
	Counts       ClientCounts
}

// Client makes connections to upstreams. Its methods may be called by any goroutine.
type Client struct {
	options   ClientOptions
	transport *http2.Transport
}

// NewClient returns a Client for these options. It starts nothing.
func NewClient(o ClientOptions) *Client {
	if o.Streams <= 0 {
		o.Streams = DefaultStreams
	}
	transport, err := http2.ConfigureTransports(&http.Transport{
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderList,
		HTTP2: &http.HTTP2Config{
			MaxReceiveBufferPerStream:     upstreamWindow,
			MaxReceiveBufferPerConnection: min(max(o.Streams, 4)*upstreamWindow, mostWindow),
			SendPingTimeout:               o.PingInterval,
			PingTimeout:                   pingTimeout,
			WriteByteTimeout:              pingTimeout,
		},
	})
	if err != nil {
		panic("http2: " + err.Error()) // a transport that was configured before
	}
	transport.IdleConnTimeout = o.IdleTimeout
	transport.CountError = func(what string) { // that of HTTP2Config is not told of PINGs
		if what == "conn_close_lost_ping" {
			o.Counts.PingTimeouts.Inc()
		}
	}
	// A request waits for a moment where the library still has one more than we: we have
	// counted before that there is room.
	transport.StrictMaxConcurrentStreams = true
	return &Client{options: o, transport: transport}
}

// Owner is what a connection has to tell whoever has made it, on any goroutine. None of the
// functions waits.
type Owner struct {
	// Room is called when an exchange has ended, or the peer lets there be more.
	Room func()

	// Leaving is called, once, when the peer wants no more exchanges on the connection, which
	// goes on with those that it has.
	Leaving func()

	// Ended is called, once, when the connection was closed, and says whether the peer was
	// first.
	Ended func(byPeer bool)
}

// ClientConn is a connection to an upstream that carries several exchanges at once, for any
// loop. Its methods may be called by any goroutine, and do not wait.
type ClientConn struct {
	client *Client
	secure bool
	owner  Owner
	wire   *clientWire
	conn   *http2.ClientConn

	mu      sync.Mutex
	active  int
	peers   int // most that the peer takes at once
	used    bool
	leaving bool
	none    bool // the peer takes no exchanges
	closed  bool
}

// Begin makes a connection of one that nothing was sent on, secure saying whether it has TLS, and
// blocks until the peer has proven that it speaks HTTP/2, or ctx is done. It takes c over, and
// closes it with an error.
func (c *Client) Begin(ctx context.Context, conn net.Conn, secure bool, o Owner) (*ClientConn, error) {
	cc := &ClientConn{client: c, secure: secure, owner: o, peers: c.options.Streams}
	cc.wire = newClientWire(conn, cc)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var err error
	if cc.conn, err = c.transport.NewClientConn(cc.wire); err != nil {
		_ = cc.wire.Close()
		return nil, err
	}
	// Its settings come first (RFC 9113 §3.4), and then the answer.
	if err = cc.conn.Ping(ctx); err == nil && !stop() {
		err = ctx.Err()
	}
	none := cc.takesNone()
	if err == nil && !none {
		return cc, nil
	}
	_ = cc.conn.Close()
	switch {
	case none:
		return nil, ErrNoStreams
	case ctx.Err() != nil:
		err = ctx.Err()
	}
	return nil, fmt.Errorf("%w: %w", errNotHTTP2, err)
}

var errNotHTTP2 = errors.New("the endpoint does not answer in HTTP/2")

// ErrNoStreams is the error of connections on which the peer takes no exchanges.
var ErrNoStreams = errors.New("the endpoint takes no requests on an HTTP/2 connection")

// Exchange begins one for a loop. ok is false if there can be none: all are in use that there
// may be, or the connection takes no more. first says that the caller takes the connection for
// a fresh one.
func (c *ClientConn) Exchange(l *stream.Loop, first bool) (up exchange.Upstream, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving || c.closed || c.active >= min(c.peers, c.client.options.Streams) {
		return nil, false
	}
	c.active++
	c.client.options.Counts.Streams.Add(1)
	reused := c.used && !first
	c.used = true
	return newClientStream(c, l, reused), true
}

// Active is how many exchanges there are.
func (c *ClientConn) Active() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.active
}

// Usable says whether there may be further exchanges, now or later.
func (c *ClientConn) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.leaving && !c.closed
}

// ended notes the end of an exchange.
func (c *ClientConn) ended() {
	c.mu.Lock()
	c.active--
	over := c.active == 0 && c.leaving
	c.mu.Unlock()
	c.client.options.Counts.Streams.Add(-1)
	if over {
		c.Close()
	}
	c.owner.Room()
}

// notice looks, after an exchange has failed, whether the library has given the connection up: it
// says so to nobody but the next request, as when the peer has reset a stream for PROTOCOL_ERROR.
func (c *ClientConn) notice() {
	if !c.conn.CanTakeNewRequest() {
		c.Retire()
	}
}

// Retire has there be no further exchanges. The connection is closed when those it has have ended.
func (c *ClientConn) Retire() {
	c.mu.Lock()
	before := c.leaving
	c.leaving = true
	over := c.active == 0
	c.mu.Unlock()
	if !before && c.owner.Leaving != nil {
		c.owner.Leaving()
	}
	if over {
		c.Close()
	}
}

// Close ends all exchanges and closes the connection, some time: TLS has to say something before.
func (c *ClientConn) Close() {
	c.mu.Lock()
	before := c.closed
	c.closed = true
	c.mu.Unlock()
	if before {
		return
	}
	c.wire.tell(false)
	go c.wire.Conn.Close() // by which the library notices
}

func (c *ClientConn) takesNone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.none
}

// allows notes how many streams the peer takes at once. One that takes none is not waited for: the
// next exchange needs another connection anyway, and these would add up.
func (c *ClientConn) allows(n uint32) {
	if n == 0 {
		c.mu.Lock()
		c.none = true
		c.mu.Unlock()
		c.Retire()
		return
	}
	c.mu.Lock()
	more := int(min(n, 1<<30)) > c.peers
	c.peers = int(min(n, 1<<30))
	c.mu.Unlock()
	if more {
		c.owner.Room()
	}
}

// What a connection may be sent that is of no use to anybody: see clientWire.
const (
	mostCredit      = 4096 // frames
	creditOfStream  = 16   // for each exchange
	creditOfData    = 4    // for each frame with content that is sent: servers of gRPC answer it with windows and a PING
	creditPerSecond = 50
	bytesOfCredit   = 512 // of bodies and heads, in either direction
)

// errFlood is why a connection ends on which little came but frames that say nothing.
var errFlood = errors.New("a flood of HTTP/2 frames without content")

// clientWire is the connection as the library has it. It looks at the frames that come: what the
// library does not tell, and whether they are worth anything. PINGs, SETTINGS, resets and empty
// frames cost the peer nothing and us some; for these there is a credit, which is earned by what
// the connection is for. One setting it changes: see tamed.
type clientWire struct {
	net.Conn
	of     *ClientConn
	earned atomic.Int64 // by what was sent
	over   sync.Once

	// Of the library's goroutine that reads:
	head    [9]byte
	had     int     // bytes of head
	left    int     // bytes of the frame's content that are still to come
	setting [6]byte // of a frame of settings
	some    int     // bytes of that
	credit  int64
	at      time.Time // when credit was given for time
	failed  bool

	// Of whoever writes, for which the library has a lock:
	sentHead [9]byte
	sentHad  int // bytes of it
	unsent   int // bytes of the frame's content, or of the preface, that are still to be sent
}

func newClientWire(conn net.Conn, of *ClientConn) *clientWire {
	return &clientWire{Conn: conn, of: of, credit: mostCredit, at: time.Now(), unsent: len(http2.ClientPreface)}
}

// Read implements [net.Conn].
func (w *clientWire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	counts := &w.of.client.options.Counts
	if n > 0 {
		counts.Traffic.Received.Add(uint64(n))
		w.look(p[:n])
		if w.credit < 0 && !w.refill() {
			if !w.failed {
				w.failed = true
				counts.Floods.Inc()
			}
			return 0, errFlood
		}
	}
	if err != nil {
		w.tell(true)
	}
	return n, err
}

// Write implements [net.Conn].
func (w *clientWire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	w.of.client.options.Counts.Traffic.Sent.Add(uint64(n))
	w.earned.Add(int64(n/bytesOfCredit + creditOfData*w.dataIn(p)))
	return n, err
}

// dataIn is how many frames with content begin in p, which is sent.
func (w *clientWire) dataIn(p []byte) (frames int) {
	for len(p) > 0 {
		if w.unsent > 0 {
			n := min(w.unsent, len(p))
			w.unsent -= n
			p = p[n:]
			continue
		}
		n := copy(w.sentHead[w.sentHad:], p)
		w.sentHad += n
		p = p[n:]
		if w.sentHad < len(w.sentHead) {
			break
		}
		w.sentHad = 0
		f := parseFrameHeader(w.sentHead[:])
		if w.unsent = f.length; f.kind == http2.FrameData && f.length > 0 {
			frames++
		}
	}
	return frames
}

// Close implements [net.Conn].
func (w *clientWire) Close() error {
	w.tell(false)
	return w.Conn.Close()
}

// tell tells of the end, once.
func (w *clientWire) tell(byPeer bool) {
	w.over.Do(func() {
		w.of.mu.Lock()
		w.of.closed = true
		w.of.mu.Unlock()
		if w.of.owner.Ended != nil {
			w.of.owner.Ended(byPeer)
		}
	})
}

// refill adds what was earned, and says whether there is any credit.
func (w *clientWire) refill() bool {
	now := time.Now()
	seconds := now.Sub(w.at).Seconds()
	w.at = now
	w.credit = min(w.credit+w.earned.Swap(0)+int64(seconds*creditPerSecond), mostCredit)
	return w.credit >= 0
}

// look looks at what has come.
func (w *clientWire) look(p []byte) {
	for len(p) > 0 {
		if w.had < len(w.head) {
			n := copy(w.head[w.had:], p)
			w.had += n
			p = p[n:]
			if w.had < len(w.head) {
				return
			}
			w.left = int(w.head[0])<<16 | int(w.head[1])<<8 | int(w.head[2])
			w.begins(http2.FrameType(w.head[3]), http2.Flags(w.head[4]))
		}
		n := min(w.left, len(p))
		w.content(p[:n])
		p = p[n:]
		if w.left -= n; w.left == 0 {
			w.had, w.some = 0, 0
		}
	}
}

// begins is told of each frame.
func (w *clientWire) begins(t http2.FrameType, flags http2.Flags) {
	counts := &w.of.client.options.Counts
	w.credit--
	switch t {
	case http2.FrameData:
		if w.left > 0 && !flags.Has(http2.FlagDataPadded) || flags.Has(http2.FlagDataEndStream) {
			w.credit++
		}
		w.credit = min(w.credit+int64(w.left/bytesOfCredit), mostCredit)
	case http2.FrameRSTStream:
		counts.ResetsByPeer.Inc()
	case http2.FrameGoAway:
		counts.GoAways.Inc()
		w.of.Retire()
	}
}

// content is told of what is in a frame.
func (w *clientWire) content(p []byte) {
	if http2.FrameType(w.head[3]) != http2.FrameSettings {
		return
	}
	for len(p) > 0 {
		n := copy(w.setting[w.some:], p)
		for i := range n {
			p[i] = w.tamed(w.some + i)
		}
		w.some += n
		p = p[n:]
		if w.some < len(w.setting) {
			return
		}
		w.some = 0
		s := w.setting
		if w.settingID() == http2.SettingMaxConcurrentStreams {
			w.of.allows(uint32(s[2])<<24 | uint32(s[3])<<16 | uint32(s[4])<<8 | uint32(s[5]))
		}
	}
}

func (w *clientWire) settingID() http2.SettingID {
	return http2.SettingID(w.setting[0])<<8 | http2.SettingID(w.setting[1])
}

// tamed is the i-th byte of a setting as the library is to have it. For the body of each request it
// has memory of the size of the largest frame that the peer takes, up to half a megabyte, also while
// nothing moves: so it hears of no more than the least that a peer may take (RFC 9113 §6.5.2). A
// value that is invalid stays that.
func (w *clientWire) tamed(i int) byte {
	s := w.setting
	if i >= 3 && w.settingID() == http2.SettingMaxFrameSize && s[2] == 0 {
		switch large := s[3] > 0; {
		case i == 3:
			return 0
		case i == 4 && (large || s[4] > maxFrame>>8):
			return maxFrame >> 8
		case i == 5 && (large || s[4] >= maxFrame>>8):
			return 0
		}
	}
	return s[i]
}
