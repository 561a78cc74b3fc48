// Command mutations shows that the promises of Holdfast are kept by tests: each
// mutation is a small change that breaks one of them, and the tests that it names
// must then fail.
//
//	go run ./test/mutations            # all of them
//	go run ./test/mutations NAME …     # some
//
// It works on a copy of the module in a temporary directory. It exits with 1 if a
// mutation goes unnoticed, does not compile, or does not apply any more.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// limit bounds the tests of one mutation: a hang is noticed too.
const limit = 5 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, names []string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mutations")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := copyModule(root, dir); err != nil {
		return err
	}
	var failed []error
	for _, m := range all {
		if len(names) > 0 && !slices.Contains(names, m.name) {
			continue
		}
		began := time.Now()
		if err := m.try(ctx, dir); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", m.name, err))
			fmt.Printf("FAIL  %-40s %s\n", m.name, err)
			continue
		}
		fmt.Printf("ok    %-40s %s: noticed by %s in %s\n", m.name, m.promise, m.tests, time.Since(began).Round(time.Second))
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return errors.Join(failed...)
}

// mutation replaces old by new in file, which must break the promise and make the
// tests of the package fail.
type mutation struct {
	name     string
	promise  string
	file     string
	old, new string
	pkg      string // of the tests
	tests    string // a pattern for go test -run
}

// apply returns the file's text with the change in it.
func (m mutation) apply(root string) (string, error) {
	text, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(text), m.old); n != 1 {
		return "", fmt.Errorf("%s has %d places like %q, want 1", m.file, n, m.old)
	}
	return strings.Replace(string(text), m.old, m.new, 1), nil
}

// try makes the change, runs the tests and takes the change back.
func (m mutation) try(ctx context.Context, dir string) error {
	path := filepath.Join(dir, m.file)
	original, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed, err := m.apply(dir)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(changed), 0o644); err != nil {
		return err
	}
	defer os.WriteFile(path, original, 0o644)
	if out, err := command(ctx, dir, "go", "vet", "./"+filepath.Dir(m.file)).CombinedOutput(); err != nil {
		return fmt.Errorf("does not compile: %w\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	out, err := command(ctx, dir, "go", "test", "-race", "-count=1", "-timeout=4m", "-run="+m.tests, m.pkg).CombinedOutput()
	if err == nil {
		return fmt.Errorf("UNNOTICED: %s, and %s in %s passes", m.promise, m.tests, m.pkg)
	}
	if !strings.Contains(string(out), "--- FAIL") && !strings.Contains(string(out), "panic:") && !strings.Contains(string(out), "DATA RACE") {
		return fmt.Errorf("the tests did not run: %w\n%s", err, out)
	}
	return nil
}

func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("not inside of the module")
		}
	}
}

// copyModule copies what tests can need: everything but the repository's history
// and what was built.
func copyModule(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel == ".git" || rel == "bin" {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		info, err := d.Info()
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, info.Mode().Perm())
	})
}
