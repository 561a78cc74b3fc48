package route_test

import (
	"fmt"
	"sync"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/route"
)

// shared is a route with shares of three clusters, two of which can be overridden.
func shared(t *testing.T, values *dynamic.Set) *route.Route {
	t.Helper()
	c := config.Route{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{
		{Cluster: "blue", Weight: config.Dynamic{Value: 9, Key: "blue"}},
		{Cluster: "green", Weight: config.Dynamic{Key: "green"}},
		{Cluster: "grey", Weight: config.Dynamic{Value: 1}},
	}}
	all := route.New(&config.Config{VirtualHosts: []config.VirtualHost{host("vh", []string{"*"}, c)}}, values)
	return all.Routes()[0]
}

func TestWeightsAreOverridden(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	r := shared(t, &values)
	for _, c := range []struct {
		name      string
		overrides map[string]float64
		want      string // of as many numbers as the weights are in sum
		sum       uint64
	}{
		{"as configured", nil, "map[blue:9 grey:1]", 10},
		{"a share that is configured to be none", map[string]float64{"green": 10}, "map[blue:9 green:10 grey:1]", 20},
		{"all of it to another", map[string]float64{"green": 3, "blue": 0}, "map[green:3 grey:1]", 4},
		{"beyond the bounds", map[string]float64{"blue": 1e9, "green": -1}, "map[blue:1000000 grey:1]", 1_000_001},
		{"and back", map[string]float64{"other": 3}, "map[blue:9 grey:1]", 10},
	} {
		values.Apply(c.overrides)
		got := map[string]int{}
		for n := range c.sum {
			got[r.Cluster(n+c.sum*7)]++
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("%s: got %v, want %s", c.name, got, c.want)
		}
	}
}

// Nobody means a route that goes nowhere.
func TestWhereAllWeightsAreOverriddenToNothingThoseOfTheFileHold(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	c := config.Route{Match: config.Match{Prefix: "/"}, Clusters: []config.WeightedCluster{
		{Cluster: "blue", Weight: config.Dynamic{Value: 3, Key: "blue"}}, {Cluster: "green", Weight: config.Dynamic{Value: 1, Key: "green"}},
	}}
	r := route.New(&config.Config{VirtualHosts: []config.VirtualHost{host("vh", []string{"*"}, c)}}, &values).Routes()[0]
	values.Apply(map[string]float64{"blue": 0, "green": 0})
	for n, want := range []string{"blue", "blue", "blue", "green"} {
		if got := r.Cluster(uint64(n)); got != want {
			t.Errorf("%d: got %q, want %q", n, got, want)
		}
	}
}

// Weights change while requests are dealt, which always get a cluster that has had a share.
func TestWeightsChangeUnderRequests(t *testing.T) {
	t.Parallel()
	var values dynamic.Set
	r := shared(t, &values)
	var changing sync.WaitGroup
	over := make(chan struct{})
	changing.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-over:
				return
			default:
				values.Apply(map[string]float64{"blue": float64(n % 3), "green": float64(n % 2)})
			}
		}
	})
	for n := range uint64(20000) {
		if c := r.Cluster(n * 0x9e3779b97f4a7c15); c == "" {
			t.Fatalf("%d has none", n)
		}
	}
	close(over)
	changing.Wait()
}

func TestADynamicShareCostsNoAllocation(t *testing.T) {
	r := shared(t, new(dynamic.Set))
	if n := testing.AllocsPerRun(100, func() { r.Cluster(12345) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
