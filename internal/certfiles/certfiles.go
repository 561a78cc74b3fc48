// Package certfiles reads the files that TLS is made of, and tells when they have changed.
//
//	f := certfiles.Watch(paths, func() error { ... certfiles.Pair(cert, key) ... })
//	if err := f.Read(); err != nil { ... }
//	certfiles.Run(ctx, []*certfiles.Files{f}) // reads them again, until ctx is done
package certfiles

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"holdfast/internal/config"
)

// Pair reads a certificate, with those that lead to a root behind it, and its key. Leaf is set.
// Nothing of the key is in an error.
func Pair(p config.KeyPair) (*tls.Certificate, error) {
	cert, err := config.ReadTLSFile(p.Certificate)
	if err != nil {
		return nil, err
	}
	key, err := config.ReadTLSFile(p.Key)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", p.Certificate, p.Key, err)
	}
	return &pair, nil
}

// Roots reads the certificates of a file, all of which are trusted. One that makes no sense is an
// error, and so is a file with none.
func Roots(path string) (*x509.CertPool, error) {
	data, err := config.ReadTLSFile(path)
	if err != nil {
		return nil, err
	}
	pool, n := x509.NewCertPool(), 0
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: there is something else than certificates in it", path)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", path, n+1, err)
		}
		pool.AddCert(cert)
		n++
	}
	if n == 0 {
		return nil, fmt.Errorf("%s: %w", path, errNone)
	}
	return pool, nil
}

var errNone = errors.New("there is no certificate in PEM in it")
