package proxy

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	beatEvery = time.Second

	// missedBeats is how many of its own ticks the watch waits for the loop. It
	// counts ticks, not time: a process that was stopped and goes on has missed
	// none.
	missedBeats = 15
)

// heartbeat sees to it that a generation whose control loop hangs, and which the
// supervisor therefore cannot drain, does not accept for ever.
type heartbeat struct {
	beats  atomic.Uint64
	paused atomic.Bool
}

// tick is called by the loop. It says true if the watch had given it up.
func (h *heartbeat) tick() (back bool) {
	h.beats.Add(1)
	return h.paused.Swap(false)
}

// watch calls pause when the loop has not run for missedBeats ticks.
func (h *heartbeat) watch(ctx context.Context, log *slog.Logger, pause func()) {
	t := time.NewTicker(beatEvery)
	defer t.Stop()
	last, missed := uint64(0), 0
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		now := h.beats.Load()
		if now != last {
			last, missed = now, 0
			continue
		}
		if missed++; missed == missedBeats {
			log.Error("the control loop hangs: accepting no more")
			pause()
			h.paused.Store(true) // after it, so that what the loop takes back is complete
		}
	}
}
