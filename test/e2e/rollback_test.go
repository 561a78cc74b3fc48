package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

// saying is a configuration that says at /which which one it is; all else is the endpoint's. Its
// probation is short.
func saying(text, endpoint string) string {
	return fmt.Sprintf(`
[reload]
probation = "50ms"
[[listeners]]
name = "public"
address = "127.0.0.1:0"
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [
  { match = { path = "/which" }, direct_response = { status = 200, body = %q } },
  { match = { prefix = "/" }, websocket = true, cluster = "app" },
]
[[clusters]]
name = "app"
endpoints = [%q]
`, text, endpoint)
}

// wantSays expects the text of what serves.
func (i *instance) wantSays(text string) {
	i.t.Helper()
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	resp, err := fresh.Get("http://" + i.address("public") + "/which")
	if err != nil {
		i.t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || string(got) != text {
		i.t.Fatalf("got %q, %v, want %q", got, err, text)
	}
}

func (i *instance) rollback(want string) {
	i.t.Helper()
	code, out, errs := i.holdfast("rollback", "--wait")
	if code != 0 || !strings.Contains(out, "the next reload puts it into service") || !strings.Contains(out, "passed its probation") {
		i.t.Fatalf("rollback: exit code %d\n%s%s", code, out, errs)
	}
	i.wantSays(want)
}

// awaitPassed waits until a probation is over, as whoever rolls back does who sees that something
// is wrong only then.
func (i *instance) awaitPassed(passed int) {
	i.t.Helper()
	eventually(i.t, func() bool {
		_, out, _ := i.holdfast("metrics")
		return strings.Contains(out, fmt.Sprintf("holdfast_probations_total{result=\"passed\"} %d\n", passed))
	}, func() string { return "the end of the probation" })
}

// TestARollback goes back while a tunnel holds what served before, and after that has ended; what
// was read then serves, whatever is on the disk.
func TestARollback(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, saying("one", backend))
	if code, _, errs := i.holdfast("rollback"); code != 1 || !strings.Contains(errs, "nothing to go back to") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	load := startLoad(t, i.address("public"), 2)
	load.awaitProgress()
	i.reload(saying("two", backend))
	i.awaitPassed(1)
	i.wantSays("two")
	i.rollback("one")
	s := i.wait("that generation 1 serves again", func(s *status) bool { return strings.Contains(s.states(), "1 serving") })
	if _, out, _ := i.holdfast("status"); !strings.Contains(out, "rolled back from generation 2; the file on disk differs") {
		t.Errorf("%s\n%s", s.states(), out)
	}
	i.rollback("two") // which takes it back
	i.rollback("one")
	i.write("[broken")
	i.wantSays("one")
	i.rollback("two")
	if code, _, errs := i.holdfast("reload"); code != 2 || !strings.Contains(errs, "not valid TOML") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	load.awaitProgress()
	load.stop()
	load.report()
	i.reload(saying("three", backend))
	i.wantSays("three")
	if _, out, _ := i.holdfast("status"); strings.Contains(out, "rolled back") {
		t.Error(out)
	}
}

// TestADrainThatIsToEnd has what drains closed in time, and what serves left alone.
func TestADrainThatIsToEnd(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, saying("one", backend))
	load := startLoad(t, i.address("public"), 2)
	i.reload(saying("two", backend))
	i.awaitPassed(1)
	i.wantStates("2 serving, 1 draining")
	if code, _, errs := i.holdfast("drain", "--generation", "2", "--within", "1s"); code != 1 || !strings.Contains(errs, "generation 2 serves") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if code, out, errs := i.holdfast("drain", "--generation", "1", "--within", "1h"); code != 0 || !strings.Contains(out, "within 1h0m0s; it has 2 tunnels") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	i.upgrade()
	load.awaitProgress()
	if _, out, _ := i.holdfast("status"); !strings.Contains(out, "draining, empty within ") {
		t.Error(out)
	}
	if code, out, errs := i.holdfast("drain", "--generation", "1", "--within", "300ms", "--wait"); code != 0 || out != "generation 1 has ended\n" {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	i.wantStates("2 serving")
	load.stop()
	closed := 0
	for range load.faultsOfTunnels() {
		closed++
	}
	if _, out, _ := i.holdfast("metrics"); closed != 2 || !strings.Contains(out, `reason="operator"`) {
		t.Errorf("%d tunnels were closed", closed)
	}
}

// TestARollbackUnderAnotherSupervisor goes back after an upgrade, and after the supervisor was
// killed, with nothing left of the generation that served before.
func TestARollbackUnderAnotherSupervisor(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, saying("one", backend))
	i.reload(saying("two", backend))
	i.awaitPassed(1)
	i.wantStates("2 serving")
	i.upgrade()
	i.rollback("one")
	i.wait("the end of generation 2", func(s *status) bool { return s.states() == "3 serving" })
	i.signal(syscall.SIGKILL)
	i.awaitEnd()
	i.launch(nil)
	i.wait("the next supervisor", func(s *status) bool { return s.states() == "3 serving" })
	i.rollback("two")
}
