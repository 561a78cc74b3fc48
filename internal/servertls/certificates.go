package servertls

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"holdfast/internal/certfiles"
	"holdfast/internal/config"
)

// pair is a certificate with its key, which nobody changes.
type pair struct {
	certificate tls.Certificate // Leaf is set
	kind        kind
	expires     time.Time // the first of the certificates in the file
}

// kind is what a client must understand to be served with a certificate. The lesser is tried first:
// it costs less.
type kind int

const (
	p256 kind = iota
	p384
	p521
	ed
	rsaKind
)

// readPair reads both files. read returns the content of one.
func readPair(read func(path string) ([]byte, error), files config.KeyPair) (*pair, error) {
	certificate, err := read(files.Certificate)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	key, err := read(files.Key)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	p, err := parsePair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("with key %s: %w", files.Key, err)
	}
	return p, nil
}

// parsePair reads both in PEM. No error has anything of a key.
func parsePair(certificate, key []byte) (*pair, error) {
	if b, _ := pem.Decode(key); b != nil && (strings.Contains(b.Type, "ENCRYPTED") || strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED")) {
		return nil, errors.New("the key is encrypted: nobody is there to be asked for the word; write it without")
	}
	c, err := certfiles.KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	p := &pair{certificate: c, expires: c.Leaf.NotAfter}
	switch public := c.Leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		switch public.Curve {
		case elliptic.P256():
			p.kind = p256
		case elliptic.P384():
			p.kind = p384
		case elliptic.P521():
			p.kind = p521
		default:
			return nil, fmt.Errorf("TLS has no certificates with a key on %s; use P-256", public.Curve.Params().Name)
		}
	case ed25519.PublicKey:
		p.kind = ed
	case *rsa.PublicKey:
		p.kind = rsaKind
		if n := public.N.BitLen(); n < 2048 {
			return nil, fmt.Errorf("an RSA key of %d bits is too weak: clients refuse it; 2048 is the least", n)
		}
	}
	for _, der := range c.Certificate[1:] {
		x, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("a certificate behind the first: %w", err)
		}
		if x.NotAfter.Before(p.expires) {
			p.expires = x.NotAfter
		}
	}
	return p, nil
}

// encode returns both as files have them.
func (p *pair) encode() (certificate, key []byte, err error) {
	for _, der := range p.certificate.Certificate {
		certificate = append(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(p.certificate.PrivateKey)
	if err != nil {
		return nil, nil, errors.New("a key cannot be written")
	}
	return certificate, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// same says whether nobody could tell them apart: a key belongs to its certificate.
func (p *pair) same(other *pair) bool {
	return slices.EqualFunc(p.certificate.Certificate, other.certificate.Certificate, bytes.Equal)
}

func (p *pair) serial() string { return p.certificate.Leaf.SerialNumber.Text(16) }

// names are the servers that it is for.
func (p *pair) names() []string { return p.certificate.Leaf.DNSNames }

// mostShown is how many names a line of the log has at most: a certificate may be for thousands.
const mostShown = 10

func shown(names []string) []string {
	if len(names) <= mostShown {
		return names
	}
	return append(slices.Clone(names[:mostShown]), fmt.Sprintf("and %d more", len(names)-mostShown))
}

// days is how many whole ones are left; below 0 it has expired.
func (p *pair) days(now time.Time) int64 {
	return int64(math.Floor(p.expires.Sub(now).Hours() / 24))
}

// choice is which certificates there are for which server. Nobody changes it.
type choice struct {
	exact    map[string][]*tls.Certificate
	wild     map[string][]*tls.Certificate // by what follows the first label, with its dot
	fallback []*tls.Certificate            // for all others; nil: they are refused
}

// ErrUnknownServer is the error of a handshake in which a session is resumed with a server that there
// is no certificate for any more. Of a session that is none crypto/tls says that by itself.
var ErrUnknownServer = errors.New("the client asks for a server that no certificate is for")

func newChoice(pairs []*pair, strict bool) *choice {
	c := &choice{exact: make(map[string][]*tls.Certificate), wild: make(map[string][]*tls.Certificate)}
	exact, wild := make(map[string][]*pair), make(map[string][]*pair)
	like := []*pair{pairs[0]} // the first, and what could be in its place
	for _, p := range pairs {
		shared := false
		for _, name := range p.certificate.Leaf.DNSNames {
			name = strings.ToLower(name)
			to, key := exact, name
			if suffix, ok := strings.CutPrefix(name, "*."); ok {
				to, key = wild, "."+suffix
			}
			to[key] = withKind(to[key], p)
			shared = shared || slices.Contains(to[key], pairs[0])
		}
		if shared {
			like = withKind(like, p)
		}
	}
	for key, all := range exact {
		c.exact[key] = certificates(all)
	}
	for key, all := range wild {
		c.wild[key] = certificates(all)
	}
	if !strict {
		c.fallback = certificates(like)
	}
	return c
}

// withKind adds p unless there is one already that every client understands which understands p.
func withKind(all []*pair, p *pair) []*pair {
	if slices.ContainsFunc(all, func(other *pair) bool { return other.kind == p.kind }) {
		return all
	}
	return append(all, p)
}

func certificates(pairs []*pair) []*tls.Certificate {
	sorted := slices.Clone(pairs)
	slices.SortStableFunc(sorted, func(a, b *pair) int { return cmp.Compare(a.kind, b.kind) })
	all := make([]*tls.Certificate, len(sorted))
	for i, p := range sorted {
		all[i] = &p.certificate
	}
	return all
}

// of returns those for a server, nil where there is none.
func (c *choice) of(server string) []*tls.Certificate {
	server = strings.ToLower(server)
	if all := c.exact[server]; all != nil {
		return all
	}
	if dot := strings.IndexByte(server, '.'); dot > 0 {
		return c.wild[server[dot:]]
	}
	return nil
}

// covers says whether a certificate is for a name that another one has, which may be a wildcard.
func (c *choice) covers(name string) bool {
	if suffix, ok := strings.CutPrefix(name, "*."); ok {
		return c.wild["."+strings.ToLower(suffix)] != nil
	}
	return c.of(name) != nil
}

// has says whether a client that asks for a server is served.
func (c *choice) has(server string) bool { return c.fallback != nil || c.of(server) != nil }

// certificate is [tls.Config.GetCertificate]. Without a certificate and without an error crypto/tls
// refuses the client with unrecognized_name.
func (c *choice) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	all := c.of(hello.ServerName)
	if all == nil {
		all = c.fallback
	}
	switch len(all) {
	case 0:
		return nil, nil
	case 1:
		return all[0], nil
	}
	nameless := *hello
	nameless.ServerName = "" // which fits, or it does not matter
	for _, one := range all {
		if nameless.SupportsCertificate(one) == nil {
			return one, nil
		}
	}
	return all[0], nil // crypto/tls says what is wrong
}
