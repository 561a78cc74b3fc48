package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"holdfast/internal/tlstest"
)

// TestHTTP2OverTLSOnBothSides has over TLS, to clients and to an endpoint, what lasts and what comes
// behind a body: a stream of events, trailers, and a WebSocket (RFC 8441), which the endpoint takes
// by HTTP/1.1. All that is open goes on over reloads.
func TestHTTP2OverTLSOnBothSides(t *testing.T) {
	t.Parallel()
	events := make(chan string)
	up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/events":
			w.Header().Set("Content-Type", "text/event-stream")
			for event := range events {
				fmt.Fprintf(w, "data: %s\n\n", event)
				w.(http.Flusher).Flush()
			}
		case "/trailers":
			body, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %v", body, err)
			w.Header().Set(http.TrailerPrefix+"X-Amz-Checksum-Crc32", "of "+string(body))
		case "/ws":
			conn, rw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\n", acceptFor(r.Header.Get("Sec-WebSocket-Key")))
			_, _ = io.Copy(conn, rw)
		default:
			fmt.Fprintf(w, "%s %s", r.Proto, r.Header.Get("X-Forwarded-Proto"))
		}
	}))
	ours := tlstest.NewAuthority(t)
	up.EnableHTTP2 = true
	up.TLS = &tls.Config{Certificates: []tls.Certificate{ours.Leaf([]string{"app.internal"}).Certificate}}
	up.StartTLS()
	t.Cleanup(up.Close)
	s := seal(t, fmt.Sprintf(`
[[listeners]]
name = "https"
address = "127.0.0.1:0"
http2_websockets = true
[listeners.tls]
{tls}
[[virtual_hosts]]
name = "all"
domains = ["*"]
routes = [{ match = { prefix = "/" }, websocket = true, cluster = "app" }]
[[clusters]]
name = "app"
protocol = "auto"
endpoints = [%q]
tls = { ca = %q, sni = "app.internal" }
`, up.Listener.Addr(), ours.File(t.TempDir(), "ca.pem")))

	tr := &http.Transport{TLSClientConfig: s.client(), ForceAttemptHTTP2: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", s.at["https"])
	}}
	t.Cleanup(tr.CloseIdleConnections)
	web := &http.Client{Transport: tr, Timeout: 2 * patience}
	do := func(method, path string, body io.Reader, trailer http.Header) *http.Response {
		t.Helper()
		r, err := http.NewRequest(method, "https://a.test"+path, body)
		if err != nil {
			t.Fatal(err)
		}
		r.Trailer = trailer
		r.Header.Set("TE", "trailers")
		resp, err := web.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		if resp.StatusCode != 200 || resp.ProtoMajor != 2 {
			t.Fatalf("%d in %s", resp.StatusCode, resp.Proto)
		}
		return resp
	}
	want := func(resp *http.Response, want string) {
		t.Helper()
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != want {
			t.Fatalf("got %q, %v, want %q", b, err, want)
		}
	}
	want(do("GET", "/", nil, nil), "HTTP/2.0 https")

	go func() { events <- "0" }()
	stream := do("GET", "/events", nil, nil)
	lines := bufio.NewReader(stream.Body)
	wantEvent := func(event string) {
		t.Helper()
		for _, want := range []string{"data: " + event + "\n", "\n"} {
			if line, err := lines.ReadString('\n'); err != nil || line != want {
				t.Fatalf("got %q, %v, want %q", line, err, want)
			}
		}
	}
	wantEvent("0")

	own := s.client()
	own.NextProtos = []string{"h2"}
	conn := tls.Client(dial(t, s.at["https"]), own)
	t.Cleanup(func() { conn.Close() })
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	ws := openH2Tunnel(t, conn, "https", "a.test", "/ws")
	ws.wantStatus("200")

	for _, event := range []string{"1", "2", "3"} {
		resp := do("POST", "/trailers", io.NopCloser(strings.NewReader("content")), http.Header{"X-Amz-Checksum-Crc32": {event}})
		want(resp, "content <nil>")
		if got := resp.Trailer.Get("X-Amz-Checksum-Crc32"); got != "of content" {
			t.Errorf("trailers %v", resp.Trailer)
		}
		events <- event // nothing follows before this one has arrived
		wantEvent(event)
		ws.send(event)
		ws.wantBytes(event)
		s.reload(s.text + "# " + event + "\n")
	}
	close(events)
	want(stream, "")
	ws.send("last")
	ws.wantBytes("last")
	ws.sendEnd()
	ws.wantEnd()
}
