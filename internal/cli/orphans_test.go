package cli_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/cli"
	"holdfast/internal/pidfd"
	"holdfast/internal/runtimedir"
)

// playRole has the test binary be another process than the tests, where it was started
// as one.
func playRole() bool {
	switch os.Getenv("HOLDFAST_TEST_ROLE") {
	case "orphan": // ends when it is told to
		fmt.Println("ready")
	case "stubborn orphan": // must be killed
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
	case "command":
		os.Exit(new(cli.Program).Main(os.Args[1:], os.Stdout, os.Stderr))
	default:
		return false
	}
	io.Copy(io.Discard, os.Stdin)
	return true
}

// orphan starts a process as generation number. It is our child, and when it has ended
// nobody waits for it before the test ends.
func orphan(t *testing.T, number int, role string) runtimedir.Generation {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE="+role)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	id, err := pidfd.Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return runtimedir.Generation{Number: number, Identity: id, State: "draining"}
}

// leave makes a runtime directory as a killed supervisor leaves it.
func leave(t *testing.T, generations ...runtimedir.Generation) *runtimedir.Dir {
	t.Helper()
	dir, err := runtimedir.Prepare(shortDir(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := dir.SaveState(&runtimedir.State{Epoch: 3, Last: 9, Generations: generations}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func stopOrphans(dir *runtimedir.Dir, flags string) result {
	return execute(&cli.Program{}, "stop --orphans --runtime-dir "+dir.Path()+" "+flags)
}

// lives says whether the process of a generation runs.
func lives(t *testing.T, g runtimedir.Generation) bool {
	t.Helper()
	p, err := pidfd.Open(g.Identity)
	if err != nil {
		return false
	}
	p.Close()
	return true
}

func named(g runtimedir.Generation) string {
	return fmt.Sprintf("generation %d (pid %d)", g.Number, g.PID)
}

// wantLines is want where the order of the lines of stdout is open, but for the last.
func (got result) wantLines(t *testing.T, code int, stderr string, stdout ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(got.stdout, "\n"), "\n")
	slices.Sort(lines[:len(lines)-1])
	slices.Sort(stdout[:len(stdout)-1])
	got.stdout = strings.Join(lines, "\n") + "\n"
	got.want(t, code, strings.Join(stdout, "\n")+"\n", stderr)
}

func TestOrphansAreEnded(t *testing.T) {
	t.Parallel()
	one, two := orphan(t, 1, "orphan"), orphan(t, 2, "orphan")
	dir := leave(t, one, two)
	stopOrphans(dir, "").wantLines(t, 0, "", named(one)+" has ended", named(two)+" has ended", "no generation is left")
	if lives(t, one) || lives(t, two) {
		t.Error("a generation lives")
	}
	stopOrphans(dir, "").wantLines(t, 0, "", named(one)+" was gone already", named(two)+" was gone already", "no generation is left")
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}

func TestOrphansThatDoNotEndAreKilled(t *testing.T) {
	t.Parallel()
	g := orphan(t, 4, "stubborn orphan")
	stopOrphans(leave(t, g), "--timeout 50ms").want(t, 0, named(g)+" did not end within 50ms and was killed\nno generation is left\n", "")
	if lives(t, g) {
		t.Error("it lives")
	}
}

func TestOrphansAreKilledAtOnce(t *testing.T) {
	t.Parallel()
	g := orphan(t, 4, "stubborn orphan")
	began := time.Now()
	stopOrphans(leave(t, g), "--now --timeout 1h").want(t, 0, named(g)+" was killed\nno generation is left\n", "")
	if lives(t, g) || time.Since(began) > time.Minute {
		t.Errorf("after %s it lives: %v", time.Since(began), lives(t, g))
	}
}

// The numbers of generations that have ended are others' by now.
func TestOthersThanOrphansAreLeftAlone(t *testing.T) {
	t.Parallel()
	g := orphan(t, 4, "orphan")
	earlier := g
	earlier.Start--
	before := g
	before.Number, before.Boot = 5, "10000000-0000-0000-0000-000000000000"
	stopOrphans(leave(t, earlier, before), "--now").wantLines(t, 0, "", named(earlier)+" was gone already", named(before)+" was gone already", "no generation is left")
	if !lives(t, g) {
		t.Error("a process was ended that is no generation")
	}
}

func TestGenerationsOfASupervisorAreNoOrphans(t *testing.T) {
	t.Parallel()
	g := orphan(t, 4, "orphan")
	dir := leave(t, g)
	lock, err := dir.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	stopOrphans(dir, "").want(t, 1, "", fmt.Sprintf("holdfast: nothing was ended: a supervisor runs (pid %d)\n", os.Getpid())+
		"  try: `holdfast stop`, which ends it with all generations\n")
	if !lives(t, g) {
		t.Error("it was ended")
	}
}

func TestNothingIsKnownOfOrphans(t *testing.T) {
	t.Parallel()
	path := shortDir(t)
	execute(&cli.Program{}, "stop --orphans --runtime-dir "+path).want(t, 0,
		"nothing is known of generations: no supervisor has left word in "+path+"\n", "")
	execute(&cli.Program{}, "stop --orphans --runtime-dir "+path+"/missing").want(t, 0,
		"nothing is known of generations: there is no runtime directory "+path+"/missing\n", "")
	if _, err := os.Stat(path + "/missing"); err == nil {
		t.Error("the directory was made")
	}
	dir := leave(t)
	stopOrphans(dir, "").want(t, 0, "no generation is left\n", "")
	state := filepath.Join(dir.Path(), "state")
	if err := os.WriteFile(state, []byte(`{"version":1,`), 0o600); err != nil {
		t.Fatal(err)
	}
	stopOrphans(dir, "").want(t, 1, "", "holdfast: nothing was ended: state: "+state+" is damaged: unexpected end of JSON input\n")
	if err := os.Chmod(dir.Path(), 0o770); err != nil {
		t.Fatal(err)
	}
	stopOrphans(dir, "").want(t, 1, "", "holdfast: nothing was ended: runtime directory "+dir.Path()+": mode 0770 lets others write to it; chmod go-w it\n")
}

// What the user of a service has written down must not have root end processes that
// this user could not end.
func TestRootEndsOrphansAsTheUserOfTheService(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can become another user")
	}
	const nobody = 65534
	sleep := func(number int, user uint32) runtimedir.Generation {
		cmd := exec.Command("sleep", "600")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		id, err := pidfd.Of(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return runtimedir.Generation{Number: number, Identity: id, State: "serving"}
	}
	theirs, ours := sleep(1, nobody), sleep(2, 0)
	path := shortDir(t)
	data, err := json.Marshal(runtimedir.State{Version: 1, Last: 2, Generations: []runtimedir.Generation{theirs, ours}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+"/state", data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, path + "/state"} {
		if err := os.Chown(name, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(os.Args[0], "stop", "--orphans", "--runtime-dir", path)
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_ROLE=command")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Run()
	result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}.want(t, 1, named(theirs)+" has ended\n",
		"holdfast: 1 of 2 generations may still run: "+named(ours)+": signal process "+fmt.Sprint(ours.PID)+": operation not permitted\n"+
			"  try: the same as the user of the service, or as root\n")
	if lives(t, theirs) || !lives(t, ours) {
		t.Errorf("theirs lives: %v, ours: %v", lives(t, theirs), lives(t, ours))
	}
	// A lock that root had made would keep the service from starting.
	info, err := os.Stat(path + "/lock")
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != nobody {
		t.Errorf("the lock is root's: %v", err)
	}
}
