package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// checkedServer says at /healthz how it is, and counts the requests for anything else.
type checkedServer struct {
	address  string
	status   atomic.Int64
	leaves   atomic.Bool // its next response says that it wants no more work
	requests atomic.Int64
	checks   atomic.Int64
}

func newCheckedServer(t *testing.T) *checkedServer {
	s := new(checkedServer)
	s.status.Store(200)
	s.address = server(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" {
			s.checks.Add(1)
			w.WriteHeader(int(s.status.Load()))
			return
		}
		s.requests.Add(1)
		if s.leaves.Swap(false) {
			w.Header().Set("Holdfast-Immediate-Health-Check-Fail", "true")
		}
		io.WriteString(w, s.address)
	}))
	return s
}

// TestHealthChecks is about which servers get requests, with real ones that fail and come back,
// and with some that hang and stream for ever.
func TestHealthChecks(t *testing.T) {
	t.Parallel()
	a, b := newCheckedServer(t), newCheckedServer(t)
	hanging, streaming := chatterer(t, ""), chatterer(t, "HTTP/1.1 200 OK\r\n\r\nfor ever\r\n")
	config := func(more string) string {
		return fmt.Sprintf(publicListener+`
[reload]
probation = "0s"
[[virtual_hosts]]
name = "all"
domains = ["*"]
  [[virtual_hosts.routes]]
  match = { prefix = "/slow" }
  cluster = "slow"
  [[virtual_hosts.routes]]
  match = { prefix = "/" }
  cluster = "web"
[[clusters]]
name = "web"
endpoints = ["%s", "%s"]
health_check = { http = "/healthz", interval = "250ms", no_traffic_interval = "250ms", unhealthy_threshold = 2 }
[[clusters]]
name = "slow"
endpoints = ["%s", "%s"]
health_check = { http = "/", interval = "250ms", no_traffic_interval = "250ms", timeout = "300ms", body = "ready" }
%s`, a.address, b.address, hanging, streaming, more)
	}
	i := serve(t, config(""))
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func() (who string, header http.Header) {
		t.Helper()
		resp, err := client.Get("http://" + i.address("public"))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("status %d, %v", resp.StatusCode, err)
		}
		return string(body), resp.Header
	}
	// settled waits until requests get these servers, all of them and no other.
	settled := func(want ...*checkedServer) {
		t.Helper()
		for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
			got := map[string]bool{}
			for range 8 {
				who, _ := get()
				got[who] = true
			}
			ok := len(got) == len(want)
			for _, s := range want {
				ok = ok && got[s.address]
			}
			if ok {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("requests get %v", got)
			}
		}
	}
	settled(a, b)
	a.status.Store(503)
	settled(b)
	if log := i.log.String(); !strings.Contains(log, "an endpoint fails its health checks") || !strings.Contains(log, "status 503") {
		t.Errorf("the log is\n%s", log)
	}
	i.wantSeries(series{
		`holdfast_cluster_endpoints{cluster=web}`: 2, `holdfast_cluster_endpoints_healthy{cluster=web}`: 1,
		`holdfast_cluster_health_changes_total{cluster=web,to=failing}`: 1,
	})
	before := a.requests.Load()
	i.reload(config("# the same"))
	for range 20 {
		get()
	}
	if n := a.requests.Load() - before; n != 0 {
		t.Errorf("%d requests have come to one that failed before the reload", n)
	}
	a.status.Store(204)
	settled(a, b)

	// It says so itself, and is well again when it has passed two checks.
	b.leaves.Store(true)
	for b.leaves.Load() {
		if _, h := get(); len(h.Values("Holdfast-Immediate-Health-Check-Fail")) > 0 {
			t.Error("a client has got what was for the proxy alone")
		}
	}
	settled(a)
	settled(a, b)
	if n := strings.Count(i.log.String(), "it has said so in a response"); n != 1 {
		t.Errorf("%d lines say that the endpoint has said so itself, want 1; the log:\n%s", n, i.log)
	}
	i.wantSeries(series{`holdfast_cluster_endpoints_healthy{cluster=web}`: 2, `holdfast_cluster_endpoints_healthy{cluster=slow}`: 0})
}

// chatterer is a server that says the same for as long as somebody listens.
func chatterer(t *testing.T, says string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	conns := make(chan net.Conn, 10_000)
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
			go func() {
				for err := error(nil); err == nil && says != ""; {
					_, err = io.WriteString(c, says)
				}
				io.Copy(io.Discard, c)
				c.Close()
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
		close(conns)
		for c := range conns {
			c.Close()
		}
	})
	return l.Addr().String()
}
