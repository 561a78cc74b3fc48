package proxy

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// empty returns a manager without a route, and what it counts in.
func empty(t *testing.T) (*Manager, *metrics.Registry) {
	t.Helper()
	r := metrics.NewRegistry()
	clusters, err := upstream.New(t.Context(), upstream.Options{Config: new(config.Config), Metrics: r})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clusters.Close)
	return NewManager(ManagerOptions{Routes: route.New(new(config.Config), nil), Clusters: clusters, Log: slog.New(slog.DiscardHandler), Metrics: r}), r
}

// Whoever makes up names, tunnel after tunnel, gets his tunnels, but not the memory that
// figures are in.
func TestNamesOfOtherConfigurationsAreCountedUpToABound(t *testing.T) {
	t.Parallel()
	m, r := empty(t)
	for i := range 3 * mostAdoptions {
		p := whole()
		p.route, p.limits.MaxAge = fmt.Sprint("route ", i), time.Duration(i)
		a := m.adopt(p)
		if a.origin.Route != p.route || a.origin.Limits != p.limits || !a.closes {
			t.Fatalf("tunnel %d is %+v", i, a)
		}
		m.TunnelArrived(a.origin)
	}
	most := 0
	for _, f := range r.Families() {
		most = max(most, len(f.Series))
	}
	if most != 2*mostAdoptions { // of the bytes relayed, in two directions
		t.Errorf("a metric has %d series", most)
	}
	p := whole()
	p.route, p.limits.MaxAge = "route 7", 7
	if first := m.adopt(p); m.adopt(p) != first {
		t.Error("the tunnels of one provenance have several origins")
	}
}

// Also where nobody was there to be told that it has ended.
func TestWhereATunnelWasBeforeIsForgottenWhenItIsGone(t *testing.T) {
	t.Parallel()
	m, _ := empty(t)
	g := &generation{log: slog.New(slog.DiscardHandler), manager: m, elsewhere: new(listener)}
	g.vault = newVault(g, 0)
	p := whole()
	record := func(n uint64) tunnel.Record {
		return tunnel.Record{Origin: newOrigin(&p, routeTunnels{}, upstream.TunnelMetrics{}), Number: n}
	}
	for n := range uint64(3) {
		g.vault.origin(n, control.VaultTunnel{Generation: 1, Number: n + 1})
	}
	g.onTunnelEnd(record(0))
	g.onTunnelMoved(record(1))
	if len(g.vault.from) != 1 || g.vault.fromOf(2).Number != 3 {
		t.Errorf("it knows of %v", g.vault.from)
	}
}

// A listener that relays connections is to its tunnels what a route is to others.
func TestRelayedTunnelsGoByTheListenerThatIsHere(t *testing.T) {
	t.Parallel()
	shares := []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}}
	cfg := &config.Config{
		HTTPListeners: []config.Listener{
			{Name: "all", TCP: &config.TCP{Clusters: shares, Tunnels: config.Tunnels{MaxAge: time.Hour, MoveOnReload: true}}},
			{Name: "named", TCP: &config.TCP{
				Routes:  []config.TCPRoute{{Name: "a", ServerNames: []string{"a.example"}, Clusters: shares}},
				Tunnels: config.Tunnels{MaxAge: 2 * time.Hour, MoveOnReload: true, CloseOnRouteRemoved: true},
			}},
			{Name: "requests"},
		},
		Clusters: []config.Cluster{{Name: "web"}},
	}
	r := metrics.NewRegistry()
	clusters, err := upstream.New(t.Context(), upstream.Options{Config: cfg, Metrics: r})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clusters.Close)
	m := NewManager(ManagerOptions{Routes: route.New(cfg, nil), Clusters: clusters, Listeners: cfg.HTTPListeners, Log: slog.New(slog.DiscardHandler), Metrics: r})
	for name, tt := range map[string]struct {
		listener, route, cluster string
		closeRemoved             bool // as it was
		age                      time.Duration
		closes                   bool
	}{
		"its listener is here":          {"all", "", "web", true, time.Hour, false},
		"its cluster is not":            {"all", "", "gone", true, time.Minute, false}, // the listener says keep
		"its route is here":             {"named", "a", "web", false, 2 * time.Hour, false},
		"its route is not, and closes":  {"named", "", "web", true, time.Minute, true},
		"nor its cluster, which closes": {"named", "a", "gone", false, time.Minute, true},
		"its route is not, and keeps":   {"named", "b", "web", false, time.Minute, false},
		"it takes requests now":         {"requests", "", "web", true, time.Minute, true},
		"its listener is gone":          {"gone", "", "web", true, time.Minute, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := provenance{listener: tt.listener, route: tt.route, cluster: tt.cluster, endpoint: "10.0.0.1:80", limits: tunnel.Limits{MaxAge: time.Minute}, closeRemoved: tt.closeRemoved}
			a := m.adopt(p)
			if a.origin.Limits.MaxAge != tt.age || a.closes != tt.closes || a.origin.Listener != tt.listener || a.origin.Route != tt.route {
				t.Errorf("closes %t, origin %+v", a.closes, a.origin)
			}
			m.TunnelArrived(a.origin)
			if n, value := seriesOf(r, "holdfast_tcp_tunnels_active", tt.listener, tt.route); n == 0 || value < 1 {
				t.Errorf("it is not counted: %d of %d", value, n)
			}
			if _, value := seriesOf(r, "holdfast_route_tunnels_active", "", tt.route); value > 0 {
				t.Error("it is counted as of a virtual host")
			}
		})
	}
}
