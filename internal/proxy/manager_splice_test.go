package proxy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream/streamtest"
)

const (
	large   = 5 << 20
	endless = 1 << 29

	// late is how late a deadline may be, with some more.
	late = 300 * time.Millisecond
)

// noise is a body that nobody makes by accident.
func noise(seed, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// pipes returns how many pipes are in use, and how many there are: only a splice makes one.
func (s *site) pipes() (used, made int) {
	streamtest.Do(s.loop, func() {
		var free int
		free, made = s.loop.Pipes()
		used = made - free
	})
	return used, made
}

// wantSpliced expects that a splice has moved something, and has given its pipe back.
func (s *site) wantSpliced() {
	s.t.Helper()
	if used, made := s.pipes(); used != 0 || made == 0 {
		s.t.Errorf("%d of %d pipes are in use", used, made)
	}
}

// wantNoPipe expects that a pipe with bytes was not kept.
func (s *site) wantNoPipe() {
	s.t.Helper()
	if _, made := s.pipes(); made != 0 {
		s.t.Errorf("there are %d pipes", made)
	}
}

// full waits until a splice is stuck because what it fills takes no more: for a while the
// bytes on the way have not changed.
func (s *site) full() {
	s.t.Helper()
	last, same := int64(-1), 0
	eventually(s.t, "it is full", func() bool {
		got := figures(s.counted)
		n := got["downstream_sent_bytes_total{public}"] + got["downstream_received_bytes_total{public}"]
		if used, _ := s.pipes(); used == 0 || n != last {
			last, same = n, 0
		}
		same++
		return same > 50
	})
}

// received waits until n bytes have come from clients, and settled until the loop has done
// what it can.
func (s *site) received(n int) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("%d bytes have come", n), func() bool { return s.got() >= n })
	s.settled()
}

func (s *site) got() int { return int(figures(s.counted)["downstream_received_bytes_total{public}"]) }

func (s *site) settled() {
	for range 3 {
		streamtest.Do(s.loop, func() {})
	}
}

// recorded waits for the only record, and for the figures that come with it: a loop adds them
// at the end of its turn.
func (s *site) recorded(want map[string]any) {
	s.t.Helper()
	eventually(s.t, "it is recorded", func() bool {
		return figures(s.counted)["access_log_records_total{"+s.records.path+"}"] == 1
	})
	s.settled()
	wantRecord(s.t, s.records.read(s.t)[0], want)
}

// wantBody reads just this body.
func (w *wire) wantBody(want []byte) {
	w.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(w.in, got); err != nil || !bytes.Equal(got, want) {
		w.t.Errorf("%d bytes of %d, %v; equal: %v", n, len(want), err, bytes.Equal(got, want))
	}
}

// pour writes for as long as somebody takes it.
func (w *wire) pour() (ended <-chan struct{}) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := noise(1, 1<<20); ; {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	}()
	w.t.Cleanup(func() { w.Close(); <-done })
	return done
}

func (w *wire) reset() {
	w.Conn.(*net.TCPConn).SetLinger(0)
	w.Close()
}

// wantCut expects that the connection ends, and returns what came before.
func (w *wire) wantCut() (n int64) {
	w.t.Helper()
	n, err := io.Copy(io.Discard, w.in)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.Error("the connection stays open")
	}
	return n
}

// play is an endpoint for requests that name the bodies of both directions: the target is
// /SEED/REQUEST/RESPONSE, with the sizes. It counts connections.
func (s *site) play(conns *atomic.Int64) (stop func()) {
	var all sync.WaitGroup
	quit := make(chan struct{})
	all.Go(func() {
		for {
			select {
			case u := <-s.conns:
				conns.Add(1)
				all.Go(u.answerAll)
				all.Go(func() { <-quit; u.Close() })
			case <-quit:
				return
			}
		}
	})
	return func() { close(quit); all.Wait() }
}

func (w *wire) answerAll() {
	for {
		r, err := http.ReadRequest(w.in)
		if err != nil {
			return
		}
		var seed, up, down int
		fmt.Sscanf(r.URL.Path, "/%d/%d/%d", &seed, &up, &down)
		if got, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(got, noise(seed, up)) {
			w.t.Errorf("%s: the endpoint got %d bytes, %v", r.URL.Path, len(got), err)
		}
		w.say("HTTP/1.1 200 OK\nContent-Length: %d\n\n", down)
		w.Write(noise(seed+1, down))
	}
}

// ask sends a request to play, and expects its answer.
func (w *wire) ask(seed, up, down int) {
	w.t.Helper()
	w.say("POST /%d/%d/%d HTTP/1.1\nHost: a.example\nContent-Length: %d\n\n", seed, up, down, up)
	if _, err := w.Write(noise(seed, up)); err != nil {
		w.t.Error(err)
	}
	w.wantHead("HTTP/1.1 200 OK\n", "Content-Length: "+strconv.Itoa(down)+"\n")
	w.wantBody(noise(seed+1, down))
}

// Bodies of every kind follow each other on connections that are kept on both sides.
func TestLargeBodiesAreSpliced(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ up, down int }{
		"of requests":  {large, 10},
		"of responses": {10, large},
		"both":         {large, large},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			var conns atomic.Int64
			defer s.play(&conns)()
			defer s.server.Close()
			c := s.client()
			c.ask(1, tt.up, tt.down)
			s.wantSpliced()
			c.ask(2, 100, 100)
			c.ask(3, tt.up+1, tt.down+1)
			if n := conns.Load(); n != 1 {
				t.Errorf("%d connections to the endpoint", n)
			}
			c.Close()
			eventually(t, "all is recorded", func() bool {
				return figures(s.counted)["access_log_records_total{"+s.records.path+"}"] == 3
			})
			s.settled()
			got := figures(s.counted)
			received, sent := int64(2*tt.up+1+100), int64(2*tt.down+1+100)
			if r, s := got["downstream_received_bytes_total{public}"]-received, got["downstream_sent_bytes_total{public}"]-sent; r < 0 || r > 300 || s < 0 || s > 500 {
				t.Errorf("beside the bodies %d bytes were received and %d sent", r, s)
			}
			wantRecord(t, s.records.read(t)[0], map[string]any{
				"status": 200, "reason": "", "received_bytes": float64(tt.up), "sent_bytes": float64(tt.down),
			})
		})
	}
}

func TestManyLargeBodiesAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	var conns atomic.Int64
	defer s.play(&conns)()
	defer s.server.Close()
	var all sync.WaitGroup
	const clients = 6
	for i := range clients {
		c := s.client()
		all.Go(func() {
			for k := range 3 {
				c.ask(100*i+k, (i+k)%3*(1<<20)+i, (i+k+1)%3*(1<<20)+k)
			}
		})
	}
	all.Wait()
	s.wantSpliced()
	if n := conns.Load(); n > clients {
		t.Errorf("%d connections to the endpoint: none is kept", n)
	}
}

// A response may end where its upload is still under way, both through pipes.
func TestALargeEarlyResponse(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("POST / HTTP/1.1\nHost: a.example\nContent-Length: %d\n\n", endless)
	sending := c.pour()
	u := s.endpoint()
	u.head()
	s.full()
	u.say("HTTP/1.1 200 OK\nContent-Length: %d\n\n", large+1)
	u.Write(noise(2, large))
	c.wantHead("HTTP/1.1 200 OK\n")
	c.wantBody(noise(2, large))
	u.say("x") // which may not reach a client that goes on sending
	c.wantCut()
	<-sending
	u.wantCut()
	s.recorded(map[string]any{"status": 200, "reason": "", "sent_bytes": float64(large + 1)})
	s.wantSpliced() // that of the request went with what was in it
}

func TestLargeBodiesOfOtherKinds(t *testing.T) {
	t.Parallel()
	body := noise(3, large)
	for name, tt := range map[string]struct {
		request string
		answer  string
		body    bool
		last    bool
	}{
		"HTTP/1.0":                {"GET / HTTP/1.0\nHost: a.example\n\n", "HTTP/1.1 200 OK\nContent-Length: %d\n\n", true, true},
		"HTTP/1.0, kept alive":    {"GET / HTTP/1.0\nHost: a.example\nConnection: keep-alive\n\n", "HTTP/1.1 200 OK\nContent-Length: %d\n\n", true, true},
		"HEAD":                    {"HEAD / HTTP/1.1\nHost: a.example\n\n", "HTTP/1.1 200 OK\nContent-Length: %d\n\n", false, false},
		"304":                     {"GET / HTTP/1.1\nHost: a.example\n\n", "HTTP/1.1 304 Not Modified\nContent-Length: %d\n\n", false, false},
		"an upstream that closes": {"GET / HTTP/1.1\nHost: a.example\n\n", "HTTP/1.1 200 OK\nConnection: close\nContent-Length: %d\n\n", true, false},
		"a client that closes":    {"GET / HTTP/1.1\nHost: a.example\nConnection: close\n\n", "HTTP/1.1 200 OK\nContent-Length: %d\n\n", true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			c := s.client()
			c.say("%s", strings.ReplaceAll(tt.request, "\n", "\r\n"))
			u := s.endpoint()
			u.head()
			u.say(tt.answer, large)
			if tt.body {
				go u.Write(body)
			}
			c.wantHead("Content-Length: " + strconv.Itoa(large) + "\n")
			if tt.body {
				c.wantBody(body)
				s.wantSpliced()
			} else {
				s.wantNoPipe()
			}
			if tt.last {
				if rest := c.rest(); rest != "" {
					t.Errorf("%q is left", rest)
				}
				return
			}
			c.say("GET /again HTTP/1.1\nHost: a.example\n\n")
			if strings.Contains(tt.answer, "close") {
				u = s.endpoint()
			}
			u.wantHead("GET /again")
			u.say("HTTP/1.1 204 No Content\n\n")
			c.wantHead("HTTP/1.1 204 No Content\n")
		})
	}
}

// downloading has a large response move until the client takes no more.
func downloading(t *testing.T, options ...func(*site)) (s *site, c, u *wire) {
	t.Helper()
	s = newSite(t, options...)
	c = s.client()
	c.say("GET / HTTP/1.1\nHost: a.example\n\n")
	u = s.endpoint()
	u.head()
	u.say("HTTP/1.1 200 OK\nContent-Length: %d\n\n", endless)
	c.wantHead("HTTP/1.1 200 OK\n")
	return s, c, u
}

// uploading has a large request move until the endpoint takes no more.
func uploading(t *testing.T, options ...func(*site)) (s *site, c, u *wire) {
	t.Helper()
	s = newSite(t, options...)
	c = s.client()
	c.say("POST / HTTP/1.1\nHost: a.example\nContent-Length: %d\n\n", endless)
	c.Write([]byte("x"))
	u = s.endpoint()
	u.head()
	u.want("x")
	return s, c, u
}

func TestASplicedResponseIsCut(t *testing.T) {
	t.Parallel()
	t.Run("by its client", func(t *testing.T) {
		t.Parallel()
		s, c, u := downloading(t)
		sending := u.pour()
		s.full()
		c.reset()
		<-sending
		s.recorded(map[string]any{"status": 200, "reason": "the client has gone"})
		s.wantNoPipe()
	})
	t.Run("by its client, while the upstream says nothing", func(t *testing.T) {
		t.Parallel()
		s, c, u := downloading(t)
		u.Write(noise(1, large))
		c.wantBody(noise(1, large))
		c.closeWrite() // which owes us nothing, and so has gone
		u.wantCut()
		s.recorded(map[string]any{"status": 200, "reason": "the client has gone", "sent_bytes": float64(large)})
		s.wantSpliced()
	})
	for name, cut := range map[string]func(u *wire){"the upstream's end": func(u *wire) { u.Close() }, "the upstream's reset": (*wire).reset} {
		t.Run("by "+name, func(t *testing.T) {
			t.Parallel()
			s, c, u := downloading(t)
			u.Write(noise(1, large))
			c.wantBody(noise(1, large)) // before a reset, which takes along what was not read
			cut(u)
			if n := c.wantCut(); n > 0 {
				t.Errorf("%d bytes more", n)
			}
			s.recorded(map[string]any{"status": 200, "sent_bytes": float64(large)})
			if got := figures(s.counted)["downstream_requests_cut_total{public,holdfast}"]; got != 1 {
				t.Errorf("%d requests were cut by us", got)
			}
			s.wantSpliced()
		})
	}
	t.Run("by the upstream's end, with bytes on the way", func(t *testing.T) {
		t.Parallel()
		_, c, u := downloading(t)
		go func() { u.Write(noise(1, large)); u.Close() }()
		c.wantBody(noise(1, large))
		if n := c.wantCut(); n > 0 {
			t.Errorf("%d bytes more", n)
		}
	})
	t.Run("by the stop", func(t *testing.T) {
		t.Parallel()
		s, c, u := downloading(t)
		sending := u.pour()
		s.full()
		s.server.Close()
		<-sending
		c.wantCut()
		s.recorded(map[string]any{"status": 200, "reason": "cut when the time of the drain or the stop was over"})
		s.wantNoPipe()
	})
}

func idleAfter(d time.Duration) func(*site) { return func(s *site) { s.idle = d } }

func TestTheIdleTimeOfASplicedResponse(t *testing.T) {
	t.Parallel()
	t.Run("a slow client that moves", func(t *testing.T) {
		t.Parallel()
		s, c, u := downloading(t, idleAfter(5*time.Second))
		clock := streamtest.NewClock(s.loop)
		sending := u.pour()
		for range 3 {
			s.full()
			clock.Advance(4 * time.Second)
			sent := func() int64 { return figures(s.counted)["downstream_sent_bytes_total{public}"] }
			for before := sent(); sent() == before; {
				if _, err := io.CopyN(io.Discard, c.in, 64<<10); err != nil {
					t.Fatal(err)
				}
			}
		}
		s.full()
		clock.Advance(2 * time.Second) // the client's kernel may have taken some until now
		clock.Advance(5*time.Second + late)
		<-sending
		c.wantCut()
		s.recorded(map[string]any{"status": 200, "reason": "no byte moved within the route's stream_idle_timeout, the client takes no more"})
		s.wantNoPipe()
	})
	t.Run("an upstream that stalls", func(t *testing.T) {
		t.Parallel()
		s, c, u := downloading(t, idleAfter(5*time.Second))
		clock := streamtest.NewClock(s.loop)
		for range 3 {
			u.Write(noise(1, large))
			c.wantBody(noise(1, large))
			s.settled()
			clock.Advance(4 * time.Second)
		}
		clock.Advance(time.Second + late)
		c.wantCut()
		u.wantCut()
		s.recorded(map[string]any{"status": 200, "reason": "no byte moved within the route's stream_idle_timeout", "sent_bytes": float64(3 * large)})
		s.wantSpliced()
	})
}

// What a client takes may lie in our kernel for long: until much of that has gone there is
// no room for more.
func TestAClientThatTakesWhatTheKernelHasIsNotIdle(t *testing.T) {
	t.Parallel()
	for name, framing := range map[string]string{
		"spliced": fmt.Sprintf("Content-Length: %d\r\n\r\n", endless),
		"copied":  fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n", endless),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, idleAfter(5*time.Second))
			clock := streamtest.NewClock(s.loop)
			c := s.client()
			c.Conn.(*net.TCPConn).SetReadBuffer(32 << 10)
			c.say("GET / HTTP/1.1\nHost: a.example\n\n")
			u := s.endpoint()
			u.head()
			u.say("HTTP/1.1 200 OK\n%s", framing)
			c.wantHead("HTTP/1.1 200 OK\n")
			sending := u.pour()
			before := s.stuck()
			for range 4 {
				clock.Advance(4 * time.Second)
				c.takeSome()
			}
			if n := s.server.Requests(); n != 1 {
				t.Error("it was cut")
			}
			if sent := s.stuck(); sent != before {
				t.Errorf("%d bytes more were given to the kernel: this tests nothing", sent-before)
			}
			clock.Advance(2 * time.Second)
			clock.Advance(5*time.Second + late)
			<-sending
			c.wantCut()
			s.recorded(map[string]any{"status": 200, "reason": "no byte moved within the route's stream_idle_timeout, the client takes no more"})
		})
	}
}

// stuck waits until a client is given no more, and returns how many bytes it was given.
func (s *site) stuck() (sent int64) {
	s.t.Helper()
	same := 0
	eventually(s.t, "it is full", func() bool {
		s.settled()
		n := figures(s.counted)["downstream_sent_bytes_total{public}"]
		if n != sent {
			sent, same = n, 0
		}
		same++
		return same > 50
	})
	return sent
}

// takeSome reads until more comes from where it is sent.
func (w *wire) takeSome() {
	w.t.Helper()
	there := func() int {
		n, err := unix.IoctlGetInt(w.fd(), unix.SIOCINQ)
		if err != nil {
			w.t.Fatal(err)
		}
		return n + w.in.Buffered()
	}
	for had, taken := there(), 0; there()+taken <= had; taken += 4 << 10 {
		if _, err := io.CopyN(io.Discard, w.in, 4<<10); err != nil {
			w.t.Fatal(err)
		}
	}
}

// fd is the connection's descriptor.
func (w *wire) fd() (fd int) {
	raw, err := w.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		w.t.Fatal(err)
	}
	raw.Control(func(p uintptr) { fd = int(p) })
	return fd
}

func TestADrainLetsASplicedResponseEnd(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("GET / HTTP/1.1\nHost: a.example\n\n")
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 200 OK\nContent-Length: %d\n\n", 2*large)
	u.Write(noise(1, large))
	c.wantHead("HTTP/1.1 200 OK\n")
	c.wantBody(noise(1, large))
	s.server.Drain(0)
	s.settled()
	u.Write(noise(2, large))
	c.wantBody(noise(2, large))
	if rest := c.rest(); rest != "" {
		t.Errorf("%q is left", rest)
	}
	s.recorded(map[string]any{"status": 200, "reason": "", "sent_bytes": float64(2 * large)})
	s.wantSpliced()
}

func TestASplicedRequestIsCut(t *testing.T) {
	t.Parallel()
	t.Run("by its client", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		c.Write(noise(1, large))
		c.reset()
		u.wantCut()
		s.recorded(map[string]any{"status": 0, "reason": "the client has gone"})
	})
	t.Run("by its client, while the upstream takes nothing", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		sending := c.pour()
		s.full()
		c.reset()
		<-sending
		u.wantCut()
		s.recorded(map[string]any{"status": 0, "reason": "the client has gone"})
		s.wantNoPipe()
	})
	t.Run("by its client's end", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		c.Write(noise(1, large))
		c.closeWrite()
		u.wantCut()
		s.recorded(map[string]any{"status": 0, "reason": "the client has gone"})
	})
	t.Run("by the upstream", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		sending := c.pour()
		s.full()
		u.reset()
		c.wantHead("HTTP/1.1 503 Service Unavailable\n")
		c.wantCut()
		<-sending
		s.recorded(map[string]any{"status": 503})
		s.wantNoPipe()
	})
	t.Run("by the upstream's answer", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		sending := c.pour()
		s.full()
		u.say("HTTP/1.1 413 Content Too Large\nContent-Length: 8\n\ntoo much")
		c.wantHead("HTTP/1.1 413 Content Too Large\n")
		c.want("too much")
		<-sending
		u.wantCut()
		s.recorded(map[string]any{"status": 413, "reason": ""})
		s.wantNoPipe()
	})
	t.Run("by the upstream's answer, while the client sends nothing", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		c.Write(noise(1, large))
		u.wantBody(noise(1, large))
		u.say("HTTP/1.1 413 Content Too Large\nContent-Length: 8\n\ntoo much")
		c.wantHead("HTTP/1.1 413 Content Too Large\n")
		c.want("too much")
		u.wantCut()
		c.wantCut()
		s.recorded(map[string]any{"status": 413, "reason": "", "received_bytes": float64(1 + large)})
		s.wantSpliced()
	})
	t.Run("by the stop", func(t *testing.T) {
		t.Parallel()
		s, c, u := uploading(t)
		sending := c.pour()
		s.full()
		s.server.Close()
		<-sending
		u.wantCut()
		s.recorded(map[string]any{"status": 0, "reason": "cut when the time of the drain or the stop was over"})
		s.wantNoPipe()
	})
}

func TestTheIdleTimeOfASplicedRequest(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		stalls func(s *site, c, u *wire)
		status int
		reason string
	}{
		"the client sends nothing": {func(s *site, c, u *wire) {
			c.Write(noise(1, large))
			u.wantBody(noise(1, large))
			s.settled()
		}, 408, ", the client's body was due"},
		"the upstream takes nothing": {func(s *site, c, u *wire) {
			c.pour()
			s.full()
		}, 504, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, c, u := uploading(t, idleAfter(5*time.Second))
			clock := streamtest.NewClock(s.loop)
			tt.stalls(s, c, u)
			clock.Advance(4 * time.Second)
			if n := s.server.Requests(); n != 1 {
				t.Error("it is answered too early")
			}
			clock.Advance(time.Second + late)
			c.wantHead("HTTP/1.1 "+strconv.Itoa(tt.status), "Connection: close\n")
			s.recorded(map[string]any{"status": tt.status, "reason": "no byte moved within the route's stream_idle_timeout" + tt.reason})
			if used, _ := s.pipes(); used != 0 {
				t.Error("a pipe is in use")
			}
		})
	}
}

// What is spliced must come as fast as what is read.
func TestTheLeastRateOfASplicedRequest(t *testing.T) {
	t.Parallel()
	limits := func(s *site) { s.limits.BodyTimeout, s.limits.BodyRate = 10*time.Second, 100 }
	type step struct {
		after time.Duration
		bytes int
	}
	for name, tt := range map[string]struct {
		steps  []step
		reason string // by the end of them; "": none
	}{
		"just enough":          {[]step{{5 * time.Second, 500}, {4900 * time.Millisecond, 500}, {9 * time.Second, 1}, {900 * time.Millisecond, 999}, {9 * time.Second, 0}}, ""},
		"too few":              {[]step{{4 * time.Second, 100}, {4 * time.Second, 100}, {2*time.Second + late, 0}}, "a body that came too slowly"},
		"too few for a window": {[]step{{4 * time.Second, 100}, {6 * time.Second, 1}, {0, 1}}, "a body that came too slowly"},
		"nothing":              {[]step{{4 * time.Second, 5000}, {10*time.Second + late, 0}}, "a body that came too slowly"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, c, u := uploading(t, limits)
			push := func(n int) {
				before := s.got()
				c.Write(noise(1, n))
				u.wantBody(noise(1, n))
				s.received(before + n)
			}
			clock := streamtest.NewClock(s.loop)
			push(large)
			s.wantSpliced()
			clock.Advance(9 * time.Second)
			push(1)
			clock.Advance(2 * time.Second)
			push(1) // ends the window in which all that has come
			for _, step := range tt.steps {
				clock.Advance(step.after)
				if step.bytes > 0 {
					before := s.got()
					c.Write(noise(1, step.bytes))
					s.received(before + step.bytes)
				}
			}
			s.settled()
			if answered := s.server.Requests() == 0; answered != (tt.reason != "") {
				t.Fatalf("refused: %v", answered)
			}
			if tt.reason == "" {
				return
			}
			c.wantHead("HTTP/1.1 408 Request Timeout\n", "Connection: close\n")
			s.recorded(map[string]any{"status": 408, "reason": tt.reason})
		})
	}
}

// TestTheLeastRateOfASplicedRequestIsTheClientsAlone has an upstream that takes its time.
func TestTheLeastRateOfASplicedRequestIsTheClientsAlone(t *testing.T) {
	t.Parallel()
	s, c, u := uploading(t, func(s *site) { s.limits.BodyTimeout, s.limits.BodyRate = 10*time.Second, 100 })
	clock := streamtest.NewClock(s.loop)
	body := noise(1, endless/16)
	go c.Write(body)
	s.full()
	for range 5 {
		clock.Advance(time.Minute)
	}
	u.wantBody(body)
	c.say("x") // the next one is in time as well
	u.want("x")
	if n := s.server.Requests(); n != 1 {
		t.Error("it was answered")
	}
	s.wantSpliced()
}

// The client sends what it has once it is told to go on.
func TestALargeBodyAfterA100(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say("PUT / HTTP/1.1\nHost: a.example\nExpect: 100-continue\nContent-Length: %d\n\n", large)
	u := s.endpoint()
	u.head()
	c.want("HTTP/1.1 100 Continue\n\n")
	go c.Write(noise(1, large))
	u.wantBody(noise(1, large))
	u.say("HTTP/1.1 201 Created\nContent-Length: 0\n\n")
	c.wantHead("HTTP/1.1 201 Created\n")
	s.wantSpliced()
	c.say("GET /again HTTP/1.1\nHost: a.example\n\n")
	u.wantHead("GET /again")
	u.say("HTTP/1.1 204 No Content\n\n")
	c.wantHead("HTTP/1.1 204 No Content\n")
}
