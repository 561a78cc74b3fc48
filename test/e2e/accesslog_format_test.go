package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Three logs of one instance, each with a format, events and conditions of its own.
func TestAccessLogsInFormatsOfTheirOwn(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	i := newInstance(t, "")
	path := func(name string) string { return filepath.Join(i.dir, name) }
	i.write(simple(up.addr, fmt.Sprintf(`
[[access_logs]]
path = %q
text_format = '"%%REQ(:METHOD)%% %%REQ(:PATH)%% %%PROTOCOL%%" %%RESPONSE_CODE%% %%RESPONSE_FLAGS%% %%BYTES_RECEIVED%% %%BYTES_SENT%% [%%REQ(X-Name?User-Agent)%%] %%RESP(Content-Type):16%% %%UPSTREAM_HOST%% %%UPSTREAM_CLUSTER%% %%VIRTUAL_HOST_NAME%% %%RESPONSE_CODE_DETAILS%%'
events = ["request"]
[[access_logs]]
path = %q
json_format = { event = "%%EVENT%%", name = "%%REQ(X-Name)%%", none = "%%REQ(X-None)%%", server = "%%RESP(X-Server)%%", status = "%%RESPONSE_CODE%%", in = "%%BYTES_RECEIVED%%", why = "%%REASON%% (%%RESPONSE_FLAGS%%)" }
events = ["tunnel_open", "tunnel_close"]
[[access_logs]]
path = %q
text_format = "%%EVENT%% %%REQ(:PATH)%%"
[access_logs.filter]
status = ["2xx"]
headers = [{ name = "X-Name", prefix = "b" }]
`, path("requests"), path("tunnels"), path("some"))))
	i.start(nil)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}

	client := s.dial()
	for _, name := range []string{"a] [x\ty", "bob"} {
		client.send(s.request("POST /x HTTP/1.1", "X-Name: "+name, "Content-Length: 3"), "123")
		server := up.accept(t)
		server.head()
		server.wantBytes("123")
		server.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 2\r\n\r\nok")
		client.want(200, "ok")
		server.close()
	}
	down, behind, _ := s.tunnel("/ws", "X-Name: bea")
	down.send("1234567")
	behind.wantBytes("1234567")
	behind.reset()
	down.wantReset()

	lines := i.wantLines("requests", 2)
	for n, name := range []string{`a\u005d\u0020\u005bx\u0009y`, "bob"} {
		want := fmt.Sprintf(`"POST /x HTTP/1.1" 200 - 3 2 [%s] application/j… %s backend all via_upstream`, name, up.addr)
		if lines[n] != want {
			t.Errorf("got %s\nwant %s", lines[n], want)
		}
	}
	i.wantLines("tunnels", 2)
	data, err := os.ReadFile(path("tunnels"))
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"event":"tunnel_open","in":0,"name":"bea","none":null,"server":null,"status":101,"why":"- (-)"}` + "\n" +
		`{"event":"tunnel_close","in":7,"name":"bea","none":null,"server":null,"status":101,"why":"upstream\u0020reset (UR)"}` + "\n"
	if string(data) != want {
		t.Errorf("got %s\nwant %s", data, want)
	}
	for line := range strings.Lines(string(data)) {
		if !json.Valid([]byte(line)) {
			t.Errorf("no object: %s", line)
		}
	}
	if some := i.wantLines("some", 1); some[0] != "request /x" {
		t.Errorf("got %q", some)
	}
}
