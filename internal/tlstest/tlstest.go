// Package tlstest makes certificates for tests: authorities, leaves for servers and clients, and
// the files that they are read from. Nothing of it is to be trusted by anybody else.
package tlstest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Authority is a root that signs leaves.
type Authority struct {
	Certificate *x509.Certificate

	t   testing.TB
	key *ecdsa.PrivateKey
}

// Option changes what a certificate is.
type Option func(*leaf)

type leaf struct {
	template *x509.Certificate
	rsa      bool
}

// RSA has the key be one of 2048 bits rather than of P-256. All leaves of a process share one.
func RSA() Option { return func(l *leaf) { l.rsa = true } }

// Client has the certificate be for clients rather than for servers.
func Client() Option {
	return func(l *leaf) { l.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }
}

// CommonName has the subject be called so; otherwise it is called "tlstest".
func CommonName(name string) Option {
	return func(l *leaf) { l.template.Subject.CommonName = name }
}

// Valid has the certificate hold from one time to another, otherwise it does from an hour ago for
// a day.
func Valid(from, to time.Time) Option {
	return func(l *leaf) { l.template.NotBefore, l.template.NotAfter = from, to }
}

// Change has f change what is to be signed.
func Change(f func(*x509.Certificate)) Option { return func(l *leaf) { f(l.template) } }

// NewAuthority returns a root with a key of its own.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	key := ecdsaKey(t)
	template := newTemplate(t)
	template.Subject.CommonName = "tlstest authority " + template.SerialNumber.Text(36)
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	return &Authority{Certificate: sign(t, template, template, key.Public(), key), t: t, key: key}
}

// Pool has the authority, and nobody else.
func (a *Authority) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.Certificate)
	return p
}

// PEM is the authority's certificate.
func (a *Authority) PEM() []byte { return certificatePEM(a.Certificate.Raw) }

// File writes the authority's certificate into a file, and returns its path.
func (a *Authority) File(dir, name string) string { return Write(a.t, dir, name, a.PEM()) }

// Leaf signs a certificate for a server with these names: DNS names, IP addresses, URIs with
// "://" and mail addresses.
func (a *Authority) Leaf(names []string, options ...Option) *Leaf {
	a.t.Helper()
	l := leaf{template: newTemplate(a.t)}
	l.template.KeyUsage = x509.KeyUsageDigitalSignature
	l.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, name := range names {
		addName(a.t, l.template, name)
	}
	for _, o := range options {
		o(&l)
	}
	var key crypto.Signer
	if l.rsa {
		key = rsaKey()
	} else {
		key = ecdsaKey(a.t)
	}
	signed := sign(a.t, l.template, a.Certificate, key.Public(), a.key)
	return &Leaf{
		t:           a.t,
		Certificate: tls.Certificate{Certificate: [][]byte{signed.Raw}, PrivateKey: key, Leaf: signed},
	}
}

func addName(t testing.TB, template *x509.Certificate, name string) {
	t.Helper()
	if ip, err := netip.ParseAddr(name); err == nil {
		template.IPAddresses = append(template.IPAddresses, ip.AsSlice())
	} else if strings.Contains(name, "://") {
		u, err := url.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	} else if strings.Contains(name, "@") {
		template.EmailAddresses = append(template.EmailAddresses, name)
	} else {
		template.DNSNames = append(template.DNSNames, name)
	}
}

// Leaf is a certificate with its key.
type Leaf struct {
	Certificate tls.Certificate // Leaf is set

	t testing.TB
}

// CertificatePEM is the certificate as a file has it.
func (l *Leaf) CertificatePEM() []byte { return certificatePEM(l.Certificate.Certificate[0]) }

// KeyPEM is the key as a file has it.
func (l *Leaf) KeyPEM() []byte {
	l.t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(l.Certificate.PrivateKey)
	if err != nil {
		l.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// Files writes the certificate and the key into dir as name.pem and name.key, in place of those
// that are there, and returns their paths.
func (l *Leaf) Files(dir, name string) (certificate, key string) {
	l.t.Helper()
	return Write(l.t, dir, name+".pem", l.CertificatePEM()), Write(l.t, dir, name+".key", l.KeyPEM())
}

// Write puts data into a file of dir at once, in place of the one that is there: whoever looks
// finds the old one or the new one, whole. It returns its path. Everybody may read it, for
// processes of other users.
func Write(t testing.TB, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	next := filepath.Join(dir, "."+name+".next")
	if err := os.WriteFile(next, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func newTemplate(t testing.TB) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 64))
	if err != nil {
		t.Fatal(err)
	}
	serial.Add(serial, big.NewInt(1)) // 0 is none
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "tlstest"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
}

func sign(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func ecdsaKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// rsaKey is made once: it takes long.
var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err) // there is no randomness
	}
	return key
})

func certificatePEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
