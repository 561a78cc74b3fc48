package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/tlstest"
)

// teller answers requests with what it was told of their clients.
func teller(t *testing.T) (address string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s", r.Header.Get("X-Forwarded-Proto"), r.Header.Get("X-Forwarded-Port"), strings.Join(r.Header.Values("X-Forwarded-Client-Cert"), "|"))
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// sealed is a service with TLS.
type sealed struct {
	*instance
	authority *tlstest.Authority
	root      string // its certificate's file
	text      string // the configuration
	at        map[string]string
}

// seal starts a service whose configuration has {tls} where a listener has its certificate, for
// a.test and *.b.test, and {dir} for its directory.
func seal(t *testing.T, config string) *sealed {
	t.Helper()
	s := &sealed{instance: newInstance(t, ""), authority: tlstest.NewAuthority(t)}
	s.root = s.authority.File(s.dir, "root.pem")
	s.authority.Leaf([]string{"a.test", "*.b.test"}).Files(s.dir, "a")
	pair := fmt.Sprintf("certificates = [{ cert = %q, key = %q }]", filepath.Join(s.dir, "a.pem"), filepath.Join(s.dir, "a.key"))
	s.text = noProbation + strings.NewReplacer("{tls}", pair, "{dir}", s.dir).Replace(config)
	s.write(s.text)
	s.start(nil)
	s.at = s.addresses()
	return s
}

// client is what clients have that trust the service.
func (s *sealed) client() *tls.Config {
	return &tls.Config{RootCAs: s.authority.Pool(), ServerName: "a.test"}
}

// web is a client of HTTP/1.1 that connects to a listener, whatever it is asked for.
func (s *sealed) web(listener string, c *tls.Config) *http.Client {
	tr := &http.Transport{TLSClientConfig: c, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.at[listener])
	}}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func (s *sealed) get(c *http.Client, fields ...string) (body string, reused bool) {
	s.t.Helper()
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused }}
	r, err := http.NewRequestWithContext(httptrace.WithClientTrace(s.t.Context(), trace), "GET", "https://a.test/", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		r.Header[name] = append(r.Header[name], value)
	}
	resp, err := c.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		s.t.Fatalf("%d %q, %v", resp.StatusCode, b, err)
	}
	return string(b), reused
}

// run runs a program that is a client.
func run(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	path := requireTool(t, name)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v", name, err)
	}
	return string(out)
}

// Clients of all kinds are served by TLS; what is none of them is closed, and holds up nobody.
func TestTLS(t *testing.T) {
	t.Parallel()
	up := teller(t)
	s := seal(t, fmt.Sprintf(`
[[access_logs]]
path = "{dir}/access.log"
[[listeners]]
name = "https"
address = "127.0.0.1:0"
trusted_hops = 1
[listeners.tls]
{tls}
handshake_timeout = "1s"
[[listeners]]
name = "narrow"
address = "127.0.0.1:0"
[listeners.tls]
{tls}
handshake_timeout = "500ms"
max_handshakes = 1
[[listeners]]
name = "plain"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [{ match = { prefix = "/" }, cluster = "up" }]
[[clusters]]
name = "up"
endpoints = [%q]
`, up))

	const want = "https 443 "
	t.Run("a client keeps its connection", func(t *testing.T) {
		web := s.web("https", s.client())
		for i := range 3 {
			if body, reused := s.get(web); body != want || reused != (i > 0) {
				t.Errorf("%q, reused %v", body, reused)
			}
		}
		if body, _ := s.get(web, "X-Forwarded-Client-Cert: Hash=forged"); body != want {
			t.Errorf("a trusted peer's word: %q", body)
		}
	})
	_, port, _ := net.SplitHostPort(s.at["https"])
	t.Run("curl", func(t *testing.T) {
		for _, version := range []string{"1.2", "1.3"} {
			if got := run(t, "", "curl", "-sS", "--max-time", "20", "--tls-max", version, "--tlsv"+version, "--cacert", s.root, "--resolve", "a.test:"+port+":127.0.0.1", "https://a.test:"+port+"/"); got != "https "+port+" " {
				t.Errorf("%q", got)
			}
		}
	})
	t.Run("openssl", func(t *testing.T) {
		got := run(t, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n", "openssl", "s_client", "-connect", s.at["https"], "-servername", "x.b.test", "-CAfile", s.root,
			"-verify_return_error", "-verify_hostname", "x.b.test", "-alpn", "http/1.1", "-ign_eof")
		for _, part := range []string{"Verify return code: 0 (ok)", "ALPN protocol: http/1.1", "HTTP/1.1 200 OK", want} {
			if !strings.Contains(got, part) {
				t.Errorf("no %q in %s", part, got)
			}
		}
	})
	t.Run("who speaks plain HTTP is told", func(t *testing.T) {
		w := dialWire(t, "tcp", s.at["https"])
		w.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
		w.wantLast(400, "This port speaks TLS: the address begins with https://\n")
	})
	t.Run("garbage is closed at once", func(t *testing.T) {
		for _, garbage := range []string{"SSH-2.0-x\r\n", "\x80\x01\x02", "\x00\x00"} {
			w := dialWire(t, "tcp", s.at["https"])
			w.send(garbage)
			w.wantEOF()
		}
	})
	t.Run("a hello has its time", func(t *testing.T) {
		hello := helloTo(t, "a.test")
		for _, sent := range []string{"", hello[:10], hello} {
			w := dialWire(t, "tcp", s.at["https"])
			w.send(sent)
			if _, err := io.Copy(io.Discard, w.conn); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Error(err)
			}
		}
	})
	t.Run("handshakes wait for each other", func(t *testing.T) {
		stuck := dialWire(t, "tcp", s.at["narrow"])
		stuck.send(helloTo(t, "a.test"))
		if _, err := stuck.r.ReadByte(); err != nil { // it has its turn
			t.Fatal(err)
		}
		web := s.web("narrow", s.client())
		done := make(chan struct{})
		go func() { // the limit is that of the handshake, not of who waits for it
			defer close(done)
			for range 3 { // its own time may be over first
				if resp, err := web.Get("https://a.test/"); err == nil {
					resp.Body.Close()
					return
				}
			}
			t.Error("nobody is served")
		}()
		<-done
	})
	t.Run("without TLS the field is nobody's", func(t *testing.T) {
		w := dialWire(t, "tcp", s.at["plain"])
		w.send(request("GET / HTTP/1.1", "Host: a.test", "X-Forwarded-Client-Cert: Hash=forged", "X_Forwarded_Client_Cert: Hash=twin"))
		w.want(200, "http 80 ")
	})
	s.reload(s.text)
	t.Run("the log has it", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(s.dir, "access.log"))
		if err != nil {
			t.Fatal(err)
		}
		var seen []string
		for line := range strings.Lines(string(text)) {
			var r struct {
				TLS    string `json:"tls_version"`
				Server string `json:"server_name"`
			}
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatal(err)
			}
			seen = append(seen, r.TLS+" "+r.Server)
		}
		for _, want := range []string{"TLSv1.2 a.test", "TLSv1.3 x.b.test", " "} {
			if !strings.Contains("\n"+strings.Join(seen, "\n")+"\n", "\n"+want+"\n") {
				t.Errorf("no %q among %q", want, seen)
			}
		}
	})
}

// What a handshake has shown of a client is told to upstreams, and nothing else is.
func TestClientCertificatesAreTold(t *testing.T) {
	t.Parallel()
	up := teller(t)
	s := seal(t, fmt.Sprintf(`
[[listeners]]
name = "set"
address = "127.0.0.1:0"
[listeners.tls]
{tls}
client_certificates = "optional"
client_ca = "{dir}/root.pem"
forward_client_certificate = "set"
[[listeners]]
name = "required"
address = "127.0.0.1:0"
[listeners.tls]
{tls}
client_certificates = "required"
client_ca = "{dir}/root.pem"
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [{ match = { prefix = "/" }, cluster = "up" }]
[[clusters]]
name = "up"
endpoints = [%q]
`, up))
	forged := "X-Forwarded-Client-Cert: Hash=forged"
	shown := s.client()
	shown.Certificates = []tls.Certificate{s.authority.Leaf([]string{"spiffe://us/me", "me.test"}, tlstest.Client(), tlstest.CommonName("me")).Certificate}
	if body, _ := s.get(s.web("set", s.client()), forged); body != "https 443 " {
		t.Errorf("without a certificate: %q", body)
	}
	shown.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	for range 2 { // the second one resumes the session
		body, _ := s.get(s.web("set", shown), forged)
		if !strings.HasPrefix(body, "https 443 Hash=") || !strings.HasSuffix(body, `;Subject="CN=me";URI=spiffe://us/me;DNS=me.test`) || strings.Contains(body, "forged") {
			t.Errorf("with one: %q", body)
		}
	}
	if body, _ := s.get(s.web("required", shown), forged); body != "https 443 " {
		t.Errorf("by default nothing is told: %q", body)
	}
	if _, err := s.web("required", s.client()).Get("https://a.test/"); err == nil {
		t.Error("who has no certificate is served")
	}
}

// A WebSocket over TLS stays where it is over reloads, and so do terminated connections of other
// protocols.
func TestTunnelsOverTLS(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	s := seal(t, fmt.Sprintf(`
[[listeners]]
name = "https"
address = "127.0.0.1:0"
[listeners.tls]
{tls}
[[listeners]]
name = "tcp"
address = "127.0.0.1:0"
protocol = "tcp"
tcp_routes = [{ server_names = ["a.test"], cluster = "up" }]
[listeners.tls]
{tls}
[[virtual_hosts]]
name = "all"
listeners = ["https"]
domains = ["*"]
routes = [{ match = { prefix = "/" }, websocket = true, cluster = "up" }]
[[clusters]]
name = "up"
endpoints = [%q]
`, up.addr))
	secure := func(listener, server string) *wire {
		t.Helper()
		c := s.client()
		c.ServerName = server
		conn := tls.Client(dial(t, s.at[listener]), c)
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		return &wire{t: t, conn: conn, r: bufio.NewReader(conn)}
	}
	client := secure("https", "a.test")
	client.send(request("GET /ws HTTP/1.1", "Host: a.test", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="))
	server := up.accept(t)
	server.head()
	server.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
	client.wantStart("HTTP/1.1 101 Switching Protocols")

	relayed := secure("tcp", "a.test")
	relayed.send("hello")
	behind := up.accept(t)
	behind.wantBytes("hello")

	other := secure("tcp", "x.b.test") // which has no route
	if _, err := other.r.ReadByte(); err == nil {
		t.Error("who asks for another server is served")
	}
	for range 2 {
		s.reload(s.text)
		for _, pair := range [][2]*wire{{client, server}, {relayed, behind}} {
			pair[0].send("ping")
			pair[1].wantBytes("ping")
			pair[1].send("pong")
			pair[0].wantBytes("pong")
		}
	}
	relayed.conn.(*tls.Conn).CloseWrite()
	behind.wantEOF()
	behind.send("the rest")
	behind.close()
	relayed.wantBytes("the rest")
	relayed.wantEOF()
}
