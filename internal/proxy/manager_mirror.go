package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/poller"
	"holdfast/internal/route"
	"holdfast/internal/stream"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

// Copies of a route's ordinary requests go to the mirror's cluster, in tasks of their own that
// nobody waits for. A copy has memory of its own: the request may be over long before it is.
// What comes back is read and forgotten.

// What copies may cost. Beyond, they are dropped: nothing that the mirror's cluster does
// reaches the requests themselves.
const (
	mostShadows      = 256       // at once, on one loop
	mostShadowBytes  = 16 << 20  // of their bodies, on one loop
	mostShadowAnswer = 256 << 10 // bytes of a response that are read, to keep the connection
	shadowTime       = 15 * time.Second
)

var (
	errShadowSlow = errors.New("the mirror did not answer in time")
	errShadowsEnd = errors.New("the generation ends")
)

// What is counted of routes with a mirror.
var (
	routeMirrored      = routeCounter("mirrored", "Copies of requests that were begun to be sent to the route's mirror.")
	routeMirrorsFailed = routeCounter("mirror_failures", "Copies of requests to which the route's mirror gave no complete response.")
	routeMirrorDrops   = metrics.Define(metrics.Desc{
		Name: "holdfast_route_mirror_drops_total",
		Help: "Requests of which no copy was sent to the route's mirror although one was due, by the reason: the body is longer than mirror.buffer, there are too many copies already, or a limit of the mirror's cluster was reached (overload), which is found out when the copy has been begun.",
		Type: metrics.TypeCounter, Labels: []string{"virtual_host", "route", "reason"},
	})
)

// mirrorPolicy is which requests of a route are copied, and where to. It never changes.
type mirrorPolicy struct {
	config.Mirror
	percent *dynamic.Value
	limit   time.Duration // of a copy, from its beginning

	priority config.Priority

	mirrored, failures, tooLong, tooMany, overflows *metrics.Counter
}

// addMirrors makes those of all routes that have one.
func (m *Manager) addMirrors() {
	for _, r := range m.options.Routes.Routes() {
		if r.Mirror == nil {
			continue
		}
		if m.mirrors == nil {
			m.mirrors = make(map[*route.Route]*mirrorPolicy)
		}
		m.mirrors[r] = newMirrorPolicy(&m.options, r)
	}
}

func newMirrorPolicy(o *ManagerOptions, of *route.Route) *mirrorPolicy {
	c, r, virtualHost, name := of.Mirror, o.Metrics, of.VirtualHost, of.Name
	limit := of.Timeout
	if limit <= 0 {
		limit = shadowTime
	}
	return &mirrorPolicy{
		Mirror: *c, limit: limit, priority: of.Priority,
		percent:  o.Values.New(c.Percent.Key, dynamic.Percent, c.Percent.Value, 0, dynamic.Whole),
		mirrored: r.Counter(routeMirrored, virtualHost, name),
		failures: r.Counter(routeMirrorsFailed, virtualHost, name),
		tooLong:  r.Counter(routeMirrorDrops, virtualHost, name, "body too large"),
		tooMany:  r.Counter(routeMirrorDrops, virtualHost, name, "too many"),

		overflows: r.Counter(routeMirrorDrops, virtualHost, name, "overload"),
	}
}

// shadows are the copies that are under way on a loop.
type shadows struct {
	live  map[*shadow]struct{}
	bytes int64
	ended bool          // there are to be no more
	empty chan struct{} // closed when that has come about; nil: nobody waits for it
}

// chooseCopies decides whether the request is copied.
func (r *request) chooseCopies() {
	p := r.m.mirrors[r.route]
	if p.percent.Hits(r.m.options.Random()) {
		r.copies = p
		r.tape.limit = max(r.tape.limit, p.Buffer)
	}
}

// dropCopies says that the request is not copied after all.
func (r *request) dropCopies(why *metrics.Counter) {
	r.copies = nil
	why.Inc()
}

// mirror sends the copy, once: the head is as the endpoint gets it, and all of the body is on
// the tape.
func (r *request) mirror() {
	p, all, body := r.copies, &r.local.shadows, r.tape.kept
	switch {
	case int64(len(body)) > p.Buffer:
		r.dropCopies(p.tooLong)
		return
	case all.ended, len(all.live) >= mostShadows, all.bytes+int64(len(body)) > mostShadowBytes:
		r.dropCopies(p.tooMany)
		return
	}
	r.copies = nil
	s := &shadow{m: r.m, loop: r.loop, all: all, policy: p, body: append([]byte(nil), body...)}
	s.head = shadowOf(r.head, len(body))
	if c, ok := r.m.options.Clusters.Get(p.Cluster); ok && c.Announces() {
		s.attempt.Announcement = r.announcement()
	}
	if all.live == nil {
		all.live = make(map[*shadow]struct{})
	}
	all.live[s] = struct{}{}
	all.bytes += int64(len(s.body))
	p.mirrored.Inc()
	r.loop.Tasks.Go(s)
}

// shadowOf copies a head for a body of n bytes. The host tells an endpoint that its answer
// is not for a client, as it does with Envoy.
func shadowOf(of *exchange.Request, n int) (head exchange.Request) {
	head = *of
	size := len(of.Method) + len(of.Scheme) + len(of.Target) + len(of.Authority) + len(shadowSuffix)
	for _, f := range of.Fields {
		size += len(f.Name) + len(f.Value)
	}
	head.Texts = exchange.Texts{}
	head.Texts.Use(make([]byte, size))
	own := head.Texts.Join
	head.Method, head.Scheme, head.Target = own(of.Method), own(of.Scheme), own(of.Target)
	host, port := of.Authority, ""
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host, port = host[:i], host[i:]
	}
	if suffix := shadowSuffix; !strings.HasSuffix(host, "]") && host != "" { // no IPv6 address
		head.Authority = own(host, suffix, port)
	} else {
		head.Authority = own(of.Authority)
	}
	head.Fields = make(exchange.Fields, len(of.Fields))
	for i, f := range of.Fields {
		head.Fields[i] = exchange.Field{Name: own(f.Name), Value: own(f.Value)}
	}
	head.ContentLength, head.Trailers, head.HeadTail, head.Offer = int64(n), false, nil, ""
	return head
}

const shadowSuffix = "-shadow"

// shadow is a copy on its way.
type shadow struct {
	m      *Manager
	loop   *stream.Loop
	all    *shadows
	policy *mirrorPolicy
	head   exchange.Request
	body   []byte

	endpoint *upstream.Endpoint
	call     upstream.Call
	attempt  upstream.Attempt
	up       exchange.Upstream // nil: none, or it is closed
	due      poller.Deadline
	cause    error // why it was ended
}

// Run implements [task.Runner].
func (s *shadow) Run(t *task.Task) {
	defer s.end()
	s.loop.SetDeadline(&s.due, s, s.loop.Now().Add(s.policy.limit))
	switch err := s.send(t); {
	case err == nil:
	case isOverflow(err):
		s.policy.overflows.Inc()
	default:
		s.policy.failures.Inc()
		if log := s.m.options.Log; log.Enabled(context.Background(), slog.LevelDebug) {
			log.Debug("a mirrored request was not answered", "cluster", s.policy.Cluster, "err", err)
		}
	}
}

// Expire implements [poller.Expirer].
func (s *shadow) Expire(*poller.Deadline) { s.stop(errShadowSlow) }

// stop ends it.
func (s *shadow) stop(cause error) {
	if s.cause == nil {
		s.cause = cause
		s.attempt.Cancel(cause)
		s.close()
	}
}

func (s *shadow) close() {
	if up := s.up; up != nil {
		s.up = nil
		up.Close()
	}
}

func (s *shadow) end() {
	s.close()
	s.loop.Forget(&s.due)
	delete(s.all.live, s)
	s.all.bytes -= int64(len(s.body))
	if s.all.empty != nil && len(s.all.live) == 0 {
		close(s.all.empty)
		s.all.empty = nil
	}
}

// send sends the copy to one endpoint, and reads what it answers.
func (s *shadow) send(t *task.Task) error {
	cluster, ok := s.m.options.Clusters.Get(s.policy.Cluster)
	if !ok {
		return errNoCluster
	}
	s.attempt.Priority = s.policy.priority
	up, err := s.connect(t, cluster)
	if err != nil {
		return err
	}
	s.up = up
	s.endpoint.Begin(s.loop, &s.attempt, &s.call)
	outcome := upstream.Cancelled // by a panic
	defer func() {
		s.close()
		s.call.End(outcome)
	}()
	switch err = s.converse(t, up); {
	case err == nil:
		outcome = upstream.Complete
	case s.cause == errShadowSlow:
		err, outcome = s.cause, upstream.TimedOut
	case s.cause != nil:
		err = s.cause
	case isInvalid(err):
		outcome = upstream.Invalid
	default:
		outcome = upstream.Reset
	}
	return err
}

// connect begins an exchange with one of the endpoints.
func (s *shadow) connect(t *task.Task, cluster *upstream.Cluster) (up exchange.Upstream, err error) {
	err = errNoEndpoint
	round := cluster.Round(balance.Query{})
	for range cluster.ConnectAttempts() {
		e := round.Next()
		if e == nil || s.cause != nil {
			break
		}
		s.endpoint = e
		if up, err = e.Get(t, s.loop, &s.attempt); err == nil || isOverflow(err) {
			return up, err
		}
	}
	return nil, err
}

// converse is one request and its response.
func (s *shadow) converse(t *task.Task, up exchange.Upstream) error {
	if err := up.Send(t, &s.head); err != nil {
		return err
	}
	if len(s.body) > 0 && s.up != nil {
		_ = up.Write(t, s.body) // it may have answered nevertheless
	}
	if s.up != nil {
		_ = up.Finish(t, nil)
	}
	for s.up != nil {
		resp, err := up.Receive(t)
		switch {
		case err != nil:
			return err
		case s.up == nil:
			return s.cause
		case resp.Status == 101:
			return errUnasked101
		case resp.Status >= 200:
			s.call.Answered(resp.Status)
			s.endpoint.Heed(resp)
			return s.forget(t, up)
		}
	}
	return s.cause
}

// forget reads a body that nobody gets, so that the connection can carry another request.
// Of one that is long it is not worth it.
func (s *shadow) forget(t *task.Task, up exchange.Upstream) error {
	for n := 0; n < mostShadowAnswer && s.up != nil; {
		b, err := up.Read(t)
		if err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
		n += len(b)
	}
	return s.cause
}

// EndMirrors ends all copies that are under way, and has no more begun. It returns when
// they have ended, or ctx is done. It may be called by any goroutine but those of the loops,
// which run.
func (m *Manager) EndMirrors(ctx context.Context, loops []*stream.Loop) {
	var ending sync.WaitGroup
	for _, l := range loops {
		all := &m.loops[l.Index].shadows
		empty := make(chan struct{})
		posted := l.Post(func() {
			all.ended = true
			for s := range all.live {
				s.stop(errShadowsEnd)
			}
			if all.empty = empty; len(all.live) == 0 {
				close(empty)
				all.empty = nil
			}
		})
		if posted {
			ending.Go(func() {
				select {
				case <-empty:
				case <-ctx.Done():
				}
			})
		}
	}
	ending.Wait()
}
