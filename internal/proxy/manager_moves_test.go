package proxy_test

import (
	"fmt"
	"testing"

	"holdfast/internal/exchange"
)

// A request of which a connection that has ended has seen nothing goes to another one, whatever
// its method is and without a retry; but not for ever.
func TestARequestThatNobodyHasSeenMoves(t *testing.T) {
	t.Parallel()
	unseen := failing(fmt.Errorf("%w: %w", exchange.ErrRefused, exchange.ErrNoAnswer))
	for ends, want := range []int{200, 200, 200, 200, 503} {
		t.Run(fmt.Sprint(ends), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				behave := []func(*origin){}
				for range ends {
					behave = append(behave, unseen)
				}
				f.behave[first] = inTurn(append(behave, ok)...)
				c := get(t, "a.example", "/")
				c.request.Method = "POST"
				c.start(f.manager()).wait()
				c.wantStatus(want)
			})
		})
	}
}
