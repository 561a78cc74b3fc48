package supervisor

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// fakeRuntime is the version of runtime values that this process says it knows.
var fakeRuntime int

// fakeOverridden is the part of a fake generation that has runtime values. It notes what it is
// told, and when it begins to serve.
type fakeOverridden struct {
	b     *control.Bundle
	note  func(file, format string, args ...any)
	holds map[string]float64
}

func (o *fakeOverridden) take(conn *control.Conn, m *control.Message, fds []int) bool {
	switch m.Type {
	case control.TypeListeners:
		if fakeRuntime != 0 {
			o.note("overrides", "%d is built", o.b.Generation)
		}
		for told(*o.b, "waits for a word") {
			if _, err := os.Stat(filepath.Join(filepath.Dir(os.Args[0]), "word")); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		return false
	case control.TypeServe:
		if fakeRuntime != 0 {
			o.note("overrides", "%d serves", o.b.Generation)
		}
		return false
	case control.TypeOverride:
		var all control.Overrides
		control.ReadPayload(fds[0], &all)
		o.holds = all.Values
		o.note("overrides", "%d %v", o.b.Generation, all.Values)
		if m.ID != 0 && !told(*o.b, "confirms nothing") {
			conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second)
		}
	case control.TypeValues:
		now := 5.0
		if v, ok := o.holds["weight"]; ok {
			now = v
		}
		f, _ := control.Payload(control.RuntimeValues{Values: []control.RuntimeValue{
			{Key: "weight", Unit: "count", Configured: []float64{5}, Effective: []float64{now}, Most: 10, Places: []string{"routes[0]", "a\x1b[2J"}},
			{Key: "share", Unit: "percent", Configured: []float64{0.5}, Effective: []float64{0.5}, Most: 100},
			{Key: "escape\x1b", Unit: "count"},
			{Key: "unit", Unit: "parsecs"},
		}})
		conn.Send(&control.Message{Type: control.TypeAnswer, Re: m.ID}, time.Second, int(f.Fd()))
		f.Close()
	default:
		return false
	}
	return true
}

// overrides returns what generations have noted, in order.
func (w *world) overrides() []string {
	text, _ := os.ReadFile(filepath.Join(w.dir, "overrides"))
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// wantTold waits until a generation was told something last.
func (w *world) wantTold(generation int, overrides string) {
	w.t.Helper()
	prefix := fmt.Sprint(generation, " map")
	last := ""
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		for _, line := range w.overrides() {
			if strings.HasPrefix(line, prefix) {
				last = line
			}
		}
		if last == fmt.Sprint(generation, " ", overrides) {
			return
		}
	}
	w.t.Fatalf("generation %d was told %q last, want %q", generation, last, overrides)
}

func (w *world) override(values map[string]float64) *OverrideResult {
	w.t.Helper()
	r, err := w.s.Override(w.t.Context(), values)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) resetOverrides(key string) *OverrideResult {
	w.t.Helper()
	r, err := w.s.ResetOverrides(w.t.Context(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// startOverridable starts a service whose generations know overrides, with a file.
func startOverridable(t *testing.T, more string) *world {
	t.Helper()
	w := prepare(t, "")
	w.mood("knows overrides")
	w.write(w.withFile("runtime.toml") + more)
	w.lasting()
	w.run()
	w.wantServing(1)
	return w
}

// withFile is a configuration with a file of that name.
func (w *world) withFile(name string) string {
	return fmt.Sprintf("[runtime]\nfile = %q\n%s#! holds tunnels\n", filepath.Join(w.dir, name), base)
}

// put replaces a file at once.
func (w *world) put(name, text string) {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
		w.t.Fatal(err)
	}
}

func TestOverridesReachEveryGenerationUntilTheyAreReset(t *testing.T) {
	w := startOverridable(t, "")
	w.override(map[string]float64{"weight": 7})
	w.wantTold(1, "map[weight:7]")
	w.mustReload(w.withFile("runtime.toml") + "# 2\n")
	all := w.overrides()
	if i := slices.Index(all, "2 map[weight:7]"); i < 0 || i > slices.Index(all, "2 is built") {
		t.Errorf("the new generation was not told before it was built: %q", all)
	}
	w.override(map[string]float64{"share": 0.25})
	for generation := range 2 { // Override has waited for it
		if !slices.Contains(w.overrides(), fmt.Sprint(generation+1, " map[share:0.25 weight:7]")) {
			t.Errorf("generation %d was not told: %q", generation+1, w.overrides())
		}
	}
	w.wantSeries(w.scrape(), map[string]float64{"holdfast_runtime_overrides{by=command}": 2, "holdfast_runtime_overrides{by=file}": 0})
	if st := w.status(); st.Overridden != (Overridden{ByCommand: 2}) {
		t.Errorf("the status says %+v", st.Overridden)
	}
	w.resetOverrides("weight")
	w.wantTold(1, "map[share:0.25]")
	if r := w.resetOverrides(""); !slices.Equal(r.Reset, []string{"share"}) {
		t.Errorf("%q were reset", r.Reset)
	}
	w.wantTold(1, "map[]")
	w.wantTold(2, "map[]")
}

// It has heard of what held when it was begun, and answers nobody.
func TestWhatIsSetWhileAGenerationStartsHoldsForItsFirstRequest(t *testing.T) {
	w := startOverridable(t, "")
	w.write(w.withFile("runtime.toml") + "#! waits for a word\n")
	reloaded := make(chan error, 1)
	go func() {
		_, err := w.s.Reload(t.Context(), false)
		reloaded <- err
	}()
	w.wait("a generation that starts", func(*Status) bool { return slices.Contains(w.overrides(), "2 is built") })
	w.override(map[string]float64{"weight": 7})
	if err := os.WriteFile(filepath.Join(w.dir, "word"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-reloaded; err != nil {
		t.Fatal(err)
	}
	all := w.overrides()
	if i := slices.Index(all, "2 map[weight:7]"); i < 0 || i > slices.Index(all, "2 serves") {
		t.Errorf("it was not told before it served: %q", all)
	}
}

func TestWhatAFileSaysLiesBelowWhatWasSetByCommand(t *testing.T) {
	w := startOverridable(t, "")
	w.put("runtime.toml", "weight = 3\n[share]\nof = 1\n")
	w.wantTold(1, "map[share.of:1 weight:3]")
	w.override(map[string]float64{"weight": 7})
	w.wantTold(1, "map[share.of:1 weight:7]")
	w.put("runtime.toml", "weight = 4\n")
	w.wantTold(1, "map[weight:7]")
	w.put("runtime.toml", "weight = \"4\"\n")
	broken := w.wait("the complaint", func(st *Status) bool { return st.Overridden.FileError != "" })
	if !strings.Contains(broken.Overridden.FileError, "runtime.toml:1: weight: must be a number") {
		t.Error(broken.Overridden.FileError)
	}
	if r := w.resetOverrides("weight"); len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "weight is 4 now, as ") {
		t.Errorf("warnings %q", r.Warnings)
	}
	w.wantTold(1, "map[weight:4]") // the broken file has changed nothing
	w.put("runtime.toml", "weight = 5\n")
	w.wantTold(1, "map[weight:5]")
	if err := os.Remove(filepath.Join(w.dir, "runtime.toml")); err != nil {
		t.Fatal(err)
	}
	w.wantTold(1, "map[]")
	w.wantSeries(w.scrape(), map[string]float64{
		"holdfast_runtime_file_loads_total{result=done}": 3, "holdfast_runtime_file_loads_total{result=refused}": 1,
	})
}

func TestASuccessorGoesOnWithWhatWasOverridden(t *testing.T) {
	w := startOverridable(t, "")
	w.put("runtime.toml", "a = 1\n")
	w.wantTold(1, "map[a:1]")
	w.override(map[string]float64{"weight": 7})
	before := strings.Count(strings.Join(w.overrides(), "\n"), "1 map[]")
	w.vanish()
	w.put("runtime.toml", "half of a line") // what it said before holds
	w.newSupervisor()
	w.run()
	<-w.s.begun
	r, err := w.s.Runtime(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(shown(r)); got != "[a file 1, share, weight set 7]" {
		t.Errorf("got %s", got)
	}
	w.mustReload(w.withFile("runtime.toml") + "# 2\n")
	w.wantTold(2, "map[a:1 weight:7]")
	w.resetOverrides("weight")
	w.wantTold(1, "map[a:1]")
	for _, line := range w.overrides() {
		if !strings.HasSuffix(line, "serves") && !strings.HasSuffix(line, "built") && !strings.Contains(line, "map[a:1") && line != "1 map[]" {
			t.Errorf("between two supervisors a generation was told %q", line)
		}
	}
	if n := strings.Count(strings.Join(w.overrides(), "\n"), "1 map[]"); n != before {
		t.Errorf("generation 1 was told %d times that nothing is overridden, want %d, all at its start", n, before)
	}
}

// shown says of each key what overrides it.
func shown(r *Runtime) string {
	var all []string
	for _, v := range r.Values {
		word := v.Key
		if v.File != nil {
			word += fmt.Sprint(" file ", *v.File)
		}
		if v.Command != nil {
			word += fmt.Sprint(" set ", *v.Command)
		}
		all = append(all, word)
	}
	return "[" + strings.Join(all, ", ") + "]"
}

func TestANewFileHoldsForTheGenerationThatComesWithIt(t *testing.T) {
	w := startOverridable(t, "")
	w.put("runtime.toml", "a = 1\n")
	w.wantTold(1, "map[a:1]")
	w.put("other.toml", "b = 2\n")
	w.mood("crash")
	if _, err := w.reload(w.withFile("other.toml")); err == nil {
		t.Fatal("what crashes at once was put into service")
	}
	w.mood("knows overrides")
	w.mustReload(w.withFile("other.toml"))
	w.wantTold(1, "map[b:2]") // the old one's, too
	all := w.overrides()
	if i := slices.Index(all, "3 map[b:2]"); i < 0 || i > slices.Index(all, "3 serves") {
		t.Errorf("the new generation was not told before it served: %q", all)
	}
	if slices.Contains(all, "3 map[a:1]") || strings.Count(strings.Join(all, "\n"), "1 map[b:2]") != 1 {
		t.Errorf("they were told %q", all)
	}
	w.put("other.toml", "b = 3\n")
	w.wantTold(3, "map[b:3]")
	w.put("runtime.toml", "a = 4\n") // nobody looks there any more
	w.mustReload(base + "#! holds tunnels\n")
	w.wantTold(3, "map[]")
	w.wantTold(4, "map[]")
}

func TestARuntimeValueIsNotSetToWhatItCannotBe(t *testing.T) {
	w := startOverridable(t, "")
	many := make(map[string]float64)
	for n := range config.MaxOverrides {
		many[fmt.Sprint("k", n)] = 1
	}
	for _, c := range []struct {
		values map[string]float64
		want   string
	}{
		{nil, "no key is given"},
		{map[string]float64{"weight": 11, "share": 1}, "weight: 11 is out of range: from 0 to 10"},
		{map[string]float64{"weight": -1}, "weight: -1 is out of range"},
		{map[string]float64{"weight": 1.5}, "weight: 1.5 is no whole number"},
		{map[string]float64{"share": 100.1}, "share: 100.1 is out of range"},
		{map[string]float64{"a b": 1}, "a runtime key is a name of 1 to 128 letters"},
		{map[string]float64{"": 1}, "a runtime key is a name"},
		{map[string]float64{"x": math.NaN()}, "a runtime value is a number from"},
		{map[string]float64{"x": math.Inf(1)}, "a runtime value is a number from"},
	} {
		_, err := w.s.Override(t.Context(), c.values)
		if r, ok := errors.AsType[*Refusal](err); !ok || r.Step != "runtime values" || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: got %v, want a refusal with %q", c.values, err, c.want)
		}
	}
	if _, err := w.s.ResetOverrides(t.Context(), "weight"); err == nil || !strings.Contains(err.Error(), `"weight" is not set by command`) {
		t.Errorf("the reset of what was not set: %v", err)
	}
	for _, line := range w.overrides() {
		if line != "1 map[]" && line != "1 serves" && line != "1 is built" {
			t.Errorf("it was told %q", line)
		}
	}
	if r := w.override(many); len(r.Warnings) != len(many) || !strings.Contains(r.Warnings[0], "no generation knows k0") {
		t.Errorf("%d warnings", len(r.Warnings))
	}
	if _, err := w.s.Override(t.Context(), map[string]float64{"weight": 1}); err == nil || !strings.Contains(err.Error(), "1001 keys would be overridden") {
		t.Errorf("got %v", err)
	}
	w.resetOverrides("")
	w.override(map[string]float64{"weight": 10, "share": 12.5})
}

func TestWhatIsShownOfRuntimeValues(t *testing.T) {
	w := startOverridable(t, "")
	w.override(map[string]float64{"weight": 7, "unheard": 1})
	r, err := w.s.Runtime(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := shown(r); got != "[share, unheard set 1, weight set 7]" {
		t.Errorf("got %s", got)
	}
	weight := r.Values[2]
	if got := fmt.Sprint(weight.Unit, weight.Configured, weight.Effective, weight.Least, weight.Most, weight.Places, weight.Generations); got != "count[5] [7] 0 10 [routes[0]] [1]" {
		t.Errorf("got %s", got)
	}
	if got := fmt.Sprint(r.Warnings); got != "[no generation knows unheard: it holds for those to come]" {
		t.Errorf("got %s", got)
	}
}

// A process of another build must not be sent what it takes for a breach of the protocol.
func TestAGenerationThatKnowsNoOverridesHearsNothingOfThem(t *testing.T) {
	for _, mood := range []string{"", "knows overrides in its own way"} {
		t.Run(mood, func(t *testing.T) {
			w := prepare(t, base)
			w.mood(mood)
			w.run()
			w.wantServing(1)
			w.override(map[string]float64{"weight": 7})
			for _, line := range w.overrides() {
				if strings.Contains(line, "map") {
					t.Errorf("it was told %q", line)
				}
			}
			if r, err := w.s.Runtime(t.Context()); err != nil || len(r.Warnings) != 2 || !strings.Contains(r.Warnings[0], "generation 1 is of a build") {
				t.Errorf("got %+v, %v", r, err)
			}
		})
	}
}

// It is told when it goes on, and nobody takes it for told meanwhile.
func TestAGenerationThatDoesNotConfirmIsReported(t *testing.T) {
	w := startOverridable(t, "")
	w.mustReload("")
	st := w.wantStates("2 serving, 1 draining")
	pid := st.Generations[1].PID
	freeze(t, pid)
	_, err := w.s.Override(t.Context(), map[string]float64{"weight": 7})
	if !errors.Is(err, ErrUnanswered) || !strings.Contains(err.Error(), "generation 1 has not confirmed it") {
		t.Errorf("got %v", err)
	}
	w.wantTold(2, "map[weight:7]")
	if r, err := w.s.Runtime(t.Context()); err != nil || !slices.Contains(r.Warnings, "generation 1 does not say which numbers it has") {
		t.Errorf("shown is %+v, %v", r, err)
	}
	syscall.Kill(pid, syscall.SIGCONT)
	w.wantTold(1, "map[weight:7]")
	w.override(map[string]float64{"weight": 8})
}

func TestAFileIsReadWhenItHasChangedAndRests(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := &watchedFile{path: filepath.Join(dir, "f")}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) func() {
		return func() { t.Helper(); do(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)) }
	}
	for _, st := range []struct {
		name string
		do   func()
		want string // at the second look
	}{
		{"nothing is there", func() {}, "map[]"},
		{"nothing has changed", func() {}, "no news"},
		{"it is there", write("f", "a = 1\n"), "map[a:1]"},
		{"it is looked at again", func() {}, "no news"},
		{"it is written to", write("f", "a = 100\n"), "map[a:100]"},
		{"half of it", write("f", "a = 2"), "error"},
		{"the error is told once", func() {}, "no news"},
		{"all of it", write("f", "a = 20\n"), "map[a:20]"},
		{"another takes its place", func() {
			write("g", "a = 30\n")()
			do(os.Rename(filepath.Join(dir, "g"), filepath.Join(dir, "f")))
		}, "map[a:30]"},
		{"it is gone", func() { do(os.Remove(filepath.Join(dir, "f"))) }, "map[]"},
		{"a link comes", func() {
			do(os.Mkdir(filepath.Join(dir, "v1"), 0o700))
			do(os.Mkdir(filepath.Join(dir, "v2"), 0o700))
			write("v1/f", "a = 40\n")()
			write("v2/f", "a = 50\n")()
			do(os.Symlink("v1", filepath.Join(dir, "now")))
			do(os.Symlink("now/f", filepath.Join(dir, "f")))
		}, "map[a:40]"},
		{"what lies between is exchanged", func() {
			do(os.Symlink("v2", filepath.Join(dir, "next")))
			do(os.Rename(filepath.Join(dir, "next"), filepath.Join(dir, "now")))
		}, "map[a:50]"},
		{"a directory", func() {
			do(os.Remove(filepath.Join(dir, "f")))
			do(os.Mkdir(filepath.Join(dir, "f"), 0o700))
		}, "error"},
	} {
		st.do()
		if _, _, news := f.look(); news && st.want != "map[]" {
			t.Errorf("%s: believed at first sight", st.name)
			continue
		} else if news {
			continue
		}
		values, err, news := f.look()
		got := fmt.Sprint(values)
		switch {
		case !news:
			got = "no news"
		case err != nil:
			got = "error"
		}
		if got != st.want {
			t.Errorf("%s: got %s (%v), want %s", st.name, got, err, st.want)
		}
	}
}

// What comes back from a generation may be anything.
func TestOnlyOverridesThatCanBeAreRestored(t *testing.T) {
	t.Parallel()
	many := make(map[string]float64)
	for n := range config.MaxOverrides + 1 {
		many[fmt.Sprint(n)] = 1
	}
	var o overrides
	o.apply(&facts{Overrides: map[string]float64{"a": 1, "b c": 2, "d": 1e300}, OverridesFile: "/f", FileOverrides: many})
	if !maps.Equal(o.command, map[string]float64{"a": 1}) || len(o.file.values) != 0 || o.file.path != "/f" {
		t.Errorf("got %v, %d of the file", o.command, len(o.file.values))
	}
}
