package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// h2cServer is an upstream that speaks HTTP/2 without TLS, and nothing else. at is where it
// listens.
func h2cServer(t *testing.T, l net.Listener, handler http.Handler) (s *httptest.Server, conns *atomic.Int32) {
	t.Helper()
	s, conns = httptest.NewUnstartedServer(handler), new(atomic.Int32)
	if l != nil {
		s.Listener.Close()
		s.Listener = l
	}
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s, conns
}

const http2Cluster = publicListener + `
[[virtual_hosts]]
name = "all"
domains = ["*"]
  [[virtual_hosts.routes]]
  match = { prefix = "/" }
  cluster = "app"
[[clusters]]
name = "app"
endpoints = [%s]
protocol = "http2"
`

// talkative answers as the path says.
func talkative(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/echo": // as gRPC: both directions at once, and how it ended in the trailers
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.WriteHeader(200)
		b := make([]byte, 4096)
		for {
			n, err := r.Body.Read(b)
			w.Write(b[:n])
			w.(http.Flusher).Flush()
			if err != nil {
				break
			}
		}
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "7")
	case "/length":
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%d %d", r.ContentLength, len(b))
	default:
		fmt.Fprintf(w, "%s %s %s %q", r.Proto, r.Host, r.RequestURI, r.UserAgent())
	}
}

func TestAnUpstreamWithHTTP2(t *testing.T) {
	t.Parallel()
	s, conns := h2cServer(t, nil, http.HandlerFunc(talkative))
	i := serve(t, fmt.Sprintf(http2Cluster, `"`+s.Listener.Addr().String()+`"`))
	at := "http://" + i.address("public")
	client := &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: 200}}
	defer client.CloseIdleConnections()
	get := func(path string) string {
		req, err := http.NewRequest("GET", at+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "app.test"
		req.Header["User-Agent"] = nil
		resp, err := client.Do(req)
		if err != nil {
			t.Error(err)
			return ""
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 200 {
			t.Errorf("status %d, %v", resp.StatusCode, err)
		}
		return string(b)
	}
	if got, want := get("/a%20b?c=%2F"), `HTTP/2.0 app.test /a%20b?c=%2F ""`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	resp, err := client.Post(at+"/length", "text/plain", strings.NewReader(strings.Repeat("x", 300_000)))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "300000 300000" {
		t.Errorf("got %q, %v", b, err)
	}
	resp.Body.Close()

	r, w := io.Pipe()
	req, err := http.NewRequest("POST", at+"/echo", r)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	go io.WriteString(w, "one ")
	if resp, err = client.Do(req); err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	four := make([]byte, 4)
	for _, message := range []string{"one ", "two ", "last"} {
		if message != "one " {
			io.WriteString(w, message)
		}
		if _, err := io.ReadFull(resp.Body, four); err != nil || string(four) != message {
			t.Fatalf("got %q, %v, want %q", four, err, message)
		}
	}
	w.Close()
	if _, err := io.ReadAll(resp.Body); err != nil || resp.Trailer.Get("Grpc-Status") != "7" {
		t.Errorf("trailers %v, %v", resp.Trailer, err)
	}

	var all sync.WaitGroup
	for range 100 {
		all.Go(func() { get("/") })
	}
	all.Wait()
	if n := conns.Load(); n > 4 {
		t.Errorf("%d connections", n)
	}
}

// An upstream that is restarted properly fails no request: what it has begun it ends, and what it
// has not seen another one gets.
func TestAnUpstreamWithHTTP2ThatIsRestarted(t *testing.T) {
	t.Parallel()
	first, _ := h2cServer(t, nil, http.HandlerFunc(talkative))
	second, _ := h2cServer(t, nil, http.HandlerFunc(talkative))
	i := serve(t, fmt.Sprintf(http2Cluster, fmt.Sprintf("%q, %q", first.Listener.Addr(), second.Listener.Addr())))
	client := &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: 20}}
	defer client.CloseIdleConnections()
	var made, failed atomic.Int32
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := client.Post("http://"+i.address("public")+"/", "text/plain", nil)
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if made.Add(1); resp.StatusCode != 200 {
					failed.Add(1)
				}
			}
		})
	}
	await := func(n int32) {
		t.Helper()
		for began := made.Load(); made.Load() < began+n && failed.Load() == 0 && !t.Failed(); {
			resp, err := client.Get("http://" + i.address("public") + "/")
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
		}
	}
	await(100)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := first.Config.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	await(100)
	close(stop)
	all.Wait()
	if failed.Load() > 0 {
		t.Errorf("%d of %d requests have failed", failed.Load(), made.Load())
	}
}
