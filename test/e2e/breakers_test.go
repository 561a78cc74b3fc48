package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCircuitBreakers is about limits of clusters, with real servers at both ends.
func TestCircuitBreakers(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "access.log")
	play(t, publicListener+fmt.Sprintf("[[access_logs]]\npath = %q\ntext_format = \"%%REQ(:PATH)%% %%RESPONSE_CODE%% %%RESPONSE_FLAGS%%\"\n", log), breakerScenes(log))
}

// limited is the scene's cluster with limits, of its two upstreams.
func limited(limits string) string {
	return `
[[clusters]]
name = "{cluster}"
endpoints = ["{up}", "{other}"]
limits = { runtime_prefix = "{cluster}", ` + limits + " }\n"
}

// alone is that with one of them.
func alone(limits string) string { return strings.Replace(limited(limits), `, "{other}"`, "", 1) }

// wantOverloaded reads an answer that says that there is too much.
func wantOverloaded(client *wire) {
	client.t.Helper()
	r := client.reply("GET")
	if r.StatusCode != 503 || r.Header.Get("Holdfast-Overloaded") != "true" || r.body != "503 Service Unavailable\n" {
		client.t.Errorf("got %d %q with %v", r.StatusCode, r.body, r.Header)
	}
}

// wantFigure waits for a value of the scene's cluster.
func (s *stage) wantFigure(name, labels, value string) {
	s.Helper()
	line, said := fmt.Sprintf("holdfast_cluster_%s{cluster=%q,%spriority=\"default\"} %s\n", name, s.name, labels, value), ""
	eventually(s.T, func() bool {
		_, said, _ = s.service.holdfast("metrics")
		return strings.Contains(said, line)
	}, func() string {
		got := ""
		for l := range strings.Lines(said) {
			if strings.Contains(l, name) && strings.Contains(l, s.name) {
				got += l
			}
		}
		return line + got
	})
}

func breakerScenes(log string) []scene {
	const withUrgent = `
[[virtual_hosts.routes]]
match = { prefix = "/urgent" }
cluster = "{cluster}"
priority = "high"
` + defaultRoutes
	return []scene{
		{name: "requests beyond the limit are refused, until it is raised", routes: withUrgent, clusters: alone("requests = 1"), play: func(s *stage) {
			one, two := s.dial(), s.dial()
			one.send(s.get("/"))
			first := s.up.accept(s.T)
			first.head()
			two.send(s.get("/overflow"))
			wantOverloaded(two)
			eventually(s.T, func() bool {
				b, _ := os.ReadFile(log)
				return strings.Contains(string(b), "/overflow 503 UO\n")
			}, func() string { return "a record with the flag" })
			s.wantFigure("overflows_total", `limit="requests",`, "1")
			s.wantFigure("circuit_breaker_open", `limit="requests",`, "1")

			two.send(s.get("/urgent")) // which has limits of its own
			second := s.up.accept(s.T)
			second.head()
			second.send(answer(200, "urgent"))
			two.want(200, "urgent")

			if code, said, errs := s.service.holdfast("runtime", "set", s.name+".requests", "2"); code != 0 {
				s.Fatalf("%d: %s%s", code, said, errs)
			}
			s.wantFigure("circuit_breaker_open", `limit="requests",`, "0")
			two.send(s.get("/"))
			third := s.up.accept(s.T)
			third.head()
			third.send(answer(200, "raised"))
			two.want(200, "raised")
			first.send(answer(200, "first"))
			one.want(200, "first")
		}},
		{name: "who finds no connection waits for one", clusters: alone("connections = 1, pending = 1"), play: func(s *stage) {
			one, two, three := s.dial(), s.dial(), s.dial()
			one.send(s.get("/"))
			first := s.up.accept(s.T)
			first.head()
			two.send(s.get("/"))
			s.wantFigure("pending_active", "", "1")
			three.send(s.get("/"))
			wantOverloaded(three)
			s.wantFigure("overflows_total", `limit="pending",`, "1")
			first.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nfirst")
			one.want(200, "first")
			second := s.up.accept(s.T)
			second.head()
			second.send(answer(200, "second"))
			two.want(200, "second")
			s.wantFigure("pending_active", "", "0")
		}},
		{name: "an idle connection makes room for another endpoint's, and for an upgrade's", clusters: limited("connections = 1"), play: func(s *stage) {
			for n := range 4 { // on whatever loop
				client := s.dial()
				client.send(s.get("/"))
				up := s.up
				if n%2 == 1 {
					up = s.other
				}
				server := up.accept(s.T)
				server.head()
				server.send(answer(200, "here"))
				client.want(200, "here")
			}
			client, server, _ := s.tunnel("/ws")
			wantTunnel(client, server)
		}},
		{name: "tunnels have their place until they end", clusters: alone("tunnels = 1, connections = 1"), play: func(s *stage) {
			one, server, _ := s.tunnel("/ws")
			client := s.dial()
			client.send(s.upgrade("/ws"))
			wantOverloaded(client)
			client.wantEOF()
			client = s.dial()
			client.send(s.get("/")) // the tunnel takes no connection from it
			up := s.up.accept(s.T)
			up.head()
			up.send(answer(200, "a request"))
			client.want(200, "a request")
			wantTunnel(one, server)
			one.close()
			server.wantEOF()
			server.close()
			s.wantFigure("circuit_breaker_open", `limit="tunnels",`, "0")
			wantTunnel(first(s.tunnel("/ws")))
		}},
	}
}

func first(client, server *wire, _ head) (*wire, *wire) { return client, server }

// A tunnel that moves to another generation has its place there, also where it would be one too
// many.
func TestTunnelsThatMoveKeepTheirPlace(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	config := func(tunnels int) string {
		return publicListener + fmt.Sprintf(`
[reload]
probation = "1ms"
[tunnels]
on_reload = "move"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "web"
[[clusters]]
name = "web"
endpoints = [%q]
limits = { tunnels = %d }
`, up.addr, tunnels)
	}
	i := serve(t, config(3))
	s := &stage{T: t, service: i, addresses: i.addresses(), name: "web", host: "any.test", up: up}
	all := s.tunnels(2)
	i.reload(config(1))
	i.wait("the tunnels in the new generation", func(st *status) bool {
		return len(st.Generations) == 1 && st.Generations[0].Tunnels == 2
	})
	wantTunnels(all)
	s.wantFigure("circuit_breaker_open", `limit="tunnels",`, "1")
	refused := func() {
		t.Helper()
		client := s.dial()
		client.send(s.upgrade("/ws"))
		wantOverloaded(client)
	}
	refused()
	for n, ends := range all {
		ends[0].close()
		ends[1].wantEOF()
		ends[1].close()
		if n == 0 {
			refused()
		}
	}
	s.wantFigure("circuit_breaker_open", `limit="tunnels",`, "0")
	wantTunnels(s.tunnels(1))
}
