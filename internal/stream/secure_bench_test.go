package stream_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
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

// BenchmarkHandshake has both sides in one process: what it costs us is the difference between who is
// the server.
func BenchmarkHandshake(b *testing.B) {
	for _, resumed := range []bool{false, true} {
		for _, ours := range []bool{false, true} {
			b.Run(fmt.Sprintf("resumed %v, on a loop %v", resumed, ours), func(b *testing.B) {
				w, s := start(b), newSides(b, 0)
				if resumed {
					s.client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
				}
				b.ReportAllocs()
				began := processorTime(b)
				defer func() { b.ReportMetric(float64(processorTime(b)-began)/float64(b.N), "cpu-ns/op") }()
				for b.Loop() {
					c, far := w.adoptAny(true)
					if ours {
						conn := w.secure(c, far, s, true)
						w.run(func(t *task.Task) { _ = c.Send(t, []byte("x"), nil, nil) })
						_, _ = conn.Read(make([]byte, 1))
						far.Close()
						w.on(c.Close)
						continue
					}
					var near net.Conn
					w.on(func() { near, _ = c.Blocking() })
					server, client := tls.Server(near, s.server), tls.Client(far, s.client)
					done := make(chan struct{})
					go func() { defer close(done); _ = server.Handshake(); _, _ = server.Write([]byte("x")) }()
					_ = client.Handshake()
					_, _ = client.Read(make([]byte, 1))
					<-done
					near.Close()
					far.Close()
				}
			})
		}
	}
}

// processorTime is what the process has used of it: what waits for a processor takes none.
func processorTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
