package clienttls

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Reason is why a handshake has failed, in a word for metrics.
type Reason uint8

// The reasons.
const (
	other Reason = iota
	unknownAuthority
	selfSigned
	expired
	notYetValid
	noName
	badCertificate
	refused
	badProtocol
	closed
	timeout
	ourFiles
	numReasons
)

var reasons = [numReasons]string{
	other: "other", unknownAuthority: "unknown authority", selfSigned: "self-signed", expired: "expired", notYetValid: "not yet valid",
	noName: "name", badCertificate: "certificate", refused: "refused", badProtocol: "protocol", closed: "closed", timeout: "timeout", ourFiles: "files",
}

func (r Reason) String() string { return reasons[r] }

// Error is why a handshake has failed. What an endpoint has sent is not in it, or bounded.
type Error struct {
	Reason Reason
	text   string
}

func (e *Error) Error() string { return "TLS error: " + e.text }

// Unwrap has one that took too long be [os.ErrDeadlineExceeded].
func (e *Error) Unwrap() error {
	if e.Reason == timeout {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// IsOurs says of an error that no endpoint is to blame for it.
func IsOurs(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Reason == ourFiles
}

// verify finds out whether a chain of certificates is that of an endpoint with one of the names.
// Without a name nobody is.
func verify(chain []*x509.Certificate, roots *x509.CertPool, names []string, now time.Time) error {
	if len(chain) == 0 {
		return &Error{badCertificate, "it has no certificate"}
	}
	leaf, between := chain[0], x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now}); err != nil { // for servers, which is the default
		return explainCertificate(leaf, err, now)
	}
	if !slices.ContainsFunc(names, func(name string) bool { return has(leaf, name) }) {
		return &Error{noName, "its certificate is not for " + listed(names)}
	}
	return nil
}

// has says whether a certificate is for a name: a host, an IP address or a URI.
func has(leaf *x509.Certificate, name string) bool {
	if strings.Contains(name, "://") {
		for _, u := range leaf.URIs {
			if u.String() == name {
				return true
			}
		}
		return false
	}
	return leaf.VerifyHostname(name) == nil
}

// listed has some names for people.
func listed(names []string) string {
	const most = 3
	switch {
	case len(names) == 0:
		return "an endpoint that has no name"
	case len(names) > most:
		return fmt.Sprintf("%s, or %d other names", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, " or ")
}

// explainCertificate says what is wrong with a certificate in our own words: those of x509 have
// what it has.
func explainCertificate(leaf *x509.Certificate, err error, now time.Time) error {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		if bytes.Equal(leaf.RawIssuer, leaf.RawSubject) {
			return &Error{selfSigned, "its certificate has signed itself, and is not trusted"}
		}
		return &Error{unknownAuthority, "its certificate is signed by an authority that is not known"}
	}
	if _, ok := errors.AsType[x509.SystemRootsError](err); ok {
		return &Error{unknownAuthority, "the system has no roots to trust in"}
	}
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	if !ok {
		return &Error{badCertificate, "its certificate is not valid"}
	}
	switch invalid.Reason {
	case x509.Expired:
		what, cert := "its certificate", invalid.Cert
		if cert == nil {
			cert = leaf
		}
		if cert != leaf {
			what = "an authority of its certificate"
		}
		if now.Before(cert.NotBefore) {
			return &Error{notYetValid, what + " is not valid before " + cert.NotBefore.UTC().Format(time.RFC3339)}
		}
		return &Error{expired, what + " has expired on " + cert.NotAfter.UTC().Format(time.RFC3339)}
	case x509.IncompatibleUsage:
		return &Error{badCertificate, "its certificate is not for servers"}
	case x509.NotAuthorizedToSign:
		return &Error{badCertificate, "its certificate is signed by one that is not for that"}
	case x509.CANotAuthorizedForThisName:
		return &Error{badCertificate, "its authority may not sign for its names"}
	}
	return &Error{badCertificate, "its certificate is not valid"}
}

// Failed counts a handshake that has failed with err, and says why in an [*Error].
func (c *Client) Failed(err error) *Error {
	e := explain(err)
	c.metrics.failed[e.Reason].Inc()
	return e
}

// Succeeded counts a handshake.
func (c *Client) Succeeded(resumed bool) {
	if resumed {
		c.metrics.resumed.Inc()
	} else {
		c.metrics.full.Inc()
	}
}

// mostText is how much is kept of what crypto/tls says, which may have what an endpoint has sent.
const mostText = 160

func explain(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		return &Error{refused, "it has refused: " + plain(op.Err.Error())}
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return &Error{badProtocol, "it does not speak TLS"}
	}
	text := plain(err.Error())
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &Error{timeout, "the handshake took too long"}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return &Error{closed, "it has closed the connection within the handshake"}
	case strings.Contains(text, "certificate"):
		return &Error{badCertificate, text}
	case strings.Contains(err.Error(), "tls: "):
		return &Error{badProtocol, text}
	}
	return &Error{other, text}
}

// plain is a text that fits into a line.
func plain(s string) string {
	s = strings.TrimPrefix(s, "tls: ")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s[:min(len(s), mostText)])
}
