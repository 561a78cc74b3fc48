package e2e

import (
	"bufio"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/tlstest"
)

// withTLS has the only listener of a configuration speak TLS.
func withTLS(config, certificate, key, more string) string {
	const address = "address = \"127.0.0.1:0\"\n"
	return strings.Replace(config, address, fmt.Sprintf("%s%s\n[listeners.tls]\ncertificates = [{ cert = %q, key = %q }]\n", address, more, certificate, key), 1)
}

// The page itself comes over HTTP/2, and its WebSocket over HTTP/1.1, which browsers take for it
// where the server does not offer more.
func TestABrowsersWebSocketOverTLSStaysOpenOverReloads(t *testing.T) {
	t.Parallel()
	k := newPageServer(t)
	leaf := tlstest.NewAuthority(t).Leaf([]string{"127.0.0.1", "localhost"})
	certificate, key := leaf.Files(t.TempDir(), "page")
	config := func(n int) string {
		return withTLS(simple(k.Listener.Addr().String(), fmt.Sprintf("# %d\n[reload]\nprobation = \"50ms\"\n", n)), certificate, key, "")
	}
	i := serve(t, config(0))
	hold(t, "https://"+i.address("public")+"/", leaf, k)
	k.holdsOver(t, i, config)
	if s := k.seen.Load(); s.Protocol != "h2" {
		t.Errorf("the page came over %q", s.Protocol)
	}
}

// hold opens a page in a browser that is driven by playwright until the test ends, and has k see
// what it says. The browser believes the leaf's key.
func hold(t *testing.T, url string, leaf *tlstest.Leaf, k *pageServer) {
	t.Helper()
	chromium, node := requireTool(t, "chromium"), requireTool(t, "node")
	scripts, err := filepath.Abs("../browser")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(scripts, "node_modules")); err != nil {
		if os.Getenv("HOLDFAST_TEST_REQUIRE_TOOLS") == "1" {
			t.Fatal("playwright-core is missing: see test/install-tools")
		}
		t.Skip("playwright-core is not installed")
	}
	home, err := os.MkdirTemp("", "b")
	if err != nil {
		t.Fatal(err)
	}
	pin := sha256.Sum256(leaf.Certificate.Leaf.RawSubjectPublicKeyInfo)
	cmd := exec.Command(node, filepath.Join(scripts, "hold.mjs"), chromium, url, base64.StdEncoding.EncodeToString(pin[:]))
	cmd.Env = append(os.Environ(), "HOME="+home, "TMPDIR="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home)
	log := new(lockedBuffer)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			s := new(pageState)
			if json.Unmarshal(lines.Bytes(), s) == nil {
				k.seen.Store(s)
			}
		}
	}()
	t.Cleanup(func() {
		in.Close() // it ends the browser, which is another group of processes
		select {
		case <-read:
		case <-time.After(patience):
			t.Error("the browser does not end")
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-read
		}
		cmd.Wait()
		os.RemoveAll(home)
		if t.Failed() {
			t.Logf("log of the browser:\n%s", log.String())
		}
	})
}
