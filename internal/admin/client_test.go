package admin_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
	"holdfast/internal/supervisor"
)

func TestTheClientSaysWhatTheSupervisorSays(t *testing.T) {
	t.Parallel()
	result := &supervisor.ReloadResult{
		Generation: 8, Previous: 7, Duration: 1234567, Added: []string{"0.0.0.0:81"}, Removed: []string{"0.0.0.0:80"},
		Warnings: []string{"generation 7 may still accept"}, Probation: "passed",
	}
	status := &supervisor.Status{
		Version: "1.2.3", PID: 42, Started: time.Unix(1e9, 0).UTC(), ConfigPath: "/etc/h.toml", FileDiffers: true,
		LastReload:  &supervisor.LastReload{Time: time.Unix(1e9, 5).UTC(), Error: "no"},
		Listeners:   []supervisor.ListenerStatus{{Name: "a", Key: "0.0.0.0:0", Address: "0.0.0.0:4711"}},
		Generations: []supervisor.GenerationStatus{{Number: 8, State: "serving", Tunnels: 3, OldestTunnel: time.Unix(1e9, 0).UTC()}},
	}
	fake := &admintest.Supervisor{
		OnReload: func(context.Context, bool) (*supervisor.ReloadResult, error) { return result, nil },
		OnStatus: func(context.Context) (*supervisor.Status, error) { return status, nil },
	}
	c := admin.Dial(begin(t, fake).dir)
	gotResult, err := c.Reload(t.Context(), true)
	if err != nil || !reflect.DeepEqual(gotResult, result) {
		t.Errorf("reload: got %+v, %v", gotResult, err)
	}
	gotStatus, err := c.Status(t.Context())
	if err != nil || !reflect.DeepEqual(gotStatus, status) {
		t.Errorf("status: got %+v, %v", gotStatus, err)
	}
	if err := errors.Join(c.SetReady(t.Context(), false), c.SetReady(t.Context(), true), c.Kill(t.Context(), 7), c.MoveTunnels(t.Context(), 6), c.Clear(t.Context(), 5, 90*time.Second)); err != nil {
		t.Error(err)
	}
	if want := []string{"reload and wait", "ready false", "ready true", "kill 7", "move 6", "clear 5 within 1m30s"}; !slices.Equal(fake.Calls(), want) {
		t.Errorf("the supervisor was told %q, want %q", fake.Calls(), want)
	}
}

func TestTheClientShowsWhatIsInside(t *testing.T) {
	t.Parallel()
	fake := &admintest.Supervisor{
		OnMetrics: merged(counter("holdfast_reloads_total", "Reloads\x1b[2J.", 3)),
		OnConfig:  func(file bool) (string, error) { return fmt.Sprintf("file = %t\n", file), nil },
		OnProfile: func(_ context.Context, generation int, name string, over time.Duration) ([]byte, error) {
			return fmt.Appendf(nil, "\x00%s of %d over %s", name, generation, over), nil
		},
	}
	c := admin.Dial(begin(t, fake).dir)
	for _, file := range []bool{true, false} {
		if text, err := c.Config(t.Context(), file); err != nil || text != fmt.Sprintf("file = %t\n", file) {
			t.Errorf("config: got %q, %v", text, err)
		}
	}
	text, err := c.Metrics(t.Context())
	if err != nil || !strings.Contains(text, "# HELP holdfast_reloads_total Reloads\uFFFD[2J.\n") {
		t.Errorf("metrics: got %q, %v", text, err)
	}
	for want, ask := range map[string]func() ([]byte, error){
		"\x00cpu of 7 over 5s":  func() ([]byte, error) { return c.Profile(t.Context(), 7, "cpu", 5*time.Second) },
		"\x00heap of 7 over 0s": func() ([]byte, error) { return c.Profile(t.Context(), 7, "heap", 0) },
		"\x1f\x8b":              func() ([]byte, error) { return c.Profile(t.Context(), 0, "heap", 0) },
	} {
		if got, err := ask(); err != nil || !strings.HasPrefix(string(got), want) {
			t.Errorf("profile: got %.40q, %v, want %q", got, err, want)
		}
	}
	if err := errors.Join(c.SetLogLevel(t.Context(), "debug"), c.ReopenLogs(t.Context())); err != nil {
		t.Error(err)
	}
	if want := []string{"log level debug", "reopen logs"}; !slices.Equal(fake.Calls(), want) {
		t.Errorf("the supervisor was told %q, want %q", fake.Calls(), want)
	}
}

func TestTheClientHasTheErrorsOfTheSupervisor(t *testing.T) {
	t.Parallel()
	refusal := &supervisor.Refusal{Step: "configuration", Problems: []string{"h.toml:3: a", "h.toml:4: <b>"}}
	fake := &admintest.Supervisor{
		OnReload: func(_ context.Context, wait bool) (*supervisor.ReloadResult, error) {
			if wait {
				return nil, supervisor.ErrStopping
			}
			return nil, refusal
		},
		OnKill:   func(int) error { return errors.New("no living generation 9") },
		OnConfig: func(bool) (string, error) { return "", refusal },
		OnReopen: func() error { return errors.New("generation 7 says \x1b[2J\xff") },
	}
	c := admin.Dial(begin(t, fake).dir)
	_, err := c.Reload(t.Context(), false)
	if got, ok := errors.AsType[*supervisor.Refusal](err); !ok || !reflect.DeepEqual(got, refusal) {
		t.Errorf("a refusal came as %#v", err)
	}
	if _, err = c.Reload(t.Context(), true); !errors.Is(err, supervisor.ErrStopping) {
		t.Errorf("ErrStopping came as %#v", err)
	}
	_, err = c.Config(t.Context(), true)
	if got, ok := errors.AsType[*supervisor.Refusal](err); !ok || !reflect.DeepEqual(got, refusal) {
		t.Errorf("a refused file came as %#v", err)
	}
	if err := c.ReopenLogs(t.Context()); err == nil || err.Error() != "generation 7 says \uFFFD[2J\uFFFD" {
		t.Errorf("what could drive a terminal came as %q", err)
	}
	if err := c.Kill(t.Context(), 9); err == nil || err.Error() != "no living generation 9" {
		t.Errorf("an error came as %#v", err)
	}
}

func TestTheClientKnowsWhetherAnythingWasAsked(t *testing.T) {
	t.Parallel()
	t.Run("no socket", func(t *testing.T) {
		dir := shortDir(t)
		wantNotRunning(t, dir)
	})
	t.Run("no directory", func(t *testing.T) {
		wantNotRunning(t, shortDir(t)+"/none")
	})
	t.Run("a socket that a killed supervisor left", func(t *testing.T) {
		dir := shortDir(t)
		l := listen(t, dir)
		l.SetUnlinkOnClose(false)
		l.Close()
		wantNotRunning(t, dir)
	})
	t.Run("a path that is too long", func(t *testing.T) {
		_, err := admin.Dial("/"+strings.Repeat("d", 200)).Reload(t.Context(), false)
		if err == nil || errors.Is(err, admin.ErrUnknown) || !strings.Contains(err.Error(), "at most 107 bytes") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("a connection that breaks after the request", func(t *testing.T) {
		dir := shortDir(t)
		l := listen(t, dir)
		go breakAll(l)
		_, err := admin.Dial(dir).Reload(t.Context(), false)
		if !errors.Is(err, admin.ErrUnknown) {
			t.Errorf("reload: error is %v", err)
		}
		_, err = admin.Dial(dir).Status(t.Context())
		if err == nil || errors.Is(err, admin.ErrUnknown) || errors.Is(err, admin.ErrNotRunning) {
			t.Errorf("a status that changes nothing: error is %v", err)
		}
	})
	t.Run("an answer that does not come in time", func(t *testing.T) {
		fake := &admintest.Supervisor{OnReload: func(ctx context.Context, _ bool) (*supervisor.ReloadResult, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, errors.New("after 20ms"))
		defer cancel()
		_, err := admin.Dial(begin(t, fake).dir).Reload(ctx, true)
		if !errors.Is(err, admin.ErrUnknown) || !strings.Contains(err.Error(), "in time (after 20ms)") {
			t.Errorf("error is %v", err)
		}
	})
}

func TestStopReturnsWhenTheServiceHasEnded(t *testing.T) {
	t.Parallel()
	told := make(chan struct{})
	fake := &admintest.Supervisor{OnStop: sync.OnceFunc(func() { close(told) })}
	s := begin(t, fake)
	stopped := make(chan error, 1)
	go func() { stopped <- admin.Dial(s.dir).Stop(t.Context(), false) }()
	<-told
	s.CloseListeners()
	if _, err := os.Stat(s.socket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	select {
	case err := <-stopped:
		t.Fatalf("Stop returned %v before the end", err)
	case <-time.After(50 * time.Millisecond):
	}
	s.Close()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// Its generations may live: they do not end with it.
func TestStopOfASupervisorThatDiesIsUnknown(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	l := listen(t, dir)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.Read(make([]byte, 1))
		l.Close() // it dies with the request in its hands
		conn.Close()
	}()
	if err := admin.Dial(dir).Stop(t.Context(), false); !errors.Is(err, admin.ErrUnknown) {
		t.Errorf("error is %v", err)
	}
}

func TestStopThatIsNotSeenToEndIsUnknown(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(*testing.T) string{
		"it takes too long": func(t *testing.T) string { return begin(t, &admintest.Supervisor{}).dir },
		"the connection breaks and somebody still listens": func(t *testing.T) string {
			dir := shortDir(t)
			go breakAll(listen(t, dir))
			return dir
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := admin.Dial(answer(t)).Stop(ctx, false); !errors.Is(err, admin.ErrUnknown) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func wantNotRunning(t *testing.T, dir string) {
	t.Helper()
	_, err := admin.Dial(dir).Reload(t.Context(), false)
	if !errors.Is(err, admin.ErrNotRunning) || err.Error() != "no supervisor runs with runtime directory "+dir {
		t.Errorf("error is %v", err)
	}
}

// listen takes the place of a supervisor.
func listen(t *testing.T, dir string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/admin.sock", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// breakAll closes every connection after its first byte.
func breakAll(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.Read(make([]byte, 1))
		conn.Close()
	}
}
