package config

import (
	"errors"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// ListenerTLS is how a listener speaks TLS to its clients.
type ListenerTLS struct {
	Certificates []KeyPair // at least one; the first is for who asks for none by name
	MinVersion   uint16    // as TLS has it on the wire: TLS12 or TLS13
	StrictSNI    bool      // who asks for no name of a certificate is refused

	ClientCertificates ClientCertificates
	ClientCA           string       // file in PEM with those who sign them; "" where none are asked for
	ClientNames        []ClientName // of which a client's certificate must have one; nil: any will do

	HandshakeTimeout time.Duration
	Handshakes       int // at once, in one generation; 0: unlimited

	ForwardCertificate CertificateForwarding // of clients, to upstreams

	KeyLog string // file for the secrets of all connections; "" means off
}

// Versions of TLS, as it has them on the wire.
const (
	TLS12 = 0x0303
	TLS13 = 0x0304
)

// KeyPair are two files in PEM: a certificate, with those that lead to a root behind it, and its
// key.
type KeyPair struct{ Certificate, Key string }

// ClientCertificates says whether clients show who they are.
type ClientCertificates int

// What is asked of clients.
const (
	ClientCertificatesOff      ClientCertificates = iota // nothing
	ClientCertificatesOptional                           // what they show must be valid
	ClientCertificatesRequired                           // whoever shows none is refused
)

// ClientName is a subject alternative name.
type ClientName struct {
	Kind string // "dns", "ip", "uri" or "email"
	Text string // of DNS in lower case, where "*." in front is any one label; of the others as certificates have it
}

// tlsFile is where a file stands that is read and watched.
var tlsFile = form[string]{`an absolute path like "/etc/holdfast/tls.pem"`, func(s string) (string, error) {
	return parseFilePath(s, maxPath)
}, asIs}

var tlsVersion = form[uint16]{`"1.2" or "1.3"`, func(s string) (uint16, error) {
	switch s {
	case "1.2":
		return TLS12, nil
	case "1.3":
		return TLS13, nil
	case "1.0", "1.1":
		return 0, errors.New("it is broken (RFC 8996), and not spoken")
	}
	return 0, errForm
}, func(v uint16) string {
	if v == TLS13 {
		return "1.3"
	}
	return "1.2"
}}

// clientName is told apart by its look.
var clientName = form[ClientName]{`a name as in certificates like "app.example.com", "spiffe://example.com/app", "app@example.com" or "10.0.0.1"`, parseClientName,
	func(n ClientName) string { return n.Text }}

func parseClientName(s string) (ClientName, error) {
	if len(s) == 0 || len(s) > 2048 || hasControl(s) || strings.ContainsFunc(s, func(r rune) bool { return r == ' ' || r >= 0x7f }) {
		return ClientName{}, errForm
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		if ip.Zone() != "" {
			return ClientName{}, errors.New("a zone is not supported")
		}
		return ClientName{"ip", ip.Unmap().String()}, nil
	}
	if strings.Contains(s, ":") { // before "@", which may be in it
		if u, err := url.Parse(s); err != nil || u.Scheme == "" {
			return ClientName{}, errors.New("it is no URI")
		}
		return ClientName{"uri", s}, nil
	}
	if local, host, ok := strings.Cut(s, "@"); ok {
		if local == "" || host == "" || strings.ContainsAny(host, "@*") {
			return ClientName{}, errForm
		}
		return ClientName{"email", local + "@" + strings.ToLower(host)}, nil
	}
	if s == "*" {
		return ClientName{}, errors.New("leave the key out for any certificate")
	}
	name, err := serverName.parse(s)
	if err != nil {
		return ClientName{}, err
	}
	return ClientName{"dns", name}, nil
}

// readListenerTLS returns nil where there is none.
func readListenerTLS(listener *table) *ListenerTLS {
	if !listener.asked("tls") {
		return nil
	}
	t := listener.table("tls")
	l := &ListenerTLS{MinVersion: TLS12, HandshakeTimeout: 10 * time.Second, Handshakes: 1000}
	l.Certificates = readKeyPairs(t)
	read(t, "min_version", &l.MinVersion, tlsVersion)
	t.boolean("strict_sni", &l.StrictSNI)
	readClientCertificates(t, l)
	read(t, "handshake_timeout", &l.HandshakeTimeout, duration)
	t.limit("max_handshakes", &l.Handshakes, 1)
	l.ForwardCertificate = readCertificateForwarding(listener, t)
	if t.asked("key_log") {
		read(t, "key_log", &l.KeyLog, tlsFile)
	}
	t.strict()
	return l
}

func readKeyPairs(t *table) (pairs []KeyPair) {
	if _, ok := t.get("certificates"); !ok || t.empty("certificates") {
		t.at("certificates").fail(`missing; must be an array with at least one table like { cert = "/etc/holdfast/a.pem", key = "/etc/holdfast/a.key" }`)
		return nil
	}
	declared := map[string]node{}
	for _, c := range t.tables("certificates") {
		var p KeyPair
		need(c, "cert", &p.Certificate, tlsFile)
		need(c, "key", &p.Key, tlsFile)
		c.strict()
		if n := c.at("cert"); p.Certificate != "" {
			if first, twice := declared[p.Certificate]; twice {
				n.fail("%s is listed twice (%s)", quote(p.Certificate), first)
				continue
			}
			declared[p.Certificate] = n
		}
		pairs = append(pairs, p)
	}
	return pairs
}

func readClientCertificates(t *table, l *ListenerTLS) {
	var mode int
	read(t, "client_certificates", &mode, numbered([]string{"off", "optional", "required"}))
	l.ClientCertificates = ClientCertificates(mode)
	if t.asked("client_ca") {
		read(t, "client_ca", &l.ClientCA, tlsFile)
	}
	if t.asked("client_names") {
		for _, e := range list(t, "client_names", clientName) {
			if slices.Contains(l.ClientNames, e.value) {
				e.fail("%s is listed twice", quote(e.value.Text))
				continue
			}
			l.ClientNames = append(l.ClientNames, e.value)
		}
		if t.empty("client_names") {
			t.at("client_names").fail("must have at least one name; leave the key out for any certificate")
		}
	}
	switch _, wordIsString := t.keys["client_certificates"].(string); {
	case t.has("client_certificates") && (!wordIsString || mode == 0 && t.keys["client_certificates"] != "off"): // nobody knows what goes with that
	case l.ClientCertificates == ClientCertificatesOff:
		const text = `nobody's certificate is asked for unless client_certificates is "required" or "optional"`
		t.inapplicable("client_ca", text)
		t.inapplicable("client_names", text)
	case !t.has("client_ca"):
		t.at("client_ca").fail("missing; must be %s: whose signature makes a client's certificate a valid one", tlsFile.is)
	}
}
