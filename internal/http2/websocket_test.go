package http2

import (
	"bytes"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"holdfast/internal/exchange"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// frames is a client that speaks HTTP/2 frame by frame.
type frames struct {
	t *testing.T
	net.Conn
	*http2.Framer
	settings map[http2.SettingID]uint32
	goAway   bool
}

func (s *testedServer) frames() *frames {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(3 * serverPatience))
	io.WriteString(conn, http2.ClientPreface)
	f := &frames{t: s.t, Conn: conn, Framer: http2.NewFramer(conn, conn), settings: make(map[http2.SettingID]uint32)}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.WriteSettings()
	for f.settings[http2.SettingMaxConcurrentStreams] == 0 {
		f.next()
	}
	f.WriteSettingsAck()
	return f
}

// next returns the next frame of a stream.
func (f *frames) next() http2.Frame {
	f.t.Helper()
	frame, err := f.ReadFrame()
	if err != nil {
		f.t.Fatalf("read a frame: %v", err)
	}
	switch frame := frame.(type) {
	case *http2.SettingsFrame:
		frame.ForeachSetting(func(s http2.Setting) error { f.settings[s.ID] = s.Val; return nil })
	case *http2.GoAwayFrame:
		f.goAway = true
	}
	return frame
}

// connect opens a stream.
func (f *frames) connect(id uint32, protocol string, more ...string) {
	f.t.Helper()
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	all := append([]string{":method", "CONNECT", ":protocol", protocol, ":scheme", "http", ":path", "/chat", ":authority", "x.test", "sec-websocket-version", "13"}, more...)
	for i := 0; i < len(all); i += 2 {
		e.WriteField(hpack.HeaderField{Name: all[i], Value: all[i+1]})
	}
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b.Bytes(), EndHeaders: true}); err != nil {
		f.t.Fatal(err)
	}
}

// answer returns the head of a stream's answer.
func (f *frames) answer() (fields map[string]string) {
	f.t.Helper()
	for {
		if h, ok := f.next().(*http2.MetaHeadersFrame); ok {
			fields = make(map[string]string)
			for _, field := range h.Fields {
				fields[field.Name] = field.Value
			}
			return fields
		}
	}
}

// wantData reads exactly these bytes.
func (f *frames) wantData(want string) {
	f.t.Helper()
	got := ""
	for len(got) < len(want) {
		if d, ok := f.next().(*http2.DataFrame); ok {
			got += string(d.Data())
		}
	}
	if got != want {
		f.t.Errorf("got %q, want %q", got, want)
	}
}

// end returns how a stream ends: the code of its reset, or false for END_STREAM.
func (f *frames) end() (code http2.ErrCode, reset bool) {
	f.t.Helper()
	for {
		switch frame := f.next().(type) {
		case *http2.RSTStreamFrame:
			return frame.ErrCode, true
		case *http2.DataFrame:
			if frame.StreamEnded() {
				return 0, false
			}
		}
	}
}

// switching answers upgrades as an endpoint would, and leaves the other end of each.
type switching struct {
	mu    sync.Mutex
	asked []exchange.Request
	pairs chan *pairEnd
}

type pairEnd struct {
	net.Conn
	cut  func()
	gone func() bool
}

func newSwitching() *switching { return &switching{pairs: make(chan *pairEnd, 10)} }

func (s *switching) Serve(tk *task.Task, e exchange.Exchange) {
	r := e.Request()
	s.mu.Lock()
	s.asked = append(s.asked, exchange.Request{Method: r.Method, Target: strings.Clone(r.Target), Upgrade: r.Upgrade, ContentLength: r.ContentLength, UpgradeBody: r.UpgradeBody})
	s.mu.Unlock()
	if r.Upgrade == "" || r.Fields.Has("X-Refuse") {
		answerWith(tk, e, 403, "no")
		return
	}
	head := e.(*serverExchange).head
	accept := acceptOf(head.key)
	if r.Fields.Has("X-Wrong") {
		accept = acceptOf("another")
	}
	resp := &exchange.Response{Status: 101, Upgrade: "websocket", Fields: exchange.Fields{
		{Name: "Sec-WebSocket-Accept", Value: accept}, {Name: "Sec-WebSocket-Protocol", Value: "chat"},
	}}
	if !e.(*serverExchange).Accepts(resp) {
		answerWith(tk, e, 502, "")
		return
	}
	p, first, err := e.Switch(resp)
	if err != nil || len(first) > 0 {
		return
	}
	f := os.NewFile(uintptr(p.FD), "end")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return
	}
	s.pairs <- &pairEnd{
		Conn: conn,
		cut:  func() { p.Resets.ByTunnel.Store(true); conn.Close() },
		gone: p.Resets.ByPeer.Load,
	}
}

func (s *switching) end(t *testing.T) *pairEnd {
	t.Helper()
	select {
	case p := <-s.pairs:
		t.Cleanup(func() { p.Close() })
		p.SetDeadline(time.Now().Add(2 * serverPatience))
		return p
	case <-time.After(2 * serverPatience):
		t.Fatal("no tunnel has begun")
		return nil
	}
}

func startSwitching(t *testing.T) (*testedServer, *switching) {
	h := newSwitching()
	return startServer(t, ServerOptions{Limits: limitsForTests(), Handler: h, Connect: true}), h
}

func TestAWebSocketOverHTTP2IsAnUpgradeForItsHandler(t *testing.T) {
	t.Parallel()
	s, h := startSwitching(t)
	f := s.frames()
	if f.settings[http2.SettingEnableConnectProtocol] != 1 {
		t.Errorf("the settings are %v", f.settings)
	}
	f.connect(1, "websocket", "sec-websocket-key", "the client's own")
	head := f.answer()
	if head[":status"] != "200" || head["sec-websocket-protocol"] != "chat" || head["sec-websocket-accept"] != "" || head["upgrade"] != "" {
		t.Errorf("the answer is %v", head)
	}
	p := h.end(t)
	f.WriteData(1, false, []byte("question"))
	got := make([]byte, 8)
	if _, err := io.ReadFull(p, got); err != nil || string(got) != "question" {
		t.Errorf("read %q, %v", got, err)
	}
	io.WriteString(p, "answer")
	f.wantData("answer")
	h.mu.Lock()
	if r := h.asked[0]; r.Method != "GET" || r.Target != "/chat" || r.Upgrade != "websocket" || r.ContentLength != 0 || r.UpgradeBody {
		t.Errorf("the handler was asked %+v", r)
	}
	h.mu.Unlock()
	if n, m := s.Requests(), s.Connections(); n != 0 || m != 0 {
		t.Errorf("%d requests and %d connections wait for the end of a tunnel", n, m)
	}
}

// What one side says of its end is what the other one is told.
func TestEndsOfAWebSocketOverHTTP2ArePassedOn(t *testing.T) {
	t.Parallel()
	begin := func(t *testing.T) (*testedServer, *frames, *pairEnd) {
		s, h := startSwitching(t)
		f := s.frames()
		f.connect(1, "websocket")
		f.answer()
		return s, f, h.end(t)
	}
	wantEnd := func(t *testing.T, p *pairEnd) {
		t.Helper()
		if n, err := p.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read %d bytes and %v, want an end", n, err)
		}
	}
	wantReset := func(t *testing.T, p *pairEnd) {
		t.Helper()
		for end := time.Now().Add(serverPatience); !p.gone(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the endpoint is not told of the reset")
			}
		}
	}
	t.Run("END_STREAM leaves the other direction", func(t *testing.T) {
		t.Parallel()
		_, f, p := begin(t)
		f.WriteData(1, true, nil)
		wantEnd(t, p)
		if p.gone() {
			t.Error("it was a reset")
		}
		io.WriteString(p, "the rest")
		f.wantData("the rest")
		p.Close()
		if code, reset := f.end(); reset {
			t.Errorf("the stream was reset: %v", code)
		}
	})
	t.Run("the endpoint's FIN", func(t *testing.T) {
		t.Parallel()
		_, f, p := begin(t)
		io.WriteString(p, "last")
		p.Conn.(*net.UnixConn).CloseWrite()
		f.wantData("last")
		if code, reset := f.end(); reset {
			t.Errorf("the stream was reset: %v", code)
		}
		wantEnd(t, p)
		if p.gone() {
			t.Error("the end was taken for a reset")
		}
	})
	t.Run("RST_STREAM", func(t *testing.T) {
		t.Parallel()
		_, f, p := begin(t)
		f.WriteRSTStream(1, http2.ErrCodeCancel)
		wantEnd(t, p)
		if !p.gone() {
			t.Error("it was not a reset")
		}
	})
	t.Run("RST_STREAM behind END_STREAM", func(t *testing.T) {
		t.Parallel()
		_, f, p := begin(t)
		f.WriteData(1, true, nil)
		wantEnd(t, p)
		f.WriteRSTStream(1, http2.ErrCodeCancel)
		wantReset(t, p)
	})
	t.Run("RST_STREAM while the endpoint takes nothing", func(t *testing.T) {
		t.Parallel()
		s, f, p := begin(t)
		full := s.stuck(f, 1)
		f.WriteRSTStream(1, http2.ErrCodeCancel)
		wantReset(t, p)
		if full == 0 {
			t.Error("nothing was on its way")
		}
	})
	t.Run("the client's connection", func(t *testing.T) {
		t.Parallel()
		_, f, p := begin(t)
		f.Close()
		wantEnd(t, p)
		if !p.gone() {
			t.Error("it was not a reset")
		}
	})
	t.Run("the endpoint's reset", func(t *testing.T) {
		t.Parallel()
		_, f, p := begin(t)
		p.cut()
		if code, reset := f.end(); !reset || code != http2.ErrCodeCancel {
			t.Errorf("reset: %v, %v; want CANCEL", reset, code)
		}
	})
}

// stuck sends on a stream, of which nobody takes anything, until its window is full, and returns how
// much that was. Then as much was taken from the window as the tunnel's socket has room for.
func (s *testedServer) stuck(f *frames, id uint32) (sent int) {
	window, part := streamWindow, make([]byte, maxFrame)
	for window >= maxFrame {
		if err := f.WriteData(id, false, part); err != nil {
			s.t.Fatal(err)
		}
		sent, window = sent+len(part), window-len(part)
		f.WritePing(false, [8]byte{})
		for {
			switch frame := f.next().(type) {
			case *http2.WindowUpdateFrame:
				if frame.StreamID == id {
					window += int(frame.Increment)
				}
				continue
			case *http2.PingFrame:
			default:
				continue
			}
			break
		}
	}
	return sent
}

func TestWhatIsNoWebSocketIsAnswered(t *testing.T) {
	t.Parallel()
	s, _ := startSwitching(t)
	f := s.frames()
	for i, test := range []struct {
		protocol, status string
		more             []string
	}{
		{"connect-udp", "501", nil},
		{"websocket", "403", []string{"x-refuse", "1"}},
		{"websocket", "502", []string{"x-wrong", "1"}},
	} {
		id := uint32(2*i + 1)
		f.connect(id, test.protocol, test.more...)
		if head := f.answer(); head[":status"] != test.status {
			t.Errorf("%s: the answer is %v, want %s", test.protocol, head, test.status)
		}
		f.WriteData(id, false, []byte("for nobody"))
	}
	f.connect(101, "websocket") // the connection is still good
	if head := f.answer(); head[":status"] != "200" {
		t.Errorf("the answer is %v", head)
	}
}

func TestWithoutItWebSocketsAreNotOffered(t *testing.T) {
	t.Parallel()
	s := startServer(t, ServerOptions{Limits: limitsForTests(), Handler: newSwitching()})
	f := s.frames()
	if _, offered := f.settings[http2.SettingEnableConnectProtocol]; offered {
		t.Error("it is offered")
	}
	f.connect(1, "websocket")
	if code, reset := f.end(); !reset || code != http2.ErrCodeProtocol {
		t.Errorf("reset: %v, %v; want PROTOCOL_ERROR", reset, code)
	}
}

// While a WebSocket lives no GOAWAY is sent, and nobody cuts its connection; then both happen.
func TestADrainWaitsForWebSocketsOverHTTP2(t *testing.T) {
	t.Parallel()
	s, h := startSwitching(t)
	f := s.frames()
	f.connect(1, "websocket")
	f.answer()
	p := h.end(t)
	s.Drain(0)
	s.Close()
	for range 3 {
		io.WriteString(p, "still here")
		f.wantData("still here")
	}
	if f.goAway {
		t.Error("there was a GOAWAY")
	}
	p.Close()
	for {
		if _, err := f.ReadFrame(); err != nil {
			break
		}
	}
}

// hasten has clients have hardly any time for the last that they are sent.
func (s *testedServer) hasten() {
	streamtest.Do(s.loop, func() { s.finish = time.Millisecond })
}

// A client that takes nothing keeps the stream for as long as there is a tunnel, and not for ever
// what one has left behind.
func TestAClientTakesNothingOfATunnelThatIsOver(t *testing.T) {
	t.Parallel()
	s, h := startSwitching(t)
	s.hasten()
	f := s.frames()
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	f.connect(1, "websocket")
	f.connect(3, "websocket")
	f.answer()
	f.answer()
	p, other := h.end(t), h.end(t)
	io.WriteString(p, "nobody reads this")
	io.WriteString(other, "nor that")
	p.Close()
	if _, reset := f.end(); !reset {
		t.Error("the stream has ended properly")
	}
	if other.gone() {
		t.Error("a tunnel was given up that is there")
	}
}

// Nor does one that takes nothing keep what was refused.
func TestAClientTakesNothingOfARefusal(t *testing.T) {
	t.Parallel()
	s, _ := startSwitching(t)
	s.hasten()
	f := s.frames()
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	f.connect(1, "another")
	if _, reset := f.end(); !reset {
		t.Error("the stream has ended properly")
	}
}
