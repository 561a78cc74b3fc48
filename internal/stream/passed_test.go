package stream_test

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// heir is who goes on with a socket.
type heir struct {
	index uint32
	e     poller.Events
}

func (h *heir) Ready(index uint32, e poller.Events) { h.index, h.e = index, h.e|e }

// A socket that is passed on stays on the loop. What the kernel has told goes along, and what
// it tells later is its new owner's.
func TestASocketIsPassedOnWithoutLeavingItsLoop(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	far.Write([]byte("head and more"))
	w.run(func(t *task.Task) {
		c.Fill(t)
		c.Consume(5)
	})
	var h heir
	var p stream.Passed
	w.on(func() {
		p = c.PassOn()
		w.loop.Pass(p.Handle, &h, 4711)
	})
	if string(p.Early) != "and more" || c.Open() || p.Events&poller.Readable != 0 || p.Events&poller.Writable == 0 {
		t.Errorf("%q, open: %v, events: %b", p.Early, c.Open(), p.Events)
	}
	far.Write([]byte("x"))
	w.on(func() {
		if h.index != 4711 || h.e&poller.Readable == 0 {
			t.Errorf("%d was told %b", h.index, h.e)
		}
		p.Leave(w.loop)
		h = heir{}
	})
	far.Write([]byte("y"))
	w.on(func() {
		if h != (heir{}) {
			t.Error("it is told of a socket that has left")
		}
		p.Close(w.loop)
	})

	c, far = w.adopt(nil)
	far.Write([]byte("unread"))
	w.on(func() {}) // it is told
	w.on(func() {
		if p = c.PassOn(); p.Events&poller.Readable == 0 {
			t.Errorf("of unread bytes is known: %b", p.Events)
		}
		p.Close(w.loop)
	})
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Error("it is open")
	}
}

// tcp returns a TCP connection on the loop that has urgent bytes in its stream, and its other
// end.
func (w *world) tcp() (c *stream.Conn, far net.Conn) {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	defer ln.Close()
	c = new(stream.Conn)
	w.run(func(t *task.Task) {
		err = w.loop.Dial(t, c, ln.Addr().(*net.TCPAddr).AddrPort(), &stream.DialOptions{
			KeepAlive: stream.KeepAlive{Idle: time.Minute, Interval: time.Minute, Count: 1},
		})
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.on(c.Close) })
	if far, err = ln.Accept(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { far.Close() })
	return c, far
}

// Reads stop at an urgent byte, although more is there behind it.
func TestUrgentBytesAreLikeAllOthers(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.tcp()
	raw, err := far.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	far.Write([]byte("before"))
	raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
	if err != nil {
		t.Fatal(err)
	}
	far.Write([]byte("behind"))
	w.await(w.begin(func(tk *task.Task) {
		c.Limit(w.loop.Now().Add(bound / 2))
		for len(c.Buffered()) < len("before!behind") {
			if err := c.Fill(tk); err != nil {
				t.Errorf("after %q: %v", c.Buffered(), err)
				return
			}
		}
		if got := string(c.Buffered()); got != "before!behind" {
			t.Errorf("%q", got)
		}
		c.Consume(len(c.Buffered()))
		if !c.Quiet() {
			t.Error("something is left")
		}
	}))
}
