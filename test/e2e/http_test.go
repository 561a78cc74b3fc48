package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestHTTP is about ordinary requests, over raw connections on both sides.
func TestHTTP(t *testing.T) {
	t.Parallel()
	play(t, publicListener, slices.Concat(bodies(), interims(), connections(), failures(), endpoints()))
}

// bodies are about what is relayed behind the heads.
func bodies() []scene {
	return []scene{
		{name: "request and response stream at the same time", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST /echo HTTP/1.1", "Transfer-Encoding: chunked"), "3\r\none\r\n")
			server := s.up.accept(s.T)
			server.head()
			up, down := httputil.NewChunkedReader(server.r), httputil.NewChunkedReader(client.r)
			wantRead(s.T, up, "one")
			server.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "3\r\nONE\r\n")
			client.wantStart("HTTP/1.1 200 OK").wantField(s.T, "Transfer-Encoding", "chunked")
			wantRead(s.T, down, "ONE")
			for _, word := range []string{"two", "three", "four"} {
				client.send(chunk(word))
				wantRead(s.T, up, word)
				server.send(chunk(strings.ToUpper(word)))
				wantRead(s.T, down, strings.ToUpper(word))
			}
			client.send("0\r\n\r\n")
			wantRead(s.T, up, "")
			server.send("0\r\n\r\n")
			wantRead(s.T, down, "")
		}},
		{name: "trailers pass both ways", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Trailer: ETag"), "2\r\nup\r\n0\r\nETag: 1\r\n\r\n")
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("2\r\nup\r\n0\r\nETag: 1\r\n\r\n")
			server.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Digest\r\n\r\n4\r\ndown\r\n0\r\nDigest: 2\r\n\r\n")
			if r := client.want(200, "down"); r.Trailer.Get("Digest") != "2" {
				s.Errorf("got the trailers %v", r.Trailer)
			}
		}},
		{name: "bodies of known length keep it", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("PUT / HTTP/1.1", "Content-Length: 4"), "body")
			server := s.up.accept(s.T)
			server.head().wantField(s.T, "Content-Length", "4")
			server.wantBytes("body")
			server.send(answer(200, "answer"))
			if r := client.want(200, "answer"); r.ContentLength != 6 {
				s.Errorf("got the length %d", r.ContentLength)
			}
		}},
		{name: "an upstream that ends its body by closing", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.0 200 OK\r\n\r\nuntil the end")
			server.close()
			client.want(200, "until the end") // and we go on
		}},
		{name: "an event arrives before the next one is sent", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/events", "Accept: text/event-stream"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
			client.wantStart("HTTP/1.1 200 OK") // before the first event
			events := httputil.NewChunkedReader(client.r)
			for n := range 3 {
				event := fmt.Sprintf("data: %d\n\n", n)
				server.send(chunk(event))
				wantRead(s.T, events, event)
			}
			client.close()
			server.wantClosed()
		}},
		{name: "answers without a body", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("HEAD / HTTP/1.1"))
			server := s.up.accept(s.T)
			server.wantStart("HEAD / HTTP/1.1")
			server.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
			if r := client.reply("HEAD"); r.ContentLength != 1000 || r.Close {
				s.Errorf("HEAD: got the length %d, the last one: %v", r.ContentLength, r.Close)
			}
			client.send(s.request("DELETE / HTTP/1.1"))
			server.wantStart("DELETE / HTTP/1.1")
			server.send("HTTP/1.1 204 No Content\r\n\r\n")
			h := client.wantStart("HTTP/1.1 204 No Content")
			h.wantField(s.T, "Content-Length")
			h.wantField(s.T, "Transfer-Encoding")
			client.send(s.get("/", `If-None-Match: "x"`))
			server.wantStart("GET / HTTP/1.1").wantField(s.T, "If-None-Match", `"x"`)
			server.send("HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 1000\r\n\r\n")
			client.wantStart("HTTP/1.1 304 Not Modified").wantField(s.T, "ETag", `"x"`)
			client.send(s.get("/"))
			server.wantStart("GET / HTTP/1.1")
			server.send(answer(200, "x"))
			client.want(200, "x")
		}},
		{name: "an answer while the client still uploads", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST / HTTP/1.1", "Content-Length: 1000000"), "beginning")
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("beginning")
			server.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!")
			client.wantLast(413, "no!") // of an upload of which so much is left nobody waits for the rest
			server.wantClosed()
		}},
	}
}

func chunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }

// wantRead reads exactly want, or the end if that is empty.
func wantRead(t *testing.T, r io.Reader, want string) {
	t.Helper()
	if want == "" {
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("got %d bytes, %v; want the end", n, err)
		}
		return
	}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got[:n], err, want)
	}
}

// interims are about responses before the final one.
func interims() []scene {
	return []scene{
		{name: "103 is relayed as it comes", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
			client.wantStart("HTTP/1.1 103 Early Hints").wantField(s.T, "Link", "</a.css>")
			server.send(answer(200, "x"))
			client.want(200, "x")
		}},
		{name: "a client of HTTP/1.0 gets no interim response", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("GET / HTTP/1.0"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 103 Early Hints\r\n\r\n", answer(200, "x"))
			client.wantLast(200, "x")
		}},
		{name: "a client that expects 100 Continue is told to go on", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("POST / HTTP/1.1", "Expect: 100-continue", "Content-Length: 4"))
			client.wantStart("HTTP/1.1 100 Continue")
			client.send("body")
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("body")
			server.send(answer(200, "x"))
			client.want(200, "x")
		}},
		{
			name:   "a client that expects 100 Continue and is refused need not send its body",
			routes: "[[virtual_hosts.routes]]\nmatch = { path = \"/only\" }\ncluster = \"{cluster}\"\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.request("POST / HTTP/1.1", "Expect: 100-continue", "Content-Length: 4"))
				client.wantRefused(404) // the last one: nobody knows whether a body follows
			},
		},
		{name: "a 101 that nobody asked for is 502", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/ws"))
			server := s.up.accept(s.T)
			server.head()
			server.send(agreement)
			if r := client.reply("GET"); r.StatusCode != 502 {
				s.Errorf("got %d", r.StatusCode)
			}
			server.wantClosed()
		}},
	}
}

// connections are about which connection carries what.
func connections() []scene {
	return []scene{
		{
			// Another client's request may come on another loop, which has connections of its own.
			name:   "a connection carries request after request, and so does the upstream's",
			routes: "[[virtual_hosts.routes]]\nmatch = { path = \"/own\" }\nredirect = { path = \"/\" }\n" + defaultRoutes,
			play: func(s *stage) {
				client := s.dial()
				client.send(s.get("/0"))
				server := s.up.accept(s.T)
				for n := range 6 {
					server.wantStart(fmt.Sprintf("GET /%d HTTP/1.1", n))
					server.send(answer(200, fmt.Sprint(n)))
					client.want(200, fmt.Sprint(n))
					client.send(s.get("/own")) // answered when all is done about the request before it
					if r := client.reply("GET"); r.StatusCode != 301 {
						s.Fatalf("got %d", r.StatusCode)
					}
					if n < 5 {
						client.send(s.get(fmt.Sprintf("/%d", n+1)))
					}
				}
				s.up.wantNobody(s.T)
			},
		},
		{name: "pipelined requests are answered in their order", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/1"), s.request("POST /2 HTTP/1.1", "Content-Length: 4"), "body", s.get("/3"))
			server := s.up.accept(s.T)
			server.wantStart("GET /1 HTTP/1.1")
			server.send(answer(200, "1"))
			server.wantStart("POST /2 HTTP/1.1")
			server.wantBytes("body")
			server.send(answer(200, "2"))
			server.wantStart("GET /3 HTTP/1.1")
			server.send(answer(200, "3"))
			for _, body := range []string{"1", "2", "3"} {
				client.want(200, body)
			}
		}},
		{name: "a client of HTTP/1.0 gets a body that ends with the connection", play: func(s *stage) {
			client := s.dial()
			client.send(s.request("GET / HTTP/1.0", "Connection: keep-alive"))
			server := s.up.accept(s.T)
			server.wantStart("GET / HTTP/1.1")
			server.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n")
			h := client.head()
			h.wantField(s.T, "Transfer-Encoding")
			h.wantField(s.T, "Connection", "close")
			client.wantBytes("body")
			client.wantEOF()
		}},
		{name: "Connection: close of the client is obeyed", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/", "Connection: close"))
			server := s.up.accept(s.T)
			server.head()
			server.send(answer(200, "x"))
			client.wantLast(200, "x")
		}},
		{name: "Connection: close of the upstream is not the client's", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/1"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\n1")
			client.want(200, "1")
			server.wantClosed()
			client.send(s.get("/2"))
			server = s.up.accept(s.T)
			server.head()
			server.send(answer(200, "2"))
			client.want(200, "2")
		}},
		{name: "an upstream that closed an idle connection is connected again", play: func(s *stage) {
			client := s.dial()
			for range 2 {
				client.send(s.request("POST / HTTP/1.1", "Content-Length: 1"), "x")
				server := s.up.accept(s.T)
				server.head()
				server.wantBytes("x")
				server.send(answer(200, "x"))
				server.close() // before the next request is sent
				client.want(200, "x")
			}
		}},
		{name: "a GET is sent again if an idle connection closes under it", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/1"))
			server := s.up.accept(s.T)
			server.head()
			server.send(answer(200, "1"))
			client.want(200, "1")
			client.send(s.get("/2"))
			server.wantStart("GET /2 HTTP/1.1")
			server.close()
			server = s.up.accept(s.T)
			server.wantStart("GET /2 HTTP/1.1")
			server.send(answer(200, "2"))
			client.want(200, "2")
		}},
		{name: "a request with a body is not sent again", play: func(s *stage) {
			for _, method := range []string{"POST", "PUT"} {
				client := s.dial()
				client.send(s.get("/1"))
				server := s.up.accept(s.T)
				server.head()
				server.send(answer(200, "1"))
				client.want(200, "1")
				client.send(s.request(method+" /2 HTTP/1.1", "Content-Length: 1"), "x")
				server.wantStart(method + " /2 HTTP/1.1")
				server.wantBytes("x")
				server.close()
				if r := client.reply("GET"); r.StatusCode != 503 {
					s.Errorf("%s: got %d", method, r.StatusCode)
				}
				s.up.wantNobody(s.T)
			}
		}},
		{name: "a client that goes takes its upstream's connection along", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/"))
			server := s.up.accept(s.T)
			server.head()
			client.close()
			server.wantClosed()
		}},
	}
}

// failures are about upstreams that do not answer as they should.
func failures() []scene {
	// cut lets the upstream end within its answer's body.
	cut := func(name, version, response, got string) scene {
		return scene{name: name, play: func(s *stage) {
			client := s.dial()
			client.send(s.request("GET / " + version))
			server := s.up.accept(s.T)
			server.head()
			server.send(response)
			client.head()
			client.wantBytes(got)
			server.close()
			rest, err := io.ReadAll(client.r)
			if len(rest) > 0 || version == "HTTP/1.0" && err == nil { // there a proper end would be taken for success
				s.Errorf("got %q, %v behind the half of a body", rest, err)
			}
			s.wantLog("response cut", "status=200")
		}}
	}
	return []scene{
		cut("a body of known length that is cut is cut for the client", "HTTP/1.1", "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf", "half"),
		cut("chunks that are cut are cut for the client", "HTTP/1.1", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "4\r\nhalf\r\n"),
		cut("chunks that are malformed are cut for the client", "HTTP/1.1", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nxyz\r\n", "4\r\nhalf\r\n"),
		cut("chunks that are cut are cut for a client of HTTP/1.0", "HTTP/1.0", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "half"),
		{
			name:   "no answer within the route's timeout is 504",
			routes: "[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\ncluster = \"{cluster}\"\ntimeout = \"200ms\"\n",
			play: func(s *stage) {
				client := s.dial()
				began := time.Now()
				client.send(s.get("/"))
				server := s.up.accept(s.T)
				server.head()
				if r := client.reply("GET"); r.StatusCode != 504 {
					s.Errorf("got %d", r.StatusCode)
				}
				wantAtLeast(s.T, began, 200*time.Millisecond)
				server.wantClosed()
			},
		},
		{
			name:   "a response that stands still for stream_idle_timeout is cut",
			routes: "[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\ncluster = \"{cluster}\"\ntimeout = \"100ms\"\nstream_idle_timeout = \"300ms\"\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.get("/"))
				server := s.up.accept(s.T)
				server.head()
				server.send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
				client.head()
				client.wantBytes("half")
				client.wantClosed()
				server.wantClosed()
			},
		},
		{
			name:     "no endpoint that accepts is 503",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{refusing}\"]\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.get("/"))
				if r := client.reply("GET"); r.StatusCode != 503 || r.Close {
					s.Errorf("got %d, the last one: %v", r.StatusCode, r.Close)
				}
			},
		},
		{
			name:     "no endpoint that answers is 504",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{silent}\"]\nconnect_timeout = \"200ms\"\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.get("/"))
				if r := client.reply("GET"); r.StatusCode != 504 {
					s.Errorf("got %d", r.StatusCode)
				}
			},
		},
		{name: "an answer that is no HTTP is 502", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/"))
			server := s.up.accept(s.T)
			server.head()
			server.send("220 mail.test ESMTP\r\n\r\n")
			if r := client.reply("GET"); r.StatusCode != 502 {
				s.Errorf("got %d", r.StatusCode)
			}
			server.wantClosed()
		}},
	}
}

// endpoints are about where requests are sent.
func endpoints() []scene {
	return []scene{
		{
			name:     "endpoints take turns",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{up}\", \"{other}\"]\n",
			play: func(s *stage) {
				client := s.dial()
				servers := make(map[*upstream]*wire)
				for n := range 6 {
					up := []*upstream{s.up, s.other}[n%2]
					client.send(s.get("/"))
					if servers[up] == nil {
						servers[up] = up.accept(s.T)
					}
					servers[up].head()
					servers[up].send(answer(200, "x"))
					client.want(200, "x")
				}
			},
		},
		{name: "the fields of a request arrive, those of one hop do not", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/", "X-Two: a", "X-Two: b", "x-LOWER: c", "X-Empty:", "X-Hop: gone", "Connection: X-Hop, keep-alive", "Keep-Alive: timeout=5",
				"Proxy-Connection: keep-alive", "TE: trailers", "Accept-Encoding: br", "Authorization: Basic eA=="))
			server := s.up.accept(s.T)
			got := server.head()
			got.wantField(s.T, "X-Two", "a", "b")
			got.wantField(s.T, "X-Lower", "c")
			got.wantField(s.T, "Accept-Encoding", "br")
			got.wantField(s.T, "Authorization", "Basic eA==")
			got.wantField(s.T, "Host", s.host)
			for _, name := range []string{"X-Hop", "Connection", "Keep-Alive", "Proxy-Connection", "TE", "Transfer-Encoding", "Content-Length", "User-Agent"} {
				got.wantField(s.T, name)
			}
			server.send("HTTP/1.1 200 Fine\r\nContent-Length: 0\r\nX-Two: a\r\nX-Two: b\r\nX-Hop: gone\r\nConnection: X-Hop\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\n")
			back := client.wantStart("HTTP/1.1 200 Fine")
			back.wantField(s.T, "X-Two", "a", "b")
			back.wantField(s.T, "Set-Cookie", "a", "b")
			for _, name := range []string{"X-Hop", "Connection", "Keep-Alive", "Upgrade"} {
				back.wantField(s.T, name)
			}
		}},
		{
			name:   "a prefix is rewritten for requests too",
			routes: "[[virtual_hosts.routes]]\nmatch = { prefix = \"/api/\" }\nprefix_rewrite = \"/\"\nhost_rewrite = \"app.internal\"\ncluster = \"{cluster}\"\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.get("/api/a?b"))
				server := s.up.accept(s.T)
				got := server.wantStart("GET /a?b HTTP/1.1")
				got.wantField(s.T, "Host", "app.internal")
				got.wantField(s.T, "X-Forwarded-Host", s.host)
			},
		},
		{
			name: "redirects",
			routes: `
[[virtual_hosts.routes]]
match = { path = "/path" }
redirect = { path = "/new?q=1" }
[[virtual_hosts.routes]]
match = { path = "/scheme" }
redirect = { scheme = "https", status = 308 }
[[virtual_hosts.routes]]
match = { prefix = "/host" }
redirect = { host = "www.test:8443", status = 302 }
`,
			play: func(s *stage) {
				client := s.dial()
				for _, r := range []struct {
					target   string
					status   int
					location string
				}{
					{"/path?x=y", 301, "http://" + s.host + "/new?q=1"},
					{"/scheme?x=y", 308, "https://" + s.host + "/scheme?x=y"},
					{"/hosts/a?x=y", 302, "http://www.test:8443/hosts/a?x=y"},
				} {
					client.send(s.get(r.target))
					got := client.reply("GET")
					if got.StatusCode != r.status || got.Header.Get("Location") != r.location || got.Close {
						s.Errorf("%s: got %d to %q; want %d to %q", r.target, got.StatusCode, got.Header.Get("Location"), r.status, r.location)
					}
				}
				s.up.wantNobody(s.T)
			},
		},
		{
			name:   "a request without a route is 404",
			routes: "[[virtual_hosts.routes]]\nmatch = { path = \"/only\" }\ncluster = \"{cluster}\"\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.get("/only/"))
				if r := client.reply("GET"); r.StatusCode != 404 || r.Close {
					s.Errorf("got %d, the last one: %v", r.StatusCode, r.Close)
				}
				s.up.wantNobody(s.T)
			},
		},
	}
}

// TestForwardingFields is about who is believed about the client.
func TestForwardingFields(t *testing.T) {
	t.Parallel()
	// ask sends a request with these fields and returns what arrives.
	ask := func(s *stage, listener string, fields ...string) head {
		s.Helper()
		client := s.dialTo(listener)
		client.send(s.get("/", fields...))
		return s.up.accept(s.T).head()
	}
	claims := []string{
		"X-Forwarded-For: 1.2.3.4", "X-Forwarded-For: 5.6.7.8", "X-Forwarded-Proto: https", "X-Forwarded-Host: shop.test", "X-Request-Id: mine",
		"Forwarded: for=1.2.3.4", "X-Real-IP: 1.2.3.4", "X-Forwarded-Port: 443", "X_Forwarded_For: 1.2.3.4",
	}
	wantOwn := func(s *stage, got head) {
		s.Helper()
		got.wantField(s.T, "X-Forwarded-For", "127.0.0.1")
		got.wantField(s.T, "X-Forwarded-Proto", "http")
		got.wantField(s.T, "X-Forwarded-Host", s.host)
		if id := got.values("X-Request-Id"); len(id) != 1 || len(id[0]) != 36 {
			s.Errorf("X-Request-Id: %q", id)
		}
	}
	play(t, publicListener+`
[[listeners]]
name = "trusting"
address = "127.0.0.1:0"
trusted_proxies = ["10.0.0.0/8", "127.0.0.1"]
[[listeners]]
name = "trusting-others"
address = "127.0.0.1:0"
trusted_proxies = ["10.0.0.0/8"]
`, []scene{
		{name: "they are made", play: func(s *stage) { wantOwn(s, ask(s, "public")) }},
		{name: "they are made by a listener that trusts", play: func(s *stage) { wantOwn(s, ask(s, "trusting")) }},
		{name: "a stranger's are replaced", play: func(s *stage) {
			for _, listener := range []string{"public", "trusting-others"} {
				got := ask(s, listener, claims...)
				wantOwn(s, got)
				got.wantField(s.T, "X-Forwarded-Port", "80")
				for _, name := range []string{"Forwarded", "X-Real-IP", "X_Forwarded_For"} {
					got.wantField(s.T, name)
				}
			}
		}},
		{name: "a trusted proxy's are kept and continued", play: func(s *stage) {
			got := ask(s, "trusting", claims...)
			got.wantField(s.T, "X-Forwarded-For", "1.2.3.4, 5.6.7.8, 127.0.0.1")
			got.wantField(s.T, "X-Forwarded-Proto", "https")
			got.wantField(s.T, "X-Forwarded-Host", "shop.test")
			got.wantField(s.T, "X-Forwarded-Port", "443")
			got.wantField(s.T, "X-Request-Id", "mine")
			got.wantField(s.T, "Forwarded", "for=1.2.3.4")
			got.wantField(s.T, "X_Forwarded_For")
		}},
		{name: "each request has an id of its own", play: func(s *stage) {
			one, two := ask(s, "public"), ask(s, "public")
			if slices.Equal(one.values("X-Request-Id"), two.values("X-Request-Id")) {
				s.Errorf("twice the same: %q", one.values("X-Request-Id"))
			}
		}},
		{
			name:   "a redirect goes back to the scheme that the trusted proxy names",
			routes: "[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\nredirect = { path = \"/new\" }\n",
			play: func(s *stage) {
				for listener, location := range map[string]string{"public": "http://" + s.host + "/new", "trusting": "https://" + s.host + "/new"} {
					client := s.dialTo(listener)
					client.send(s.get("/", "X-Forwarded-Proto: https"))
					if got := client.reply("GET").Header.Get("Location"); got != location {
						s.Errorf("%s: got %q, want %q", listener, got, location)
					}
				}
			},
		},
	})
}

func TestVirtualHosts(t *testing.T) {
	t.Parallel()
	var config strings.Builder
	config.WriteString(publicListener + "[[listeners]]\nname = \"inner\"\naddress = \"127.0.0.1:0\"\n")
	for name, rest := range map[string]string{
		"exact":    `domains = ["a.test", "[::1]"]`,
		"wildcard": `domains = ["*.test"]`,
		"longer":   `domains = ["*.b.test"]`,
		"rest":     "listeners = [\"public\"]\ndomains = [\"*\"]",
		"inner":    "listeners = [\"inner\"]\ndomains = [\"only.inner\"]",
	} {
		fmt.Fprintf(&config, "[[virtual_hosts]]\nname = %q\n%s\n[[virtual_hosts.routes]]\nmatch = { prefix = \"/\" }\nredirect = { path = \"/%s\", status = 302 }\n", name, rest, name)
	}
	addresses := serve(t, config.String()).addresses()
	for _, tt := range []struct{ listener, host, want string }{
		{"public", "a.test", "exact"}, {"public", "A.TEST:8080", "exact"}, {"public", "a.test.", "exact"}, {"public", "[0:0::1]:80", "exact"},
		{"public", "x.test", "wildcard"}, {"public", "x.a.test", "wildcard"}, {"public", "b.test", "wildcard"},
		{"public", "x.b.test", "longer"}, {"public", "y.x.b.test", "longer"},
		{"public", "test", "rest"}, {"public", "only.inner", "rest"}, {"public", "127.0.0.1", "rest"},
		{"inner", "only.inner", "inner"}, {"inner", "a.test", "exact"}, {"inner", "other", ""},
	} {
		client := dialWire(t, "tcp", addresses[tt.listener])
		client.send(request("GET / HTTP/1.1", "Host: "+tt.host))
		r := client.reply("GET")
		_, got, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("Location"), "http://"), "/")
		if got != tt.want || tt.want == "" && r.StatusCode != 404 {
			t.Errorf("%s, %s: got %d to %q; want %q", tt.listener, tt.host, r.StatusCode, got, tt.want)
		}
	}
}

// TestOtherSockets is about unix sockets and IPv6, on both sides.
func TestOtherSockets(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	overUnix := newUpstreamAt(t, "unix", filepath.Join(dir, "up"))
	overIPv6 := newUpstreamAt(t, "tcp", "[::1]:0")
	config := publicListener + `
[[listeners]]
name = "unix"
address = "unix:` + dir + `/http"
mode = "0600"
[[listeners]]
name = "ipv6"
address = "[::1]:0"
[[listeners]]
name = "both"
address = "[::]:0"
`
	for name, up := range map[string]*upstream{"unix": overUnix, "ipv6": overIPv6} {
		address := up.addr
		if name == "unix" {
			address = "unix:" + address
		}
		config += fmt.Sprintf(`
[[virtual_hosts]]
name = %q
domains = ["%s.test"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = %q
[[clusters]]
name = %q
endpoints = [%q]
`, name, name, name, name, address)
	}
	service := serve(t, config)
	addresses := service.addresses()
	if info, err := os.Stat(filepath.Join(dir, "http")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the unix socket: %v, %v", info, err)
	}
	_, bothPort, _ := strings.Cut(addresses["both"], "]:")
	for _, tt := range []struct {
		name, network, address string
		forwarded              []string
	}{
		{"public", "tcp", addresses["public"], []string{"127.0.0.1"}},
		{"a unix socket", "unix", filepath.Join(dir, "http"), nil},
		{"IPv6", "tcp", addresses["ipv6"], []string{"::1"}},
		{"both, by IPv4", "tcp", "127.0.0.1:" + bothPort, []string{"127.0.0.1"}},
		{"both, by IPv6", "tcp", "[::1]:" + bothPort, []string{"::1"}},
	} {
		for host, up := range map[string]*upstream{"unix.test": overUnix, "ipv6.test": overIPv6} {
			t.Run(tt.name+" to "+host, func(t *testing.T) {
				s := &stage{T: t, host: host}
				client := dialWire(t, tt.network, tt.address)
				client.send(s.upgrade("/"))
				server := up.accept(t)
				server.head().wantField(t, "X-Forwarded-For", tt.forwarded...)
				server.send(agreement)
				client.wantStart(agreed)
				wantTunnel(client, server)
				client.sendFIN()
				server.wantEOF()
				server.send("rest")
				server.close()
				client.wantBytes("rest")
				client.wantEOF()
			})
		}
	}
}

// TestLimits has a listener for each limit.
func TestLimits(t *testing.T) {
	t.Parallel()
	var config strings.Builder
	for name, limits := range map[string]string{
		"head-size": `head_size = "1KiB"`, "head-time": `head_timeout = "300ms"`, "body-size": `body_size = "1KiB"`,
		"body-time": `body_timeout = "300ms"`, "idle": `idle_timeout = "300ms"`, "two": `connections = 2`,
	} {
		fmt.Fprintf(&config, "[[listeners]]\nname = %q\naddress = \"127.0.0.1:0\"\nlimits = { %s }\n", name, limits)
	}
	const slowly = 300 * time.Millisecond
	play(t, config.String(), []scene{
		{name: "a head that is too large is 431", play: func(s *stage) {
			client := s.dialTo("head-size")
			client.send(s.get("/", "X-Large: "+strings.Repeat("x", 2000)))
			client.wantRefused(431)
			s.up.wantNobody(s.T)
		}},
		{name: "a head that never ends is 431", play: func(s *stage) {
			client := s.dialTo("head-size")
			client.send("GET / HTTP/1.1\r\nX-Large: " + strings.Repeat("x", 2000))
			client.wantRefused(431)
		}},
		{name: "a head that comes too slowly is 408", play: func(s *stage) {
			client := s.dialTo("head-time")
			began := time.Now()
			client.send("GET / HTTP/1.1\r\nHost: ")
			client.wantRefused(408)
			wantAtLeast(s.T, began, slowly)
			s.up.wantNobody(s.T)
		}},
		{name: "draft-76 keys that do not come are 408", play: func(s *stage) {
			client := s.dialTo("head-time")
			client.send(s.get("/ws", "Upgrade: WebSocket", "Connection: Upgrade", "Sec-WebSocket-Key1: 1 2", "Sec-WebSocket-Key2: 3 4"), "^n:d")
			client.wantRefused(408)
			s.up.wantNobody(s.T)
		}},
		{name: "a length that is too large is 413", play: func(s *stage) {
			client := s.dialTo("body-size")
			client.send(s.request("POST / HTTP/1.1", "Content-Length: 1025"))
			client.wantRefused(413)
			s.up.wantNobody(s.T)
		}},
		{name: "chunks that are too large in sum are 413", play: func(s *stage) {
			client := s.dialTo("body-size")
			client.send(s.request("POST / HTTP/1.1", "Transfer-Encoding: chunked"), chunk(strings.Repeat("x", 1000)), chunk(strings.Repeat("x", 1000)))
			client.wantRefused(413)
			// Where both chunks came at once, the upstream has not even seen the head.
			server := s.up.accept(s.T)
			got, _ := io.ReadAll(server.r)
			if _, body, _ := strings.Cut(string(got), "\r\n\r\n"); strings.Count(body, "x") > 1024 {
				s.Errorf("%d bytes have arrived", len(body))
			}
		}},
		{name: "a body of just that size passes", play: func(s *stage) {
			client := s.dialTo("body-size")
			body := strings.Repeat("x", 1024)
			client.send(s.request("POST / HTTP/1.1", "Transfer-Encoding: chunked"), chunk(body), "0\r\n\r\n")
			server := s.up.accept(s.T)
			server.head()
			got, err := io.ReadAll(httputil.NewChunkedReader(server.r))
			if string(got) != body || err != nil {
				s.Errorf("%d bytes have arrived, %v", len(got), err)
			}
			server.wantBytes("\r\n") // the end of the trailers
			server.send(answer(200, "x"))
			client.want(200, "x")
		}},
		{name: "a body that comes too slowly is 408", play: func(s *stage) {
			client := s.dialTo("body-time")
			client.send(s.request("POST / HTTP/1.1", "Content-Length: 10"), "part")
			server := s.up.accept(s.T)
			server.head()
			server.wantBytes("part")
			client.wantRefused(408)
			server.wantClosed()
		}},
		{name: "an idle connection is closed after idle_timeout", play: func(s *stage) {
			client, mute := s.dialTo("idle"), s.dialTo("idle")
			client.send(s.get("/"))
			server := s.up.accept(s.T)
			server.head()
			server.send(answer(200, "x"))
			client.want(200, "x")
			client.wantEOF()
			mute.wantEOF()
		}},
		{name: "no more connections than allowed are served, the others wait", play: func(s *stage) {
			first, second := s.dialTo("two"), s.dialTo("two")
			first.send(s.get("/1"))
			serverOfFirst := s.up.accept(s.T)
			serverOfFirst.wantStart("GET /1 HTTP/1.1")
			second.send(s.upgrade("/ws/2"))
			server := s.up.accept(s.T)
			server.wantStart("GET /ws/2 HTTP/1.1")
			server.send(agreement)
			second.wantStart(agreed) // a tunnel counts
			third := s.dialTo("two")
			third.send(s.get("/3"))
			third.wantNothing()
			s.up.wantNobody(s.T)
			second.close()
			server.wantEOF()
			server.close()
			s.up.accept(s.T).wantStart("GET /3 HTTP/1.1")
		}},
	})
}

// TestLargeBodies sends more than any buffer holds, both ways, with real clients and
// servers.
func TestLargeBodies(t *testing.T) {
	t.Parallel()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		w.Header().Set("Trailer", "Digest")
		http.NewResponseController(w).EnableFullDuplex()
		io.Copy(w, io.TeeReader(r.Body, h))
		w.Header().Set("Digest", fmt.Sprintf("%x", h.Sum(nil)))
	}))
	t.Cleanup(upstream.Close)
	address := serve(t, simple(upstream.Listener.Addr().String(), "")).address("public")
	client := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	t.Cleanup(client.CloseIdleConnections)
	body := noise(1, 32<<20)
	for name, reader := range map[string]io.Reader{"of known length": bytes.NewReader(body), "in chunks": io.MultiReader(bytes.NewReader(body))} {
		resp, err := client.Post("http://"+address+"/", "application/octet-stream", reader)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		sum := fmt.Sprintf("%x", sha256.Sum256(body))
		if err != nil || !bytes.Equal(got, body) || resp.Trailer.Get("Digest") != sum {
			t.Errorf("%s: %d bytes came back, %v, and the trailers %v", name, len(got), err, resp.Trailer)
		}
	}
}
