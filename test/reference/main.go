// Command reference makes what is said about Holdfast from where it is defined: docs/metrics.md
// from the metrics, the manual pages and the scripts for shells from the commands, the schema of
// the configuration from its documentation and its loader, the dashboard from a list of panels.
//
//	go run ./test/reference -write
//
// writes all of it into the repository in which it is run; `make generate` does that. Without
// -write it prints docs/metrics.md.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"

	// What defines metrics.
	_ "holdfast/internal/proxy"
	_ "holdfast/internal/supervisor"
)

func main() {
	write := flag.Bool("write", false, "write all files into the repository")
	flag.Parse()
	if err := run(*write); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(write bool) error {
	if !write {
		_, err := os.Stdout.Write(reference())
		return err
	}
	repository := newTree(".")
	for _, f := range files {
		if err := os.MkdirAll(filepath.Dir(f.name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(f.name, f.make(repository), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// files are those that are made.
var files = []struct {
	name string
	make func(*tree) []byte
}{
	{"docs/metrics.md", func(*tree) []byte { return reference() }},
	{"deploy/holdfast.schema.json", configurationSchema},
	{"deploy/man/holdfast.1", manCommands},
	{"deploy/man/holdfast.toml.5", manConfiguration},
	{"deploy/completions/holdfast.bash", func(*tree) []byte { return bashCompletion() }},
	{"deploy/completions/_holdfast", func(*tree) []byte { return zshCompletion() }},
	{"deploy/completions/holdfast.fish", func(*tree) []byte { return fishCompletion() }},
	{"deploy/grafana/holdfast.json", func(*tree) []byte { return dashboard() }},
}

// A section is the metrics whose names begin with one of its prefixes and that no
// earlier section has.
type section struct {
	title, about string
	prefixes     []string
}

var sections = []section{
	{"Downstream", "Connections and requests of clients, by listener. Bytes of tunnels are counted with the tunnels.", []string{"downstream_"}},
	{"Routes", "A route is named as in the log: by its name, or the match that it has. Where a configuration has more than 1,000 routes, a route's series are not there from the start but from its first request on, and beyond 2,048 routes that had one, the others are counted together as `*`, of the virtual host `*`.", []string{"route_"}},
	{"Clusters and endpoints", "", []string{"cluster_", "endpoint_"}},
	{"Tunnels", "", []string{"tunnel", "loop_"}},
	{"Generations", "", []string{"generation"}},
	{"Successions of supervisors", "", []string{"supervisor_epoch", "supervisor_upgrades", "rendezvous_"}},
	{"Configuration and reloads", "", []string{"reload", "probation", "config", "listeners"}},
	{"Access log and log", "", []string{"access_log", "log_", "supervisor_log"}},
	{"The service", "`process_…`, `go_…` and `promhttp_metric_handler_errors_total`, which the Prometheus client library defines, are about the supervisor's own process and its answers to scrapes.", []string{""}},
}

func reference() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, intro, int(merge.Expiry.Minutes()), int(merge.Grace.Minutes()))
	left := metrics.Catalogue()
	for _, s := range sections {
		var rest, mine []*metrics.Desc
		for _, d := range left {
			if s.has(d.Name) {
				mine = append(mine, d)
			} else {
				rest = append(rest, d)
			}
		}
		left = rest
		s.print(&out, mine)
	}
	printBounds(&out)
	printModel(&out)
	return out.Bytes()
}

func (s *section) has(name string) bool {
	for _, p := range s.prefixes {
		if strings.HasPrefix(name, "holdfast_"+p) {
			return true
		}
	}
	return false
}

func (s *section) print(w io.Writer, all []*metrics.Desc) {
	fmt.Fprintf(w, "\n## %s\n\n", s.title)
	if s.about != "" {
		fmt.Fprintf(w, "%s\n\n", s.about)
	}
	fmt.Fprintln(w, "| metric | type | labels | of several generations | meaning |\n| --- | --- | --- | --- | --- |")
	for _, d := range all {
		labels := "`" + strings.Join(d.Labels, "`, `") + "`"
		if len(d.Labels) == 0 {
			labels = ""
		}
		fmt.Fprintf(w, "| `%s` | %s | %s | %s | %s |\n", d.Name, d.Type, labels, d.Merge, strings.ReplaceAll(d.Help, "|", `\|`))
	}
}

// printBounds lists the bounds of the histograms, which are fixed.
func printBounds(w io.Writer) {
	fmt.Fprint(w, "\n## Bounds of the histograms\n\nThey are fixed, so that the buckets of generations of any version can be added up.\n\n| metric | upper bounds |\n| --- | --- |\n")
	for _, d := range metrics.Catalogue() {
		if d.Type != metrics.TypeHistogram {
			continue
		}
		var bounds []string
		for _, b := range d.Bounds {
			bounds = append(bounds, strconv.FormatFloat(b, 'f', -1, 64))
		}
		fmt.Fprintf(w, "| `%s` | %s |\n", d.Name, strings.Join(bounds, ", "))
	}
}

const intro = `# Metrics

<!-- Made by: make generate -->

` + "`/metrics`" + ` on the command socket and at ` + "`admin.http`" + `, and ` + "`holdfast metrics`" + `, show what all generations together have counted, in the formats of
Prometheus:

    curl --unix-socket /run/holdfast/admin.sock http://localhost/metrics

Each generation counts in a memory file that the supervisor has made and reads. So what it had counted is not lost when one crashes, and **no counter ever
decreases**: what ended generations have counted stays in the sums. What happened in the last milliseconds before a death may be missing in
the sums, but requests and responses of listeners never are; bytes of tunnels are in their records in the access log.

That holds over upgrades of the supervisor and when it is killed, too. It counts in a memory file itself, and what ended generations have counted, and
the living ones by the last scrape, is in another one. The generations hold both, and so does systemd's descriptor store, so a successor goes on
from there. Counters begin at 0 only where nothing is left that holds them: when the supervisor and all generations are gone at the same time and there is no
descriptor store, and after a start of the machine. Gauges are about what is now; those about the last reload are handed on. ` + "`process_…`" + ` and
` + "`go_…`" + ` are about one process, and begin again with each supervisor.

How the figures of several generations become one stands beside each metric:

| of several generations | meaning |
| --- | --- |
| sum | the sum. Of counters and histograms with all that have ended, of gauges over the living ones |
| serving | that of the serving generation |
| max | the greatest one of a living generation |
| per generation | not merged: the label ` + "`generation`" + ` has its number. The series ends with the generation |

A generation that does not answer within 250 ms is shown with what it counts (which needs no answer) and with what it has measured last; ` +
	"`holdfast_generation_stale`" + ` is 1 for it then.

No label has a value that a client chooses. Series of a listener, route, cluster or endpoint that no living generation's configuration names any more are
shown for another %d minutes after the last of those generations has ended, and are then forgotten. Where they come back later they begin at 0. A successor of the
supervisor goes on with these minutes, but forgets nothing in its first %d: generations come back to it one after the other.

Generations may be of different versions. Where two define a metric in different ways, the definition of the supervisor holds, then that of the serving
generation; what cannot be added up is left out and counted in ` + "`holdfast_metrics_conflicts`" + `, which says where
a disagreement shows, not who is wrong. Of a histogram whose bounds differ the buckets with the old bounds disappear; its
count and its sum never decrease.
`
