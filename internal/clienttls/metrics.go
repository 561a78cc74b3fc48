package clienttls

import "holdfast/internal/metrics"

// What is counted of handshakes, after Envoy's cluster.NAME.ssl.*.
var (
	handshakes = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_tls_handshakes_total",
		Help: "TLS handshakes with endpoints of the cluster, health checks included, by kind: full, or resumed from a session of before.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "kind"},
	})
	failures = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_tls_handshake_failures_total",
		Help: "TLS handshakes with endpoints of the cluster that have failed, health checks included, by reason.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "reason"},
	})
	filesRefused = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_tls_files_refused_total",
		Help: "Times that files of the cluster's TLS had changed and were of no use.",
		Type: metrics.TypeCounter, Labels: []string{"cluster"},
	})
	expiry = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_tls_certificate_expiry_days",
		Help: "Whole days for which the certificate that the cluster shows its endpoints is still valid; negative: it has expired.",
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"cluster"},
	})
)

type clientMetrics struct {
	full, resumed, refused *metrics.Counter
	failed                 [numReasons]*metrics.Counter
	days                   *metrics.Gauge
}

func newClientMetrics(r *metrics.Registry, cluster string, certificate bool) clientMetrics {
	m := clientMetrics{full: r.Counter(handshakes, cluster, "full"), resumed: r.Counter(handshakes, cluster, "resumed"), refused: r.Counter(filesRefused, cluster)}
	for reason := range numReasons {
		m.failed[reason] = r.Counter(failures, cluster, reason.String())
	}
	if certificate {
		m.days = r.Gauge(expiry, cluster)
	}
	return m
}
