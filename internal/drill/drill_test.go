package drill

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const limit = 3 * time.Minute

// build builds both programs side by side, as the drill needs them.
func build(t *testing.T) (holdfast string) {
	t.Helper()
	dir := t.TempDir()
	for name, pkg := range map[string]string{"holdfast": "supervisor", "holdfast-proxy": "proxy"} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, name), "holdfast/cmd/"+pkg)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return filepath.Join(dir, "holdfast")
}

// A drill takes all of a small machine, so there is one at a time.
func TestTheDrill(t *testing.T) {
	holdfast := build(t)
	t.Run("shows that the promise holds", func(t *testing.T) {
		p := play(t, holdfast, nil, "--rounds", strconv.Itoa(len(kinds)), "--seed", "1")
		p.want(t, 0, "\nThe promise held.\n")
		p.wantNothingLeft(t)
	})
	for sabotage, seen := range map[string]func(*Result) int64{
		"listener": func(r *Result) int64 { return min(r.Seen.Refused, r.Seen.Dropped) },
		"byte":     func(r *Result) int64 { return r.Seen.Damage.Changed },
		"tunnel":   func(r *Result) int64 { return r.Seen.Dropped },
		"vault":    func(r *Result) int64 { return r.Seen.Dropped },
	} {
		t.Run("fails when it is sabotaged: "+sabotage, func(t *testing.T) {
			p := play(t, holdfast, nil, "--rounds", "1", "--seed", "1", "--json", "--sabotage", sabotage)
			result := new(Result)
			if err := json.Unmarshal([]byte(p.out), result); err != nil {
				t.Fatalf("%v\n%s%s", err, p.out, p.errors)
			}
			if p.code != 1 || result.Held || len(result.Broken) == 0 || seen(result) == 0 {
				t.Errorf("exit code %d\n%s", p.code, p.out)
			}
			if log, err := os.ReadFile(filepath.Join(result.Files, "holdfast.log")); err != nil || len(log) == 0 {
				t.Errorf("the log of the instance: %q, %v", log, err)
			}
			if err := os.RemoveAll(result.Files); err != nil {
				t.Error(err)
			}
			p.wantNothingLeft(t)
		})
	}
	t.Run("clears away on Ctrl-C", func(t *testing.T) {
		seed := beginsWith("upgrade") // after which nothing that the drill has started itself is left
		p := play(t, holdfast, func(drill *os.Process) { drill.Signal(os.Interrupt) }, "--for", "1h", "--seed", seed, "--verbose")
		p.want(t, 0, "\nThe promise held.\n")
		p.wantNothingLeft(t)
	})
	t.Run("wants to be asked in a way that makes sense", func(t *testing.T) {
		for _, args := range [][]string{
			{"--rounds", "0"}, {"--sabotage", "everything"}, {"--rounds", "1", "--for", "1s"}, {"--kills", "1", "--for", "1s"},
			{"--only", "nothing"}, {"--tunnels", "0"}, {"more"},
		} {
			play(t, holdfast, nil, args...).want(t, 2, "")
		}
	})
	t.Run("says what is missing", func(t *testing.T) {
		if err := os.Remove(holdfast + "-proxy"); err != nil {
			t.Fatal(err)
		}
		p := play(t, holdfast, nil, "--rounds", "1")
		p.want(t, 1, "")
		if !strings.Contains(p.errors, "holdfast-proxy") {
			t.Error(p.errors)
		}
		p.wantNothingLeft(t)
	})
}

// beginsWith returns a seed with which the first round is of the kind.
func beginsWith(kind string) string {
	for seed := uint64(1); ; seed++ {
		d := newDeck(rand.New(rand.NewPCG(seed, 0)), nil)
		if kinds[d.next()].name == kind {
			return strconv.FormatUint(seed, 10)
		}
	}
}

// played is a drill that is over.
type played struct {
	programs    string // their folder
	tmp         string // where it had its files
	out, errors string
	code        int
}

// play runs the drill, does something at the first line of its standard error, and
// returns when it is over.
func play(t *testing.T, holdfast string, then func(*os.Process), args ...string) *played {
	t.Helper()
	tmp, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, holdfast, append([]string{"drill"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	var out, errors bytes.Buffer
	cmd.Stdout = &out
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(said); lines.Scan(); {
		if errors.Len() == 0 && then != nil {
			then(cmd.Process)
		}
		errors.WriteString(lines.Text() + "\n")
	}
	cmd.Wait() // the code says how
	return &played{filepath.Dir(holdfast), tmp, out.String(), errors.String(), cmd.ProcessState.ExitCode()}
}

func (p *played) want(t *testing.T, code int, text string) {
	t.Helper()
	if p.code != code || !strings.Contains(p.out, text) {
		t.Errorf("exit code %d, want %d; in what it says %q must be:\n%s%s", p.code, code, text, p.out, p.errors)
	}
}

// wantNothingLeft wants no file and no process of the programs.
func (p *played) wantNothingLeft(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(p.tmp)
	if err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v\n%s%s", entries, err, p.out, p.errors)
	}
	all, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil || len(all) == 0 {
		t.Errorf("processes: %v, %v", all, err)
	}
	for _, exe := range all {
		if program, err := os.Readlink(exe); err == nil && strings.HasPrefix(program, p.programs) {
			t.Errorf("%s lives on: %s", filepath.Dir(exe), program)
		}
	}
}
