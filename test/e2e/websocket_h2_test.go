package e2e

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestAWebSocketOverHTTP2OutlivesReloads opens one on a connection without TLS, by prior knowledge,
// and goes on with it while generations come and go.
func TestAWebSocketOverHTTP2OutlivesReloads(t *testing.T) {
	t.Parallel()
	play(t, publicListener+"http2 = true\nhttp2_websockets = true\n", []scene{{name: "over reloads", play: func(s *stage) {
		w := s.dial()
		w.send(http2.ClientPreface)
		f := http2.NewFramer(w.conn, w.r)
		f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		f.WriteSettings()
		f.WriteSettingsAck()
		next := func() http2.Frame {
			w.conn.SetDeadline(time.Now().Add(patience))
			frame, err := f.ReadFrame()
			if err != nil {
				s.Fatal(err)
			}
			if _, ok := frame.(*http2.GoAwayFrame); ok {
				s.Error("there was a GOAWAY")
			}
			return frame
		}
		var block bytes.Buffer
		e := hpack.NewEncoder(&block)
		for _, field := range [][2]string{
			{":method", "CONNECT"}, {":protocol", "websocket"}, {":scheme", "http"}, {":path", "/ws"}, {":authority", s.host}, {"sec-websocket-version", "13"},
		} {
			e.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
		}
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
		server := s.up.accept(s.T)
		got := server.wantStart("GET /ws HTTP/1.1")
		server.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: ", acceptFor(got.values("Sec-WebSocket-Key")[0]), "\r\n\r\n")
		for {
			if h, ok := next().(*http2.MetaHeadersFrame); ok {
				if status := h.PseudoValue("status"); status != "200" {
					s.Fatalf("the answer is %s", status)
				}
				break
			}
		}
		for range 3 {
			f.WriteData(1, false, []byte("question"))
			question := make([]byte, 8)
			if _, err := io.ReadFull(server.r, question); err != nil || string(question) != "question" {
				s.Fatalf("the server got %q, %v", question, err)
			}
			server.send("answer")
			for answer := ""; answer != "answer"; {
				if d, ok := next().(*http2.DataFrame); ok {
					answer += string(d.Data())
				}
			}
			if code, out, errs := s.service.holdfast("reload"); code != 0 {
				s.Fatalf("reload: %d %s %s", code, out, errs)
			}
		}
		f.WriteData(1, true, nil)
		if _, err := server.r.ReadByte(); err != io.EOF {
			s.Errorf("the server got %v, want a FIN", err)
		}
		server.close()
		for {
			if d, ok := next().(*http2.DataFrame); ok && d.StreamEnded() {
				break
			}
		}
	}}})
}

// acceptFor is the answer to a client's key (RFC 6455 §4.2.2).
func acceptFor(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}
