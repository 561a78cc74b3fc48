package proxy

import (
	"errors"
	"time"

	"holdfast/internal/upstream"
)

// overloadedField is what an answer of ours has when a limit of the cluster was reached, so that
// clients and those in between can tell it from a 503 of an upstream, and do not come back at
// once.
const overloadedField = "Holdfast-Overloaded"

var errPendingTimeout = errors.New("no connection was to be had within the route's timeout, by the limits of the cluster")

// isOverflow says of a failed request that a limit of its cluster was reached. Nothing is tried
// again for that: it would make more of what is too much.
func isOverflow(err error) bool {
	_, ok := errors.AsType[*upstream.OverflowError](err)
	return ok
}

// limitPending bounds the time in which a request waits for a connection, where there are limited
// ones, and its answer is not due yet: the time for that begins when its body has been sent,
// which nobody does before there is a connection.
func (r *request) limitPending(c *upstream.Cluster) {
	if r.head.Upgrade == "" && r.head.ContentLength != 0 && !r.upload.complete && c.LimitsConnections(r.route.Priority) {
		r.awaitAnswer(r.route.Timeout, errPendingTimeout)
	}
}

// endPending ends that. Where the last of the body has been sent meanwhile, as it may be for
// another try, the time for the answer goes on.
func (r *request) endPending() {
	if r.answerDue.reason == errPendingTimeout {
		r.answerDue.reason = nil
		r.loop.SetDeadline(&r.answerDue.Deadline, nil, time.Time{})
	}
}

// takeRetry takes a retry of what the request's cluster leaves: of its budget, and of its limit.
// Both must have one.
func (r *request) takeRetry() bool {
	b := r.m.budgets[r.cluster]
	if !b.take() {
		return false
	}
	if !b.cluster.TakeRetry(r.route.Priority) {
		b.give()
		return false
	}
	r.tries.budget = b
	return true
}

// giveBack ends what the request has of that.
func (r *request) giveBack() {
	if b := r.tries.budget; b != nil {
		r.tries.budget = nil
		b.give()
		b.cluster.GiveRetry(r.route.Priority)
	}
}
