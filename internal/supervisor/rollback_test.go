package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
)

// shortened has the probation be over at once.
func shortened(file string) string {
	return strings.Replace(file, `probation = "1h"`, `probation = "1ms"`, 1)
}

var quick = shortened(base)

func (w *world) rollback() (*ReloadResult, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	return w.s.Rollback(ctx, false)
}

func (w *world) mustRollback() *ReloadResult {
	w.t.Helper()
	r, err := w.rollback()
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// config is which comment the configuration has that serves.
func (w *world) config() (text string) {
	w.s.do(func() { text = string(w.s.serving.release.bytes) })
	_, text, _ = strings.Cut(text, "\n# ")
	return strings.TrimSpace(text)
}

func (w *world) wantBack(config string, previous int) {
	w.t.Helper()
	r := w.mustRollback()
	if got := w.config(); got != config || r.Previous != previous || !r.RolledBack {
		w.t.Fatalf("%q serves, the result is %+v; want %q instead of generation %d", got, r, config, previous)
	}
}

func TestThereIsNothingToGoBackTo(t *testing.T) {
	w := start(t, quick)
	for range 2 {
		_, err := w.rollback()
		if r, ok := errors.AsType[*Refusal](err); !ok || r.Step != "rollback" || !strings.Contains(err.Error(), "nothing to go back to") {
			t.Errorf("got %v", err)
		}
		w.mustReload(quick) // the same once more is nothing to go back to either
	}
}

// What has not passed its probation is left for what serves where it crashes; and that is what
// passed it.
func TestARollbackWithinProbationReinstates(t *testing.T) {
	w := start(t, base+"# 1\n")
	one := w.generation(1)
	w.mustReload(base + "# 2\n")
	w.wantBack("1", 2)
	w.s.do(func() {
		if w.s.serving != one || w.s.probation != nil || w.s.passed != one {
			t.Errorf("%d serves, on probation %v", w.s.serving.number, w.s.probation)
		}
	})
	w.wantServing(1)
	if last := w.status().LastReload; last.RolledBack != 2 || last.Error != "" {
		t.Errorf("the last reload was %+v", last)
	}
	if _, err := w.rollback(); err == nil {
		t.Error("what never passed its probation is gone back to")
	}
	w.mustReload("") // puts the file into service again
	if w.config() != "2" {
		t.Errorf("%q serves", w.config())
	}
	if last := w.status().LastReload; last.RolledBack != 0 {
		t.Errorf("the last reload was %+v", last)
	}
}

// A second one takes the first one back.
func TestARollbackStartsWhatHasEnded(t *testing.T) {
	w := start(t, quick+"# 1\n")
	w.mustReload(quick + "# 2\n")
	w.wantServing(2)
	w.mustReload(quick + "# 2\n") // the same once more changes nothing of it
	w.wantServing(3)
	w.wantBack("1", 3)
	w.wantServing(4)
	w.wantBack("2", 4)
	w.wantServing(5)
	w.wantBack("1", 5)
	w.s.do(func() {
		if n := w.s.stats.rolledBack.Value(); n != 3 {
			t.Errorf("%d rollbacks are counted", n)
		}
		if n := w.s.stats.done.Value(); n != 3 {
			t.Errorf("%d reloads are counted", n)
		}
	})
}

func TestARollbackReinstatesWhatDrains(t *testing.T) {
	w := start(t, quick+"#! holds tunnels\n# 1\n")
	w.mustReload(quick + "# 2\n")
	w.s.do(func() {})
	w.wait("the end of probation", func(*Status) (over bool) {
		w.s.do(func() { over = w.s.probation == nil })
		return over
	})
	if r := w.mustRollback(); r.Generation != 1 || w.config() != "1" {
		t.Errorf("got %+v, %q serves", r, w.config())
	}
}

// One that lives and does not answer is no hindrance.
func TestARollbackBesideOneThatHangs(t *testing.T) {
	w := start(t, quick+"#! holds tunnels\n# 1\n")
	w.mustReload(quick + "# 2\n")
	freeze(t, w.generation(1).proc.PID())
	w.wait("that it does not answer", func(st *Status) bool {
		return len(st.Generations) == 2 && st.Generations[1].NotAnswering
	})
	if r := w.mustRollback(); r.Generation != 3 || w.config() != "1" {
		t.Errorf("got %+v, %q serves", r, w.config())
	}
	syscall.Kill(w.generation(1).proc.PID(), syscall.SIGKILL)
}

func TestARollbackOpensAndClosesListeners(t *testing.T) {
	addr := freeAddress(t)
	w := start(t, shortened(twoListeners(addr))+"# 1\n")
	w.mustReload(quick + "# 2\n")
	w.wantServing(2)
	w.wantClosed(addr)
	if r := w.mustRollback(); fmt.Sprint(r.Added) != "["+addr+"]" {
		t.Errorf("got %+v", r)
	}
	w.wantOpen(addr)
	w.wantServing(3)
	if r := w.mustRollback(); fmt.Sprint(r.Removed) != "["+addr+"]" {
		t.Errorf("got %+v", r)
	}
	w.wantServing(4)
	w.wantClosed(addr)
}

func TestARollbackThatIsRefusedChangesNothing(t *testing.T) {
	addr := freeAddress(t)
	w := start(t, shortened(twoListeners(addr))+"# 1\n")
	w.mustReload(quick + "# 2\n")
	w.wantServing(2)
	taken, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.rollback()
	if r, ok := errors.AsType[*Refusal](err); !ok || r.Step != "listeners" {
		t.Errorf("got %v", err)
	}
	w.wantServing(2)
	taken.Close()
	w.wantBack("1", 2)
}

// Another supervisor, after an upgrade or a death, knows what can be gone back to.
func TestWhatCanBeGoneBackToOutlivesTheSupervisor(t *testing.T) {
	w := startLasting(t, quick+"# 1\n")
	w.mustReload(quick + "# 2\n")
	w.wantServing(2)
	w.wait("that it is kept", func(*Status) (kept bool) {
		w.s.do(func() { kept = w.s.serving.keepsBack != nil })
		return kept
	})
	w.succeed()
	w.wantServing(2)
	w.wantBack("1", 2)
}
