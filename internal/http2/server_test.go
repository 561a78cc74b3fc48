package http2

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

func dialPlain(ctx context.Context, network, addr string, _ *tls.Config) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, addr)
}

func fetch(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	r, err := c.Get(url)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Error(err)
	}
	return r.StatusCode, string(body)
}

func TestRequestsAreAnswered(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	c := s.client()
	if status, body := fetch(t, c, s.url("/a?b=c")); status != 200 || body != "GET /a?b=c " {
		t.Errorf("got %d %q", status, body)
	}
	large := strings.Repeat("0123456789abcdef", 1<<16)
	r, err := c.Post(s.url("/post"), "text/plain", strings.NewReader(large))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if body, err := io.ReadAll(r.Body); err != nil || string(body) != "POST /post "+large {
		t.Errorf("got %d bytes, %v", len(body), err)
	}
}

func TestManyStreamsOfOneConnection(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	c := s.client()
	fetch(t, c, s.url("/first"))
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			want := fmt.Sprintf("/%d", i)
			if status, body := fetch(t, c, s.url(want)); status != 200 || body != "GET "+want+" " {
				t.Errorf("got %d %q", status, body)
			}
		})
	}
	all.Wait()
	if n := s.value("holdfast_downstream_http2_connections_total"); n != 1 {
		t.Errorf("%v connections", n)
	}
}

func TestTrailersGoBothWays(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(func(tk *task.Task, e exchange.Exchange) {
		if _, err := readBody(tk, e); err != nil {
			t.Error(err)
		}
		sum, _ := e.Trailers().Get("x-amz-checksum-crc32")
		e.Respond(&exchange.Response{Status: 200, ContentLength: -1})
		e.Write(tk, []byte("body"))
		if err := e.Finish(tk, exchange.Fields{{Name: "Grpc-Status", Value: "0" + sum}}); err != nil {
			t.Error(err)
		}
	})})
	q, _ := http.NewRequest("POST", s.url("/"), io.NopCloser(strings.NewReader("content")))
	q.Trailer = http.Header{"X-Amz-Checksum-Crc32": {"abc"}}
	r, err := s.client().Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if body, err := io.ReadAll(r.Body); err != nil || string(body) != "body" {
		t.Errorf("got %q, %v", body, err)
	}
	if got := r.Trailer.Get("Grpc-Status"); got != "0abc" {
		t.Errorf("trailer %q", got)
	}
}

// A client that opens no window for its answers does not keep its requests here by that.
func TestARefusalThatNobodyTakesIsGivenUp(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	streamtest.Do(s.loop, func() { s.finish = time.Millisecond })
	p := s.connect()
	p.check(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	p.request(1, line("expect", "a miracle")...)
	for {
		f, err := p.ReadFrame()
		if err != nil {
			t.Fatalf("the stream is not reset: %v", err)
		}
		if r, ok := f.(*http2.RSTStreamFrame); ok && r.StreamID == 1 {
			break
		}
	}
	select {
	case r := <-s.refused:
		if r.Status != 417 || r.Err == nil {
			t.Errorf("the refusal is %d, %v", r.Status, r.Err)
		}
	case <-time.After(serverPatience):
		t.Error("nobody is told of the refusal")
	}
}

// A client that has reset its connection before anybody looks at it has no address any more.
func TestAClientThatHasGoneBeforeItIsServed(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: handlerFunc(echoing)})
	ours, theirs := dialPair(t)
	defer theirs.Close()
	f, err := theirs.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours.(*net.TCPConn).SetLinger(0)
	ours.Close()
	s.until("reset", func() bool {
		_, err := unix.Getpeername(fd)
		return err == unix.ENOTCONN
	})
	streamtest.Do(s.loop, func() { s.Serve(s.loop, stream.Passed{FD: fd}, netip.AddrPort{}) })
	s.until("end of the connection", func() bool { return s.ended.Load() == 1 })
	if status, _ := fetch(t, s.client(), s.url("/")); status != 200 {
		t.Errorf("others get %d", status)
	}
}
