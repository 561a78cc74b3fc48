package filter

import (
	"strconv"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

// rateLimit refuses what is too much: of ordinary requests, or of upgrades. Never of both:
// each has a limit of its own.
type rateLimit struct {
	upgrades bool
	rate     *dynamic.Value // tokens in a period
	per      time.Duration
	burst    int64
	epoch    time.Time // from which time is counted
	all      bucket
	clients  *buckets // nil: all have one bucket
	limited  *metrics.Counter
}

func newRateLimit(c *config.RateLimit, upgrades bool, o *Options, scope, name string) *rateLimit {
	of := "requests"
	if upgrades {
		of = "tunnels"
	}
	l := &rateLimit{
		upgrades: upgrades, per: c.Per, burst: c.Burst,
		rate:    o.Values.New(c.Requests.Key, dynamic.Count, c.Requests.Value, 0, config.MaxRate),
		limited: o.Metrics.Counter(rateLimited, scope, name, of),
		epoch:   time.Now().Add(-time.Hour), // a loop's time may be older than now, and 0 is a full bucket
	}
	if c.ByClient {
		l.clients = newBuckets(o.Metrics.Counter(clientsForgotten, scope, name, of).Inc)
	}
	return l
}

// Filter implements [Filter].
func (l *rateLimit) Filter(r *Request) *Answer {
	if r.IsUpgrade() != l.upgrades {
		return nil
	}
	wait := l.take(r)
	if wait == 0 {
		return nil
	}
	l.limited.Inc()
	reason := "too many requests"
	if l.upgrades {
		reason = "too many new tunnels"
	}
	seconds := (wait + time.Second - 1) / time.Second
	return r.reply(Answer{Status: 429, Cause: RateLimited, Reason: reason},
		exchange.Field{Name: "Retry-After", Value: r.Head.Texts.Join(strconv.Itoa(int(max(seconds, 1))))})
}

// take takes a token for the request, or returns how long it takes until there is one.
func (l *rateLimit) take(r *Request) (wait time.Duration) {
	rate := l.rate.Load()
	if rate <= 0 {
		return l.per // nobody passes until that is changed
	}
	p := newPace(rate, l.per, l.burst)
	now := int64(r.Loop.Now().Sub(l.epoch))
	if l.clients != nil {
		return time.Duration(l.clients.take(clientOf(r.Client), p, now))
	}
	return time.Duration(l.all.take(p, now))
}
