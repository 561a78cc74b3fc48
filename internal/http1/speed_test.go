package http1

import "testing"

// What a browser and a small service say, some 230 bytes each.
const (
	usualRequest = "GET /api/v1/items?page=2 HTTP/1.1\r\nHost: www.example.com\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\nAccept: text/html,application/xhtml+xml\r\n" +
		"Accept-Encoding: gzip, deflate, br\r\nConnection: keep-alive\r\nCookie: session=0123456789\r\n\r\n"
	usualResponse = "HTTP/1.1 200 OK\r\nServer: example\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 512\r\n" +
		"Cache-Control: private, max-age=0\r\nVary: Accept-Encoding\r\nX-Request-Id: 0123456789abcdef\r\n\r\n"
)

func BenchmarkRequestHead(b *testing.B) {
	var h requestHead
	raw := []byte(usualRequest)
	for b.Loop() {
		scan := headScanner{limit: defaultHeadSize, request: true}
		end, err := scan.scan(raw)
		if err == nil {
			err = h.parse(viewOf(raw[:end]), "http")
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkResponseHead(b *testing.B) {
	var h responseHead
	raw := []byte(usualResponse)
	for b.Loop() {
		scan := headScanner{limit: defaultHeadSize}
		end, err := scan.scan(raw)
		if err == nil {
			err = h.parse(viewOf(raw[:end]), "GET")
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendRequest(b *testing.B) {
	var h requestHead
	if err := h.parse(usualRequest, "http"); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 0, 4<<10)
	for b.Loop() {
		if _, err := appendRequest(buf, &h.Request); err != nil {
			b.Fatal(err)
		}
	}
}
