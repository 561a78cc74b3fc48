package http1

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

// decode feeds raw in pieces of the given size, with all of the rest in sight of
// none of them, and returns the content, what follows the body, and the trailers.
func decode(d *bodyDecoder, raw string, piece int) (content, rest string, err error) {
	pending := []byte(nil)
	for {
		data, n, err := d.next(pending, 3)
		content += string(data)
		pending = pending[n:]
		switch {
		case err != nil:
			return content, "", err
		case d.done():
			return content, string(pending) + raw, nil
		case n > 0:
			continue
		case raw == "":
			return content, "", fmt.Errorf("needs more")
		}
		n = min(piece, len(raw))
		pending = append(pending, raw[:n]...)
		raw = raw[n:]
	}
}

func TestChunkedBodies(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, raw, content, trailers string }{
		{"one chunk", "5\r\nhello\r\n0\r\n\r\n", "hello", "[]"},
		{"an empty body", "0\r\n\r\n", "", "[]"},
		{"many zeros", "0000000000000005\r\nhello\r\n0000\r\n\r\n", "hello", "[]"},
		{"hexadecimal in both cases", "a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n", "01234567890123456789a", "[]"},
		{"content that looks like framing", "7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", "\r\n0\r\n\r\n", "[]"},
		{"extensions", "5;a=b;c=\"d;e\"\r\nhello\r\n0;last\r\n\r\n", "hello", "[]"},
		{"trailers", "0\r\nServer-Timing: v\r\nGrpc-Status: 0\r\n\r\n", "", "[{Server-Timing v} {Grpc-Status 0}]"},
		{"trailers that are dropped", "0\r\nX-T: v\r\nETag: x\r\nConnection: x\r\nExpires: x\r\n\r\n", "", "[{ETag x}]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for piece := 1; piece <= len(tt.raw); piece++ {
				d := decoderFor(-1)
				content, rest, err := decode(&d, tt.raw+"GET /", piece)
				if err != nil || content != tt.content || rest != "GET /" {
					t.Errorf("in pieces of %d: content %q, rest %q, error %v", piece, content, rest, err)
				}
				if got := fmt.Sprint(d.trailers); got != tt.trailers {
					t.Errorf("in pieces of %d: trailers %s, want %s", piece, got, tt.trailers)
				}
			}
		})
	}
}

func TestChunkedBodiesThatAreRefused(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, raw string }{
		{"no size", "\r\nhello\r\n0\r\n\r\n"},
		{"a size that is no number", "5g\r\nhello\r\n0\r\n\r\n"},
		{"a size in quotes", "\"5\"\r\nhello\r\n0\r\n\r\n"},
		{"a signed size", "+5\r\nhello\r\n0\r\n\r\n"},
		{"a size with 0x", "0x5\r\nhello\r\n0\r\n\r\n"},
		{"white space before the size", " 5\r\nhello\r\n0\r\n\r\n"},
		{"white space behind the size", "5 \r\nhello\r\n0\r\n\r\n"},
		{"a size of 17 digits", "00000000000000005\r\nhello\r\n0\r\n\r\n"},
		{"a size beyond 64 bits", "10000000000000005\r\nhello\r\n0\r\n\r\n"},
		{"a size of 2^64-1", "ffffffffffffffff\r\nhello\r\n0\r\n\r\n"},
		{"a size ended by LF", "5\nhello\r\n0\r\n\r\n"},
		{"a size ended by CR CR", "5\r\rhello\r\n0\r\n\r\n"},
		{"a chunk longer than its size", "5\r\nhello!\r\n0\r\n\r\n"},
		{"a chunk shorter than its size", "6\r\nhello\r\n0\r\n\r\n"},
		{"a chunk ended by LF", "5\r\nhello\n0\r\n\r\n"},
		{"a chunk one longer than its size", "5\r\nhelloX\n0\r\n\r\n"},
		{"a chunk ended by CR and more", "5\r\nhello\rX0\r\n\r\n"},
		{"LF in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"},
		{"CR in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n"},
		{"NUL in an extension", "5;a\x00b\r\nhello\r\n0\r\n\r\n"},
		{"an extension that is too long", "5;" + strings.Repeat("a", maxExtension+1) + "\r\nhello\r\n0\r\n\r\n"},
		{"too many extensions", strings.Repeat("1;"+strings.Repeat("a", 512)+"\r\nx\r\n", 40) + "0\r\n\r\n"},
		{"a last chunk ended by LF", "0\n\n"},
		{"a last line of CR and more", "0\r\n\rX\r\n\r\n"},
		{"a trailer like Content-Length", "0\r\nContent_Length: 5\r\n\r\n"},
		{"a trailer like Transfer-Encoding", "0\r\nTransfer_Encoding: chunked\r\n\r\n"},
		{"a request for a trailer", "0\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"},
		{"a folded trailer", "0\r\nX: y\r\n z\r\n\r\n"},
		{"a trailer Host", "0\r\nHost: b\r\n\r\n"},
		{"a trailer Content-Length", "0\r\nContent-Length: 5\r\n\r\n"},
		{"a trailer Transfer-Encoding", "0\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"trailers ended by LF", "0\r\nX: y\r\n\n"},
		{"trailers without end", "0\r\nX: " + strings.Repeat("y", maxTrailers)},
		{"too many trailers", "0\r\n" + strings.Repeat("X: y\r\n", maxFields+1) + "\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, piece := range []int{1, 7, len(tt.raw)} {
				d := decoderFor(-1)
				content, _, err := decode(&d, tt.raw, piece)
				if exchange.StatusOf(err, 0) == 0 {
					t.Errorf("in pieces of %d: content %q, error %v", piece, content, err)
				}
			}
		})
	}
}

// TestTrailersThatPass: the list as a user reads it, and beside it what a recipient that
// merges trailers into the head would take for what a proxy has said or checked there.
func TestTrailersThatPass(t *testing.T) {
	t.Parallel()
	passing := []string{
		"Accept-Ranges", "Authentication-Info", "Content-Digest", "Digest", "ETag", "etag", "Proxy-Status", "Repr-Digest",
		"Server-Timing", "Signature", "Signature-Input", "grpc-status", "Grpc-Message", "grpc-status-details-bin",
		"Grpc-Trailer-X-Custom", "x-amz-checksum-crc32", "x-amz-checksum-sha256", "x-amz-trailer-signature",
	}
	dropped := []string{
		"Age", "Authorization", "Cache-Control", "Connection", "Content-Encoding", "Content-Location", "Content-Range",
		"Content-Type", "Cookie", "Date", "Expect", "Expires", "Forwarded", "If-Match", "Keep-Alive", "Last-Modified",
		"Location", "Max-Forwards", "Pragma", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Range",
		"Retry-After", "Sec-WebSocket-Protocol", "Set-Cookie", "TE", "Trailer", "Upgrade", "Vary", "Via", "Warning",
		"WWW-Authenticate", "X-Envoy-Attempt", "X-Forwarded-For", "X_Forwarded_For", "X-Real-IP", "X-Request-Id", "X-Custom",
		"Grpc-Encoding", "Grpc-Timeout", "Grpc-Trailer-", "Grpc_Status", "Content_Digest", "x-amz-checksum-", "x-amz-date",
		"x-amz-security-token", "Signatur", "Signatures",
	}
	for _, name := range append(dropped, passing...) {
		trailers, err := parseTrailers(name+": v\r\n", nil)
		if want := slices.Contains(passing, name); err != nil || trailers.Has(name) != want {
			t.Errorf("%s: read %v, %v, want %v", name, trailers, err, want)
		}
		written := string(appendLastChunk(nil, exchange.Fields{{Name: name, Value: "v"}}))
		if want := slices.Contains(passing, name); strings.Contains(written, name) != want {
			t.Errorf("%s: written %q, want %v", name, written, want)
		}
	}
}

func TestForbiddenBytesInChunks(t *testing.T) {
	t.Parallel()
	never := func(byte) bool { return false }
	tests := []struct {
		name          string
		before, after string
		allowed       func(c byte) bool
	}{
		{"in a size", "", "\r\n" + strings.Repeat("x", 15) + "\r\n0\r\n\r\n", func(c byte) bool { return c|0x20 == 'f' }},
		{"behind a size", "0", "\r\n\r\n", func(c byte) bool { return c == '0' || c == ';' }},
		{"in an extension", "0;a", "b\r\n\r\n", func(c byte) bool { return c == '\t' || c >= ' ' && c != 0x7f }},
		{"between CR and LF", "0\r", "\n\r\n", never},
		{"in place of the CR behind content", "1\r\nx", "\n0\r\n\r\n", func(c byte) bool { return c == '\r' }},
		{"in place of the LF behind content", "1\r\nx\r", "0\r\n\r\n", func(c byte) bool { return c == '\n' }},
		{"before the end", "0\r\n", "\r\n", never},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for c := range 256 {
				d := decoderFor(-1)
				_, _, err := decode(&d, tt.before+string([]byte{byte(c)})+tt.after, 1)
				if (err == nil) != tt.allowed(byte(c)) {
					t.Errorf("byte %#02x: error %v", c, err)
				}
			}
		})
	}
}

func TestOtherBodies(t *testing.T) {
	t.Parallel()
	d := decoderFor(5)
	if content, rest, err := decode(&d, "hello!", 2); content != "hello" || rest != "!" || err != nil {
		t.Errorf("by length: content %q, rest %q, error %v", content, rest, err)
	}
	d = decoderFor(0)
	if content, rest, err := decode(&d, "hello", 2); content != "" || rest != "hello" || err != nil {
		t.Errorf("none: content %q, rest %q, error %v", content, rest, err)
	}
	d = bodyDecoder{kind: untilClose}
	if content, _, err := decode(&d, "hello", 2); content != "hello" || err == nil {
		t.Errorf("until the end: content %q, error %v", content, err)
	}
}
