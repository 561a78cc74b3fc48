// Package proc asks the kernel what processes cost: CPU time, memory that is theirs
// alone, descriptors; and which processes belong to a program.
package proc

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CPU returns how long the threads of a process have run, ended ones included. It
// reads the process's CPU clock, which counts nanoseconds where /proc/PID/stat has
// ticks of 10 ms.
func CPU(pid int) (time.Duration, error) {
	// As clock_getcpuclockid(3) makes it: the complement of the pid, then "of all
	// threads" and "as the scheduler measures".
	const scheduler = 2
	clock := int32(^pid)<<3 | scheduler
	var ts unix.Timespec
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0, fmt.Errorf("CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// CPUOf adds up the CPU time of several processes.
func CPUOf(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		d, err := CPU(pid)
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

// Memory is what a process occupies, in bytes.
type Memory struct {
	Private int64 // pages that no other process maps
	Pss     int64 // these, and its share of the others
}

// MemoryOf adds up what several processes occupy.
func MemoryOf(pids []int) (Memory, error) {
	var sum Memory
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return Memory{}, err
		}
		m, err := parseRollup(f)
		f.Close()
		if err != nil {
			return Memory{}, fmt.Errorf("memory of process %d: %w", pid, err)
		}
		sum.Private += m.Private
		sum.Pss += m.Pss
	}
	return sum, nil
}

// parseRollup reads a file like /proc/PID/smaps_rollup: "Private_Dirty:   123 kB".
func parseRollup(r io.Reader) (Memory, error) {
	var m Memory
	found := 0
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		var to *int64
		switch name {
		case "Private_Clean", "Private_Dirty", "Private_Hugetlb":
			to = &m.Private
		case "Pss":
			to = &m.Pss
		default:
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
		if err != nil {
			return Memory{}, fmt.Errorf("%q: %w", lines.Text(), err)
		}
		*to += n << 10
		found++
	}
	if err := lines.Err(); err != nil {
		return Memory{}, err
	}
	if found < 3 {
		return Memory{}, fmt.Errorf("found %d of the lines about private memory and Pss", found)
	}
	return m, nil
}

// Cores is how the machine's cores have spent their time so far, all together.
type Cores struct {
	All    time.Duration
	Idle   time.Duration
	Stolen time.Duration // a virtual machine's, when its host did something else
}

// ReadCores reads it.
func ReadCores() (Cores, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return Cores{}, err
	}
	return parseCores(string(stat))
}

// parseCores reads the first line of a file like /proc/stat, which counts ticks.
func parseCores(stat string) (Cores, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	const idle, waiting, stolen = 4, 5, 8 // the fields behind it are in others already
	if len(fields) <= stolen || fields[0] != "cpu" {
		return Cores{}, fmt.Errorf("not the times of all cores: %q", line)
	}
	var c Cores
	for i, field := range fields[1 : stolen+1] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return Cores{}, err
		}
		d := time.Duration(n) * 10 * time.Millisecond // USER_HZ is 100 wherever Go runs
		c.All += d
		switch i + 1 {
		case idle, waiting:
			c.Idle += d
		case stolen:
			c.Stolen += d
		}
	}
	return c, nil
}

// Since returns which shares of the time since an earlier reading the cores were busy,
// and stolen.
func (c Cores) Since(earlier Cores) (busy, stolen float64) {
	all := float64(c.All - earlier.All)
	if all <= 0 {
		return 0, 0
	}
	return 1 - float64(c.Idle-earlier.Idle)/all, float64(c.Stolen-earlier.Stolen) / all
}

// Descriptors returns how many descriptors processes have open together.
func Descriptors(pids []int) (int, error) {
	sum := 0
	for _, pid := range pids {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return 0, err
		}
		sum += len(entries)
	}
	return sum, nil
}

// A Process is one at a moment. The time of its start tells it from a later process
// that was given the same pid.
type Process struct {
	PID, Parent int
	Started     uint64 // in ticks since the machine has started
	Ended       bool   // only its exit status is left (a zombie)
}

// Find returns the process with a pid, if there is one.
func Find(pid int) (Process, bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, false
	}
	p, err := parseStat(stat)
	return p, err == nil
}

// Family returns the process with a pid and all processes below it that run, the
// first one in front.
func Family(pid int) []Process {
	first, ok := Find(pid)
	if !ok || first.Ended {
		return nil
	}
	family := []Process{first}
	children := map[int][]Process{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended meanwhile
		}
		if p, err := parseStat(stat); err == nil && !p.Ended {
			children[p.Parent] = append(children[p.Parent], p)
		}
	}
	for i := 0; i < len(family); i++ {
		family = append(family, children[family[i].PID]...)
	}
	return family
}

// parseStat reads a file like /proc/PID/stat. The second field is the program's name
// in brackets, which may itself hold brackets and spaces.
func parseStat(stat []byte) (Process, error) {
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return Process{}, fmt.Errorf("no name in brackets: %q", stat)
	}
	fields := strings.Fields(string(stat[end+1:]))
	const state, parent, started = 0, 1, 19 // counted behind the name; proc(5) counts from 1 before the pid
	if len(fields) <= started {
		return Process{}, fmt.Errorf("%d fields behind the name: %q", len(fields), stat)
	}
	var p Process
	var err error
	if p.PID, err = strconv.Atoi(strings.TrimSpace(string(stat[:open]))); err != nil {
		return Process{}, err
	}
	if p.Parent, err = strconv.Atoi(fields[parent]); err != nil {
		return Process{}, err
	}
	if p.Started, err = strconv.ParseUint(fields[started], 10, 64); err != nil {
		return Process{}, err
	}
	p.Ended = fields[state] == "Z" || fields[state] == "X"
	return p, nil
}

// PIDs returns the pids of processes.
func PIDs(of []Process) []int {
	pids := make([]int, len(of))
	for i, p := range of {
		pids[i] = p.PID
	}
	return pids
}
