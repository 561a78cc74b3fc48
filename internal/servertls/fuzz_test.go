package servertls

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"holdfast/internal/tlstest"
)

// Files are written by others, and what is in a key must never be in an error.
func FuzzFiles(f *testing.F) {
	a := tlstest.NewAuthority(f)
	for _, l := range []*tlstest.Leaf{a.Leaf([]string{"a.example", "*.b.example"}), a.Leaf(nil, tlstest.RSA())} {
		f.Add(l.CertificatePEM(), l.KeyPEM())
		f.Add(append(l.CertificatePEM(), a.PEM()...), append([]byte("text\n"), l.KeyPEM()...))
		f.Add(l.KeyPEM(), l.CertificatePEM())
	}
	f.Fuzz(func(t *testing.T, certificate, key []byte) {
		if clients, err := parseAuthorities(certificate); err == nil {
			again, err := parseAuthorities(clients.encode())
			if err != nil || !again.same(clients) {
				t.Errorf("what is kept of authorities is another: %v", err)
			}
		}
		p, err := parsePair(certificate, key)
		if err != nil {
			for line := range bytes.Lines(key) {
				if line = bytes.TrimSpace(line); len(line) > 40 && !bytes.Contains(certificate, line) && strings.Contains(err.Error(), string(line)) {
					t.Errorf("an error has a line of the key: %v", err)
				}
			}
			return
		}
		newChoice([]*pair{p}, true).of("a.example")
		p.days(time.Now())
		certificate, key, err = p.encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parsePair(certificate, key); err != nil || !again.same(p) || again.kind != p.kind {
			t.Errorf("what is kept of a certificate is another: %v", err)
		}
	})
}
