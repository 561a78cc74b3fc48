package proxy_test

import (
	"net/netip"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
)

// What is matched is the request as it came, of an upgrade as of any other.
func TestRoutesAskForMoreThanThePath(t *testing.T) {
	t.Parallel()
	only := func(m config.Match) config.Route {
		r := webSocket("/", "web")
		r.Match = m
		r.Match.Prefix = "/"
		return r
	}
	tests := map[string]struct {
		match config.Match
		fits  func(*client)
	}{
		"the method": {config.Match{Methods: []string{"DELETE"}}, func(c *client) { c.request.Method = "DELETE" }},
		"a header": {config.Match{Headers: []config.Condition{{Name: "x-v", Text: "1,2"}}}, func(c *client) {
			c.request.Fields.Add("X-V", "1")
			c.request.Fields.Add("X-v", "2")
		}},
		"a parameter": {config.Match{Query: []config.Condition{{Name: "v", Text: "1"}}}, func(c *client) { c.request.Target = "/?v=1" }},
		"the client":  {config.Match{Sources: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}}, func(c *client) { c.down.Remote = netip.MustParseAddrPort("10.9.0.1:1") }},
	}
	for name, tt := range tests {
		for kind, begin := range map[string]func(*client){
			"ordinary": func(*client) {},
			"upgrade":  func(c *client) { c.request.Upgrade = "websocket" },
		} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				inBubble(t, func(t *testing.T) {
					f := newFarm(t)
					f.routes = []config.Route{only(tt.match)}
					f.behave[first] = func(o *origin) {
						o.reads()
						o.answers(200, exchange.Field{Name: "A", Value: "b"})
						o.ends()
					}
					m := f.manager()
					for fits, want := range map[bool]int{false: 404, true: 200} {
						c := get(t, "a.example", "/")
						begin(c)
						if fits {
							tt.fits(c)
						}
						c.start(m).wait()
						if got := c.answer.Status; got != want {
							t.Errorf("fits: %v: got %d, want %d", fits, got, want)
						}
					}
				})
			})
		}
	}
}
