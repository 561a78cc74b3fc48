package upstream

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
	"holdfast/internal/upstream/outlier"
)

// What is counted of outliers, in clusters that look for them.
var (
	outlierEjected = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_outlier_ejections_active",
		Help: "Endpoints of the cluster that are ejected.",
		Type: metrics.TypeGauge, Merge: metrics.Serving, Labels: []string{"cluster"},
	})
	outlierEnforced = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_outlier_ejections_enforced_total",
		Help: "Ejections of endpoints of the cluster, by what they were found by: consecutive_5xx, consecutive_gateway_failures, consecutive_connect_failures or success_rate.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "by"},
	})
	outlierDetected = metrics.Define(metrics.Desc{
		Name: "holdfast_cluster_outlier_ejections_detected_total",
		Help: "Outliers among the endpoints of the cluster, ejected or not, by what they were found by.",
		Type: metrics.TypeCounter, Labels: []string{"cluster", "by"},
	})
	outlierOverflow = clusterCounter("outlier_ejections_overflow", "Outliers among the endpoints of the cluster that were not ejected because outlier_detection.max_ejection_percent are already.")
)

// mostOutlierLines is how many lines the log gets about the outliers of a cluster in an interval.
const mostOutlierLines = 20

// outliers has the outliers of a cluster ejected, and lets them return. It costs nothing while
// nothing happens: its timer is set while an endpoint is ejected or was of late, or requests come.
type outliers struct {
	cluster  *Cluster
	detector *outlier.Detector

	ejected            *metrics.Gauge
	enforced, detected [outlier.NumKinds]*metrics.Counter
	overflow           *metrics.Counter

	deciding sync.Mutex // held by who decides
	lines    int        // of the log, in the interval that began then
	left     int        // of them that were left out
	began    time.Time

	mu     sync.Mutex  // guards what follows; nothing is called while it is held
	timer  *time.Timer // nil: before Run
	soon   bool        // the timer was set to come at once
	closed bool
}

// newOutliers returns nil where none are looked for.
func newOutliers(c *Cluster, o *Options) *outliers {
	cfg := c.cfg.Outliers
	if cfg == nil {
		return nil
	}
	out := &outliers{cluster: c, ejected: o.Metrics.Gauge(outlierEjected, c.Name), overflow: o.Metrics.Counter(outlierOverflow, c.Name)}
	for k := range outlier.NumKinds {
		out.enforced[k] = o.Metrics.Counter(outlierEnforced, c.Name, k.String())
		out.detected[k] = o.Metrics.Counter(outlierDetected, c.Name, k.String())
	}
	out.detector = outlier.New(cfg, o.Values, out.wake)
	return out
}

// watch begins to look after what an endpoint does, with what another generation knew of it.
// cluster.mu is held, or nobody knows the endpoint yet.
func (o *outliers) watch(e *Endpoint) {
	if o == nil {
		return
	}
	e.outlier = o.detector.NewHost()
	e.outlier.Of = e
	was, ok := o.cluster.former[identity{e.Address, Place{e.Addr, e.Path}}]
	if !ok || was.Ejections == 0 && was.EjectedUntil.IsZero() {
		return
	}
	state := outlier.State{Ejections: was.Ejections, Until: was.EjectedUntil, Kind: outlier.KindOf(was.Reason)}
	if e.outlier.Restore(state, time.Now()) {
		e.mark(Ejected, true)
	}
}

// formerEndpoints are the endpoints of a cluster that another generation had; nil: it did not have
// the cluster.
func formerEndpoints(c *control.ClusterState) map[identity]*control.EndpointState {
	if c == nil {
		return nil
	}
	all := make(map[identity]*control.EndpointState, len(c.Endpoints))
	for i := range c.Endpoints {
		e := &c.Endpoints[i]
		all[identity{e.Address, placeOf(e.Address, e.At)}] = e
	}
	return all
}

// outlierState says what is known of the endpoint as an outlier.
func (e *Endpoint) outlierState(to *control.EndpointState) {
	if e.outlier == nil {
		return
	}
	s := e.outlier.State()
	to.Ejections, to.EjectedUntil = s.Ejections, s.Until
	if !s.Until.IsZero() {
		to.Reason = s.Kind.String()
	}
	if s.Rate >= 0 {
		percent := 100 * s.Rate
		to.SuccessRate = &percent
	}
}

// run begins to decide.
func (o *outliers) run() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.timer == nil && !o.closed {
		o.soon = true
		o.timer = time.AfterFunc(0, o.decide)
	}
}

// close ends what run has begun, and waits for that.
func (o *outliers) close() {
	if o == nil {
		return
	}
	o.mu.Lock()
	o.closed = true
	if o.timer != nil {
		o.timer.Stop()
	}
	o.mu.Unlock()
	o.deciding.Lock()
	defer o.deciding.Unlock()
}

// wake has it decided soon. Any goroutine may call it; it does not wait.
func (o *outliers) wake() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.timer != nil && !o.closed && !o.soon {
		o.soon = true
		o.timer.Reset(0)
	}
}

// decide is called by the timer. It is no loop's: that an endpoint comes or goes changes what a
// cluster chooses from, which may take a while.
func (o *outliers) decide() {
	o.deciding.Lock()
	defer o.deciding.Unlock()
	o.mu.Lock()
	closed := o.closed
	o.soon = false
	o.mu.Unlock()
	if closed {
		return
	}
	now := time.Now()
	members, former := o.hosts()
	decided := o.detector.Decide(now, members, former)
	o.mark(decided.Events)
	for i := range decided.Events {
		o.report(&decided.Events[i], now)
	}
	o.ejected.Set(int64(decided.Ejected))
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.closed && !o.soon && !decided.Next.IsZero() {
		o.timer.Reset(time.Until(decided.Next))
	}
}

// hosts returns the members of the cluster, and what was one.
func (o *outliers) hosts() (members, former []*outlier.Host) {
	for _, e := range o.cluster.Known() {
		if e.Conditions()&Left != 0 {
			former = append(former, e.outlier)
		} else {
			members = append(members, e.outlier)
		}
	}
	return members, former
}

// mark has requests choose by what was decided: once for all of it, since each time costs as much
// as the cluster is large.
func (o *outliers) mark(events []outlier.Event) {
	c := o.cluster
	var changes []change
	c.mu.Lock()
	for i := range events {
		ev := &events[i]
		if ev.Act != outlier.Eject && ev.Act != outlier.Return {
			continue
		}
		if ch := ev.Host.Of.(*Endpoint).mark(Ejected, ev.Act == outlier.Eject); ch.was != ch.now {
			changes = append(changes, ch)
		}
	}
	if len(changes) > 0 {
		c.rebalance()
	}
	c.mu.Unlock()
	c.tell(changes)
}

// report counts what was decided, and tells operators.
func (o *outliers) report(ev *outlier.Event, now time.Time) {
	e := ev.Host.Of.(*Endpoint)
	message := "an endpoint is an outlier, but is not ejected"
	level := slog.LevelWarn
	attrs := []slog.Attr{
		slog.String("cluster", e.Cluster), slog.String("endpoint", e.Address), slog.String("address", e.String()),
		slog.String("reason", ev.Kind.String()), slog.Int("ejections", ev.Ejections),
	}
	switch ev.Act {
	case outlier.Eject:
		o.enforced[ev.Kind].Inc()
		message = "an endpoint is ejected"
		attrs = append(attrs, slog.Duration("for", ev.For))
	case outlier.Return:
		message, level = "an endpoint is no longer ejected", slog.LevelInfo
	case outlier.Overflow:
		o.overflow.Inc()
		attrs = append(attrs, slog.String("because", "max_ejection_percent"))
	case outlier.NotForced:
		attrs = append(attrs, slog.String("because", "enforcing"))
	}
	if ev.Act != outlier.Return {
		o.detected[ev.Kind].Inc()
		if ev.Kind == outlier.SuccessRate {
			attrs = append(attrs, slog.Float64("success_rate", 100*ev.Rate), slog.Float64("average", 100*ev.Average), slog.Float64("threshold", 100*ev.Threshold))
		}
	}
	if o.mayLog(now) {
		o.cluster.options.Log.LogAttrs(context.Background(), level, message, attrs...)
	}
}

// mayLog says whether there is room for one more line, and says first what there was none for.
func (o *outliers) mayLog(now time.Time) bool {
	if now.Sub(o.began) >= o.cluster.cfg.Outliers.Interval {
		if o.left > 0 {
			o.cluster.options.Log.Warn("more about outliers was not written", "cluster", o.cluster.Name, "lines", o.left)
		}
		o.began, o.lines, o.left = now, 0, 0
	}
	if o.lines == mostOutlierLines {
		o.left++
		return false
	}
	o.lines++
	return true
}

// connected and notConnected count what became of an attempt to connect to the endpoint.
func (e *Endpoint) connected() {
	if e.outlier != nil {
		e.outlier.Connected()
	}
}

func (e *Endpoint) notConnected(err error) {
	if e.outlier != nil && !isOurs(err) {
		e.outlier.NotConnected()
	}
}

// isOurs says of a failure to connect that the endpoint has no part in it.
func isOurs(err error) bool {
	for _, errno := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.EADDRNOTAVAIL, unix.EADDRINUSE, unix.EPERM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// answered counts the status of an answer. What a 101 is worth is known at the end.
func (c *Call) answered(status int) {
	if h := c.e.outlier; h != nil && status != 101 {
		h.Answered(status)
	}
}

// ended counts the end of a call that had no answer so far that says all.
func (c *Call) ended(o Outcome) {
	h := c.e.outlier
	if h == nil {
		return
	}
	switch o {
	case BecameTunnel:
		h.Answered(101)
	case TimedOut, Reset, Invalid:
		if !c.failed {
			h.Failed()
		}
	}
}
