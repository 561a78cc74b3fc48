package admin

// What cannot be brought about from outside: a peer of another user, and a
// supervisor that is stuck for longer than a test may wait.

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/supervisor"
)

func TestThePeerIsWhoTheKernelSays(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var log bytes.Buffer
	refuse := true
	g := newGate(l.(listener), func(c net.Conn) error {
		if refuse {
			refuse = false
			return errors.New("not you")
		}
		return checkPeer(c)
	}, slog.New(slog.NewTextHandler(&log, nil)))

	first, second := dial(t, l), dial(t, l)
	conn, err := g.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	first.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := first.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection of a refused peer stays open")
	}
	second.Close()
	if !strings.Contains(log.String(), "not you") {
		t.Errorf("log is %q", log.String())
	}
	if len(g.guests) != 0 {
		t.Errorf("%d places are still taken", len(g.guests))
	}
}

func TestTheSocketAsksWhoCalls(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	s := New(slog.New(slog.DiscardHandler))
	if err := s.Start(dir, &admintest.Supervisor{}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// Another user cannot be played without root; who is let in is tested above.
	if s.unix.listener.check == nil {
		t.Error("the socket lets everybody in")
	}
}

func dial(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestAStuckSupervisorIsNotWaitedFor(t *testing.T) {
	for what, want := range map[string]int{"GET /status": 504, "GET /readyz": 503} {
		synctest.Test(t, func(t *testing.T) {
			s := New(slog.New(slog.DiscardHandler))
			s.cmds = &admintest.Supervisor{NotReady: true, OnStatus: func(ctx context.Context) (*supervisor.Status, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}}
			method, path, _ := strings.Cut(what, " ")
			answer := httptest.NewRecorder()
			began := time.Now()
			s.handler(&endpoint{}).ServeHTTP(answer, httptest.NewRequest(method, path, nil))
			if answer.Code != want || time.Since(began) > askTimeout {
				t.Errorf("%s: got %d %q after %s, want %d", what, answer.Code, answer.Body, time.Since(began), want)
			}
		})
	}
}

func TestAScrapeOfAStuckSupervisorShowsTheProcess(t *testing.T) {
	for name, test := range map[string]struct {
		heedsContext bool
		code         int
		text         string
	}{
		"one that gives up":       {true, 200, "process_open_fds "},
		"one that never comes to": {false, 503, "timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				h := scrapeHandler(&admintest.Supervisor{OnMetrics: func(ctx context.Context) ([]*dto.MetricFamily, error) {
					if test.heedsContext {
						<-ctx.Done()
					} else {
						<-release
					}
					return nil, ctx.Err()
				}}, slog.New(slog.DiscardHandler))
				answer := httptest.NewRecorder()
				began := time.Now()
				h.ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
				if answer.Code != test.code || !strings.Contains(answer.Body.String(), test.text) || time.Since(began) > scrapeTimeout {
					t.Errorf("got %d %q after %s", answer.Code, answer.Body, time.Since(began))
				}
				close(release)
			})
		})
	}
}

func TestOnlySoManyScrapesRunAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		h := scrapeHandler(&admintest.Supervisor{OnMetrics: func(context.Context) ([]*dto.MetricFamily, error) {
			<-release
			return nil, nil
		}}, slog.New(slog.DiscardHandler))
		scrape := func() int {
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
			return answer.Code
		}
		codes := make(chan int, maxScrapes)
		for range maxScrapes {
			go func() { codes <- scrape() }()
		}
		synctest.Wait()
		if code := scrape(); code != 503 {
			t.Errorf("one more got %d", code)
		}
		close(release)
		for range maxScrapes {
			if code := <-codes; code != 200 {
				t.Errorf("one of the first got %d", code)
			}
		}
	})
}

func TestAnAnswerThatIsTooLongIsNotShortened(t *testing.T) {
	t.Parallel()
	for text, whole := range map[string]bool{"": true, "123": true, "1234": false, "12345": false} {
		body, err := readAll(strings.NewReader(text), 3)
		if whole && (err != nil || string(body) != text) || !whole && !errors.Is(err, errTooLong) {
			t.Errorf("%q: got %q, %v", text, body, err)
		}
	}
}
