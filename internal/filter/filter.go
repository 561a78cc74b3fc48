// Package filter is what a request must pass between its route and the route's target: a
// chain of filters, each of which lets it go on, holds it up, or answers it.
//
//	chain := filter.New(options)["public"][route.Number]   // nil in most cases
//	...
//	if answer := chain.Filter(&filter.Request{Head: head, Route: route, …}); answer != nil {
//		// the client gets that
//	}
//
// The order is the same for every route, and a filter that is not configured for a route
// is not in its chain:
//
//	addresses          allow, deny
//	rate limits        rate_limit of ordinary requests, tunnel_rate_limit of upgrades
//	faults             fault: delay first, then abort
//	authorization      authorize
//
// Within one kind, that of the listener comes first, then that of the virtual host, then
// that of the route. What costs least and refuses most comes first, and nobody is asked
// about a request that something else refuses.
//
// A filter sees ordinary requests and upgrades alike, in a task of the request's loop. It
// must not block otherwise than by what it finds in the [Request]. Its methods are called on
// several loops at once.
package filter

import (
	"net/netip"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/exchange"
	"holdfast/internal/poller"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/task"
)

// A Filter judges requests.
type Filter interface {
	// Filter returns nil to let the request go on, or what it is answered with. It may
	// change the request's fields. Where [Request.Over] says after a wait that the exchange is
	// over, what it returns does not matter.
	Filter(*Request) *Answer
}

// Chain is the filters of a route in their order.
type Chain []Filter

// Filter asks one filter after the other, until one answers or the exchange is over.
func (c Chain) Filter(r *Request) *Answer {
	for _, f := range c {
		if a := f.Filter(r); a != nil || r.over != nil {
			return a
		}
	}
	return nil
}

// Answer is what a filter has a client told. It is only read, and so may be shared.
type Answer struct {
	Status      int
	Fields      exchange.Fields // beside those of the body
	Body        string          // "": a line with the status and its reason
	ContentType string          // of the body; "": text

	Cause  Cause  // what it is counted as
	Reason string // for logs; nothing of the client's stands in it
}

// Cause is why a filter has answered.
type Cause uint8

// The causes.
const (
	AddressDenied       Cause = iota // the client's address
	RateLimited                      // too many requests, or tunnels
	FaultInjected                    // on purpose
	Unauthorized                     // the authorization service has refused it
	AuthorizationFailed              // the authorization service could not be asked
	NumCauses
)

// Flags returns the response flags of an answer for this cause. An address that is denied has
// none.
func (c Cause) Flags() flags.Set { return flagsOf[c] }

var flagsOf = [NumCauses]flags.Set{
	RateLimited: flags.RateLimited, FaultInjected: flags.FaultInjected, Unauthorized: flags.Unauthorized, AuthorizationFailed: flags.Unauthorized,
}

// Request is a request on its way through a chain, as its filters see it. Whoever runs the
// chain fills the exported fields. Strings are good until the exchange ends.
type Request struct {
	Head     *exchange.Request // a filter may change its fields
	Listener string
	Route    *route.Route // with its name and its virtual host
	Client   netip.Addr   // no valid one for a client on a unix socket
	Task     *task.Task
	Loop     *stream.Loop
	Random   func() uint64

	// Response are fields that every final response or 101 gets besides.
	Response exchange.Fields

	// Delayed says that the request was held up on purpose.
	Delayed bool

	over   error // why nobody waits for an answer any more
	waits  Interrupter
	alarm  poller.Alarm
	answer Answer // memory for one, and for its fields
	fields [4]exchange.Field
}

// IsUpgrade says whether the client asks for another protocol, so that the request may become
// a tunnel. None does of a route that answers by itself.
func (r *Request) IsUpgrade() bool { return r.Head.Upgrade != "" && r.Route.Direct == nil }

// Over returns why nobody waits for an answer any more, nil while somebody does.
func (r *Request) Over() error { return r.over }

// Sleep waits, as exact as a [poller.Alarm]. It returns false at once when the exchange is over.
func (r *Request) Sleep(d time.Duration) bool {
	r.SetAlarm(r.Loop.Now().Add(d), nil)
	for r.over == nil && r.alarm.IsSet() {
		r.Task.Wait()
	}
	r.ClearAlarm()
	return r.over == nil
}

// SetAlarm wakes the task at a time, and no longer at the one that was set before. It calls fn
// then, if that is not nil, on the loop's goroutine, before the task goes on.
func (r *Request) SetAlarm(at time.Time, fn func()) {
	r.Loop.SetAlarm(&r.alarm, at, func() {
		r.Task.Wake()
		if fn != nil {
			fn()
		}
	})
}

// ClearAlarm has nothing called any more.
func (r *Request) ClearAlarm() { r.Loop.DropAlarm(&r.alarm) }

// An Interrupter ends what a filter waits for, at once and without waiting.
type Interrupter interface{ Interrupt(error) }

// OnOver has i told, on the loop's goroutine, when the exchange is over while the filter
// waits; nil: nobody. A filter that sets it takes it back before it returns.
func (r *Request) OnOver(i Interrupter) { r.waits = i }

// End says that the exchange is over, and why. It is called on the loop's goroutine.
func (r *Request) End(why error) {
	if r.over != nil {
		return
	}
	r.over = why
	if r.waits != nil {
		r.waits.Interrupt(why)
	}
	r.Task.Wake()
}

// Reset makes the request one that knows nothing, to be used for another one.
func (r *Request) Reset() {
	r.ClearAlarm()
	response := r.Response[:0]
	clear(response[:cap(response)])
	*r = Request{Response: response}
}

// reply returns an answer in the request's own memory.
func (r *Request) reply(a Answer, fields ...exchange.Field) *Answer {
	r.answer = a
	r.answer.Fields = append(r.fields[:0], fields...)
	return &r.answer
}
