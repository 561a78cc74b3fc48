package inflight_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/tunnel/inflight"
)

func TestPipesAreAsWanted(t *testing.T) {
	t.Parallel()
	pipes := inflight.NewPipes(3, 128<<10)
	if len(pipes) != 3 {
		t.Fatalf("%d pipes", len(pipes))
	}
	for _, p := range pipes {
		if n := pipeSize(p); n != 128<<10 {
			t.Errorf("a pipe of %d bytes", n)
		}
		for _, fd := range []int{p.R, p.W} {
			fdFlags, err1 := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			flags, err2 := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
			if fdFlags&unix.FD_CLOEXEC == 0 || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("flags %x, %x, %v, %v", fdFlags, flags, err1, err2)
			}
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	small := inflight.NewPipes(1, 1)
	if len(small) != 1 || pipeSize(small[0]) != 64<<10 {
		t.Errorf("got %v", small)
	}
	for _, p := range small {
		p.Close()
	}
}

func pipeSize(p inflight.Pipe) int {
	n, _ := unix.FcntlInt(uintptr(p.R), unix.F_GETPIPE_SZ, 0)
	return n
}

func TestTheLargestPipeIsTakenFirst(t *testing.T) {
	t.Parallel()
	pipes := append(inflight.NewPipes(1, 128<<10), newPipes(t, 2)...)
	s, _ := newStore(t, 10, 1, pipes...)
	for i, want := range pipes {
		if got := s.Pipe(inflight.Direction(i)); got.R != want.R || got.W != want.W {
			t.Errorf("pipe %d is %d and %d, want %v", i, got.R, got.W, want)
		}
	}
}

// The next direction that is given a pipe must never get what another has left in it.
func TestWhatALostReceiverLeavesInAPipeIsThrownAway(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t, 10, 1, newPipes(t, 1)...)
	p := s.Pipe(1)
	for _, err := unix.Write(p.W, make([]byte, 5000)); err == nil; {
		_, err = unix.Write(p.W, make([]byte, 5000))
	}
	s.FreePipe(p)
	if p = s.Pipe(2); p == nil {
		t.Fatal("no pipe")
	}
	if n, err := unix.Read(p.R, make([]byte, 10)); err != unix.EAGAIN {
		t.Errorf("%d bytes are left: %v", n, err)
	}
	if n, err := unix.Write(p.W, make([]byte, 64<<10)); n != 64<<10 {
		t.Errorf("%d bytes fit: %v", n, err)
	}
}

func TestAPipeThatHoldsSomethingIsRefused(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*inflight.Pipe){
		"bytes":       func(p *inflight.Pipe) { unix.Write(p.W, []byte("x")) },
		"read waits":  func(p *inflight.Pipe) { unix.SetNonblock(p.R, false) },
		"write waits": func(p *inflight.Pipe) { unix.SetNonblock(p.W, false) },
	} {
		pipes := newPipes(t, 2)
		spoil(&pipes[1])
		if s, err := inflight.Open(duplicate(t, newFile(t, 10, 1)), pipes); err == nil {
			s.Close()
			t.Errorf("%s: opened", name)
		}
	}
}

// usersPipes is what a user gets.
type usersPipes struct {
	Sizes   []int // of pipes, when many were asked for
	Again   int   // how many more there are then
	Few     int   // with descriptors for 3
	Leaked  int   // descriptors that are neither
	Failure string
}

// pipesOfAUser is the child of TestAUserHasFewerAndSmallerPipes.
func pipesOfAUser() {
	var u usersPipes
	if err := u.run(); err != nil {
		u.Failure = err.Error()
	}
	json.NewEncoder(os.Stdout).Encode(u)
	os.Exit(0)
}

func (u *usersPipes) run() error {
	if os.Geteuid() == 0 {
		// Nobody else's, so that nobody else's pipes count.
		user := 1<<30 + os.Getpid()
		if err := syscall.Setresuid(user, user, user); err != nil {
			return err
		}
	}
	before, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	pipes := inflight.NewPipes(200, 1<<20)
	for _, p := range pipes {
		u.Sizes = append(u.Sizes, pipeSize(p))
	}
	u.Again = len(inflight.NewPipes(1, 1<<20))
	for _, p := range pipes {
		if err := p.Close(); err != nil {
			return err
		}
	}
	after, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	u.Leaked = len(after) - len(before) - 2*u.Again

	if err := leaveDescriptors(7); err != nil {
		return err
	}
	u.Few = len(inflight.NewPipes(200, 64<<10))
	return nil
}

// leaveDescriptors uses descriptors up until only n can be opened.
func leaveDescriptors(n int) error {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: 100}); err != nil {
		return err
	}
	var used []int
	for {
		fd, err := unix.Dup(0)
		if err == unix.EMFILE {
			break
		}
		used = append(used, fd)
	}
	for _, fd := range used[:n] {
		unix.Close(fd)
	}
	return nil
}

func TestAUserHasFewerAndSmallerPipes(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=pipes")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var u usersPipes
	if err := json.Unmarshal(out, &u); err != nil || u.Failure != "" {
		t.Fatalf("%v, %s", err, out)
	}
	pages, total := number(t, "/proc/sys/fs/pipe-user-pages-soft"), 0
	for i, n := range u.Sizes {
		if n < 64<<10 || n > 1<<20 || i > 0 && n > u.Sizes[i-1] {
			t.Errorf("the sizes are %v", u.Sizes)
			break
		}
		total += n
	}
	if u.Leaked != 0 {
		t.Errorf("%d descriptors are left", u.Leaked)
	}
	if u.Few != 3 {
		t.Errorf("%d pipes with descriptors for 3", u.Few)
	}
	if os.Geteuid() != 0 {
		return // other processes of the user have pipes, too
	}
	if limit := pages * os.Getpagesize(); pages != 0 && len(u.Sizes) != 200 && (total > limit || total < limit*9/10 || u.Again != 0) {
		t.Errorf("%d bytes in %d pipes, and then %d; the limit is %d", total, len(u.Sizes), u.Again, limit)
	}
}

func number(t *testing.T, file string) (n int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &n); err != nil {
		t.Fatal(err)
	}
	return n
}
