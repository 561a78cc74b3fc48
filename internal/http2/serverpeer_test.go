package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// peer is a client that sends what it likes, frame by frame.
type peer struct {
	*http2.Framer
	t    *testing.T
	conn net.Conn
	text bytes.Buffer
	enc  *hpack.Encoder
}

// connect begins a connection of HTTP/2.
func (s *testedServer) connect() *peer {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(serverPatience))
	p := &peer{t: s.t, conn: conn, Framer: http2.NewFramer(conn, conn)}
	p.enc = hpack.NewEncoder(&p.text)
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		s.t.Fatal(err)
	}
	p.check(p.WriteSettings())
	return p
}

func (p *peer) check(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// block encodes fields, each "name: value".
func (p *peer) block(fields ...string) []byte {
	p.text.Reset()
	for i := 0; i < len(fields); i += 2 {
		p.check(p.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return append([]byte(nil), p.text.Bytes()...)
}

// line are the fields of every request.
func line(more ...string) []string {
	return append([]string{":method", "GET", ":scheme", "http", ":authority", "example.com", ":path", "/"}, more...)
}

// request sends a request without a body.
func (p *peer) request(id uint32, fields ...string) {
	p.t.Helper()
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(fields...), EndHeaders: true, EndStream: true}))
}

// next returns the next frame of interest, described.
func (p *peer) next() string {
	p.t.Helper()
	for {
		f, err := p.ReadFrame()
		if err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				p.t.Fatal("nothing has come")
			}
			return "end"
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			status := f.PseudoValue("status")
			if status == "" {
				status = "trailers"
			}
			if f.StreamEnded() {
				status += " end"
			}
			return fmt.Sprintf("%d %s", f.StreamID, status)
		case *http2.DataFrame:
			if f.StreamEnded() {
				return fmt.Sprintf("%d %q end", f.StreamID, f.Data())
			}
			return fmt.Sprintf("%d %q", f.StreamID, f.Data())
		case *http2.RSTStreamFrame:
			return fmt.Sprintf("%d reset %v", f.StreamID, f.ErrCode)
		case *http2.GoAwayFrame:
			return "goaway " + strconv.Itoa(int(f.LastStreamID)) + " " + f.ErrCode.String()
		}
	}
}

func (p *peer) want(all ...string) {
	p.t.Helper()
	for _, want := range all {
		if got := p.next(); got != want {
			p.t.Fatalf("got %q, want %q", got, want)
		}
	}
}

// wantAnswer waits for a whole response without content, which may end with its head or behind it.
func (p *peer) wantAnswer(id uint32, status string) {
	p.t.Helper()
	head := fmt.Sprintf("%d %s", id, status)
	switch got := p.next(); got {
	case head + " end":
	case head:
		p.want(fmt.Sprintf(`%d "" end`, id))
	default:
		p.t.Fatalf("got %q, want %q", got, head)
	}
}
