package proxy

import (
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/scavenge"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// Connections and tunnels of all listeners count, as they come and as they go. A
// generation that was relieved does it however few there were.
func TestAGenerationGivesMemoryBackOnceForABurst(t *testing.T) {
	t.Parallel()
	var released atomic.Int64
	log := slog.New(slog.DiscardHandler)
	g := &generation{
		vault: newVault(nil, 0), clusters: new(upstream.Clusters),
		phase: serving, cfg: new(config.Config), log: log, changed: make(chan struct{}, 1),
		tunnels: tunnel.NewSet(tunnel.Options{Log: log}), memory: scavenge.New(time.Now()), releaseMemory: func() { released.Add(1) },
	}
	g.handover = newHandover(g)
	loop := streamtest.New(t)
	g.loops = &loops{streams: []*stream.Loop{loop}}
	for _, name := range []string{"a", "b"} {
		l := newListener(config.Listener{Name: name}, name, g.loops.streams, log, nil, nil)
		l.serveBy(http1.NewServer(http1.ServerOptions{Log: log, Loops: g.loops.streams, Ended: l.ended}))
		g.listeners = append(g.listeners, l)
	}
	now := time.Now()
	for _, l := range g.listeners {
		for range scavenge.Least / 4 {
			l.enter()
			l.leave()
		}
	}
	for times := int64(1); times <= 2; times++ {
		for range 100 {
			now = now.Add(time.Second)
			g.giveMemoryBack(now)
		}
		g.work.Wait()
		if n := released.Load(); n != times {
			t.Errorf("memory was given back %d times, want %d", n, times)
		}
		g.drain(nil, 0, 0) // those that stay may stay for long
	}
}
