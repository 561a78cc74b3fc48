package tunnel

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// routines carries the tunnels that no loop can: of whatever is not plain TCP, and what
// the loops have no room for.
type routines struct {
	set  *Set
	pool buffers

	mu       sync.Mutex
	live     map[*routine]struct{}
	schedule schedule
	sweeps   sweeps
	sweeper  *time.Timer
	watcher  *time.Timer
	watching bool // the watcher is set
}

func newRoutines(s *Set) *routines {
	c := &routines{set: s, live: make(map[*routine]struct{})}
	c.sweeps.set = c.sweepAtLocked
	return c
}

func (c *routines) start(a *arrival) {
	t := newRoutine(c.set, a)
	c.set.countNotPlain(&t.record, 1)
	c.mu.Lock()
	c.live[t] = struct{}{}
	c.schedule.join(&t.dates, t.limits)
	c.judgeLocked(t)
	due, _ := t.due(t.limits, t.started)
	c.sweeps.by(due)
	c.mu.Unlock()
	t.start()
}

// remove takes a tunnel out that has ended, and has it reported.
func (c *routines) remove(t *routine) {
	c.mu.Lock()
	delete(c.live, t)
	if len(c.live) == 0 {
		c.restLocked()
	}
	c.mu.Unlock()
	c.set.live.Add(-1)
	c.set.countNotPlain(&t.record, -1)
	r := t.snapshot()
	r.Ended = time.Now()
	c.set.reporter.report([]Record{r})
}

// restLocked stops the timers: there is no tunnel.
func (c *routines) restLocked() {
	if c.sweeper != nil {
		c.sweeper.Stop()
		c.sweeps.at = 0
	}
	if c.watcher != nil {
		c.watcher.Stop()
		c.watching = false
	}
}

func (c *routines) tunnels() []*routine {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.live))
}

func (c *routines) list() []Record {
	var records []Record
	for _, t := range c.tunnels() {
		records = append(records, t.snapshot())
	}
	return records
}

func (c *routines) oldest() (at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for t := range c.live {
		if at.IsZero() || t.record.Started.Before(at) {
			at = t.record.Started
		}
	}
	return at
}

func (c *routines) buffers() int { return int(c.pool.out.Load()) }

// allLocked yields what the schedule deals with.
func (c *routines) allLocked(yield func(*dates, *Limits) bool) {
	for t := range c.live {
		if !yield(&t.dates, t.limits) {
			return
		}
	}
}

func (c *routines) drain(by spread) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.schedule.drain(by, c.allLocked)
	c.sweepLocked()
}

func (c *routines) undrain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.schedule.undrain(c.allLocked)
}

func (c *routines) closeAll(reason Reason, by spread) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.schedule.closeAll(reason, by, len(c.live), c.allLocked)
	c.sweepLocked()
}

func (c *routines) abandon() {
	for _, t := range c.tunnels() {
		t.abandon()
	}
}

// sweepAtLocked sets the timer of the sweeps.
func (c *routines) sweepAtLocked(at time.Duration) {
	in := at - c.set.now()
	if c.sweeper == nil {
		c.sweeper = time.AfterFunc(in, c.sweep)
	} else {
		c.sweeper.Reset(in)
	}
}

// sweep closes what is due.
func (c *routines) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sweepLocked()
}

func (c *routines) sweepLocked() {
	now := c.set.now()
	c.sweeps.begin()
	for t := range c.live {
		switch at, reason := t.due(t.limits, time.Duration(t.active.Load())); {
		case at == 0:
		case at > now:
			c.sweeps.seen(max(at, now+t.limits.slack(reason)))
		default:
			t.cut(reason, nil)
		}
	}
	c.sweeps.end(now, c.set.bounds.sweep)
}

// watchSoon plans a look for receivers that are dead.
func (c *routines) watchSoon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watchSoonLocked()
}

func (c *routines) watchSoonLocked() {
	if c.watching || len(c.live) == 0 {
		return
	}
	c.watching = true
	if c.watcher == nil {
		c.watcher = time.AfterFunc(c.set.bounds.check, c.watch)
	} else {
		c.watcher.Reset(c.set.bounds.check)
	}
}

// watch looks at all directions that have something on its way, and looks again while
// there are some.
func (c *routines) watch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watching = false
	again := false
	for t := range c.live {
		for _, d := range []*direction{&t.toUp, &t.toDown} {
			again = d.watch() || again
		}
	}
	if again {
		c.watchSoonLocked()
	}
}
