package tlstest

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
)

func TestCertificatesAreTrustedByThoseWhoTrustTheirAuthority(t *testing.T) {
	t.Parallel()
	a := NewAuthority(t)
	for _, test := range []struct {
		name    string
		leaf    *Leaf
		usage   x509.ExtKeyUsage
		dnsName string
	}{
		{"server", a.Leaf([]string{"a.example", "192.0.2.1"}), x509.ExtKeyUsageServerAuth, "a.example"},
		{"address", a.Leaf([]string{"a.example", "192.0.2.1"}), x509.ExtKeyUsageServerAuth, "192.0.2.1"},
		{"rsa", a.Leaf([]string{"*.example"}, RSA()), x509.ExtKeyUsageServerAuth, "b.example"},
		{"client", a.Leaf([]string{"spiffe://example/a", "a@example.org"}, Client()), x509.ExtKeyUsageClientAuth, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			_, err := test.leaf.Certificate.Leaf.Verify(x509.VerifyOptions{Roots: a.Pool(), DNSName: test.dnsName, KeyUsages: []x509.ExtKeyUsage{test.usage}})
			if err != nil {
				t.Error(err)
			}
			if _, err := test.leaf.Certificate.Leaf.Verify(x509.VerifyOptions{Roots: NewAuthority(t).Pool(), KeyUsages: []x509.ExtKeyUsage{test.usage}}); err == nil {
				t.Error("whoever trusts another authority trusts it, too")
			}
			cert, key := test.leaf.Files(t.TempDir(), "leaf")
			if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
				t.Error(err)
			}
		})
	}
}
