package proc

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

const rollup = `55d0a0000000-7ffd0a000000 ---p 00000000 00:00 0                          [rollup]
Rss:               13024 kB
Pss:                9050 kB
Pss_Dirty:          4200 kB
Shared_Clean:       5000 kB
Shared_Dirty:          4 kB
Private_Clean:      3000 kB
Private_Dirty:      5020 kB
Swap:                  0 kB
Private_Hugetlb:    2048 kB
`

func TestParseRollup(t *testing.T) {
	t.Parallel()
	got, err := parseRollup(strings.NewReader(rollup))
	if want := (Memory{Private: (3000 + 5020 + 2048) << 10, Pss: 9050 << 10}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "Pss: 1 kB\n", strings.Replace(rollup, "5020", "many", 1)} {
		if m, err := parseRollup(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read as %+v", bad, m)
		}
	}
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	const rest = " 41 42 42 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 7 0 987654 1 2 3\n"
	for stat, want := range map[string]Process{
		"42 (nginx) S" + rest:       {PID: 42, Parent: 41, Started: 987654},
		"42 (a) S 1 (b c) R" + rest: {PID: 42, Parent: 41, Started: 987654},
		"42 (gone) Z" + rest:        {PID: 42, Parent: 41, Started: 987654, Ended: true},
	} {
		if got, err := parseStat([]byte(stat)); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", stat, got, err, want)
		}
	}
	for _, bad := range []string{"", "42", "42 (x) S 41", ") (", "42 (x) S x" + rest, "x (x) S" + rest} {
		if p, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was read as %+v", bad, p)
		}
	}
}

func TestCores(t *testing.T) {
	t.Parallel()
	const second = time.Second
	got, err := parseCores("cpu  100 200 300 4000 500 60 40 800 7777 8888\ncpu0 1 2 3\n")
	if want := (Cores{All: 60 * second, Idle: 45 * second, Stolen: 8 * second}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	later := Cores{All: 80 * second, Idle: 50 * second, Stolen: 9 * second}
	if busy, stolen := later.Since(got); busy != 0.75 || stolen != 0.05 {
		t.Errorf("busy %v, stolen %v", busy, stolen)
	}
	if busy, stolen := got.Since(got); busy != 0 || stolen != 0 {
		t.Errorf("in no time: busy %v, stolen %v", busy, stolen)
	}
	for _, bad := range []string{"", "cpu 1 2 3 4 5 6 7", "cpu0 1 2 3 4 5 6 7 8", "cpu a 2 3 4 5 6 7 8"} {
		if c, err := parseCores(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, c)
		}
	}
	if now, err := ReadCores(); err != nil || now.All <= now.Idle {
		t.Errorf("now it is %+v, %v", now, err)
	}
}

func TestOwnProcess(t *testing.T) {
	t.Parallel()
	self := os.Getpid()
	before, err := CPUOf([]int{self})
	if err != nil {
		t.Fatal(err)
	}
	const work = 20 * time.Millisecond
	for after, sum := before, 0; after < before+work; {
		for i := range 1_000_000 {
			sum += i
		}
		if after, err = CPU(self); err != nil {
			t.Fatal(err)
		}
	}
	m, err := MemoryOf([]int{self, self})
	if err != nil || m.Private < 1<<20 || m.Pss < m.Private {
		t.Errorf("memory %+v, %v", m, err)
	}
	if n, err := Descriptors([]int{self}); err != nil || n < 3 {
		t.Errorf("%d descriptors, %v", n, err)
	}
}

func TestFamily(t *testing.T) {
	t.Parallel()
	// A shell that has a child of its own, and tells us the child's pid.
	cmd := exec.Command("sh", "-c", "sleep 60 & echo; wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Read(make([]byte, 1)) // now it has been started
	family := Family(cmd.Process.Pid)
	if len(family) != 2 || family[0].PID != cmd.Process.Pid || family[1].Parent != cmd.Process.Pid {
		t.Errorf("the family of %d is %+v", cmd.Process.Pid, family)
	}
	if own := PIDs(Family(os.Getpid())); own[0] != os.Getpid() || !slices.Contains(own, cmd.Process.Pid) {
		t.Errorf("our own family is %v, without %d", own, cmd.Process.Pid)
	}
	cmd.Process.Kill()
	for _, p := range family[min(1, len(family)):] {
		if child, err := os.FindProcess(p.PID); err == nil {
			child.Kill()
		}
	}
	cmd.Wait()
	if left := Family(cmd.Process.Pid); left != nil {
		t.Errorf("after its end there is %+v", left)
	}
}
