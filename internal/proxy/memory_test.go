package proxy

import (
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/http1"
	"holdfast/internal/tunnel"
)

func TestMemoryIsGivenBackWhenManyHaveComeOrGoneAndItIsQuiet(t *testing.T) {
	t.Parallel()
	steady := func(each uint64, seconds int) []uint64 { return slices.Repeat([]uint64{each}, seconds) }
	idle := func(seconds int) []uint64 { return steady(0, seconds) }
	burst := []uint64{20_000}
	for name, tt := range map[string]struct {
		changes []uint64 // of each second
		want    []int    // seconds in which memory is given back
		wanted  bool     // at the beginning
	}{
		"nothing happens":                   {changes: idle(300)},
		"too little happens":                {changes: slices.Concat(steady(calm, 19), idle(300))},
		"a burst":                           {changes: slices.Concat(idle(20), burst, idle(300)), want: []int{24}},
		"a burst that takes its time":       {changes: slices.Concat(idle(20), burst, burst, burst, idle(300)), want: []int{26}},
		"a burst right at the beginning":    {changes: slices.Concat(burst, idle(300)), want: []int{4}},
		"many come and go":                  {changes: slices.Concat(idle(20), burst, idle(29), burst, idle(300)), want: []int{24, 54}},
		"many come and go at once":          {changes: slices.Concat(idle(20), burst, idle(4), burst, idle(300)), want: []int{24, 29}},
		"it is quiet for too short a time":  {changes: slices.Concat(idle(20), burst, idle(1), burst, idle(1), burst, idle(300)), want: []int{28}},
		"a burst, and then a trickle":       {changes: slices.Concat(idle(20), burst, steady(10, 300)), want: []int{24, 124, 224}},
		"it was wanted, and is quiet":       {changes: idle(300), want: []int{4}, wanted: true},
		"it was wanted, and is never quiet": {changes: steady(100, 100), want: []int{59}, wanted: true},
		"it is never quiet":                 {changes: steady(200, 200), want: []int{59, 119, 179}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			now := time.Unix(1_700_000_000, 0)
			m := memory{at: now, wanted: tt.wanted}
			var got []int
			var sum uint64
			for second, n := range tt.changes {
				now = now.Add(time.Second)
				if sum += n; m.due(now, sum) {
					got = append(got, second)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("given back in the seconds %v, want %v", got, tt.want)
			}
		})
	}
}

// Connections and tunnels of all listeners count, as they come and as they go. A
// generation that was relieved does it however few there were.
func TestAGenerationGivesMemoryBackOnceForABurst(t *testing.T) {
	t.Parallel()
	var released atomic.Int64
	log := slog.New(slog.DiscardHandler)
	g := &generation{
		vault: newVault(nil, 0),
		phase: serving, cfg: new(config.Config), log: log, changed: make(chan struct{}, 1),
		tunnels: tunnel.NewSet(tunnel.Options{Log: log}), releaseMemory: func() { released.Add(1) },
	}
	server := http1.NewServer(http1.ServerOptions{Log: log})
	for _, name := range []string{"a", "b"} {
		g.listeners = append(g.listeners, newListener(config.Listener{Name: name}, name, server, log, nil, nil))
	}
	now := time.Now()
	for _, l := range g.listeners {
		for range releaseAfter / 4 {
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
		g.drain(nil, 0) // those that stay may stay for long
	}
}
