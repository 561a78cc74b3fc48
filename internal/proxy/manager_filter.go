package proxy

import (
	"log/slog"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/filter"
)

// filters is what the manager has on one loop for requests that pass filters.
type filters struct {
	idle []*filter.Request // to be used again
}

// mostIdleFiltered is how many are kept on a loop.
const mostIdleFiltered = 256

func (f *filters) request() *filter.Request {
	n := len(f.idle)
	if n == 0 {
		return new(filter.Request)
	}
	r := f.idle[n-1]
	f.idle[n-1] = nil
	f.idle = f.idle[:n-1]
	return r
}

func (f *filters) keep(r *filter.Request) {
	r.Reset()
	if len(f.idle) < mostIdleFiltered {
		f.idle = append(f.idle, r)
	}
}

// passes asks the filters of the request's route. false: it was answered, or there is nobody
// to be answered.
func (r *request) passes() bool {
	if r.side.chains == nil {
		return true
	}
	chain := r.side.chains[r.route.Number]
	return len(chain) == 0 || r.passesChain(chain)
}

func (r *request) passesChain(chain filter.Chain) bool {
	f := r.local.filters.request()
	f.Head, f.Listener, f.Route, f.Client = r.head, r.listener, r.route, r.client
	f.Task, f.Loop, f.Random = r.task, r.loop, r.m.options.Random
	r.filter = f
	if r.cause != nil { // the client has gone already
		f.End(r.cause)
	}
	a := chain.Filter(f)
	if f.Delayed {
		r.flag(flags.DelayInjected)
	}
	switch {
	case r.cause != nil:
		r.failed(r.cause)
		return false
	case a == nil:
		return true
	}
	r.answerFiltered(a)
	return false
}

// answerFiltered answers what a filter says, and logs why.
func (r *request) answerFiltered(a *filter.Answer) {
	if r.logs(slog.LevelDebug) {
		r.log(slog.LevelDebug, "request refused by a filter", slog.Int("status", a.Status), slog.String("reason", a.Reason))
	}
	r.reason = a.Reason
	r.flag(a.Cause.Flags())
	r.metrics.refused[filterRefusals[a.Cause]].Inc()
	r.reply(answer{status: a.Status, fields: a.Fields, body: a.Body, contentType: a.ContentType})
}

var filterRefusals = [filter.NumCauses]refusal{
	filter.AddressDenied:       refusedAddress,
	filter.RateLimited:         refusedRate,
	filter.FaultInjected:       refusedFault,
	filter.Unauthorized:        refusedUnauthorized,
	filter.AuthorizationFailed: refusedAuthorization,
}

// filteredOutcome is what has become of an upgrade that did not pass.
func (r *request) filteredOutcome() upgradeOutcome {
	if r.cause != nil {
		return cancelled
	}
	return filtered
}
