package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http/httputil"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestDrainByClass reloads once under everything that a generation can hold: each
// kind of connection has a rule of its own. Of two listeners one is gone then.
func TestDrainByClass(t *testing.T) {
	t.Parallel()
	const grace = 3 * time.Second
	up := newUpstream(t)
	config := strings.ReplaceAll(publicListener+`
[reload]
probation = "0s"
[drain]
idle_grace = "3s"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { path = "/own" }
redirect = { path = "/" }
`+defaultRoutes+defaultClusters, "{up}", up.addr)
	config = strings.ReplaceAll(config, "{cluster}", "backend")
	const leaving = "[[listeners]]\nname = \"leaving\"\naddress = \"127.0.0.1:0\"\n"
	i := serve(t, config+leaving)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}

	tunnel, far, _ := s.tunnel("/ws")
	wantTunnel(tunnel, far)

	// Of each kind there are two: one that can go on, and one whose listener goes away.
	var slow, upload [2]*wire
	var inFlight, uploading, idle, late, mute [2]*wire
	for n, listener := range []string{"public", "leaving"} {
		inFlight[n] = s.dialTo(listener)
		inFlight[n].send(s.get("/slow"))
		slow[n] = up.accept(t)
		slow[n].head()

		uploading[n] = s.dialTo(listener)
		uploading[n].send(s.request("POST /upload HTTP/1.1", "Content-Length: 8"), "half")
		upload[n] = up.accept(t)
		upload[n].head()
		upload[n].wantBytes("half")

		idle[n], late[n], mute[n] = s.dialTo(listener), s.dialTo(listener), s.dialTo(listener) // mute has never sent a byte
		for _, client := range []*wire{idle[n], late[n]} {
			client.send(s.get("/own"))
			if r := client.reply("GET"); r.StatusCode != 301 || r.Close {
				t.Fatalf("got %d, the last one: %v", r.StatusCode, r.Close)
			}
		}
	}
	const goes, ends = 0, 1

	events := s.dialTo("leaving")
	events.send(s.get("/events"))
	source := up.accept(t)
	source.head()
	source.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", chunk("data: 1\n\n"))
	events.wantStart("HTTP/1.1 200 OK")
	stream := httputil.NewChunkedReader(events.r)
	wantRead(t, stream, "data: 1\n\n")

	i.wait("all connections", func(st *status) bool {
		return st.Generations[0].Connections == 11 && st.Generations[0].Requests == 5 && st.Generations[0].Tunnels == 1
	})

	began := time.Now()
	i.reload(strings.Replace(config, "redirect = { path = \"/\" }", "redirect = { path = \"/changed\" }", 1))

	t.Run("a request on an idle connection is answered as its last one", func(t *testing.T) {
		late[ends].send(s.get("/late"))
		server := up.accept(t)
		server.wantStart("GET /late HTTP/1.1")
		server.send(answer(200, "late"))
		late[ends].wantLast(200, "late")
	})
	t.Run("a new connection is served by the new generation", func(t *testing.T) {
		client := s.dial()
		client.send(s.get("/new"))
		server := up.accept(t)
		server.head()
		server.send(answer(200, "new"))
		client.want(200, "new")
	})
	t.Run("an idle connection is closed after idle_grace, and not before", func(t *testing.T) {
		for _, client := range []*wire{idle[ends], mute[ends]} {
			client.wantEOF()
			wantAtLeast(t, began, grace)
		}
	})
	wantChanged := func(t *testing.T, client *wire) {
		t.Helper()
		client.send(s.get("/own"))
		if r := client.reply("GET"); r.StatusCode != 301 || r.Close || !strings.HasSuffix(r.Header.Get("Location"), "/changed") {
			t.Errorf("got %d to %q, the last one: %v", r.StatusCode, r.Header.Get("Location"), r.Close)
		}
	}
	t.Run("an idle connection of a listener that stays goes on in the new generation", func(t *testing.T) {
		for _, client := range []*wire{idle[goes], late[goes], mute[goes]} {
			wantChanged(t, client)
		}
	})
	t.Run("a request in flight is answered", func(t *testing.T) {
		for _, server := range slow {
			server.send(answer(200, "slow"))
		}
		inFlight[ends].wantLast(200, "slow")
		inFlight[goes].want(200, "slow")
		wantChanged(t, inFlight[goes])
	})
	t.Run("an upload goes on and is answered", func(t *testing.T) {
		for n, server := range upload {
			uploading[n].send("rest")
			server.wantBytes("rest")
			server.send(answer(200, "uploaded"))
		}
		uploading[ends].wantLast(200, "uploaded")
		uploading[goes].want(200, "uploaded")
		wantChanged(t, uploading[goes])
	})
	t.Run("an event stream runs on", func(t *testing.T) {
		for n := range 3 {
			event := fmt.Sprintf("data: more %d\n\n", n)
			source.send(chunk(event))
			wantRead(t, stream, event)
		}
		source.send("0\r\n\r\n")
		wantRead(t, stream, "")
		events.wantBytes("\r\n") // the end of the trailers
		events.wantEOF()
	})
	t.Run("a tunnel stays for as long as its ends want", func(t *testing.T) {
		st := i.wait("nothing but the tunnel", func(st *status) bool {
			return st.states() == "2 serving, 1 draining" && st.Generations[1].Connections == 0 && st.Generations[1].Requests == 0
		})
		if st.Generations[1].Tunnels != 1 {
			t.Errorf("%d tunnels", st.Generations[1].Tunnels)
		}
		wantTunnel(tunnel, far)
		tunnel.send("last words")
		tunnel.sendFIN()
		far.wantBytes("last words")
		far.wantEOF()
		far.send("and the answer")
		far.close()
		tunnel.wantBytes("and the answer")
		tunnel.wantEOF()
	})
	t.Run("the generation ends when nothing is left", func(t *testing.T) { i.wantStates("2 serving") })
}

// TestStreamTimeout cuts what a relieved generation still answers, and nothing else.
func TestStreamTimeout(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	config := simple(up.addr, "[reload]\nprobation = \"0s\"\n[drain]\nstream_timeout = \"500ms\"\n")
	i := serve(t, config)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	tunnel, far, _ := s.tunnel("/ws")
	begin := func() (client, server *wire, body io.Reader) {
		client = s.dial()
		client.send(s.get("/events"))
		server = up.accept(t)
		server.head()
		server.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk("first"))
		client.wantStart("HTTP/1.1 200 OK")
		body = httputil.NewChunkedReader(client.r)
		wantRead(t, body, "first")
		return client, server, body
	}
	_, oldServer, old := begin()
	began := time.Now()
	i.reload(config + "# changed\n")
	_, server, body := begin() // of the new generation
	if n, err := old.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %d bytes, %v; want a cut", n, err)
	}
	wantAtLeast(t, began, 500*time.Millisecond)
	oldServer.wantClosed()
	server.send(chunk("second"))
	wantRead(t, body, "second")
	wantTunnel(tunnel, far)
	i.wait("the tunnel alone", func(st *status) bool {
		return len(st.Generations) == 2 && st.Generations[1].Connections == 0 && st.Generations[1].Tunnels == 1
	})
}

// TestTunnelsDrainTimeout closes the tunnels of a relieved generation after their
// time, and not all in one moment.
func TestTunnelsDrainTimeout(t *testing.T) {
	t.Parallel()
	const tunnels, timeout, spread = 20, 500 * time.Millisecond, 2 * time.Second
	up := newUpstream(t)
	config := publicListener + strings.ReplaceAll(`
[reload]
probation = "0s"
[drain]
close_spread = "2s"
[tunnels]
drain_timeout = "500ms"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/for-ever" }
websocket = true
cluster = "backend"
tunnels = { drain_timeout = "off" }
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "backend"
[[clusters]]
name = "backend"
endpoints = ["{up}"]
`, "{up}", up.addr)
	i := serve(t, config)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	stays, far, _ := s.tunnel("/for-ever")
	var pairs [][2]*wire
	for range tunnels {
		client, server, _ := s.tunnel("/")
		pairs = append(pairs, [2]*wire{client, server})
	}
	began := time.Now()
	i.reload(config + "# changed\n")
	drained := time.Now() // the drain began somewhere between the two
	young, server, _ := s.tunnel("/")

	ends := make([]time.Time, tunnels)
	var reading sync.WaitGroup
	for n, p := range pairs {
		reading.Go(func() {
			for _, w := range p {
				if rest, err := io.ReadAll(w.r); len(rest) > 0 || err != nil {
					t.Errorf("tunnel %d: got %q, %v; want a proper end", n, rest, err)
				}
			}
			ends[n] = time.Now()
			p[0].close()
			p[1].close()
		})
	}
	reading.Wait()
	first, last := slices.MinFunc(ends, time.Time.Compare), slices.MaxFunc(ends, time.Time.Compare)
	if first.Sub(began) < timeout {
		t.Errorf("the first tunnel ended %v after the reload began, before its drain_timeout", first.Sub(began))
	}
	if apart := last.Sub(first); apart < spread/2 {
		t.Errorf("all tunnels ended within %v, want them spread over about %v", apart, spread)
	}
	if all := last.Sub(drained); all > timeout+spread+5*time.Second {
		t.Errorf("the last tunnel ended %v after the reload", all)
	}
	wantTunnel(stays, far)
	wantTunnel(young, server)
	i.wantSeries(series{"holdfast_tunnels_ended_total{reason=drain limit}": tunnels, "holdfast_tunnels_active": 2})
	i.wait("the tunnel that stays", func(st *status) bool { return len(st.Generations) == 2 && st.Generations[1].Tunnels == 1 })
}

// TestMaxGenerations refuses the reload that would make one too many, and says who
// is in the way.
func TestMaxGenerations(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	config := simple(up.addr, "[reload]\nprobation = \"0s\"\nmax_generations = 2\n")
	i := serve(t, config)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	client, server, _ := s.tunnel("/ws")
	i.reload(config + "# second\n")
	i.write(config + "# third\n")
	code, _, errs := i.holdfast("reload")
	if code != 1 || !containsAll(errs, []string{"max_generations", "generation 1 is draining with 1 tunnels", "generation 2 is serving"}) {
		t.Errorf("exit code %d, want 1 and the holders in:\n%s", code, errs)
	}
	i.wantStates("2 serving, 1 draining")
	wantTunnel(client, server)
	client.close()
	server.wantEOF()
	server.close()
	i.wantStates("2 serving")
	i.reload(config + "# third\n")
	i.wantStates("3 serving")
}
