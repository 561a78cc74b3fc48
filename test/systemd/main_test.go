// Package systemd runs the service as its unit files say, under a real systemd: each
// test has a box of its own, a systemd in its own namespaces, in which the network is
// the box's too. It needs root.
package systemd

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// bin has the programs under test.
var bin string

// pauseVariable is the environment variable that names the file with the point of an
// upgrade at which a process pauses; see points.go in package service.
const pauseVariable = "HOLDFAST_TEST_PAUSE"

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(code)
}

func runTests(m *testing.M) (int, error) {
	err := missingTools()
	if err == nil {
		err = makeBase()
	}
	if err != nil {
		if os.Getenv("HOLDFAST_TEST_REQUIRE_TOOLS") == "1" {
			return 0, err
		}
		fmt.Println("skipped:", err)
		return 0, nil
	}
	dir, err := os.MkdirTemp("", "hf-systemd-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	bin = dir
	for name, pkg := range map[string]string{"holdfast": "holdfast/cmd/supervisor", "holdfast-proxy": "holdfast/cmd/proxy"} {
		flags := "-X holdfast/internal/service.pauseVariable=" + pauseVariable
		if out, err := exec.Command("go", "build", "-o", filepath.Join(bin, name), "-ldflags", flags, pkg).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build %s: %w\n%s", pkg, err, out)
		}
	}
	// Most of them wait for something most of the time. -parallel is parsed by Run, and
	// has the last word.
	if err := flag.Set("test.parallel", "6"); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

func missingTools() error {
	if os.Geteuid() != 0 {
		return errors.New("the tests of the systemd units need root")
	}
	var missing []string
	for _, tool := range []string{"mmdebstrap", "unshare", "nsenter", "setpriv", "findmnt", "flock"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the tests of the systemd units need %s (test/install-tools installs them)", strings.Join(missing, ", "))
	}
	return nil
}

// makeBase makes the system of the boxes, which takes half a minute where it is not
// there yet.
func makeBase() error {
	if out, err := exec.Command("./box", "base").CombinedOutput(); err != nil {
		return fmt.Errorf("the system of the boxes: %w\n%s", err, out)
	}
	return nil
}
