package balance

import (
	"math"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
)

// unit is 1 as a weight that may be reduced.
const unit = 1 << 10

// How often weights are reduced by less.
const (
	stepsOfSlowStart = 50 // in the window
	leastStep        = 50 * time.Millisecond
	mostStep         = time.Second
)

// startsSlowly tells whether the policy has hosts do so.
func startsSlowly(b *config.Balancing) bool {
	return b.SlowStart != nil && b.Policy != config.Random && b.Policy != config.Maglev
}

// clock is the time, if it matters.
func (b *Balancer) clock(members []Member) time.Time {
	if startsSlowly(&b.cfg) {
		for i := range members {
			if !members[i].Since.IsZero() {
				return time.Now()
			}
		}
	}
	return time.Time{}
}

// effective returns the weight of a member at the moment, and when it is another; zero: never.
func (b *Balancer) effective(m *Member, now time.Time) (weight int64, until time.Time) {
	whole := m.Weight * unit
	if now.IsZero() || m.Since.IsZero() {
		return whole, time.Time{}
	}
	s := b.cfg.SlowStart
	gone := now.Sub(m.Since)
	if gone >= s.Window {
		return whole, time.Time{}
	}
	share := math.Pow(min(1, float64(max(gone, time.Second))/float64(s.Window)), 1/s.Aggression)
	share = max(share, float64(s.LeastWeight)/dynamic.Whole)
	step := min(max(s.Window/stepsOfSlowStart, leastStep), mostStep)
	return max(1, int64(float64(whole)*share)), now.Add(min(step, s.Window-gone))
}
