package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
)

// fakeTunnelCount is how many tunnels a fake generation has that keeps some.
const fakeTunnelCount = 20

// fakeKeeper is the part of a fake generation that has tunnels: descriptors and words,
// which nothing is done with but to deposit them and to note who has them.
type fakeKeeper struct {
	b      *control.Bundle
	note   func(file, format string, args ...any)
	vault  *control.Vault
	stores chan struct{} // closed when those of a dead one have come
}

// take does what has to do with the vault, and says whether that is all.
func (k *fakeKeeper) take(conn *control.Conn, m *control.Message, fds []int) bool {
	answer := func() {
		if m.ID != 0 {
			conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second)
		}
	}
	switch m.Type {
	case control.TypeVault:
		k.vault, _ = control.NewVault(fds[0])
		k.stores = make(chan struct{})
		if k.b.Stores == 0 {
			k.deposit()
		}
		go k.receive()
		answer()
	case control.TypeListeners:
		if k.b.Stores > 0 {
			<-k.stores // it is ready only then
		}
		return false
	case control.TypeResume:
		if told(*k.b, "dies when it is to resume") && k.b.Generation < 5 {
			os.Exit(15)
		}
		answer()
	case control.TypeMove:
		k.note("moves", "%d all %v", k.b.Generation, m.All)
		answer()
	default:
		return false
	}
	return true
}

func (k *fakeKeeper) deposit() {
	store, _ := unix.MemfdCreate("store", unix.MFD_CLOEXEC)
	k.vault.Send(&control.VaultPacket{Type: control.VaultStore, Files: []int{store}}, time.Second)
	for n := range uint64(fakeTunnelCount) {
		fds, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		k.vault.Send(&control.VaultPacket{Type: control.VaultDeposit, Entries: []control.VaultEntry{
			{Number: n + 1, Record: fmt.Appendf(nil, "of %d", k.b.Generation), Files: fds[:]},
		}}, time.Second)
	}
	k.vault.Send(&control.VaultPacket{Type: control.VaultComplete}, time.Second)
}

func (k *fakeKeeper) receive() {
	stores := 0
	for {
		p, err := k.vault.Receive(0)
		if err != nil {
			return
		}
		switch p.Type {
		case control.VaultStore:
			if stores++; stores == k.b.Stores {
				close(k.stores)
			}
			k.note("stores", "%d killed %v", k.b.Generation, p.Flags&control.VaultKilled != 0)
		case control.VaultResume:
			for _, e := range p.Entries {
				k.note("resumed", "%d resumes %d %s with %d", k.b.Generation, e.Number, e.Record, len(e.Files))
			}
			if told(*k.b, "dies while it resumes") && k.b.Generation < 5 {
				os.Exit(16)
			}
		case control.VaultComplete:
			k.note("resumed", "%d has all", k.b.Generation)
		}
	}
}

// noted returns the lines of a file that fake generations write, sorted.
func (w *world) noted(file string) []string {
	w.t.Helper()
	text, err := os.ReadFile(filepath.Join(w.dir, file))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	slices.Sort(lines)
	return lines
}

// startKeeping is start with generations that have tunnels.
func startKeeping(t *testing.T, file string) *world {
	t.Helper()
	w := prepare(t, file)
	w.mood("keeps tunnels")
	w.run()
	w.wantServing(1)
	w.wantDeposits(1)
	return w
}

func (w *world) wantDeposits(generation int) *Status {
	w.t.Helper()
	return w.wait(fmt.Sprintf("the deposits of generation %d", generation), func(st *Status) bool {
		return st.Vault.Resuming == 0 && slices.ContainsFunc(st.Generations, func(g GenerationStatus) bool {
			return g.Number == generation && g.Deposits == fakeTunnelCount
		})
	})
}

// wantResumed waits until a generation has what generation 1 had deposited.
func (w *world) wantResumed(by int) {
	w.t.Helper()
	var want []string
	for n := range fakeTunnelCount {
		want = append(want, fmt.Sprintf("%d resumes %d of 1 with 2", by, n+1))
	}
	want = append(want, fmt.Sprintf("%d has all", by))
	slices.Sort(want)
	w.wantDeposits(by)
	var got []string
	w.wait("all to be resumed", func(*Status) bool {
		got = slices.DeleteFunc(w.noted("resumed"), func(l string) bool { return !strings.HasPrefix(l, fmt.Sprint(by, " ")) })
		return slices.Equal(got, want)
	})
}

// killed kills a generation.
func (w *world) kill(number int, sig syscall.Signal) {
	w.t.Helper()
	if err := w.generation(number).proc.Signal(sig); err != nil {
		w.t.Fatal(err)
	}
}

// Another generation, which does not serve, resumes the tunnels of the one that was
// killed, beside the one that serves in its place.
func TestTunnelsOfAKilledGenerationAreResumed(t *testing.T) {
	for _, test := range []struct {
		sig    syscall.Signal
		killed bool
	}{{syscall.SIGKILL, true}, {syscall.SIGSEGV, false}} {
		t.Run(test.sig.String(), func(t *testing.T) {
			w := startKeeping(t, base)
			w.kill(1, test.sig)
			st := w.wait("a generation beside the serving one", func(st *Status) bool {
				return len(st.Generations) == 2 && (states(st) == "3 draining, 2 serving" || states(st) == "3 serving, 2 draining") &&
					st.Vault.Deposits >= 2*fakeTunnelCount // its own ones come when it serves
			})
			heir := st.Generations[slices.IndexFunc(st.Generations, func(g GenerationStatus) bool { return g.State == "draining" })].Number
			w.wantResumed(heir)
			if got, want := w.noted("stores"), fmt.Sprintf("%d killed %v", heir, test.killed); len(got) != 1 || got[0] != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if st = w.status(); st.Vault.Bereft != 0 || st.Vault.Resumed != 1 || st.Vault.Deposits != 2*fakeTunnelCount {
				t.Errorf("the vault: %+v", st.Vault)
			}
			if n := w.s.stats.tunnelsLost.Value(); n != 0 {
				t.Errorf("%d tunnels count as lost", n)
			}
		})
	}
}

// Whatever happens to those that are to resume tunnels, the next one gets all of them.
func TestTunnelsWaitForOneThatResumesThem(t *testing.T) {
	for _, word := range []string{"dies when it is to resume", "dies while it resumes"} {
		t.Run(word, func(t *testing.T) {
			w := startKeeping(t, base+"#! "+word+"\n")
			w.kill(1, syscall.SIGKILL)
			st := w.wait("one that has them", func(st *Status) bool {
				return st.Vault.Resuming == 0 && slices.ContainsFunc(st.Generations, func(g GenerationStatus) bool {
					return g.State == "draining" && g.Number >= 5 && g.Deposits == fakeTunnelCount
				})
			})
			i := slices.IndexFunc(st.Generations, func(g GenerationStatus) bool { return g.State == "draining" })
			w.wantResumed(st.Generations[i].Number)
		})
	}
}

// What a generation has not withdrawn that ended as it should has ended with it.
func TestAGenerationThatEndsLeavesNothing(t *testing.T) {
	w := startKeeping(t, strings.Replace(base, `"1h"`, `"1ms"`, 1))
	w.mustReload("")
	w.wait("the first one to end", func(st *Status) bool {
		return states(st) == "2 serving" && st.Vault.Resuming == 0 && st.Vault.Deposits == fakeTunnelCount
	})
	if lines := w.noted("resumed"); lines[0] != "" {
		t.Errorf("%q", lines)
	}
}

// The stop does not wait for tunnels that nobody has.
func TestTheStopEndsTheWaitForOneThatResumes(t *testing.T) {
	w := startKeeping(t, base)
	w.mood("crash")
	w.kill(1, syscall.SIGKILL)
	w.wait("an attempt to fail", func(st *Status) bool {
		return w.s.stats.resumeFailures.Value() > 0 && st.Vault.Bereft == fakeTunnelCount
	})
	w.s.Stop()
	select {
	case <-w.s.ended:
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
}

// An upgrade begins only when all tunnels have a process again.
func TestAnUpgradeWaitsUntilTunnelsAreResumed(t *testing.T) {
	w := startKeeping(t, base)
	w.s.do(func() { w.s.resuming[77] = new(bequest) })
	w.s.opts.Successor = func(context.Context) (Successor, error) { return nil, errors.New("no successor today") }
	asked := make(chan error, 1)
	go func() {
		_, err := w.s.Upgrade(t.Context())
		asked <- err
	}()
	w.wait("the upgrade to wait", func(*Status) bool {
		waits := false
		w.s.do(func() { waits = w.s.upgradeAsked && len(w.s.quiet) > 0 })
		return waits
	})
	select {
	case err := <-asked:
		t.Fatalf("it has begun: %v", err)
	default:
	}
	w.s.do(func() {
		delete(w.s.resuming, 77)
		w.s.settled()
	})
	if err := <-asked; err == nil || !strings.Contains(err.Error(), "no successor") {
		t.Errorf("got %v", err)
	}
}

// Tunnels move to what has passed probation, not before, and by command all of them.
func TestTunnelsMoveAfterProbation(t *testing.T) {
	w := startKeeping(t, base+"#! holds tunnels\n")
	if err := w.s.MoveTunnels(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "generation 1 serves") {
		t.Errorf("got %v", err)
	}
	if err := w.s.MoveTunnels(t.Context(), 7); err == nil || !strings.Contains(err.Error(), "no living generation 7") {
		t.Errorf("got %v", err)
	}
	w.mustReload("")
	w.wantStates("2 serving, 1 draining")
	if err := w.s.MoveTunnels(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "on probation") {
		t.Errorf("got %v", err)
	}
	if lines := w.noted("moves"); lines[0] != "" {
		t.Errorf("moved in probation: %q", lines)
	}
	w.s.do(func() {
		w.s.pass(w.s.serving)
		w.s.endProbation("passed")
	})
	w.wait("the draining one to hear of it", func(*Status) bool { return slices.Equal(w.noted("moves"), []string{"1 all false"}) })
	if err := w.s.MoveTunnels(t.Context(), 1); err != nil {
		t.Error(err)
	}
	if got := w.noted("moves"); !slices.Equal(got, []string{"1 all false", "1 all true"}) {
		t.Errorf("got %q", got)
	}
}

// Generations of builds that know no vault hear nothing of it.
func TestAGenerationWithoutAVaultHearsNothingOfIt(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	w.kill(1, syscall.SIGKILL)
	w.wantServing(2)
	if n := w.s.stats.tunnelsLost.Value(); n == 0 {
		t.Error("nothing counts as lost")
	}
	w.mood("keeps tunnels")
	w.mustReload("")
	w.wantStates("3 serving, 2 draining")
	w.s.do(func() {
		w.s.pass(w.s.serving)
		w.s.endProbation("passed")
	})
	if err := w.s.MoveTunnels(t.Context(), 2); err == nil || !strings.Contains(err.Error(), "cannot be moved") {
		t.Errorf("got %v", err)
	}
}

// Tunnels that nobody can resume are cut in the end, and an upgrade does not wait for that.
func TestTunnelsThatCannotBeResumedAreCut(t *testing.T) {
	w := startKeeping(t, base)
	w.s.opts.Successor = func(context.Context) (Successor, error) { return nil, errors.New("no successor today") }
	w.mood("crash")
	w.s.do(func() { w.s.patience = 300 * time.Millisecond })
	w.kill(1, syscall.SIGKILL)
	w.wait("an attempt to fail", func(*Status) bool { return w.s.stats.resumeFailures.Value() > 0 })
	if _, err := w.s.Upgrade(t.Context()); err == nil || !strings.Contains(err.Error(), "tunnels of generation 1") && !strings.Contains(err.Error(), "no generation serves") {
		t.Errorf("got %v", err)
	}
	w.wait("the tunnels to be given up", func(st *Status) bool { return st.Vault.Resuming == 0 && st.Vault.Deposits == 0 })
	if n := w.s.stats.tunnelsLost.Value(); n != fakeTunnelCount {
		t.Errorf("%d count as lost", n)
	}
}

// A process that ends by itself as soon as it has the tunnels has them cut in the end. One
// that is killed, by whom or what ever, does not: the tunnels live in between.
func TestTunnelsAreCutOnlyWhenProcessesEndByThemselves(t *testing.T) {
	for name, tt := range map[string]struct {
		sig  syscall.Signal
		lost uint64
	}{
		"killed":         {syscall.SIGKILL, 0},
		"a fault of its": {syscall.SIGSEGV, fakeTunnelCount},
	} {
		t.Run(name, func(t *testing.T) {
			w := startKeeping(t, base)
			w.s.do(func() { w.s.living[1].deaths, w.s.living[1].bequests = mostDeaths-1, 1 })
			w.kill(1, tt.sig)
			w.wait("the tunnels to be resumed, or cut", func(st *Status) bool {
				return st.Vault.Resuming == 0 && !slices.ContainsFunc(st.Generations, func(g GenerationStatus) bool { return g.Number == 1 })
			})
			if n := w.s.stats.tunnelsLost.Value(); n != tt.lost {
				t.Errorf("%d tunnels are lost, want %d", n, tt.lost)
			}
		})
	}
}

// Tunnels of which the dead generation had not heard yet that others have them are not
// lost.
func TestTunnelsThatHaveMovedAreNotLost(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		tunnels, counted int64
		left, moved      int
		want             uint64
	}{
		{tunnels: 10, left: 10},
		{tunnels: 10, left: 7, want: 3},
		{tunnels: 10, left: 7, moved: 3},
		{tunnels: 10, left: 7, moved: 30, counted: 27},
		{tunnels: 10, left: 7, moved: 30, counted: 30, want: 3},
		{tunnels: 10, left: 7, moved: 2, counted: 40, want: 3},
		{tunnels: 1, left: 2},
	} {
		if got := (losses{tunnels: tt.tunnels, moved: tt.counted}).tunnelsFor(tt.left, tt.moved); got != tt.want {
			t.Errorf("%+v: %d", tt, got)
		}
	}
	f := metrics.Family{Series: []metrics.Series{{Labels: []string{"in"}, Value: 3}, {Labels: []string{"out"}, Value: 7}}}
	if n := counted(&f, "out"); n != 7 {
		t.Errorf("%d are counted", n)
	}
	if n := counted(&f, "away"); n != 0 {
		t.Errorf("%d are counted", n)
	}
}

// A supervisor asks generations again that were to move all their tunnels.
func TestAllTunnelsMoveOnUnderTheNextSupervisor(t *testing.T) {
	w := prepare(t, base)
	w.strangers()
	w.run()
	w.wantServing(1)
	w.s.arrive(guest(t, control.Report{Generation: 9, Phase: control.PhaseDraining, Vault: control.VaultVersion, MovesAll: true}, nil, false), &control.Hello{Generation: 9, PID: 1 << 30, Version: "x"})
	w.wait("it to be adopted", func(st *Status) bool { return len(st.Generations) == 2 })
	w.do(func() {
		if g := w.s.living[9]; g == nil || !g.movesAll {
			t.Errorf("it is not known: %+v", g)
		}
		delete(w.s.living, 9)
	})
}

// bereave has a supervisor, which runs but has not begun, know tunnels of a generation
// that it has never met.
func (w *world) bereave(generation int) {
	w.t.Helper()
	ours, theirs, err := control.Ends()
	if err != nil {
		w.t.Fatal(err)
	}
	conn, err := control.NewVault(ours)
	if err != nil {
		w.t.Fatal(err)
	}
	end, err := control.NewVault(theirs)
	if err != nil {
		w.t.Fatal(err)
	}
	w.s.vault.Open(generation, conn)
	(&fakeKeeper{b: &control.Bundle{Generation: generation}, vault: end}).deposit()
	if err := w.s.vault.Await(w.t.Context(), generation); err != nil {
		w.t.Fatal(err)
	}
	end.Close()
}

// A candidate may have deposits of a generation that dies before it is adopted. They are
// resumed as well, but only by a supervisor that cannot be discarded any more: otherwise
// its predecessor and it would both.
func TestACandidateResumesNothingBeforeItCommands(t *testing.T) {
	w := prepare(t, base)
	var err error
	if w.s.stats, err = newStats(nil); err != nil {
		t.Fatal(err)
	}
	if w.s.estate, err = newEstate(); err != nil {
		t.Fatal(err)
	}
	go w.s.loop()
	t.Cleanup(func() {
		w.s.stopWork(ErrStopping)
		w.s.endLoop()
		w.s.vault.Close()
	})
	w.bereave(7)
	w.s.do(func() { w.s.mournUnmet(7) })
	for range 1000 {
		w.s.do(func() {})
	}
	if n := w.s.stats.resumeFailures.Value(); n != 0 {
		t.Errorf("%d attempts before it commands", n)
	}
	close(w.s.begun)
	for deadline := time.Now().Add(patience); w.s.stats.resumeFailures.Value() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no attempt although it commands")
		}
	}
}

// Who has obeyed another supervisor meanwhile is told once more that its tunnels are to
// move, and all of them if that was said.
func TestAGenerationIsToldAgainToMove(t *testing.T) {
	w := startKeeping(t, base+"#! holds tunnels\n")
	w.mustReload("")
	w.wantStates("2 serving, 1 draining")
	w.s.do(func() {
		w.s.pass(w.s.serving)
		w.s.endProbation("passed")
	})
	w.wait("the draining one to hear of it", func(*Status) bool { return len(w.noted("moves")) == 1 && w.noted("moves")[0] != "" })
	if err := w.s.MoveTunnels(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	w.s.opts.Successor = func(context.Context) (Successor, error) { return nil, errors.New("no successor today") }
	if _, err := w.s.Upgrade(t.Context()); err == nil {
		t.Fatal("upgraded")
	}
	w.wait("it to be told again", func(*Status) bool {
		return slices.Equal(w.noted("moves"), []string{"1 all false", "1 all true", "1 all true"})
	})
}

// Not even for the moment in which it begins.
func TestNothingMovesToWhatIsOnProbation(t *testing.T) {
	w := startKeeping(t, base+"#! holds tunnels\n")
	w.mustReload("")
	w.pass()
	w.wait("the draining one to hear of it", func(*Status) bool { return slices.Equal(w.noted("moves"), []string{"1 all false"}) })
	w.mustReload("")
	w.wantStates("3 serving, 2 draining, 1 draining")
	w.s.do(func() {
		if g := w.s.living[1]; w.s.target != 0 || g.movesTo != 2 {
			t.Errorf("tunnels move to %d, and those of generation 1 were told to go to %d", w.s.target, g.movesTo)
		}
	})
}

// witness is a successor in whose commit a generation dies.
type witness struct {
	failing
	w      *world
	at     string // when the generation dies
	cancel error
}

func (c *witness) Offer(ctx context.Context, e *control.Estate, fds map[string]int) error {
	if c.at == "offer" {
		c.watch(ctx)
	}
	return context.Cause(ctx)
}

func (c *witness) Commit(ctx context.Context) error {
	if c.at == "commit" {
		c.watch(ctx)
	}
	return errors.New("not today")
}

// watch kills a generation that has tunnels, and waits until that was noticed.
func (c *witness) watch(ctx context.Context) {
	c.w.kill(1, syscall.SIGKILL)
	c.w.wait("the death to be noticed", func(st *Status) bool {
		return !slices.ContainsFunc(st.Generations, func(g GenerationStatus) bool { return g.Number == 1 })
	})
	c.cancel = context.Cause(ctx)
}

// Until a candidate is told to command, the death of a generation with tunnels ends the
// upgrade; afterwards the candidate knows of it, too, and it is for that to mourn.
func TestADeathInACommitIsTheCandidatesBusiness(t *testing.T) {
	for at, cancelled := range map[string]bool{"offer": true, "commit": false} {
		t.Run(at, func(t *testing.T) {
			w := startKeeping(t, base)
			w.mustReload(base + "# 2\n")
			w.s.do(func() {
				w.s.pass(w.s.serving)
				w.s.endProbation("passed")
			})
			c := &witness{w: w, at: at}
			w.s.opts.Successor = func(context.Context) (Successor, error) { return c, nil }
			if _, err := w.s.Upgrade(t.Context()); err == nil {
				t.Error("it was upgraded")
			}
			if (c.cancel != nil) != cancelled {
				t.Errorf("the upgrade was ended: %v", c.cancel)
			}
			w.wait("the tunnels to be resumed", func(st *Status) bool { return st.Vault.Resuming == 0 })
			if n := w.s.stats.tunnelsLost.Value(); n != 0 {
				t.Errorf("%d tunnels are lost", n)
			}
		})
	}
}

// A supervisor that may still be discarded has no tunnels move.
func TestNothingMovesBeforeItIsCertainWhoCommands(t *testing.T) {
	t.Parallel()
	s := New(Options{Log: slog.New(slog.DiscardHandler)}) // which nobody runs
	defer s.vault.Close()
	s.serving = &generation{number: 1, vaultVersion: control.VaultVersion}
	s.passed = s.serving
	if s.retarget(); s.target != 0 {
		t.Errorf("before, the target is %d", s.target)
	}
	close(s.begun)
	if s.retarget(); s.target != 1 {
		t.Errorf("afterwards it is %d", s.target)
	}
}

// What a generation has deposited stays behind when the supervisor is succeeded. One that
// cannot be given another vault keeps the old supervisor, since it may die before it has found
// the next one.
func TestAnUpgradeWaitsForWhoHasTunnels(t *testing.T) {
	for name, tt := range map[string]struct {
		start func(t *testing.T, file string) *world
		want  string
	}{
		"with deposits":    {startKeeping, "generation 1, which has tunnels, cannot be handed over now: "},
		"without deposits": {startLasting, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := tt.start(t, base+"#! holds tunnels\n#! is not prepared\n")
			w.mustReload("# 2\n" + base + "#! holds tunnels\n#! is not prepared\n")
			w.wantStates("2 serving, 1 draining")
			_, fds, err := w.s.offer(t.Context())
			closeEnds(fds)
			if got := fmt.Sprint(err); tt.want == "" && err != nil || !strings.HasPrefix(got, tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
