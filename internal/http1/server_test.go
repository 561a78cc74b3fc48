package http1

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

var noLimits config.ListenerLimits

func TestRequestsOnOneConnectionAreAnsweredInOrder(t *testing.T) {
	t.Parallel()
	p := serve(t, noLimits, echo(t)).dial()
	for i := range 3 {
		p.get(fmt.Sprint("/", i))
		r := p.want(200, fmt.Sprintf("GET /%d ", i), false)
		if _, err := http.ParseTime(r.Header.Get("Date")); err != nil {
			t.Errorf("date: %v", err)
		}
	}
	p.send("POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 2\r\n\r\nhi\r\n" +
		"POST /b HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nho\r\n0\r\n\r\n" +
		"GET /c HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n" +
		"GET /never HTTP/1.1\r\nHost: a.test\r\n\r\n")
	p.want(200, "POST /a hi", false)
	p.want(200, "POST /b ho", false)
	p.want(200, "GET /c ", true)
	p.wantEOF()
}

func TestRequestsByteByByte(t *testing.T) {
	t.Parallel()
	p := serve(t, noLimits, echo(t)).dial()
	for _, b := range []byte("\r\nPOST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nho\r\n0\r\nETag: v\r\n\r\nGET /b HTTP/1.1\r\nHost: a.test\r\n\r\n") {
		p.send(string([]byte{b}))
	}
	p.want(200, "POST /a ho", false)
	p.want(200, "GET /b ", false)
}

func TestHeadsOfAllSizes(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{HeadSize: 100 << 10}, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		v, _ := e.Request().Fields.Get("X")
		respond(t, tk, e, 200, fmt.Sprint(len(v)))
	}))
	p := s.dial()
	for _, n := range []int{1, 4000, 5000, 17000, 70000, 102000} {
		p.send("GET / HTTP/1.1\r\nHost: a.test\r\nX: " + strings.Repeat("x", n) + "\r\n\r\n")
		p.want(200, fmt.Sprint(n), false)
	}
	p.send("GET / HTTP/1.1\r\nHost: a.test\r\nX: " + strings.Repeat("x", 103000) + "\r\n\r\n")
	p.want(431, "", true)
}

// status answers with the status that belongs to how the request's body has ended.
func status(t *testing.T, text string) handlerFunc {
	return func(tk *task.Task, e exchange.Exchange) {
		_, err := readAll(tk, e)
		respond(t, tk, e, exchange.StatusOf(err, 200), text)
	}
}

func TestRefusalsNameTheirServer(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "edge/1"} {
		s := serve(t, config.ListenerLimits{}, status(t, "ok"))
		s.Server.options.Server = name
		p := s.dial()
		p.send("GET / HTTP/1.1\r\nHost : a\r\n\r\n")
		if r := p.want(400, "", true); r.Header.Get("Server") != name {
			t.Errorf("Server is %q, want %q", r.Header.Get("Server"), name)
		}
	}
}

func TestRefusalsReachAClientThatIsStillSending(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{BodySize: 1000}, status(t, "refused"))
	for name, tt := range map[string]struct {
		head   string
		status int
	}{
		"a malformed head":       {"POST / HTTP/1.1\r\nHost : a\r\n\r\n", 400},
		"two empty lines":        {"\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		"a length beyond limits": {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n", 413},
		"chunks beyond limits":   {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n300000\r\n", 413},
		"malformed chunks":       {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nhello\r\n", 400},
		"HTTP/2":                 {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := s.dial()
			p.t = t
			p.send(tt.head)
			p.send(strings.Repeat("x", 3<<20))
			r := p.want(tt.status, "", true)
			if r.ContentLength <= 0 {
				t.Errorf("length %d", r.ContentLength)
			}
			p.closeWrite()
			p.wantEOF()
		})
	}
}

func TestHeadThatComesTooSlowly(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, config.ListenerLimits{HeadTimeout: 5 * time.Second, IdleTimeout: time.Hour}, echo(t))
	p := s.dial()
	s.await(1)
	clock.Advance(time.Minute) // silence costs nothing
	p.send("GET / HT")
	s.wantReceived(8)
	clock.Advance(3 * time.Second)
	p.send("TP/1.1\r\n")
	s.wantReceived(16)
	clock.Advance(1900 * time.Millisecond)
	if len(s.refused) > 0 {
		t.Error("refused too early")
	}
	clock.Advance(100*time.Millisecond + granularity)
	p.want(408, "", true)
	p.wantEOF()
}

func TestIdleConnectionIsClosedWithoutAWord(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, config.ListenerLimits{IdleTimeout: 5 * time.Second}, echo(t))
	p := s.dial()
	s.await(1)
	clock.Advance(4 * time.Second)
	p.get("/")
	p.want(200, "", false)
	s.settled()
	clock.Advance(4900 * time.Millisecond)
	s.wantOpen(1)
	clock.Advance(100*time.Millisecond + granularity)
	p.wantEOF()
}

func TestBodyThatComesTooSlowly(t *testing.T) {
	t.Parallel()
	for name, framing := range map[string]string{"by length": "Content-Length: 5", "chunked": "Transfer-Encoding: chunked"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, clock := clocked(t, config.ListenerLimits{BodyTimeout: 5 * time.Second, HeadTimeout: time.Second}, status(t, "late"))
			p := s.dial()
			head := "POST / HTTP/1.1\r\nHost: a\r\n" + framing + "\r\n\r\n"
			p.send(head)
			s.wantReceived(int64(len(head)))
			for i := range 3 { // each byte has its own time
				clock.Advance(4900 * time.Millisecond)
				p.send("0")
				s.wantReceived(int64(len(head) + i + 1))
			}
			clock.Advance(4900 * time.Millisecond)
			if s.Requests() != 1 {
				t.Error("answered too early")
			}
			clock.Advance(100*time.Millisecond + granularity)
			p.want(408, "late", true)
		})
	}
}

func TestBodyBelowTheLeastRate(t *testing.T) {
	t.Parallel()
	type step struct {
		after time.Duration
		bytes int
	}
	limits := config.ListenerLimits{BodyTimeout: 10 * time.Second, BodyRate: 10}
	for name, tt := range map[string]struct {
		steps   []step
		refused bool // by the end of them
	}{
		"just enough":                    {[]step{{5 * time.Second, 50}, {4900 * time.Millisecond, 50}, {9 * time.Second, 1}, {900 * time.Millisecond, 99}, {9 * time.Second, 0}}, false},
		"too few":                        {[]step{{4 * time.Second, 10}, {4 * time.Second, 10}, {2*time.Second + granularity, 0}}, true},
		"too few, and the window is on":  {[]step{{4 * time.Second, 10}, {4 * time.Second, 10}, {1900 * time.Millisecond, 0}}, false},
		"enough, then too few":           {[]step{{4 * time.Second, 500}, {6 * time.Second, 1}, {9 * time.Second, 98}, {time.Second + granularity, 0}}, true},
		"enough, and then a short pause": {[]step{{4 * time.Second, 100}, {9900 * time.Millisecond, 0}}, false},
		"enough, and then a long one":    {[]step{{4 * time.Second, 100}, {10*time.Second + granularity, 0}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, clock := clocked(t, limits, status(t, "slow"))
			p := s.dial()
			const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10000\r\n\r\n"
			p.send(head)
			sent := len(head)
			s.wantReceived(int64(sent))
			for _, step := range tt.steps {
				clock.Advance(step.after)
				p.send(strings.Repeat("x", step.bytes))
				sent += step.bytes
				s.wantReceived(int64(sent))
			}
			if answered := s.Requests() == 0; answered != tt.refused {
				t.Errorf("refused: %v", answered)
			}
			if tt.refused {
				p.want(408, "slow", true)
			} else {
				p.send(strings.Repeat("x", len(head)+10000-sent))
				p.want(200, "slow", false)
			}
		})
	}
}

// TestTheLeastRateIsTheClientsAlone has an upstream that takes its time.
func TestTheLeastRateIsTheClientsAlone(t *testing.T) {
	t.Parallel()
	slow := make(chan struct{})
	s, clock := clocked(t, config.ListenerLimits{BodyTimeout: 10 * time.Second, BodyRate: 10}, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		total := 0
		for {
			p, err := e.Read(tk)
			if total += len(p); err != nil {
				respond(t, tk, e, exchange.StatusOf(err, 200), fmt.Sprint(total))
				return
			}
			streamtest.Block(e.Loop(), tk, func() { <-slow })
		}
	}))
	p := s.dial()
	const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
	p.send(head)
	for i := range 4 {
		p.send("x")
		s.wantReceived(int64(len(head) + i + 1))
		clock.Advance(time.Minute)
		slow <- struct{}{}
		s.settled()
	}
	p.want(200, "4", false)
}

// clog fills the way to the client, which does not read.
func clog(e exchange.Exchange) {
	fd, junk := e.(*serverExchange).c.FD(), make([]byte, 64<<10)
	for moved := true; moved; {
		moved = false
		for {
			if _, err := unix.Write(fd, junk); err != nil {
				break
			}
			moved = true
		}
		// What is on its way leaves room when it has arrived.
		unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 50)
	}
}

func TestInterimHeadThatTheClientDoesNotTakeEndsTheExchange(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		request string
		send    func(*task.Task, exchange.Exchange) error
	}{
		"100 before the body is read": {
			"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
			func(tk *task.Task, e exchange.Exchange) error { _, err := e.Read(tk); return err },
		},
		"103 from the upstream": {
			"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
			func(tk *task.Task, e exchange.Exchange) error { return e.Inform(tk, &exchange.Response{Status: 103}) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ended := make(chan error, 1)
			s, clock := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				clog(e)
				err := tt.send(tk, e)
				if err != nil && e.Over() == nil {
					t.Errorf("failed with %v, but the exchange goes on", err)
				}
				ended <- err
			}))
			s.dial().send(tt.request)
			eventually(t, "the request", func() bool { return s.Requests() == 1 })
			s.settled()
			clock.Advance(interimTime - time.Millisecond)
			if len(ended) > 0 {
				t.Error("the client had no time")
			}
			clock.Advance(time.Millisecond + granularity)
			if err := await(t, "the end of the wait", ended); err == nil {
				t.Error("it was sent to a client that does not read")
			}
		})
	}
}

func TestHandlerLearnsThatTheClientHasGone(t *testing.T) {
	t.Parallel()
	const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	const post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
	const unread = "POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
	reset := func(p *peer) { p.tcp().SetLinger(0); p.tcp().Close() }
	for name, tt := range map[string]struct {
		request string
		leave   func(*peer)
	}{
		"close":                                 {get, func(p *peer) { p.conn.Close() }},
		"half-close":                            {get, func(p *peer) { p.closeWrite() }},
		"reset":                                 {get, reset},
		"reset within a body that nobody reads": {unread, reset},
		"close after a body":                    {post, func(p *peer) { p.conn.Close() }},
		"half-close behind pipelining":          {get + get, func(p *peer) { p.closeWrite() }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			called, gone := make(chan struct{}), make(chan error, 1)
			s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				if e.Request().Target != "/unread" {
					readAll(tk, e)
				}
				close(called)
				if err := awaitOver(tk, e); err != errClientGone || e.Over() != err {
					t.Errorf("over for %v and %v", err, e.Over())
				}
				gone <- e.Respond(&exchange.Response{Status: 200})
			}))
			p := s.dial()
			p.send(tt.request)
			await(t, "the handler", called)
			tt.leave(p)
			if err := await(t, "the end of the exchange", gone); err == nil {
				t.Error("the exchange goes on")
			}
		})
	}
}

// TestAClientThatIsGoneBeforeItsRequestIsRead has the end in the kernel beside the request.
func TestAClientThatIsGoneBeforeItsRequestIsRead(t *testing.T) {
	t.Parallel()
	for name, request := range map[string]string{
		"without a body": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"with a body":    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			over := make(chan error, 1)
			s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				readAll(tk, e)
				over <- awaitOver(tk, e)
			}))
			p := s.dial()
			s.await(1)
			streamtest.Do(s.loop, func() { // which looks at nothing meanwhile
				p.send(request)
				p.closeWrite()
			})
			if err := await(t, "the handler", over); err != errClientGone {
				t.Error(err)
			}
		})
	}
}

// TestFinishBehindAClientThatHasEverything has a client that leaves between the
// last byte and Finish: its response is complete.
func TestFinishBehindAClientThatHasEverything(t *testing.T) {
	t.Parallel()
	finished := make(chan error, 1)
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.Respond(&exchange.Response{Status: 200, ContentLength: 1})
		e.Write(tk, []byte("x"))
		awaitOver(tk, e)
		finished <- e.Finish(tk, nil)
	})).dial()
	p.get("/")
	p.want(200, "x", false)
	p.conn.Close()
	if err := await(t, "the handler", finished); err != nil {
		t.Error(err)
	}
}

// TestAClientThatEndsItsDirectionWithinTheLastBytesGetsThem: it has asked for nothing else.
func TestAClientThatEndsItsDirectionWithinTheLastBytesGetsThem(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "it fills the socket")
	finished := make(chan error, 1)
	ending := make(chan struct{})
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		clog(e)
		e.Respond(&exchange.Response{Status: 204})
		close(ending)
		finished <- e.Finish(tk, nil)
	}))
	p := s.dial()
	p.get("/")
	await(t, "the handler", ending)
	s.settled()
	p.closeWrite()
	if rest, err := io.ReadAll(p.r); err != nil || !strings.Contains(string(rest), "HTTP/1.1 204") {
		t.Errorf("%d bytes, error %v", len(rest), err)
	}
	if err := await(t, "the handler", finished); err != nil {
		t.Error(err)
	}
}

type watcherFunc func(error)

func (f watcherFunc) ExchangeOver(err error) { f(err) }

func TestNobodyIsToldOfAnEndBehindTheHandler(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.OnOver(watcherFunc(func(err error) { t.Errorf("it is over: %v", err) }))
		e.StopReading()
		respond(t, tk, e, 200, "x")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
	p.want(200, "x", true)
	s.settled()
	s.Close() // while we wait for the client's end
	p.wantEOF()
	s.await(0)
}

// TestAHalfClosedClientGetsAnAnswerThatItsBodyIsNotReadFor: that the body is whole nobody
// knows, so that its end is no sign that the client has gone.
func TestAHalfClosedClientGetsAnAnswerThatItsBodyIsNotReadFor(t *testing.T) {
	t.Parallel()
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		for !e.(*serverExchange).c.HungUp() {
			tk.Pause()
		}
		respond(t, tk, e, 403, "no")
	})).dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
	p.closeWrite()
	p.want(403, "no", false)
	p.wantEOF()
}

func TestPipelinedRequestsThatComeWhileOneIsAnsweredAreServed(t *testing.T) {
	t.Parallel()
	first := make(chan struct{})
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target == "/first" {
			streamtest.Block(e.Loop(), tk, func() { <-first })
		}
		respond(t, tk, e, 200, e.Request().Target)
	})).dial()
	const n = 500
	p.get("/first")
	for i := range n {
		p.get(fmt.Sprint("/", i))
	}
	close(first)
	p.want(200, "/first", false)
	for i := range n {
		p.want(200, fmt.Sprint("/", i), false)
	}
}

func TestBodilessResponses(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		var status int
		var length int64
		fmt.Sscanf(e.Request().Target, "/%d/%d", &status, &length)
		if err := e.Respond(&exchange.Response{Status: status, ContentLength: length}); err != nil {
			t.Error(err)
		}
		if e.Request().Method == "HEAD" {
			if err := e.Write(tk, []byte("not sent")); err != nil {
				t.Error(err)
			}
		} else if err := e.Write(tk, []byte("not sent")); err == nil {
			t.Error("a body was written")
		}
		if err := e.Finish(tk, exchange.Fields{{Name: "ETag", Value: "v"}}); err != nil {
			t.Error(err)
		}
	}))
	p := s.dial()
	for _, tt := range []struct{ method, target, length string }{
		{"HEAD", "/200/7", "7"}, {"HEAD", "/200/0", "0"}, {"HEAD", "/200/-1", ""},
		{"GET", "/204/0", ""}, {"GET", "/304/7", "7"}, {"GET", "/304/-1", ""},
	} {
		p.send(tt.method + " " + tt.target + " HTTP/1.1\r\nHost: a\r\n\r\n")
		r, body := p.response(tt.method)
		if got := r.Header.Get("Content-Length"); got != tt.length || body != "" || len(r.TransferEncoding) > 0 {
			t.Errorf("%s %s: length %q, want %q; body %q, coding %v", tt.method, tt.target, got, tt.length, body, r.TransferEncoding)
		}
	}
	p.send("GET /304/7 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	p.response("GET")
	p.wantEOF()
}

func TestStreamedResponse(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		r := &exchange.Response{Status: 200, ContentLength: -1, Fields: exchange.Fields{{Name: "Date", Value: "today"}}}
		if e.Respond(r) != nil || e.Flush(tk) != nil {
			t.Error("respond")
		}
		streamtest.Block(e.Loop(), tk, func() { <-release })
		e.Write(tk, []byte("one"))
		streamtest.Block(e.Loop(), tk, func() { <-release })
		e.Write(tk, []byte(strings.Repeat("x", 4097)))
		trailers := exchange.Fields{{Name: "ETag", Value: "v"}, {Name: "Content-Type", Value: "dropped"}, {Name: "Digest", Value: "a\r\nb"}}
		if err := e.Finish(tk, trailers); err != nil {
			t.Error(err)
		}
	}))
	p := s.dial()
	p.get("/")
	p.wantBytes(lines("HTTP/1.1 200 ", "Transfer-Encoding: chunked", "Date: today", ""))
	release <- struct{}{}
	p.wantBytes(lines("3", "one"))
	release <- struct{}{}
	p.wantBytes(lines("1001", strings.Repeat("x", 4097), "0", "ETag: v", ""))

	p.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n")
	p.wantBytes(lines("HTTP/1.1 200 ", "Connection: close", "Date: today", ""))
	close(release)
	p.wantBytes("one" + strings.Repeat("x", 4097))
	p.wantEOF()
}

func TestResponsesThatTheHandlerLeavesUnfinished(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		version string
		handler handlerFunc
		reset   bool
	}{
		"no response": {"1.1", func(*task.Task, exchange.Exchange) {}, false},
		"a panic":     {"1.1", func(*task.Task, exchange.Exchange) { panic("tested") }, false},
		"too few bytes": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: 5})
			e.Write(tk, []byte("x"))
			wantErr(t, e.Finish(tk, nil))
		}, false},
		"too many bytes": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: 5})
			wantErr(t, e.Write(tk, []byte("too long")))
		}, false},
		"no last chunk": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			e.Write(tk, []byte("x"))
		}, false},
		"no end": {"1.0", func(tk *task.Task, e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			e.Write(tk, []byte("x"))
		}, true},
		"aborted": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			e.Write(tk, []byte("x"))
			e.Abort()
			wantErr(t, e.Finish(tk, nil))
		}, false},
		"aborted without a length": {"1.0", func(tk *task.Task, e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			e.Write(tk, []byte("x"))
			e.Abort()
		}, true},
		"a bad field name": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "a b", Value: "c"}}}))
		}, false},
		"a split response": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "a", Value: "b\r\nc: d"}}}))
		}, false},
		"framing in fields": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "content-length", Value: "5"}}}))
		}, false},
		"an interim final": {"1.1", func(tk *task.Task, e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 101}))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := serve(t, noLimits, tt.handler).dial()
			p.send("GET / HTTP/" + tt.version + "\r\nHost: a\r\n\r\n")
			if tt.reset {
				if _, err := io.Copy(io.Discard, p.r); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the end looks proper: %v", err)
				}
				return
			}
			r, err := http.ReadResponse(p.r, nil)
			if err != nil {
				return
			}
			if body, err := io.ReadAll(r.Body); err == nil {
				t.Errorf("a whole response with the body %q", body)
			}
		})
	}
}

func wantErr(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		t.Error("no error")
	}
}

func TestExpectContinue(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target == "/refuse" {
			respond(t, tk, e, 403, "no")
			return
		}
		echo(t)(tk, e)
	}))
	p := s.dial()
	p.send("POST /a HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	p.wantBytes(lines("HTTP/1.1 100 Continue", ""))
	p.send("hi")
	p.want(200, "POST /a hi", false)
	p.send("POST /b HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi")
	p.want(200, "POST /b hi", false) // its body was there: nothing to wait for
	p.send("POST /refuse HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	p.want(403, "no", true)
	p.closeWrite()
	p.wantEOF()
}

// TestA100AndAResponseOfTwoTasksComeOneAfterTheOther has the client take nothing while the
// 100 is sent, and the response begin meanwhile.
func TestA100AndAResponseOfTwoTasksComeOneAfterTheOther(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "it fills the socket")
	responding := make(chan struct{})
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		clog(e)
		read := false
		e.Loop().Tasks.Go(runner(func(reader *task.Task) {
			_, err := e.Read(reader)
			wantErr(t, err) // the client does not send it any more
			read = true
			tk.Wake()
		}))
		tk.Pause() // the reader waits for room
		e.Respond(&exchange.Response{Status: 200, ContentLength: 5, Close: true})
		body := []byte("hello")
		e.Loop().Post(func() {
			copy(body, "XXXXX") // it is not the codec's any more when the task has waited
			close(responding)
		})
		if err := e.Write(tk, body); err != nil {
			t.Error(err)
		}
		e.StopReading()
		for !read {
			tk.Wait()
		}
		e.Finish(tk, nil)
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
	await(t, "the response", responding)
	all, err := io.ReadAll(p.r)
	_, got, found := strings.Cut(strings.TrimLeft(string(all), "\x00"), "HTTP/1.1 100 Continue\r\n\r\n")
	if err != nil || !found || !strings.HasPrefix(got, "HTTP/1.1 200 ") || !strings.HasSuffix(got, "\r\n\r\nhello") {
		t.Errorf("got %q, error %v", got, err)
	}
}

func TestInterimResponses(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if err := e.Inform(tk, &exchange.Response{Status: 103, Reason: "Early Hints", Fields: exchange.Fields{{Name: "Link", Value: "x"}}}); err != nil {
			t.Error(err)
		}
		wantErr(t, e.Inform(tk, &exchange.Response{Status: 101}))
		wantErr(t, e.Inform(tk, &exchange.Response{Status: 200}))
		respond(t, tk, e, 200, "x")
		wantErr(t, e.Inform(tk, &exchange.Response{Status: 103}))
		wantErr(t, e.Respond(&exchange.Response{Status: 200}))
	}))
	p := s.dial()
	p.get("/")
	p.wantBytes(lines("HTTP/1.1 103 Early Hints", "Link: x", ""))
	p.want(200, "x", false)
	p.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n")
	p.want(200, "x", true)
}

func TestRequestBodyThatTheHandlerLeaves(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target == "/stop" {
			e.StopReading()
		}
		respond(t, tk, e, 200, "early")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10000\r\n\r\n" + strings.Repeat("x", 10000))
	p.want(200, "early", false)
	p.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
	p.want(200, "early", false)
	p.send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nx", leftoverBytes+2))
	p.want(200, "early", true) // too much to read
	p.closeWrite()
	p.wantEOF()
	p = s.dial()
	p.send("POST /stop HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
	p.want(200, "early", true)
	p.closeWrite()
	p.wantEOF()
}

func TestWhatTheHandlerLeavesOfABodyHasItsBounds(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { respond(t, tk, e, 200, "early") }))
	for name, tt := range map[string]struct {
		behind string
		after  time.Duration
	}{
		"it does not come": {"", leftoverTime + granularity},
		"it is too much":   {fmt.Sprintf("%x\r\n", 2*leftoverBytes) + strings.Repeat("x", 2*leftoverBytes), 0},
	} {
		p := s.dial()
		p.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + tt.behind)
		p.want(200, "early", false)
		s.settled()
		clock.Advance(tt.after)
		p.wantEOF() // and we read on for a while
		p.conn.Close()
		s.await(0)
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

func TestManySmallChunksAreReadAtOnce(t *testing.T) {
	t.Parallel()
	const chunks = 3000
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		total, reads := 0, 0
		for err := error(nil); err == nil; reads++ {
			var p []byte
			p, err = e.Read(tk)
			total += len(p)
		}
		if total != chunks || reads > chunks/10 {
			t.Errorf("%d bytes in %d reads", total, reads)
		}
		respond(t, tk, e, 200, "")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nx\r\n", chunks) + "0\r\n\r\n")
	p.want(200, "", false)
}

func TestStopReadingEndsARead(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{BodyTimeout: time.Hour}, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		total, ended := 0, error(nil)
		e.Loop().Tasks.Go(runner(func(reader *task.Task) {
			for ended == nil {
				var p []byte
				p, ended = e.Read(reader)
				total += len(p)
				tk.Wake()
			}
		}))
		for total < 2 {
			tk.Wait()
		}
		tk.Pause() // the reader waits again
		e.StopReading()
		for ended == nil {
			tk.Wait()
		}
		_, err := e.Read(tk)
		wantErr(t, err)
		if e.Over() != nil {
			t.Error("the exchange is over")
		}
		respond(t, tk, e, 413, "enough")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe")
	p.want(413, "enough", true)
}

// TestTheEndOfReadingIsNotThatOfSending: a response that is on its way when the body is
// given up, or comes too slowly, goes on.
func TestTheEndOfReadingIsNotThatOfSending(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(e exchange.Exchange, clock *streamtest.Clock){
		"it is given up": func(e exchange.Exchange, _ *streamtest.Clock) {
			streamtest.Do(e.Loop(), e.StopReading)
		},
		"it comes too slowly": func(_ exchange.Exchange, clock *streamtest.Clock) {
			clock.Advance(5*time.Second + granularity)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 8 << 20
			writing := make(chan exchange.Exchange, 1)
			s, clock := clocked(t, config.ListenerLimits{BodyTimeout: 5 * time.Second}, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				reading := true
				e.Loop().Tasks.Go(runner(func(reader *task.Task) {
					_, err := e.Read(reader)
					wantErr(t, err)
					reading = false
					tk.Wake()
				}))
				e.Respond(&exchange.Response{Status: 200, ContentLength: size})
				writing <- e
				if err := e.Write(tk, make([]byte, size)); err != nil {
					t.Error(err)
				}
				for reading {
					tk.Wait()
				}
				if err := e.Finish(tk, nil); err != nil {
					t.Error(err)
				}
			}))
			p := s.dial()
			p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
			e := await(t, "the response", writing)
			s.settled()
			end(e, clock)
			s.settled()
			if _, body := p.response("POST"); len(body) != size {
				t.Errorf("%d bytes", len(body))
			}
		})
	}
}

// TestTheLimitsOfARequestEndWithIt: the client has all the time for its response.
func TestTheLimitsOfARequestEndWithIt(t *testing.T) {
	t.Parallel()
	for name, request := range map[string][2]string{
		"a head in two pieces": {"GET / HT", "TP/1.1\r\nHost: a\r\n\r\n"},
		"a body behind a head": {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n", "hi"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 8 << 20
			writing := make(chan struct{})
			limits := config.ListenerLimits{HeadTimeout: time.Second, BodyTimeout: 5 * time.Second, IdleTimeout: time.Second}
			s, clock := clocked(t, limits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				readAll(tk, e)
				if err := e.Inform(tk, &exchange.Response{Status: 103}); err != nil {
					t.Error(err)
				}
				e.Respond(&exchange.Response{Status: 200, ContentLength: size})
				close(writing)
				if err := e.Write(tk, make([]byte, size)); err != nil {
					t.Error(err)
				}
				if err := e.Finish(tk, nil); err != nil {
					t.Error(err)
				}
			}))
			p := s.dial()
			p.send(request[0])
			s.wantReceived(int64(len(request[0])))
			p.send(request[1])
			await(t, "the response", writing)
			s.settled()
			clock.Advance(time.Hour)
			p.wantBytes("HTTP/1.1 103 \r\n\r\n")
			if _, body := p.response("POST"); len(body) != size {
				t.Errorf("%d bytes", len(body))
			}
		})
	}
}

func TestLingeringHasItsBounds(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, noLimits, echo(t))
	p := s.dial()
	p.send("nonsense\r\n\r\n")
	p.want(400, "", true)
	p.wantEOF() // but it is read on
	clock.Advance(lingerTime - time.Millisecond)
	s.wantOpen(1)
	clock.Advance(time.Millisecond + granularity)
	s.await(0)

	before, _ := bytesOf(s.counted)
	p = s.dial()
	p.send("nonsense\r\n\r\n" + strings.Repeat("x", lingerBytes/2))
	s.wantReceived(before + lingerBytes/2)
	s.wantOpen(1)
	received, _ := bytesOf(s.counted)
	var err error
	for n := 0; n < 16 && err == nil; n++ {
		_, err = io.WriteString(p.conn, strings.Repeat("x", lingerBytes/2))
	}
	s.await(0)
	if now, _ := bytesOf(s.counted); now-received > lingerBytes+128<<10 {
		t.Errorf("it has read %d bytes", now-received)
	}
}

func TestAClientThatPipelinesIsNotServedAloneForLong(t *testing.T) {
	t.Parallel()
	const n = 500
	var served []string
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		served = append(served, strings.Clone(e.Request().Target))
		respond(t, tk, e, 200, "x")
	}))
	a, b := s.dial(), s.dial()
	s.await(2)
	streamtest.Do(s.loop, func() {
		for range n {
			a.get("/a")
			b.get("/b")
		}
	})
	for range n {
		a.want(200, "x", false)
		b.want(200, "x", false)
	}
	for begin := 0; begin < n; begin += 50 {
		if few := served[begin : begin+50]; !slices.Contains(few, "/a") || !slices.Contains(few, "/b") {
			t.Fatalf("%q", few)
		}
	}
}

func TestAbortUnblocksAWrite(t *testing.T) {
	t.Parallel()
	blocked := make(chan exchange.Exchange, 1)
	ended := make(chan error, 1)
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		blocked <- e
		for {
			if err := e.Write(tk, make([]byte, 1<<20)); err != nil {
				ended <- err
				return
			}
		}
	})).dial()
	p.get("/")
	e := await(t, "the handler", blocked)
	streamtest.Do(e.Loop(), e.Abort)
	if err := await(t, "the end of Write", ended); err != errAborted {
		t.Error(err)
	}
	p.wantCut()
}

const upgradeRequest = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"

func TestSwitch(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "what was switched is used as it is")
	held := make(chan struct{})
	conns := make(chan net.Conn, 1)
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		streamtest.Block(e.Loop(), tk, func() { <-held })
		c, head, err := e.Switch(&exchange.Response{Status: 101, Reason: "Switching Protocols", Upgrade: "websocket",
			Fields: exchange.Fields{{Name: "Sec-WebSocket-Accept", Value: "x"}}})
		if err != nil || string(c.Early) != "early" {
			t.Errorf("early %q, error %v", c.Early, err)
			return
		}
		e.Abort() // does nothing any more
		c.Leave(e.Loop())
		conn := connOf(t, c.FD)
		streamtest.Block(e.Loop(), tk, func() { conn.Write(head) })
		conns <- conn
	}))
	p := s.dial()
	p.send(upgradeRequest + "\r\nearly")
	eventually(t, "the request", func() bool { return s.Requests() == 1 })
	close(held)
	p.wantBytes(lines("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Accept: x", ""))
	conn := await(t, "the switch", conns)
	defer conn.Close()
	eventually(t, "the server to forget it", func() bool { return s.Connections() == 0 && s.Requests() == 0 })
	s.Server.Close()
	other := newPeer(t, conn)
	p.send("ping")
	other.wantBytes("ping")
	other.send("pong")
	p.wantBytes("pong")
}

// A protocol that the codec does not know is the handler's to agree to, and is named in the
// 101.
func TestSwitchToAnotherProtocol(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "what was switched is used as it is")
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Upgrade != "" || e.Request().Offer != "my-proto/2" {
			t.Errorf("got %+v", e.Request())
		}
		c, head, err := e.Switch(&exchange.Response{Status: 101, Reason: "Switching Protocols", Upgrade: e.Request().Offer})
		if err != nil || string(c.Early) != "early" {
			t.Errorf("early %q, error %v", c.Early, err)
			return
		}
		c.Leave(e.Loop())
		conn := connOf(t, c.FD)
		streamtest.Block(e.Loop(), tk, func() { conn.Write(head); conn.Close() })
	}))
	p := s.dial()
	p.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: My-Proto/2\r\n\r\nearly")
	p.wantBytes(lines("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: my-proto/2", ""))
	p.wantEOF()
}

// Where nobody agrees, such a request is an ordinary one, and its connection goes on.
func TestAnOfferThatNobodyTakes(t *testing.T) {
	t.Parallel()
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { respond(t, tk, e, 200, e.Request().Target) })).dial()
	p.send("GET /1 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: my-proto\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
	p.want(200, "/1", false)
	p.want(200, "/2", false)
}

func TestSwitchWithManyEarlyBytes(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "what was switched is used as it is")
	const n = 1 << 20
	type switched struct {
		fd    int
		early []byte
	}
	results := make(chan switched, 1)
	full := make(chan struct{})
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		streamtest.Block(e.Loop(), tk, func() { <-full })
		c, _, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
		if err != nil {
			t.Error(err)
		}
		c.Leave(e.Loop())
		results <- switched{c.FD, c.Early}
	})).dial()
	p.send(upgradeRequest + "\r\n" + strings.Repeat("x", 1000))
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		p.send(strings.Repeat("x", n/2-1000))
		close(full)
		p.send(strings.Repeat("x", n/2))
		p.closeWrite()
	})
	r := await(t, "the switch", results)
	conn := connOf(t, r.fd)
	defer conn.Close()
	rest, err := io.ReadAll(conn)
	if len(r.early) > 64<<10 || len(r.early)+len(rest) != n || err != nil {
		t.Errorf("%d early bytes and %d, error %v", len(r.early), len(rest), err)
	}
}

func TestSwitchFailsForAClientThatHasGone(t *testing.T) {
	t.Parallel()
	ended := make(chan error, 1)
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		awaitOver(tk, e)
		_, _, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
		ended <- err
	})).dial()
	p.send(upgradeRequest + "\r\n")
	p.closeWrite()
	wantErr(t, await(t, "the handler", ended))
	p.wantEOF()
}

func TestSwitchIsOnlyForUpgrades(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.Request().Upgrade = "websocket" // the handler's wish changes nothing
		e.Request().UpgradeBody = false
		_, _, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
		wantErr(t, err)
	}))
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: my-proto\r\nContent-Length: 1\r\n\r\nx",
		upgradeRequest + "Content-Length: 1\r\n\r\nx",
	} {
		p := s.dial()
		p.send(request)
		p.wantCut()
	}
}

func TestNothingIsServedBehindARefusedUpgrade(t *testing.T) {
	t.Parallel()
	p := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { respond(t, tk, e, 403, e.Request().Target) })).dial()
	p.send(upgradeRequest + "\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
	p.want(403, "/ws", true)
	p.closeWrite()
	p.wantEOF()
}

func TestDraft76(t *testing.T) {
	t.Parallel()
	const head = upgradeRequest + "Sec-WebSocket-Key1: a\r\nSec-WebSocket-Key2: b\r\n\r\n"
	s := serve(t, config.ListenerLimits{HeadTimeout: patience}, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		respond(t, tk, e, 403, string(e.Request().HeadTail))
	}))
	for split := range draft76Tail + 1 {
		p := s.dial()
		p.send(head + "12345678"[:split])
		p.send("12345678"[split:] + "GET /")
		p.want(403, "12345678", true)
	}
	s, clock := clocked(t, config.ListenerLimits{HeadTimeout: time.Second}, echo(t))
	p := s.dial()
	p.send(head + "1234567")
	s.wantReceived(int64(len(head) + 7))
	clock.Advance(time.Second + granularity)
	p.want(408, "", true)
}

func TestDrain(t *testing.T) {
	t.Parallel()
	slow := make(chan struct{})
	s, clock := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target == "/slow" {
			streamtest.Block(e.Loop(), tk, func() { <-slow })
		}
		respond(t, tk, e, 200, "x")
	}))
	silent, idle, late, busy := s.dial(), s.dial(), s.dial(), s.dial()
	idle.get("/")
	idle.want(200, "x", false)
	late.get("/")
	late.want(200, "x", false)
	busy.get("/slow")
	eventually(t, "all connections", func() bool { return s.Connections() == 4 && s.Requests() == 1 })

	s.Drain(time.Second)
	s.settled()
	late.get("/")
	late.want(200, "x", true)
	fresh := s.dial()
	fresh.get("/")
	fresh.want(200, "x", true)
	fresh.conn.Close()
	late.conn.Close()
	s.await(3)
	clock.Advance(900 * time.Millisecond)
	s.wantOpen(3)
	clock.Advance(100*time.Millisecond + granularity)
	idle.wantEOF()
	silent.wantEOF()
	close(slow)
	busy.want(200, "x", true)
	busy.conn.Close()
	s.await(0)
}

func TestDrainAndResume(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Hour}, echo(t))
	p := s.dial()
	s.await(1)
	s.Drain(time.Minute)
	s.settled()
	clock.Advance(30 * time.Second)
	s.Resume()
	s.settled()
	clock.Advance(time.Minute)
	p.get("/")
	p.want(200, "", false)
	s.Drain(time.Minute)
	s.settled()
	clock.Advance(59 * time.Second)
	s.wantOpen(1)
	clock.Advance(time.Second + granularity)
	p.wantEOF()
}

func TestRetireSaysNothing(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Hour}, echo(t))
	p, idle := s.dial(), s.dial()
	s.await(2)
	s.Retire(time.Minute)
	s.settled()
	p.get("/")
	p.want(200, "", false)
	clock.Advance(59 * time.Second)
	s.wantOpen(2)
	clock.Advance(time.Second + granularity)
	idle.wantEOF()
	p.wantEOF()

	p = s.dial()
	s.await(1)
	s.Retire(time.Minute)
	s.settled()
	s.Drain(time.Minute)
	s.settled()
	p.get("/")
	p.want(200, "", true)
}

// taken are connections that were handed over.
type taken struct {
	mu    sync.Mutex
	idle  []Idle
	offer bool // nobody takes them
	asked int
}

func (k *taken) give(_ *stream.Loop, i Idle) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	if !k.offer {
		k.idle = append(k.idle, i)
	}
	return !k.offer
}

func (k *taken) wait(t *testing.T, n int) []Idle {
	t.Helper()
	eventually(t, "connections that are given away", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return len(k.idle) >= n
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.idle
}

func TestIdleConnectionsAreHandedOver(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	slow := make(chan struct{})
	s, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Minute}, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target == "/slow" {
			streamtest.Block(e.Loop(), tk, func() { <-slow })
		}
		respond(t, tk, e, 200, "x")
	}))
	idle := s.dial()
	s.await(1)
	since := clock.Now()
	busy, half := s.dial(), s.dial()
	busy.get("/slow")
	half.send("GET /")
	eventually(t, "the requests", func() bool { return s.Connections() == 3 && s.Requests() == 1 })
	s.wantReceived(int64(len("GET /slow HTTP/1.1\r\nHost: a.test\r\n\r\nGET /")))
	clock.Advance(30 * time.Second)

	var k taken
	s.HandOver(k.give)
	got := k.wait(t, 1)
	s.wantOpen(2)
	if len(got) != 1 || got[0].Remote.String() != idle.conn.LocalAddr().String() || !got[0].Since.Equal(since) || len(got[0].Early) > 0 {
		t.Errorf("got %+v, want %v idle since %v", got, idle.conn.LocalAddr(), since)
	}
	close(slow)
	busy.want(200, "x", false)
	half.send(" HTTP/1.1\r\nHost: a.test\r\n\r\n")
	half.want(200, "x", false)
	got = k.wait(t, 3)
	s.wantOpen(0)
	if n := s.ended.Load(); n != 3 {
		t.Errorf("%d connections were said to have ended", n)
	}

	other, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Minute}, echo(t))
	streamtest.Do(other.loop, func() {
		for _, i := range got {
			other.Take(other.loop, i)
		}
	})
	for _, p := range []*peer{idle, busy, half} {
		p.get("/again")
		p.want(200, "GET /again ", false)
	}
	other.wantOpen(3)
	if n := other.options.Metrics.connections.Value(); n != 0 {
		t.Errorf("%d connections are counted twice", n)
	}
	clock.Advance(time.Minute + granularity)
	idle.wantEOF()
}

// A connection that is served only while idle ones are given away, as one that has waited for
// something else before, goes as well.
func TestAConnectionThatComesGoesOverToo(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	s := serve(t, config.ListenerLimits{}, echo(t))
	var k taken
	s.HandOver(k.give)
	streamtest.Do(s.loop, func() {})
	s.dial()
	k.wait(t, 1)
	s.wantOpen(0)
}

func TestATakenConnectionsIdleTimeGoesOn(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	s := serve(t, config.ListenerLimits{IdleTimeout: time.Minute}, echo(t))
	p := s.dial()
	s.await(1)
	var k taken
	s.HandOver(k.give)
	i := k.wait(t, 1)[0]
	other, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Minute}, echo(t))
	i.Since = clock.Now().Add(-50 * time.Second)
	streamtest.Do(other.loop, func() { other.Take(other.loop, i) })
	clock.Advance(9 * time.Second)
	other.wantOpen(1)
	clock.Advance(time.Second + granularity)
	p.wantEOF()
}

func TestAConnectionThatNobodyTakesStays(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	s, clock := clocked(t, config.ListenerLimits{IdleTimeout: time.Minute}, echo(t))
	p := s.dial()
	s.await(1)
	k := taken{offer: true}
	s.HandOver(k.give)
	s.settled()
	p.get("/")
	p.want(200, "GET / ", false)
	s.settled()
	if k.asked != 2 || s.Connections() != 1 || s.ended.Load() != 0 {
		t.Errorf("offered %d times, %d connections", k.asked, s.Connections())
	}
	s.HandOver(nil)
	p.get("/")
	p.want(200, "GET / ", false)
	s.settled()
	if k.asked != 2 {
		t.Error("it is offered although nobody wants it any more")
	}
	clock.Advance(time.Minute + granularity)
	p.wantEOF()
}

// TestAClientThatNeverPausesIsHandedOver: what it has sent already goes with it.
func TestAClientThatNeverPausesIsHandedOver(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	slow := make(chan struct{})
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		streamtest.Block(e.Loop(), tk, func() { <-slow })
		respond(t, tk, e, 200, e.Request().Target)
	}))
	request := func(n int) string { return fmt.Sprintf("GET /%d HTTP/1.1\r\nHost: a.test\r\n\r\n", n) }
	p := s.dial()
	p.send(request(1) + request(2) + request(3)[:10])
	eventually(t, "the first request", func() bool { return s.Requests() == 1 })
	k := taken{offer: true}
	s.HandOver(k.give)
	s.settled()
	slow <- struct{}{}
	p.want(200, "/1", false)
	asked := func() int {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.asked
	}
	eventually(t, "the second request, since nobody takes it", func() bool { return asked() > 0 && s.Requests() == 1 })
	if n := asked(); n != 1 {
		t.Errorf("it was offered %d times", n)
	}
	k.mu.Lock()
	k.offer = false
	k.mu.Unlock()
	slow <- struct{}{}
	p.want(200, "/2", false)
	got := k.wait(t, 1)[0]
	if string(got.Early) != request(3)[:10] {
		t.Errorf("with it comes %q", got.Early)
	}
	other := serve(t, noLimits, echo(t))
	streamtest.Do(other.loop, func() { other.Take(other.loop, got) })
	p.send(request(3)[10:])
	p.want(200, "GET /3 ", false)
}

// TestOneThatStaysStandsForAll: where there is no room for one there is none for the next.
func TestOneThatStaysStandsForAll(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "idle connections stay")
	s := serve(t, noLimits, echo(t))
	for range 10 {
		s.dial()
	}
	s.await(10)
	k := taken{offer: true}
	s.HandOver(k.give)
	s.settled()
	if k.asked != 1 || s.Connections() != 10 {
		t.Errorf("of %d connections %d were offered", s.Connections(), k.asked)
	}
	k.offer = false
	s.HandOver(k.give)
	k.wait(t, 10)
	s.wantOpen(0)
}

// TestWhatAnotherHasReadIsServed: bytes that come with a connection stand before what is
// read from it.
func TestWhatAnotherHasReadIsServed(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, echo(t))
	for _, early := range []string{"GET /a HT", "GET /a HTTP/1.1\r\nHost: a.test\r\n\r\n", "GET /a HTTP/1.1\r\nHost: a.test\r\n\r\nGET /b"} {
		ours, theirs := tcpPair(t)
		fd := release(t, ours)
		streamtest.Do(s.loop, func() { s.Serve(s.loop, stream.Passed{FD: fd, Early: []byte(early)}, remoteOf(theirs)) })
		p := newPeer(t, theirs)
		if strings.Contains(early, "\r\n\r\n") { // what is there needs nothing behind it
			p.want(200, "GET /a ", false)
			p.send(strings.TrimPrefix("GET /a HTTP/1.1\r\nHost: a.test\r\n\r\nGET /b HTTP/1.1\r\nHost: a.test\r\n\r\n", early))
			p.want(200, "GET /b ", false)
			continue
		}
		p.send(strings.TrimPrefix("GET /a HTTP/1.1\r\nHost: a.test\r\n\r\nGET /b HTTP/1.1\r\nHost: a.test\r\n\r\n", early))
		p.want(200, "GET /a ", false)
		p.want(200, "GET /b ", false)
	}
}

// TestNoRequestIsLostAtTheEndOfTheGrace sends requests around the instant at which
// idle connections are closed. What reached the server before is answered.
func TestNoRequestIsLostAtTheEndOfTheGrace(t *testing.T) {
	t.Parallel()
	s, clock := clocked(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { respond(t, tk, e, 200, "x") }))
	for range 20 {
		p := s.dial()
		s.await(1)
		s.Drain(0)
		streamtest.Do(s.loop, func() { // which has told of nothing when the time has come
			p.get("/")
			s.loop.SetClock(func() time.Time { return clock.Now().Add(granularity) })
		})
		if r, body := p.response("GET"); r.StatusCode != 200 || body != "x" {
			t.Errorf("got %d %q", r.StatusCode, body)
		}
		p.conn.Close()
		s.await(0)
		s.Resume()
		s.settled()
	}
}

func TestCloseCutsEverything(t *testing.T) {
	t.Parallel()
	over := make(chan error, 1)
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { over <- awaitOver(tk, e) }))
	idle, busy := s.dial(), s.dial()
	busy.get("/")
	eventually(t, "both connections", func() bool { return s.Connections() == 2 && s.Requests() == 1 })
	s.Server.Close()
	if err := await(t, "the end of the exchange", over); err != net.ErrClosed {
		t.Error(err)
	}
	idle.wantCut()
	busy.wantCut()
	s.dial().wantCut()
	eventually(t, "three ends", func() bool { return s.ended.Load() == 3 })
	s.Resume()
	s.settled()
	s.dial().send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	eventually(t, "a request", func() bool { return s.Requests() == 1 })
}

func TestIdleConnectionHoldsNoBuffer(t *testing.T) {
	withoutTLS(t, "it has what TLS needs")
	// Not parallel: it measures the heap.
	if size := unsafe.Sizeof(serverConn{}); size > 300 {
		t.Errorf("%d bytes of an idle connection", size)
	}
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) { respond(t, tk, e, 200, "x") }))
	heap := func() int64 {
		streamtest.Do(s.loop, s.loop.Trim)
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // the second one empties the pools
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const n = 100
	peers := make([]*peer, n)
	before := heap()
	for i := range peers {
		peers[i] = s.dial()
		peers[i].send("GET / HTTP/1.1\r\nHost: a.test\r\nX: " + strings.Repeat("x", 50<<10) + "\r\n\r\n")
		peers[i].want(200, "x", false)
	}
	eventually(t, "idle connections", func() bool { return s.Requests() == 0 })
	s.settled()
	// The test's own reader of 4 KiB and what the runtime keeps of its connection are
	// in this figure; the 64 KiB of a head are not.
	if each := (heap() - before) / n; each > 10<<10 {
		t.Errorf("%d bytes for an idle connection", each)
	}
	streamtest.Do(s.loop, func() {
		if tasks := s.loop.Tasks.Live(); tasks != 0 {
			t.Errorf("%d tasks", tasks)
		}
	})
	runtime.KeepAlive(peers)
}

func TestAPanicOverAConnectionsBytesCostsOnlyThatConnection(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, echo(t))
	s.options.Refused = func(exchange.Downstream, Refusal) { panic("tested") }
	p, other := s.dial(), s.dial()
	p.send("nonsense\r\n\r\n")
	p.wantCut()
	s.await(1)
	other.get("/")
	other.want(200, "GET / ", false)
}

// TestAPanicLeavesAnExchangeToWhoStillHasIt: another task may use it after that.
func TestAPanicLeavesAnExchangeToWhoStillHasIt(t *testing.T) {
	t.Parallel()
	var left exchange.Exchange
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if left == nil {
			left = e
			panic("tested")
		}
		left.Abort()
		respond(t, tk, e, 200, "x")
	}))
	p := s.dial()
	p.get("/")
	p.wantCut()
	s.await(0)
	p = s.dial()
	p.get("/")
	p.want(200, "x", false)
}

// TestAPanicOfAWatcherCostsOnlyItsConnection: it would end the loop, and the process.
func TestAPanicOfAWatcherCostsOnlyItsConnection(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		e.OnOver(watcherFunc(func(error) { tk.Wake(); panic("tested") }))
		tk.Wait()
	}))
	p := s.dial()
	p.get("/")
	eventually(t, "the request", func() bool { return s.Requests() == 1 })
	p.conn.Close()
	s.await(0)
}

func TestRefusalsDoNotLookAtMemoryOfOthers(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, echo(t))
	other := s.dial()
	s.await(1)
	p := s.dial()
	s.await(2)
	const mine, theirs = "GET /mine HTTP/1.1\r\nHost: a\r\nHost: b", "GET /theirs HTTP/1.1\r\nHost: a\r\n"
	p.send(mine)
	s.wantReceived(int64(len(mine)))
	other.send(theirs) // which moves what was read before
	s.wantReceived(int64(len(mine + theirs)))
	p.send("\r\n\r\n")
	if r := await(t, "the refusal", s.refused); r.Request.Target != "/mine" || r.Status != 400 {
		t.Errorf("got %d of %q", r.Status, r.Request.Target)
	}
}
