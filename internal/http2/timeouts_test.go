package http2

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/task"
)

// A head that does not come to its end ends the connection, be it in a frame or between two.
func TestSlowHeads(t *testing.T) {
	t.Parallel()
	for name, send := range map[string]func(p *peer, block []byte) error{
		"within a frame": func(p *peer, block []byte) error {
			_, err := p.conn.Write(appendFrame(nil, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, block)[:frameHeader+3])
			return err
		},
		"between frames": func(p *peer, block []byte) error {
			return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3]})
		},
		"within the last frame": func(p *peer, block []byte) error {
			if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3]}); err != nil {
				return err
			}
			_, err := p.conn.Write(appendFrame(nil, http2.FrameContinuation, http2.FlagContinuationEndHeaders, 1, block[3:])[:frameHeader+3])
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := limitsForTests()
			limits.HeadTimeout = 10 * time.Millisecond
			s := startServer(t, ServerOptions{Limits: limits, Handler: handlerFunc(func(*task.Task, exchange.Exchange) {
				t.Error("there is a request")
			})})
			p := s.connect()
			p.check(send(p, p.block(line()...)))
			for p.next() != "end" { // there may be a GOAWAY before
			}
			s.until("the end of the connection", func() bool { return s.Connections() == 0 && s.ended.Load() == 1 })
		})
	}
}

// The time of a head is over with the head: what comes much later is served.
func TestAHeadsTimeIsOverWithIt(t *testing.T) {
	t.Parallel()
	limits := limitsForTests()
	limits.HeadTimeout = 100 * time.Millisecond
	s := startServer(t, ServerOptions{Limits: limits, Handler: handlerFunc(echoing)})
	for { // until one has come in time
		p := s.connect()
		block := p.block(line()...)
		first := appendFrame(nil, http2.FrameHeaders, http2.FlagHeadersEndStream, 1, block[:3])
		last := appendFrame(nil, http2.FrameContinuation, http2.FlagContinuationEndHeaders, 1, block[3:])
		for _, part := range [][]byte{first, last[:frameHeader+1], last[frameHeader+1:]} {
			p.conn.Write(part)
		}
		if got := p.next(); got != "1 200" {
			continue
		}
		stalled := s.connect() // which has the same time, and begins later
		stalled.check(stalled.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3]}))
		for stalled.next() != "end" {
		}
		p.request(3, line()...)
		for got := ""; !strings.HasSuffix(got, " end"); { // with the content or behind it
			if got = p.next(); !strings.HasPrefix(got, `1 "`) {
				t.Fatalf("got %q", got)
			}
		}
		p.want("3 200")
		return
	}
}

// A connection without requests ends, and one whose request is under way does not.
func TestIdleConnections(t *testing.T) {
	t.Parallel()
	h, begun, goOn := slowly()
	limits := limitsForTests()
	limits.IdleTimeout = 100 * time.Millisecond
	s := startServer(t, ServerOptions{Limits: limits, Handler: h})
	var busy *peer
	for busy == nil { // until a request comes in time
		p := s.connect()
		if p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(path("/slow")...), EndHeaders: true, EndStream: true}) != nil {
			continue
		}
		ended := make(chan struct{})
		go func() {
			s.until("a request or an end", func() bool { return len(begun) > 0 || s.ended.Load() > 0 })
			close(ended)
		}()
		<-ended
		if len(begun) > 0 {
			busy = p
		}
		s.ended.Store(0)
	}
	idle := s.connect()
	if got := idle.next(); got != "goaway 0 NO_ERROR" {
		t.Errorf("got %q", got)
	}
	for idle.next() != "end" {
	}
	close(goOn)
	busy.wantAnswer(1, "200")
	if got := busy.next(); got != "goaway 1 NO_ERROR" {
		t.Errorf("got %q", got)
	}
	for busy.next() != "end" {
	}
	if n := s.value("holdfast_downstream_connections_cut_total"); n != 0 {
		t.Errorf("%d connections were cut", n)
	}
}
