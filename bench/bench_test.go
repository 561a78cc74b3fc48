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

// A table that is asked for is taken, with a rate that its others have been measured at.
func TestCommandLineChoosesATable(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"performance": nil, "http": {"-http"}, "vault": {"-vault"}} {
		for _, extent := range []string{"-rounds=1", "-quick", "-smoke"} {
			c := newCommandLine()
			if err := c.flags.Parse(append(args, extent)); err != nil {
				t.Fatal(err)
			}
			o, err := c.options()
			if err != nil || o.table.name != name || !slices.Equal(o.modes, o.table.modes) || o.sizes.Rate > o.table.full.Rate {
				t.Errorf("%q %s: %+v, %v", args, extent, o, err)
			}
		}
	}
	c := newCommandLine()
	if err := c.flags.Parse([]string{"-http", "-vault"}); err != nil {
		t.Fatal(err)
	}
	if o, err := c.options(); err == nil {
		t.Errorf("two tables at once: %+v", o)
	}
}

// Each mode of a table is one that there is.
func TestTablesHaveModesThatThereAre(t *testing.T) {
	t.Parallel()
	for _, table := range tables {
		for _, name := range table.modes {
			if !slices.ContainsFunc(modes, func(m mode) bool { return m.name == name }) {
				t.Errorf("%s: there is no mode %s", table.name, name)
			}
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

// small is smaller yet than what -smoke runs.
func small() report.Sizes {
	sizes := smoke
	sizes.Measured = report.Duration(50 * time.Millisecond)
	return sizes
}

// runSmall runs one small round of a table, with the proxies that need nothing to be built,
// and looks that nothing is left of it.
func runSmall(t *testing.T, of *table) *report.Run {
	t.Helper()
	var temp string
	r, err := func() (*report.Run, error) {
		b, err := newBench(options{table: of, proxies: []string{"httputil", "iocopy", direct}, modes: of.modes, sizes: small(), root: "..", command: "x"})
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
	if _, err := os.Stat(temp); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", temp, err)
	}
	if family := proc.Family(os.Getpid()); len(family) != 1 {
		t.Errorf("processes are left: %+v", family[1:])
	}
	return r
}

// wantValues looks of which proxies a run has values, and how many.
func wantValues(t *testing.T, r *report.Run, want map[string][]string) {
	t.Helper()
	for measure, proxies := range want {
		values := 1
		if strings.Contains(measure, "paced.") {
			values = pacedTimes
		}
		for _, p := range proxies {
			if got := len(r.Values[measure][p]); got != values {
				t.Errorf("%s of %s has %d values", measure, p, got)
			}
		}
		if len(r.Values[measure]) != len(proxies) {
			t.Errorf("%s has values of %v, want of %v", measure, r.Values[measure], proxies)
		}
	}
}

func TestRun(t *testing.T) {
	r := runSmall(t, tables[0])
	proxies := []string{"httputil", "iocopy"}
	all := append(proxies, direct)
	wantValues(t, r, map[string][]string{
		"idle.private":   proxies,
		"idle.left":      proxies,
		"echo.few.cpu":   proxies,
		"echo.many.rate": all,
		"paced.p999":     all,
		"bulk.one.rate":  all,
		"bulk.few.cpu":   proxies,
		"connect.rate":   all,
		"crash.dropped":  proxies,
		"reload.dropped": {},
	})
	for _, p := range proxies {
		if dropped, _ := r.Median("crash.dropped", p); dropped != float64(small().Held) {
			t.Errorf("a crash of %s drops %v of %d tunnels", p, dropped, small().Held)
		}
		if cpu, _ := r.Median("echo.few.cpu", p); cpu <= 0 {
			t.Errorf("a round trip through %s costs %v", p, cpu)
		}
	}
}

func TestRunOfRequests(t *testing.T) {
	r := runSmall(t, tables[1])
	proxies := []string{"httputil", "iocopy"}
	all := append(proxies, direct)
	// Of what takes long there may be none in so short a time: that has a rate, of 0, and no
	// CPU time.
	wantValues(t, r, map[string][]string{
		"http.small.few.cpu":   proxies,
		"http.small.few.rate":  all,
		"http.small.many.rate": all,
		"http.16k.few.rate":    all,
		"http.16k.many.rate":   all,
		"http.1m.few.rate":     all,
		"http.1m.many.rate":    all,
		"http.paced.p50":       all,
		"http.paced.p99":       all,
		"http.paced.cpu":       proxies,
		"http.conns.rate":      all,
		"connect.rate":         all,
		"http.idle.pss":        proxies,
		"echo.few.cpu":         {},
	})
	for _, p := range all {
		if rate, _ := r.Median("http.small.few.rate", p); rate <= 0 {
			t.Errorf("%v small answers a second through %s", rate, p)
		}
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
