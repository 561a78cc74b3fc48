package proxy

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/fence"
)

// A supervisor is sought for ever: at once at first, then at a pace that hurts nobody,
// also where one is there each time and goes away.
func TestASupervisorIsSoughtAtAPaceThatHurtsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		began := time.Now()
		var attempts []time.Time
		const failing, going = 20, 20
		s := &seeking{path: "p", key: []byte("k"), reunite: func(_ context.Context, path string, key []byte, hello control.Hello) (*control.Conn, error) {
			if path != "p" || string(key) != "k" || hello.Generation != 7 {
				t.Errorf("%s, %s, %+v", path, key, hello)
			}
			attempts = append(attempts, time.Now())
			if len(attempts) <= failing {
				return nil, errors.New("nobody is there")
			}
			return new(control.Conn), nil
		}}
		g := &generation{log: slog.New(slog.NewTextHandler(&log, nil)), found: make(chan *control.Conn, 1)}
		for range going {
			s.run(t.Context(), g, control.Hello{Generation: 7})
			<-g.found
		}
		if len(attempts) != failing+going {
			t.Fatalf("%d attempts", len(attempts))
		}
		if first := attempts[0].Sub(began); first < firstPause/2 || first > firstPause {
			t.Errorf("the first attempt came after %v", first)
		}
		for i := 1; i < len(attempts); i++ {
			least := min(firstPause<<min(i, 10), mostPause) / 2
			if pause := attempts[i].Sub(attempts[i-1]); pause < least || pause > 2*least {
				t.Errorf("pause %d is %v, want %v to %v", i, pause, least, 2*least)
			}
		}
		if n := strings.Count(log.String(), "no supervisor"); n != 1 {
			t.Errorf("%d lines:\n%s", n, log.String())
		}
	})
}

func TestTheSearchForASupervisorEndsWithTheGeneration(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		g := &generation{log: slog.New(slog.DiscardHandler)}
		s := &seeking{reunite: func(context.Context, string, []byte, control.Hello) (*control.Conn, error) {
			return nil, errors.New("no")
		}}
		over := make(chan struct{})
		go func() { s.run(ctx, g, control.Hello{}); close(over) }()
		time.Sleep(time.Hour)
		cancel()
		<-over
	})
}

// A channel that was found too late for anybody is closed.
func TestASupervisorThatIsFoundAtTheEndIsLetGo(t *testing.T) {
	t.Parallel()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(a)
	ctx, cancel := context.WithCancel(t.Context())
	g := &generation{log: slog.New(slog.DiscardHandler), found: make(chan *control.Conn)}
	s := &seeking{reunite: func(context.Context, string, []byte, control.Hello) (*control.Conn, error) {
		cancel()
		return control.NewConn(b)
	}}
	s.run(ctx, g, control.Hello{})
	if _, err := unix.Write(a, []byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("it is still open: %v", err)
	}
}

// What hangs between being found and commanding does not keep a generation from
// another supervisor.
func TestPatienceIsOnlyLostWithWhoDoesNotCommand(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		say  func(f *fence.Fence)
		open bool
	}{
		{"candidate alone", func(f *fence.Fence) { f.Ended(fence.First); f.Found() }, false},
		{"candidate beside the commander", func(f *fence.Fence) { f.Message(fence.First, control.TypePrepare, 2) }, true},
		{"commander", func(f *fence.Fence) {
			f.Ended(fence.First)
			c, _ := f.Found()
			f.Message(c, control.TypeObey, 2)
		}, true},
	} {
		a, b, err := control.Ends()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(a)
		conn, err := control.NewConn(b)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		g := &generation{log: slog.New(slog.DiscardHandler), fence: fence.New(1)}
		tt.say(g.fence)
		id := max(g.fence.Candidate(), g.fence.Commander())
		g.channels = map[fence.Channel]*channel{id: {id: id, conn: conn}}
		g.losePatience()
		if _, err := unix.Write(a, []byte("x")); (err == nil) != tt.open {
			t.Errorf("%s: %v, want it open: %v", tt.name, err, tt.open)
		}
	}
}

// A supervisor that never comes is not expected for ever, and the time begins when the
// one was lost that commanded.
func TestASupervisorIsExpectedForAWhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := &generation{changed: make(chan struct{}, 1), phase: draining}
		if g.expected() {
			t.Error("one that was not lost is expected")
		}
		g.expect(time.Now())
		time.Sleep(absence / 2)
		g.expect(time.Now()) // another one came and went and never commanded
		time.Sleep(absence/2 - time.Nanosecond)
		if !g.expected() {
			t.Error("it is not expected any more")
		}
		for _, p := range []phase{serving, stopping} {
			if g := (&generation{phase: p, lost: g.lost}); g.expected() {
				t.Errorf("it is expected in phase %d", p)
			}
		}
		time.Sleep(time.Nanosecond)
		<-g.changed // the loop looks
		if g.expected() {
			t.Error("it is still expected")
		}
	})
}

func TestASupervisorThatIsObeyedIsSoughtQuicklyWhenItIsGone(t *testing.T) {
	t.Parallel()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(a)
	conn, err := control.NewConn(b)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	g := &generation{log: slog.New(slog.DiscardHandler), fence: fence.New(1), seek: seeking{pause: mostPause}, lost: time.Now(), phase: draining}
	g.vault = newVault(g, 0)
	g.obey(received{from: &channel{id: fence.First, conn: conn}, m: &control.Message{Type: control.TypeObey, Epoch: 2, ID: 1}}, fence.None)
	if g.seek.pause != 0 || g.expected() {
		t.Errorf("the pause is %v, another is expected: %v", g.seek.pause, g.expected())
	}
}
