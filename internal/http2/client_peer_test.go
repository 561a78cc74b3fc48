package http2

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// patience is how long a test waits for what has to come.
const patience = 30 * time.Second

// upstreamPeer is an upstream in the hands of a test: it sends and expects frames.
type upstreamPeer struct {
	t    *testing.T
	conn net.Conn
	fr   *http2.Framer
	buf  bytes.Buffer
	enc  *hpack.Encoder
}

// testOwner notes what a connection tells.
type testOwner struct {
	room, leaving chan struct{}
	ended         chan bool
}

func newTestOwner() *testOwner {
	return &testOwner{make(chan struct{}, 1000), make(chan struct{}, 10), make(chan bool, 10)}
}

func (o *testOwner) owner() Owner {
	return Owner{
		Room:    func() { o.room <- struct{}{} },
		Leaving: func() { o.leaving <- struct{}{} },
		Ended:   func(byPeer bool) { o.ended <- byPeer },
	}
}

func wait[T any](t *testing.T, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("no %s", what)
	}
	return v
}

// pair returns two ends of a TCP connection.
func dialPair(t testing.TB) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if ours, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if theirs, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// conversation is a connection with a loop for its exchanges, and its peer.
type conversation struct {
	*upstreamPeer
	*testOwner
	client *ClientConn
	loop   *stream.Loop
}

// converse makes a connection to a peer with these settings.
func converse(t *testing.T, o ClientOptions, settings ...http2.Setting) *conversation {
	t.Helper()
	ours, theirs := dialPair(t)
	_ = theirs.SetDeadline(time.Now().Add(patience))
	p := &upstreamPeer{t: t, conn: theirs, fr: http2.NewFramer(theirs, theirs)}
	p.enc = hpack.NewEncoder(&p.buf)
	p.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	v := &conversation{upstreamPeer: p, testOwner: newTestOwner(), loop: streamtest.New(t)}
	began := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		var err error
		v.client, err = NewClient(o).Begin(ctx, ours, false, v.owner())
		began <- err
	}()
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(theirs, preface); err != nil || string(preface) != http2.ClientPreface {
		t.Fatalf("preface %q, %v", preface, err)
	}
	p.must(p.fr.WriteSettings(settings...))
	for ping := false; !ping; {
		switch f := p.read().(type) {
		case *http2.PingFrame:
			p.must(p.fr.WritePing(true, f.Data))
			ping = true
		case *http2.SettingsFrame:
			if !f.IsAck() {
				p.must(p.fr.WriteSettingsAck())
			}
		}
	}
	if err := wait(t, began, "connection"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.client.Close()
		theirs.Close()
		wait(t, v.ended, "end")
	})
	return v
}

func (p *upstreamPeer) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// read returns the next frame.
func (p *upstreamPeer) read() http2.Frame {
	p.t.Helper()
	f, err := p.fr.ReadFrame()
	if err != nil {
		p.t.Fatal("no further frame:", err)
	}
	return f
}

// want returns the next frame of a kind, and passes over settings, windows and PINGs.
func want[F http2.Frame](p *upstreamPeer) F {
	p.t.Helper()
	for {
		switch f := p.read().(type) {
		case F:
			return f
		case *http2.SettingsFrame, *http2.WindowUpdateFrame, *http2.PingFrame:
		default:
			p.t.Fatalf("got %v, want %T", f, *new(F))
		}
	}
}

// request returns the next request's head, as "name: value" lines.
func (p *upstreamPeer) request() (stream uint32, head []string, end bool) {
	p.t.Helper()
	f := want[*http2.MetaHeadersFrame](p)
	for _, h := range f.Fields {
		head = append(head, h.Name+": "+h.Value)
	}
	return f.StreamID, head, f.StreamEnded()
}

// head sends a head of "name: value" lines.
func (p *upstreamPeer) head(stream uint32, end bool, lines ...string) {
	p.t.Helper()
	p.buf.Reset()
	for _, l := range lines {
		i := strings.Index(l[1:], ": ") + 1
		p.must(p.enc.WriteField(hpack.HeaderField{Name: l[:i], Value: l[i+2:]}))
	}
	b := p.buf.Bytes()
	first := b[:min(len(b), 16<<10)]
	b = b[len(first):]
	p.must(p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: first, EndStream: end, EndHeaders: len(b) == 0}))
	for len(b) > 0 {
		part := b[:min(len(b), 16<<10)]
		b = b[len(part):]
		p.must(p.fr.WriteContinuation(stream, len(b) == 0, part))
	}
}

func (p *upstreamPeer) data(stream uint32, end bool, s string) {
	p.t.Helper()
	p.must(p.fr.WriteData(stream, end, []byte(s)))
}

// exchange begins one.
func (v *conversation) exchange() *drivenStream {
	v.t.Helper()
	up, ok := v.client.Exchange(v.loop, false)
	if !ok {
		v.t.Fatal("the connection takes no exchange")
	}
	d := &drivenStream{v: v, up: up}
	v.t.Cleanup(d.close)
	return d
}

// get sends a request, of which the peer has the head.
func (v *conversation) get() (*drivenStream, uint32) {
	v.t.Helper()
	d := v.exchange()
	d.send(get("/"))
	id, _, _ := v.request()
	return d, id
}

func get(target string) *exchange.Request {
	return &exchange.Request{Method: "GET", Target: target, Authority: "a.test", Major: 1, Minor: 1}
}

// drivenStream is an exchange whose calls a test makes from its own goroutine.
type drivenStream struct {
	v  *conversation
	up exchange.Upstream
}

func (d *drivenStream) on(fn func(t *task.Task)) { streamtest.Go(d.v.loop, fn) }

func (d *drivenStream) close() { streamtest.Do(d.v.loop, d.up.Close) }

func (d *drivenStream) send(r *exchange.Request) {
	d.v.t.Helper()
	var err error
	d.on(func(t *task.Task) {
		if err = d.up.Send(t, r); err == nil && r.ContentLength == 0 {
			err = d.up.Finish(t, nil)
		}
	})
	if err != nil {
		d.v.t.Fatal(err)
	}
}

func (d *drivenStream) receive() (resp *exchange.Response, err error) {
	d.on(func(t *task.Task) { resp, err = d.up.Receive(t) })
	return resp, err
}

// status receives a head, and wants that status.
func (d *drivenStream) status(want int) *exchange.Response {
	d.v.t.Helper()
	resp, err := d.receive()
	if err != nil || resp.Status != want {
		d.v.t.Fatalf("got %+v, %v, want %d", resp, err, want)
	}
	return resp
}

// rest reads the body to its end.
func (d *drivenStream) rest() (body string, err error) {
	d.on(func(t *task.Task) {
		var b []byte
		for err == nil {
			var p []byte
			p, err = d.up.Read(t)
			b = append(b, p...)
		}
		body = string(b)
	})
	if err == io.EOF {
		err = nil
	}
	return body, err
}

func (d *drivenStream) wantRest(want string) {
	d.v.t.Helper()
	if got, err := d.rest(); err != nil || got != want {
		d.v.t.Fatalf("got a body of %d bytes, %v, want %d", len(got), err, len(want))
	}
}

func (d *drivenStream) write(s string) (err error) {
	d.on(func(t *task.Task) { err = d.up.Write(t, []byte(s)) })
	return err
}

func (d *drivenStream) finish(trailers ...exchange.Field) (err error) {
	d.on(func(t *task.Task) { err = d.up.Finish(t, trailers) })
	return err
}
