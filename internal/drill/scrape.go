package drill

import (
	"fmt"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// counters are the values that must never decrease, by series.
type counters map[string]float64

// readCounters takes them from what a scrape shows. What the supervisor's process says
// of itself (go_…, process_…) begins anew with each process.
func readCounters(text string) (counters, error) {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	all := make(counters)
	for name, f := range families {
		if !strings.HasPrefix(name, "holdfast_") {
			continue
		}
		for _, m := range f.Metric {
			of := labels(m)
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				all[name+of] = m.GetCounter().GetValue()
			case dto.MetricType_HISTOGRAM:
				h := m.GetHistogram()
				all[name+"_count"+of] = float64(h.GetSampleCount())
				all[name+"_sum"+of] = h.GetSampleSum()
				for _, b := range h.Bucket {
					all[fmt.Sprintf("%s_bucket%s up to %v", name, of, b.GetUpperBound())] = float64(b.GetCumulativeCount())
				}
			}
		}
	}
	return all, nil
}

func labels(m *dto.Metric) string {
	var all []string
	for _, l := range m.Label {
		all = append(all, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
	}
	if len(all) == 0 {
		return ""
	}
	slices.Sort(all)
	return "{" + strings.Join(all, ",") + "}"
}

// decreased says which of the counters are smaller now, or gone.
func (c counters) decreased(now counters) (all []string) {
	for series, before := range c {
		if after, ok := now[series]; !ok {
			all = append(all, fmt.Sprintf("%s was %v and is not there any more", series, before))
		} else if after < before {
			all = append(all, fmt.Sprintf("%s was %v and is %v", series, before, after))
		}
	}
	slices.Sort(all)
	return all
}
