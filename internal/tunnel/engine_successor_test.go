package tunnel_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
	"holdfast/internal/tunnel"
	"holdfast/internal/tunnel/inflight"
)

// mirror is a loop, and what somebody else holds of it: who would go on with its tunnels
// if this process died has no more than that, and two descriptors for each tunnel.
type mirror struct {
	t       testing.TB
	loop    tunnel.Loop
	buffers int
	file    int
	pipes   []inflight.Pipe
}

func newMirror(t testing.TB, s shape) *mirror {
	t.Helper()
	fd, err := inflight.NewFile(2*s.tunnels, s.buffers)
	if err != nil {
		t.Fatal(err)
	}
	m := &mirror{t: t, buffers: s.buffers, file: another(t, fd)}
	pipes := inflight.NewPipes(s.pipes, 1<<20)
	if len(pipes) != s.pipes {
		t.Skipf("only %d pipes are allowed", len(pipes))
	}
	for _, p := range pipes {
		m.pipes = append(m.pipes, inflight.Pipe{R: another(t, p.R), W: another(t, p.W)})
	}
	if m.loop.Store, err = inflight.Open(fd, pipes); err != nil {
		t.Fatal(err)
	}
	if m.loop.Poller, err = poller.New(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { m.loop.Poller.Run(); close(ended) }()
	t.Cleanup(func() {
		m.loop.Poller.Stop()
		<-ended
		m.loop.Store.Close()
	})
	return m
}

func another(t testing.TB, fd int) int {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(n) })
	return n
}

// blocks returns how much memory the file has.
func (m *mirror) blocks() int64 {
	var st unix.Stat_t
	if err := unix.Fstat(m.file, &st); err != nil {
		m.t.Fatal(err)
	}
	return st.Blocks
}

func (m *mirror) read(at, n int) []byte {
	m.t.Helper()
	b := make([]byte, n)
	if got, err := unix.Pread(m.file, b, int64(at)); got != n || err != nil {
		m.t.Fatalf("read %d bytes of the memory file: %v", got, err)
	}
	return b
}

func (m *mirror) word(at, i int) uint64 { return binary.NativeEndian.Uint64(m.read(at+8*i, 8)) }

// Where things are in the file, as the documentation of package inflight says, with so
// few buffers and directions that each kind takes the least that it can.
const (
	bufferClaims = 4096
	pipeClaims   = 2 * 4096
	counts       = 3 * 4096
	buffers      = 64 << 10
)

// inFlight returns the bytes that a direction has taken and not given, of which the
// kernel says that c were taken and w given, and where they are.
func (m *mirror) inFlight(direction int, c, w uint64) (p []byte, where string) {
	m.t.Helper()
	completed := m.word(counts, direction)
	for i := range m.buffers {
		claim := m.word(bufferClaims, i)
		if uint32(claim) != uint32(direction)+1 {
			continue
		}
		if where != "" {
			m.t.Errorf("two claims")
		}
		where = "buffer"
		if filled := claim >> 32; w > c || w < completed || filled != c-completed {
			m.t.Fatalf("%d bytes taken, %d given, %d completed, %d in a buffer", c, w, completed, filled)
		}
		p = m.read(buffers+i*inflight.BufferSize+int(w-completed), int(c-w))
	}
	for i := range m.pipes {
		if m.word(pipeClaims, i) != uint64(direction)+1 {
			continue
		}
		if where != "" {
			m.t.Errorf("two claims")
		}
		p, where = m.look(m.pipes[i]), "pipe"
		if completed != w {
			m.t.Errorf("%d bytes given, %d completed", w, completed)
		}
	}
	if where == "" && (c != w || completed != w) {
		m.t.Errorf("nothing is claimed with %d bytes taken, %d given, %d completed", c, w, completed)
	}
	return p, where
}

// look returns what is in a pipe, and leaves it there.
func (m *mirror) look(p inflight.Pipe) []byte {
	m.t.Helper()
	n, err := unix.IoctlGetInt(p.R, unix.TIOCINQ)
	if err != nil || n == 0 {
		m.t.Fatalf("%d bytes in a pipe that is claimed: %v", n, err)
	}
	copies := inflight.NewPipes(1, 1<<20)
	defer copies[0].Close()
	teed, err := unix.Tee(p.R, copies[0].W, n, unix.SPLICE_F_NONBLOCK)
	if err != nil || int(teed) != n {
		m.t.Fatalf("%d of %d bytes of a pipe: %v", teed, n, err)
	}
	b := make([]byte, n)
	for off := 0; off < n; {
		k, err := unix.Read(copies[0].R, b[off:])
		if err != nil {
			m.t.Fatal(err)
		}
		off += k
	}
	return b
}

// taken returns how many bytes were taken from a socket, and given how many were put into
// it, both since some time before the tunnel. They are constants apart from what the
// kernel counts besides bytes.
func taken(t testing.TB, fd int) uint64 { return counter(t, fd, unix.TIOCINQ) }
func given(t testing.TB, fd int) uint64 { return counter(t, fd, unix.TIOCOUTQ) }

func counter(t testing.TB, fd int, queue uint) uint64 {
	t.Helper()
	for {
		before := info(t, fd)
		n, err := unix.IoctlGetInt(fd, queue)
		if err != nil {
			t.Fatal(err)
		}
		if after := info(t, fd); before.Bytes_received != after.Bytes_received || before.Bytes_acked != after.Bytes_acked {
			continue
		}
		if queue == unix.TIOCINQ {
			return before.Bytes_received - uint64(n)
		}
		return before.Bytes_acked + uint64(n)
	}
}

func info(t testing.TB, fd int) (i unix.TCPInfo) {
	t.Helper()
	p, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		t.Fatal(err)
	}
	return *p
}

// What a tunnel has taken and not given on is found from outside, at any time, by the
// arithmetic that package inflight documents: while a receiver stalls, and as it reads on.
func TestASuccessorWouldFindWhatIsInFlight(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		where  string // it is held while the receiver stalls
		shape  shape
		buffer int64
		early  int
	}{
		{"buffer", shape{tunnels: 1, buffers: 2}, 0, 0},
		{"buffer", shape{tunnels: 1, buffers: 4, pipes: 1}, 20_000, 3000},
		{"pipe", shape{tunnels: 1, buffers: 4, pipes: 1}, 0, 0},
		{"pipe", shape{tunnels: 1, buffers: 2, pipes: 2}, 100_000, 5000},
		{"", shape{tunnels: 1, buffers: 1}, 0, 4000}, // in the sender's socket
	} {
		t.Run(test.where, func(t *testing.T) {
			t.Parallel()
			m := newMirror(t, test.shape)
			set := relay{}.newSetWith(t, tunnel.Options{Loops: []tunnel.Loop{m.loop}})
			client, down := tcpPair(t, test.where == "buffer")
			server, up := tcpPair(t, test.where == "buffer")
			if test.where != "buffer" {
				for _, c := range []tcpConn{client, down, server, up} { // a few megabytes in all
					c.SetReadBuffer(200 << 10)
					c.SetWriteBuffer(200 << 10)
				}
			}
			src, dst := second(t, down), second(t, up)
			c0, w0 := taken(t, src), given(t, dst)+uint64(test.early)
			origin := limited(tunnel.Limits{Buffer: test.buffer})
			set.Start(tunnel.Spec{Down: down, Up: up, Origin: origin, DownEarly: pattern(0, test.early)})
			wantBytes(t, server, string(pattern(0, test.early)))
			sent := len(overfill(t, client))

			places := map[string]int{}
			check := func() {
				thaw := freeze(m.loop)
				defer thaw()
				c, w := taken(t, src)-c0, given(t, dst)-w0
				held, where := m.inFlight(0, c, w)
				places[where]++
				if len(held) != int(c-w) || !bytes.Equal(held, pattern(int(w), len(held))) {
					t.Errorf("%d bytes taken, %d given: %d found in a %s, or others", c, w, len(held), where)
				}
			}
			check()
			b := make([]byte, sent/100)
			for got := 0; got < sent; {
				n, err := server.Read(b[:min(len(b), sent-got)])
				if err != nil || !bytes.Equal(b[:n], pattern(got, n)) {
					t.Fatalf("wrong bytes at %d, or %v", got, err)
				}
				got += n
				check()
			}
			if places[test.where] == 0 {
				t.Errorf("bytes were in %v, never in %q", places, test.where)
			}
			if test.where == "buffer" && places["pipe"] > 0 {
				t.Errorf("%d times there was a pipe, though there are none, or they hold too much", places["pipe"])
			}
			client.Close()
			wantEOF(t, server)
			server.Close()
			waitEmpty(t, set)
			if claims := m.read(bufferClaims, 2*4096); !bytes.Equal(claims, make([]byte, len(claims))) {
				t.Error("something is claimed after the end")
			}
		})
	}
}
