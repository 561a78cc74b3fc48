package config

import (
	"errors"
	"net/netip"
	"net/url"
	"strings"
)

// ClusterTLS is how a cluster's endpoints are spoken to by TLS.
type ClusterTLS struct {
	CA          string   // a file with roots in PEM; "": the system's
	Unverified  bool     // anybody is believed to be an endpoint
	SNI         string   // the name that every endpoint is asked for by; "": its own
	Names       []string // of which the certificate must have one; none: the name that was asked for
	Certificate KeyPair  // our own; zero: none
	MinVersion  string   // "1.2" or "1.3"
}

// maxTLSNames is how many names are looked for in a certificate.
const maxTLSNames = 64

// readClusterTLS returns nil where there is none.
func readClusterTLS(cluster *table, endpoints []Endpoint) *ClusterTLS {
	if !cluster.asked("tls") {
		return nil
	}
	t := cluster.table("tls")
	if t.keys == nil {
		return nil // it is something else, which was said
	}
	c := &ClusterTLS{MinVersion: "1.2"}
	read(t, "verify", &c.Unverified, either("full", "none"))
	read(t, "ca", &c.CA, tlsFile)
	read(t, "sni", &c.SNI, askedName)
	c.Names = readTLSNames(t)
	if c.Unverified {
		const nobody = `is of no use with verify = "none", which believes everybody; drop one of the two`
		t.inapplicable("ca", nobody)
		t.inapplicable("names", nobody)
	} else if c.SNI == "" && len(c.Names) == 0 {
		checkTLSNames(t, endpoints)
	}
	if t.asked("certificate") {
		pair := t.table("certificate")
		need(pair, "cert", &c.Certificate.Certificate, tlsFile)
		need(pair, "key", &c.Certificate.Key, tlsFile)
		pair.strict()
	}
	read(t, "min_version", &c.MinVersion, oneOf("1.2", "1.3"))
	t.strict()
	return c
}

func readTLSNames(t *table) (names []string) {
	if !t.asked("names") {
		return nil
	}
	for _, e := range list(t, "names", certificateName) {
		names = append(names, e.value)
	}
	switch {
	case t.empty("names"):
		t.at("names").fail("must have %s", certificateName.is)
	case len(names) > maxTLSNames:
		t.at("names").fail("has %d names; at most %d are looked for", len(names), maxTLSNames)
	}
	return names
}

// checkTLSNames finds an endpoint that has no name which its certificate could have.
func checkTLSNames(t *table, endpoints []Endpoint) {
	for _, e := range endpoints {
		if strings.HasPrefix(e.Address, "unix:") {
			t.fail("the endpoint %s is a unix socket and has no name that its certificate could have; give it by sni or names", quote(e.Address))
			return
		}
	}
}

// askedName is a name to ask for (RFC 6066 §3).
var askedName = form[string]{`a host name like "chat.internal"`, func(s string) (string, error) {
	if _, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return "", errors.New("nobody is asked for by an IP address; write it into names")
	}
	return parseHost(s)
}, asIs}

// certificateName is what may be among the subject alternative names of a certificate
// (RFC 5280 §4.2.1.6).
var certificateName = form[string]{`names of a certificate like "chat.internal", "10.0.0.1" or "spiffe://example.org/chat"`, func(s string) (string, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return "", errors.New("a certificate has no zones")
		}
		return a.Unmap().String(), nil
	}
	if strings.Contains(s, "://") {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" || hasControl(s) || len(s) > 2048 {
			return "", errors.New("it is no URI")
		}
		return s, nil
	}
	if strings.Contains(s, "*") {
		return "", errors.New("the name itself is needed, which a certificate may cover with a star")
	}
	return parseHost(s)
}, asIs}
