package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/config"
)

// scrape returns the series as "name{label=value,…}" with their values.
func (w *world) scrape() map[string]float64 {
	w.t.Helper()
	families, err := w.s.Metrics(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	all := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			slices.Sort(labels)
			name := f.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			all[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			if f.GetType() == dto.MetricType_HISTOGRAM {
				all[name] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return all
}

func (w *world) wantSeries(all map[string]float64, want map[string]float64) {
	w.t.Helper()
	for name, value := range want {
		if got, ok := all[name]; !ok || got != value {
			w.t.Errorf("%s is %v (there: %t), want %v", name, got, ok, value)
		}
	}
}

func TestWhatEndedGenerationsHaveCountedIsNeverLost(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	const questions = "holdfast_fake_questions_total"
	before := w.scrape()[questions]
	if before == 0 {
		t.Fatal("the first generation has counted nothing")
	}
	for kill := range 3 {
		if kill == 1 {
			w.mustReload("")
		}
		pid := w.status().Generations[0].PID
		n := w.status().Generations[0].Number
		syscall.Kill(pid, syscall.SIGKILL)
		w.wait("a replacement", func(st *Status) bool {
			return len(st.Generations) > 0 && st.Generations[0].Number > n && st.Generations[0].State == "serving" ||
				len(st.Generations) == 1 && st.Generations[0].Number != n && st.Generations[0].State == "serving"
		})
		now := w.scrape()[questions]
		if now < before {
			t.Errorf("%s went from %v to %v", questions, before, now)
		}
		before = now
	}
}

func TestTheFiguresOfAGenerationAreGoneWithIt(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	w.mustReload("")
	w.status() // has both measure
	w.wantSeries(w.scrape(), map[string]float64{
		"holdfast_fake_held{generation=1}":        5,
		"holdfast_fake_held{generation=2}":        5,
		"holdfast_generation_stale{generation=1}": 0,
		"holdfast_generations{state=serving}":     1,
		"holdfast_generations{state=draining}":    1,
		"holdfast_probation_active":               1,
		"holdfast_reloads_total{result=done}":     2,
		"holdfast_reload_duration_seconds":        2,
		"holdfast_listeners":                      1,
		"holdfast_ready":                          1,
	})
	if err := w.s.Kill(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	all := w.scrape()
	for name := range all {
		if strings.Contains(name, "generation=1") {
			t.Errorf("%s is still there", name)
		}
	}
	w.wantSeries(all, map[string]float64{"holdfast_generation_crashes_total{state=draining}": 1})
}

func TestAGenerationThatDoesNotAnswerIsMarkedAndKeepsItsFigures(t *testing.T) {
	w := start(t, base)
	w.status()
	freeze(t, w.status().Generations[0].PID)
	began := time.Now()
	all := w.scrape()
	w.wantSeries(all, map[string]float64{
		"holdfast_generation_stale{generation=1}": 1,
		"holdfast_fake_held{generation=1}":        5,
	})
	if all["holdfast_fake_questions_total"] == 0 {
		t.Error("what it has counted is not shown")
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the scrape took %v", took)
	}
	syscall.Kill(w.status().Generations[0].PID, syscall.SIGCONT)
}

func TestARefusedReloadIsCountedByItsStep(t *testing.T) {
	w := start(t, base)
	w.wantRefused(base+"#! cannot be ready\n", "start", "no such host")
	all := w.scrape()
	w.wantSeries(all, map[string]float64{
		"holdfast_reloads_total{result=refused}":           1,
		"holdfast_reload_refusals_total{step=start}":       1,
		"holdfast_reload_last_successful":                  0,
		"holdfast_config_file_differs":                     1,
		"holdfast_generation_crashes_total{state=serving}": 0,
	})
	if all["holdfast_reload_last_timestamp_seconds"] <= all["holdfast_reload_last_done_timestamp_seconds"] {
		t.Error("the times of the last reload and of the last that was done are not as they were")
	}
}

// logged is base with access logs.
func (w *world) logged(names ...string) string {
	s := base
	for _, n := range names {
		s += fmt.Sprintf("[[access_logs]]\npath = %q\n", filepath.Join(w.dir, n))
	}
	return s
}

func (w *world) wantFile(name, want string) {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		got, err := os.ReadFile(filepath.Join(w.dir, name))
		if err == nil && string(got) == want {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s holds %q (%v), want %q", name, got, err, want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestAnAccessLogThatCannotBeOpenedRefusesTheReload(t *testing.T) {
	w := start(t, base)
	w.wantRefused(w.logged("no such folder/a.log"), "access logs", "no such folder/a.log: no such file or directory")
	if err := syscall.Mkfifo(filepath.Join(w.dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.wantRefused(w.logged("fifo"), "access logs", "a FIFO that nobody reads")
}

func TestEveryGenerationGetsItsAccessLogsAndGetsThemAgain(t *testing.T) {
	w := start(t, base)
	w.mustReload(w.logged("a.log", "b.log") + "#! holds tunnels\n")
	w.mustReload(w.logged("a.log"))
	w.wantFile("a.log", "generation 2 has a.log\ngeneration 3 has a.log\n")
	w.wantFile("b.log", "generation 2 has b.log\n")
	for _, name := range []string{"a.log", "b.log"} {
		if err := os.Rename(filepath.Join(w.dir, name), filepath.Join(w.dir, name+".1")); err != nil {
			t.Fatal(err)
		}
	}
	// b.log cannot be opened now: its generation goes on with the one that it has.
	if err := os.Mkdir(filepath.Join(w.dir, "b.log"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := w.s.ReopenLogs(t.Context()); err == nil || !strings.Contains(err.Error(), "b.log: is a directory") {
		t.Errorf("got %v", err)
	}
	w.wantFile("b.log.1", "generation 2 has b.log\ngeneration 2 has b.log\n")
	deadline := time.Now().Add(patience)
	for {
		now, _ := os.ReadFile(filepath.Join(w.dir, "a.log"))
		lines := strings.Split(strings.TrimSpace(string(now)), "\n")
		slices.Sort(lines)
		if slices.Equal(lines, []string{"generation 2 has a.log", "generation 3 has a.log"}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a.log holds %q", now)
		}
		time.Sleep(5 * time.Millisecond)
	}
	os.Remove(filepath.Join(w.dir, "b.log"))
	if err := w.s.ReopenLogs(t.Context()); err != nil {
		t.Error(err)
	}
	w.wantSeries(w.scrape(), map[string]float64{
		"holdfast_access_log_reopens_total{result=done}":   1,
		"holdfast_access_log_reopens_total{result=failed}": 1,
	})
}

func TestAccessLogsWithLongPathsTravelToo(t *testing.T) {
	w := prepare(t, "")
	folder := w.dir
	for range 14 { // of 200 bytes that JSON makes 1200 of
		folder = filepath.Join(folder, strings.Repeat("<", 200))
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	file := base
	for n := range 8 {
		file += fmt.Sprintf("[[access_logs]]\npath = %q\n", filepath.Join(folder, fmt.Sprint(n)))
	}
	w.write(file)
	w.run()
	w.wantServing(1)
}

func TestACrashIsMendedAlthoughAnAccessLogCannotBeOpenedAnyMore(t *testing.T) {
	w := start(t, base)
	w.mustReload(w.logged("a.log"))
	path := filepath.Join(w.dir, "a.log")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	w.passed(2)
	syscall.Kill(w.wantServing(2).Generations[0].PID, syscall.SIGKILL)
	w.wantServing(3)
}

// passed ends the probation of a generation, and what stayed at hand for it.
func (w *world) passed(number int) {
	w.t.Helper()
	w.do(func() { w.s.pass(w.s.serving); w.s.endProbation("passed") })
	if err := w.s.Kill(w.t.Context(), number-1); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) do(f func()) {
	w.t.Helper()
	if !w.s.do(f) {
		w.t.Fatal("the supervisor has ended")
	}
}

func TestTheLogLevelIsSetForGenerationsThatLiveAndThatCome(t *testing.T) {
	w := prepare(t, base)
	var mu sync.Mutex
	var applied []string
	w.s.opts.ApplyLog = func(l config.Log) {
		mu.Lock()
		defer mu.Unlock()
		applied = append(applied, l.Level.String())
	}
	w.run()
	w.wantServing(1)
	w.wantFile("levels", "1 info\n")
	if err := w.s.SetLogLevel(t.Context(), "loud"); err == nil {
		t.Error(`"loud" is a level`)
	}
	for _, level := range []string{"debug", "config", "error"} {
		if err := w.s.SetLogLevel(t.Context(), level); err != nil {
			t.Fatal(err)
		}
	}
	w.wantFile("levels", "1 info\n1 debug\n1 info\n1 error\n")
	w.mustReload(base + "#! other\n")
	w.wantFile("levels", "1 info\n1 debug\n1 info\n1 error\n2 error\n")
	mu.Lock()
	defer mu.Unlock()
	if want := "[INFO DEBUG INFO ERROR ERROR]"; fmt.Sprint(applied) != want {
		t.Errorf("applied %v, want %s", applied, want)
	}
}

func TestTheEffectiveConfigurationIsOfWhatServesOrOfTheFile(t *testing.T) {
	w := start(t, base)
	w.write(base + "# changed\n")
	for file, want := range map[bool]string{false: "effective:" + base, true: "effective:" + base + "# changed\n"} {
		got, err := w.s.Config(t.Context(), file)
		if err != nil || got != want {
			t.Errorf("file %t: got %q, %v", file, got, err)
		}
	}
	w.write(base + "#! check refuses\n")
	_, err := w.s.Config(t.Context(), true)
	if r, ok := errors.AsType[*Refusal](err); !ok || r.Step != "configuration" || len(r.Problems) != 2 {
		t.Errorf("got %v", err)
	}
}

func TestAProfileComesFromTheGenerationThatIsMeant(t *testing.T) {
	w := start(t, base)
	got, err := w.s.Profile(t.Context(), 1, "heap", 0)
	if err != nil || string(got) != "profile heap" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := w.s.Profile(t.Context(), 1, "none", 0); err == nil {
		t.Error("a profile without bytes")
	}
	if _, err := w.s.Profile(t.Context(), 7, "heap", 0); err == nil {
		t.Error("a profile of no generation")
	}
}

func TestThePhasesOfTheServiceAreTold(t *testing.T) {
	w := prepare(t, base)
	var mu sync.Mutex
	var phases []Phase
	w.s.opts.Phase = func(p Phase) {
		mu.Lock()
		defer mu.Unlock()
		phases = append(phases, p)
	}
	w.run()
	w.wantServing(1)
	w.mustReload(base + "# other\n")
	if _, err := w.reload(base + "#! check refuses\n"); err == nil {
		t.Fatal("not refused")
	}
	w.s.Stop()
	<-w.s.ended
	mu.Lock()
	defer mu.Unlock()
	if want := "[serving reloading serving reloading serving stopping]"; fmt.Sprint(phases) != want {
		t.Errorf("got %v, want %s", phases, want)
	}
}

func TestThePulseIsTheLoops(t *testing.T) {
	w := prepare(t, base)
	beats := make(chan struct{}, 1)
	w.s.opts.PulseEvery = time.Millisecond
	w.s.opts.Pulse = func() {
		select {
		case beats <- struct{}{}:
		default:
		}
	}
	w.run()
	w.wantServing(1)
	<-beats
	w.do(func() { // while the loop is busy there is none
		select {
		case <-beats: // from before
		default:
		}
		select {
		case <-beats:
			t.Error("a pulse although the loop does not run")
		case <-time.After(50 * time.Millisecond):
		}
	})
	<-beats
}

func TestAGenerationHasNoPrivileges(t *testing.T) {
	t.Parallel()
	// More often than there are threads, so that the main one is among them.
	for range 20 {
		var said strings.Builder
		cmd := exec.CommandContext(t.Context(), "grep", "-E", "^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs)", "/proc/self/status")
		cmd.Stdout = &said
		err := startUnprivileged(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(said.String()) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			if value = strings.TrimLeft(value, "\t0"); name == "NoNewPrivs" && value != "1" || name != "NoNewPrivs" && value != "" {
				t.Errorf("%s is %q", name, value)
			}
		}
		if said.Len() == 0 {
			t.Error("nothing was said")
		}
	}
}

// hooked is an admin surface that has something happen in the midst of a reload.
type hooked struct{ hook func() }

func (h *hooked) Prepare(config.Admin) (commit, abort func(), err error) {
	if h.hook != nil {
		h.hook()
	}
	return func() {}, func() {}, nil
}

func TestLogsThatAreRotatedDuringAReloadAreOpenedAgain(t *testing.T) {
	w := prepare(t, base)
	admin := new(hooked)
	w.s.opts.Admin = admin
	w.run()
	w.wantServing(1)
	admin.hook = func() {
		if err := os.Rename(filepath.Join(w.dir, "a.log"), filepath.Join(w.dir, "a.log.1")); err != nil {
			t.Error(err)
		}
		if err := w.s.ReopenLogs(t.Context()); err != nil {
			t.Error(err)
		}
	}
	w.mustReload(w.logged("a.log"))
	w.wantFile("a.log", "generation 2 has a.log\n")
	w.wantFile("a.log.1", "")
}

func TestTheLoopWaitsForNoFile(t *testing.T) {
	w := start(t, base)
	w.mustReload(w.logged("a.log") + "#! holds tunnels\n")
	w.mustReload(base + "# third\n")
	var g *generation
	w.do(func() { g = w.s.living[2] })
	g.release.logs.mu.Lock() // as long as this is held, no file can be closed
	defer g.release.logs.mu.Unlock()
	if err := w.s.Kill(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.s.try(ctx, func() {}); err != nil {
		t.Errorf("the loop is stuck: %v", err)
	}
}

func TestNoFileStaysOpenThatNobodyNeeds(t *testing.T) {
	w := start(t, base)
	held := func(name string) (n int) {
		links, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, filepath.Join(w.dir, name)) {
				n++
			}
		}
		return n
	}
	want := func(what, name string, n int) {
		t.Helper()
		deadline := time.Now().Add(patience)
		for held(name) != n {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d descriptors of %s, want %d", what, held(name), name, n)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	w.wantRefused(w.logged("a.log", "no such folder/b.log"), "access logs", "no such folder")
	want("refused by a log", "a.log", 0)
	w.wantRefused(w.logged("a.log")+"#! cannot be ready\n", "start", "no such host")
	want("refused by the generation", "a.log", 0)
	w.mustReload(w.logged("a.log"))
	want("serving", "a.log", 1)
	for range 3 {
		if err := w.s.ReopenLogs(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want("opened again", "a.log", 1)
	w.mustReload(base + "# without\n") // generation 3, which has it, ends by itself
	want("not needed any more", "a.log", 0)
}

func TestAGenerationCannotHaveItsSuccessorOverwriteTheLog(t *testing.T) {
	w := start(t, base)
	w.mustReload(w.logged("a.log") + "#! turns appending off\n")
	w.passed(2)
	syscall.Kill(w.wantServing(2).Generations[0].PID, syscall.SIGKILL)
	w.wantServing(3)
	w.wantFile("a.log", "generation 2 has a.log\ngeneration 3 has a.log\n")
}

func TestAGenerationThatDoesNotConfirmIsNamed(t *testing.T) {
	w := start(t, base)
	w.mustReload(w.logged("a.log") + "#! holds tunnels\n")
	g := w.generation(2)
	freeze(t, g.proc.PID())
	defer syscall.Kill(g.proc.PID(), syscall.SIGCONT)
	for range 2 * mostUnanswered { // its queue is not filled, too
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		for what, err := range map[string]error{"access logs": w.s.ReopenLogs(ctx), "log level": w.s.SetLogLevel(ctx, "debug")} {
			if err == nil {
				t.Fatalf("%s: the generation is frozen and has confirmed", what)
			}
		}
		cancel()
	}
	err := w.s.ReopenLogs(t.Context())
	if err == nil || !strings.Contains(err.Error(), "generation 2 has not confirmed its access logs") || !strings.Contains(err.Error(), "no answer to 8 questions") {
		t.Errorf("got %v", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.unanswered > mostUnanswered {
		t.Errorf("it was asked %d questions", g.unanswered)
	}
}

// Who asks a lot must not make a generation look as if it did not answer.
func TestManyWhoAskSilenceNobody(t *testing.T) {
	w := start(t, base)
	var asking sync.WaitGroup
	for range 50 {
		asking.Go(func() {
			for range 5 {
				if st, err := w.s.Status(t.Context()); err != nil || st.Generations[0].NotAnswering {
					t.Errorf("not answering (%v)", err)
				}
			}
		})
	}
	asking.Wait()
}

func TestAStopWithoutAnybodyWhoServesHasNoDelay(t *testing.T) {
	w := start(t, strings.Replace(base, "[stop]\n", "[stop]\ndelay = \"1h\"\n", 1))
	w.mood("crash")
	syscall.Kill(w.generation(1).proc.PID(), syscall.SIGKILL)
	w.wait("nothing", func(st *Status) bool { return len(st.Generations) == 0 })
	w.s.Stop()
	select {
	case <-w.s.ended:
	case <-time.After(patience):
		t.Error("still waits for stop.delay although nothing serves")
	}
}

func TestWhatDiesWhileItStopsIsCountedUnlessWeKillIt(t *testing.T) {
	for words, want := range map[string]uint64{"#! dies when stopping\n": 1, "#! does not stop\n": 0, "": 0} {
		t.Run(words, func(t *testing.T) {
			w := start(t, strings.Replace(base, "\"5s\"", "\"0s\"", 1)+words)
			w.s.Stop()
			<-w.s.ended
			for state, n := range w.s.stats.deaths {
				if state == stopping && n.Value() != want || state != stopping && n.Value() != 0 {
					t.Errorf("%d were counted as crashed while they were %s", n.Value(), state)
				}
			}
		})
	}
}

func TestWhatBecomesOfGenerationsIsCounted(t *testing.T) {
	w := start(t, base+"#! holds tunnels\n")
	w.mustReload(base + "# 2\n")
	w.mustReload(w.logged("a.log") + "#! holds tunnels\n[[listeners]]\nname = \"b\"\naddress = \"127.0.0.1:0\"\n") // supersedes
	w.status()
	syscall.Kill(w.generation(3).proc.PID(), syscall.SIGKILL) // on probation: generation 1 is reinstated
	w.wait("generation 1 to serve", func(st *Status) bool {
		return strings.Contains(states(st), "1 serving")
	})
	w.status()
	w.wantSeries(w.scrape(), map[string]float64{
		"holdfast_probations_total{result=superseded}":          1,
		"holdfast_probations_total{result=crashed}":             1,
		"holdfast_generation_replacements_total{by=reinstated}": 1,
		"holdfast_generation_crashes_total{state=serving}":      1,
		"holdfast_tunnels_lost_total":                           3,
		"holdfast_listeners_added_total":                        2,
		"holdfast_listeners_removed_total":                      1,
		"holdfast_generation_crashes_in_a_row":                  1,
		"holdfast_reloads_total{result=done}":                   3,
	})
}

func TestAHostileGenerationCannotMakeOurCountersOverflow(t *testing.T) {
	w := start(t, base+"#! claims too much\n")
	before := 0.0
	for range 3 {
		w.status()
		st := w.status()
		syscall.Kill(st.Generations[0].PID, syscall.SIGKILL)
		w.wantServing(st.Generations[0].Number + 1)
		now := w.scrape()["holdfast_tunnels_lost_total"]
		if now <= before {
			t.Errorf("the tunnels that were lost went from %v to %v", before, now)
		}
		before = now
	}
}

func TestACheckSeesWhetherAccessLogsCanBeOpenedAndMakesNone(t *testing.T) {
	w := prepare(t, "")
	proxy := filepath.Join(w.dir, "proxy")
	for file, problem := range map[string]string{
		w.logged("a.log"):                "",
		w.logged("no such folder/a.log"): "no such file or directory",
		w.logged("."):                    "is a directory",
	} {
		w.write(file)
		err := Check(t.Context(), filepath.Join(w.dir, "a.toml"), proxy)
		if (err == nil) != (problem == "") || err != nil && !strings.Contains(err.Error(), problem) {
			t.Errorf("%s: got %v, want %q", file, err, problem)
		}
	}
	if _, err := os.Stat(filepath.Join(w.dir, "a.log")); err == nil {
		t.Error("the check has made the file")
	}
}

// To close a socket may last as long as a generation wishes.
func TestASocketThatLingersHoldsUpNothing(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := prepare(t, base+"#! lingers at "+ln.Addr().String()+"\n")
	t.Cleanup(func() { ln.Close() }) // resets what was never accepted
	w.run()
	w.wantServing(1)
	for range 10 {
		if all := w.scrape(); all["holdfast_generation_stale{generation=1}"] != 0 {
			t.Error("the generation is stale")
		}
	}
	w.s.Stop()
	select {
	case <-w.s.ended:
	case <-time.After(patience):
		t.Error("the supervisor does not end")
	}
}
