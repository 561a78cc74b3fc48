package proxy_test

import (
	"strings"
	"testing"

	"holdfast/internal/control"
)

// A tunnel that moves comes to a configuration that may not have its endpoint. What the route
// says there holds, or what it said where the tunnel was opened.
func TestTunnelsThatMoveAndWhoseEndpointIsGone(t *testing.T) {
	t.Parallel()
	gone := func(f string) string { return endpoints.ReplaceAllString(f, `endpoints = ["127.0.0.1:9"]`) }
	routeGone := func(f string) string { return strings.ReplaceAll(f, `prefix = "/socket"`, `prefix = "/elsewhere"`) }
	becomes := func(old, new string) func(string) string {
		return func(f string) string { return gone(strings.ReplaceAll(f, old, new)) }
	}
	for name, tt := range map[string]struct {
		tunnels string
		change  func(file string) string
		closes  bool
	}{
		"it is gone":                        {`on_endpoint_removed = "close"`, gone, true},
		"which is no reason":                {`on_endpoint_removed = "keep"`, gone, false},
		"that it is unhealthy would be one": {`on_endpoint_unhealthy = "close"`, gone, false},
		"it is there":                       {`on_endpoint_removed = "close"`, func(f string) string { return f }, false},
		"so is its route":                   {`on_endpoint_removed = "close"`, func(f string) string { return gone(routeGone(f)) }, true},
		"so is its route, it is no reason":  {`on_endpoint_removed = "keep"`, func(f string) string { return gone(routeGone(f)) }, false},
		"which has come to be a reason":     {`on_endpoint_removed = "keep"`, becomes(`"keep"`, `"close"`), true},
		"which is a reason no more":         {`on_endpoint_removed = "close"`, becomes(`"close"`, `"keep"`), false},
		"its cluster is, of which it says nothing": {`on_endpoint_removed = "close"`, func(f string) string {
			return strings.NewReplacer(`cluster = "web"`, `cluster = "other"`, `name = "web"`, `name = "other"`).Replace(gone(f))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, log, give := logged(t)
			a := command(t, "", log+"[drain]\nclose_spread = \"0s\"\n"+moves+tt.tunnels+"\n")
			give(a)
			a.serve()
			from := a.keep()
			client, server := a.tunnel()
			carries(client, server)
			b := a.another(func(b *commander) { b.file = tt.change(a.file) })
			give(b)
			b.serve()
			to := b.keep()
			a.drain(0)
			a.ask(control.Message{Type: control.TypeMove})
			from.pass(1, to)
			if err := a.wait(); err != nil {
				t.Error(err)
			}
			want := recorded{Reason: "endpoint removed", Generation: 2, Received: 4, Sent: 6}
			if !tt.closes {
				carries(client, server)
				client.Close()
				want = recorded{Reason: "downstream closed", Generation: 2, Received: 8, Sent: 12}
			}
			if got := server.rest(); got != "" {
				t.Errorf("the server got %q", got)
			}
			server.Close()
			client.Close()
			to.has(0)
			wantOneEnd(t, path, want)
			b.wantTunnels(0)
		})
	}
}
