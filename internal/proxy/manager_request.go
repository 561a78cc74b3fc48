package proxy

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"holdfast/internal/accesslog/flags"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/filter"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

// replyTimeout is how long a client may take to make room for an answer of our own.
// The answer is small, but a client that sends requests and reads no answers has
// filled its connection with the ones before.
const replyTimeout = 10 * time.Second

// Why a request has failed, where no codec or kernel said it.
var (
	errNoCluster        = errors.New("no such cluster")
	errNoEndpoint       = errors.New("the cluster has no healthy endpoint")
	errResponseTimeout  = errors.New("no response within the route's timeout")
	errHandshakeTimeout = errors.New("no answer to the upgrade within its handshake_timeout")
	errUnasked101       = errors.New("a 101 that nobody asked for")
	errImproper101      = errors.New("a 101 that does not agree to what was asked for")
	errUnauthorized     = errors.New("the upstream takes the upgrade for an ordinary request, about which authorize is not asked by authorize_upgrades = false")
	errFault            = errors.New("a fault of ours, which is in the log")

	// The stream_idle_timeout ran out while we waited for one of the two.
	errIdleClient   = &exchange.StatusError{Status: 408, Text: "no byte moved within the route's stream_idle_timeout, the client's body was due"}
	errIdleReader   = errors.New("no byte moved within the route's stream_idle_timeout, the client takes no more")
	errIdleUpstream = &exchange.StatusError{Status: 504, Text: "no byte moved within the route's stream_idle_timeout"}
)

// What access logs say of responses that were not completed, where that is no error's
// text.
const (
	clientGone     = "the client has gone"
	answerNotTaken = "the client did not take the answer in time"
	cutByTheStop   = "cut when the time of the drain or the stop was over"
)

// bodyError is a fault in the request's body, goneError one in sending to the client,
// so that neither is taken for the upstream's.
type (
	bodyError struct{ error }
	goneError struct{ error }
)

func (e bodyError) Unwrap() error { return e.error }
func (e goneError) Unwrap() error { return e.error }

// request is one exchange on its way through the manager. All of it is done on the
// goroutine of one loop: by the handler's task, that of the upload, and what the loop
// calls when time is over or the client has gone. It is used again when it is over, so
// whoever was given a pointer to it has let go of that by then.
type request struct {
	limits
	bells bells
	transit
	logged   logged
	pristine exchange.Fields // as the client had them, where they are changed
}

// transit is what a request knows of one exchange.
type transit struct {
	m        *Manager
	x        exchange.Exchange
	loop     *stream.Loop
	task     *task.Task // the handler's
	head     *exchange.Request
	listener string
	route    *route.Route // nil: none matches
	cluster  string       // "": none chosen
	endpoint *upstream.Endpoint

	id           string
	scheme       string       // that the client used, behind proxies that we trust
	authority    string       // as received
	client       netip.Addr   // behind proxies that we trust; zero: not known
	edge         *config.Edge // of the listener
	target       string       // normalised: what is matched and rewritten
	original     string       // the target as received, for those who look at it; nothing is decided by it
	forwardedFor string       // as received; only for the access log
	aim          aim
	status       int // of the response, once there is one

	account

	local  *perLoop
	tries  tries
	side   *side           // of its listener
	filter *filter.Request // nil: no filter has seen it

	attempt upstream.Attempt  // to connect
	up      exchange.Upstream // in use; nil: none, or it is closed
	upload  upload
	tape    tape
	copies  *mirrorPolicy // the request is to be copied, and was not yet; nil: it is not

	cause      error    // why it cannot be completed, of what we or the codec found out while nobody asked
	left       bool     // cause is that the exchange is over, which was not us
	answering  bool     // the final response has begun
	givenUp    bool     // nobody wants the rest of the request body
	clientDue  bool     // the client's next bytes are waited for
	clientSlow bool     // the client takes no more
	overloaded bool     // it failed by a limit of its cluster
	spliced    splicing // the response's body

	own       exchange.Response // an answer of our own
	ownFields [4]exchange.Field
}

// begin makes r, which knows nothing yet, the request of an exchange.
func (r *request) begin(m *Manager, t *task.Task, x exchange.Exchange) {
	head, down := x.Request(), x.Downstream()
	r.m, r.x, r.loop, r.task = m, x, x.Loop(), t
	r.head, r.listener = head, down.Listener
	r.authority, r.target, r.original = head.Authority, head.Target, head.Target
	r.local = m.loops[r.loop.Index]
	r.upload.r, r.tape.r, r.answerDue.r, r.idle.r, r.grace.r, r.replyDue.r = r, r, r, r, r, r
	r.answerDue.reason, r.idle.limit, r.grace.over, r.replyDue.over = nil, 0, false, false
	side := m.side(down.Listener)
	r.side = side
	r.open(side)
	if m.options.AccessLog != nil {
		r.forwardedFor, _ = head.Fields.Get(forwardedFor)
		r.logged.response = r.logged.response[:0]
	}
	r.edge = &side.edge
	r.identify(side, down.Remote)
	x.OnOver(r)
}

// end makes sure that nothing touches the exchange after Serve has returned.
func (r *request) end() {
	for _, d := range r.deadlines() {
		r.loop.SetDeadline(d, nil, time.Time{})
	}
	r.abandonUpload() // after a panic between two tries
	r.endTry()
	r.giveBack()
	r.tape.erase()
	r.settle()
	r.forgetPristine()
}

// ExchangeOver implements [exchange.Watcher]: nothing can be done for the client any
// more.
func (r *request) ExchangeOver(err error) {
	if r.cause == nil {
		r.left = true
		r.stop(err)
	}
}

// fail ends the exchange with the upstream for a reason that the handler finds in
// r.cause, and what waits for the client: before the response so that the handler can
// answer, afterwards by cutting the connection. The first reason counts.
func (r *request) fail(reason error) {
	if r.cause != nil {
		return
	}
	r.stop(reason)
	r.giveUpBody()
	if r.answering {
		r.x.Abort()
	}
}

// bodyFailed is fail for a fault in the request's body, if anybody still wants it and
// it is one of the body.
func (r *request) bodyFailed(err error) {
	if over := r.x.Over(); over != nil {
		r.ExchangeOver(over)
	}
	if !r.givenUp {
		r.fail(bodyError{err})
	}
}

// stop ends all that has to do with the upstream.
func (r *request) stop(cause error) {
	r.cause = cause
	r.attempt.Cancel(cause)
	r.closeUpstream()
	r.tape.wake()
	if r.tries.pausing {
		r.task.Wake()
	}
	if r.filter != nil {
		r.filter.End(cause)
	}
}

// closeUpstream closes the exchange with the upstream, once: its connection may be
// another request's from then on.
func (r *request) closeUpstream() {
	if up := r.up; up != nil {
		r.up = nil
		up.Close()
	}
}

// giveUpBody makes reading the request's body end.
func (r *request) giveUpBody() {
	r.givenUp = true
	r.x.StopReading()
	r.tape.wake()
}

// beginAnswer ends the wait for a response. false means that it failed meanwhile.
func (r *request) beginAnswer() bool {
	r.loop.SetDeadline(&r.answerDue.Deadline, nil, time.Time{})
	if r.answering = r.cause == nil; r.answering {
		r.endTry()
		r.giveBack()
		if !r.uploading() {
			r.tape.erase() // the response may last
		}
	}
	return r.answering
}

// opener is how an endpoint begins an exchange.
type opener func(*upstream.Endpoint, *task.Task, *stream.Loop, *upstream.Attempt) (exchange.Upstream, error)

// connect chooses a cluster, unless that was done, and begins an exchange with one
// of its endpoints: with the next in turn, or with others where that one cannot
// be reached.
func (r *request) connect(open opener) (exchange.Upstream, error) {
	if r.cluster == "" {
		r.cluster = r.choose()
	}
	cluster, ok := r.m.options.Clusters.Get(r.cluster)
	if !ok {
		return nil, errNoCluster
	}
	err := errNoEndpoint
	attempts := 0
	round := &r.tries.round
	cluster.Again(round, r.query())
	if cluster.Announces() {
		r.attempt.Announcement = r.announcement()
	}
	r.attempt.Priority = r.route.Priority
	r.limitPending(cluster)
	defer r.endPending()
	for e := round.Next(); e != nil; e = round.Next() {
		r.endpoint = e
		var up exchange.Upstream
		if up, err = open(e, r.task, r.loop, &r.attempt); err == nil {
			return up, nil
		}
		if isOverflow(err) {
			return nil, err // which would be so with every endpoint
		}
		r.m.notConnected(err)
		if attempts++; attempts == cluster.ConnectAttempts() || r.cause != nil {
			break
		}
		if r.logs(slog.LevelDebug) {
			r.log(slog.LevelDebug, "trying another endpoint", slog.Any("err", err))
		}
	}
	if r.cause == nil {
		cluster.Unserved(err != errNoEndpoint)
	}
	return nil, err
}

// query is what the choice of an endpoint may depend on.
func (r *request) query() balance.Query {
	return balance.Query{Hash: r.aim.hash, Hashed: r.aim.hashed}
}

// use begins what is counted of a request that its endpoint is given.
func (r *request) use(up exchange.Upstream) {
	r.up = up
	r.called = true
	r.endpoint.Begin(r.loop, &r.attempt, &r.call)
}

// leave ends what use has begun. Nobody reads the request's body any more then, unless the
// request is tried again.
func (r *request) leave(err error) {
	r.endTry()
	if r.tries.next == giveUp {
		r.abandonUpload()
	} else {
		r.detachUpload()
	}
	r.closeUpstream()
	outcome := r.outcome(err)
	if outcome == upstream.Reset && r.tries.next == repeat {
		outcome = upstream.Stale
	}
	r.call.End(outcome)
}

// rewrite makes the head the one that the chosen endpoint gets.
func (r *request) rewrite() {
	r.head.Target = r.aim.target
	switch {
	case r.aim.host != "":
		r.head.Authority = r.aim.host
	case r.route.HostRewrite != "":
		r.head.Authority = r.route.HostRewrite
	case r.route.AutoHostRewrite && r.endpoint.Path == "": // a path is no host
		r.head.Authority = r.endpoint.Address
	}
	r.editRequest()
}

// receive relays interim responses and returns the final one, or a 101.
func (r *request) receive(up exchange.Upstream) (*exchange.Response, error) {
	for r.cause == nil {
		resp, err := up.Receive(r.task)
		if err != nil {
			return nil, err
		}
		r.touch()
		if resp.Status >= 200 || resp.Status == 101 {
			if r.m.options.AccessLog != nil {
				r.upstreamTime = r.loop.Now().Sub(r.began)
			}
			r.call.Answered(resp.Status)
			r.endpoint.Heed(resp)
			return resp, nil
		}
		if err := r.x.Inform(r.task, resp); err != nil {
			return nil, goneError{err}
		}
	}
	return nil, r.cause
}

// relay sends a final response on as it comes. It returns without an error at the
// end of the body, before the response is finished.
func (r *request) relay(up exchange.Upstream, resp *exchange.Response) error {
	r.status = resp.Status
	resp.Close = r.closes()
	r.prepare(resp)
	if err := r.x.Respond(resp); err != nil {
		return goneError{err}
	}
	r.begins(resp.Status)
	if r.hasBody(resp) && !up.Ready() {
		// What follows may take its time: an event stream's head goes out first.
		r.clientSlow = true
		if err := r.x.Flush(r.task); err != nil {
			return goneError{err}
		}
		r.clientSlow = false
	}
	return r.relayBody(up)
}

// relayBody sends the body of a response on.
func (r *request) relayBody(up exchange.Upstream) error {
	for r.cause == nil {
		p, err := up.Read(r.task)
		if n := len(p); n > 0 {
			r.touch()
			r.clientSlow = true
			if err := r.x.Write(r.task, p); err != nil {
				return goneError{err}
			}
			r.clientSlow = false
			r.sent += uint64(n)
			r.touch()
			if err := r.spliced.run(r.task, r, r.up, r.x); err != nil {
				return goneError{err}
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil && r.sent == 0 && r.cause == nil:
			_ = r.x.Flush(r.task) // the client gets the head, as it does where the error comes later
			return err
		case err != nil:
			return err
		}
	}
	return r.cause
}

func (r *request) hasBody(resp *exchange.Response) bool {
	return resp.ContentLength != 0 && r.head.Method != "HEAD" && resp.Status != 204 && resp.Status != 304
}

// closes says whether the response is its connection's last one. Behind a refused
// upgrade nobody can tell which protocol the client's next bytes are.
func (r *request) closes() bool { return r.head.Upgrade != "" }

// failed ends a request that cannot be completed: with an answer, or, once the
// response has begun or the client has gone, by leaving it unfinished, so that
// the codec cuts the connection.
func (r *request) failed(err error) {
	_, gone := errors.AsType[goneError](err)
	switch over := r.x.Over(); {
	case r.cause != nil:
		// What we see is the consequence of the first reason, which may be ours.
		err, gone = r.cause, r.left
	case gone && over != nil:
		err = over
	}
	switch err {
	case errResponseTimeout, errPendingTimeout, errHandshakeTimeout:
		r.routeMetrics.timeouts.Inc()
	case errIdleClient, errIdleReader, errIdleUpstream:
		r.routeMetrics.idleTimeouts.Inc()
	}
	switch {
	case gone && err == net.ErrClosed:
		r.reason = cutByTheStop
		r.flag(flags.LocalReset)
		if r.logs(r.notable()) {
			r.log(r.notable(), "request cut", slog.Int("status", r.status), slog.String("reason", r.reason))
		}
	case gone:
		r.reason, r.clientLeft = clientGone, true
		r.flag(flags.DownstreamTermination)
		// A tunnel that did not come about is worth a line: clients that give up
		// tell of upstreams that hang.
		level := slog.LevelDebug
		if r.head.Upgrade != "" {
			level = r.notable()
		}
		if r.logs(level) {
			r.log(level, "the client has gone", slog.Any("err", err))
		}
	case r.answering, err == errFault:
		r.reason = err.Error()
		r.flag(flagsOfFailure(err))
		if r.logs(r.notable()) {
			r.log(r.notable(), "response cut", slog.Int("status", r.status), slog.Any("err", err))
		}
	default:
		status, why := answerTo(err)
		r.flag(flagsOfFailure(err))
		r.overloaded = isOverflow(err)
		r.refuse(status, why, err.Error())
	}
}

// answerTo returns the answer to a failure before the response, and what it is
// counted as.
func answerTo(err error) (status int, why refusal) {
	if c, ok := errors.AsType[*upstream.ConnectError](err); ok {
		if c.Timeout {
			return 504, refusedUpstreamSlow
		}
		return 503, refusedUnreachable
	}
	if errors.Is(err, errCrowded) || isOverflow(err) {
		return 503, refusedOverload
	}
	if b, ok := errors.AsType[bodyError](err); ok {
		status = exchange.StatusOf(b, 400)
		return status, codecRefusals[status]
	}
	switch err {
	case errUnresolved:
		return 400, refusedPath
	case errNoPath, errNoAuthority:
		return 400, refusedMalformed
	case errUnknown:
		return 404, refusedNoCluster
	case errUnauthorized:
		return 403, refusedUnauthorized
	case errNoCluster, errNoEndpoint:
		return 503, refusedUnreachable
	case errIdleClient:
		return 408, refusedSlow
	case errResponseTimeout, errPendingTimeout, errHandshakeTimeout, errTryTimeout, errIdleUpstream:
		return 504, refusedUpstreamSlow
	}
	if isInvalid(err) {
		return 502, refusedInvalid
	}
	return exchange.StatusOf(err, 503), refusedClosed
}

// isInvalid says of a failed request that the upstream's answer was not a valid one.
// Of an answer that has no end nobody knows.
func isInvalid(err error) bool {
	return err == errUnasked101 || err == errImproper101 ||
		exchange.StatusOf(err, 0) == 502 && !errors.Is(err, io.ErrUnexpectedEOF)
}

// refuse answers by ourselves, and logs why.
func (r *request) refuse(status int, why refusal, reason string) {
	level := slog.LevelDebug
	if status >= 500 {
		level = r.notable()
	}
	if r.logs(level) {
		r.log(level, "request refused", slog.Int("status", status), slog.String("reason", reason))
	}
	r.reason = reason
	r.flag(flagsOfRefused[why])
	r.metrics.refused[why].Inc()
	a := answer{status: status}
	if r.overloaded {
		a.fields = append(r.ownFields[:0], exchange.Field{Name: overloadedField, Value: "true"})
	}
	r.reply(a)
}
