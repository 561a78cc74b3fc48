package proxy

import (
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
)

func TestAnEpisodeIsOneHoweverOftenItComesUp(t *testing.T) {
	t.Parallel()
	var e episode
	at := func(seconds int) time.Time { return time.Unix(1000+int64(seconds), 0) }
	if _, over := e.ends(at(0)); over {
		t.Error("what never was is over")
	}
	for round := range 2 {
		from := round * 100
		if !e.comesUp(at(from)) {
			t.Error("it does not begin")
		}
		for i := 1; i < 20; i++ {
			if _, over := e.ends(at(from + i)); over {
				t.Errorf("it is over in second %d", i)
			}
			if e.comesUp(at(from + i)) {
				t.Errorf("it begins again in second %d", i)
			}
		}
		if _, over := e.ends(at(from + 28)); over {
			t.Error("it is over too soon")
		}
		if times, over := e.ends(at(from + 29)); !over || times != 20 {
			t.Errorf("it came up %d times, over: %v; want 20, true", times, over)
		}
		if _, over := e.ends(at(from + 60)); over {
			t.Error("it is over a second time")
		}
	}
}

func TestWhatHeldUpAcceptingIsOverWhenItIsCalm(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	limits := config.ListenerLimits{Connections: 1}
	l := newListener(config.Listener{Name: "public", Limits: limits}, "public", nil, logger, nil, func() {})
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	l.enter()
	l.full.comesUp(start)
	l.failing.comesUp(start)
	for i := range 60 {
		l.report(at(i))
	}
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "accepting works again") {
		t.Errorf("while it is full the log says\n%s", got)
	}
	l.leave()
	for i := range 60 {
		l.report(at(60 + i))
	}
	if got := log.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "there is room below limits.connections again") {
		t.Errorf("once there is room the log says\n%s", got)
	}
}

// starved is a listener for which the process has no descriptor, some times.
type starved struct {
	net.Listener
	times int
}

func (s *starved) Accept() (net.Conn, error) {
	if s.times--; s.times < 0 {
		return nil, net.ErrClosed
	}
	return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", unix.EMFILE)}
}

func TestFailuresToAcceptAreCountedAndLoggedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		registry := metrics.NewRegistry()
		l := newListener(config.Listener{Name: "public"}, "public", nil, slog.New(slog.NewTextHandler(&log, nil)), registry, func() {})
		l.acceptLoop(&starved{times: 5}, make(chan struct{}))
		if n := registry.Counter(acceptFailures, "public").Value(); n != 5 {
			t.Errorf("%d failures are counted, want 5", n)
		}
		if n := strings.Count(log.String(), "too many open files"); n != 1 {
			t.Errorf("%d lines:\n%s", n, log.String())
		}
	})
}
