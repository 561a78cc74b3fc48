package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/socket"
)

// twoListeners are base with a second listener at the address.
func twoListeners(address string) string {
	return base + fmt.Sprintf("[[listeners]]\nname = \"b\"\naddress = %q\n", address)
}

// mustPlan reads the file as a reload does, which goes no further.
func (w *world) mustPlan() *plan {
	w.t.Helper()
	p, err := w.s.plan(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) mustLaunch(p *plan) *generation {
	w.t.Helper()
	g, err := w.s.launch(w.t.Context(), p)
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

// generation returns a living one.
func (w *world) generation(number int) (g *generation) {
	w.t.Helper()
	w.s.do(func() { g = w.s.living[number] })
	if g == nil {
		w.t.Fatalf("generation %d does not live", number)
	}
	return g
}

// The relieved generation accepts until it is drained. Its death in this moment was
// taken for that of the serving one, which was then replaced and never drained.
func TestTheDeathOfARelievedGenerationIsNotThatOfTheServingOne(t *testing.T) {
	w := start(t, base)
	p := w.mustPlan()
	g := w.mustLaunch(p)
	if _, err := w.s.relieve(t.Context(), g, p, false); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(w.generation(1).proc.PID(), syscall.SIGKILL)
	w.wantServing(2)
	if !w.s.Ready() {
		t.Error("not ready although generation 2 serves")
	}
	w.s.do(func() {
		if w.s.serving != g || w.s.restoring {
			t.Errorf("serving is %v, restoring is %v", w.s.serving, w.s.restoring)
		}
	})
}

// A generation that was cut off, or that the stop has told to end, between its
// answer and our next step became the serving one, and nobody missed it when it died.
func TestAGenerationThatIsEndingDoesNotBecomeTheServingOne(t *testing.T) {
	w := start(t, base)
	p := w.mustPlan()
	g := w.mustLaunch(p)
	w.s.do(func() { w.s.move(g, evStop) })
	if _, err := w.s.relieve(t.Context(), g, p, false); err == nil {
		t.Error("it serves")
	}
	p.abort()
	g.kill(t.Context())
	w.wantServing(1)
	w.wantOpen(w.address("a"))
}

// A reload and the mending of a crash may be under way at once. The one that is
// adopted first closed sockets that the other was about to serve from.
func TestAPlanKeepsItsSocketsWhateverIsAdoptedMeanwhile(t *testing.T) {
	addr := freeAddress(t)
	w := start(t, twoListeners(addr))
	before := inodes(t, w)
	p := w.mustPlan()
	w.mustReload(base) // removes b
	o, err := w.s.replace(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.result.Added, []string{addr}) {
		t.Errorf("added %v", o.result.Added)
	}
	w.wantOpen(addr)
	if after := inodes(t, w); !slices.Equal(before, after) {
		t.Errorf("sockets %v became %v", before, after)
	}
	w.mustReload(base)
	w.wantClosed(addr)
}

func TestTwoPlansShareASocketThatBothAdd(t *testing.T) {
	addr := freeAddress(t)
	w := start(t, base)
	w.write(twoListeners(addr))
	first, second := w.mustPlan(), w.mustPlan()
	first.abort()
	w.wantOpen(addr)
	second.abort()
	w.wantClosed(addr)
	w.s.do(func() {
		if len(w.s.open) != 1 {
			t.Errorf("%d sockets are open", len(w.s.open))
		}
	})
}

// What the stop has closed is not closed again: the number may be another file's.
func TestAPlanThatIsGivenUpAfterTheStopClosesNothing(t *testing.T) {
	w := start(t, base)
	p := w.mustPlan()
	w.s.do(w.s.closeSockets)
	var other *socket.Socket
	for _, other = range p.sockets {
	}
	fd, err := syscall.Open(os.DevNull, syscall.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if fd != other.FD() {
		if err := syscall.Dup3(fd, other.FD(), syscall.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		syscall.Close(fd)
	}
	p.abort()
	var st syscall.Stat_t
	if err := syscall.Fstat(other.FD(), &st); err != nil {
		t.Errorf("a descriptor of somebody else was closed: %v", err)
	}
	syscall.Close(other.FD())
}

// A restore that woke up when a reload had served already took its fallback away.
func TestARestoreThatComesTooLateTakesNoFallbackAway(t *testing.T) {
	w := start(t, base)
	w.mustReload("")
	g := w.generation(1)
	var r *release
	w.s.do(func() { r = w.s.pinned })
	if err := w.s.restoreOnce(t.Context(), g, r); !errors.Is(err, errServes) {
		t.Errorf("got %v", err)
	}
	w.s.do(func() {
		if w.s.passed != g || w.s.crashes != 0 {
			t.Errorf("passed: %v, crashes: %d", w.s.passed, w.s.crashes)
		}
	})
	w.wantStates("2 serving, 1 draining")
}

func TestWhatIsCutOffNeverPasses(t *testing.T) {
	w := start(t, base)
	w.mustReload("")
	w.s.do(func() {
		p, g := w.s.probation, w.s.serving
		w.s.onCutOff(g, errors.New("test"))
		if w.s.probation != nil || p.result != "crashed" {
			t.Errorf("probation: %+v", w.s.probation)
		}
	})
	w.wantServing(1)
	w.s.do(func() {
		w.s.onCutOff(w.s.serving, errors.New("test"))
		if w.s.passed != nil {
			t.Error("it would be reinstated")
		}
	})
	w.wantServing(3)
}

// Status questions to a process that is stopped filled its queue, so that a drain
// or a stop did not reach it any more.
func TestQuestionsToAHungGenerationDoNotFillItsQueue(t *testing.T) {
	w := start(t, base)
	g := w.generation(1)
	freeze(t, g.proc.PID())
	for range 2000 {
		if _, err := g.ask(t.Context(), control.Message{Type: control.TypeStatus}, 50*time.Millisecond); !errors.Is(err, errSilent) {
			t.Fatalf("got %v", err)
		}
	}
	if err := g.ch.Send(&control.Message{Type: control.TypeDrain, ID: 1 << 40}, time.Second); err != nil {
		t.Errorf("a drain does not reach it: %v", err)
	}
	syscall.Kill(g.proc.PID(), syscall.SIGCONT)
	w.wantServing(2) // the fake ends when it is drained
}

// The channel of a process that has ended was closed before its last words were read.
func TestLastWordsAreHeard(t *testing.T) {
	w := start(t, base)
	w.write(base + "#! says why and dies\n")
	for range 20 {
		if _, err := w.reload(""); err == nil || !strings.Contains(err.Error(), "no such host") {
			t.Fatalf("got %v", err)
		}
	}
}

func TestAReloadThatWaitsIsRefusedWhenTheStopBegins(t *testing.T) {
	w := start(t, strings.Replace(base, "[stop]\n", "[stop]\ndelay = \"1h\"\n", 1))
	w.write(base + "#! never ready\n")
	refused := make(chan error, 2)
	reload := func() {
		_, err := w.s.Reload(context.Background(), false)
		refused <- err
	}
	go reload()
	w.wantStates("2 starting, 1 serving")
	go reload()
	for waits := 0; waits == 0; {
		w.s.do(func() { waits = len(w.s.waiting) })
	}
	w.s.Stop()
	for range 2 {
		select {
		case err := <-refused:
			if !errors.Is(err, ErrStopping) {
				t.Errorf("got %v", err)
			}
		case <-time.After(patience):
			t.Fatal("no answer")
		}
	}
}

func TestTheStopDelayEndsWhenNothingServesAnyMore(t *testing.T) {
	w := start(t, strings.Replace(base, "[stop]\n", "[stop]\ndelay = \"1h\"\n", 1))
	w.s.Stop()
	syscall.Kill(w.generation(1).proc.PID(), syscall.SIGKILL)
	select {
	case err := <-w.done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("still runs")
	}
}

// immortal is a process in the kernel's uninterruptible sleep.
type immortal struct{}

func (immortal) PID() int               { return 1 << 30 }
func (immortal) Signal(os.Signal) error { return nil }
func (immortal) Wait() string           { select {} }

func TestKillWaitsNoLongerThanItsCaller(t *testing.T) {
	w := start(t, base)
	w.s.do(func() { w.s.living[99] = newGeneration(99, w.s.pinned, immortal{}, nil, w.s.log) })
	defer w.s.do(func() { delete(w.s.living, 99) })
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := w.s.Kill(ctx, 99); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// A fallback that hangs hears of its reinstatement when it wakes up, when another
// serves. It served then beside that one.
func TestAFallbackThatWakesUpTooLateDrains(t *testing.T) {
	w := start(t, base)
	w.mustReload("")
	g := w.generation(1)
	freeze(t, g.proc.PID())
	syscall.Kill(w.generation(2).proc.PID(), syscall.SIGKILL)
	w.wantStates("3 serving, 1 draining")
	syscall.Kill(g.proc.PID(), syscall.SIGCONT)
	// The fake has nothing that it would drain: it ends, since nobody wants it back.
	w.wantServing(3)
}

func TestAReplacementIsTheFallbackOfTheNextReload(t *testing.T) {
	w := start(t, base)
	syscall.Kill(w.generation(1).proc.PID(), syscall.SIGKILL)
	pid := w.wantServing(2).Generations[0].PID
	w.mustReload(base + "#! dies when serving\n")
	if st := w.wantServing(2); st.Generations[0].PID != pid {
		t.Errorf("pid %d, want the same process %d", st.Generations[0].PID, pid)
	}
}

// A serving generation that somebody sent SIGTERM drains, which can take as long as
// stop.timeout. New connections waited for all of it.
func TestAGenerationThatLeavesIsReplacedAtOnce(t *testing.T) {
	w := prepare(t, base+"#! leaves\n")
	w.run()
	w.wantStates("2 serving, 1 stopping")
}
