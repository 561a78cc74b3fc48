package control_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

const soon = 5 * time.Second

// pair returns both ends of a channel.
func pair(t *testing.T) (a, b *control.Conn) {
	t.Helper()
	a, f, err := control.Pair()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	b, err = control.NewConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// rawSupervisor is raw for the supervisor's end.
func rawSupervisor(t testing.TB) (*control.Conn, int) {
	t.Helper()
	c, f, err := control.Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); f.Close() })
	return c, int(f.Fd())
}

// raw returns a generation's end and the descriptor of the other, to send rubbish with.
func raw(t testing.TB) (*control.Conn, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := control.NewConn(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); unix.Close(fds[1]) })
	return c, fds[1]
}

// A token is a file of a test's own. How many descriptors of it are open is not
// disturbed by whatever else this process opens and closes meanwhile.
type token struct {
	fd   int
	file unix.Stat_t
}

func newToken(t testing.TB) *token {
	t.Helper()
	fd, err := unix.MemfdCreate("token", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	k := &token{fd: fd}
	if err := unix.Fstat(fd, &k.file); err != nil {
		t.Fatal(err)
	}
	return k
}

// times returns its descriptor n times, to be sent.
func (k *token) times(n int) []int { return slices.Repeat([]int{k.fd}, n) }

// open counts the descriptors of it.
func (k *token) open(t testing.TB) (n int) {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range all {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		var file unix.Stat_t
		if unix.Fstat(fd, &file) == nil && file.Dev == k.file.Dev && file.Ino == k.file.Ino {
			n++
		}
	}
	return n
}

// wantOpen waits until so many descriptors of it are open: those of a peer that does
// not keep to the protocol are closed beside whoever receives.
func (k *token) wantOpen(t testing.TB, want int) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for k.open(t) != want {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors are open, want %d", k.open(t), want)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestMessageAndDescriptorsArriveTogether(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := a.Send(&control.Message{Type: control.TypeListeners, Keys: []string{"k"}}, soon, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	w.Close()
	m, fds, err := b.Receive()
	if err != nil || m.Type != control.TypeListeners || len(m.Keys) != 1 || len(fds) != 1 {
		t.Fatalf("got %+v, %v, %v", m, fds, err)
	}
	if flags, _ := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
		t.Error("a received descriptor would be inherited by children")
	}
	if _, err := unix.Write(fds[0], []byte("x")); err != nil {
		t.Error(err)
	}
	control.CloseAll(fds)
	if got, _ := io.ReadAll(r); string(got) != "x" {
		t.Errorf("through the passed descriptor came %q", got)
	}
}

func TestPassingADescriptorLeavesItNonBlocking(t *testing.T) {
	a, b := pair(t)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := a.Send(&control.Message{Type: control.TypeListeners, Keys: []string{"k"}}, soon, fd); err != nil {
		t.Fatal(err)
	}
	_, fds, err := b.Receive()
	if err != nil {
		t.Fatal(err)
	}
	defer control.CloseAll(fds)
	// Both are the same open file description: what one process does to the flag
	// every other one feels.
	for _, n := range []int{fd, fds[0]} {
		if flags, _ := unix.FcntlInt(uintptr(n), unix.F_GETFL, 0); flags&unix.O_NONBLOCK == 0 {
			t.Errorf("descriptor %d blocks now", n)
		}
	}
}

func TestTheOtherSidesEndIsEOF(t *testing.T) {
	a, b := pair(t)
	a.Close()
	if _, _, err := b.Receive(); err != io.EOF {
		t.Errorf("got %v, want io.EOF", err)
	}
}

// A question that nobody has read must not hide what was said before the end.
func TestLastWordsAreHeardAlthoughOurQuestionWasNot(t *testing.T) {
	s, g := pair(t)
	if err := s.Send(&control.Message{Type: control.TypeStatus, ID: 1}, soon); err != nil {
		t.Fatal(err)
	}
	if err := g.Send(&control.Message{Type: control.TypeDone}, soon); err != nil {
		t.Fatal(err)
	}
	g.Close()
	if m, _, err := s.Receive(); err != nil || m.Type != control.TypeDone {
		t.Errorf("got %+v, %v", m, err)
	}
	if _, _, err := s.Receive(); err != io.EOF {
		t.Errorf("got %v, want io.EOF", err)
	}
}

func TestSendDoesNotWaitForEver(t *testing.T) {
	a, _ := pair(t)
	m := &control.Message{Type: "x", Error: strings.Repeat("x", control.MaxMessage/2)}
	var err error
	for range 1000 { // the queue holds far less
		if err = a.Send(m, 20*time.Millisecond); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want a passed deadline", err)
	}
}

func TestUnknownFieldsAreIgnored(t *testing.T) {
	c, peer := raw(t)
	if err := unix.Send(peer, []byte(`{"type":"hello","hello":{"core":7,"core_min":1,"mood":"good"},"later":{"a":1}}`), 0); err != nil {
		t.Fatal(err)
	}
	m, _, err := c.Receive()
	if err != nil || m.Hello.Core != 7 {
		t.Fatalf("got %+v, %v", m, err)
	}
}

func TestVersionsMeetWhereRangesOverlap(t *testing.T) {
	for _, c := range []struct {
		name            string
		theirMin, their int
		ourMin, our     int
		want            bool
	}{
		{"the same", 1, 1, 1, 1, true},
		{"they are newer and know ours", 1, 3, 1, 1, true},
		{"they are newer and have forgotten ours", 2, 3, 1, 1, false},
		{"we are newer and know theirs", 1, 1, 1, 3, true},
		{"we are newer and have forgotten theirs", 1, 1, 2, 3, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := control.Hello{Core: c.their, CoreMin: c.theirMin}
			if got := h.Meets(c.our, c.ourMin); got != c.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

// Whatever a peer sends that is no message, Receive says so and keeps nothing of it.
func TestRubbishIsRefusedAndLeaksNothing(t *testing.T) {
	file := newToken(t)
	many := file.times
	for _, c := range []struct {
		name string
		data string
		fds  []int
	}{
		{"no JSON", "rubbish", nil},
		{"JSON of another kind", `[1,2]`, nil},
		{"no type", `{"id":1}`, nil},
		{"a field of another type", `{"type":7}`, nil},
		{"too long", `{"type":"x","error":"` + strings.Repeat("x", control.MaxMessage) + `"}`, nil},
		{"a descriptor that does not belong", `{"type":"hello"}`, many(1)},
		{"more descriptors than belong", `{"type":"bundle"}`, many(4)},
		{"as many descriptors as the kernel lets pass", `{"type":"listeners"}`, many(control.MaxFiles)},
		{"rubbish with descriptors", "\x00\xff", many(100)},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, peer := raw(t)
			var oob []byte
			if c.fds != nil {
				oob = unix.UnixRights(c.fds...)
			}
			if err := unix.Sendmsg(peer, []byte(c.data), oob, nil, 0); err != nil {
				t.Fatal(err)
			}
			if m, _, err := conn.Receive(); !errors.Is(err, control.ErrProtocol) {
				t.Errorf("got %+v, %v; want ErrProtocol", m, err)
			}
			file.wantOpen(t, 1)
		})
	}
}

// What belongs to a message depends on who sends it: a generation has no business
// with handing listening sockets over.
func TestAGenerationSendsFewDescriptors(t *testing.T) {
	for data, fds := range map[string]int{
		`{"type":"prepare"}`: 1, `{"type":"keep","keys":["k"]}`: 1, `{"type":"logs","keys":["k"]}`: 1, `{"type":"bundle"}`: 1,
		`{"type":"answer","re":1}`: 2, `{"type":"ready"}`: 2,
	} {
		t.Run(data, func(t *testing.T) {
			conn, peer := rawSupervisor(t)
			file := newToken(t)
			if err := unix.Sendmsg(peer, []byte(data), unix.UnixRights(file.times(fds)...), nil, 0); err != nil {
				t.Fatal(err)
			}
			if m, _, err := conn.Receive(); !errors.Is(err, control.ErrProtocol) {
				t.Errorf("got %+v, %v; want ErrProtocol", m, err)
			}
			file.wantOpen(t, 1)
		})
	}
}

// Who closes the last descriptor of a socket waits as long as its SO_LINGER says,
// while its peer does not take what was sent.
func TestASocketThatLingersHoldsUpNobody(t *testing.T) {
	conn, peer := rawSupervisor(t)
	fd := lingering(t)
	if err := unix.Sendmsg(peer, []byte(`{"type":"rubbish"}`), unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	received := make(chan error, 1)
	go func() {
		_, _, err := conn.Receive()
		received <- err
	}()
	select {
	case err := <-received:
		if !errors.Is(err, control.ErrProtocol) {
			t.Errorf("got %v, want ErrProtocol", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("to receive takes as long as the socket lingers")
	}
}

// lingering returns a connected TCP socket with a full send queue, of which the last
// close lasts until the end of the test.
func lingering(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	at := ln.Addr().(*net.TCPAddr)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: at.Port, Addr: [4]byte(at.IP.To4())}); err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() }) // resets it: bytes were not read
	chunk := make([]byte, 64<<10)
	for {
		if err := unix.Sendto(fd, chunk, unix.MSG_DONTWAIT, nil); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 3600}); err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestOwnMistakesAreNotSent(t *testing.T) {
	a, _ := pair(t)
	if err := a.Send(&control.Message{Type: "x", Error: strings.Repeat("x", control.MaxMessage)}, soon); err == nil {
		t.Error("a message that no peer takes was sent")
	}
	if err := a.Send(&control.Message{Type: control.TypeServe}, soon, 0); err == nil {
		t.Error("a descriptor that no peer takes was sent")
	}
}

func TestOnlySeqpacketSocketsAreChannels(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	if _, err := control.NewConn(fds[0]); err == nil {
		t.Error("took a stream")
	}
	r, w, _ := os.Pipe()
	defer w.Close()
	fd, _ := unix.Dup(int(r.Fd()))
	r.Close()
	if _, err := control.NewConn(fd); err == nil {
		t.Error("took a pipe")
	}
}

func TestPayloadsAreWholeAndSealed(t *testing.T) {
	in := control.Bundle{Path: "/etc/x.toml", Config: []byte(strings.Repeat("x", 1<<20)), Generation: 3}
	f, err := control.Payload(in)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("y"), 0); err == nil {
		t.Error("a payload can be changed after it was made")
	}
	if err := f.Truncate(1); err == nil {
		t.Error("a payload can be cut")
	}
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	var out control.Bundle
	if err := control.ReadPayload(fd, &out); err != nil {
		t.Fatal(err)
	}
	if out.Path != in.Path || string(out.Config) != string(in.Config) || out.Generation != 3 {
		t.Error("the payload came out different")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
		t.Error("the descriptor is still open")
	}
}

// The supervisor decodes it and keeps it, so that 64 MiB would cost it a gigabyte.
func TestWhatAGenerationHasLearntIsBounded(t *testing.T) {
	for _, size := range []int{control.MaxLearnt / 2, control.MaxLearnt} {
		f, err := control.Payload(map[string]any{"addresses": map[string]any{strings.Repeat("a", size): []string{"192.0.2.1"}}})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fd, err := unix.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		learnt, err := control.ReadLearnt(fd)
		if fits := size < control.MaxLearnt; (err == nil) != fits || fits && len(learnt.Addresses) != 1 {
			t.Errorf("a name of %d bytes: error %v", size, err)
		}
	}
}

func TestAnUnsealedFileIsNoPayload(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data, _ := json.Marshal(control.Bundle{})
	f.Write(data)
	fd, _ := unix.Dup(int(f.Fd()))
	if err := control.ReadPayload(fd, new(control.Bundle)); err == nil {
		t.Error("took a file that its owner can change while it is read")
	}
}

func TestAPayloadWithASealMissingIsNone(t *testing.T) {
	const all = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	for _, missing := range []int{unix.F_SEAL_SEAL, unix.F_SEAL_SHRINK, unix.F_SEAL_GROW, unix.F_SEAL_WRITE, 0} {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fd, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, all&^missing); err != nil {
			t.Fatal(err)
		}
		if err := control.ReadPayload(fd, new(control.Bundle)); (err == nil) != (missing == 0) {
			t.Errorf("without the seal %#x: %v", missing, err)
		}
	}
}

// The kernel cuts descriptors off, and says so, where the receiver may have no more.
func TestDescriptorsThatWereCutOffAreRefused(t *testing.T) {
	conn, peer := raw(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	file := newToken(t)
	const many = 200 // more than this process has open, so that not all of them fit
	keys := strings.Repeat(`"k",`, many-1) + `"k"`
	if err := unix.Sendmsg(peer, []byte(`{"type":"listeners","keys":[`+keys+`]}`), unix.UnixRights(file.times(many)...), nil, 0); err != nil {
		t.Fatal(err)
	}
	// There is room for the first of them.
	room, err := unix.Dup(file.fd)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(room)
	tight := unix.Rlimit{Cur: uint64(room + 1), Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &tight); err != nil {
		t.Fatal(err)
	}
	m, got, err := conn.Receive()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, control.ErrProtocol) {
		t.Errorf("got %+v with %d descriptors, %v; want ErrProtocol", m, len(got), err)
	}
	file.wantOpen(t, 1)
}

func FuzzReceive(f *testing.F) {
	for _, s := range []string{
		`{"type":"hello","hello":{"core":1,"core_min":1,"version":"x","pid":1}}`,
		`{"type":"status","id":7}`, `{"type":"answer","re":7,"status":{"tunnels":3}}`,
		`{"type":"listeners","keys":["0.0.0.0:80"]}`, `{}`, ``, "\x00",
	} {
		f.Add([]byte(s), 0)
		f.Add([]byte(s), 1)
	}
	f.Fuzz(func(t *testing.T, data []byte, fds int) {
		conn, peer := raw(t)
		file := newToken(t)
		var oob []byte
		if fds = fds & 3; fds > 0 {
			oob = unix.UnixRights(file.times(fds)...)
		}
		if err := unix.Sendmsg(peer, data, oob, nil, unix.MSG_DONTWAIT); err != nil {
			return // the kernel does not take it: an empty or a huge packet
		}
		unix.Shutdown(peer, unix.SHUT_WR)
		m, got, err := conn.Receive()
		control.CloseAll(got)
		if (m == nil) == (err == nil) {
			t.Errorf("message %v with error %v", m, err)
		}
		file.wantOpen(t, 1)
	})
}
