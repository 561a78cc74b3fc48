package servertls

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"holdfast/internal/certfiles"
	"holdfast/internal/config"
)

// authorities are those who sign clients' certificates. Nobody changes them.
type authorities struct {
	all  []*x509.Certificate
	pool *x509.CertPool
}

func readAuthorities(read func(path string) ([]byte, error), path string) (*authorities, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	return parseAuthorities(data)
}

func parseAuthorities(data []byte) (*authorities, error) {
	all, err := certfiles.Parse(data)
	if err != nil {
		return nil, err
	}
	a := &authorities{all: all, pool: x509.NewCertPool()}
	for _, c := range all {
		a.pool.AddCert(c)
	}
	return a, nil
}

func (a *authorities) encode() (data []byte) {
	for _, c := range a.all {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return data
}

func (a *authorities) same(other *authorities) bool {
	return slices.EqualFunc(a.all, other.all, (*x509.Certificate).Equal)
}

// clientNames are those of which a client's certificate must have one. Nobody changes them.
type clientNames struct {
	dns, wild, ips, uris, emails map[string]bool // wild by what follows the first label, with its dot
}

// ErrClientName is the error of a handshake with a client whose certificate is valid and whose name
// may not connect. It says nothing of what the client has sent.
var ErrClientName = errors.New("the client's certificate has none of the names that may connect")

func newClientNames(names []config.ClientName) *clientNames {
	if len(names) == 0 {
		return nil
	}
	n := &clientNames{make(map[string]bool), make(map[string]bool), make(map[string]bool), make(map[string]bool), make(map[string]bool)}
	for _, name := range names {
		suffix, wild := strings.CutPrefix(name.Text, "*")
		switch {
		case name.Kind == "dns" && wild:
			n.wild[suffix] = true
		case name.Kind == "dns":
			n.dns[name.Text] = true
		case name.Kind == "ip":
			n.ips[name.Text] = true
		case name.Kind == "uri":
			n.uris[name.Text] = true
		default:
			n.emails[name.Text] = true
		}
	}
	return n
}

// verify looks at a client's certificate, which is valid, and the first of chain. That clients have to show
// one is not its business.
func (n *clientNames) verify(chain []*x509.Certificate) error {
	if n == nil || len(chain) == 0 || n.have(chain[0]) {
		return nil
	}
	return ErrClientName
}

func (n *clientNames) have(c *x509.Certificate) bool {
	for _, name := range c.DNSNames {
		name = strings.ToLower(name)
		if n.dns[name] {
			return true
		}
		if dot := strings.IndexByte(name, '.'); dot > 0 && n.wild[name[dot:]] {
			return true
		}
	}
	for _, ip := range c.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok && n.ips[a.Unmap().String()] {
			return true
		}
	}
	for _, u := range c.URIs {
		if n.uris[u.String()] {
			return true
		}
	}
	for _, e := range c.EmailAddresses {
		if local, host, ok := strings.Cut(e, "@"); ok && n.emails[local+"@"+strings.ToLower(host)] {
			return true
		}
	}
	return false
}
