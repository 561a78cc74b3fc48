package http2

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/task"
)

func TestARequestIsSentAsItIs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		r    exchange.Request
		want []string // beside :authority and :scheme, sorted
	}{
		{"a path that is encoded", *get("/a%2Fb/%E4?x=%20y&z"), []string{":method: GET", ":path: /a%2Fb/%E4?x=%20y&z"}},
		{"two slashes", *get("//a.test/b?c"), []string{":method: GET", ":path: //a.test/b?c"}},
		{"two slashes alone", *get("//"), []string{":method: GET", ":path: //"}},
		{"what looks like the URL", *get("/http://a.test/b"), []string{":method: GET", ":path: /http://a.test/b"}},
		{"an empty query", *get("/a?"), []string{":method: GET", ":path: /a?"}},
		{"bytes that Go would escape", *get(`/a"<>\^{|}`), []string{":method: GET", `:path: /a"<>\^{|}`}},
		{"the server itself", exchange.Request{Method: "OPTIONS", Target: "*", Authority: "a.test"}, []string{":method: OPTIONS", ":path: *"}},
		{"fields", exchange.Request{Method: "GET", Target: "/", Authority: "a.test", TakesTrailers: true, Fields: exchange.Fields{
			{Name: "X-B", Value: "1"}, {Name: "x-b", Value: "2"}, {Name: "User-Agent", Value: "me"}, {Name: "Cookie", Value: "a=1; b=2"}, {Name: "Accept-Encoding", Value: "br"},
		}}, []string{":method: GET", ":path: /", "accept-encoding: br", "cookie: a=1", "cookie: b=2", "te: trailers", "user-agent: me", "x-b: 1", "x-b: 2"}},
		{"no content where one is usual", exchange.Request{Method: "POST", Target: "/", Authority: "a.test"}, []string{":method: POST", ":path: /", "content-length: 0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			v := converse(t, ClientOptions{})
			v.exchange().send(&c.r)
			_, head, end := v.request()
			slices.Sort(head)
			want := append([]string{":authority: a.test", ":scheme: http"}, c.want...)
			slices.Sort(want)
			if !slices.Equal(head, want) || !end {
				t.Errorf("got %q, end %v, want %q", head, end, want)
			}
		})
	}
}

// The memory of a request is another one's when its exchange is over, but the library's table of
// fields lives as long as the connection.
func TestNothingOfARequestIsKept(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	memory := make([]byte, 64)
	for i := range 500 {
		var texts exchange.Texts
		texts.Use(memory)
		letter := string(rune('a' + i%26))
		value := strings.Repeat(letter, i%7+1)
		r := &exchange.Request{Method: texts.Join("GET"), Target: texts.Join("/", value), Authority: texts.Join(letter, ".test"), Fields: exchange.Fields{
			{Name: texts.Join("X-", letter), Value: texts.Join(value)},
		}}
		d := v.exchange()
		d.send(r)
		id, head, _ := v.request()
		slices.Sort(head)
		if want := []string{":authority: " + letter + ".test", ":method: GET", ":path: /" + value, ":scheme: http", "x-" + letter + ": " + value}; !slices.Equal(head, want) {
			t.Fatalf("got %q, want %q", head, want)
		}
		v.head(id, true, ":status: 200")
		d.status(200)
		d.close()
	}
}

func TestWhatCannotBeSentIsNot(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	change := func(fn func(*exchange.Request)) *exchange.Request {
		r := get("/")
		fn(r)
		return r
	}
	for name, r := range map[string]*exchange.Request{
		"a method":            change(func(r *exchange.Request) { r.Method = "GE T" }),
		"CONNECT":             change(func(r *exchange.Request) { r.Method = "CONNECT" }),
		"a target":            change(func(r *exchange.Request) { r.Target = "a" }),
		"a line end":          change(func(r *exchange.Request) { r.Target = "/\r\nx: y" }),
		"a fragment":          change(func(r *exchange.Request) { r.Target = "/#a" }),
		"* but for OPTIONS":   change(func(r *exchange.Request) { r.Target = "*" }),
		"no authority":        change(func(r *exchange.Request) { r.Authority = "" }),
		"user information":    change(func(r *exchange.Request) { r.Authority = "a@b" }),
		"an upgrade":          change(func(r *exchange.Request) { r.Upgrade = "websocket" }),
		"a field's value":     change(func(r *exchange.Request) { r.Fields.Add("a", "b\r\nc: d") }),
		"a connection's":      change(func(r *exchange.Request) { r.Fields.Add("Connection", "x") }),
		"a length":            change(func(r *exchange.Request) { r.ContentLength = -2 }),
		"what looks like one": change(func(r *exchange.Request) { r.Fields.Add("Content_Length", "1") }),
	} {
		var err error
		d := v.exchange()
		d.on(func(t *task.Task) { err = d.up.Send(t, r) })
		d.close()
		if err == nil {
			t.Errorf("%s is sent", name)
		}
	}
	if n := v.client.Active(); n != 0 {
		t.Errorf("%d exchanges are left", n)
	}
	_, id := v.get() // the connection is as good as before
	if id != 1 {
		t.Errorf("stream %d", id)
	}
}

func TestAResponseWithAllThatItMayHave(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d, id := v.get()
	v.head(id, false, ":status: 103", "link: </a>; rel=preload")
	v.head(id, false, ":status: 200", "content-type: text/plain", "set-cookie: a=1", "set-cookie: b=2")
	v.data(id, false, "hello ")
	v.data(id, false, "world")
	v.head(id, true, "grpc-status: 0", "authorization: no")
	if resp := d.status(103); !resp.Fields.Has("Link") {
		t.Errorf("got %v", resp.Fields)
	}
	resp := d.status(200)
	if want := (exchange.Fields{{Name: "Content-Type", Value: "text/plain"}, {Name: "Set-Cookie", Value: "a=1"}, {Name: "Set-Cookie", Value: "b=2"}}); !slices.Equal(resp.Fields, want) || resp.ContentLength != -1 {
		t.Errorf("got %+v", resp)
	}
	d.wantRest("hello world")
	if got, want := d.up.Trailers(), (exchange.Fields{{Name: "Grpc-Status", Value: "0"}}); !slices.Equal(got, want) {
		t.Errorf("trailers %v", got)
	}
	d.close()
	if d2, _ := v.get(); d.up.Reused() || !d2.up.Reused() {
		t.Error("only the first exchange is on a fresh connection")
	}
}

func TestResponsesWithoutABody(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		method string
		head   []string
		length int64
	}{
		{"HEAD", []string{":status: 200", "content-length: 5"}, 5},
		{"HEAD", []string{":status: 200"}, -1},
		{"GET", []string{":status: 204"}, 0},
		{"GET", []string{":status: 304", "content-length: 7"}, 7},
		{"GET", []string{":status: 304"}, -1},
		{"GET", []string{":status: 200", "content-length: 0"}, 0},
		{"GET", []string{":status: 200"}, 0},
	} {
		v := converse(t, ClientOptions{})
		d := v.exchange()
		r := get("/")
		r.Method = c.method
		d.send(r)
		id, _, _ := v.request()
		v.head(id, true, c.head...)
		resp, err := d.receive()
		if err != nil || resp.ContentLength != c.length {
			t.Errorf("%v: got %+v, %v, want the length %d", c, resp, err, c.length)
			continue
		}
		d.wantRest("")
		if !d.up.Ready() {
			t.Errorf("%v: the end is not known", c)
		}
	}
}

func TestABodyIsSentInFramesWithItsEnd(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	r := get("/")
	r.Method, r.ContentLength = "POST", 5
	d := v.exchange()
	d.send(r)
	if _, head, end := v.request(); end || !slices.Contains(head, "content-length: 5") {
		t.Errorf("got %v, end %v", head, end)
	}
	if err := errors.Join(d.write("he"), d.write("llo")); err != nil {
		t.Fatal(err)
	}
	var body string
	for end := false; !end; {
		f := want[*http2.DataFrame](v.upstreamPeer)
		body, end = body+string(f.Data()), f.StreamEnded()
		if end && len(f.Data()) == 0 {
			t.Error("the end comes by itself")
		}
	}
	if err := d.finish(); err != nil || body != "hello" {
		t.Errorf("got %q, %v", body, err)
	}
	if err := d.write("x"); err == nil {
		t.Error("more is sent than was announced")
	}
}

func TestTrailersOfARequest(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	r := get("/")
	r.Method, r.ContentLength = "POST", -1
	d := v.exchange()
	d.send(r)
	_, head, _ := v.request()
	if slices.ContainsFunc(head, func(l string) bool { return strings.HasPrefix(l, "content-length") }) {
		t.Errorf("got %v", head)
	}
	if err := errors.Join(d.write("abc"), d.finish(exchange.Field{Name: "Grpc-Status", Value: "0"}, exchange.Field{Name: "Host", Value: "x"})); err != nil {
		t.Fatal(err)
	}
	if f := want[*http2.DataFrame](v.upstreamPeer); string(f.Data()) != "abc" || f.StreamEnded() {
		t.Errorf("got %v", f)
	}
	f := want[*http2.MetaHeadersFrame](v.upstreamPeer)
	if len(f.Fields) != 1 || f.Fields[0].Name != "grpc-status" || !f.StreamEnded() {
		t.Errorf("got %v", f)
	}
}

// The library looks at trailers while it sends the head: they must not come while it does.
func TestTrailersThatAreThereAtOnce(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	r := get("/")
	r.Method, r.ContentLength = "POST", -1
	for range 50 {
		d := v.exchange()
		var err error
		d.on(func(t *task.Task) {
			err = errors.Join(d.up.Send(t, r), d.up.Write(t, []byte("abc")), d.up.Finish(t, exchange.Fields{{Name: "Grpc-Status", Value: "0"}}))
		})
		if err != nil {
			t.Fatal(err)
		}
		id, head, end := v.request()
		if end || slices.ContainsFunc(head, func(l string) bool { return strings.HasPrefix(l, "trailer") }) {
			t.Fatalf("got %v, end %v", head, end)
		}
		for got := ""; got != "abc"; {
			got += string(want[*http2.DataFrame](v.upstreamPeer).Data())
		}
		if f := want[*http2.MetaHeadersFrame](v.upstreamPeer); len(f.Fields) != 1 || f.Fields[0].Name != "grpc-status" || !f.StreamEnded() {
			t.Fatalf("got %v", f)
		}
		v.head(id, true, ":status: 200")
		d.status(200)
		d.close()
	}
}

// Whatever an upstream says that HTTP/2 forbids is a 502, or is not passed on: no client of
// HTTP/1.1 gets it.
func TestInvalidResponses(t *testing.T) {
	t.Parallel()
	for name, play := range map[string]func(v *conversation, id uint32){
		"no status":                  func(v *conversation, id uint32) { v.head(id, true, "a: b") },
		"a short status":             func(v *conversation, id uint32) { v.head(id, true, ":status: 99") },
		"a status that is too large": func(v *conversation, id uint32) { v.head(id, true, ":status: 600") },
		"a status with a sign":       func(v *conversation, id uint32) { v.head(id, true, ":status: +200") },
		"a status with zeros":        func(v *conversation, id uint32) { v.head(id, true, ":status: 0200") },
		"a negative status":          func(v *conversation, id uint32) { v.head(id, true, ":status: -20") },
		"words for a status":         func(v *conversation, id uint32) { v.head(id, true, ":status: 200 OK") },
		"two statuses":               func(v *conversation, id uint32) { v.head(id, true, ":status: 200", ":status: 500") },
		"a pseudo-field of requests": func(v *conversation, id uint32) { v.head(id, true, ":status: 200", ":path: /") },
		"a pseudo-field too late":    func(v *conversation, id uint32) { v.head(id, true, "a: b", ":status: 200") },
		"a 101":                      func(v *conversation, id uint32) { v.head(id, false, ":status: 101") },
		"an end in a 1xx":            func(v *conversation, id uint32) { v.head(id, true, ":status: 103") },
		"CR LF in a value":           func(v *conversation, id uint32) { v.head(id, true, ":status: 200", "a: b\r\nc: d") },
		"NUL in a value":             func(v *conversation, id uint32) { v.head(id, true, ":status: 200", "a: \x00") },
		"LF in a value of a 1xx":     func(v *conversation, id uint32) { v.head(id, false, ":status: 103", "a: b\nc") },
		"a capital letter":           func(v *conversation, id uint32) { v.head(id, true, ":status: 200", "Aa: b") },
		"a space in a name":          func(v *conversation, id uint32) { v.head(id, true, ":status: 200", "a b: c") },
		"Transfer-Encoding in a 1xx": func(v *conversation, id uint32) { v.head(id, false, ":status: 103", "transfer-encoding: chunked") },
		"what looks like framing":    func(v *conversation, id uint32) { v.head(id, true, ":status: 200", "transfer_encoding: chunked") },
		"a 204 with a length":        func(v *conversation, id uint32) { v.head(id, false, ":status: 204", "content-length: 5") },
		"a body before the head":     func(v *conversation, id uint32) { v.data(id, true, "a") },
		"too many fields": func(v *conversation, id uint32) {
			v.head(id, true, append([]string{":status: 200"}, slices.Repeat([]string{"a: b"}, maxFields+1)...)...)
		},
		"a head that is too large": func(v *conversation, id uint32) {
			v.head(id, true, ":status: 200", "a: "+strings.Repeat("x", maxHeaderList+1000))
		},
		"interim responses without end": func(v *conversation, id uint32) {
			for range maxInterim + 1 {
				v.head(id, false, ":status: 103")
			}
		},
		"a frame that is none": func(v *conversation, id uint32) {
			v.must(v.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, []byte{0, 0, 0, 0}))
		},
		"a push": func(v *conversation, id uint32) {
			v.must(v.fr.WritePushPromise(http2.PushPromiseParam{StreamID: id, PromiseID: 2, EndHeaders: true}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := converse(t, ClientOptions{})
			d, id := v.get()
			play(v, id)
			for {
				resp, err := d.receive()
				if err == nil && resp.Status < 200 {
					continue
				}
				if exchange.StatusOf(err, 0) != 502 || errors.Is(err, exchange.ErrNoAnswer) || errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("got %+v, %v, want 502", resp, err)
				}
				return
			}
		})
	}
}

func TestFieldsAboutConnectionsReachNobody(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d, id := v.get()
	v.head(id, true, ":status: 200", "connection: close, x", "keep-alive: 1", "proxy-connection: x", "transfer-encoding: chunked", "upgrade: h2c", "te: x", "trailer: y", "host: z", "x: 1")
	if resp := d.status(200); len(resp.Fields) != 1 {
		t.Errorf("got %v", resp.Fields)
	}
}

func TestABodyThatIsNotWhatWasAnnounced(t *testing.T) {
	t.Parallel()
	for name, play := range map[string]func(v *conversation, id uint32){
		"too short": func(v *conversation, id uint32) {
			v.head(id, false, ":status: 200", "content-length: 9")
			v.data(id, true, "a")
		},
		"none": func(v *conversation, id uint32) { v.head(id, true, ":status: 200", "content-length: 9") },
		"too long": func(v *conversation, id uint32) {
			v.head(id, false, ":status: 200", "content-length: 1")
			v.data(id, true, "abc")
		},
		"where none may be": func(v *conversation, id uint32) {
			v.head(id, false, ":status: 304")
			v.data(id, true, "abc")
		},
		"reset": func(v *conversation, id uint32) {
			v.head(id, false, ":status: 200")
			v.data(id, false, "abc")
			v.must(v.fr.WriteRSTStream(id, http2.ErrCodeInternal))
		},
		"cut": func(v *conversation, id uint32) {
			v.head(id, false, ":status: 200")
			v.conn.Close()
		},
		"invalid trailers": func(v *conversation, id uint32) {
			v.head(id, false, ":status: 200")
			v.head(id, true, "grpc-status: 0", "connection: close")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := converse(t, ClientOptions{})
			d, id := v.get()
			play(v, id)
			if _, err := d.receive(); err != nil {
				t.Fatal(err)
			}
			if body, err := d.rest(); err == nil || exchange.StatusOf(err, 0) != 502 || len(body) > 3 {
				t.Errorf("got %q, %v", body, err)
			}
		})
	}
}

func TestWhatAFailureSaysOfTheRequest(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name             string
		play             func(v *conversation, id uint32)
		refused, unknown bool // ErrRefused, ErrNoAnswer
	}{
		{"REFUSED_STREAM", func(v *conversation, id uint32) { v.must(v.fr.WriteRSTStream(id, http2.ErrCodeRefusedStream)) }, true, false},
		{"another reset", func(v *conversation, id uint32) { v.must(v.fr.WriteRSTStream(id, http2.ErrCodeInternal)) }, false, false},
		{"GOAWAY that has not seen it", func(v *conversation, id uint32) { v.must(v.fr.WriteGoAway(id-2, http2.ErrCodeNo, nil)) }, true, true},
		{"GOAWAY with an error", func(v *conversation, id uint32) { v.must(v.fr.WriteGoAway(id-2, http2.ErrCodeInternal, nil)) }, true, true},
		{"GOAWAY that has seen it, and the end", func(v *conversation, id uint32) {
			v.must(v.fr.WriteGoAway(id, http2.ErrCodeNo, nil))
			v.conn.Close()
		}, false, true},
		{"the end", func(v *conversation, id uint32) { v.conn.Close() }, false, true},
		{"the end after a 1xx", func(v *conversation, id uint32) {
			v.head(id, false, ":status: 103")
			v.conn.Close()
		}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			v := converse(t, ClientOptions{})
			first, _ := v.get()
			d, id := v.get()
			c.play(v, id)
			resp, err := d.receive()
			for err == nil && resp.Status < 200 {
				resp, err = d.receive()
			}
			if err == nil || errors.Is(err, exchange.ErrRefused) != c.refused || errors.Is(err, exchange.ErrNoAnswer) != c.unknown {
				t.Errorf("got %v, want refused %v, no answer %v", err, c.refused, c.unknown)
			}
			first.close()
		})
	}
}

// The first request of a connection is treated in another way by the library.
func TestGoAwayBeforeTheFirstRequest(t *testing.T) {
	t.Parallel()
	for _, code := range []http2.ErrCode{http2.ErrCodeNo, http2.ErrCodeEnhanceYourCalm} {
		v := converse(t, ClientOptions{})
		d, _ := v.get()
		v.must(v.fr.WriteGoAway(0, code, nil))
		if _, err := d.receive(); !errors.Is(err, exchange.ErrRefused) || !errors.Is(err, exchange.ErrNoAnswer) {
			t.Errorf("%v: %v", code, err)
		}
	}
}

func TestGoAwayLetsWhatIsUnderWayEnd(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d, id := v.get()
	v.must(v.fr.WriteGoAway(id, http2.ErrCodeNo, nil))
	wait(t, v.leaving, "word of it")
	if _, ok := v.client.Exchange(v.loop, false); ok || v.client.Usable() {
		t.Error("the connection takes another exchange")
	}
	v.head(id, false, ":status: 200")
	v.data(id, true, "abc")
	d.status(200)
	d.wantRest("abc")
	if byPeer := wait(t, v.ended, "end of the connection"); byPeer {
		t.Error("the peer is said to have ended it")
	}
	v.ended <- true // for the end of the test
}

// The library takes no further request on a connection on which a stream was reset so, and says
// nothing of it.
func TestAConnectionThatTheLibraryHasGivenUp(t *testing.T) {
	t.Parallel()
	for _, answered := range []bool{false, true} {
		v := converse(t, ClientOptions{})
		other, otherID := v.get()
		d, id := v.get()
		if answered {
			v.head(id, false, ":status: 200")
			d.status(200)
		}
		v.must(v.fr.WriteRSTStream(id, http2.ErrCodeProtocol))
		var err error
		if answered {
			_, err = d.rest()
		} else {
			_, err = d.receive()
		}
		if err == nil {
			t.Fatal("a stream that was reset succeeds")
		}
		if _, ok := v.client.Exchange(v.loop, false); ok || v.client.Usable() {
			t.Error("the connection takes another exchange")
		}
		wait(t, v.leaving, "word of it")
		v.head(otherID, true, ":status: 200")
		other.status(200)
		other.wantRest("")
	}
}

func TestCloseResetsTheStreamOnly(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d, id := v.get()
	other, otherID := v.get()
	d.close()
	if f := want[*http2.RSTStreamFrame](v.upstreamPeer); f.StreamID != id || f.ErrCode != http2.ErrCodeCancel {
		t.Errorf("got %v", f)
	}
	if _, err := d.receive(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
	v.head(otherID, true, ":status: 200")
	other.status(200)
}

// What is closed while somebody waits ends that.
func TestCloseWhileATaskWaits(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	for _, what := range []string{"for a head", "for a body", "to send"} {
		d := v.exchange()
		r := get("/")
		r.Method, r.ContentLength = "POST", -1
		d.send(r)
		id, _, _ := v.request()
		if what == "for a body" {
			v.head(id, false, ":status: 200")
			d.status(200)
		}
		result := make(chan error, 1)
		d.on(func(*task.Task) {
			d.v.loop.Tasks.Go(runs(func(t *task.Task) {
				var err error
				switch what {
				case "for a head":
					_, err = d.up.Receive(t)
				case "for a body":
					_, err = d.up.Read(t)
				case "to send":
					err = d.up.Write(t, make([]byte, 1<<20)) // beyond the window
				}
				result <- err
			}))
		})
		d.close()
		if err := wait(t, result, "end of the wait "+what); err == nil {
			t.Errorf("who waits %s succeeds", what)
		}
		for f := v.read(); ; f = v.read() {
			if _, ok := f.(*http2.RSTStreamFrame); ok {
				break
			}
		}
	}
}

type runs func(*task.Task)

func (r runs) Run(t *task.Task) { r(t) }

// A client that does not read costs a window of memory, and no other stream its turn.
func TestAStreamThatNobodyReads(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	part := strings.Repeat("x", 16<<10)
	var slow *drivenStream
	var slowID uint32
	for range 4 {
		slow, slowID = v.get()
		v.head(slowID, false, ":status: 200")
		for range upstreamWindow / len(part) {
			v.data(slowID, false, part)
		}
		slow.status(200)
	}
	d, id := v.get()
	v.head(id, false, ":status: 200")
	v.data(id, true, part)
	d.status(200)
	d.wantRest(part)
	v.data(slowID, true, "")
	slow.wantRest(strings.Repeat("x", upstreamWindow))
}

// A body of which nothing comes for long, as of a stream of events, needs no memory meanwhile.
func TestWaitingForABodyNeedsNoMemory(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	body := &readSizes{}
	newClientStream(v.client, v.loop, false).take(&http.Response{Body: body}, false)
	if want := []int{0, chunkSize, 0}; !slices.Equal(body.sizes, want) {
		t.Errorf("reads of %v, want %v", body.sizes, want)
	}
}

// readSizes is a body that notes how it is read: the second read has a byte, the third the end.
type readSizes struct{ sizes []int }

func (r *readSizes) Read(p []byte) (int, error) {
	r.sizes = append(r.sizes, len(p))
	switch len(r.sizes) {
	case 2:
		return copy(p, "x"), nil
	case 3:
		return 0, io.EOF
	}
	return 0, nil
}

func (r *readSizes) Close() error { return nil }

func TestBeyondTheWindow(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d, id := v.get()
	v.head(id, false, ":status: 200")
	part := strings.Repeat("x", 16<<10)
	for range upstreamWindow/len(part) + mostChunks*chunkSize/len(part) + 1 {
		v.data(id, false, part)
	}
	for end := error(nil); end == nil; { // while nobody reads what has come
		_, end = v.fr.ReadFrame()
	}
	d.status(200)
	if _, err := d.rest(); err == nil {
		t.Error("more is taken than was allowed")
	}
}

// An endpoint that takes nothing has whoever writes wait, with little in memory.
func TestAnUploadThatThePeerDoesNotTake(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d := v.exchange()
	r := get("/")
	r.Method, r.ContentLength = "POST", 1<<20
	d.send(r)
	id, _, _ := v.request()
	sent := make(chan error, 1)
	d.on(func(*task.Task) {
		v.loop.Tasks.Go(runs(func(t *task.Task) {
			for range 32 {
				if err := d.up.Write(t, make([]byte, 32<<10)); err != nil {
					sent <- err
					return
				}
			}
			sent <- d.up.Finish(t, nil)
		}))
	})
	n := 0
	for n < 64<<10-1 {
		n += len(want[*http2.DataFrame](v.upstreamPeer).Data())
	}
	d.on(func(*task.Task) {
		s := d.up.(*clientStream)
		s.mu.Lock()
		defer s.mu.Unlock()
		if kept := len(s.out.kept) - s.out.read; kept > mostUnsent+32<<10 {
			t.Errorf("%d bytes are kept", kept)
		}
	})
	if len(sent) > 0 {
		t.Fatal("nobody waits:", <-sent)
	}
	v.must(v.fr.WriteWindowUpdate(0, 2<<20))
	v.must(v.fr.WriteWindowUpdate(id, 2<<20))
	for end := false; !end; {
		f := want[*http2.DataFrame](v.upstreamPeer)
		n, end = n+len(f.Data()), f.StreamEnded()
	}
	if err := wait(t, sent, "end of the upload"); err != nil || n != 1<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// The library has memory of the size of the largest frame for each body that is under way, also where
// nothing moves. Most servers allow frames of a megabyte and more.
func TestLargeFramesAreNotUsed(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	v.must(v.fr.WriteWindowUpdate(0, 1<<20))
	d := v.exchange()
	r := get("/")
	r.Method, r.ContentLength = "POST", 100<<10
	v.must(v.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1<<24 - 1}))
	for ack := false; !ack; {
		f, ok := v.read().(*http2.SettingsFrame)
		ack = ok && f.IsAck()
	}
	d.send(r)
	_, _, _ = v.request()
	sent := make(chan error, 1)
	d.on(func(*task.Task) {
		v.loop.Tasks.Go(runs(func(t *task.Task) { sent <- d.up.Write(t, make([]byte, 100<<10)) }))
	})
	for end := false; !end; {
		f := want[*http2.DataFrame](v.upstreamPeer)
		if end = f.StreamEnded(); f.Length > maxFrame {
			t.Fatalf("a frame of %d bytes", f.Length)
		}
	}
	if err := wait(t, sent, "end of the upload"); err != nil {
		t.Error(err)
	}
}

// What is no size of a frame stays none.
func TestInvalidFrameSizes(t *testing.T) {
	t.Parallel()
	for _, size := range []uint32{0, 1<<14 - 1, 1 << 24, 1 << 31} {
		v := converse(t, ClientOptions{})
		v.must(v.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: size}))
		wait(t, v.ended, "end of the connection")
		v.ended <- true
	}
}

// An endpoint that answers and takes no more of the body lets the rest go nowhere.
func TestAnAnswerBeforeTheEndOfTheBody(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d := v.exchange()
	r := get("/")
	r.Method, r.ContentLength = "POST", -1
	d.send(r)
	id, _, _ := v.request()
	v.head(id, true, ":status: 413")
	d.status(413)
	d.wantRest("")
	d.close()
	if f := want[*http2.RSTStreamFrame](v.upstreamPeer); f.StreamID != id {
		t.Errorf("got %v", f)
	}
}

func TestThePeerSaysHowManyThereMayBe(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{Streams: 3}, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
	first, id := v.get()
	if _, ok := v.client.Exchange(v.loop, false); ok {
		t.Error("there are more than the peer allows")
	}
	v.must(v.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 100}))
	wait(t, v.room, "room")
	v.get()
	v.get()
	if _, ok := v.client.Exchange(v.loop, false); ok {
		t.Error("there are more than we allow")
	}
	v.head(id, true, ":status: 200")
	first.status(200)
	first.wantRest("")
	wait(t, v.room, "room")
	v.get()
}

func TestFloodsOfAnEndpoint(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string]func(v *conversation, id uint32) error{
		"PING":       func(v *conversation, _ uint32) error { return v.fr.WritePing(true, [8]byte{1}) },
		"SETTINGS":   func(v *conversation, _ uint32) error { return v.fr.WriteSettings() },
		"RST_STREAM": func(v *conversation, id uint32) error { return v.fr.WriteRSTStream(id+2, http2.ErrCodeCancel) },
		"empty DATA": func(v *conversation, id uint32) error { return v.fr.WriteData(id, false, nil) },
		"padding":    func(v *conversation, id uint32) error { return v.fr.WriteDataPadded(id, false, nil, []byte{0}) },
		"unknown":    func(v *conversation, id uint32) error { return v.fr.WriteRawFrame(0xee, 0, id, nil) },
		"PRIORITY": func(v *conversation, id uint32) error {
			return v.fr.WritePriority(id, http2.PriorityParam{StreamDep: 0, Weight: 1})
		},
		"WINDOW_UPDATE": func(v *conversation, id uint32) error { return v.fr.WriteWindowUpdate(id, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			floods := new(metrics.Counter)
			v := converse(t, ClientOptions{Counts: ClientCounts{Floods: floods}})
			d, id := v.get()
			go io.Copy(io.Discard, v.conn)
			v.head(id, false, ":status: 200")
			d.status(200)
			var err error
			for range 4 * mostCredit {
				if err = frame(v, id); err != nil {
					break
				}
			}
			if err == nil {
				v.conn.Close()
			}
			if _, err := d.rest(); exchange.StatusOf(err, 0) != 502 || floods.Value() != 1 {
				t.Errorf("got %v, %d floods", err, floods.Value())
			}
			wait(t, v.ended, "end of the connection")
			v.ended <- true
		})
	}
}

// What carries something may go on for ever.
func TestManySmallPartsAreNoFlood(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d, id := v.get()
	go io.Copy(io.Discard, v.conn)
	v.head(id, false, ":status: 200")
	d.status(200)
	const parts = 3 * mostCredit
	go func() {
		for range parts {
			_ = v.fr.WriteData(id, false, []byte("x"))
		}
		_ = v.fr.WriteData(id, true, nil)
	}()
	d.wantRest(strings.Repeat("x", parts))
}

// A server of gRPC answers each message, however small, with a window and a PING, by which it
// measures how much it may take at once.
func TestWhatEachMessageIsAnsweredWithIsNoFlood(t *testing.T) {
	t.Parallel()
	v := converse(t, ClientOptions{})
	d := v.exchange()
	r := get("/")
	r.Method, r.ContentLength = "POST", -1
	d.send(r)
	id, _, _ := v.request()
	v.head(id, false, ":status: 200")
	d.status(200)
	const messages = mostCredit
	sent := make(chan error, 1)
	d.on(func(*task.Task) {
		v.loop.Tasks.Go(runs(func(t *task.Task) {
			var err error
			for range messages {
				err = errors.Join(err, d.up.Write(t, []byte("message")))
				if p, err2 := d.up.Read(t); string(p) != "a" {
					err = errors.Join(err, err2, errors.New("no answer"))
					break
				}
			}
			sent <- errors.Join(err, d.up.Finish(t, nil))
		}))
	})
	for range messages {
		n := len(want[*http2.DataFrame](v.upstreamPeer).Data())
		v.must(v.fr.WriteWindowUpdate(0, uint32(n)))
		v.must(v.fr.WriteWindowUpdate(id, uint32(n)))
		v.must(v.fr.WritePing(false, [8]byte{1}))
		v.data(id, false, "a")
	}
	if err := wait(t, sent, "end of the messages"); err != nil {
		t.Error(err)
	}
}

func TestAPeerThatDoesNotSpeakHTTP2(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		says string
		end  bool
		want error
	}{
		"HTTP/1.1": {"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", false, errNotHTTP2},
		"the end":  {"", true, errNotHTTP2},
		"nothing":  {"", false, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ours, theirs := dialPair(t)
			defer theirs.Close()
			bound := patience
			if c.want == context.DeadlineExceeded {
				bound = 10 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), bound)
			defer cancel()
			_, _ = io.WriteString(theirs, c.says)
			if c.end {
				theirs.Close()
			}
			o := newTestOwner()
			if _, err := NewClient(ClientOptions{}).Begin(ctx, ours, false, o.owner()); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			wait(t, o.ended, "end")
		})
	}
}
