package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
)

const balancingFile = `
[reload]
probation = "1ms"
[tunnels]
on_reload = "move"
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "site"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/least" }
websocket = true
cluster = "least"
[[virtual_hosts.routes]]
match = { prefix = "/sticky" }
cluster = "sticky"
hash_policy = [{ header = "X-User" }]
[[virtual_hosts.routes]]
match = { prefix = "/weighted" }
cluster = "weighted"
[[clusters]]
name = "least"
endpoints = ["{0}", "{1}", "{2}", "{3}"]
load_balancing = "least_connections"
[[clusters]]
name = "weighted"
endpoints = [{ address = "{0}", weight = 3 }, { address = "{1}", metadata = { zone = "b" } }, { address = "{2}", priority = 1 }]
`

// balancing is a client of that.
type balancing struct {
	t      *testing.T
	public string
}

// asks sends a request and returns who has answered it.
func (b *balancing) asks(target, user string) string {
	b.t.Helper()
	c := dial(b.t, b.public)
	defer c.Close()
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: site\r\nX-User: %s\r\n\r\n", target, user)
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != 200 {
		b.t.Fatalf("%d %q %v", answer.StatusCode, body, err)
	}
	return string(body)
}

// opens opens a tunnel, and returns to whom.
func (b *balancing) opens() (c net.Conn, name string) {
	b.t.Helper()
	c = dial(b.t, b.public)
	fmt.Fprint(c, "GET /least HTTP/1.1\r\nHost: site\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	r := bufio.NewReader(c)
	answer, err := http.ReadResponse(r, nil)
	if err != nil || answer.StatusCode != 101 {
		b.t.Fatalf("%+v, %v", answer, err)
	}
	first := make([]byte, 4)
	if _, err := io.ReadFull(r, first); err != nil {
		b.t.Fatal(err)
	}
	return c, string(first)
}

// Endpoints are chosen by their weights, by the tunnels that they have, and by what a client is:
// also after a reload, which brings the tunnels along.
func TestEndpointsAreChosenOverAReload(t *testing.T) {
	t.Parallel()
	names := []string{"up-0", "up-1", "up-2", "up-3"}
	var addresses []string
	file := balancingFile
	for i, name := range names {
		addresses = append(addresses, named(t, name))
		file = strings.ReplaceAll(file, fmt.Sprintf("{%d}", i), addresses[i])
	}
	sticky := func(addresses []string) string {
		return file + "[[clusters]]\nname = \"sticky\"\nload_balancing = \"maglev\"\nendpoints = [\"" + strings.Join(addresses, `", "`) + "\"]\n"
	}
	i := serve(t, sticky(addresses))
	b := &balancing{t, i.address("public")}

	weighted := map[string]int{}
	for range 8 {
		weighted[b.asks("/weighted", "")]++
	}
	if fmt.Sprint(weighted) != "map[up-0:6 up-1:2]" {
		t.Errorf("weights 3 and 1, and one of a later priority: %v", weighted)
	}

	const users = 24
	var homes []string
	for u := range users {
		homes = append(homes, b.asks("/sticky", fmt.Sprint(u)))
	}
	if seen := slices.Compact(slices.Sorted(slices.Values(homes))); len(seen) < 3 {
		t.Errorf("%d clients are at %v", users, seen)
	}

	open := map[string][]net.Conn{}
	for range 5 * len(names) {
		c, name := b.opens()
		open[name] = append(open[name], c)
	}
	for _, name := range names {
		if len(open[name]) != 5 {
			t.Errorf("%s has %d tunnels of %d", name, len(open[name]), 5*len(names))
		}
	}
	for _, c := range open["up-2"] {
		c.Close()
	}
	i.wait("its tunnels to end", func(s *status) bool { return s.serving() != nil && s.serving().Tunnels == 15 })

	slices.Reverse(addresses) // whose order means nothing
	i.reload(sticky(addresses))
	i.wait("the tunnels to come along", func(s *status) bool { return s.states() == "2 serving" && s.serving().Tunnels == 15 })
	for n := range 5 {
		if _, name := b.opens(); name != "up-2" {
			t.Errorf("tunnel %d of those that come back is with %s", n+1, name)
		}
	}
	for u, home := range homes {
		if at := b.asks("/sticky", fmt.Sprint(u)); at != home {
			t.Errorf("client %d was at %s, and is at %s", u, home, at)
		}
	}
}
