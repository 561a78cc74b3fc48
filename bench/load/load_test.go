package load

import (
	"bytes"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bench/proc"
)

// do has a command carried out.
func do(t *testing.T, c *Client, cmd Command) Answer {
	t.Helper()
	a, err := c.Do(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestTunnelsAreOpenedUsedAndClosed(t *testing.T) {
	t.Parallel()
	address, pid := startUpstream(t)
	c := startClient(t)
	const tunnels = 40
	brief := Command{Size: 64, Rate: 500, Warm: 20 * time.Millisecond, For: 200 * time.Millisecond, PIDs: []int{pid}}
	with := func(what string) Command { cmd := brief; cmd.Do = what; return cmd }

	if a := do(t, c, Command{Do: "open", Address: address, Path: EchoPath, Tunnels: tunnels}); a.Count != tunnels || a.Failed != 0 {
		t.Fatalf("opened: %+v", a)
	}
	echo := do(t, c, with("echo"))
	if echo.Count < tunnels || echo.Failed != 0 || echo.CPU <= 0 || echo.Measured < brief.For {
		t.Errorf("round trips: %+v", echo)
	}
	paced := do(t, c, with("paced"))
	if l := paced.Latencies; paced.Failed != 0 || paced.Count == 0 || l.P50 <= 0 || l.P50 > l.P99 || l.P99 > l.P999 || l.P999 > l.Max {
		t.Errorf("paced: %+v", paced)
	}
	// What was used before is in neither.
	if all, err := proc.CPU(pid); err != nil || echo.CPU+paced.CPU > all {
		t.Errorf("CPU time %s and %s, of %s in all (%v)", echo.CPU, paced.CPU, all, err)
	}
	if a := do(t, c, Command{Do: "check", Size: 64}); a.Count != tunnels || a.Failed != 0 {
		t.Errorf("checked: %+v", a)
	}
	if a := do(t, c, Command{Do: "close"}); a.Count != tunnels {
		t.Errorf("closed: %+v", a)
	}
	if a := do(t, c, Command{Do: "check", Size: 64}); a.Count != 0 || a.Failed != 0 {
		t.Errorf("after closing: %+v", a)
	}
}

// What happens in the middle of a pace is looked at on its own: the messages that were
// due before it, meanwhile and afterwards are all that there were.
func TestAPartOfAPaceIsLookedAt(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	c := startClient(t)
	const tunnels = 7
	do(t, c, Command{Do: "open", Address: address, Path: EchoPath, Tunnels: tunnels})
	began := time.Now()
	whole := do(t, c, Command{Do: "paced", Size: 64, Rate: 500, For: 200 * time.Millisecond})
	middle := began.Add(100 * time.Millisecond)
	all := do(t, c, Command{Do: "between", From: began, To: began.Add(time.Hour)})
	first := do(t, c, Command{Do: "between", From: began, To: middle})
	second := do(t, c, Command{Do: "between", From: middle, To: began.Add(time.Hour)})
	if all.Latencies != whole.Latencies || all.Count+tunnels < whole.Count { // which has those answered that were on their way
		t.Errorf("all of it is %+v, of %+v", all, whole)
	}
	if first.Count == 0 || second.Count == 0 || first.Count+second.Count != all.Count {
		t.Errorf("%d before the middle and %d behind it, of %d", first.Count, second.Count, all.Count)
	}
	if most := max(first.Latencies.Max, second.Latencies.Max); most != all.Latencies.Max || first.Latencies.P50 <= 0 {
		t.Errorf("%+v and %+v, of %+v", first.Latencies, second.Latencies, all.Latencies)
	}
	if none := do(t, c, Command{Do: "between", From: middle, To: middle}); none.Count != 0 || none.Latencies != (Latencies{}) {
		t.Errorf("in no time: %+v", none)
	}
}

// Nine thousand tunnels of a dead process may take longer than the usual patience.
func TestACheckHasThePatienceThatItIsGiven(t *testing.T) {
	t.Parallel()
	silent := server(t, func(conn net.Conn, _ string) {
		conn.Write(switching)
		io.Copy(io.Discard, conn)
	})
	c := startClient(t)
	do(t, c, Command{Do: "open", Address: silent, Path: EchoPath, Tunnels: 1})
	began := time.Now()
	const patience = 20 * time.Millisecond
	a := do(t, c, Command{Do: "check", Size: 64, For: patience})
	if took := time.Since(began); a.Failed != 1 || took < patience || took >= settleTimeout {
		t.Errorf("%+v after %s", a, took)
	}
}

// The number of messages at a pace is what the pace says, within what was measured.
func TestPaceKeepsItsRate(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	c := startClient(t)
	do(t, c, Command{Do: "open", Address: address, Path: EchoPath, Tunnels: 7})
	a := do(t, c, Command{Do: "paced", Size: 64, Rate: 200, For: 500 * time.Millisecond})
	// What is sent late is sent all the same, and what comes late is not counted:
	// the machine may be busy at the end.
	if a.Count < 20 || a.Count > 200 {
		t.Errorf("%d messages in %s at 200 a second", a.Count, a.Measured)
	}
}

func TestBulkIsTaken(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	c := startClient(t)
	do(t, c, Command{Do: "open", Address: address, Path: BulkPath, Tunnels: 5})
	a := do(t, c, Command{Do: "bulk", For: 100 * time.Millisecond})
	if a.Bytes < 10*chunk || a.Failed != 0 {
		t.Errorf("bulk: %+v", a)
	}
	// The upstream has not come to harm by tunnels that end in the middle.
	do(t, c, Command{Do: "close"})
	if a := do(t, c, Command{Do: "open", Address: address, Path: EchoPath, Tunnels: 5}); a.Count != 5 {
		t.Errorf("afterwards: %+v", a)
	}
}

func TestConnectStopsAtItsLimit(t *testing.T) {
	t.Parallel()
	address, _ := startUpstream(t)
	c := startClient(t)
	a := do(t, c, Command{Do: "connect", Address: address, Path: EchoPath, Tunnels: 4, Limit: 50, For: time.Minute})
	if a.Count != 50 || a.Failed != 0 || a.Measured > 50*time.Second {
		t.Errorf("connect: %+v", a)
	}
}

// server reads a request's head from each connection and leaves the answer to reply.
func server(t *testing.T, reply func(conn net.Conn, head string)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				head := make([]byte, 4096)
				n, _ := conn.Read(head)
				if bytes.HasSuffix(head[:n], headEnd) {
					reply(conn, string(head[:n]))
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Wait()
	})
	return l.Addr().String()
}

func TestRefusedTunnelsAreCounted(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	refusing := server(t, func(conn net.Conn, _ string) {
		io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
		conn.Read(make([]byte, 1)) // it stays open
	})
	hangingUp := server(t, func(net.Conn, string) {})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody is there
	for _, address := range []string{refusing, hangingUp, l.Addr().String()} {
		if a, err := c.Do(Command{Do: "open", Address: address, Path: EchoPath, Tunnels: 3}); err != nil || a.Count != 0 || a.Failed != 3 {
			t.Errorf("%+v, %v", a, err)
		}
		do(t, c, Command{Do: "close"})
	}
}

// babbling is a server that sends back more than it got.
func babbling(t *testing.T) string {
	return server(t, func(conn net.Conn, _ string) {
		conn.Write(switching)
		b := make([]byte, 64)
		io.ReadFull(conn, b)
		conn.Write(append(b, "and more"...))
		conn.Read(b)
	})
}

// Lost tunnels are found whether they end at once, later, say nothing or say what
// they should not.
func TestLostTunnelsAreCounted(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	end := make(chan struct{})
	ending := server(t, func(conn net.Conn, _ string) {
		conn.Write(switching)
		<-end
	})
	silent := server(t, func(conn net.Conn, _ string) {
		conn.Write(switching)
		io.Copy(io.Discard, conn)
	})
	upstream, _ := startUpstream(t)
	for _, address := range []string{ending, babbling(t), silent, upstream} {
		do(t, c, Command{Do: "open", Address: address, Path: EchoPath, Tunnels: 4})
	}
	close(end)
	if a := do(t, c, Command{Do: "check", Size: 64}); a.Count != 4 || a.Failed != 12 {
		t.Errorf("checked: %+v", a)
	}
	do(t, c, Command{Do: "close"})
}

func TestTunnelsThatAreLostMeanwhileAreCounted(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	do(t, c, Command{Do: "open", Address: babbling(t), Path: EchoPath, Tunnels: 4})
	if a := do(t, c, Command{Do: "echo", Size: 64, For: 500 * time.Millisecond}); a.Failed != 4 {
		t.Errorf("round trips: %+v", a)
	}
	do(t, c, Command{Do: "close"})
}

// Tunnels that end while others are opened are lost, and the others are not.
func TestTunnelsEndWhileOthersAreOpened(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	var open sync.WaitGroup
	open.Add(5)
	end := make(chan struct{})
	ending := server(t, func(conn net.Conn, _ string) {
		conn.Write(switching)
		<-end
		conn.Close()
		open.Done()
	})
	var once sync.Once
	later := server(t, func(conn net.Conn, _ string) {
		once.Do(func() { close(end) })
		open.Wait()
		conn.Write(switching)
		io.Copy(conn, conn)
	})
	do(t, c, Command{Do: "open", Address: ending, Path: EchoPath, Tunnels: 5})
	if a := do(t, c, Command{Do: "open", Address: later, Path: EchoPath, Tunnels: 5}); a.Count != 5 || a.Failed != 0 {
		t.Errorf("opened: %+v", a)
	}
	if a := do(t, c, Command{Do: "check", Size: 64}); a.Count != 5 || a.Failed != 5 {
		t.Errorf("checked: %+v", a)
	}
	do(t, c, Command{Do: "close"})
}

// An answer in pieces, with bytes of the tunnel behind it.
func TestAnswerInPieces(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	address := server(t, func(conn net.Conn, _ string) {
		for part := range slices.Chunk(append(bytes.Clone(switching), "early bytes"...), 20) {
			conn.Write(part)
			time.Sleep(time.Millisecond) // so that most are read alone
		}
		conn.Read(make([]byte, 1))
	})
	if a := do(t, c, Command{Do: "open", Address: address, Path: EchoPath, Tunnels: 3}); a.Count != 3 {
		t.Errorf("%+v", a)
	}
	do(t, c, Command{Do: "close"})
}

func TestWatchTellsWhatFails(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	for _, fails := range []bool{false, true} {
		asked := make(chan string, 1000)
		address := server(t, func(conn net.Conn, head string) {
			defer func() { asked <- head }()
			switch {
			case fails:
				io.WriteString(conn, "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
			case strings.HasPrefix(head, "GET "+PagePath):
				conn.Write(page)
			default:
				conn.Write(switching)
				io.Copy(conn, conn)
			}
		})
		began := time.Now()
		do(t, c, Command{Do: "watch", Address: address, Rate: 100})
		heads := ""
		for range 3 * tunnelEach { // the last ones are not counted if they are unwatched before their end
			heads += <-asked
		}
		a := do(t, c, Command{Do: "unwatch"})
		if a.Count < 2*tunnelEach || !strings.Contains(heads, PagePath) || !strings.Contains(heads, EchoPath) {
			t.Errorf("tried %d times, the first ones:\n%s", a.Count, heads)
		}
		if !fails && a.Failed != 0 {
			t.Errorf("%d of %d failed: %s", a.Failed, a.Count, a.Reason)
		}
		if fails && (a.Failed != a.Count || a.LastFailure.Before(began) || a.Reason == "") {
			t.Errorf("of one that refuses: %+v", a)
		}
	}
}

func TestBadCommands(t *testing.T) {
	t.Parallel()
	c := startClient(t)
	for _, cmd := range []Command{
		{Do: "dance"},
		{Do: "open", Address: "192.0.2.1:80", Tunnels: 1},
		{Do: "open", Address: "nowhere", Tunnels: 1},
		{Do: "echo", Size: longestMessage + 1},
		{Do: "paced", Size: 64},
		{Do: "unwatch"},
	} {
		if a, err := c.Do(cmd); err == nil {
			t.Errorf("%+v was answered with %+v", cmd, a)
		}
	}
}

func TestPercentiles(t *testing.T) {
	t.Parallel()
	upTo := func(n int) []time.Duration {
		all := make([]time.Duration, n)
		for i := range all {
			all[i] = time.Duration(n - i) // unsorted
		}
		return all
	}
	for n, want := range map[int]Latencies{
		0:     {},
		1:     {1, 1, 1, 1},
		2:     {1, 2, 2, 2},
		10:    {5, 10, 10, 10},
		100:   {50, 99, 100, 100},
		1000:  {500, 990, 999, 1000},
		10000: {5000, 9900, 9990, 10000},
	} {
		if got := summarise(upTo(n)); got != want {
			t.Errorf("of 1 to %d: %+v, want %+v", n, got, want)
		}
	}
}
