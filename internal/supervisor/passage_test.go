package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// fakeGiver is the part of a fake generation that gives idle connections away: a word
// that says whose it is, with a descriptor, and nothing is done with either but to note
// who has it.
type fakeGiver struct {
	b    *control.Bundle
	note func(file, format string, args ...any)

	gives   *control.Passage
	takes   []*control.Passage
	refused bool
}

// take does what has to do with passages, and says whether that is all.
func (k *fakeGiver) take(conn *control.Conn, m *control.Message, fds []int) bool {
	a := &control.Message{Type: control.TypeAnswer, Re: m.ID}
	switch m.Type {
	case control.TypeTake:
		p, _ := control.NewPassage(fds[0])
		k.takes = append(k.takes, p)
		go k.receive(p)
	case control.TypeGive:
		if told(*k.b, "does not hear at once") && !k.refused {
			k.refused, a.Error = true, "not now"
			control.CloseAll(fds)
			break
		}
		p, _ := control.NewPassage(fds[0])
		if k.gives != nil {
			k.gives.Close()
		}
		k.gives = p
		go k.give(p)
	case control.TypeDrain:
		k.note("passages", "%d drains, and expects one: %v", k.b.Generation, m.Passage > 0)
		for _, p := range k.takes {
			p.End()
		}
		return false
	default:
		return false
	}
	conn.Send(a, time.Second)
	return true
}

// give gives a connection, and notes the end of whoever takes.
func (k *fakeGiver) give(p *control.Passage) {
	fd, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	p.TrySend([]control.Passed{{Key: fmt.Sprint(k.b.Generation), FD: fd}})
	unix.Close(fd)
	if _, err := p.ReceiveKeys(); !errors.Is(err, net.ErrClosed) {
		k.note("passages", "%d gives no more", k.b.Generation)
	}
}

func (k *fakeGiver) receive(p *control.Passage) {
	for {
		all, err := p.Receive()
		if err != nil {
			p.Close()
			return
		}
		for _, c := range all {
			k.note("passages", "%d has one of %s", k.b.Generation, c.Key)
		}
	}
}

// wantPassages waits until fake generations have noted this, in any order.
func (w *world) wantPassages(want ...string) {
	w.t.Helper()
	slices.Sort(want)
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("noted: %q", w.noted("passages"))
		}
	})
	w.wait(fmt.Sprintf("%q", want), func(*Status) bool { return slices.Equal(w.noted("passages"), want) })
}

// startGiving is start with generations that give their connections away.
func startGiving(t *testing.T, file string) *world {
	t.Helper()
	w := prepare(t, file)
	w.mood("gives connections")
	w.run()
	w.wantServing(1)
	return w
}

// pass has what serves pass its probation.
func (w *world) pass() {
	w.s.do(func() {
		w.s.pass(w.s.serving)
		w.s.endProbation("passed")
	})
}

func TestIdleConnectionsGoToWhatServesAfterItsProbation(t *testing.T) {
	const file = base + "#! holds tunnels\n"
	w := startGiving(t, file)
	w.mustReload(file)
	w.wantPassages("1 drains, and expects one: true")
	w.wantStates("2 serving, 1 draining")
	w.pass()
	w.wantPassages("1 drains, and expects one: true", "2 has one of 1")
	// The next one has them from all, and only when it has passed.
	w.mustReload(file)
	w.wantStates("3 serving, 2 draining, 1 draining")
	before := []string{
		"1 drains, and expects one: true", "2 has one of 1",
		"2 drains, and expects one: true", "1 drains, and expects one: true", "1 gives no more",
	}
	w.wantPassages(before...)
	w.pass()
	w.wantPassages(append(before, "3 has one of 1", "3 has one of 2")...)
}

// What is superseded never takes any.
func TestIdleConnectionsWaitForTheLastOfSeveralReloads(t *testing.T) {
	const file = base + "#! holds tunnels\n"
	w := startGiving(t, file)
	w.mustReload(file)
	w.wantPassages("1 drains, and expects one: true")
	w.mustReload(file)
	before := []string{"1 drains, and expects one: true", "1 drains, and expects one: true", "2 drains, and expects one: true"}
	w.wantPassages(before...)
	w.pass()
	w.wantPassages(append(before, "3 has one of 1", "3 has one of 2")...)
}

// Whoever is put back takes them.
func TestIdleConnectionsGoToWhatIsReinstated(t *testing.T) {
	const file = base + "#! holds tunnels\n"
	w := startGiving(t, file)
	w.mustReload(file)
	w.pass()
	noted := []string{"1 drains, and expects one: true", "2 has one of 1"}
	w.wantPassages(noted...)
	w.mustReload(file)
	noted = append(noted, "1 drains, and expects one: true", "2 drains, and expects one: true", "1 gives no more")
	w.wantPassages(noted...)
	w.kill(3, syscall.SIGKILL)
	w.wantStates("2 serving, 1 draining")
	w.wantPassages(append(noted, "2 has one of 1")...)
}

// Who has not heard yet that it drains is asked again, and who takes is dead is given
// another one.
func TestAPassageIsLaidAgain(t *testing.T) {
	const file = base + "#! holds tunnels\n#! does not hear at once\n"
	w := startGiving(t, file)
	w.mustReload(file)
	w.pass()
	noted := []string{"1 drains, and expects one: true", "2 has one of 1"}
	w.wantPassages(noted...)
	w.kill(2, syscall.SIGKILL)
	w.wantStates("3 serving, 1 draining")
	w.wantPassages(append(noted, "1 gives no more", "3 has one of 1")...)
}

// Builds that have nothing in common here are left alone, whichever of the two is older.
func TestIdleConnectionsStayWhereBuildsDiffer(t *testing.T) {
	const file = base + "#! holds tunnels\n"
	for name, moods := range map[string][2]string{
		"the old one knows nothing of it": {"", "gives connections"},
		"the new one knows nothing of it": {"gives connections", ""},
		"the new one does it otherwise":   {"gives connections", "gives connections in its own way"},
	} {
		t.Run(name, func(t *testing.T) {
			w := prepare(t, file)
			w.mood(moods[0])
			w.run()
			w.wantServing(1)
			w.mood(moods[1])
			w.mustReload(file)
			w.wantStates("2 serving, 1 draining")
			w.pass()
			w.s.do(func() {
				if g := w.s.living[1]; g.givesTo != 0 {
					t.Errorf("it gives them to generation %d", g.givesTo)
				}
			})
			w.wantPassages("1 drains, and expects one: false")
		})
	}
}

// An upgrade that comes to nothing takes nothing away.
func TestIdleConnectionsGoOnAfterAnUpgradeThatFails(t *testing.T) {
	const file = base + "#! holds tunnels\n"
	w := startGiving(t, file)
	w.mustReload(file)
	w.pass()
	noted := []string{"1 drains, and expects one: true", "2 has one of 1"}
	w.wantPassages(noted...)
	w.s.opts.Successor = func(context.Context) (Successor, error) { return nil, errors.New("no successor today") }
	if _, err := w.s.Upgrade(t.Context()); err == nil {
		t.Fatal("upgraded")
	}
	w.wantPassages(append(noted, "2 has one of 1")...)
}

// The next supervisor knows from its report that a generation has passages.
func TestPassagesAreKnownToTheNextSupervisor(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	w.s.arrive(guest(t, control.Report{Generation: 9, Phase: control.PhaseDraining, Passage: control.PassageVersion}, nil, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "x"})
	w.wait("it to be adopted", func(st *Status) bool { return len(st.Generations) == 2 })
	w.do(func() {
		if g := w.s.living[9]; g == nil || !g.hasPassage() {
			t.Errorf("it is not known: %+v", g)
		}
		delete(w.s.living, 9)
	})
}

// A supervisor that may still be discarded lays none.
func TestNoPassageBeforeItIsCertainWhoCommands(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	defer s.vault.Close()
	passed := &generation{number: 1, passageVersion: control.PassageVersion}
	s.serving, s.passed = passed, passed
	if s.retarget(); s.taker != 0 {
		t.Errorf("before, %d takes", s.taker)
	}
	close(s.begun)
	if s.retarget(); s.taker != 1 {
		t.Errorf("afterwards it is %d", s.taker)
	}
	for name, change := range map[string]func(on bool){
		"a probation":             func(on bool) { s.passed = map[bool]*generation{false: passed}[on] },
		"an upgrade is under way": func(on bool) { s.upgrading = map[bool]*upgrading{true: {}}[on] },
		"the service ends":        func(on bool) { s.stopping = on },
	} {
		change(true)
		if s.retarget(); s.taker != 0 {
			t.Errorf("%s: %d takes", name, s.taker)
		}
		change(false)
		if s.retarget(); s.taker != 1 {
			t.Errorf("after %s %d takes", name, s.taker)
		}
	}
}
