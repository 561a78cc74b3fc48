package stream_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// TestADeadlineIsTheReadersWhereOneWaits: a send that waits at the same time goes on.
func TestADeadlineIsTheReadersWhereOneWaits(t *testing.T) {
	t.Parallel()
	w := start(t)
	c, far := w.adopt(nil)
	const size = 8 << 20
	sends := w.begin(func(t *task.Task) {
		if err := c.Send(t, make([]byte, size), nil, nil); err != nil {
			w.t.Errorf("the send: %v", err)
		}
	})
	w.run(func(t *task.Task) {
		c.Limit(w.loop.Now().Add(time.Millisecond))
		for range 2 { // it is late until the deadline is another one
			if err := c.Fill(t); !errors.Is(err, os.ErrDeadlineExceeded) {
				w.t.Errorf("the read: %v", err)
			}
		}
	})
	for got := 0; got < size; {
		n, err := far.Read(make([]byte, 64<<10))
		if got += n; err != nil {
			t.Fatal(err)
		}
	}
	w.await(sends)
	far.Write([]byte("x"))
	w.run(func(t *task.Task) {
		c.Limit(time.Time{})
		if err := c.Fill(t); err != nil {
			w.t.Errorf("behind another deadline: %v", err)
		}
		c.Close()
	})
}

// steady keeps the kernel from enlarging the buffers between the two: it would take much at
// once, and there would be room for more before anybody has looked.
func steady(t *testing.T, c *stream.Conn, far halfConn) {
	t.Helper()
	if err := unix.SetsockoptInt(c.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := far.(interface{ SetReadBuffer(int) error }).SetReadBuffer(32 << 10); err != nil {
		t.Fatal(err)
	}
}

// A sender learns that its peer takes what the kernel had, although there is no room for
// more yet.
func TestWhatAPeerTakesIsKnownWhileASendWaits(t *testing.T) {
	t.Parallel()
	for _, tcp := range []bool{false, true} {
		w := start(t)
		c, far := w.adoptAny(tcp)
		steady(t, c, far)
		taken := func() (yes bool) {
			w.on(func() { yes = c.Taken(1) })
			return yes
		}
		takenAll := func(least int) (yes bool) {
			w.on(func() { yes = c.Taken(least) })
			return yes
		}
		if taken() {
			t.Error("it is said where nothing waits")
		}
		full := fill(c)
		sending := w.begin(func(t *task.Task) { c.Send(t, []byte("more"), nil, nil) })
		w.on(func() {})
		if !taken() {
			t.Error("who has not looked before cannot know that it has taken nothing")
		}
		for range 3 { // the kernel may take some by itself
			taken()
		}
		if taken() {
			t.Error("nothing was taken")
		}
		for read, end := 0, time.Now().Add(bound); !taken(); read += 4 << 10 {
			if readN(t, far, 4<<10); read > full/2 || time.Now().After(end) {
				t.Fatalf("nobody knows that %d bytes of %d were taken", read, full)
			}
		}
		// What was taken in several goes counts together, and not before it is enough.
		least, read := full/8, 0
		for end := time.Now().Add(bound); !takenAll(least); read += 4 << 10 {
			if readN(t, far, 4<<10); time.Now().After(end) {
				t.Fatalf("nobody knows that %d bytes of %d were taken", read, full)
			}
		}
		if read < least/2 {
			t.Errorf("%d bytes were read, and %d are said to be taken", read, least)
		}
		if takenAll(least) {
			t.Error("so much was not taken since")
		}
		if taken() {
			t.Error("it is said again")
		}
		w.on(c.Close)
		w.await(sending)
	}
}
