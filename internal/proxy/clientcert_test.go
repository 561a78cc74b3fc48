package proxy

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"math/big"
	"net/url"
	"strings"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/tlstest"
)

func certified(c *x509.Certificate) *agreement {
	a := new(agreement)
	a.certify(c)
	return a
}

// Nothing in a certificate ends a pair, an element, a string or a line.
func TestACertificateIsToldSafely(t *testing.T) {
	t.Parallel()
	const hash = "Hash=6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d;"
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for _, test := range []struct {
		name    string
		subject pkix.Name
		uris    []*url.URL
		hosts   []string
		want    string
	}{
		{"nobody", pkix.Name{}, nil, nil, `Subject=""`},
		{"the usual", pkix.Name{CommonName: "me", Organization: []string{"us"}}, []*url.URL{uri("spiffe://us/me")}, []string{"me.test", "*.me.test"}, `Subject="CN=me,O=us";URI=spiffe://us/me;DNS=me.test;DNS=*.me.test`},
		{"quotes", pkix.Name{CommonName: `a";URI="b`}, nil, nil, `Subject="CN=a\22\3BURI=\22b"`},
		{"a backslash at the end", pkix.Name{CommonName: `a\`}, nil, nil, `Subject="CN=a\5C"`},
		{"a comma", pkix.Name{CommonName: `a,Hash=b`}, nil, nil, `Subject="CN=a\2CHash=b"`},
		{"another line", pkix.Name{CommonName: "a\r\nX-Evil: 1\x00\x7f"}, nil, nil, `Subject="CN=a\0D\0AX-Evil: 1\00\7F"`},
		{"other scripts", pkix.Name{CommonName: "é"}, nil, nil, `Subject="CN=\C3\A9"`},
		{"spaces around", pkix.Name{CommonName: " a "}, nil, nil, `Subject="CN=\20a\20"`},
		{"a URI with separators", pkix.Name{}, []*url.URL{{Scheme: "x", Opaque: "a;Hash=b,\"c\\\r\n"}}, nil, `Subject="";URI="x:a%3BHash=b%2C%22c%5C%0D%0A"`},
		{"no names", pkix.Name{}, nil, []string{"a;b", "a,b", "", "a\nb", "a\"", "b.test"}, `Subject="";DNS=b.test`},
		{"a subject that is too long", pkix.Name{CommonName: strings.Repeat("x", 1025)}, nil, []string{"b.test"}, `Subject="";DNS=b.test`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := &x509.Certificate{Raw: []byte{0}, SerialNumber: big.NewInt(255), Subject: test.subject, URIs: test.uris, DNSNames: test.hosts}
			a := certified(c)
			if a.element != hash+test.want {
				t.Errorf("got  %q\nwant %q", a.element, hash+test.want)
			}
			if a.TLS.Peer.Serial != "ff" {
				t.Errorf("serial number %s", a.TLS.Peer.Serial)
			}
		})
	}
}

func TestACertificateWithManyNamesIsBounded(t *testing.T) {
	t.Parallel()
	c := &x509.Certificate{SerialNumber: big.NewInt(1)}
	for range 1000 {
		c.DNSNames = append(c.DNSNames, "a.test")
	}
	if n := strings.Count(certified(c).element, "DNS="); n != mostCertNames {
		t.Errorf("%d names", n)
	}
	for i := range c.DNSNames {
		c.DNSNames[i] = strings.Repeat("x", 500)
	}
	if n := len(certified(c).element); n > mostCertElement || n < mostCertElement/2 {
		t.Errorf("%d bytes", n)
	}
}

// What a certificate may be is anything that its authority signs.
func FuzzCertificate(f *testing.F) {
	f.Add("me", "spiffe://us/me", "me.test")
	f.Add("a\\\"\r\n", "x:\";,=", "a;b")
	f.Fuzz(func(t *testing.T, name, uri, host string) {
		c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{{Scheme: "x", Opaque: uri}}, DNSNames: []string{host}}
		element := certified(c).element
		quoted, pairs := false, 1
		for i := range len(element) {
			switch c := element[i]; {
			case c < ' ' || c >= 0x7f:
				t.Fatalf("%q", element)
			case c == '"':
				quoted = !quoted
			case c == ';' && !quoted:
				pairs++
			case c == ',' && !quoted:
				t.Fatalf("a second element: %q", element)
			case c == '\\' && (i+2 >= len(element) || !isHex(element[i+1]) || !isHex(element[i+2])):
				t.Fatalf("an escape of what nobody knows: %q", element)
			}
		}
		if quoted || pairs > 4 {
			t.Fatalf("%q", element)
		}
	})
}

func isHex(c byte) bool { return strings.IndexByte(upperHex, c) >= 0 }

// downstreamOf is an exchange of which nothing is known but who has sent it.
type downstreamOf struct {
	exchange.Exchange
	down exchange.Downstream
}

func (d *downstreamOf) Downstream() *exchange.Downstream { return &d.down }

// What a client says of its certificate reaches upstreams only as the configuration wants it.
func TestACertificateCannotBeForged(t *testing.T) {
	t.Parallel()
	const forged, own = `Hash=forged`, `Hash=own;Subject="CN=me"`
	none, shown := new(agreement), &agreement{element: own}
	for _, test := range []struct {
		name    string
		mode    config.CertificateForwarding
		a       *agreement
		trusted bool
		want    string
	}{
		{"removed", config.SanitizeCertificate, none, false, ""},
		{"removed, with a certificate", config.SanitizeCertificate, shown, false, ""},
		{"removed, from a trusted proxy", config.SanitizeCertificate, shown, true, ""},
		{"set", config.SetCertificate, shown, false, own},
		{"set, without a certificate", config.SetCertificate, none, false, ""},
		{"set, a trusted proxy without a certificate", config.SetCertificate, none, true, ""},
		{"set, a trusted proxy", config.SetCertificate, shown, true, own},
		{"append", config.AppendCertificate, shown, false, forged + "," + forged + "2," + own},
		{"append, without a certificate", config.AppendCertificate, none, false, ""},
		{"append, a trusted proxy without a certificate", config.AppendCertificate, none, true, forged + ", " + forged + "2"},
		{"forward", config.ForwardCertificate, shown, false, forged + "," + forged + "2"},
		{"forward, without a certificate", config.ForwardCertificate, none, false, ""},
		{"forward, a trusted proxy without a certificate", config.ForwardCertificate, none, true, forged + "," + forged + "2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			secure := &stream.Secure{Known: test.a}
			head := &exchange.Request{Scheme: "https", Authority: "a.test", Fields: exchange.Fields{
				{Name: "x-forwarded-client-cert", Value: forged}, {Name: "X_Forwarded_Client_Cert", Value: "Hash=twin"}, {Name: "X-Forwarded-Client-Cert", Value: forged + "2"},
			}}
			r := &request{transit: transit{head: head, x: &downstreamOf{down: exchange.Downstream{Secure: secure}}, m: &Manager{options: ManagerOptions{Random: func() uint64 { return 1 }}}}}
			s := &side{secure: true, certificates: test.mode}
			if test.trusted {
				s.edge.TrustedHops = 1
			}
			r.identify(s, addrPort(nil))
			got := ""
			lines := 0
			for _, l := range head.Fields {
				if strings.EqualFold(strings.ReplaceAll(l.Name, "_", "-"), certificateField) {
					lines, got = lines+1, l.Value
				}
			}
			if strings.ReplaceAll(got, ", ", ",") != strings.ReplaceAll(test.want, ", ", ",") || lines > 1 {
				t.Errorf("%d lines, %q, want %q", lines, got, test.want)
			}
			if proto, _ := head.Fields.Get(forwardedProto); proto != "https" {
				t.Errorf("the scheme is %q", proto)
			}
		})
	}
}

// A certificate that nobody has verified is nobody's.
func TestOnlyAVerifiedCertificateIsTold(t *testing.T) {
	t.Parallel()
	stranger := tlstest.NewAuthority(t).Leaf([]string{"me.test"}, tlstest.Client())
	for auth, told := range map[tls.ClientAuthType]bool{tls.RequestClientCert: false, tls.RequireAnyClientCert: false, tls.VerifyClientCertIfGiven: true} {
		g := guardedOn(t, 1, 0)
		leaf := stranger
		if told {
			leaf = g.authority.Leaf([]string{"me.test"}, tlstest.Client())
		}
		streamtest.Do(g.loops[0], func() { g.server.ClientAuth, g.server.ClientCAs = auth, g.authority.Pool() })
		c := g.client()
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &leaf.Certificate, nil }
		if _, err := g.shake(c); err != nil {
			t.Fatal(err)
		}
		a := await(t, "it is served", g.served)
		sum := sha256.Sum256(leaf.Certificate.Certificate[0])
		if hash := "Hash=" + hex.EncodeToString(sum[:]) + ";"; strings.HasPrefix(a.element, hash) != told || (a.TLS.Peer != nil) != told {
			t.Errorf("%v: %q", auth, a.element)
		}
		g.end(g.next())
	}
}
