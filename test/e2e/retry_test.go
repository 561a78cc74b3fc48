package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// seen is a request as a server got it.
type seen struct {
	host   string
	length int64
	body   string
}

// fickle is a server that fails as the path says, once for each value of the query.
type fickle struct {
	mu     sync.Mutex
	failed map[string]bool
}

// first says whether it is to fail.
func (f *fickle) first(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	again := f.failed[key]
	f.failed[key] = true
	return !again
}

func (f *fickle) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	how, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if f.first(r.URL.String()) {
		switch how {
		case "status":
			io.Copy(io.Discard, r.Body)
			w.WriteHeader(503)
			io.WriteString(w, "later")
			return
		case "early":
			w.WriteHeader(503) // nothing was read
			return
		case "cut":
			r.Body.Read(make([]byte, 1000))
			panic(http.ErrAbortHandler)
		case "slow":
			io.Copy(io.Discard, r.Body) // or nobody notices the end
			<-r.Context().Done()
			return
		}
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if how == "always" {
		w.WriteHeader(503)
	}
	w.Header().Set("Got-Length", fmt.Sprint(r.ContentLength))
	w.Write(body)
}

func server(t *testing.T, h http.Handler) string {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = nil
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// TestTriesAndCopies is about what real servers see of requests that are tried again,
// buffered or copied.
func TestTriesAndCopies(t *testing.T) {
	t.Parallel()
	unsteady := server(t, &fickle{failed: map[string]bool{}})
	copies := make(chan seen, 100)
	hold := make(chan struct{})
	var held atomic.Int64
	mirror := server(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/mirror/hold" {
			held.Add(1)
			select {
			case <-hold:
			case <-r.Context().Done():
			}
			return
		}
		copies <- seen{r.Host, r.ContentLength, string(body)}
		w.WriteHeader(500)
	}))
	defer close(hold)
	config := func(more string) string {
		return fmt.Sprintf(publicListener+`
[reload]
probation = "0s"
[[virtual_hosts]]
name = "all"
domains = ["*"]
  [[virtual_hosts.routes]]
  match = { prefix = "/status/once" }
  cluster = "unsteady"
  [[virtual_hosts.routes]]
  match = { prefix = "/mirror" }
  cluster = "unsteady"
  mirror = { cluster = "mirror" }
  [[virtual_hosts.routes]]
  match = { prefix = "/buffered" }
  cluster = "unsteady"
  request_buffer = "100KiB"
  [[virtual_hosts.routes]]
  match = { prefix = "/slow" }
  cluster = "both"
  retry = { on = ["reset"], attempts = 5, per_try_timeout = "1s", buffer = "1MiB" }
  [[virtual_hosts.routes]]
  match = { prefix = "/" }
  cluster = "both"
  retry = { on = ["5xx"], attempts = 3, backoff = { base = "1ms" }, buffer = "1MiB" }
[[clusters]]
name = "unsteady"
endpoints = [%q]
[[clusters]]
name = "both"
endpoints = [%q, %q]
retry_budget = { min_concurrency = 100 }
[[clusters]]
name = "mirror"
endpoints = [%q]
%s`, unsteady, refusing(t), unsteady, mirror, more)
	}
	i := serve(t, config(""))
	address := i.address("public")
	client := &http.Client{Timeout: patience, Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	// send sends a body, of unknown length if it is chunked.
	send := func(t *testing.T, path, body string, chunked bool) (status int, length, got string) {
		t.Helper()
		var r io.Reader = strings.NewReader(body)
		if chunked {
			r = io.MultiReader(r)
		}
		resp, err := client.Post("http://"+address+path, "text/plain", r)
		if err != nil {
			t.Error(err)
			return 0, "", ""
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return resp.StatusCode, resp.Header.Get("Got-Length"), string(b)
	}
	bodies := map[string]string{"empty": "", "short": "body", "long": strings.Repeat("0123456789", 50_000)}

	t.Run("tries", func(t *testing.T) {
		var all sync.WaitGroup
		for _, how := range []string{"status", "early", "cut", "slow", "well"} {
			for name, body := range bodies {
				for _, chunked := range []bool{false, true} {
					all.Go(func() {
						path := fmt.Sprintf("/%s/%s?%v", how, name, chunked)
						if status, _, got := send(t, path, body, chunked); status != 200 || got != body {
							t.Errorf("%s: %d with %d bytes of %d", path, status, len(got), len(body))
						}
					})
				}
			}
		}
		all.Wait()
		if status, _, got := send(t, "/always", "body", false); status != 503 || got != "body" {
			t.Errorf("the last answer was %d %q", status, got)
		}
		if status, _, got := send(t, "/status/once", "body", false); status != 503 || got != "later" {
			t.Errorf("a route without retries answers %d %q", status, got)
		}
	})

	t.Run("a buffered body", func(t *testing.T) {
		if status, length, got := send(t, "/buffered", "some", true); status != 200 || length != "4" || got != "some" {
			t.Errorf("%d, Content-Length %s, %q", status, length, got)
		}
		for _, chunked := range []bool{false, true} {
			if status, _, _ := send(t, "/buffered", bodies["long"], chunked); status != 413 {
				t.Errorf("too long a body is answered with %d", status)
			}
		}
		if status, length, _ := send(t, "/status/once", "some", true); status != 200 || length != "-1" {
			t.Errorf("without a buffer: %d, Content-Length %s", status, length)
		}
	})

	t.Run("a mirror", func(t *testing.T) {
		for _, body := range []string{"", "some"} {
			if status, _, got := send(t, "/mirror/x", body, true); status != 200 || got != body {
				t.Errorf("%d %q", status, got)
			}
			select {
			case got := <-copies:
				host, port, _ := strings.Cut(address, ":")
				if want := (seen{host + "-shadow:" + port, int64(len(body)), body}); got != want {
					t.Errorf("the mirror got %+v, want %+v", got, want)
				}
			case <-time.After(patience):
				t.Fatal("the mirror got nothing")
			}
		}
		if status, _, _ := send(t, "/mirror/long", bodies["long"], true); status != 200 {
			t.Errorf("a long body: %d", status)
		}
		for range 5 { // it does not answer, and nobody waits
			if status, _, _ := send(t, "/mirror/hold", "some", false); status != 200 {
				t.Errorf("%d", status)
			}
		}
		eventually(t, func() bool { return held.Load() == 5 }, func() string { return "the mirror to have five requests" })
	})

	i.wantSeries(series{
		"holdfast_route_mirrored_total{route=all:prefix=/mirror,virtual_host=all}":                           7,
		"holdfast_route_mirror_drops_total{reason=body too large,route=all:prefix=/mirror,virtual_host=all}": 1,
		"holdfast_route_retry_limit_exceeded_total{route=all:prefix=/,virtual_host=all}":                     1,
		"holdfast_route_retry_overflows_total{route=all:prefix=/,virtual_host=all}":                          0,
		"holdfast_route_retries_abandoned_total{route=all:prefix=/,virtual_host=all}":                        0,
		"holdfast_route_retry_successes_total{route=all:prefix=/,virtual_host=all}":                          18,
		"holdfast_route_retry_successes_total{route=all:prefix=/slow,virtual_host=all}":                      6,
	})

	// Copies keep no generation alive.
	client.CloseIdleConnections()
	began := time.Now()
	i.reload(config("[drain]\nidle_grace = \"0s\"\n"))
	i.wantStates("2 serving")
	if took := time.Since(began); took > 10*time.Second { // they would be given up after 15
		t.Errorf("the old generation has stayed for %v", took)
	}
}
