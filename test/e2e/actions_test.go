package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestActions is about what routes do besides sending requests somewhere, over raw connections
// on both sides.
func TestActions(t *testing.T) {
	t.Parallel()
	page := filepath.Join(t.TempDir(), "sorry.html")
	if err := os.WriteFile(page, []byte("<p>sorry</p>"), 0o644); err != nil {
		t.Fatal(err)
	}
	play(t, publicListener, []scene{
		fieldsAreChanged(), answersWithoutAServer(page), pathsAndHosts(), clustersByRequest(), otherProtocols(), pages(), limitsOfARoute(),
	})
}

func fieldsAreChanged() scene {
	return scene{
		name: "fields are changed for requests, answers and tunnels",
		routes: `request_headers = { remove = ["X-Secret"], set = { X-By = "host" } }
response_headers = { set = { X-Frame-Options = "DENY" } }
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
request_headers = { set = { X-By = "%REQ(X-By)%, route" }, add = { X-Client = "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%" } }
response_headers = { remove = ["Server"], set = { X-Id = "%REQUEST_ID%" } }
`,
		clusters: `
[[clusters]]
name = "{cluster}"
endpoints = ["{up}"]
request_headers = { set = { X-Cluster = "%UPSTREAM_CLUSTER% %UPSTREAM_HOST%" } }
response_headers = { add = { X-Cluster = "%UPSTREAM_CLUSTER%" } }
`,
		play: func(s *stage) {
			wantSent := func(h head) {
				s.Helper()
				h.wantField(s.T, "X-Secret")
				h.wantField(s.T, "X-By", "host, route")
				h.wantField(s.T, "X-Client", "127.0.0.1")
				h.wantField(s.T, "X-Cluster", s.name+" "+s.up.addr)
			}
			wantGot := func(h http.Header, id string) {
				s.Helper()
				if h.Get("X-Frame-Options") != "DENY" || h.Get("X-Cluster") != s.name || h.Get("X-Id") != id || h.Get("Server") != "" {
					s.Errorf("got %v", h)
				}
			}
			client := s.dial()
			client.send(s.get("/", "X-Secret: 1", "x-by: me"))
			server := s.up.accept(s.T)
			sent := server.head()
			wantSent(sent)
			server.send("HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\nok")
			wantGot(client.want(200, "ok").Header, sent.values("X-Request-Id")[0])

			refused := s.dial()
			refused.send(s.upgrade("/", "X-Secret: 1"))
			server = s.up.accept(s.T)
			sent = server.head()
			wantSent(sent)
			server.send(answer(401, "no"))
			wantGot(refused.wantLast(401, "no").Header, sent.values("X-Request-Id")[0])

			client.send(s.upgrade("/", "X-Secret: 1"))
			server = s.up.accept(s.T)
			sent = server.head()
			wantSent(sent)
			server.send(agreement)
			got := client.wantStart(agreed)
			got.wantField(s.T, "X-Frame-Options", "DENY")
			got.wantField(s.T, "X-Id", sent.values("X-Request-Id")...)
			got.wantField(s.T, "Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
			wantTunnel(client, server)
		},
	}
}

func answersWithoutAServer(page string) scene {
	return scene{
		name: "redirects and answers of our own",
		routes: `
[[virtual_hosts.routes]]
match = { prefix = "/docs/" }
redirect = { scheme = "https", port = 8443, prefix_rewrite = "/manual/", strip_query = true, status = 308 }
[[virtual_hosts.routes]]
match = { prefix = "/item/" }
redirect = { host = "shop.test", regex_rewrite = { pattern = "^/item/([0-9]+)$", substitution = "/i/\\1" } }
[[virtual_hosts.routes]]
match = { path = "/sorry" }
direct_response = { status = 503, file = "` + page + `", content_type = "text/html" }
response_headers = { set = { Retry-After = "60" } }
[[virtual_hosts.routes]]
match = { path = "/nothing" }
direct_response = { status = 204 }
`,
		play: func(s *stage) {
			client := s.dial()
			for target, location := range map[string]string{
				"/docs/a?q": "https://" + s.host + ":8443/manual/a", "/item/7?q": "http://shop.test/i/7?q", "/item/x": "http://shop.test/item/x",
			} {
				client.send(s.get(target))
				if r := client.reply("GET"); r.Header.Get("Location") != location || r.StatusCode/100 != 3 {
					s.Errorf("%s: got %d to %q, want %q", target, r.StatusCode, r.Header.Get("Location"), location)
				}
			}
			client.send(s.get("/sorry"))
			if r := client.want(503, "<p>sorry</p>"); r.Header.Get("Content-Type") != "text/html" || r.Header.Get("Retry-After") != "60" {
				s.Errorf("got %v", r.Header)
			}
			client.send(s.request("HEAD /sorry HTTP/1.1"))
			if r := client.reply("HEAD"); r.StatusCode != 503 || r.ContentLength != 12 {
				s.Errorf("got %d with the length %d", r.StatusCode, r.ContentLength)
			}
			client.send(s.get("/nothing"))
			client.want(204, "")
			client.send(s.upgrade("/sorry"))
			client.wantLast(503, "<p>sorry</p>")
			client = s.dial()
			client.send(s.upgrade("/docs/"))
			client.wantRefused(403)
		},
	}
}

func pathsAndHosts() scene {
	return scene{
		name: "paths and hosts are rewritten for requests and upgrades",
		routes: `
[[virtual_hosts.routes]]
match = { prefix = "/v" }
websocket = true
cluster = "{cluster}"
regex_rewrite = { pattern = "^/v([0-9]+)/", substitution = "/api/\\1/" }
host_rewrite_header = "X-Host"
[[virtual_hosts.routes]]
match = { prefix = "/gone" }
cluster = "{cluster}"
regex_rewrite = { pattern = "^/", substitution = "" }
`,
		play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/v2/a?/v3/", "X-Host: inner.test:81"))
			server := s.up.accept(s.T)
			h := server.wantStart("GET /api/2/a?/v3/ HTTP/1.1")
			h.wantField(s.T, "Host", "inner.test:81")
			h.wantField(s.T, "X-Forwarded-Host", s.host)
			server.send(answer(200, "x"))
			client.want(200, "x")
			client.send(s.get("/v2/", "X-Host: a b"))
			client.want(400, "400 Bad Request\n")
			client.send(s.get("/gone"))
			client.want(400, "400 Bad Request\n")
			client.send(s.upgrade("/v2/ws"))
			server = s.up.accept(s.T)
			server.wantStart("GET /api/2/ws HTTP/1.1").wantField(s.T, "Host", s.host)
			server.send(agreement)
			client.wantStart(agreed)
			wantTunnel(client, server)
		},
	}
}

func clustersByRequest() scene {
	return scene{
		name: "a field, or a hash, chooses the cluster",
		routes: `
[[virtual_hosts.routes]]
match = { prefix = "/field" }
websocket = true
cluster_header = "X-Cluster"
request_headers = { remove = ["X-Cluster"] }
[[virtual_hosts.routes]]
match = { prefix = "/hash" }
websocket = true
weighted_clusters = [{ cluster = "{cluster}-a", weight = 1 }, { cluster = "{cluster}-b", weight = 1 }]
split_by_hash = true
hash_policy = [{ cookie = { name = "seat", ttl = "1h", path = "/" } }]
`,
		clusters: `
[[clusters]]
name = "{cluster}-a"
endpoints = ["{up}"]
[[clusters]]
name = "{cluster}-b"
endpoints = ["{other}"]
`,
		play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/field", "X-Cluster: "+s.name+"-b"))
			server := s.other.accept(s.T)
			server.head().wantField(s.T, "X-Cluster")
			server.send(answer(200, "b"))
			client.want(200, "b")
			client.send(s.get("/field"))
			client.want(404, "404 Not Found\n")
			client.send(s.upgrade("/field", "X-Cluster: none"))
			client.wantRefused(404)

			// Whoever comes back with the cookie gets to the same one, also with a WebSocket.
			client = s.dial()
			client.send(s.upgrade("/hash"))
			var first *upstream
			select {
			case conn := <-s.up.arrived:
				first, server = s.up, newWire(s.T, conn)
			case conn := <-s.other.arrived:
				first, server = s.other, newWire(s.T, conn)
			}
			server.head()
			server.send(agreement)
			cookie, attributes, _ := strings.Cut(client.wantStart(agreed).values("Set-Cookie")[0], "; ")
			if attributes != "Path=/; Max-Age=3600; HttpOnly" || !strings.HasPrefix(cookie, "seat=") {
				s.Errorf("got the cookie %q with %q", cookie, attributes)
			}
			wantTunnel(client, server)
			for range 8 {
				client := s.dial()
				client.send(s.upgrade("/hash", "Cookie: "+cookie))
				server := first.accept(s.T)
				server.head()
				server.send(agreement)
				client.wantStart(agreed).wantField(s.T, "Set-Cookie")
				client.close()
				server.wantClosed()
			}
		},
	}
}

func otherProtocols() scene {
	const other = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: my-proto/2\r\nConnection: Upgrade\r\n\r\n"
	return scene{
		name: "connections change to other protocols where a route takes them",
		routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
upgrades = ["my-proto/2"]
cluster = "{cluster}"
`,
		play: func(s *stage) {
			ask := s.get("/", "Connection: upgrade", "Upgrade: My-Proto/2")
			client := s.dial()
			client.send(ask, "early")
			server := s.up.accept(s.T)
			h := server.head()
			h.wantField(s.T, "Upgrade", "my-proto/2")
			h.wantField(s.T, "Connection", "Upgrade")
			server.wantNothing() // before it has agreed
			server.send(other)
			client.wantStart(agreed).wantField(s.T, "Upgrade", "my-proto/2")
			server.wantBytes("early")
			wantTunnel(client, server)

			client = s.dial()
			client.send(ask)
			server = s.up.accept(s.T)
			server.head()
			server.send(agreement) // to WebSocket
			client.wantRefused(502)
			server.wantClosed()

			client = s.dial()
			client.send(ask)
			server = s.up.accept(s.T)
			server.head()
			server.send(answer(200, "no"))
			client.wantLast(200, "no")

			client = s.dial()
			client.send(s.upgrade("/"))
			client.wantRefused(403)

			client = s.dial() // what the route does not take is an ordinary request
			client.send(s.get("/", "Connection: upgrade", "Upgrade: another"))
			server = s.up.accept(s.T)
			server.head().wantField(s.T, "Upgrade")
			server.send(answer(200, "ok"))
			client.want(200, "ok")
			client.send(s.get("/", "Connection: upgrade", "Upgrade: h2c"))
			server.head().wantField(s.T, "Upgrade")
			server.send(answer(200, "ok"))
			client.want(200, "ok")
		},
	}
}

func pages() scene {
	return scene{
		name: "pages of other origins",
		routes: `
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
origins = ["https://app.test", "https://*.app.test"]
cluster = "{cluster}"
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "{cluster}"
  [virtual_hosts.routes.cors]
  allow_origins = ["https://app.test"]
  allow_methods = ["PUT"]
  max_age = "1m"
`,
		play: func(s *stage) {
			for _, origin := range []string{"https://evil.test", "null", "http://app.test"} {
				client := s.dial()
				client.send(s.upgrade("/ws", "Origin: "+origin))
				client.wantRefused(403)
			}
			for _, fields := range [][]string{nil, {"Origin: https://app.test"}, {"Origin: https://a.app.test"}} {
				client, server, _ := s.tunnel("/ws", fields...)
				wantTunnel(client, server)
			}
			client := s.dial()
			client.send(s.request("OPTIONS / HTTP/1.1", "Origin: https://app.test", "Access-Control-Request-Method: PUT"))
			r := client.want(200, "")
			for name, want := range map[string]string{
				"Access-Control-Allow-Origin": "https://app.test", "Access-Control-Allow-Methods": "PUT", "Access-Control-Max-Age": "60", "Vary": "Origin",
			} {
				if r.Header.Get(name) != want {
					s.Errorf("%s is %q, want %q", name, r.Header.Get(name), want)
				}
			}
			client.send(s.get("/", "Origin: https://app.test"))
			server := s.up.accept(s.T)
			server.head()
			server.send(answer(200, "x"))
			if r := client.want(200, "x"); r.Header.Get("Access-Control-Allow-Origin") != "https://app.test" || r.Header.Get("Vary") != "Origin" {
				s.Errorf("got %v", r.Header)
			}
			client.send(s.request("OPTIONS / HTTP/1.1", "Origin: https://evil.test", "Access-Control-Request-Method: PUT"))
			server.wantStart("OPTIONS / HTTP/1.1")
			server.send(answer(200, "x"))
			if r := client.want(200, "x"); r.Header.Get("Access-Control-Allow-Origin") != "" || r.Header.Get("Vary") != "Origin" {
				s.Errorf("got %v", r.Header)
			}
		},
	}
}

func limitsOfARoute() scene {
	return scene{
		name: "limits of one route",
		routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
max_body_size = "8B"
max_head_size = "1KiB"
cluster = "{cluster}"
`,
		play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST / HTTP/1.1", "Transfer-Encoding: chunked"), chunk("12345678"))
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("8\r\n12345678\r\n")
			client.send(chunk("9"))
			if r := client.reply("POST"); r.StatusCode != 413 || !r.Close {
				s.Errorf("got %d, the last one: %v", r.StatusCode, r.Close)
			}
			server.wantClosed()
			client = s.dial()
			client.send(s.request("PUT / HTTP/1.1", "Content-Length: 8"), "12345678")
			server = s.up.accept(s.T)
			server.head()
			server.wantBytes("12345678")
			server.send(answer(200, "ok"))
			client.want(200, "ok")
			client.send(s.request("PUT / HTTP/1.1", "Content-Length: 9"), "123456789")
			if r := client.reply("PUT"); r.StatusCode != 413 {
				s.Errorf("got %d", r.StatusCode)
			}
			client = s.dial()
			client.send(s.upgrade("/", "X: "+strings.Repeat("x", 1000)))
			client.wantRefused(431)
		},
	}
}
