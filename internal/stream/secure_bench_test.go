package stream_test

import (
	"fmt"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/task"
)

// BenchmarkSend sends to a peer that reads and does nothing else, with TLS and without. With
// TLS that peer's own work is not ours: it throws away what it has not decrypted.
func BenchmarkSend(b *testing.B) {
	for _, secured := range []bool{false, true} {
		for _, size := range []int{100, 16 << 10, 64 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("TLS %v, %d", secured, size), func(b *testing.B) {
				w := start(b)
				c, far := w.adoptAny(true)
				if secured {
					w.secure(c, far, newSides(b, 0), true)
				}
				go io.Copy(io.Discard, onlyReads{far})
				p := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				w.run(func(t *task.Task) {
					for b.Loop() {
						if err := c.Send(t, p, nil, nil); err != nil {
							b.Error(err)
							return
						}
					}
				})
				w.on(func() { unix.Shutdown(c.FD(), unix.SHUT_RDWR) })
			})
		}
	}
}

// onlyReads has no other way of copying.
type onlyReads struct{ io.Reader }
