package supervisor

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// Only what drains, and is not to serve again, can be told to be empty.
func TestWhatDrainsIsToldToBeEmpty(t *testing.T) {
	w := startKeeping(t, base+"#! holds tunnels\n")
	refused := func(number int, text string) {
		t.Helper()
		if err := w.s.Clear(t.Context(), number, time.Minute); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %q", err, text)
		}
	}
	refused(1, "generation 1 serves")
	refused(7, "no living generation 7")
	w.mustReload("")
	w.wantStates("2 serving, 1 draining")
	refused(1, "generation 1 stays at hand")
	w.s.do(func() {
		w.s.pass(w.s.serving)
		w.s.endProbation("passed")
	})
	if err := w.s.Clear(t.Context(), 1, time.Minute); err != nil {
		t.Error(err)
	}
	if got := w.noted("clears"); !slices.Equal(got, []string{"1 within 1m0s"}) {
		t.Errorf("got %q", got)
	}
	w.s.do(func() {
		g := w.s.living[1]
		g.mu.Lock()
		g.clearVersion = 0
		g.mu.Unlock()
	})
	refused(1, "of a build that does not know how")
}
