package tunnel_test

import (
	"testing"

	"holdfast/internal/tunnel"
)

// On its way to a loop a tunnel needs other descriptors. One that may not have them is
// relayed by goroutines, with those that it has.
func TestATunnelThatMayNotHaveADescriptorKeepsItsOwn(t *testing.T) {
	t.Parallel()
	for _, may := range []bool{true, false} {
		r := relay{loops: shape{loops: 1, tunnels: 4, buffers: 4, pipes: 1}}
		set := r.newSetWith(t, tunnel.Options{MayHave: func(int) bool { return may }})
		client, server := open(t, set, tunnel.Spec{})
		write(t, client, []byte("hello"))
		wantBytes(t, server, "hello")
		write(t, server, []byte("and back"))
		wantBytes(t, client, "and back")
		if onLoop := set.Footprint() != [4]int{}; onLoop != may {
			t.Errorf("it may have others: %t; a loop relays it: %t", may, onLoop)
		}
		client.Close()
		wantEOF(t, server)
		server.Close()
		waitEmpty(t, set)
	}
}
