package http1

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

// readRequest scans and parses as a connection does, from bytes that are there at once.
func readRequest(raw string) (requestHead, error) {
	scan := headScanner{limit: defaultHeadSize, request: true}
	end, err := scan.scan([]byte(raw))
	if err != nil {
		return requestHead{}, err
	}
	if end == 0 {
		return requestHead{}, fmt.Errorf("no end of head in %q", raw)
	}
	var h requestHead
	err = h.parse(raw[:end], "http")
	return h, err
}

// Who has taken the port of another protocol for this one is to find out why nothing works.
func TestTLSIsCalledByItsName(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": "it begins as TLS does, which is not spoken here",
		"\x15\x03\x01\x00\x02\x02\x46":                 "it begins as TLS does, which is not spoken here",
		"\x16":                                         "it begins as TLS does, which is not spoken here",
		"\x17\x03":                                     "a control character",
		"GET /\x16\x03":                                "a control character",
	} {
		for _, request := range []bool{true, false} {
			scan := headScanner{limit: defaultHeadSize, request: request}
			if _, err := scan.scan([]byte(raw)); err == nil || err.Error() != want {
				t.Errorf("%q: %v, want %q", raw, err, want)
			}
		}
	}
}

func TestRequestHeadsThatAreRefused(t *testing.T) {
	t.Parallel()
	const h = "Host: a.test\r\n"
	tests := []struct {
		name   string
		raw    string
		status int
	}{
		{"a request line without a version", "GET /\r\n\r\n", 400},
		{"an empty method", " / HTTP/1.1\r\n" + h + "\r\n", 400},
		{"a method that is no token", "G@T / HTTP/1.1\r\n" + h + "\r\n", 400},
		{"two spaces before the target", "GET  / HTTP/1.1\r\n" + h + "\r\n", 400},
		{"two spaces before the version", "GET /  HTTP/1.1\r\n" + h + "\r\n", 400},
		{"a space behind the version", "GET / HTTP/1.1 \r\n" + h + "\r\n", 400},
		{"a tab for a space", "GET\t/ HTTP/1.1\r\n" + h + "\r\n", 400},
		{"a space before the method", " GET / HTTP/1.1\r\n" + h + "\r\n", 400},
		{"lower-case http", "GET / http/1.1\r\n" + h + "\r\n", 400},
		{"another protocol", "GET / RTSP/1.0\r\n" + h + "\r\n", 400},
		{"a version of two digits", "GET / HTTP/1.10\r\n" + h + "\r\n", 400},
		{"a version without a dot", "GET / HTTP/11\r\n" + h + "\r\n", 400},
		{"HTTP/1.2", "GET / HTTP/1.2\r\n" + h + "\r\n", 505},
		{"HTTP/0.9 that says so", "GET / HTTP/0.9\r\n" + h + "\r\n", 505},
		{"HTTP/2.0", "GET / HTTP/2.0\r\n" + h + "\r\n", 505},
		{"the HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\n", 505},
		{"the whole HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
		{"a request of HTTP/0.9", "GET /\r\n", 400},
		{"a line of another protocol", "EHLO\r\n", 400},
		{"CONNECT", "CONNECT a.test:80 HTTP/1.1\r\n" + h + "\r\n", 501},
		{"CONNECT with a path", "CONNECT / HTTP/1.1\r\n" + h + "\r\n", 501},
		{"a target without a slash", "GET a HTTP/1.1\r\n" + h + "\r\n", 400},
		{"an asterisk for GET", "GET * HTTP/1.1\r\n" + h + "\r\n", 400},
		{"an asterisk with more", "OPTIONS */a HTTP/1.1\r\n" + h + "\r\n", 400},
		{"a fragment", "GET /a#b HTTP/1.1\r\n" + h + "\r\n", 400},
		{"a target beyond ASCII", "GET /\xc3\xa4 HTTP/1.1\r\n" + h + "\r\n", 400},
		{"a target that is too long", "GET /" + strings.Repeat("a", maxTarget) + " HTTP/1.1\r\n" + h + "\r\n", 414},
		{"absolute-form of another scheme", "GET ftp://a.test/ HTTP/1.1\r\n" + h + "\r\n", 400},
		{"absolute-form with a port that Host leaves out", "GET http://a.test:80/ HTTP/1.1\r\n" + h + "\r\n", 400},
		{"absolute-form and no Host", "GET http://a.test/ HTTP/1.1\r\n\r\n", 400},
		{"absolute-form with a NUL in its host", "GET http://a\x00.test/ HTTP/1.1\r\n" + h + "\r\n", 400},
		{"absolute-form that disagrees with Host", "GET http://b.test/ HTTP/1.1\r\n" + h + "\r\n", 400},
		{"absolute-form with another port", "GET http://a.test:81/ HTTP/1.1\r\n" + h + "\r\n", 400},
		{"absolute-form with user information", "GET http://u@a.test/ HTTP/1.1\r\nHost: u@a.test\r\n\r\n", 400},
		{"absolute-form without a host", "GET http:///a HTTP/1.1\r\n" + h + "\r\n", 400},
		{"no Host", "GET / HTTP/1.1\r\n\r\n", 400},
		{"no Host in HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", 400},
		{"two Hosts", "GET / HTTP/1.1\r\n" + h + h + "\r\n", 400},
		{"an empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400},
		{"a Host with a path", "GET / HTTP/1.1\r\nHost: a.test/x\r\n\r\n", 400},
		{"a Host list", "GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n", 400},
		{"a Host with user information", "GET / HTTP/1.1\r\nHost: u@a.test\r\n\r\n", 400},
		{"a Host with percent-encoding", "GET / HTTP/1.1\r\nHost: a%2etest\r\n\r\n", 400},
		{"a Host with an empty port", "GET / HTTP/1.1\r\nHost: a.test:\r\n\r\n", 400},
		{"a Host with a negative port", "GET / HTTP/1.1\r\nHost: a.test:-1\r\n\r\n", 400},
		{"a Host with a port too high", "GET / HTTP/1.1\r\nHost: a.test:65536\r\n\r\n", 400},
		{"a Host with two ports", "GET / HTTP/1.1\r\nHost: a.test:1:2\r\n\r\n", 400},
		{"an IPv6 Host without brackets", "GET / HTTP/1.1\r\nHost: ::1\r\n\r\n", 400},
		{"an IPv6 Host without an end", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400},
		{"an IPv6 Host with a zone", "GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n\r\n", 400},
		{"an IPv6 Host with a tail", "GET / HTTP/1.1\r\nHost: [::1]x\r\n\r\n", 400},
		{"an IPv4 address in brackets", "GET / HTTP/1.1\r\nHost: [127.0.0.1]\r\n\r\n", 400},
		{"a space before the colon", "GET / HTTP/1.1\r\n" + h + "A : b\r\n\r\n", 400},
		{"an empty field name", "GET / HTTP/1.1\r\n" + h + ": b\r\n\r\n", 400},
		{"a field without a colon", "GET / HTTP/1.1\r\n" + h + "A\r\n\r\n", 400},
		{"a folded line", "GET / HTTP/1.1\r\n" + h + "A: b\r\n c\r\n\r\n", 400},
		{"a line that begins with a tab", "GET / HTTP/1.1\r\n\t" + h + "\r\n", 400},
		{"a bare LF", "GET / HTTP/1.1\n" + h + "\r\n", 400},
		{"a bare LF at the end", "GET / HTTP/1.1\r\n" + h + "\n", 400},
		{"a bare CR", "GET / HTTP/1.1\r\n" + h + "A: b\rC: d\r\n\r\n", 400},
		{"a TLS hello", "\x16\x03\x01\x00P\x01\x00", 400},
		{"CR for all line ends", "GET / HTTP/1.1\rHost: a.test\r\r", 400},
		{"LF for all line ends", "GET / HTTP/1.1\nHost: a.test\n\n", 400},
		{"a CR before CRLF", "GET / HTTP/1.1\r\n" + h + "A: b\r\r\n\r\n", 400},
		{"too many fields", "GET / HTTP/1.1\r\n" + h + strings.Repeat("A: b\r\n", maxFields) + "\r\n", 431},
		{"a head that is too large", "GET / HTTP/1.1\r\n" + h + "A: " + strings.Repeat("b", defaultHeadSize) + "\r\n\r\n", 431},
		{"a request line without end", "GET /" + strings.Repeat("a", defaultHeadSize), 414},
		{"a signed length", "POST / HTTP/1.1\r\n" + h + "Content-Length: +5\r\n\r\n", 400},
		{"an empty length", "POST / HTTP/1.1\r\n" + h + "Content-Length:\r\n\r\n", 400},
		{"a hexadecimal length", "POST / HTTP/1.1\r\n" + h + "Content-Length: 0x5\r\n\r\n", 400},
		{"a length list", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5, 5\r\n\r\n", 400},
		{"two lengths", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400},
		{"the same length twice", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400},
		{"a length above 2^62", "POST / HTTP/1.1\r\n" + h + "Content-Length: 4611686018427387905\r\n\r\n", 400},
		{"a length above 2^64", "POST / HTTP/1.1\r\n" + h + "Content-Length: 18446744073709551621\r\n\r\n", 400},
		{"both lengths", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"chunked twice", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"chunked twice in a list", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked, chunked\r\n\r\n", 400},
		{"chunked before another coding", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked, gzip\r\n\r\n", 400},
		{"chunked with a Kelvin sign", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chun\u212aed\r\n\r\n", 400},
		{"chunked in quotes", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: \"chunked\"\r\n\r\n", 400},
		{"chunked with a parameter", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked;q=1\r\n\r\n", 400},
		{"chunked behind a vertical tab", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: \x0bchunked\r\n\r\n", 400},
		{"chunked and an empty element", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked,\r\n\r\n", 501},
		{"chunked and a second line", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 400},
		{"both lengths, the other way round", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400},
		{"both lengths in HTTP/1.0", "POST / HTTP/1.0\r\n" + h + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400},
		{"identity", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: identity\r\n\r\n", 501},
		{"a coding before chunked", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501},
		{"an unknown coding", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: cow\r\n\r\n", 501},
		{"an empty coding", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding:\r\n\r\n", 501},
		{"chunked in HTTP/1.0", "POST / HTTP/1.0\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n", 400},
		{"a name like Content-Length", "POST / HTTP/1.1\r\n" + h + "content_length: 5\r\n\r\n", 400},
		{"a name like Transfer-Encoding", "POST / HTTP/1.1\r\n" + h + "Transfer_Encoding: chunked\r\n\r\n", 400},
		{"Connection that names Host", "GET / HTTP/1.1\r\n" + h + "Connection: close, Host\r\n\r\n", 400},
		{"Connection that names Content-Length", "GET / HTTP/1.1\r\n" + h + "Connection: content-length\r\n\r\n", 400},
		{"Connection that names Transfer-Encoding", "GET / HTTP/1.1\r\n" + h + "Connection: transfer-encoding\r\n\r\n", 400},
		{"a Connection option that is no token", "GET / HTTP/1.1\r\n" + h + "Connection: \"close\"\r\n\r\n", 400},
		{"too many Connection options", "GET / HTTP/1.1\r\n" + h + "Connection: " + strings.Repeat("a,", maxOptions+1) + "\r\n\r\n", 400},
		{"an unknown expectation", "GET / HTTP/1.1\r\n" + h + "Expect: 200-ok\r\n\r\n", 417},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			head, err := readRequest(tt.raw)
			if got := exchange.StatusOf(err, 0); got != tt.status {
				t.Errorf("status %d (%v), want %d; head %+v", got, err, tt.status, head.Request)
			}
		})
	}
}

func TestRequestHeadsThatAreUnderstood(t *testing.T) {
	t.Parallel()
	const h = "Host: a.test\r\n"
	const ws = "GET / HTTP/1.1\r\n" + h + "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
	tests := []struct{ name, raw, want string }{
		{"the least", "GET / HTTP/1.1\r\n" + h + "\r\n", "GET a.test / 1.1 0 []"},
		{"white space around a value", "GET / HTTP/1.1\r\nHost:a.test \r\nA:\t b c \t\r\n\r\n", "GET a.test / 1.1 0 [A=b c]"},
		{"an empty value and bytes beyond ASCII", "GET / HTTP/1.1\r\n" + h + "A:\r\nB: \xe4\r\n\r\n", "GET a.test / 1.1 0 [A= B=\xe4]"},
		{"fields in their order and case", "GET / HTTP/1.1\r\nb: 1\r\n" + h + "A: 2\r\nb: 3\r\n\r\n", "GET a.test / 1.1 0 [b=1 A=2 b=3]"},
		{"an unusual method", "M-SEARCH /x?y HTTP/1.1\r\n" + h + "\r\n", "M-SEARCH a.test /x?y 1.1 0 []"},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\n" + h + "\r\n", "OPTIONS a.test * 1.1 0 []"},
		{"absolute-form", "GET http://A.test/x?y HTTP/1.1\r\n" + h + "\r\n", "GET a.test /x?y 1.1 0 []"},
		{"absolute-form without a path", "GET HTTPS://a.test HTTP/1.1\r\n" + h + "\r\n", "GET a.test / 1.1 0 []"},
		{"absolute-form with a query only", "GET http://a.test?x HTTP/1.1\r\n" + h + "\r\n", "GET a.test /?x 1.1 0 []"},
		{"absolute-form OPTIONS without a path", "OPTIONS http://a.test HTTP/1.1\r\n" + h + "\r\n", "OPTIONS a.test * 1.1 0 []"},
		{"a Host with a port", "GET / HTTP/1.1\r\nHost: a.test:80\r\n\r\n", "GET a.test:80 / 1.1 0 []"},
		{"an IPv6 Host", "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "GET [::1]:80 / 1.1 0 []"},
		{"HTTP/1.0 is the last one", "GET / HTTP/1.0\r\n" + h + "Connection: keep-alive\r\n\r\n", "GET a.test / 1.0 0 [] close"},
		{"Connection: close", "GET / HTTP/1.1\r\n" + h + "Connection: Close\r\n\r\n", "GET a.test / 1.1 0 [] close"},
		{"a length", "POST / HTTP/1.1\r\n" + h + "Content-Length: 0005\r\n\r\n", "POST a.test / 1.1 5 []"},
		{"the largest length", "POST / HTTP/1.1\r\n" + h + "Content-Length: 4611686018427387904\r\n\r\n", "POST a.test / 1.1 4611686018427387904 []"},
		{"chunked", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: Chunked\r\nTrailer: T\r\n\r\n", "POST a.test / 1.1 -1 [] trailers"},
		{"an expectation", "POST / HTTP/1.1\r\n" + h + "Content-Length: 5\r\nExpect: 100-Continue\r\n\r\n", "POST a.test / 1.1 5 [] expect"},
		{"an expectation without a body", "POST / HTTP/1.1\r\n" + h + "Expect: 100-continue\r\n\r\n", "POST a.test / 1.1 0 []"},
		{"an expectation in HTTP/1.0", "POST / HTTP/1.0\r\n" + h + "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n", "POST a.test / 1.0 5 [] close"},
		{"fields of one hop are removed", "GET / HTTP/1.1\r\n" + h + "Keep-Alive: 1\r\nProxy-Connection: x\r\nTE: trailers\r\nHTTP2-Settings: x\r\nA: b\r\n\r\n", "GET a.test / 1.1 0 [A=b]"},
		{"a client that takes trailers", "GET / HTTP/1.1\r\n" + h + "TE: gzip;q=0.5 ,\tTrailers\r\nConnection: keep-alive, te\r\nA: b\r\n\r\n", "GET a.test / 1.1 0 [A=b] takes trailers"},
		{"a client that takes trailers, in lines", "GET / HTTP/1.1\r\n" + h + "Connection: TE\r\nTE: gzip\r\nTE: trailers, deflate\r\n\r\n", "GET a.test / 1.1 0 [] takes trailers"},
		{"TE without its word", "GET / HTTP/1.1\r\n" + h + "Connection: TE\r\nTE: gzip, trailers;q=1, xtrailers\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"TE of a hop before", "GET / HTTP/1.1\r\n" + h + "Connection: keep-alive\r\nTE: trailers\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"TE that is named and not there", "GET / HTTP/1.1\r\n" + h + "Connection: TE\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"TE in HTTP/1.0", "GET / HTTP/1.0\r\n" + h + "Connection: TE\r\nTE: trailers\r\n\r\n", "GET a.test / 1.0 0 [] close"},
		{"TE in an upgrade", ws + "Connection: TE\r\nTE: trailers\r\n\r\n", "GET a.test / 1.1 0 [] upgrade"},
		{"fields that Connection names are removed", "GET / HTTP/1.1\r\n" + h + "x-forwarded-for: 1\r\nA: b\r\nConnection: X-Forwarded-For,, keep-alive\r\nConnection: c\r\nC: d\r\n\r\n", "GET a.test / 1.1 0 [A=b]"},
		{"a field that stands before Connection and one behind it", "GET / HTTP/1.1\r\n" + h + "Cookie: 1\r\nConnection: cookie, X-A, x-a\r\nX-A: 1\r\nx-a: 2\r\nX-B: 3\r\n\r\n", "GET a.test / 1.1 0 [X-B=3]"},
		{"an option that is not there", "GET / HTTP/1.1\r\n" + h + "Connection: X-C\r\nX-B: 3\r\n\r\n", "GET a.test / 1.1 0 [X-B=3]"},
		{"keep-alive in any number", "GET / HTTP/1.1\r\n" + h + "Connection: " + strings.Repeat("Keep-Alive,", 2*maxOptions) + "\r\nKeep-Alive: 5\r\nA: b\r\n\r\n", "GET a.test / 1.1 0 [A=b]"},
		{"an upgrade", ws + "\r\n", "GET a.test / 1.1 0 [] upgrade"},
		{"an upgrade with an empty body", ws + "Content-Length: 0\r\n\r\n", "GET a.test / 1.1 0 [] upgrade"},
		{"an upgrade with a body", ws + "Content-Length: 1\r\n\r\n", "GET a.test / 1.1 1 [] upgrade body"},
		{"an upgrade with a chunked body", ws + "Transfer-Encoding: chunked\r\n\r\n", "GET a.test / 1.1 -1 [] upgrade body"},
		{"an upgrade of draft 76", ws + "Sec-WebSocket-Key1: a\r\nSec-WebSocket-Key2: b\r\n\r\n", "GET a.test / 1.1 0 [Sec-WebSocket-Key1=a Sec-WebSocket-Key2=b] upgrade tail"},
		{"an upgrade with all three keys", ws + "Sec-WebSocket-Key1: a\r\nSec-WebSocket-Key2: b\r\nSec-WebSocket-Key: c\r\n\r\n", "GET a.test / 1.1 0 [Sec-WebSocket-Key1=a Sec-WebSocket-Key2=b Sec-WebSocket-Key=c] upgrade"},
		{"draft-76 keys without an upgrade", "GET / HTTP/1.1\r\n" + h + "Sec-WebSocket-Key1: a\r\nSec-WebSocket-Key2: b\r\n\r\n", "GET a.test / 1.1 0 [Sec-WebSocket-Key1=a Sec-WebSocket-Key2=b]"},
		{"an Upgrade that Connection does not name", "GET / HTTP/1.1\r\n" + h + "Upgrade: websocket\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade by POST", "POST / HTTP/1.1\r\n" + h + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "POST a.test / 1.1 0 []"},
		{"an upgrade in HTTP/1.0", "GET / HTTP/1.0\r\n" + h + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "GET a.test / 1.0 0 [] close"},
		{"an upgrade to h2c without its settings", "GET / HTTP/1.1\r\n" + h + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"settings of HTTP/2 that Connection does not name", "GET / HTTP/1.1\r\n" + h + "HTTP2-Settings: A\r\nA: b\r\n\r\n", "GET a.test / 1.1 0 [A=b]"},
		{"an upgrade to h2c and WebSocket", "GET / HTTP/1.1\r\n" + h + "Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade to h2c", "GET / HTTP/1.1\r\n" + h + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade list", "GET / HTTP/1.1\r\n" + h + "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade with a Kelvin sign", "GET / HTTP/1.1\r\n" + h + "Connection: Upgrade\r\nUpgrade: websoc\u212aet\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade to something else", "GET / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: My-Proto/2\r\n\r\n", "GET a.test / 1.1 0 [] offers my-proto/2"},
		{"an upgrade to something else, with a body", "GET / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: my-proto\r\nContent-Length: 1\r\n\r\n", "GET a.test / 1.1 1 [] offers my-proto"},
		{"something else that Connection does not name", "GET / HTTP/1.1\r\n" + h + "Upgrade: my-proto\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"something else by POST", "POST / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: my-proto\r\n\r\n", "POST a.test / 1.1 0 []"},
		{"a list of something else", "GET / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: my-proto, other\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade to TLS", "GET / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: TLS/1.0\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade to HTTP", "GET / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"an upgrade to no protocol", "GET / HTTP/1.1\r\n" + h + "Connection: upgrade\r\nUpgrade: my/proto/2\r\n\r\n", "GET a.test / 1.1 0 []"},
		{"two Upgrade lines", ws + "Upgrade: websocket\r\n\r\n", "GET a.test / 1.1 0 []"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			head, err := readRequest(tt.raw)
			if err != nil {
				t.Fatal(err)
			}
			if got := describe(head); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// describe renders all that a request head says.
func describe(h requestHead) string {
	var fields []string
	for _, f := range h.Fields {
		fields = append(fields, f.Name+"="+f.Value)
	}
	s := fmt.Sprintf("%s %s %s %d.%d %d %v", h.Method, h.Authority, h.Target, h.Major, h.Minor, h.ContentLength, fields)
	for _, flag := range []struct {
		on   bool
		name string
	}{{h.Upgrade == "websocket", "upgrade"}, {h.UpgradeBody, "body"}, {h.hasTail, "tail"}, {h.Trailers, "trailers"}, {h.TakesTrailers, "takes trailers"}, {h.expect, "expect"}, {h.close, "close"}} {
		if flag.on {
			s += " " + flag.name
		}
	}
	if h.Offer != "" {
		s += " offers " + h.Offer
	}
	return s
}

// TestForbiddenBytes puts every byte at every place of a head and compares with the
// grammar, written a second time.
func TestForbiddenBytes(t *testing.T) {
	t.Parallel()
	const tokens = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	isTchar := func(c byte) bool { return strings.IndexByte(tokens, c) >= 0 }
	tests := []struct {
		name          string
		before, after string
		allowed       func(c byte) bool
	}{
		{"in the method", "GE", "T / HTTP/1.1\r\nHost: a\r\n\r\n", isTchar},
		{"in the target", "GET /a", "b HTTP/1.1\r\nHost: a\r\n\r\n", func(c byte) bool { return c > ' ' && c < 0x7f && c != '#' }},
		{"in the version", "GET / HTTP/1.", "\r\nHost: a\r\n\r\n", func(c byte) bool { return c == '0' || c == '1' }},
		{"behind the version", "GET / HTTP/1.1", "\r\nHost: a\r\n\r\n", func(byte) bool { return false }},
		{"in a field name", "GET / HTTP/1.1\r\nHost: a\r\nX", "Y: z\r\n\r\n", func(c byte) bool { return isTchar(c) || c == ':' }},
		{"before a field name", "GET / HTTP/1.1\r\nHost: a\r\n", "Y: z\r\n\r\n", isTchar},
		{"before the colon", "GET / HTTP/1.1\r\nHost: a\r\nY", ": z\r\n\r\n", func(c byte) bool { return isTchar(c) || c == ':' }},
		{"in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: y", "z\r\n\r\n", func(c byte) bool { return c == '\t' || c >= ' ' && c != 0x7f }},
		{"behind a value", "GET / HTTP/1.1\r\nHost: a\r\nX: y", "\r\n\r\n", func(c byte) bool { return c == '\t' || c >= ' ' && c != 0x7f }},
		{"in Host", "GET / HTTP/1.1\r\nHost: a", "b\r\n\r\n", func(c byte) bool { return isTchar(c) && strings.IndexByte("!#$%&'*+^`|", c) < 0 }},
		{"in Content-Length", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1", "1\r\n\r\n", func(c byte) bool { return '0' <= c && c <= '9' }},
		{"in Transfer-Encoding", "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chun", "ked\r\n\r\n", func(byte) bool { return false }},
		{"as a line of its own", "GET / HTTP/1.1\r\nHost: a\r\n", "\r\n\r\n", func(byte) bool { return false }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for c := range 256 {
				_, err := readRequest(tt.before + string([]byte{byte(c)}) + tt.after)
				if (err == nil) != tt.allowed(byte(c)) {
					t.Errorf("byte %#02x: error %v", c, err)
				}
				if err != nil && exchange.StatusOf(err, 0) == 0 {
					t.Errorf("byte %#02x: waits for more", c)
				}
			}
		})
	}
}

// TestScannerAtEverySplit feeds heads in two pieces, and byte by byte.
func TestScannerAtEverySplit(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\nbehind",
		"GET / HTTP/1.1\r\nHost: a\r\nX: y\n\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: y\rz\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: \x00a\r\n\r\n",
		"\r\nGET",
	} {
		whole := headScanner{limit: 100}
		wantEnd, wantErr := whole.scan([]byte(raw))
		for split := range len(raw) {
			scan := headScanner{limit: 100}
			end, err := scan.scan([]byte(raw[:split]))
			if end == 0 && err == nil {
				end, err = scan.scan([]byte(raw))
			}
			if end != wantEnd || fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Errorf("%q split at %d: end %d, error %v; want %d, %v", raw, split, end, err, wantEnd, wantErr)
			}
		}
		bytewise := headScanner{limit: 100}
		end, err := 0, error(nil)
		for n := 0; n <= len(raw) && end == 0 && err == nil; n++ {
			end, err = bytewise.scan([]byte(raw[:n]))
		}
		if end != wantEnd || fmt.Sprint(err) != fmt.Sprint(wantErr) {
			t.Errorf("%q byte by byte: end %d, error %v; want %d, %v", raw, end, err, wantEnd, wantErr)
		}
	}
}

// TestValueLength: looking at eight bytes at once finds what looking at each finds.
func TestValueLength(t *testing.T) {
	t.Parallel()
	for length := range 20 {
		for at := range length {
			for c := range 256 {
				for _, fill := range []byte{'a', 0xff} {
					b := bytes.Repeat([]byte{fill}, length)
					b[at] = byte(c)
					want := length
					if c < ' ' && c != '\t' || c == 0x7f {
						want = at
					}
					if got := valueLength(b); got != want {
						t.Fatalf("%q: %d, want %d", b, got, want)
					}
				}
			}
		}
	}
	g := newGenerator("values")
	for range 1000 { // what comes behind the first one changes nothing
		b := []byte(strings.Repeat("a", g.IntN(30)))
		want := len(b)
		for n := g.IntN(30); n > 0; n-- {
			b = append(b, "\r\n\x00\x1f\x7f \ta\xff"[g.IntN(9)])
		}
		for want < len(b) && (b[want] >= ' ' && b[want] != 0x7f || b[want] == '\t') {
			want++
		}
		if got := valueLength(b); got != want {
			t.Fatalf("%q: %d, want %d", b, got, want)
		}
	}
}
