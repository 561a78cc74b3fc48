package admin_test

import (
	"compress/gzip"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"holdfast/internal/admin/admintest"
)

// counter is a family of one series.
func counter(name, help string, value float64) *dto.MetricFamily {
	return &dto.MetricFamily{
		Name: &name, Help: &help, Type: dto.MetricType_COUNTER.Enum(),
		Metric: []*dto.Metric{{Counter: &dto.Counter{Value: &value}}},
	}
}

func merged(families ...*dto.MetricFamily) func(context.Context) ([]*dto.MetricFamily, error) {
	return func(context.Context) ([]*dto.MetricFamily, error) { return families, nil }
}

// parse reads a scrape as Prometheus would.
func parse(t *testing.T, text string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return families
}

func TestAScrapeShowsWhatWasMergedAndTheProcess(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{OnMetrics: merged(counter("holdfast_reloads_total", "Reloads.", 3))})
	code, text := ask(t, client(t, "unix", s.socket()), "GET /metrics")
	if code != 200 {
		t.Fatalf("got %d %q", code, text)
	}
	families := parse(t, text)
	if f := families["holdfast_reloads_total"]; f == nil || f.Metric[0].Counter.GetValue() != 3 {
		t.Errorf("the counter is %v", f)
	}
	for _, name := range []string{"process_open_fds", "process_resident_memory_bytes", "go_goroutines", "promhttp_metric_handler_errors_total"} {
		if families[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint says %v, %v", problems, err)
	}
}

func TestAScrapeIsCompressedForWhoWantsThat(t *testing.T) {
	t.Parallel()
	s := begin(t, &admintest.Supervisor{OnMetrics: merged(counter("holdfast_reloads_total", "Reloads.", 3))})
	request, err := http.NewRequestWithContext(t.Context(), "GET", "http://localhost/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept-Encoding", "gzip") // by hand: net/http would undo it
	response, err := client(t, "unix", s.socket()).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.Header.Get("Cache-Control") != "no-store" {
		t.Error("a scrape may be cached")
	}
	body, err := gzip.NewReader(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(body)
	if err != nil || families["holdfast_reloads_total"] == nil {
		t.Errorf("got %v, %v", families, err)
	}
}

func TestOneProblemNeverEmptiesAScrape(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		merged func(context.Context) ([]*dto.MetricFamily, error)
		shown  bool   // whether holdfast_reloads_total is
		logged string // "" means nothing
	}{
		"nothing is wrong": {merged(counter("holdfast_reloads_total", "Reloads.", 3)), true, ""},
		"nothing was merged": {func(context.Context) ([]*dto.MetricFamily, error) {
			return nil, errors.New("the supervisor is out of luck")
		}, false, "out of luck"},
		"a family beside an error": {func(context.Context) ([]*dto.MetricFamily, error) {
			return []*dto.MetricFamily{counter("holdfast_reloads_total", "Reloads.", 3)}, errors.New("generation 7 wrote nonsense")
		}, true, "generation 7 wrote nonsense"},
		"a family that pretends to be the supervisor's process": {
			merged(counter("process_open_fds", "Mine.", 1e9), counter("holdfast_reloads_total", "Reloads.", 3)), true, "process_open_fds",
		},
		"a series that is there twice": {
			merged(counter("holdfast_reloads_total", "Reloads.", 3), counter("holdfast_reloads_total", "Reloads.", 4)), true, "holdfast_reloads_total",
		},
		"a type without a value": {merged(&dto.MetricFamily{
			Name: new("holdfast_broken"), Help: new(""), Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{{}},
		}, counter("holdfast_reloads_total", "Reloads.", 3)), true, "holdfast_broken"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := begin(t, &admintest.Supervisor{OnMetrics: test.merged})
			c := client(t, "unix", s.socket())
			code, text := ask(t, c, "GET /metrics")
			if code != 200 {
				t.Fatalf("got %d %q", code, text)
			}
			families := parse(t, text)
			if f := families["holdfast_reloads_total"]; (f != nil) != test.shown || f != nil && f.Metric[0].Counter.GetValue() != 3 {
				t.Errorf("the counter is %v", f)
			}
			if f := families["process_open_fds"]; f == nil || f.Metric[0].Gauge == nil || f.Metric[0].Gauge.GetValue() >= 1e9 {
				t.Errorf("the open files of the process are %v", f)
			}
			if log := s.log.String(); test.logged == "" && strings.Contains(log, "metrics") || !strings.Contains(log, test.logged) {
				t.Errorf("log is %s", log)
			}
			errorsCounted := 0.0
			for _, m := range parse(t, second(ask(t, c, "GET /metrics")))["promhttp_metric_handler_errors_total"].Metric {
				errorsCounted += m.Counter.GetValue()
			}
			if (errorsCounted > 0) != (test.logged != "") {
				t.Errorf("%v errors are counted", errorsCounted)
			}
		})
	}
}

func second[A, B any](_ A, b B) B { return b }
