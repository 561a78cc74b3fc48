package http1

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/task"
)

// memory is what a connection uses for one message after the other.
type memory struct {
	request  requestHead
	response responseHead
	body     bodyDecoder
	content  []byte
	written  []byte
}

// requests reads all that a client says, and writes each head anew. It returns how many
// requests there were.
func (m *memory) requests(raw []byte) (n int, err error) {
	m.content = m.content[:0]
	for ; len(raw) > 0; n++ {
		scan := headScanner{limit: defaultHeadSize, request: true}
		end, err := scan.scan(raw)
		if end == 2 {
			raw = raw[2:]
			scan = headScanner{limit: defaultHeadSize, request: true}
			end, err = scan.scan(raw)
		}
		if err == nil {
			err = m.request.parse(viewOf(raw[:end]), "http")
		}
		if err != nil {
			return n, err
		}
		raw = raw[end:]
		if m.request.hasTail {
			m.request.addTail(raw[:draft76Tail])
			raw = raw[draft76Tail:]
		}
		if raw, err = m.decode(raw, decoderFor(m.request.ContentLength)); err != nil {
			return n, err
		}
		if m.request.UpgradeBody {
			continue // which no handler sends on
		}
		if m.written, err = appendRequest(m.written[:0], &m.request.Request); err != nil {
			return n, err
		}
	}
	return n, nil
}

// responses is the same of an upstream.
func (m *memory) responses(raw []byte, method string) (n int, err error) {
	m.content = m.content[:0]
	for ; len(raw) > 0; n++ {
		scan := headScanner{limit: defaultHeadSize}
		end, err := scan.scan(raw)
		if err == nil {
			err = m.response.parse(viewOf(raw[:end]), method)
		}
		if err != nil {
			return n, err
		}
		raw = raw[end:]
		if raw, err = m.decode(raw, m.response.body); err != nil {
			return n, err
		}
		f := framing{body: m.response.body.kind, close: m.response.close, date: "Thu, 01 Jan 1970 00:00:00 GMT"}
		if m.written, err = appendResponse(m.written[:0], &m.response.Response, f); err != nil {
			return n, err
		}
	}
	return n, nil
}

func (m *memory) decode(raw []byte, dec bodyDecoder) (rest []byte, err error) {
	dec.reuse(&m.body)
	m.body = dec
	for !m.body.done() {
		content, n, err := m.body.next(raw, len(raw))
		if err != nil {
			return nil, err
		}
		m.content = append(m.content, content...)
		if raw = raw[n:]; len(raw) == 0 && m.body.kind == untilClose {
			break
		}
	}
	m.written = appendLastChunk(m.written[:0], m.body.trailers)
	return raw, nil
}

// TestValidMessagesAllocateNothing: with memory that was used before, neither reading a
// valid message nor writing its head again allocates.
func TestValidMessagesAllocateNothing(t *testing.T) {
	m := &memory{written: make([]byte, 0, 64<<10)}
	valid := 0
	for name, raw := range requestsToFeed(t) {
		c := readRequests(raw)
		if len(c.read) == 0 || c.err != nil || c.in != nil || len(c.pending) > 0 {
			continue
		}
		valid++
		sent := []byte(raw)
		wantNoGarbage(t, name, len(c.read), func() (int, error) { return m.requests(sent) })
	}
	for name, raw := range responses {
		for _, method := range []string{"GET", "HEAD"} {
			c := readResponses(method, raw)
			if c.err != nil || c.in != nil || len(c.pending) > 0 {
				continue // content that HEAD makes none
			}
			valid++
			sent := []byte(raw)
			wantNoGarbage(t, name, len(c.read), func() (int, error) { return m.responses(sent, method) })
		}
	}
	upgraded := []byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n")
	wantNoGarbage(t, "an upgrade", 1, func() (int, error) { return m.responses(upgraded, "GET") })
	if valid < 40 {
		t.Errorf("only %d conversations are valid", valid)
	}
}

func wantNoGarbage(t *testing.T, name string, messages int, read func() (int, error)) {
	t.Helper()
	var n int
	var err error
	allocations := testing.AllocsPerRun(3, func() { n, err = read() })
	if n != messages || err != nil || allocations != 0 {
		t.Errorf("%s: %d messages, %v, want %d; %v allocations", name, n, err, messages, allocations)
	}
}

// TestMemoryIsUsedAgain: what one message has left behind is not seen in the next.
func TestMemoryIsUsedAgain(t *testing.T) {
	t.Parallel()
	all := requestsToFeed(t)
	var h requestHead
	for name, raw := range all {
		scan := headScanner{limit: defaultHeadSize, request: true}
		end, _ := scan.scan([]byte(raw))
		if end <= 2 {
			continue
		}
		fresh, want := readRequest(raw)
		got := h.parse(raw[:end], "http")
		if fmt.Sprint(got) != fmt.Sprint(want) || want == nil && describe(h) != describe(fresh) {
			t.Errorf("%s:\ngot  %s, %v\nwant %s, %v", name, describe(h), got, describe(fresh), want)
		}
		h.addTail([]byte("12345678"))
	}
	var r responseHead
	for name, raw := range allResponses() {
		scan := headScanner{limit: defaultHeadSize}
		end, _ := scan.scan([]byte(raw))
		if end == 0 {
			continue
		}
		fresh, want := readResponse(raw, "GET")
		got := r.parse(raw[:end], "GET")
		same := fmt.Sprint(r.Response) == fmt.Sprint(fresh.Response) && r.body.kind == fresh.body.kind && r.close == fresh.close
		if fmt.Sprint(got) != fmt.Sprint(want) || want == nil && !same {
			t.Errorf("%s:\ngot  %+v, %v\nwant %+v, %v", name, r.Response, got, fresh.Response, want)
		}
	}
}

// TestNamesOfOneHopAreForgotten: what Connection names concerns its own message.
func TestNamesOfOneHopAreForgotten(t *testing.T) {
	t.Parallel()
	var h requestHead
	for _, tt := range []struct{ head, want string }{
		{"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: A, close\r\nA: b\r\nC: d\r\n\r\n", "GET a.test / 1.1 0 [C=d] close"},
		{"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: C\r\nA: b\r\nC: d\r\n\r\n", "GET a.test / 1.1 0 [A=b]"},
		{"GET / HTTP/1.1\r\nHost: a.test\r\nA: b\r\nC: d\r\n\r\n", "GET a.test / 1.1 0 [A=b C=d]"},
	} {
		if err := h.parse(tt.head, "http"); err != nil || describe(h) != tt.want {
			t.Errorf("got %s, %v, want %s", describe(h), err, tt.want)
		}
	}
}

// TestReadableOfBadHeads: of a head that was refused, the log gets the request line.
func TestReadableOfBadHeads(t *testing.T) {
	t.Parallel()
	h, err := readRequest(conversations["chunked bodies with trailers"])
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ head, want string }{
		{"GET http://a.test/x?y HTTP/1.1\r\nHost : b\r\n\r\n", "GET /x?y 1.1"},
		{"GET /x HTTP/1.0\r\nHo", "GET /x 1.0"},
		{"GET /x HTTP/1.1", "  0.0"},
		{"GET x HTTP/1.1\r\n", "  0.0"},
		{"", "  0.0"},
	} {
		h.readable(tt.head, "https")
		got := fmt.Sprintf("%s %s %d.%d", h.Method, h.Target, h.Major, h.Minor)
		if got != tt.want || h.Scheme != "https" || len(h.Fields) > 0 || h.ContentLength != 0 || h.Trailers || h.Authority != "" {
			t.Errorf("%q: got %s, %+v", tt.head, got, h.Request)
		}
	}
}

// TestBodiesAllocateNothing: a body is read, and written with a head, in steady state.
func TestBodiesAllocateNothing(t *testing.T) {
	w := newBodyWire(t)
	large := strings.Repeat("x", 6000)
	raw := []byte("5\r\nhello\r\n1770\r\n" + large + "\r\n1\r\n!\r\n0\r\nETag: v\r\n\r\n")
	var peer int
	w.raw.Control(func(fd uintptr) { peer = int(fd) })
	buf := make([]byte, 64<<10)
	b, err := bodyReader{}, error(nil)
	var sent int
	w.run(func(t *task.Task) {
		allocations := testing.AllocsPerRun(50, func() {
			if _, err = unix.Write(peer, raw); err != nil {
				return
			}
			b.begin(&w.ours, decoderFor(-1), 0)
			out := bodyWriter{out: &w.ours, kind: byChunks}
			out.held = append(out.take(), "head"...)
			var p []byte
			for err == nil {
				if p, err = b.read(t); err == nil {
					err = out.write(t, p)
				}
			}
			if err == io.EOF {
				err = out.finish(t, b.dec.trailers)
			}
			sent, _ = unix.Read(peer, buf)
		})
		if allocations != 0 {
			err = fmt.Errorf("%v allocations", allocations)
		}
	})
	if want := "head1776\r\nhello" + large + "!\r\n0\r\nETag: v\r\n\r\n"; err != nil || string(buf[:sent]) != want {
		t.Errorf("%v; sent %q", err, buf[:sent])
	}
}
