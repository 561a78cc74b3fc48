package proxy

import (
	"testing"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
)

func TestWhatAGenerationHoldsIsShownAsItLastWas(t *testing.T) {
	t.Parallel()
	registry := metrics.NewRegistry()
	p := newProcess(registry)
	oldest := time.Unix(1700000000, 5)
	for _, st := range []control.Status{
		{Connections: 3, Requests: 2, Tunnels: 4, OldestTunnel: oldest, RSS: 9 << 20, Draining: true, LogsDropped: 7},
		{Connections: 1, RSS: 8 << 20, LogsDropped: 9},
	} {
		p.sample(&st)
		draining, started := int64(0), int64(0)
		if st.Draining {
			draining, started = 1, oldest.UnixNano()
		}
		for d, want := range map[*metrics.Desc]int64{
			generationDraining: draining, generationConnections: int64(st.Connections), generationRequests: int64(st.Requests),
			generationTunnels: int64(st.Tunnels), generationOldestTunnel: started, generationMemory: st.RSS, processMemory: st.RSS,
		} {
			if got := registry.Gauge(d).Value(); got != want {
				t.Errorf("%s is %d, want %d", d.Name, got, want)
			}
		}
		if got := registry.Counter(processLogDropped).Value(); got != st.LogsDropped {
			t.Errorf("%d dropped lines are shown, want %d", got, st.LogsDropped)
		}
	}
}

// A total that somebody else keeps may not take a counter back.
func TestACounterIsOnlyEverRaised(t *testing.T) {
	t.Parallel()
	c := metrics.NewRegistry().Counter(processCPU)
	for _, total := range []uint64{5, 3, 5, 8} {
		raise(c, total)
	}
	if c.Value() != 8 {
		t.Errorf("got %d, want 8", c.Value())
	}
}
