package filter

import (
	"errors"
	"io"
	"slices"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

const (
	// mostAnswer is how much of the body of a service's answer is read: of a refusal that has
	// more, the client does not get the body.
	mostAnswer = 64 << 10
)

var (
	errAskTimeout   = errors.New("the authorization service has not answered in time")
	errAskNobody    = errors.New("the authorization service has no endpoint")
	errAskStatus    = errors.New("the authorization service answered with a status that says neither yes nor no")
	authorizeFailed = [2]*Answer{
		{Status: 403, Cause: AuthorizationFailed, Reason: "the authorization service could not be asked"},
		{Status: 403, Cause: AuthorizationFailed, Reason: "the authorization service did not answer in time"},
	}
)

// aboutClient are fields of the proxy's own that the service gets in any case.
var aboutClient = []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Request-Id"}

// authorization asks a service by HTTP whether a request may pass: with the method, the path,
// the host and some fields of the request, and no body.
//
//	2xx                      it may, with fields of the answer
//	3xx, 4xx, but not 304    it may not: the client gets that status, fields and body
//	anything else, nothing   as on_error says
type authorization struct {
	cfg     *config.Authorize
	cluster *upstream.Cluster // nil: it is not there
	asked   []string          // fields that the service gets

	outcomes [numOutcomes]*metrics.Counter
	duration *metrics.Histogram
}

// outcome is what came of a question.
type outcome uint8

const (
	askAllowed outcome = iota
	askDenied
	askFailed
	askTimeout
	askCancelled // the client has gone
	numOutcomes
)

var outcomes = [numOutcomes]string{askAllowed: "allowed", askDenied: "denied", askFailed: "error", askTimeout: "timeout", askCancelled: "cancelled"}

func newAuthorization(c *config.Authorize, o *Options, of *route.Route) *authorization {
	a := &authorization{cfg: c, asked: slices.Concat(aboutClient, c.RequestHeaders)}
	if o.Clusters != nil {
		a.cluster, _ = o.Clusters.Get(c.Cluster)
	}
	for n, name := range outcomes {
		a.outcomes[n] = o.Metrics.Counter(authorizationsTotal, of.VirtualHost, of.Name, name)
	}
	a.duration = o.Metrics.Histogram(authorizationDuration, of.VirtualHost, of.Name)
	return a
}

// Filter implements [Filter].
func (a *authorization) Filter(r *Request) *Answer {
	for _, name := range a.cfg.UpstreamHeaders {
		drop(&r.Head.Fields, name)
	}
	if r.IsUpgrade() && !a.cfg.Upgrades {
		return nil
	}
	began := r.Loop.Now()
	answer, err := a.ask(r)
	a.duration.Observe(int64(r.Loop.Now().Sub(began)))
	what := askAllowed
	switch {
	case r.over != nil:
		what = askCancelled
	case err == errAskTimeout:
		what, answer = askTimeout, a.failed(1)
	case err != nil:
		what, answer = askFailed, a.failed(0)
	case answer != nil:
		what = askDenied
	}
	a.outcomes[what].Inc()
	return answer
}

func (a *authorization) failed(why int) *Answer {
	if a.cfg.FailOpen {
		return nil
	}
	return authorizeFailed[why]
}

// ask asks the service, for a bounded time. nil without an error: the request may pass.
func (a *authorization) ask(r *Request) (*Answer, error) {
	if a.cluster == nil {
		return nil, errAskNobody
	}
	q := question{a: a, r: r}
	r.OnOver(&q)
	defer r.OnOver(nil)
	r.SetAlarm(r.Loop.Now().Add(a.cfg.Timeout), func() { q.Interrupt(errAskTimeout) })
	defer r.ClearAlarm()
	a.head(r, &q.head)
	open := opener((*upstream.Endpoint).Get)
	for {
		reused := false
		up, err := q.connect(open)
		var answer *Answer
		if err == nil {
			reused = up.Reused()
			answer, err = q.exchange(up)
		}
		switch {
		case q.decided:
			return answer, nil
		case q.err != nil:
			return nil, q.err
		case err == nil || !reused || !errors.Is(err, exchange.ErrNoAnswer):
			return answer, err
		}
		q.endpoint.Retried() // a kept connection was closed: a question may be asked twice
		open = (*upstream.Endpoint).Fresh
	}
}

// head makes the head of the question.
func (a *authorization) head(r *Request, head *exchange.Request) {
	*head = exchange.Request{
		Method: r.Head.Method, Scheme: r.Head.Scheme, Authority: r.Head.Authority, Target: r.Head.Target, Major: 1, Minor: 1,
	}
	if a.cfg.PathPrefix != "" {
		head.Target = a.cfg.PathPrefix + r.Head.Target
	}
	for _, f := range r.Head.Fields {
		if slices.ContainsFunc(a.asked, func(name string) bool { return strings.EqualFold(name, f.Name) }) {
			head.Fields = append(head.Fields, f)
		}
	}
}

// opener is how an endpoint begins an exchange.
type opener func(*upstream.Endpoint, *task.Task, *stream.Loop, *upstream.Attempt) (exchange.Upstream, error)

// question is one to a service.
type question struct {
	a        *authorization
	r        *Request
	head     exchange.Request
	attempt  upstream.Attempt
	endpoint *upstream.Endpoint
	up       exchange.Upstream // in use; nil: none
	err      error             // why it was given up
	decided  bool              // the service has said yes or no
}

// Interrupt implements [Interrupter].
func (q *question) Interrupt(err error) {
	if q.err != nil {
		return
	}
	q.err = err
	q.attempt.Cancel(err)
	q.close()
}

func (q *question) close() {
	if up := q.up; up != nil {
		q.up = nil
		up.Close()
	}
}

// connect begins an exchange with one of the service's endpoints.
func (q *question) connect(open opener) (exchange.Upstream, error) {
	err := errAskNobody
	q.attempt.Priority = q.r.Route.Priority
	round := q.a.cluster.Round(balance.Query{})
	for range q.a.cluster.ConnectAttempts() {
		e := round.Next()
		if e == nil || q.err != nil {
			break
		}
		q.endpoint = e
		var up exchange.Upstream
		if up, err = open(e, q.r.Task, q.r.Loop, &q.attempt); err == nil {
			return up, nil
		}
		if _, overflow := errors.AsType[*upstream.OverflowError](err); overflow {
			return nil, err // the same with every endpoint
		}
	}
	if q.err == nil {
		q.a.cluster.Unserved(q.endpoint != nil)
	}
	return nil, err
}

// exchange asks, and returns the answer for the client if there is to be one.
func (q *question) exchange(up exchange.Upstream) (answer *Answer, err error) {
	q.up = up
	var call upstream.Call
	q.endpoint.Begin(q.r.Loop, &q.attempt, &call)
	complete := false
	defer func() {
		q.close()
		call.End(q.outcome(complete, err))
	}()
	resp, err := q.receive(up)
	if err != nil {
		return nil, err
	}
	call.Answered(resp.Status)
	q.endpoint.Heed(resp)
	q.decided = resp.Status >= 200 && resp.Status < 500 && resp.Status != 304
	switch {
	case resp.Status == 101:
		return nil, errAskStatus
	case !q.decided:
		_, complete = q.body(up)
		return nil, errAskStatus
	case resp.Status < 300:
		q.allow(resp)
		_, complete = q.body(up)
		return nil, nil
	}
	answer = q.refusal(resp)
	encoding, _ := resp.Fields.Get("Content-Encoding")
	kind, _ := resp.Fields.Get("Content-Type")
	kind, encoding = q.keep(kind), q.keep(encoding)
	var body []byte
	if body, complete = q.body(up); complete && len(body) > 0 {
		answer.Body, answer.ContentType = string(body), kind
		if encoding != "" {
			answer.Fields.Add("Content-Encoding", encoding)
		}
	}
	return answer, nil
}

// receive sends the question and returns the head of the final answer, or a 101.
func (q *question) receive(up exchange.Upstream) (resp *exchange.Response, err error) {
	if err = up.Send(q.r.Task, &q.head); err == nil && q.err == nil {
		err = up.Finish(q.r.Task, nil)
	}
	for err == nil && q.err == nil {
		resp, err = up.Receive(q.r.Task)
		if err == nil && (resp.Status >= 200 || resp.Status == 101) {
			return resp, nil
		}
	}
	if err == nil {
		err = q.err
	}
	return nil, err
}

// outcome is how the endpoint's request has ended.
func (q *question) outcome(complete bool, err error) upstream.Outcome {
	switch {
	case complete:
		return upstream.Complete
	case q.err == errAskTimeout:
		return upstream.TimedOut
	case q.err != nil || err == nil:
		return upstream.Cancelled
	case exchange.StatusOf(err, 0) == 502 && !errors.Is(err, io.ErrUnexpectedEOF):
		return upstream.Invalid
	}
	return upstream.Reset
}

// allow has the upstream get what the service says.
func (q *question) allow(resp *exchange.Response) {
	for _, name := range q.a.cfg.UpstreamHeaders {
		for v := range resp.Fields.Values(name) {
			q.r.Head.Fields.Add(name, q.keep(v))
		}
	}
}

// refusal is an answer with the service's status and fields.
func (q *question) refusal(resp *exchange.Response) *Answer {
	a := q.r.reply(Answer{Status: resp.Status, Cause: Unauthorized, Reason: "the authorization service has refused it"})
	for _, name := range q.a.cfg.ClientHeaders {
		if strings.EqualFold(name, "Content-Type") || strings.EqualFold(name, "Content-Encoding") {
			continue // those of the body go with it
		}
		for v := range resp.Fields.Values(name) {
			a.Fields.Add(name, q.keep(v))
		}
	}
	return a
}

// keep returns a text of the answer in memory of the request.
func (q *question) keep(s string) string {
	if s == "" {
		return ""
	}
	return q.r.Head.Texts.Join(s)
}

// body reads the body of an answer, so that its connection can be kept, too. It is complete
// unless it is too long, or did not come to its end in time.
func (q *question) body(up exchange.Upstream) (body []byte, complete bool) {
	for q.err == nil {
		p, err := up.Read(q.r.Task)
		if len(body)+len(p) > mostAnswer {
			return nil, false
		}
		body = append(body, p...)
		switch {
		case err == io.EOF:
			return body, q.err == nil
		case err != nil:
			return nil, false
		}
	}
	return nil, false
}

// drop removes the fields of a name, and of those that upstreams may take for it: CGI-like
// ones write "_" for "-".
func drop(fields *exchange.Fields, name string) {
	*fields = slices.DeleteFunc(*fields, func(f exchange.Field) bool { return resembles(f.Name, name) })
}

func resembles(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if plain(a[i]) != plain(b[i]) {
			return false
		}
	}
	return true
}

// plain lowers a letter, and makes one of the two that are taken for each other.
func plain(c byte) byte {
	switch {
	case 'A' <= c && c <= 'Z':
		return c + 'a' - 'A'
	case c == '_':
		return '-'
	}
	return c
}
