package e2e

import (
	"fmt"
	"testing"
)

// TestTheEdge is about what a listener believes of its clients, how it reads their paths,
// and what it tells them.
func TestTheEdge(t *testing.T) {
	t.Parallel()
	const guarded = `
[[virtual_hosts.routes]]
match = { prefix = "/admin" }
redirect = { path = "/guarded" }
[[virtual_hosts.routes]]
match = { prefix = "/api" }
prefix_rewrite = "/"
websocket = true
cluster = "{cluster}"
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
`
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	play(t, publicListener+`
[[listeners]]
name = "named"
address = "127.0.0.1:0"
trusted_proxies = ["127.0.0.1"]
internal_headers = ["X-Internal-*"]
forwarded = "append"
request_id_in_response = true
server = "overwrite:edge"
path = { encoded_slashes = "decode" }
[[listeners]]
name = "counted"
address = "127.0.0.1:0"
trusted_hops = 1
server = "append-if-absent:edge"
path = { merge_slashes = false, encoded_slashes = "keep", parameters = "reject" }
[[listeners]]
name = "strangers"
address = "127.0.0.1:0"
internal_headers = ["X-Internal-*"]
forwarded = "append"
server = "off"
path = { normalize = false }
`, []scene{
		{name: "no spelling of a path passes by a route", routes: guarded, play: func(s *stage) {
			for _, listener := range []string{"public", "named"} {
				client := s.dialTo(listener)
				for _, target := range []string{"/admin", "/public/../admin", "/public/%2e%2e/admin", "//admin", "/%61dmin", "/./admin", "/../admin/x"} {
					client.send(s.get(target))
					if r := client.reply("GET"); r.StatusCode != 301 {
						s.Errorf("%s: %s: got %d", listener, target, r.StatusCode)
					}
				}
			}
			client := s.dial()
			bad := []string{"/admin%2f..", "/x%2fadmin", `/\admin`, "/x%5cadmin", "/a/..;/b", "/a/%2e%2e;x/b", "/%00", "/admin%00", "/%0d%0a", "/%", "/%4", "/%zz", "/api../admin"}
			for _, target := range bad {
				client.send(s.get(target))
				if r := client.reply("GET"); r.StatusCode != 400 || r.Close {
					s.Errorf("%s: got %d, the last one: %v", target, r.StatusCode, r.Close)
				}
				upgrading := s.dial()
				upgrading.send(s.upgrade(target))
				if r := upgrading.reply("GET"); r.StatusCode != 400 || !r.Close {
					s.Errorf("an upgrade of %s: got %d", target, r.StatusCode)
				}
			}
			s.up.wantNobody(s.T)
			s.service.wantSeries(series{"holdfast_downstream_requests_refused_total{listener=public,reason=path}": float64(2 * len(bad))})
		}},
		{name: "what was matched is what is sent", routes: guarded, play: func(s *stage) {
			for _, tt := range []struct{ listener, target, sent string }{
				{"public", "/a//b/../%7Ec/%c3%a4?x=/../%2f//%zz", "/a/~c/%C3%A4?x=/../%2f//%zz"},
				{"public", "/x/../api//y/%2E?", "//y/?"}, // exactly the matched bytes are replaced
				{"named", `/a%2fb\c/%5C..?\`, `/a/b/?\`},
				{"counted", "//a%2fb/./c", "//a%2Fb/c"},
				{"strangers", "/x/../admin//%61%zz%00;\\", "/x/../admin//%61%zz%00;\\"},
			} {
				for _, ask := range []string{s.get(tt.target), s.upgrade(tt.target)} {
					client := s.dialTo(tt.listener)
					client.send(ask)
					server := s.up.accept(s.T)
					got := server.wantStart("GET " + tt.sent + " HTTP/1.1")
					if tt.listener == "strangers" {
						got.wantField(s.T, "X-Envoy-Original-Path")
					} else {
						got.wantField(s.T, "X-Envoy-Original-Path", tt.target)
					}
					server.close()
				}
			}
			for _, target := range []string{"/a;b", "/a%3bb", "/a%2f../b"} {
				client := s.dialTo("counted")
				client.send(s.get(target))
				if r := client.reply("GET"); r.StatusCode != 400 {
					s.Errorf("%s: got %d", target, r.StatusCode)
				}
			}
		}},
		{name: "who speaks for the client", play: func(s *stage) {
			claims := []string{"X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Forwarded-Host: shop.test:8443", "X-Internal-User: root", "Forwarded: for=1.2.3.4",
				"X-Request-Id: mine", "X-Original-URL: /admin", "traceparent: " + trace, "tracestate: a=1", "tracestate: b=2"}
			for _, upgrades := range []bool{false, true} {
				ask := func(listener string) head {
					client := s.dialTo(listener)
					if upgrades {
						client.send(s.upgrade("/ws", claims...))
					} else {
						client.send(s.get("/", claims...))
					}
					server := s.up.accept(s.T)
					defer server.close()
					got := server.head()
					got.wantField(s.T, "traceparent", trace)
					got.wantField(s.T, "tracestate", "a=1", "b=2")
					return got
				}
				got := ask("strangers")
				got.wantField(s.T, "X-Forwarded-For", "127.0.0.1")
				got.wantField(s.T, "X-Forwarded-Port", "80")
				got.wantField(s.T, "X-Internal-User")
				got.wantField(s.T, "X-Original-URL")
				got.wantField(s.T, "Forwarded", fmt.Sprintf("for=127.0.0.1;host=%q;proto=http", s.host))
				for _, listener := range []string{"named", "counted"} {
					got := ask(listener)
					got.wantField(s.T, "X-Forwarded-For", "1.2.3.4, 127.0.0.1")
					got.wantField(s.T, "X-Forwarded-Port", "8443")
					got.wantField(s.T, "X-Internal-User", "root")
					got.wantField(s.T, "X-Request-Id", "mine")
					if listener == "counted" {
						got.wantField(s.T, "Forwarded", "for=1.2.3.4")
					} else {
						got.wantField(s.T, "Forwarded", fmt.Sprintf("for=1.2.3.4, for=127.0.0.1;host=%q;proto=http", s.host))
					}
				}
			}
		}},
		{name: "what responses say", play: func(s *stage) {
			for listener, want := range map[string]struct{ theirs, ours []string }{
				"public":    {[]string{"theirs"}, nil},
				"named":     {[]string{"edge"}, []string{"edge"}},
				"counted":   {[]string{"theirs"}, []string{"edge"}},
				"strangers": {nil, nil},
			} {
				wantHead := func(got head, servers []string) {
					got.wantField(s.T, "Server", servers...)
					if n := len(got.values("Date")); n != 1 {
						s.Errorf("%s: %d Dates in %q", listener, n, got)
					}
					if id := got.values("X-Request-Id"); (listener == "named") != (len(id) == 1) {
						s.Errorf("%s: X-Request-Id %q", listener, id)
					}
				}
				client := s.dialTo(listener)
				client.send(s.get("/"))
				server := s.up.accept(s.T)
				server.head()
				server.send("HTTP/1.1 200 OK\r\nServer: theirs\r\nContent-Length: 0\r\n\r\n")
				wantHead(client.wantStart("HTTP/1.1 200 OK"), want.theirs)

				client.send(s.get("/"))
				server.head()
				server.send("HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nServer: theirs\r\nContent-Length: 0\r\n\r\n")
				client.wantStart("HTTP/1.1 200 OK").wantField(s.T, "Date", "Sun, 06 Nov 1994 08:49:37 GMT")

				client.send(s.request("GET / HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade", "Content-Length: 1"))
				wantHead(client.wantStart("HTTP/1.1 403 Forbidden"), want.ours)
				server.close()

				refused := s.dialTo(listener) // by the codec
				refused.send(s.get("/", "Transfer-Encoding: x"))
				got := refused.wantStart("HTTP/1.1 501 Not Implemented")
				got.wantField(s.T, "Server", want.ours...)
			}
		}},
		{name: "a client that takes trailers", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/", "TE: gzip, trailers", "Connection: TE"))
			server := s.up.accept(s.T)
			got := server.head()
			got.wantField(s.T, "TE", "trailers")
			got.wantField(s.T, "Connection", "TE")
			server.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nServer-Timing: a\r\n\r\n")
			client.wantStart("HTTP/1.1 200 OK")
			client.wantBytes("2\r\nok\r\n0\r\nServer-Timing: a\r\n\r\n")
			client.send(s.get("/", "TE: trailers"))
			server.head().wantField(s.T, "TE")
		}},
	})
}

// A redirect of ours leaks nothing that one program has told another.
func TestRedirectsSayNothingOfTheRequest(t *testing.T) {
	t.Parallel()
	play(t, publicListener, []scene{{
		name:   "traces and the like",
		routes: "[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\nredirect = { path = \"/new\" }\n",
		play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/", "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate: a=1", "X-Request-Id: mine", "Forwarded: for=1.2.3.4"))
			got := client.wantStart("HTTP/1.1 301 Moved Permanently")
			for _, name := range []string{"traceparent", "tracestate", "X-Request-Id", "Forwarded", "X-Forwarded-For"} {
				got.wantField(s.T, name)
			}
		},
	}})
}
