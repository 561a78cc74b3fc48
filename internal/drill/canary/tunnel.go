package canary

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// TunnelPath is followed by a tunnel's number.
const TunnelPath = "/tunnel/"

// A pace is how a direction of a tunnel is used.
type pace struct {
	most  int           // bytes at once; how many is random
	pause time.Duration // between two times
	ends  bool          // soon: after briefEnds, or bulkEnds if it comes in bulk
	bulk  bool          // always most at once
	slow  bool          // the receiver takes little, so there is always something in the way
}

var (
	talking  = pace{most: 2000, pause: 20 * time.Millisecond}
	brief    = pace{most: 2000, pause: 20 * time.Millisecond, ends: true}
	quiet    = pace{most: 100, pause: 4 * time.Second}
	bulky    = pace{most: 512 << 10, pause: 100 * time.Millisecond, bulk: true}
	large    = pace{most: 512 << 10, pause: 20 * time.Millisecond, bulk: true, ends: true}
	flooding = pace{most: slowRead, bulk: true, slow: true}
)

const (
	briefEnds = 300 * time.Millisecond
	bulkEnds  = 4 << 20

	// A slow receiver reads so much, and then does nothing for a slowPause.
	slowRead   = 32 << 10
	slowBuffer = 64 << 10

	// A pause is longer or shorter than told by at most this part of it.
	unevenness = 4
)

// kind is a kind of tunnels, by what is done in their directions.
type kind struct {
	name     string
	up, down pace // to the upstream, to the client
	lossy    bool // both ends lose some of what reaches them, and get it again
}

var kinds = [...]kind{
	{name: "talking both ways", up: talking, down: talking},
	{name: "half-closed by the client", up: brief, down: talking},
	{name: "half-closed by the upstream", up: talking, down: brief},
	{name: "half-closed by the client after some MiB", up: large, down: talking},
	{name: "half-closed by the upstream after some MiB", up: talking, down: large},
	{name: "with a slow client", up: talking, down: flooding},
	{name: "with a slow upstream", up: flooding, down: talking},
	{name: "half-closed by the client, which is slow", up: brief, down: flooding},
	{name: "half-closed by the upstream, which is slow", up: flooding, down: brief},
	{name: "with bulk for both", up: bulky, down: bulky},
	{name: "talking, with losses", up: talking, down: talking, lossy: true},
	{name: "with bulk for both, and losses", up: bulky, down: bulky, lossy: true},
	quietKind,
}

var quietKind = kind{name: "quiet", up: quiet, down: quiet}

// The key is always the same, so its answer (RFC 6455, section 4.2.2) is too. The
// answer says which tunnel's it is.
const (
	upgradeTo = "GET %s%d HTTP/1.1\r\nHost: drill\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" + numberField + ": %d\r\n\r\n"
	numberField = "Drill-Tunnel"
)

// tunnel is one tunnel, of which both ends are ours.
type tunnel struct {
	number uint64
	kind   *kind
	client *conn
	up     flow // to the upstream
	down   flow // to the client

	live     context.Context // until its ends shall close it
	over     context.CancelFunc
	whole    context.Context // until it is cut; the cause is why
	cut      context.CancelCauseFunc
	accepted chan struct{} // closed when the upstream has done with it
	carried  atomic.Bool   // something has arrived
	loses    atomic.Bool   // segments
}

func (c *canary) newTunnel(kind *kind, client *conn, lifetime time.Duration) *tunnel {
	t := &tunnel{number: c.tunnels.Add(1), kind: kind, client: client, accepted: make(chan struct{})}
	t.live, t.over = context.WithTimeout(c.live, lifetime)
	t.up.stream, t.up.pace = streamOf(2*t.number), kind.up
	t.down.stream, t.down.pace = streamOf(2*t.number+1), kind.down
	t.whole, t.cut = context.WithCancelCause(context.Background())
	return t
}

func (t *tunnel) String() string { return fmt.Sprintf("tunnel %d (%s)", t.number, t.kind.name) }

// keepTunnel has a tunnel open until the canary ends; after its lifetime, or its
// death, another one.
func (c *canary) keepTunnel(kind *kind, lifetime func() time.Duration) {
	for c.live.Err() == nil {
		if !c.tunnel(c.address, kind, lifetime()) {
			c.pause(requestPause)
		}
	}
}

// tunnel opens a tunnel at address and uses it until its lifetime is over or it
// breaks. It returns whether there was one.
func (c *canary) tunnel(address string, kind *kind, lifetime time.Duration) bool {
	t, ok := c.open(address, kind, lifetime)
	if !ok {
		return false
	}
	defer t.over()
	defer t.client.Close()
	c.tally.opened(t)
	defer c.tally.closed(t)
	c.use(t, t.client.TCPConn, t.client, &t.up, &t.down)
	<-t.accepted
	if err := context.Cause(t.whole); err != nil && t.carried.Load() {
		c.tally.fail(&c.tally.Dropped, "%s was dropped: %v", t, err)
	} else if err != nil { // so perhaps it was not a tunnel yet
		c.tally.failOn(t.client, &c.tally.Dropped, "%s was dropped before it was used: %v", t, err)
	}
	return true
}

// open opens a tunnel.
func (c *canary) open(address string, kind *kind, lifetime time.Duration) (*tunnel, bool) {
	c.opens <- struct{}{}
	defer func() { <-c.opens }()
	conn, ok := c.dial(address)
	if !ok {
		return nil, false
	}
	t := c.newTunnel(kind, conn, lifetime)
	c.opening.Store(t.number, t)
	err := t.shake()
	c.opening.Delete(t.number)
	if err != nil {
		t.cut(err)
		t.over()
		conn.Close()
		c.tally.failOn(conn, &c.tally.Failed, "%s cannot be opened: %v", t, err)
		return nil, false
	}
	return t, true
}

// shake asks for the upgrade.
func (t *tunnel) shake() error {
	client := t.client
	if err := t.prepare(client.TCPConn); err != nil {
		return err
	}
	client.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintf(client, upgradeTo, TunnelPath, t.number); err != nil {
		return err
	}
	// Byte by byte, so that nothing behind the head is taken.
	var head strings.Builder
	for b := make([]byte, 1); !strings.HasSuffix(head.String(), "\r\n\r\n"); head.Write(b) {
		if _, err := io.ReadFull(client, b); err != nil {
			return err
		}
	}
	if !strings.HasPrefix(head.String(), "HTTP/1.1 101 ") || !strings.Contains(head.String(), fmt.Sprintf("\r\n%s: %d\r\n", numberField, t.number)) {
		return fmt.Errorf("answered with %.200q", head.String())
	}
	client.SetDeadline(time.Time{})
	return nil
}

// prepare has the kernel do with an end's connection what the tunnel's kind wants.
func (t *tunnel) prepare(c *net.TCPConn) error {
	if t.up.pace.slow || t.down.pace.slow {
		// The kernel takes little on our behalf, so that the proxy is what has to wait.
		c.SetReadBuffer(slowBuffer)
		c.SetWriteBuffer(slowBuffer)
	}
	if !t.kind.lossy {
		return nil
	}
	err := lose(c)
	if errors.Is(err, unix.EPERM) { // some kernels want CAP_NET_ADMIN
		return nil
	}
	t.loses.Store(err == nil)
	return err
}

// acceptTunnel is the upstream's end of a tunnel.
func (c *canary) acceptTunnel(w http.ResponseWriter, r *http.Request) {
	number, _ := strconv.ParseUint(strings.TrimPrefix(r.URL.Path, TunnelPath), 10, 64)
	found, ok := c.opening.LoadAndDelete(number)
	if !ok { // its client has given up
		http.Error(w, "no such tunnel", http.StatusGone)
		return
	}
	t := found.(*tunnel)
	defer close(t.accepted)
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.cut(err)
		return
	}
	defer nc.Close()
	tcp := nc.(*net.TCPConn)
	if err := t.prepare(tcp); err != nil {
		t.cut(err)
		return
	}
	if _, err := fmt.Fprintf(tcp, switching, t.number); err != nil {
		t.cut(err)
		return
	}
	c.use(t, tcp, rw.Reader, &t.down, &t.up)
}

// use is one end's part: it sends what is to be sent and receives the rest, until
// both directions have ended or the tunnel is cut. rest reads what is left of conn.
func (c *canary) use(t *tunnel, conn *net.TCPConn, rest io.Reader, out, in *flow) {
	defer context.AfterFunc(t.whole, func() { conn.Close() })()
	var sending sync.WaitGroup
	sending.Go(func() {
		if err := c.send(t, out, conn); err != nil {
			t.cut(describe("send", err))
		}
	})
	if err := c.receive(t, in, conn, rest); err != nil {
		t.cut(describe("receive", err))
	}
	sending.Wait()
}

// describe says what err was about. Why a tunnel was cut is not that we then closed
// its connections.
func describe(what string, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%s: nothing moved for %s", what, patience)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// flow is one direction of a tunnel.
type flow struct {
	stream   stream
	pace     pace
	sent     atomic.Int64
	finished atomic.Bool // all is sent; set before the other side can notice

	mu       sync.Mutex
	underway []stamp // unless it floods
}

// stamp says when what is in front of an offset was sent.
type stamp struct {
	upTo int64
	at   time.Time
}

func (f *flow) depart(upTo int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.underway = append(f.underway, stamp{upTo, time.Now()})
}

// arrive returns the longest time that anything in front of upTo took.
func (f *flow) arrive(upTo int64) (longest time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for ; n < len(f.underway) && f.underway[n].upTo <= upTo; n++ {
		longest = max(longest, time.Since(f.underway[n].at))
	}
	f.underway = slices.Delete(f.underway, 0, n)
	return longest
}

// send sends at the flow's pace until the tunnel is to end, and then closes the
// direction.
func (c *canary) send(t *tunnel, f *flow, to *net.TCPConn) error {
	live, most := t.live, int64(1<<62)
	switch {
	case f.pace.ends && f.pace.bulk:
		most = bulkEnds
	case f.pace.ends:
		var over context.CancelFunc
		live, over = context.WithTimeout(live, briefEnds)
		defer over()
	}
	for buf := make([]byte, f.pace.most); live.Err() == nil && f.sent.Load() < most; {
		b := buf
		if !f.pace.bulk {
			b = buf[:1+rand.IntN(len(buf))]
		}
		offset := f.sent.Load()
		f.stream.fill(b, offset)
		if f.timed(t) {
			f.depart(offset + int64(len(b)))
		}
		f.sent.Add(int64(len(b)))
		to.SetWriteDeadline(time.Now().Add(patience))
		if _, err := to.Write(b); err != nil {
			return err
		}
		if pause := f.pace.pause; pause > 0 {
			wait(live, pause-pause/unevenness+rand.N(2*pause/unevenness))
		}
	}
	f.finished.Store(true)
	return to.CloseWrite()
}

// timed says whether the time that f's bytes take is the proxy's.
func (f *flow) timed(t *tunnel) bool { return !f.pace.slow && !t.kind.lossy }

// receive checks what arrives until the direction is closed.
func (c *canary) receive(t *tunnel, f *flow, conn *net.TCPConn, from io.Reader) error {
	check := checker{stream: f.stream}
	var seen Damage
	note := func(now Damage) {
		if now != seen {
			c.tally.damaged(t, seen, now)
			seen = now
		}
	}
	for buf := make([]byte, min(f.pace.most, slowRead)); ; {
		conn.SetReadDeadline(time.Now().Add(patience))
		n, err := from.Read(buf)
		check.feed(buf[:n])
		note(check.soFar())
		c.tally.arrived(n, f.arrive(check.high))
		if n > 0 {
			t.carried.Store(true)
		}
		switch {
		case errors.Is(err, io.EOF) && f.finished.Load():
			note(check.end(f.sent.Load()))
			return nil
		case errors.Is(err, io.EOF):
			return errors.New("it was closed before its end")
		case err != nil:
			return err
		}
		if f.pace.slow {
			wait(t.live, slowPause)
		}
	}
}
