package http1

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
)

// generator makes messages out of good and bad parts, and damages some of them.
type generator struct{ *rand.Rand }

// newGenerator returns one that makes the same of the same seed.
func newGenerator(seed string) generator {
	h := fnv.New64()
	h.Write([]byte(seed))
	return generator{rand.New(rand.NewPCG(h.Sum64(), 1))}
}

func (g generator) one(of []string) string { return of[g.IntN(len(of))] }

// mostly takes the first third of the parts, which are the usual ones, more often.
func (g generator) mostly(of []string) string {
	if g.IntN(4) > 0 {
		return g.one(of[:len(of)/3+1])
	}
	return g.one(of)
}

var (
	requestLines = []string{
		"GET / HTTP/1.1", "POST /a?b=c HTTP/1.1", "PUT /%41 HTTP/1.1", "HEAD / HTTP/1.1", "OPTIONS * HTTP/1.1", "GET / HTTP/1.0",
		"GET http://a.test/x HTTP/1.1", "GET HTTP://A.TEST HTTP/1.1", "GET http://b.test/ HTTP/1.1", "OPTIONS http://a.test HTTP/1.1", "GET https://a.test?x HTTP/1.1",
		"GET * HTTP/1.1", "CONNECT a.test:80 HTTP/1.1", "GET a.test HTTP/1.1", "GET //a.test/ HTTP/1.1", "GET /%zz HTTP/1.1", "GET /a#b HTTP/1.1", "GET /\xc3\xa4 HTTP/1.1",
		"GET / HTTP/1.2", "GET / HTTP/2.0", "GET / HTTP/1.10", "GET  / HTTP/1.1", "GET / HTTP/1.1 ", "GET /a b HTTP/1.1", "G@T / HTTP/1.1", "GET /", "get / http/1.1",
		"PRI * HTTP/2.0", "GET ftp://a.test/ HTTP/1.1", "GET http://u@a.test/ HTTP/1.1", "GET /\" HTTP/1.1", "GET mailto:x HTTP/1.1", "GET http:///x HTTP/1.1", "GET http://a.test:80/ HTTP/1.1",
	}
	statusLines = []string{
		"HTTP/1.1 200 OK", "HTTP/1.1 404 Not Found", "HTTP/1.1 200", "HTTP/1.1 304 Not Modified", "HTTP/1.1 103 Early Hints", "HTTP/1.1 204 No Content", "HTTP/1.0 200 OK",
		"HTTP/1.1 101 Switching Protocols", "HTTP/1.1 200 ", "HTTP/1.1 100 Continue", "HTTP/1.1 200  OK", "HTTP/1.1  200 OK", "HTTP/1.0 101 Switching Protocols", "HTTP/1.0 103 Early Hints", "HTTP/1.1 600 x", "HTTP/1.1 099 x", "HTTP/1.1 20 OK",
		"HTTP/1.1 2000 OK", "HTTP/1.1 +20 OK", "HTTP/1.1 -20 OK", "HTTP/2.0 200 OK", "HTTP/1.2 200 OK", "ICY 200 OK", "HTTP/1.1", "HTTP/1.1 200 O\x01K", "HTTP/1.1 200\tOK", "http/1.1 200 OK", "HTTP/1.1 999 x",
	}
	hostLines = []string{
		"Host: a.test", "host: a.test", "Host: a.test", "Host: A.TEST", "Host: [::1]:80", "", "Host:", "Host: a.test\r\nHost: a.test", "Host: a.test/x", "Host: u@a.test", "Host: a%2etest",
		"Host: a.test:", "Host: a.test:99999", "Host: a.test, b.test", "Host: \xc3\xa4", "Host : a.test", "Host: a b", "Host: [fe80::1%25eth0]",
	}
	fieldLines = []string{
		"A: b", "A:b", "a: B", "A:\tb \t", "A:", "Cookie: x=1; y=2", "User-Agent: x", "X-A: \xe4", "Sec-WebSocket-Key1: 1", "Sec-WebSocket-Key2: 2",
		"Connection: keep-alive", "Connection: close", "Connection: Upgrade", "Upgrade: websocket", "Expect: 100-continue", "Trailer: ETag", "Pragma: no-cache", "Cache-Control: no-cache",
		"Connection: a", "Connection: close, a", "Connection: ,,", "Connection: a b", "Connection: content-length", "Connection: host", "Upgrade: h2c", "HTTP2-Settings: x", "Keep-Alive: 5", "TE: trailers", "TE: trailers, gzip", "Connection: TE", "Connection: te, a", "Proxy-Connection: close",
		"Expect: x", "Content_Length: 5", "Transfer_Encoding: chunked", "A : b", " A: b", "A: b\r\n c", "A", ": b", "A b: c", "A\x00: b", "A: \x00", "A: b\x7f", "A: b\rC: d", "A: b\nC: d", "A: b\r", "\xe4: b", "A(: b", "Trailer: Content-Length", "Trailer: a b",
		"Content-Length: 3", "Transfer-Encoding: chunked", "Date: x", "Pragma: x",
	}
	trailerLines = []string{"ETag: v", "Digest: w", "X-T: v", "Grpc-Status: 0", "Set-Cookie: a", "Content-Length: 5", "Host: b", "Transfer-Encoding: chunked", "A : b", "A: b\r\n c", "A", "Trailer: x", "A: \x01", "A: b\n"}
	sizeLines    = []string{"%x", "%X", "%x;a=b", "0%x", "00000000000000%x", "%x ", " %x", "%x;a=\"b\"", "%x;\xe4", "0x%x", "+%x", "%x\t", "%x; ", "%x\n", "0000000000000000%x", "%x;\x01", "%x;a\rb", "%x ;a", "f%015x"}
	lengthLines  = []string{"Content-Length: %d", "content-length: %d", "Content-Length:%d", "Content-Length: 0%d", "Content-Length: +%d", "Content-Length: %d, %[1]d", "Content-Length: %d\r\nContent-Length: %[1]d",
		"Content-Length: %dx", "Content-Length: -%d", "Content-Length: 1%d", "Content-Length: %d\r\nTransfer-Encoding: chunked", "Content-Length: \"%d\"", "Content-Length: 0x%d", "Content-Length: 18446744073709551616%d", "Content-Length: 922337203685477580%d", "Content-Length: 5764607523034234%03d", "Content-Length:", "Content-Length: %d\r\nContent-Length: 1"}
	codingLines = []string{"Transfer-Encoding: chunked", "transfer-encoding:chunked", "Transfer-Encoding: Chunked", "Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, gzip", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding: chunked, chunked", "Transfer-Encoding:\x0bchunked", "Transfer-Encoding: \"chunked\"", "Transfer-Encoding: ", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"}
	chunkEnds = []string{"\r\n", "\r\n", "\r\n", "\n", "\r", "", "\rX\n", "X\r\n", "\r\r\n", "\r\n\r\n"}
	contents  = []string{"", "x", "hello", "0\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"}
)

func (g generator) request() string {
	head := g.mostly(requestLines)
	if g.IntN(10) == 0 {
		head = "\r\n" + head
	}
	return g.message(head, append([]string{g.mostly(hostLines)}, g.fields()...))
}

func (g generator) response() string { return g.message(g.mostly(statusLines), g.fields()) }

func (g generator) fields() (lines []string) {
	for range g.IntN(4) {
		lines = append(lines, g.mostly(fieldLines))
	}
	return lines
}

// message adds a body in one of the framings, and shuffles the fields.
func (g generator) message(start string, lines []string) string {
	content, body := g.one(contents), ""
	switch g.IntN(5) {
	case 0, 1:
	case 2:
		lines = append(lines, fmt.Sprintf(strings.Split(g.mostly(lengthLines), "%!")[0], len(content)))
		body = content
	default:
		lines = append(lines, g.mostly(codingLines))
		body = g.chunked(content)
	}
	g.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
	lines = slices.DeleteFunc(lines, func(s string) bool { return s == "" })
	return strings.Join(append([]string{start}, lines...), "\r\n") + "\r\n\r\n" + body
}

func (g generator) chunked(content string) string {
	var b strings.Builder
	for content != "" {
		n := 1 + g.IntN(len(content))
		fmt.Fprintf(&b, g.mostly(sizeLines)+"\r\n%s%s", n, content[:n], g.mostly(chunkEnds))
		content = content[n:]
	}
	fmt.Fprintf(&b, g.mostly(sizeLines)+"\r\n", 0)
	for range g.IntN(3) {
		b.WriteString(g.mostly(trailerLines) + "\r\n")
	}
	return b.String() + "\r\n"
}

// damage changes a few bytes.
func (g generator) damage(raw string) string {
	const alphabet = "\r\n\t \x00\x01\x7f\x80\xff:;,0aAfF/%#\"-_."
	for n := g.IntN(4); n > 0 && raw != ""; n-- {
		i := g.IntN(len(raw))
		j := min(len(raw), i+1+g.IntN(8))
		c := string(alphabet[g.IntN(len(alphabet))])
		switch g.IntN(6) {
		case 0:
			raw = raw[:i] + c + raw[i:]
		case 1:
			raw = raw[:i] + raw[i+1:]
		case 2:
			raw = raw[:i] + c + raw[i+1:]
		case 3:
			raw = raw[:j] + raw[i:]
		case 4:
			raw = strings.Replace(raw, "\r\n", g.one([]string{"\n", "\r", "\r\r\n", "\r\n\r\n", ""}), 1+g.IntN(3))
		case 5:
			raw = raw[:i] + raw[j:]
		}
	}
	return raw
}
