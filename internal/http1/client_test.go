package http1

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

// tcpPair returns the two ends of a connection.
func tcpPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := l.Accept()
		accepted <- conn
	}()
	a, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b = await(t, "accept", accepted)
	if b == nil {
		t.Fatal("accept failed")
	}
	return a, b
}

// testClient is a Conn with its upstream in the hands of the test.
type testClient struct {
	*Conn
	*peer
	idle chan *Conn
}

func dialClient(t *testing.T) *testClient {
	t.Helper()
	ours, theirs := tcpPair(t)
	idle := make(chan *Conn, 1)
	c := NewClient(ours, ClientOptions{OnIdle: func(c *Conn) { idle <- c }})
	t.Cleanup(func() { c.Close() })
	return &testClient{Conn: c, peer: newPeer(t, theirs), idle: idle}
}

func (c *testClient) begin() exchange.Upstream {
	c.t.Helper()
	e, err := c.Exchange()
	if err != nil {
		c.t.Fatal(err)
	}
	return e
}

// isIdle says whether the connection was handed back.
func (c *testClient) isIdle() bool {
	select {
	case <-c.idle:
		return true
	default:
		return false
	}
}

func getRequest() *exchange.Request {
	return &exchange.Request{Method: "GET", Authority: "a.test", Target: "/"}
}

// exchangeOf sends r and has the upstream answer with raw; "" if it has already.
func (c *testClient) exchangeOf(r *exchange.Request, raw string) (exchange.Upstream, *exchange.Response, string, error) {
	c.t.Helper()
	e := c.begin()
	if err := e.Send(r); err != nil {
		c.t.Fatal(err)
	}
	if raw != "" {
		c.send(raw)
	}
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
			if c.isIdle() != tt.reusable || c.Reusable() != tt.reusable || c.Alive() != tt.reusable {
				t.Errorf("reusable %v, alive %v; want %v", c.Reusable(), c.Alive(), tt.reusable)
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
	c.send("HTTP/1.1 200 OK\r\n\r\nhello")
	c.closeWrite()
	e, head, body, err := c.exchangeOf(getRequest(), "")
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
			if c.isIdle() || c.Reusable() {
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
			c.send(raw)
			c.closeWrite()
			e, _, _, err := c.exchangeOf(getRequest(), "")
			if exchange.StatusOf(err, 0) != 502 || errors.Is(err, exchange.ErrNoAnswer) {
				t.Errorf("error %v", err)
			}
			e.Close()
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
		if i == 0 && !c.Reusable() {
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
	for name, run := range map[string]func(*testClient, exchange.Upstream){
		"nothing sent":     func(_ *testClient, e exchange.Upstream) {},
		"nothing received": func(_ *testClient, e exchange.Upstream) { e.Send(getRequest()) },
		"a body not read":  func(c *testClient, e exchange.Upstream) { e.Send(getRequest()); c.send(ok); e.Receive() },
		"a body not read to its end": func(c *testClient, e exchange.Upstream) {
			e.Send(getRequest())
			c.send(ok)
			e.Receive()
			e.Read(make([]byte, 1))
		},
		"an answer before the request's end": func(c *testClient, e exchange.Upstream) {
			e.Send(&exchange.Request{Method: "POST", Target: "/", Authority: "a", ContentLength: 5})
			c.send(ok)
			e.Receive()
			io.Copy(io.Discard, e)
		},
		"bytes behind the answer": func(c *testClient, e exchange.Upstream) {
			e.Send(getRequest())
			c.send(ok + "HTTP/1.1 200 OK\r\n") // one packet: no look at the socket tells
			e.Receive()
			io.Copy(io.Discard, e)
		},
		"a refused upgrade": func(c *testClient, e exchange.Upstream) {
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
			if c.isIdle() || c.Reusable() || c.Alive() {
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
		"our end": func(c *testClient) { c.Conn.Close() },
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

func (c *testClient) conn() *net.TCPConn { return c.peer.conn.(*net.TCPConn) }

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
			end(c)
			eventually(t, "the end", func() bool { return !c.Alive() })
			e = c.begin()
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
	c.Conn.Close()
	defer conn.Close()
	if c.isIdle() || c.Reusable() {
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
