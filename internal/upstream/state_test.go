package upstream_test

import (
	"encoding/json"
	"net/netip"
	"slices"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/upstream"
)

// stateOf is what is said of an endpoint of the only cluster.
func stateOf(t *testing.T, cs *upstream.Clusters, name string) control.EndpointState {
	t.Helper()
	all := cs.State()
	for _, e := range all.Clusters[0].Endpoints {
		if e.Name == name {
			return e
		}
	}
	t.Fatalf("no endpoint %s: %+v", name, all)
	return control.EndpointState{}
}

func TestTheStateSaysWhatIsWithEachEndpoint(t *testing.T) {
	t.Parallel()
	cluster := web("app.internal:80", "unix:/run/app.sock")
	cluster.Endpoints[0].EndpointOptions = config.EndpointOptions{Weight: 3, Priority: 1, Metadata: map[string]string{"zone": "a"}}
	n := &fakeNetwork{names: map[string][]netip.Addr{"app.internal": {netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}}}
	endpoints, cs, _ := countedClusters(t, n, cluster)
	l := endpoints[0].loops[0]
	var calls [3]upstream.Call
	used := []*used{endpoints[0].get(), endpoints[0].get(), endpoints[1].get()}
	streamtest.Do(l, func() {
		for i, e := range []*endpoint{endpoints[0], endpoints[0], endpoints[1]} {
			e.Begin(l, new(upstream.Attempt), &calls[i])
		}
		calls[1].End(upstream.Complete)
	})
	endpoints[0].Tunnels.Count(2)
	used[1].closeConn()

	e := stateOf(t, cs, "10.0.0.1:80")
	if e.Connects != 2 || e.Connections != 1 || e.Requests != 1 || e.RequestsSum != 2 || e.Tunnels != 2 || e.ConnectFails != 0 {
		t.Errorf("of the first endpoint: %+v", e)
	}
	if e.Address != "app.internal:80" || e.At != netip.MustParseAddrPort("10.0.0.1:80") || e.Weight != 3 || e.Priority != 1 || e.Metadata["zone"] != "a" || !e.Healthy || e.Conditions != nil {
		t.Errorf("it is described as %+v", e)
	}
	if e := stateOf(t, cs, "10.0.0.2:80"); e.Connects != 1 || e.Requests != 1 || e.RequestsSum != 1 || e.Tunnels != 0 {
		t.Errorf("of the other address of the same name: %+v", e)
	}
	if e := stateOf(t, cs, "unix:/run/app.sock"); e.Address != "unix:/run/app.sock" || e.At.IsValid() || e.Weight != 1 || e.Connects != 0 {
		t.Errorf("of the socket: %+v", e)
	}
	if _, err := json.Marshal(cs.State()); err != nil {
		t.Error(err)
	}
}

func TestTheStateSaysWhyAnEndpointGetsNothing(t *testing.T) {
	t.Parallel()
	endpoints, cs, _ := countedClusters(t, &fakeNetwork{}, web("10.0.0.1:80", "10.0.0.2:80"))
	e := endpoints[0]
	e.Mark(upstream.Failing, true)
	e.Mark(upstream.Ejected, true)
	if s := stateOf(t, cs, e.String()); s.Healthy || !slices.Equal(s.Conditions, []string{"failing", "ejected"}) {
		t.Errorf("got %+v", s)
	}
	if s := stateOf(t, cs, "10.0.0.2:80"); !s.Healthy {
		t.Errorf("got %+v", s)
	}
}

func TestTheStateHasWhatHasLeftAsLongAsItHoldsSomething(t *testing.T) {
	t.Parallel()
	endpoints, cs, _ := countedClusters(t, &fakeNetwork{}, web("10.0.0.1:80", "10.0.0.2:80"))
	endpoints[0].Tunnels.Count(1)
	web, _ := cs.Get("web")
	web.SetMembers([]upstream.Member{{Address: "10.0.0.3:80", At: upstream.Place{Addr: netip.MustParseAddrPort("10.0.0.3:80")}}})
	if s := stateOf(t, cs, "10.0.0.1:80"); s.Healthy || !slices.Equal(s.Conditions, []string{"left"}) || s.Tunnels != 1 {
		t.Errorf("got %+v", s)
	}
	if n := len(cs.State().Clusters[0].Endpoints); n != 2 {
		t.Errorf("there are %d endpoints, want the new one and the one with a tunnel", n)
	}
	endpoints[0].Tunnels.Count(-1)
	if n := len(cs.State().Clusters[0].Endpoints); n != 1 {
		t.Errorf("there are %d endpoints when it holds nothing any more", n)
	}
}

func TestTheStateSaysHowLongConnectingTook(t *testing.T) {
	t.Parallel()
	n := &fakeNetwork{fail: func(*pending, string) error { time.Sleep(time.Millisecond); return nil }}
	endpoints, cs, _ := countedClusters(t, n, web("10.0.0.1:80"))
	endpoints[0].get().Close()
	if s := stateOf(t, cs, "10.0.0.1:80"); s.Connects != 1 || s.ConnectSum < 0.001 || s.ConnectSum > 60 {
		t.Errorf("got %+v", s)
	}
}

// Clusters may be changed while somebody looks: the race detector watches.
func TestTheStateIsReadWhileClustersChange(t *testing.T) {
	t.Parallel()
	_, cs, _ := countedClusters(t, &fakeNetwork{}, web("10.0.0.1:80"))
	web, _ := cs.Get("web")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range byte(100) {
			web.SetMembers([]upstream.Member{{
				Address: "a", At: upstream.Place{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, i}), 80)},
				EndpointOptions: config.EndpointOptions{Weight: int64(i)},
			}})
		}
	}()
	for range 100 {
		cs.State()
	}
	<-done
}
