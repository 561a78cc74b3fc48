package proc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Calls are system calls a second, by name, and what else is counted with them.
type Calls map[string]float64

// All system calls, and how often a thread had to give way or waited.
const (
	AllCalls = "system calls"
	Switches = "context switches"
)

// tracepoints is where the kernel lists what can be counted.
const tracepoints = "/sys/kernel/tracing/events"

// interesting are the system calls by which proxies spend their time.
var interesting = []string{
	"accept4", "close", "connect", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "futex", "getpid", "getsockopt", "ioctl", "madvise", "nanosleep",
	"poll", "ppoll", "read", "readv", "recvfrom", "recvmsg", "sched_yield", "sendmsg", "sendto", "setsockopt", "shutdown", "socket", "splice", "tgkill", "write", "writev",
}

// CountCalls counts the system calls of processes by perf(1), which slows them hardly at
// all. It takes a right that few but root have.
func CountCalls(pids []int, over time.Duration) (Calls, error) {
	perf, err := exec.LookPath("perf")
	if err != nil {
		return nil, errors.New("perf is not installed (Debian's package linux-perf)")
	}
	of := strings.Trim(strings.Join(strings.Fields(fmt.Sprint(pids)), ","), "[]")
	ctx, cancel := context.WithTimeout(context.Background(), over+10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, perf, "stat", "-x", ",", "-e", strings.Join(countable(), ","), "-p", of,
		"sleep", fmt.Sprint(over.Seconds())).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("perf: %w\n%s", err, out)
	}
	return parseCalls(string(out), over)
}

// countable are the events that this kernel has, by their names.
func countable() []string {
	events := []string{"context-switches", "raw_syscalls:sys_enter"}
	for _, name := range interesting {
		if _, err := os.Stat(filepath.Join(tracepoints, "syscalls", "sys_enter_"+name)); err == nil {
			events = append(events, "syscalls:sys_enter_"+name)
		}
	}
	return events
}

// parseCalls reads what perf stat -x, says: count, unit, event and more, a line each.
func parseCalls(said string, over time.Duration) (Calls, error) {
	calls := Calls{}
	for line := range strings.Lines(said) {
		fields := strings.Split(line, ",")
		if len(fields) < 3 {
			continue
		}
		n, err := strconv.ParseFloat(fields[0], 64)
		if err != nil {
			return nil, fmt.Errorf("perf: %s", strings.TrimSpace(line))
		}
		name := strings.TrimPrefix(fields[2], "syscalls:sys_enter_")
		switch name {
		case "raw_syscalls:sys_enter":
			name = AllCalls
		case "context-switches":
			name = Switches
		}
		calls[name] = n / over.Seconds()
	}
	if calls[AllCalls] == 0 {
		return nil, fmt.Errorf("perf has counted nothing: %q", said)
	}
	return calls, nil
}

// Each says how many there were for each of so many operations a second. What is rare is
// left out.
func (c Calls) Each(rate float64) string {
	const rare = 0.01
	var names []string
	for name, n := range c {
		if name != AllCalls && name != Switches && n/rate >= rare {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(c[b], c[a]), cmp.Compare(a, b)) })
	text := fmt.Sprintf("%.2f %s each", c[AllCalls]/rate, AllCalls)
	for i, name := range names {
		text += fmt.Sprintf("%s %.2f %s", [2]string{":", ","}[min(i, 1)], c[name]/rate, name)
	}
	return text + fmt.Sprintf("; %.2f %s", c[Switches]/rate, Switches)
}
