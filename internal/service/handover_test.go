package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/control"
	"holdfast/internal/socket"
	"holdfast/internal/supervisor"
)

// fakeFlip is tableflip between two goroutines. The zero value starts nothing and is no
// candidate.
type fakeFlip struct {
	start     func(channel *os.File) error // what Upgrade does once; nil: it blocks until ready
	hasParent bool
	ready     chan struct{} // closed by Ready
	parent    chan struct{} // closed when it has ended; nil: there is none
	premature []string      // errors of Upgrade for now

	mu      sync.Mutex
	channel *os.File
}

func (f *fakeFlip) HasParent() bool { return f.hasParent }

func (f *fakeFlip) AddFile(name string, file *os.File) error {
	dup, err := dupFile(file)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.channel = dup
	return err
}

func (f *fakeFlip) File(name string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.channel == nil || name != channelName {
		return nil, nil
	}
	return dupFile(f.channel)
}

func dupFile(file *os.File) (*os.File, error) {
	fd, err := control.DuplicateOf(file)
	return os.NewFile(uintptr(fd), channelName), err
}

func (f *fakeFlip) Upgrade() error {
	if len(f.premature) > 0 {
		err := errors.New(f.premature[0])
		f.premature = f.premature[1:]
		return err
	}
	if f.start != nil {
		return f.start(f.channel)
	}
	<-f.ready
	return nil
}

func (f *fakeFlip) Ready() error {
	close(f.ready)
	return nil
}

func (f *fakeFlip) WaitForParent(ctx context.Context) error {
	select {
	case <-f.parent:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	default:
	}
	if f.parent == nil {
		return nil
	}
	select {
	case <-f.parent:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fakeHeir writes down what is asked of the service.
type fakeHeir struct {
	own      map[string]int // as belongings says them
	unknown  error          // of relieve
	mu       sync.Mutex
	happened []string
}

func (h *fakeHeir) note(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.happened = append(h.happened, what)
}

func (h *fakeHeir) belongings() (map[string]int, error) {
	fds := make(map[string]int)
	for key, fd := range h.own {
		fds[key], _ = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	return fds, nil
}

func (h *fakeHeir) hold() { h.note("hold") }
func (h *fakeHeir) open() { h.note("open") }

func (h *fakeHeir) relieve(int, time.Duration) error {
	h.note("relieve")
	return h.unknown
}

// family is a predecessor, and a candidate that is a child process as far as its number
// goes; what it says it says in the test.
type family struct {
	t    *testing.T
	old  *succession
	flip *fakeFlip // of the old one
	heir *fakeHeir
	next *fakeFlip // of the candidate
	body *exec.Cmd // which can be killed
}

// beget starts the body of a candidate.
func beget(t *testing.T, environ ...string) *family {
	t.Helper()
	f := &family{t: t, heir: new(fakeHeir)}
	f.body = exec.Command("sleep", "300")
	f.body.Env = environ
	f.body.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := f.body.Start(); err != nil {
		t.Fatal(err)
	}
	died := make(chan struct{})
	go func() { f.body.Wait(); close(died) }()
	ready := make(chan struct{})
	f.next = &fakeFlip{hasParent: true, ready: ready}
	f.flip = &fakeFlip{start: func(channel *os.File) error {
		select {
		case <-ready:
			return nil
		case <-died:
			return errors.New("child exited: signal: killed")
		}
	}}
	f.old = newSuccession(f.flip, f.heir, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		f.body.Process.Kill()
		<-died
		if f.old.last != nil {
			f.old.last.Discard()
			<-f.old.last.flipped
		}
		f.flip.channel.Close() // of nil, does nothing
	})
	return f
}

// says has the candidate say hello with these changes and goes on with act.
func (f *family) says(change func(*control.Hello), act func(*predecessor)) {
	wait := f.flip.start
	f.flip.start = func(channel *os.File) error {
		f.next.channel = channel
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := passed(f.next)
			if err != nil {
				f.t.Error(err)
				return
			}
			defer conn.Close()
			hello := &control.Hello{Core: control.Core, CoreMin: control.CoreMin, Version: "2.0.0", PID: f.body.Process.Pid}
			if change != nil {
				change(hello)
			}
			conn.Send(&control.Message{Type: control.TypeCandidate, Hello: hello}, sendTimeout)
			if act != nil {
				act(&predecessor{
					flip: f.next, conn: conn, fds: make(map[string]int), log: slog.New(slog.DiscardHandler),
					takeOver: func() error { f.heir.note("take over"); return nil }, known: func() { f.heir.note("known") },
				})
			}
		}()
		err := wait(channel)
		if err != nil {
			<-done
		}
		return err
	}
}

func (f *family) start() *candidate {
	f.t.Helper()
	s, err := f.old.start(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	return s.(*candidate)
}

// wantDead expects that the body is dead already.
func (f *family) wantDead() {
	f.t.Helper()
	if _, err := openChild(f.body.Process.Pid); !errors.Is(err, os.ErrProcessDone) {
		f.t.Errorf("the candidate is not dead: %v", err)
	}
}

// wantGone waits for the end of the body.
func (f *family) wantGone() {
	f.t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := openChild(f.body.Process.Pid); errors.Is(err, os.ErrProcessDone) {
			return
		}
	}
	f.t.Fatal("a killed process lives")
}

func (f *family) wantHappened(want ...string) {
	f.t.Helper()
	f.heir.mu.Lock()
	defer f.heir.mu.Unlock()
	if !slices.Equal(f.heir.happened, want) {
		f.t.Errorf("what happened is %q, want %q", f.heir.happened, want)
	}
}

// pipe returns the reading end, and a descriptor of the other that is to be handed over.
func pipe(t *testing.T) (*os.File, int) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	r := os.NewFile(uintptr(fds[0]), "pipe")
	t.Cleanup(func() { r.Close() })
	r.SetReadDeadline(time.Now().Add(limit))
	return r, fds[1]
}

func TestTheWholeUpgrade(t *testing.T) {
	t.Parallel()
	f := beget(t)
	own, ownEnd := pipe(t)
	defer own.Close()
	f.heir.own = map[string]int{keyLock: ownEnd}
	generation, generationEnd := pipe(t)
	got := make(chan *control.Estate, 1)
	f.says(nil, func(p *predecessor) {
		if err := p.inherit(); err != nil {
			t.Error(err)
		}
		if lock, err := p.takeOne(keyLock); err != nil || unix.Close(lock) != nil {
			t.Error(err)
		}
		estate, fds := p.Estate()
		if len(fds) != 1 {
			t.Errorf("the supervisor has got %v", fds)
		}
		unix.Write(fds["generation 3"], []byte("x"))
		control.CloseNamed(fds)
		if err := p.Prepared(); err != nil {
			t.Error(err)
		}
		f.heir.note("commands")
		if err := p.Committed(); err != nil {
			t.Error(err)
		}
		got <- estate
	})
	c := f.start()
	if c.PID() != f.body.Process.Pid || c.Version() != "2.0.0" {
		t.Errorf("pid %d, version %s", c.PID(), c.Version())
	}
	estate := &control.Estate{Epoch: 8, Last: 3, LogLevel: "debug"}
	if err := c.Offer(t.Context(), estate, map[string]int{"generation 3": generationEnd}); err != nil {
		t.Fatal(err)
	}
	unix.Close(generationEnd)
	unix.Close(ownEnd)
	if err := c.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Farewell(t.Context())
	if e := <-got; e.Epoch != 8 || e.Last != 3 || e.LogLevel != "debug" {
		t.Errorf("the estate is %+v", e)
	}
	f.wantHappened("hold", "commands", "take over", "relieve", "known")
	for _, r := range []*os.File{generation, own} {
		if data, err := io.ReadAll(r); err != nil || len(data) > 1 {
			t.Errorf("a descriptor is open still: %q, %v", data, err)
		}
	}
}

// grandchild returns the number of a process that may be killed and is no child.
func grandchild(t *testing.T) (pid int) {
	t.Helper()
	parent := exec.Command("sh", "-c", "sleep 300 & echo $!; wait")
	parent.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-parent.Process.Pid, syscall.SIGKILL)
		parent.Wait()
	})
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// Whatever is wrong with a candidate, the answer says it, and what is left of it is dead.
func TestACandidateThatIsNotWanted(t *testing.T) {
	t.Parallel()
	stranger := grandchild(t)
	offer := func(t *testing.T, c *candidate) error {
		return c.Offer(t.Context(), new(control.Estate), nil)
	}
	for name, test := range map[string]struct {
		hello func(*control.Hello)
		act   func(*predecessor)
		then  func(*testing.T, *candidate) error
		want  string
	}{
		"shares no protocol": {hello: func(h *control.Hello) { h.Core, h.CoreMin = control.Core+9, control.Core+8 }, want: "speaks control protocol 9 to 10, this supervisor 1 to 1"},
		"is somebody else":   {hello: func(h *control.Hello) { h.PID = stranger }, want: "no child of this one"},
		"is nobody":          {hello: func(h *control.Hello) { h.PID = 1 << 30 }, want: "process already finished"},
		"has no version":     {hello: func(h *control.Hello) { h.Version = "\x1b[31m" }, want: "no version that can be shown"},
		"refuses": {
			act: func(p *predecessor) {
				p.inherit()
				p.Refuse(errors.New("h.toml:1: no\nh.toml:2: \x1bneither"))
			},
			then: offer, want: "h.toml:1: no\nh.toml:2: \uFFFDneither",
		},
		"refuses at length": {
			act:  func(p *predecessor) { p.Refuse(errors.New(strings.Repeat("é\x01", maxReason))) },
			then: offer, want: "é\uFFFDé",
		},
		"ends after its hello": {
			act: func(p *predecessor) {}, then: func(t *testing.T, c *candidate) error {
				c.process.Signal(syscall.SIGKILL)
				return offer(t, c)
			}, want: "the new program has not come up: child exited: signal: killed",
		},
		"says what it should not": {
			act:  func(p *predecessor) { p.conn.Send(&control.Message{Type: "x"}, sendTimeout) },
			then: offer, want: `has said "x", and not "prepared"`,
		},
		"is slow": {
			act: func(p *predecessor) { p.inherit() },
			then: func(t *testing.T, c *candidate) error {
				c.deadline = time.Now()
				return offer(t, c)
			},
			want: "the new program could not command the generations within",
		},
		"does not command when it is told to": {
			act: func(p *predecessor) {
				p.inherit()
				p.Prepared()
			},
			then: func(t *testing.T, c *candidate) error {
				c.commitTimeout = time.Millisecond
				return errors.Join(offer(t, c), c.Commit(t.Context()))
			},
			want: "does not command within",
		},
		"dies when it is told to command": {
			act: func(p *predecessor) {
				p.inherit()
				p.Prepared()
			},
			then: func(t *testing.T, c *candidate) error {
				err := offer(t, c)
				c.process.Signal(syscall.SIGKILL)
				return errors.Join(err, c.Commit(t.Context()))
			},
			want: "child exited",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := beget(t)
			f.says(test.hello, test.act)
			s, err := f.old.start(t.Context())
			if test.then != nil {
				if err != nil {
					t.Fatal(err)
				}
				err = test.then(t, s.(*candidate))
				if d := s.Discard(); d != nil {
					t.Error(d)
				}
				f.wantDead()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the reason is %v, want %q", err, test.want)
			}
			f.heir.mu.Lock()
			defer f.heir.mu.Unlock()
			if n := len(f.heir.happened); n == 0 || f.heir.happened[n-1] != "open" {
				t.Errorf("commands are held for ever: %q", f.heir.happened)
			}
		})
	}
}

// Not parallel: the process is found by what is said of it in /proc, among all children.
func TestAProgramThatSaysNothing(t *testing.T) {
	t.Run("because it cannot be started", func(t *testing.T) {
		f := beget(t)
		f.flip.start = func(*os.File) error { return errors.New("can't start child: no such file") }
		if _, err := f.old.start(t.Context()); err == nil || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("the reason is %v", err)
		}
	})
	t.Run("and runs", func(t *testing.T) {
		f := beget(t, "PATH=/bin", marker+"=yes") // as tableflip has it
		f.old.prepareTimeout = 50 * time.Millisecond
		_, err := f.old.start(t.Context())
		if err == nil || !strings.Contains(err.Error(), "has not said what it is within 50ms") {
			t.Errorf("the reason is %v", err)
		}
		f.wantDead()
	})
	t.Run("and is given up", func(t *testing.T) {
		f := beget(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(supervisor.ErrStopping)
		if _, err := f.old.start(ctx); !errors.Is(err, supervisor.ErrStopping) {
			t.Errorf("the reason is %v", err)
		}
	})
}

// A candidate that is killed has perhaps not received what it was sent. tableflip goes on
// to hold the end of the channel where that lies.
func TestWhatADeadCandidateHasNotReceivedIsClosed(t *testing.T) {
	t.Parallel()
	f := beget(t)
	f.old.prepareTimeout = 200 * time.Millisecond
	f.says(nil, nil)
	r, w := pipe(t)
	c := f.start()
	if err := c.Offer(t.Context(), new(control.Estate), map[string]int{"generation 1": w}); err == nil {
		t.Error("prepared")
	}
	unix.Close(w)
	if err := c.Discard(); err != nil {
		t.Error(err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("it is open: %v", err)
	}
}

func TestTheNextUpgradeWaitsForWhatWasBefore(t *testing.T) {
	t.Parallel()
	t.Run("for its parent", func(t *testing.T) {
		f := beget(t)
		f.flip.parent = make(chan struct{})
		f.flip.premature = []string{"parent hasn't exited", "process is not ready yet"}
		f.says(nil, nil)
		time.AfterFunc(20*time.Millisecond, func() { close(f.flip.parent) })
		f.start()
	})
	t.Run("and not for ever", func(t *testing.T) {
		f := beget(t)
		f.flip.parent = make(chan struct{})
		f.old.prepareTimeout = 20 * time.Millisecond
		if _, err := f.old.start(t.Context()); err == nil || !strings.Contains(err.Error(), "has not ended within 20ms") {
			t.Errorf("the reason is %v", err)
		}
	})
	t.Run("for an earlier candidate", func(t *testing.T) {
		f := beget(t)
		f.old.last = &candidate{flipped: make(chan struct{})}
		f.old.prepareTimeout = 20 * time.Millisecond
		if _, err := f.old.start(t.Context()); err == nil || !strings.Contains(err.Error(), "has not ended within 20ms") {
			t.Errorf("the reason is %v", err)
		}
		f.old.last = nil
	})
}

// A service manager starts another supervisor if this one ends out of order. It must do so
// where it may not know the successor, or not have noticed its end.
func TestASuccessorThatTheServiceManagerMayNotKnow(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*family){
		"it does not answer":    func(f *family) { f.heir.unknown = errors.New("systemd does not answer") },
		"the successor is gone": func(f *family) { f.body.Process.Kill(); f.wantGone() },
		"none of that":          func(*family) {},
	} {
		t.Run(name, func(t *testing.T) {
			f := beget(t)
			heard := make(chan error, 1)
			f.says(nil, func(p *predecessor) {
				p.supervised = true
				heard <- errors.Join(p.inherit(), p.Prepared(), p.Committed())
			})
			c := f.start()
			if err := errors.Join(c.Offer(t.Context(), new(control.Estate), nil), c.Commit(t.Context())); err != nil {
				t.Fatal(err)
			}
			spoil(f)
			c.Farewell(t.Context())
			if lost := (&holdings{succession: f.old}).parting(); (lost == nil) != (name == "none of that") {
				t.Errorf("this process ends with %v", lost)
			}
			c.conn.Close() // as its end does
			if err := <-heard; (err == nil) != (name == "none of that") {
				t.Errorf("the successor goes on with %v", err)
			}
		})
	}
}

func TestProcess1IsNotUpgraded(t *testing.T) {
	t.Parallel()
	s := newSuccession(nil, nil, slog.New(slog.DiscardHandler))
	s.pid = 1
	_, err := s.start(t.Context())
	wantError(t, err, "a container is replaced, not upgraded")
}

// What a candidate does when its predecessor ends.
func TestWithoutAPredecessor(t *testing.T) {
	t.Parallel()
	connect := func(t *testing.T) (*control.Conn, *predecessor) {
		ours, theirs, err := control.Ends()
		if err != nil {
			t.Fatal(err)
		}
		old, err := control.NewPredecessorConn(ours)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := control.NewCandidateConn(theirs)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { old.Close(); conn.Close() })
		return old, &predecessor{
			flip: &fakeFlip{ready: make(chan struct{})}, conn: conn, fds: make(map[string]int), log: slog.New(slog.DiscardHandler),
			takeOver: func() error { return nil }, known: func() {},
		}
	}
	t.Run("nothing is inherited", func(t *testing.T) {
		old, p := connect(t)
		old.Close()
		wantError(t, p.inherit(), "the predecessor is gone")
	})
	t.Run("it does not command", func(t *testing.T) {
		old, p := connect(t)
		time.AfterFunc(10*time.Millisecond, func() { old.Close() })
		wantError(t, p.Prepared(), "the predecessor is gone")
	})
	t.Run("it commands if it was told to", func(t *testing.T) {
		old, p := connect(t)
		if err := old.Send(&control.Message{Type: control.TypeCommit}, sendTimeout); err != nil {
			t.Fatal(err)
		}
		if err := p.Prepared(); err != nil {
			t.Error(err)
		}
	})
	t.Run("it commands on where there is no service manager", func(t *testing.T) {
		old, p := connect(t)
		old.Close()
		if err := p.Committed(); err != nil || !p.commands {
			t.Errorf("%v, commands %t", err, p.commands)
		}
	})
	t.Run("it leaves where the service manager may not know it", func(t *testing.T) {
		old, p := connect(t)
		p.supervised = true
		old.Close()
		wantError(t, p.Committed(), "the service manager may not know this process")
		h := &holdings{predecessor: p, succession: new(succession)}
		wantError(t, h.parting(), "the service manager may not know this process")
	})
}

// TestThroughTableflip has this program succeed itself ten times. See the role.
func TestThroughTableflip(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[0] = self // which is what tableflip starts
	cmd.Env = append(os.Environ(), roleEnv+"=dynasty")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(limit))
	out, err := io.ReadAll(r) // until the last of them ends
	if err != nil || cmd.Wait() != nil || !strings.HasSuffix(string(out), "the last one commands\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

const roleEnv = "HOLDFAST_TEST_ROLE"

// dynasty is the role of TestThroughTableflip: a supervisor that has nothing to hand over
// but a number, and a candidate that counts it down.
func dynasty() error {
	up, err := newFlip()
	if err != nil {
		return err
	}
	if os.Getenv(marker) != "" {
		return errors.New("the marker is in the environment")
	}
	p, err := meet(up)
	if err != nil {
		return err
	}
	left := 10
	if p != nil {
		for fd := uintptr(3); fd <= 5; fd++ { // tableflip's
			if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
				to, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
				return fmt.Errorf("descriptor %d (%s) would be inherited", fd, to)
			}
		}
		p.log, p.takeOver, p.known = slog.Default(), func() error { return nil }, func() {}
		left = p.estate.Last
		if err := errors.Join(p.Prepared(), p.Committed()); err != nil {
			return err
		}
	}
	if left == 0 {
		os.Stdout.WriteString("the last one commands\n")
		return nil
	}
	next, err := newSuccession(up, new(fakeHeir), slog.Default()).start(context.Background())
	if err != nil {
		return err
	}
	if err := next.Offer(context.Background(), &control.Estate{Last: left - 1}, nil); err != nil {
		return err
	}
	if err := next.Commit(context.Background()); err != nil {
		return err
	}
	next.Farewell(context.Background())
	return nil
}

func TestWhatTheServiceHandsOver(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	r, w := pipe(t)
	h, err := occupy(dir, origin{inherited: socket.InheritDescriptors(map[string][]int{"two words": {w}})})
	if err != nil {
		t.Fatal(err)
	}
	h.settle(slog.New(slog.DiscardHandler), new(supervisor.Options))
	if err := h.surface.Start(dir, new(admintest.Supervisor)); err != nil {
		t.Fatal(err)
	}
	defer h.close(true)
	fds, err := h.belongings()
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(w)
	for _, key := range []string{keyLock, keyRendezvous, "admin unix"} {
		if _, ok := fds[key]; !ok {
			t.Errorf("no %s among %v", key, fds)
		}
	}
	if fds[keyLock] == h.lock.FD() || fds[keyRendezvous] == h.rendezvous.FD() {
		t.Errorf("what this process has itself is not to be closed: %v", fds)
	}
	p := &predecessor{fds: fds}
	if all := takeSystemd(p).All(); len(all["two words"]) != 1 {
		t.Errorf("the sockets of systemd are %v", all)
	} else {
		unix.Close(all["two words"][0])
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a duplicate is left: %v", err)
	}
	if len(p.fds) != 3 {
		t.Errorf("the supervisor, too, is given what is the service's: %v", p.fds)
	}
	control.CloseNamed(p.fds)
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %q", err, text)
	}
}
