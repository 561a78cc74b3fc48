package certfiles

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"

	"holdfast/internal/control"
)

// mostDescribed bounds each text of a description: certificates may have long ones.
const mostDescribed = 512

// Describe says for people what a certificate is.
func Describe(c *x509.Certificate) control.Certificate {
	sum := sha256.Sum256(c.Raw)
	d := control.Certificate{
		Subject: short(c.Subject.String()), Issuer: short(c.Issuer.String()), Serial: short(c.SerialNumber.Text(16)), Fingerprint: hex.EncodeToString(sum[:]),
		Key: keyOf(c.PublicKey), ValidFrom: c.NotBefore.UTC(), Expires: c.NotAfter.UTC(),
	}
	name := func(s string) {
		if len(d.Names) == control.MaxNames {
			d.MoreNames++
			return
		}
		d.Names = append(d.Names, short(s))
	}
	for _, n := range c.DNSNames {
		name(n)
	}
	for _, ip := range c.IPAddresses {
		name(ip.String())
	}
	for _, u := range c.URIs {
		name(u.String())
	}
	for _, e := range c.EmailAddresses {
		name(e)
	}
	return d
}

func keyOf(public any) string {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return ""
}

func short(s string) string { return s[:min(len(s), mostDescribed)] }
