package inflight_test

import (
	"net"
	"os"
	"testing"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

func TestMain(m *testing.M) {
	becomeChild()
	goleak.VerifyTestMain(m)
}

// childEnv names what the test binary does instead of testing.
const childEnv = "HOLDFAST_TEST_INFLIGHT"

func becomeChild() {
	switch os.Getenv(childEnv) {
	case "pipes":
		pipesOfAUser()
	case "relay":
		relayUntilKilled()
	}
}

// newStore returns a Store and another descriptor of its file.
func newStore(t testing.TB, directions, buffers int, pipes ...inflight.Pipe) (s *inflight.Store, file int) {
	t.Helper()
	fd := newFile(t, directions, buffers)
	s = open(t, duplicate(t, fd), pipes...)
	return s, fd
}

func newFile(t testing.TB, directions, buffers int) int {
	t.Helper()
	fd, err := inflight.NewFile(directions, buffers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func open(t testing.TB, fd int, pipes ...inflight.Pipe) *inflight.Store {
	t.Helper()
	s, err := inflight.Open(fd, pipes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// duplicate returns a descriptor that somebody else closes.
func duplicate(t testing.TB, fd int) int {
	t.Helper()
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// newPipes returns pipes that are closed by the Store they are given to.
func newPipes(t testing.TB, n int) []inflight.Pipe {
	t.Helper()
	pipes := inflight.NewPipes(n, 64<<10)
	if len(pipes) != n {
		t.Fatalf("%d pipes, want %d", len(pipes), n)
	}
	return pipes
}

// mapped returns another mapping of a file, as another process has it.
func mapped(t testing.TB, fd int) []byte {
	t.Helper()
	mem, err := unix.Mmap(fd, 0, size(t, fd), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func size(t testing.TB, fd int) int { return int(stat(t, fd).Size) }

// memory returns how much a file takes.
func memory(t testing.TB, fd int) int { return int(stat(t, fd).Blocks) * 512 }

func stat(t testing.TB, fd int) (s unix.Stat_t) {
	t.Helper()
	if err := unix.Fstat(fd, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func panics(fn func()) (yes bool) {
	defer func() { yes = recover() != nil }()
	fn()
	return false
}

// connected returns both ends of a connection, ours as a descriptor.
func connected(t testing.TB) (peer *net.TCPConn, ours int) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	raw, err := accepted.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { ours = duplicate(t, int(fd)) })
	t.Cleanup(func() { unix.Close(ours) })
	return conn.(*net.TCPConn), ours
}

// What a relay does. 0 is nothing now, the end, or an error.

func receive(fd int, b []byte, flags int) int {
	n, _, _ := unix.Recvfrom(fd, b, flags|unix.MSG_DONTWAIT)
	return max(n, 0)
}

func send(fd int, b []byte) int {
	n, _ := unix.SendmsgN(fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return max(n, 0)
}

func splice(from, to, most int) int {
	n, _ := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	return max(int(n), 0)
}

// disconnect resets a connection, whoever else has it.
func disconnect(fd int) {
	nowhere := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unsafe.Sizeof(nowhere))
}
