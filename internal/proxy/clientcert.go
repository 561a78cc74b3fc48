package proxy

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"strings"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/stream"
)

// certificateField tells upstreams of the client's certificate, in elements with a comma between
// two, of pairs with a semicolon between two, as Envoy has it:
//
//	Hash=<SHA-256 in hex>;Subject="<RFC 2253>";URI=<of its names>;DNS=<of its names>
//
// No character of a certificate ends a pair, an element or a quoted string, whether whoever
// reads it knows of escapes or not: what might is written as its number.
const certificateField = "X-Forwarded-Client-Cert"

// What an element may be: names that are longer, or more, are left out.
const (
	mostCertName    = 1024
	mostCertNames   = 32
	mostCertElement = 4096
)

// agreement is what a handshake has come to, and what requests of the connection are to know of
// it. It never changes.
type agreement struct {
	TLS      accesslog.TLS
	Protocol string // of ALPN; "": none
	version  uint16
	resumed  bool
	element  string // of certificateField; "": the client has shown no certificate that was verified
}

// agree notes what a handshake has come to, for whoever has the connection.
func agree(s *stream.Secure) *agreement {
	state := s.State()
	a := &agreement{
		TLS:      accesslog.TLS{Version: versionName(state.Version), Cipher: tls.CipherSuiteName(state.CipherSuite), ServerName: state.ServerName},
		Protocol: state.NegotiatedProtocol, version: state.Version, resumed: state.DidResume,
	}
	// What nobody has verified is nobody's name.
	if len(state.VerifiedChains) > 0 && len(state.PeerCertificates) > 0 {
		a.certify(state.PeerCertificates[0])
	}
	s.Known = a
	return a
}

// agreementOf returns what the handshake of a connection has come to; nil: it had none.
func agreementOf(s *stream.Secure) *agreement {
	if s == nil {
		return nil
	}
	a, _ := s.Known.(*agreement)
	return a
}

// tls returns what the access log is to know of it.
func (a *agreement) tls() *accesslog.TLS {
	if a == nil {
		return nil
	}
	return &a.TLS
}

func versionName(v uint16) string {
	switch v {
	case tls.VersionTLS10:
		return "TLSv1"
	case tls.VersionTLS11:
		return "TLSv1.1"
	case tls.VersionTLS12:
		return "TLSv1.2"
	case tls.VersionTLS13:
		return "TLSv1.3"
	}
	return ""
}

// certify notes whose certificate it is.
func (a *agreement) certify(c *x509.Certificate) {
	sum := sha256.Sum256(c.Raw)
	p := &accesslog.Peer{
		Fingerprint: hex.EncodeToString(sum[:]), Serial: c.SerialNumber.Text(16),
		Subject: distinguishedName(c.Subject.String()), Issuer: distinguishedName(c.Issuer.String()),
	}
	var b strings.Builder
	b.WriteString("Hash=" + p.Fingerprint + `;Subject="`)
	if len(p.Subject) <= mostCertName {
		b.WriteString(p.Subject)
	}
	b.WriteString(`"`)
	left := mostCertNames
	list := func(key string, names []string) (joined string) {
		for _, n := range names {
			if left == 0 || n == "" || len(n) > mostCertName || b.Len()+len(key)+len(n)+4 > mostCertElement {
				continue
			}
			left--
			if joined != "" {
				joined += ","
			}
			joined += n
			if strings.Contains(n, "=") {
				n = `"` + n + `"`
			}
			b.WriteString(";" + key + "=" + n)
		}
		return joined
	}
	uris := make([]string, 0, len(c.URIs))
	for _, u := range c.URIs {
		uris = append(uris, uriName(u.String()))
	}
	p.URIs = list("URI", uris)
	hosts := make([]string, 0, len(c.DNSNames))
	for _, n := range c.DNSNames {
		hosts = append(hosts, hostName(n))
	}
	p.DNSNames = list("DNS", hosts)
	a.TLS.Peer, a.element = p, b.String()
}

// distinguishedName writes each character of a name that has a meaning for whoever reads it, or
// cannot be printed, as its number (RFC 2253 §2.4).
func distinguishedName(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		escaped := c == '\\' && i+1 < len(s)
		if escaped {
			i++
			c = s[i]
		}
		if escaped || c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			b.WriteByte('\\')
			b.WriteByte(upperHex[c>>4])
			b.WriteByte(upperHex[c&15])
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}

const upperHex = "0123456789ABCDEF"

// uriName is the same for a URI (RFC 3986 §2.1).
func uriName(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ', c >= 0x7f, c == '"', c == '\\', c == ',', c == ';':
			b.WriteByte('%')
			b.WriteByte(upperHex[c>>4])
			b.WriteByte(upperHex[c&15])
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// hostName returns "" for what is no name of a host.
func hostName(s string) string {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.', c == '*':
		default:
			return ""
		}
	}
	return s
}

// presented is what the client says in certificateField, if it is to be believed. It is asked
// before fields are dropped.
func (r *request) presented(s *side, trusted bool) string {
	if s.certificates != config.AppendCertificate && s.certificates != config.ForwardCertificate {
		return ""
	}
	if a := agreementOf(r.x.Downstream().Secure); !trusted && (a == nil || a.element == "") {
		return ""
	}
	had, _ := listOf(r.head.Fields, certificateField)
	return had
}

// present has the request say which certificate the client has, as the configuration wants it.
// Who has none to show is not known by what it says.
func (r *request) present(s *side, had string) {
	f := &r.head.Fields
	f.Del(certificateField)
	own := ""
	if a := agreementOf(r.x.Downstream().Secure); a != nil && s.certificates != config.ForwardCertificate && s.certificates != config.SanitizeCertificate {
		own = a.element
	}
	switch {
	case own == "" && had == "":
	case own == "":
		f.Add(certificateField, had)
	case had == "":
		f.Add(certificateField, own)
	default:
		f.Add(certificateField, r.head.Texts.Join(had, ",", own))
	}
}
