package proxy

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/exchange"
	"holdfast/internal/route"
	"holdfast/internal/upstream"
)

// maxAttempts is how many endpoints are tried until one is connected.
const maxAttempts = 3

// replyTimeout is how long a client may take to make room for an answer of our own.
// The answer is small, but a client that sends requests and reads no answers has
// filled its connection with the ones before.
const replyTimeout = 10 * time.Second

// Why a request has failed, where no codec or kernel said it.
var (
	errNoCluster        = errors.New("no such cluster")
	errNoEndpoint       = errors.New("the cluster has no endpoint")
	errResponseTimeout  = errors.New("no response within the route's timeout")
	errHandshakeTimeout = errors.New("no answer to the upgrade within its handshake_timeout")
	errUnasked101       = errors.New("a 101 that nobody asked for")
	errImproper101      = errors.New("a 101 that does not agree to WebSocket")
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

// request is one exchange on its way through the manager. Its handler's goroutine
// owns it, apart from what mu guards.
type request struct {
	m        *Manager
	x        exchange.Exchange
	head     *exchange.Request
	listener string
	route    *route.Route // nil: none matches
	cluster  string       // "": none chosen
	endpoint *upstream.Endpoint

	id           string
	scheme       string // that the client used, behind proxies that we trust
	authority    string // as received
	target       string // as received
	forwardedFor string // as received
	status       int    // of the response, once there is one

	account

	ctx    context.Context // ends with the exchange's, and by fail
	cancel context.CancelCauseFunc
	idle   watchdog

	clientDue  atomic.Bool // the client's next bytes are waited for
	clientSlow atomic.Bool // the client takes no more

	mu           sync.Mutex
	answering    bool        // the final response has begun
	givenUp      bool        // nobody wants the rest of the request body
	over         bool        // Serve is about to return
	responseTime *time.Timer // until the final response; nil: none is running
}

func newRequest(m *Manager, x exchange.Exchange) *request {
	head, down := x.Request(), x.Downstream()
	r := &request{
		m: m, x: x, head: head, listener: down.Listener,
		authority: head.Authority, target: head.Target,
	}
	side := m.side(down.Listener)
	r.begin(side)
	r.ctx, r.cancel = context.WithCancelCause(x.Context())
	r.forwardedFor, _ = head.Fields.Get(forwardedFor)
	r.id, r.scheme = setForwarding(head, down.Remote, trusts(side.trusted, down.Remote), m.options.Random)
	return r
}

// end makes sure that nothing touches the exchange after Serve has returned.
func (r *request) end() {
	r.mu.Lock()
	r.over = true
	r.stopTimerLocked()
	r.mu.Unlock()
	r.idle.stop()
	r.cancel(nil)
	r.settle()
}

// fail ends the exchange with the upstream for a reason that the handler finds in
// r.ctx, and wakes whoever waits for the client: before the response so that
// the handler can answer, afterwards by cutting the connection. Any goroutine
// may call it; the first reason counts.
func (r *request) fail(reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failLocked(reason)
}

// bodyFailed is fail for a fault in the request's body, if anybody still wants it.
func (r *request) bodyFailed(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.givenUp {
		r.failLocked(bodyError{err})
	}
}

// giveUpBody makes reading the request's body end.
func (r *request) giveUpBody() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.givenUp = true
	r.x.StopReading()
}

func (r *request) failLocked(reason error) {
	if r.over || r.ctx.Err() != nil {
		return
	}
	r.cancel(reason)
	r.givenUp = true
	r.x.StopReading()
	if r.answering {
		r.x.Abort()
	}
}

// abort cuts the client's connection, unless it is no longer ours to cut.
func (r *request) abort() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.over {
		r.x.Abort()
	}
}

// beginAnswer ends the wait for a response. false means that it failed meanwhile.
func (r *request) beginAnswer() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopTimerLocked()
	r.answering = r.ctx.Err() == nil
	return r.answering
}

// awaitAnswer gives the upstream limited time for its final response, from now on.
func (r *request) awaitAnswer(limit time.Duration, reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if limit <= 0 || r.answering || r.over {
		return
	}
	r.responseTime = time.AfterFunc(limit, func() { r.fail(reason) })
}

func (r *request) stopTimerLocked() {
	if r.responseTime != nil {
		r.responseTime.Stop()
		r.responseTime = nil
	}
}

// opener is how an endpoint begins an exchange.
type opener func(*upstream.Endpoint, context.Context) (exchange.Upstream, error)

// connect chooses a cluster, unless that was done, and begins an exchange with one
// of its endpoints: with the next in turn, or with others where that one cannot
// be reached.
func (r *request) connect(open opener) (exchange.Upstream, error) {
	if r.cluster == "" {
		r.cluster = r.route.Cluster(r.m.options.Random())
	}
	cluster, ok := r.m.options.Clusters.Get(r.cluster)
	if !ok {
		return nil, errNoCluster
	}
	err := errNoEndpoint
	attempts := 0
	for e := range cluster.Endpoints() {
		r.endpoint = e
		var up exchange.Upstream
		if up, err = open(e, r.ctx); err == nil {
			return up, nil
		}
		r.m.notConnected(err)
		if attempts++; attempts == maxAttempts || r.ctx.Err() != nil {
			break
		}
		r.log(slog.LevelDebug, "trying another endpoint", slog.Any("err", err))
	}
	if r.ctx.Err() == nil {
		cluster.Exhausted()
	}
	return nil, err
}

// closeWith closes up when ctx is done. What it returns closes up too, and waits
// until nobody else does.
func closeWith(ctx context.Context, up exchange.Upstream) (release func()) {
	closed := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		defer close(closed)
		up.Close()
	})
	return func() {
		if !unhook() {
			<-closed
		}
		up.Close()
	}
}

// rewrite makes the head the one that the chosen endpoint gets.
func (r *request) rewrite() {
	r.head.Target = r.route.Target(r.target)
	switch {
	case r.route.HostRewrite != "":
		r.head.Authority = r.route.HostRewrite
	case r.route.AutoHostRewrite && r.endpoint.Path == "": // a path is no host
		r.head.Authority = r.endpoint.Address
	}
}

// receive relays interim responses and returns the final one, or a 101.
func (r *request) receive(up exchange.Upstream) (*exchange.Response, error) {
	for {
		resp, err := up.Receive()
		if err != nil {
			return nil, err
		}
		r.idle.touch()
		if resp.Status >= 200 || resp.Status == 101 {
			r.upstreamTime = time.Since(r.began)
			r.call.Answered(resp.Status)
			return resp, nil
		}
		if err := r.x.Inform(resp); err != nil {
			return nil, goneError{err}
		}
	}
}

// relay sends a final response on as it comes. It returns without an error at the
// end of the body, before the response is finished.
func (r *request) relay(up exchange.Upstream, resp *exchange.Response) error {
	r.status = resp.Status
	resp.Close = r.closes()
	if err := r.x.Respond(resp); err != nil {
		return goneError{err}
	}
	r.responded = true
	if r.hasBody(resp) {
		// What follows may take its time: an event stream's head goes out first.
		if err := r.x.Flush(); err != nil {
			return goneError{err}
		}
	}
	buf := r.m.buffers.Get().(*copyBuffer)
	defer r.m.buffers.Put(buf)
	for {
		n, err := up.Read(buf[:])
		if n > 0 {
			r.idle.touch()
			r.clientSlow.Store(true)
			if _, err := r.x.Write(buf[:n]); err != nil {
				return goneError{err}
			}
			r.clientSlow.Store(false)
			r.sent += uint64(n)
			r.idle.touch()
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
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
	if r.ctx.Err() != nil {
		// What we see is the consequence of the first reason, which may be ours.
		err = context.Cause(r.ctx)
		gone = err == context.Cause(r.x.Context())
	}
	switch err {
	case errResponseTimeout, errHandshakeTimeout:
		r.routeMetrics.timeouts.Inc()
	case errIdleClient, errIdleReader, errIdleUpstream:
		r.routeMetrics.idleTimeouts.Inc()
	}
	switch {
	case gone && err == net.ErrClosed:
		r.reason = cutByTheStop
		r.log(r.notable(), "request cut", slog.Int("status", r.status), slog.String("reason", r.reason))
	case gone:
		r.reason, r.clientLeft = clientGone, true
		// A tunnel that did not come about is worth a line: clients that give up
		// tell of upstreams that hang.
		level := slog.LevelDebug
		if r.head.Upgrade != "" {
			level = r.notable()
		}
		r.log(level, "the client has gone", slog.Any("err", err))
	case r.answering, err == errFault:
		r.reason = err.Error()
		r.log(r.notable(), "response cut", slog.Int("status", r.status), slog.Any("err", err))
	default:
		status, why := answerTo(err)
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
	if b, ok := errors.AsType[bodyError](err); ok {
		status = exchange.StatusOf(b, 400)
		return status, codecRefusals[status]
	}
	switch err {
	case errNoCluster, errNoEndpoint:
		return 503, refusedUnreachable
	case errIdleClient:
		return 408, refusedSlow
	case errResponseTimeout, errHandshakeTimeout, errIdleUpstream:
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
	r.log(level, "request refused", slog.Int("status", status), slog.String("reason", reason))
	r.reason = reason
	r.metrics.refused[why].Inc()
	r.reply(status, nil)
}

// notable is the level of lines about a request that an operator looks for. Beside a
// dead upstream each request is one, and journald drops what a service writes beyond
// a rate (journald.conf(5), RateLimitBurst=), also the lines that matter more. So where
// there is an access log, whose records have the same facts, the level is debug.
func (r *request) notable() slog.Level {
	if r.m.options.AccessLog != nil {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

func (r *request) redirect() {
	status, location, ok := r.route.Redirect(r.scheme, r.authority, r.target)
	if !ok {
		r.refuse(400, refusedMalformed, "a redirect needs a host, the request has none")
		return
	}
	r.routeMetrics.redirects.Inc()
	r.reply(status, exchange.Fields{{Name: "Location", Value: location}})
}

// reply answers by ourselves. Where that fails it settles who is to blame: a client that
// has gone, or we, who give it limited time.
func (r *request) reply(status int, fields exchange.Fields) {
	limit := time.AfterFunc(replyTimeout, r.abort)
	err := r.send(status, fields)
	inTime := limit.Stop()
	if err == nil {
		r.complete = true
		return
	}
	cause := clientGone
	switch {
	case context.Cause(r.x.Context()) == net.ErrClosed:
		cause = cutByTheStop
	case !inTime:
		cause = answerNotTaken
	default:
		r.clientLeft = true
	}
	r.reason = cmp.Or(r.reason, cause)
	r.log(slog.LevelDebug, "the client did not take its answer", slog.Int("status", status), slog.String("reason", cause), slog.Any("err", err))
}

// send sends an answer of our own. The client learns the status and nothing else.
func (r *request) send(status int, fields exchange.Fields) error {
	body := strconv.Itoa(status) + " " + reasons[status] + "\n"
	fields.Add("Content-Type", "text/plain; charset=utf-8")
	err := r.x.Respond(&exchange.Response{
		Status: status, Reason: reasons[status], Fields: fields,
		ContentLength: int64(len(body)), Close: r.closes(),
	})
	if err != nil {
		return err
	}
	r.status, r.responded = status, true
	if r.head.Method != "HEAD" {
		if _, err := io.WriteString(r.x, body); err != nil {
			return err
		}
		r.sent = uint64(len(body))
	}
	return r.x.Finish(nil)
}

// reasons are those of RFC 9110 §15, for what we answer ourselves and for what
// codecs ask us to.
var reasons = map[int]string{
	301: "Moved Permanently",
	302: "Found",
	303: "See Other",
	307: "Temporary Redirect",
	308: "Permanent Redirect",
	400: "Bad Request",
	403: "Forbidden",
	404: "Not Found",
	408: "Request Timeout",
	413: "Content Too Large",
	431: "Request Header Fields Too Large",
	502: "Bad Gateway",
	503: "Service Unavailable",
	504: "Gateway Timeout",
}

// log writes a line about the request. What the client chose is in attributes only.
func (r *request) log(level slog.Level, message string, attrs ...slog.Attr) {
	if !r.m.options.Log.Enabled(r.ctx, level) {
		return
	}
	client := "unix"
	if remote := r.x.Downstream().Remote; remote.IsValid() {
		client = remote.String()
	}
	attrs = append(attrs,
		slog.String("request_id", r.id),
		slog.String("listener", r.listener),
		slog.String("client", client),
		slog.String("method", r.head.Method),
		slog.String("authority", r.authority),
		slog.String("target", r.target))
	if r.head.Upgrade != "" {
		attrs = append(attrs, slog.String("upgrade", r.head.Upgrade))
	}
	if r.route != nil {
		attrs = append(attrs, slog.String("route", r.route.Name))
	}
	if r.cluster != "" {
		attrs = append(attrs, slog.String("cluster", r.cluster))
	}
	if r.endpoint != nil {
		attrs = append(attrs, slog.String("endpoint", r.endpoint.String()))
	}
	r.m.options.Log.LogAttrs(r.ctx, level, message, attrs...)
}
