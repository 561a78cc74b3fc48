package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestMalformedRequests sends heads that are wrong. Each is answered, is its
// connection's last, and reaches no upstream.
func TestMalformedRequests(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	address := serve(t, simple(up.addr, "")).address("public")
	tests := []struct {
		name   string
		status int
		raw    string // TARGET stands for the path of a route, HOST for a field
	}{
		{"bare LF behind the request line", 400, "GET TARGET HTTP/1.1\nHOST\r\n\r\n"},
		{"bare LF behind a field", 400, "GET TARGET HTTP/1.1\r\nHOST\nX: y\r\n\r\n"},
		{"bare LF everywhere", 400, "GET TARGET HTTP/1.1\nHOST\n\n"},
		{"bare CR in a value", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nX: a\rb\r\n\r\n"},
		{"NUL in a value", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nX: a\x00b\r\n\r\n"},
		{"a folded line", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nX: a\r\n b\r\n\r\n"},
		{"a folded line by tab", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nX: a\r\n\tb\r\n\r\n"},
		{"a folded first line", 400, "GET TARGET HTTP/1.1\r\n X: a\r\nHOST\r\n\r\n"},
		{"Content-Length and Transfer-Encoding", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"Transfer-Encoding and Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"},
		{"differing Content-Lengths", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"},
		{"differing Content-Lengths in a list", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: 5, 6\r\n\r\nabcdef"},
		{"a Content-Length with a sign", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: +5\r\n\r\nabcde"},
		{"a negative Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: -1\r\n\r\n"},
		{"a hexadecimal Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: 0x5\r\n\r\nabcde"},
		{"an endless Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length: 99999999999999999999\r\n\r\n"},
		{"an empty Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length:\r\n\r\n"},
		{"Transfer-Encoding twice", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"chunked, but not last", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"},
		{"Transfer-Encoding in HTTP/1.0", 400, "POST TARGET HTTP/1.0\r\nHOST\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"a Transfer-Encoding that we do not have", 501, "POST TARGET HTTP/1.1\r\nHOST\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"},
		{"a name with a space behind it", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent-Length : 5\r\n\r\nabcde"},
		{"a name with a space in it", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nX Y: z\r\n\r\n"},
		{"a name with a forbidden letter", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nX(Y): z\r\n\r\n"},
		{"a name beyond ASCII", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nN\xc3\xa4me: z\r\n\r\n"},
		{"an empty name", 400, "GET TARGET HTTP/1.1\r\nHOST\r\n: z\r\n\r\n"},
		{"a field without a colon", 400, "GET TARGET HTTP/1.1\r\nHOST\r\nXY\r\n\r\n"},
		{"a name that CGI takes for Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nContent_Length: 5\r\n\r\nabcde"},
		{"no Host", 400, "GET TARGET HTTP/1.1\r\nX: y\r\n\r\n"},
		{"two Hosts", 400, "GET TARGET HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n"},
		{"two equal Hosts", 400, "GET TARGET HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n"},
		{"a Host with a path", 400, "GET TARGET HTTP/1.1\r\nHost: a.test/b\r\n\r\n"},
		{"a Host with user information", 400, "GET TARGET HTTP/1.1\r\nHost: b@a.test\r\n\r\n"},
		{"a Host with an odd port", 400, "GET TARGET HTTP/1.1\r\nHost: a.test:80a\r\n\r\n"},
		{"an absolute target with another host", 400, "GET http://b.testTARGET HTTP/1.1\r\nHost: a.test\r\n\r\n"},
		{"an absolute target with another port", 400, "GET http://a.test:81TARGET HTTP/1.1\r\nHost: a.test\r\n\r\n"},
		{"an absolute target without Host", 400, "GET http://a.testTARGET HTTP/1.1\r\nX: y\r\n\r\n"},
		{"a target without a slash", 400, "GET ws HTTP/1.1\r\nHOST\r\n\r\n"},
		{"a target with a space", 400, "GET TARGET a HTTP/1.1\r\nHOST\r\n\r\n"},
		{"a target with a fragment", 400, "GET TARGET#a HTTP/1.1\r\nHOST\r\n\r\n"},
		{"a target that is too long", 414, "GET TARGET" + strings.Repeat("a", 10_000) + " HTTP/1.1\r\nHOST\r\n\r\n"},
		{"two spaces behind the method", 400, "GET  TARGET HTTP/1.1\r\nHOST\r\n\r\n"},
		{"a space before the method", 400, " GET TARGET HTTP/1.1\r\nHOST\r\n\r\n"},
		{"a method that is no token", 400, "G(T TARGET HTTP/1.1\r\nHOST\r\n\r\n"},
		{"CONNECT", 501, "CONNECT a.test:80 HTTP/1.1\r\nHost: a.test:80\r\n\r\n"},
		{"no version", 400, "GET TARGET\r\nHOST\r\n\r\n"},
		{"a version in small letters", 400, "GET TARGET http/1.1\r\nHOST\r\n\r\n"},
		{"HTTP/2.0", 505, "GET TARGET HTTP/2.0\r\nHOST\r\n\r\n"},
		{"the preface of HTTP/2", 505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		{"a handshake of TLS", 400, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n"},
		{"an expectation that we do not know", 417, "POST TARGET HTTP/1.1\r\nHOST\r\nExpect: a-miracle\r\nContent-Length: 1\r\n\r\nx"},
		{"Connection that names Content-Length", 400, "POST TARGET HTTP/1.1\r\nHOST\r\nConnection: Content-Length\r\nContent-Length: 5\r\n\r\nabcde"},
		{"more fields than anybody needs", 431, "GET TARGET HTTP/1.1\r\nHOST\r\n" + strings.Repeat("X: y\r\n", 1000) + "\r\n"},
	}
	for _, tt := range tests {
		for _, target := range []string{"/plain", "/ws"} {
			raw := strings.NewReplacer("TARGET", target, "HOST", "Host: a.test").Replace(tt.raw)
			client := dialWire(t, "tcp", address)
			client.send(raw, request("GET /smuggled HTTP/1.1", "Host: a.test"))
			r := client.reply("GET")
			if r.StatusCode != tt.status || !r.Close {
				t.Errorf("%s, %s: got %d, the last one: %v; want %d and the last one", tt.name, target, r.StatusCode, r.Close, tt.status)
			}
			client.wantEOF()
			client.close()
		}
	}
	up.wantNobody(t)
}

// TestMalformedBodies sends proper heads with chunks behind them that are not. The
// upstream must never take what it has got for a whole request.
func TestMalformedBodies(t *testing.T) {
	t.Parallel()
	// malformed sends chunks behind a proper one.
	malformed := func(name, chunks string) scene {
		return scene{name: name, play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST / HTTP/1.1", "Transfer-Encoding: chunked"), "4\r\ngood\r\n")
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("4\r\ngood\r\n")
			client.send(chunks, s.get("/smuggled"))
			client.wantRefused(400)
			server.wantClosed()
			s.up.wantNobody(s.T)
		}}
	}
	play(t, publicListener, []scene{
		malformed("no size", "\r\nabc\r\n"),
		malformed("a size that is no number", "xyz\r\nabc\r\n"),
		malformed("a size with 0x", "0x3\r\nabc\r\n"),
		malformed("a negative size", "-3\r\nabc\r\n"),
		malformed("a size beyond all bounds", "fffffffffffffffff\r\nabc\r\n"),
		malformed("a size with a space behind it", "3 \r\nabc\r\n"),
		malformed("a size with bare LF", "3\nabc\r\n"),
		malformed("an extension with bare LF", "3;a=b\nabc\r\n"),
		malformed("trailers about framing", "0\r\nContent-Length: 5\r\n\r\n"),
		malformed("trailers with bare LF", "0\r\nX: y\n\r\n"),
		malformed("trailers that are folded", "0\r\nX: y\r\n z\r\n\r\n"),
		{name: "a client that closes within its body", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST / HTTP/1.1", "Content-Length: 8"), "half")
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("half")
			client.close()
			server.wantClosed()
		}},
	})
}

// ask sends a request on a connection of its own and returns the answer's body.
func ask(address, path string) (string, error) {
	conn, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, request("GET "+path+" HTTP/1.1", "Host: a.test", "Connection: close"))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}
