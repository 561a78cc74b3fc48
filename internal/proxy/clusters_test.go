package proxy_test

import (
	"strings"
	"testing"
	"time"

	"holdfast/internal/control"
)

// state is what the generation says of the only endpoint of its only cluster.
func (c *commander) state() control.EndpointState {
	c.t.Helper()
	c.ask(control.Message{Type: control.TypeClusters})
	all, err := control.ReadClusterStates(await(c.t, "the clusters", c.payloads))
	if err != nil {
		c.t.Fatal(err)
	}
	if len(all.Clusters) != 1 || all.Clusters[0].Name != "web" || len(all.Clusters[0].Endpoints) != 1 {
		c.t.Fatalf("it says %+v", all)
	}
	return all.Clusters[0].Endpoints[0]
}

// loads is what it says that it has with that endpoint.
func (c *commander) loads() int64 {
	c.t.Helper()
	c.ask(control.Message{Type: control.TypeLoads})
	all, err := control.ReadLoads(await(c.t, "the loads", c.payloads))
	if err != nil {
		c.t.Fatal(err)
	}
	if len(all.Clusters) == 0 {
		return 0
	}
	return all.Clusters[0].Endpoints[0].Load
}

// loadsOf is a payload that says of an endpoint what a generation has with it.
func loadsOf(t *testing.T, e control.EndpointState, n int64) int {
	t.Helper()
	f, err := control.Payload(control.Loads{Clusters: []control.ClusterLoad{
		{Name: "web", Endpoints: []control.EndpointLoad{{Address: e.Address, At: e.At, Load: n}, {Address: "gone:80", Load: 9}}},
		{Name: "of another configuration", Endpoints: []control.EndpointLoad{{Address: "a", Load: 9}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

func TestAGenerationSaysWhatItHasWithItsClusters(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	if c.hello.Clusters != control.ClustersVersion {
		t.Errorf("it says version %d in its hello", c.hello.Clusters)
	}
	if e := c.state(); e.Tunnels != 0 || !e.Healthy {
		t.Errorf("before it serves: %+v", e)
	}
	c.serve()
	client, server := c.tunnel()
	carries(client, server)
	if e := c.state(); e.Tunnels != 1 || e.Requests != 0 || e.Connects != 1 || e.RequestsSum != 1 {
		t.Errorf("with a tunnel: %+v", e)
	}
	if n := c.loads(); n != 1 {
		t.Errorf("its load is %d", n)
	}
	c.drain(0)
	if n := c.loads(); n != 1 {
		t.Errorf("its load is %d while it drains", n)
	}
	client.Close()
	server.Close()
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

func TestAGenerationHearsWhatOthersHave(t *testing.T) {
	t.Parallel()
	c := command(t, "", "")
	c.serve()
	e := c.state()
	tell := func(more bool, keys []string, fds ...int) string {
		t.Helper()
		return c.question(control.Message{Type: control.TypeElsewhere, Keys: keys, More: more}, fds...).Error
	}
	want := func(when string, n int64) {
		t.Helper()
		if got := c.state().Elsewhere; got != n {
			t.Errorf("%s: %d elsewhere, want %d", when, got, n)
		}
	}
	tell(false, []string{"7", "8"}, loadsOf(t, e, 3), loadsOf(t, e, 4))
	want("from two others", 7)
	tell(true, []string{"7"}, loadsOf(t, e, 5))
	want("while more is to come", 7)
	tell(false, []string{"8"}, loadsOf(t, e, 6))
	want("in two messages", 11)
	rubbish, err := control.Bytes([]byte("rubbish"))
	if err != nil {
		t.Fatal(err)
	}
	defer rubbish.Close()
	tell(false, []string{"7", "8"}, int(rubbish.Fd()), loadsOf(t, e, 2))
	want("where one cannot be read", 2)
	if tell(false, []string{"7"}) == "" || tell(false, []string{"x"}, loadsOf(t, e, 1)) == "" || tell(false, []string{"7", "7"}, loadsOf(t, e, 1), loadsOf(t, e, 1)) == "" {
		t.Error("it takes what makes no sense")
	}
	want("after what makes no sense", 2)
	tell(false, nil)
	want("when there is nobody else", 0)
}

// What comes with the bundle is for what finds endpoints and their health; here is only that
// nothing is at stake where it is wrong.
func TestStatesThatCannotBeReadHinderNobody(t *testing.T) {
	t.Parallel()
	file, err := control.Bytes([]byte("rubbish"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	c := command(t, "", "", func(c *commander) { c.bundled = append(c.bundled, int(file.Fd())) })
	c.serve()
	c.works()
	deadline := time.Now().Add(bound)
	for !strings.Contains(c.log.String(), "what the generation before knew of its clusters cannot be read") {
		if time.Now().After(deadline) {
			t.Fatal(c.log.String())
		}
		time.Sleep(time.Millisecond)
	}
	if n := holders(t, int(file.Fd())); n != 1 {
		t.Errorf("%d descriptors of it are open", n)
	}
}
