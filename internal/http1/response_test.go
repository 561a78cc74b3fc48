package http1

import (
	"fmt"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

func readResponse(raw, method string) (responseHead, error) {
	scan := headScanner{limit: defaultHeadSize}
	end, err := scan.scan([]byte(raw))
	if err != nil {
		return responseHead{}, err
	}
	if end == 0 {
		return responseHead{}, fmt.Errorf("no end of head in %q", raw)
	}
	var h responseHead
	err = h.parse(raw[:end], method)
	return h, err
}

func TestResponseHeadsThatAreRefused(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, raw string }{
		{"an empty line first", "\r\nHTTP/1.1 200 OK\r\n\r\n"},
		{"another version", "HTTP/2.0 200 OK\r\n\r\n"},
		{"another protocol", "ICY 200 OK\r\n\r\n"},
		{"no status", "HTTP/1.1\r\n\r\n"},
		{"a status of two digits", "HTTP/1.1 20 OK\r\n\r\n"},
		{"a status of four digits", "HTTP/1.1 2000 OK\r\n\r\n"},
		{"a signed status", "HTTP/1.1 +20 OK\r\n\r\n"},
		{"a status below 100", "HTTP/1.1 099 OK\r\n\r\n"},
		{"a status above 599", "HTTP/1.1 600 OK\r\n\r\n"},
		{"two spaces before the status", "HTTP/1.1  200 OK\r\n\r\n"},
		{"a control character in the reason", "HTTP/1.1 200 O\x01K\r\n\r\n"},
		{"a bare LF", "HTTP/1.1 200 OK\nA: b\r\n\r\n"},
		{"a folded line", "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n"},
		{"a space before the colon", "HTTP/1.1 200 OK\r\nA : b\r\n\r\n"},
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"},
		{"both lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"an unknown coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"},
		{"chunked in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"Connection that names Content-Length", "HTTP/1.1 200 OK\r\nConnection: Content-Length\r\nContent-Length: 1\r\n\r\n"},
		{"the HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\n"},
		{"a body without a head", "<html>\r\n\r\n"},
		{"a head that is too large", "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("b", defaultHeadSize) + "\r\n\r\n"},
		{"a status line without end", "HTTP/1.1 200 " + strings.Repeat("b", defaultHeadSize)},
		{"fields without end", "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", defaultHeadSize)},
		{"a bare CR", "HTTP/1.1 200 OK\r\nA: b\rContent-Length: 5\r\n\r\n"},
		{"NUL in a value", "HTTP/1.1 200 OK\r\nA: b\x00\r\n\r\n"},
		{"the same length in a list", "HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n"},
		{"a signed length", "HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n"},
		{"a length above 2^64", "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551621\r\n\r\n"},
		{"chunked twice", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"chunked before another coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n"},
		{"a name like Content-Length", "HTTP/1.1 200 OK\r\nContent_Length: 1\r\n\r\n"},
		{"a 101 in HTTP/1.0", "HTTP/1.0 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"},
		{"a 100 in HTTP/1.0", "HTTP/1.0 100 Continue\r\n\r\n"},
		{"a 304 with two lengths", "HTTP/1.1 304 Not Modified\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"},
		{"a 204 with a length", "HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\n"},
		{"a chunked 204", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"a 103 with a length", "HTTP/1.1 103 Early Hints\r\nContent-Length: 1\r\n\r\n"},
		{"a chunked 101", "HTTP/1.1 101 Switching\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"too many fields", "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", maxFields+1) + "\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			head, err := readResponse(tt.raw, "GET")
			if exchange.StatusOf(err, 0) == 0 {
				t.Errorf("got %+v, %v, want a refusal", head.Response, err)
			}
		})
	}
}

func TestResponseHeadsThatAreUnderstood(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, method, raw string
		status            int
		reason            string
		length            int64
		body              bodyKind
		close             bool
		upgrade           string
	}{
		{"a length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, "OK", 5, byLength, false, ""},
		{"a length of 0", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, "OK", 0, noBody, false, ""},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, "OK", -1, byChunks, false, ""},
		{"until the connection ends", "GET", "HTTP/1.1 200 OK\r\n\r\n", 200, "OK", -1, untilClose, true, ""},
		{"no reason", "GET", "HTTP/1.1 200\r\nContent-Length: 5\r\n\r\n", 200, "", 5, byLength, false, ""},
		{"an empty reason", "GET", "HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\n", 200, "", 5, byLength, false, ""},
		{"a reason of many words", "GET", "HTTP/1.1 404 Not  here, \xe4\r\nContent-Length: 5\r\n\r\n", 404, "Not  here, \xe4", 5, byLength, false, ""},
		{"HTTP/1.0 is not kept", "GET", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\n", 200, "OK", 5, byLength, true, ""},
		{"close", "GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\n", 200, "OK", 5, byLength, true, ""},
		{"HEAD with a length", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, "OK", 5, noBody, false, ""},
		{"HEAD without a length", "HEAD", "HTTP/1.1 200 OK\r\n\r\n", 200, "OK", -1, noBody, false, ""},
		{"HEAD, chunked", "HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, "OK", -1, noBody, false, ""},
		{"304 with a length", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, "Not Modified", 5, noBody, false, ""},
		{"304 without a length", "GET", "HTTP/1.1 304 Not Modified\r\n\r\n", 304, "Not Modified", -1, noBody, false, ""},
		{"204", "GET", "HTTP/1.1 204 No Content\r\n\r\n", 204, "No Content", 0, noBody, false, ""},
		{"204 with a length of 0", "GET", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204, "No Content", 0, noBody, false, ""},
		{"103", "GET", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 103, "Early Hints", 0, noBody, false, ""},
		{"101", "GET", "HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n\r\n", 101, "Switching", 0, noBody, false, "websocket"},
		{"101 to something else", "GET", "HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: H2C\r\n\r\n", 101, "Switching", 0, noBody, false, "h2c"},
		{"101 without Connection", "GET", "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n", 101, "Switching", 0, noBody, false, ""},
		{"101 without Upgrade", "GET", "HTTP/1.1 101 Switching\r\nConnection: upgrade\r\n\r\n", 101, "Switching", 0, noBody, false, ""},
		{"101 to a list", "GET", "HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket, h2c\r\n\r\n", 101, "Switching", 0, noBody, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, err := readResponse(tt.raw, tt.method)
			if err != nil {
				t.Fatal(err)
			}
			if h.Status != tt.status || h.Reason != tt.reason || h.ContentLength != tt.length || h.body.kind != tt.body || h.close != tt.close || h.Upgrade != tt.upgrade {
				t.Errorf("got %+v with body %d, close %v", h.Response, h.body.kind, h.close)
			}
		})
	}
}

func TestResponseFieldsOfOneHopAreRemoved(t *testing.T) {
	t.Parallel()
	h, err := readResponse("HTTP/1.1 200 OK\r\nKeep-Alive: 1\r\nX-Hop: 1\r\nConnection: x-hop\r\nUpgrade: h2c\r\nTrailer: T\r\nA: b\r\nContent-Length: 0\r\n\r\n", "GET")
	if err != nil {
		t.Fatal(err)
	}
	if len(h.Fields) != 1 || h.Fields[0] != (exchange.Field{Name: "A", Value: "b"}) {
		t.Errorf("fields %v", h.Fields)
	}
}
