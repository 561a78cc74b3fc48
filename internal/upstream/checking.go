package upstream

import (
	"log/slog"
	"sync/atomic"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/upstream/health"
)

// How the endpoints of a cluster with health_check are checked:
//
//	it has come                 Unchecked: no new work, and the generation is not ready yet
//	its first check has ended   it gets work, or it is Failing
//	the time for warming ends   whoever is Unchecked still gets work until its check has ended
//	it leaves, or Close         its checks end, and the connection of these is closed
//	the generation drains       the checks of the next one count; see [config.Config.ClosesUnhealthy]
//
// What the generation before knew of an endpoint counts from the beginning. Each endpoint is
// checked on one loop, whose goroutine does all that a check is about.

// mostAge is how old what another generation knew may be, if that is no less than two intervals:
// of an endpoint that was away for longer nobody knows anything.
const mostAge = 5 * time.Minute

// forHealth is what a cluster waits for as long as an endpoint is Unchecked.
const forHealth = "health"

// What is counted of checks, after Envoy's cluster.NAME.health_check.*.
var (
	clusterChecks = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_health_checks_total",
		Help: "Health checks of endpoints of the cluster that have ended, by result: success, failure (the endpoint has answered, but not as expected) or network_failure (it has not).",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "result"},
	})
	clusterHealthChanges = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_health_changes_total",
		Help: "Times that an endpoint of the cluster has become healthy or failing by its health checks, or by what it said itself.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "to"},
	})
	clusterHealthy = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_endpoints_healthy",
		Help: "Endpoints of the cluster that nothing keeps from new work.",
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"cluster"},
	})
)

// checking is what a cluster knows of the checks of its endpoints. Without health_check it is
// of no use, but for running.
type checking struct {
	loops []*health.Loop // by the loop; set once
	next  *atomic.Uint32 // deals endpoints to loops; set once
	keeps bool           // see [config.Config.ClosesUnhealthy]

	passed, failed, unanswered, toHealthy, toFailing *metrics.Counter

	// Guarded by the cluster's lock.
	running, draining, closed bool
	warmed                    bool // nobody is waited for any more
	unbalanced                bool // the balancer is about to hear of changes
	used                      time.Time
	looked                    time.Time
	requests                  uint64
	lines                     lineLimit
}

// newChecking is for c, of which all else is there.
func newChecking(c *Cluster) checking {
	k := checking{keeps: c.options.Config.ClosesUnhealthy(), loops: c.options.checks, next: c.options.checked, lines: lineLimit{left: mostLines}}
	if c.cfg.HealthCheck == nil {
		return k
	}
	r := c.options.Metrics
	k.passed = r.Counter(clusterChecks, c.Name, "success")
	k.failed = r.Counter(clusterChecks, c.Name, "failure")
	k.unanswered = r.Counter(clusterChecks, c.Name, "network_failure")
	k.toHealthy = r.Counter(clusterHealthChanges, c.Name, "healthy")
	k.toFailing = r.Counter(clusterHealthChanges, c.Name, "failing")
	return k
}

// newCheckLoops returns what the checks of each loop share.
func newCheckLoops(loops []*stream.Loop) []*health.Loop {
	all := make([]*health.Loop, len(loops))
	for i, l := range loops {
		all[i] = health.NewLoop(l)
	}
	return all
}

// runChecks begins the checks of all clusters, and has them wait to be warm until each endpoint
// was checked once.
func (c *Clusters) runChecks() {
	for _, cluster := range c.byName {
		cluster.setChecking(func(k *checking) { k.running = true })
	}
}

// endWarming has all endpoints get work of which nothing is known.
func (c *Clusters) endWarming() {
	for _, cluster := range c.byName {
		cluster.mu.Lock()
		cluster.checking.warmed = true
		var changes []change
		for _, e := range cluster.members {
			if e.Conditions()&Unchecked != 0 {
				changes = append(changes, e.mark(Unchecked, false))
			}
		}
		if cluster.cfg.HealthCheck != nil {
			cluster.rebalance() // also by what a loop is about to tell
		}
		cluster.mu.Unlock()
		cluster.tell(changes)
	}
}

// drainChecks stops the checks, or has them go on.
func (c *Clusters) drainChecks(draining bool) {
	for _, cluster := range c.byName {
		cluster.setChecking(func(k *checking) { k.draining = draining })
	}
}

// closeChecks ends the checks for good.
func (c *Clusters) closeChecks() {
	for _, cluster := range c.byName {
		cluster.setChecking(func(k *checking) { k.closed = true })
	}
}

func (c *Cluster) setChecking(set func(*checking)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	set(&c.checking)
	c.checkMembers()
}

// checkMembers starts and stops checks as the members and the generation are now. c.mu is held.
func (c *Cluster) checkMembers() {
	if c.cfg.HealthCheck == nil {
		return
	}
	k := &c.checking
	runs := k.running && !k.closed && (!k.draining || k.keeps)
	for _, e := range c.known {
		member := e.Conditions()&Left == 0
		e.health.want(runs && member, !member)
	}
}

// endpointHealth is what is known of an endpoint by its checks.
type endpointHealth struct {
	e     *Endpoint
	loop  *stream.Loop
	check *health.Check // the loop's

	saying atomic.Bool // a response has said that it fails, and the loop does not know yet

	// Guarded by the cluster's lock.
	wanted bool
	began  bool   // checks ran before
	warm   func() // ends that the cluster waits for it; nil: it does not
	last   time.Time
	since  time.Time // it is healthy; zero: it is not
	reason string    // of the last failure; "": there was none since it is healthy
}

// newEndpointHealth returns what is known of an endpoint to begin with, and what that keeps it
// from: nil for one that is not checked.
func newEndpointHealth(e *Endpoint) (*endpointHealth, Condition) {
	c := e.cluster
	cfg := c.cfg.HealthCheck
	if cfg == nil || len(c.checking.loops) == 0 {
		return nil, 0
	}
	i := int(c.checking.next.Add(1)-1) % len(c.loops)
	h := &endpointHealth{e: e, loop: c.loops[i]}
	state := h.inherit()
	o := health.Options{Config: cfg, Owner: h, State: state}
	if cfg.HTTP != nil {
		o.Probe = newHTTPProbe(e, h.loop)
	} else {
		o.Probe = newTCPProbe(e, h.loop)
	}
	h.check = c.checking.loops[i].NewCheck(o)
	switch {
	case state == health.Failing:
		return h, Failing
	case state == health.Healthy, c.options.Urgent && !c.checking.warmed:
		return h, 0
	}
	return h, Unchecked
}

// inherit takes over what another generation knew.
func (h *endpointHealth) inherit() health.State {
	s := h.e.cluster.former[identity{h.e.Address, placeOf(h.e.Address, h.e.Addr)}]
	if s == nil || s.LastCheck.IsZero() {
		return health.Unknown
	}
	cfg := h.e.cluster.cfg.HealthCheck
	if time.Since(s.LastCheck) > max(mostAge, 2*max(cfg.NoTrafficInterval, cfg.UnhealthyInterval)) {
		return health.Unknown
	}
	h.last, h.reason = s.LastCheck, s.Reason
	switch was := conditionOf(s); {
	case was&Failing != 0:
		return health.Failing
	case was&Unchecked != 0:
		return health.Unknown
	}
	h.since = s.HealthySince
	return health.Healthy
}

// unknown is what an endpoint that has left comes back with.
func (h *endpointHealth) unknown() Condition {
	if h == nil {
		return 0
	}
	return Unchecked
}

// want has the checks run, or not: forgotten is what is known then. c.mu is held, so that the
// loop hears of it in order.
func (h *endpointHealth) want(wanted, forget bool) {
	if h == nil || h.wanted == wanted {
		return
	}
	h.wanted = wanted
	k := &h.e.cluster.checking
	if !wanted {
		h.endWait()
		h.loop.Post(func() {
			h.check.Stop()
			if forget {
				h.check.Reset()
			}
		})
		return
	}
	// What another generation has checked is not urgent, and comes with all others of its kind.
	now := h.began || h.e.Conditions() != 0 || h.since.IsZero()
	h.began = true
	if h.e.Conditions()&Unchecked != 0 && !k.warmed {
		h.warm = h.e.cluster.warms(forHealth)
	}
	h.loop.Post(func() { h.check.Start(now) })
}

// endWait has the cluster not wait for the endpoint any more. c.mu is held.
func (h *endpointHealth) endWait() {
	if h.warm != nil {
		h.warm()
		h.warm = nil
	}
}

// Checked implements [health.Owner].
func (h *endpointHealth) Checked(r health.Result) {
	c := h.e.cluster
	k := &c.checking
	switch {
	case r.Told: // that was no check
	case r.Err == nil:
		k.passed.Inc()
	case r.Network:
		k.unanswered.Inc()
	default:
		k.failed.Inc()
	}
	c.mu.Lock()
	if !h.wanted { // the loop is about to hear
		c.mu.Unlock()
		return
	}
	if !r.Told {
		h.last = time.Now()
	}
	if r.Err != nil {
		h.reason = shortened(r.Err.Error())
	}
	changed := change{e: h.e, was: h.e.Conditions()}
	if r.State == health.Failing {
		h.e.mark(Failing, true)
		h.since = time.Time{}
	} else {
		h.e.mark(Failing, false)
		if r.Err == nil {
			h.reason = ""
		}
		if h.since.IsZero() {
			h.since = time.Now()
		}
	}
	changed.now = h.e.mark(Unchecked, false).now
	h.endWait()
	var write bool
	var dropped int
	if changed.was != changed.now {
		h.unbalance()
		write, dropped = k.lines.take(time.Now())
	}
	reason := h.reason
	c.mu.Unlock()
	if changed.was == changed.now {
		return
	}
	c.tell([]change{changed})
	h.log(changed, reason, write, dropped)
}

// unbalance has the balancer hear of what has changed in this turn of the loop, once. c.mu is
// held.
func (h *endpointHealth) unbalance() {
	c := h.e.cluster
	if c.checking.unbalanced {
		return
	}
	c.checking.unbalanced = h.loop.Post(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.checking.unbalanced = false
		c.rebalance()
	})
}

// log tells operators what has become of the endpoint.
func (h *endpointHealth) log(ch change, reason string, write bool, dropped int) {
	c := h.e.cluster
	failing := ch.now&Failing != 0
	switch {
	case failing && ch.was&Failing == 0:
		c.checking.toFailing.Inc()
	case !failing && ch.was&(Failing|Unchecked) != 0:
		c.checking.toHealthy.Inc()
	default: // it fails still, now that it was checked
	}
	if !write {
		return
	}
	attrs := []any{slog.String("cluster", c.Name), slog.String("endpoint", h.e.Address), slog.String("at", h.e.name)}
	if dropped > 0 {
		attrs = append(attrs, slog.Int("lines_dropped", dropped))
	}
	switch {
	case failing:
		c.options.Log.Warn("an endpoint fails its health checks: it gets no new work", append(attrs, slog.String("reason", reason))...)
	case ch.was&Failing != 0:
		c.options.Log.Info("an endpoint passes its health checks again", attrs...)
	default:
		c.options.Log.Debug("an endpoint has passed its first health check", attrs...)
	}
}

// Idle implements [health.Owner]: a cluster is looked at once in a while, whoever asks.
func (h *endpointHealth) Idle() bool {
	c := h.e.cluster
	k, now := &c.checking, h.loop.Now()
	const lookAgain = 200 * time.Millisecond
	c.mu.Lock()
	defer c.mu.Unlock()
	if since := now.Sub(k.looked); since >= lookAgain || since < 0 {
		k.looked = now
		if n := c.metrics.requests.Value() + c.metrics.tunnels.Value(); n != k.requests || c.busy() {
			k.requests, k.used = n, now
		}
	}
	return now.Sub(k.used) > c.cfg.HealthCheck.Interval
}

// busy says whether an endpoint has requests or tunnels. c.mu is held.
func (c *Cluster) busy() bool {
	for _, e := range c.known {
		if e.host.Load() > 0 {
			return true
		}
	}
	return false
}

// Heed takes out of a response what the endpoint says to us alone, and believes it: with one of
// the fields for that it fails its health checks until it has passed some. Without checks, which
// alone can find out that it is well again, it is a response like any other.
func (e *Endpoint) Heed(resp *exchange.Response) {
	if e.health != nil && saysFailing(resp.Fields) {
		e.health.heed(resp)
	}
}

func (h *endpointHealth) heed(resp *exchange.Response) {
	resp.Fields = deleteFailFields(resp.Fields)
	if h.e.Conditions()&Failing != 0 || !h.saying.CompareAndSwap(false, true) {
		return
	}
	h.loop.Post(func() {
		h.saying.Store(false)
		h.check.Fail(saidSo)
	})
}

// healthState fills in what is known by the checks.
func (e *Endpoint) healthState(s *control.EndpointState) {
	if e.health == nil {
		return
	}
	e.cluster.mu.Lock()
	defer e.cluster.mu.Unlock()
	s.Reason, s.HealthySince, s.LastCheck = e.health.reason, e.health.since, e.health.last
}

// shortened bounds what is kept of an error.
func shortened(s string) string {
	const most = 256
	return s[:min(len(s), most)]
}

// mostLines is how many lines of the log may be about the health of one cluster's endpoints at
// once. One comes back each second.
const mostLines = 60

// lineLimit bounds them.
type lineLimit struct {
	left    int
	dropped int
	since   time.Time
}

// take says whether a line may be written, and how many were not, since the last one was.
func (l *lineLimit) take(now time.Time) (ok bool, dropped int) {
	if l.since.IsZero() {
		l.since = now
	}
	if n := int(now.Sub(l.since) / time.Second); n > 0 {
		l.left, l.since = min(l.left+n, mostLines), l.since.Add(time.Duration(n)*time.Second)
	}
	if l.left == 0 {
		l.dropped++
		return false, 0
	}
	l.left--
	dropped, l.dropped = l.dropped, 0
	return true, dropped
}
