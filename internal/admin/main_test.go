package admin_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/admin"
	"holdfast/internal/admin/admintest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// limit bounds every wait of a test.
const limit = 20 * time.Second

// surface is a running admin surface over a fake supervisor.
type surface struct {
	*admin.Server
	dir string
	log *lockedBuffer
}

// begin starts a surface that ends with the test.
func begin(t *testing.T, fake *admintest.Supervisor) *surface {
	t.Helper()
	s := &surface{dir: shortDir(t), log: new(lockedBuffer)}
	s.Server = admin.New(slog.New(slog.NewTextHandler(s.log, nil)))
	if err := s.Start(s.dir, fake); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// shortDir is a directory whose name leaves room for a socket's, whatever the
// test is called.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (s *surface) socket() string { return filepath.Join(s.dir, "admin.sock") }

// client speaks plain HTTP to the socket, or to an address.
func client(t *testing.T, network, address string) *http.Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	transport := &http.Transport{DialContext: dial}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: limit}
}

// ask sends a request to "METHOD /path" and returns code and body. fields are
// header lines; "Host: x" sets the host.
func ask(t *testing.T, c *http.Client, what string, fields ...string) (int, string) {
	t.Helper()
	method, path, _ := strings.Cut(what, " ")
	request, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		if name == "Host" {
			request.Host = value
		}
		request.Header.Set(name, value)
	}
	response, err := c.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

// want asks and compares. The body must contain text.
func want(t *testing.T, c *http.Client, what string, code int, text string, fields ...string) {
	t.Helper()
	gotCode, gotText := ask(t, c, what, fields...)
	if gotCode != code || !strings.Contains(gotText, text) {
		t.Errorf("%s %q: got %d %q, want %d with %q", what, fields, gotCode, gotText, code, text)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
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
