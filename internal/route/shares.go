package route

import (
	"iter"
	"slices"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
)

// shares divide the requests of a route among clusters.
type shares struct {
	all     []share
	total   uint64 // of the weights as configured
	dynamic bool   // some weight may be overridden
}

// share is a cluster's part of a route: as configured, the numbers below upTo that are not
// below the upTo of the share before it.
type share struct {
	cluster string
	upTo    uint64
	weight  *dynamic.Value // nil where no weight of the route may be overridden
}

func newShares(clusters []config.WeightedCluster, values *dynamic.Set) (s shares) {
	s.dynamic = slices.ContainsFunc(clusters, func(wc config.WeightedCluster) bool { return wc.Weight.Key != "" })
	for _, wc := range clusters {
		if wc.Weight.Value == 0 && wc.Weight.Key == "" {
			continue
		}
		s.total += uint64(wc.Weight.Value)
		part := share{cluster: wc.Cluster, upTo: s.total}
		if s.dynamic {
			part.weight = values.New(wc.Weight.Key, dynamic.Count, wc.Weight.Value, 0, config.MaxWeight)
		}
		s.all = append(s.all, part)
	}
	return s
}

// choose returns the cluster that a number leads to, "" if there is none.
func (s *shares) choose(random uint64) string {
	if s.dynamic {
		if cluster, ok := s.chooseNow(random); ok {
			return cluster
		}
	}
	if s.total == 0 {
		return ""
	}
	n := random % s.total
	for i := range s.all {
		if n < s.all[i].upTo {
			return s.all[i].cluster
		}
	}
	panic("route: the last share does not reach the total")
}

// chooseNow is choose by the weights that hold now. It has no answer where all of them are 0,
// since somebody has to get the request: then what is configured holds.
func (s *shares) chooseNow(random uint64) (cluster string, ok bool) {
	var total uint64
	for i := range s.all {
		total += uint64(s.all[i].weight.Load())
	}
	if total == 0 {
		return "", false
	}
	n := random % total
	for i := range s.all {
		weight := uint64(s.all[i].weight.Load())
		if weight == 0 {
			continue
		}
		// Weights may have become smaller since they were added up: then the last one gets it.
		if cluster = s.all[i].cluster; n < weight {
			break
		}
		n -= weight
	}
	return cluster, cluster != ""
}

// parts yields each cluster with its part of the requests by the weights that hold now.
func (s *shares) parts() iter.Seq2[string, float64] {
	return func(yield func(string, float64) bool) {
		weights, total := s.weights()
		for i, w := range weights {
			if !yield(s.all[i].cluster, w/total) {
				return
			}
		}
	}
}

// weights are those that hold now, and their sum.
func (s *shares) weights() (weights []float64, total float64) {
	if s.dynamic {
		for i := range s.all {
			w := float64(s.all[i].weight.Load())
			weights, total = append(weights, w), total+w
		}
		if total > 0 {
			return weights, total
		}
	}
	weights = nil
	before := uint64(0)
	for i := range s.all {
		weights = append(weights, float64(s.all[i].upTo-before))
		before = s.all[i].upTo
	}
	return weights, float64(s.total)
}
