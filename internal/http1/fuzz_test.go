package http1

import (
	"bufio"
	"bytes"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

// FuzzRequestHead: what we accept and write again, we accept again as the same
// request, and so does net/http.
func FuzzRequestHead(f *testing.F) {
	for _, c := range readCorpus(f) {
		f.Add(string(c.Raw))
	}
	f.Fuzz(func(t *testing.T, raw string) {
		first, err := readRequest(raw)
		if err != nil {
			return
		}
		if first.UpgradeBody {
			first.Upgrade, first.UpgradeBody = "", false // as a handler must
		}
		b, err := appendRequest(nil, &first.Request)
		if err != nil {
			t.Fatalf("accepted, but not written: %v", err)
		}
		second, err := readRequest(string(b))
		if err != nil {
			t.Fatalf("written as %q: %v", b, err)
		}
		second.Minor, second.Trailers = first.Minor, first.Trailers // facts of one hop
		if len(first.Fields) == 0 && len(second.Fields) == 0 {
			second.Fields = first.Fields
		}
		if !reflect.DeepEqual(first.Request, second.Request) {
			t.Fatalf("got %+v\nfrom %+v", second.Request, first.Request)
		}
		other, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			// net/http parses the target as a URL, which may have bad escapes.
			if strings.Contains(err.Error(), "parse ") {
				return
			}
			t.Fatalf("net/http refuses %q: %v", b, err)
		}
		if other.Host != first.Authority || other.Method != first.Method || other.RequestURI != first.Target || other.ContentLength != first.ContentLength {
			t.Fatalf("net/http reads %q as %+v", b, other)
		}
	})
}

// FuzzResponseHead: the same for responses.
func FuzzResponseHead(f *testing.F) {
	for _, raw := range answers {
		f.Add(raw, "GET")
		f.Add(raw, "HEAD")
	}
	f.Add("HTTP/1.1 200\r\nConnection: a, close\r\nA: b\r\nC:\r\n\r\n", "GET")
	f.Add("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "GET")
	f.Fuzz(func(t *testing.T, raw, method string) {
		first, err := readResponse(raw, method)
		if err != nil || first.Status == 101 && first.Upgrade == "" {
			return
		}
		f := framing{body: first.body.kind, close: first.close, length: first.ContentLength >= 0 && first.Status >= 200 && first.Status != 204}
		b, err := appendResponse(nil, &first.Response, f)
		if err != nil {
			t.Fatalf("accepted, but not written: %v", err)
		}
		second, err := readResponse(string(b), method)
		if err != nil {
			t.Fatalf("written as %q: %v", b, err)
		}
		if len(first.Fields) == 0 && len(second.Fields) == 0 {
			second.Fields = first.Fields
		}
		if !reflect.DeepEqual(first.Response, second.Response) || first.body.kind != second.body.kind {
			t.Fatalf("got %+v\nfrom %+v", second.Response, first.Response)
		}
	})
}

// FuzzChunked: a body reads the same however it is cut, and content that is framed
// anew reads as itself.
func FuzzChunked(f *testing.F) {
	f.Add("5\r\nhello\r\n0\r\n\r\nGET /", 1)
	f.Add("5;a=b\r\nhello\r\n0;last\r\nETag: v\r\nX-T: v\r\n\r\n", 3)
	for _, c := range readCorpus(f) {
		if c.Route == "app" {
			_, body, _ := strings.Cut(string(c.Raw), "\r\n\r\n")
			f.Add(body, 2)
		}
	}
	w := newBodyWire(f)
	f.Fuzz(func(t *testing.T, raw string, piece int) {
		whole, cut := decoderFor(-1), decoderFor(-1)
		content, rest, err := decode(&whole, raw, len(raw)+1)
		content2, rest2, err2 := decode(&cut, raw, max(piece, 1))
		if fmt.Sprint(err) != fmt.Sprint(err2) || err == nil && (content != content2 || rest != rest2 || !reflect.DeepEqual(whole.trailers, cut.trailers)) {
			t.Fatalf("whole: %q, %q, %v\ncut: %q, %q, %v", content, rest, err, content2, rest2, err2)
		}
		if err != nil {
			return
		}
		var pieces []string
		for rest := content; rest != ""; {
			n := min(len(rest), 32<<10)
			pieces, rest = append(pieces, rest[:n]), rest[n:]
		}
		framed := w.framed(t, nil, byChunks, 0, pieces, whole.trailers)
		again := decoderFor(-1)
		content3, rest3, err := decode(&again, framed, 7)
		if err != nil || content3 != content || rest3 != "" || len(again.trailers) != len(whole.trailers) {
			t.Fatalf("framed anew: %q, %q, %v", content3, rest3, err)
		}
	})
}
