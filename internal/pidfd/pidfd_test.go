package pidfd_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/pidfd"
)

// The test binary runs itself as the processes that the tests are about.
func TestMain(m *testing.M) {
	switch os.Getenv("HOLDFAST_TEST_ROLE") {
	case "": // the tests
		goleak.VerifyTestMain(m)
	case "parent": // leaves an orphan behind and says its number
		cmd := sleeper()
		cmd.Stdin = os.Stdin
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(cmd.Process.Pid)
	case "sleeper": // lives until its input ends
		io.Copy(io.Discard, os.Stdin)
	}
}

func role(name string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE="+name)
	return cmd
}

func sleeper() *exec.Cmd { return role("sleeper") }

// child starts a sleeper. The caller waits for it.
func child(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := sleeper()
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() // an error is that it has ended
		cmd.Wait()
	})
	return cmd
}

// orphan starts a sleeper that is nobody's child here. It ends with end, or with the test.
func orphan(t *testing.T) (id pidfd.Identity, end func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	end = func() { w.Close() }
	t.Cleanup(end)
	cmd := role("parent")
	cmd.Stdin = r
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(out), &pid); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	id, err = pidfd.Of(pid)
	if err != nil {
		t.Fatal(err)
	}
	return id, end
}

func open(t *testing.T, id pidfd.Identity) *pidfd.Process {
	t.Helper()
	p, err := pidfd.Open(id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// waiting returns what p.Wait will return.
func waiting(p *pidfd.Process) <-chan error {
	result := make(chan error, 1)
	go func() { result <- p.Wait() }()
	return result
}

func wantWait(t *testing.T, result <-chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("Wait does not return")
		return nil
	}
}

func wantGone(t *testing.T, id pidfd.Identity) {
	t.Helper()
	p, err := pidfd.Open(id)
	if err == nil {
		p.Close()
	}
	if !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("opening %+v: got %v, want that it is gone", id, err)
	}
}

func of(t *testing.T, pid int) pidfd.Identity {
	t.Helper()
	id, err := pidfd.Of(pid)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestAProcessThatIsNoChildOfOursIsAwaited(t *testing.T) {
	t.Parallel()
	id, end := orphan(t)
	p := open(t, id)
	if p.PID() != id.PID {
		t.Errorf("got pid %d, want %d", p.PID(), id.PID)
	}
	first, second := waiting(p), waiting(p)
	select {
	case err := <-first:
		t.Fatalf("Wait returned %v while the process runs", err)
	default:
	}
	end()
	for _, result := range []<-chan error{first, second, waiting(p)} {
		if err := wantWait(t, result); err != nil {
			t.Errorf("got %v", err)
		}
	}
	wantGone(t, id)
}

func TestAProcessThatIsNoChildOfOursIsSignalled(t *testing.T) {
	t.Parallel()
	id, _ := orphan(t)
	p := open(t, id)
	if err := p.Signal(syscall.Signal(0)); err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := wantWait(t, waiting(p)); err != nil {
		t.Error(err)
	}
}

func TestCloseEndsWaiting(t *testing.T) {
	t.Parallel()
	cmd := child(t)
	p := open(t, of(t, cmd.Process.Pid))
	result := waiting(p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := wantWait(t, result); err == nil {
		t.Error("Wait says that a running process has ended")
	}
	if err := p.Signal(syscall.SIGKILL); err == nil {
		t.Error("a signal was sent after Close")
	}
	if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the process has not gone on: %v", err)
	}
}

func TestAProcessThatWasNotWaitedForIsGone(t *testing.T) {
	t.Parallel()
	cmd := child(t)
	id := of(t, cmd.Process.Pid)
	p := open(t, id)
	cmd.Process.Kill()
	if err := wantWait(t, waiting(p)); err != nil { // nobody has waited for it: a zombie
		t.Fatal(err)
	}
	if of(t, cmd.Process.Pid) != id {
		t.Error("a zombie has another identity")
	}
	wantGone(t, id)
	cmd.Wait()
	wantGone(t, id)
	if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to one that is gone: got %v", err)
	}
}

func TestANumberThatIsAnothersNow(t *testing.T) {
	t.Parallel()
	id := of(t, child(t).Process.Pid)
	earlier := id
	earlier.Start--
	wantGone(t, earlier)
	otherBoot := id
	otherBoot.Boot = "10000000-0000-0000-0000-000000000000"
	wantGone(t, otherBoot)
	unknownBoot := id
	unknownBoot.Boot = ""
	open(t, unknownBoot)
}

func TestAnIdentityThatNoProcessHas(t *testing.T) {
	t.Parallel()
	self := of(t, os.Getpid())
	for _, pid := range []int{0, -1, -os.Getpid(), 1 << 30, 1<<32 + os.Getpid()} {
		id := self
		id.PID = pid
		wantGone(t, id)
		if got, err := pidfd.Of(pid); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("process %d: got %+v, %v", pid, got, err)
		}
	}
	wantGone(t, pidfd.Identity{PID: os.Getpid()})
}

// A thread has a number of the same kind, and even a folder in /proc.
func TestAThreadIsNoProcess(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		var tid int
		fmt.Sscan(thread.Name(), &tid)
		if tid == os.Getpid() {
			continue
		}
		id, err := pidfd.Of(tid)
		if err != nil {
			continue // it has ended
		}
		if p, err := pidfd.Open(id); err == nil {
			p.Close()
			t.Errorf("thread %d was opened as a process", tid)
		}
	}
}

func TestAProcessWithAMisleadingName(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	name := dir + "/a) R 1 1 (b"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, name); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name)
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE=sleeper")
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil || !strings.Contains(string(stat), "(a) R 1 1 (b)") {
		t.Fatalf("the name is not shown: %q, %v", stat, err)
	}
	_, rest, _ := strings.Cut(string(stat), "(a) R 1 1 (b) ")
	if id, want := of(t, cmd.Process.Pid), strings.Fields(rest)[19]; fmt.Sprint(id.Start) != want {
		t.Errorf("got start %d, want %s", id.Start, want)
	}
}

func TestAnIdentityIsTheSameAfterItWasWrittenDown(t *testing.T) {
	t.Parallel()
	id := of(t, os.Getpid())
	if id.Start == 0 || id.Boot == "" {
		t.Fatalf("got %+v", id)
	}
	data, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	var again pidfd.Identity
	if err := json.Unmarshal(data, &again); err != nil || again != id {
		t.Errorf("got %+v, %v, want %+v", again, err, id)
	}
	open(t, again)
}

// Who waits for hundreds of processes must not need a thread for each.
func TestWaitingTakesNoThreads(t *testing.T) {
	id, _ := orphan(t)
	const many = 200
	var results []<-chan error
	var opened []*pidfd.Process
	for range many {
		p := open(t, id)
		opened = append(opened, p)
		results = append(results, waiting(p))
	}
	stacks := make([]byte, 1<<20)
	deadline := time.Now().Add(20 * time.Second)
	for waits := 0; waits < many; time.Sleep(time.Millisecond) {
		waits = bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte(" [IO wait"))
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d goroutines are parked", waits, many)
		}
	}
	for _, p := range opened {
		p.Close()
	}
	for _, result := range results {
		wantWait(t, result)
	}
}
