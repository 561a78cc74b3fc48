package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What `holdfast route` says becomes of a request is what becomes of it.
func TestRequestsGetTheRoutesThatAreExplained(t *testing.T) {
	t.Parallel()
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Host, r.URL.RequestURI()) // each route gives the host of its own
	}))
	t.Cleanup(backend.Close)
	route := func(match, host string) string {
		return fmt.Sprintf("[[virtual_hosts.routes]]\nname = %q\nmatch = { %s }\nhost_rewrite = %q\ncluster = \"web\"\n", host, match, host)
	}
	i := serve(t, fmt.Sprintf(`
[[listeners]]
name = "public"
address = "127.0.0.1:0"

[[clusters]]
name = "web"
endpoints = [%q]

[[virtual_hosts]]
name = "api"
domains = ["*.example.com"]
`, backend.Listener.Addr())+
		route(`prefix = "/seg", segments = true`, "segments")+
		route(`prefix = "/Case", case_sensitive = false`, "case")+
		route(`regex = "/v[0-9]+/[a-z]*"`, "regex")+
		route(`prefix = "/", methods = ["DELETE"]`, "method")+
		route(`prefix = "/", headers = [{ name = "X-Version", exact = "1,2" }]`, "lines")+
		route(`prefix = "/", headers = [{ name = "X-Shard", range = [0, 16] }, { name = "X-Debug", present = true, invert = true }]`, "range")+
		route(`prefix = "/", query = [{ name = "lang", prefix = "de" }]`, "query")+
		route(`prefix = "/", sources = ["127.0.0.0/8"], headers = [{ name = "X-Who", present = true }]`, "source")+
		route(`prefix = "/", fraction = { percent = 0 }`, "never")+
		route(`path = "/else"`, "path")+
		route(`prefix = "/", fraction = { percent = 100 }`, "rest")+`
[[virtual_hosts]]
name = "any"
domains = ["*"]
`+route(`prefix = "/any"`, "any"))

	var tests strings.Builder
	for _, tt := range []struct {
		method, host, target string
		headers              []string
		want                 string // "": none
	}{
		{"GET", "a.example.com", "/seg", nil, "segments"},
		{"GET", "a.example.com", "/seg/x?y", nil, "segments"},
		{"GET", "a.example.com", "/segx", nil, "rest"},
		{"GET", "A.Example.com:80", "/cASEs", nil, "case"},
		{"GET", "a.example.com", "/v12/abc", nil, "regex"},
		{"GET", "a.example.com", "/v12/abc/", nil, "rest"},
		{"DELETE", "a.example.com", "/v12/abc/", nil, "method"},
		{"GET", "a.example.com", "/", []string{"x-version: 1", "X-VERSION: 2"}, "lines"},
		{"GET", "a.example.com", "/", []string{"X-Version: 2", "X-Version: 1"}, "rest"},
		{"GET", "a.example.com", "/", []string{"X-Shard: 15"}, "range"},
		{"GET", "a.example.com", "/", []string{"X-Shard: 16"}, "rest"},
		{"GET", "a.example.com", "/", []string{"X-Shard: 1", "X-Debug: "}, "rest"},
		{"GET", "a.example.com", "/?x=1&lang=de-AT", nil, "query"},
		{"GET", "a.example.com", "/?xlang=de-AT", nil, "rest"},
		{"GET", "a.example.com", "/else", []string{"X-Who: me"}, "source"},
		{"GET", "a.example.com", "/else", nil, "path"},
		{"GET", "example.com", "/any", nil, "any"},
		{"GET", "example.com", "/else", nil, ""},
	} {
		name := fmt.Sprintf("%s %s%s %q", tt.method, tt.host, tt.target, tt.headers)
		got := raw(t, i.address("public"), tt.method, tt.host, tt.target, tt.headers)
		want, expect := "404 404 Not Found", `{ route = "none", status = 404 }`
		if tt.want != "" {
			want = "200 " + tt.want + tt.target
			expect = fmt.Sprintf("{ host = %q, target = %q, cluster = \"web\" }", tt.want, tt.target)
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		fmt.Fprintf(&tests, "[[tests]]\nname = '%s'\nmethod = %q\nurl = %q\nclient = \"127.0.0.1\"\nexpect = %s\n", name, tt.method, "http://"+tt.host+tt.target, expect)
		if tt.headers != nil {
			fmt.Fprintf(&tests, "headers = [\"%s\"]\n", strings.Join(tt.headers, `", "`))
		}
	}
	file := filepath.Join(i.dir, "routes.toml")
	try := func(text string) (int, string, string) {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return i.holdfast("route", "-c", i.config(), "--test", file)
	}
	if code, out, errs := try(tests.String()); code != 0 || out != "18 of 18 requests get what is expected\n" {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	if code, out, errs := try(strings.Replace(tests.String(), `host = "lines"`, `host = "other"`, 1)); code != 1 || !strings.Contains(out, "host: lines, expected other") {
		t.Errorf("of an expectation that is not met: exit code %d: %s%s", code, out, errs)
	}
	if code, out, errs := try("[[tests]]\nname = 1\n"); code != 2 || !strings.Contains(errs, file+":2: tests[0].name") {
		t.Errorf("of a file with a mistake: exit code %d: %s%s", code, out, errs)
	}
	code, out, errs := i.holdfast("route", "-c", i.config(), "GET", "http://a.example.com/else", "-H", "X-Who: me", "--client", "10.0.0.1")
	if code != 0 || !strings.Contains(out, "route: api:path") || !strings.Contains(out, "api:source: the client 10.0.0.1 is not in 127.0.0.0/8") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
}

// raw sends a request as it stands, and returns the status and the body of the answer.
func raw(t *testing.T, address, method, host, target string, headers []string) string {
	t.Helper()
	w := dialWire(t, "tcp", address)
	w.send(request(method+" "+target+" HTTP/1.1", append([]string{"Host: " + host, "Connection: close"}, headers...)...))
	resp, err := http.ReadResponse(w.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, strings.TrimSuffix(string(body), "\n"))
}

// What it says that Holdfast answers by itself, and what an upstream gets, is so.
func TestAnswersAreThoseThatAreExplained(t *testing.T) {
	t.Parallel()
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.RequestURI()) }))
	t.Cleanup(backend.Close)
	i := serve(t, fmt.Sprintf(`
[[listeners]]
name = "public"
address = "127.0.0.1:0"
trusted_proxies = ["127.0.0.1"]
health_check = { path = "/healthz" }
deny = ["192.0.2.0/24"]

[[clusters]]
name = "web"
endpoints = [%q]

[[virtual_hosts]]
name = "site"
domains = ["*"]
[[virtual_hosts.routes]]
match = { path = "/hello" }
direct_response = { status = 202, body = "/hello" }
[[virtual_hosts.routes]]
match = { prefix = "/old/" }
redirect = { prefix_rewrite = "/new/", status = 308 }
[[virtual_hosts.routes]]
match = { prefix = "/seam" }
prefix_rewrite = "/"
cluster = "web"
[[virtual_hosts.routes]]
match = { prefix = "/v" }
regex_rewrite = { pattern = "^/v[0-9]*", substitution = "" }
cluster = "web"
[[virtual_hosts.routes]]
match = { prefix = "/named" }
cluster_header = "X-Cluster"
host_rewrite_header = "X-Host"
[[virtual_hosts.routes]]
match = { prefix = "/fault" }
cluster = "web"
allow = ["198.51.100.0/24"]
cors = { allow_origins = ["https://a.test"] }
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "web"
`, backend.Listener.Addr()))
	var tests strings.Builder
	n := 0
	for _, tt := range []struct {
		method, target, client string
		headers                []string
		status                 int    // 0: the upstream answers
		want                   string // that it gets
	}{
		{"GET", "/x/../hello", "", nil, 202, ""},
		{"GET", "/%2f", "", nil, 400, ""},
		{"GET", "/healthz", "192.0.2.1", nil, 200, ""},
		{"POST", "/healthz", "", nil, 0, "/healthz"},
		{"GET", "/hello", "192.0.2.1", nil, 403, ""},
		{"GET", "/old/x", "", nil, 308, ""},
		{"GET", "/seam../x", "", nil, 400, ""},
		{"GET", "/seam/x", "", nil, 0, "//x"},
		{"GET", "/v1/x?y", "", nil, 0, "/x?y"},
		{"GET", "/v1", "", nil, 400, ""},
		{"GET", "/named", "", []string{"X-Cluster: web"}, 0, "/named"},
		{"GET", "/named", "", []string{"X-Cluster: other"}, 404, ""},
		{"GET", "/named", "", []string{"X-Cluster: web", "X-Host: a/b"}, 400, ""},
		{"GET", "/fault", "", nil, 403, ""},
		{"GET", "/fault", "198.51.100.7", nil, 0, "/fault"},
		{"OPTIONS", "/fault", "", []string{"Origin: https://a.test", "Access-Control-Request-Method: PUT"}, 200, ""},
		{"GET", "//a/%7eb", "", nil, 0, "/a/~b"},
	} {
		client := tt.client
		if client == "" {
			client = "203.0.113.1"
		}
		n++
		name := fmt.Sprintf("%d %s %s from %s %q", n, tt.method, tt.target, client, tt.headers)
		got := raw(t, i.address("public"), tt.method, "a.test", tt.target, append([]string{"X-Forwarded-For: " + client}, tt.headers...))
		want, expect := "200 "+tt.want, fmt.Sprintf("{ target = %q }", tt.want)
		if tt.status != 0 {
			want, expect = fmt.Sprint(tt.status), fmt.Sprintf("{ status = %d }", tt.status)
			got, _, _ = strings.Cut(got, " ")
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		fmt.Fprintf(&tests, "[[tests]]\nname = '%s'\nmethod = %q\nurl = %q\nclient = %q\nexpect = %s\n", name, tt.method, "http://a.test"+tt.target, client, expect)
		if tt.headers != nil {
			fmt.Fprintf(&tests, "headers = [\"%s\"]\n", strings.Join(tt.headers, `", "`))
		}
	}
	file := filepath.Join(i.dir, "routes.toml")
	if err := os.WriteFile(file, []byte(tests.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, out, errs := i.holdfast("route", "-c", i.config(), "--test", file); code != 0 || out != fmt.Sprintf("%d of %d requests get what is expected\n", n, n) {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
}
