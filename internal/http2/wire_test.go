package http2

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// scripted is a connection from which is read what is given, in pieces, and to which all is written.
type scripted struct {
	net.Conn
	pieces [][]byte
	wrote  bytes.Buffer
}

func (c *scripted) Read(p []byte) (int, error) {
	if len(c.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.pieces[0])
	if c.pieces[0] = c.pieces[0][n:]; len(c.pieces[0]) == 0 {
		c.pieces = c.pieces[1:]
	}
	return n, nil
}

func (c *scripted) Write(p []byte) (int, error) { return c.wrote.Write(p) }

// observer is told what passes, and notes it.
type observer struct{ heads map[uint32]*serverHead }

func (o *observer) opened(id uint32, h *serverHead) bool { o.heads[id] = h; return true }
func (o *observer) find(id uint32) *serverHead           { return o.heads[id] }
func (o *observer) malformed(*serverHead, error)         {}
func (o *observer) resetByClient(id uint32) bool         { delete(o.heads, id); return true }
func (o *observer) resetByUs(id uint32, _ http2.ErrCode) { delete(o.heads, id) }
func (o *observer) goAway(bool, http2.ErrCode)           {}
func (o *observer) flooded(flood)                        {}
func (o *observer) received(int)                         {}
func (o *observer) sent(int)                             {}

func seeds() (all [][]byte) {
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&b, nil)
	var text bytes.Buffer
	enc := hpack.NewEncoder(&text)
	for i, fields := 0, line("x-a", "b", "cookie", "c=d"); i < len(fields); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	block := text.Bytes()
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3], PadLength: 4, Priority: http2.PriorityParam{Weight: 3}})
	f.WriteContinuation(1, true, block[3:])
	f.WriteDataPadded(1, false, []byte("content"), []byte{0, 0})
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0, 3, 'x', '-', 't', 1, 'v'}, EndHeaders: true, EndStream: true})
	f.WritePing(false, [8]byte{})
	f.WriteRSTStream(1, http2.ErrCodeCancel)
	f.WriteGoAway(0, http2.ErrCodeNo, nil)
	all = append(all, bytes.Clone(b.Bytes()))
	f.WriteData(3, true, []byte("idle"))
	f.WriteContinuation(3, true, block)
	return append(all, bytes.Clone(b.Bytes()))
}

// pass has a wire read all of some bytes, in two pieces, and returns what the library would get.
func passed(t *testing.T, b []byte, at int) []byte {
	c := &scripted{pieces: [][]byte{b[:at], b[at:]}}
	if at == 0 {
		c.pieces = c.pieces[1:]
	}
	w := newWire(deadlineless{c}, &observer{map[uint32]*serverHead{}}, "http", 1<<16, 0)
	out, err := io.ReadAll(w)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// FuzzWire: what the library gets does not depend on how it comes, and is whole frames.
func FuzzWire(f *testing.F) {
	for _, b := range seeds() {
		for at := 0; at < len(b); at += 1 {
			f.Add(b, uint(at))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint) {
		if len(b) == 0 {
			return
		}
		whole := passed(t, b, 0)
		if split := passed(t, b, int(at%uint(len(b)))); !bytes.Equal(split, whole) {
			t.Errorf("split at %d: got %x, want %x", at, split, whole)
		}
	})
}

// FuzzWireOut: what leaves is what the library has sent, with what is put in between frames.
func FuzzWireOut(f *testing.F) {
	for _, b := range seeds() {
		b = b[len(http2.ClientPreface):]
		for at := range b {
			f.Add(b, uint(at))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint) {
		if len(b) == 0 {
			return
		}
		n := int(at % uint(len(b)))
		var sent [2][]byte
		for i := range sent {
			c := &scripted{}
			w := newWire(deadlineless{c}, &observer{map[uint32]*serverHead{}}, "http", 1<<16, 0)
			w.connects = true
			w.resetAs(1, http2.ErrCodeProtocol)
			if i == 0 {
				w.Write(b)
			} else {
				w.Write(b[:n])
				w.Write(b[n:])
			}
			sent[i] = c.wrote.Bytes()
		}
		if !bytes.Equal(sent[0], sent[1]) {
			t.Errorf("split at %d: got %x, want %x", n, sent[1], sent[0])
		}
	})
}

// A frame of our own stands between frames, wherever the library's are cut.
func TestOurFramesStandBetweenFrames(t *testing.T) {
	t.Parallel()
	b := seeds()[0][len(http2.ClientPreface):]
	ours := appendFrame(nil, http2.FrameGoAway, 0, 0, make([]byte, 8))
	for at := range b {
		c := &scripted{}
		w := newWire(deadlineless{c}, &observer{map[uint32]*serverHead{}}, "http", 1<<16, 0)
		w.Write(b[:at])
		w.inject(ours)
		w.Write(b[at:])
		f := http2.NewFramer(nil, &c.wrote)
		frames, goAways := 0, 0
		for {
			got, err := f.ReadFrame()
			if err != nil {
				if err != io.EOF {
					t.Errorf("cut at %d: %v", at, err)
				}
				break
			}
			frames++
			if _, ok := got.(*http2.GoAwayFrame); ok {
				goAways++
			}
		}
		if frames != 9 || goAways != 2 {
			t.Errorf("cut at %d: %d frames, %d of them GOAWAY", at, frames, goAways)
		}
	}
}

// deadlineless is a connection without deadlines.
type deadlineless struct{ *scripted }

func (deadlineless) SetReadDeadline(time.Time) error  { return nil }
func (deadlineless) SetWriteDeadline(time.Time) error { return nil }
func (deadlineless) Close() error                     { return nil }
