package poller

import "time"

// A Timer calls a function on the loop's goroutine at a time, not before it and some
// milliseconds late. Every turn looks at all timers of the loop, so there is one for a
// package, and not one for each connection: that may have an [Alarm].
type Timer struct {
	fn func()
	at time.Time // zero: never
}

// NewTimer returns a timer that is not set. It stays with the loop for good.
func (l *Loop) NewTimer(fn func()) *Timer {
	t := &Timer{fn: fn}
	l.timers = append(l.timers, t)
	return t
}

// Set has the function called once, at the given time and no longer at the one that was
// set before. The zero time: never.
func (t *Timer) Set(at time.Time) { t.at = at }

// untilDue returns how long nothing is due: 0 when something is, or forever.
func (l *Loop) untilDue(now time.Time) time.Duration {
	d := forever
	for _, t := range l.timers {
		if !t.at.IsZero() {
			d = min(d, max(t.at.Sub(now), 0))
		}
	}
	return d
}

func (l *Loop) runTimers() (any bool) {
	for _, t := range l.timers {
		if !t.at.IsZero() && !l.now.Before(t.at) {
			t.at = time.Time{}
			any = true
			t.fn()
		}
	}
	return any
}
