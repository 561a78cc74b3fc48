package upstream_test

import (
	"encoding/json"
	"fmt"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/upstream"
)

// What a supervisor asks for every ten seconds: the states of 1,000 clusters of 10 endpoints.
func BenchmarkState(b *testing.B) {
	cfg := new(config.Config)
	for i := range 1000 {
		c := config.Cluster{Name: fmt.Sprint("c", i)}
		for j := range 10 {
			c.Endpoints = append(c.Endpoints, config.Endpoint{Address: fmt.Sprintf("10.0.%d.%d:80", i%250, j)})
		}
		cfg.Clusters = append(cfg.Clusters, c)
	}
	cs, err := upstream.New(b.Context(), upstream.Options{Config: cfg, Network: (&fakeNetwork{}).network()})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		data, err := json.Marshal(cs.State())
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(data)))
	}
}
