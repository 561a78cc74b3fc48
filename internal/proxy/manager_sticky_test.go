package proxy_test

import (
	"fmt"
	"slices"
	"testing"

	"holdfast/internal/config"
)

// One client gets one cluster of a split, and in it one endpoint. That it is in this cluster
// does not say which endpoint that is: they share the clients evenly.
func TestAClientKeepsItsClusterAndItsEndpoint(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	of := map[string]string{} // the cluster of an address
	for c, name := range []string{"web", "other"} {
		f.cluster[name] = nil
		for i := range 3 {
			a := fmt.Sprintf("10.0.%d.%d:80", c, i+1)
			f.cluster[name] = append(f.cluster[name], a)
			of[a] = name
			f.behave[a] = func(o *origin) {
				o.reads()
				o.answers(200)
				o.writes(a)
				o.ends()
			}
		}
	}
	f.routes = []config.Route{to("/", "web")}
	f.routes[0].SplitByHash, f.routes[0].HashPolicy = true, []config.HashPolicy{{Header: "X-User"}}
	f.routes[0].Clusters = []config.WeightedCluster{{Cluster: "web", Weight: config.Dynamic{Value: 1}}, {Cluster: "other", Weight: config.Dynamic{Value: 1}}}
	f.change = func(cfg *config.Config) {
		for i := range cfg.Clusters {
			cfg.Clusters[i].Balancing.Policy = config.Maglev
		}
	}
	m := f.manager()
	homes := map[string]string{}
	count := map[string]int{}
	const users = 300
	for try := range 2 {
		for u := range users {
			user := fmt.Sprint("X-User: user-", u)
			c := get(t, "a.example", "/").asks(user)
			c.start(m).wait().wantStatus(200)
			at := c.received()
			if try == 0 {
				homes[user] = at
				count[at]++
			} else if homes[user] != at {
				t.Fatalf("%s was at %s of %s, and is at %s of %s", user, homes[user], of[homes[user]], at, of[at])
			}
		}
	}
	var counts []int
	for at := range of {
		counts = append(counts, count[at])
	}
	if slices.Min(counts) < users/6/2 || slices.Max(counts) > users/6*2 {
		t.Errorf("clients are shared out unevenly: %v", count)
	}
}
