package e2e

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestFilters is about what requests and upgrades must pass before an upstream sees them, with
// real servers at both ends.
func TestFilters(t *testing.T) {
	t.Parallel()
	play(t, filteredListeners, filterScenes())
}

const filteredListeners = publicListener + `
health_check = { path = "/healthz" }

[[listeners]]
name = "denying"
address = "127.0.0.1:0"
deny = ["127.0.0.0/8"]

[[listeners]]
name = "limited"
address = "127.0.0.1:0"
rate_limit = { requests = 1, per = "1h", burst = 2 }
`

// authRoutes asks {other} about everything, and sends it to {up}.
func authRoutes(keys, route string) string {
	return `
authorize = { cluster = "{cluster}-auth", path_prefix = "/auth", request_headers = ["Cookie"], upstream_headers = ["X-User"]` + keys + ` }
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
` + route
}

const authClusters = defaultClusters + `
[[clusters]]
name = "{cluster}-auth"
endpoints = ["{other}"]
`

// serves answers one request as the upstream.
func (s *stage) serves() head {
	s.Helper()
	server := s.up.accept(s.T)
	got := server.head()
	server.send(answer(200, "served"))
	return got
}

// decides answers one question as the authorization service, and ends the connection: the
// next question may come from another loop, which has connections of its own, or from the same.
func (s *stage) decides(answers string) head {
	s.Helper()
	service := s.other.accept(s.T)
	got := service.head()
	service.send(answers)
	service.close()
	return got
}

const allowed = "HTTP/1.1 200 OK\r\nX-User: ann\r\nContent-Length: 0\r\n\r\n"

func filterScenes() []scene {
	return []scene{
		{name: "addresses are refused by listener and by route", routes: `
[[virtual_hosts.routes]]
match = { prefix = "/denied" }
websocket = true
cluster = "{cluster}"
deny = ["127.0.0.1"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "{cluster}"
allow = ["127.0.0.0/8"]
`, play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/denied"))
			client.want(403, "403 Forbidden\n")
			client.send(s.get("/"))
			s.serves()
			client.want(200, "served")
			client = s.dialTo("denying")
			client.send(s.get("/"))
			client.want(403, "403 Forbidden\n")
			client = s.dial()
			client.send(s.upgrade("/denied"))
			client.wantRefused(403)
			s.up.wantNobody(s.T)
		}},
		{name: "too many requests are told when to come again", play: func(s *stage) {
			client := s.dialTo("limited")
			server := (*wire)(nil)
			for range 2 {
				client.send(s.get("/"))
				if server == nil {
					server = s.up.accept(s.T)
				}
				server.head()
				server.send(answer(200, "served"))
				client.want(200, "served")
			}
			client.send(s.get("/"))
			r := client.want(429, "429 Too Many Requests\n")
			after := r.Header.Get("Retry-After")
			if n, err := strconv.Atoi(after); err != nil || n < 3600-int(patience/time.Second) || n > 3600 {
				s.Errorf("Retry-After is %q", after)
			}
			s.tunnelOn("limited") // which that limit does not count
		}},
		{name: "new tunnels have a limit of their own", routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
tunnel_rate_limit = { tunnels = 1, per = "1h", key = "client" }
`, play: func(s *stage) {
			one, server, _ := s.tunnel("/")
			client := s.dial()
			client.send(s.upgrade("/"))
			client.wantRefused(429)
			client = s.dial()
			client.send(s.get("/"))
			s.serves()
			client.want(200, "served")
			wantTunnel(one, server)
		}},
		{name: "faults are for those who ask for them", routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
fault = { headers = [{ name = "X-Chaos", value = "yes" }], delay = { percent = 100, duration = "100ms" }, abort = { percent = 100, status = 500 } }
`, play: func(s *stage) {
			client, began := s.dial(), time.Now()
			client.send(s.get("/", "X-Chaos: yes"))
			client.want(500, "500 Internal Server Error\n")
			if took := time.Since(began); took < 100*time.Millisecond {
				s.Errorf("it took %v", took)
			}
			client.send(s.get("/", "X-Chaos: no"))
			s.serves()
			client.want(200, "served")
			client = s.dial()
			client.send(s.upgrade("/", "X-Chaos: yes"))
			client.wantRefused(500)
		}},
		{name: "a service says yes", routes: authRoutes("", ""), clusters: authClusters, play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST /path?q HTTP/1.1", "Cookie: c=1", "X-User: root", "Content-Length: 4"), "body")
			question := s.decides(allowed)
			if question.start() != "POST /auth/path?q HTTP/1.1" || strings.Contains(string(question), "root") {
				s.Errorf("the service was asked %q", question)
			}
			question.wantField(s.T, "Cookie", "c=1")
			question.wantField(s.T, "Host", s.host)
			got := s.serves()
			got.wantField(s.T, "X-User", "ann")
			if strings.Contains(string(got), "root") {
				s.Errorf("the upstream believes the client: %q", got)
			}
			client.want(200, "served")
		}},
		{name: "a service says no", routes: authRoutes("", ""), clusters: authClusters, play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/"))
			s.decides("HTTP/1.1 401 No\r\nWWW-Authenticate: Basic\r\nX-Secret: 1\r\nContent-Length: 4\r\n\r\nwho?")
			if r := client.want(401, "who?"); r.Header.Get("WWW-Authenticate") != "Basic" || r.Header.Get("X-Secret") != "" {
				s.Errorf("the client gets %v", r.Header)
			}
			s.up.wantNobody(s.T)
		}},
		{name: "upgrades are asked about before the tunnel opens", routes: authRoutes("", ""), clusters: authClusters, play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/", "X-User: root"), "early")
			s.decides(allowed)
			server := s.up.accept(s.T)
			server.head().wantField(s.T, "X-User", "ann")
			server.send(agreement)
			client.wantStart(agreed)
			server.wantBytes("early")
			wantTunnel(client, server)

			client = s.dial()
			client.send(s.upgrade("/"))
			s.decides(answer(403, "no"))
			client.wantLast(403, "no")
			s.up.wantNobody(s.T)
		}},
		{name: "upgrades are not asked about where that is off", routes: "authorize_upgrades = false\n" + authRoutes("", ""), clusters: authClusters, play: func(s *stage) {
			client, server, got := s.tunnel("/", "X-User: root")
			if strings.Contains(string(got), "root") {
				s.Errorf("the upstream believes the client: %q", got)
			}
			wantTunnel(client, server)
			s.other.wantNobody(s.T)
		}},
		{name: "without an answer nothing passes", routes: authRoutes(`, timeout = "50ms"`, ""), clusters: authClusters, play: func(s *stage) {
			for range 2 {
				client := s.dial()
				client.send(s.upgrade("/"))
				client.wantRefused(403)
			}
			client := s.dial()
			client.send(s.get("/"))
			client.want(403, "403 Forbidden\n")
			s.up.wantNobody(s.T)
		}},
		{name: "without a service nothing passes", routes: authRoutes("", ""), clusters: strings.Replace(authClusters, "{other}", "{refusing}", 1), play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/"))
			client.want(403, "403 Forbidden\n")
			s.up.wantNobody(s.T)
		}},
		{name: "without a service everything passes where that is wanted", routes: authRoutes(`, timeout = "50ms", on_error = "allow"`, ""), clusters: authClusters, play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/", "X-User: root"))
			if got := s.serves(); strings.Contains(string(got), "root") {
				s.Errorf("the upstream believes the client: %q", got)
			}
			client.want(200, "served")
			client, server, _ := s.tunnel("/")
			wantTunnel(client, server)
		}},
		{name: "health checks need no host", play: func(s *stage) {
			client := s.dial()
			client.send(request("GET /healthz HTTP/1.1", "Host: unknown.test"))
			client.want(200, "ok\n")
			client.send(request("GET /other HTTP/1.1", "Host: unknown.test"))
			client.want(404, "404 Not Found\n")
		}},
	}
}

// tunnelOn opens a tunnel on a listener.
func (s *stage) tunnelOn(listener string) {
	s.Helper()
	client := s.dialTo(listener)
	client.send(s.upgrade("/ws"))
	server := s.up.accept(s.T)
	server.head()
	server.send(agreement)
	client.wantStart(agreed)
	wantTunnel(client, server)
}

// A load balancer hears of `ready off` and of a stop in the same way, over reloads, while
// everything is served.
func TestHealthChecksTurnNegative(t *testing.T) {
	t.Parallel()
	up := newBackend(t)
	config := func(more string) string {
		return strings.Replace(simple(up, "[reload]\nprobation = \"0s\"\n[stop]\ndelay = \"1h\"\n"+more), "name = \"public\"\n", "name = \"public\"\nhealth_check = { path = \"/healthz\" }\n", 1)
	}
	i := serve(t, config(""))
	address := i.address("public")
	// Each check is a connection of its own, which the newest generation answers.
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	check := func() int {
		resp, err := client.Get("http://" + address + "/healthz")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	want := func(when string, status int) {
		t.Helper()
		if got := check(); got != status {
			t.Errorf("%s: %d, want %d", when, got, status)
		}
	}
	ready := func(word string) {
		t.Helper()
		if code, _, errs := i.holdfast("ready", word); code != 0 {
			t.Fatalf("exit code %d: %s", code, errs)
		}
	}
	want("at first", 200)
	ready("off")
	want("when it is off", 503)
	i.reload(config("# changed\n"))
	want("after a reload", 503)
	ready("on")
	want("when it is on again", 200)
	i.signal(15)
	eventually(t, func() bool { return check() == 503 }, func() string { return "a negative answer within stop.delay" })
	wantAnswer(t, address)
	i.signal(15) // at once
	i.awaitEnd()
}
