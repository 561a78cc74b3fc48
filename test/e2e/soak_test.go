package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// soakEnv says how many reloads the soak makes, if not as usual: see `make soak`.
const soakEnv = "HOLDFAST_SOAK_RELOADS"

// consumption is what a process has taken of the machine.
type consumption struct {
	Descriptors, Threads, Goroutines, Entries int // Entries: of the runtime directory
	RSS                                       int // bytes
}

func (i *instance) consumption() (c consumption) {
	i.t.Helper()
	c.Descriptors = besidesPipes(i.t, i.pid)
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", i.pid))
	if err != nil {
		i.t.Fatal(err)
	}
	c.Threads = len(threads)
	c.Goroutines = int(i.mustScrape()["go_goroutines"])
	entries, err := os.ReadDir(i.runtime())
	if err != nil {
		i.t.Fatal(err)
	}
	c.Entries = len(entries)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", i.pid))
	if err != nil {
		i.t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	if err != nil {
		i.t.Fatal(err)
	}
	c.RSS = pages * os.Getpagesize()
	return c
}

// within says whether c is what before was, give or take what the Go runtime needs.
func (c consumption) within(before consumption) bool {
	return c.Descriptors <= before.Descriptors+2 && c.Threads <= before.Threads+6 && c.Goroutines <= before.Goroutines+4 &&
		c.Entries <= before.Entries && c.RSS <= before.RSS*3/2+8<<20
}

// However often the configuration changes, the supervisor keeps nothing of it, and who
// has been connected since the beginning notices nothing.
func TestReloadsWithoutEndCostNothing(t *testing.T) {
	t.Parallel()
	reloads := 100
	if n, err := strconv.Atoi(os.Getenv(soakEnv)); err == nil {
		reloads = n
	}
	up := newUpstream(t)
	i := newInstance(t, "")
	i.program = program("plain/holdfast")
	config := func(n int) string {
		more := fmt.Sprintf("[process]\nproxy = %q\n[reload]\nprobation = \"0s\"\n[[access_logs]]\npath = %q\n",
			program("plain/holdfast-proxy"), filepath.Join(i.dir, "access.log"))
		if n%2 == 1 {
			more += "[[listeners]]\nname = \"odd\"\naddress = \"127.0.0.2:0\"\n"
		}
		return simple(up.addr, more)
	}
	i.write(config(0))
	i.start(nil)
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	client, server, _ := s.tunnel("/ws")

	commands := http.Client{Timeout: patience, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(i.runtime(), "admin.sock"))
		},
	}}
	defer commands.CloseIdleConnections()
	reload := func(n int) {
		i.write(config(n))
		resp, err := commands.Post("http://localhost/reload", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 {
			t.Fatalf("reload %d: status %d: %s", n, resp.StatusCode, answer)
		}
	}
	settle := func(n int) {
		t.Helper()
		i.wantStates(fmt.Sprintf("%d serving, 1 draining", n+1))
	}
	// As many threads stay as were ever needed at a time, one for each generation that
	// drains: so no more than some do.
	const first = 20 // of them make everything that is made once
	for n := range first {
		reload(n + 1)
		if n%10 == 9 {
			settle(n + 1)
		}
	}
	before, began := i.consumption(), time.Now()
	for n := first; n < reloads; n++ {
		reload(n + 1)
		if n%10 == 9 || n == reloads-1 {
			settle(n + 1)
		}
	}
	took := time.Since(began)
	var after consumption
	eventually(t, func() bool { after = i.consumption(); return after.within(before) }, func() string {
		return fmt.Sprintf("the supervisor to have what it had after %d reloads, %+v; after %d: %+v", first, before, reloads, after)
	})
	for _, w := range []*wire{client, server} {
		w.conn.SetDeadline(time.Now().Add(patience)) // the old one was from the beginning
	}
	wantTunnel(client, server)
	t.Logf("after %d reloads: %+v\nafter %d: %+v, %s each", first, before, reloads, after, took/time.Duration(max(reloads-first, 1)))
}
