package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// nameServer answers every question of a type with the same records.
type nameServer struct {
	address string

	mu      sync.Mutex
	records map[uint16][]string
	fails   bool
}

func newNameServer(t *testing.T) *nameServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &nameServer{address: conn.LocalAddr().String(), records: make(map[uint16][]string)}
	started, over := make(chan struct{}), make(chan struct{})
	s := &dns.Server{PacketConn: conn, Handler: n, NotifyStartedFunc: func() { close(started) }}
	go func() { defer close(over); s.ActivateAndServe() }()
	<-started
	t.Cleanup(func() { s.Shutdown(); <-over })
	return n
}

// set has every name of a type have these data, for a second.
func (n *nameServer) set(kind uint16, data ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.records[kind], n.fails = data, false
}

func (n *nameServer) fail() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fails = true
}

func (n *nameServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := new(dns.Msg).SetReply(q)
	if n.fails {
		r.Rcode = dns.RcodeServerFailure
	}
	kind := q.Question[0].Qtype
	for _, data := range n.records[kind] {
		rr, err := dns.NewRR(fmt.Sprintf("%s 1 IN %s %s", q.Question[0].Name, dns.TypeToString[kind], data))
		if err == nil && !n.fails {
			r.Answer = append(r.Answer, rr)
		}
	}
	w.WriteMsg(r)
}

// twins are servers at two addresses with one port, which say who they are and echo in tunnels.
func twins(t *testing.T, addresses ...string) (port string) {
	t.Helper()
	var listeners []net.Listener
	for attempt := 0; len(listeners) < len(addresses) && attempt < 50; attempt++ {
		l, err := net.Listen("tcp", net.JoinHostPort(addresses[len(listeners)], port))
		if err == nil {
			_, port, _ = net.SplitHostPort(l.Addr().String())
			listeners = append(listeners, l)
			continue
		}
		for _, l := range listeners {
			l.Close()
		}
		listeners, port = nil, ""
	}
	for i, l := range listeners {
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Upgrade") == "" {
				io.WriteString(w, addresses[i])
				return
			}
			conn, buffered, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(conn, buffered)
		})}
		s.SetKeepAlivesEnabled(false)
		over := make(chan struct{})
		go func() { defer close(over); s.Serve(l) }()
		t.Cleanup(func() { s.Close(); <-over })
	}
	return port
}

// echoing is a tunnel to one of the twins.
type echoing struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func openEchoing(t *testing.T, address, path string) *echoing {
	t.Helper()
	e := &echoing{t: t, conn: dial(t, address)}
	e.r = bufio.NewReader(e.conn)
	e.conn.SetDeadline(time.Now().Add(2 * patience))
	fmt.Fprintf(e.conn, "GET %s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", path)
	resp, err := http.ReadResponse(e.r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("no tunnel: %v, %v", resp, err)
	}
	return e
}

func (e *echoing) want(text string) {
	e.t.Helper()
	io.WriteString(e.conn, text)
	got := make([]byte, len(text))
	if _, err := io.ReadFull(e.r, got); err != nil || string(got) != text {
		e.t.Errorf("the tunnel gives %q, %v, want %q", got, err, text)
	}
}

// TestClustersFollowDNSAndFiles is about one generation whose clusters change under it.
func TestClustersFollowDNSAndFiles(t *testing.T) {
	t.Parallel()
	const one, two = "127.0.0.11", "127.0.0.12"
	port := twins(t, one, two)
	names := newNameServer(t)
	names.set(dns.TypeA, one)
	names.set(dns.TypeSRV, "0 1 "+port+" host.test.")
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	listed := filepath.Join(dir, "listed.json")
	list := func(text string) {
		t.Helper()
		if err := os.WriteFile(listed+"~", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(listed+"~", listed); err != nil {
			t.Fatal(err)
		}
	}
	list(`{"endpoints": ["` + one + ":" + port + `"]}`)
	config := publicListener + "[[virtual_hosts]]\nname = \"all\"\ndomains = [\"*\"]\n"
	clusters := []string{"strict", "service", "logical", "listed", "cold"}
	for _, name := range clusters {
		config += fmt.Sprintf("  [[virtual_hosts.routes]]\n  match = { prefix = \"/%s\" }\n  cluster = %q\n  websocket = true\n", name, name)
	}
	how := fmt.Sprintf("dns = { resolvers = [%q], min_ttl = \"1s\", local_addresses = true }\n", names.address)
	for name, keys := range map[string]string{
		"strict":  "discovery = \"strict_dns\"\nendpoints = [\"web.test:" + port + "\"]\n" + how,
		"service": "discovery = \"strict_dns\"\nendpoints = [{ srv = \"_web._tcp.test\" }]\n" + how,
		"logical": "discovery = \"logical_dns\"\nendpoints = [\"web.test:" + port + "\"]\n" + how,
		"listed":  fmt.Sprintf("discovery = \"file\"\nendpoints_file = %q\n", listed),
		"cold":    fmt.Sprintf("discovery = \"strict_dns\"\nendpoints = [\"web.test:80\"]\ndns = { resolvers = [%q] }\nwarming_timeout = \"50ms\"\n", silent.LocalAddr()),
	} {
		config += fmt.Sprintf("[[clusters]]\nname = %q\n%s", name, keys)
	}
	i := serve(t, config)
	wantLog(t, i, "clusters are not warm in time", "clusters=1", "cold (its endpoints)")
	address := i.address("public")
	client := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer client.CloseIdleConnections()
	get := func(path string) string {
		resp, err := client.Get("http://" + address + path)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 {
			return fmt.Sprint(resp.StatusCode)
		}
		return string(body)
	}
	want := func(path, answer string) {
		t.Helper()
		if got := get(path); got != answer {
			t.Errorf("%s is answered with %s, want %s", path, got, answer)
		}
	}
	await := func(path, answer string) {
		t.Helper()
		eventually(t, func() bool { return get(path) == answer }, func() string { return path + " is answered with " + get(path) + ", not " + answer })
	}
	want("/cold", "503")
	var tunnels []*echoing
	for _, name := range clusters[:4] {
		want("/"+name, one)
		tunnels = append(tunnels, openEchoing(t, address, "/"+name))
	}

	names.set(dns.TypeA, two)
	list(`{"endpoints": ["` + two + ":" + port + `"]}`)
	for n, name := range clusters[:4] {
		await("/"+name, two)
		tunnels[n].want("still there, " + name)
	}
	names.fail()
	if err := os.Remove(listed); err != nil {
		t.Fatal(err)
	}
	_, before, _ := i.holdfast("metrics")
	wantLog(t, i, "a name of a cluster cannot be resolved", "cluster=strict")
	wantLog(t, i, "is of no use", "cluster=listed")
	for n, name := range clusters[:4] {
		want("/"+name, two)
		tunnels[n].want("still there")
		tunnels[n].conn.Close()
	}
	if s := i.status(); s.states() != "1 serving" {
		t.Errorf("the generations are %s, want the first one alone", s.states())
	}
	for _, figure := range []string{
		`holdfast_clusters_warming 1`,
		`holdfast_cluster_membership_changes_total{cluster="strict"} 2`,
		`holdfast_cluster_membership_changes_total{cluster="logical"} 1`,
		`holdfast_cluster_membership_changes_total{cluster="listed"} 2`,
		`holdfast_endpoint_tunnels_active{cluster="listed",endpoint="` + listed + `"} 1`,
		`holdfast_endpoint_tunnels_active{cluster="service",endpoint="_web._tcp.test"} 1`,
		`holdfast_endpoint_tunnels_active{cluster="logical",endpoint="web.test:` + port + `"} 1`,
	} {
		if !strings.Contains(before, figure+"\n") {
			t.Errorf("the metrics lack %s", figure)
		}
	}
	if strings.Contains(before, "host.test") || strings.Contains(before, two) {
		t.Error("the metrics have something of an answer")
	}
}
