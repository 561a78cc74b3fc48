package merge_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
)

// In all tests but that of the clock itself, series expire by the time that synctest fakes.
func TestMain(m *testing.M) {
	merge.SetClock(func() time.Duration { return time.Duration(time.Now().UnixNano()) })
	goleak.VerifyTestMain(m)
}

func counter(name string, labels ...string) *metrics.Desc {
	return &metrics.Desc{Name: name, Help: "Help.", Type: metrics.TypeCounter, Labels: labels}
}

func gauge(name string, kind metrics.Merge, labels ...string) *metrics.Desc {
	return &metrics.Desc{Name: name, Help: "Help.", Type: metrics.TypeGauge, Merge: kind, Labels: labels}
}

func histogram(name string, bounds ...float64) *metrics.Desc {
	return &metrics.Desc{Name: name, Help: "Help.", Type: metrics.TypeHistogram, Bounds: bounds}
}

// start adds a generation and returns what it counts in.
func start(t testing.TB, totals *merge.Totals, number int) (*metrics.Registry, *metrics.File) {
	t.Helper()
	f := add(t, totals, number, nil)
	fd, err := unix.Dup(f.FD())
	if err != nil {
		t.Fatal(err)
	}
	r, err := metrics.Open(fd)
	if err != nil {
		t.Fatal(err)
	}
	return r, f
}

// add adds a generation that has written these bytes.
func add(t testing.TB, totals *merge.Totals, number int, b []byte) *metrics.File {
	t.Helper()
	f, err := metrics.NewFile()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	write(t, f, 0, b)
	totals.Add(number, f)
	return f
}

func end(t testing.TB, totals *merge.Totals, number int) {
	t.Helper()
	totals.End(number)
	if err := totals.Settle(); err != nil {
		t.Fatal(err)
	}
}

// expose returns what a scrape gets.
func expose(t testing.TB, families []*dto.MetricFamily) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatalf("%s: %v", f.GetName(), err)
		}
	}
	return b.Bytes()
}

// values parses what a scrape gets and returns each line's value by its name and
// labels, the parts of a histogram as the format writes them.
func values(t testing.TB, families []*dto.MetricFamily) map[string]float64 {
	t.Helper()
	text := expose(t, families)
	parser := expfmt.NewTextParser(model.LegacyValidation)
	if _, err := parser.TextToMetricFamilies(bytes.NewReader(text)); err != nil {
		t.Fatalf("a scrape fails: %v\n%s", err, text)
	}
	out := make(map[string]float64)
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		line = strings.TrimSpace(line)
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if _, twice := out[line[:i]]; twice {
			t.Errorf("%s is there twice", line[:i])
		}
		out[line[:i]] = v
	}
	return out
}

// want compares the series of metrics whose names begin with prefix.
func want(t *testing.T, totals *merge.Totals, prefix string, lines ...string) {
	t.Helper()
	var got []string
	for name, v := range values(t, totals.Merge(nil, nil)) {
		if strings.HasPrefix(name, prefix) {
			got = append(got, fmt.Sprintf("%s %v", name, v))
		}
	}
	sort.Strings(got)
	sort.Strings(lines)
	if !slices.Equal(got, lines) {
		t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(lines, "\n\t"))
	}
}

// rises holds whether a series is one that never decreases.
func rises(families []*dto.MetricFamily, name string) bool {
	name, _, _ = strings.Cut(name, "{")
	for _, f := range families {
		n, ok := strings.CutPrefix(name, f.GetName())
		switch {
		case f.GetType() == dto.MetricType_COUNTER && ok && n == "":
			return true
		case f.GetType() == dto.MetricType_HISTOGRAM && ok && (n == "_bucket" || n == "_count" || n == "_sum"):
			return true
		}
	}
	return false
}

// wantRisen fails where something has decreased, or is gone, since an earlier scrape,
// and returns the new one.
func wantRisen(t *testing.T, before map[string]float64, families []*dto.MetricFamily) map[string]float64 {
	t.Helper()
	now := values(t, families)
	for name, v := range before {
		got, ok := now[name]
		if rises(families, name) && (!ok || got < v) || math.IsNaN(got) {
			t.Errorf("%s: %v, after %v", name, got, v)
		}
	}
	return now
}

// write puts other bytes into a generation's file.
func write(t testing.TB, f *metrics.File, at int64, b []byte) {
	t.Helper()
	if _, err := unix.Pwrite(f.FD(), b, at); err != nil {
		t.Fatal(err)
	}
}

// readFile returns what a generation has written by now.
func readFile(t testing.TB, f *metrics.File) []byte {
	t.Helper()
	head := make([]byte, 64)
	if _, err := unix.Pread(f.FD(), head, 0); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, binary.NativeEndian.Uint64(head[16:]))
	if _, err := unix.Pread(f.FD(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}
