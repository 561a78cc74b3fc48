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
)

// TunnelPath is followed by a tunnel's number.
const TunnelPath = "/tunnel/"

// A pace is how a direction of a tunnel is used.
type pace int

const (
	talking  pace = iota // something small now and then
	brief                // as talking, and closed soon
	flooding             // as much as is taken, which is not much
)

// kinds are the tunnels that there are, by what is done in their directions.
var kinds = [...]struct {
	name     string
	up, down pace // to the upstream, to the client
}{
	{"talking both ways", talking, talking},
	{"half-closed by the client", brief, talking},
	{"half-closed by the upstream", talking, brief},
	{"with a slow client", talking, flooding},
	{"with a slow upstream", flooding, talking},
}

const (
	talkPause = 20 * time.Millisecond
	talkMost  = 2000 // bytes at once
	briefEnds = 300 * time.Millisecond

	// A slow receiver reads so much, and then does nothing for a slowPause.
	slowRead   = 32 << 10
	slowBuffer = 64 << 10
)

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
	kind   int
	client *conn
	up     flow // to the upstream
	down   flow // to the client

	live     context.Context // until its ends shall close it
	whole    context.Context // until it is cut; the cause is why
	cut      context.CancelCauseFunc
	accepted chan struct{} // closed when the upstream has done with it
}

func (c *canary) newTunnel(kind int, client *conn, live context.Context) *tunnel {
	t := &tunnel{number: c.tunnels.Add(1), kind: kind, client: client, live: live, accepted: make(chan struct{})}
	t.up.stream, t.up.pace = streamOf(2*t.number), kinds[kind].up
	t.down.stream, t.down.pace = streamOf(2*t.number+1), kinds[kind].down
	t.whole, t.cut = context.WithCancelCause(context.Background())
	return t
}

func (t *tunnel) String() string { return fmt.Sprintf("tunnel %d (%s)", t.number, kinds[t.kind].name) }

// keepTunnel has a tunnel open until the canary ends; after its lifetime, or its
// death, another one.
func (c *canary) keepTunnel(kind int, lifetime func() time.Duration) {
	for c.live.Err() == nil {
		if !c.tunnel(c.address, kind, lifetime()) {
			c.pause(requestPause)
		}
	}
}

// tunnel opens a tunnel at address and uses it until its lifetime is over or it
// breaks. It returns whether there was one.
func (c *canary) tunnel(address string, kind int, lifetime time.Duration) bool {
	conn, ok := c.dial(address)
	if !ok {
		return false
	}
	defer conn.Close()
	live, over := context.WithTimeout(c.live, lifetime)
	defer over()
	t := c.newTunnel(kind, conn, live)
	c.opening.Store(t.number, t)
	err := t.open()
	c.opening.Delete(t.number)
	if err != nil {
		t.cut(err)
		c.tally.fail(conn, &c.tally.KilledRequests, &c.tally.Failed, "%s cannot be opened: %v", t, err)
		return false
	}
	c.tally.opened(t)
	defer c.tally.closed(t)
	c.use(t, conn.TCPConn, conn, &t.up, &t.down)
	<-t.accepted
	if err := context.Cause(t.whole); err != nil {
		c.tally.fail(conn, &c.tally.KilledTunnels, &c.tally.Dropped, "%s was dropped: %v", t, err)
	}
	return true
}

// open asks for the upgrade.
func (t *tunnel) open() error {
	client := t.client
	if t.up.pace == flooding || t.down.pace == flooding {
		slow(client.TCPConn)
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

// slow keeps the kernel from taking much on our behalf, so that the proxy is what
// has to wait.
func slow(c *net.TCPConn) {
	c.SetReadBuffer(slowBuffer)
	c.SetWriteBuffer(slowBuffer)
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
	c.conns.note(t.client, nc)
	defer c.conns.forget(nc)
	tcp := nc.(*net.TCPConn)
	if t.up.pace == flooding || t.down.pace == flooding {
		slow(tcp)
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
	live := t.live
	if f.pace == brief {
		var over context.CancelFunc
		live, over = context.WithTimeout(live, briefEnds)
		defer over()
	}
	for buf := make([]byte, slowRead); live.Err() == nil; {
		b := buf
		if f.pace != flooding {
			b = buf[:1+rand.IntN(talkMost)]
		}
		offset := f.sent.Load()
		f.stream.fill(b, offset)
		if f.pace != flooding {
			f.depart(offset + int64(len(b)))
		}
		f.sent.Add(int64(len(b)))
		to.SetWriteDeadline(time.Now().Add(patience))
		if _, err := to.Write(b); err != nil {
			return err
		}
		if f.pace != flooding {
			wait(live, talkPause)
		}
	}
	f.finished.Store(true)
	return to.CloseWrite()
}

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
	for buf := make([]byte, slowRead); ; {
		conn.SetReadDeadline(time.Now().Add(patience))
		n, err := from.Read(buf)
		check.feed(buf[:n])
		note(check.soFar())
		c.tally.arrived(n, f.arrive(check.high))
		switch {
		case errors.Is(err, io.EOF) && t.client.killed.Load():
			return errors.New("its process was killed")
		case errors.Is(err, io.EOF) && f.finished.Load():
			note(check.end(f.sent.Load()))
			return nil
		case errors.Is(err, io.EOF):
			return errors.New("it was closed before its end")
		case err != nil:
			return err
		}
		if f.pace == flooding {
			wait(t.live, slowPause)
		}
	}
}
