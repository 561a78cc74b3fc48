package http2

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/exchange"
)

func TestFieldsThatHaveCome(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		h    http.Header
		want exchange.Fields
		err  string
	}{
		{"by name, lines in their order", http.Header{"B": {"2", "3"}, "A": {"1"}}, exchange.Fields{{Name: "A", Value: "1"}, {Name: "B", Value: "2"}, {Name: "B", Value: "3"}}, ""},
		{"white space at the ends", http.Header{"A": {"\t1 2 "}}, exchange.Fields{{Name: "A", Value: "1 2"}}, ""},
		{"framing and what is for one hop", http.Header{"Content-Length": {"3"}, "Te": {"trailers"}, "Trailer": {"a"}, "Host": {"h"}, "Expect": {"100-continue"}, "X": {"y"}}, exchange.Fields{{Name: "X", Value: "y"}}, ""},
		{"Connection", http.Header{"Connection": {"close"}}, nil, "about a connection"},
		{"Transfer-Encoding", http.Header{"Transfer-Encoding": {"chunked"}}, nil, "about a connection"},
		{"Upgrade", http.Header{"Upgrade": {"websocket"}}, nil, "about a connection"},
		{"Keep-Alive", http.Header{"Keep-Alive": {"1"}}, nil, "about a connection"},
		{"Proxy-Connection", http.Header{"Proxy-Connection": {"1"}}, nil, "about a connection"},
		{"what some read as framing", http.Header{"Transfer_encoding": {"chunked"}}, nil, "the field"},
		{"a name that is no token", http.Header{"a b": {"1"}}, nil, "valid name"},
		{"an empty name", http.Header{"": {"1"}}, nil, "valid name"},
		{"too many", http.Header{"A": slices.Repeat([]string{"1"}, maxFields+1)}, nil, "more than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got, err := appendFields(nil, c.h)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
}

// No byte that ends a line, or that HTTP/1 forbids, passes in either direction.
func TestControlCharactersInFields(t *testing.T) {
	t.Parallel()
	for c := range 256 {
		value := "a" + string([]byte{byte(c)}) + "b"
		want := c == '\t' || c >= ' ' && c != 0x7f
		if _, err := appendFields(nil, http.Header{"A": {value}}); (err == nil) != want {
			t.Errorf("%#x has come: %v", c, err)
		}
		if err := addHeader(http.Header{}, exchange.Fields{{Name: "A", Value: value}}); (err == nil) != want {
			t.Errorf("%#x is to be sent: %v", c, err)
		}
	}
}

func TestFieldsToBeSent(t *testing.T) {
	t.Parallel()
	h := http.Header{}
	err := addHeader(h, exchange.Fields{{Name: "x-a", Value: "1"}, {Name: "X-A", Value: "2"}, {Name: "b", Value: ""}})
	if want := (http.Header{"X-A": {"1", "2"}, "B": {""}}); err != nil || !maps.EqualFunc(h, want, slices.Equal) {
		t.Errorf("got %v, %v", h, err)
	}
	for _, name := range []string{"Connection", "te", "Host", "content-length", "Transfer-Encoding", "Upgrade", "", "a:b", "a\n"} {
		if err := addHeader(http.Header{}, exchange.Fields{{Name: name, Value: "1"}}); err == nil {
			t.Errorf("%q is sent", name)
		}
	}
}

func TestTrailers(t *testing.T) {
	t.Parallel()
	all := exchange.Fields{
		{Name: "Authorization", Value: "x"}, {Name: "Content-Length", Value: "1"}, {Name: "Grpc-Message", Value: "a\nb"}, {Name: "Grpc-Status", Value: "0"}, {Name: "Host", Value: "a"},
		{Name: "My-Own", Value: "1"}, {Name: "Set-Cookie", Value: "a=b"}, {Name: "Transfer_encoding", Value: "chunked"}, {Name: "my_own-Bin", Value: "AAEC"},
	}
	for grpc, want := range map[bool]http.Header{
		false: {"Grpc-Status": {"0"}},
		true:  {"Grpc-Status": {"0"}, "My-Own": {"1"}, "My_own-Bin": {"AAEC"}},
	} {
		h := http.Header{}
		addTrailers(h, all, grpc)
		if !maps.EqualFunc(h, want, slices.Equal) {
			t.Errorf("gRPC %v: sent %v, want %v", grpc, h, want)
		}
		come := http.Header{}
		for _, f := range all {
			if isValue(f.Value) {
				add(come, f)
			}
		}
		got, err := appendTrailers(nil, come, grpc)
		h = http.Header{}
		for _, f := range got {
			h.Add(f.Name, f.Value)
		}
		if err != nil || !maps.EqualFunc(h, want, slices.Equal) {
			t.Errorf("gRPC %v: got %v, %v, want %v", grpc, got, err, want)
		}
	}
	if _, err := appendTrailers(nil, http.Header{"Connection": {"close"}}, true); err == nil {
		t.Error("a field about the connection is taken")
	}
}

func TestWhatIsGRPC(t *testing.T) {
	t.Parallel()
	for contentType, want := range map[string]bool{
		"application/grpc": true, "application/grpc+proto": true, "Application/gRPC; charset=utf-8": true,
		"application/grpc-web": false, "application/grpc-web+proto": false, "application/grp": false, "text/plain": false, "": false,
	} {
		if got := isGRPC(http.Header{"Content-Type": {contentType}}); got != want {
			t.Errorf("%q: %v", contentType, got)
		}
	}
	if isGRPC(http.Header{}) || isGRPC(http.Header{"Content-Type": {"application/grpc", "text/plain"}}) {
		t.Error("what has no type, or two, is taken for gRPC")
	}
}
