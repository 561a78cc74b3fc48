package demo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"holdfast/internal/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const limit = time.Minute

// build builds both programs side by side, as the demo needs them.
func build(t *testing.T) (holdfast string) {
	t.Helper()
	dir := t.TempDir()
	for name, pkg := range map[string]string{"holdfast": "supervisor", "holdfast-proxy": "proxy"} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, name), "holdfast/cmd/"+pkg)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return filepath.Join(dir, "holdfast")
}

func TestTheDemo(t *testing.T) {
	holdfast := build(t)
	t.Run("tells its story and leaves nothing behind", func(t *testing.T) {
		out, code := play(t, holdfast, nil, "--once")
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
		for _, text := range []string{
			"5 WebSockets", "reload 1   generation 2 serves", "reload 3   generation 4 serves", "generation 1 drains 5 tunnels",
			" 0 lost", "are still the connections that were opened before the first reload",
		} {
			if !strings.Contains(out, text) {
				t.Errorf("%q is missing in\n%s", text, out)
			}
		}
	})
	t.Run("goes on until Ctrl-C", func(t *testing.T) {
		out, code := play(t, holdfast, func(demo *os.Process, _ string) { demo.Signal(os.Interrupt) })
		if code != 0 || !strings.Contains(out, "At the end: ") || !strings.Contains(out, " 0 lost, 5 WebSockets open.") {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
	t.Run("is not broken by a command to stop", func(t *testing.T) {
		out, code := play(t, holdfast, func(_ *os.Process, runtimeDir string) {
			if out, err := exec.CommandContext(t.Context(), holdfast, "stop", "--now", "--runtime-dir", runtimeDir).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
		if code != 0 || !strings.Contains(out, "Holdfast was stopped") {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
	t.Run("fails when tunnels are lost", func(t *testing.T) {
		out, code := play(t, holdfast, func(demo *os.Process, _ string) { killUpstream(t, demo) })
		if code != 1 || !strings.Contains(out, "lost message") {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
	t.Run("says what is missing", func(t *testing.T) {
		if err := os.Remove(holdfast + "-proxy"); err != nil {
			t.Fatal(err)
		}
		out, code := play(t, holdfast, nil, "--once")
		if code != 1 || !strings.Contains(out, "holdfast-proxy") {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
}

// killUpstream kills the echo server that a demo has started: nothing else takes tunnels
// along.
func killUpstream(t *testing.T, demo *os.Process) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", demo.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		children, _ := os.ReadFile(list) // of a thread that has ended there are none
		for child := range strings.FieldsSeq(string(children)) {
			command, _ := os.ReadFile("/proc/" + child + "/cmdline")
			if !strings.Contains(string(command), "demo-upstream") {
				continue
			}
			pid, err := strconv.Atoi(child)
			if err == nil {
				err = syscall.Kill(pid, syscall.SIGKILL)
			}
			if err != nil {
				t.Error(err)
			}
			return
		}
	}
	t.Error("the demo has no echo server")
}

// play runs the demo, does something when its story has been told, and returns
// what it has said. It must leave no file.
func play(t *testing.T, holdfast string, then func(demo *os.Process, runtimeDir string), flags ...string) (out string, code int) {
	t.Helper()
	tmp, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, holdfast, append([]string{"demo"}, flags...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	said, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var told strings.Builder
	for lines := bufio.NewScanner(said); lines.Scan(); {
		told.WriteString(lines.Text() + "\n")
		if strings.HasPrefix(lines.Text(), "Serving until Ctrl-C") {
			dirs, _ := filepath.Glob(filepath.Join(tmp, "*", "run"))
			then(cmd.Process, strings.Join(dirs, " and "))
		}
	}
	cmd.Wait() // the code says how
	wantEmpty(t, tmp)
	return told.String() + complaint.String(), cmd.ProcessState.ExitCode()
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestTheConfigurationIsGood(t *testing.T) {
	t.Parallel()
	c, err := config.Parse("holdfast.toml", []byte(configuration("127.0.0.1:4711", 3)))
	if err != nil {
		t.Fatal(err)
	}
	if routes := c.VirtualHosts[0].Routes; len(routes) != 5 || routes[2].Match.Path != addedPath(3) || !routes[3].WebSocket {
		t.Errorf("routes are %+v", routes)
	}
}

// TestWhatIsLostIsNoticed shows that the demo cannot say "0 lost" out of blindness.
func TestWhatIsLostIsNoticed(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		spoil func(*websocket.Conn, []byte) []byte // nil closes
		want  string
	}{
		"a byte that is changed": {func(_ *websocket.Conn, b []byte) []byte { b[len(b)-1] ^= 1; return b }, "another came back"},
		"a message too many": {func(c *websocket.Conn, b []byte) []byte {
			c.Write(context.Background(), websocket.MessageText, b)
			return b
		}, "another came back"},
		"a connection that is cut": {func(c *websocket.Conn, b []byte) []byte { c.CloseNow(); return nil }, "lost message 20"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				conn, err := websocket.Accept(w, r, nil)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.CloseNow()
				for n := 1; ; n++ {
					_, message, err := conn.Read(r.Context())
					if err != nil {
						return
					}
					if n == 20 {
						message = test.spoil(conn, message)
					}
					if conn.Write(r.Context(), websocket.MessageText, message) != nil {
						return
					}
				}
			}))
			defer server.Close()
			talk, err := openTalk(t.Context(), server.URL, 1)
			if err != nil {
				t.Fatal(err)
			}
			defer talk.close()
			if err := talk.waitFor(t.Context(), 1000); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			if !strings.Contains(talk.String(), "1 lost, 0 WebSockets open") {
				t.Errorf("it says %q", talk)
			}
		})
	}
}

func TestTheUpstream(t *testing.T) {
	t.Parallel()
	in, end := io.Pipe()
	out, addresses := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- serveUpstream(in, addresses) }()
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + strings.TrimSpace(address)
	transport := &http.Transport{DisableKeepAlives: true}
	get := func(path, accept string) *http.Response {
		request, err := http.NewRequestWithContext(t.Context(), "GET", url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Accept", accept)
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { response.Body.Close() })
		return response
	}
	if text, _ := io.ReadAll(get("/", "*/*").Body); !strings.HasPrefix(string(text), "hello from the echo server") {
		t.Errorf("a tool gets %q", text)
	}
	if text, _ := io.ReadAll(get("/", "text/html").Body); !bytes.Equal(text, page) {
		t.Errorf("a browser gets %q", text)
	}
	events := get("/events", "text/event-stream")
	if line, err := bufio.NewReader(events.Body).ReadString('\n'); err != nil || !strings.HasPrefix(line, "data: ") {
		t.Errorf("the first event is %q, %v", line, err)
	}
	events.Body.Close()
	talk, err := openTalk(t.Context(), url+"/echo", 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := talk.waitFor(t.Context(), 100); err != nil {
		t.Error(err)
	}
	talk.close()
	end.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", strings.TrimSpace(address)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after its end: %v", err)
	}
}
