package main

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"holdfast/bench/report"
)

// machine says where this is.
func machine() (report.Machine, error) {
	var name unix.Utsname
	var info unix.Sysinfo_t
	if err := errors.Join(unix.Uname(&name), unix.Sysinfo(&info)); err != nil {
		return report.Machine{}, err
	}
	return report.Machine{
		Kernel: unix.ByteSliceToString(name.Release[:]),
		CPU:    cpuModel(),
		Cores:  runtime.NumCPU(),
		Memory: int64(info.Totalram) * int64(info.Unit),
		Go:     runtime.Version(),
	}, nil
}

// cpuModel is empty where the kernel does not tell.
func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// moduleRoot is the folder of this module, in which we were started.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Path}} {{.Dir}}").Output()
	path, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || path != "holdfast" {
		return "", errors.New("this is to be run in a folder of the module holdfast")
	}
	return filepath.Clean(dir), nil
}
