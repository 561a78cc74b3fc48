package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/runtimedir"
)

// belongings are what a fake generation has for whoever supervises it next.
type belongings struct {
	b               *control.Bundle
	listeners, kept map[string]int
	phase           control.Phase // "": it has never served
	epoch           uint64
	began           time.Time
}

func newBelongings(b *control.Bundle) *belongings {
	return &belongings{b: b, listeners: make(map[string]int), kept: make(map[string]int), began: time.Now()}
}

func (o *belongings) drain() {
	o.phase = control.PhaseDraining
	control.CloseNamed(o.listeners)
	clear(o.listeners)
}

// another looks for a supervisor, for as long as there is a runtime directory.
func (o *belongings) another() *control.Conn {
	hello := control.Hello{Core: control.Core, CoreMin: control.CoreMin, Version: "fake", PID: os.Getpid(), Generation: o.b.Generation, Epoch: o.epoch}
	for o.phase != "" && o.b.Rendezvous != "" {
		conn, err := control.Reunite(context.Background(), o.b.Rendezvous, o.b.Key, hello)
		if err == nil {
			return conn
		}
		if _, err := os.Stat(filepath.Dir(o.b.Rendezvous)); err != nil {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// take does what has to do with adoption, and says whether that is all.
func (o *belongings) take(conn *control.Conn, m *control.Message, fds *[]int) bool {
	answer := &control.Message{Type: control.TypeAnswer, Re: m.ID}
	send := func(m *control.Message, fds ...int) error { return conn.Send(m, time.Second, fds...) }
	switch m.Type {
	case control.TypeKeep, control.TypeListeners:
		to := o.kept
		if m.Type == control.TypeListeners {
			to = o.listeners
		}
		for i, key := range m.Keys {
			to[key] = (*fds)[i]
		}
		*fds = nil
		return m.Type == control.TypeKeep
	case control.TypeAdopt:
		if told(*o.b, "hands nothing back") {
			return true // nor does it answer
		}
		if o.epoch == 0 {
			o.epoch = o.b.Epoch
		}
		if told(*o.b, "has obeyed others") {
			o.epoch = max(o.epoch, 41)
		}
		if told(*o.b, "hands rubbish back") {
			o.kept = map[string]int{control.KeptBundle: 2, control.KeptBinary: 2, control.KeptCounts: 2, control.KeptLedger: 2, control.KeptTotals: 2, "what is this": 2}
		}
		control.SendFiles(control.TypeListeners, o.listeners, send)
		control.SendFiles(control.TypeKept, o.kept, send)
		answer.Report = &control.Report{Generation: o.b.Generation, Epoch: o.epoch, Phase: o.phase, Started: o.began, Runtime: fakeRuntime, Clusters: fakeClusters, Tickets: fakeTickets, Clear: control.ClearVersion}
	case control.TypeObey:
		o.epoch = m.Epoch
	case control.TypePrepare:
		control.CloseAll(*fds)
		*fds = nil
		if told(*o.b, "is not prepared") && o.b.Generation == 1 {
			answer.Error = "not now"
		}
	default:
		return false
	}
	send(answer)
	return true
}

// startLasting is start for a service that can be succeeded.
func startLasting(t *testing.T, file string) *world {
	t.Helper()
	w := prepare(t, file)
	w.lasting()
	w.run()
	w.wantServing(1)
	return w
}

// lasting gives the supervisor a runtime directory.
func (w *world) lasting() {
	w.t.Helper()
	run, err := os.MkdirTemp("", "hf")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { os.RemoveAll(run) })
	w.runtime = run
	w.newSupervisor()
}

// newSupervisor puts a supervisor with the same directories in the place of the other.
func (w *world) newSupervisor() {
	w.t.Helper()
	dir, err := runtimedir.Prepare(w.runtime)
	if err != nil {
		w.t.Fatal(err)
	}
	o := w.options()
	o.Directory = dir
	if o.Secret, o.Fresh, err = dir.Secret(); err != nil {
		w.t.Fatal(err)
	}
	r, err := control.ListenRendezvous(dir.Rendezvous())
	if err != nil {
		w.t.Fatal(err)
	}
	w.rendezvous, o.Rendezvous = r, r
	w.t.Cleanup(func() { r.Close(true) })
	w.s = New(o)
}

// vanish ends the supervisor as a kill would: it does nothing any more, and its
// channels are closed.
func (w *world) vanish() {
	w.t.Helper()
	w.s.resign()
	<-w.s.ended
	w.rendezvous.Close(true)
	<-w.done
}

// succeed puts another supervisor in the place of one that vanishes.
func (w *world) succeed() {
	w.t.Helper()
	w.vanish()
	w.newSupervisor()
	w.run()
	<-w.s.begun
}

func TestASuccessorFindsEverythingAsItWas(t *testing.T) {
	w := startLasting(t, base+"#! holds tunnels\n")
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	before := w.wantStates("2 serving, 1 draining")
	for n := range 3 {
		w.succeed()
		after := w.wantStates("2 serving, 1 draining")
		for n, g := range after.Generations {
			if was := before.Generations[n]; g.PID != was.PID || g.ConfigHash != was.ConfigHash || g.Started.Sub(was.Started).Abs() > patience {
				t.Errorf("generation %d was %+v and is %+v", g.Number, was, g)
			}
		}
		if fmt.Sprint(after.Listeners) != fmt.Sprint(before.Listeners) {
			t.Errorf("listeners were %v and are %v", before.Listeners, after.Listeners)
		}
		if want := uint64(n + 2); after.Epoch != want {
			t.Errorf("epoch %d, want %d", after.Epoch, want)
		}
		w.wantOpen(w.address("a"))
	}
	w.write(base + "# to be put into service by a command, not by a successor\n")
	w.succeed()
	w.wantStates("2 serving, 1 draining")
	w.mustReload(base + "# 3\n")
	w.wait("generation 3", func(st *Status) bool { return strings.HasPrefix(states(st), "3 serving") })
}

// The supervisor was killed between "serve" and "drain".
func TestOfTwoThatServeTheNewerOneStays(t *testing.T) {
	w := startLasting(t, base+"#! holds tunnels\n#! does not drain\n")
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	drains := filepath.Join(w.dir, "drains")
	if err := os.Remove(drains); err != nil { // it was told, and did not
		t.Fatal(err)
	}
	w.succeed()
	w.wantStates("2 serving, 1 draining")
	if told, err := os.ReadFile(drains); err != nil || string(told) != "1\n" {
		t.Errorf("told to drain: %q, %v; want generation 1", told, err)
	}
}

func TestASuccessorMendsACrashFromWhatCameBack(t *testing.T) {
	w := startLasting(t, base)
	w.succeed()
	w.write("broken")
	if err := os.Remove(filepath.Join(w.dir, "proxy")); err != nil {
		t.Fatal(err)
	}
	st := w.wantServing(1)
	address := w.address("a")
	syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
	w.wantServing(2)
	w.wantOpen(address)
}

func TestWhereNothingServesAndTheFileIsBrokenWhatDrainsServesAgain(t *testing.T) {
	w := startLasting(t, base+"#! holds tunnels\n")
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	st := w.wantStates("2 serving, 1 draining")
	w.vanish()
	w.write("broken")
	syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
	w.newSupervisor()
	w.run()
	w.wantServing(1)
	if err := os.WriteFile(filepath.Join(w.dir, "a.toml"), []byte(base), 0o600); err != nil {
		t.Fatal(err)
	}
	w.mustReload("")
}

// A generation has obeyed a supervisor of which nothing else is left.
func TestTheEpochIsAboveAllThatWereObeyed(t *testing.T) {
	w := startLasting(t, base+"#! has obeyed others\n")
	w.succeed()
	if st := w.wantServing(1); st.Epoch != 42 {
		t.Errorf("epoch %d, want 42", st.Epoch)
	}
}

func TestAGenerationThatHandsRubbishBackIsCommandedAllTheSame(t *testing.T) {
	w := startLasting(t, base+"#! hands rubbish back\n#! holds tunnels\n")
	w.succeed()
	st := w.wantServing(1)
	w.mustReload(base + "# sound\n")
	w.wantStates("2 serving, 1 draining")
	if err := w.s.Kill(t.Context(), 1); err != nil {
		t.Error(err)
	}
	w.wantServing(2)
	_ = st
}

// It lives and does not say what it has: known, killable, and not in the way for ever.
func TestAGenerationThatDoesNotHandBackIsKnown(t *testing.T) {
	w := startLasting(t, base+"#! holds tunnels\n#! hands nothing back\n")
	w.mustReload(base + "# 2\n")
	w.wantStates("2 serving, 1 draining")
	w.succeed()
	st := w.wantStates("2 serving, 1 draining")
	if !st.Generations[1].NotAnswering || st.Generations[0].NotAnswering {
		t.Errorf("not answering: generation 2 %t, generation 1 %t", st.Generations[0].NotAnswering, st.Generations[1].NotAnswering)
	}
	if err := w.s.Kill(t.Context(), 1); err != nil {
		t.Error(err)
	}
	w.wantServing(2)
}

// A channel that breaks while its supervisor lives is mended at the rendezvous; nobody
// is cut off for it.
func TestAGenerationThatComesBackIsNotCutOff(t *testing.T) {
	w := startLasting(t, base)
	var g *generation
	w.s.do(func() { g = w.s.serving })
	ch, heard := g.channel()
	ch.Close()
	<-heard
	w.wait("another channel", func(*Status) bool { now, _ := g.channel(); return now != ch })
	st := w.wait("an answer", func(st *Status) bool { return !st.Generations[0].NotAnswering })
	if states(st) != "1 serving" || st.Crashes != 0 {
		t.Errorf("%s, %d crashes", states(st), st.Crashes)
	}
	w.mustReload(base + "# 2\n")
}

// Somebody who proves to be generation 1 and is another process.
func TestAnotherProcessIsNotTakenForAGeneration(t *testing.T) {
	w := startLasting(t, base)
	path := w.s.opts.Rendezvous.Path()
	conn, err := control.Reunite(t.Context(), path, control.GenerationKey(w.s.opts.Secret, 1), control.Hello{
		Core: control.Core, CoreMin: control.CoreMin, Version: "fake", PID: os.Getpid(), Generation: 1, Epoch: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for {
		m, fds, err := conn.Receive()
		control.CloseAll(fds)
		if err != nil {
			break // it was turned away
		}
		switch m.Type {
		case control.TypeAdopt:
			conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID, Report: &control.Report{Generation: 1, Epoch: 1, Phase: control.PhaseServing}}, time.Second)
		case control.TypeObey:
			t.Error("it is commanded")
			return
		}
	}
	w.wantServing(1)
}

func TestARefusedUpgradeChangesNothing(t *testing.T) {
	w := startLasting(t, base)
	before := w.wantServing(1)
	for _, at := range []string{"start", "offer", "commit"} {
		s := &failing{at: at}
		w.s.opts.Successor = func(context.Context) (Successor, error) {
			if at == "start" {
				return nil, errors.New("fails at start")
			}
			return s, nil
		}
		_, err := w.s.Upgrade(t.Context())
		if r, ok := errors.AsType[*Refusal](err); !ok || r.Step != "upgrade" || !strings.Contains(err.Error(), "fails at "+at) {
			t.Errorf("%s: %v", at, err)
		}
		if at != "start" && !s.discarded {
			t.Errorf("%s: the candidate lives", at)
		}
		after := w.wantServing(1)
		if after.Generations[0].PID != before.Generations[0].PID || after.Epoch <= before.Epoch {
			t.Errorf("%s: epoch %d and %d, %+v", at, before.Epoch, after.Epoch, after.Generations)
		}
		before = after
	}
	w.mustReload(base + "# 2\n")
}

// failing is a successor that is not to be.
type failing struct {
	at        string
	discarded bool
}

func (f *failing) Offer(_ context.Context, e *control.Estate, fds map[string]int) error {
	if _, there := fds["generation 1"]; !there || len(e.Generations) != 1 {
		return fmt.Errorf("offered %v, %v", e, fds)
	}
	if f.at == "offer" {
		return errors.New("fails at offer")
	}
	return nil
}
func (f *failing) Commit(context.Context) error { return errors.New("fails at commit") }
func (f *failing) Farewell(context.Context)     {}
func (f *failing) Discard() error               { f.discarded = true; return nil }
func (f *failing) PID() int                     { return 0 }
func (f *failing) Version() string              { return "" }

// What a supervisor and its generations have counted goes on, whoever adds it up.
func TestASuccessorCountsOn(t *testing.T) {
	w := startLasting(t, base+"#! holds tunnels\n")
	w.mustReload(base + "#! holds tunnels\n# 2\n")
	w.mustReload(base + "# 3\n")
	w.wait("three generations", func(st *Status) bool { return len(st.Generations) == 3 })
	if err := w.s.Kill(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		before := w.counters()
		w.succeed()
		after := w.counters()
		for name, was := range before {
			if after[name] < was {
				t.Errorf("%s was %v and is %v", name, was, after[name])
			}
		}
		if after["holdfast_generations_started_total"] < 3 || after["holdfast_fake_questions_total"] == 0 {
			t.Errorf("it has %v", after)
		}
	}
}

// counters are the values of all, by name; of those with labels, the sum.
func (w *world) counters() map[string]float64 {
	w.t.Helper()
	families, err := w.s.Metrics(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	all := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.Metric {
			if m.Counter != nil {
				all[f.GetName()] += m.Counter.GetValue()
			}
		}
	}
	return all
}
