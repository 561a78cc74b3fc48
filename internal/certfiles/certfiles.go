// Package certfiles reads the files that TLS is made of.
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
// Nothing of the key is in an error. read returns the content of a file.
func Pair(p config.KeyPair, read func(path string) ([]byte, error)) (*tls.Certificate, error) {
	cert, err := read(p.Certificate)
	if err != nil {
		return nil, err
	}
	key, err := read(p.Key)
	if err != nil {
		return nil, err
	}
	pair, err := KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", p.Certificate, p.Key, err)
	}
	return &pair, nil
}

// mostTried is how many certificates of a file a key is compared with to say what is wrong.
const mostTried = 10

// KeyPair is [tls.X509KeyPair]. It says so where the key is that of another certificate of the file,
// as when the root stands first.
func KeyPair(cert, key []byte) (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err == nil {
		return pair, nil
	}
	for n, rest := 1, cert; n <= mostTried; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if _, other := tls.X509KeyPair(pem.EncodeToMemory(block), key); n > 1 && other == nil {
			return pair, fmt.Errorf("%w: the key is that of certificate %d of the file, which must be the first", err, n)
		}
	}
	return pair, err
}

// Roots reads the certificates of a file, all of which are trusted. One that makes no sense is an
// error, and so is a file with none.
func Roots(path string, read func(path string) ([]byte, error)) (*x509.CertPool, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	all, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	pool := x509.NewCertPool()
	for _, c := range all {
		pool.AddCert(c)
	}
	return pool, nil
}

// Parse reads certificates in PEM. One that makes no sense is an error, and so is that there is
// none, or something else.
func Parse(data []byte) (all []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("there is something else than certificates in it")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(all)+1, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no certificate in PEM in it")
	}
	return all, nil
}
