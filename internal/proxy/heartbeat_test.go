package proxy

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestAHangingLoopIsPausedAndComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h heartbeat
		var paused atomic.Int32
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go h.watch(ctx, slog.New(slog.DiscardHandler), func() { paused.Add(1) })
		beat := func(seconds int) {
			for range seconds {
				time.Sleep(beatEvery)
				if h.tick() {
					t.Error("given up although it beats")
				}
			}
		}
		hang := func(seconds time.Duration, want int32) {
			t.Helper()
			time.Sleep(seconds * time.Second)
			synctest.Wait()
			if n := paused.Load(); n != want {
				t.Errorf("paused %d times after %d seconds of silence", n, seconds)
			}
		}
		beat(60)
		hang(missedBeats-1, 0)
		hang(3, 1)
		hang(60, 1) // once is enough
		if !h.tick() {
			t.Error("the loop does not learn that it was given up")
		}
		beat(60)
		hang(missedBeats+2, 2)
	})
}

// The loop may come back in the very moment in which it is given up. It took back a
// pause that came only after that, and the generation never accepted again.
func TestALoopThatComesBackWhileItIsGivenUpLearnsItAfterwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h heartbeat
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go h.watch(ctx, slog.New(slog.DiscardHandler), func() {
			if h.tick() {
				t.Error("the loop takes back what is not done yet")
			}
		})
		time.Sleep((missedBeats + 2) * beatEvery)
		synctest.Wait()
		if !h.tick() {
			t.Error("the loop does not learn that it was given up")
		}
	})
}

func await[T any](t *testing.T, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(20 * time.Second):
		t.Fatalf("not in time: %s", what)
	}
	return v
}
