package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
)

const clustersFile = `
[admin]
http = "127.0.0.1:0"
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "app"
[[clusters]]
name = "app"
endpoints = ["{app}"]
[[clusters]]
name = "idle"
endpoints = ["127.0.0.1:1"]
`

// shownEndpoint is what /clusters says of an endpoint, as far as it is tested.
type shownEndpoint struct {
	Address     string
	Healthy     bool
	Requests    int64
	Total       uint64 `json:"requests_total"`
	Tunnels     int64
	Elsewhere   int64
	Connects    uint64
	Sum         float64 `json:"connect_sum"`
	Generations []struct {
		Generation        int
		Requests, Tunnels int64
	}
}

type shownClusters struct {
	Generations []int
	Clusters    []struct {
		Name      string
		Endpoints []shownEndpoint
	}
	Warnings []string
}

// app is what is said of the only endpoint of the cluster app.
func (c *shownClusters) app() (e shownEndpoint) {
	for _, one := range c.Clusters {
		if one.Name == "app" && len(one.Endpoints) == 1 {
			e = one.Endpoints[0]
		}
	}
	return e
}

func (s *site) clusters() (shown shownClusters) {
	s.t.Helper()
	if err := json.Unmarshal([]byte(s.run("clusters", "--json")), &shown); err != nil {
		s.t.Fatal(err)
	}
	return shown
}

// wantApp waits until what is said of the endpoint is as described.
func (s *site) wantApp(what string, is func(e shownEndpoint) bool) {
	s.t.Helper()
	var shown shownClusters
	eventually(s.t, func() bool { shown = s.clusters(); return is(shown.app()) }, func() string { return fmt.Sprintf("%s: %+v", what, shown) })
}

// tunnel opens one and keeps it.
func (s *site) tunnel() net.Conn {
	s.t.Helper()
	c := s.dial()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: site\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	answer := make([]byte, len("HTTP/1.1 101"))
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "HTTP/1.1 101" {
		s.t.Fatalf("%q, %v", answer, err)
	}
	return c
}

func TestClustersAreShownAcrossGenerations(t *testing.T) {
	t.Parallel()
	app := named(t, "blue")
	i := newInstance(t, "")
	config := strings.NewReplacer("{app}", app).Replace(clustersFile)
	i.write(config)
	i.start(nil)
	s := &site{i, i.address("public")}
	conn := s.dial()
	s.asks(conn)
	conn.Close()
	first := s.tunnel()
	s.tunnel()
	s.wantApp("with two tunnels", func(e shownEndpoint) bool {
		return e.Address == app && e.Healthy && e.Tunnels == 2 && e.Requests == 0 && e.Total == 3 && e.Connects >= 2 && e.Sum > 0 && e.Elsewhere == 0 && len(e.Generations) == 1
	})

	s.reload(config + "# 2\n")
	s.wantStates("2 serving, 1 draining")
	s.tunnel()
	s.wantApp("with one more after a reload", func(e shownEndpoint) bool {
		return e.Tunnels == 3 && e.Elsewhere == 2 && len(e.Generations) == 2 &&
			e.Generations[0].Generation == 2 && e.Generations[0].Tunnels == 1 && e.Generations[1].Generation == 1 && e.Generations[1].Tunnels == 2
	})
	said := s.run("clusters", "app")
	if !strings.Contains(said, "generation 2: 0 requests, 1 tunnel; generation 1: 0 requests, 2 tunnels") || strings.Contains(said, "idle") {
		t.Errorf("it is shown as\n%s", said)
	}
	first.Close()
	s.wantApp("when one of the old ones is gone", func(e shownEndpoint) bool { return e.Tunnels == 2 && e.Elsewhere == 1 })

	s.crashOf(2)
	left := func(e shownEndpoint) bool { // the old one is reinstated, and a third has resumed a tunnel
		return e.Healthy && e.Tunnels == 2 && e.Elsewhere == 1 && len(e.Generations) == 2 && e.Generations[0].Generation == 1 && e.Generations[1].Generation == 3
	}
	s.wantApp("after the death of what served", left)
	s.upgrade()
	s.wantApp("after an upgrade", left)
	s.wantClustersOverHTTP()

	if code, _, errs := s.holdfast("clusters", "nonsense"); code != 1 || !strings.Contains(errs, `no generation has a cluster "nonsense"`) {
		t.Errorf("exit code %d, %q", code, errs)
	}
}

// crashOf kills a generation.
func (s *site) crashOf(number int) {
	s.t.Helper()
	for _, g := range s.status().Generations {
		if g.Number == number {
			if p, err := os.FindProcess(g.PID); err != nil || p.Kill() != nil {
				s.t.Fatal(err)
			}
		}
	}
}

func (s *site) wantClustersOverHTTP() {
	s.t.Helper()
	answer, err := s.admin("/clusters?cluster=app")
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	var shown shownClusters
	if err := json.NewDecoder(answer.Body).Decode(&shown); err != nil || len(shown.Clusters) != 1 || !slices.Contains(shown.Generations, 1) {
		s.t.Errorf("%+v, %v", shown, err)
	}
}
