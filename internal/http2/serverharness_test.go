//lint:file-ignore SA1019 the library that comes with Go leads each connection through a listener
// of its own and has no say over single ones: this is the same code, with the connections ours.

package http2

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// serverPatience bounds every wait of a test that should end at once.
const serverPatience = 10 * time.Second

type handlerFunc func(*task.Task, exchange.Exchange)

func (f handlerFunc) Serve(t *task.Task, e exchange.Exchange) { f(t, e) }

// readBody reads a request's body to its end.
func readBody(tk *task.Task, e exchange.Exchange) (string, error) {
	var all []byte
	for {
		p, err := e.Read(tk)
		all = append(all, p...)
		if err == io.EOF {
			return string(all), nil
		}
		if err != nil {
			return string(all), err
		}
	}
}

// answerWith answers with a body of known length.
func answerWith(tk *task.Task, e exchange.Exchange, status int, body string) error {
	err := e.Respond(&exchange.Response{Status: status, ContentLength: int64(len(body))})
	if err == nil {
		err = e.Write(tk, []byte(body))
	}
	if err == nil {
		err = e.Finish(tk, nil)
	}
	return err
}

// echoing answers with method, target and body of the request.
func echoing(tk *task.Task, e exchange.Exchange) {
	body, err := readBody(tk, e)
	if err == nil {
		err = answerWith(tk, e, 200, e.Request().Method+" "+e.Request().Target+" "+body)
	}
	if err != nil {
		e.Abort()
	}
}

// testedServer serves on a loopback socket for as long as the test runs.
type testedServer struct {
	*Server
	t       *testing.T
	loop    *stream.Loop
	addr    string
	counted *metrics.Registry
	refused chan http1.Refusal
	ended   atomic.Int64
}

func startServer(t *testing.T, o ServerOptions) *testedServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &testedServer{t: t, loop: streamtest.New(t), addr: l.Addr().String(), counted: metrics.NewRegistry(), refused: make(chan http1.Refusal, 1000)}
	o.Scheme, o.Listener, o.Log, o.Loops = "http", "test", slog.New(slog.DiscardHandler), []*stream.Loop{s.loop}
	o.Metrics = NewServerMetrics(s.counted, "test", http1.NewServerMetrics(s.counted, "test"))
	o.Refused = func(_ exchange.Downstream, r http1.Refusal) {
		select {
		case s.refused <- r:
		default:
		}
	}
	o.Ended = func() { s.ended.Add(1) }
	s.Server = NewServer(o)
	var accepting sync.WaitGroup
	accepting.Go(func() { s.accept(l) })
	t.Cleanup(func() {
		l.Close()
		accepting.Wait()
		s.Close()
		s.until("the end of all connections", func() bool { return s.Connections() == 0 && s.Requests() == 0 })
	})
	return s
}

func (s *testedServer) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		raw, err := conn.(syscall.Conn).SyscallConn()
		fd := -1
		if err == nil {
			raw.Control(func(ours uintptr) { fd, err = unix.FcntlInt(ours, unix.F_DUPFD_CLOEXEC, 0) })
		}
		if err != nil {
			s.t.Error(err)
		}
		conn.Close()
		streamtest.Do(s.loop, func() { s.Serve(s.loop, stream.Passed{FD: fd}, conn.RemoteAddr().(*net.TCPAddr).AddrPort()) })
	}
}

// until waits for a condition.
func (s *testedServer) until(what string, is func() bool) {
	s.t.Helper()
	for end := time.Now().Add(serverPatience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			s.t.Errorf("no %s after %v", what, serverPatience)
			return
		}
	}
}

// value returns what was counted: the sum of a metric's series whose labels contain all of some
// values.
func (s *testedServer) value(name string, labels ...string) (sum int64) {
	for _, f := range s.counted.Families() {
		if f.Desc.Name != name {
			continue
		}
	series:
		for _, one := range f.Series {
			for _, l := range labels {
				if !strings.Contains(strings.Join(one.Labels, ","), l) {
					continue series
				}
			}
			sum += one.Value
		}
	}
	return sum
}

// client is Go's client of HTTP/2, by prior knowledge.
func (s *testedServer) client() *http.Client {
	tr := &http2.Transport{AllowHTTP: true, DialTLSContext: dialPlain}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: serverPatience}
}

func (s *testedServer) url(path string) string { return "http://" + s.addr + path }

// limitsForTests are those of a listener by default.
func limitsForTests() config.ListenerLimits {
	return config.ListenerLimits{HeadTimeout: 10 * time.Second, BodyTimeout: time.Minute, IdleTimeout: time.Minute}
}

var _ = context.Background
