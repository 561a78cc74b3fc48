package metrics_test

import (
	"math"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/metrics"
)

var (
	requests = metrics.Define(metrics.Desc{
		Name: "holdfast_test_requests_total", Help: "Requests.", Type: metrics.TypeCounter, Labels: []string{"listener", "code"},
	})
	connections = metrics.Define(metrics.Desc{
		Name: "holdfast_test_connections", Help: "Connections.", Type: metrics.TypeGauge, Merge: metrics.Max,
	})
	duration = metrics.Define(metrics.Desc{
		Name: "holdfast_test_duration_seconds", Help: "How long it takes.", Type: metrics.TypeHistogram, Unit: metrics.Seconds,
		Labels: []string{"route"}, Bounds: []float64{0.005, 0.3, 2.5},
	})
	size = metrics.Define(metrics.Desc{
		Name: "holdfast_test_body_bytes", Help: "How long bodies are.", Type: metrics.TypeHistogram, Bounds: []float64{0, 1.5, 1e30},
	})
)

func defines(d metrics.Desc) (refusal string) {
	defer func() {
		if p := recover(); p != nil {
			refusal = p.(string)
		}
	}()
	metrics.Define(d)
	return ""
}

func TestADefinitionThatWouldBreakAScrapeIsRefused(t *testing.T) {
	t.Parallel()
	good := metrics.Desc{Name: "holdfast_test_good", Help: "Good.", Type: metrics.TypeGauge, Labels: []string{"a"}}
	histogram := metrics.Desc{Name: "holdfast_test_good_bytes", Help: "Good.", Type: metrics.TypeHistogram, Bounds: []float64{1}}
	for name, change := range map[string]func(*metrics.Desc){
		"no prefix":                    func(d *metrics.Desc) { d.Name = "requests" },
		"nothing but the prefix":       func(d *metrics.Desc) { d.Name = "holdfast_" },
		"capitals":                     func(d *metrics.Desc) { d.Name = "holdfast_Requests" },
		"a line break in the name":     func(d *metrics.Desc) { d.Name = "holdfast_x\n" },
		"a colon":                      func(d *metrics.Desc) { d.Name = "holdfast_a:b" },
		"a name without an end":        func(d *metrics.Desc) { d.Name += strings.Repeat("x", 128) },
		"a bucket of something else":   func(d *metrics.Desc) { d.Name = "holdfast_x_bucket" },
		"a count of something else":    func(d *metrics.Desc) { d.Name = "holdfast_x_count" },
		"a sum of something else":      func(d *metrics.Desc) { d.Name = "holdfast_x_sum" },
		"a time of something else":     func(d *metrics.Desc) { d.Name = "holdfast_x_created" },
		"a gauge with _total":          func(d *metrics.Desc) { d.Name += "_total" },
		"a counter without _total":     func(d *metrics.Desc) { d.Type = metrics.TypeCounter },
		"seconds without a unit":       func(d *metrics.Desc) { d.Name += "_seconds" },
		"a unit without seconds":       func(d *metrics.Desc) { d.Unit = metrics.Seconds },
		"no help":                      func(d *metrics.Desc) { d.Help = "" },
		"help that is not UTF-8":       func(d *metrics.Desc) { d.Help = "\xff" },
		"help without an end":          func(d *metrics.Desc) { d.Help = strings.Repeat("x", 513) },
		"an unknown type":              func(d *metrics.Desc) { d.Type = 3 },
		"an unknown merge kind":        func(d *metrics.Desc) { d.Merge = 4 },
		"an unknown unit":              func(d *metrics.Desc) { d.Unit = 2; d.Name += "_seconds" },
		"bounds of a gauge":            func(d *metrics.Desc) { d.Bounds = []float64{1} },
		"the label generation":         func(d *metrics.Desc) { d.Labels = []string{"generation"} },
		"the label le":                 func(d *metrics.Desc) { d.Labels = []string{"le"} },
		"the label quantile":           func(d *metrics.Desc) { d.Labels = []string{"quantile"} },
		"a label of Prometheus' own":   func(d *metrics.Desc) { d.Labels = []string{"__name__"} },
		"a label that is not a name":   func(d *metrics.Desc) { d.Labels = []string{"a-b"} },
		"an empty label":               func(d *metrics.Desc) { d.Labels = []string{""} },
		"a label without an end":       func(d *metrics.Desc) { d.Labels = []string{strings.Repeat("x", 129)} },
		"a label twice":                func(d *metrics.Desc) { d.Labels = []string{"a", "b", "a"} },
		"nine labels":                  func(d *metrics.Desc) { d.Labels = strings.Split("abcdefghi", "") },
		"a counter that is the newest": func(d *metrics.Desc) { d.Type, d.Merge, d.Name = metrics.TypeCounter, metrics.Max, d.Name+"_total" },
		"a histogram of one": func(d *metrics.Desc) {
			*d = histogram
			d.Merge = metrics.Serving
		},
		"no bounds":                func(d *metrics.Desc) { *d = histogram; d.Bounds = nil },
		"bounds that do not rise":  func(d *metrics.Desc) { *d = histogram; d.Bounds = []float64{1, 1} },
		"an infinite bound":        func(d *metrics.Desc) { *d = histogram; d.Bounds = []float64{1, math.Inf(1)} },
		"a bound that is nothing":  func(d *metrics.Desc) { *d = histogram; d.Bounds = []float64{math.NaN()} },
		"a negative bound":         func(d *metrics.Desc) { *d = histogram; d.Bounds = []float64{-1, 1} },
		"bounds without an end":    func(d *metrics.Desc) { *d = histogram; d.Bounds = rising(65) },
		"a name that is there":     func(d *metrics.Desc) { d.Name = connections.Name },
		"a name without its total": func(d *metrics.Desc) { d.Name = "holdfast_test_requests" },
	} {
		d := good
		change(&d)
		if refusal := defines(d); refusal == "" {
			t.Errorf("%s: taken", name)
		} else if !strings.HasPrefix(refusal, "metric ") {
			t.Errorf("%s: %s", name, refusal)
		}
	}
	histogram.Bounds = rising(64)
	for _, d := range []metrics.Desc{good, histogram} {
		if err := d.Check(); err != nil {
			t.Errorf("%s: %v", d.Name, err)
		}
	}
}

func rising(n int) []float64 {
	bounds := make([]float64, n)
	for i := range bounds {
		bounds[i] = float64(i)
	}
	return bounds
}

func TestTheCatalogueIsSorted(t *testing.T) {
	t.Parallel()
	var names []string
	for _, d := range metrics.Catalogue() {
		names = append(names, d.Name)
	}
	if !slices.IsSorted(names) || !slices.Contains(names, requests.Name) {
		t.Errorf("got %q", names)
	}
}
