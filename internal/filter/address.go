package filter

import (
	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
)

// addresses lets clients pass by their addresses.
type addresses struct {
	*route.Addresses
	denied *metrics.Counter
}

var denied = &Answer{Status: 403, Cause: AddressDenied, Reason: "the client's address is not allowed"}

func newAddresses(f *config.Filters, counter *metrics.Counter) *addresses {
	return &addresses{route.NewAddresses(f.Allow, f.Deny), counter}
}

// Filter implements [Filter].
func (a *addresses) Filter(r *Request) *Answer {
	if a.Denies(r.Client) {
		a.denied.Inc()
		return denied
	}
	return nil
}
