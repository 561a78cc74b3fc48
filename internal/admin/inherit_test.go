package admin_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
	"holdfast/internal/config"
	"holdfast/internal/supervisor"
)

// named says who answers.
func named(version string) *admintest.Supervisor {
	return &admintest.Supervisor{OnStatus: func(context.Context) (*supervisor.Status, error) {
		return &supervisor.Status{Version: version}, nil
	}}
}

// succeed starts a surface that has the sockets of another one.
func succeed(t *testing.T, old *surface, fake *admintest.Supervisor) *surface {
	t.Helper()
	fds, err := old.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	s := &surface{dir: old.dir, log: new(lockedBuffer)}
	s.Server = admin.New(slog.New(slog.NewTextHandler(s.log, nil)))
	s.Inherit(fds)
	if err := s.Start(s.dir, fake); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func onLoopback() config.Admin {
	return config.Admin{HTTP: netip.MustParseAddrPort("127.0.0.1:0"), AllowActions: true}
}

// later asks in the background.
func later(t *testing.T, c *http.Client, what string) <-chan string {
	t.Helper()
	got := make(chan string, 1)
	go func() {
		method, path, _ := strings.Cut(what, " ")
		request, _ := http.NewRequest(method, "http://localhost"+path, nil)
		response, err := c.Do(request)
		if err != nil {
			got <- err.Error()
			return
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		got <- string(body)
	}()
	return got
}

func TestASurfaceTakesThePlaceOfAnother(t *testing.T) {
	t.Parallel()
	old := begin(t, named("old"))
	address := old.open(t, onLoopback())
	next := succeed(t, old, named("new"))
	if got := next.open(t, onLoopback()); got != address {
		t.Errorf("the address is %s, and was %s", got, address)
	}
	clients := map[string]*http.Client{"socket": client(t, "unix", old.socket()), "address": client(t, "tcp", address)}
	for name, c := range clients {
		want(t, c, "GET /status", 200, `"version": "old"`)
		c.CloseIdleConnections()
		old.Hold() // again is harmless
		waiting := later(t, c, "GET /status")
		old.Open()
		if got := <-waiting; !strings.Contains(got, `"old"`) {
			t.Errorf("%s: while it was held back came %s", name, got)
		}
		c.CloseIdleConnections()
	}
	old.Hold()
	waiting := []<-chan string{later(t, clients["socket"], "GET /status"), later(t, clients["address"], "GET /status")}
	for _, w := range waiting {
		select {
		case got := <-w:
			t.Fatalf("nobody is to answer, and it was answered %s", got)
		case <-time.After(50 * time.Millisecond):
		}
	}
	next.Open()
	for _, w := range waiting {
		if got := <-w; !strings.Contains(got, `"new"`) {
			t.Errorf("who came in between was answered %s", got)
		}
	}
	old.Leave()
	old.Close()
	for name, c := range clients {
		c.CloseIdleConnections()
		if _, got := ask(t, c, "GET /status"); !strings.Contains(got, `"new"`) {
			t.Errorf("%s: in the end it says %s", name, got)
		}
	}
	// The path is the new one's.
	next.CloseListeners()
	if _, err := os.Lstat(old.socket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestASurfaceThatIsNotWantedLeavesEverythingAlone(t *testing.T) {
	t.Parallel()
	old := begin(t, named("old"))
	address := old.open(t, onLoopback())
	next := succeed(t, old, named("new"))
	next.open(t, onLoopback())
	next.CloseListeners() // whichever way it ends
	next.Close()
	want(t, client(t, "unix", old.socket()), "GET /status", 200, `"old"`)
	want(t, client(t, "tcp", address), "GET /status", 200, `"old"`)
}

// A connection may have been accepted when another supervisor was told to command.
func TestWhatTheOldSurfaceIsAskedStill(t *testing.T) {
	t.Parallel()
	asked, obeyed := make(chan struct{}), make(chan struct{})
	old := begin(t, &admintest.Supervisor{OnStop: func() { close(asked) }})
	next := succeed(t, old, &admintest.Supervisor{OnStop: func() { close(obeyed) }})
	stopped := make(chan error, 1)
	go func() { stopped <- admin.Dial(old.dir).Stop(t.Context(), false) }()
	<-asked
	// It did not come to that: the old one was succeeded. The client asks once more.
	next.Open()
	old.Leave()
	old.Close()
	select {
	case <-obeyed:
		next.Close()
	case err := <-stopped:
		t.Fatalf("the client was satisfied: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestAClientAsksTheSuccessor(t *testing.T) {
	t.Parallel()
	times := 0
	fake := &admintest.Supervisor{OnReload: func(context.Context, bool) (*supervisor.ReloadResult, error) {
		if times++; times < 3 {
			return nil, supervisor.ErrSucceeded
		}
		return &supervisor.ReloadResult{Generation: 7}, nil
	}}
	s := begin(t, fake)
	if r, err := admin.Dial(s.dir).Reload(t.Context(), false); err != nil || r.Generation != 7 {
		t.Errorf("got %+v, %v", r, err)
	}
	want(t, client(t, "unix", s.socket()), "POST /upgrade", 200, `"version"`)
}

func TestUpgrade(t *testing.T) {
	t.Parallel()
	refusal := &supervisor.Refusal{Step: "upgrade", Problems: []string{"no"}}
	fake := &admintest.Supervisor{}
	s := begin(t, fake)
	if _, err := admin.Dial(s.dir).Upgrade(t.Context()); err != nil {
		t.Error(err)
	}
	fake.OnUpgrade = func(context.Context) (*supervisor.UpgradeResult, error) { return nil, refusal }
	_, err := admin.Dial(s.dir).Upgrade(t.Context())
	if got, ok := errors.AsType[*supervisor.Refusal](err); !ok || got.Error() != refusal.Error() {
		t.Errorf("got %v", err)
	}
	want(t, client(t, "tcp", s.open(t, onLoopback())), "POST /upgrade", 404, "there is no such path", "Holdfast-Action: 1")
}
