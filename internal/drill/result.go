package drill

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"holdfast/internal/drill/canary"
)

// Result is what came of a drill. Its durations are nanoseconds in JSON.
type Result struct {
	Seed     uint64        `json:"seed"`
	Held     bool          `json:"held"` // the promise
	Duration time.Duration `json:"duration"`
	Rounds   int           `json:"rounds"`
	Kinds    []KindResult  `json:"kinds"`

	Kills     Kills         `json:"kills"`
	Changes   Changes       `json:"changes"`
	Seen      canary.Report `json:"seen"`               // by the canary, in the whole drill
	Mishaps   int           `json:"mishaps"`            // things that did not go as they should, whoever noticed
	Compared  int           `json:"counters_compared"`  // between two scrapes, all together
	Decreased int           `json:"counters_decreased"` // of these

	Broken []string `json:"broken,omitempty"` // where the promise did not hold: the first of it
	Files  string   `json:"files,omitempty"`  // the folder that is left then
}

// Changes are how often tunnels have come from one process to another, as the service has
// counted.
type Changes struct {
	Resumed int64 `json:"resumed"` // after a death
	Moved   int64 `json:"moved"`

	// Directions of resumed tunnels: all, and those of which bytes were found in a
	// buffer, in a pipe, or sent and still in the sender's queue.
	Flows    int64 `json:"flows"`
	Buffered int64 `json:"buffered"`
	Piped    int64 `json:"piped"`
	Peeked   int64 `json:"peeked"`
}

// changes are those that the counters tell of.
func (c counters) changes() Changes {
	found := func(what string) int64 { return int64(c[`holdfast_tunnel_recovered_flows_total{found="`+what+`"}`]) }
	t := Changes{Buffered: found("buffer"), Piped: found("pipe"), Peeked: found("peeked")}
	t.Flows = found("nothing") + t.Buffered + t.Piped + t.Peeked
	t.Resumed = int64(c["holdfast_tunnels_resumed_total"])
	t.Moved = int64(c[`holdfast_tunnels_moved_total{direction="in"}`])
	return t
}

// KindResult is what came of the rounds of one kind.
type KindResult struct {
	Kind   string        `json:"kind"`
	Rounds int           `json:"rounds"`
	Pauses canary.Pauses `json:"pauses"`
}

func newResult(seed uint64) *Result {
	r := &Result{Seed: seed, Held: true}
	for _, k := range kinds {
		r.Kinds = append(r.Kinds, KindResult{Kind: k.name})
	}
	return r
}

// What is described of all that breaks.
const (
	mostAtOnce = 4 // of one round
	mostBroken = 100
)

// wrong notes that the promise did not hold, and when.
func (r *Result) wrong(when string, what ...string) {
	if len(what) == 0 {
		return
	}
	r.Held = false
	if more := len(what) - mostAtOnce; more > 0 {
		what = append(slices.Clone(what[:mostAtOnce]), fmt.Sprintf("and %d more of this", more))
	}
	for _, w := range what {
		if len(r.Broken) < mostBroken {
			r.Broken = append(r.Broken, when+": "+w)
		}
	}
}

// mishap notes what went wrong although perhaps no client has noticed.
func (r *Result) mishap(when string, err error) {
	r.Mishaps++
	r.wrong(when, err.Error())
}

// see takes the canary's report since the one before.
func (r *Result) see(when string, report *canary.Report) {
	if report.Broken() > r.Seen.Broken() {
		r.Held = false
		r.wrong(when, report.Failures...)
	}
	worst := r.Seen.Pauses.Longest(report.Pauses)
	r.Seen = *report
	r.Seen.Pauses, r.Seen.Failures = worst, nil
}

// WriteJSON writes all of it.
func (r *Result) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteTable writes it for a person.
func (r *Result) WriteTable(out io.Writer) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%d rounds in %s, seed %d\n\n", r.Rounds, r.Duration.Round(time.Second), r.Seed)
	r.kindTable(&text)
	text.WriteByte('\n')
	r.brokenTable(&text)
	s := &r.Seen
	fmt.Fprintf(&text, "\n%s\n%s\n", &r.Kills, &r.Changes)
	fmt.Fprintf(&text, "With the killed ended, which is not in the table, %d requests and tunnels that were not open yet.\n", s.KilledRequests)
	if s.Tunnels > 0 && s.Lossy == 0 {
		text.WriteString("No segment was lost on purpose: this kernel permits that only with CAP_NET_ADMIN.\n")
	}
	if r.Held {
		text.WriteString("The promise held.\n")
	} else {
		text.WriteString("The promise did not hold:\n")
	}
	for _, b := range r.Broken {
		text.WriteString("  " + b + "\n")
	}
	_, err := io.WriteString(out, text.String())
	return err
}

func (c *Changes) String() string {
	return fmt.Sprintf("Tunnels went on in another process %d times, and were moved %d times. Of %d directions that went on, %d had bytes\n"+
		"in a buffer, %d in a pipe, and %d had bytes that were sent and not yet taken from the sender.",
		c.Resumed, c.Moved, c.Flows, c.Buffered, c.Piped, c.Peeked)
}

// kindTable says how often what was done, and the longest that it made anybody wait.
func (r *Result) kindTable(out io.Writer) {
	t := newTable(out)
	fmt.Fprintf(t, "%s\tROUNDS\tWORST PAUSE: CONNECTION\tREQUEST\tTUNNEL\t\n", first(""))
	for _, k := range r.Kinds {
		if k.Rounds == 0 {
			continue
		}
		p := k.Pauses
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t\n", first(k.Kind), k.Rounds, short(p.Connection), short(p.Request), short(p.Tunnel))
	}
	t.Flush()
}

// brokenTable says what was broken, and of how much.
func (r *Result) brokenTable(out io.Writer) {
	t := newTable(out)
	fmt.Fprintf(t, "%s\tBROKEN\tOF\t\n", first(""))
	s := &r.Seen
	for _, row := range []struct {
		what       string
		broken, of int64
	}{
		{"connections refused", s.Refused, s.Connections},
		{"requests failed", s.Failed, s.Requests},
		{"tunnels dropped", s.Dropped, s.Tunnels},
		{"bytes lost", s.Damage.Lost, s.Bytes},
		{"bytes doubled", s.Damage.Doubled, s.Bytes},
		{"bytes reordered", s.Damage.Reordered, s.Bytes},
		{"bytes changed", s.Damage.Changed, s.Bytes},
		{"counters decreased", int64(r.Decreased), int64(r.Compared)},
		{"rounds that went wrong otherwise", int64(r.Mishaps), int64(r.Rounds)},
	} {
		fmt.Fprintf(t, "%s\t%d\t%d\t\n", first(row.what), row.broken, row.of)
	}
	t.Flush()
}

func newTable(out io.Writer) *tabwriter.Writer {
	return tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
}

// first is a cell of the first column: that is aligned to the left, the others to the
// right.
func first(s string) string { return fmt.Sprintf("%-44s", s) }

func short(d time.Duration) string { return d.Round(time.Millisecond).String() }
