package exchange

import "holdfast/internal/metrics"

// RequestBounds are those of histograms of requests, in seconds: on the client's side
// and on the upstream's, so that the two can be compared.
var RequestBounds = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}

// Classes count responses by the class of their status, 1xx to 5xx. Codecs neither send
// nor receive any other. The zero value counts nothing.
type Classes [5]*metrics.Counter

// NewClasses returns the counters of d, whose last label is the class, for these
// values of the others.
func NewClasses(r *metrics.Registry, d *metrics.Desc, labels ...string) (c Classes) {
	for i, class := range []string{"1xx", "2xx", "3xx", "4xx", "5xx"} {
		c[i] = r.Counter(d, append(labels[:len(labels):len(labels)], class)...)
	}
	return c
}

// Of returns the counter of a status.
func (c *Classes) Of(status int) *metrics.Counter { return c[status/100-1] }
