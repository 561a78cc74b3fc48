package proxy_test

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"

	"holdfast/internal/config"
)

// What the endpoint of a cluster with PROXY headers learns of the client, and nobody else's
// connection does.
func TestAConnectionToAnEndpointBeginsWithItsClient(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, trusted, peer, chain, want string
	}{
		{"the peer itself", "", "192.0.2.1:4711", "", "PROXY TCP4 192.0.2.1 10.0.0.80 4711 8080\r\n"},
		{"a peer that is not believed", "", "192.0.2.1:4711", "198.51.100.1", "PROXY TCP4 192.0.2.1 10.0.0.80 4711 8080\r\n"},
		{"a client behind a trusted proxy", "192.0.2.0/24", "192.0.2.1:4711", "198.51.100.1", "PROXY TCP4 198.51.100.1 10.0.0.80 0 8080\r\n"},
		{"a trusted proxy that names nobody", "192.0.2.0/24", "192.0.2.1:4711", "", "PROXY TCP4 192.0.2.1 10.0.0.80 4711 8080\r\n"},
		{"of the other family", "", "[2001:db8::1]:4711", "", "PROXY TCP6 2001:db8::1 ::ffff:10.0.0.80 4711 8080\r\n"},
		{"nobody knows", "", "", "", "PROXY UNKNOWN\r\n"},
	} {
		for _, kind := range []func(*testing.T, string, string) *client{get, upgrade} {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := newFarm(t)
					f.routes = []config.Route{webSocket("/", "web")}
					f.change = func(c *config.Config) {
						for i := range c.Clusters {
							c.Clusters[i].Connecting.ProxyProtocol = 1
						}
					}
					if tt.trusted != "" {
						f.trusted = []netip.Prefix{netip.MustParsePrefix(tt.trusted)}
					}
					c := kind(t, "a.example", "/")
					c.down.Remote = netip.AddrPort{}
					if tt.peer != "" {
						c.down.Remote = netip.MustParseAddrPort(tt.peer)
					}
					if tt.chain != "" {
						c.request.Fields.Add("X-Forwarded-For", tt.chain)
					}
					m := f.manager()
					c.start(m).wait()
					c.wantStatus(200)
					if !slices.Equal(f.headers, []string{tt.want}) {
						t.Errorf("the connections begin with %q, want %q", f.headers, tt.want)
					}
					get(t, "a.example", "/").start(m).wait()
					if len(f.headers) != 2 {
						t.Errorf("%d connections for two clients", len(f.headers))
					}
				})
			})
		}
	}
}

func TestTheMirrorLearnsOfTheClientToo(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := mirrored(t)
		f.change = func(c *config.Config) {
			for i := range c.Clusters {
				c.Clusters[i].Connecting.ProxyProtocol = 1
			}
		}
		get(t, "a.example", "/").start(f.manager()).wait()
		synctest.Wait()
		want := "PROXY TCP4 192.0.2.1 10.0.0.80 4711 8080\r\n"
		if !slices.Equal(f.headers, []string{want, want}) {
			t.Errorf("the connections begin with %q", f.headers)
		}
	})
}

func TestAsManyEndpointsAreTriedAsTheClusterSays(t *testing.T) {
	t.Parallel()
	all := []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80"}
	for _, attempts := range []int{1, 2, 5} {
		inBubble(t, func(t *testing.T) {
			f := newFarm(t)
			f.cluster["web"] = all
			f.connect = map[string]func(context.Context) error{}
			for _, a := range all {
				f.connect[a] = refused
			}
			f.change = func(c *config.Config) { c.Clusters[0].Connecting.Attempts = attempts }
			get(t, "a.example", "/").start(f.manager()).wait().wantStatus(503)
			if !slices.Equal(f.attempts, all[:attempts]) {
				t.Errorf("tried %v", f.attempts)
			}
		})
	}
}
