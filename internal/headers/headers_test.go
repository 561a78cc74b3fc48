package headers_test

import (
	"strings"
	"testing"

	"holdfast/internal/headers"
)

// known is a source whose variables are these, by number; fields by name.
type known struct {
	variables map[headers.Variable]string
	fields    map[string]string
}

func (k known) Variable(v headers.Variable, name string) string {
	if v == headers.RequestField {
		return k.fields[name]
	}
	return k.variables[v]
}

var sample = known{
	variables: map[headers.Variable]string{
		headers.RemoteAddress: "192.0.2.1", headers.Protocol: "HTTP/1.1", headers.Hostname: "edge", headers.StartTime: "2026-01-02T03:04:05.678Z",
		headers.UpstreamCluster: "web", headers.UpstreamHost: "10.0.0.1:80", headers.RouteName: "site:prefix=/", headers.RequestID: "id",
	},
	fields: map[string]string{
		"User-Agent": "curl", ":path": "/a?b", "X-Break": "1\r\nX-Evil: 2", "X-Null": "a\x00b", "X-Del": "\x7f", "X-Tab": "a\tb", "X-Long": strings.Repeat("x", headers.MostBytes),
	},
}

func TestValuesArePutTogether(t *testing.T) {
	t.Parallel()
	for written, want := range map[string]string{
		"DENY":  "DENY",
		"100%%": "100%",
		"%%%%":  "%%",
		"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%": "192.0.2.1",
		"%PROTOCOL% on %HOSTNAME%":                 "HTTP/1.1 on edge",
		"%START_TIME%":                             "2026-01-02T03:04:05.678Z",
		"%UPSTREAM_CLUSTER%/%UPSTREAM_HOST%":       "web/10.0.0.1:80",
		"%ROUTE_NAME%":                             "site:prefix=/",
		"%REQUEST_ID%":                             "id",
		"%REQ(User-Agent)%":                        "curl",
		"%REQ(:PATH)%":                             "/a?b",
		"[%REQ(X-None)%]":                          "[]",
		"[%REQ(X-Break)%]":                         "[]",
		"[%REQ(X-Null)%]":                          "[]",
		"[%REQ(X-Del)%]":                           "[]",
		"%REQ(X-Tab)%":                             "a\tb",
		"%REQ(X-Long)%":                            strings.Repeat("x", headers.MostBytes),
		"%REQ(X-Long)%y":                           "",
		"é":                                        "é",
	} {
		v, err := headers.Parse(written)
		if err != nil {
			t.Errorf("%q: %v", written, err)
			continue
		}
		got := strings.Join(v.Append(nil, sample), "")
		if got != want {
			t.Errorf("%q becomes %.80q, want %.80q", written, got, want)
		}
		if text, fixed := v.Text(); fixed && text != want {
			t.Errorf("%q is said to be %q always", written, text)
		}
	}
}

func TestValuesThatAreRefused(t *testing.T) {
	t.Parallel()
	for _, written := range []string{
		"%", "a%b", "%PROTOCOL", "%PROTOCOL%%", "%protocol%", "%NONE%", "%PROTOCOL()%", "%REQ%", "%REQ(%", "%REQ()%", "%REQ(a b)%", "%REQ(:method)x%", "%REQ(:status)%",
		"a\nb", "a\rb", "a\x00", "\x7f", " a", "a ", "a\t", strings.Repeat("a", 4097), strings.Repeat("%PROTOCOL%", headers.MostParts+1),
	} {
		if v, err := headers.Parse(written); err == nil {
			t.Errorf("%.80q was taken: %+v", written, v)
		}
	}
}

// A value costs nothing to make, but for the memory that its text takes.
func TestAValueIsPutTogetherWithoutAllocating(t *testing.T) { // not parallel: it counts allocations
	v, err := headers.Parse("%REQ(User-Agent)% by %PROTOCOL%")
	if err != nil {
		t.Fatal(err)
	}
	var source headers.Source = sample
	room := make([]string, 0, headers.MostParts)
	if n := testing.AllocsPerRun(100, func() { v.Append(room, source) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestFieldsThatAreNotForAConfigurationToChange(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name            string
		request, remove bool
		may             bool
	}{
		{"X-Own", true, false, true},
		{"Cookie", true, true, true},
		{"Proxy-Authorization", true, true, true},
		{"Host", true, false, false},
		{"host", false, true, false},
		{"Content-Length", true, false, false},
		{"content_length", true, false, false},
		{"Transfer-Encoding", false, true, false},
		{"Transfer_Encoding", false, false, false},
		{"Connection", true, true, false},
		{"Upgrade", false, false, false},
		{"TE", true, false, false},
		{"Trailer", false, true, false},
		{"Expect", true, false, false},
		{"Keep-Alive", false, false, false},
		{"Proxy-Connection", true, false, false},
		{"HTTP2-Settings", true, false, false},
		{"Sec-WebSocket-Key", true, true, false},
		{"sec_websocket_protocol", false, false, false},
		{"X-Forwarded-For", true, false, false},
		{"X_Forwarded_For", true, false, false},
		{"X-Forwarded-For", true, true, true},
		{"X-Forwarded-Proto", false, false, true},
		{"Forwarded", true, false, false},
		{"X-Request-ID", true, false, false},
		{"X-Request-Id", false, false, true},
	}
	for _, tt := range tests {
		if why := headers.Check(tt.name, tt.request, tt.remove); (why == "") != tt.may {
			t.Errorf("%+v: %q", tt, why)
		}
	}
}

// FuzzParse makes sure that nothing of what is taken can end a field's line, whatever the
// variables hold.
func FuzzParse(f *testing.F) {
	for _, seed := range [][2]string{
		{"a", ""}, {"%REQ(A)%", "b"}, {"%%%REQ(:path)%", "\r\n"}, {"%PROTOCOL% %HOSTNAME%", "x"}, {"%REQ(%", "\x00"}, {"%", "%"}, {"\t", "\t"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, written, variable string) {
		v, err := headers.Parse(written)
		if err != nil {
			return
		}
		all := strings.Join(v.Append(nil, every(variable)), "")
		if strings.ContainsAny(all, "\r\n\x00\x7f") || len(all) > headers.MostBytes {
			t.Errorf("%q becomes %q", written, all)
		}
	})
}

// every is a source that knows the same of everything.
type every string

func (e every) Variable(headers.Variable, string) string { return string(e) }
