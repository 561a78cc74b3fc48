package proxy

import (
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/upstream"
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

// Each request meets it, and the operator is told once what to do.
func TestThatNoDescriptorIsLeftToConnectWithIsOneLineOfAnEpisode(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		errno syscall.Errno
		says  []string
	}{
		{unix.EMFILE, []string{"level=ERROR", "raise the limit of descriptors", "limit=", "too many open files"}},
		{unix.ENFILE, []string{"level=ERROR", "raise fs.file-max", "too many open files in system"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			var log strings.Builder
			m := &Manager{options: ManagerOptions{Log: slog.New(slog.NewTextHandler(&log, nil))}}
			g := &generation{phase: serving, manager: m}
			err := &upstream.ConnectError{Err: &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", tt.errno)}}
			want := func(lines int, says ...string) {
				t.Helper()
				all := strings.SplitAfter(log.String(), "\n")
				if len(all)-1 != lines {
					t.Fatalf("%d lines, want %d:\n%s", len(all)-1, lines, log.String())
				}
				for _, part := range says {
					if last := all[lines-1]; !strings.Contains(last, part) {
						t.Errorf("%q is not in %s", part, last)
					}
				}
			}
			for range 2 {
				log.Reset()
				for range 5 {
					m.notConnected(err)
					g.report()
					time.Sleep(time.Second)
				}
				m.notConnected(&upstream.ConnectError{Err: unix.ECONNREFUSED})
				want(1, tt.says...)
				time.Sleep(episodeCalm)
				g.report()
				g.report()
				want(2, "level=INFO", "descriptors", "failures=5")
			}
			m.notConnected(&upstream.ConnectError{Err: unix.ECONNREFUSED})
			want(2)
		})
	}
}
