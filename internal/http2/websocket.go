package http2

import (
	"context"
	"crypto/rand"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/stream"
)

// WebSockets over HTTP/2 (RFC 8441): an extended CONNECT is, for the handler, the upgrade of
// HTTP/1.1 that asks for the same. Its key is made here, and here it is seen whether the answer
// fits to it. A 101 becomes a 200, any other answer stays what it is, and the stream becomes one
// end of a pair of unix sockets, of which the other one is a tunnel's.
//
// The ends of that are passed on so:
//
//	the client's END_STREAM        a FIN; the other direction goes on
//	RST_STREAM, the connection     a reset
//	the upstream's FIN             END_STREAM, and the stream is over: what the client
//	                               still sends goes nowhere (the library ends both at once)
//	its reset                      RST_STREAM with CANCEL (RFC 8441 §5)

// acceptGUID is what the answer to a key is made of (RFC 6455 §1.3).
const acceptGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

// asUpgrade makes the upgrade of an extended CONNECT, or refuses what is no WebSocket.
func (h *serverHead) asUpgrade() {
	if h.refusal != nil {
		return
	}
	if !strings.EqualFold(h.protocol, "websocket") {
		h.refusal = http1.Refuse(501, "an extended CONNECT for another protocol than websocket")
		return
	}
	var key [16]byte
	rand.Read(key[:])
	h.key = base64.StdEncoding.EncodeToString(key[:])
	fields := h.Fields[:0]
	for _, f := range h.Fields {
		if !strings.EqualFold(f.Name, "sec-websocket-key") && !strings.EqualFold(f.Name, "sec-websocket-accept") {
			fields = append(fields, f)
		}
	}
	h.Fields = append(fields, exchange.Field{Name: "Sec-WebSocket-Key", Value: h.key})
	h.Method, h.Upgrade = "GET", "websocket"
	h.UpgradeBody = h.declared > 0
	h.ContentLength = 0 // what follows is the protocol's, and no body
	h.TakesTrailers, h.Trailers = false, false
}

// Accepts says whether an answer to an upgrade is one to its key, which the client knows nothing of.
func (e *serverExchange) Accepts(r *exchange.Response) bool {
	accept, n := "", 0
	for _, f := range r.Fields {
		if strings.EqualFold(f.Name, "sec-websocket-accept") {
			accept = f.Value
			n++
		}
	}
	return n == 1 && accept == acceptOf(e.head.key)
}

// acceptOf is the answer to a key (RFC 6455 §4.2.2).
func acceptOf(key string) string {
	sum := sha1.Sum([]byte(key + acceptGUID))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// Switch implements [exchange.Exchange]: the caller gets one end of a pair, and the client its 200.
func (e *serverExchange) Switch(r *exchange.Response) (stream.Passed, []byte, error) {
	nothing := stream.Passed{FD: -1}
	switch {
	case e.over != nil:
		return nothing, nil, e.over
	case e.head.key == "" || e.state != awaitingResponse:
		e.Abort()
		return nothing, nil, errNoSwitch
	}
	header, err := headerOf(r.Fields)
	if err != nil {
		e.Abort()
		return nothing, nil, err
	}
	for _, name := range []string{"Sec-Websocket-Accept", "Upgrade", "Connection"} {
		for as := range header {
			if strings.EqualFold(as, name) {
				delete(header, as)
			}
		}
	}
	header["Content-Type"] = nil // the library would guess
	if _, ok := header["Date"]; !ok {
		header["Date"] = []string{e.Loop().Date()}
	}
	near, p, err := newPair()
	if err != nil {
		e.Abort()
		return nothing, nil, err
	}
	e.state, e.watcher = responseFinished, nil
	e.c.hold()
	e.order(func() {
		e.final, e.flush, e.pair = &responseHead{200, header}, true, p
	})
	return stream.Passed{FD: near, Resets: &p.resets}, nil, nil
}

// pair is the stream's end of a pair of sockets.
type pair struct {
	net.Conn
	resets stream.Resets
}

// newPair returns the descriptor of the other end, too, which does not block.
func newPair() (near int, p *pair, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, nil, os.NewSyscallError("socketpair", err)
	}
	f := os.NewFile(uintptr(fds[1]), "stream")
	defer f.Close()
	p = new(pair)
	if p.Conn, err = net.FileConn(f); err != nil {
		unix.Close(fds[0])
		return -1, nil, err
	}
	return fds[0], p, nil
}

// giveUp has the tunnel's peer reset.
func (p *pair) giveUp() {
	p.resets.ByPeer.Store(true)
	p.Close()
}

// relay carries the bytes of a stream that has become a tunnel, on the handler's goroutine and
// another one, until both of its directions have ended. It returns whether that was properly.
func (e *serverExchange) relay(p *pair) (whole bool) {
	s := e.c.on.server
	s.requests.Add(-1) // it is the tunnel's from here on
	defer s.requests.Add(1)
	defer func() {
		if !e.c.on.loop.Post(e.c.release) {
			return // nobody is left who would drain it
		}
	}()
	// Neither direction may have a look at the stream: both may wait for the tunnel.
	stop := context.AfterFunc(e.r.Context(), p.giveUp)
	defer stop()
	taking := make(chan struct{})
	go func() {
		defer close(taking)
		e.take(p)
	}()
	whole = e.give(p)
	if whole {
		p.Conn.(*net.UnixConn).CloseWrite()
	} else {
		if e.r.Context().Err() == nil {
			e.head.resetAs = true
			e.c.wire.resetAs(e.id, http2.ErrCodeCancel)
		}
		p.giveUp()
	}
	e.r.Body.Close() // take ends
	<-taking
	p.Close()
	return whole
}

// take gives the tunnel what the client sends.
func (e *serverExchange) take(p *pair) {
	buffer := make([]byte, leastRead)
	for {
		n, err := e.r.Body.Read(buffer)
		if n > 0 {
			if _, err := p.Write(buffer[:n]); err != nil {
				return // give finds out why
			}
		}
		switch {
		case err == io.EOF:
			p.Conn.(*net.UnixConn).CloseWrite()
			return
		case err != nil:
			if e.r.Context().Err() != nil { // and not because relay has closed it
				p.giveUp()
			}
			return
		}
	}
}

// give sends the client what the tunnel has for it, and returns whether that has ended properly.
func (e *serverExchange) give(p *pair) (whole bool) {
	control := http.NewResponseController(e.w)
	buffer := make([]byte, leastRead)
	w := watch{e: e, p: p}
	for {
		n, err := p.Read(buffer)
		if n > 0 {
			w.begin()
			_, err := e.w.Write(buffer[:n])
			if err == nil {
				err = control.Flush()
			}
			w.end()
			if err != nil {
				return false
			}
			if n == len(buffer) && n < mostRead {
				buffer = make([]byte, mostRead)
			}
		}
		if err != nil {
			return err == io.EOF && !p.resets.ByTunnel.Load()
		}
	}
}

// watch looks after what give sends. As long as there is a tunnel it says itself how long a client
// may take nothing; what one has left behind that is over nobody else looks after.
type watch struct {
	e *serverExchange
	p *pair

	mu    sync.Mutex
	timer *time.Timer // nil: nothing was sent yet
	since time.Time   // when the piece was begun that is sent; zero: none is
}

func (w *watch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = time.Now()
	if patience := w.e.c.on.server.finish; w.timer == nil {
		w.timer = time.AfterFunc(patience, w.look)
	} else {
		w.timer.Reset(patience)
	}
}

func (w *watch) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = time.Time{}
	w.timer.Stop()
}

// look gives up a stream whose client takes nothing of a tunnel that is over.
func (w *watch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	patience := w.e.c.on.server.finish
	switch {
	case w.since.IsZero():
	case time.Since(w.since) < patience || !w.p.over():
		w.timer.Reset(patience)
	default:
		w.e.help(func() { _ = http.NewResponseController(w.e.w).SetWriteDeadline(time.Unix(1, 0)) })
	}
}

// over says whether the tunnel has closed its end.
func (p *pair) over() bool {
	raw, err := p.Conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return true
	}
	fds := [1]unix.PollFd{{}}
	if err = raw.Control(func(fd uintptr) {
		fds[0].Fd = int32(fd)
		_, _ = unix.Poll(fds[:], 0) // with an error nothing has happened
	}); err != nil {
		return true
	}
	return fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
}

// dropPair gives up a pair that was never relayed with: the client has gone meanwhile.
func (e *serverExchange) dropPair() {
	e.mu.Lock()
	p := e.pair
	e.mu.Unlock()
	if p != nil {
		p.giveUp()
		e.c.on.loop.Post(e.c.release)
	}
}
