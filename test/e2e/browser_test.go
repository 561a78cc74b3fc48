package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/coder/websocket"
)

// page opens one WebSocket, talks over it without end, and reports.
const page = `<!doctype html><title>talk</title><script>
const state = {echoed: 0, faults: [], protocol: performance.getEntriesByType("navigation")[0].nextHopProtocol};
const report = () => fetch("/report", {method: "POST", body: JSON.stringify(state)}).catch(() => {});
const ws = new WebSocket(location.origin.replace(/^http/, "ws") + "/ws");
let n = 0;
const next = () => ws.send("message " + ++n);
ws.onopen = next;
ws.onmessage = e => {
	if (e.data !== "message " + n) state.faults.push("sent " + n + ", got " + e.data);
	state.echoed++;
	setTimeout(next, 5);
};
ws.onclose = e => { state.faults.push("closed: " + e.code); report(); };
ws.onerror = () => state.faults.push("error");
setInterval(report, 50);
</script>`

// requireTool skips the test where a program of the machine is missing; in CI that
// is a failure.
func requireTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("HOLDFAST_TEST_REQUIRE_TOOLS") == "1" {
		t.Fatalf("%s is missing: see test/install-tools", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// pageState is what the page reports.
type pageState struct {
	Echoed   int      `json:"echoed"`
	Faults   []string `json:"faults"`
	Protocol string   `json:"protocol"` // that has brought the page
}

// pageServer is a server with the page and its WebSocket.
type pageServer struct {
	*httptest.Server
	seen   atomic.Pointer[pageState] // the last report
	opened atomic.Int64              // WebSockets
}

func newPageServer(t *testing.T) *pageServer {
	k := new(pageServer)
	k.seen.Store(new(pageState))
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, page)
	})
	mux.HandleFunc("/report", func(w http.ResponseWriter, r *http.Request) {
		s := new(pageState)
		if json.NewDecoder(r.Body).Decode(s) == nil {
			k.seen.Store(s)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		// The page's Origin is the proxy, and so is the Host that it sends.
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		k.opened.Add(1)
		for {
			kind, data, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), kind, data) != nil {
				return
			}
		}
	})
	k.Server = httptest.NewServer(mux)
	t.Cleanup(k.Close)
	return k
}

// holdsOver waits for the page to talk, before and after each of ten reloads.
func (k *pageServer) holdsOver(t *testing.T, i *instance, config func(n int) string) {
	t.Helper()
	progress := func() {
		t.Helper()
		from := k.seen.Load().Echoed
		eventually(t, func() bool { s := k.seen.Load(); return s.Echoed > from+10 || len(s.Faults) > 0 },
			func() string { return "the page to talk" })
	}
	progress()
	for n := range 10 {
		i.reload(config(n + 1))
		progress()
	}
	if s := k.seen.Load(); len(s.Faults) > 0 || k.opened.Load() != 1 {
		t.Errorf("%d messages echoed over %d WebSockets; the page saw %q", s.Echoed, k.opened.Load(), s.Faults)
	}
}

func TestABrowsersWebSocketStaysOpenOverReloads(t *testing.T) {
	t.Parallel()
	chromium := requireTool(t, "chromium")
	k := newPageServer(t)
	config := func(n int) string {
		return simple(k.Listener.Addr().String(), fmt.Sprintf("# %d\n[reload]\nprobation = \"50ms\"\n", n))
	}
	i := serve(t, config(0))
	browse(t, chromium, "http://"+i.address("public")+"/")
	k.holdsOver(t, i, config)
}

// browse opens a page in a browser without a window until the test ends.
func browse(t *testing.T, chromium, url string) {
	t.Helper()
	home, err := os.MkdirTemp("", "b")
	if err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	cmd := exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+home, url)
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it is many processes
		cmd.Wait()
		os.RemoveAll(home)
		if t.Failed() {
			t.Logf("log of the browser:\n%s", log.String())
		}
	})
}
