package proc

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

const counted = `150,,context-switches,2000000000,100.00,,
5000,,raw_syscalls:sys_enter,2000000000,100.00,,
2000,,syscalls:sys_enter_writev,2000000000,100.00,,
2600,,syscalls:sys_enter_recvfrom,2000000000,100.00,,
9,,syscalls:sys_enter_futex,2000000000,100.00,,
0,,syscalls:sys_enter_read,2000000000,100.00,,
`

func TestParseCalls(t *testing.T) {
	t.Parallel()
	calls, err := parseCalls(counted, 2*time.Second)
	if err != nil || len(calls) != 6 || calls["writev"] != 1000 {
		t.Fatalf("got %v, %v", calls, err)
	}
	const want = "5.00 system calls each: 2.60 recvfrom, 2.00 writev; 0.15 context switches"
	if got := calls.Each(500); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, bad := range []string{"", "event syntax error", strings.Replace(counted, "5000", "<not counted>", 1), strings.Replace(counted, "5000", "0", 1)} {
		if calls, err := parseCalls(bad, time.Second); err == nil {
			t.Errorf("%q was read as %v", bad, calls)
		}
	}
}

// What can be counted here is.
func TestCountCalls(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("perf"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs perf, and root")
	}
	busy := exec.Command("dd", "if=/dev/zero", "of=/dev/null", "bs=1")
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		busy.Process.Kill()
		busy.Wait()
	})
	named := slices.Contains(countable(), "syscalls:sys_enter_read") // not before somebody mounts tracefs, as perf does
	calls, err := CountCalls([]int{busy.Process.Pid, busy.Process.Pid}, 100*time.Millisecond)
	if err != nil {
		t.Skip(err)
	}
	for _, name := range []string{AllCalls, "read", "write"} {
		if calls[name] <= 0 && (name == AllCalls || named) {
			t.Errorf("it reads and writes without end, and %v were counted", calls)
		}
	}
}
