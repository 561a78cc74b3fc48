package proxy_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// relays is a listener that relays connections as they are, to endpoints that the test plays.
type relays struct {
	*site
	tcp   *proxy.TCPServer
	other chan *wire   // at the endpoint of the other cluster
	ended atomic.Int64 // connections that the server does not have any more
}

// relaysOptions are what a test changes before all begins.
type relaysOptions struct {
	listener config.Listener
	clusters []config.Cluster
	network  upstream.Network
}

func newRelays(t *testing.T, change func(*relaysOptions)) *relays {
	t.Helper()
	store := newStore(t)
	s := &site{t: t, loop: streamtest.New(t), conns: make(chan *wire, 16), counted: metrics.NewRegistry()}
	r := &relays{site: s, other: make(chan *wire, 16)}
	o := relaysOptions{
		listener: config.Listener{Name: "public", TCP: &config.TCP{Clusters: to("", "web").Clusters, SNITimeout: bound, Tunnels: config.Tunnels{Buffer: 256 << 10}}},
		clusters: []config.Cluster{
			{Name: "web", ConnectTimeout: bound, Endpoints: []config.Endpoint{{Address: s.listen(func(conn net.Conn) { s.conns <- newWire(t, conn) })}}},
			{Name: "other", ConnectTimeout: bound, Endpoints: []config.Endpoint{{Address: s.listen(func(conn net.Conn) { r.other <- newWire(t, conn) })}}},
		},
	}
	if change != nil {
		change(&o)
	}
	cfg := &config.Config{HTTPListeners: []config.Listener{o.listener}, Clusters: o.clusters}
	loops := []*stream.Loop{s.loop}
	clusters, err := upstream.New(t.Context(), upstream.Options{Config: cfg, Metrics: s.counted, Loops: loops, Network: o.network})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clusters.Close)
	log := slog.New(slog.DiscardHandler)
	var manager *proxy.Manager
	s.Set = s.tunnels(store, tunnel.Options{Log: log, OnEnd: func(r tunnel.Record) { manager.TunnelEnded(&r) }, Metrics: s.counted})
	manager = proxy.NewManager(proxy.ManagerOptions{
		Routes: route.New(cfg, nil), Clusters: clusters, Listeners: cfg.HTTPListeners, Tunnels: s, Log: log, Metrics: s.counted, AccessLog: s.records.open(t, s.counted),
	})
	r.tcp = manager.NewTCPServer("public", loops, func() { r.ended.Add(1) })
	s.address = s.listen(func(conn net.Conn) {
		fd, remote := descriptor(t, conn), addrPort(conn.RemoteAddr())
		s.loop.Post(func() { r.tcp.Serve(s.loop, stream.Passed{FD: fd}, remote) })
	})
	t.Cleanup(func() {
		r.tcp.Close()
		streamtest.Do(s.loop, func() {})
	})
	return r
}

// settled waits until no connection is left that is not a tunnel, and no tunnel, and returns
// what was recorded.
func (r *relays) settled(connections int64) []map[string]any {
	r.t.Helper()
	eventually(r.t, "connections end", func() bool { return r.ended.Load() == connections })
	select {
	case <-r.Set.Empty():
	case <-time.After(bound):
		r.t.Fatal("a tunnel is left")
	}
	if n := r.tcp.Connections(); n != 0 {
		r.t.Errorf("%d connections are left", n)
	}
	streamtest.Do(r.loop, func() {})
	return r.records.read(r.t)
}

// wantRefused connects, and wants to be reset, which may be before that is noticed.
func (r *relays) wantRefused() {
	r.t.Helper()
	conn, err := net.Dial("tcp", r.address)
	if err != nil {
		if !errors.Is(err, syscall.ECONNRESET) {
			r.t.Error(err)
		}
		return
	}
	defer conn.Close()
	newWire(r.t, conn).wantReset()
}

// wantReset reads to the end, which is to be a reset.
func (w *wire) wantReset() {
	w.t.Helper()
	if b, err := io.ReadAll(w.in); len(b) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		w.t.Errorf("got %q and %v, want a reset", b, err)
	}
}

// wantBytes is want for what is no text.
func (w *wire) wantBytes(b []byte) {
	w.t.Helper()
	got := make([]byte, len(b))
	if n, err := io.ReadFull(w.in, got); err != nil || !bytes.Equal(got, b) {
		w.t.Errorf("got %q (%v), want %q", got[:n], err, b)
	}
}

// value is that of a metric with these labels, 0 if there is none.
func (r *relays) value(name string, labels ...string) (n uint64) {
	for _, f := range r.counted.Families() {
		if f.Desc.Name != name {
			continue
		}
		for _, s := range f.Series {
			if strings.Join(s.Labels, ",") == strings.Join(labels, ",") {
				return uint64(s.Value)
			}
		}
	}
	return 0
}

func TestAServerThatSpeaksFirstIsHeard(t *testing.T) {
	t.Parallel()
	r := newRelays(t, nil)
	c := r.client()
	u := r.endpoint()
	u.say("220 ready\n")
	c.want("220 ready\n")
	u.closeWrite() // the client goes on
	c.wantEnd()
	c.say("QUIT\n")
	u.want("QUIT\n")
	c.closeWrite()
	u.wantEnd()
	all := r.settled(1)
	if len(all) != 2 {
		t.Fatalf("%d records", len(all))
	}
	wantRecord(t, all[0], map[string]any{
		"event": "tunnel_open", "protocol": "TCP", "listener": "public", "virtual_host": "", "route": "", "cluster": "web", "status": 0,
		"client": c.LocalAddr(), "client_address": "127.0.0.1", "authority": "", "method": "", "flags": "", "reason": "",
	})
	wantRecord(t, all[1], map[string]any{
		"event": "tunnel_close", "protocol": "TCP", "cluster": "web", "received_bytes": 6, "sent_bytes": 11, "reason": "upstream closed", "request_id": all[0]["request_id"],
		"endpoint": u.LocalAddr(),
	})
	if id, _ := all[0]["request_id"].(string); len(id) != 36 {
		t.Errorf("its id is %q", id)
	}
}

func TestAClientThatEndsItsDirectionGetsTheAnswer(t *testing.T) {
	t.Parallel()
	r := newRelays(t, nil)
	c := r.client()
	c.say("all that there is")
	c.closeWrite() // maybe before an endpoint is connected to
	u := r.endpoint()
	if got := u.rest(); got != "all that there is" {
		t.Errorf("the endpoint got %q", got)
	}
	u.say("and the answer")
	u.Close()
	if got := c.rest(); got != "and the answer" {
		t.Errorf("the client got %q", got)
	}
	wantRecord(t, r.settled(1)[1], map[string]any{"reason": "downstream closed"})
}

func TestLargeAmountsArriveWholeThoughTheirReaderStalls(t *testing.T) {
	t.Parallel()
	r := newRelays(t, nil)
	c := r.client()
	u := r.endpoint()
	data := make([]byte, 12<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	for _, way := range [][2]*wire{{c, u}, {u, c}} {
		sent := make(chan error, 1)
		go func() {
			_, err := way[0].Write(data)
			way[0].closeWrite()
			sent <- err
		}()
		first := make([]byte, 10)
		if _, err := io.ReadFull(way[1].in, first); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-sent:
			t.Errorf("all was taken although nobody reads: %v", err)
		case <-time.After(50 * time.Millisecond): // it is held up; that it is not may be missed, never the other way
		}
		rest := way[1].rest()
		if err := <-sent; err != nil || !bytes.Equal(append(first, rest...), data) {
			t.Errorf("%d bytes have come: %v", len(first)+len(rest), err)
		}
	}
	wantRecord(t, r.settled(1)[1], map[string]any{"received_bytes": float64(len(data)), "sent_bytes": float64(len(data))})
}

func TestAConnectionWithoutAnEndpointIsReset(t *testing.T) {
	t.Parallel()
	refused := config.Endpoint{Address: streamtest.Refusing(t)}
	t.Run("nobody is there", func(t *testing.T) {
		t.Parallel()
		r := newRelays(t, func(o *relaysOptions) { o.clusters[0].Endpoints = []config.Endpoint{refused} })
		r.wantRefused()
		all := r.settled(1)
		wantRecord(t, all[0], map[string]any{"event": "tunnel_close", "flags": "UF", "cluster": "web", "endpoint": refused.Address, "sent_bytes": 0, "received_bytes": 0})
		if len(all) != 1 || r.value("holdfast_tcp_connections_refused_total", "public", "upstream unreachable") != 1 {
			t.Errorf("%v", all)
		}
		if r.value("holdfast_downstream_connections_total", "public") != 1 || r.value("holdfast_downstream_connections_active", "public") != 0 ||
			r.value("holdfast_downstream_connections_closed_total", "public", "holdfast") != 1 {
			t.Error("the connection is not counted")
		}
	})
	t.Run("another one is", func(t *testing.T) {
		t.Parallel()
		r := newRelays(t, func(o *relaysOptions) {
			o.clusters[0].Endpoints = append([]config.Endpoint{refused}, o.clusters[0].Endpoints...)
		})
		c := r.client()
		r.endpoint().say("here")
		c.want("here")
	})
	t.Run("the cluster is not there", func(t *testing.T) {
		t.Parallel()
		r := newRelays(t, func(o *relaysOptions) { o.clusters = o.clusters[1:] })
		r.wantRefused()
		wantRecord(t, r.settled(1)[0], map[string]any{"flags": "NC"})
	})
}

func TestLimitsOfTunnelsHoldForRelayedConnections(t *testing.T) {
	t.Parallel()
	for reason, limit := range map[string]func(*config.Tunnels){
		"idle timeout": func(c *config.Tunnels) { c.IdleTimeout = 30 * time.Millisecond },
		"max age":      func(c *config.Tunnels) { c.MaxAge = 30 * time.Millisecond },
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			r := newRelays(t, func(o *relaysOptions) { limit(&o.listener.TCP.Tunnels) })
			c := r.client()
			u := r.endpoint()
			c.wantEnd()
			u.wantEnd()
			c.Close()
			u.Close()
			wantRecord(t, r.settled(1)[1], map[string]any{"event": "tunnel_close", "reason": reason})
		})
	}
}

func TestAddressesDecideWhoIsRelayed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		filters config.Filters
		passes  bool
	}{
		"denied":      {config.Filters{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, false},
		"not allowed": {config.Filters{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}, false},
		"allowed":     {config.Filters{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRelays(t, func(o *relaysOptions) { o.listener.Filters = &c.filters })
			if c.passes {
				client := r.client()
				r.endpoint().say("here")
				client.want("here")
				return
			}
			r.wantRefused()
			wantRecord(t, r.settled(1)[0], map[string]any{"event": "tunnel_close", "reason": "the client's address is not allowed", "cluster": "", "client_address": "127.0.0.1"})
			if len(r.conns) > 0 || r.value("holdfast_tcp_connections_refused_total", "public", "address denied") != 1 {
				t.Error("somebody has asked the endpoint, or it was not counted")
			}
		})
	}
}

// byServer has connections go by the server that a client asks for.
func byServer(o *relaysOptions) {
	o.listener.TCP.Clusters = nil
	o.listener.TCP.Routes = []config.TCPRoute{
		{Name: "a", ServerNames: []string{"a.example"}, Clusters: to("", "web").Clusters},
		{Name: "b", ServerNames: []string{"*.b.example"}, Clusters: to("", "other").Clusters},
	}
}

// hello is what a TLS client sends first.
func hello(t *testing.T, server string) []byte {
	client, sent := net.Pipe()
	defer client.Close()
	defer sent.Close()
	go tls.Client(client, &tls.Config{ServerName: server, InsecureSkipVerify: true}).Handshake() // ends with its connection
	b := make([]byte, 16<<10)
	sent.SetReadDeadline(time.Now().Add(bound))
	n, err := sent.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	for n < 5+int(b[3])<<8+int(b[4]) {
		more, err := sent.Read(b[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += more
	}
	return b[:n]
}

func TestTheServerThatIsAskedForDecides(t *testing.T) {
	t.Parallel()
	r := newRelays(t, byServer)
	for server, at := range map[string]chan *wire{"A.example": r.conns, "x.y.b.example": r.other} {
		c := r.client()
		begin := hello(t, server)
		c.Write(begin[:1]) // in pieces
		c.Write(begin[1:70])
		c.Write(append(bytes.Clone(begin[70:]), "and what follows"...))
		var u *wire
		select {
		case u = <-at:
		case <-time.After(bound):
			t.Fatalf("%s: nobody connects", server)
		}
		u.wantBytes(append(bytes.Clone(begin), "and what follows"...))
		u.say("from the server")
		c.want("from the server")
		c.Close()
		u.Close()
	}
	seen := map[any]any{}
	for _, record := range r.settled(2) {
		if record["event"] == "tunnel_close" {
			seen[record["authority"]] = record["route"]
		}
	}
	if len(seen) != 2 || seen["a.example"] != "a" || seen["x.y.b.example"] != "b" {
		t.Errorf("recorded: %v", seen)
	}
	if r.value("holdfast_tcp_hellos_total", "public", "name") != 2 || r.value("holdfast_tcp_tunnels_total", "public", "b") != 1 {
		t.Error("it is not counted")
	}
}

func TestWhoAsksForNoServerThatThereIs(t *testing.T) {
	t.Parallel()
	for name, sent := range map[string][]byte{
		"another server": hello(t, "c.example"),
		"no server":      hello(t, ""),
		"no TLS":         []byte("GET / HTTP/1.1\r\n"),
		"a wrong hello":  {22, 3, 1, 0, 4, 1, 0, 0, 0},
	} {
		for _, fallback := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				r := newRelays(t, func(o *relaysOptions) {
					if byServer(o); fallback {
						o.listener.TCP.Clusters = to("", "other").Clusters
					}
				})
				c := r.client()
				c.Write(sent)
				if !fallback {
					c.wantReset()
					wantRecord(t, r.settled(1)[0], map[string]any{"event": "tunnel_close", "flags": "NR", "cluster": ""})
					return
				}
				u := await(t, "the endpoint of the other cluster", r.other)
				u.wantBytes(sent)
				u.Close()
			})
		}
	}
}

func TestAHelloHasATimeAndASize(t *testing.T) {
	t.Parallel()
	begin := hello(t, "a.example")
	for name, c := range map[string]struct {
		sent    []byte
		ends    bool // the client's direction
		advance time.Duration
		flags   string
		reason  string
	}{
		"nothing comes":         {nil, false, 6 * time.Second, "SI", "too slow"},
		"not all of it comes":   {begin[:100], false, 6 * time.Second, "SI", "too slow"},
		"the client has gone":   {nil, true, 0, "DC", "cancelled"},
		"or within it":          {begin[:100], true, 0, "DC", "cancelled"},
		"more than anybody has": {append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x50, 0}, make([]byte, 100)...), false, 0, "DPE", "hello too large"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRelays(t, func(o *relaysOptions) {
				byServer(o)
				o.listener.TCP.SNITimeout = 5 * time.Second
			})
			clock := streamtest.NewClock(r.loop)
			client := r.client()
			client.Write(c.sent)
			if c.ends {
				client.closeWrite()
			}
			eventually(t, "the connection is there", func() bool { return r.tcp.Connections()+int(r.ended.Load()) == 1 })
			if c.advance > 0 {
				clock.Advance(c.advance - 2*time.Second)
				if r.ended.Load() > 0 {
					t.Error("it ended too early")
				}
				clock.Advance(2 * time.Second)
			}
			client.wantReset()
			wantRecord(t, r.settled(1)[0], map[string]any{"event": "tunnel_close", "flags": c.flags})
			if r.value("holdfast_tcp_connections_refused_total", "public", c.reason) != 1 {
				t.Errorf("it is not counted as %q", c.reason)
			}
		})
	}
}

// stuck is what an endpoint is that answers to nothing.
type stuck struct {
	task *task.Task
	err  error
}

func (s *stuck) Interrupt(err error) {
	s.err = err
	s.task.Wake()
}

func TestAConnectionThatWaitsForItsEndpointIsGivenUp(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		why    func(r *relays, client *wire, clock *streamtest.Clock)
		flags  string
		reason string
		by     string
	}{
		"the client resets it": {func(_ *relays, client *wire, _ *streamtest.Clock) {
			client.Conn.(*net.TCPConn).SetLinger(0)
			client.Close()
		}, "DC", "cancelled", "downstream"},
		"its time is over":     {func(_ *relays, _ *wire, clock *streamtest.Clock) { clock.Advance(6 * time.Second) }, "UT", "upstream too slow", "holdfast"},
		"the server is closed": {func(r *relays, _ *wire, _ *streamtest.Clock) { r.tcp.Close() }, "LR", "cut", "holdfast"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tries := make(chan struct{}, 16)
			r := newRelays(t, func(o *relaysOptions) {
				o.listener.TCP.Tunnels.HandshakeTimeout = 5 * time.Second
				o.network.Connect = func(t *task.Task, _ *stream.Loop, _, _ string, _ time.Time, a *upstream.Attempt, _ upstream.Owner) (upstream.Conn, error) {
					s := &stuck{task: t}
					a.Wait(s)
					tries <- struct{}{}
					for s.err == nil {
						t.Wait()
					}
					return nil, s.err
				}
			})
			clock := streamtest.NewClock(r.loop)
			client := r.client()
			client.say("what nobody reads")
			await(t, "an attempt to connect", tries)
			c.why(r, client, clock)
			wantRecord(t, r.settled(1)[0], map[string]any{"event": "tunnel_close", "flags": c.flags, "received_bytes": 0})
			if len(tries) > 0 {
				t.Error("it was tried again")
			}
			if r.value("holdfast_tcp_connections_refused_total", "public", c.reason) != 1 || r.value("holdfast_downstream_connections_closed_total", "public", c.by) != 1 {
				t.Errorf("it is not counted as %q by %s", c.reason, c.by)
			}
		})
	}
}

func TestManyConnectionsAreRelayedSideBySide(t *testing.T) {
	t.Parallel()
	r := newRelays(t, nil)
	const n = 12 // slots of the store are few
	var clients, servers []*wire
	for range n {
		clients = append(clients, r.client())
		servers = append(servers, r.endpoint())
	}
	for i, c := range clients {
		c.say("%03d", i)
	}
	for i, u := range servers {
		u.want([]string{"000", "001", "002", "003", "004", "005", "006", "007", "008", "009", "010", "011"}[i])
		u.Close()
	}
	for _, c := range clients {
		c.wantEnd()
		c.Close()
	}
	r.settled(n)
	if r.value("holdfast_tcp_tunnels_total", "public", "") != n || r.value("holdfast_tcp_tunnels_active", "public", "") != 0 ||
		r.value("holdfast_endpoint_tunnels_active", "web", servers[0].LocalAddr().String()) != 0 ||
		r.value("holdfast_tcp_tunnel_relayed_bytes_total", "public", "", "upstream") != 3*n {
		t.Error("it is not counted")
	}
}
