package proxy_test

import (
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/tunnel"
)

// chat is a farm with a WebSocket route and others beside it.
func chat(t *testing.T) *farm {
	f := newFarm(t)
	f.routes = []config.Route{
		webSocket("/socket", "web"),
		{Match: config.Match{Prefix: "/moved"}, Redirect: &config.Redirect{Path: "/socket", Status: 308}},
		to("/plain", "web"),
		webSocket("/lost", "nowhere"),
	}
	return f
}

// TestUpgradeTable has each row of the contract for WebSocket routes that this
// package decides, in the order of decision.
func TestUpgradeTable(t *testing.T) {
	t.Parallel()
	informs := func(o *origin) {
		o.reads()
		for _, status := range []int{100, 102, 103} {
			o.answers(status)
		}
		agrees(o)
	}
	improper := func(upgrade string) func(*origin) {
		return func(o *origin) { o.heads <- &exchange.Response{Status: 101, Upgrade: upgrade} }
	}
	lost := fmt.Errorf("%w: %w", exchange.ErrNoAnswer, io.EOF)
	bad := &exchange.StatusError{Status: 502, Text: "bad head"}
	body := func(c *client) { c.request.UpgradeBody, c.request.ContentLength = true, 5 }
	tests := []struct {
		name   string
		target string
		client func(*client)
		farm   func(*farm)
		behave func(*origin)
		status int
		tunnel bool
		asked  int // exchanges that the upstream sees
	}{
		{name: "no route", target: "/none", status: 404},
		{name: "no route comes before a body", target: "/none", client: body, status: 404},
		{name: "not enabled", target: "/plain", status: 403},
		{name: "not enabled comes before a body", target: "/plain", client: body, status: 403},
		{name: "not enabled comes before the cluster", target: "/plain", farm: func(f *farm) { f.connect[first] = refused }, status: 403},
		{name: "a redirect", target: "/moved", status: 403},
		{name: "a body", target: "/socket", client: body, status: 400},
		{name: "a body comes before the cluster", target: "/lost", client: body, status: 400},
		{name: "no cluster", target: "/lost", status: 503},
		{name: "no endpoint", target: "/socket", farm: func(f *farm) { f.cluster["web"] = nil }, status: 503},
		{name: "connecting fails", target: "/socket", farm: func(f *farm) { f.connect[first] = refused }, status: 503},
		{name: "connecting takes too long", target: "/socket", farm: func(f *farm) { f.connect[first] = hangs }, status: 504},
		{name: "interim answers first", target: "/socket", behave: informs, status: 101, tunnel: true, asked: 1},
		{name: "the upstream agrees", target: "/socket", behave: agrees, status: 101, tunnel: true, asked: 1},
		{name: "a 101 without Upgrade", target: "/socket", behave: improper(""), status: 502, asked: 1},
		{name: "a 101 to something else", target: "/socket", behave: improper("h2c"), status: 502, asked: 1},
		{name: "200", target: "/socket", behave: answering(200), status: 200, asked: 1},
		{name: "401", target: "/socket", behave: answering(401), status: 401, asked: 1},
		{name: "426", target: "/socket", behave: answering(426), status: 426, asked: 1},
		{name: "204", target: "/socket", behave: answering(204), status: 204, asked: 1},
		{name: "nonsense", target: "/socket", behave: failing(bad), status: 502, asked: 1},
		{name: "closed without an answer", target: "/socket", behave: failing(lost), status: 503, asked: 1},
		{name: "no answer in time", target: "/socket", behave: silent, status: 504, asked: 1,
			farm: func(f *farm) { f.routes[0].Tunnels.HandshakeTimeout = time.Minute }},
		{name: "interim answers are not enough in time", target: "/socket", status: 504, asked: 1,
			farm:   func(f *farm) { f.routes[0].Tunnels.HandshakeTimeout = time.Minute },
			behave: func(o *origin) { o.answers(102); silent(o) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := chat(t), upgrade(t, "a.example", tt.target)
				f.behave[first] = tt.behave
				if tt.client != nil {
					tt.client(c)
				}
				if tt.farm != nil {
					tt.farm(f)
				}
				c.start(f.manager()).wait()
				c.wantStatus(tt.status)
				if (len(f.tunnels) == 1) != tt.tunnel || (c.switched != nil) != tt.tunnel {
					t.Errorf("tunnels: %+v", f.tunnels)
				}
				if n := len(f.origins()); n != tt.asked {
					t.Fatalf("the upstream has seen %d exchanges, want %d", n, tt.asked)
				}
				if tt.tunnel {
					return
				}
				c.wantEnd(true)
				c.wantClose(true)
				if tt.asked > 0 {
					o := f.origin()
					if sent, _ := io.ReadAll(o.upload); !o.conn.wasClosed() || len(sent) > 0 {
						t.Errorf("the upstream's connection: closed %v, bytes %q", o.conn.wasClosed(), sent)
					}
				}
			})
		})
	}
}

func TestTunnelKnowsWhereItCameFrom(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		f.behave[first] = agrees
		f.trusted = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		f.routes[0].Tunnels = config.Tunnels{IdleTimeout: 1, MaxAge: 2, DrainTimeout: 3, Buffer: 4, HandshakeTimeout: 5,
			KeepAlive: config.KeepAlive{Idle: 6 * time.Second, Interval: 7 * time.Second, Count: 8}}
		c := upgrade(t, "a.example", "/socket")
		c.request.Fields.Add("X-Request-Id", "given")
		c.start(f.manager()).wait()
		if v, _ := c.answer.Fields.Get("Sec-WebSocket-Accept"); v != "x" || c.answer.Upgrade != "websocket" || c.answer.Close {
			t.Errorf("the client got %+v", c.answer)
		}
		got := f.tunnels[0]
		if string(got.DownEarly) != "early from the client" || string(got.UpEarly) != "early from the server" {
			t.Errorf("early bytes: %q, %q", got.DownEarly, got.UpEarly)
		}
		if got.Down != nil || got.Up != nil || got.FDs[0] <= 0 || got.FDs[1] <= 0 || got.FDs[0] == got.FDs[1] || got.Loop != 0 || string(got.Head) != "a head" {
			t.Errorf("it is given %v and %v, the descriptors %v, loop %d, and the head %q", got.Down, got.Up, got.FDs, got.Loop, got.Head)
		}
		if client := netip.MustParseAddrPort("192.0.2.1:4711"); got.ID != "given" || got.Client != client {
			t.Errorf("%q from %v", got.ID, got.Client)
		}
		for n, counters := range map[uint64][]*metrics.Counter{5: got.Origin.UpBytes, 3: got.Origin.DownBytes} {
			for _, c := range counters {
				c.Add(n)
			}
		}
		counted := figures(f.registry)
		maps.DeleteFunc(counted, func(name string, _ int64) bool { return !strings.Contains(name, "relayed") })
		wantFigures(t, counted, `
			route_tunnel_relayed_bytes_total{site,site:prefix=/socket,upstream} 5
			route_tunnel_relayed_bytes_total{site,site:prefix=/socket,downstream} 3
			cluster_tunnel_relayed_bytes_total{web,upstream} 5
			cluster_tunnel_relayed_bytes_total{web,downstream} 3
			endpoint_tunnel_relayed_bytes_total{web,10.0.0.1:80,upstream} 5
			endpoint_tunnel_relayed_bytes_total{web,10.0.0.1:80,downstream} 3
		`)
		origin := *got.Origin
		origin.Owner, origin.UpBytes, origin.DownBytes = nil, nil, nil
		want := tunnel.Origin{
			Listener: "public", VirtualHost: "site", Route: "site:prefix=/socket", Cluster: "web", Endpoint: first,
			EndpointAddr: netip.MustParseAddrPort(first),
			Limits: tunnel.Limits{IdleTimeout: 1, MaxAge: 2, DrainTimeout: 3, Buffer: 4,
				KeepAlive: tunnel.KeepAlive{Idle: 6 * time.Second, Interval: 7 * time.Second, Count: 8}},
		}
		if fmt.Sprintf("%+v", origin) != fmt.Sprintf("%+v", want) {
			t.Errorf("got  %+v\nwant %+v", origin, want)
		}
	})
}

// What is the same for all tunnels of a route, an endpoint and a loop is there once.
func TestTunnelsShareTheirOrigin(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		f.cluster["web"] = []string{first, "10.0.0.2:80"}
		f.behave[first], f.behave["10.0.0.2:80"] = agrees, agrees
		m := f.manager()
		for range 4 {
			upgrade(t, "a.example", "/socket").start(m).wait().wantStatus(101)
		}
		o := func(i int) *tunnel.Origin { return f.tunnels[i].Origin }
		if o(0) != o(2) || o(1) != o(3) || o(0) == o(1) || o(0).Endpoint != first {
			t.Errorf("origins %p, %p, %p, %p", o(0), o(1), o(2), o(3))
		}
	})
}

func TestInterimAnswersReachTheClientBeforeTheTunnel(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		f.behave[first] = func(o *origin) { o.answers(100); o.answers(103); time.Sleep(time.Second); agrees(o) }
		c := upgrade(t, "a.example", "/socket").start(f.manager())
		synctest.Wait()
		if !slices.Equal(c.informed, []int{100, 103}) || c.status() != 0 {
			t.Errorf("so far: %v, %d", c.informed, c.status())
		}
		c.wait().wantStatus(101)
	})
}

func TestRefusalOfTheUpstreamIsRelayedWhole(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		f.behave[first] = func(o *origin) {
			o.answers(401, exchange.Field{Name: "WWW-Authenticate", Value: "Basic"})
			o.writes("who are ")
			time.Sleep(time.Minute)
			o.writes("you?")
			o.ends(exchange.Field{Name: "Sum", Value: "1"})
		}
		c := upgrade(t, "a.example", "/socket").start(f.manager()).wait()
		c.wantStatus(401)
		c.wantBody("who are you?")
		c.wantEnd(true)
		if !c.answer.Fields.Has("WWW-Authenticate") || !c.trailers.Has("Sum") {
			t.Errorf("fields %v, trailers %v", c.answer.Fields, c.trailers)
		}
	})
}

// The answer that refuses an upgrade may be of any length.
func TestRefusalOfTheUpstreamEndsWhenNothingMoves(t *testing.T) {
	t.Parallel()
	for name, deaf := range map[string]bool{"an upstream that sends no more": false, "a client that does not read": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := chat(t), upgrade(t, "a.example", "/socket")
				f.routes[0].StreamIdleTimeout = 7 * time.Second
				f.behave[first] = func(o *origin) {
					time.Sleep(time.Minute) // the handshake has its own limit
					o.answers(401)
					o.writes("who are ")
					<-o.gone
				}
				c.deaf = deaf
				start := time.Now()
				c.start(f.manager())
				select {
				case <-c.served:
				case <-time.After(time.Hour):
					t.Error("it goes on without end")
					c.cancel(errGone)
					c.wait()
				}
				if took := time.Since(start); took != time.Minute+7*time.Second {
					t.Errorf("it took %v", took)
				}
				c.wantStatus(401)
				c.wantEnd(false)
			})
		})
	}
}

func TestUpgradeNeverTakesAKeptConnection(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		m := f.manager()
		get(t, "a.example", "/plain").start(m).wait().wantStatus(200)
		f.behave[first] = agrees
		upgrade(t, "a.example", "/socket").start(m).wait().wantStatus(101)
		if all := f.origins(); all[1].reused || all[0].conn == all[1].conn {
			t.Error("the upgrade went over a kept connection")
		}
	})
}

func TestUpgradeIsNeverSentAgain(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		f.cluster["web"] = []string{first, "10.0.0.2:80"}
		f.behave[first] = failing(fmt.Errorf("%w: %w", exchange.ErrNoAnswer, syscall.ECONNRESET))
		upgrade(t, "a.example", "/socket").start(f.manager()).wait().wantStatus(503)
		f.origin()
	})
}

func TestHandshakeTimeout(t *testing.T) {
	t.Parallel()
	late := func(o *origin) { time.Sleep(10 * time.Hour); agrees(o) }
	tests := []struct {
		name   string
		change func(*config.Route)
		status int
		after  time.Duration
	}{
		{"it is off by zero", func(*config.Route) {}, 101, 10 * time.Hour},
		{"the route's other timeouts do not apply", func(r *config.Route) { r.Timeout, r.StreamIdleTimeout = time.Second, time.Second }, 101, 10 * time.Hour},
		{"it ends the wait", func(r *config.Route) { r.Tunnels.HandshakeTimeout = time.Minute }, 504, time.Minute},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := chat(t)
				f.behave[first] = late
				tt.change(&f.routes[0])
				start := time.Now()
				upgrade(t, "a.example", "/socket").start(f.manager()).wait().wantStatus(tt.status)
				if took := time.Since(start); took != tt.after {
					t.Errorf("it took %v, want %v", took, tt.after)
				}
				time.Sleep(10 * time.Hour) // lets the endpoint come to its end
			})
		})
	}
	t.Run("it includes connecting", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f := chat(t)
			f.connect[first] = hangs
			f.routes[0].Tunnels.HandshakeTimeout = time.Second
			upgrade(t, "a.example", "/socket").start(f.manager()).wait().wantStatus(504)
			f.wantLog("handshake_timeout")
			if figures(f.registry)["downstream_upgrades_total{public,upstream too slow}"] != 1 {
				t.Error("it is not counted as too slow an upstream")
			}
		})
	})
	t.Run("it ends together with the answer", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f := chat(t)
			f.behave[first] = func(o *origin) { o.pause = time.Minute; agrees(o) }
			f.routes[0].Tunnels.HandshakeTimeout = time.Second
			upgrade(t, "a.example", "/socket").start(f.manager()).wait().wantStatus(504)
			if closed := f.origin().conn.wasClosed(); !closed || len(f.tunnels) != 0 {
				t.Errorf("the upstream's connection was closed: %v, tunnels %v", closed, f.tunnels)
			}
		})
	})
	t.Run("it does not reach into the tunnel", func(t *testing.T) {
		t.Parallel()
		inBubble(t, func(t *testing.T) {
			f := chat(t)
			f.behave[first] = agrees
			f.routes[0].Tunnels.HandshakeTimeout = time.Second
			c := upgrade(t, "a.example", "/socket").start(f.manager()).wait()
			time.Sleep(time.Minute)
			if c.aborted || c.stopped || f.origin().closed {
				t.Error("something was closed behind the tunnel's back")
			}
		})
	})
}

func TestClientThatGoesBeforeThe101(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		f.behave[first] = silent
		c := upgrade(t, "a.example", "/socket").start(f.manager())
		synctest.Wait()
		c.cancel(errGone)
		c.wait()
		if o := f.origin(); !o.conn.wasClosed() || len(f.tunnels) != 0 {
			t.Error("the upstream's connection was not closed")
		}
		f.wantLog("level=INFO", "the client has gone", "upgrade=websocket")
	})
}

func TestClientThatGoesWithThe101(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := chat(t), upgrade(t, "a.example", "/socket")
		f.behave[first] = func(o *origin) { c.unreachable = true; agrees(o) }
		c.start(f.manager()).wait()
		if len(f.tunnels) != 0 {
			t.Fatal("a tunnel without a client")
		}
		if !f.origin().switched.closed() {
			t.Error("the upstream's connection was not closed")
		}
		f.wantLog("the client has gone")
	})
}

func TestOrdinaryRequestOnAWebSocketRoute(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := chat(t)
		c := get(t, "a.example", "/socket").start(f.manager()).wait()
		c.wantStatus(200)
		c.wantClose(false)
		if o := f.origin(); o.head.Upgrade != "" || !o.conn.wasKept() {
			t.Errorf("upgrade %q, kept %v", o.head.Upgrade, o.conn.wasKept())
		}
	})
}
