package e2e

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2Tunnel is a WebSocket as the only stream of an HTTP/2 connection (RFC 8441).
type h2Tunnel struct {
	t    *testing.T
	conn net.Conn
	fr   *http2.Framer
}

// openH2Tunnel asks for one, of which the answer is still to come.
func openH2Tunnel(t *testing.T, conn net.Conn, scheme, host, path string) *h2Tunnel {
	t.Helper()
	w := &h2Tunnel{t, conn, http2.NewFramer(conn, conn)}
	w.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	w.fr.WriteSettings()
	w.fr.WriteSettingsAck()
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for _, field := range [][2]string{
		{":method", "CONNECT"}, {":protocol", "websocket"}, {":scheme", scheme}, {":path", path}, {":authority", host}, {"sec-websocket-version", "13"},
	} {
		e.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
	}
	w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	return w
}

// next returns the next frame, which may be no GOAWAY while the tunnel lives.
func (w *h2Tunnel) next() http2.Frame {
	w.t.Helper()
	frame := w.read()
	if _, ok := frame.(*http2.GoAwayFrame); ok {
		w.t.Error("there was a GOAWAY")
	}
	return frame
}

func (w *h2Tunnel) read() http2.Frame {
	w.t.Helper()
	w.conn.SetDeadline(time.Now().Add(patience))
	frame, err := w.fr.ReadFrame()
	if err != nil {
		w.t.Fatal(err)
	}
	return frame
}

func (w *h2Tunnel) wantStatus(want string) {
	w.t.Helper()
	for {
		if h, ok := w.next().(*http2.MetaHeadersFrame); ok {
			if status := h.PseudoValue("status"); status != want {
				w.t.Fatalf("the answer is %s, want %s", status, want)
			}
			return
		}
	}
}

func (w *h2Tunnel) send(s string) { w.fr.WriteData(1, false, []byte(s)) }
func (w *h2Tunnel) sendEnd()      { w.fr.WriteData(1, true, nil) }

func (w *h2Tunnel) wantBytes(want string) {
	w.t.Helper()
	for got := ""; got != want; {
		if d, ok := w.next().(*http2.DataFrame); ok {
			if got += string(d.Data()); len(got) > len(want) || d.StreamEnded() {
				w.t.Fatalf("got %q, want %q", got, want)
			}
		}
	}
}

// wantEnd waits for the end of a tunnel of which both peers have ended. A GOAWAY that lets the
// stream end may come before: for the proxy the tunnel is over.
func (w *h2Tunnel) wantEnd() {
	w.t.Helper()
	for {
		switch f := w.read().(type) {
		case *http2.GoAwayFrame:
			if f.ErrCode != http2.ErrCodeNo || f.LastStreamID < 1 {
				w.t.Fatalf("got %v", f)
			}
		case *http2.DataFrame:
			if f.StreamEnded() {
				return
			}
		case *http2.RSTStreamFrame:
			w.t.Fatalf("the stream is reset: %v", f.ErrCode)
		}
	}
}

// TestAWebSocketOverHTTP2OutlivesReloads opens one on a connection without TLS, by prior knowledge,
// and goes on with it while generations come and go.
func TestAWebSocketOverHTTP2OutlivesReloads(t *testing.T) {
	t.Parallel()
	play(t, publicListener+"http2 = true\nhttp2_websockets = true\n", []scene{{name: "over reloads", play: func(s *stage) {
		w := openH2Tunnel(s.T, s.dial().conn, "http", s.host, "/ws")
		server := s.up.accept(s.T)
		got := server.wantStart("GET /ws HTTP/1.1")
		server.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: ", acceptFor(got.values("Sec-WebSocket-Key")[0]), "\r\n\r\n")
		w.wantStatus("200")
		for range 3 {
			w.send("question")
			server.wantBytes("question")
			server.send("answer")
			w.wantBytes("answer")
			if code, out, errs := s.service.holdfast("reload"); code != 0 {
				s.Fatalf("reload: %d %s %s", code, out, errs)
			}
		}
		w.sendEnd()
		server.wantEOF()
		server.close()
		w.wantEnd()
	}}})
}

// TestWebSocketsOverHTTP2AreOffByDefault: they are not offered, so browsers take HTTP/1.1, and
// whoever asks all the same has no tunnel.
func TestWebSocketsOverHTTP2AreOffByDefault(t *testing.T) {
	t.Parallel()
	play(t, publicListener+"http2 = true\n", []scene{{name: "refused", play: func(s *stage) {
		w := openH2Tunnel(s.T, s.dial().conn, "http", s.host, "/ws")
		for {
			switch f := w.next().(type) {
			case *http2.SettingsFrame:
				if v, ok := f.Value(http2.SettingEnableConnectProtocol); ok && v != 0 {
					s.Error("they are offered")
				}
			case *http2.MetaHeadersFrame:
				s.Fatalf("the answer is %s", f.PseudoValue("status"))
			case *http2.RSTStreamFrame:
				if f.StreamID != 1 || f.ErrCode != http2.ErrCodeProtocol {
					s.Errorf("got %v", f)
				}
				return
			}
		}
	}}})
}

// acceptFor is the answer to a client's key (RFC 6455 §4.2.2).
func acceptFor(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}
