package proxy

import (
	"crypto/tls"

	"holdfast/internal/metrics"
)

// What is counted of listeners with TLS.
var (
	tlsHandshakes = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_handshakes_total",
		Help: "Connections of listeners with tls, by how their handshake has ended. They are closed before it for what is not TLS, HTTP included, for a hello that makes no sense or is too large, or one that does not come within handshake_timeout.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "result"},
	})
	tlsVersions = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_connections_total",
		Help: "Handshakes that have succeeded, by the version of TLS.",
		Type: metrics.TypeCounter, Labels: []string{"listener", "version"},
	})
	tlsResumed = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_resumed_total",
		Help: "Handshakes that have succeeded with a session of an earlier connection.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	tlsCertified = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_client_certificates_total",
		Help: "Handshakes that have succeeded with a certificate of the client that was verified.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
	tlsActive = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_handshakes_active",
		Help: "Handshakes that are under way.",
		Type: metrics.TypeGauge, Labels: []string{"listener"},
	})
	tlsWaiting = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_handshakes_waiting",
		Help: "Connections whose handshake waits because max_handshakes are under way.",
		Type: metrics.TypeGauge, Labels: []string{"listener"},
	})
	tlsQueued = metrics.Define(metrics.Desc{
		Name: "holdfast_downstream_tls_handshakes_queued_total",
		Help: "Connections whose handshake had to wait because max_handshakes were under way.",
		Type: metrics.TypeCounter, Labels: []string{"listener"},
	})
)

// A gateResult is how a connection has ended its handshake, or why it had none.
type gateResult uint8

const (
	gateOK          gateResult = iota
	gateHTTP                   // it speaks HTTP
	gateNotTLS                 // or anything else
	gateInvalid                // its hello makes no sense
	gateLarge                  // or is too large
	gateLate                   // not within handshake_timeout
	gateGone                   // the client went before
	gateCertificate            // the client's, or that there is none
	gateServer                 // that it asks for has no certificate
	gateVersion                // none that both know
	gateParameters             // no ciphers or groups that both know
	gateProtocol               // none that both speak
	gateAlert                  // the client says that it does not want to
	gateOther                  // whatever else the client does wrong
	gateEnded                  // the generation's time was over
	gateFault                  // ours
	numGateResults
)

var gateResults = [numGateResults]string{
	gateOK:          "ok",
	gateHTTP:        "plain HTTP",
	gateNotTLS:      "not TLS",
	gateInvalid:     "invalid hello",
	gateLarge:       "hello too large",
	gateLate:        "timeout",
	gateGone:        "gone",
	gateCertificate: "client certificate",
	gateServer:      "unknown server",
	gateVersion:     "version",
	gateParameters:  "cipher or group",
	gateProtocol:    "application protocol",
	gateAlert:       "alert from client",
	gateOther:       "protocol error",
	gateEnded:       "ended",
	gateFault:       "fault",
}

// gateMetrics is what is counted of one listener.
type gateMetrics struct {
	results               [numGateResults]*metrics.Counter
	tls12, tls13, resumed *metrics.Counter
	certified, queued     *metrics.Counter
	active, waiting       *metrics.Gauge
}

func newGateMetrics(r *metrics.Registry, listener string) gateMetrics {
	m := gateMetrics{
		tls12: r.Counter(tlsVersions, listener, "1.2"), tls13: r.Counter(tlsVersions, listener, "1.3"),
		resumed: r.Counter(tlsResumed, listener), certified: r.Counter(tlsCertified, listener), queued: r.Counter(tlsQueued, listener),
		active: r.Gauge(tlsActive, listener), waiting: r.Gauge(tlsWaiting, listener),
	}
	for result, name := range gateResults {
		m.results[result] = r.Counter(tlsHandshakes, listener, name)
	}
	return m
}

// agreed counts a handshake that has succeeded.
func (m *gateMetrics) agreed(a *agreement) {
	m.results[gateOK].Inc()
	if a.version == tls.VersionTLS13 {
		m.tls13.Inc()
	} else {
		m.tls12.Inc()
	}
	if a.resumed {
		m.resumed.Inc()
	}
	if a.TLS.Peer != nil {
		m.certified.Inc()
	}
}
