package service

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/supervisor"
)

// hears waits until systemd has heard text, and returns all that it has heard.
func hears(t *testing.T, manager *net.UnixConn, text string) string {
	t.Helper()
	manager.SetReadDeadline(time.Now().Add(limit))
	var heard strings.Builder
	for !strings.Contains(heard.String(), text) {
		var packet [4096]byte
		n, err := manager.Read(packet[:])
		if err != nil {
			t.Fatalf("systemd has not heard %q, but\n%s", text, &heard)
		}
		heard.Write(packet[:n])
		heard.WriteByte('\n')
	}
	return heard.String()
}

// Not parallel: the environment is the process's.
func TestWhatSystemdHearsOfTheService(t *testing.T) {
	path := filepath.Join(shortDir(t), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "3000000")

	i := begin(t, shortDir(t), "")
	if i.options.PulseEvery != time.Second {
		t.Errorf("a watchdog of 3s is fed every %s", i.options.PulseEvery)
	}
	if heard := hears(t, manager, "STATUS=starting\n"); strings.Contains(heard, "READY=1") {
		t.Errorf("ready before anything serves:\n%s", heard)
	}
	i.options.Pulse()
	hears(t, manager, "WATCHDOG=1\nEXTEND_TIMEOUT_USEC=30000000\n")

	i.setStatus(&supervisor.Status{Generations: []supervisor.GenerationStatus{{Number: 1, State: "serving"}}})
	i.options.Phase(supervisor.Serving)
	if heard := hears(t, manager, "STATUS=generation 1 serving 0 tunnels\n"); !strings.Contains(heard, "READY=1\n") {
		t.Errorf("not ready:\n%s", heard)
	}
	i.options.Pulse()
	if heard := hears(t, manager, "WATCHDOG=1\n"); strings.Contains(heard, "EXTEND") {
		t.Errorf("nothing is under way, and systemd waits on:\n%s", heard)
	}
	i.options.Phase(supervisor.Reloading)
	hears(t, manager, "RELOADING=1\nMONOTONIC_USEC=")
	i.options.Phase(supervisor.Serving)
	hears(t, manager, "READY=1\n")
	i.options.Phase(supervisor.Stopping)
	if heard := hears(t, manager, "EXTEND_TIMEOUT_USEC="); !strings.Contains(heard, "STOPPING=1\n") {
		t.Errorf("not stopping:\n%s", heard)
	}
}

// Not parallel: the environment is the process's.
func TestSystemdIsLeftWithTheReasonWhyAStartFailed(t *testing.T) {
	path := filepath.Join(shortDir(t), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", path)

	refusal := &supervisor.Refusal{Step: "configuration", Problems: []string{"h.toml:1: no", "h.toml:2: neither"}}
	fake := &fakeSupervisor{running: make(chan struct{}), err: refusal}
	fake.setStatus(&supervisor.Status{Stopping: true})
	err = run(Options{ConfigPath: "h.toml", RuntimeDir: shortDir(t), Log: new(lockedBuffer)}, origin{}, func(supervisor.Options) service { return fake })
	if !errors.Is(err, refusal) {
		t.Errorf("error is %v", err)
	}
	// All is said now: what comes behind it is ours.
	mark, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer mark.Close()
	if _, err := mark.Write([]byte("END")); err != nil {
		t.Fatal(err)
	}
	if heard := hears(t, manager, "END\n"); !strings.HasSuffix(heard, "STATUS=cannot start: configuration: h.toml:1: no\nEND\n") {
		t.Errorf("systemd has heard\n%s", heard)
	}
}

func TestWithoutSystemdTheLoopTellsNobody(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "3000000")
	i := begin(t, shortDir(t), "")
	if i.options.Phase != nil || i.options.Pulse != nil || i.options.PulseEvery != 0 {
		t.Error("the loop has something to tell")
	}
}

func TestTheStatusInOneLine(t *testing.T) {
	t.Parallel()
	generation := func(number int, state string, tunnels int) supervisor.GenerationStatus {
		return supervisor.GenerationStatus{Number: number, State: state, Tunnels: tunnels}
	}
	for _, c := range []struct {
		want string
		st   supervisor.Status
	}{
		{"starting", supervisor.Status{}},
		{"no generation serves; last reload refused: start: no", supervisor.Status{LastReload: &supervisor.LastReload{Error: "start: no"}}},
		{"starting", supervisor.Status{Generations: []supervisor.GenerationStatus{generation(1, "starting", 0)}}},
		{"generation 1 serving 0 tunnels", supervisor.Status{Generations: []supervisor.GenerationStatus{generation(1, "serving", 0)}}},
		{"generation 8 serving 1,988 tunnels; 2 draining with 1,001,207 tunnels", supervisor.Status{Generations: []supervisor.GenerationStatus{
			generation(9, "ready", 0), generation(8, "serving", 1988), generation(7, "draining", 1001206), generation(5, "draining", 1),
		}}},
		{"generation 2 serving 1 tunnel; last reload refused: configuration: h.toml:1: no", supervisor.Status{
			Generations: []supervisor.GenerationStatus{generation(2, "serving", 1)},
			LastReload:  &supervisor.LastReload{Error: "configuration: h.toml:1: no"},
		}},
		{"no generation serves; the last one died: signal: killed; 1 draining with 3 tunnels", supervisor.Status{
			Generations: []supervisor.GenerationStatus{generation(3, "starting", 0), generation(1, "draining", 3)},
			LastCrash:   "signal: killed", LastReload: &supervisor.LastReload{},
		}},
		{"stopping; 2 generations left with 3 tunnels", supervisor.Status{Stopping: true, Generations: []supervisor.GenerationStatus{
			generation(2, "serving", 1), generation(1, "stopping", 2),
		}}},
	} {
		if got := summary(&c.st); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
}

// setStatus is what Status says from now on.
func (f *fakeSupervisor) setStatus(st *supervisor.Status) { f.status.Store(st) }

// Status implements [supervisor.Commands].
func (f *fakeSupervisor) Status(ctx context.Context) (*supervisor.Status, error) {
	if st := f.status.Load(); st != nil {
		return st, nil
	}
	return f.Supervisor.Status(ctx)
}
