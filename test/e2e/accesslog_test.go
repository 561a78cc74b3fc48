package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// access is a record of the access log, as far as the tests look.
type access struct {
	Event       string  `json:"event"`
	Duration    float64 `json:"duration_seconds"`
	Received    int     `json:"received_bytes"`
	Sent        int     `json:"sent_bytes"`
	Reason      string  `json:"reason"`
	Status      int     `json:"status"`
	Method      string  `json:"method"`
	Target      string  `json:"target"`
	Authority   string  `json:"authority"`
	Listener    string  `json:"listener"`
	VirtualHost string  `json:"virtual_host"`
	Route       string  `json:"route"`
	Cluster     string  `json:"cluster"`
	Endpoint    string  `json:"endpoint"`
	Generation  int     `json:"generation"`
	RequestID   string  `json:"request_id"`
	UserAgent   string  `json:"user_agent"`
}

// withLogs is simple with access logs in the instance's folder.
func (i *instance) withLogs(backend string, names ...string) string {
	var logs strings.Builder
	for _, n := range names {
		fmt.Fprintf(&logs, "[[access_logs]]\npath = %q\n", filepath.Join(i.dir, n))
	}
	return simple(backend, logs.String())
}

// records are those that a log has now, of which each line is one.
func (i *instance) records(name string) (all []access) {
	i.t.Helper()
	data, _ := os.ReadFile(filepath.Join(i.dir, name))
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break // it is still being written
		}
		var a access
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			i.t.Fatalf("%v: %q", err, line)
		}
		all = append(all, a)
	}
	return all
}

// wantRecords waits until a log has so many records.
func (i *instance) wantRecords(name string, n int) (records []access) {
	i.t.Helper()
	eventually(i.t, func() bool { records = i.records(name); return len(records) >= n }, func() string {
		return fmt.Sprintf("%d records in %s; it holds %+v", n, name, records)
	})
	if len(records) > n {
		i.t.Errorf("%d records in %s, want %d: %+v", len(records), name, n, records)
	}
	return records
}

func TestTheAccessLogTellsOfEveryRequestAndTunnel(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	i := newInstance(t, "")
	i.write(i.withLogs(up.addr, "access.log"))
	i.start(nil)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}

	client := s.dial()
	client.send("POST /x?y HTTP/1.1\r\nHost: a.test\r\nUser-Agent: me \"\x7f\r\nContent-Length: 5\r\n\r\n12345")
	client.wantRefused(400) // a control character is no field value
	got := i.wantRecords("access.log", 1)[0]
	if got.Status != 400 || got.Event != "request" || got.Listener != "public" || got.Reason == "" || got.Cluster != "" {
		t.Errorf("the refused request: %+v", got)
	}

	// The operations page tells of every field.
	var fields map[string]any
	data, err := os.ReadFile(filepath.Join(i.dir, "access.log"))
	if err == nil {
		err = json.Unmarshal(data, &fields)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, page, _ := strings.Cut(docPage(t, "operations.md"), "\n## Access log\n")
	for key := range fields {
		if !strings.Contains(page, "`"+key+"`") {
			t.Errorf("the operations page has no %s", key)
		}
	}

	client = s.dial()
	client.send("POST /x?y HTTP/1.1\r\nHost: a.test\r\nUser-Agent: me \"\r\nContent-Length: 5\r\n\r\n12345")
	server := up.accept(t)
	server.wantStart("POST /x?y HTTP/1.1")
	server.wantBytes("12345")
	server.send(answer(200, "123"))
	client.want(200, "123")
	got = i.wantRecords("access.log", 2)[1]
	want := access{
		Event: "request", Duration: got.Duration, Received: 5, Sent: 3, Status: 200, Method: "POST", Target: "/x?y", Authority: "a.test",
		Listener: "public", VirtualHost: "all", Route: got.Route, Cluster: "backend", Endpoint: up.addr, Generation: 1, RequestID: got.RequestID, UserAgent: `me "`,
	}
	if got != want || got.Route == "" || got.RequestID == "" || got.Duration <= 0 {
		t.Errorf("the request: %+v\nwant %+v", got, want)
	}

	down, behind, _ := s.tunnel("/ws")
	opened := i.wantRecords("access.log", 3)[2]
	down.send("1234567")
	behind.wantBytes("1234567")
	behind.send("89")
	down.wantBytes("89")
	behind.close()
	down.wantEOF()
	down.close()
	closed := i.wantRecords("access.log", 4)[3]
	if opened.Event != "tunnel_open" || opened.Status != 101 || opened.Cluster != "backend" || opened.Endpoint != up.addr {
		t.Errorf("the tunnel's open record: %+v", opened)
	}
	want = opened
	want.Event, want.Duration, want.Received, want.Sent, want.Reason, want.UserAgent = "tunnel_close", closed.Duration, 7, 2, "upstream closed", ""
	if opened.UserAgent = ""; closed != want || closed.Duration <= 0 {
		t.Errorf("the tunnel's close record: %+v\nwant %+v", closed, want)
	}
}

// Several generations append to one file, whole lines each, while it is moved away
// again and again.
func TestAccessLogsAreReopenedByAllGenerationsWithoutLosingALine(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	i.write(i.withLogs(backend, "access.log"))
	i.start(nil)
	address := i.address("public")
	load := startLoad(t, address, 5) // holds generation 1
	i.reload(i.withLogs(backend, "access.log") + "# second\n")
	i.wantStates("2 serving, 1 draining")
	path := filepath.Join(i.dir, "access.log")
	const rounds = 5
	for n := range rounds {
		load.awaitProgress()
		if err := os.Rename(path, fmt.Sprintf("%s.%d", path, n)); err != nil {
			t.Fatal(err)
		}
		if n%2 == 0 {
			i.signal(syscall.SIGUSR1)
		} else if code, _, errs := i.holdfast("reopen-logs"); code != 0 {
			t.Fatalf("reopen-logs: exit code %d: %s", code, errs)
		}
		eventually(t, func() bool { _, err := os.Stat(path); return err == nil }, func() string { return "the file to be there again" })
	}
	load.stop()
	load.report()
	i.wait("one generation", func(s *status) bool { return len(s.Generations) == 1 })

	// Both generations have written behind the last reopening too: the ends of the
	// tunnels of generation 1, and requests of 2.
	var last []int
	opened, closed, lines := map[string]bool{}, map[string]bool{}, 0
	for n := range rounds + 1 {
		name := fmt.Sprintf("%s.%d", path, n)
		if n == rounds {
			name = path
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			var a access
			if err := json.Unmarshal([]byte(line), &a); err != nil {
				t.Fatalf("%v: %q", err, line)
			}
			lines++
			switch a.Event {
			case "tunnel_open":
				opened[a.RequestID] = true
			case "tunnel_close":
				closed[a.RequestID] = true
			}
			if n == rounds && !slices.Contains(last, a.Generation) {
				last = append(last, a.Generation)
			}
		}
	}
	if slices.Sort(last); !slices.Equal(last, []int{1, 2}) {
		t.Errorf("generations %v have written to the last file, want 1 and 2", last)
	}
	for id := range opened {
		if !closed[id] {
			t.Errorf("tunnel %s has opened and not closed", id)
		}
	}
	all := i.mustScrape()
	written := 0.0
	for name, v := range all {
		if strings.HasPrefix(name, "holdfast_access_log_records_total{") {
			written += v
		}
		if strings.HasPrefix(name, "holdfast_access_log_dropped_total{") && v > 0 {
			t.Errorf("%s is %v", name, v)
		}
	}
	if written != float64(lines) {
		t.Errorf("%v records counted, %d lines are there", written, lines)
	}
}

func TestAnAccessLogThatCannotBeOpenedRefusesTheReload(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := serve(t, simple(backend, ""))
	i.wantRefused(i.withLogs(backend, "no/such/folder.log"), 1, "no such file or directory")
}

func TestAnAccessLogThatNobodyReadsHoldsUpNothing(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	fifo := filepath.Join(i.dir, "access.fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	i.write(i.withLogs(backend, "access.fifo"))
	i.start(nil)
	address := i.address("public")
	padding := strings.Repeat("x", 900)
	dropped := func() (n float64) {
		for name, v := range i.mustScrape() {
			if strings.HasPrefix(name, "holdfast_access_log_dropped_total{") {
				n += v
			}
		}
		return n
	}
	// The pipe takes 64 KiB and the queue some more; then records are dropped, and
	// every request is answered all the same.
	for range 40 {
		for range 100 {
			if _, err := ask(address, "/"+padding); err != nil {
				t.Fatal(err)
			}
		}
		if dropped() > 0 {
			return
		}
	}
	t.Error("nothing was dropped although nobody reads")
}

// The kernel sends SIGXFSZ to who writes beyond its limit, of which a process dies.
func TestALimitOnTheSizeOfFilesCostsRecordsOnly(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, "")
	i.write(i.withLogs(backend, "access.log"))
	i.start(nil)
	wantAnswer(t, i.address("public"))
	i.wantRecords("access.log", 1)
	pid := i.status().Generations[0].PID
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10, Max: 10}, nil); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, i.address("public"))
	i.wantSeries(series{"holdfast_access_log_dropped_total{path=" + filepath.Join(i.dir, "access.log") + "}": 1})
	if now := i.status(); now.states() != "1 serving" || now.Generations[0].PID != pid {
		t.Errorf("now %s", now.states())
	}
}

func TestAnAccessLogOnTheStandardOutput(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	i := newInstance(t, simple(backend, "[[access_logs]]\npath = \"stdout\"\nformat = \"text\"\n"))
	out := new(lockedBuffer)
	i.stdout = out
	i.start(nil)
	wantAnswer(t, i.address("public"))
	eventually(t, func() bool { return strings.Contains(out.String(), "request ") }, func() string { return "a record on the standard output: " + out.String() })
}
