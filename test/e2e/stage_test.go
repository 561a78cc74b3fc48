package e2e

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
)

// scene is a test that shares its service with others: it has a virtual host and
// upstreams of its own, so that they do not disturb each other.
type scene struct {
	name   string // a sentence
	routes string // "": everything goes to {cluster}, WebSockets under /ws
	// clusters replaces the one that is called {cluster} and leads to {up}.
	clusters string
	play     func(*stage)
}

// In routes and clusters, words in braces stand for what differs between scenes:
//
//	{cluster}                the name of the scene's cluster, or the beginning of several
//	{host}                   the domain of its virtual host
//	{up} {other}             addresses of its two upstreams
//	{refusing} {refusing-2}  addresses that refuse connections
//	{silent}                 an address that does not answer
const (
	defaultRoutes = `
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "{cluster}"
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "{cluster}"
`
	defaultClusters = `
[[clusters]]
name = "{cluster}"
endpoints = ["{up}"]
`
	publicListener = `
[[listeners]]
name = "public"
address = "127.0.0.1:0"
`
)

// stage is what a scene plays with.
type stage struct {
	*testing.T
	service   *instance
	addresses map[string]string // of listeners
	name      string            // of the virtual host
	host      string            // its domain
	up, other *upstream
}

// play starts one service for all scenes. config says what they have in common, its
// listeners included.
func play(t *testing.T, config string, scenes []scene) {
	t.Helper()
	refusing, refusing2, silent := refusing(t), refusing(t), silent(t)
	stages := make([]*stage, len(scenes))
	for n, sc := range scenes {
		s := &stage{name: fmt.Sprintf("scene%d", n), host: fmt.Sprintf("scene%d.test", n), up: newUpstream(t), other: newUpstream(t)}
		stages[n] = s
		words := strings.NewReplacer("{cluster}", s.name, "{host}", s.host,
			"{up}", s.up.addr, "{other}", s.other.addr, "{refusing}", refusing, "{refusing-2}", refusing2, "{silent}", silent)
		config += words.Replace(sc.config())
	}
	service := serve(t, config)
	addresses := service.addresses()
	for n, sc := range scenes {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			s := *stages[n]
			s.T, s.service, s.addresses = t, service, addresses
			sc.play(&s)
		})
	}
}

func (sc *scene) config() string {
	routes, clusters := sc.routes, sc.clusters
	if routes == "" {
		routes = defaultRoutes
	}
	if clusters == "" {
		clusters = defaultClusters
	}
	return "[[virtual_hosts]]\nname = \"{cluster}\"\ndomains = [\"{host}\"]\n" + routes + clusters
}

// addresses are where the listeners are bound, by name.
func (i *instance) addresses() map[string]string {
	i.t.Helper()
	all := make(map[string]string)
	for _, l := range i.status().Listeners {
		all[l.Name] = l.Address
	}
	return all
}

// dial connects a client to the listener "public".
func (s *stage) dial() *wire {
	s.Helper()
	return s.dialTo("public")
}

func (s *stage) dialTo(listener string) *wire {
	s.Helper()
	return dialWire(s.T, "tcp", s.addresses[listener])
}

func dialWire(t *testing.T, network, address string) *wire {
	t.Helper()
	conn, err := net.DialTimeout(network, address, patience)
	if err != nil {
		t.Fatal(err)
	}
	return newWire(t, conn)
}

// request is a request head, for the scene's host.
func (s *stage) request(start string, fields ...string) string {
	return request(start, append([]string{"Host: " + s.host}, fields...)...)
}

func request(start string, fields ...string) string {
	return start + "\r\n" + strings.Join(fields, "\r\n") + "\r\n\r\n"
}

func (s *stage) get(target string, fields ...string) string {
	return s.request("GET "+target+" HTTP/1.1", fields...)
}

// upgrade is a proper handshake.
func (s *stage) upgrade(target string, fields ...string) string {
	return s.get(target, append([]string{
		"Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"}, fields...)...)
}

// agreement is the proper answer to upgrade.
const agreement = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"

// answer is a response behind which the connection goes on.
func answer(status int, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Length: %d\r\n\r\n%s", status, http.StatusText(status), len(body), body)
}

const agreed = "HTTP/1.1 101 Switching Protocols"

// tunnel opens a tunnel and returns both its ends, with the head that the upstream
// got.
func (s *stage) tunnel(target string, fields ...string) (client, server *wire, got head) {
	s.Helper()
	client = s.dial()
	client.send(s.upgrade(target, fields...))
	server = s.up.accept(s.T)
	got = server.head()
	server.send(agreement)
	client.wantStart(agreed)
	return client, server, got
}

// wantTunnel makes sure that bytes pass both ways.
func wantTunnel(client, server *wire) {
	client.t.Helper()
	client.send("\x81\x85up!!!hello")
	server.wantBytes("\x81\x85up!!!hello")
	server.send("\x81\x05there")
	client.wantBytes("\x81\x05there")
}

// wantLog waits for a line of the service's log that is about this scene and holds
// all these words.
func (s *stage) wantLog(words ...string) string {
	s.Helper()
	return wantLog(s.T, s.service, append(words, s.name+":")...)
}

func wantLog(t *testing.T, i *instance, words ...string) (line string) {
	t.Helper()
	eventually(t, func() bool {
		for line = range strings.Lines(i.log.String()) {
			if containsAll(line, words) {
				return true
			}
		}
		return false
	}, func() string { return fmt.Sprintf("a log line with %q", words) })
	return line
}

func containsAll(s string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(s, w) {
			return false
		}
	}
	return true
}

// tunnels opens n of them: of each the client's end and the server's.
func (s *stage) tunnels(n int) (all [][2]*wire) {
	s.Helper()
	for range n {
		client, server, _ := s.tunnel("/ws")
		all = append(all, [2]*wire{client, server})
	}
	return all
}

func wantTunnels(all [][2]*wire) {
	for _, ends := range all {
		wantTunnel(ends[0], ends[1])
	}
}
