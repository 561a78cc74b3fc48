package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"holdfast/internal/drill"
)

// hard are the kinds of rounds in which tunnels change processes, the storm most of
// all.
var hard = []string{
	"generations killed in a storm", "generations killed in a storm", "generations killed in a storm", "generations killed in a storm",
	"generations killed in a storm", "generations killed in a storm", "generations killed in a storm", "generations killed in a storm",
	"generation killed while tunnels are moved", "draining generation killed during an upgrade", "serving generation crashed", "tunnels moved",
	"supervisor killed", "supervisor killed, and its successor", "supervisor killed during a reload", "supervisor killed during an upgrade",
}

// Generations are killed at all kinds of moments, and no tunnel loses, doubles or
// reorders a byte, or ends. The drill, its canary and everything that it starts are as
// unprivileged as we are. See also `make soak-vault`.
func TestNoKillCostsATunnel(t *testing.T) {
	t.Parallel()
	wantHeld(t, "plain/holdfast", hard, 150, 4)
}

// few has each of the moments in which processes race with each other once.
var few = []string{
	"generations killed in a storm", "generation killed while tunnels are moved", "draining generation killed during an upgrade", "tunnels moved",
	"supervisor killed",
}

// The same with programs that say where they race.
func TestNoKillRevealsARace(t *testing.T) {
	t.Parallel()
	races := t.TempDir()
	wantHeld(t, "holdfast", few, 10, 2, "GORACE=atexit_sleep_ms=0 log_path="+filepath.Join(races, "race"))
	found, err := filepath.Glob(filepath.Join(races, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		report, err := os.ReadFile(path)
		t.Errorf("a data race in the service: %v\n%s", err, report)
	}
}

// wantHeld runs a drill of a program with rounds of these kinds until so many generations
// were killed, with so many tunnels of each kind, and wants the promise to have held.
func wantHeld(t *testing.T, name string, kinds []string, kills, tunnels int, env ...string) {
	t.Helper()
	tmp, err := os.MkdirTemp("", "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	args := []string{"drill", "--json", "--kills", strconv.Itoa(kills), "--tunnels", strconv.Itoa(tunnels)}
	for _, kind := range kinds {
		args = append(args, "--only", kind)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience+time.Duration(kills)*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(name), args...)
	cmd.Env = append(append(os.Environ(), "TMPDIR="+tmp), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // so that it clears away
	err = cmd.Run()
	result := new(drill.Result)
	if err := json.Unmarshal(out.Bytes(), result); err != nil {
		t.Fatalf("%v\n%s%s", err, out.Bytes(), errs.Bytes())
	}
	var table bytes.Buffer
	if err := result.WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", table.Bytes())
	if err != nil || !result.Held {
		log, logErr := os.ReadFile(filepath.Join(result.Files, "holdfast.log"))
		t.Errorf("%v\n%s\nlog of the service: %s", errors.Join(err, logErr), errs.Bytes(), log)
	}
	if result.Kills.Generations() < kills || result.Changes.Resumed == 0 || result.Changes.Moved == 0 || result.Seen.Bytes == 0 {
		t.Errorf("it has hardly been tried: %+v, %+v", result.Kills, result.Changes)
	}
}
