package tunnel_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
)

// shape says what the loops of a test have: each one its tunnels, buffers and pipes.
type shape struct{ loops, tunnels, buffers, pipes int }

func (r relay) onLoops() bool { return r.loops != shape{} }

// start makes loops, runs them, and stops them at the end of the test. Nothing may be
// in flight then.
func (s shape) start(t testing.TB) []tunnel.Loop {
	t.Helper()
	var loops []tunnel.Loop
	for range s.loops {
		fd, err := inflight.NewFile(2*s.tunnels, s.buffers)
		if err != nil {
			t.Fatal(err)
		}
		store, err := inflight.Open(fd, inflight.NewPipes(s.pipes, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		loop, err := poller.New()
		if err != nil {
			t.Fatal(errors.Join(err, store.Close()))
		}
		var running sync.WaitGroup
		running.Go(loop.Run)
		t.Cleanup(func() {
			loop.Stop()
			running.Wait()
			wantNothingClaimed(t, fd)
			if err := store.Close(); err != nil {
				t.Error(err)
			}
		})
		loops = append(loops, tunnel.Loop{Poller: loop, Store: store})
	}
	return loops
}

// claims are the two pages of a memory file that say whose bytes are in its buffers
// and pipes: a word of zero is nobody's.
const claimsAt, claimsSize = 4096, 2 * 4096

func wantNothingClaimed(t testing.TB, fd int) {
	t.Helper()
	claims := make([]byte, claimsSize)
	if n, err := unix.Pread(fd, claims, claimsAt); n != claimsSize || err != nil {
		t.Fatalf("read %d bytes of claims: %v", n, err)
	}
	if !bytes.Equal(claims, make([]byte, claimsSize)) {
		t.Error("bytes are still claimed to be in flight")
	}
}
