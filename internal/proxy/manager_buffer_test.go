package proxy_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"holdfast/internal/exchange"
	"holdfast/internal/proxy"
)

// waitFor connects when it is released.
func waitFor(release chan struct{}) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unsafeString is p as a text that changes with it, as those of a codec do.
func unsafeString(p []byte) string { return unsafe.String(unsafe.SliceData(p), len(p)) }

func TestABufferedBodyIsCompleteBeforeAnEndpointIsChosen(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes[0].RequestBuffer = 1 << 20
		f.routes[0].Timeout = time.Second // from its end
		var got string
		f.behave[first] = func(o *origin) {
			got = o.reads()
			o.answers(200)
			o.ends()
		}
		c.start(f.manager())
		io.WriteString(c.send, "one")
		time.Sleep(time.Minute)
		if len(f.attempts) != 0 {
			t.Error("an endpoint was connected to before the body was complete")
		}
		io.WriteString(c.send, " two")
		c.send.Close()
		c.wait().wantStatus(200)
		if o := f.origin(); got != "one two" || o.head.ContentLength != 7 || !o.conn.wasKept() {
			t.Errorf("the endpoint got %q with Content-Length %d; its connection was kept: %v", got, o.head.ContentLength, o.conn.wasKept())
		}
		c.wantClose(false)
	})
}

func TestBufferedBodies(t *testing.T) {
	t.Parallel()
	const most = 10_000
	tests := []struct {
		name     string
		length   int64 // as the client states it
		body     int
		trailers bool
		fault    error // of the body, at its end
		status   int
		stated   int64 // to the endpoint
		last     bool  // the client's connection ends
	}{
		{"none", 0, 0, false, nil, 200, 0, false},
		{"an empty one", -1, 0, false, nil, 200, 0, false},
		{"of known length", most, most, false, nil, 200, most, false},
		{"of unknown length", -1, most, false, nil, 200, most, false},
		{"with trailers", -1, 5, true, nil, 200, -1, false},
		{"too long", -1, most + 1, false, nil, 413, 0, true},
		{"said to be too long", most + 1, 0, false, nil, 413, 0, false}, // the codec skips what is short, or closes
		{"too slow", -1, 5, false, &exchange.StatusError{Status: 408, Text: "slow"}, 408, 0, true},
		{"malformed", -1, 5, false, &exchange.StatusError{Status: 400, Text: "bad chunk"}, 400, 0, true},
		{"cut", -1, 5, false, errGone, 0, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f, c := newFarm(t), post(t, "a.example", "/")
				f.routes[0].RequestBuffer = most
				c.request.ContentLength = tt.length
				if tt.trailers {
					c.more = exchange.Fields{{Name: "X-Sum", Value: "1"}}
				}
				var got string
				f.behave[first] = func(o *origin) {
					got = o.reads()
					o.answers(200)
					o.ends()
				}
				body := strings.Repeat("x", tt.body)
				go func() {
					io.WriteString(c.send, body)
					if tt.fault == errGone {
						c.cancel(errGone)
						return
					}
					c.send.CloseWithError(tt.fault)
				}()
				c.start(f.manager()).wait()
				c.wantStatus(tt.status)
				if tt.status != 0 {
					c.wantClose(tt.last)
				}
				if tt.status != 200 {
					if len(f.attempts) > 0 {
						t.Error("an endpoint was connected to")
					}
					return
				}
				o := f.origin()
				if got != body || o.head.ContentLength != tt.stated || !o.conn.wasKept() {
					t.Errorf("the endpoint got %d bytes with Content-Length %d; its connection was kept: %v", len(got), o.head.ContentLength, o.conn.wasKept())
				}
				if tt.trailers && len(o.more) != 1 {
					t.Errorf("trailers %v", o.more)
				}
			})
		})
	}
}

// Clients that send bodies slowly take no more memory than all together may.
func TestBufferedBodiesAreBoundedTogether(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.routes[0].RequestBuffer = 1 << 20
		f.options = func(o *proxy.ManagerOptions) { o.Bodies = 200_000 }
		f.behave[first] = func(o *origin) { o.reads(); o.answers(200); o.ends() }
		m := f.manager()
		var slow []*client
		for range 4 { // each has 64 KiB for its 20,000 bytes, so the last one is too much
			c := post(t, "a.example", "/").start(m)
			io.WriteString(c.send, strings.Repeat("x", 20_000))
			slow = append(slow, c)
		}
		slow[3].wait().wantStatus(503)
		f.wantLog("request refused", "kept already")
		if n := figures(f.registry)["downstream_requests_refused_total{public,overload}"]; n != 1 {
			t.Errorf("%d are counted", n)
		}
		for _, c := range slow[:3] {
			c.send.Close()
			c.wait().wantStatus(200)
		}
		alone := post(t, "a.example", "/").start(m)
		io.WriteString(alone.send, strings.Repeat("x", 500_000))
		alone.send.Close()
		alone.wait().wantStatus(200)
	})
}

func TestABufferedBodyThatDoesNotCome(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes[0].RequestBuffer = 1000
		f.routes[0].StreamIdleTimeout = 10 * time.Second
		c.start(f.manager())
		io.WriteString(c.send, "part")
		synctest.Wait()
		began := time.Now()
		c.wait()
		c.wantStatus(408)
		c.wantClose(true)
		if took := time.Since(began); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("answered after %v", took)
		}
	})
}

// An endpoint that answers without reading what is buffered has answered.
func TestAnEarlyAnswerToABufferedBody(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f, c := newFarm(t), post(t, "a.example", "/")
		f.routes[0].RequestBuffer = 1 << 20
		f.behave[first] = func(o *origin) {
			o.answers(413)
			o.writes("too much")
			o.ends()
		}
		go func() { io.WriteString(c.send, strings.Repeat("x", 500_000)); c.send.Close() }()
		c.start(f.manager()).wait()
		c.wantStatus(413)
		c.wantBody("too much")
		c.wantEnd(true)
		c.wantClose(false) // all of it was read
		if f.origin().conn.wasKept() {
			t.Error("a connection with half a request on it was kept")
		}
	})
}
