package supervisor

import (
	"strings"
	"testing"
)

// Whoever asks a generation whether traffic is wanted hears what /readyz says, also after a
// reload.
func TestGenerationsHearWhetherTrafficIsWanted(t *testing.T) {
	w := start(t, base)
	for _, ready := range []bool{false, true, false} {
		if err := w.s.SetReady(t.Context(), ready); err != nil {
			t.Fatal(err)
		}
	}
	w.wantFile("readiness", "1 \"off\"\n1 \"\"\n1 \"off\"\n")
	w.mustReload(base + "#! other\n")
	w.wantFile("readiness", "1 \"off\"\n1 \"\"\n1 \"off\"\n2 \"off\"\n")
}

func TestGenerationsHearOfAStopBeforeItsDelay(t *testing.T) {
	w := start(t, strings.Replace(base, "[stop]\n", "[stop]\ndelay = \"1h\"\n", 1))
	w.s.Stop()
	w.wantFile("readiness", "1 \"stopping\"\n")
	w.s.Stop() // at once
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}
