package filter

import (
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
)

// fault holds requests up, or answers them, on purpose: to see what clients make of it.
type fault struct {
	headers  []config.FaultHeader
	delay    *dynamic.Value // a percentage
	duration time.Duration
	abort    *dynamic.Value // a percentage
	answer   Answer
	most     *dynamic.Value // delays at once
	active   atomic.Int64

	delayed, aborted, overflowed *metrics.Counter
	activeGauge                  *metrics.Gauge
}

func newFault(c *config.Fault, o *Options, of *route.Route) *fault {
	percentage := func(d config.Dynamic) *dynamic.Value {
		return o.Values.New(d.Key, dynamic.Percent, d.Value, 0, dynamic.Whole)
	}
	counter := func(kind string) *metrics.Counter {
		return o.Metrics.Counter(faultsInjected, of.VirtualHost, of.Name, kind)
	}
	return &fault{
		headers: c.Headers,
		delay:   percentage(c.Delay.Percent), duration: c.Delay.Duration,
		abort:   percentage(c.Abort.Percent),
		answer:  Answer{Status: c.Abort.Status, Cause: FaultInjected, Reason: "a fault that was injected on purpose"},
		most:    o.Values.New(c.MaxActive.Key, dynamic.Count, c.MaxActive.Value, 0, config.MaxDelays),
		delayed: counter("delay"), aborted: counter("abort"), overflowed: counter("overflow"),
		activeGauge: o.Metrics.Gauge(delaysActive, of.VirtualHost, of.Name),
	}
}

// Filter implements [Filter].
func (f *fault) Filter(r *Request) *Answer {
	if !f.concerns(r.Head.Fields) {
		return nil
	}
	if hits(f.delay, r) && f.duration > 0 && !f.hold(r) {
		return nil
	}
	if hits(f.abort, r) {
		f.aborted.Inc()
		return &f.answer
	}
	return nil
}

// concerns says whether all the fields are there.
func (f *fault) concerns(fields exchange.Fields) bool {
	for _, h := range f.headers {
		if !hasField(fields, h.Name, h.Value) {
			return false
		}
	}
	return true
}

func hasField(fields exchange.Fields, name, value string) bool {
	for v := range fields.Values(name) {
		if value == "" || v == value {
			return true
		}
	}
	return false
}

// hits draws a lot, where there are any.
func hits(percentage *dynamic.Value, r *Request) bool {
	return percentage.Load() > 0 && percentage.Hits(r.Random())
}

// hold holds the request up, unless too many are already. It returns false when the exchange
// is over.
func (f *fault) hold(r *Request) bool {
	defer f.active.Add(-1)
	if f.active.Add(1) > f.most.Load() {
		f.overflowed.Inc()
		return true
	}
	f.delayed.Inc()
	f.activeGauge.Add(1)
	defer f.activeGauge.Add(-1)
	r.Delayed = true
	return r.Sleep(f.duration)
}
