package control_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
)

// descriptor is one of a payload of its own.
func descriptor(t testing.TB, data []byte) int {
	t.Helper()
	f, err := control.Bytes(data)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// sentOf is a descriptor of what is sent of v.
func sentOf(t *testing.T, v any) int {
	t.Helper()
	f, err := control.Payload(v)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestWhatIsToldOfClustersArrives(t *testing.T) {
	t.Parallel()
	rate, at, now := 99.5, netip.MustParseAddrPort("192.0.2.1:80"), time.Unix(1e9, 0).UTC()
	states := &control.ClusterStates{Clusters: []control.ClusterState{
		{
			Name: "app", Policy: "maglev",
			Endpoints: []control.EndpointState{
				{
					Address: "app:80", At: at, Name: "192.0.2.1:80", Weight: 3, Priority: 1, Metadata: map[string]string{"zone": "a"},
					Conditions: []string{"failing"}, Reason: "503", Ejections: 2, EjectedUntil: now, HealthySince: now, LastCheck: now, SuccessRate: &rate,
					Connects: 1, ConnectSum: 0.5, ConnectFails: 2, Requests: 3, RequestsSum: 4, Tunnels: 5, Elsewhere: 6, Connections: 7,
				},
				{Address: "unix:/a", Name: "unix:/a", Healthy: true},
			},
			TLS:      &control.TLSState{Unverified: true, Expires: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC), Problem: "no such file"},
			Breakers: []control.BreakerState{{Priority: "default", Limits: map[string]control.BreakerUsed{"tunnels": {Limit: 1, Here: 2, Elsewhere: 3, Open: true, Overflows: 4}}}},
		},
		{Name: "empty"},
	}}
	if got, err := control.ReadClusterStates(sentOf(t, states)); err != nil || !reflect.DeepEqual(got, states) {
		t.Errorf("got %+v, %v", got, err)
	}
	loads := &control.Loads{Clusters: []control.ClusterLoad{
		{
			Name: "app", Endpoints: []control.EndpointLoad{{Address: "app:80", At: at, Load: 7}},
			Used: []control.BreakerLoad{{Priority: "high", Used: map[string]int64{"requests": 3}}},
		},
	}}
	if got, err := control.ReadLoads(sentOf(t, loads)); err != nil || !reflect.DeepEqual(got, loads) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, nothing := range []any{control.Loads{}, control.ClusterStates{}} {
		if got, err := control.ReadLoads(sentOf(t, nothing)); err != nil || len(got.Clusters) != 0 {
			t.Errorf("got %+v, %v", got, err)
		}
	}
}

// Each of these takes little to send, and much to hold.
func TestWhatIsToldOfClustersIsBounded(t *testing.T) {
	t.Parallel()
	many := func(element string, n int) string { return strings.TrimSuffix(strings.Repeat(element+",", n), ",") }
	for name, text := range map[string]string{
		"no JSON":               "rubbish",
		"of another kind":       `[1,2]`,
		"no array":              `{"clusters":{"a":1}}`,
		"too long":              `{"clusters":[]}` + strings.Repeat(" ", control.MaxClusters),
		"clusters of nothing":   `{"clusters":[` + many("{}", 21_000) + `]}`,
		"clusters of null":      `{"clusters":[` + many("null", 21_000) + `]}`,
		"numbers":               `{"clusters":[` + many("1", 10) + `]}`,
		"endpoints of nothing":  `{"clusters":[{"endpoints":[` + many("{}", 101_000) + `]}]}`,
		"endpoints in clusters": `{"clusters":[` + many(`{"endpoints":[`+many("{}", 30_000)+`]}`, 4) + `]}`,
		"endpoints are numbers": `{"clusters":[{"endpoints":[` + many("1", 10) + `]}]}`,
		"breakers":              `{"clusters":[{"breakers":[` + many("{}", 30_000) + `],"used":[` + many("{}", 30_000) + `]}]}`,
		"the data of endpoints": `{"clusters":[{"endpoints":[{"metadata":{"a":"` + strings.Repeat("x", 70_000) + `"},"address":1}]}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := control.ReadClusterStates(descriptor(t, []byte(text))); err == nil {
				t.Error("states were taken")
			}
			if _, err := control.ReadLoads(descriptor(t, []byte(text))); err == nil {
				t.Error("loads were taken")
			}
		})
	}
}

func TestOnlyWhatNobodyCanChangeIsPassedOn(t *testing.T) {
	t.Parallel()
	sealed := descriptor(t, []byte("0123456789"))
	defer unix.Close(sealed)
	for most, fits := range map[int64]bool{10: true, 9: false} {
		if err := control.CheckPayload(sealed, most); (err == nil) != fits {
			t.Errorf("of at most %d bytes: %v", most, err)
		}
	}
	open, err := unix.MemfdCreate("open", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(open)
	for _, fd := range []int{open, 0} {
		if control.CheckPayload(fd, 10) == nil {
			t.Errorf("descriptor %d was taken", fd)
		}
	}
}

func FuzzReadClusterStates(f *testing.F) {
	for _, seed := range []string{
		"", "{}", `{"clusters":null}`, `{"clusters":[{"name":"a","endpoints":[{"address":"b","at":"192.0.2.1:80","load":-1}]}]}`,
		`{"clusters":[{"breakers":[{"limits":{"a":{"limit":1}}}],"used":[{"used":{"a":1}}]}]}`, `{"clusters":[{"endpoints":[1,`, `{"clusters":"]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		states, err := control.ReadClusterStates(descriptor(t, data))
		if (states == nil) == (err == nil) {
			t.Errorf("states %v and error %v", states, err)
		}
		loads, err := control.ReadLoads(descriptor(t, data))
		if (loads == nil) == (err == nil) {
			t.Errorf("loads %v and error %v", fmt.Sprint(loads), err)
		}
	})
}
