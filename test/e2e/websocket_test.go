package e2e

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestWebSocketTable goes through every case of a request that has to do with
// upgrades, over raw connections on both sides.
func TestWebSocketTable(t *testing.T) {
	t.Parallel()
	play(t, publicListener, slices.Concat(ordinaryRequests(), refusedUpgrades(), handshakes(), lostHandshakes()))
}

// ordinaryRequests are those that are no WebSocket upgrade, whatever they look like.
func ordinaryRequests() []scene {
	// ordinary sends a request with these fields to a WebSocket route. It must
	// arrive as a request without any of them, and be answered as one.
	ordinary := func(name, start string, last bool, fields ...string) scene {
		return scene{name: name, play: func(s *stage) {
			client := s.dial()
			client.send(s.request(start, fields...))
			server := s.up.accept(s.T)
			got := server.head()
			for _, name := range []string{"Upgrade", "Connection", "HTTP2-Settings"} {
				got.wantField(s.T, name)
			}
			server.send(answer(200, "ordinary"))
			if last {
				client.wantLast(200, "ordinary")
				return
			}
			client.want(200, "ordinary")
			client.send(s.get("/ws/2"))
			server.wantStart("GET /ws/2 HTTP/1.1") // the same connection: it was pooled
			server.send(answer(200, "again"))
			client.want(200, "again")
		}}
	}
	const get = "GET /ws HTTP/1.1"
	return []scene{
		ordinary("an ordinary request on a WebSocket route", get, false),
		ordinary("half an upgrade: Connection does not name it", get, false, "Upgrade: websocket", "Connection: keep-alive"),
		ordinary("half an upgrade: no Connection", get, false, "Upgrade: websocket"),
		ordinary("half an upgrade: no Upgrade", get, false, "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
		ordinary("an upgrade over HTTP/1.0", "GET /ws HTTP/1.0", true, "Upgrade: websocket", "Connection: Upgrade"),
		ordinary("an upgrade with another method than GET", "DELETE /ws HTTP/1.1", false, "Upgrade: websocket", "Connection: Upgrade"),
		ordinary("an upgrade to h2c", get, false, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
		ordinary("an upgrade to TLS", get, false, "Upgrade: TLS/1.0", "Connection: Upgrade"),
		ordinary("an upgrade to one of a list", get, false, "Upgrade: websocket, h2c", "Connection: Upgrade"),
		ordinary("an upgrade with two Upgrade fields", get, false, "Upgrade: websocket", "Upgrade: websocket", "Connection: Upgrade"),
		ordinary("an upgrade to another WebSocket", get, false, "Upgrade: websocket/13", "Connection: Upgrade"),
	}
}

// refusedUpgrades are upgrades that no upstream hears of.
func refusedUpgrades() []scene {
	// refused sends an upgrade together with bytes behind it.
	refused := func(name string, status int, request func(*stage) string) scene {
		return scene{name: name, routes: `
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "{cluster}"
[[virtual_hosts.routes]]
match = { prefix = "/plain" }
cluster = "{cluster}"
[[virtual_hosts.routes]]
match = { path = "/redirect" }
redirect = { path = "/ws" }
`, play: func(s *stage) {
			client := s.dial()
			client.send(request(s), "\x81\x85smuggled")
			client.wantRefused(status)
			s.up.wantNobody(s.T)
		}}
	}
	return []scene{
		refused("an upgrade on a route without websocket is 403", 403, func(s *stage) string { return s.upgrade("/plain") }),
		refused("an upgrade on a redirecting route is 403", 403, func(s *stage) string { return s.upgrade("/redirect") }),
		refused("an upgrade without a route is 404", 404, func(s *stage) string { return s.upgrade("/none") }),
		refused("an upgrade without a virtual host is 404", 404, func(s *stage) string {
			return request("GET /ws HTTP/1.1", "Host: nobody.test", "Upgrade: websocket", "Connection: Upgrade")
		}),
		refused("an upgrade with a length is 400", 400, func(s *stage) string { return s.upgrade("/ws", "Content-Length: 3") + "abc" }),
		refused("an upgrade with chunks is 400", 400, func(s *stage) string {
			return s.upgrade("/ws", "Transfer-Encoding: chunked") + "3\r\nabc\r\n0\r\n\r\n"
		}),
		{
			name:     "an upgrade is 503 when every endpoint refuses the connection",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{refusing}\", \"{refusing-2}\"]\n",
			play: func(s *stage) {
				client := s.dial()
				client.send(s.upgrade("/ws"), "\x81\x85smuggled")
				client.wantRefused(503)
				s.wantLog("request refused", "status=503", "connection refused")
			},
		},
		{
			name:     "an upgrade is 504 when no endpoint answers the connection",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{silent}\"]\nconnect_timeout = \"200ms\"\n",
			play: func(s *stage) {
				client := s.dial()
				began := time.Now()
				client.send(s.upgrade("/ws"), "\x81\x85smuggled")
				client.wantRefused(504)
				wantAtLeast(s.T, began, 200*time.Millisecond)
				s.wantLog("request refused", "status=504")
			},
		},
		{
			name:     "an endpoint that refuses the connection is passed over",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{refusing}\", \"{up}\"]\n",
			play: func(s *stage) {
				for range 4 { // whoever's turn it is
					wantTunnel(firstTwo(s.tunnel("/ws")))
				}
			},
		},
		{
			name:     "an endpoint that does not answer the connection is passed over",
			clusters: "[[clusters]]\nname = \"{cluster}\"\nendpoints = [\"{silent}\", \"{up}\"]\nconnect_timeout = \"200ms\"\n",
			play: func(s *stage) {
				for range 2 {
					wantTunnel(firstTwo(s.tunnel("/ws")))
				}
			},
		},
	}
}

func firstTwo(client, server *wire, _ head) (*wire, *wire) { return client, server }

func wantAtLeast(t *testing.T, began time.Time, d time.Duration) {
	t.Helper()
	if took := time.Since(began); took < d {
		t.Errorf("it took %v, want at least %v", took, d)
	}
}

// handshakes are upgrades that reach the upstream, by what it answers.
func handshakes() []scene {
	// answered lets the upstream answer an upgrade in its own way, which must
	// reach the client, and must be all that either gets.
	answered := func(name, response string, want func(*wire)) scene {
		return scene{name: name, play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"), "\x81\x85early")
			server := s.up.accept(s.T)
			server.head()
			server.send(response)
			want(client)
			server.wantClosed() // and not one byte of what the client sent behind its head

			client = s.dial()
			client.send(s.get("/after"))
			server = s.up.accept(s.T) // a fresh connection: the other was not pooled
			server.wantStart("GET /after HTTP/1.1")
			server.send(answer(200, "after"))
			client.want(200, "after")
		}}
	}
	badSwitch := func(name, response string) scene {
		return answered(name, response, func(client *wire) { client.wantRefused(502) })
	}
	return []scene{
		{name: "a 101 makes a tunnel", play: func(s *stage) {
			client, server, got := s.tunnel("/ws/a?b=c", "Sec-WebSocket-Protocol: chat, superchat", "Sec-WebSocket-Extensions: permessage-deflate", "Origin: http://x.test", "Cookie: a=b")
			if got.start() != "GET /ws/a?b=c HTTP/1.1" {
				s.Errorf("the upstream got %q", got)
			}
			for name, value := range map[string]string{
				"Host": s.host, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
				"Sec-WebSocket-Protocol": "chat, superchat", "Sec-WebSocket-Extensions": "permessage-deflate", "Origin": "http://x.test", "Cookie": "a=b",
			} {
				got.wantField(s.T, name, value)
			}
			wantTunnel(client, server)
		}},
		{name: "the head of a 101 reaches the client", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 101 Why not\r\nupgrade: WebSocket\r\nconnection: keep-alive, UPGRADE\r\nSec-WebSocket-Accept: abc\r\nX-Own: 1\r\nX-Own: 2\r\n\r\nearly")
			got := client.wantStart("HTTP/1.1 101 Why not")
			got.wantField(s.T, "Sec-WebSocket-Accept", "abc")
			got.wantField(s.T, "X-Own", "1", "2")
			got.wantField(s.T, "Connection", "Upgrade")
			got.wantField(s.T, "Upgrade", "websocket")
			client.wantBytes("early")
			wantTunnel(client, server)
		}},
		{name: "tokens compare without case", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/ws", "UPGRADE: WebSocket", "CONNECTION: keep-alive, uPgRaDe"))
			server := s.up.accept(s.T)
			server.head()
			server.send(agreement)
			client.wantStart(agreed)
			wantTunnel(client, server)
		}},
		{name: "interim responses are relayed before the 101", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 100 Continue\r\n\r\n")
			client.wantStart("HTTP/1.1 100 Continue")
			server.send("HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
			client.wantStart("HTTP/1.1 102 Processing")
			client.wantStart("HTTP/1.1 103 Early Hints").wantField(s.T, "Link", "</a>")
			server.send(agreement)
			client.wantStart(agreed)
			wantTunnel(client, server)
		}},
		{name: "bytes before the 101 are held and sent after it", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"), "early ")
			server := s.up.accept(s.T)
			server.head()
			client.send("birds")
			server.wantNothing()
			server.send(agreement)
			client.wantStart(agreed)
			server.wantBytes("early birds")
			wantTunnel(client, server)
		}},
		{name: "more bytes before the 101 than are held arrive in order", play: func(s *stage) {
			data := noise(1, 8<<20)
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			sent := make(chan error, 1)
			go func() {
				_, err := client.conn.Write(data)
				sent <- err
			}()
			server.wantNothing()
			server.send(agreement)
			client.wantStart(agreed)
			wantNoise(server, data)
			if err := <-sent; err != nil {
				s.Fatal(err)
			}
			wantTunnel(client, server)
		}},
		{name: "a draft-76 handshake is awaited with its 8 key bytes", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/ws", "Upgrade: WebSocket", "Connection: Upgrade", "Sec-WebSocket-Key1: 4 @1  46546xW%0l 1 5", "Sec-WebSocket-Key2: 12998 5 Y3 1  .P00", "Origin: http://x.test"))
			client.send("^n:d")
			client.wantNothing()
			s.up.wantNobody(s.T) // half of the keys is no handshake
			client.send("s[4U", "\x00later\xff")
			server := s.up.accept(s.T)
			got := server.head()
			got.wantField(s.T, "Sec-WebSocket-Key1", "4 @1  46546xW%0l 1 5")
			got.wantField(s.T, "Sec-WebSocket-Key2", "12998 5 Y3 1  .P00")
			server.wantBytes("^n:ds[4U")
			server.wantNothing() // what follows is of the tunnel
			server.send("HTTP/1.1 101 WebSocket Protocol Handshake\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\nSec-WebSocket-Origin: http://x.test\r\n\r\n8jKS'y:G*Co,Wxa-")
			client.wantStart("HTTP/1.1 101 WebSocket Protocol Handshake")
			client.wantBytes("8jKS'y:G*Co,Wxa-")
			server.wantBytes("\x00later\xff")
			wantTunnel(client, server)
		}},
		{name: "a tunnel has a connection of its own, even if one lies idle", play: func(s *stage) {
			client := s.dial()
			client.send(s.get("/ws"))
			pooled := s.up.accept(s.T)
			pooled.head()
			pooled.send(answer(200, "x"))
			client.want(200, "x")
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.wantStart("GET /ws HTTP/1.1")
			server.send(agreement)
			client.wantStart(agreed)
			wantTunnel(client, server)
		}},
		{name: "an upgrade that says that it has no body", play: func(s *stage) {
			client, server, _ := s.tunnel("/ws", "Content-Length: 0")
			wantTunnel(client, server)
		}},
		badSwitch("a 101 without Upgrade is 502", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n"),
		badSwitch("a 101 without Connection is 502", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"),
		badSwitch("a bare 101 is 502", "HTTP/1.1 101 Switching Protocols\r\n\r\nbytes of what?"),
		badSwitch("a 101 to something else is 502", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"),
		badSwitch("an answer that is no HTTP is 502", "SSH-2.0-OpenSSH_9.9\r\n\r\n"),
		answered("a 401 is relayed with its body", "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nContent-Length: 4\r\n\r\nnope", func(client *wire) {
			if r := client.wantLast(401, "nope"); r.Header.Get("WWW-Authenticate") != "Basic" {
				client.t.Errorf("got %v", r.Header)
			}
		}),
		answered("a 404 is relayed with its chunks", "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\nTrailer: Digest\r\n\r\n4\r\nnope\r\n0\r\nDigest: 1\r\n\r\n", func(client *wire) {
			if r := client.wantLast(404, "nope"); r.Trailer.Get("Digest") != "1" {
				client.t.Errorf("got the trailers %v", r.Trailer)
			}
		}),
		answered("a 200 is relayed", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", func(client *wire) { client.wantLast(200, "no") }),
		answered("a 204 is relayed", "HTTP/1.1 204 No Content\r\n\r\n", func(client *wire) { client.wantLast(204, "") }),
		answered("a 426 is relayed with what it says about upgrading taken away", "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nContent-Length: 0\r\n\r\n", func(client *wire) {
			r := client.wantLast(426, "")
			if r.Header.Get("Upgrade") != "" || r.Header.Get("Sec-WebSocket-Version") != "13" {
				client.t.Errorf("got %v", r.Header)
			}
		}),
	}
}

// lostHandshakes are those in which somebody is too slow or goes away.
func lostHandshakes() []scene {
	// leaves lets the client end its connection in some way before the 101.
	leaves := func(name string, leave func(*wire)) scene {
		return scene{name: name, play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			leave(client)
			server.wantClosed()
			s.wantLog("the client has gone", "upgrade=websocket")
		}}
	}
	return []scene{
		{
			name: "no answer within handshake_timeout is 504",
			routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
timeout = "1ms"
stream_idle_timeout = "1ms"
tunnels = { handshake_timeout = "300ms" }
`,
			play: func(s *stage) {
				client := s.dial()
				began := time.Now()
				client.send(s.upgrade("/ws"), "early")
				server := s.up.accept(s.T)
				server.head()
				server.send("HTTP/1.1 103 Early Hints\r\n\r\n") // no answer
				client.wantStart("HTTP/1.1 103 Early Hints")
				client.wantRefused(504)
				wantAtLeast(s.T, began, 300*time.Millisecond)
				server.wantClosed()
				s.wantLog("request refused", "status=504", "handshake_timeout")
			},
		},
		{name: "an upstream that closes without an answer is 503", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			server.close()
			client.wantRefused(503)
			s.up.wantNobody(s.T) // not tried again: it may have acted on the request
		}},
		{name: "an upstream that closes within its answer is 502", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: webs")
			server.close()
			client.wantRefused(502)
		}},
		{name: "an upstream that closes within a refusal's body cuts the client", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"))
			server := s.up.accept(s.T)
			server.head()
			server.send("HTTP/1.1 401 Unauthorized\r\nContent-Length: 10\r\n\r\nhalf ")
			server.close()
			client.wantStart("HTTP/1.1 401 Unauthorized")
			client.wantBytes("half ")
			client.wantClosed()
		}},
		leaves("a client closes before the 101", (*wire).close),
		leaves("a client half-closes before the 101", (*wire).sendFIN),
		leaves("a client resets before the 101", (*wire).reset),
		{name: "a client that sends early bytes and closes before the 101", play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade("/ws"), "early")
			server := s.up.accept(s.T)
			server.head()
			client.close()
			server.wantClosed()
			s.wantLog("the client has gone", "upgrade=websocket")
		}},
	}
}

// noise is bytes in which each loss, doubling and swap shows. Frames, text and
// whatever else may be among them.
func noise(seed uint64, n int) []byte {
	data := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	r.Read(data)
	return data
}

func wantNoise(w *wire, want []byte) {
	w.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(w.r, got); err != nil {
		w.t.Fatalf("got %d of %d bytes: %v", n, len(want), err)
	}
	if !bytes.Equal(got, want) {
		w.t.Fatal("the bytes have changed on the way")
	}
}

func TestTunnels(t *testing.T) {
	t.Parallel()
	// ends closes one end of a tunnel in some way.
	ends := func(name, reason string, play func(s *stage, client, server *wire)) scene {
		return scene{name: name, play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			wantTunnel(client, server)
			play(s, client, server)
			s.wantLog("tunnel closed", reason)
		}}
	}
	limited := func(limits string) string {
		return `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
tunnels = ` + limits + "\n"
	}
	play(t, "[log]\nlevel = \"debug\"\n"+publicListener, []scene{ // for lines about the ends of tunnels
		ends("the client's FIN is forwarded, and the server goes on until its own", "downstream closed", func(s *stage, client, server *wire) {
			client.send("last words")
			client.sendFIN()
			server.wantBytes("last words")
			server.wantEOF()
			server.send("and the answer")
			client.wantBytes("and the answer")
			client.wantNothing()
			server.send("and more")
			server.close()
			client.wantBytes("and more")
			client.wantEOF()
		}),
		ends("the server's FIN is forwarded, and the client goes on until its own", "upstream closed", func(s *stage, client, server *wire) {
			server.send("last words")
			server.sendFIN()
			client.wantBytes("last words")
			client.wantEOF()
			client.send("and the answer")
			server.wantBytes("and the answer")
			server.wantNothing()
			client.send("and more")
			client.close()
			server.wantBytes("and more")
			server.wantEOF()
		}),
		ends("the client's reset is forwarded as a reset", "downstream reset", func(_ *stage, client, server *wire) {
			client.reset()
			server.wantReset()
		}),
		ends("the server's reset is forwarded as a reset", "upstream reset", func(_ *stage, client, server *wire) {
			server.reset()
			client.wantReset()
		}),
		ends("a reset after a FIN is forwarded too", "upstream reset", func(_ *stage, client, server *wire) {
			client.sendFIN()
			server.wantEOF()
			server.reset()
			client.wantReset()
		}),
		{name: "any bytes pass, both ways at once", play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			up, down := noise(1, 16<<20), noise(2, 16<<20)
			go client.conn.Write(up)
			go server.conn.Write(down)
			read := make(chan struct{})
			go func() {
				defer close(read)
				got := make([]byte, len(up))
				if n, err := io.ReadFull(server.r, got); err != nil || !bytes.Equal(got, up) {
					s.Errorf("up: %d bytes, %v", n, err)
				}
			}()
			wantNoise(client, down)
			<-read
		}},
		{name: "frames that are against the protocol pass as they are", play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			for _, odd := range []string{
				"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", // all bits reserved, a length beyond all bounds
				"\x81\x05clear", // unmasked from a client
				"\x00draft-76\xff",
				"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
				"HTTP/1.1 200 OK\r\n\r\n",
				"\r\n", "\n", "\x00", "",
			} {
				client.send(odd)
				server.wantBytes(odd)
				server.send(odd)
				client.wantBytes(odd)
			}
		}},
		{name: "a receiver that does not read stops the sender, and gets everything in the end", play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			client.conn.SetWriteDeadline(time.Now().Add(4 * moment))
			const most = 256 << 20
			sent := 0
			for piece := noise(1, 1<<20); ; {
				n, err := client.conn.Write(piece)
				if sent += n; err != nil {
					break
				}
				if sent > most {
					s.Fatalf("%d bytes were taken and nobody has read one", sent)
				}
			}
			client.sendFIN()
			if got, err := io.Copy(io.Discard, server.r); err != nil || int(got) != sent {
				s.Errorf("%d of %d bytes have arrived, %v", got, sent, err)
			}
		}},
		{
			name: "the route's times do not touch a tunnel",
			routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "{cluster}"
timeout = "100ms"
stream_idle_timeout = "150ms"
`,
			play: func(s *stage) {
				client, server, _ := s.tunnel("/ws")
				for range 3 { // requests of the same route, as a clock
					hanging := s.dial()
					hanging.send(s.get("/hanging"))
					s.up.accept(s.T).head()
					if r := hanging.reply("GET"); r.StatusCode != 504 {
						s.Fatalf("got %d", r.StatusCode)
					}
				}
				wantTunnel(client, server)
			},
		},
		{name: "a silent tunnel is closed by idle_timeout", routes: limited(`{ idle_timeout = "300ms" }`), play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			began := time.Now()
			client.wantEOF()
			server.wantEOF()
			wantAtLeast(s.T, began, 250*time.Millisecond)
			client.close()
			server.close()
			s.wantLog("tunnel closed", "idle timeout")
		}},
		{name: "an old tunnel is closed by max_age", routes: limited(`{ max_age = "300ms" }`), play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			wantTunnel(client, server)
			client.wantEOF()
			server.wantEOF()
			client.close()
			server.close()
			s.wantLog("tunnel closed", "max age")
		}},
		{name: "the log says how many bytes went where", play: func(s *stage) {
			client, server, _ := s.tunnel("/ws")
			client.send("four")
			server.wantBytes("four")
			server.send("seventy")
			client.wantBytes("seventy")
			client.close()
			server.wantEOF()
			server.close()
			s.wantLog("tunnel closed", "downstream closed", "cluster="+s.name, "endpoint="+s.up.addr, "received_bytes=4", "sent_bytes=7")
		}},
	})
}

// TestWebSocketRoutes is about what a route may do to an upgrade.
func TestWebSocketRoutes(t *testing.T) {
	t.Parallel()
	with := func(rewrite string) string {
		return `
[[virtual_hosts.routes]]
match = { prefix = "/chat/" }
websocket = true
cluster = "{cluster}"
` + rewrite + "\n"
	}
	// wants opens a tunnel and compares the request line and the host that arrive.
	wants := func(name, routes, start string, host func(*stage) string) scene {
		return scene{name: name, routes: routes, play: func(s *stage) {
			client, server, got := s.tunnel("/chat/a//b/../c?d=%2F")
			if got.start() != start {
				s.Errorf("the upstream got %q, want %q", got.start(), start)
			}
			got.wantField(s.T, "Host", host(s))
			got.wantField(s.T, "X-Forwarded-Host", s.host)
			wantTunnel(client, server)
		}}
	}
	own := func(s *stage) string { return s.host }
	const same = "GET /chat/a/c?d=%2F HTTP/1.1" // normalised
	play(t, publicListener, []scene{
		wants("nothing is rewritten by itself", with(""), same, own),
		wants("a prefix rewrite", with(`prefix_rewrite = "/ws/v2/"`), "GET /ws/v2/a/c?d=%2F HTTP/1.1", own),
		wants("a host rewrite", with(`host_rewrite = "chat.internal:9000"`), same, func(*stage) string { return "chat.internal:9000" }),
		wants("an automatic host rewrite", with(`auto_host_rewrite = true`), same, func(s *stage) string { return s.up.addr }),
		wants("prefix and host together", with("prefix_rewrite = \"/\"\nauto_host_rewrite = true"), "GET /a/c?d=%2F HTTP/1.1", func(s *stage) string { return s.up.addr }),
		{
			name: "weights split new tunnels",
			routes: `
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
weighted_clusters = [{ cluster = "{cluster}-a", weight = 75 }, { cluster = "{cluster}-b", weight = 25 }, { cluster = "{cluster}-off", weight = 0 }]
`,
			clusters: `
[[clusters]]
name = "{cluster}-a"
endpoints = ["{up}"]
[[clusters]]
name = "{cluster}-b"
endpoints = ["{other}"]
[[clusters]]
name = "{cluster}-off"
endpoints = ["{refusing}"]
`,
			play: wantSplit,
		},
		{name: "forwarding fields are made for upgrades too", play: func(s *stage) {
			_, _, got := s.tunnel("/ws", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Request-Id: mine", "Keep-Alive: timeout=5", "X-Other: stays")
			got.wantField(s.T, "X-Forwarded-For", "127.0.0.1")
			got.wantField(s.T, "X-Forwarded-Proto", "http")
			got.wantField(s.T, "X-Forwarded-Host", s.host)
			got.wantField(s.T, "X-Other", "stays")
			got.wantField(s.T, "Keep-Alive")
			if id := got.values("X-Request-Id"); len(id) != 1 || len(id[0]) != 36 {
				s.Errorf("X-Request-Id: %q", id)
			}
		}},
	})
}

// wantSplit opens many tunnels, of which three in four must lead to the first
// upstream. The bounds are six standard deviations wide.
func wantSplit(s *stage) {
	const all, least, most = 200, 113, 187
	first := 0
	for range all {
		client := s.dial()
		client.send(s.upgrade("/ws"))
		var server *wire
		select {
		case conn := <-s.up.arrived:
			server = newWire(s.T, conn)
			first++
		case conn := <-s.other.arrived:
			server = newWire(s.T, conn)
		case <-time.After(patience):
			s.Fatal("no connection has arrived at either upstream")
		}
		server.head()
		server.send(agreement)
		client.wantStart(agreed)
		client.close()
		server.wantEOF()
		server.close()
	}
	if first < least || first > most {
		s.Errorf("%d of %d tunnels lead to the upstream of weight 75 in 100", first, all)
	}
}

// TestNothingIsSmuggledBehindARefusedUpgrade sends a second request right behind an
// upgrade. Whoever takes the upgrade for refused would read it as a request, whoever
// does not as bytes of a tunnel: so nobody may get it.
func TestNothingIsSmuggledBehindARefusedUpgrade(t *testing.T) {
	t.Parallel()
	const routes = `
[[virtual_hosts.routes]]
match = { prefix = "/ws" }
websocket = true
cluster = "{cluster}"
[[virtual_hosts.routes]]
match = { prefix = "/plain" }
cluster = "{cluster}"
`
	// smuggle sends both at once. The upstream answers the upgrade, if it gets it.
	smuggle := func(name, target, response string, status int) scene {
		return scene{name: name, routes: routes, play: func(s *stage) {
			client := s.dial()
			client.send(s.upgrade(target), s.get("/plain/smuggled"))
			if response != "" {
				server := s.up.accept(s.T)
				server.wantStart(fmt.Sprintf("GET %s HTTP/1.1", target))
				server.send(response)
				defer server.wantClosed() // without a byte more
			}
			if r := client.reply("GET"); r.StatusCode != status || !r.Close {
				s.Fatalf("got %d, the last one: %v; want %d and the last one", r.StatusCode, r.Close, status)
			}
			client.conn.Write([]byte(s.get("/plain/late"))) // it may be too late even to send it
			client.wantEOF()
			s.up.wantNobody(s.T)

			fresh := s.dial()
			fresh.send(s.get("/plain/fresh"))
			server := s.up.accept(s.T)
			server.wantStart("GET /plain/fresh HTTP/1.1")
			server.send(answer(200, "fresh"))
			fresh.want(200, "fresh")
		}}
	}
	play(t, publicListener, []scene{
		smuggle("no WebSocket on the route", "/plain", "", 403),
		smuggle("no route", "/none", "", 404),
		smuggle("a 401 of the upstream", "/ws", answer(401, "no"), 401),
		smuggle("a 426 of the upstream", "/ws", answer(426, "no"), 426),
		smuggle("a 200 of the upstream", "/ws", answer(200, "no"), 200),
		smuggle("a 404 of the upstream in chunks", "/ws", "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 404),
		smuggle("a bare 101 of the upstream", "/ws", "HTTP/1.1 101 Switching Protocols\r\n\r\n", 502),
		smuggle("a 101 with an answer behind it", "/ws", "HTTP/1.1 101 Switching Protocols\r\n\r\n"+answer(200, "smuggled"), 502),
		smuggle("an answer with another behind it", "/ws", answer(400, "no")+answer(200, "smuggled"), 400),
	})
}
