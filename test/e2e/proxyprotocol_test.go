package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Two listeners one behind the other, as a load balancer before a proxy before another one:
// the header that the first one is sent names the client, and the first one names it to the
// second one. What the upstream and the access log say of the client is
// the same behind both, and stays so over reloads, for connections that are idle, that wait for
// their header, and for tunnels, moved ones as well.
func TestTheProxyProtocolBothWays(t *testing.T) {
	t.Parallel()
	up, direct := newUpstream(t), newUpstream(t)
	i := newInstance(t, "")
	file := func(name string) string { return filepath.Join(i.dir, name) }
	back := "127.0.0.1:1" // not known before it is bound
	config := func(n int) string {
		return fmt.Sprintf(`
[reload]
probation = "100ms"
[drain]
idle_grace = "0s"
[tunnels]
on_reload = "move"
[[access_logs]]
path = %q
text_format = "%%EVENT%% %%LISTENER_NAME%% %%CLIENT_ADDRESS%% %%DOWNSTREAM_REMOTE_ADDRESS%%"
[[listeners]]
name = "front"
address = "127.0.0.1:0"
proxy_protocol = "required"
proxy_protocol_trusted = ["127.0.0.0/8"]
[[listeners]]
name = "back"
address = "127.0.0.1:0"
proxy_protocol = "required"
proxy_protocol_trusted = ["127.0.0.0/8"]
[[listeners]]
name = "strict"
address = "127.0.0.1:0"
proxy_protocol = "required"
proxy_protocol_trusted = ["192.0.2.0/24"]
[[listeners]]
name = "mixed"
address = "127.0.0.1:0"
proxy_protocol = "optional"
proxy_protocol_trusted = ["127.0.0.0/8"]
[[virtual_hosts]]
name = "first"
listeners = ["front"]
domains = ["*"]
routes = [
  { match = { path = "/direct" }, cluster = "direct" },
  { match = { prefix = "/" }, websocket = true, cluster = "second" },
]
[[virtual_hosts]]
name = "second"
listeners = ["back", "strict", "mixed"]
domains = ["*"]
routes = [
  { match = { path = "/now" }, redirect = { path = "/configuration-%d" } },
  { match = { prefix = "/" }, websocket = true, cluster = "up" },
]
[[clusters]]
name = "second"
endpoints = [%q]
proxy_protocol = "v2"
[[clusters]]
name = "up"
endpoints = [%q]
[[clusters]]
name = "direct"
endpoints = [%q]
proxy_protocol = "v1"
connect_attempts = 1
source_address = "127.0.0.77"
`, file("access.log"), n, back, up.addr, direct.addr)
	}
	i.write(config(0))
	i.start(nil)
	back = i.address("back")
	i.reload(config(0))
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	const (
		v1 = "PROXY TCP4 192.0.2.1 10.0.0.1 12345 80\r\n"
		v2 = "\r\n\r\n\x00\r\nQUIT\n\x21\x21\x00\x24" + // [2001:db8::1]:1 to [::1]:2
			"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x01\x00\x02"
	)
	var servers []*wire // of the upstream: connections to it are kept
	wantClient := func(client *wire, address string) {
		t.Helper()
		client.send(s.get("/"))
		server := up.accept(t)
		servers = append(servers, server)
		server.head().wantField(t, "X-Forwarded-For", address)
		server.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
		client.want(200, "ok")
	}

	// Clients of the load balancer.
	first, second := s.dialTo("front"), s.dialTo("front")
	first.send(v1[:10])
	second.send(v2[:10])
	first.send(v1[10:])
	second.send(v2[10:])
	wantClient(first, "192.0.2.1")
	wantClient(second, "2001:db8::1")
	wantClient(first, "192.0.2.1") // and another request on the same connection

	// What the load balancer does itself has its own address.
	own := s.dialTo("front")
	own.send("PROXY UNKNOWN\r\n")
	wantClient(own, "127.0.0.1")

	// A tunnel through both, whose bytes come with its head.
	tunnel := s.dialTo("front")
	tunnel.send(v1 + s.upgrade("/ws"))
	far := up.accept(t)
	far.head().wantField(t, "X-Forwarded-For", "192.0.2.1")
	far.send(agreement)
	tunnel.wantStart(agreed)
	wantTunnel(tunnel, far)

	// The same client to a server that reads the header itself.
	client := s.dialTo("front")
	client.send(v1 + s.get("/direct"))
	server := direct.accept(t)
	if from := server.conn.RemoteAddr().String(); !strings.HasPrefix(from, "127.0.0.77:") {
		t.Errorf("the connection comes from %s", from)
	}
	if line, err := server.r.ReadString('\n'); err != nil || line != "PROXY TCP4 192.0.2.1 127.0.0.1 12345 "+portOf(s.addresses["front"])+"\r\n" {
		t.Errorf("the connection begins with %q, %v", line, err)
	}
	server.wantStart("GET /direct HTTP/1.1")
	server.send(answer(200, "ok"))
	client.want(200, "ok")
	server.wantEOF() // it is nobody else's

	// Strangers, and those who say nothing of use.
	stranger := s.dialTo("strict")
	stranger.send(v1)
	stranger.wantClosed()
	silly := s.dialTo("front")
	silly.send(s.get("/"))
	silly.wantClosed()
	wantClient(s.dialTo("mixed"), "127.0.0.1")
	named := s.dialTo("mixed")
	named.send(v1)
	wantClient(named, "192.0.2.1")

	// Reloads: what is idle goes over, what waits does not lose a byte, the tunnel goes on.
	waits := s.dialTo("front")
	waits.send(v2[:20])
	for n := range 2 {
		i.reload(config(n + 1))
		waits.send(v2[20+n : 21+n])
		i.wait("the idle connections and the tunnel to go over", func(st *status) bool {
			return !slices.ContainsFunc(st.Generations[1:], func(old generation) bool { return old.Connections > 1 || old.Tunnels > 0 })
		})
		wantClient(first, "192.0.2.1")
		wantClient(second, "2001:db8::1")
		wantClient(own, "127.0.0.1")
		wantTunnel(tunnel, far)
	}
	waits.send(v2[22:])
	wantClient(waits, "2001:db8::1")
	i.wait("the old generations to end", func(st *status) bool { return len(st.Generations) == 1 })
	wantClient(waits, "2001:db8::1")
	tunnel.close()
	far.wantEOF()
	far.close()

	var log string
	eventually(t, func() bool {
		data, _ := os.ReadFile(file("access.log"))
		log = string(data)
		return strings.Count(log, "tunnel_close") == 2
	}, func() string { return "the tunnels to end; the log is\n" + log })
	for _, line := range []string{
		"request front 192.0.2.1 192.0.2.1:12345", "request back 192.0.2.1 192.0.2.1:12345", "request front 2001:db8::1 [2001:db8::1]:1",
		"request back 2001:db8::1 [2001:db8::1]:1", "tunnel_close front 192.0.2.1 192.0.2.1:12345", "tunnel_close back 192.0.2.1 192.0.2.1:12345",
	} {
		if !strings.Contains(log, line+"\n") {
			t.Errorf("the log lacks %q:\n%s", line, log)
		}
	}
}

func portOf(address string) string { return address[strings.LastIndex(address, ":")+1:] }
