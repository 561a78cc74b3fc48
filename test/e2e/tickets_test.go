package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/tlstest"
)

// session is a TLS client that has been here before, from its first visit on.
type session struct {
	version uint16
	roots   *x509.CertPool
	cache   tls.ClientSessionCache
}

func newSession(version uint16, roots *x509.CertPool) *session {
	return &session{version, roots, tls.NewLRUClientSessionCache(1)}
}

// visit says whether the session was resumed. It stays until it has an answer, so that it has a
// ticket, too, which is for the next visit.
func (s *session) visit(t *testing.T, address string) (resumed bool) {
	t.Helper()
	c := tls.Client(dial(t, address), &tls.Config{
		ServerName: "a.example", RootCAs: s.roots, ClientSessionCache: s.cache, MinVersion: s.version, MaxVersion: s.version,
	})
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil && err != io.ErrUnexpectedEOF || !strings.HasPrefix(string(answer), fmt.Sprintf("HTTP/1.1 %d", http.StatusOK)) {
		t.Fatalf("%q, %v", answer, err)
	}
	return c.ConnectionState().DidResume
}

// Who has got a ticket resumes the session, whatever has become of the process that made it and of
// whoever has started that.
func TestSessionsAreResumedWhateverBecomesOfProcesses(t *testing.T) {
	t.Parallel()
	authority := tlstest.NewAuthority(t)
	i := newInstance(t, "")
	certificate, key := authority.Leaf([]string{"a.example"}).Files(i.dir, "a")
	config := func(rotation string, n int) string {
		return strings.Replace(simple(newBackend(t), fmt.Sprintf("# %d\n[reload]\nprobation = \"1ms\"\n[tls]\nticket_rotation = %q\n", n, rotation)),
			"[[listeners]]\n", fmt.Sprintf("[[listeners]]\ntls = { certificates = [{ cert = %q, key = %q }] }\n", certificate, key), 1)
	}
	first := config("12h", 1)
	i.write(first)
	i.start(nil)
	address := i.address("public")
	sessions := map[string]*session{
		"TLS 1.2": newSession(tls.VersionTLS12, authority.Pool()),
		"TLS 1.3": newSession(tls.VersionTLS13, authority.Pool()),
	}
	visit := func(when string, want bool) {
		t.Helper()
		for name, s := range sessions {
			if resumed := s.visit(t, address); resumed != want {
				t.Errorf("%s, %s: resumed is %v", when, name, resumed)
			}
		}
	}
	visit("at first", false)
	visit("by the same generation", true)
	i.reload(first + "# 2\n")
	visit("by the next generation", true)

	serving := i.wantStates("2 serving").Generations[0]
	syscall.Kill(serving.PID, syscall.SIGKILL)
	i.wait("a replacement", func(s *status) bool {
		return len(s.Generations) == 1 && s.Generations[0].State == "serving" && s.Generations[0].PID != serving.PID
	})
	visit("by the replacement of a killed one", true)

	before := i.crash()
	visit("without a supervisor", true)
	i.succeed(before)
	i.reload(first + "# 3\n")
	visit("by a generation of another supervisor", true)

	i.upgrade()
	i.reload(first + "# 4\n")
	visit("by a generation of an upgraded supervisor", true)

	if code, out, errs := i.holdfast("tickets", "rotate"); code != 0 || !strings.Contains(out, "other keys") {
		t.Fatalf("tickets rotate: exit code %d\n%s%s", code, out, errs)
	}
	visit("after all keys were dropped", false)
	visit("with the new ones", true)

	rotations := func() float64 {
		_, counters, err := i.scrape()
		if err != nil {
			t.Fatal(err)
		}
		return counters["holdfast_tls_ticket_key_rotations_total{by=schedule}"]
	}
	i.reload(config("1s", 2))
	last := newSession(tls.VersionTLS13, authority.Pool())
	eventually(t, func() bool {
		before := rotations()
		last.visit(t, address)
		return rotations() > before && last.visit(t, address)
	}, func() string { return "a session that is resumed after a rotation" })
	for _, line := range strings.Split(i.log.String(), "\n") {
		if strings.Contains(line, "session tickets") && strings.Contains(line, "level=ERROR") {
			t.Error(line)
		}
	}
}

func TestWithoutTicketsNothingIsResumed(t *testing.T) {
	t.Parallel()
	authority := tlstest.NewAuthority(t)
	i := newInstance(t, "")
	certificate, key := authority.Leaf([]string{"a.example"}).Files(i.dir, "a")
	i.write(strings.Replace(simple(newBackend(t), "[tls]\ntickets = false\n"),
		"[[listeners]]\n", fmt.Sprintf("[[listeners]]\ntls = { certificates = [{ cert = %q, key = %q }] }\n", certificate, key), 1))
	i.start(nil)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		s := newSession(version, authority.Pool())
		for range 2 {
			if s.visit(t, i.address("public")) {
				t.Errorf("%s was resumed", tls.VersionName(version))
			}
		}
	}
}
