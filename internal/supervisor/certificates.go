package supervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/control"
)

// Certificates are those that a generation works with.
type Certificates struct {
	Generation   int                   `json:"generation"`   // the one that serves
	Certificates []control.Certificate `json:"certificates"` // the first to expire first
}

// Certificates implements [Commands].
func (s *Supervisor) Certificates(ctx context.Context) (*Certificates, error) {
	if err := s.awaitBegin(ctx); err != nil {
		return nil, err
	}
	select { // one answer is made at a time: it may be large
	case s.viewing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.viewing }()
	var g *generation
	if err := s.try(ctx, func() { g = s.serving }); err != nil {
		return nil, err
	}
	if g == nil {
		return nil, errors.New("no generation serves")
	}
	fd, err := g.payload(ctx, control.TypeCertificates, showTimeout, control.MaxCertificates)
	if err != nil {
		return nil, fmt.Errorf("generation %d does not say which certificates it has: %w", g.number, err)
	}
	said, err := control.ReadCertificates(fd)
	if err != nil {
		return nil, fmt.Errorf("generation %d does not say which certificates it has: %w", g.number, err)
	}
	all := &Certificates{Generation: g.number, Certificates: []control.Certificate{}}
	for _, c := range said.Certificates {
		all.Certificates = append(all.Certificates, cleanCertificate(c))
	}
	slices.SortStableFunc(all.Certificates, func(a, b control.Certificate) int {
		return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.Listener, b.Listener), cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.File, b.File))
	})
	return all, nil
}

// cleanCertificate is what a generation says of a certificate, short and harmless: names are
// whatever its maker has written.
func cleanCertificate(c control.Certificate) control.Certificate {
	for _, word := range []*string{&c.Listener, &c.Cluster, &c.Subject, &c.Issuer, &c.Serial, &c.Fingerprint, &c.Key, &c.Problem} {
		*word = clean(*word)
	}
	c.File = oneLine(c.File)
	names := c.Names[:min(len(c.Names), control.MaxNames)]
	c.Names = nil
	for _, n := range names {
		c.Names = append(c.Names, clean(n))
	}
	return c
}
