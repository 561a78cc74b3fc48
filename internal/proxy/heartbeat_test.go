package proxy

import (
	"context"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/http1"
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

func TestAPausedListenerLeavesItsQueueToOthers(t *testing.T) {
	const rounds = 16
	shared, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer shared.Close()
	raw, err := shared.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	dup := -1
	raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	server := http1.NewServer(http1.ServerOptions{Scheme: "http", Log: log})
	served := make(chan struct{}, 100)
	l := newListener(config.Listener{Name: "public"}, "public", server, log, nil, func() { served <- struct{}{} })
	if err := l.accept(dup); err != nil {
		t.Fatal(err)
	}
	defer l.stop(false)
	// Somebody else accepts from the same socket all the time.
	others := make(chan struct{}, 100)
	go func() {
		for {
			conn, err := shared.Accept()
			if err != nil {
				return
			}
			conn.Close()
			others <- struct{}{}
		}
	}()
	dial := func() {
		t.Helper()
		conn, err := net.Dial("tcp", shared.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	accepted := func() (byUs bool) {
		t.Helper()
		select {
		case <-served:
			return true
		case <-others:
			return false
		case <-time.After(20 * time.Second):
			t.Fatal("nobody accepts")
			return false
		}
	}

	// An accept that is under way at the pause may take one connection, which is rare.
	taken := 0
	for range rounds {
		for dial(); !accepted(); dial() { // until it is our turn
		}
		l.pause(true)
		for range 2 {
			dial()
			if accepted() {
				taken++
			}
		}
		l.pause(false)
	}
	if taken > rounds/4 {
		t.Errorf("%d connections were taken in %d pauses", taken, rounds)
	}
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
