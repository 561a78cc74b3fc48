package accesslog

import (
	"holdfast/internal/logs"
	"holdfast/internal/metrics"
)

var (
	recordsTotal = metrics.Define(metrics.Desc{
		Name:   "holdfast_access_log_records_total",
		Help:   "Records that were written to an access log.",
		Type:   metrics.TypeCounter,
		Labels: []string{"path"},
	})
	bytesTotal = metrics.Define(metrics.Desc{
		Name:   "holdfast_access_log_written_bytes_total",
		Help:   "Bytes that were written to an access log.",
		Type:   metrics.TypeCounter,
		Labels: []string{"path"},
	})
	droppedTotal = metrics.Define(metrics.Desc{
		Name:   "holdfast_access_log_dropped_total",
		Help:   "Records that are missing in an access log, because they came faster than they could be written or because writing failed.",
		Type:   metrics.TypeCounter,
		Labels: []string{"path"},
	})
	errorsTotal = metrics.Define(metrics.Desc{
		Name:   "holdfast_access_log_write_errors_total",
		Help:   "Writes to an access log that failed.",
		Type:   metrics.TypeCounter,
		Labels: []string{"path"},
	})
	queuedRecords = metrics.Define(metrics.Desc{
		Name:   "holdfast_access_log_queued_records",
		Help:   "Records that wait to be written. Those of a process that dies are lost: see holdfast_access_log_lost_total.",
		Type:   metrics.TypeGauge,
		Merge:  metrics.Sum,
		Labels: []string{"path"},
	})
)

// counting returns options that count in m what becomes of the records for path.
func counting(m *metrics.Registry, path string) logs.Options {
	return logs.Options{
		Lines:   m.Counter(recordsTotal, path),
		Bytes:   m.Counter(bytesTotal, path),
		Dropped: m.Counter(droppedTotal, path),
		Errors:  m.Counter(errorsTotal, path),
		Queued:  m.Gauge(queuedRecords, path),
	}
}
