package http2

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"holdfast/internal/exchange"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// with returns the fields of a request of which some are others; "": they are not there.
func with(changes map[string]string, more ...string) (fields []string) {
	usual := line()
	for i := 0; i < len(usual); i += 2 {
		value, changed := changes[usual[i]]
		if !changed {
			value = usual[i+1]
		}
		if value != "" {
			fields = append(fields, usual[i], value)
		}
	}
	return append(fields, more...)
}

var malformedRequests = []struct {
	name   string
	fields []string
}{
	{"connection", line("connection", "close")},
	{"keep-alive", line("keep-alive", "timeout=5")},
	{"proxy-connection", line("proxy-connection", "close")},
	{"transfer-encoding", line("transfer-encoding", "chunked")},
	{"upgrade", line("upgrade", "h2c")},
	{"te other than trailers", line("te", "gzip")},
	{"te with more than trailers", line("te", "trailers, deflate")},
	{"framing that looks like it", line("content_length", "5")},
	{"upper case", line("X-Up", "1")},
	{"name with a space", line("x up", "1")},
	{"name with a colon", line("x:up", "1")},
	{"no name", line("", "1")},
	{"CR", line("x-a", "a\rb")},
	{"LF", line("x-a", "a\nb")},
	{"NUL", line("x-a", "a\x00b")},
	{"space before a value", line("x-a", " a")},
	{"space behind a value", line("x-a", "a ")},
	{"tab behind a value", line("x-a", "a\t")},
	{"two lengths", line("content-length", "0", "content-length", "0")},
	{"a length that is none", line("content-length", "+1")},
	{"two lengths in one", line("content-length", "0, 0")},
	{"a length without content", line("content-length", "5")},
	{"no method", with(map[string]string{":method": ""})},
	{"a method that is none", with(map[string]string{":method": "GE T"})},
	{"no scheme", with(map[string]string{":scheme": ""})},
	{"another scheme", with(map[string]string{":scheme": "ftp"})},
	{"no path", with(map[string]string{":path": ""})},
	{"an empty path", append(with(map[string]string{":path": ""})[:6], ":path", "")},
	{"a relative path", with(map[string]string{":path": "a"})},
	{"an absolute path", with(map[string]string{":path": "http://example.com/"})},
	{"an asterisk", with(map[string]string{":path": "*"})},
	{"a path with a space", with(map[string]string{":path": "/a b"})},
	{"a path with a line end", with(map[string]string{":path": "/a\r\nx: y"})},
	{"a path with a fragment", with(map[string]string{":path": "/a#b"})},
	{"userinfo", with(map[string]string{":authority": "user@example.com"})},
	{"an authority that is none", with(map[string]string{":authority": "exa mple.com"})},
	{"host and authority", line("host", "example.org")},
	{"two hosts", line("host", "example.com", "host", "example.com")},
	{"a pseudo-header field twice", append([]string{":path", "/"}, line()...)},
	{"an unknown one", append([]string{":status", "200"}, line()...)},
	{"a pseudo-header field behind others", append([]string{"x-a", "b"}, line()...)},
	{"a protocol", append([]string{":protocol", "websocket"}, line()...)},
	{"a protocol that was not offered", append([]string{":protocol", "websocket"}, with(map[string]string{":method": "CONNECT"})...)},
	{"CONNECT with a path", with(map[string]string{":method": "CONNECT"})},
}

// What is malformed reaches no handler: its stream is reset, and the connection goes on.
func TestMalformedRequestsAreReset(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if e.Request().Target != "/good" {
			t.Errorf("a handler has got %+v", e.Request())
		}
		answerWith(tk, e, 200, "")
	})})
	for _, c := range malformedRequests {
		t.Run(c.name, func(t *testing.T) {
			p := s.connect()
			p.t = t
			p.request(1, c.fields...)
			p.want("1 reset PROTOCOL_ERROR")
			p.request(3, with(map[string]string{":path": "/good"})...)
			p.wantAnswer(3, "200")
			if r := <-s.refused; r.Status != 400 {
				t.Errorf("recorded with %d %s", r.Status, r.Reason)
			}
		})
	}
	if n := s.value("holdfast_downstream_protocol_errors_total"); n != int64(len(malformedRequests)) {
		t.Errorf("%d errors counted, want %d", n, len(malformedRequests))
	}
}

// What is valid and cannot be served is answered.
func TestRefusedRequestsAreAnswered(t *testing.T) {
	t.Parallel()
	limits := limitsForTests()
	limits.HeadSize, limits.BodySize = 2000, 10
	s := startServer(t, ServerOptions{Limits: limits, Handler: handlerFunc(echoing)})
	for _, c := range []struct {
		name, status string
		fields       []string
	}{
		{"no authority", "400", with(map[string]string{":authority": ""})},
		{"an unknown expectation", "417", line("expect", "the unexpected")},
		{"CONNECT", "501", []string{":method", "CONNECT", ":authority", "example.com:443"}},
		{"a large head", "431", line("x-large", strings.Repeat("a", 1990))},
		{"a large head of many fields", "431", line(strings.Split(strings.Repeat("x-a,b,", 100), ",")[:200]...)},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := s.connect()
			p.t = t
			p.request(1, c.fields...)
			p.want("1 " + c.status)
			if r := <-s.refused; r.Err != nil || r.Sent == 0 {
				t.Errorf("recorded as %+v", r)
			}
		})
	}
	t.Run("a large body", func(t *testing.T) {
		p := s.connect()
		p.t = t
		p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line("content-length", "11")...), EndHeaders: true}))
		p.want("1 413")
	})
	if n := s.value("holdfast_downstream_http2_header_overflows_total"); n != 2 {
		t.Errorf("%d overflows", n)
	}
}

// A body of another length than announced is never whole.
func TestBodiesOfAnotherLengthAreReset(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, content, padding string }{
		{"less", "1234", ""}, {"less, with padding", "1234", "\x00\x00"}, {"more", "123456", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			begun, over := make(chan bool, 1), make(chan error, 1)
			s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
				begun <- true
				_, err := readBody(tk, e)
				over <- err
			})})
			p := s.connect()
			p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(line("content-length", "5")...), EndHeaders: true}))
			<-begun
			p.check(p.WriteDataPadded(1, true, []byte(c.content), []byte(c.padding)))
			p.want("1 reset PROTOCOL_ERROR")
			if err := <-over; err == nil {
				t.Error("the body was read as a whole one")
			}
		})
	}
}

// Cookies are one field again, and fields keep their order and their lines.
func TestFieldsKeepTheirOrder(t *testing.T) {
	t.Parallel()
	var got exchange.Fields
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		for _, f := range e.Request().Fields {
			got.Add(f.Name, f.Value)
		}
		if e.Request().Authority != "EXAMPLE.com" || !e.Request().TakesTrailers {
			t.Errorf("got %+v", e.Request())
		}
		answerWith(tk, e, 200, "")
	})})
	p := s.connect()
	p.request(1, line("x-b", "1", "cookie", "a=b", "x-a", "2", "cookie", "c=d", "x-b", "3", "host", "EXAMPLE.com", "te", "trailers")...)
	p.wantAnswer(1, "200")
	want := exchange.Fields{{Name: "x-b", Value: "1"}, {Name: "cookie", Value: "a=b; c=d"}, {Name: "x-a", Value: "2"}, {Name: "x-b", Value: "3"}}
	if len(got) != len(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("got %v, want %v", got[i], want[i])
		}
	}
}

// Hundreds of cookies cost a client a byte each, and are not copied once for each of them.
func TestManyCookiesAreJoinedAtOnce(t *testing.T) {
	fields := []hpack.HeaderField{
		{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "example.com"}, {Name: ":path", Value: "/"},
	}
	const many = 190
	for range many {
		fields = append(fields, hpack.HeaderField{Name: "cookie", Value: strings.Repeat("a", 300)})
	}
	var value string
	allocations := testing.AllocsPerRun(10, func() {
		h, err := parseHead(fields, true, "http")
		if err != nil || len(h.Fields) != 1 {
			t.Fatalf("got %d fields, %v", len(h.Fields), err)
		}
		value = h.Fields[0].Value
	})
	if want := strings.TrimSuffix(strings.Repeat(strings.Repeat("a", 300)+"; ", many), "; "); value != want {
		t.Errorf("the cookies have become %d bytes, want %d", len(value), len(want))
	}
	if allocations > many/4 {
		t.Errorf("%v allocations for %d cookies", allocations, many)
	}
}

// What comes behind the end of a request changes nothing of it, also where the stream is none of the
// last that were opened: its handler may be reading the trailers.
func TestTrailersBehindTheEndAreNotTaken(t *testing.T) {
	t.Parallel()
	over, asked := make(chan struct{}), make(chan *serverHead, 1)
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		readBody(tk, e)
		if e.Request().Method == "POST" {
			asked <- e.(*serverExchange).head
			e.OnOver(watcherFunc(func(error) { close(over); tk.Wake() }))
			tk.Wait()
			return
		}
		answerWith(tk, e, 204, "")
	})})
	p := s.connect()
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(with(map[string]string{":method": "POST"})...), EndHeaders: true}))
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block("grpc-status", "0"), EndHeaders: true, EndStream: true}))
	head := <-asked
	last := uint32(1)
	for range len(wire{}.recent) {
		last += 2
		p.request(last, line()...)
		p.wantAnswer(last, "204")
	}
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block("grpc-status", "1"), EndHeaders: true, EndStream: true}))
	p.want(fmt.Sprintf("goaway %d STREAM_CLOSED", last))
	<-over
	if want := (exchange.Fields{{Name: "grpc-status", Value: "0"}}); !slices.Equal(head.trailers, want) {
		t.Errorf("the trailers are %v", head.trailers)
	}
}

type watcherFunc func(error)

func (f watcherFunc) ExchangeOver(err error) { f(err) }

// Trailers that follow the end of a request are not taken for its, however many streams ago that
// has begun: somebody may be reading the others.
func TestTrailersBehindTheEndOfARequest(t *testing.T) {
	t.Parallel()
	goOn, trailers := make(chan struct{}), make(chan exchange.Fields, 1)
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		_, err := readBody(tk, e)
		if e.Request().ContentLength < 0 && err == nil {
			streamtest.Block(e.Loop(), tk, func() { <-goOn })
			trailers <- e.Trailers()
		}
		answerWith(tk, e, 204, "")
	})})
	p := s.connect()
	p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(with(map[string]string{":method": "POST"})...), EndHeaders: true}))
	end := func(etag string) {
		p.check(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block("etag", etag), EndHeaders: true, EndStream: true}))
	}
	end("first")
	for id := uint32(3); id < 2*200; id += 2 {
		p.request(id, line()...)
		p.wantAnswer(id, "204")
	}
	end("second")
	p.want("goaway 399 STREAM_CLOSED", "end")
	close(goOn)
	if etag, _ := (<-trailers).Get("etag"); etag != "first" {
		t.Errorf("got the trailers %q", etag)
	}
}

// What is malformed and has no handler never gets one: its fields are for the log then.
func TestARequestThatIsMalformedHasNoHandler(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	var c *serverConn
	streamtest.Do(s.loop, func() { c = newServerConn(s.loops[s.loop.Index], netip.AddrPort{}, nil) })
	for _, id := range []uint32{1, 3} {
		h := new(serverHead)
		c.opened(id, h)
		if id == 3 && c.start(id) != h {
			t.Error("a handler cannot have it")
		}
		c.malformed(h, malformedError("nonsense"))
	}
	if c.start(1) != nil {
		t.Error("a handler has it")
	}
	<-s.refused
	streamtest.Do(s.loop, func() {})
	if len(s.refused) > 0 {
		t.Error("what a handler has was refused")
	}
}
