package proxy

import (
	"time"

	"holdfast/internal/poller"
	"holdfast/internal/stream"
)

// limits are those of a request's time: deadlines of its loop that know whose they are. What
// one exchange has left filed is put off by the next one, so that it costs nothing but stores.
type limits struct {
	answerDue answerDeadline
	idle      idleDeadline
	grace     graceDeadline
	replyDue  replyDeadline
}

type (
	// answerDeadline is that of the final response.
	answerDeadline struct {
		poller.Deadline
		r      *request
		reason error
	}

	// idleDeadline comes when nothing has moved for a while, at which it looks. Of what a
	// client takes from the kernel nobody tells, so that is looked at meanwhile.
	idleDeadline struct {
		poller.Deadline
		r     *request
		limit time.Duration // 0: none
		moved time.Time     // something has, last
	}

	// graceDeadline is that of a request body whose response is complete.
	graceDeadline struct {
		poller.Deadline
		r    *request
		over bool
	}

	// replyDeadline is that of a client that is to take an answer of our own.
	replyDeadline struct {
		poller.Deadline
		r    *request
		over bool
	}
)

// Expire implements [poller.Expirer].
func (d *answerDeadline) Expire(*poller.Deadline) { d.r.fail(d.reason) }

// Expire implements [poller.Expirer].
func (d *idleDeadline) Expire(*poller.Deadline) {
	now := d.r.loop.Now()
	if d.r.clientSlow && d.r.x.Taken(d.least()) {
		d.moved = now
	}
	switch {
	case now.Before(d.moved.Add(d.limit)):
		d.lookAgain(now)
	case d.r.clientDue:
		d.r.fail(errIdleClient)
	case d.r.clientSlow:
		d.r.fail(errIdleReader)
	default:
		d.r.fail(errIdleUpstream)
	}
}

// idleLooks is how often it is looked at in the time in which something must move: a client
// that has taken something just after a look has that much more.
const idleLooks = 4

// leastTaken is what a client takes in a second, at least, who is not idle: as little as it
// may send of a body by default. One that took a byte now and then would keep what it does
// not take for ever.
const leastTaken = 64

// least is how much a client must have taken for the limit to begin anew.
func (d *idleDeadline) least() int { return max(1, int(leastTaken*d.limit.Seconds())) }

// lookAgain has d look once more, or come.
func (d *idleDeadline) lookAgain(now time.Time) {
	next := now.Add(d.limit / idleLooks)
	if end := d.moved.Add(d.limit); end.Before(next) {
		next = end
	}
	d.r.loop.SetDeadline(&d.Deadline, d, next)
}

// Expire implements [poller.Expirer].
func (d *graceDeadline) Expire(*poller.Deadline) {
	d.over = true
	d.r.task.Wake()
}

// Expire implements [poller.Expirer].
func (d *replyDeadline) Expire(*poller.Deadline) {
	d.over = true
	d.r.x.Abort()
}

func (l *limits) deadlines() [4]*poller.Deadline {
	return [...]*poller.Deadline{&l.answerDue.Deadline, &l.idle.Deadline, &l.grace.Deadline, &l.replyDue.Deadline}
}

// forget takes all deadlines from their loop: nobody uses them again.
func (l *limits) forget(loop *stream.Loop) {
	for _, d := range l.deadlines() {
		loop.Forget(d)
	}
}

// awaitAnswer gives the upstream limited time for its final response, from now on.
func (r *request) awaitAnswer(limit time.Duration, reason error) {
	if limit <= 0 || r.answering {
		return
	}
	r.answerDue.reason = reason
	r.loop.SetDeadline(&r.answerDue.Deadline, &r.answerDue, r.loop.Now().Add(limit))
}

// watchIdle ends the request when nothing moves for too long. It is called once.
func (r *request) watchIdle() {
	if r.idle.limit = r.route.StreamIdleTimeout; r.idle.limit > 0 {
		r.touch()
		r.idle.lookAgain(r.idle.moved)
	}
}

// touch says that something has moved.
func (r *request) touch() { r.idle.moved = r.loop.Now() }
