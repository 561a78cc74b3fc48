package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait; nothing comes near it on an idle machine.
const patience = 60 * time.Second

// instance is a running service: a supervisor with a runtime directory of its own.
type instance struct {
	t   *testing.T
	dir string // of the configuration, the runtime directory and unix sockets
	cmd *exec.Cmd
	pid int // of the supervisor that commands
	log *lockedBuffer

	program string   // that is started; set before start; "": holdfast
	command string   // that commands it; "": holdfast
	env     []string // what its environment has besides ours; set before start

	stdout io.Writer // of the service; set before start; nil: nobody's

	ended chan struct{}
	err   *error        // how the supervisor ended, when ended is closed; shared by copies, see on
	said  chan struct{} // closed when nobody can write to the log any more
}

// status is what `holdfast status --json` says, as far as the tests look.
type status struct {
	PID         int    `json:"pid"`
	Version     string `json:"version"`
	ConfigHash  string `json:"config_hash"`
	FileDiffers bool   `json:"file_differs"`
	Ready       bool   `json:"ready"`
	Stopping    bool   `json:"stopping"`
	Listeners   []struct {
		Name, Key, Address string
	} `json:"listeners"`
	Generations []generation `json:"generations"`
	Vault       struct {
		Resuming int `json:"resuming"`
	} `json:"vault"`
}

type generation struct {
	Number       int    `json:"generation"`
	State        string `json:"state"`
	Version      string `json:"version"`
	NotAnswering bool   `json:"not_answering"`
	PID          int    `json:"pid"`
	Requests     int    `json:"requests"`
	Tunnels      int    `json:"tunnels"`
	Connections  int    `json:"connections"`
	Deposits     int    `json:"deposits"`

	OldestTunnel time.Time `json:"oldest_tunnel"`
}

// states is the status in a word: "2 serving, 1 draining".
func (s *status) states() string {
	var all []string
	for _, g := range s.Generations {
		all = append(all, fmt.Sprintf("%d %s", g.Number, g.State))
	}
	return strings.Join(all, ", ")
}

func program(name string) string { return filepath.Join(os.Getenv(binEnv), name) }

// newInstance prepares a service; start starts it.
func newInstance(t *testing.T, config string) *instance {
	t.Helper()
	dir, err := os.MkdirTemp("", "i")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	i := &instance{t: t, dir: dir, log: new(lockedBuffer)}
	i.write(config)
	return i
}

// serve starts a service that is stopped when the test ends. It must have stopped
// properly then, and left no process behind.
func serve(t *testing.T, config string) *instance {
	t.Helper()
	i := newInstance(t, config)
	i.start(nil)
	return i
}

// start starts the supervisor and waits until it serves. stderr nil: kept, and shown
// if the test fails.
func (i *instance) start(stderr *os.File) {
	i.t.Helper()
	i.launch(stderr)
	i.wait("a serving generation", func(s *status) bool { return len(s.Generations) > 0 && s.Generations[0].State == "serving" })
}

func (i *instance) launch(stderr *os.File) {
	i.t.Helper()
	i.cmd = exec.Command(cmp.Or(i.program, program("holdfast")), "run", "-c", i.config(), "--runtime-dir", i.runtime())
	i.cmd.Stdout, i.cmd.Stderr = i.stdout, stderr
	i.cmd.Env = append(os.Environ(), i.env...)
	i.said = make(chan struct{})
	if stderr == nil {
		// A pipe of our own: with one of os/exec's, the end of the supervisor would wait
		// for that of its generations.
		r, w, err := os.Pipe()
		if err != nil {
			i.t.Fatal(err)
		}
		defer w.Close()
		i.cmd.Stderr = w
		go func(said chan struct{}) { io.Copy(i.log, r); r.Close(); close(said) }(i.said)
	} else {
		close(i.said)
	}
	i.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := i.cmd.Start(); err != nil {
		i.t.Fatal(err)
	}
	i.pid, i.ended, i.err = i.cmd.Process.Pid, make(chan struct{}), new(error)
	go func(cmd *exec.Cmd, ended chan struct{}, err *error) { *err = cmd.Wait(); close(ended) }(i.cmd, i.ended, i.err)
	i.t.Cleanup(i.stopAtTheEnd)
}

func (i *instance) config() string  { return filepath.Join(i.dir, "holdfast.toml") }
func (i *instance) runtime() string { return filepath.Join(i.dir, "run") }

func (i *instance) write(config string) {
	i.t.Helper()
	if err := os.WriteFile(i.config(), []byte(config), 0o600); err != nil {
		i.t.Fatal(err)
	}
}

// stopAtTheEnd stops what still runs, by signal, twice if need be, and sees to it
// that nothing survives.
func (i *instance) stopAtTheEnd() {
	var pids []int
	if !i.hasEnded() {
		pids = i.pids()
		i.signal(syscall.SIGTERM)
		select {
		case <-i.ended:
		case <-time.After(2 * time.Second): // tunnels that the test left open
			i.signal(syscall.SIGTERM)
			i.awaitEnd()
		}
	}
	for _, pid := range pids {
		if !i.gone(pid) {
			i.t.Errorf("process %d has survived the supervisor", pid)
			if runs(pid) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	select {
	case <-i.said:
	case <-time.After(5 * time.Second): // somebody has survived, which is said elsewhere
	}
	if strings.Contains(i.log.String(), "DATA RACE") {
		i.t.Error("a data race in the service")
	}
	if i.t.Failed() {
		i.t.Logf("log of the service:\n%s", i.log.String())
	}
}

func (i *instance) hasEnded() bool {
	select {
	case <-i.ended:
		return true
	default:
		return false
	}
}

func (i *instance) awaitEnd() {
	i.t.Helper()
	select {
	case <-i.ended:
	case <-time.After(patience):
		i.t.Error("the supervisor has not ended")
		i.signal(syscall.SIGKILL)
		<-i.ended
	}
}

// pids are the generations' processes.
func (i *instance) pids() []int {
	var all []int
	if s, err := i.tryStatus(); err == nil {
		for _, g := range s.Generations {
			all = append(all, g.PID)
		}
	}
	return all
}

// gone waits a moment for a process to end. Whoever it is a child of when its own
// parent has ended may never wait for it.
func (i *instance) gone(pid int) bool {
	for range 200 {
		if state, _ := processState(pid); state == "" || state == "Z" {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

func (i *instance) signal(sig syscall.Signal) { syscall.Kill(i.pid, sig) }

// processState is a letter as in /proc/PID/stat, "" if there is no process, and its
// process group.
func processState(pid int) (state string, group int) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0
	}
	var parent int
	fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &parent, &group)
	return state, group
}

// holdfast runs a command against the service.
func (i *instance) holdfast(args ...string) (code int, stdout, stderr string) {
	i.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, cmp.Or(i.command, program("holdfast")), append([]string{"--runtime-dir", i.runtime()}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), out.String(), errs.String()
	}
	if err != nil {
		i.t.Fatal(err)
	}
	return 0, out.String(), errs.String()
}

// reload puts a configuration into service.
func (i *instance) reload(config string) {
	i.t.Helper()
	i.write(config)
	if code, out, errs := i.holdfast("reload"); code != 0 {
		i.t.Fatalf("reload: exit code %d\n%s%s", code, out, errs)
	}
}

// wantRefused reloads and expects a refusal that changes nothing.
func (i *instance) wantRefused(config string, code int, text string) {
	i.t.Helper()
	before := i.wait("one generation", func(s *status) bool { return len(s.Generations) == 1 })
	i.write(config)
	got, out, errs := i.holdfast("reload")
	if got != code || !strings.Contains(errs, text) {
		i.t.Errorf("exit code %d, want %d; the answer, in which %q must be:\n%s%s", got, code, text, out, errs)
	}
	after := i.status()
	if before.states() != after.states() || before.Generations[0].PID != after.Generations[0].PID {
		i.t.Errorf("before: %s (pid %d), after: %s", before.states(), before.Generations[0].PID, after.states())
	}
	if fmt.Sprint(before.Listeners) != fmt.Sprint(after.Listeners) {
		i.t.Errorf("listeners before: %v, after: %v", before.Listeners, after.Listeners)
	}
}

func (i *instance) tryStatus() (*status, error) {
	i.t.Helper()
	code, out, errs := i.holdfast("status", "--json")
	if code != 0 {
		return nil, fmt.Errorf("status: exit code %d: %s", code, errs)
	}
	s := new(status)
	return s, json.Unmarshal([]byte(out), s)
}

func (i *instance) status() *status {
	i.t.Helper()
	s, err := i.tryStatus()
	if err != nil {
		i.t.Fatal(err)
	}
	return s
}

// wait waits until the status is as described.
func (i *instance) wait(what string, is func(*status) bool) *status {
	i.t.Helper()
	var s *status
	var err error
	eventually(i.t, func() bool {
		if i.hasEnded() {
			i.t.Fatalf("waiting for %s: the supervisor has ended: %v\n%s", what, *i.err, i.log.String())
		}
		s, err = i.tryStatus()
		return err == nil && is(s)
	}, func() string {
		if err != nil {
			return what + ": " + err.Error()
		}
		return what + "; now: " + s.states()
	})
	return s
}

func (i *instance) wantStates(want string) *status {
	i.t.Helper()
	return i.wait(want, func(s *status) bool { return s.states() == want })
}

// address is where a listener is bound.
func (i *instance) address(name string) string {
	i.t.Helper()
	for _, l := range i.status().Listeners {
		if l.Name == name {
			return l.Address
		}
	}
	i.t.Fatalf("no listener %q", name)
	return ""
}

// dial connects; the connection is closed at the end of the test.
func dial(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// eventually waits for a condition. Between two looks it lets others run.
func eventually(t *testing.T, is func() bool, what func() string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", patience, what())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
