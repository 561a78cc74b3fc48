package tunnel_test

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// Runs alone: it looks at the heap of the whole process.
func TestStalledReceiversBoundMemory(t *testing.T) {
	const n = 200 // tunnels, stalled both ways
	for _, r := range []relay{onLoops, onGoroutines} {
		t.Run(r.name, func(t *testing.T) {
			var loops []tunnel.Loop
			growth, buffers := uint64(2*n*r.buffer+4<<20), 2*n
			if r.onLoops() {
				shape := shape{loops: 2, tunnels: n, buffers: 16, pipes: 4}
				loops = shape.start(t)
				growth, buffers = 1<<20, shape.loops*shape.buffers
			}
			set := r.newSetWith(t, tunnel.Options{Loops: loops})
			var flows []*flow
			for range n {
				client, down := tcpPair(t, true)
				server, up := tcpPair(t, true)
				set.Start(tunnel.Spec{Down: down, Up: up})
				flows = append(flows, &flow{from: client, to: server}, &flow{from: server, to: client})
			}
			other, otherServer := open(t, set, tunnel.Spec{})
			before := heap()
			stall(t, flows)
			if got := heap(); got > before+growth {
				t.Errorf("the heap has grown by %d KiB, want %d at most", (got-before)>>10, growth>>10)
			}
			if held := set.Buffers(); held < 1 || held > buffers {
				t.Errorf("%d buffers are held, want 1 to %d", held, buffers)
			}
			for _, l := range loops {
				if held, pipes := l.Store.Held(); held > 16 || pipes > 4 {
					t.Errorf("a loop holds %d buffers and %d pipes", held, pipes)
				}
			}
			// Where every buffer is taken, others are relayed all the same.
			for range 3 {
				write(t, other, pattern(0, 100<<10))
				wantBytes(t, otherServer, string(pattern(0, 100<<10)))
			}
			var readers sync.WaitGroup
			for _, f := range flows {
				readers.Go(func() { f.check(t) })
			}
			readers.Wait()
			eventually(t, "no buffer is held", func() bool { return set.Buffers() == 0 })
		})
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}

// flow is what one end of a tunnel has sent to the other.
type flow struct {
	from, to tcpConn
	sent     int
}

// stall sends until nobody takes any more.
func stall(t testing.TB, flows []*flow) {
	t.Helper()
	stream := pattern(0, 1<<20) // more than the kernel takes of one
	rest := 0                   // rounds in which nobody took anything
	eventually(t, "all senders are held back", func() bool {
		taken := 0
		for _, f := range flows {
			n := writeNow(t, f.from, stream[f.sent:])
			f.sent += n
			taken += n
		}
		rest++
		if taken > 0 {
			rest = 0
		}
		return rest > 100
	})
}

// writeNow writes what the kernel takes without waiting.
func writeNow(t testing.TB, c tcpConn, p []byte) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if werr := raw.Write(func(fd uintptr) bool {
		n, err = unix.Write(int(fd), p)
		return true
	}); werr != nil || err != nil && err != unix.EAGAIN {
		t.Fatal(errors.Join(werr, err))
	}
	return max(n, 0)
}

// check reads all that was sent.
func (f *flow) check(t testing.TB) {
	t.Helper()
	got := make([]byte, f.sent)
	if n, err := io.ReadFull(f.to, got); err != nil || !bytes.Equal(got, pattern(0, f.sent)) {
		t.Errorf("%d bytes of %d have come, or not what was sent: %v", n, f.sent, err)
	}
}
