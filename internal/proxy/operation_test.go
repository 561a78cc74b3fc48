package proxy_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// figures are what the supervisor reads from the generation's memory.
func (c *commander) figures() map[string]int64 {
	c.t.Helper()
	families, err := c.counts.Families()
	if err != nil {
		c.t.Fatal(err)
	}
	return figuresOf(families)
}

func TestAGenerationCountsInTheMemoryThatItIsGiven(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	if got, ok := c.figures()["cluster_endpoints{web}"]; !ok || got != 1 {
		t.Error("nothing is registered before it serves")
	}
	c.serve()
	client, server := c.tunnel()
	carries(client, server) // the 101 is there a moment before the tunnel
	w := c.dial()
	c.exchange(w)
	c.status()
	got := c.figures()
	for name, want := range map[string]int64{
		"downstream_requests_total{public}":     2,
		"downstream_connections_total{public}":  2,
		"downstream_connections_active{public}": 1,
		"tunnels_active":                        1,
		"generation_tunnels":                    1,
		"generation_connections":                1,
		"generation_draining":                   0,
	} {
		if got[name] != want {
			t.Errorf("%s is %d, want %d", name, got[name], want)
		}
	}
	for _, name := range []string{
		"generation_oldest_tunnel_start_timestamp_seconds", "generation_start_timestamp_seconds", "generation_resident_memory_bytes",
		"proxy_resident_memory_bytes", "proxy_heap_bytes", "proxy_goroutines", "proxy_cpu_seconds_total", "proxy_open_fds", "proxy_max_fds",
	} {
		if got[name] <= 0 {
			t.Errorf("%s is %d", name, got[name])
		}
	}
	c.drain(0)
	c.status()
	if got := c.figures()["generation_draining"]; got != 1 {
		t.Errorf("generation_draining is %d while it drains", got)
	}
	c.dropped.Store(3) // after the last question
	client.Close()
	server.Close()
	w.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	got = c.figures()
	if n := got["proxy_log_lines_dropped_total"]; n != 3 {
		t.Errorf("%d dropped lines are counted at the end, want 3", n)
	}
	if got["downstream_requests_total{public}"] != 2 || got["tunnels_started_total"] != 1 || got["tunnels_active"] != 0 {
		t.Errorf("after the end: %v", got)
	}
}

// An older supervisor sends the bundle alone.
func TestAGenerationWithoutMemoryToCountInServes(t *testing.T) {
	t.Parallel()
	c := command(t, "", "", alone)
	c.serve()
	c.exchange(c.dial())
	if got := c.status().RequestsTotal; got != 1 {
		t.Errorf("%d requests", got)
	}
	if got := c.figures(); len(got) > 0 {
		t.Errorf("counted in memory that was not given: %v", got)
	}
}

// logFile opens an access log as the supervisor does.
func logFile(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// targets are those of the records in a file.
func targets(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var all []string
	for line := range strings.Lines(string(data)) {
		var one struct{ Event, Target string }
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, one.Event+" "+one.Target)
	}
	return strings.Join(all, ", ")
}

func TestAGenerationRecordsInTheFilesThatItIsGivenAndInThoseThatReplaceThem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, other, missing := filepath.Join(dir, "access.log"), filepath.Join(dir, "other.log"), filepath.Join(dir, "missing.log")
	log := func(path string) string { return fmt.Sprintf("[[access_logs]]\npath = %q\n", path) }
	c := command(t, "", log(path)+log(other)+log(missing))
	// Those of a release that was opened again while the generation was being built
	// come twice; one that is not configured is of no use.
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path, filepath.Join(dir, "unknown.log")}, More: true}, logFile(t, other+".old"), logFile(t, path+".unknown"))
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path, other}}, logFile(t, path), logFile(t, other))
	c.serve()
	ask := func(target string) {
		t.Helper()
		w := c.dial()
		w.say("GET %s HTTP/1.1\nHost: a.example\nConnection: close\n\n", target)
		c.answer(w)
		w.rest()
	}
	recorded := func(path, want string) {
		t.Helper()
		eventually(t, "records in "+path+": "+want, func() bool { return targets(t, path) == want })
	}
	ask("/one")
	recorded(path, "request /one")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path}}, logFile(t, path))
	c.status() // the message was taken
	ask("/two")
	client := c.dial()
	client.say("GET / \n\n")
	client.wantHead("400")
	recorded(path, "request /two, request ")
	recorded(path+".1", "request /one")
	recorded(other, "request /one, request /two, request ")
	if got := c.log.String(); strings.Count(got, "no file for an access log") != 1 || !strings.Contains(got, missing) {
		t.Errorf("the log says\n%s", got)
	}
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path}})
	c.status()
	if got := c.log.String(); !strings.Contains(got, "access logs and descriptors do not match") {
		t.Errorf("the log says\n%s", got)
	}
	for _, wrong := range []string{other + ".old", path + ".unknown"} {
		if got := targets(t, wrong); got != "" {
			t.Errorf("%s has %s", wrong, got)
		}
	}
}

// logPipe is a descriptor to hand over as an access log, and what fails if anybody else
// has the file. That does not wait: what is forgotten is closed too, by the collector
// of garbage, some time.
func logPipe(t *testing.T) (fd int, wantClosed func(what string)) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(ours uintptr) { fd = int(ours) })
	return fd, func(what string) {
		t.Helper()
		w.Close()
		raw, err := r.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Read(func(fd uintptr) bool {
			_, err = unix.Read(int(fd), make([]byte, 1))
			return true
		})
		if err != nil { // of an end there is none
			t.Errorf("%s is still open: %v", what, err)
		}
	}
}

func TestFilesThatAreOfNoUseToAGenerationAreClosed(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "access.log")
	c := command(t, "", fmt.Sprintf("[[access_logs]]\npath = %q\n", path))
	twice, twiceClosed := logPipe(t)
	replaced, replacedClosed := logPipe(t)
	unknown, unknownClosed := logPipe(t)
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path, path}}, twice, replaced)
	c.status() // the message was taken
	twiceClosed("a file of a path that came twice")
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path, "unknown"}}, logFile(t, path), unknown)
	c.status()
	replacedClosed("a file that was replaced before it was needed")
	c.serve()
	unknownClosed("a file that no access log is written to")
	odd, oddClosed := logPipe(t)
	c.say(&control.Message{Type: control.TypeLogs}, odd)
	c.status()
	oddClosed("a file without a path")
}

func TestAGenerationWithoutAccessLogsKeepsNoFiles(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	before, beforeClosed := logPipe(t)
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{"a"}}, before)
	c.serve()
	beforeClosed("a file that came before it served")
	later, laterClosed := logPipe(t)
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{"a"}}, later)
	c.status()
	laterClosed("a file that came later")
}

func TestFilesThatWereNeverNeededAreClosedAtTheEnd(t *testing.T) {
	t.Parallel()
	c := command(t, "", "[[access_logs]]\npath = \"/a\"\n")
	kept, keptClosed := logPipe(t)
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{"/a"}}, kept)
	c.say(&control.Message{Type: control.TypeStop})
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	keptClosed("a file of a generation that never served")
}

// A message with an id is answered, once: [commander.ask] would take a second answer
// for one to the next question.
func TestWhetherItWorkedIsAnsweredWhereThatIsAsked(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	for _, tt := range []struct {
		m    control.Message
		want string // in the answer's error
	}{
		{control.Message{Type: control.TypeLevel, Level: "debug"}, ""},
		{control.Message{Type: control.TypeLevel, Level: "loud"}, `not "loud"`},
		{control.Message{Type: control.TypeLogs}, ""},
		{control.Message{Type: control.TypeLogs, Keys: []string{"a"}}, "do not match"},
		{control.Message{Type: "riddle"}, "unknown message"},
	} {
		a := c.question(tt.m)
		if a.Re != c.lastID || !strings.Contains(a.Error, tt.want) || tt.want == "" && a.Error != "" {
			t.Errorf("%s was answered by %+v, want the error %q", tt.m.Type, a, tt.want)
		}
		c.status()
	}
	if got := c.log.String(); strings.Contains(got, "level=ERROR") {
		t.Errorf("what was answered is logged too:\n%s", got)
	}
}

func TestTheLastRecordsAreWrittenWhenAGenerationEnds(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "access.log")
	c := command(t, "", fmt.Sprintf("[[access_logs]]\npath = %q\n", path))
	c.say(&control.Message{Type: control.TypeLogs, Keys: []string{path}}, logFile(t, path))
	c.serve()
	busy := c.dial()
	busy.say("GET /busy HTTP/1.1\nHost: a.example\n\n")
	upstream := c.endpoint()
	upstream.head()
	c.tunnel()
	c.say(&control.Message{Type: control.TypeStop, Within: time.Millisecond})
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"event":"tunnel_open"`, `"event":"tunnel_close"`, `"reason":"stopped"`,
		`"reason":"cut when the time of the drain or the stop was over"`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("no %s in\n%s", want, data)
		}
	}
	got := c.figures()
	for name, want := range map[string]int64{
		"downstream_connections_cut_total{public}":       1,
		"downstream_requests_cut_total{public,holdfast}": 1,
		"tunnels_ended_total{stopped}":                   1,
	} {
		if got[name] != want {
			t.Errorf("%s is %d, want %d", name, got[name], want)
		}
	}
}

func TestTheLevelOfTheLogCanBeChangedWhileItRuns(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	refusals := func() int { return strings.Count(c.log.String(), "request refused") }
	refuse := func() {
		t.Helper()
		w := c.dial()
		w.say("nonsense\n\n")
		w.wantHead("400")
	}
	refuse()
	if n := refusals(); n != 0 {
		t.Errorf("%d lines of level debug", n)
	}
	c.say(&control.Message{Type: control.TypeLevel, Level: "debug"})
	c.status()
	refuse()
	if n := refusals(); n != 1 {
		t.Errorf("%d lines of level debug, want 1", n)
	}
	c.say(&control.Message{Type: control.TypeLevel, Level: "loud"})
	c.status()
	if got := c.log.String(); !strings.Contains(got, `not \"loud\"`) {
		t.Errorf("the log does not say that there is no such level:\n%s", got)
	}
	refuse()
	if n := refusals(); n != 2 {
		t.Errorf("%d lines of level debug, want 2", n)
	}
}

// question asks for what may be refused.
func (c *commander) question(m control.Message, fds ...int) *control.Message {
	c.t.Helper()
	c.lastID++
	m.ID = c.lastID
	c.say(&m, fds...)
	return await(c.t, string(m.Type), c.answers)
}

func await[T any](t *testing.T, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(bound):
		t.Fatalf("not in time: %s", what)
	}
	return v
}

// holders is how many descriptors of this process are of the same file.
func holders(t *testing.T, fd int) (n int) {
	t.Helper()
	want, err := os.Stat(fmt.Sprint("/proc/self/fd/", fd))
	if err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		// Those of other tests come and go.
		if got, err := os.Stat("/proc/self/fd/" + one.Name()); err == nil && os.SameFile(want, got) {
			n++
		}
	}
	return n
}

func TestAGenerationGivesProfilesOfItself(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	var profiles []int
	for name, over := range map[string]time.Duration{"goroutine": 0, "heap": 0, "trace": 10 * time.Millisecond} {
		if a := c.question(control.Message{Type: control.TypeProfile, Profile: name, Within: over}); a.Error != "" {
			t.Errorf("%s: %s", name, a.Error)
			continue
		}
		fd := await(t, "a profile", c.payloads)
		same, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		profiles = append(profiles, same)
		t.Cleanup(func() { unix.Close(same) })
		data, err := control.ReadBytes(fd, 1<<24)
		if err != nil || len(data) == 0 {
			t.Errorf("%s: %d bytes, %v", name, len(data), err)
		}
	}
	for name, over := range map[string]time.Duration{"nobody's": 0, "cpu": 0, "trace": 2 * time.Minute} {
		if a := c.question(control.Message{Type: control.TypeProfile, Profile: name, Within: over}); a.Error == "" {
			t.Errorf("%q over %v was made", name, over)
			control.CloseAll([]int{<-c.payloads})
		}
	}
	c.drain(0)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	for _, fd := range profiles {
		if n := holders(t, fd); n != 1 {
			t.Errorf("the generation has kept %d descriptors of a profile", n-1)
		}
	}
}

// It takes as long as it takes, and meanwhile the loop answers, no second one is
// made, and the generation ends when it has to.
func TestAProfileThatTakesTimeHoldsNothingUp(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	c.lastID++
	long := control.Message{Type: control.TypeProfile, Profile: "cpu", Within: time.Minute, ID: c.lastID}
	c.say(&long)
	if a := c.question(control.Message{Type: control.TypeProfile, Profile: "goroutine"}); !strings.Contains(a.Error, "another profile") {
		t.Errorf("got %+v", a)
	}
	c.status()
	c.drain(0)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	if a := await(t, "the answer about the profile", c.answers); a.Re != long.ID || a.Error == "" {
		t.Errorf("got %+v", a)
	}
}

func TestAListenerThatIsFullSaysSoOnce(t *testing.T) {
	t.Parallel()
	c := command(t, "limits = { connections = 1 }", "")
	c.serve()
	for i := range 3 {
		w := c.dial()
		eventually(t, "the listener is full", func() bool { return c.figures()["downstream_connection_limit_reached_total{public}"] == int64(i+1) })
		w.Close()
	}
	if n := strings.Count(c.log.String(), "limits.connections is reached"); n != 1 {
		t.Errorf("%d lines:\n%s", n, c.log.String())
	}
}
