// Command mutations shows that the promises of Holdfast are kept by tests: each
// mutation is a small change that breaks one of them, and the tests that it names
// must then fail.
//
//	go run ./test/mutations            # all of them
//	go run ./test/mutations 3 7        # those of the third and the seventh invariant
//	go run ./test/mutations NAME …     # some
//	go run ./test/mutations -list
//
// The mutations stand in list.go, grouped by the invariants of docs/architecture.md.
// A mutation names the quickest tests that must notice it. These are first run
// without any mutation, because a test that fails anyway notices nothing; then once
// for each mutation, in copies of the module in a temporary directory, some at the
// same time (-j). A test that hangs has noticed too, when its time is over.
//
// The exit code is 1 if a mutation goes unnoticed, does not compile or does not
// apply any more, or if its tests fail without it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// limit bounds the tests of one mutation. They take seconds where they notice as
// they should; only those that hang need all of it.
const limit = time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	list := flag.Bool("list", false, "say what there is and run nothing")
	workers := flag.Int("j", runtime.GOMAXPROCS(0), "how many to try at the same time")
	flag.Parse()
	chosen, err := choose(flag.Args())
	switch {
	case err != nil:
	case *list:
		show(chosen)
	default:
		err = run(ctx, chosen, max(*workers, 1))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutations:", err)
		os.Exit(1)
	}
}

// group is an invariant with the mutations that break it.
type group struct {
	invariant string
	mutations []mutation
}

// mutation replaces old by new in file, which must break the promise and make the
// tests of the package fail.
type mutation struct {
	name     string
	promise  string // what is broken
	file     string // below internal
	old, new string // old stands in the file once
	pkg      string // of the tests; "" is the file's
	tests    string // names of tests and their subtests, "|" between them
}

// dir is the folder of the tests.
func (m *mutation) dir() string {
	if m.pkg != "" {
		return m.pkg
	}
	return filepath.Dir(m.path())
}

func (m *mutation) path() string { return filepath.Join("internal", m.file) }

// choose returns the groups with those mutations that were asked for, by name or by
// the number of their group; all without a wish.
func choose(wishes []string) ([]group, error) {
	if len(wishes) == 0 {
		return all, nil
	}
	met := map[string]bool{}
	var chosen []group
	for i, g := range all {
		number := strconv.Itoa(i + 1)
		wanted := func(m mutation) bool {
			for _, wish := range []string{number, m.name} {
				if slices.Contains(wishes, wish) {
					met[wish] = true
					return true
				}
			}
			return false
		}
		some := group{invariant: g.invariant}
		for _, m := range g.mutations {
			if wanted(m) {
				some.mutations = append(some.mutations, m)
			}
		}
		if len(some.mutations) > 0 {
			chosen = append(chosen, some)
		}
	}
	for _, wish := range wishes {
		if !met[wish] {
			return nil, fmt.Errorf("no mutation is called %s; -list shows all", wish)
		}
	}
	return chosen, nil
}

func show(groups []group) {
	for _, g := range groups {
		fmt.Println(g.invariant)
		for _, m := range g.mutations {
			fmt.Printf("  %-36s %s\n", m.name, m.promise)
		}
	}
}

// outcome is what became of one mutation.
type outcome struct {
	by   string // the test that noticed
	took time.Duration
	err  error
}

// run makes every change, some at a time, and reports them in their order.
func run(ctx context.Context, groups []group, workers int) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	base, err := os.MkdirTemp("", "mutations")
	if err != nil {
		return err
	}
	defer os.RemoveAll(base)
	var working sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer working.Wait()
	defer cancel()

	type job struct {
		mutation
		done chan<- outcome
	}
	jobs := make(chan job)
	for i := range workers {
		dir := filepath.Join(base, strconv.Itoa(i))
		if err := copyModule(root, dir); err != nil {
			return err
		}
		if i == 0 {
			if err := unchanged(ctx, dir, groups); err != nil {
				return err
			}
		}
		working.Go(func() {
			for j := range jobs {
				start := time.Now()
				by, err := j.try(ctx, dir)
				j.done <- outcome{by, time.Since(start), err}
			}
		})
	}
	var done []chan outcome
	for _, g := range groups {
		for range g.mutations {
			done = append(done, make(chan outcome, 1))
		}
	}
	working.Go(func() {
		defer close(jobs)
		next := 0
		for _, g := range groups {
			for _, m := range g.mutations {
				select {
				case jobs <- job{m, done[next]}:
				case <-ctx.Done():
					return
				}
				next++
			}
		}
	})
	return report(ctx, groups, done)
}

// report prints what became of the mutations, which come from done in their order.
func report(ctx context.Context, groups []group, done []chan outcome) error {
	began, noticed := time.Now(), 0
	var failed []string
	for _, g := range groups {
		fmt.Println(g.invariant)
		for _, m := range g.mutations {
			var o outcome
			select {
			case o = <-done[noticed+len(failed)]:
			case <-ctx.Done():
				return ctx.Err()
			}
			if o.err != nil {
				failed = append(failed, m.name)
				fmt.Printf("  FAIL  %-36s %v\n", m.name, o.err)
				continue
			}
			noticed++
			fmt.Printf("  ok    %-36s %5.1fs  %s\n", m.name, o.took.Seconds(), o.by)
		}
	}
	fmt.Printf("%d mutations were noticed, %d were not, in %s\n", noticed, len(failed), time.Since(began).Round(time.Second))
	if len(failed) > 0 {
		return fmt.Errorf("not noticed as they should be: %s", strings.Join(failed, " "))
	}
	return nil
}

// unchanged runs the tests that all of the mutations name on the code as it is.
func unchanged(ctx context.Context, dir string, groups []group) error {
	named := map[string][]string{} // by folder
	for _, g := range groups {
		for _, m := range g.mutations {
			for test := range strings.SplitSeq(m.tests, "|") {
				if !slices.Contains(named[m.dir()], test) {
					named[m.dir()] = append(named[m.dir()], test)
				}
			}
		}
	}
	for pkg, tests := range named {
		if out, err := goTest(ctx, dir, pkg, tests); err != nil {
			return fmt.Errorf("without any mutation the tests of %s fail: %w\n%s", pkg, err, out)
		}
	}
	return ctx.Err()
}

// apply returns the file's text with the change in it.
func (m *mutation) apply(root string) (string, error) {
	text, err := os.ReadFile(filepath.Join(root, m.path()))
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(text), m.old); n != 1 {
		return "", fmt.Errorf("%s has %d places like %q, want 1", m.path(), n, m.old)
	}
	return strings.Replace(string(text), m.old, m.new, 1), nil
}

// try makes the change, runs the tests and takes the change back. It returns the
// test that noticed first.
func (m *mutation) try(ctx context.Context, dir string) (by string, err error) {
	path := filepath.Join(dir, m.path())
	original, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	changed, err := m.apply(dir)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(path, []byte(changed), 0o644); err != nil {
		return "", err
	}
	defer os.WriteFile(path, original, 0o644)
	if out, err := command(ctx, dir, "go", "build", "./"+filepath.Dir(m.path())).CombinedOutput(); err != nil {
		return "", fmt.Errorf("does not compile: %w\n%s", err, out)
	}
	out, err := goTest(ctx, dir, m.dir(), strings.Split(m.tests, "|"))
	if err == nil {
		return "", fmt.Errorf("UNNOTICED by %s in %s: %s", m.tests, m.dir(), m.promise)
	}
	if by = culprit(string(out)); by == "" {
		return "", fmt.Errorf("the tests did not run: %w\n%s", err, out)
	}
	return by, nil
}

var failure = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)

// culprit says from the output of go test which test has failed: the last of the
// first lines that name it, which is the innermost subtest.
func culprit(out string) string {
	if m := failure.FindAllStringSubmatch(out, -1); m != nil {
		by := m[0][1]
		for _, more := range m[1:] {
			if strings.HasPrefix(more[1], by+"/") {
				by = more[1]
			}
		}
		return by
	}
	if strings.Contains(out, "test timed out") {
		return "a hang"
	}
	if strings.Contains(out, "panic:") || strings.Contains(out, "fatal error:") {
		return "a panic"
	}
	if strings.Contains(out, "goleak: Errors") {
		return "goleak"
	}
	return ""
}

// goTest runs some tests, given by their names. The race detector is left out: what
// it alone notices would be luck, and without it everything is built much sooner.
func goTest(ctx context.Context, dir, pkg string, tests []string) ([]byte, error) {
	args := []string{"test", "-vet=off", "-count=1", "-failfast", "-timeout=" + limit.String(), "-run=" + pattern(tests), "./" + pkg}
	ctx, cancel := context.WithTimeout(ctx, 2*limit) // for building, too
	defer cancel()
	return command(ctx, dir, "go", args...).CombinedOutput()
}

// pattern is what go test -run takes, where "|" binds weaker than "/".
func pattern(tests []string) string {
	var all []string
	for _, t := range tests {
		top, sub, ok := strings.Cut(t, "/")
		p := "^" + top + "$"
		if ok {
			p += "/" + strings.ReplaceAll(regexp.QuoteMeta(sub), " ", "_")
		}
		all = append(all, p)
	}
	return strings.Join(all, "|")
}

func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // a process that a test started may hold the pipe
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
