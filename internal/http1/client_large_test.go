package http1

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"holdfast/internal/stream/streamtest"
)

// Of a large response little is read with its head, so that the rest can be moved without a
// copy. Any other is read as far as it has come, so that it leaves at once.
func TestALargeBodyStaysWhereItIs(t *testing.T) {
	t.Parallel()
	const came = 50 << 10
	for name, tt := range map[string]struct {
		framing string
		left    bool
	}{
		"large":           {fmt.Sprintf("Content-Length: %d", 1<<20), true},
		"a little larger": {fmt.Sprintf("Content-Length: %d", headAndSome+mostRead), true},
		"not large":       {fmt.Sprintf("Content-Length: %d", came), false},
		"in chunks":       {"Transfer-Encoding: chunked", false},
		"until the end":   {"Connection: close", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := streamtest.New(t)
			c, theirs := adoptClient(t, l, ClientOptions{})
			p := newPeer(t, connOf(t, theirs))
			up, err := c.Exchange()
			if err != nil {
				t.Fatal(err)
			}
			e := &driven{t: t, loop: l, up: up}
			if err := e.Send(getRequest()); err != nil {
				t.Fatal(err)
			}
			body, first := strings.Repeat("0123456789", came/10), ""
			if strings.Contains(tt.framing, "chunked") {
				first = fmt.Sprintf("%x\r\n", len(body))
			}
			p.send("HTTP/1.1 200 OK\r\n" + tt.framing + "\r\n\r\n" + first + body)
			if _, err := e.Receive(); err != nil {
				t.Fatal(err)
			}
			var buffered int
			streamtest.Do(l, func() { buffered = len(c.conn.Buffered()) })
			if left := buffered < headAndSome; left != tt.left || !left && buffered != len(first+body) {
				t.Errorf("%d bytes are buffered", buffered)
			}
			got := make([]byte, len(body))
			if n, err := io.ReadFull(e, got); err != nil || string(got) != body {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
}
