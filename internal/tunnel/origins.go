package tunnel

import (
	"time"

	"holdfast/internal/metrics"
	"holdfast/internal/tunnel/inflight"
)

// origins are the origins of a loop's tunnels. Each has a number, which is all that a
// slot has of it. What the tunnels of an origin moved is added up here, and counted for
// everybody to see once in a turn: so a message costs no atomic addition, however many
// counters it is for.
type origins struct {
	used    []originUse
	numbers map[*Origin]uint32
	free    []uint32
	changed []uint32            // whose moved is not zero
	totals  [2]*metrics.Counter // by the flow
	verdict *Verdict
}

// originUse is an origin that tunnels have.
type originUse struct {
	*Origin
	tunnels  int
	moved    [2]uint64     // not counted yet, by the flow
	changed  bool          // in origins.changed
	read     int           // bytes that one read may take
	splice   int           // bytes that a pipe may hold; 0: none are used
	patience time.Duration // with a peer that has something to acknowledge
	verdict  Reason        // why its tunnels are to be closed; Open: they are not
}

func newOrigins(m *setMetrics, v *Verdict) origins {
	return origins{
		numbers: make(map[*Origin]uint32),
		totals:  [2]*metrics.Counter{down: m.toUpstream, up: m.toDownstream},
		verdict: v,
	}
}

// take returns the number of an origin, which has one tunnel more then.
func (o *origins) take(origin *Origin) uint32 {
	n, ok := o.numbers[origin]
	if !ok {
		if last := len(o.free) - 1; last >= 0 {
			n, o.free = o.free[last], o.free[:last]
		} else {
			n = uint32(len(o.used))
			o.used = append(o.used, originUse{})
		}
		o.numbers[origin] = n
		o.used[n] = newOriginUse(origin)
		o.used[n].verdict = o.verdict.of(origin)
	}
	o.used[n].tunnels++
	return n
}

func newOriginUse(o *Origin) originUse {
	u := originUse{Origin: o, read: inflight.BufferSize, splice: mostSpliced, patience: o.Limits.KeepAlive.patience()}
	if b := o.Limits.Buffer; b > 0 {
		u.read = int(min(b, inflight.BufferSize))
		u.splice = int(min(b, mostSpliced))
	}
	if u.splice < inflight.BufferSize {
		u.splice = 0 // so little is not worth a pipe
	}
	return u
}

// release takes one tunnel away from an origin.
func (o *origins) release(n uint32) {
	u := &o.used[n]
	u.tunnels--
	if u.tunnels == 0 {
		o.count(u)
		delete(o.numbers, u.Origin)
		u.Origin = nil
		o.free = append(o.free, n)
	}
}

// moved adds what a flow has moved.
func (o *origins) moved(n uint32, from, bytes int) {
	u := &o.used[n]
	u.moved[from] += uint64(bytes)
	if !u.changed {
		u.changed = true
		o.changed = append(o.changed, n)
	}
}

// flush counts what was moved in a turn.
func (o *origins) flush() {
	for _, n := range o.changed {
		u := &o.used[n]
		u.changed = false
		if u.Origin != nil {
			o.count(u)
		}
	}
	o.changed = o.changed[:0]
}

func (o *origins) count(u *originUse) {
	for from, shares := range [2][]*metrics.Counter{down: u.UpBytes, up: u.DownBytes} {
		if n := u.moved[from]; n > 0 {
			o.totals[from].Add(n)
			for _, c := range shares {
				c.Add(n)
			}
			u.moved[from] = 0
		}
	}
}
