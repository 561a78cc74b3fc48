// Package health checks endpoints: when one is checked, how many are at the same time, and what
// follows from what the checks have found.
//
//	checks := health.NewLoop(l)
//	check := checks.NewCheck(health.Options{Config: cfg, Probe: probe, Owner: owner})
//	check.Start(true) // owner.Checked tells of every result
//	...
//	check.Stop()
//
// How an endpoint is asked is the business of a [Probe]. All is done on the goroutine of the
// loop, by a task while a check is under way; between two checks an endpoint costs a deadline.
package health

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/poller"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// mostAtOnce is how many checks of a loop are under way at the same time; others wait for their
// turn, which is not a part of their timeout. It bounds what hanging endpoints cost.
const mostAtOnce = 1024

// Probe asks an endpoint. Its methods are called on the loop's goroutine.
type Probe interface {
	// Probe makes one check and waits for its end: nil, if the endpoint has passed. Some
	// errors count in a way of their own: [Failure], [ErrNoResult].
	Probe(*task.Task) error

	// Cancel has the Probe that is under way return soon, with any error. It does not wait.
	Cancel(error)

	// Close lets go of what is kept for the next one. None is under way.
	Close()
}

// Failure is an answer that an endpoint has given and that fails the check. Every other error
// of a [Probe] is that there was none.
type Failure struct {
	Text   string // for the log; nothing of it is the endpoint's own words
	AtOnce bool   // whatever the threshold
}

func (f *Failure) Error() string { return f.Text }

// Owner is who has an endpoint checked.
type Owner interface {
	// Checked tells the result of each check, and of each [Check.Fail]. It must not wait.
	Checked(Result)

	// Idle says whether nobody has used the endpoint's cluster since it was asked last, and
	// nobody does.
	Idle() bool
}

// Result is what a check has come to.
type Result struct {
	Err     error // nil: it has passed
	Network bool  // there was no answer
	State   State // as of now
	Changed bool  // by this check
	Told    bool  // it was no check: the endpoint has said so itself
}

// ErrNoResult says that nobody could ask, for reasons that are not the endpoint's: for now it is
// what it was. A Probe's errors wrap it.
var ErrNoResult = errors.New("it could not be asked")

var (
	errStopped = errors.New("checks were stopped")
	errPanic   = errors.New("the check has panicked")

	// ErrTimeout is what a Probe is cancelled with whose time is over.
	ErrTimeout = errors.New("it took too long")
)

// Loop is the checks of one loop.
type Loop struct {
	loop   *stream.Loop
	active int
	queue  []*Check // wait for their turn, unless they were stopped meanwhile
	random func() float64
}

// NewLoop returns what the checks on l share.
func NewLoop(l *stream.Loop) *Loop { return &Loop{loop: l, random: rand.Float64} }

// Options are what a [Check] is made of.
type Options struct {
	Config *config.EndpointCheck
	Probe  Probe
	Owner  Owner
	State  State // to begin with
}

// Check is how one endpoint is checked, time and again. All but NewCheck is done on the loop's
// goroutine.
type Check struct {
	of      *Loop
	cfg     *config.EndpointCheck
	probe   Probe
	owner   Owner
	verdict verdict

	runs    bool
	apart   bool // its beat is its own, whatever others have begun with it
	queued  bool // waits for its turn
	busy    bool // a task makes a check
	stale   bool // of which nobody wants the result
	last    time.Time
	due     poller.Deadline
	timeout poller.Alarm
}

// NewCheck returns a check that does nothing before Start. Any goroutine may call it.
func (l *Loop) NewCheck(o Options) *Check {
	return &Check{of: l, cfg: o.Config, probe: o.Probe, owner: o.Owner, verdict: verdict{state: o.State}}
}

// Start has the checks begin, or go on: at once, or at any time within the interval.
func (c *Check) Start(now bool) {
	if c.runs {
		return
	}
	c.runs, c.apart = true, false
	switch {
	case c.busy: // what was stopped ends soon, and is followed by the first one
	case now:
		c.begin()
	default:
		c.scheduleIn(c.spread(c.interval()))
	}
}

// Stop ends the checks, and whatever is under way. What is known stays.
func (c *Check) Stop() {
	if !c.runs {
		return
	}
	c.runs = false
	c.of.loop.Forget(&c.due)
	c.queued = false
	if c.busy {
		c.stale = true
		c.probe.Cancel(errStopped)
	} else {
		c.probe.Close()
	}
}

// Reset forgets what is known: the endpoint was away.
func (c *Check) Reset() { c.verdict = verdict{} }

// Fail has an endpoint that has said so itself fail, until it has passed as many checks as it
// takes. If checks do not run it does nothing.
func (c *Check) Fail(text string) {
	if !c.runs || c.verdict.state == Failing {
		return
	}
	err := &Failure{Text: text, AtOnce: true}
	changed := c.verdict.note(err, c.cfg)
	c.owner.Checked(Result{Err: err, State: c.verdict.state, Changed: changed, Told: true})
	if !c.busy && !c.queued && c.runs {
		c.scheduleIn(c.jittered(c.interval()))
	}
}

// interval is how long the next check has to wait.
func (c *Check) interval() time.Duration {
	if c.verdict.state == Failing {
		return c.cfg.UnhealthyInterval
	}
	return c.cfg.Interval
}

// jittered adds what keeps checks apart that have begun together.
func (c *Check) jittered(d time.Duration) time.Duration {
	return d + time.Duration(c.of.random()*float64(c.cfg.Jitter))
}

// spread is any time within d.
func (c *Check) spread(d time.Duration) time.Duration {
	return time.Duration(c.of.random() * float64(d))
}

func (c *Check) scheduleIn(d time.Duration) {
	c.of.loop.SetDeadline(&c.due, c, c.of.loop.Now().Add(d))
}

// Expire implements [poller.Expirer]: an endpoint that does well, and that nobody uses, is left
// alone for longer. Whether that is so is looked at in each interval.
func (c *Check) Expire(*poller.Deadline) {
	if c.verdict.calm() && c.owner.Idle() {
		if left := c.last.Add(c.cfg.NoTrafficInterval).Sub(c.of.loop.Now()); left > 0 {
			c.scheduleIn(min(left, c.cfg.Interval))
			return
		}
	}
	c.begin()
}

// begin makes a check as soon as it is its turn.
func (c *Check) begin() {
	if c.queued {
		return
	}
	c.queued = true
	c.of.queue = append(c.of.queue, c)
	c.of.next()
}

// next begins the checks whose turn it is.
func (l *Loop) next() {
	for len(l.queue) > 0 && l.active < mostAtOnce {
		c := l.queue[0]
		l.queue[0] = nil
		l.queue = l.queue[1:]
		if c.queued { // it was not stopped meanwhile
			c.queued, c.busy = false, true
			l.active++
			l.loop.Tasks.Go(c)
		}
	}
}

// Run implements [task.Runner]: it is one check.
func (c *Check) Run(t *task.Task) {
	err := errPanic
	defer func() {
		c.of.loop.DropAlarm(&c.timeout)
		c.busy = false
		c.of.active--
		c.ended(err)
		c.of.next()
	}()
	if !c.stale {
		err = c.ask(t)
	}
}

// stall is how late the loop may be before that counts: what has come meanwhile was not looked
// at when the time of a check is over, and deserves as long once more.
const stall = 250 * time.Millisecond

// ask asks the endpoint.
func (c *Check) ask(t *task.Task) error {
	l, timedOut := c.of.loop, false
	until := l.Now().Add(c.cfg.Timeout)
	var expire func()
	expire = func() {
		if l.Now().Sub(until) >= stall {
			until = l.Now().Add(stall)
			l.SetAlarm(&c.timeout, until, expire)
			return
		}
		timedOut = true
		c.probe.Cancel(ErrTimeout)
	}
	l.SetAlarm(&c.timeout, until, expire)
	err := c.probe.Probe(t)
	if timedOut && err != nil {
		return fmt.Errorf("no answer within %v", c.cfg.Timeout)
	}
	return err
}

// ended goes on behind a check.
func (c *Check) ended(err error) {
	switch {
	case !c.stale:
		c.note(err)
	case c.runs:
		c.stale = false
		c.begin()
	default:
		c.stale = false
		c.probe.Close()
	}
}

// note judges by a result, and says when the next check is.
func (c *Check) note(err error) {
	if errors.Is(err, ErrNoResult) {
		c.scheduleIn(c.jittered(c.interval()))
		return
	}
	changed := c.verdict.note(err, c.cfg)
	_, answered := errors.AsType[*Failure](err)
	c.last = c.of.loop.Now()
	c.owner.Checked(Result{Err: err, Network: err != nil && !answered, State: c.verdict.state, Changed: changed})
	switch {
	case !c.runs: // the owner has stopped it
	case !c.apart && err == nil:
		// Those that have all begun at once must not stay together.
		c.apart = true
		c.last = c.last.Add(-c.spread(c.cfg.NoTrafficInterval))
		c.scheduleIn(c.spread(c.cfg.Interval))
	default:
		c.scheduleIn(c.jittered(c.interval()))
	}
}
