package load

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// A counting counts what comes, from the first byte on, and notices the end.
type counting struct {
	bytes int
	over  bool
}

func (*counting) opened(*client, int)         {}
func (*counting) answered(*client, int)       {}
func (m *counting) moved(_ *client, _, n int) { m.bytes += n }
func (m *counting) ended(*client, int)        { m.over = true }

// asked returns a client whose request has been sent, and its mode.
func asked(t *testing.T, address, path string) (*client, *counting) {
	t.Helper()
	c, err := newClient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.end)
	if err := c.prepare(Command{Address: address, Path: path}); err != nil {
		t.Fatal(err)
	}
	m := &counting{}
	c.conns = make([]conn, 1)
	if err := c.start(0); err != nil {
		t.Fatal(err)
	}
	until(t, c, m, func() bool { return c.conns[0].stage != connecting })
	return c, m
}

// until lets a client go on.
func until(t *testing.T, c *client, m *counting, done func() bool) {
	t.Helper()
	if err := c.run(m, time.Now().Add(30*time.Second), func() (bool, time.Duration) { return done(), long }); err != nil {
		t.Fatal(err)
	}
	if !done() {
		t.Fatalf("nothing goes on: %d bytes, stage %d", m.bytes, c.conns[0].stage)
	}
}

// What has come while nobody looked makes one event, however often it has to be read,
// and an end behind it makes none.
func TestOneEventForManyReads(t *testing.T) {
	t.Parallel()
	const much = 50_000
	for _, ends := range []bool{false, true} {
		sent := make(chan struct{})
		address := server(t, func(conn net.Conn, _ string) {
			conn.Write(append(bytes.Clone(switching), make([]byte, much)...))
			if ends {
				conn.Close()
			}
			close(sent)
			io.Copy(io.Discard, conn)
		})
		c, m := asked(t, address, BulkPath)
		if !ends {
			c.buf = c.buf[:1000]
		}
		<-sent
		until(t, c, m, func() bool { return m.bytes == much && m.over == ends })
	}
}

// A bulk tunnel goes on although the upstream lets others have their turn.
func TestBulkGoesOn(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	c, m := asked(t, address, BulkPath)
	until(t, c, m, func() bool { return m.bytes > 100*share })
}

func TestUpstreamEndsABulkTunnelWithItsClient(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Write(upgrade(address, BulkPath)); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
}

// A message counts from when it was due, and if it was due in the time that is
// measured.
func TestPaceCountsFromWhenAMessageWasDue(t *testing.T) {
	t.Parallel()
	const size, tunnels, each = 64, 2, 50
	p := &pace{exchange: exchange{size: size}, schedule: schedule{slots: []int{1, 2}, place: []int{0, 0, 1}, every: 10 * time.Millisecond,
		start: time.Now().Add(-tunnels * each * 10 * time.Millisecond)}}
	p.from = p.at(60)
	c := &client{conns: make([]conn, 3), mode: p}
	for _, i := range p.slots {
		c.conns[i].sent = each * size
		p.moved(c, i, each*size-1) // the last message is not whole
		p.moved(c, i, 1)
	}
	if len(p.samples) != 40 {
		t.Fatalf("%d messages were counted, of 40 that were due", len(p.samples))
	}
	// Message 60 was due 400 ms before start, message 98 and 99 last.
	if first, last := p.samples[0].took, p.samples[19].took; first < 400*time.Millisecond || first-last < 370*time.Millisecond {
		t.Errorf("the first one took %s, the last one %s", first, last)
	}
}
