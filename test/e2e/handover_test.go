package e2e

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// numbered is a configuration that says which one it is. Nothing depends on idle_grace.
func numbered(n int, probation string) string {
	return publicListener + fmt.Sprintf(`
[reload]
probation = %q
[drain]
idle_grace = "0s"
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { path = "/now" }
redirect = { path = "/configuration-%d" }
`, probation, n)
}

const askNow = "GET /now HTTP/1.1\r\nHost: a.test\r\n\r\n"

// now reads the answer to askNow: the configuration that has served it. It is never the
// last one of the connection.
func (w *wire) now() (location string) {
	w.t.Helper()
	r := w.reply("GET")
	if r.StatusCode != 301 || r.Close {
		w.t.Fatalf("got %d, the last one: %v", r.StatusCode, r.Close)
	}
	location = r.Header.Get("Location")
	return location[strings.LastIndex(location, "/")+1:]
}

func (w *wire) wantNow(n int) {
	w.t.Helper()
	w.send(askNow)
	if got, want := w.now(), fmt.Sprintf("configuration-%d", n); got != want {
		w.t.Errorf("%s has answered, want %s", got, want)
	}
}

// restless asks on one connection without a pause until stop is closed. It notes which
// configuration has answered last: they come one after the other, and none is left out.
func (w *wire) restless(stop <-chan struct{}, last *atomic.Int64) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		w.send(askNow)
		var n int64
		if _, err := fmt.Sscanf(w.now(), "configuration-%d", &n); err != nil || n != last.Load() && n != last.Load()+1 {
			w.t.Errorf("after configuration %d came %d, %v", last.Load(), n, err)
		}
		last.Store(n)
	}
}

// The promise: no client of plain HTTP/1.1 notices a reload by the end of its connection,
// and its next request after the probation is the new configuration's.
func TestIdleConnectionsGoOnUnderEveryConfiguration(t *testing.T) {
	t.Parallel()
	const clients, reloads = 20, 10
	i := serve(t, numbered(0, "100ms"))
	address := i.address("public")
	var idle, half []*wire
	for range clients {
		c := dialWire(t, "tcp", address)
		c.wantNow(0)
		idle = append(idle, c, dialWire(t, "tcp", address)) // and one that has not sent anything
	}
	for range 5 {
		half = append(half, dialWire(t, "tcp", address))
	}
	stop := make(chan struct{})
	var busy sync.WaitGroup
	asking := sync.OnceFunc(func() { close(stop); busy.Wait() })
	defer asking() // also where the test fails: who asks behind its end would end all tests
	last := make([]atomic.Int64, 2)
	for n := range last {
		w := dialWire(t, "tcp", address)
		busy.Go(func() { w.restless(stop, &last[n]) })
	}
	for n := range reloads {
		for _, w := range half {
			w.send(askNow[:30])
		}
		i.reload(numbered(n+1, "100ms"))
		for _, w := range idle[:5] { // during the probation, or just after it
			w.send(askNow)
			w.now()
		}
		for _, w := range half {
			w.send(askNow[30:])
			w.now()
		}
		i.wait("all connections to go over", func(st *status) bool {
			return !slices.ContainsFunc(st.Generations[1:], func(old generation) bool { return old.Connections > 0 })
		})
		for _, w := range append(idle, half...) {
			w.wantNow(n + 1)
		}
		for c := range last {
			eventually(t, func() bool { return last[c].Load() == int64(n+1) }, func() string { return "who asks all the time to be served by the new configuration" })
		}
		if n == reloads/2 {
			i.upgrade()
		}
	}
	asking()

	s := i.wantStates(fmt.Sprintf("%d serving", reloads+1)) // the old ones have ended
	if got := s.Generations[0].Connections; got < 2*clients+5 {
		t.Errorf("%d connections, want %d", got, 2*clients+5)
	}
	if code, _, errs := i.holdfast("stop"); code != 0 {
		t.Errorf("stop: exit code %d\n%s", code, errs)
	}
	for _, w := range append(idle, half...) {
		w.wantEOF()
	}
	i.awaitEnd()
}

// A configuration that does not pass its probation never had them.
func TestIdleConnectionsAreNotGivenToWhatDoesNotLast(t *testing.T) {
	t.Parallel()
	i := serve(t, numbered(0, "1h"))
	w := dialWire(t, "tcp", i.address("public"))
	w.wantNow(0)
	i.reload(numbered(1, "1h"))
	w.wantNow(0)
	s := i.wantStates("2 serving, 1 draining")
	if code, _, errs := i.holdfast("kill", "--generation", "2"); code != 0 {
		t.Fatalf("kill: exit code %d\n%s", code, errs)
	}
	if got := i.wantStates("1 serving"); got.Generations[0].PID != s.Generations[1].PID {
		t.Errorf("process %d serves, want %d", got.Generations[0].PID, s.Generations[1].PID)
	}
	w.wantNow(0)
}
