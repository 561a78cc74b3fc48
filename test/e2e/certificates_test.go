package e2e

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/supervisor"
	"holdfast/internal/tlstest"
)

const certificates = `
[log]
level = "debug"
[[listeners]]
name = "https"
address = "127.0.0.1:0"
tls = { certificates = [{ cert = "{dir}/first.pem", key = "{dir}/first.key" }, { cert = "{dir}/a.pem", key = "{dir}/a.key" }, { cert = "{dir}/wild.pem", key = "{dir}/wild.key" }] }
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [{ match = { prefix = "/" }, direct_response = { status = 200, body = "here" } }]
`

// certified is a service with several certificates.
type certified struct {
	*instance
	authority *tlstest.Authority
	at        string
	text      string
}

func certify(t *testing.T) (s *certified, leaves map[string]*tlstest.Leaf) {
	t.Helper()
	s = &certified{instance: newInstance(t, ""), authority: tlstest.NewAuthority(t)}
	leaves = map[string]*tlstest.Leaf{"first": s.leaf("first.test"), "a": s.leaf("a.test"), "wild": s.leaf("*.b.test")}
	for name, l := range leaves {
		l.Files(s.dir, name)
	}
	s.text = noProbation + strings.ReplaceAll(certificates, "{dir}", s.dir)
	s.write(s.text)
	s.start(nil)
	s.at = s.address("https")
	return s, leaves
}

func (s *certified) leaf(name string) *tlstest.Leaf { return s.authority.Leaf([]string{name}) }

// dial connects as a client that asks for a server, and returns the serial number of the certificate that it got.
func (s *certified) dial(server string) (c *tls.Conn, serial string) {
	s.t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", s.at, &tls.Config{ServerName: server, InsecureSkipVerify: true})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c, c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func serialOf(l *tlstest.Leaf) string { return l.Certificate.Leaf.SerialNumber.String() }

// wantServed waits until a server has this certificate.
func (s *certified) wantServed(server string, want *tlstest.Leaf) {
	s.t.Helper()
	got := ""
	eventually(s.t, func() bool {
		var c *tls.Conn
		c, got = s.dial(server)
		c.Close()
		return got == serialOf(want)
	}, func() string { return fmt.Sprintf("%s has certificate %s, not %s", server, got, serialOf(want)) })
}

func (s *certified) get(c *tls.Conn) {
	s.t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")); err != nil {
		s.t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, err := c.Read(answer)
	if err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 200") {
		s.t.Fatalf("%q, %v", answer[:n], err)
	}
}

func (s *certified) wantMetric(name string, value string) {
	s.t.Helper()
	eventually(s.t, func() bool {
		_, out, _ := s.holdfast("metrics")
		return strings.Contains(out, name+" "+value+"\n")
	}, func() string { _, out, _ := s.holdfast("metrics"); return name + " " + value + " is not in\n" + out })
}

// wantShown says that this certificate is shown of a file, and, unless problem is empty, what is wrong with the file.
func (s *certified) wantShown(file string, want *tlstest.Leaf, problem string) {
	s.t.Helper()
	code, out, errs := s.holdfast("certs", "--json")
	var all supervisor.Certificates
	if err := json.Unmarshal([]byte(out), &all); code != 0 || err != nil {
		s.t.Fatalf("exit code %d, %v: %s%s", code, err, out, errs)
	}
	if strings.Contains(out, "PRIVATE KEY") {
		s.t.Error("a key is shown")
	}
	leaf := want.Certificate.Leaf
	for _, c := range all.Certificates {
		if c.File != filepath.Join(s.dir, file) {
			continue
		}
		if c.Listener != "https" || c.Serial != leaf.SerialNumber.Text(16) || !c.Expires.Equal(leaf.NotAfter) || !slices.Equal(c.Names, leaf.DNSNames) ||
			(c.Problem == "") != (problem == "") || !strings.Contains(c.Problem, problem) {
			s.t.Errorf("%s is shown as %+v", file, c)
		}
		return
	}
	s.t.Errorf("%s is not shown:\n%s", file, out)
}

// killServing kills what serves, and waits for what takes its place.
func (s *certified) killServing() {
	s.t.Helper()
	killed := s.wait("a serving generation", func(s *status) bool { return s.serving() != nil }).serving()
	syscall.Kill(killed.PID, syscall.SIGKILL)
	s.wait("another one", func(s *status) bool { return s.serving() != nil && s.serving().Number > killed.Number })
}

// Certificates change while connections go on, and without another generation.
func TestCertificatesAreChosenAndSwapped(t *testing.T) {
	t.Parallel()
	s, leaves := certify(t)
	for server, name := range map[string]string{"a.test": "a", "x.b.test": "wild", "y.x.b.test": "first", "": "first"} {
		if _, got := s.dial(server); got != serialOf(leaves[name]) {
			t.Errorf("%q got another certificate than %s", server, name)
		}
	}
	open, _ := s.dial("a.test")
	s.get(open)
	next := s.leaf("a.test")
	next.Files(s.dir, "a")
	s.wantServed("a.test", next)
	s.get(open)
	s.wantMetric(fmt.Sprintf(`holdfast_downstream_tls_file_updates_total{file="%s/a.pem",listener="https"}`, s.dir), "1")
	s.wantMetric(fmt.Sprintf(`holdfast_downstream_tls_certificate_expiry_days{certificate="%s/a.pem",listener="https"}`, s.dir), "0")
	s.wantStates("1 serving")
}

// What is of no use is refused, by whoever looks at it, and what was served is served on, by
// whoever takes the place of a dead generation as well.
func TestABrokenCertificateEndsNothing(t *testing.T) {
	t.Parallel()
	s, leaves := certify(t)
	next := s.leaf("a.test")
	next.Files(s.dir, "a")
	s.wantServed("a.test", next) // which is not what it was started with

	tlstest.Write(t, s.dir, "a.pem", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n"))
	if err := os.Remove(filepath.Join(s.dir, "wild.key")); err != nil {
		t.Fatal(err)
	}
	s.wantMetric(`holdfast_downstream_tls_files_refused{listener="https"}`, "2")
	wantLog(t, s.instance, "a file of a listener's TLS is of no use", "a.pem")
	s.wantServed("a.test", next)
	s.wantShown("a.pem", next, "any PEM data")
	s.wantShown("wild.pem", leaves["wild"], "no such file")
	s.wantShown("first.pem", leaves["first"], "")
	s.wantRefused(s.text, 2, filepath.Join(s.dir, "a.pem"))
	if code, _, errs := s.holdfast("check", "-c", s.config()); code == 0 || !strings.Contains(errs, "wild.key") {
		t.Errorf("check: exit code %d, %s", code, errs)
	}

	s.killServing()
	s.wantServed("a.test", next)
	s.wantServed("x.b.test", leaves["wild"])
	s.wantShown("wild.pem", leaves["wild"], "no such file")
	s.wantMetric(`holdfast_downstream_tls_files_refused{listener="https"}`, "2")

	// Another supervisor has it from the generation.
	handed := strings.Count(s.log.String(), "copies of files are kept")
	s.crash()
	s.launch(nil)
	eventually(t, func() bool { return strings.Count(s.log.String(), "copies of files are kept") > handed }, func() string { return "the next supervisor does not ask for copies" })
	s.killServing()
	s.wantServed("a.test", next)

	last := s.leaf("a.test")
	last.Files(s.dir, "a")
	leaves["wild"].Files(s.dir, "wild")
	s.wantServed("a.test", last)
	s.reload(s.text + "# again\n")
	s.wantServed("a.test", last)
	s.wantShown("a.pem", last, "")
	if strings.Contains(s.log.String(), "PRIVATE KEY") {
		t.Error("the log has a key")
	}
}

// Generations that drain for the sake of a tunnel say nothing of files that only who serves has a
// use for, until they serve again.
func TestOnlyWhoServesWatchesCertificates(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	s := seal(t, strings.ReplaceAll(`
[[listeners]]
name = "tunnels"
address = "127.0.0.1:0"
protocol = "tcp"
cluster = "echo"
tls = { {tls} }
[[clusters]]
name = "echo"
endpoints = ["{echo}"]
`, "{echo}", l.Addr().String()))
	for range 2 {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", s.at["tunnels"], s.client())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		s.text += "# again\n"
		s.reload(s.text)
	}
	s.wantStates("3 serving, 2 draining, 1 draining")
	tlstest.Write(t, s.dir, "a.pem", []byte("nonsense"))
	refused := func() string {
		_, out, _ := s.holdfast("metrics")
		return out
	}
	eventually(t, func() bool {
		return strings.Contains(refused(), `holdfast_downstream_tls_files_refused{listener="tunnels"} 1`)
	}, func() string { return "it is not refused" })
	s.authority.Leaf([]string{"a.test"}).Files(s.dir, "a")
	updates := fmt.Sprintf(`holdfast_downstream_tls_file_updates_total{file="%s/a.pem",listener="tunnels"} `, s.dir)
	eventually(t, func() bool { return strings.Contains(refused(), updates+"1\n") }, func() string { return "the next is not taken once:\n" + refused() })
	if n := strings.Count(s.log.String(), "a file of a listener's TLS is of no use"); n != 1 {
		t.Errorf("%d generations say that a file is of no use", n)
	}
	wantLog(t, s.instance, "no certificate is for these any more", "*.b.test")
}
