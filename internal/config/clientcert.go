package config

// CertificateForwarding is what a listener with TLS makes of X-Forwarded-Client-Cert, by which
// upstreams are told of a client's certificate.
type CertificateForwarding int

// The ways. A client is believed that has shown a certificate, or is a trusted proxy.
const (
	SanitizeCertificate CertificateForwarding = iota // the field is removed
	SetCertificate                                   // it says what the client's certificate is, and nothing else
	AppendCertificate                                // the same behind what a client says that is believed
	ForwardCertificate                               // it is what a client says that is believed
)

func readCertificateForwarding(listener, tls *table) CertificateForwarding {
	if listener.keys["protocol"] == "tcp" {
		tls.foreign([]string{"forward_client_certificate"}, notOfTCP)
		return SanitizeCertificate
	}
	var mode int
	read(tls, "forward_client_certificate", &mode, numbered([]string{"sanitize", "set", "append", "forward"}))
	return CertificateForwarding(mode)
}
