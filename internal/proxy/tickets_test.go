package proxy

import (
	"slices"
	"testing"

	"holdfast/internal/control"
)

type fakeTicketServer struct{ keys [][32]byte }

func (f *fakeTicketServer) SetTicketKeys(keys [][32]byte) { f.keys = slices.Clone(keys) }

func takeKeys(t *testing.T, k *ticketKeys, keys ...[32]byte) {
	t.Helper()
	f, err := control.Bytes(control.TicketKeys(keys))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := control.Duplicate(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.take([]int{fd}); err != nil {
		t.Fatal(err)
	}
}

// Keys may come before or after a listener is made, and again and again.
func TestListenersHaveTheKeysThatCameLast(t *testing.T) {
	t.Parallel()
	var k ticketKeys
	var early, late fakeTicketServer
	k.serve("a", &early)
	if early.keys != nil {
		t.Error("keys of nowhere")
	}
	for n := range byte(3) {
		takeKeys(t, &k, [32]byte{1, n}, [32]byte{2, n})
		k.serve("a", &late)
		if want := keysFor("a", [][32]byte{{1, n}, {2, n}}); !slices.Equal(late.keys, want) || n == 0 && len(early.keys) != 2 {
			t.Errorf("%d: not the keys that came last", n)
		}
	}
	if err := k.take(nil); err == nil {
		t.Error("no keys were taken")
	}
}

func TestEachListenerHasTicketKeysOfItsOwn(t *testing.T) {
	t.Parallel()
	var k ticketKeys
	var a, b fakeTicketServer
	k.serve("a", &a)
	k.serve("b", &b)
	keys := [][32]byte{{1}, {2}}
	takeKeys(t, &k, keys...)
	all := slices.Concat(keys, a.keys, b.keys)
	for i, key := range all {
		if slices.Contains(all[:i], key) {
			t.Error("a key is used twice")
		}
	}
	if len(all) != 6 {
		t.Errorf("%d keys", len(all))
	}
}
