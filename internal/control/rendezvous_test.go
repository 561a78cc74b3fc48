package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

const liveness = 30 * time.Second

// The test binary runs itself as processes that come to a rendezvous.
func TestMain(m *testing.M) {
	switch path := os.Getenv("HOLDFAST_TEST_PATH"); os.Getenv("HOLDFAST_TEST_ROLE") {
	case "":
		goleak.VerifyTestMain(m)
	case "generation": // tries once and says how that went
		c, err := control.Reunite(context.Background(), path, keyOf(7), hello(7))
		fmt.Println(err)
		if err == nil {
			c.Receive()
		}
	case "flood": // until its input ends
		go flood(path)
		io.Copy(io.Discard, os.Stdin)
	}
}

// start runs the test binary as another process, until the test ends.
func start(t *testing.T, role, path string) (output io.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE="+role, "HOLDFAST_TEST_PATH="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if output, err = cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return output
}

// flood has a thousand connections open that say nothing, and opens another for each
// that is closed.
func flood(path string) {
	for range 1000 {
		go func() {
			for {
				if c, err := net.Dial("unixpacket", path); err == nil {
					c.Read(make([]byte, 1))
					c.Close()
				}
			}
		}()
	}
}

var secret = []byte("0123456789abcdef0123456789abcdef")

func keyOf(generation int) []byte { return control.GenerationKey(secret, generation) }

// known is what a supervisor has generations 1 to 9 of.
func known(generation int) []byte {
	if generation < 1 || generation > 9 {
		return nil
	}
	return keyOf(generation)
}

func hello(generation int) control.Hello {
	return control.Hello{Core: 2, CoreMin: 1, Version: "v9", PID: os.Getpid(), Generation: generation, Epoch: 41}
}

// socketDir leaves room for a socket's name, whatever the test is called.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

type admitted struct {
	conn  *control.Conn
	hello *control.Hello
}

// place is a rendezvous of a supervisor.
type place struct {
	*control.Rendezvous
	came chan admitted
	log  *lines
}

func listen(t testing.TB) *place {
	t.Helper()
	r, err := control.ListenRendezvous(filepath.Join(socketDir(t), "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(true) })
	return &place{Rendezvous: r, came: make(chan admitted, 100), log: new(lines)}
}

// serve serves until stop, or until the test ends.
func (p *place) serve(t testing.TB) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.Serve(ctx, known, slog.New(slog.NewTextHandler(p.log, nil)), func(c *control.Conn, h *control.Hello) {
			t.Cleanup(func() { c.Close() })
			p.came <- admitted{c, h}
		})
	}()
	stop = func() {
		t.Helper()
		cancel()
		select {
		case <-ended:
		case <-time.After(liveness):
			t.Error("Serve does not return")
		}
	}
	t.Cleanup(stop)
	return stop
}

// lines is a log.
type lines struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *lines) Write(data []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(data)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(liveness); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never was so that %s", what)
		}
	}
}

// reunite looks for the supervisor as generation 7 does, and gives up when a real one
// would have been admitted long since.
func (p *place) reunite(t testing.TB) (*control.Conn, admitted) {
	t.Helper()
	var c *control.Conn
	eventually(t, "a generation was let in", func() (ok bool) {
		var err error
		c, err = control.Reunite(t.Context(), p.Path(), keyOf(7), hello(7))
		return err == nil
	})
	t.Cleanup(func() { c.Close() })
	// What it has said last may not have been judged yet.
	select {
	case a := <-p.came:
		return c, a
	case <-time.After(liveness):
		t.Fatal("a generation was not admitted")
		return nil, admitted{}
	}
}

func TestAGenerationAndASupervisorMeet(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	c, a := p.reunite(t)
	if *a.hello != hello(7) {
		t.Errorf("got %+v", a.hello)
	}
	// It is a control channel now, with descriptors in both directions.
	file := newToken(t)
	if err := a.conn.Send(&control.Message{Type: control.TypeAdopt, ID: 1}, soon); err != nil {
		t.Fatal(err)
	}
	if m, _, err := c.Receive(); err != nil || m.Type != control.TypeAdopt {
		t.Fatalf("got %+v, %v", m, err)
	}
	if err := c.Send(&control.Message{Type: control.TypeKept, Keys: []string{"k"}}, soon, file.fd); err != nil {
		t.Fatal(err)
	}
	m, fds, err := a.conn.Receive()
	if err != nil || m.Type != control.TypeKept || len(fds) != 1 {
		t.Fatalf("got %+v, %v, %v", m, fds, err)
	}
	control.CloseAll(fds)
	if err := a.conn.Send(&control.Message{Type: control.TypeKeep, Keys: []string{"k"}}, soon, file.fd); err != nil {
		t.Fatal(err)
	}
	m, fds, err = c.Receive()
	if err != nil || m.Type != control.TypeKeep || len(fds) != 1 {
		t.Fatalf("got %+v, %v, %v", m, fds, err)
	}
	control.CloseAll(fds)
	if n := p.Refused(); n != 0 {
		t.Errorf("%d were refused", n)
	}
}

// The time limits of the handshake must not outlive it.
func TestAChannelFromTheRendezvousMayBeSilent(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	c, a := p.reunite(t)
	quiet := make(chan error, 2)
	for _, end := range []*control.Conn{c, a.conn} {
		go func() {
			_, _, err := end.Receive()
			quiet <- err
		}()
	}
	select {
	case err := <-quiet:
		t.Errorf("Receive returned %v", err)
	case <-time.After(6 * time.Second): // longer than the handshake may take
	}
	c.Close()
	a.conn.Close()
	<-quiet
	<-quiet
}

// client is a stranger at the rendezvous.
type client struct {
	t testing.TB
	*net.UnixConn
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(liveness))
	return &client{t, c.(*net.UnixConn)}
}

func (c *client) say(m any) {
	c.t.Helper()
	packet, ok := m.([]byte)
	if !ok {
		packet, _ = json.Marshal(m)
	}
	if _, err := c.Write(packet); err != nil && !errors.Is(err, unix.EPIPE) { // it may be closed already
		c.t.Fatal(err)
	}
}

func (c *client) hear() (m control.Message, packet []byte) {
	c.t.Helper()
	packet = make([]byte, control.MaxMessage)
	n, err := c.Read(packet)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := json.Unmarshal(packet[:n], &m); err != nil {
		c.t.Fatal(err)
	}
	return m, packet[:n]
}

func (c *client) wantClosed() {
	c.t.Helper()
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("it was not closed: %d bytes, %v", n, err)
	}
}

func nonce(n int) []byte { return bytes.Repeat([]byte{7}, n) }

func greeting(change func(*control.Message)) *control.Message {
	h := hello(7)
	m := &control.Message{Type: control.TypeHello, Hello: &h, Nonce: nonce(32)}
	change(m)
	return m
}

func TestWhoIsRefusedAtTheRendezvous(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	good := func(*control.Message) {}
	for name, act := range map[string]func(c *client){
		"one that goes at once":        func(c *client) { c.Close() },
		"one that ends what it says":   func(c *client) { c.CloseWrite() },
		"rubbish":                      func(c *client) { c.say([]byte("\x00\xff rubbish")) },
		"too many bytes":               func(c *client) { c.say(bytes.Repeat([]byte(" "), control.MaxMessage+1)) },
		"another message first":        func(c *client) { c.say(&control.Message{Type: control.TypeAnswer, Re: 1}) },
		"a proof first":                func(c *client) { c.say(&control.Message{Type: control.TypeProof, Proof: nonce(32)}) },
		"a hello without a nonce":      func(c *client) { c.say(greeting(func(m *control.Message) { m.Nonce = nil })) },
		"a hello with a short nonce":   func(c *client) { c.say(greeting(func(m *control.Message) { m.Nonce = nonce(31) })) },
		"a hello with a long nonce":    func(c *client) { c.say(greeting(func(m *control.Message) { m.Nonce = nonce(33) })) },
		"a hello that says nothing":    func(c *client) { c.say(greeting(func(m *control.Message) { m.Hello = nil })) },
		"another process's number":     func(c *client) { c.say(greeting(func(m *control.Message) { m.Hello.PID++ })) },
		"no process's number":          func(c *client) { c.say(greeting(func(m *control.Message) { m.Hello.PID = 0 })) },
		"a generation that is unknown": func(c *client) { c.say(greeting(func(m *control.Message) { m.Hello.Generation = 10 })) },
		"one that goes in the middle":  func(c *client) { c.say(greeting(good)); c.hear(); c.Close() },
		"one without the key": func(c *client) {
			c.say(greeting(good))
			c.hear()
			c.say(&control.Message{Type: control.TypeProof, Proof: nonce(32)})
		},
		"one with an empty proof": func(c *client) {
			c.say(greeting(good))
			c.hear()
			c.say(&control.Message{Type: control.TypeProof})
		},
		"one that returns the proof that it was given": func(c *client) {
			c.say(greeting(good))
			challenge, _ := c.hear()
			c.say(&control.Message{Type: control.TypeProof, Proof: challenge.Proof})
		},
	} {
		c := dial(t, p.Path())
		refused := p.Refused()
		act(c)
		eventually(t, name+" was refused", func() bool { return p.Refused() == refused+1 })
		if !strings.HasPrefix(name, "one that goes") {
			c.wantClosed()
		}
	}
	select {
	case a := <-p.came:
		t.Fatalf("%+v was admitted", a.hello)
	default:
	}
	p.reunite(t)
	if !strings.Contains(p.log.String(), "connection at the rendezvous refused") {
		t.Error("the log says nothing of it")
	}
}

func TestAStrangersDescriptorsAreClosed(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	file := newToken(t)
	c := dial(t, p.Path())
	packet, _ := json.Marshal(greeting(func(*control.Message) {}))
	if _, _, err := c.WriteMsgUnix(packet, unix.UnixRights(file.times(3)...), nil); err != nil {
		t.Fatal(err)
	}
	c.wantClosed()
	file.wantOpen(t, 1)
}

// pass carries packets between two connections and notes them.
func pass(from, to *net.UnixConn, change func([]byte) []byte, noted *[][]byte) {
	packet := make([]byte, control.MaxMessage)
	for {
		n, err := from.Read(packet)
		if err != nil {
			to.CloseWrite()
			return
		}
		*noted = append(*noted, change(bytes.Clone(packet[:n])))
		to.Write((*noted)[len(*noted)-1])
	}
}

func unchanged(packet []byte) []byte { return packet }

// between listens in front of p, once, and passes on what is said, after it has changed
// what the generation says. wait returns it when
// one side has ended.
func between(t *testing.T, p *place, change func([]byte) []byte) (path string, wait func() (up, down [][]byte)) {
	t.Helper()
	path = filepath.Join(socketDir(t), "between.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var up, down [][]byte
	var relay sync.WaitGroup
	relay.Go(func() {
		a, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer a.Close()
		b, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.Path(), Net: "unixpacket"})
		if err != nil {
			return
		}
		defer b.Close()
		for _, c := range []*net.UnixConn{a, b} {
			c.SetDeadline(time.Now().Add(liveness))
		}
		relay.Go(func() { pass(a, b, change, &up) })
		pass(b, a, unchanged, &down)
		a.CloseRead()
		b.CloseRead()
	})
	return path, func() ([][]byte, [][]byte) {
		l.Close()
		relay.Wait()
		return up, down
	}
}

// record lets a handshake happen and returns its packets.
func record(t *testing.T, p *place) (hi, challenge, proof []byte) {
	t.Helper()
	path, wait := between(t, p, unchanged)
	c, err := control.Reunite(t.Context(), path, keyOf(7), hello(7)) // the relay is in the same process
	if err != nil {
		t.Fatal(err)
	}
	a := <-p.came
	c.Close()
	a.conn.Close()
	up, down := wait()
	if len(up) != 2 || len(down) != 1 {
		t.Fatalf("%d and %d packets", len(up), len(down))
	}
	return up[0], down[0], up[1]
}

func TestWhatWasSaidOnceIsOfNoUseAgain(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	hi, challenge, proof := record(t, p)

	t.Run("to a supervisor", func(t *testing.T) {
		c := dial(t, p.Path())
		c.say(hi)
		if _, again := c.hear(); bytes.Equal(again, challenge) {
			t.Error("two challenges are the same")
		}
		c.say(proof)
		c.wantClosed()
	})
	t.Run("to a generation", func(t *testing.T) {
		path := impostor(t, func(c *client) {
			c.hear()
			c.say(challenge)
		})
		wantNoReunion(t, path, "does not know this generation's key")
	})
	if len(p.came) > 0 {
		t.Error("it was admitted")
	}
}

// impostor listens and does act with the first that comes.
func impostor(t *testing.T, act func(c *client)) (path string) {
	t.Helper()
	path = filepath.Join(socketDir(t), "control.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if c, err := l.AcceptUnix(); err == nil {
			defer c.Close()
			act(&client{t, c})
			c.Read(make([]byte, control.MaxMessage)) // until the other side has gone
		}
	}()
	t.Cleanup(func() { l.Close(); <-ended })
	return path
}

func wantNoReunion(t *testing.T, path, message string) {
	t.Helper()
	c, err := control.Reunite(t.Context(), path, keyOf(7), hello(7))
	if err == nil {
		c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), message) {
		t.Errorf("got %v, want %q", err, message)
	}
}

func TestWhomAGenerationDoesNotTakeForASupervisor(t *testing.T) {
	t.Parallel()
	const nobody = "does not know this generation's key"
	for name, test := range map[string]struct {
		act  func(c *client)
		want string
	}{
		"one without the key": {func(c *client) {
			c.hear()
			c.say(&control.Message{Type: control.TypeChallenge, Nonce: nonce(32), Proof: nonce(32)})
		}, nobody},
		"one with an empty proof": {func(c *client) {
			c.hear()
			c.say(&control.Message{Type: control.TypeChallenge, Nonce: nonce(32)})
		}, nobody},
		"one without a nonce": {func(c *client) {
			c.hear()
			c.say(&control.Message{Type: control.TypeChallenge, Proof: nonce(32)})
		}, nobody},
		"one that commands at once": {func(c *client) {
			c.hear()
			c.say(&control.Message{Type: control.TypeObey, Epoch: 99})
		}, "obey"},
		"one that talks rubbish": {func(c *client) { c.hear(); c.say([]byte("rubbish")) }, "no message"},
		"one that closes":        {func(c *client) { c.CloseWrite() }, "EOF"},
		"one that says nothing":  {func(c *client) { c.hear() }, "timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			wantNoReunion(t, impostor(t, test.act), test.want)
		})
	}
	t.Run("one whose key is of another generation", func(t *testing.T) {
		t.Parallel()
		p := listen(t)
		p.serve(t)
		c, err := control.Reunite(t.Context(), p.Path(), keyOf(8), hello(7))
		if err == nil {
			c.Close()
			t.Error("generation 7 was let in with the key of 8")
		}
	})
	t.Run("nobody", func(t *testing.T) {
		t.Parallel()
		wantNoReunion(t, filepath.Join(socketDir(t), "control.sock"), "no such file")
	})
}

// Who listens where a generation looks for its supervisor, and passes on what the two
// say, is neither of them.
func TestSomebodyInBetweenIsRefused(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	path, wait := between(t, p, unchanged)
	output := make([]byte, 1<<10)
	n, err := start(t, "generation", path).Read(output)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(output[:n]); got == "<nil>\n" {
		t.Error("the generation takes somebody in between for its supervisor")
	}
	wait()
	eventually(t, "it was refused", func() bool { return p.Refused() == 1 })
	eventually(t, "the log says why", func() bool { return strings.Contains(p.log.String(), "says that it is process") })
}

func TestWhatAGenerationSaysCannotBeChanged(t *testing.T) {
	t.Parallel()
	for _, change := range [][2]string{
		{`"core":2`, `"core":3`}, {`"core_min":1`, `"core_min":0`}, {`"version":"v9"`, `"version":"v8"`},
		{`"epoch":41`, `"epoch":40`}, {`"generation":7`, `"generation":8`},
	} {
		t.Run(change[1], func(t *testing.T) {
			t.Parallel()
			p := listen(t)
			p.serve(t)
			path, wait := between(t, p, func(packet []byte) []byte {
				return bytes.Replace(packet, []byte(change[0]), []byte(change[1]), 1)
			})
			wantNoReunion(t, path, "does not know this generation's key") // the relay is in the same process
			if up, _ := wait(); len(up) == 0 || !bytes.Contains(up[0], []byte(change[1])) {
				t.Errorf("nothing was changed: %q", up)
			}
			if len(p.came) > 0 {
				t.Error("it was admitted")
			}
		})
	}
}

func TestAFloodKeepsNoGenerationOut(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	start(t, "flood", p.Path())
	eventually(t, "a thousand have come", func() bool { return p.Refused() >= 1000 })
	began := time.Now()
	p.reunite(t)
	t.Logf("let in after %s, beside %d strangers", time.Since(began), p.Refused())
	if n := strings.Count(p.log.String(), "\n"); n > 2+int(time.Since(began)/time.Second) {
		t.Errorf("%d lines of the log", n)
	}
}

func TestOneThatSaysNothingKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	p := listen(t)
	p.serve(t)
	silent := dial(t, p.Path())
	slow := dial(t, p.Path())
	slow.say(greeting(func(*control.Message) {}))
	slow.hear()
	p.reunite(t)
	if n := p.Refused(); n != 0 {
		t.Error("the silent ones were refused before their time")
	}
	silent.wantClosed()
	slow.wantClosed()
	eventually(t, "both were refused", func() bool { return p.Refused() == 2 }) // after they were closed
}

func TestServingEndsAndBeginsAgain(t *testing.T) {
	t.Parallel()
	p := listen(t)
	stop := p.serve(t)
	p.reunite(t)
	silent := dial(t, p.Path())
	silent.say(greeting(func(*control.Message) {}))
	silent.hear()
	stop()
	silent.wantClosed()
	if n := p.Refused(); n != 0 {
		t.Errorf("%d count as refused", n)
	}
	met := make(chan error, 1)
	go func() { // waits in the queue
		c, err := control.Reunite(t.Context(), p.Path(), keyOf(7), hello(7))
		if err == nil {
			c.Close()
		}
		met <- err
	}()
	p.serve(t)
	if err := <-met; err != nil {
		t.Error(err)
	}
}

func TestTheEndOfTheContextEndsTheSearch(t *testing.T) {
	t.Parallel()
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan struct{})
	path := impostor(t, func(c *client) {
		c.hear()
		cancel(enough)
		<-ended
	})
	began := time.Now()
	if c, err := control.Reunite(ctx, path, keyOf(7), hello(7)); !errors.Is(err, enough) {
		t.Errorf("got %v, %v", c, err)
	}
	close(ended)
	if took := time.Since(began); took > 4*time.Second { // a handshake may take 5 s
		t.Errorf("it took %s", took)
	}
}

func TestASuccessorTakesTheSocketOver(t *testing.T) {
	t.Parallel()
	old := listen(t)
	fd, err := unix.FcntlInt(uintptr(old.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	r, err := control.NewRendezvous(fd, old.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close(true)
	p := &place{Rendezvous: r, came: make(chan admitted, 1), log: new(lines)}
	if err := old.Close(false); err != nil {
		t.Fatal(err)
	}
	p.serve(t)
	p.reunite(t)
	if flags, err := unix.FcntlInt(uintptr(r.FD()), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	if err := r.Close(true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(old.Path()); err == nil {
		t.Error("the socket is still there")
	}
}

func TestWhatCannotBeTakenOver(t *testing.T) {
	t.Parallel()
	r := listen(t)
	dup := func(fd int) int {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	file := newToken(t)
	stream, err := net.Listen("unix", filepath.Join(socketDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	raw, _ := stream.(*net.UnixListener).SyscallConn()
	var streamFD int
	raw.Control(func(fd uintptr) { streamFD = dup(int(fd)) })
	deaf, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	deafPath := filepath.Join(socketDir(t), "deaf")
	if err := unix.Bind(deaf, &unix.SockaddrUnix{Name: deafPath}); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		fd   int
		path string
	}{
		"a file":                   {dup(file.fd), r.Path()},
		"no descriptor":            {-1, r.Path()},
		"another kind of socket":   {streamFD, stream.Addr().String()},
		"one that is elsewhere":    {dup(r.FD()), listen(t).Path()},
		"one that does not listen": {deaf, deafPath},
	} {
		if got, err := control.NewRendezvous(test.fd, test.path); err == nil {
			got.Close(false)
			t.Errorf("%s was taken over", name)
		}
	}
	file.wantOpen(t, 1)
	os.Remove(r.Path())
	if got, err := control.NewRendezvous(dup(r.FD()), r.Path()); err == nil {
		got.Close(false)
		t.Error("one that nobody finds was taken over")
	}
}

func TestThePathOfTheRendezvous(t *testing.T) {
	t.Parallel()
	listenAt := func(t *testing.T, path, message string) {
		t.Helper()
		r, err := control.ListenRendezvous(path)
		if err == nil {
			defer r.Close(true)
		}
		if (err == nil) != (message == "") || err != nil && !strings.Contains(err.Error(), message) {
			t.Errorf("got %v, want %q", err, message)
		}
	}
	t.Run("is this user's alone", func(t *testing.T) {
		info, err := os.Lstat(listen(t).Path())
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("got %v, %v", info.Mode(), err)
		}
	})
	t.Run("may have a socket that a killed supervisor has left", func(t *testing.T) {
		p := listen(t)
		if err := p.Close(false); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(p.Path()); err != nil {
			t.Fatal(err)
		}
		listenAt(t, p.Path(), "")
	})
	t.Run("may be another's", func(t *testing.T) {
		listenAt(t, listen(t).Path(), "another process listens there")
	})
	t.Run("may be another's whose queue is full", func(t *testing.T) {
		p := listen(t)
		unix.Listen(p.FD(), 0)
		dial(t, p.Path())
		listenAt(t, p.Path(), "another process listens there")
	})
	t.Run("may be taken by a file", func(t *testing.T) {
		path := filepath.Join(socketDir(t), "control.sock")
		if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		listenAt(t, path, "no socket")
		if data, err := os.ReadFile(path); err != nil || string(data) != "mine" {
			t.Errorf("the file was touched: %q, %v", data, err)
		}
	})
	t.Run("may be taken by a link", func(t *testing.T) {
		dir := socketDir(t)
		if err := os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, "control.sock")); err != nil {
			t.Fatal(err)
		}
		listenAt(t, filepath.Join(dir, "control.sock"), "no socket")
	})
	t.Run("may be too long", func(t *testing.T) {
		listenAt(t, filepath.Join(socketDir(t), strings.Repeat("x", 107)), "at most 107 bytes")
	})
	t.Run("may be where nothing can be", func(t *testing.T) {
		listenAt(t, filepath.Join(socketDir(t), "missing", "control.sock"), "no such file")
	})
	t.Run("is left alone where it is another's by now", func(t *testing.T) {
		p := listen(t)
		os.Remove(p.Path())
		other, err := control.ListenRendezvous(p.Path())
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close(true)
		if err := p.Close(true); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(p.Path()); err != nil {
			t.Error(err)
		}
	})
}

// Not parallel: no other test may open descriptors meanwhile.
func TestARendezvousWithoutDescriptorsWaits(t *testing.T) {
	p := listen(t)
	p.serve(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: p.Path()})
	var said string
	for deadline := time.Now().Add(liveness); said == "" && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		said = p.log.String()
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err != nil || !strings.Contains(said, "too many open files") {
		t.Fatalf("%v, %q", err, said)
	}
	p.reunite(t)
	if n := strings.Count(p.log.String(), "too many open files"); n != 1 {
		t.Errorf("it was said %d times", n)
	}
}
