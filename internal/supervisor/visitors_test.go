package supervisor

import (
	"math"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
	"holdfast/internal/pidfd"
	"holdfast/internal/runtimedir"
)

type spyStore struct {
	mu      sync.Mutex
	removed []string
}

func (s *spyStore) Store(string, int) {}
func (s *spyStore) Remove(k string)   { s.mu.Lock(); s.removed = append(s.removed, k); s.mu.Unlock() }
func (s *spyStore) listeners() (n []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.removed {
		if strings.HasPrefix(k, storedListener) {
			n = append(n, k)
		}
	}
	return n
}

// guest is the generation's side of a channel: it hands back what is given, and answers obey unless mute.
func guest(t *testing.T, r control.Report, kept map[string]int, mute bool) channel {
	t.Helper()
	a, b, err := control.Ends()
	if err != nil {
		t.Fatal(err)
	}
	ours, err := control.NewSupervisorConn(a)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := control.NewConn(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	go func() {
		for {
			m, fds, err := theirs.Receive()
			if err != nil {
				return
			}
			control.CloseAll(fds)
			switch m.Type {
			case control.TypeAdopt:
				send := func(m *control.Message, fds ...int) error { return theirs.Send(m, time.Second, fds...) }
				control.SendFiles(control.TypeListeners, nil, send)
				control.SendFiles(control.TypeKept, kept, send)
				theirs.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID, Report: &r}, time.Second)
			case control.TypeObey:
				if !mute {
					theirs.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID, Report: &r}, time.Second)
				}
			default:
				if m.ID != 0 {
					theirs.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second)
				}
			}
		}
	}()
	return ours
}

func (w *world) strangers() {
	id, find := w.s.kernel.identify, w.s.kernel.find
	w.s.kernel.identify = func(pid int) (pidfd.Identity, error) {
		if pid == 1<<30 {
			return pidfd.Identity{PID: pid, Start: 1}, nil
		}
		return id(pid)
	}
	w.s.kernel.find = func(i pidfd.Identity) (process, error) {
		if i.PID == 1<<30 {
			return immortal{}, nil
		}
		return find(i)
	}
	w.s.kernel.setOOMScore = nil
}

func TestAnEpochBeyondAllBoundsIsNotBelieved(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	for _, e := range []uint64{math.MaxUint64, math.MaxUint64 - 1} {
		v, err := w.s.meet(guest(t, control.Report{Generation: 9, Epoch: e, Phase: control.PhaseDraining}, nil, false), 9, 1<<30, "x")
		if err == nil {
			t.Errorf("a generation that has obeyed supervisor %d is met", e)
			v.close()
		}
	}
}

func TestAVersionThatCannotBeShownIsRefusedAtTheRendezvous(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	w.s.arrive(guest(t, control.Report{Generation: 9, Epoch: 0, Phase: control.PhaseDraining}, nil, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "1\x1b[2J"})
	for _, g := range w.status().Generations {
		if !presentable(g.Version) {
			t.Errorf("%d %q", g.Number, g.Version)
		}
	}
	w.do(func() { delete(w.s.living, 9) })
}

func TestAnUpgradeThatFailsDoesNotEndWhoWasAbsentAnyway(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	u := &upgrading{over: make(chan struct{})}
	w.do(func() {
		w.s.enlistAbsent(runtimedir.Generation{Number: 9, Identity: pidfd.Identity{PID: 1 << 30, Start: 1}, State: "draining"})
		w.s.upgrading = u
	})
	var g *generation
	w.do(func() { g = w.s.living[9] })
	w.s.reclaim(u)
	time.Sleep(cutOffGrace + 200*time.Millisecond) // for as long as one that has just lost its channel may take
	w.do(func() {
		if g.cutOff != nil {
			t.Errorf("state %s, cut off: %v", g.state, g.cutOff)
		}
		delete(w.s.living, 9)
	})
}

func TestVisitorsThatDoNotAnswerHoldNothingUp(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	st := w.wantServing(1)
	for range 8 {
		v, err := w.s.meet(guest(t, control.Report{Generation: 9, Phase: control.PhaseDraining}, nil, true), 9, 1<<30, "x")
		if err != nil {
			t.Fatal(err)
		}
		go w.s.adoptLate(v)
	}
	syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
	w.wantStates("2 serving")
}

func TestASocketThatWasLeftOutlivesAPlanThatComesToNothing(t *testing.T) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // as systemd's store: another holder who does not accept
	addr := l.Addr().String()
	f, _ := l.(*net.TCPListener).File()
	defer f.Close()
	fd, _ := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	w := prepare(t, strings.ReplaceAll(base, "127.0.0.1:0", addr))
	w.s.opts.Stored = map[string]int{storedListener + addr: fd}
	w.s.stats, _ = newStats(nil)
	w.s.estate, _ = newEstate()
	go w.s.loop()
	defer w.s.endLoop()
	w.s.resume(t.Context())
	p := w.mustPlan()
	p.abort() // as after a launch that failed
	_, err = w.s.plan(t.Context())
	if err != nil {
		t.Errorf("the second attempt: %v", err)
	}
}

func TestAStartThatFailsLeavesTheStoreAsItIs(t *testing.T) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().String()
	f, _ := l.(*net.TCPListener).File()
	defer f.Close()
	fd, _ := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	w := prepare(t, "rubbish\n"+strings.ReplaceAll(base, "127.0.0.1:0", addr))
	store := new(spyStore)
	w.s.opts.Store = store
	w.s.opts.Stored = map[string]int{storedListener + addr: fd}
	err = w.s.Run(t.Context())
	if err == nil {
		t.Error("it started")
	}
	if n := store.listeners(); len(n) > 0 {
		t.Errorf("withdrawn: %q", n)
	}
}

func TestAStopDoesNotKillWhoseChannelIsBroken(t *testing.T) {
	w := start(t, base)
	a, b, _ := control.Ends()
	ch, _ := control.NewSupervisorConn(a)
	unix.Close(b)
	var g *generation
	w.do(func() { g = w.s.living[1]; g.attach(ch) })
	w.s.Stop()
	<-w.s.ended
	if g.killed.Load() {
		t.Errorf("SIGKILL: %s", g.how)
	}
}

func TestCountsThatAreInTheTotalsAlreadyAreLetGo(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	one, _ := metrics.NewFile()
	w.do(func() { w.s.totals.Add(9, one); w.s.totals.End(9) })
	w.s.totals.Settle()
	two, _ := metrics.NewFile()
	dup, _ := unix.Dup(two.FD())
	v, err := w.s.meet(guest(t, control.Report{Generation: 9, Phase: control.PhaseDraining}, map[string]int{control.KeptCounts: dup}, false), 9, 1<<30, "x")
	if err != nil {
		t.Fatal(err)
	}
	w.s.adoptLate(v)
	w.do(func() {
		g := w.s.living[9]
		delete(w.s.living, 9)
		if g.counts == nil {
			return
		}
		if _, err := g.counts.Families(); err != nil {
			t.Errorf("%v", err)
		}
		delete(w.s.living, 9)
	})
}

func TestWhoWaitsToBeLetInIsNotCutOff(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	r := control.Report{Generation: 9, Phase: control.PhaseDraining}
	v, err := w.s.meet(guest(t, r, nil, false), 9, 1<<30, "x")
	if err != nil {
		t.Fatal(err)
	}
	w.s.adoptLate(v)
	g := w.generation(9)
	w.s.switchTurn <- struct{}{} // a reload whose new generation does not answer serve has it for 5 s
	ch, _ := g.channel()
	ch.Close()                                                                                        // its channel breaks
	go w.s.arrive(guest(t, r, nil, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "x"}) // it comes at once
	time.Sleep(answerTimeout)
	<-w.s.switchTurn
	time.Sleep(200 * time.Millisecond)
	w.do(func() {
		if g.cutOff != nil {
			t.Errorf("state %s, cut off: %v", g.state, g.cutOff)
		}
		delete(w.s.living, 9)
	})
}

// mortal is a process that ends when it is told so.
type mortal struct {
	immortal
	end chan struct{}
}

func (p mortal) Wait() string {
	<-p.end
	return endedUnseen
}

// Who dies while it waits to be let in once more is not adopted: what it has left is
// resumed already, and would be given to another one as well.
func TestWhoDiesOnAVisitIsNotAdopted(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	p := mortal{end: make(chan struct{})}
	find := w.s.kernel.find
	w.s.kernel.find = func(id pidfd.Identity) (process, error) {
		if id.PID == 1<<30 {
			return p, nil
		}
		return find(id)
	}
	w.run()
	w.wantServing(1)
	r := control.Report{Generation: 9, Phase: control.PhaseDraining}
	v, err := w.s.meet(guest(t, r, nil, false), 9, 1<<30, "x")
	if err != nil {
		t.Fatal(err)
	}
	w.s.adoptLate(v)
	g := w.generation(9)
	w.s.switchTurn <- struct{}{} // nobody is let in meanwhile
	ch, _ := g.channel()
	ch.Close()
	arrived := make(chan struct{})
	go func() {
		defer close(arrived)
		w.s.arrive(guest(t, r, nil, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "x"})
	}()
	w.wait("a visit", func(*Status) (is bool) {
		w.do(func() { is = w.s.visiting[9] })
		return is
	})
	adopted := w.s.stats.adopted.Value()
	close(p.end)
	w.wantStates("1 serving")
	<-w.s.switchTurn
	<-arrived
	if now := w.s.stats.adopted.Value(); now != adopted {
		t.Error("a generation that has died is adopted")
	}
}

func TestAStopAfterTheUpgradeTouchesNothing(t *testing.T) {
	for range 20 {
		func() {
			w := &world{}
			t.Run("", func(t *testing.T) {
				*w = *prepare(t, base)
				store := new(spyStore)
				w.s.opts.Store = store
				w.run()
				w.wantServing(1)
				u := &upgrading{over: make(chan struct{}), cancel: func(error) {}}
				w.do(func() { w.s.upgrading = u; w.s.succeeded = true })
				w.s.Stop()
				time.Sleep(5 * time.Millisecond)
				w.s.resign()
				<-w.s.ended
				if n := store.listeners(); len(n) > 0 {
					t.Errorf("withdrawn by one that was succeeded: %q", n)
				}
			})
		}()
	}
}

func TestADrainThatComesTooLateIsDropped(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	w.mustReload(base + "#! holds tunnels\n#! x\n")
	g := w.generation(1)
	st := w.wantStates("2 serving, 1 draining")
	syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
	w.wantServing(1)
	w.s.drain(g, nil) // as at the end of a reload
	w.do(func() {
		if w.s.serving == nil || w.s.serving.state != serving {
			t.Errorf("serving: %v, in state %s", w.s.serving != nil, w.s.serving.state)
		}
	})
}

// It was not there when something else was put into service in its place.
func TestANewerGenerationThatServesTakesOver(t *testing.T) {
	w := prepare(t, base+"#! holds tunnels\n")
	w.strangers()
	w.run()
	w.wantServing(1)
	w.s.arrive(guest(t, control.Report{Generation: 9, Phase: control.PhaseServing}, nil, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "x"})
	w.wantStates("9 serving, 1 draining")
	w.do(func() {
		delete(w.s.living, 9)
		w.s.serving = nil
	})
}

// All who had what an earlier supervisor had counted did not run while they were waited
// for.
func TestWhatAnEarlierSupervisorCountedIsFoundLate(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	w.do(func() { w.s.first = 7 })
	earlier, err := newEstate()
	if err != nil {
		t.Fatal(err)
	}
	defer earlier.close()
	stats, err := newStats(nil)
	if err != nil {
		t.Fatal(err)
	}
	stats.started.Add(40)
	if err := earlier.facts.Write(facts{Epoch: 6, Last: 30}); err != nil {
		t.Fatal(err)
	}
	if err := earlier.totals.Write(merge.New().Export()); err != nil {
		t.Fatal(err)
	}
	kept := map[string]int{control.KeptLedger: earlier.facts.FD(), control.KeptTotals: earlier.totals.FD(), control.KeptStats: stats.file.FD()}
	for range 2 { // what it had is added once
		w.s.arrive(guest(t, control.Report{Generation: 9, Phase: control.PhaseDraining}, kept, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "x"})
	}
	if n := w.counters()["holdfast_generations_started_total"]; n != 41 {
		t.Errorf("%v generations were started, want 41", n)
	}
	w.do(func() {
		if w.s.numbers < 30 {
			t.Errorf("the last number is %d", w.s.numbers)
		}
		delete(w.s.living, 9)
	})
}
