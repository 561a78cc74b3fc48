package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// A mutation that does not apply any more shows nothing; running them takes too
// long for every test run, but this can be seen at once.
func TestEveryMutationApplies(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	tests := map[string]string{}
	for _, g := range all {
		for _, m := range g.mutations {
			if names[m.name] {
				t.Errorf("two mutations are called %s", m.name)
			}
			names[m.name] = true
			if text, err := m.apply(root); err != nil {
				t.Errorf("%s: %v", m.name, err)
			} else if text == "" || m.promise == "" || m.tests == "" || m.old == m.new {
				t.Errorf("%s is incomplete", m.name)
			}
			if tests[m.dir()] == "" {
				tests[m.dir()] = testsOf(t, filepath.Join(root, m.dir()))
			}
			for test := range strings.SplitSeq(m.tests, "|") {
				top, _, _ := strings.Cut(test, "/")
				if !strings.Contains(tests[m.dir()], "func "+top+"(") {
					t.Errorf("%s: %s has no %s", m.name, m.dir(), top)
				}
			}
		}
	}
}

// testsOf returns the text of all tests of a folder.
func testsOf(t *testing.T, dir string) string {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	return all.String()
}

// The groups are the invariants that the documentation promises, in its order and
// its words; what else is promised stands behind them.
func TestEveryInvariantIsBroken(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "## Invariants\n")
	section, _, _ = strings.Cut(section, "\n## ")
	found := 0
	for line := range strings.Lines(section) {
		number, _, ok := strings.Cut(line, ". ")
		if _, err := strconv.Atoi(number); !ok || err != nil {
			continue
		}
		if found >= len(all) || all[found].invariant != strings.TrimSpace(line) || len(all[found].mutations) == 0 {
			t.Errorf("nothing breaks %q", strings.TrimSpace(line))
		}
		found++
	}
	if found == 0 {
		t.Error("the documentation has no invariants")
	}
}
