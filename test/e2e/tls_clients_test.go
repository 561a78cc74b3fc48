package e2e

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/tlstest"
)

// What a client that is made for it finds wrong with the defaults.
func TestTestsslFindsNothing(t *testing.T) {
	t.Parallel()
	testssl := requireTool(t, "testssl")
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Strict-Transport-Security", "max-age=31536000") // fields are the application's
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("X-Frame-Options", "DENY")
		w.Header().Set("Content-Security-Policy", "default-src 'self'")
		io.WriteString(w, "hello\n")
	}))
	t.Cleanup(backend.Close)
	dir := t.TempDir()
	authority := tlstest.NewAuthority(t)
	certificate, key := authority.Leaf([]string{"127.0.0.1", "localhost"}, tlstest.Valid(time.Now().Add(-time.Hour), time.Now().Add(90*24*time.Hour)),
		tlstest.Change(func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://crl.invalid/"} })).Files(dir, "public")
	i := serve(t, withTLS(simple(backend.Listener.Addr().String(), ""), certificate, key, ""))

	found := filepath.Join(dir, "found.json")
	cmd := exec.Command(testssl, "--quiet", "--color", "0", "--warnings", "off", "--severity", "MEDIUM",
		"--add-ca", authority.File(dir, "ca"), "--jsonfile", found, "https://"+i.address("public"))
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	out, err := cmd.CombinedOutput()
	var findings []struct{ ID, Severity, Finding string }
	data, readErr := os.ReadFile(found)
	if readErr != nil || json.Unmarshal(data, &findings) != nil {
		t.Fatalf("%v, %v, %s\n%s", err, readErr, data, out)
	}
	for _, f := range findings {
		if slices.Contains([]string{"MEDIUM", "HIGH", "CRITICAL", "FATAL"}, f.Severity) {
			t.Errorf("%s: %s: %s", f.Severity, f.ID, f.Finding)
		}
	}
	if !strings.Contains(string(out), "TLS 1.3") {
		t.Errorf("nothing was tested:\n%s", out)
	}
}

// openssl speaks as it is told to.
func TestOpenssl(t *testing.T) {
	t.Parallel()
	openssl := requireTool(t, "openssl")
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "hello over %s\n", r.Proto) }))
	t.Cleanup(backend.Close)
	dir := t.TempDir()
	authority := tlstest.NewAuthority(t)
	certificate, key := authority.Leaf([]string{"127.0.0.1", "localhost"}).Files(dir, "public")
	ca := authority.File(dir, "ca")
	i := serve(t, withTLS(simple(backend.Listener.Addr().String(), ""), certificate, key, ""))
	for name, c := range map[string]struct {
		options []string
		want    string // in what it says
	}{
		"TLS 1.3":     {[]string{"-tls1_3"}, "hello over"},
		"TLS 1.2":     {[]string{"-tls1_2"}, "hello over"},
		"ALPN":        {[]string{"-alpn", "http/1.1"}, "ALPN protocol: http/1.1"},
		"ALPN of two": {[]string{"-alpn", "h2,http/1.1"}, "ALPN protocol: h2"},
		"TLS 1.1":     {[]string{"-tls1_1", "-cipher", "ALL:@SECLEVEL=0"}, "alert protocol version"},
		"a bad suite": {[]string{"-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"}, "alert handshake failure"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(openssl, append([]string{"s_client", "-connect", i.address("public"), "-CAfile", ca, "-verify_return_error", "-servername", "localhost", "-ign_eof"}, c.options...)...)
			cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
			if out, err := cmd.CombinedOutput(); !strings.Contains(string(out), c.want) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
