package load

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestRequestsOnConnectionsThatAreKept(t *testing.T) {
	t.Parallel()
	address, pid := startUpstream(t)
	c := startClient(t)
	for _, body := range []int{shortestBody, 100, 16 << 10, looksAt + 1, longestBody} {
		const conns = 20
		brief := Command{Rate: 200, Warm: 20 * time.Millisecond, For: 200 * time.Millisecond, PIDs: []int{pid}}
		with := func(what string) Command { cmd := brief; cmd.Do = what; return cmd }
		if a := do(t, c, Command{Do: "hold", Address: address, Tunnels: conns, Body: body}); a.Count != conns || a.Failed != 0 {
			t.Fatalf("%d bytes: held %+v", body, a)
		}
		if a := do(t, c, with("ask")); a.Count < conns || a.Failed != 0 || a.CPU <= 0 || a.Measured < brief.For {
			t.Errorf("%d bytes: %+v", body, a)
		}
		paced := do(t, c, with("askpaced"))
		if l := paced.Latencies; paced.Failed != 0 || paced.Count == 0 || l.P50 <= 0 || l.P50 > l.P99 || l.P99 > l.Max {
			t.Errorf("%d bytes, paced: %+v", body, paced)
		}
		if a := do(t, c, Command{Do: "close"}); a.Count != conns {
			t.Errorf("%d bytes: closed %+v", body, a)
		}
	}
	if a := do(t, c, Command{Do: "hold", Address: address, Tunnels: 300, Body: 100}); a.Count != 300 {
		t.Errorf("many: %+v", a)
	}
	if a := do(t, c, Command{Do: "hold", Address: address, Tunnels: 5, Body: 100}); a.Count != 305 {
		t.Errorf("and more: %+v", a)
	}
}

func TestARequestOnAConnectionOfItsOwn(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	c := startClient(t)
	a := do(t, c, Command{Do: "fresh", Address: address, Body: 100, Tunnels: 4, Limit: 50, For: time.Minute})
	if a.Count != 50 || a.Failed != 0 || a.Measured > 50*time.Second {
		t.Errorf("%+v", a)
	}
	// The other kind of turnover is not mistaken for it afterwards.
	if a := do(t, c, Command{Do: "connect", Address: address, Path: EchoPath, Tunnels: 4, Limit: 50, For: time.Minute}); a.Count != 50 {
		t.Errorf("tunnels: %+v", a)
	}
}

// answerOf is what an upstream would say to a request.
func answerOf(t *testing.T, head string) []byte {
	t.Helper()
	target := strings.Fields(head)[1]
	parts := strings.Split(target, "/") // "", "body", length, number
	length, err := strconv.Atoi(parts[2])
	if err != nil {
		t.Errorf("asked for %q", target)
	}
	a := newBodyAnswer(length)
	copy(a.whole[a.at:], parts[3])
	return a.whole
}

// TestWrongAnswers has each kind of answer that a proxy could get wrong noticed, and named.
func TestWrongAnswers(t *testing.T) {
	t.Parallel()
	const length = 100_000 // longer than what is always looked at
	change := func(from, to string) func([]byte) []byte {
		return func(b []byte) []byte { return bytes.Replace(b, []byte(from), []byte(to), 1) }
	}
	for name, wrong := range map[string]struct {
		spoil  func([]byte) []byte
		reason string
	}{
		"another status":          {change("200 OK", "502 Bad Gateway"), `"HTTP/1.1 502 Bad Gateway"`},
		"another version":         {change("HTTP/1.1", "HTTP/1.0"), `"HTTP/1.0 200 OK"`},
		"another length":          {change("Content-Length: 100000", "Content-Length: 100001"), `its length is "100001", not 100000`},
		"no length":               {change("Content-Length: 100000", "Transfer-Encoding: chunked"), `its length is "", not 100000`},
		"an end announced":        {change("Server: bench", "connection: close"), "it is to be the connection's last"},
		"a body too long":         {func(b []byte) []byte { return append(b, "more"...) }, "4 bytes more than its length"},
		"a body too short":        {func(b []byte) []byte { return b[:len(b)-1] }, "the connection ended in the answer"},
		"an end in the head":      {func(b []byte) []byte { return b[:20] }, "the connection ended in the answer"},
		"another number":          {func(b []byte) []byte { b[len(b)-length+7]++; return b }, "byte 7 is not of its number"},
		"another byte":            {func(b []byte) []byte { b[len(b)-1]++; return b }, "wrong bytes between"},
		"another byte near front": {func(b []byte) []byte { b[len(b)-length+8]++; return b }, "wrong bytes between 8 and"},
		"a head without end":      {func([]byte) []byte { return bytes.Repeat([]byte("X: y\r\n"), longestHead) }, "its head has no end"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startClient(t)
			address := server(t, func(conn net.Conn, head string) { conn.Write(wrong.spoil(answerOf(t, head))) })
			a := do(t, c, Command{Do: "hold", Address: address, Tunnels: 1, Body: length})
			if a.Count != 0 || a.Failed != 1 || !strings.Contains(a.Reason, wrong.reason) {
				t.Errorf("%+v, want one failure for %q", a, wrong.reason)
			}
		})
	}
}

// Of a long body only now and then every byte is compared, but its head, its number and
// its length always are.
func TestALongBodyIsNotComparedEachTime(t *testing.T) {
	t.Parallel()
	const length = looksAt + 1
	for _, at := range []struct {
		from  int // 0 is the first byte
		fails bool
	}{{0, true}, {looksAt, false}} {
		c, err := newClient()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.end)
		if err := c.prepare(Command{Do: "hold", Address: "127.0.0.1:1", Body: length}); err != nil {
			t.Fatal(err)
		}
		a := newBodyAnswer(length)
		s := &conn{asking: asking{answers: 1, number: newNumber(7)}}
		copy(a.whole[a.at:], s.asking.number[:])
		a.whole[a.at+at.from]++
		var failed error
		for part := range slices.Chunk(a.whole, a.at+100) {
			if failed == nil {
				failed = c.wish.take(s, part)
			}
		}
		if (failed != nil) != at.fails || !at.fails && s.asking.received != length {
			t.Errorf("a wrong byte %d: %v, of %d bytes", at.from, failed, s.asking.received)
		}
	}
}

func TestAnAnswerInPieces(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	address := server(t, func(conn net.Conn, head string) {
		for part := range slices.Chunk(answerOf(t, head), 20) {
			conn.Write(part)
			time.Sleep(time.Millisecond) // so that most are read alone
		}
		conn.Read(make([]byte, 1))
	})
	if a := do(t, c, Command{Do: "hold", Address: address, Tunnels: 3, Body: 100}); a.Count != 3 {
		t.Errorf("%+v", a)
	}
	do(t, c, Command{Do: "close"})
}

// What comes while nothing was asked for is a failure, be it an end or bytes.
func TestWhatComesUnaskedIsCounted(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	for _, more := range []string{"", "HTTP/1.1 408 Request Timeout\r\n\r\n"} {
		asked := make(chan bool)
		address := server(t, func(conn net.Conn, head string) {
			conn.Write(answerOf(t, head))
			<-asked // the second request is there, or its answer would be
			io.WriteString(conn, more)
		})
		do(t, c, Command{Do: "hold", Address: address, Tunnels: 1, Body: 100})
		close(asked)
		if a := do(t, c, Command{Do: "ask", For: 20 * time.Millisecond}); a.Failed != 1 || a.Reason == "" {
			t.Errorf("%+v", a)
		}
		do(t, c, Command{Do: "close"})
	}
}

// A request that is due while the one before has not been answered waits, and its time
// counts from when it was due.
func TestARequestWaitsForTheAnswerBefore(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const slow = 100 * time.Millisecond
	done := make(chan error, 1)
	served := 0
	go func() { done <- serveSlowly(t, l, slow, &served) }()
	do(t, c, Command{Do: "hold", Address: l.Addr().String(), Tunnels: 1, Body: 100})
	a := do(t, c, Command{Do: "askpaced", Rate: 40, For: 300 * time.Millisecond})
	// Twelve were due in three tenths of a second, and each took one tenth.
	if a.Failed != 0 || a.Count > 5 || a.Latencies.Max < 2*slow {
		t.Errorf("%+v", a)
	}
	do(t, c, Command{Do: "close"})
	if err := <-done; err != nil || served < 1+12 {
		t.Errorf("%d requests were sent, %v", served, err)
	}
}

// serveSlowly answers the requests of one connection, which never has two under way.
func serveSlowly(t *testing.T, l net.Listener, slow time.Duration, served *int) error {
	defer l.Close()
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	head := make([]byte, 4096)
	for ; ; *served++ {
		n, err := conn.Read(head)
		if err != nil {
			return nil // the client has closed it
		}
		if got := bytes.Count(head[:n], headEnd); got != 1 {
			return fmt.Errorf("%d requests at once", got)
		}
		if *served > 0 {
			time.Sleep(slow)
		}
		conn.Write(answerOf(t, string(head[:n])))
	}
}

func TestBadCommandsForRequests(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	address, _ := startUpstream(t)
	for _, cmd := range []Command{
		{Do: "hold", Address: address, Tunnels: 1, Body: shortestBody - 1},
		{Do: "fresh", Address: address, Tunnels: 1, Body: longestBody + 1},
		{Do: "ask"},
		{Do: "askpaced", Rate: 1},
	} {
		if a, err := c.Do(cmd); err == nil {
			t.Errorf("%+v was answered with %+v", cmd, a)
		}
	}
	do(t, c, Command{Do: "hold", Address: address, Tunnels: 1, Body: 100})
	if a, err := c.Do(Command{Do: "askpaced"}); err == nil {
		t.Errorf("without a rate: %+v", a)
	}
}
