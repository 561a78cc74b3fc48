package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"holdfast/internal/exchange"
)

// relay is the least proxy that can stand between the two codecs. Two routes lead
// to upstreams of their own; only paths under /ws may be upgraded.
type relay struct {
	app, ws *recorder
	mu      sync.Mutex
	idle    map[*recorder][]*Conn
}

func (r *relay) Serve(e exchange.Exchange) {
	request := e.Request()
	up := r.app
	if strings.HasPrefix(request.Target, "/ws") {
		up = r.ws
	}
	switch {
	case request.UpgradeBody:
		r.refuse(e, 400)
	case request.Upgrade != "" && up != r.ws:
		r.refuse(e, 403)
	default:
		r.forward(e, up)
	}
}

func (r *relay) refuse(e exchange.Exchange, status int) {
	if e.Respond(&exchange.Response{Status: status, Close: true}) == nil {
		e.Finish(nil)
	}
}

func (r *relay) forward(e exchange.Exchange, up *recorder) {
	u, err := r.connect(up, e.Request().Upgrade != "")
	if err != nil {
		r.refuse(e, 503)
		return
	}
	defer u.Close()
	if err := u.Send(e.Request()); err != nil {
		r.refuse(e, 502)
		return
	}
	if err := copyBody(u, e); err != nil {
		r.refuse(e, exchange.StatusOf(err, 400))
		return
	}
	head, err := u.Receive()
	for err == nil && head.Status < 200 && head.Status != 101 {
		e.Inform(head)
		head, err = u.Receive()
	}
	switch {
	case err != nil:
		r.refuse(e, exchange.StatusOf(err, 502))
	case head.Status == 101:
		r.tunnel(e, u, head)
	default:
		if e.Respond(head) == nil {
			copyBack(e, u)
		}
	}
}

func copyBody(u exchange.Upstream, e exchange.Exchange) error {
	if _, err := io.Copy(struct{ io.Writer }{u}, struct{ io.Reader }{e}); err != nil {
		return err
	}
	return u.Finish(e.Trailers())
}

func copyBack(e exchange.Exchange, u exchange.Upstream) {
	if _, err := io.Copy(struct{ io.Writer }{e}, struct{ io.Reader }{u}); err == nil {
		e.Finish(u.Trailers())
	}
}

func (r *relay) tunnel(e exchange.Exchange, u exchange.Upstream, head *exchange.Response) {
	if head.Upgrade != "websocket" {
		r.refuse(e, 502)
		return
	}
	down, answer, early, err := e.Switch(head)
	if err != nil {
		return
	}
	defer down.Close()
	up, late, err := u.Switch()
	if err != nil {
		return
	}
	defer up.Close()
	up.Write(early)
	down.Write(append(answer, late...))
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(up, down); up.(*net.TCPConn).CloseWrite() })
	io.Copy(down, up)
	down.(*net.TCPConn).CloseWrite()
	wg.Wait()
}

// connect prefers a pooled connection, so that what an exchange leaves behind on it
// is seen by the next one.
func (r *relay) connect(up *recorder, fresh bool) (exchange.Upstream, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for pool := r.idle[up]; !fresh && len(pool) > 0; {
		c := pool[len(pool)-1]
		pool = pool[:len(pool)-1]
		r.idle[up] = pool
		if c.Alive() {
			return c.Exchange()
		}
		c.Close()
	}
	conn, err := net.Dial("tcp", up.addr)
	if err != nil {
		return nil, err
	}
	return NewClient(conn, ClientOptions{OnIdle: func(c *Conn) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.idle[up] = append(r.idle[up], c)
	}}).Exchange()
}

func (r *relay) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
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
