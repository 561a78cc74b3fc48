package stream

import "testing"

// What crypto/tls has may change with a version of Go: then idle connections cost more, until
// somebody has looked at what has become of its buffers.
func TestTheBuffersOfTLSAreWhereTheyAreLookedFor(t *testing.T) {
	t.Parallel()
	if !canSlim {
		t.Error("the buffers of crypto/tls cannot be given up")
	}
}
