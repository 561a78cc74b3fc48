package servertls

import (
	"holdfast/internal/config"
	"holdfast/internal/metrics"
)

// What is counted of a listener's TLS. Files are the paths of the configuration.
var (
	certificateExpiry = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_certificate_expiry_days",
		Help: "Whole days until the first of the certificates in the file expires that is served; below 0 it has.",
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"listener", "certificate"},
	})
	fileUpdates = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_file_updates_total",
		Help: "Times that the file of a certificate, together with its key, or of those who sign clients' certificates, was replaced and served from then on, without a reload.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "file"},
	})
	fileFailures = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_file_failures_total",
		Help: "Times that such a file was replaced by something of no use, so that the one before is served on.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "file"},
	})
	filesRefused = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_files_refused",
		Help: "Files of the listener's TLS that are of no use as they are now: what they said before is served.",
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"listener"},
	})
	keyLogs = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_key_log",
		Help: "1 if the secrets of the listener's connections are written to a file (key_log), which is for debugging only.",
		Type: metrics.TypeGauge, Merge: metrics.Max, Labels: []string{"listener"},
	})
)

// counts is what is counted of one listener.
type counts struct {
	updates, failures func(file string) *metrics.Counter
	expiry            []*metrics.Gauge // aligned with the configuration's certificates
	refused, keyLog   *metrics.Gauge
}

func newCounts(r *metrics.Registry, listener string, c *config.ListenerTLS) counts {
	k := counts{
		updates:  func(file string) *metrics.Counter { return r.Counter(fileUpdates, listener, file) },
		failures: func(file string) *metrics.Counter { return r.Counter(fileFailures, listener, file) },
		refused:  r.Gauge(filesRefused, listener), keyLog: r.Gauge(keyLogs, listener),
	}
	begin := func(file string) { // at 0, so that a rate sees the first
		k.updates(file)
		k.failures(file)
	}
	for _, pair := range c.Certificates {
		k.expiry = append(k.expiry, r.Gauge(certificateExpiry, listener, pair.Certificate))
		begin(pair.Certificate)
	}
	if c.ClientCA != "" {
		begin(c.ClientCA)
	}
	return k
}
