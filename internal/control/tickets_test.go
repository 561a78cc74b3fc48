package control_test

import (
	"slices"
	"testing"

	"holdfast/internal/control"
)

func TestTicketKeysArriveAsTheyWere(t *testing.T) {
	t.Parallel()
	keys := [][32]byte{{1}, {2, 3}, {31: 4}}
	got, err := readTicketKeys(t, control.TicketKeys(keys))
	if err != nil || !slices.Equal(got, keys) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestWhatIsNoTicketKeysIsRefused(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{"nothing": nil, "too short": make([]byte, 31), "a byte too much": make([]byte, 65), "too many": make([]byte, 17*32)} {
		if got, err := readTicketKeys(t, b); err == nil {
			t.Errorf("%s: %d keys", name, len(got))
		}
	}
}

func readTicketKeys(t *testing.T, b []byte) ([][32]byte, error) {
	t.Helper()
	f, err := control.Bytes(b)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := control.Duplicate(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return control.ReadTicketKeys(fd)
}
