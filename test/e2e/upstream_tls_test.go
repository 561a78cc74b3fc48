package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/tlstest"
)

// secureServer is an HTTP server that wants certificates of its clients, and answers with the name
// that theirs has. It echoes what comes behind an upgrade.
func secureServer(t *testing.T, leaf *tlstest.Leaf) (address string) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			w.Header().Set("Connection", "close") // so that there is a handshake each time
			fmt.Fprint(w, r.TLS.PeerCertificates[0].DNSNames[0])
			return
		}
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(conn, rw)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{leaf.Certificate}, ClientAuth: tls.RequireAnyClientCert}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// upstreamTLSFile has clusters of the same server: one as it should be, and one with another CA.
const upstreamTLSFile = `
[log]
level = "debug"

[admin]
http = "127.0.0.1:0"
[[access_logs]]
path = "{dir}/access.log"
text_format = '%RESPONSE_CODE% %RESPONSE_FLAGS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%"'
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/stranger" }
cluster = "stranger"
[[virtual_hosts.routes]]
match = { prefix = "/" }
websocket = true
cluster = "app"
[[clusters]]
name = "app"
endpoints = ["{app}"]
health_check = { http = "/", interval = "1s" }
tls = { ca = "{dir}/ca.pem", sni = "app.internal", certificate = { cert = "{dir}/client.pem", key = "{dir}/client.key" } }
[[clusters]]
name = "stranger"
endpoints = ["{app}"]
tls = { ca = "{dir}/other.pem", sni = "app.internal" }
`

func TestUpstreamTLS(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	i := newInstance(t, "")
	client := func(name string) *tlstest.Leaf { return ours.Leaf([]string{name}, tlstest.Client()) }
	ours.File(i.dir, "ca.pem")
	tlstest.NewAuthority(t).File(i.dir, "other.pem")
	client("first").Files(i.dir, "client")
	app := secureServer(t, ours.Leaf([]string{"app.internal"}))
	config := strings.NewReplacer("{dir}", i.dir, "{app}", app).Replace(upstreamTLSFile)
	i.write(config)
	i.start(nil)
	s := &site{i, i.address("public")}
	get := func(path string) (status int, body string) {
		t.Helper()
		c := s.dial()
		defer c.Close()
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: site\r\nConnection: close\r\n\r\n", path)
		b, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		head, body, _ := strings.Cut(string(b), "\r\n\r\n")
		_, _ = fmt.Sscanf(head, "HTTP/1.1 %d", &status)
		return status, body
	}
	if status, body := get("/"); status != 200 || body != "first" { // the generation was not ready before its checks have passed
		t.Errorf("%d, %q", status, body)
	}
	if status, body := get("/stranger"); status != 503 {
		t.Errorf("where another authority is trusted: %d, %q", status, body)
	}
	const failed = "its certificate is signed by an authority that is not known"
	if said := s.run("clusters", "stranger"); !strings.Contains(said, "  last handshake that failed, ") || !strings.Contains(said, failed) {
		t.Errorf("it is shown as\n%s", said)
	}
	const want = `503 UF "its certificate is signed by an authority that is not known"`
	eventually(t, func() bool {
		b, _ := os.ReadFile(filepath.Join(i.dir, "access.log"))
		return strings.Contains(string(b), want)
	}, func() string { return "the access log has no line " + want })

	// A certificate without its key changes nothing, and the two of them hold at once.
	second := client("second")
	tlstest.Write(t, i.dir, "client.pem", second.CertificatePEM())
	i.wantSeries(series{"holdfast_cluster_tls_files_refused_total{cluster=app}": 1})
	tlstest.Write(t, i.dir, "client.key", second.KeyPEM())
	eventually(t, func() bool { _, body := get("/"); return body == "second" }, func() string { return "the new certificate is not shown" })
	if said := s.run("clusters", "app"); !strings.Contains(said, "  TLS, its own certificate expires in 2") {
		t.Errorf("it is shown as\n%s", said)
	}
	if said := s.run("certs"); !strings.Contains(said, "  cluster app") || !strings.Contains(said, filepath.Join(i.dir, "client.pem")) {
		t.Errorf("it is shown as\n%s", said)
	}

	// Who takes the place of a dead generation has what that one has used last.
	eventually(t, func() bool { return strings.Count(i.log.String(), "copies of files are kept") > 1 }, func() string { return "the supervisor does not ask for copies" })
	tlstest.Write(t, i.dir, "client.key", []byte("no key"))
	i.wantSeries(series{"holdfast_cluster_tls_files_refused_total{cluster=app}": 2})
	killed := i.wait("a serving generation", func(s *status) bool { return s.serving() != nil }).serving()
	syscall.Kill(killed.PID, syscall.SIGKILL)
	i.wait("another one", func(s *status) bool { return s.serving() != nil && s.serving().Number > killed.Number })
	if status, body := get("/"); status != 200 || body != "second" {
		t.Errorf("%d, %q", status, body)
	}
	tlstest.Write(t, i.dir, "client.key", second.KeyPEM())
	eventually(t, func() bool { return !strings.Contains(s.run("certs"), "of no use") }, func() string { return "the file is of no use still" })

	// What is of no use is refused before anything is replaced, also by a reload.
	i.wantRefused(strings.Replace(config, "other.pem", "none.pem", 1), 2, `cluster "stranger": tls: open `)
}

// A tunnel goes to its endpoint within TLS, be it that of an upgrade or of a TCP listener.
func TestTunnelsOverUpstreamTLS(t *testing.T) {
	t.Parallel()
	ours := tlstest.NewAuthority(t)
	i := newInstance(t, "")
	ours.File(i.dir, "ca.pem")
	tlstest.NewAuthority(t).File(i.dir, "other.pem")
	ours.Leaf([]string{"client"}, tlstest.Client()).Files(i.dir, "client")
	app := secureServer(t, ours.Leaf([]string{"app.internal"}))
	i.write(strings.NewReplacer("{dir}", i.dir, "{app}", app).Replace(upstreamTLSFile) + `
[[listeners]]
name = "tcp"
address = "127.0.0.1:0"
protocol = "tcp"
cluster = "app"
`)
	i.start(nil)
	for _, listener := range []string{"public", "tcp"} {
		s := &site{i, i.address(listener)}
		c := s.tunnel()
		fmt.Fprint(c, "hello")
		all := make([]byte, 1<<10)
		for n := 0; !strings.HasSuffix(string(all[:n]), "\r\n\r\nhello"); {
			more, err := c.Read(all[n:])
			if n += more; err != nil {
				t.Fatalf("%s: %q, %v", listener, all[:n], err)
			}
		}
		c.Close()
	}
}
