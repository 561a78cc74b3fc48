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
	"testing"
	"time"
)

// TestHTTP2 has clients that begin with HTTP/2, beside one that does not.
func TestHTTP2(t *testing.T) {
	t.Parallel()
	begun, goOn := make(chan bool, 1), make(chan bool)
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			begun <- true
			<-goOn
			io.WriteString(w, "late")
		case "/trailers":
			io.WriteString(w, "body")
			w.(http.Flusher).Flush()
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
		default:
			io.Copy(w, r.Body)
			fmt.Fprintf(w, "%s %s", r.Method, r.URL.Path)
		}
	}))
	t.Cleanup(upstream.Close)
	config := `
[[listeners]]
name = "public"
address = "127.0.0.1:0"
http2 = true
[[clusters]]
name = "web"
endpoints = ["` + strings.TrimPrefix(upstream.URL, "http://") + `"]
[[virtual_hosts]]
name = "all"
domains = ["*"]
[[virtual_hosts.routes]]
match = { prefix = "/" }
cluster = "web"
`
	i := serve(t, config)
	client := func() *http.Client {
		tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, i.address("public"))
		}}
		tr.Protocols.SetUnencryptedHTTP2(true)
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, Timeout: time.Minute}
	}
	c := client()
	want := func(r *http.Response, err error, status int, body string) {
		t.Helper()
		if err != nil {
			t.Error(err)
			return
		}
		defer r.Body.Close()
		if got, err := io.ReadAll(r.Body); r.StatusCode != status || string(got) != body || err != nil || r.ProtoMajor != 2 {
			t.Errorf("got %d %q %v in %s", r.StatusCode, got, err, r.Proto)
		}
	}
	url := "http://example.com"
	r, err := c.Get(url + "/a")
	want(r, err, 200, "GET /a")
	large := strings.Repeat("x", 1<<20)
	r, err = c.Post(url+"/b", "", strings.NewReader(large))
	want(r, err, 200, large+"POST /b")
	q, _ := http.NewRequest("GET", url+"/trailers", nil)
	q.Header.Set("TE", "trailers")
	r, err = c.Do(q)
	want(r, err, 200, "body")
	if err == nil && r.Trailer.Get("Grpc-Status") != "0" {
		t.Errorf("trailers %v", r.Trailer)
	}
	var all sync.WaitGroup
	for n := range 100 {
		all.Go(func() {
			path := fmt.Sprintf("/%d", n)
			r, err := c.Get(url + path)
			want(r, err, 200, "GET "+path)
		})
	}
	all.Wait()
	one, err := http.Get("http://" + i.address("public") + "/one")
	if err != nil {
		t.Fatal(err)
	}
	one.Body.Close()
	if one.ProtoMajor != 1 || one.StatusCode != 200 {
		t.Errorf("got %d in %s", one.StatusCode, one.Proto)
	}

	// A reload while a response is under way loses nothing.
	slow, err := c.Get(url + "/slow")
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	i.reload(config + "# again\n")
	for n := range 20 {
		r, err := c.Get(url + "/again")
		want(r, err, 200, "GET /again")
		if n == 10 {
			close(goOn)
		}
	}
	want(slow, nil, 200, "late")
}
