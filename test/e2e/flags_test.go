package e2e

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// What a route does to a request on purpose, and what a limit has kept from it, is in the
// record of an ordinary request as in that of an upgrade. A reload changes nothing of it,
// but that buckets of tokens are full again.
func TestRecordsTellWhatWasDoneOnPurpose(t *testing.T) {
	t.Parallel()
	tests := []struct {
		path              string
		keys              string // of the route
		request, upgraded string // the status and the flags of their records
	}{
		{"/passes", "", "200 -", "101 -"},
		{"/rate", `rate_limit = { requests = 1, per = "1h" }`, "429 RL", "101 -"},
		{"/tunnels", `tunnel_rate_limit = { tunnels = 1, per = "1h" }`, "200 -", "429 RL"},
		{"/delay", `fault = { delay = { percent = 100, duration = "1ms" } }`, "200 DI", "101 DI"},
		{"/abort", `fault = { abort = { percent = 100, status = 418 } }`, "418 FI", "418 FI"},
		{"/both", `fault = { delay = { percent = 100, duration = "1ms" }, abort = { percent = 100, status = 418 } }`, "418 DI,FI", "418 DI,FI"},
		{"/runtime", `fault = { abort = { percent = 0, status = 418, runtime_key = "faults" } }`, "418 FI", "418 FI"},
		{"/denied", `deny = ["127.0.0.0/8"]`, "403 -", "403 -"},
		{"/unauthorized", `authorize = { cluster = "sour" }`, "401 UAEX", "401 UAEX"},
		{"/unasked", `authorize = { cluster = "refusing" }`, "403 UAEX", "403 UAEX"},
		{"/open", `authorize = { cluster = "refusing", on_error = "allow" }`, "200 -", "101 -"},
		{"/requests", `authorize = { cluster = "sour" }, authorize_upgrades = false`, "401 UAEX", "101 -"},
		{"/tried", `cluster = "sour", retry = { on = ["retriable-status-codes"], status_codes = [401], attempts = 1, backoff = { base = "1ms" } }`, "401 URX", "401 -"},
		{"/overflow", `cluster = "spent", retry = { on = ["retriable-status-codes"], status_codes = [401] }`, "401 UO", "401 -"},
		{"/unreachable", `cluster = "refusing", retry = { on = ["connect-failure"], attempts = 1, backoff = { base = "1ms" } }`, "503 UF,URX", "503 UF"},
		{"/field", `cluster_header = "X-None"`, "404 NC", "404 NC"},
		{"/fraction", `match = { prefix = "/fraction", fraction = { percent = 100, runtime_key = "share" } }`, "404 NR", "404 NR"},
	}
	var routes strings.Builder
	for _, tt := range tests {
		keys := []string{"websocket = true"}
		if tt.keys != "" {
			keys = append(keys, tt.keys)
		}
		if !strings.Contains(tt.keys, "match =") {
			keys = append(keys, fmt.Sprintf("match = { prefix = %q }", tt.path))
		}
		if !strings.HasPrefix(tt.keys, "cluster") {
			keys = append(keys, `cluster = "up"`)
		}
		fmt.Fprintf(&routes, "  { %s },\n", strings.Join(keys, ", "))
	}
	sour := server(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }))
	i := newInstance(t, "")
	config := func(more string) string {
		return fmt.Sprintf(`
%s
[reload]
probation = "0s"
[[access_logs]]
path = %q
text_format = "%%REQ(:PATH)%% %%REQ(X-Kind)%% %%RESPONSE_CODE%% %%RESPONSE_FLAGS%%"
events = ["request", "tunnel_open"]
[[access_logs]]
path = %q
text_format = "%%REQ(:PATH)%% %%RESPONSE_CODE%%"
events = ["request", "tunnel_open"]
filter = { health_checks = false }
[[listeners]]
name = "public"
address = "127.0.0.1:0"
health_check = { path = "/healthz" }
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [
%s]
[[clusters]]
name = "up"
endpoints = [%q]
[[clusters]]
name = "sour"
endpoints = [%[6]q]
[[clusters]]
name = "spent"
endpoints = [%[6]q]
retry_budget = { percent = 0, min_concurrency = 0 }
[[clusters]]
name = "refusing"
endpoints = [%[7]q]
`, more, filepath.Join(i.dir, "all.log"), filepath.Join(i.dir, "traffic.log"), &routes, named(t, "up"), sour, refusing(t))
	}
	i.write(config(""))
	i.start(nil)
	address := i.address("public")
	run := func(args ...string) {
		t.Helper()
		if code, _, errs := i.holdfast(args...); code != 0 {
			t.Fatalf("holdfast %q: exit code %d: %s", args, code, errs)
		}
	}
	// ask returns the status of one more request, or of an upgrade.
	ask := func(path, kind string, fields ...string) string {
		t.Helper()
		w := dialWire(t, "tcp", address)
		defer w.close()
		w.send(request("GET "+path+" HTTP/1.1", append([]string{"Host: a.test", "X-Kind: " + kind}, fields...)...))
		_, status, _ := strings.Cut(w.head().start(), " ")
		return status[:3]
	}
	run("runtime", "set", "share", "0", "faults", "100")
	run("ready", "off")
	lines, traffic := 0, 0
	for _, generation := range []string{"first", "second"} {
		when := generation + " generation"
		if generation == "second" {
			i.reload(config("# changed"))
		}
		for _, path := range []string{"/rate", "/tunnels"} { // which take the one token
			ask(path, "token")
			ask(path, "token", upgradeFields...)
			lines, traffic = lines+2, traffic+2
		}
		kind := generation + "-check"
		if got := ask("/healthz", kind); got != "503" {
			t.Errorf("%s: a health check is answered with %s", when, got)
		}
		want := []string{"/healthz " + kind + " 503 LH"}
		for _, tt := range tests {
			for kind, record := range map[string]string{generation + "-request": tt.request, generation + "-upgrade": tt.upgraded} {
				var fields []string
				if strings.HasSuffix(kind, "upgrade") {
					fields = upgradeFields
				}
				if got := ask(tt.path, kind, fields...); got != record[:3] {
					t.Errorf("%s: %s %s is answered with %s, want %s", when, kind, tt.path, got, record)
				}
				want = append(want, fmt.Sprintf("%s %s %s", tt.path, kind, record))
			}
		}
		lines, traffic = lines+len(want), traffic+len(want)-1
		got := i.wantLines("all.log", lines)
		for _, w := range want {
			n := 0
			for _, line := range got {
				if line == w {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%s: %d lines %q", when, n, w)
			}
		}
	}
	for _, line := range i.wantLines("traffic.log", traffic) {
		if strings.HasPrefix(line, "/healthz") {
			t.Errorf("a health check is in the log without them: %q", line)
		}
	}
	if t.Failed() {
		t.Log(strings.Join(i.wantLines("all.log", lines), "\n"))
	}

	// What was said about the readiness and the numbers holds until it is taken back.
	run("ready", "on")
	run("runtime", "reset")
	for path, want := range map[string]string{"/healthz": "200", "/fraction": "200", "/runtime": "200"} {
		if got := ask(path, "after"); got != want {
			t.Errorf("%s is answered with %s at the end, want %s", path, got, want)
		}
	}
}
