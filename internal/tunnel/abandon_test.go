package tunnel_test

import (
	"errors"
	"io"
	"syscall"
	"testing"

	"holdfast/internal/tunnel"
)

// A receiver that did not get all must not take what it got for all.
func TestAnAbandonedStreamDoesNotLookComplete(t *testing.T) {
	onAllRelays(t, func(t *testing.T, r relay) {
		set, _ := r.newSet(t)
		client, server := openOver(t, set, tunnel.Spec{}, true)
		sent := overfill(t, client)
		client.CloseWrite()
		set.Abandon()
		waitEmpty(t, set)
		n, err := io.Copy(io.Discard, server)
		if int(n) < len(sent) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%d of %d bytes came, and then %v", n, len(sent), err)
		}
	})
}

// What has goroutines does not count when the loops are dealt their tunnels.
func TestTheLoopsGetEqualShares(t *testing.T) {
	t.Parallel()
	set := relay{}.newSetWith(t, tunnel.Options{Loops: shape{loops: 2, tunnels: 4, buffers: 4}.start(t)})
	for range 8 {
		_, down := tcpPair(t, false)
		_, up := tcpPair(t, false)
		set.Start(tunnel.Spec{Down: down, Up: up})
		_, down = tcpPair(t, false)
		_, up = tcpPair(t, false)
		set.Start(tunnel.Spec{Down: plain{down}, Up: plain{up}})
	}
	if got := set.Shares(); got[0] != 4 || got[1] != 4 {
		t.Errorf("the loops have %v tunnels, want 4 each", got)
	}
}

// Both orders may reach a loop in one turn.
func TestWhatIsAbandonedJustAfterItWasClosedHasTheFirstReason(t *testing.T) {
	t.Parallel()
	loops := shape{loops: 1, tunnels: 2, buffers: 4}.start(t)
	e := new(ends)
	set := relay{}.newSetWith(t, tunnel.Options{OnEnd: e.add, Loops: loops})
	open(t, set, tunnel.Spec{})
	thaw := freeze(loops[0])
	set.CloseAll(tunnel.Operator, 0)
	set.Abandon()
	thaw()
	wantEnd(t, set, e, tunnel.Operator)
}
