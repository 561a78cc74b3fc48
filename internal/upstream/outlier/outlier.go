// Package outlier finds the hosts of a cluster that fail more than they should, and decides
// for how long they get no new work: they are ejected.
//
//	d := outlier.New(cfg, values, wake)
//	h := d.NewHost()
//	h.Answered(503)                                  // on the way of requests
//	decided := d.Decide(time.Now(), hosts, nil)      // when woken, and at decided.Next
//
// What hosts do is counted with a few atomic operations and without a lock. Decisions are
// made aside from requests, by whoever calls Decide; nothing here has a clock or a goroutine.
package outlier

import (
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
)

// Kind is what an outlier was found by.
type Kind uint8

// The kinds.
const (
	Consecutive5xx Kind = iota
	ConsecutiveGatewayFailures
	ConsecutiveConnectFailures
	SuccessRate
	NumKinds
)

const rows = SuccessRate // kinds that are a number of failures in a row

var kinds = [NumKinds]string{
	Consecutive5xx:             "consecutive_5xx",
	ConsecutiveGatewayFailures: "consecutive_gateway_failures",
	ConsecutiveConnectFailures: "consecutive_connect_failures",
	SuccessRate:                "success_rate",
}

func (k Kind) String() string {
	if k < NumKinds {
		return kinds[k]
	}
	return "unknown"
}

// Host is what a cluster consists of, as far as this package looks at it. It must not be
// copied. Any goroutine may call its methods; those that count do not wait.
type Host struct {
	Of any // its owner's own

	d     *Detector
	rows  [rows]atomic.Uint32
	asked atomic.Uint64 // requests in the interval, and of these times succeeded those that went well

	// Guarded by d.mu.
	ejections int       // that are not forgiven
	until     time.Time // zero: it is not ejected
	kind      Kind      // of the ejection
	rate      float64   // of successes in the last interval, from 0 to 1; negative: too few requests
}

// succeeded is what a request that went well adds to [Host.asked], besides itself.
const succeeded = 1 << 32

// Answered counts a request by the status of its answer.
func (h *Host) Answered(status int) {
	switch {
	case status < 500:
		h.ends(Consecutive5xx)
		h.ends(ConsecutiveGatewayFailures)
		h.count(1 + succeeded)
		return
	case status == 502 || status == 503 || status == 504:
		h.goesOn(ConsecutiveGatewayFailures)
	default:
		h.ends(ConsecutiveGatewayFailures)
	}
	h.goesOn(Consecutive5xx)
	h.count(1)
}

// Failed counts a request that got no whole answer, or none in time.
func (h *Host) Failed() {
	h.goesOn(ConsecutiveGatewayFailures)
	h.goesOn(Consecutive5xx)
	h.count(1)
}

// NotConnected counts a connection that could not be made.
func (h *Host) NotConnected() {
	h.goesOn(ConsecutiveConnectFailures)
	h.Failed()
}

// Connected counts a connection that was made.
func (h *Host) Connected() { h.ends(ConsecutiveConnectFailures) }

// ends begins a row anew. A store would take the memory from other processors each time.
func (h *Host) ends(k Kind) {
	if h.rows[k].Load() != 0 {
		h.rows[k].Store(0)
	}
}

func (h *Host) goesOn(k Kind) {
	if most := h.d.rows[k]; most > 0 && h.rows[k].Add(1) == most {
		h.d.find(h, k)
	}
}

func (h *Host) count(n uint64) {
	if !h.d.rates {
		return
	}
	h.asked.Add(n)
	if !h.d.counting.Load() && h.d.counting.CompareAndSwap(false, true) {
		h.d.wake()
	}
}

// Detector looks after the hosts of one cluster.
type Detector struct {
	cfg                *config.Outliers
	enforcing          [NumKinds]*dynamic.Value
	maxEjected         *dynamic.Value
	wake               func()
	random             func() uint64
	rows               [rows]uint32 // how many in a row are enough; 0: no number is
	rates              bool         // success rates are looked at
	counting           atomic.Bool  // requests were counted, and that is known to Decide
	mu                 sync.Mutex
	found              []finding
	sweep              time.Time // when success rates are looked at next, and ejections are forgiven; zero: no time
	average, threshold float64   // of success rates, at the last sweep
}

// finding is that a host has a row of failures that is long enough.
type finding struct {
	host *Host
	kind Kind
}

// New returns a Detector without hosts. values makes the numbers that may be overridden; nil:
// none is. wake is called, by whoever counts something, when Decide is to be called soon: it
// does not wait.
func New(cfg *config.Outliers, values *dynamic.Set, wake func()) *Detector {
	d := &Detector{cfg: cfg, wake: wake, random: rand.Uint64, rates: cfg.SuccessRateDeviations > 0}
	d.rows = [rows]uint32{
		Consecutive5xx:             uint32(cfg.Consecutive5xx),
		ConsecutiveGatewayFailures: uint32(cfg.ConsecutiveGatewayFailures),
		ConsecutiveConnectFailures: uint32(cfg.ConsecutiveConnectFailures),
	}
	percent := func(p config.Dynamic) *dynamic.Value {
		return values.New(p.Key, dynamic.Percent, p.Value, 0, dynamic.Whole)
	}
	row := percent(cfg.Enforcing)
	for k := range rows {
		d.enforcing[k] = row
	}
	d.enforcing[SuccessRate] = percent(cfg.EnforcingSuccessRate)
	d.maxEjected = percent(cfg.MaxEjected)
	return d
}

// NewHost returns a host that nothing is known of.
func (d *Detector) NewHost() *Host { return &Host{d: d, rate: -1} }

// find notes that a row is long enough. That happens once until the row begins anew.
func (d *Detector) find(h *Host, k Kind) {
	d.mu.Lock()
	d.found = append(d.found, finding{h, k})
	d.mu.Unlock()
	d.wake()
}

// Act is what was decided about a host.
type Act uint8

// The acts.
const (
	Eject     Act = iota
	Return        // its time is over
	NotForced     // it is an outlier that is not ejected: the configuration wants it so, by chance
	Overflow      // the same: too many are ejected already
)

// Event is a decision.
type Event struct {
	Host      *Host
	Act       Act
	Kind      Kind // that of the ejection, for Return
	Ejections int  // which one it is, those not counted that were forgiven
	For       time.Duration

	Rate, Average, Threshold float64 // of successes, from 0 to 1; for [SuccessRate]
}

// Decision is what was decided at one time.
type Decision struct {
	Events  []Event
	Ejected int       // members that are ejected now
	Next    time.Time // when Decide is to be called at the latest; zero: not before wake
}

// Decide decides what is to be decided now. It is called when it was asked for by wake, and in
// time. members are what the cluster consists of, and former what did: they are not ejected,
// and return like others.
func (d *Detector) Decide(now time.Time, members, former []*Host) Decision {
	d.mu.Lock()
	defer d.mu.Unlock()
	var events []Event
	for _, all := range [][]*Host{members, former} {
		for _, h := range all {
			if !h.until.IsZero() && !now.Before(h.until) {
				events = append(events, Event{Host: h, Act: Return, Kind: h.kind, Ejections: h.ejections})
				h.until = time.Time{}
				h.begin()
			}
		}
	}
	events = d.judge(events, now, members)
	if d.sweep.IsZero() && d.busy(members) {
		d.sweep = now.Add(d.cfg.Interval)
	}
	if !d.sweep.IsZero() && !now.Before(d.sweep) {
		d.forgive(events, members)
		events = d.compare(events, now, members)
		d.sweep = time.Time{}
		if d.busy(members) {
			d.sweep = now.Add(d.cfg.Interval)
		}
	}
	next := d.sweep
	for _, all := range [][]*Host{members, former} {
		for _, h := range all {
			if !h.until.IsZero() && (next.IsZero() || h.until.Before(next)) {
				next = h.until
			}
		}
	}
	return Decision{events, ejected(members), next}
}

// busy says whether there is something for a sweep to come.
func (d *Detector) busy(members []*Host) bool {
	if d.counting.Load() {
		return true
	}
	for _, h := range members {
		if h.ejections > 0 {
			return true
		}
	}
	return false
}

// begin begins all rows anew.
func (h *Host) begin() {
	for k := range h.rows {
		h.rows[k].Store(0)
	}
}

// judge decides about what has a row that is long enough.
func (d *Detector) judge(events []Event, now time.Time, members []*Host) []Event {
	found := d.found
	d.found = nil
	if len(found) == 0 {
		return events
	}
	is := make(map[*Host]bool, len(members))
	for _, h := range members {
		is[h] = true
	}
	for _, f := range found {
		f.host.rows[f.kind].Store(0)
		if is[f.host] && f.host.until.IsZero() {
			events = append(events, d.decide(Event{Host: f.host, Kind: f.kind}, now, members))
		}
	}
	return events
}

// decide decides about an outlier.
func (d *Detector) decide(e Event, now time.Time, members []*Host) Event {
	h := e.Host
	e.Ejections = h.ejections
	switch {
	case !d.enforcing[e.Kind].Hits(d.random()):
		e.Act = NotForced
	case !d.mayEject(members):
		e.Act = Overflow
	default:
		h.ejections++
		h.kind = e.Kind
		e.Act, e.Ejections, e.For = Eject, h.ejections, d.time(h.ejections)
		h.until = now.Add(e.For)
		h.begin()
	}
	return e
}

// mayEject says whether one more may be ejected: the first may, unless none at all may.
func (d *Detector) mayEject(members []*Host) bool {
	n, share := ejected(members), d.maxEjected.Load()
	return share > 0 && (n == 0 || int64(n+1)*dynamic.Whole <= share*int64(len(members)))
}

// ejected is how many of the hosts are ejected.
func ejected(hosts []*Host) (n int) {
	for _, h := range hosts {
		if !h.until.IsZero() {
			n++
		}
	}
	return n
}

// time is how long the nth ejection lasts.
func (d *Detector) time(n int) time.Duration {
	longest := max(d.cfg.MaxEjectionTime, d.cfg.BaseEjectionTime)
	t := longest
	if time.Duration(n) <= longest/d.cfg.BaseEjectionTime {
		t = time.Duration(n) * d.cfg.BaseEjectionTime
	}
	if j := d.cfg.EjectionJitter; j > 0 {
		t += time.Duration(d.random() % uint64(j))
	}
	return t
}

// forgive has each host that was not ejected since the last sweep have one ejection less.
func (d *Detector) forgive(events []Event, members []*Host) {
	back := make(map[*Host]bool)
	for i := range events {
		back[events[i].Host] = true
	}
	for _, h := range members {
		if h.until.IsZero() && h.ejections > 0 && !back[h] {
			h.ejections--
		}
	}
}

// compare compares success rates, and decides about those that are far below the others.
func (d *Detector) compare(events []Event, now time.Time, members []*Host) []Event {
	if !d.rates {
		return events
	}
	var rated []*Host
	var all, sum float64
	for _, h := range members {
		asked := h.asked.Swap(0)
		requests := asked % succeeded
		all += float64(requests)
		if h.rate = -1; requests >= uint64(d.cfg.SuccessRateRequests) {
			h.rate = float64(asked/succeeded) / float64(requests)
			if h.until.IsZero() {
				rated = append(rated, h)
				sum += h.rate
			}
		}
	}
	if all == 0 {
		d.counting.Store(false) // whoever counts the next one wakes us
	}
	if len(rated) < d.cfg.SuccessRateHosts {
		return events
	}
	d.average = sum / float64(len(rated))
	var squares float64
	for _, h := range rated {
		squares += (h.rate - d.average) * (h.rate - d.average)
	}
	d.threshold = d.average - d.cfg.SuccessRateDeviations*math.Sqrt(squares/float64(len(rated)))
	for _, h := range rated {
		if h.rate < d.threshold {
			events = append(events, d.decide(Event{Host: h, Kind: SuccessRate, Rate: h.rate, Average: d.average, Threshold: d.threshold}, now, members))
		}
	}
	return events
}

// State is what is known of a host.
type State struct {
	Ejections int       // that are not forgiven
	Until     time.Time // zero: it is not ejected
	Kind      Kind      // of the ejection
	Rate      float64   // of successes in the last interval, from 0 to 1; negative: too few requests
}

// State returns what is known of the host.
func (h *Host) State() State {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	return State{h.ejections, h.until, h.kind, h.rate}
}

// mostEjections is as many as are taken over: an hour of base ejection times of a second.
const mostEjections = 3600

// Restore gives a host of which nothing is known what another process knew of it. An ejection
// lasts no longer than it could here. It returns whether the host is ejected.
func (h *Host) Restore(s State, now time.Time) (ejected bool) {
	d := h.d
	defer d.wake()
	d.mu.Lock()
	defer d.mu.Unlock()
	h.ejections = min(max(s.Ejections, 0), mostEjections)
	if !s.Until.After(now) {
		return false
	}
	h.ejections = max(h.ejections, 1)
	h.kind = s.Kind
	h.until = s.Until
	if longest := now.Add(max(d.cfg.MaxEjectionTime, d.cfg.BaseEjectionTime) + d.cfg.EjectionJitter); h.until.After(longest) {
		h.until = longest
	}
	return true
}

// KindOf returns the kind of that name, or [NumKinds].
func KindOf(name string) Kind {
	for k, n := range kinds {
		if n == name {
			return Kind(k)
		}
	}
	return NumKinds
}
