package proxy_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// retire has the generation drain, with a passage to come in so long a time.
func (c *commander) retire(passage time.Duration, removed ...string) {
	c.t.Helper()
	c.ask(control.Message{Type: control.TypeDrain, Passage: passage, Keys: removed})
}

// key is what the listener is known by.
func (c *commander) key() string { return c.socket.Addr().String() }

// pathTo lays a passage.
func (c *commander) pathTo(next *commander) {
	c.t.Helper()
	gives, takes := passageEnds(c.t)
	next.connect(control.TypeTake, takes)
	c.connect(control.TypeGive, gives)
}

// passageEnds returns the ends of a passage.
func passageEnds(t *testing.T) (gives, takes int) {
	t.Helper()
	gives, takes, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	return gives, takes
}

// connect sends one end, which it closes here.
func (c *commander) connect(kind control.Type, end int) {
	c.t.Helper()
	if a := c.question(control.Message{Type: kind}, end); a.Error != "" {
		c.t.Errorf("%s: %s", kind, a.Error)
	}
	unix.Close(end)
}

// taking is the other end of a passage, where the test takes.
func (c *commander) taking(keys ...string) *control.Passage {
	c.t.Helper()
	gives, takes := passageEnds(c.t)
	p := openPassage(c.t, takes)
	if err := p.SendKeys(keys); err != nil {
		c.t.Fatal(err)
	}
	c.connect(control.TypeGive, gives)
	return p
}

func openPassage(t *testing.T, end int) *control.Passage {
	t.Helper()
	p, err := control.NewPassage(end)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// arrive returns what comes next out of a passage. Nothing comes twice.
func arrive(t *testing.T, p *control.Passage) (all []control.Passed, err error) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		all, err = p.Receive()
		close(done)
	}()
	await(t, "connections in the passage", done)
	for _, c := range all {
		t.Cleanup(func() { unix.Close(c.FD) })
	}
	return all, err
}

// wantConnections waits until the generation has so many.
func (c *commander) wantConnections(n int) {
	c.t.Helper()
	deadline := time.Now().Add(bound)
	for c.status().Connections != n {
		if time.Now().After(deadline) {
			c.t.Fatalf("%d connections, want %d", c.status().Connections, n)
		}
		time.Sleep(time.Millisecond)
	}
}

// wantLog waits for a line.
func (c *commander) wantLog(text string) {
	c.t.Helper()
	deadline := time.Now().Add(bound)
	for !strings.Contains(c.log.String(), text) {
		if time.Now().After(deadline) {
			c.t.Fatalf("no %q in\n%s", text, c.log.String())
		}
		time.Sleep(time.Millisecond)
	}
}

// wantKept makes a request, of which the answer is not to be the last one.
func (c *commander) wantKept(w *wire) {
	c.t.Helper()
	if head := c.exchange(w); !strings.HasPrefix(head, "HTTP/1.1 200 ") || strings.Contains(head, "Connection: close") {
		c.t.Errorf("got %s", head)
	}
}

// wantServedBy makes a request on each connection and looks who has answered it.
func wantServedBy(c *commander, all ...*wire) {
	c.t.Helper()
	before := c.status().RequestsTotal
	for _, w := range all {
		c.wantKept(w)
	}
	if n := c.status().RequestsTotal - before; n != uint64(len(all)) {
		c.t.Errorf("of %d requests it has answered %d", len(all), n)
	}
}

// No idle_grace: nothing depends on it.
const noGrace = "[drain]\nidle_grace = \"0s\"\n"

// A client notices nothing, whatever it was doing when the configuration changed.
func TestConnectionsGoOnInTheNextGeneration(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	used, mute, busy, half := c.dial(), c.dial(), c.dial(), c.dial()
	c.exchange(used)
	busy.say(askPage)
	server := c.endpoint()
	server.head()
	half.say("GET / HTTP/1.1\nHost: a.ex")
	c.wantConnections(4)

	next := c.another()
	next.serve()
	c.retire(time.Hour)
	wantServedBy(c, used) // until the passage comes
	c.pathTo(next)
	next.wantConnections(2)
	c.wantConnections(2)
	wantServedBy(next, used, mute)
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	if head := busy.head(); strings.Contains(head, "Connection: close") {
		t.Errorf("got %s", head)
	}
	half.say("ample\n\n")
	if head := c.answer(half); strings.Contains(head, "Connection: close") {
		t.Errorf("got %s", head)
	}
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	next.wantConnections(4)
	wantServedBy(next, busy, half)
	c.wantCounted("downstream_connections_passed_total{public}", 4)
	c.wantCounted("downstream_connections_closed_total{public,holdfast}", 0)
	c.wantCounted("downstream_connections_drained_total{public}", 0)
	next.wantCounted("downstream_connections_received_total{public}", 4)
	next.wantCounted("downstream_connections_total{public}", 0)
	next.wantCounted("downstream_connections_active{public}", 4)
}

// What is known about a connection goes with it.
func TestWhatIsKnownAboutAConnectionIsPassed(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	w := c.dial()
	c.exchange(w)
	used := time.Now()
	c.retire(time.Hour)
	p := c.taking(c.key())
	all, err := arrive(t, p)
	if err != nil || len(all) != 1 {
		t.Fatalf("%d connections, %v", len(all), err)
	}
	got := all[0]
	if most := time.Since(used) + time.Second; got.Key != c.key() || got.Remote.String() != w.LocalAddr().String() || got.Idle <= 0 || got.Idle > most || len(got.Early) > 0 {
		t.Errorf("got %+v", got)
	}

	next := c.another()
	next.serve()
	gives, takes := passageEnds(t)
	next.connect(control.TypeTake, takes)
	got.Early = []byte("GET / HTTP/1.1\r\nHost: a.ex")
	if err := openPassage(t, gives).TrySend([]control.Passed{got}); err != nil {
		t.Fatal(err)
	}
	w.say("ample\n\n")
	server := next.endpoint()
	if head := server.head(); !strings.Contains(head, "X-Forwarded-For: 127.0.0.1\n") {
		t.Errorf("upstream got %s", head)
	}
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	w.wantHead("200 OK")
	// Nobody has it any more who has given it away.
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	if n := holders(t, got.FD); n != 2 {
		t.Errorf("%d descriptors of it, want the test's and the next generation's", n)
	}
}

// The limit of what may be idle is one for all generations together.
func TestTheIdleTimeGoesOnInTheNextGeneration(t *testing.T) {
	t.Parallel()
	c := command(t, "limits = { idle_timeout = \"10s\" }", "")
	c.serve()
	w := c.dial()
	c.wantConnections(1)
	gives, takes := passageEnds(t)
	c.connect(control.TypeTake, takes)
	p := openPassage(t, gives)
	old, server := tcpPair(t)
	fd := ownDescriptor(t, server)
	if err := p.TrySend([]control.Passed{{Key: c.key(), Idle: time.Minute, FD: fd}}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	newWire(t, old).wantEnd() // at once: it has been idle for too long
	c.wantKept(w)
	c.wantCounted("downstream_idle_timeouts_total{public}", 1)
}

// wantEnd wants a FIN and no byte before it.
func (w *wire) wantEnd() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.in); len(rest) > 0 || err != nil {
		w.t.Errorf("got %q, %v; want a proper end", rest, err)
	}
}

// tcpPair returns two ends of a connection.
func tcpPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// ownDescriptor returns the only one of a connection, which is the caller's to close.
func ownDescriptor(t *testing.T, conn net.Conn) int {
	t.Helper()
	fd, err := control.DuplicateOf(conn.(*net.TCPConn))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	return fd
}

// Without a passage in time it is a drain as any other.
func TestAPassageThatDoesNotComeIsNotWaitedForLonger(t *testing.T) {
	t.Parallel()
	c := command(t, "", "[drain]\nidle_grace = \"1h\"\n")
	c.serve()
	w, other := c.dial(), c.dial()
	c.exchange(w)
	c.exchange(other)
	c.retire(time.Millisecond)
	c.wantLog("no generation takes the idle connections")
	if head := c.exchange(w); !strings.Contains(head, "Connection: close\n") {
		t.Errorf("got %s", head)
	}
	// One that comes all the same is used.
	next := c.another()
	next.serve()
	c.pathTo(next)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	wantServedBy(next, other)
}

// The grace begins when nobody can come any more.
func TestConnectionsThatNobodyTakesHaveTheirGrace(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	w := c.dial()
	c.exchange(w)
	c.retire(100 * time.Millisecond)
	w.wantEnd()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

// Said once more, a drain only gives the passage more time.
func TestADrainIsToldThatItsPassageTakesLonger(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	w := c.dial()
	c.exchange(w)
	c.retire(300 * time.Millisecond)
	c.retire(time.Hour)
	time.Sleep(500 * time.Millisecond) // in which nothing happens
	c.wantKept(w)
	next := c.another()
	next.serve()
	c.pathTo(next)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	wantServedBy(next, w)
}

// Reload after reload: each generation gives what it has to the next, also what it was
// given too late itself.
func TestConnectionsGoFromGenerationToGeneration(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	w, slow := c.dial(), c.dial()
	c.exchange(w)
	slow.say(askPage)
	server := c.endpoint()
	server.head()
	second := c.another()
	second.serve()
	c.retire(time.Hour)
	c.pathTo(second)
	second.wantConnections(1)
	wantServedBy(second, w)

	third := second.another()
	third.serve()
	second.retire(time.Hour) // it takes no more
	c.retire(time.Hour)
	c.wantLog("takes no more")
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	slow.wantHead("200 OK")
	c.wantKept(slow)
	c.wantKept(slow)
	wantServedBy(second, w)
	for _, old := range []*commander{c, second} {
		old.pathTo(third)
		if err := old.wait(); err != nil {
			t.Error(err)
		}
	}
	third.wantConnections(2)
	wantServedBy(third, w, slow)
}

// Whoever takes may be gone. What has not got away is kept for the next one.
func TestAConnectionThatCouldNotBeGivenIsServedOn(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	w := c.dial()
	w.say(askPage)
	server := c.endpoint()
	server.head()
	c.retire(time.Hour)
	p := c.taking(c.key())
	c.wantLog("go to the generation that serves")
	p.End()
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	w.wantHead("200 OK")
	c.wantLog("takes no more")
	wantServedBy(c, w)
	next := c.another()
	next.serve()
	c.pathTo(next)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	wantServedBy(next, w)
}

// A passage may be full for as long as it likes. What finds no room in it is served where
// it is.
func TestConnectionsThatFindNoRoomAreServedOn(t *testing.T) {
	t.Parallel()
	const n = 100
	c := command(t, "", noGrace)
	c.serve()
	var all []*wire
	for range n {
		all = append(all, c.dial())
	}
	c.wantConnections(n)
	gives, takes := passageEnds(t)
	dup, err := control.Duplicate(gives)
	if err != nil {
		t.Fatal(err)
	}
	junk, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer junk.Close()
	filler, filled := openPassage(t, dup), 0
	for {
		err := filler.TrySend([]control.Passed{{Key: "junk", Early: make([]byte, 2000), FD: int(junk.Fd())}})
		if errors.Is(err, control.ErrPassageBusy) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		filled++
	}
	p := openPassage(t, takes)
	if err := p.SendKeys([]string{c.key()}); err != nil {
		t.Fatal(err)
	}
	c.retire(time.Hour)
	c.connect(control.TypeGive, gives)
	c.wantLog("go to the generation that serves")
	for range 3 {
		wantServedBy(c, all[:10]...)
	}
	if got := c.status().Connections; got != n {
		t.Errorf("%d connections, want %d", got, n)
	}
	for range filled {
		if _, err := arrive(t, p); err != nil {
			t.Fatal(err)
		}
	}
	there := map[netip.AddrPort]int{}
	for len(there) < n {
		some, err := arrive(t, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range some {
			there[one.Remote]++
		}
	}
	for _, w := range all {
		if times := there[netip.MustParseAddrPort(w.LocalAddr().String())]; times != 1 {
			t.Errorf("%s has come %d times", w.LocalAddr(), times)
		}
	}
	filler.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	c.wantCounted("downstream_connections_passed_total{public}", n)
	c.wantCounted("downstream_connections_total{public}", n)
}

// Where the next configuration does not have the listener there is nowhere to go.
func TestConnectionsOfAListenerThatIsGoneAreClosed(t *testing.T) {
	t.Parallel()
	for name, go_ := range map[string]func(*commander){
		"by the drain":               func(c *commander) { c.retire(time.Hour, c.key()) },
		"by whoever takes the rest":  func(c *commander) { c.retire(time.Hour); c.taking() },
		"for one that takes another": func(c *commander) { c.retire(time.Hour); c.taking("127.0.0.1:1", c.key()+"0") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := command(t, "", noGrace)
			c.serve()
			w := c.dial()
			c.exchange(w)
			go_(c)
			w.wantEnd()
			if err := c.wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAReinstatedGenerationKeepsItsConnections(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	idle, busy := c.dial(), c.dial()
	c.exchange(idle)
	busy.say(askPage)
	server := c.endpoint()
	server.head()
	next := c.another()
	next.serve()
	c.retire(time.Hour)
	c.pathTo(next)
	next.wantConnections(1)
	c.handOver()
	c.serve()
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	busy.wantHead("200 OK")
	wantServedBy(c, busy)
	// And back.
	next.retire(time.Hour)
	wantServedBy(c, c.dial())
	next.pathTo(c)
	if err := next.wait(); err != nil {
		t.Error(err)
	}
	wantServedBy(c, idle, busy)
}

// What a reload had removed is there again.
func TestAReinstatedListenerPassesItsConnectionsOnLater(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	c.ask(control.Message{Type: control.TypeDrain, Passage: time.Hour, Within: time.Hour, Keys: []string{c.key()}})
	c.handOver()
	c.serve()
	w := c.dial()
	c.wantKept(w)
	next := c.another()
	next.serve()
	c.retire(time.Hour)
	c.wantKept(w)
	c.pathTo(next)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	wantServedBy(next, w)
}

func TestAReinstatedListenerDrainsAgain(t *testing.T) {
	t.Parallel()
	c := command(t, "", "[drain]\nidle_grace = \"1h\"\n")
	c.serve()
	c.drain(time.Hour, c.key())
	c.handOver()
	c.serve()
	w := c.dial()
	c.wantKept(w)
	c.drain(time.Hour)
	if head := c.exchange(w); !strings.Contains(head, "Connection: close\n") {
		t.Errorf("got %s", head)
	}
}

// A generation that waits is put back as if nothing had been.
func TestAGenerationThatWaitsIsReinstated(t *testing.T) {
	t.Parallel()
	c := command(t, "", noGrace)
	c.serve()
	w := c.dial()
	c.exchange(w)
	c.retire(50 * time.Millisecond)
	c.handOver()
	c.serve()
	time.Sleep(100 * time.Millisecond) // in which nothing happens
	wantServedBy(c, w, c.dial())
}

// What was given before a generation is told to stop is its own, and ends as its own does.
func TestAStopEndsPassages(t *testing.T) {
	t.Parallel()
	c := command(t, "", "[drain]\nidle_grace = \"1h\"\n")
	c.serve()
	idle, busy := c.dial(), c.dial()
	c.exchange(idle)
	busy.say(askPage)
	server := c.endpoint()
	server.head()
	next := c.another()
	next.serve()
	c.retire(time.Hour)
	c.pathTo(next)
	next.wantConnections(1)
	for _, each := range []*commander{c, next} {
		each.say(&control.Message{Type: control.TypeStop, Within: time.Hour})
		each.status() // it has heard that
	}
	if head := next.exchange(idle); !strings.Contains(head, "Connection: close\n") {
		t.Errorf("got %s", head)
	}
	server.say("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: close\n\n")
	if head := busy.head(); !strings.Contains(head, "Connection: close\n") {
		t.Errorf("got %s", head)
	}
	for _, each := range []*commander{c, next} {
		if err := each.wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestAPassageIsForWhomItIs(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	refused := func(kind control.Type) {
		t.Helper()
		ours, theirs := passageEnds(t)
		if a := c.question(control.Message{Type: kind}, theirs); a.Error == "" {
			t.Errorf("%s is not refused", kind)
		}
		unix.Close(theirs)
		if _, err := openPassage(t, ours).ReceiveKeys(); err == nil {
			t.Errorf("%s: the end is used", kind)
		}
		if a := c.question(control.Message{Type: kind}); a.Error == "" {
			t.Errorf("%s without one is not refused", kind)
		}
	}
	refused(control.TypeGive)
	refused(control.TypeTake)
	c.serve()
	refused(control.TypeGive)
	c.drain(time.Hour)
	refused(control.TypeTake)
}

// What comes is judged. Nothing that is wrong with it hurts anything else.
func TestRubbishInAPassageHurtsNobody(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	gives, takes := passageEnds(t)
	c.connect(control.TypeTake, takes)
	p := openPassage(t, gives)
	if keys, err := p.ReceiveKeys(); err != nil || len(keys) != 1 || keys[0] != c.key() {
		t.Errorf("it takes %q, %v", keys, err)
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	listening := descriptorOf(t, c.socket.(*net.TCPListener))
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	blocking, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range append(fds[:], blocking[:]...) {
		defer unix.Close(fd)
	}
	client, server := tcpPair(t)
	stray, other := tcpPair(t)
	good, strange := ownDescriptor(t, server), ownDescriptor(t, other)
	for _, one := range []control.Passed{
		{Key: c.key(), FD: int(file.Fd())},
		{Key: c.key(), FD: listening},
		{Key: c.key(), FD: fds[0]},
		{Key: c.key(), FD: blocking[0]},
		{Key: "127.0.0.1:1", FD: strange},
		{Key: c.key(), FD: good},
	} {
		if err := p.TrySend([]control.Passed{one}); err != nil {
			t.Fatal(err)
		}
	}
	unix.Close(good)
	unix.Close(strange)
	wantServedBy(c, newWire(t, client))
	newWire(t, stray).wantEnd()
	if n := strings.Count(c.log.String(), "was passed here"); n != 1 {
		t.Errorf("%d lines about it, want 1:\n%s", n, c.log.String())
	}
	if n := c.status().Connections; n != 1 {
		t.Errorf("%d connections", n)
	}
	c.wantCounted("downstream_connections_received_total{public}", 1)
}

// descriptorOf returns one of something that stays open.
func descriptorOf(t *testing.T, of *net.TCPListener) int {
	t.Helper()
	fd, err := control.DuplicateOf(of)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Two builds may have different ones: the supervisor is told.
func TestAGenerationSaysThatItKnowsPassages(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	if c.hello.Passage != control.PassageVersion {
		t.Errorf("the hello says %d", c.hello.Passage)
	}
	c.serve()
	a := c.prepare(2)
	if r := c.obeyed(a, 2); r.Passage != control.PassageVersion {
		t.Errorf("the report says %d", r.Passage)
	}
}
