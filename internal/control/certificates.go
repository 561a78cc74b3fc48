package control

import (
	"encoding/json"
	"fmt"
	"time"
)

// MaxCertificates is the most bytes that [Certificates] may have.
const MaxCertificates = 8 << 20

// How much of it is taken at the most, whoever has sent it: decoded it is many times as large.
const (
	mostCertificates  = 20_000
	mostOfCertificate = 64 << 10
)

// Certificates are those that a generation works with now. There is no private key among them.
type Certificates struct {
	Certificates []Certificate `json:"certificates"`
}

// Certificate is one of a file: the one that is shown to others, or one that signs those of
// others.
type Certificate struct {
	Listener  string `json:"listener,omitempty"` // which it belongs to
	Cluster   string `json:"cluster,omitempty"`  // or this
	File      string `json:"file"`
	Authority bool   `json:"authority,omitempty"` // it signs the certificates of clients

	Subject     string    `json:"subject,omitempty"`
	Issuer      string    `json:"issuer,omitempty"`
	Names       []string  `json:"names,omitempty"` // subject alternative names of all kinds, not more than [MaxNames]
	MoreNames   int       `json:"more_names,omitempty"`
	Serial      string    `json:"serial,omitempty"` // in hex
	Fingerprint string    `json:"fingerprint,omitempty"`
	Key         string    `json:"key,omitempty"` // what kind its key is
	ValidFrom   time.Time `json:"valid_from,omitzero"`
	Expires     time.Time `json:"expires,omitzero"` // the first of those in the file; zero: there is none to work with

	Problem string `json:"problem,omitempty"` // why the file is of no use as it is now; "": it is what is worked with
}

// MaxNames is of how many names of a certificate is told.
const MaxNames = 32

// ReadCertificates is [ReadPayload] for what a generation answers to [TypeCertificates].
func ReadCertificates(fd int) (*Certificates, error) {
	data, err := ReadBytes(fd, MaxCertificates)
	if err != nil {
		return nil, err
	}
	var raw struct {
		Certificates json.RawMessage `json:"certificates"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	all := new(Certificates)
	err = eachElement(raw.Certificates, func(d *json.Decoder) error {
		if len(all.Certificates) == mostCertificates {
			return fmt.Errorf("more than %d certificates", mostCertificates)
		}
		var one json.RawMessage
		if err := d.Decode(&one); err != nil {
			return err
		}
		var c Certificate
		if err := boundedJSON(one, mostOfCertificate, &c); err != nil {
			return err
		}
		all.Certificates = append(all.Certificates, c)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	return all, nil
}
