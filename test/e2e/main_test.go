// Package e2e runs the real programs, with real sockets and real clients. It runs
// as an unprivileged user: root hides what limits and permissions do.
package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// binEnv names the folder of the programs under test.
const binEnv = "HOLDFAST_E2E_BIN"

// nobody is the user that the tests run as where they are started by root.
const nobody = 65534

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) != "" {
		act()
		return
	}
	if os.Getenv(binEnv) != "" {
		os.Exit(m.Run())
	}
	code, err := runTests()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(code)
}

// runTests builds the programs and runs this binary once more with them.
func runTests() (int, error) {
	dir, err := os.MkdirTemp("/tmp", "hf-e2e-") // short: paths of unix sockets are
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	bin, tmp := filepath.Join(dir, "bin"), filepath.Join(dir, "t")
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(bin, 0o755), os.Mkdir(tmp, 0o755)); err != nil {
		return 0, err
	}
	const version, core, pause = "holdfast/internal/version.override=", "holdfast/internal/control.override=", "holdfast/internal/service.pauseVariable="
	for _, p := range []struct{ name, pkg, race, set string }{
		{"holdfast", "holdfast/cmd/supervisor", "-race=true", ""},
		{"holdfast-proxy", "holdfast/cmd/proxy", "-race=true", ""},
		{"badproxy", "holdfast/test/e2e/badproxy", "-race=true", ""},
		{"plain/holdfast", "holdfast/cmd/supervisor", "-race=false", ""},
		{"plain/holdfast-proxy", "holdfast/cmd/proxy", "-race=false", ""},
		// Of upgrades: other versions, one that has little in common, and one that pauses.
		{"1.1/holdfast", "holdfast/cmd/supervisor", "-race=false", version + "1.1.0"},
		{"1.1/holdfast-proxy", "holdfast/cmd/proxy", "-race=false", version + "1.1.0"},
		{"1.3/holdfast", "holdfast/cmd/supervisor", "-race=false", version + "1.3.0"},
		{"1.3/holdfast-proxy", "holdfast/cmd/proxy", "-race=false", version + "1.3.0"},
		{"strange/holdfast", "holdfast/cmd/supervisor", "-race=false", core + "8-9"},
		{"plain/pausing", "holdfast/cmd/supervisor", "-race=false", pause + pauseEnv},
	} {
		args := []string{"build", p.race, "-o", filepath.Join(bin, p.name)}
		if p.set != "" {
			args = append(args, "-ldflags", "-X "+p.set)
		}
		build := exec.Command("go", append(args, p.pkg)...)
		if out, err := build.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build %s: %w\n%s", p.pkg, err, out)
		}
	}
	self := filepath.Join(bin, "e2e.test")
	// Where the tests run as another user, that one may not be able to read the checkout.
	corpus := filepath.Join("..", "..", "internal", "http1", "testdata", "corpus.jsonl")
	if err := errors.Join(copyExecutable("/proc/self/exe", self), copyExecutable(corpus, filepath.Join(bin, "corpus.jsonl"))); err != nil {
		return 0, err
	}
	for _, page := range []string{"README.md", filepath.Join("docs", "operations.md"), filepath.Join("docs", "metrics.md")} {
		if err := copyExecutable(filepath.Join("..", "..", page), filepath.Join(bin, filepath.Base(page))); err != nil {
			return 0, err
		}
	}
	cmd := exec.Command(self, testArgs()...)
	// The race detector would make each process sleep for a second at its end.
	cmd.Env = append(os.Environ(), binEnv+"="+bin, "TMPDIR="+tmp, "HOME="+tmp, "GORACE=atexit_sleep_ms=0")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if os.Geteuid() == 0 {
		if err := os.Chown(tmp, nobody, nobody); err != nil {
			return 0, err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// testArgs are our arguments without the files that only the user who started the
// tests may write.
func testArgs() []string {
	var args []string
	for _, a := range os.Args[1:] {
		if !strings.HasPrefix(a, "-test.testlogfile=") {
			args = append(args, a)
		}
	}
	return args
}

func copyExecutable(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
