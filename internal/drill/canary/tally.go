package canary

import (
	"fmt"
	"sync"
	"time"
)

// Report is what the canary has seen. Sums are those from the beginning.
type Report struct {
	Connections int64  `json:"connections"` // that were opened for one request
	Refused     int64  `json:"refused"`     // of these: refused, or reset before an answer
	Requests    int64  `json:"requests"`
	Failed      int64  `json:"failed"` // of these
	Tunnels     int64  `json:"tunnels"`
	Lossy       int64  `json:"lossy"`   // of these, with segments that were lost
	Dropped     int64  `json:"dropped"` // of these, before their ends wanted it
	Bytes       int64  `json:"bytes"`   // that arrived through tunnels
	Damage      Damage `json:"damage"`
	// What went with a process that was killed is counted here alone: requests, and
	// tunnels that were being opened.
	KilledRequests int64 `json:"killed_requests"`

	// Since the report before.
	Pauses   Pauses   `json:"pauses"`
	Failures []string `json:"failures,omitempty"` // the first ones

	Open   int64         `json:"open"`   // tunnels, now
	Oldest time.Duration `json:"oldest"` // of these
}

// Broken is how many things have gone wrong that should not.
func (r *Report) Broken() int64 {
	d := r.Damage
	return r.Refused + r.Failed + r.Dropped + d.Lost + d.Doubled + d.Reordered + d.Changed
}

// Pauses are the longest waits.
type Pauses struct {
	Connection time.Duration `json:"connection"` // until a new connection has its first answer
	Request    time.Duration `json:"request"`    // until a request on a connection that was kept is answered
	Tunnel     time.Duration `json:"tunnel"`     // until a byte of a tunnel arrives
}

// Longest returns the longer of each.
func (p Pauses) Longest(o Pauses) Pauses {
	return Pauses{max(p.Connection, o.Connection), max(p.Request, o.Request), max(p.Tunnel, o.Tunnel)}
}

// mostFailures bounds how many failures are described in a report.
const mostFailures = 8

// tally counts. Its methods may be called concurrently.
type tally struct {
	mu    sync.Mutex
	began map[*tunnel]time.Time // those that are open
	rages bool                  // a storm
	Report
}

// take returns what was counted.
func (t *tally) take() Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.Report
	t.Pauses, t.Failures = Pauses{}, nil
	r.Open = int64(len(t.began))
	for _, began := range t.began {
		r.Oldest = max(r.Oldest, time.Since(began))
	}
	return r
}

func (t *tally) count(f func(*Report)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f(&t.Report)
}

// fail counts what has gone wrong.
func (t *tally) fail(counted *int64, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*counted++
	t.describe(format, args...)
}

// failOn counts what has gone wrong with a request, or with a tunnel that was being
// opened: apart, if the process behind it was killed, or may have been.
func (t *tally) failOn(c *conn, counted *int64, format string, args ...any) {
	if c.killed.Load() || t.stormy() {
		t.count(func(r *Report) { r.KilledRequests++ })
		return
	}
	t.fail(counted, format, args...)
}

func (t *tally) storm(rages bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rages = rages
}

func (t *tally) stormy() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rages
}

// describe is called with mu held.
func (t *tally) describe(format string, args ...any) {
	if len(t.Failures) < mostFailures {
		now := time.Now().Format("15:04:05.000")
		t.Failures = append(t.Failures, now+" "+fmt.Sprintf(format, args...))
	}
}

func (t *tally) opened(tu *tunnel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Tunnels++
	if tu.loses.Load() {
		t.Lossy++
	}
	t.began[tu] = time.Now()
}

func (t *tally) closed(tu *tunnel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.began, tu)
}

// arrived counts bytes of a tunnel, and how long they took: 0 where that says nothing.
func (t *tally) arrived(n int, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Bytes += int64(n)
	t.Pauses.Tunnel = max(t.Pauses.Tunnel, took)
}

// damaged notes how the damage of one stream has changed.
func (t *tally) damaged(tu *tunnel, old, now Damage) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Damage.replace(old, now)
	t.describe("%s: its bytes are damaged: %s", tu, now)
}
