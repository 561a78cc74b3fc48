package http2

import (
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/task"
)

// Who sends too much of no use is told so, and the connection ends.
func TestFloods(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		kind flood
		send func(p *peer, i int) error
	}{
		{floodOfResets, func(p *peer, i int) error { // rapid reset
			id := uint32(2*i + 1)
			p.request(id, line()...)
			return p.WriteRSTStream(id, http2.ErrCodeCancel)
		}},
		{floodOfResets, func(p *peer, i int) error { // that we have to reset
			p.request(uint32(2*i+1), line("connection", "close")...)
			return nil
		}},
		{floodOfPings, func(p *peer, i int) error { return p.WritePing(false, [8]byte{}) }},
		{floodOfSettings, func(p *peer, i int) error { return p.WriteSettings() }},
		{floodOfUnknown, func(p *peer, i int) error { return p.WriteRawFrame(99, 0, 0, []byte("x")) }},
		{floodOfPriorities, func(p *peer, i int) error { return p.WritePriority(1, http2.PriorityParam{StreamDep: 3}) }},
		{floodOfWindows, func(p *peer, i int) error { return p.WriteWindowUpdate(0, 1) }},
		{floodOfEmpty, func(p *peer, i int) error {
			if i == 0 {
				return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line()...), EndHeaders: true})
			}
			return p.WriteData(1, false, nil)
		}},
		{floodOfContinuations, func(p *peer, i int) error {
			if i == 0 {
				return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line()...)})
			}
			return p.WriteContinuation(1, false, p.block("x-a", "b"))
		}},
		{floodOfHeaders, func(p *peer, i int) error {
			if i == 0 {
				return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line()...)})
			}
			return p.WriteContinuation(1, false, p.block("x-a", big))
		}},
	} {
		t.Run(floodNames[c.kind], func(t *testing.T) {
			t.Parallel()
			s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				readBody(tk, e)
				answerWith(tk, e, 200, "")
			})})
			p := s.connect()
			told := make(chan string, 1)
			go func() {
				for {
					f, err := p.ReadFrame()
					if err != nil {
						told <- "end: " + err.Error()
						return
					}
					if g, ok := f.(*http2.GoAwayFrame); ok {
						told <- g.ErrCode.String()
						return
					}
				}
			}()
			for i := range 20_000 {
				if err := c.send(p, i); err != nil {
					break
				}
				if len(told) > 0 {
					break
				}
			}
			if got := <-told; got != "ENHANCE_YOUR_CALM" {
				t.Errorf("got %s", got)
			}
			p.conn.Close()
			s.until("the end of the connection", func() bool { return s.ended.Load() == 1 })
			if n := s.value("holdfast_downstream_http2_floods_total", floodNames[c.kind]); n != 1 {
				t.Errorf("%d counted", n)
			}
		})
	}
}

// A header block bomb: little on the wire, much of it.
func TestBombsAreRefused(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	p := s.connect()
	block := p.block(line("x-bomb", big[:3000])...)
	index := p.block("x-bomb", big[:3000]) // it is in the table now
	if len(index) > 2 {
		t.Fatalf("%d bytes for a field that is known", len(index))
	}
	for range 5000 {
		block = append(block, index...)
	}
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true, EndStream: true}))
	p.want("1 431")
	p.request(3, line()...)
	for !strings.HasPrefix(p.next(), "3 200") {
	}
}

var big = func() string {
	b := make([]byte, 8000)
	for i := range b {
		b[i] = byte('!' + i%90) // not to be made shorter by HPACK's code
	}
	return string(b)
}()
