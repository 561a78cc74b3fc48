package peer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// certificateFile has a certificate and its key: of P-256, as most are that are issued today.
const certificateFile = "bench.pem"

// TLSKinds are those whose TLS is measured. Each has a second listener, with the same
// certificate, TLS 1.2 and 1.3, tickets, and HTTP/1.1 alone.
func TLSKinds() []*Kind {
	return []*Kind{
		overTLS(holdfast, "[[virtual_hosts]]\n", func(s Site) string {
			return fmt.Sprintf("[[listeners]]\nname = \"secure\"\naddress = %q\nhttp2 = false\n\n[listeners.tls]\ncertificates = [{ cert = %[2]q, key = %[2]q }]\n\n", s.Secure, filepath.Join(s.Dir, certificateFile))
		}),
		overTLS(haproxy, "  http-request redirect", func(s Site) string {
			return fmt.Sprintf("  bind %s ssl crt %s alpn http/1.1\n", s.Secure, filepath.Join(s.Dir, certificateFile))
		}),
		overTLS(nginx, "    location = ", func(s Site) string {
			return fmt.Sprintf("    listen %s ssl;\n    ssl_protocols TLSv1.2 TLSv1.3;\n    ssl_certificate %[2]s;\n    ssl_certificate_key %[2]s;\n", s.Secure, filepath.Join(s.Dir, certificateFile))
		}),
	}
}

// overTLS is a kind with more in its configuration, before the first place where something
// stands.
func overTLS(k *Kind, before string, more func(Site) string) *Kind {
	secure := *k
	secure.Name += "-tls"
	files := k.files
	secure.files = func(s Site) []File {
		all := files(s)
		all[0].Text = strings.Replace(all[0].Text, before, more(s)+before, 1)
		return all
	}
	return &secure
}

// writeCertificate makes a certificate and its key, which are for nothing but a measurement.
func writeCertificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, DNSNames: []string{"bench"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	data := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	return os.WriteFile(filepath.Join(dir, certificateFile), data, 0o600)
}
