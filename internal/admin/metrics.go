package admin

import (
	"context"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/supervisor"
)

const (
	// maxScrapes is the most at once; others are answered 503.
	maxScrapes = 4

	// scrapeTimeout bounds one, from the request to the whole answer in memory. A
	// supervisor that does not answer has been given up on by then.
	scrapeTimeout = 2 * askTimeout
)

// scrapeHandler shows what cmds.Metrics says and, as process_* and go_*, the
// process of the supervisor itself. Whatever is wrong with one of them, or with one
// family, is logged, counted as promhttp_metric_handler_errors_total and left out;
// the rest is shown.
func scrapeHandler(cmds supervisor.Commands, log *slog.Logger) http.Handler {
	own := prometheus.NewRegistry()
	own.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	merged := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
		defer cancel()
		return cmds.Metrics(ctx)
	})
	return promhttp.HandlerFor(prometheus.Gatherers{own, merged}, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ErrorHandling:       promhttp.ContinueOnError,
		Registry:            own,
		MaxRequestsInFlight: maxScrapes,
		Timeout:             scrapeTimeout,
	})
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) error {
	headers(w, scrapeTimeout+writeTimeout)
	s.scrape.ServeHTTP(w, r)
	return nil
}
