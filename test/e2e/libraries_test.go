package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"
)

// TestRealLibraries has two libraries talk to each other and to themselves, with
// everything that they agree on in their handshakes.
func TestRealLibraries(t *testing.T) {
	t.Parallel()
	config := publicListener
	for name, handler := range map[string]http.HandlerFunc{"coder": coderEcho, "gorilla": gorillaEcho} {
		server := httptest.NewServer(handler)
		t.Cleanup(server.Close)
		config += fmt.Sprintf(`
[[virtual_hosts]]
name = %q
domains = ["%s.test"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = %q
[[clusters]]
name = %q
endpoints = [%q]
`, name, name, name, name, server.Listener.Addr())
	}
	address := serve(t, config).address("public")
	for client, dial := range map[string]func(t *testing.T, address, host string) talker{"coder": dialCoder, "gorilla": dialGorilla} {
		for _, server := range []string{"coder", "gorilla"} {
			t.Run(client+" to "+server, func(t *testing.T) {
				t.Parallel()
				converse(t, dial(t, address, server+".test"))
			})
		}
	}
}

// talker is a client of either library.
type talker interface {
	handshake() *http.Response
	subprotocol() string
	exchange(binary bool, data []byte) (bool, []byte, error)
	ping() error
	// bye tells the server to close, and returns what it closes with.
	bye() (code int, reason string, err error)
}

// The server closes with these when it is told so.
const (
	byeMessage = "bye"
	byeCode    = 4001
	byeReason  = "as you wish"
)

func converse(t *testing.T, c talker) {
	if got := c.handshake().Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") {
		t.Errorf("agreed on the extensions %q", got)
	}
	if got := c.subprotocol(); got != "second" {
		t.Errorf("agreed on the subprotocol %q", got)
	}
	for _, m := range []struct {
		name   string
		binary bool
		data   []byte
	}{
		{"text", false, []byte("hello, wörld")},
		{"an empty message", true, nil},
		{"three bytes", true, []byte{0, 1, 2}},
		{"noise, which does not compress", true, noise(3, 1<<20)},
		{"lines, which do", false, bytes.Repeat([]byte("all work and no play\n"), 50_000)},
	} {
		binary, data, err := c.exchange(m.binary, m.data)
		if err != nil {
			t.Fatalf("%s: %v", m.name, err)
		}
		if binary != m.binary || !bytes.Equal(data, m.data) {
			t.Errorf("%s: %d bytes came back as %d other ones", m.name, len(m.data), len(data))
		}
		if err := c.ping(); err != nil {
			t.Errorf("ping behind %s: %v", m.name, err)
		}
	}
	if code, reason, err := c.bye(); code != byeCode || reason != byeReason {
		t.Errorf("closed with %d %q (%v), want %d %q", code, reason, err, byeCode, byeReason)
	}
}

const largest = 16 << 20

func coderEcho(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		Subprotocols: []string{"second"}, CompressionMode: websocket.CompressionContextTakeover, InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(largest)
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if string(data) == byeMessage {
			c.Close(byeCode, byeReason)
			return
		}
		if c.Write(r.Context(), kind, data) != nil {
			return
		}
	}
}

func gorillaEcho(w http.ResponseWriter, r *http.Request) {
	up := gorilla.Upgrader{Subprotocols: []string{"second"}, EnableCompression: true, CheckOrigin: func(*http.Request) bool { return true }}
	c, err := up.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer c.Close()
	for {
		kind, data, err := c.ReadMessage()
		if err != nil {
			return
		}
		if string(data) == byeMessage {
			kind, data = gorilla.CloseMessage, gorilla.FormatCloseMessage(byeCode, byeReason)
		}
		if c.WriteMessage(kind, data) != nil {
			return
		}
	}
}

type coderTalker struct {
	ctx  context.Context
	c    *websocket.Conn
	resp *http.Response
}

func dialCoder(t *testing.T, address, host string) talker {
	t.Helper()
	ctx, cancel := tooLong()
	t.Cleanup(cancel)
	c, resp, err := websocket.Dial(ctx, "ws://"+address+"/chat?room=1", &websocket.DialOptions{
		Host: host, Subprotocols: []string{"first", "second"}, CompressionMode: websocket.CompressionContextTakeover})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.CloseNow() })
	c.SetReadLimit(largest)
	return &coderTalker{ctx, c, resp}
}

func (c *coderTalker) handshake() *http.Response { return c.resp }
func (c *coderTalker) subprotocol() string       { return c.c.Subprotocol() }

func (c *coderTalker) exchange(binary bool, data []byte) (bool, []byte, error) {
	kind := websocket.MessageText
	if binary {
		kind = websocket.MessageBinary
	}
	if err := c.c.Write(c.ctx, kind, data); err != nil {
		return false, nil, err
	}
	kind, data, err := c.c.Read(c.ctx)
	return kind == websocket.MessageBinary, data, err
}

// ping needs somebody who reads until the pong is there.
func (c *coderTalker) ping() error {
	pong := make(chan error, 1)
	go func() { pong <- c.c.Ping(c.ctx) }()
	for {
		select {
		case err := <-pong:
			return err
		default:
			if _, _, err := c.exchange(true, []byte("x")); err != nil {
				return err
			}
		}
	}
}

func (c *coderTalker) bye() (int, string, error) {
	_, _, err := c.exchange(false, []byte(byeMessage))
	if closed, ok := errors.AsType[websocket.CloseError](err); ok {
		return int(closed.Code), closed.Reason, err
	}
	return 0, "", err
}

type gorillaTalker struct {
	c    *gorilla.Conn
	resp *http.Response
	pong bool
}

func dialGorilla(t *testing.T, address, host string) talker {
	t.Helper()
	d := gorilla.Dialer{HandshakeTimeout: patience, EnableCompression: true, Subprotocols: []string{"first", "second"}}
	c, resp, err := d.Dial("ws://"+address+"/chat?room=1", http.Header{"Host": {host}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(patience))
	c.SetWriteDeadline(time.Now().Add(patience))
	g := &gorillaTalker{c: c, resp: resp}
	c.SetPongHandler(func(string) error { g.pong = true; return nil })
	return g
}

func (g *gorillaTalker) handshake() *http.Response { return g.resp }
func (g *gorillaTalker) subprotocol() string       { return g.c.Subprotocol() }

func (g *gorillaTalker) exchange(binary bool, data []byte) (bool, []byte, error) {
	kind := gorilla.TextMessage
	if binary {
		kind = gorilla.BinaryMessage
	}
	if err := g.c.WriteMessage(kind, data); err != nil {
		return false, nil, err
	}
	kind, data, err := g.c.ReadMessage()
	return kind == gorilla.BinaryMessage, data, err
}

// ping: the pong is there before the answer to what was sent behind the ping.
func (g *gorillaTalker) ping() error {
	g.pong = false
	if err := g.c.WriteControl(gorilla.PingMessage, []byte("are you there?"), time.Now().Add(patience)); err != nil {
		return err
	}
	if _, _, err := g.exchange(true, []byte("x")); err != nil {
		return err
	}
	if !g.pong {
		return errors.New("no pong")
	}
	return nil
}

func (g *gorillaTalker) bye() (int, string, error) {
	_, _, err := g.exchange(false, []byte(byeMessage))
	if closed, ok := errors.AsType[*gorilla.CloseError](err); ok {
		return closed.Code, closed.Text, err
	}
	return 0, "", err
}
