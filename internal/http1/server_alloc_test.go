package http1

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// answering answers without a byte of its own.
type answering struct {
	response exchange.Response
	body     []byte
	err      error
}

func (a *answering) Serve(tk *task.Task, e exchange.Exchange) {
	for a.err == nil {
		if _, a.err = e.Read(tk); a.err != nil {
			break
		}
	}
	e.OnOver(a)
	if a.err = e.Respond(&a.response); a.err == nil {
		a.err = e.Write(tk, a.body)
	}
	if a.err == nil {
		a.err = e.Finish(tk, nil)
	}
}

func (a *answering) ExchangeOver(error) {}

func TestServingAllocatesNothing(t *testing.T) { // not parallel: it counts
	l := streamtest.New(t)
	h := &answering{response: exchange.Response{Status: 200, Reason: "OK", ContentLength: -1, Fields: exchange.Fields{{Name: "Server", Value: "x"}}}, body: []byte("hello")}
	ended := make(chan struct{})
	s := NewServer(ServerOptions{
		Limits: config.ListenerLimits{HeadTimeout: time.Minute, IdleTimeout: time.Minute, BodyTimeout: time.Minute, BodyRate: 1, BodySize: 1 << 20},
		Scheme: "http", Handler: h, Log: quiet(), Loops: []*stream.Loop{l}, Metrics: NewServerMetrics(metrics.NewRegistry(), "test"),
		Ended: func() { close(ended) },
	})
	ours, theirs := socketPair(t)
	var far stream.Conn
	streamtest.Do(l, func() {
		if err := l.Adopt(&far, theirs, nil, nil); err != nil {
			t.Error(err)
		}
		s.Serve(l, stream.Passed{FD: ours}, netip.AddrPort{})
	})
	get := []byte("GET /some/where?a=b HTTP/1.1\r\nHost: a.test\r\nUser-Agent: x\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n")
	head, body := []byte("POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"), []byte("5\r\nhello\r\n0\r\n\r\n")
	talk := func(tk *task.Task, n int) {
		for range n {
			if far.Send(tk, get, nil, nil) != nil || !tookAnswer(tk, &far) {
				t.Error("no answer to a GET")
				return
			}
			if far.Send(tk, head, nil, nil) != nil {
				return
			}
			tk.Pause() // the body comes later
			if far.Send(tk, body, nil, nil) != nil || !tookAnswer(tk, &far) {
				t.Error("no answer to a POST")
				return
			}
		}
	}
	const n = 1000
	var before, after runtime.MemStats
	streamtest.Go(l, func(tk *task.Task) { talk(tk, 100) })
	runtime.ReadMemStats(&before)
	streamtest.Go(l, func(tk *task.Task) { talk(tk, n) })
	runtime.ReadMemStats(&after)
	if count := after.Mallocs - before.Mallocs; count > n/10 { // the test's own, and what the runtime does meanwhile
		t.Errorf("%d allocations for %d requests", count, 2*n)
	}
	streamtest.Do(l, far.Close)
	await(t, "the end of the connection", ended)
}

// tookAnswer reads a chunked answer to its end.
func tookAnswer(tk *task.Task, c *stream.Conn) bool {
	const end = "0\r\n\r\n"
	for {
		b := c.Buffered()
		if len(b) > len(end) && string(b[len(b)-len(end):]) == end {
			c.Consume(len(b))
			return true
		}
		if c.Fill(tk) != nil {
			return false
		}
	}
}
