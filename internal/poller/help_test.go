package poller_test

import (
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/poller"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bound is how long anything may take that does happen.
const bound = 30 * time.Second

// newLoop returns a loop whose turns are the test's (see step).
func newLoop(t testing.TB) *poller.Loop {
	t.Helper()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Stop()
		l.Run()
	})
	return l
}

// run returns a loop that runs.
func run(t testing.TB) *poller.Loop {
	t.Helper()
	l, err := poller.New()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Run()
	}()
	t.Cleanup(func() {
		l.Stop()
		wantClosed(t, ended, "the end of Run")
	})
	return l
}

// step is a turn that does not wait.
func step(l *poller.Loop) {
	l.Post(func() {})
	l.Turn()
}

// on calls fn on the goroutine of a loop that runs, and waits for it.
func on(t testing.TB, l *poller.Loop, fn func()) {
	t.Helper()
	done := make(chan struct{})
	if !l.Post(func() { defer close(done); fn() }) {
		t.Fatal("the loop has ended")
	}
	wantClosed(t, done, "a posted function")
}

func wantClosed(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(bound):
		t.Fatalf("%s did not come", what)
	}
}

// call is what an owner was told.
type call struct {
	index uint32
	e     poller.Events
}

// recorder is an owner that remembers, and then does what the test wants.
type recorder struct {
	calls []call
	then  func(call)
}

func (r *recorder) Ready(index uint32, e poller.Events) {
	c := call{index, e}
	r.calls = append(r.calls, c)
	if r.then != nil {
		r.then(c)
	}
}

func (r *recorder) want(t testing.TB, want ...call) {
	t.Helper()
	if !slices.Equal(r.calls, want) {
		t.Errorf("the owner was told %v, want %v", r.calls, want)
	}
	r.calls = nil
}

// pair returns two connected descriptors that do not block.
func pair(t testing.TB) (near, far int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	files := []*os.File{os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")}
	t.Cleanup(func() {
		for _, f := range files {
			f.Close()
		}
	})
	return fds[0], fds[1]
}

func add(t testing.TB, l *poller.Loop, fd int, o poller.Owner, index uint32) poller.Handle {
	t.Helper()
	h, err := l.Add(fd, o, index)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func write(t testing.TB, fd int, s string) {
	t.Helper()
	if n, err := unix.Write(fd, []byte(s)); err != nil || n != len(s) {
		t.Fatalf("write: %d, %v", n, err)
	}
}

// readAll reads until there is no more.
func readAll(fd int) string {
	var all []byte
	for {
		var b [512]byte
		n, err := unix.Read(fd, b[:])
		if n <= 0 || err != nil {
			return string(all)
		}
		all = append(all, b[:n]...)
	}
}

// tcpPair returns a descriptor of one end of a connection, and the other end.
func tcpPair(t testing.TB) (near int, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	raw, err := accepted.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		near, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(near) })
	return near, c.(*net.TCPConn)
}

// until takes turns until cond holds.
func until(t testing.TB, l *poller.Loop, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(bound); !cond(); step(l) {
		if time.Now().After(deadline) {
			t.Fatal("nothing came")
		}
	}
}
