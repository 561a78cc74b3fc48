package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// namedServer is a server that says its name: in answers, and first thing in tunnels, in which it
// sends back what it gets. It fails requests for what is below "/" and its name.
type namedServer struct {
	name string
	addr string

	mu   sync.Mutex
	came []time.Time // requests, without those of tunnels
}

func newNamedServer(t *testing.T, name string) *namedServer {
	n := &namedServer{name: name}
	s := httptest.NewServer(n)
	t.Cleanup(s.Close)
	n.addr = s.Listener.Addr().String()
	return n
}

func (n *namedServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != "" {
		conn, rest, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, agreement+n.name)
		io.Copy(conn, rest)
		return
	}
	n.mu.Lock()
	n.came = append(n.came, time.Now())
	n.mu.Unlock()
	if strings.HasPrefix(r.URL.Path, "/"+n.name) {
		w.WriteHeader(500)
	}
	io.WriteString(w, n.name)
}

// since returns when requests have come since then.
func (n *namedServer) since(at time.Time) (came []time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := slices.IndexFunc(n.came, func(t time.Time) bool { return t.After(at) })
	if i < 0 {
		return nil
	}
	return slices.Clone(n.came[i:])
}

// askNamed makes a request and returns who has answered it.
func askNamed(t *testing.T, url string) (name string, status int) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body), resp.StatusCode
}

// openTo opens tunnels until there is one to each of the servers.
func openTo(t *testing.T, address, path string, names ...string) map[string]*wire {
	t.Helper()
	all := make(map[string]*wire)
	for range 20 * len(names) {
		if len(all) == len(names) {
			return all
		}
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		w := newWire(t, conn)
		w.send("GET " + path + " HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		w.wantStart(agreed)
		name := make([]byte, len(names[0]))
		if _, err := io.ReadFull(w.r, name); err != nil {
			t.Fatal(err)
		}
		if all[string(name)] != nil {
			w.close()
			continue
		}
		all[string(name)] = w
	}
	t.Fatalf("there are tunnels to %v", all)
	return nil
}

func wantEcho(t *testing.T, w *wire) {
	t.Helper()
	w.send("still here")
	w.wantBytes("still here")
}

// One instance shows what becomes of an endpoint that fails, of one that is removed, and of
// the tunnels of both.
func TestAnEndpointThatFailsOrIsRemoved(t *testing.T) {
	t.Parallel()
	bad, good := newNamedServer(t, "evil"), newNamedServer(t, "good")
	const base = 3 * time.Second
	config := func(endpoints ...string) string {
		return fmt.Sprintf(`
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[drain]
close_spread = "0s"
[tunnels]
on_reload = "move"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/close" }
websocket = true
cluster = "web"
tunnels = { on_endpoint_unhealthy = "close", on_endpoint_removed = "close" }
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "web"
[[clusters]]
name = "web"
endpoints = ["%s"]
outlier_detection = { consecutive_5xx = 3, base_ejection_time = %q, max_ejection_percent = 50, runtime_key = "eject" }
%s`, strings.Join(endpoints, `", "`), base, noProbation)
	}
	i := serve(t, config(bad.addr, good.addr))
	url := "http://" + i.address("public")
	closes := openTo(t, i.address("public"), "/close", "evil", "good")
	keeps := openTo(t, i.address("public"), "/keep", "evil", "good")

	// Nobody has to force it: then it is only said.
	if code, _, errs := i.holdfast("runtime", "set", "eject", "0"); code != 0 {
		t.Fatal(errs)
	}
	fail := func(times int) (last time.Time) {
		t.Helper()
		for n := 0; n < times; {
			last = time.Now()
			if _, status := askNamed(t, url+"/evil"); status == 500 {
				n++
			}
		}
		return last
	}
	fail(3)
	wantLog(t, i, "an endpoint is an outlier, but is not ejected", bad.addr)
	if code, _, errs := i.holdfast("runtime", "reset", "eject"); code != 0 {
		t.Fatal(errs)
	}

	earliest := fail(3)
	wantLog(t, i, "an endpoint is ejected", bad.addr)
	ejected := time.Now()
	i.wantSeries(series{"holdfast_cluster_outlier_ejections_active{cluster=web}": 1})
	closes["evil"].wantEOF()
	closes["evil"].close()
	wantEcho(t, closes["good"])
	wantEcho(t, keeps["evil"])
	wantEcho(t, keeps["good"])
	for time.Since(earliest) < base/2 {
		if name, _ := askNamed(t, url); name != "good" && time.Since(earliest) < base {
			t.Fatalf("while it is ejected, %q has answered", name)
		}
	}
	eventually(t, func() bool { askNamed(t, url); return len(bad.since(ejected)) > 0 }, func() string { return "it gets requests again" })
	if again := bad.since(ejected)[0].Sub(earliest); again < base {
		t.Errorf("it got a request %v after it had failed, want %v at least", again, base)
	}
	wantLog(t, i, "an endpoint is no longer ejected", bad.addr)
	i.wantSeries(series{
		"holdfast_cluster_outlier_ejections_active{cluster=web}":                            0,
		"holdfast_cluster_outlier_ejections_enforced_total{by=consecutive_5xx,cluster=web}": 1,
		"holdfast_cluster_outlier_ejections_detected_total{by=consecutive_5xx,cluster=web}": 2,
		"holdfast_tunnels_ended_total{reason=endpoint unhealthy}":                           1,
		"holdfast_cluster_tunnels_active{cluster=web}":                                      3,
	})

	// A reload takes the other endpoint away: its tunnels come to a generation that does not have it.
	again := openTo(t, i.address("public"), "/close", "evil", "good")
	i.reload(config(bad.addr))
	i.wait("one generation", func(s *status) bool { return s.states() == "2 serving" })
	for _, w := range []*wire{closes["good"], again["good"]} {
		w.wantEOF()
		w.close()
	}
	wantEcho(t, keeps["good"])
	wantEcho(t, keeps["evil"])
	wantEcho(t, again["evil"])
	i.wantSeries(series{"holdfast_tunnels_ended_total{reason=endpoint removed}": 2})
}
