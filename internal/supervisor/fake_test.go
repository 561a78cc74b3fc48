package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
)

// The test binary is its own proxy: started by the supervisor it does what the
// configuration's remarks of the form "#! WORD" tell it.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && slices.Contains([]string{"check", "config", "run"}, os.Args[1]) {
		os.Exit(fakeProxy(os.Args[1]))
	}
	// The race detector's children would each sleep a second at their end.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	os.Exit(m.Run())
}

func fakeProxy(command string) int {
	if command != "run" {
		var b control.Bundle
		if err := control.ReadPayload(0, &b); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		switch {
		case told(b, "check refuses"):
			fmt.Println("a.toml:1: first mistake\na.toml:2: second mistake")
			return 2
		case told(b, "check crashes"):
			panic("crash")
		case told(b, "check hangs"):
			time.Sleep(time.Hour)
		}
		if command == "config" {
			fmt.Printf("effective:%s", b.Config)
		}
		return 0
	}
	mood, _ := os.ReadFile(filepath.Join(filepath.Dir(os.Args[0]), "mood"))
	if string(mood) == "rubbish" {
		unix.Sendmsg(4, []byte("rubbish"), nil, nil, 0)
		time.Sleep(time.Hour)
	}
	conn, err := control.NewConn(4)
	if err != nil {
		return 1
	}
	// Before it has a bundle, a file beside it tells.
	hello := control.Hello{Core: control.Core, CoreMin: control.CoreMin, Version: "fake", PID: os.Getpid(), Clear: control.ClearVersion}
	switch string(mood) {
	case "crash":
		return 7
	case "hang":
		time.Sleep(time.Hour)
	case "foreign":
		hello.Core, hello.CoreMin = 99, 90
	case "knows overrides":
		fakeRuntime = control.RuntimeVersion
	case "knows overrides in its own way":
		fakeRuntime = control.RuntimeVersion + 1
	case "knows clusters":
		fakeClusters = control.ClustersVersion
	case "knows clusters in its own way":
		fakeClusters = control.ClustersVersion + 1
	case "knows tickets":
		fakeTickets = control.TicketsVersion
	case "keeps tunnels":
		hello.Vault = control.VaultVersion
	case "gives connections":
		hello.Passage = control.PassageVersion
	case "gives connections in its own way":
		hello.Passage = control.PassageVersion + 1
	case "escapes":
		hello.Version = "1.0\x1b[2J"
	}
	hello.Runtime, hello.Clusters, hello.Tickets = fakeRuntime, fakeClusters, fakeTickets
	conn.Send(&control.Message{Type: control.TypeHello, Hello: &hello}, time.Second)
	return fakeGeneration(conn)
}

// What a fake generation counts.
var (
	fakeQuestions = metrics.Define(metrics.Desc{Name: "holdfast_fake_questions_total", Help: "Questions.", Type: metrics.TypeCounter})
	fakeTunnels   = metrics.Define(metrics.Desc{Name: "holdfast_tunnels_active", Help: "Tunnels.", Type: metrics.TypeGauge})
	fakeHeld      = metrics.Define(metrics.Desc{Name: "holdfast_fake_held", Help: "Held.", Type: metrics.TypeGauge, Merge: metrics.PerGeneration})
)

// lingering returns a socket that is connected to an address where nobody reads, of
// which the last close lasts for an hour.
func lingering(address string) int {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return -1
	}
	f, _ := c.(*net.TCPConn).File()
	fd, _ := unix.Dup(int(f.Fd()))
	f.Close()
	c.Close()
	chunk := make([]byte, 64<<10)
	for unix.Sendto(fd, chunk, unix.MSG_DONTWAIT, nil) == nil {
	}
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 3600})
	return fd
}

func told(b control.Bundle, word string) bool {
	return strings.Contains(string(b.Config), "#! "+word+"\n")
}

func fakeGeneration(conn *control.Conn) int {
	var b control.Bundle
	questions := 0
	var counts *metrics.Registry
	note := func(file, format string, args ...any) {
		f, err := os.OpenFile(filepath.Join(filepath.Dir(os.Args[0]), file), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			fmt.Fprintf(f, format+"\n", args...)
			f.Close()
		}
	}
	own := newBelongings(&b)
	keeper := &fakeKeeper{b: &b, note: note}
	giver := &fakeGiver{b: &b, note: note}
	overridden := &fakeOverridden{b: &b, note: note}
	clustered := &fakeClustered{b: &b, note: note}
	ticketed := &fakeTicketed{b: &b, note: note}
	for {
		m, fds, err := conn.Receive()
		if err != nil {
			if conn = own.another(); conn == nil {
				return 0
			}
			continue
		}
		if own.take(conn, m, &fds) || keeper.take(conn, m, fds) || giver.take(conn, m, fds) || overridden.take(conn, m, fds) || clustered.take(conn, m, fds) || ticketed.take(conn, m, fds) {
			continue
		}
		answer := func() {
			holds := &control.Status{Tunnels: 3}
			if told(b, "fills up") {
				questions++
				holds.Tunnels = questions
			}
			a := &control.Message{Type: control.TypeAnswer, Re: m.ID, Status: holds}
			if _, rest, ok := strings.Cut(string(b.Config), "#! lingers at "); ok && m.Type == control.TypeStatus {
				at, _, _ := strings.Cut(rest, "\n")
				fd := lingering(at)
				conn.Send(a, time.Second, fd)
				go unix.Close(fd) // waits if it is the last one
				return
			}
			conn.Send(a, time.Second)
		}
		confirm := func() {
			if m.ID != 0 {
				conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second)
			}
		}
		switch m.Type {
		case control.TypeBundle:
			control.ReadPayload(fds[0], &b)
			counts, err = metrics.Open(fds[1])
			if err != nil {
				return 13
			}
			fds = nil
		case control.TypeLogs:
			for i, path := range m.Keys {
				unix.Write(fds[i], fmt.Appendf(nil, "generation %d has %s\n", b.Generation, filepath.Base(path)))
				if told(b, "turns appending off") {
					unix.FcntlInt(uintptr(fds[i]), unix.F_SETFL, 0)
					unix.Seek(fds[i], 0, 0)
				}
			}
			confirm()
		case control.TypeLevel:
			note("levels", "%d %s", b.Generation, m.Level)
			confirm()
		case control.TypeReadiness:
			note("readiness", "%d %q", b.Generation, m.Unready)
			confirm()
		case control.TypeProfile:
			a := &control.Message{Type: control.TypeAnswer, Re: m.ID}
			if m.Profile == "none" {
				conn.Send(a, time.Second)
				break
			}
			f, _ := control.Bytes([]byte("profile " + m.Profile))
			conn.Send(a, time.Second, int(f.Fd()))
			f.Close()
		case control.TypeListeners:
			ready := &control.Message{Type: control.TypeReady}
			switch {
			case told(b, "cannot be ready"):
				ready.Error = "no such host"
			case told(b, "never ready"):
				ready = nil
			case told(b, "dies before ready"):
				return 9
			}
			if told(b, "says why and dies") {
				conn.Send(&control.Message{Type: control.TypeReady, Error: "no such host"}, time.Second)
				return 1
			}
			if told(b, "names do not resolve any more") && b.Generation > 1 && b.Learnt == nil {
				ready.Error = "no such host"
			}
			if ready != nil {
				learnt, _ := control.Payload(control.Learnt{Addresses: map[string][]netip.Addr{"app": {netip.MustParseAddr("192.0.2.1")}}})
				conn.Send(ready, time.Second, int(learnt.Fd()))
				learnt.Close()
			}
			if told(b, "is ready again") {
				conn.Send(&control.Message{Type: control.TypeReady}, time.Second, 2) // no payload at all
			}
		case control.TypeServe:
			own.phase = control.PhaseServing
			if told(b, "refuses to serve") {
				conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID, Error: "will not"}, time.Second)
				break
			}
			answer()
			if told(b, "dies when serving") { // when the supervisor has heard the answer
				time.AfterFunc(300*time.Millisecond, func() { os.Exit(11) })
			}
		case control.TypeDrain:
			note("drains", "%d", b.Generation)
			if !told(b, "does not drain") {
				own.drain()
			}
			answer()
			if m.Within == 0 && !told(b, "holds tunnels") {
				return 0
			}
			if !told(b, "holds tunnels") {
				time.AfterFunc(m.Within, func() { os.Exit(0) })
			}
		case control.TypeStatus:
			if len(b.Config) == 0 {
				return 12 // the bundle comes first
			}
			if told(b, "leaves") && b.Generation == 1 { // as below
				time.AfterFunc(300*time.Millisecond, func() { conn.Send(&control.Message{Type: control.TypeLeaving}, time.Second) })
			}
			counts.Counter(fakeQuestions).Inc()
			counts.Gauge(fakeHeld).Set(5)
			if told(b, "claims too much") {
				counts.Gauge(fakeTunnels).Set(math.MaxInt64)
			} else {
				counts.Gauge(fakeTunnels).Set(3)
			}
			answer()
		case control.TypeClear:
			note("clears", "%d within %s", b.Generation, m.Within)
			answer()
		case control.TypeStop:
			if told(b, "does not stop") {
				break
			}
			if told(b, "dies when stopping") {
				return 14
			}
			return 0
		}
		control.CloseAll(fds)
	}
}

// world is a supervisor under test with its directory.
type world struct {
	t    *testing.T
	s    *Supervisor
	dir  string
	done chan error

	runtime    string // directory, of one that lasts
	rendezvous *control.Rendezvous
}

type noAdmin struct{}

func (noAdmin) Prepare(config.Admin) (commit, abort func(), err error) {
	return func() {}, func() {}, nil
}

// base is a configuration with one listener; %s adds to it.
const base = `
[reload]
ready_timeout = "10s"
probation = "1h"
[stop]
timeout = "5s"
[[listeners]]
name = "a"
address = "127.0.0.1:0"
`

// start starts a supervisor with the configuration; the service is stopped at the
// end of the test.
func start(t *testing.T, file string) *world {
	t.Helper()
	w := prepare(t, file)
	w.run()
	w.wantServing(1)
	return w
}

func prepare(t *testing.T, file string) *world {
	t.Helper()
	t.Parallel()
	dir := t.TempDir()
	me, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, done: make(chan error, 1)}
	w.write(file)
	proxy := filepath.Join(dir, "proxy")
	if err := os.Symlink(me, proxy); err != nil {
		t.Fatal(err)
	}
	w.s = New(w.options())
	return w
}

func (w *world) options() Options {
	return Options{
		ConfigPath: filepath.Join(w.dir, "a.toml"), DefaultProxy: filepath.Join(w.dir, "proxy"), Admin: noAdmin{},
		Log:      slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
		ApplyLog: func(config.Log) {}, LogsDropped: func() uint64 { return 0 },
	}
}

func (w *world) run() {
	s := w.s
	go func() { w.done <- s.Run(context.Background()) }()
	w.t.Cleanup(func() {
		s.Stop()
		s.Stop() // at once
		select {
		case <-s.ended:
		case <-time.After(patience):
			w.t.Error("the supervisor has not stopped")
		}
	})
}

// patience bounds every wait; nothing comes near it.
const patience = 30 * time.Second

func (w *world) write(file string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, "a.toml"), []byte(file), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) mood(mood string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, "mood"), []byte(mood), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) status() *Status {
	w.t.Helper()
	st, err := w.s.Status(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return st
}

// wait waits until the status is as described.
func (w *world) wait(what string, is func(*Status) bool) *Status {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		st := w.status()
		if is(st) {
			return st
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("waited for %s; now: %+v", what, st.Generations)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// states is the status in a word: "2 serving, 1 draining".
func states(st *Status) string {
	var all []string
	for _, g := range st.Generations {
		all = append(all, fmt.Sprintf("%d %s", g.Number, g.State))
	}
	return strings.Join(all, ", ")
}

func (w *world) wantServing(number int) *Status {
	w.t.Helper()
	return w.wait(fmt.Sprintf("generation %d alone", number), func(st *Status) bool {
		return states(st) == fmt.Sprintf("%d serving", number)
	})
}

func (w *world) wantStates(want string) *Status {
	w.t.Helper()
	return w.wait(want, func(st *Status) bool { return states(st) == want })
}

func (w *world) reload(file string) (*ReloadResult, error) {
	w.t.Helper()
	if file != "" {
		w.write(file)
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	return w.s.Reload(ctx, false)
}

func (w *world) mustReload(file string) *ReloadResult {
	w.t.Helper()
	r, err := w.reload(file)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// wantRefused reloads and expects a refusal that changes nothing.
func (w *world) wantRefused(file, step, text string) {
	w.t.Helper()
	before := w.wait("one generation", func(st *Status) bool { return len(st.Generations) == 1 })
	_, err := w.reload(file)
	r, ok := errors.AsType[*Refusal](err)
	if !ok || r.Step != step || !strings.Contains(err.Error(), text) {
		w.t.Errorf("got %v; want a refusal by %q with %q in it", err, step, text)
	}
	after := w.status()
	if states(before) != states(after) || before.Generations[0].PID != after.Generations[0].PID {
		w.t.Errorf("before: %s, after: %s", states(before), states(after))
	}
	if fmt.Sprint(before.Listeners) != fmt.Sprint(after.Listeners) {
		w.t.Errorf("listeners before: %v, after: %v", before.Listeners, after.Listeners)
	}
}

// address is where the listener is bound.
func (w *world) address(name string) string {
	w.t.Helper()
	for _, l := range w.status().Listeners {
		if l.Name == name {
			return l.Address
		}
	}
	w.t.Fatalf("no listener %q", name)
	return ""
}

// wantOpen connects: the queue takes it, whether somebody accepts or not.
func (w *world) wantOpen(address string) {
	w.t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		w.t.Errorf("%v", err)
		return
	}
	c.Close()
}

func (w *world) wantClosed(address string) {
	w.t.Helper()
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		w.t.Errorf("%s is still open", address)
	}
}

// freeze stops a process and waits until each of its threads has stopped: the
// signal alone only asks for it.
func freeze(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for !frozen(t, pid) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stop", pid)
		}
		time.Sleep(time.Millisecond)
	}
}

func frozen(t *testing.T, pid int) bool {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(stats) == 0 {
		t.Fatalf("process %d is gone: %v", pid, err)
	}
	for _, path := range stats {
		stat, _ := os.ReadFile(path) // a thread that has ended since is no hindrance
		if _, after, ok := strings.Cut(string(stat), ") "); ok && !strings.HasPrefix(after, "T") {
			return false
		}
	}
	return true
}
