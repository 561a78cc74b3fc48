package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// The generation has the processors that we have: as many loops, and an epoll set for
// each beside that of the Go runtime.
func TestAGenerationHasALoopForEachProcessor(t *testing.T) {
	t.Parallel()
	i := serve(t, simple(newBackend(t), ""))
	folder := fmt.Sprintf("/proc/%d/fd", i.status().Generations[0].PID)
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	sets := 0
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(folder, e.Name())); err == nil && target == "anon_inode:[eventpoll]" {
			sets++
		}
	}
	if want := runtime.GOMAXPROCS(0) + 1; sets != want {
		t.Errorf("%d epoll sets, want %d", sets, want)
	}
}

// While the kernel makes the table of descriptors larger, nobody gets one.
func TestAGenerationHasRoomForManyDescriptorsFromTheBeginning(t *testing.T) {
	t.Parallel()
	i := serve(t, simple(newBackend(t), ""))
	file := fmt.Sprintf("/proc/%d/status", i.status().Generations[0].PID)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	want, room := min(limit.Cur, 32<<10), uint64(0)
	eventually(t, func() bool {
		status, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(status)) {
			if n, ok := strings.CutPrefix(line, "FDSize:"); ok {
				fmt.Sscan(n, &room)
			}
		}
		return room >= want
	}, func() string { return fmt.Sprintf("room for %d descriptors; it is for %d", want, room) })
}
