package upstream_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// counted builds the only cluster over a registry of its own.
func counted(t *testing.T, n *fakeNetwork, c config.Cluster) ([]*endpoint, *metrics.Registry) {
	t.Helper()
	endpoints, _, r := countedClusters(t, n, c)
	return endpoints, r
}

func countedClusters(t *testing.T, n *fakeNetwork, c config.Cluster) ([]*endpoint, *upstream.Clusters, *metrics.Registry) {
	t.Helper()
	r := metrics.NewRegistry()
	loops := loopsFor(t, 1)
	cs, err := upstream.New(t.Context(), upstream.Options{Config: &config.Config{Clusters: []config.Cluster{c}}, Metrics: r, Loops: loops, Network: n.network()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	return (&world{t, loops, cs}).of(c.Name), cs, r
}

// wantFigures compares every value that is not 0, of histograms the number of values,
// with "name{labels} value" without "holdfast_".
func wantFigures(t *testing.T, r *metrics.Registry, want ...string) {
	t.Helper()
	var got []string
	for _, f := range r.Families() {
		if f.Desc.Name == "holdfast_cluster_endpoints_healthy" {
			continue // it is that of cluster_endpoints where nothing is wrong
		}
		for _, s := range f.Series {
			v := s.Value
			for _, n := range s.Buckets {
				v += int64(n)
			}
			if v != 0 {
				got = append(got, fmt.Sprintf("%s{%s} %d", strings.TrimPrefix(f.Desc.Name, "holdfast_"), strings.Join(s.Labels, ","), v))
			}
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("counted\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestConnectionsAreCountedUntilTheyEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		endpoints, r := counted(t, &fakeNetwork{}, web("10.0.0.1:80"))
		busy, idle := endpoints[0].get(), endpoints[0].get()
		idle.Close()
		total := []string{
			"cluster_endpoints{web} 1",
			"cluster_connections_total{web} 2",
			"cluster_connect_duration_seconds{web} 2",
			"endpoint_connections_total{web,10.0.0.1:80} 2",
		}
		wantFigures(t, r, append([]string{"cluster_connections_active{web} 2", "endpoint_connections_active{web,10.0.0.1:80} 2"}, total...)...)
		time.Sleep(2 * time.Minute) // beyond the idle timeout
		wantFigures(t, r, append([]string{
			"cluster_connections_active{web} 1", "endpoint_connections_active{web,10.0.0.1:80} 1", "cluster_connection_duration_seconds{web} 1",
			"cluster_connections_closed_total{web,holdfast} 1"}, total...)...)
		busy.closeConn()
		wantFigures(t, r, append([]string{"cluster_connection_duration_seconds{web} 2", "cluster_connections_closed_total{web,holdfast} 2"}, total...)...)
	})
}

// However it ends, a connection is counted once: as closed by one of the two, or as a
// tunnel.
func TestConnectionsAreCountedByWhoHasEndedThem(t *testing.T) {
	t.Parallel()
	endpoints, r := counted(t, &fakeNetwork{}, web("10.0.0.1:80"))
	e := endpoints[0]
	busy, kept, tunnel, failed := e.get(), e.get(), e.get(), e.get()
	kept.Close()
	kept.conn.dead.Store(true)
	e.get() // finds it dead
	busy.closeConn()
	streamtest.Do(tunnel.loop, tunnel.conn.owner.Taken)
	e.TunnelOpened(new(upstream.Call))
	streamtest.Do(failed.loop, failed.conn.owner.Taken)
	e.TunnelFailed()
	wantFigures(t, r,
		"cluster_endpoints{web} 1",
		"cluster_connections_total{web} 5",
		"endpoint_connections_total{web,10.0.0.1:80} 5",
		"cluster_connect_duration_seconds{web} 5",
		"cluster_connections_active{web} 1",
		"endpoint_connections_active{web,10.0.0.1:80} 1",
		"cluster_connection_duration_seconds{web} 4",
		"cluster_connections_closed_total{web,upstream} 1",
		"cluster_connections_closed_total{web,holdfast} 2",
		"cluster_tunnels_total{web} 1",
		"cluster_tunnels_active{web} 1",
		"endpoint_tunnels_active{web,10.0.0.1:80} 1",
	)
}

func TestFailuresToConnectAreCounted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := &fakeNetwork{fail: func(p *pending, address string) error {
			if address == "10.0.0.1:80" {
				return errors.New("connection refused")
			}
			return p.never()
		}}
		endpoints, r := counted(t, n, web("10.0.0.1:80", "10.0.0.2:80"))
		for _, e := range endpoints {
			if _, err := e.try((*upstream.Endpoint).Get, 0); err == nil {
				t.Errorf("%s was connected to", e)
			}
		}
		// A client that leaves meanwhile is no failure of the endpoint.
		e, gone := endpoints[1], errors.New("gone")
		l := e.loops[0]
		var a upstream.Attempt
		var err error
		ended := streamtest.Begin(l, func(t *task.Task) { _, err = e.Get(t, l, &a) })
		time.Sleep(time.Second)
		streamtest.Do(l, func() { a.Cancel(gone) })
		if <-ended; err != gone {
			t.Errorf("a client that has gone was served: %v", err)
		}
		wantFigures(t, r,
			"cluster_endpoints{web} 2",
			"cluster_connect_failures_total{web} 2",
			"cluster_connect_timeouts_total{web} 1",
			"endpoint_connect_failures_total{web,10.0.0.1:80} 1",
			"endpoint_connect_failures_total{web,10.0.0.2:80} 1",
		)
	})
}

func TestAllAddressesOfANameAreOneEndpointInFigures(t *testing.T) {
	t.Parallel()
	n := &fakeNetwork{names: map[string][]netip.Addr{"app.internal": {netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("10.0.0.8")}}}
	endpoints, r := counted(t, n, web("app.internal:80"))
	for _, e := range endpoints {
		e.TunnelOpened(new(upstream.Call))
	}
	endpoints[0].Tunnels.Count(-1)
	wantFigures(t, r,
		"cluster_endpoints{web} 2",
		"cluster_tunnels_total{web} 2",
		"cluster_tunnels_active{web} 1",
		"endpoint_tunnels_active{web,app.internal:80} 1",
	)
}

// So a tunnel that outlives its endpoint is counted where it was before.
func TestTheTunnelsOfAFormerEndpointAreCountedByItsName(t *testing.T) {
	t.Parallel()
	endpoints, cs, r := countedClusters(t, &fakeNetwork{}, web("10.0.0.1:80"))
	at, gone := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.9:80")
	same, former := cs.Tunnels("web", "10.0.0.1:80", at), cs.Tunnels("web", "10.0.0.9:80", gone)
	other := cs.Tunnels("chat", "10.0.0.9:80", gone)
	for i, m := range []upstream.TunnelMetrics{endpoints[0].Tunnels, same, former, other} {
		m.Count(1)
		for _, c := range m.ToUpstream {
			c.Add(1 << i)
		}
		for _, c := range m.ToDownstream {
			c.Add(16 << i)
		}
	}
	wantFigures(t, r,
		"cluster_endpoints{web} 1",
		"cluster_tunnels_active{web} 3",
		"cluster_tunnels_active{chat} 1",
		"endpoint_tunnels_active{web,10.0.0.1:80} 2",
		"endpoint_tunnels_active{web,10.0.0.9:80} 1",
		"endpoint_tunnels_active{chat,10.0.0.9:80} 1",
		"cluster_tunnel_relayed_bytes_total{web,upstream} 7",
		"cluster_tunnel_relayed_bytes_total{chat,upstream} 8",
		"cluster_tunnel_relayed_bytes_total{web,downstream} 112",
		"cluster_tunnel_relayed_bytes_total{chat,downstream} 128",
		"endpoint_tunnel_relayed_bytes_total{web,10.0.0.1:80,upstream} 3",
		"endpoint_tunnel_relayed_bytes_total{web,10.0.0.9:80,upstream} 4",
		"endpoint_tunnel_relayed_bytes_total{chat,10.0.0.9:80,upstream} 8",
		"endpoint_tunnel_relayed_bytes_total{web,10.0.0.1:80,downstream} 48",
		"endpoint_tunnel_relayed_bytes_total{web,10.0.0.9:80,downstream} 64",
		"endpoint_tunnel_relayed_bytes_total{chat,10.0.0.9:80,downstream} 128",
	)
}

func TestACallIsCountedByItsOutcome(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		status  int // 0: no answer
		outcome upstream.Outcome
		want    []string
	}{
		"answered":              {200, upstream.Complete, []string{"cluster_responses_total{web,2xx} 1", "cluster_request_duration_seconds{web} 1"}},
		"answered with a fault": {503, upstream.Complete, []string{"cluster_responses_total{web,5xx} 1", "cluster_request_duration_seconds{web} 1", "endpoint_errors_total{web,10.0.0.1:80} 1"}},
		"became a tunnel":       {101, upstream.BecameTunnel, []string{"cluster_responses_total{web,1xx} 1"}},
		"too late":              {0, upstream.TimedOut, []string{"cluster_timeouts_total{web} 1", "endpoint_errors_total{web,10.0.0.1:80} 1"}},
		"reset":                 {0, upstream.Reset, []string{"cluster_resets_total{web} 1", "endpoint_errors_total{web,10.0.0.1:80} 1"}},
		"reset within a fault":  {500, upstream.Reset, []string{"cluster_responses_total{web,5xx} 1", "cluster_resets_total{web} 1", "endpoint_errors_total{web,10.0.0.1:80} 1"}},
		"invalid":               {0, upstream.Invalid, []string{"cluster_protocol_errors_total{web} 1", "endpoint_errors_total{web,10.0.0.1:80} 1"}},
		"cancelled":             {0, upstream.Cancelled, []string{"cluster_cancelled_total{web} 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			endpoints, r := counted(t, &fakeNetwork{}, web("10.0.0.1:80"))
			total := []string{"cluster_endpoints{web} 1", "cluster_requests_total{web} 1", "endpoint_requests_total{web,10.0.0.1:80} 1"}
			var call upstream.Call
			l := streamtest.NewVirtual(t)
			streamtest.Do(l, func() { endpoints[0].Begin(l, new(upstream.Attempt), &call) })
			wantFigures(t, r, append([]string{"cluster_requests_active{web} 1", "endpoint_requests_active{web,10.0.0.1:80} 1"}, total...)...)
			streamtest.Do(l, func() {
				if tt.status != 0 {
					call.Answered(tt.status)
				}
				call.End(tt.outcome)
			})
			wantFigures(t, r, append(tt.want, total...)...)
		})
	}
}

// The connections are real here: what ends them is the codec.
func TestAnEndpointsRealConnectionsAndBytesAreCounted(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	r := metrics.NewRegistry()
	w := realClusters(t, r, nil, web(l.Addr().String()))
	e := w.of("web")[0]
	e.roundTrip(false)
	e.roundTrip(true)
	streamtest.Do(w.loops[0], func() {}) // what a turn counts is known at its end
	total := []string{
		"cluster_endpoints{web} 1",
		"cluster_connections_total{web} 1",
		"cluster_connect_duration_seconds{web} 1",
		"endpoint_connections_total{web," + e.Address + "} 1",
		fmt.Sprint("cluster_received_bytes_total{web} ", 2*len("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")),
		fmt.Sprint("cluster_sent_bytes_total{web} ", 2*len("GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
	}
	wantFigures(t, r, append([]string{"cluster_connections_active{web} 1", "endpoint_connections_active{web," + e.Address + "} 1"}, total...)...)
	w.Close()
	wantFigures(t, r, append([]string{"cluster_connection_duration_seconds{web} 1", "cluster_connections_closed_total{web,holdfast} 1"}, total...)...)
}
