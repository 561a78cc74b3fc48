package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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

// watched is a listening socket that tells of each Accept, and what becomes of it.
type watched struct {
	*net.TCPListener
	accepts chan struct{}
	ends    chan error
}

func (w *watched) Accept() (net.Conn, error) {
	w.accepts <- struct{}{}
	conn, err := w.TCPListener.Accept()
	w.ends <- err
	return conn, err
}

func TestAPausedListenerLeavesItsQueueToOthers(t *testing.T) {
	t.Parallel()
	shared, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer shared.Close()
	file, err := shared.File()
	if err != nil {
		t.Fatal(err)
	}
	same, err := net.FileListener(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	ours := &watched{same.(*net.TCPListener), make(chan struct{}, 100), make(chan error, 100)}
	log := slog.New(slog.DiscardHandler)
	server := http1.NewServer(http1.ServerOptions{Scheme: "http", Log: log})
	served := make(chan struct{}, 100)
	l := newListener(config.Listener{Name: "public"}, "public", server, log, nil, func() { served <- struct{}{} })
	l.ln = ours
	l.loop.Go(func() { l.acceptLoop(ours, nil) })
	defer l.loop.Wait()
	defer ours.Close()
	dial := func() (from string) {
		t.Helper()
		conn, err := net.Dial("tcp", shared.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.LocalAddr().String()
	}
	wantEnd := func(want error) {
		t.Helper()
		if err := await(t, "accept ends", ours.ends); !errors.Is(err, want) {
			t.Fatalf("accept ends with %v, want %v", err, want)
		}
	}
	for range 16 {
		await(t, "it accepts", ours.accepts)
		dial()
		wantEnd(nil)
		await(t, "it serves", served)
		// An accept that is under way ends, and none follows.
		await(t, "it accepts again", ours.accepts)
		l.pause(true)
		wantEnd(os.ErrDeadlineExceeded)
		from := dial()
		shared.SetDeadline(time.Now().Add(20 * time.Second))
		conn, err := shared.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.RemoteAddr().String(); got != from {
			t.Errorf("accepted %s, want %s", got, from)
		}
		conn.Close()
		if n := len(ours.accepts); n > 0 {
			t.Errorf("it accepts %d times in a pause", n)
		}
		l.pause(false)
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

func await[T any](t *testing.T, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(20 * time.Second):
		t.Fatalf("not in time: %s", what)
	}
	return v
}
