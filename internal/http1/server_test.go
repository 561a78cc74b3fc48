package http1

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
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
	s := serve(t, config.ListenerLimits{HeadSize: 100 << 10}, handlerFunc(func(e exchange.Exchange) {
		v, _ := e.Request().Fields.Get("X")
		respond(t, e, 200, fmt.Sprint(len(v)))
	}))
	p := s.dial()
	for _, n := range []int{1, 4000, 5000, 17000, 70000, 102000} {
		p.send("GET / HTTP/1.1\r\nHost: a.test\r\nX: " + strings.Repeat("x", n) + "\r\n\r\n")
		p.want(200, fmt.Sprint(n), false)
	}
	p.send("GET / HTTP/1.1\r\nHost: a.test\r\nX: " + strings.Repeat("x", 103000) + "\r\n\r\n")
	p.want(431, "", true)
}

func TestRefusalsReachAClientThatIsStillSending(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{BodySize: 1000}, handlerFunc(func(e exchange.Exchange) {
		_, err := io.Copy(io.Discard, e)
		respond(t, e, exchange.StatusOf(err, 200), "refused")
	}))
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

// pipe serves one end of an in-memory connection, for tests of time.
func pipe(t *testing.T, limits config.ListenerLimits, h exchange.Handler) (*Server, *peer) {
	t.Helper()
	ours, theirs := net.Pipe()
	s := NewServer(ServerOptions{Limits: limits, Scheme: "http", Handler: h, Log: quiet()})
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(ours, exchange.Downstream{}) })
	t.Cleanup(wg.Wait)
	p := newPeer(t, theirs)
	theirs.SetDeadline(time.Time{})
	return s, p
}

func TestHeadThatComesTooSlowly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, p := pipe(t, config.ListenerLimits{HeadTimeout: 5 * time.Second, IdleTimeout: time.Hour}, echo(t))
		time.Sleep(time.Minute) // silence costs nothing
		begin := time.Now()
		p.send("GET / HT")
		time.Sleep(3 * time.Second)
		p.send("TP/1.1\r\n")
		p.want(408, "", true)
		p.wantEOF()
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("answered after %v", d)
		}
	})
}

func TestIdleConnectionIsClosedWithoutAWord(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, p := pipe(t, config.ListenerLimits{IdleTimeout: 5 * time.Second}, echo(t))
		time.Sleep(4 * time.Second)
		p.get("/")
		p.want(200, "", false)
		begin := time.Now()
		p.wantEOF()
		if d := time.Since(begin); d < 5*time.Second || d > 5*time.Second+lookTime {
			t.Errorf("closed after %v", d)
		}
	})
}

func TestBodyThatComesTooSlowly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, p := pipe(t, config.ListenerLimits{BodyTimeout: 5 * time.Second, HeadTimeout: time.Second}, handlerFunc(func(e exchange.Exchange) {
			_, err := io.Copy(io.Discard, e)
			respond(t, e, exchange.StatusOf(err, 200), "late")
		}))
		p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
		for range 3 { // each byte has its own time
			time.Sleep(4 * time.Second)
			p.send("x")
		}
		begin := time.Now()
		p.want(408, "late", true)
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("answered after %v", d)
		}
	})
}

func TestInterimHeadThatTheClientDoesNotTakeEndsTheExchange(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		request string
		send    func(exchange.Exchange) error
	}{
		"100 before the body is read": {
			"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
			func(e exchange.Exchange) error { _, err := e.Read(make([]byte, 1)); return err },
		},
		"103 from the upstream": {
			"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
			func(e exchange.Exchange) error { return e.Inform(&exchange.Response{Status: 103}) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ended := make(chan error, 1)
				_, p := pipe(t, noLimits, handlerFunc(func(e exchange.Exchange) {
					err := tt.send(e)
					if err != nil && e.Context().Err() == nil {
						t.Errorf("failed with %v, but the exchange goes on", err)
					}
					ended <- err
				}))
				p.send(tt.request)
				select {
				case err := <-ended:
					if err == nil {
						t.Error("it was sent to a client that does not read")
					}
				case <-time.After(time.Minute):
					t.Error("it waits for the client without end")
				}
			})
		})
	}
}

func TestHandlerLearnsThatTheClientHasGone(t *testing.T) {
	t.Parallel()
	const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	const post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
	for name, tt := range map[string]struct {
		request string
		leave   func(*peer)
	}{
		"close":                        {get, func(p *peer) { p.conn.Close() }},
		"half-close":                   {get, func(p *peer) { p.closeWrite() }},
		"reset":                        {get, func(p *peer) { p.conn.(*net.TCPConn).SetLinger(0); p.conn.Close() }},
		"close after a body":           {post, func(p *peer) { p.conn.Close() }},
		"half-close behind pipelining": {get + get, func(p *peer) { p.closeWrite() }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			called, gone := make(chan struct{}), make(chan error, 1)
			s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
				io.Copy(io.Discard, e)
				close(called)
				select {
				case <-e.Context().Done():
					gone <- e.Respond(&exchange.Response{Status: 200})
				case <-time.After(patience):
					gone <- nil
				}
			}))
			p := s.dial()
			p.send(tt.request)
			await(t, "the handler", called)
			tt.leave(p)
			if err := await(t, "the end of the context", gone); err == nil {
				t.Error("the exchange goes on")
			}
		})
	}
}

// TestFinishBehindAClientThatHasEverything has a client that leaves between the
// last byte and Finish: its response is complete.
func TestFinishBehindAClientThatHasEverything(t *testing.T) {
	t.Parallel()
	finished := make(chan error, 1)
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		e.Respond(&exchange.Response{Status: 200, ContentLength: 1})
		io.WriteString(e, "x")
		<-e.Context().Done()
		finished <- e.Finish(nil)
	})).dial()
	p.get("/")
	p.want(200, "x", false)
	p.conn.Close()
	if err := await(t, "the handler", finished); err != nil {
		t.Error(err)
	}
}

func TestContextEndsWithTheHandler(t *testing.T) {
	t.Parallel()
	contexts := make(chan context.Context, 1)
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		contexts <- e.Context()
		respond(t, e, 200, "x")
	})).dial()
	p.get("/")
	p.want(200, "x", false)
	await(t, "the end of the context", (<-contexts).Done())
}

func TestPipelinedBytesThatTheWatchReadAreServed(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		<-release
		respond(t, e, 200, e.Request().Target)
	})).dial()
	// More than the watch keeps: it stops, and the kernel holds the rest.
	const n = 500
	p.get("/first")
	for i := range n {
		p.get(fmt.Sprint("/", i))
	}
	close(release)
	p.want(200, "/first", false)
	for i := range n {
		p.want(200, fmt.Sprint("/", i), false)
	}
}

func TestBodilessResponses(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		var status int
		var length int64
		fmt.Sscanf(e.Request().Target, "/%d/%d", &status, &length)
		if err := e.Respond(&exchange.Response{Status: status, ContentLength: length}); err != nil {
			t.Error(err)
		}
		if e.Request().Method == "HEAD" {
			if _, err := io.WriteString(e, "not sent"); err != nil {
				t.Error(err)
			}
		} else if _, err := io.WriteString(e, "not sent"); err == nil {
			t.Error("a body was written")
		}
		if err := e.Finish(exchange.Fields{{Name: "ETag", Value: "v"}}); err != nil {
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
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		r := &exchange.Response{Status: 200, ContentLength: -1, Fields: exchange.Fields{{Name: "Date", Value: "today"}}}
		if e.Respond(r) != nil || e.Flush() != nil {
			t.Error("respond")
		}
		<-release
		io.WriteString(e, "one")
		<-release
		io.WriteString(e, strings.Repeat("x", coalesce+1))
		trailers := exchange.Fields{{Name: "ETag", Value: "v"}, {Name: "Content-Type", Value: "dropped"}, {Name: "Digest", Value: "a\r\nb"}}
		if err := e.Finish(trailers); err != nil {
			t.Error(err)
		}
	}))
	p := s.dial()
	p.get("/")
	p.wantBytes(lines("HTTP/1.1 200 ", "Transfer-Encoding: chunked", "Date: today", ""))
	release <- struct{}{}
	p.wantBytes(lines("3", "one"))
	release <- struct{}{}
	p.wantBytes(lines("1001", strings.Repeat("x", coalesce+1), "0", "ETag: v", ""))

	p.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n")
	p.wantBytes(lines("HTTP/1.1 200 ", "Connection: close", "Date: today", ""))
	close(release)
	p.wantBytes("one" + strings.Repeat("x", coalesce+1))
	p.wantEOF()
}

func TestResponsesThatTheHandlerLeavesUnfinished(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		version string
		handler handlerFunc
		reset   bool
	}{
		"no response": {"1.1", func(exchange.Exchange) {}, false},
		"a panic":     {"1.1", func(exchange.Exchange) { panic("tested") }, false},
		"too few bytes": {"1.1", func(e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: 5})
			io.WriteString(e, "x")
			wantErr(t, e.Finish(nil))
		}, false},
		"too many bytes": {"1.1", func(e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: 5})
			_, err := io.WriteString(e, "too long")
			wantErr(t, err)
		}, false},
		"no last chunk": {"1.1", func(e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			io.WriteString(e, "x")
		}, false},
		"no end": {"1.0", func(e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			io.WriteString(e, "x")
		}, true},
		"aborted": {"1.1", func(e exchange.Exchange) {
			e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
			io.WriteString(e, "x")
			e.Abort()
			wantErr(t, e.Finish(nil))
		}, false},
		"a bad field name": {"1.1", func(e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "a b", Value: "c"}}}))
		}, false},
		"a split response": {"1.1", func(e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "a", Value: "b\r\nc: d"}}}))
		}, false},
		"framing in fields": {"1.1", func(e exchange.Exchange) {
			wantErr(t, e.Respond(&exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "content-length", Value: "5"}}}))
		}, false},
		"an interim final": {"1.1", func(e exchange.Exchange) { wantErr(t, e.Respond(&exchange.Response{Status: 101})) }, false},
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
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		if e.Request().Target == "/refuse" {
			respond(t, e, 403, "no")
			return
		}
		echo(t)(e)
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

func TestInterimResponses(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		if err := e.Inform(&exchange.Response{Status: 103, Reason: "Early Hints", Fields: exchange.Fields{{Name: "Link", Value: "x"}}}); err != nil {
			t.Error(err)
		}
		wantErr(t, e.Inform(&exchange.Response{Status: 101}))
		wantErr(t, e.Inform(&exchange.Response{Status: 200}))
		respond(t, e, 200, "x")
		wantErr(t, e.Inform(&exchange.Response{Status: 103}))
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
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		if e.Request().Target == "/stop" {
			e.StopReading()
		}
		respond(t, e, 200, "early")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10000\r\n\r\n" + strings.Repeat("x", 10000))
	p.want(200, "early", false)
	p.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
	p.want(200, "early", false)
	p.send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nx", leftoverBytes+2))
	p.want(200, "early", false) // too much to read: the end comes unannounced
	p.closeWrite()
	p.wantEOF()
	p = s.dial()
	p.send("POST /stop HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
	p.want(200, "early", true)
	p.closeWrite()
	p.wantEOF()
}

func TestManySmallChunksAreReadAtOnce(t *testing.T) {
	t.Parallel()
	const chunks = 3000
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		buf, total, reads := make([]byte, 32<<10), 0, 0
		for err := error(nil); err == nil; reads++ {
			var n int
			n, err = e.Read(buf)
			total += n
		}
		if total != chunks || reads > chunks/10 {
			t.Errorf("%d bytes in %d reads", total, reads)
		}
		respond(t, e, 200, "")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nx\r\n", chunks) + "0\r\n\r\n")
	p.want(200, "", false)
}

func TestStopReadingEndsARead(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{BodyTimeout: time.Hour}, handlerFunc(func(e exchange.Exchange) {
		begun, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			io.ReadFull(e, make([]byte, 2))
			close(begun)
			_, err := e.Read(make([]byte, 10))
			ended <- err
		}()
		await(t, "two bytes", begun)
		e.StopReading()
		wantErr(t, await(t, "the end of Read", ended))
		_, err := e.Read(make([]byte, 10))
		wantErr(t, err)
		if e.Context().Err() != nil {
			t.Error("the exchange is over")
		}
		respond(t, e, 413, "enough")
	}))
	p := s.dial()
	p.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe")
	p.want(413, "enough", true)
}

func TestAbortUnblocksAWrite(t *testing.T) {
	t.Parallel()
	blocked := make(chan exchange.Exchange, 1)
	ended := make(chan error, 1)
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		blocked <- e
		for {
			if _, err := e.Write(make([]byte, 1<<20)); err != nil {
				ended <- err
				return
			}
		}
	})).dial()
	p.get("/")
	e := await(t, "the handler", blocked)
	e.Abort()
	await(t, "the end of Write", ended)
	p.wantCut()
}

const upgradeRequest = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"

func TestSwitch(t *testing.T) {
	t.Parallel()
	held := make(chan struct{})
	conns := make(chan net.Conn, 1)
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		<-held
		conn, head, early, err := e.Switch(&exchange.Response{Status: 101, Reason: "Switching Protocols", Upgrade: "websocket",
			Fields: exchange.Fields{{Name: "Sec-WebSocket-Accept", Value: "x"}}})
		if err != nil || string(early) != "early" {
			t.Errorf("early %q, error %v", early, err)
			return
		}
		conn.Write(head)
		conns <- conn
	}))
	p := s.dial()
	p.send(upgradeRequest + "\r\nearly")
	eventually(t, "the request", func() bool { return s.Requests() == 1 })
	// The bytes may still be on their way to the watch; a second look comes with them.
	time.AfterFunc(50*time.Millisecond, func() { close(held) })
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

func TestSwitchWithManyEarlyBytes(t *testing.T) {
	t.Parallel()
	const n = 1 << 20
	type result struct {
		early int
		total int
	}
	results := make(chan result, 1)
	full := make(chan struct{})
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		<-full
		c := e.(*serverExchange).c
		c.mu.Lock()
		watch := c.watching
		c.mu.Unlock()
		<-watch // it has enough
		conn, _, early, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
		if err != nil {
			t.Error(err)
			return
		}
		rest, _ := io.ReadAll(conn)
		conn.Close()
		results <- result{len(early), len(early) + len(rest)}
	})).dial()
	p.send(upgradeRequest + "\r\n")
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		p.send(strings.Repeat("x", n/2))
		close(full)
		p.send(strings.Repeat("x", n/2))
		p.closeWrite()
	})
	if r := await(t, "the switch", results); r.early > 64<<10 || r.total != n {
		t.Errorf("%d early bytes of %d", r.early, r.total)
	}
}

func TestSwitchFailsForAClientThatHasGone(t *testing.T) {
	t.Parallel()
	ended := make(chan error, 1)
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		<-e.Context().Done()
		_, _, _, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
		ended <- err
	})).dial()
	p.send(upgradeRequest + "\r\n")
	p.closeWrite()
	wantErr(t, await(t, "the handler", ended))
	p.wantEOF()
}

func TestSwitchIsOnlyForUpgrades(t *testing.T) {
	t.Parallel()
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		e.Request().Upgrade = "websocket" // the handler's wish changes nothing
		e.Request().UpgradeBody = false
		_, _, _, err := e.Switch(&exchange.Response{Status: 101, Upgrade: "websocket"})
		wantErr(t, err)
	}))
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		upgradeRequest + "Content-Length: 1\r\n\r\nx",
	} {
		p := s.dial()
		p.send(request)
		p.wantCut()
	}
}

func TestNothingIsServedBehindARefusedUpgrade(t *testing.T) {
	t.Parallel()
	p := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) { respond(t, e, 403, e.Request().Target) })).dial()
	p.send(upgradeRequest + "\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
	p.want(403, "/ws", true)
	p.closeWrite()
	p.wantEOF()
}

func TestDraft76(t *testing.T) {
	t.Parallel()
	s := serve(t, config.ListenerLimits{HeadTimeout: patience}, handlerFunc(func(e exchange.Exchange) {
		respond(t, e, 403, string(e.Request().HeadTail))
	}))
	const head = upgradeRequest + "Sec-WebSocket-Key1: a\r\nSec-WebSocket-Key2: b\r\n\r\n"
	for split := range draft76Tail + 1 {
		p := s.dial()
		p.send(head + "12345678"[:split])
		p.send("12345678"[split:] + "GET /")
		p.want(403, "12345678", true)
	}
	synctest.Test(t, func(t *testing.T) {
		_, p := pipe(t, config.ListenerLimits{HeadTimeout: time.Second}, echo(t))
		p.send(head)
		p.send("1234567")
		p.want(408, "", true)
	})
}

func TestDrain(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		if e.Request().Target == "/slow" {
			<-release
		}
		respond(t, e, 200, "x")
	}))
	silent, idle, late, busy := s.dial(), s.dial(), s.dial(), s.dial()
	idle.get("/")
	idle.want(200, "x", false)
	late.get("/")
	late.want(200, "x", false)
	busy.get("/slow")
	eventually(t, "all connections", func() bool { return s.Connections() == 4 && s.Requests() == 1 })

	begin := time.Now()
	const grace = 500 * time.Millisecond
	s.Drain(grace)
	late.get("/")
	late.want(200, "x", true)
	fresh := s.dial()
	fresh.get("/")
	fresh.want(200, "x", true)
	fresh.conn.Close()
	late.conn.Close()
	idle.wantEOF()
	silent.wantEOF()
	if d := time.Since(begin); d < grace {
		t.Errorf("idle connections were closed after %v", d)
	}
	close(release)
	busy.want(200, "x", true)
	busy.conn.Close()
	eventually(t, "the last connection", func() bool { return s.Connections() == 0 })
}

func TestDrainAndResume(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, p := pipe(t, config.ListenerLimits{IdleTimeout: time.Hour}, echo(t))
		synctest.Wait()
		s.Drain(time.Minute)
		time.Sleep(30 * time.Second)
		s.Resume()
		time.Sleep(time.Minute)
		p.get("/")
		p.want(200, "", false)
		s.Drain(time.Minute)
		begin := time.Now()
		p.wantEOF()
		if d := time.Since(begin); d < time.Minute || d > time.Minute+lookTime {
			t.Errorf("closed after %v", d)
		}
	})
}

// TestNoRequestIsLostAtTheEndOfTheGrace sends requests around the instant at which
// idle connections are closed. What reached the server before is answered.
func TestNoRequestIsLostAtTheEndOfTheGrace(t *testing.T) {
	t.Parallel()
	for range 20 {
		s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) { respond(t, e, 200, "x") }))
		p := s.dial()
		eventually(t, "the connection", func() bool { return s.Connections() == 1 })
		p.get("/")
		s.Drain(0) // the request is in the kernel: loopback delivers before send returns
		if r, body := p.response("GET"); r.StatusCode != 200 || body != "x" {
			t.Errorf("got %d %q", r.StatusCode, body)
		}
	}
}

func TestCloseCutsEverything(t *testing.T) {
	t.Parallel()
	cancelled := make(chan struct{})
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) {
		<-e.Context().Done()
		close(cancelled)
	}))
	idle, busy := s.dial(), s.dial()
	busy.get("/")
	eventually(t, "both connections", func() bool { return s.Connections() == 2 && s.Requests() == 1 })
	s.Server.Close()
	await(t, "the end of the context", cancelled)
	idle.wantCut()
	busy.wantCut()
	s.dial().wantCut()
}

func TestIdleConnectionHoldsNoBuffer(t *testing.T) {
	// Not parallel: it measures the heap.
	s := serve(t, noLimits, handlerFunc(func(e exchange.Exchange) { respond(t, e, 200, "x") }))
	heap := func() int64 {
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
	// The test's own reader of 4 KiB and what the runtime keeps of a connection are
	// in this figure; the 64 KiB of a head are not.
	if each := (heap() - before) / n; each > 16<<10 {
		t.Errorf("%d bytes for an idle connection", each)
	}
	runtime.KeepAlive(peers)
}

// panicking is a connection whose bytes no code can stand.
type panicking struct{ net.Conn }

func (panicking) Read([]byte) (int, error) { panic("tested") }

func TestAPanicOverAConnectionsBytesCostsOnlyThatConnection(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	defer theirs.Close()
	s := NewServer(ServerOptions{Scheme: "http", Handler: echo(t), Log: quiet()})
	s.Serve(panicking{ours}, exchange.Downstream{}) // would end the test, and a process with all its tunnels
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection is still open: %v", err)
	}
	if n := s.Connections(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}
