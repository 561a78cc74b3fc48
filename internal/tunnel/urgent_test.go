package tunnel_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel"
)

// sendUrgent sends a byte as urgent data (RFC 9293 §3.8.5), which any peer can.
func sendUrgent(t testing.TB, c tcpConn, b byte) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), []byte{b}, unix.MSG_OOB|unix.MSG_DONTWAIT, nil)
		return err != unix.EAGAIN
	})
	if err != nil {
		t.Errorf("urgent data: %v", err)
	}
}

// At an urgent mark a read stops short, and a splice sees nothing, or after a FIN the
// end, although bytes stand behind it.
func TestWhatStandsBehindAnUrgentMarkIsNotForgotten(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name          string
		before, after int
	}{{"few bytes", 6, 5}, {"many bytes", 100 << 10, 50 << 10}} {
		for _, fin := range []bool{false, true} {
			t.Run(fmt.Sprint(test.name, ", FIN: ", fin), func(t *testing.T) {
				t.Parallel()
				r := relay{loops: shape{loops: 1, tunnels: 2, buffers: 8, pipes: 2}}
				loops := r.loops.start(t)
				set := relay{}.newSetWith(t, tunnel.Options{Loops: loops})
				client, server := open(t, set, tunnel.Spec{})
				write(t, client, []byte("hello"))
				wantBytes(t, server, "hello")
				thaw := freeze(loops[0])
				want := pattern(0, test.before+1+test.after)
				write(t, client, want[:test.before])
				sendUrgent(t, client, want[test.before])
				write(t, client, want[test.before+1:])
				if fin {
					client.CloseWrite()
				}
				thaw()
				wantBytes(t, server, string(want))
				client.CloseWrite()
				wantEOF(t, server)
			})
		}
	}
}

func TestUrgentBytesStayInOrder(t *testing.T) {
	t.Parallel()
	for _, s := range []shape{{}, {1, 2, 1, 0}, {1, 2, 2, 1}, {1, 2, 8, 2}} {
		t.Run(fmt.Sprintf("%+v", s), func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(8) {
				set, _ := relay{loops: s}.newSet(t)
				client, down := tcpPair(t, seed%2 == 0)
				server, up := tcpPair(t, seed%3 == 0)
				set.Start(tunnel.Spec{Down: down, Up: up})
				want := pattern(0, 2<<20)
				var sending sync.WaitGroup
				sending.Go(func() {
					random := rand.New(rand.NewPCG(seed, 2))
					for rest := want; len(rest) > 0; {
						sendUrgent(t, client, rest[0])
						n := 1 + random.IntN(min(len(rest), 1<<(1+random.IntN(18))))
						if _, err := client.Write(rest[1:n]); err != nil {
							t.Error(err)
							return
						}
						rest = rest[n:]
					}
					client.CloseWrite()
				})
				got, err := io.ReadAll(server)
				if err != nil || !bytes.Equal(got, want) {
					client.Close()
					sending.Wait()
					t.Fatalf("seed %d: %d of %d bytes, %v", seed, len(got), len(want), err)
				}
				server.Close()
				sending.Wait()
				client.Close()
			}
		})
	}
}
