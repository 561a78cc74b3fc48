package http1

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

func getRequest() *exchange.Request {
	return &exchange.Request{Method: "GET", Authority: "a.test", Target: "/"}
}

// exchangeOf sends r and has the upstream answer with raw.
func (c *testClient) exchangeOf(r *exchange.Request, raw string) (*driven, *exchange.Response, string, error) {
	c.t.Helper()
	return c.exchangeThen(r, func() { c.send(raw) })
}

// exchangeThen sends r and has the upstream do something.
func (c *testClient) exchangeThen(r *exchange.Request, answer func()) (*driven, *exchange.Response, string, error) {
	c.t.Helper()
	e := c.begin()
	if err := e.Send(r); err != nil {
		c.t.Fatal(err)
	}
	answer()
	for {
		head, err := e.Receive()
		if err != nil {
			return e, nil, "", err
		}
		if head.Status < 200 && head.Status != 101 {
			continue
		}
		body, err := io.ReadAll(e)
		return e, head, string(body), err
	}
}

func TestRequestsAsTheyAreSent(t *testing.T) {
	t.Parallel()
	fields := exchange.Fields{{Name: "b", Value: "1"}, {Name: "A", Value: "2"}}
	keys76 := exchange.Fields{{Name: "Sec-WebSocket-Key1", Value: "1"}, {Name: "Sec-WebSocket-Key2", Value: "2"}}
	tests := []struct {
		name    string
		request exchange.Request
		body    []string
		want    string
	}{
		{"no body", exchange.Request{Method: "GET", Target: "/x?y", Fields: fields}, nil, lines("GET /x?y HTTP/1.1", "Host: a.test", "b: 1", "A: 2", "")},
		{"a POST without a body", exchange.Request{Method: "POST", Target: "/"}, nil, lines("POST / HTTP/1.1", "Host: a.test", "Content-Length: 0", "")},
		{"OPTIONS *", exchange.Request{Method: "OPTIONS", Target: "*"}, nil, lines("OPTIONS * HTTP/1.1", "Host: a.test", "")},
		{"a length", exchange.Request{Method: "POST", Target: "/", ContentLength: 5}, []string{"he", "llo"}, lines("POST / HTTP/1.1", "Host: a.test", "Content-Length: 5", "") + "hello"},
		{"chunked", exchange.Request{Method: "POST", Target: "/", ContentLength: -1}, []string{"he", "", "llo"}, lines("POST / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked", "", "2", "he", "3", "llo", "0", "ETag: v", "")},
		{"an upgrade to something else", exchange.Request{Method: "GET", Target: "/", Upgrade: "my-proto/2"}, nil, lines("GET / HTTP/1.1", "Host: a.test", "Connection: Upgrade", "Upgrade: my-proto/2", "")},
		{"a client that takes trailers", exchange.Request{Method: "POST", Target: "/", ContentLength: 5, TakesTrailers: true, Fields: fields}, []string{"hello"}, lines("POST / HTTP/1.1", "Host: a.test", "Connection: TE", "TE: trailers", "Content-Length: 5", "b: 1", "A: 2", "") + "hello"},
		{"an upgrade of one that takes trailers", exchange.Request{Method: "GET", Target: "/", Upgrade: "websocket", TakesTrailers: true}, nil, lines("GET / HTTP/1.1", "Host: a.test", "Connection: Upgrade", "Upgrade: websocket", "")},
		{"an upgrade", exchange.Request{Method: "GET", Target: "/", Upgrade: "websocket", HeadTail: []byte("12345678"), Fields: keys76}, nil, lines("GET / HTTP/1.1", "Host: a.test", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key1: 1", "Sec-WebSocket-Key2: 2", "") + "12345678"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e := c.begin()
			defer e.Close()
			tt.request.Authority = "a.test"
			if err := e.Send(&tt.request); err != nil {
				t.Fatal(err)
			}
			for _, s := range tt.body {
				if _, err := io.WriteString(e, s); err != nil {
					t.Fatal(err)
				}
			}
			if err := e.Finish(exchange.Fields{{Name: "ETag", Value: "v"}, {Name: "Host", Value: "b"}}); err != nil {
				t.Fatal(err)
			}
			c.wantBytes(tt.want)
		})
	}
}

func TestRequestsThatAreNotSent(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*exchange.Request){
		"a method that is no token":        func(r *exchange.Request) { r.Method = "G T" },
		"CONNECT":                          func(r *exchange.Request) { r.Method = "CONNECT" },
		"a target with a line end":         func(r *exchange.Request) { r.Target = "/\r\nX: y" },
		"a target with a space":            func(r *exchange.Request) { r.Target = "/ HTTP/1.1" },
		"a target without a slash":         func(r *exchange.Request) { r.Target = "x" },
		"no target":                        func(r *exchange.Request) { r.Target = "" },
		"no authority":                     func(r *exchange.Request) { r.Authority = "" },
		"an authority with a line end":     func(r *exchange.Request) { r.Authority = "a\r\nX: y" },
		"a field name with a colon":        func(r *exchange.Request) { r.Fields.Add("a:b", "c") },
		"a field value with a line end":    func(r *exchange.Request) { r.Fields.Add("a", "b\nc: d") },
		"a Host among the fields":          func(r *exchange.Request) { r.Fields.Add("host", "b.test") },
		"framing among the fields":         func(r *exchange.Request) { r.Fields.Add("Transfer-Encoding", "chunked") },
		"Connection among the fields":      func(r *exchange.Request) { r.Fields.Add("Connection", "close") },
		"an upgrade with a body":           func(r *exchange.Request) { r.Upgrade = "websocket"; r.ContentLength = 5 },
		"a tail without an upgrade":        func(r *exchange.Request) { r.HeadTail = []byte("12345678") },
		"a tail without its keys":          func(r *exchange.Request) { r.Upgrade = "websocket"; r.HeadTail = []byte("12345678") },
		"a length below -1":                func(r *exchange.Request) { r.ContentLength = -2 },
		"more fields than may be":          func(r *exchange.Request) { r.Fields = make(exchange.Fields, maxFields+maxAdded+1) },
		"an upgrade to something else":     func(r *exchange.Request) { r.Upgrade = "h2c" },
		"an upgrade that announced a body": func(r *exchange.Request) { r.Upgrade = "websocket"; r.UpgradeBody = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e := c.begin()
			r := getRequest()
			change(r)
			wantErr(t, e.Send(r))
			e.Close()
			c.wantEOF()
		})
	}
}

func TestResponsesAsTheyAreReceived(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, method, raw, body string
		reusable                bool
	}{
		{"a length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello", true},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n0\r\nETag: v\r\n\r\n", "hello", true},
		{"no body", "GET", "HTTP/1.1 204 No Content\r\n\r\n", "", true},
		{"HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "", true},
		{"after interim responses", "GET", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello", true},
		{"close", "GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", "hello", false},
		{"HTTP/1.0", "GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello", false},
		{"bytes behind the response", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\r\n", "hello", false},
		{"bytes behind an answer to HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			r := getRequest()
			r.Method = tt.method
			e, _, body, err := c.exchangeOf(r, tt.raw)
			if err != nil || body != tt.body {
				t.Fatalf("body %q, error %v", body, err)
			}
			e.Close()
			if idle := c.isIdle(); idle != tt.reusable || c.Alive() != tt.reusable {
				t.Errorf("handed back %v, alive %v; want %v", idle, c.Alive(), tt.reusable)
			}
			if e.Close(); c.isIdle() {
				t.Error("handed back twice")
			}
		})
	}
}

func TestResponseUntilTheConnectionEnds(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e, head, body, err := c.exchangeThen(getRequest(), func() {
		c.send("HTTP/1.1 200 OK\r\n\r\nhello")
		c.closeWrite()
	})
	if err != nil || body != "hello" || head.ContentLength != -1 {
		t.Errorf("body %q, error %v", body, err)
	}
	e.Close()
	if c.isIdle() {
		t.Error("handed back")
	}
}

func TestResponsesThatAreRefused(t *testing.T) {
	t.Parallel()
	upgrade := getRequest()
	upgrade.Upgrade = "websocket"
	for name, tt := range map[string]struct {
		request *exchange.Request
		raw     string
	}{
		"a malformed head":         {getRequest(), "HTTP/1.1 200 OK\r\nA : b\r\n\r\n"},
		"a head without end":       {getRequest(), "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("b", defaultHeadSize)},
		"a 101 unasked":            {getRequest(), "HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"},
		"a chunked 101":            {upgrade, "HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n"},
		"interim responses galore": {getRequest(), strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", maxInterim+1)},
		"malformed chunks":         {getRequest(), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e, _, _, err := c.exchangeOf(tt.request, tt.raw)
			if exchange.StatusOf(err, 0) != 502 {
				t.Errorf("error %v, want a 502", err)
			}
			e.Close()
			if c.isIdle() || c.Alive() {
				t.Error("handed back")
			}
			c.wantCut()
		})
	}
}

func TestResponsesThatAreCutShort(t *testing.T) {
	t.Parallel()
	for name, raw := range map[string]string{
		"in the head":     "HTTP/1.1 200",
		"in a length":     "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
		"in a chunk":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhell",
		"before the end":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"in the trailers": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e, _, _, err := c.exchangeThen(getRequest(), func() {
				c.send(raw)
				c.closeWrite()
			})
			if exchange.StatusOf(err, 0) != 502 || !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, exchange.ErrNoAnswer) {
				t.Errorf("error %v", err)
			}
			e.Close()
		})
	}
}

func TestResponseThatIsResetWithin(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e := c.begin()
	defer e.Close()
	if err := e.Send(getRequest()); err != nil {
		t.Fatal(err)
	}
	c.wantBytes("GET / HTTP/1.1\r\n")
	c.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell")
	if _, err := e.Receive(); err != nil {
		t.Fatal(err)
	}
	var body [4]byte
	if _, err := io.ReadFull(e, body[:]); err != nil {
		t.Fatal(err)
	}
	c.conn().SetLinger(0)
	c.conn().Close()
	for range 2 {
		if _, err := e.Read(body[:]); exchange.StatusOf(err, 0) != 502 || !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, exchange.ErrNoAnswer) ||
			!errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("error %v", err)
		}
	}
}

// What is no response is refused as soon as that is seen: there may be no end to wait for.
func TestWhatIsNoResponseIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{"<", "<html>hello", "HTTQ", "\r", "220 mail.test ESMTP"} {
		t.Run(raw, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e, _, _, err := c.exchangeThen(getRequest(), func() {
				c.send(raw)
				c.closeWrite() // which comes too late to be what is wrong
			})
			if exchange.StatusOf(err, 0) != 502 || errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("error %v", err)
			}
			e.Close()
			c.wantCut()
		})
	}
}

func TestReuse(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	for i := range 3 {
		e := c.begin()
		if e.Reused() != (i > 0) {
			t.Errorf("exchange %d: reused %v", i, e.Reused())
		}
		if _, err := c.Exchange(); err == nil {
			t.Error("two exchanges at once")
		}
		e.Close()
		if i == 0 && !c.Alive() {
			break
		}
	}
	c = dialClient(t)
	for i := range 3 {
		e, _, body, err := c.exchangeOf(getRequest(), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		if err != nil || body != "hi" || e.Reused() != (i > 0) {
			t.Fatalf("exchange %d: body %q, error %v, reused %v", i, body, err, e.Reused())
		}
		e.Close()
		if !c.isIdle() || !c.Alive() {
			t.Fatalf("exchange %d: not handed back", i)
		}
		_, err = e.Read(make([]byte, 1))
		if err != io.EOF {
			t.Errorf("read behind the end: %v", err)
		}
		_, err = e.Write([]byte("x"))
		wantErr(t, err)
	}
}

func TestIncompleteExchangesAreNotReused(t *testing.T) {
	t.Parallel()
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
	for name, run := range map[string]func(*testClient, *driven){
		"nothing sent":     func(*testClient, *driven) {},
		"nothing received": func(_ *testClient, e *driven) { e.Send(getRequest()) },
		"a body not read":  func(c *testClient, e *driven) { e.Send(getRequest()); c.send(ok); e.Receive() },
		"a body not read to its end": func(c *testClient, e *driven) {
			e.Send(getRequest())
			c.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nh")
			e.Receive()
			e.Read(make([]byte, 1))
		},
		"chunks not read to their end": func(c *testClient, e *driven) {
			e.Send(getRequest())
			c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n")
			e.Receive()
			e.Read(make([]byte, 2))
		},
		"an answer before the request's end": func(c *testClient, e *driven) {
			e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: 5})
			c.send(ok)
			e.Receive()
			io.Copy(io.Discard, e)
		},
		"a request with less than it announced": func(c *testClient, e *driven) {
			e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: 5})
			io.WriteString(e, "hell")
			e.Finish(nil)
			c.send(ok)
			e.Receive()
			io.Copy(io.Discard, e)
		},
		"bytes behind the answer": func(c *testClient, e *driven) {
			e.Send(getRequest())
			c.send(ok + "HTTP/1.1 200 OK\r\n") // one packet: no look at the socket tells
			e.Receive()
			io.Copy(io.Discard, e)
		},
		"a refused upgrade": func(c *testClient, e *driven) {
			r := getRequest()
			r.Upgrade = "websocket"
			e.Send(r)
			c.send(ok)
			e.Receive()
			io.Copy(io.Discard, e)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e := c.begin()
			run(c, e)
			e.Close()
			if c.isIdle() || c.Alive() {
				t.Error("handed back")
			}
			c.wantCut()
		})
	}
}

func TestAliveSeesWhatNobodyAskedFor(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*testClient){
		"bytes":   func(c *testClient) { c.send("HTTP/1.1 408 Request Timeout\r\n\r\n") },
		"the end": func(c *testClient) { c.closeWrite() },
		"a reset": func(c *testClient) { c.conn().SetLinger(0); c.conn().Close() },
		"our end": func(c *testClient) { c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			if !c.Alive() {
				t.Fatal("a fresh connection is dead")
			}
			change(c)
			eventually(t, "the change to be seen", func() bool { return !c.Alive() })
		})
	}
}

func TestConnectionThatEndsBeforeAnAnswer(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testClient){
		"properly":   func(c *testClient) { c.closeWrite() },
		"by a reset": func(c *testClient) { c.conn().SetLinger(0); c.conn().Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e, _, _, err := c.exchangeOf(getRequest(), "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if err != nil {
				t.Fatal(err)
			}
			e.Close()
			e = c.begin()
			end(c)
			err = e.Send(getRequest())
			if err == nil {
				_, err = e.Receive()
			}
			if !errors.Is(err, exchange.ErrNoAnswer) || !e.Reused() {
				t.Errorf("error %v, reused %v", err, e.Reused())
			}
			e.Close()
		})
	}
}

func TestCloseUnblocksBothSides(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e := c.begin()
	if err := e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: -1}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() {
		for {
			if _, err := e.Write(make([]byte, 1<<20)); err != nil {
				ended <- err
				return
			}
		}
	}()
	go func() {
		_, err := e.Receive()
		ended <- err
	}()
	c.wantBytes("POST / HTTP/1.1\r\n")
	e.Close()
	for range 2 {
		if err := await(t, "the end of Write or Receive", ended); errors.Is(err, exchange.ErrNoAnswer) {
			t.Errorf("%v is blamed on the upstream", err)
		}
	}
}

// TestAnswerWhileTheRequestIsHeldUp has an upstream that answers and stops reading.
func TestAnswerWhileTheRequestIsHeldUp(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e := c.begin()
	if err := e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: -1}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := e.Write(make([]byte, 64<<20)) // more than all buffers of the kernel
		ended <- err
	}()
	c.wantBytes("POST / HTTP/1.1\r\n")
	c.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno")
	head, err := e.Receive()
	if err != nil || head.Status != 413 {
		t.Errorf("head %+v, error %v", head, err)
	}
	if body, err := io.ReadAll(e); string(body) != "no" || err != nil {
		t.Errorf("body %q, error %v", body, err)
	}
	e.Close()
	wantErr(t, await(t, "the end of Write", ended))
}

// TestReceiveSendsTheHead has a request whose body comes later than the answer.
func TestReceiveSendsTheHead(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e := c.begin()
	defer e.Close()
	if err := e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: 2}); err != nil {
		t.Fatal(err)
	}
	received := make(chan error, 1)
	go func() {
		_, err := e.Receive()
		received <- err
	}()
	c.wantBytes("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
	c.send("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
	if err := await(t, "the answer", received); err != nil {
		t.Error(err)
	}
}

func TestUpstreamSwitch(t *testing.T) {
	t.Parallel()
	withoutTLS(t, "what was switched is used as it is")
	upgrade := getRequest()
	upgrade.Upgrade = "websocket"
	c := dialClient(t)
	e, head, _, err := c.exchangeOf(upgrade, "HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nX: y\r\n\r\nearly")
	if err != nil || head.Upgrade != "websocket" || len(head.Fields) != 1 {
		t.Fatalf("head %+v, error %v", head, err)
	}
	conn, early, err := e.Switch()
	if err != nil || string(early) != "early" {
		t.Fatalf("early %q, error %v", early, err)
	}
	e.Close() // no longer the exchange's
	c.Close()
	defer conn.Close()
	if c.isIdle() || c.Alive() {
		t.Error("handed back")
	}
	p := newPeer(t, conn)
	c.send("ping")
	p.wantBytes("ping")

	for name, raw := range map[string]string{
		"a bare 101":              "HTTP/1.1 101 S\r\n\r\n",
		"a 101 to something else": "HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"a refusal":               "HTTP/1.1 400 No\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := dialClient(t)
			e, head, _, err := c.exchangeOf(upgrade, raw)
			if err != nil || head.Upgrade == "websocket" {
				t.Fatalf("head %+v, error %v", head, err)
			}
			if _, _, err := e.Switch(); err == nil {
				t.Error("switched")
			}
			e.Close()
			c.wantCut()
		})
	}
}

// An upgrade to a protocol is answered by a 101 to the same one, or not at all.
func TestUpstreamSwitchToAnotherProtocol(t *testing.T) {
	t.Parallel()
	for token, agrees := range map[string]bool{"my-proto/2": true, "My-Proto/2": true, "websocket": false, "my-proto": false, "h2c": false} {
		upgrade := getRequest()
		upgrade.Upgrade = "my-proto/2"
		c := dialClient(t)
		e, head, sent, err := c.exchangeOf(upgrade, "HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: "+token+"\r\n\r\n")
		if err != nil || head.Status != 101 {
			t.Fatalf("head %+v, error %v, sent %v", head, err, sent)
		}
		conn, _, err := e.Switch()
		if (err == nil) != agrees {
			t.Errorf("%s: switched %v, want %v", token, err == nil, agrees)
		}
		if err == nil {
			conn.Close()
		}
		e.Close()
		c.Close()
	}
}

// A Conn whose connection was given away is as good as new, however it was used.
func TestASwitchedConnIsRenewed(t *testing.T) {
	t.Parallel()
	upgrade := getRequest()
	upgrade.Upgrade = "websocket"
	over := 0
	idle := make(chan *Conn, 100)
	c := dialClientFor(t, idle, ClientOptions{OnIdle: func(c *Conn) { idle <- c }, OnOver: func() { over++ }})
	e, _, _, err := c.exchangeOf(upgrade, "HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX: y\r\n\r\nearly")
	if err != nil {
		t.Fatal(err)
	}
	first, _, err := e.Switch()
	if err != nil || over != 0 {
		t.Fatalf("error %v, over %d times", err, over)
	}
	defer first.Close()
	e.Close()
	e.Close()
	if over != 1 {
		t.Fatalf("over %d times", over)
	}
	c = c.dialAgain(t)
	if e, head, body, err := c.exchangeOf(getRequest(), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"); err != nil || head.Status != 200 || body != "hi" {
		t.Errorf("head %+v, body %q, error %v", head, body, err)
	} else {
		e.Close()
	}
	if !c.isIdle() || !c.Alive() {
		t.Error("the connection is not kept")
	}
	if over != 1 {
		t.Errorf("over %d times", over)
	}
}

// An idle connection needs nobody who looks at it: what comes ends it.
func TestAnIdleConnectionEndsByItself(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*testClient){
		"bytes":   func(c *testClient) { c.send("HTTP/1.1 408 Request Timeout\r\n\r\n") },
		"the end": func(c *testClient) { c.closeWrite() },
		"a reset": func(c *testClient) { c.conn().SetLinger(0); c.conn().Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e, _, _, err := c.exchangeOf(getRequest(), "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if err != nil {
				t.Fatal(err)
			}
			e.Close()
			if !c.isIdle() || !c.isOpen() {
				t.Fatal("the connection was not kept")
			}
			change(c)
			eventually(t, "the end of the connection", func() bool { return !c.isOpen() })
			if _, err := c.Exchange(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("an exchange begins on it: %v", err)
			}
		})
	}
}

// Nothing of an exchange is left for the next one on the same connection.
func TestAnExchangeKnowsNothingOfTheOneBefore(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e, head, body, err := c.exchangeOf(getRequest(),
		"HTTP/1.1 200 First\r\nTransfer-Encoding: chunked\r\nA: b\r\nC: d\r\n\r\n5\r\nfirst\r\n0\r\nETag: v\r\n\r\n")
	if err != nil || body != "first" || len(head.Fields) != 2 || len(e.up.Trailers()) != 1 {
		t.Fatalf("%+v, %q, %v, trailers %v", head, body, err, e.up.Trailers())
	}
	e.Close()
	e = c.begin()
	if _, err := e.Receive(); err != errNotSent {
		t.Errorf("receive before the request: %v", err)
	}
	if _, err := e.Read(make([]byte, 1)); err != errNotFinal {
		t.Errorf("read before the response: %v", err)
	}
	if len(e.up.Trailers()) != 0 {
		t.Errorf("trailers before the response: %v", e.up.Trailers())
	}
	e.err = nil
	if err := e.Send(getRequest()); err != nil {
		t.Fatal(err)
	}
	c.send("HTTP/1.1 201 \r\nContent-Length: 6\r\n\r\nsecond")
	head, err = e.Receive()
	if err != nil || head.Status != 201 || head.Reason != "" || len(head.Fields) != 0 || head.ContentLength != 6 {
		t.Errorf("%+v, %v", head, err)
	}
	if body, err := io.ReadAll(e); string(body) != "second" || err != nil || len(e.up.Trailers()) != 0 {
		t.Errorf("%q, %v, trailers %v", body, err, e.up.Trailers())
	}
	e.Close()
}

// Ready tells what can leave together with the head.
func TestReadySaysWhetherTheBodyHasBegun(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		raw  string
		want bool
	}{
		"no body":        {"HTTP/1.1 204 N\r\n\r\n", true},
		"content":        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", true},
		"nothing yet":    {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", false},
		"framing":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n", false},
		"a chunk":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\no", true},
		"the last chunk": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dialClient(t)
			e := c.begin()
			defer e.Close()
			if err := e.Send(getRequest()); err != nil {
				t.Fatal(err)
			}
			c.send(tt.raw)
			if _, err := e.Receive(); err != nil {
				t.Fatal(err)
			}
			if got := e.ready(); got != tt.want {
				t.Errorf("ready: %v", got)
			}
		})
	}
}

// What Ready has found belongs to the response all the same.
func TestReadyTakesNothingAway(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e := c.begin()
	if err := e.Send(getRequest()); err != nil {
		t.Fatal(err)
	}
	c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nETag: v\r\n\r\n")
	if _, err := e.Receive(); err != nil {
		t.Fatal(err)
	}
	var body []byte
	for e.err == nil {
		e.ready()
		var p [1]byte
		n, _ := e.Read(p[:])
		body = append(body, p[:n]...)
	}
	if string(body) != "hi" || e.err != io.EOF || len(e.up.Trailers()) != 1 {
		t.Errorf("%q, %v, trailers %v", body, e.err, e.up.Trailers())
	}
	if e.Close(); !c.isIdle() {
		t.Error("the connection was not kept")
	}
}

func TestAnInterruptEndsTheExchangeWithItsReason(t *testing.T) {
	t.Parallel()
	c := dialClient(t)
	e := c.begin()
	if err := e.Send(getRequest()); err != nil {
		t.Fatal(err)
	}
	received := make(chan error, 1)
	go func() {
		_, err := e.Receive()
		received <- err
	}()
	c.wantBytes("GET / HTTP/1.1\r\n")
	why := errors.New("why")
	streamtest.Do(c.loop, func() { c.Interrupt(why) })
	if err := await(t, "the end of Receive", received); err != why {
		t.Errorf("got %v", err)
	}
	e.Close()
	if c.isIdle() {
		t.Error("handed back")
	}
	c.wantCut()
}

// An upstream may answer what it does not read. The connection is of no use then.
func TestAnswerToARequestThatCannotBeSent(t *testing.T) {
	t.Parallel()
	for name, finish := range map[string]bool{"and is finished": true, "and is not": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := streamtest.New(t)
			idle := false
			c, theirs := adoptClient(t, l, ClientOptions{OnIdle: func(*Conn) { idle = true }})
			e := &driven{t: t, loop: l}
			streamtest.Do(l, func() { e.up, _ = c.Exchange() })
			if err := unix.Shutdown(theirs, unix.SHUT_RD); err != nil {
				t.Fatal(err)
			}
			p := newPeer(t, connOf(t, theirs))
			p.send("HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno")
			if err := e.Send(getRequest()); !errors.Is(err, unix.EPIPE) {
				t.Errorf("send: %v", err)
			}
			if finish {
				e.Finish(nil)
			}
			head, err := e.Receive()
			if err != nil || head.Status != 503 {
				t.Fatalf("%+v, %v", head, err)
			}
			if body, err := io.ReadAll(e); string(body) != "no" || err != nil {
				t.Errorf("%q, %v", body, err)
			}
			if e.Close(); idle {
				t.Error("handed back")
			}
			p.wantCut()
		})
	}
}

// What an exchange holds is there for others when it is closed, whatever has become of it.
func TestCloseGivesBuffersBack(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	c, theirs := adoptClient(t, l, ClientOptions{})
	e := &driven{t: t, loop: l}
	streamtest.Do(l, func() { e.up, _ = c.Exchange() })
	p := newPeer(t, connOf(t, theirs))
	if err := e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: 2}); err != nil {
		t.Fatal(err)
	}
	p.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	if _, err := e.Receive(); err != nil {
		t.Fatal(err)
	}
	streamtest.Do(l, func() {
		held := e.up.(*clientExchange).out.take()
		e.up.(*clientExchange).out.held = held
		text := e.up.(*clientExchange).text
		e.up.Close()
		a, b := l.Buffer(1), l.Buffer(1)
		if &b[0] != &text[0] || &a[0] != &held[:1][0] {
			t.Error("the buffers are not those of the loop")
		}
		l.Release(a)
		l.Release(b)
	})
}

// A head that the upstream does not take is not overtaken by the body, whoever sends it.
func TestTheBodyWaitsForTheHead(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	c, theirs := adoptClient(t, l, ClientOptions{})
	var up exchange.Upstream
	var err error
	streamtest.Do(l, func() {
		if err = unix.SetsockoptInt(c.conn.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10); err == nil {
			up, err = c.Exchange()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &exchange.Request{Method: "POST", Target: "/", Authority: "a.test", ContentLength: 4}
	for range 50 {
		r.Fields.Add("long", strings.Repeat("x", 1<<10))
	}
	e := &driven{t: t, loop: l, up: up}
	if err := e.Send(r); err != nil {
		t.Fatal(err)
	}
	receives := streamtest.Begin(l, func(task *task.Task) {
		if r, err := up.Receive(task); err != nil || r.Status != 204 {
			t.Errorf("receive: %+v, %v", r, err)
		}
	})
	writes := streamtest.Begin(l, func(task *task.Task) {
		if err := errors.Join(up.Write(task, []byte("body")), up.Finish(task, nil)); err != nil {
			t.Errorf("send: %v", err)
		}
	})
	p := newPeer(t, connOf(t, theirs))
	want, err := appendRequest(nil, r)
	if err != nil {
		t.Fatal(err)
	}
	p.wantBytes(string(want) + "body")
	p.send("HTTP/1.1 204 N\r\n\r\n")
	await(t, "the end of the request", writes)
	await(t, "the response", receives)
	e.Close()
}

// listenFully returns a unix socket whose queue is full, and how to take one out of it.
func listenFully(t *testing.T) (path string, accept func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		var waits int
		if waits, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(waits) })
		err = unix.Connect(waits, &unix.SockaddrUnix{Name: path})
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	return path, func() {
		if taken, _, err := unix.Accept(fd); err != nil {
			t.Error(err)
		} else {
			unix.Close(taken)
		}
	}
}

// A unix socket with a full queue refuses who does not wait in connect(2).
func TestDiallingAUnixSocketWaitsForRoomInItsQueue(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	clock := streamtest.NewClock(l)
	path, accept := listenFully(t)
	dial := func(c *Conn, path string, until time.Time) (ended <-chan struct{}, err *error) {
		err = new(error)
		return streamtest.Begin(l, func(t *task.Task) {
			*err = c.DialUnix(t, l, path, &stream.DialOptions{Until: until})
		}), err
	}
	c := NewClient(ClientOptions{})
	ended, err := dial(c, path, time.Time{})
	streamtest.Do(l, accept)
	clock.Advance(time.Second)
	if await(t, "the connection", ended); *err != nil {
		t.Errorf("there is room: %v", *err)
	}
	streamtest.Do(l, c.Close)

	full, _ := listenFully(t)
	ended, err = dial(NewClient(ClientOptions{}), full, clock.Now().Add(time.Millisecond))
	clock.Advance(time.Second)
	if await(t, "the deadline", ended); !errors.Is(*err, os.ErrDeadlineExceeded) {
		t.Errorf("there is no room in time: %v", *err)
	}

	why := errors.New("why") // and the time stands still
	c = NewClient(ClientOptions{})
	ended, err = dial(c, full, time.Time{})
	streamtest.Do(l, func() { c.Interrupt(why) })
	if await(t, "the interrupt", ended); *err != why {
		t.Errorf("interrupted: %v", *err)
	}
	ended, err = dial(c, full, time.Time{})
	if await(t, "the interrupt", ended); *err != why {
		t.Errorf("interrupted before: %v", *err)
	}
}

// Who dials in vain is told why, and owns nothing.
func TestDialling(t *testing.T) {
	t.Parallel()
	l := streamtest.New(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := addrOf(ln)
	ended := 0
	dial := func() (c *Conn, err error) {
		c = NewClient(ClientOptions{OnEnd: func(bool) { ended++ }})
		streamtest.Go(l, func(t *task.Task) { err = c.Dial(t, l, to, new(stream.DialOptions)) })
		return c, err
	}
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	streamtest.Do(l, c.Close)
	ln.Close()
	c, err = dial()
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	if _, err := c.Exchange(); err == nil || c.Alive() {
		t.Errorf("an exchange: %v, alive: %v", err, c.Alive())
	}
	if c.Close(); ended != 1 {
		t.Errorf("%d connections have ended, want 1", ended)
	}
}
