package load

import (
	"slices"
	"time"
)

// Latencies are a few of many sorted durations.
type Latencies struct {
	P50, P99, P999, Max time.Duration
}

// summarise sorts all. Without any there is nothing to say.
func summarise(all []time.Duration) Latencies {
	if len(all) == 0 {
		return Latencies{}
	}
	slices.Sort(all)
	return Latencies{
		P50:  percentile(all, 500),
		P99:  percentile(all, 990),
		P999: percentile(all, 999),
		Max:  all[len(all)-1],
	}
}

// percentile returns the smallest of the sorted durations that so many thousandths of
// all do not exceed (the nearest rank).
func percentile(sorted []time.Duration, thousandths int) time.Duration {
	rank := (len(sorted)*thousandths + 999) / 1000
	return sorted[max(rank, 1)-1]
}
