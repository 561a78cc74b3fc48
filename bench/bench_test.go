package main

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/bench/proc"
	"holdfast/bench/report"
)

// The run starts this binary again in other roles.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "role" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

const docs = "../docs"

// The tables are never edited by hand: each is what the run beside it comes to.
func TestPageShowsTheRunsBesideIt(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join(docs, "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := insertAll(docs, string(page))
	if err != nil {
		t.Fatal(err)
	}
	if want != string(page) {
		t.Error("the tables in docs/performance.md are not those of the runs beside it; try: go run ./bench -render docs")
	}
}

func TestPageNamesEveryFlagProxyAndMode(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join(docs, "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	for _, table := range tables {
		words = append(words, slices.Concat(table.proxies(), table.modes)...)
	}
	newCommandLine().flags.VisitAll(func(f *flag.Flag) { words = append(words, "-"+f.Name) })
	for _, w := range words {
		if !strings.Contains(string(page), "`"+w) {
			t.Errorf("docs/performance.md does not explain `%s`", w)
		}
	}
}

func TestChosen(t *testing.T) {
	t.Parallel()
	all := []string{"a", "b", "c"}
	for list, want := range map[string][]string{"": all, "a": {"a"}, "c,a": {"a", "c"}, "a,b,c": all} {
		if got, err := chosen(list, all); err != nil || !slices.Equal(got, want) {
			t.Errorf("of %s: %q, %v", list, got, err)
		}
	}
	for _, list := range []string{"d", "a,", "a,d", ","} {
		if got, err := chosen(list, all); err == nil {
			t.Errorf("of %q: %q", list, got)
		}
	}
}

// One small round of everything, with the proxies that need nothing to be built.
func TestRun(t *testing.T) {
	sizes := smoke
	sizes.Measured = report.Duration(50 * time.Millisecond)
	var temp string
	r, err := func() (*report.Run, error) {
		b, err := newBench(options{table: tables[0], proxies: []string{"httputil", "iocopy", direct}, modes: tables[0].modes, sizes: sizes, root: "..", command: "x"})
		if err != nil {
			return nil, err
		}
		temp = b.temp
		err = b.all()
		if clear := b.clear(); clear != nil {
			t.Error(clear)
		}
		return &b.run, err
	}()
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Failures) > 0 {
		t.Errorf("failures: %q", r.Failures)
	}
	for measure, proxies := range map[string][]string{
		"idle.private":   {"httputil", "iocopy"},
		"idle.left":      {"httputil", "iocopy"},
		"echo.few.cpu":   {"httputil", "iocopy"},
		"echo.many.rate": {"httputil", "iocopy", direct},
		"paced.p999":     {"httputil", "iocopy", direct},
		"bulk.one.rate":  {"httputil", "iocopy", direct},
		"bulk.few.cpu":   {"httputil", "iocopy"},
		"connect.rate":   {"httputil", "iocopy", direct},
		"crash.dropped":  {"httputil", "iocopy"},
		"reload.dropped": {},
	} {
		for _, p := range append(proxies, "") {
			want := 1
			if strings.HasPrefix(measure, "paced.") {
				want = pacedTimes
			}
			if got := len(r.Values[measure][p]); p != "" && got != want {
				t.Errorf("%s of %s has %d values", measure, p, got)
			}
		}
		if len(r.Values[measure]) != len(proxies) {
			t.Errorf("%s has values of %v, want of %v", measure, r.Values[measure], proxies)
		}
	}
	for _, p := range []string{"httputil", "iocopy"} {
		if dropped, _ := r.Median("crash.dropped", p); dropped != float64(sizes.Held) {
			t.Errorf("a crash of %s drops %v of %d tunnels", p, dropped, sizes.Held)
		}
		if cpu, _ := r.Median("echo.few.cpu", p); cpu <= 0 {
			t.Errorf("a round trip through %s costs %v", p, cpu)
		}
	}
	if _, err := os.Stat(temp); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", temp, err)
	}
	if family := proc.Family(os.Getpid()); len(family) != 1 {
		t.Errorf("processes are left: %+v", family[1:])
	}
}

func TestRunEndsWhenItIsInterrupted(t *testing.T) {
	b, err := newBench(options{table: tables[0], proxies: []string{"httputil"}, modes: tables[0].modes, sizes: smoke, root: "..", command: "x"})
	if err != nil {
		t.Fatal(err)
	}
	signals := make(chan os.Signal, 1)
	signals <- os.Interrupt
	b.interrupted = signals
	if err := b.all(); !errors.Is(err, errInterrupted) {
		t.Errorf("it ended with %v", err)
	}
	if err := b.clear(); err != nil {
		t.Error(err)
	}
	if family := proc.Family(os.Getpid()); len(family) != 1 {
		t.Errorf("processes are left: %+v", family[1:])
	}
}
