package proxy

import (
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/route"
	"holdfast/internal/upstream"
)

// How a request comes to be tried more than once, in this order:
//
//	the endpoint cannot be connected to        at once another one, of three at most (connect)
//	a kept connection was closed under it      at once on a fresh one, if that harms nobody (mayRepeat)
//	a connection has ended before it was seen  the same, up to mostMoves times (HTTP/2: GOAWAY)
//	the route's retry policy says so           after a pause, within its limits (retryPolicy)
//
// The first three are done for every request, and are no retries: nobody has seen it yet. Each
// try begins with the endpoint behind the last one. None comes after the response has begun
// towards the client; interim responses, which promise nothing, do not count.
//
// What is kept of a request's body for that is its tape.

// A nextStep is what follows a try that has failed.
type nextStep uint8

const (
	giveUp nextStep = iota
	repeat          // on a fresh connection
	retry           // as the policy says
)

var (
	errTryTimeout = errors.New("no response within the route's retry.per_try_timeout")
	errDiscarded  = errors.New("the response was discarded, the request is tried again")
)

// What is counted of routes with retries.
var (
	routeRetries          = routeCounter("retries", "Times that a request was given to its cluster once more because the route's retry says so.")
	routeRetrySuccesses   = routeCounter("retry_successes", "Requests that were answered by a retry with what is no reason for another one.")
	routeRetryLimits      = routeCounter("retry_limit_exceeded", "Requests that were not tried again because that was done retry.attempts times.")
	routeRetryOverflows   = routeCounter("retry_overflows", "Requests that were not tried again because the retry_budget of their cluster was used up, or its limits.retries.")
	routeRetriesAbandoned = routeCounter("retries_abandoned", "Requests that were not tried again because their body is longer than retry.buffer, or too much is kept of other bodies.")
	routeTryTimeouts      = routeCounter("per_try_timeouts", "Tries that were given up because there was no response within retry.per_try_timeout.")
)

// retryPolicy is how requests of a route are tried again. It never changes.
type retryPolicy struct {
	config.Retry
	attempts *dynamic.Value

	retries, successes, limits, overflows, abandoned, timeouts *metrics.Counter
}

func newRetryPolicy(o *ManagerOptions, of *route.Route) *retryPolicy {
	c, r, virtualHost, name := of.Retry, o.Metrics, of.VirtualHost, of.Name
	return &retryPolicy{
		Retry:     *c,
		attempts:  o.Values.New(c.Attempts.Key, dynamic.Count, c.Attempts.Value, 0, config.MostAttempts),
		retries:   r.Counter(routeRetries, virtualHost, name),
		successes: r.Counter(routeRetrySuccesses, virtualHost, name),
		limits:    r.Counter(routeRetryLimits, virtualHost, name),
		overflows: r.Counter(routeRetryOverflows, virtualHost, name),
		abandoned: r.Counter(routeRetriesAbandoned, virtualHost, name),
		timeouts:  r.Counter(routeTryTimeouts, virtualHost, name),
	}
}

// addRetries makes the policies of all routes that have one, and the budgets for them.
func (m *Manager) addRetries() {
	for _, r := range m.options.Routes.Routes() {
		if r.Retry == nil {
			continue
		}
		if m.retries == nil {
			m.retries, m.budgets = make(map[*route.Route]*retryPolicy), make(map[string]*retryBudget)
			for c := range m.options.Clusters.All() {
				m.budgets[c.Name] = newRetryBudget(&m.options, c)
			}
		}
		m.retries[r] = newRetryPolicy(&m.options, r)
	}
}

// status says whether a response is a reason to try again.
func (p *retryPolicy) status(status int) bool {
	on := p.On
	switch {
	case on&config.Retry5xx != 0 && status >= 500,
		on&config.RetryGatewayError != 0 && status >= 502 && status <= 504,
		on&config.Retry4xx != 0 && status == 409:
		return true
	}
	return on&config.RetryStatusCodes != 0 && slices.Contains(p.StatusCodes, status)
}

// failure says whether there being no response is one. What is no response ends as a 5xx, and
// counts as that.
func (p *retryPolicy) failure(err error) bool {
	if err == errNoCluster || err == errNoEndpoint || isOverflow(err) {
		return false
	}
	if _, gone := errors.AsType[goneError](err); gone {
		return false
	}
	reasons := config.RetryReset | config.Retry5xx | config.RetryGatewayError
	if _, ok := errors.AsType[*upstream.ConnectError](err); ok {
		reasons |= config.RetryConnectFailure
	}
	if errors.Is(err, exchange.ErrRefused) {
		reasons |= config.RetryRefusedStream
	}
	return p.On&reasons != 0
}

// pause is how long the n-th retry waits, from 1: any time below the base, then three times
// that, seven times and so on, and below the longest one. So those who have failed together do
// not come back together.
func (p *retryPolicy) pause(n int, random uint64) time.Duration {
	longest := p.BackoffMax
	if factor := uint64(1)<<min(n, 32) - 1; factor <= uint64(longest/p.BackoffBase) {
		longest = min(longest, time.Duration(factor)*p.BackoffBase)
	}
	return time.Duration(random % uint64(longest))
}

// retryBudget is that of a cluster, for all loops.
type retryBudget struct {
	cluster *upstream.Cluster
	percent *dynamic.Value
	least   int64
	active  atomic.Int64 // retries
}

func newRetryBudget(o *ManagerOptions, c *upstream.Cluster) *retryBudget {
	b := c.RetryBudget
	return &retryBudget{
		cluster: c, least: b.MinConcurrency,
		percent: o.Values.New(b.Percent.Key, dynamic.Percent, b.Percent.Value, 0, dynamic.Whole),
	}
}

// take takes one retry from the budget, if there is one. How many requests are with the
// cluster is known as of the last turn of each loop.
func (b *retryBudget) take() bool {
	most := max(b.least, b.cluster.Active()*b.percent.Load()/dynamic.Whole)
	if b.active.Add(1) <= most {
		return true
	}
	b.active.Add(-1)
	return false
}

func (b *retryBudget) give() { b.active.Add(-1) }

// tries is what a request knows of its tries. The zero value is that of one whose route has
// no retries.
type tries struct {
	policy   *retryPolicy
	budget   *retryBudget // of which a retry was taken; nil: none
	made     int          // retries
	moves    int          // to another connection since one took no more
	round    upstream.Round
	next     nextStep
	timedOut bool // the last try
	pausing  bool
	alarm    poller.Alarm // of the try, or of the pause
}

// bells are what the alarms of a request ring, made once for all its exchanges.
type bells struct{ pause, try func() }

func (r *request) hangBells() {
	if r.bells.pause == nil {
		r.bells.pause = func() {
			r.tries.pausing = false
			r.task.Wake()
		}
		r.bells.try = func() {
			r.tries.timedOut = true
			r.tries.policy.timeouts.Inc()
			r.closeUpstream()
		}
	}
}

// ended decides what follows a try that has ended with err, which may be that of connecting.
func (r *request) ended(err error, reused bool) nextStep {
	switch {
	case err == errDiscarded:
		return retry
	case r.answering || r.cause != nil:
		return giveUp
	case reused && r.mayRepeat(err), r.mayMove(err):
		return repeat
	case r.tries.policy != nil && r.tries.policy.failure(err) && r.mayRetry():
		return retry
	}
	return giveUp
}

// mostMoves is how often a request is given to another connection because one has ended before
// the endpoint has looked at it: an endpoint that ends all at once harms nobody but itself.
const mostMoves = 3

// mayMove says whether a request is given to another connection because the endpoint has seen
// nothing of it, and the connection takes no more. That harms nobody whatever the method is.
func (r *request) mayMove(err error) bool {
	if !errors.Is(err, exchange.ErrRefused) || !errors.Is(err, exchange.ErrNoAnswer) || r.tries.moves == mostMoves || !r.replayable() {
		return false
	}
	r.tries.moves++
	return true
}

// mayRetry says whether the limits leave a retry for which there is a reason, and takes it.
func (r *request) mayRetry() bool {
	p := r.tries.policy
	switch {
	case int64(r.tries.made) >= p.attempts.Load():
		p.limits.Inc()
		r.flag(flags.RetryLimit)
		return false
	case !r.replayable() || !r.tape.gathered && int64(len(r.tape.kept)) > p.Buffer:
		p.abandoned.Inc()
		return false
	}
	if r.tries.budget == nil {
		if !r.takeRetry() {
			p.overflows.Inc()
			r.flag(flags.UpstreamOverflow)
			return false
		}
	}
	r.tries.made++
	p.retries.Inc()
	return true
}

// discards says whether a final response is not for the client, because the request is tried
// again. If its body is there already, the connection can carry another request.
func (r *request) discards(up exchange.Upstream, resp *exchange.Response) bool {
	p := r.tries.policy
	switch {
	case p == nil:
		return false
	case !p.status(resp.Status):
		if r.tries.made > 0 {
			p.successes.Inc()
		}
		return false
	case r.cause != nil || !r.mayRetry():
		return false
	}
	if r.logs(slog.LevelDebug) {
		r.log(slog.LevelDebug, "the response is a reason to try again", slog.Int("status", resp.Status))
	}
	for n := 0; n < mostDrained && up.Ready(); {
		b, err := up.Read(r.task)
		if n += len(b); err != nil {
			break
		}
	}
	return true
}

// mostDrained is how much of a body is read in vain to keep a connection.
const mostDrained = 64 << 10

// pause waits before a retry. false: the request has failed meanwhile.
func (r *request) pause() bool {
	t := &r.tries
	r.upstreamTime = 0 // that of a response which nobody gets
	r.touch()
	if d := t.policy.pause(t.made, r.m.options.Random()); d > 0 {
		t.pausing = true
		r.loop.SetAlarm(&t.alarm, r.loop.Now().Add(d), r.bells.pause)
		for t.pausing && r.cause == nil {
			r.task.Wait()
		}
		t.pausing = false
		r.loop.DropAlarm(&t.alarm)
	}
	return r.cause == nil
}

// limitTry gives the endpoint limited time for its response, from now on: the request is with
// it, or the last of it is about to be.
func (r *request) limitTry() {
	t := &r.tries
	if t.policy == nil || t.policy.PerTryTimeout <= 0 || r.answering || r.up == nil {
		return
	}
	r.loop.SetAlarm(&t.alarm, r.loop.Now().Add(t.policy.PerTryTimeout), r.bells.try)
}

// endTry ends the time of a try.
func (r *request) endTry() {
	if r.tries.policy != nil {
		r.loop.DropAlarm(&r.tries.alarm)
	}
}
