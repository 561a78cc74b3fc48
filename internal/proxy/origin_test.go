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
	clusters, err := upstream.New(t.Context(), new(config.Config), nil, r, nil, nil)
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
