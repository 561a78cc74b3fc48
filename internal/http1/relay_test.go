package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// relay is the least proxy that can stand between the two codecs. Two routes lead
// to upstreams of their own; only paths under /ws may be upgraded.
type relay struct {
	t       *testing.T
	app, ws *recorder

	// The goroutine of its loop owns these.
	idle map[*recorder][]*Conn
	over bool // no connection is kept any more
}

func (r *relay) Serve(tk *task.Task, e exchange.Exchange) {
	request := e.Request()
	up := r.app
	if strings.HasPrefix(request.Target, "/ws") {
		up = r.ws
	}
	switch {
	case request.UpgradeBody:
		r.refuse(tk, e, 400)
	case request.Upgrade != "" && up != r.ws:
		r.refuse(tk, e, 403)
	default:
		r.forward(tk, e, up)
	}
}

func (r *relay) refuse(tk *task.Task, e exchange.Exchange, status int) {
	if e.Respond(&exchange.Response{Status: status, Close: true}) == nil {
		e.Finish(tk, nil)
	}
}

func (r *relay) forward(tk *task.Task, e exchange.Exchange, up *recorder) {
	u, err := r.connect(tk, e.Loop(), up, e.Request().Upgrade != "")
	if err != nil {
		r.refuse(tk, e, 503)
		return
	}
	defer u.Close()
	if err := u.Send(tk, e.Request()); err != nil {
		r.refuse(tk, e, 502)
		return
	}
	if err := copyBody(tk, u, e); err != nil {
		r.refuse(tk, e, exchange.StatusOf(err, 400))
		return
	}
	head, err := u.Receive(tk)
	for err == nil && head.Status < 200 && head.Status != 101 {
		e.Inform(tk, head)
		head, err = u.Receive(tk)
	}
	switch {
	case err != nil:
		r.refuse(tk, e, exchange.StatusOf(err, 502))
	case head.Status == 101:
		r.tunnel(tk, e, u, head)
	default:
		if e.Respond(head) == nil {
			copyBack(tk, e, u)
		}
	}
}

// sink is whatever a body is written to.
type sink interface {
	Write(*task.Task, []byte) error
}

func copyPieces(tk *task.Task, to sink, from source) error {
	for {
		p, err := from.Read(tk)
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = to.Write(tk, p)
		}
		if err != nil {
			return err
		}
	}
}

func copyBody(tk *task.Task, u exchange.Upstream, e exchange.Exchange) error {
	if err := copyPieces(tk, u, e); err != nil {
		return err
	}
	return u.Finish(tk, e.Trailers())
}

func copyBack(tk *task.Task, e exchange.Exchange, u exchange.Upstream) {
	if copyPieces(tk, e, u) == nil {
		e.Finish(tk, u.Trailers())
	}
}

func (r *relay) tunnel(tk *task.Task, e exchange.Exchange, u exchange.Upstream, head *exchange.Response) {
	if head.Upgrade != "websocket" {
		r.refuse(tk, e, 502)
		return
	}
	client, answer, err := e.Switch(head)
	if err != nil {
		return
	}
	client.Leave(e.Loop())
	down := connOf(r.t, client.FD)
	defer down.Close()
	server, err := u.Switch()
	if err != nil {
		return
	}
	server.Leave(e.Loop())
	up := connOf(r.t, server.FD)
	defer up.Close()
	streamtest.Block(e.Loop(), tk, func() {
		up.Write(client.Early)
		down.Write(append(answer, server.Early...))
		var wg sync.WaitGroup
		wg.Go(func() { io.Copy(up, down); up.(*net.TCPConn).CloseWrite() })
		io.Copy(down, up)
		down.(*net.TCPConn).CloseWrite()
		wg.Wait()
	})
}

// connect prefers a pooled connection, so that what an exchange leaves behind on it
// is seen by the next one.
func (r *relay) connect(tk *task.Task, l *stream.Loop, up *recorder, fresh bool) (exchange.Upstream, error) {
	for pool := r.idle[up]; !fresh && len(pool) > 0; {
		c := pool[len(pool)-1]
		pool = pool[:len(pool)-1]
		r.idle[up] = pool
		if c.Alive() {
			return c.Exchange()
		}
		c.Close()
	}
	c := NewClient(ClientOptions{OnIdle: func(c *Conn) {
		if r.over {
			c.Close()
		} else {
			r.idle[up] = append(r.idle[up], c)
		}
	}})
	if err := c.Dial(tk, l, netip.MustParseAddrPort(up.addr), &stream.DialOptions{}); err != nil {
		return nil, err
	}
	return c.Exchange()
}

// close closes the pooled connections, and those that come back later.
func (r *relay) close() {
	r.over = true
	for _, pool := range r.idle {
		for _, c := range pool {
			c.Close()
		}
	}
}

// recorder is an upstream that notes what it gets. It reads with net/http, so that
// a second opinion is heard on every request that we let through.
type recorder struct {
	addr   string
	answer func(*http.Request) string

	mu   sync.Mutex
	seen []record
}

// A record is a request that arrived whole, or bytes behind a 101.
type record struct {
	*http.Request
	body string
	raw  string // not of HTTP: a malformed request, or bytes of a tunnel
}

func startRecorder(t *testing.T, answer func(*http.Request) string) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rec := &recorder{addr: l.Addr().String(), answer: answer}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { rec.serve(conn) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return rec
}

func (rec *recorder) note(r record) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.seen = append(rec.seen, r)
}

func (rec *recorder) take() []record {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	seen := rec.seen
	rec.seen = nil
	return seen
}

func (rec *recorder) serve(conn net.Conn) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				rec.note(record{raw: err.Error()})
			}
			return
		}
		var body bytes.Buffer
		if _, err := io.Copy(&body, req.Body); err != nil {
			return // incomplete: the proxy gave it up
		}
		rec.note(record{Request: req, body: body.String()})
		answer := rec.answer(req)
		if _, err := io.WriteString(conn, answer); err != nil {
			return
		}
		if strings.HasPrefix(answer, "HTTP/1.1 101") {
			rec.tunnel(conn, r)
			return
		}
	}
}

// tunnel notes and echoes everything behind a 101.
func (rec *recorder) tunnel(conn net.Conn, r io.Reader) {
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			rec.note(record{raw: string(buf[:n])})
			conn.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}
