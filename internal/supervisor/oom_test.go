package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestTheOldestThatDrainsHasTheHighestScore(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		own    int
		states []state // newest first, the last one is generation 1
		want   map[int]int
	}{
		{"nobody", 0, nil, map[int]int{}},
		{"one that serves", 0, []state{serving}, map[int]int{1: 0}},
		{"one beside it that drains", 0, []state{serving, draining}, map[int]int{2: 0, 1: 1000}},
		{"one that is about to serve", 0, []state{ready, serving, draining}, map[int]int{3: 0, 2: 0, 1: 1000}},
		{"some that drain", 0, []state{serving, draining, draining, stopping, draining}, map[int]int{5: 0, 4: 250, 3: 500, 2: 750, 1: 1000}},
		{"the oldest serves again", 0, []state{draining, draining, serving}, map[int]int{3: 500, 2: 1000, 1: 0}},
		{"a service that is protected", -500, []state{serving, draining, draining}, map[int]int{3: -500, 2: 250, 1: 1000}},
		{"a service that goes first anyway", 1000, []state{serving, draining}, map[int]int{2: 1000, 1: 1000}},
	} {
		var generations []*generation
		for i, st := range tt.states {
			generations = append(generations, &generation{number: len(tt.states) - i, state: st})
		}
		if got := oomScores(tt.own, generations); !maps.Equal(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// wantOOMScores compares what the kernel says of each living generation.
func (w *world) wantOOMScores(want map[int]int) {
	w.t.Helper()
	got := make(map[int]int)
	for _, g := range w.status().Generations {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", g.PID))
		if err != nil {
			w.t.Fatal(err)
		}
		if got[g.Number], err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			w.t.Fatal(err)
		}
	}
	if !maps.Equal(got, want) {
		w.t.Errorf("scores are %v, want %v", got, want)
	}
}

func TestTheKernelKnowsWhomToEndFirst(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	own, err := ownOOMScore()
	if err != nil {
		t.Fatal(err)
	}
	step := func(i, of int) int { return own + (1000-own)*i/of }
	w.wantOOMScores(map[int]int{1: own})
	for range 3 {
		w.mustReload("")
	}
	w.wantOOMScores(map[int]int{4: own, 3: step(1, 3), 2: step(2, 3), 1: 1000})
	if err := w.s.Kill(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	w.wantStates("4 serving, 3 draining, 1 draining")
	w.wantOOMScores(map[int]int{4: own, 3: step(1, 2), 1: 1000})

	// The oldest is what serves again. What it was given is taken back.
	if err := w.s.Kill(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	w.wantStates("3 draining, 1 serving")
	w.wantOOMScores(map[int]int{3: 1000, 1: own})
}

// A kernel that does not let us is one line of the log.
func TestThatTheKernelCannotBeToldIsSaidOnce(t *testing.T) {
	w := prepare(t, base+"#! holds tunnels\n")
	log := new(strings.Builder)
	w.s.log = slog.New(slog.NewTextHandler(log, nil))
	w.s.kernel.setOOMScore = func(process, int) error { return unix.EACCES }
	w.run()
	w.wantServing(1)
	for range 3 {
		w.mustReload("")
	}
	said := 0
	w.s.do(func() { said = strings.Count(log.String(), "the kernel cannot be told") })
	if said != 1 {
		t.Errorf("it is said %d times", said)
	}
}

// Who has ended and was not waited for yet is no failure, although its files belong to
// root then, and its pidfd is good for another signal.
func TestWhoHasEndedNeedsNoScore(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &child{cmd}
	if err := setOOMScore(p, 1000); err != nil || hasExited(p.PID()) {
		t.Errorf("of a process that lives: %v", err)
	}
	in.Close()
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, p.PID(), &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if !hasExited(p.PID()) {
		t.Error("the process lives, as it seems")
	}
	if err := setOOMScore(p, 1000); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("of one that was not waited for: %v", err)
	}
	p.Wait()
	if err := setOOMScore(p, 1000); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("of one that is gone: %v", err)
	}
}
