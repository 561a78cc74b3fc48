package supervisor

import (
	"errors"
	"fmt"
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
	w.wantRefused(w.logged("fifo"), "access logs", "nobody reads this FIFO")
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
	w.do(func() { w.s.pass(w.s.serving); w.s.endProbation("passed") })
	if err := w.s.Kill(t.Context(), 1); err != nil { // it stays at hand for the whole probation
		t.Fatal(err)
	}
	syscall.Kill(w.wantServing(2).Generations[0].PID, syscall.SIGKILL)
	w.wantServing(3)
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
