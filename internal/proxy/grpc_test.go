package proxy_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

// serveHTTP2 serves HTTP/2 without TLS, and returns where.
func serveHTTP2(t *testing.T, h http.Handler) (address string) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// clientHTTP2 speaks HTTP/2 to the site.
func (s *site) clientHTTP2() *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.address)
	}}
	tr.Protocols.SetUnencryptedHTTP2(true)
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: bound}
}

// A call of gRPC: both sides speak in turn, and how it has ended, with all that the program says
// about that, is in the trailers.
func TestACallOfGRPC(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(s *site) {
		s.grpc = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor != 2 || r.Header.Get("Te") != "trailers" {
				t.Errorf("%s with %v", r.Proto, r.Header)
			}
			w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			four := make([]byte, 4)
			for {
				if _, err := io.ReadFull(r.Body, four); err != nil {
					break
				}
				w.Write(four)
				w.(http.Flusher).Flush()
			}
			for name, values := range map[string][]string{
				"Grpc-Status": {"7"}, "Grpc-Message": {"no"}, "My-Metadata": {"a", "b"}, "request_cost": {"3"}, "Trace-Bin": {"AAEC"},
				"Set-Cookie": {"a=b"}, "Age": {"1"}, "Location": {"/"},
			} {
				w.Header()[http.TrailerPrefix+name] = values
			}
		})
	})
	c := s.clientHTTP2()
	for contentType, passes := range map[string]bool{"application/grpc": true, "application/grpc+proto": true, "application/grpc-web": false, "text/plain": false} {
		r, w := io.Pipe()
		req, err := http.NewRequest("POST", "http://a.example/service/method", r)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", contentType)
		req.Header.Set("Te", "trailers")
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		four := make([]byte, 4)
		for _, message := range []string{"one ", "two ", "last"} {
			io.WriteString(w, message)
			if _, err := io.ReadFull(resp.Body, four); err != nil || string(four) != message {
				t.Fatalf("got %q, %v, want %q", four, err, message)
			}
		}
		w.Close()
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
			t.Errorf("got %q, %v", rest, err)
		}
		want := http.Header{"Grpc-Status": {"7"}, "Grpc-Message": {"no"}}
		if passes {
			want["My-Metadata"], want["Request_cost"], want["Trace-Bin"] = []string{"a", "b"}, []string{"3"}, []string{"AAEC"}
		}
		if len(resp.Trailer) != len(want) {
			t.Errorf("%s: trailers %v, want %v", contentType, resp.Trailer, want)
		}
		for name, values := range want {
			if !slices.Equal(resp.Trailer[name], values) {
				t.Errorf("%s: %s: %q, want %q", contentType, name, resp.Trailer[name], values)
			}
		}
	}
}
