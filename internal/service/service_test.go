package service

// In-package: a fake supervisor and fake signals are put in the place of real ones.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
	"holdfast/internal/config"
	"holdfast/internal/supervisor"
)

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) != "" {
		if err := dynasty(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const limit = 20 * time.Second

// fakeSupervisor serves until its first Stop.
type fakeSupervisor struct {
	admintest.Supervisor
	options supervisor.Options
	running chan struct{}
	stopped chan struct{}
	end     func()
	err     error // of Run
	status  atomic.Pointer[supervisor.Status]
}

func (f *fakeSupervisor) Run(context.Context) error {
	close(f.running)
	if f.err == nil {
		<-f.stopped
	}
	return f.err
}

// instance is a `run` under test.
type instance struct {
	*fakeSupervisor
	dir     string
	signals chan os.Signal
	log     *lockedBuffer
	done    chan error
}

// begin starts an instance and waits until its supervisor runs.
func begin(t *testing.T, dir, configuration string) *instance {
	t.Helper()
	i := &instance{dir: dir, signals: make(chan os.Signal, 8), log: new(lockedBuffer), done: make(chan error, 1)}
	i.fakeSupervisor = &fakeSupervisor{running: make(chan struct{}), stopped: make(chan struct{})}
	i.end = sync.OnceFunc(func() { close(i.stopped) })
	i.OnStop = i.end
	path := filepath.Join(t.TempDir(), "h.toml")
	if err := os.WriteFile(path, []byte(configuration), 0o600); err != nil {
		t.Fatal(err)
	}
	go func() {
		i.done <- run(Options{ConfigPath: path, RuntimeDir: dir, Log: i.log}, origin{signals: i.signals, flip: new(fakeFlip)}, func(o supervisor.Options) service {
			i.options = o
			return i
		})
	}()
	select {
	case <-i.running:
	case err := <-i.done:
		t.Fatalf("run ended: %v", err)
	}
	t.Cleanup(func() {
		i.end()
		i.wantEnd(t, nil)
	})
	return i
}

func (i *instance) wantEnd(t *testing.T, want error) {
	t.Helper()
	select {
	case err := <-i.done:
		i.done <- err
		if !errors.Is(err, want) {
			t.Errorf("run ended with %v, want %v", err, want)
		}
	case <-time.After(limit):
		t.Fatal("run has not ended")
	}
}

func (i *instance) wantCalls(t *testing.T, want ...string) {
	t.Helper()
	for deadline := time.Now().Add(limit); !slices.Equal(i.Calls(), want); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the supervisor was told %q, want %q", i.Calls(), want)
		}
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestSignals(t *testing.T) {
	t.Parallel()
	for _, first := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(first.String()+" stops", func(t *testing.T) {
			i := begin(t, shortDir(t), "")
			i.signals <- first
			i.wantEnd(t, nil)
			i.wantCalls(t, "stop")
		})
	}
	t.Run("the second one is a second stop", func(t *testing.T) {
		i := begin(t, shortDir(t), "")
		i.OnStop = nil // it goes on
		i.signals <- syscall.SIGTERM
		i.signals <- syscall.SIGTERM
		i.wantCalls(t, "stop", "stop")
	})
	t.Run("SIGHUP reloads, and a stop does not wait for it", func(t *testing.T) {
		i := begin(t, shortDir(t), "")
		i.OnReload = func(ctx context.Context, _ bool) (*supervisor.ReloadResult, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		i.signals <- syscall.SIGHUP
		i.wantCalls(t, "reload")
		i.signals <- syscall.SIGTERM
		i.wantEnd(t, nil)
		i.wantCalls(t, "reload", "stop")
	})
	t.Run("SIGUSR1 opens the access logs again, beside a reload", func(t *testing.T) {
		i := begin(t, shortDir(t), "")
		i.OnReload = func(ctx context.Context, _ bool) (*supervisor.ReloadResult, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		i.signals <- syscall.SIGHUP
		i.wantCalls(t, "reload")
		i.signals <- syscall.SIGUSR1
		i.wantCalls(t, "reload", "reopen logs")
	})
	t.Run("SIGUSR2 upgrades", func(t *testing.T) {
		i := begin(t, shortDir(t), "")
		i.signals <- syscall.SIGUSR2
		i.wantCalls(t, "upgrade")
	})
	t.Run("any number of SIGHUPs during a reload are one more reload", func(t *testing.T) {
		i := begin(t, shortDir(t), "")
		release := make(chan struct{})
		i.OnReload = func(context.Context, bool) (*supervisor.ReloadResult, error) {
			<-release
			return nil, nil
		}
		i.signals <- syscall.SIGHUP
		i.wantCalls(t, "reload")
		for range 20 {
			i.signals <- syscall.SIGHUP
		}
		for deadline := time.Now().Add(limit); strings.Count(i.log.String(), "signal received") < 21; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the signals were not taken")
			}
		}
		close(release)
		i.wantCalls(t, "reload", "reload")
	})
}

func TestAStartThatIsRefused(t *testing.T) {
	t.Parallel()
	refusal := &supervisor.Refusal{Step: "configuration", Problems: []string{"h.toml:1: no"}}
	dir := shortDir(t)
	fake := &fakeSupervisor{running: make(chan struct{}), err: refusal}
	err := run(Options{ConfigPath: "h.toml", RuntimeDir: dir, Log: new(lockedBuffer)}, origin{}, func(supervisor.Options) service { return fake })
	if got, ok := errors.AsType[*supervisor.Refusal](err); !ok || got != refusal {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "admin.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestOneSupervisorPerRuntimeDirectory(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	first := begin(t, dir, "")
	second := func() error {
		fake := &fakeSupervisor{running: make(chan struct{}), err: os.ErrExist}
		return run(Options{ConfigPath: "h.toml", RuntimeDir: dir, Log: new(lockedBuffer)}, origin{}, func(supervisor.Options) service { return fake })
	}
	err := second()
	if err == nil || !strings.Contains(err.Error(), "another supervisor (pid ") || !strings.Contains(err.Error(), dir) {
		t.Fatalf("error is %v", err)
	}
	if _, err := admin.Dial(dir).Status(t.Context()); err != nil {
		t.Errorf("the first one does not answer any more: %v", err)
	}
	// Whoever has seen the end of the first can start a second at once.
	if err := admin.Dial(dir).Stop(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := second(); !errors.Is(err, os.ErrExist) {
		t.Errorf("the second did not get as far as its supervisor: %v", err)
	}
	first.wantEnd(t, nil)
}

func TestTheLogIsAsTheFileSays(t *testing.T) {
	t.Parallel()
	i := begin(t, shortDir(t), "[log]\nlevel = \"warn\"\nformat = \"json\"\n[[listeners]]\nname = \"a\"\naddress = \"127.0.0.1:0\"\n")
	i.options.Log.Info("unseen")
	i.options.Log.Warn("seen")
	i.options.ApplyLog(config.Log{Format: "text"}) // a reload: level info
	i.options.Log.Info("seen after the reload")
	i.signals <- syscall.SIGTERM
	i.wantEnd(t, nil)
	log := i.log.String()
	if strings.Contains(log, "unseen") || !strings.Contains(log, `"msg":"seen"`) || !strings.Contains(log, `"msg":"seen after the reload"`) {
		t.Errorf("log is\n%s", log)
	}
	if !strings.Contains(log, "log.format is read at the start") {
		t.Errorf("nothing says that the format stays:\n%s", log)
	}
	for line := range strings.Lines(log) {
		if !strings.Contains(line, `"pid":`) {
			t.Errorf("no pid in %s", line)
		}
	}
}

// The supervisor runs for months, so nothing comes along that it does not need.
func TestWhatRunDoesNotReach(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	reached := strings.Fields(string(out))
	for forbidden, why := range map[string]string{
		"holdfast/internal/demo":            "a tool beside the service",
		"holdfast/internal/cli":             "the commands reach the service through its socket",
		"holdfast/internal/admin/admintest": "it is for tests",
		"holdfast/internal/proxy":           "the supervisor touches no byte of a client",
		"holdfast/internal/exchange":        "the supervisor touches no byte of a client",
		"github.com/coder/websocket":        "the supervisor touches no byte of a client",
		"github.com/spf13/cobra":            "the command line ends where the service begins",
	} {
		if slices.Contains(reached, forbidden) {
			t.Errorf("%s is reached: %s", forbidden, why)
		}
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
