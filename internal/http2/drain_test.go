package http2

import (
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// slowly returns a handler whose answers to /slow wait for a word.
func slowly() (h handlerFunc, begun, goOn chan struct{}) {
	begun, goOn = make(chan struct{}, 10), make(chan struct{})
	return func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target == "/slow" {
			begun <- struct{}{}
			streamtest.Block(e.Loop(), tk, func() { <-goOn })
		}
		answerWith(tk, e, 200, "")
	}, begun, goOn
}

func path(p string) []string { return with(map[string]string{":path": p}) }

// A drain is said twice. What comes in between is served, and what is under way has all its time.
func TestDrainInTwoSteps(t *testing.T) {
	t.Parallel()
	h, begun, goOn := slowly()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: h})
	clock := streamtest.NewClock(s.loop)
	p := s.connect()
	p.request(1, path("/slow")...)
	<-begun
	s.Drain(5 * time.Second)
	p.want("goaway 2147483647 NO_ERROR")
	p.request(3, path("/late")...)
	p.wantAnswer(3, "200")
	clock.Advance(6 * time.Second)
	p.want("goaway 3 NO_ERROR")
	p.request(5, path("/too-late")...) // nobody answers, and the client knows
	close(goOn)
	p.wantAnswer(1, "200")
	p.want("end")
	if n := s.value("holdfast_downstream_connections_drained_total"); n != 1 {
		t.Errorf("%d connections drained", n)
	}
}

// What a drain must not end is waited for.
func TestHeldConnectionsAreNotTold(t *testing.T) {
	t.Parallel()
	h, begun, goOn := slowly()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: h})
	clock := streamtest.NewClock(s.loop)
	p := s.connect()
	p.request(1, path("/slow")...)
	<-begun
	var held *serverConn
	streamtest.Do(s.loop, func() {
		for c := range s.loops[0].conns {
			held = c
			c.hold()
		}
	})
	s.Drain(5 * time.Second)
	clock.Advance(10 * time.Second)
	p.request(3, path("/other")...)
	p.wantAnswer(3, "200")
	streamtest.Do(s.loop, held.release)
	p.want("goaway 2147483647 NO_ERROR")
	close(goOn)
	p.wantAnswer(1, "200")
}

// Close cuts what is under way, and says so to its handler.
func TestCloseCuts(t *testing.T) {
	t.Parallel()
	over := make(chan error, 1)
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		_, err := e.Read(tk)
		over <- err
	})})
	p := s.connect()
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line()...), EndHeaders: true}))
	s.until("request", func() bool { return s.Requests() == 1 })
	s.Close()
	if err := <-over; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
	s.until("the end", func() bool { return s.ended.Load() == 1 })
}

// Abort resets the stream, also where the client takes nothing.
func TestAbortResets(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		tk2 := tk
		e.Loop().Post(func() { e.Loop().Post(e.Abort) })
		for e.Write(tk2, make([]byte, 64<<10)) == nil {
		}
	})})
	p := s.connect()
	p.request(1, line()...)
	for {
		got := p.next()
		if got == "1 reset INTERNAL_ERROR" {
			break
		}
		if got == "end" {
			t.Fatal("the connection has ended")
		}
	}
	s.until("the end of the request", func() bool { return s.Requests() == 0 })
}

// A client that resets its stream is gone for the handler.
func TestClientResets(t *testing.T) {
	t.Parallel()
	over := make(chan error, 1)
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		_, err := e.Read(tk)
		over <- errors.Join(err, e.Over())
	})})
	p := s.connect()
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line()...), EndHeaders: true}))
	s.until("request", func() bool { return s.Requests() == 1 })
	p.check(p.WriteRSTStream(1, http2.ErrCodeCancel))
	if err := <-over; !errors.Is(err, errClientGone) {
		t.Errorf("got %v", err)
	}
}

// Interim responses and streams of events arrive while the rest is still to come.
func TestInterimAndStreaming(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.Inform(tk, &exchange.Response{Status: 103, Fields: exchange.Fields{{Name: "Link", Value: "</a>"}}})
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		for range 3 {
			e.Write(tk, []byte("event"))
			streamtest.Block(e.Loop(), tk, func() { <-goOn })
		}
		e.Finish(tk, nil)
	})})
	p := s.connect()
	p.request(1, line()...)
	p.want("1 103", "1 200")
	for range 3 {
		p.want(`1 "event"`)
		goOn <- struct{}{}
	}
	p.want(`1 "" end`)
}

// The library writes an interim response when the stream may have ended already: by then nobody
// changes what is in it, or the process would end with it.
func TestInterimResponsesOfStreamsThatAreReset(t *testing.T) {
	t.Parallel()
	over := make(chan error, 1)
	long := strings.Repeat("a", 32<<10)
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		for {
			if err := e.Inform(tk, &exchange.Response{Status: 103, Fields: exchange.Fields{{Name: "Link", Value: long}}}); err != nil {
				over <- err
				return
			}
		}
	})})
	p := s.connect()
	p.request(1, line()...) // and reads nothing, so that one is being written
	s.until("interim responses", func() bool { return s.value("holdfast_downstream_sent_bytes_total") > 1<<20 })
	p.check(p.WriteRSTStream(1, http2.ErrCodeCancel))
	if err := <-over; !errors.Is(err, errClientGone) {
		t.Errorf("got %v", err)
	}
}

// A body that does not come is not waited for without end.
func TestSlowBodies(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if _, err := readBody(tk, e); err != nil {
			answerWith(tk, e, exchange.StatusOf(err, 500), "")
		}
	})})
	clock := streamtest.NewClock(s.loop)
	p := s.connect()
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line()...), EndHeaders: true}))
	s.until("request", func() bool { return s.Requests() == 1 })
	streamtest.Do(s.loop, func() {})
	clock.Advance(61 * time.Second)
	p.wantAnswer(1, "408")
}

// A request may have its turn when its connection is not there any more: it ends at once, and
// nothing is counted that nobody takes back.
func TestRequestsThatBeginBehindTheirConnection(t *testing.T) {
	t.Parallel()
	for want, cut := range map[error]bool{errClientGone: false, net.ErrClosed: true} {
		t.Run(want.Error(), func(t *testing.T) {
			t.Parallel()
			switched := make(chan error, 1)
			s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(_ *task.Task, e exchange.Exchange) {
				_, _, err := e.Switch(&exchange.Response{Status: 101})
				switched <- err
			})})
			var c *serverConn
			streamtest.Do(s.loop, func() { c = newServerConn(s.loops[s.loop.Index], netip.AddrPort{}, nil) })
			c.wasCut.Store(cut)
			over := make(chan any, 1)
			go func() {
				defer func() { over <- recover() }()
				newServerExchange(c, 1, &serverHead{key: "key"}, httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)).answer()
			}()
			if err := <-switched; err != want {
				t.Fatalf("got %v", err)
			}
			select {
			case got := <-over:
				if got != http.ErrAbortHandler {
					t.Errorf("got %v", got)
				}
			case <-time.After(serverPatience):
				t.Error("it does not end")
			}
		})
	}
}
