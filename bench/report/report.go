// Package report keeps what a run has measured and writes it as a table.
package report

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"
)

// A Run is all that one run has found out. The table on the page is made from it, and
// from nothing else.
type Run struct {
	Command string    `json:"command"`
	Began   time.Time `json:"began"`
	Took    Duration  `json:"took"`
	Machine Machine   `json:"machine"`
	Sizes   Sizes     `json:"sizes"`
	Proxies []Proxy   `json:"proxies"`

	// Reference names the one with which the others are compared; empty: Holdfast.
	Reference string `json:"reference,omitempty"`

	Missing []Missing `json:"missing,omitempty"`

	// Failures are measurements that did not come about, in words.
	Failures []string `json:"failures,omitempty"`

	// Values has, by measure and proxy, one value for each round.
	Values map[string]map[string][]float64 `json:"values"`
}

// A Machine is where it ran.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory int64  `json:"memory"` // bytes
	Go     string `json:"go"`

	Busy   float64 `json:"busy"`   // share of the cores' time that others took, just before the run
	Stolen float64 `json:"stolen"` // share that the host of a virtual machine took during the run
}

// Sizes say how much load was made.
type Sizes struct {
	Idle     int      `json:"idle"` // tunnels, as many others
	Few      int      `json:"few"`
	Many     int      `json:"many"`
	Rate     int      `json:"rate"`    // messages a second
	Message  int      `json:"message"` // bytes
	Held     int      `json:"held"`    // tunnels that are open over reloads and crashes
	Reloads  int      `json:"reloads"`
	Rounds   int      `json:"rounds"`
	Slow     int      `json:"slow"` // rounds of what starts a proxy anew
	Measured Duration `json:"measured"`
	Settle   Duration `json:"settle"`
}

// A Proxy is one that was measured.
type Proxy struct {
	Name    string `json:"name"`
	Title   string `json:"title"`
	Version string `json:"version,omitempty"`
	Note    string `json:"note,omitempty"`
}

// A Missing is one that could not be measured, and why.
type Missing struct {
	Title string `json:"title"`
	Why   string `json:"why"`
}

// A Duration is written as in Go: "2s".
type Duration time.Duration

func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

func (d *Duration) UnmarshalText(b []byte) error {
	parsed, err := time.ParseDuration(string(b))
	*d = Duration(parsed)
	return err
}

// Add notes a value of a round.
func (r *Run) Add(measure, proxy string, value float64) {
	if !slices.ContainsFunc(measures, func(m line) bool { return m.key == measure }) {
		panic(fmt.Sprintf("report: no line of the table is for %q", measure))
	}
	if r.Values == nil {
		r.Values = map[string]map[string][]float64{}
	}
	if r.Values[measure] == nil {
		r.Values[measure] = map[string][]float64{}
	}
	r.Values[measure][proxy] = append(r.Values[measure][proxy], value)
}

// Median returns the median of a proxy's rounds. Of an even number it is the mean of
// the two in the middle.
func (r *Run) Median(measure, proxy string) (float64, bool) {
	all := slices.Clone(r.Values[measure][proxy])
	if len(all) == 0 {
		return 0, false
	}
	slices.Sort(all)
	return (all[(len(all)-1)/2] + all[len(all)/2]) / 2, true
}

// Read reads a run from a file.
func Read(name string) (*Run, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	r := &Run{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// Write writes the run to a file.
func (r *Run) Write(name string) error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(text, '\n'), 0o644)
}
