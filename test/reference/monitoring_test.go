package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/metrics"
)

var (
	selector   = regexp.MustCompile(`\b((?:holdfast|process)_[a-z0-9_]+|up\b)(?:\{([^{}]*)\})?`)
	matcher    = regexp.MustCompile(`([a-zA-Z_]+)\s*(?:=~|!~|!=|=)\s*"[^"]*"`)
	aggregated = regexp.MustCompile(`\b(?:by|without|on|ignoring)\s*\(([^()]*)\)`)
	legend     = regexp.MustCompile(`\{\{\s*(?:\$labels\.|with \$labels\.)?([a-z_]+)\s*\}\}`)
)

// foreign are series that others define, with the labels that they have.
var foreign = []string{"up", "process_open_fds", "process_max_fds", "process_resident_memory_bytes", "process_cpu_seconds_total"}

// labelsOf is what a series of that name can have, if docs/metrics.md has the metric.
func labelsOf(name string) (labels []string, ok bool) {
	labels = []string{"job", "instance"}
	if slices.Contains(foreign, name) {
		return labels, true
	}
	for _, d := range metrics.Catalogue() {
		series, isHistogram := name, d.Type == metrics.TypeHistogram
		if isHistogram {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				series = strings.TrimSuffix(series, suffix)
			}
			if series == name {
				continue
			}
		}
		if d.Name != series || !strings.Contains(repository.read("docs/metrics.md"), "| `"+series+"` |") {
			continue
		}
		labels = append(labels, d.Labels...)
		if d.Merge == metrics.PerGeneration {
			labels = append(labels, "generation")
		}
		if strings.HasSuffix(name, "_bucket") {
			labels = append(labels, "le")
		}
		return labels, true
	}
	return labels, false
}

// checkExpression finds metrics that do not exist, labels that they do not have, and brackets that
// are not closed. It returns the labels that are there.
func checkExpression(expr string) (have []string, problems []string) {
	for _, m := range selector.FindAllStringSubmatch(expr, -1) {
		labels, ok := labelsOf(m[1])
		if !ok {
			problems = append(problems, "there is no "+m[1])
		}
		have = append(have, labels...)
		for _, l := range matcher.FindAllStringSubmatch(m[2], -1) {
			if !slices.Contains(labels, l[1]) {
				problems = append(problems, m[1]+" has no label "+l[1])
			}
		}
	}
	if have == nil {
		problems = append(problems, "no metric is used")
	}
	for _, m := range aggregated.FindAllStringSubmatch(expr, -1) {
		for l := range strings.SplitSeq(m[1], ",") {
			if l = strings.TrimSpace(l); !slices.Contains(have, l) {
				problems = append(problems, "nothing has the label "+l)
			}
		}
	}
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(expr, pair[:1]) != strings.Count(expr, pair[1:]) {
			problems = append(problems, "a bracket is missing: "+pair)
		}
	}
	return have, problems
}

func TestExpressionsAreChecked(t *testing.T) {
	t.Parallel()
	for expr, want := range map[string]string{
		`holdfast_ready == 0`: "",
		`holdfast_redy == 0`:  "there is no holdfast_redy",
		`sum by (le) (rate(holdfast_cluster_connect_duration_seconds_bucket[5m]))`: "",
		`holdfast_cluster_connect_duration_seconds > 1`:                            "there is no holdfast_cluster_connect_duration_seconds",
		`holdfast_ready{listener="x"}`:                                             "holdfast_ready has no label listener",
		`sum by (cluster) (holdfast_ready)`:                                        "nothing has the label cluster",
		`sum by (instance) (holdfast_generation_tunnels{generation="3"}`:           "a bracket is missing: ()",
		`vector(1)`: "no metric is used",
		`holdfast_downstream_responses_total{class="5xx",instance=~"a",listener="b"}`: "",
	} {
		if _, problems := checkExpression(expr); strings.Join(problems, ", ") != want {
			t.Errorf("%s: %q, want %q", expr, problems, want)
		}
	}
}

func TestTheDashboardShowsWhatThereIs(t *testing.T) {
	t.Parallel()
	check := func(what, expr, text string) {
		t.Helper()
		have, problems := checkExpression(expr)
		for _, p := range problems {
			t.Errorf("%s: %s in %s", what, p, expr)
		}
		if shown := aggregated.FindAllStringSubmatch(expr, -1); len(shown) > 0 && strings.Contains(expr, " by (") {
			have = strings.Split(strings.ReplaceAll(shown[0][1], " ", ""), ",")
		}
		for _, m := range legend.FindAllStringSubmatch(text, -1) {
			if !slices.Contains(have, m[1]) {
				t.Errorf("%s: %q has a label that %s lacks", what, text, expr)
			}
		}
		if strings.Contains(strings.NewReplacer("$instance", "", "$listener", "", "$cluster", "", "$__rate_interval", "").Replace(expr), "$") {
			t.Errorf("%s: a variable is not there in %s", what, expr)
		}
	}
	used := map[string]bool{}
	for _, r := range rows {
		for _, p := range r.panels {
			if used[p.title] {
				t.Errorf("two panels are called %s", p.title)
			}
			used[p.title] = true
			for _, q := range p.show {
				check(p.title, promQL(q.expr), q.legend)
			}
		}
	}
	for _, a := range annotations {
		check(a.name, promQL(a.expr), a.title)
	}
	for _, v := range variables {
		check(v.name, promQL(v.values), "")
	}
}

// Grafana takes what it has a panel for, and places that do not overlap.
func TestTheDashboardIsOfPartsThatGrafanaHas(t *testing.T) {
	t.Parallel()
	var d struct {
		Panels []struct {
			ID      int
			Type    string
			GridPos struct{ X, Y, W, H int }
		}
	}
	if err := json.Unmarshal([]byte(repository.read("deploy/grafana/holdfast.json")), &d); err != nil {
		t.Fatal(err)
	}
	taken, ids := map[string]int{}, map[int]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("two panels are number %d", p.ID)
		}
		ids[p.ID] = true
		if !slices.Contains([]string{"row", "timeseries", "stat", "bargauge"}, p.Type) {
			t.Errorf("panel %d is a %s", p.ID, p.Type)
		}
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := fmt.Sprint(p.GridPos.X+x, " ", p.GridPos.Y+y)
				if other := taken[at]; other != 0 || p.GridPos.X+x >= 24 {
					t.Fatalf("panel %d is where %d is, or beyond the edge", p.ID, other)
				}
				taken[at] = p.ID
			}
		}
	}
}

// alerts are the rules with their lines by key.
func alerts() (all []map[string]string) {
	for line := range strings.Lines(repository.read("deploy/prometheus/holdfast.rules.yml")) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if key == "- alert" {
			all = append(all, map[string]string{})
		}
		if ok && len(all) > 0 {
			all[len(all)-1][strings.TrimPrefix(key, "- ")] = value
		}
	}
	return all
}

func TestAlertsAreAboutWhatThereIs(t *testing.T) {
	t.Parallel()
	page := repository.read("docs/monitoring.md")
	headings := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^#+ (.*)$").FindAllStringSubmatch(page, -1) {
		headings[anchor(m[1])] = true
	}
	names := map[string]bool{}
	for _, a := range alerts() {
		name := a["alert"]
		if names[name] {
			t.Errorf("%s is there twice", name)
		}
		names[name] = true
		have, problems := checkExpression(a["expr"])
		for _, p := range problems {
			t.Errorf("%s: %s in %s", name, p, a["expr"])
		}
		if shown := aggregated.FindStringSubmatch(a["expr"]); shown != nil && strings.HasPrefix(a["expr"], "sum by") {
			have = strings.Split(strings.ReplaceAll(shown[1], " ", ""), ",")
		}
		for _, key := range []string{"summary", "description", "runbook", "labels"} {
			if a[key] == "" {
				t.Errorf("%s has no %s", name, key)
			}
			for _, m := range legend.FindAllStringSubmatch(a[key], -1) {
				if m[1] != "end" && !slices.Contains(have, m[1]) {
					t.Errorf("%s: %s has the label %s, which %s lacks", name, key, m[1], a["expr"])
				}
			}
		}
		at, ok := strings.CutPrefix(a["runbook"], "docs/monitoring.md#")
		if !ok || !headings[at] || at != anchor(name) {
			t.Errorf("%s: nothing stands at %s", name, a["runbook"])
		}
		delete(headings, at)
	}
	if len(names) < 20 {
		t.Errorf("there are only %d alerts", len(names))
	}
	for _, h := range slices.Sorted(maps.Keys(headings)) {
		if strings.HasPrefix(h, "holdfast") {
			t.Errorf("docs/monitoring.md has %s, of which there is no alert", h)
		}
	}
}

// anchor is how a heading is linked to.
func anchor(heading string) string {
	return strings.ReplaceAll(strings.ToLower(regexp.MustCompile(`[^A-Za-z0-9 _-]`).ReplaceAllString(heading, "")), " ", "-")
}

// Prometheus itself has nothing against the rules, the tests of them pass, and it understands all
// that the dashboard asks for. That is tried where promtool is: the package that has it is a
// hundred megabytes with a service.
func TestPrometheusTakesTheRules(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("promtool is not there")
	}
	var queries strings.Builder
	queries.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	for _, r := range rows {
		for _, p := range r.panels {
			for _, q := range p.show {
				expr := strings.ReplaceAll(promQL(q.expr), "$__rate_interval", "5m")
				fmt.Fprintf(&queries, "      - record: x%d\n        expr: %q\n", queries.Len(), expr)
			}
		}
	}
	ofDashboard := filepath.Join(t.TempDir(), "dashboard.yml")
	if err := os.WriteFile(ofDashboard, []byte(queries.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "rules", "holdfast.rules.yml"},
		{"test", "rules", "holdfast.rules.test.yml"},
		{"check", "rules", ofDashboard},
	} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = "../../deploy/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %q: %v\n%s", args, err, out)
		}
	}
}

// Whoever is woken by an alert finds what the page sends them to.
func TestLinksOfTheMonitoringPageLeadSomewhere(t *testing.T) {
	t.Parallel()
	for _, m := range regexp.MustCompile(`\]\(([a-z]*\.?m?d?)#([^)]*)\)`).FindAllStringSubmatch(repository.read("docs/monitoring.md"), -1) {
		page := repository.read("docs/" + cmp.Or(m[1], "monitoring.md"))
		if !slices.ContainsFunc(strings.Split(page, "\n"), func(line string) bool {
			return strings.HasPrefix(line, "#") && anchor(strings.TrimLeft(line, "# ")) == m[2]
		}) {
			t.Errorf("nothing stands at %s#%s", m[1], m[2])
		}
	}
}
