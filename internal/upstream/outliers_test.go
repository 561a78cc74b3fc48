package upstream_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/metrics"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/upstream"
	"holdfast/internal/upstream/balance"
)

// judged is a cluster that looks for outliers, on a fake clock.
type judged struct {
	t *testing.T
	upstream.Options
	*upstream.Clusters
	*upstream.Cluster
	members []*upstream.Endpoint
	log     *lines
	loop    *stream.Loop
}

// lines is a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// all returns the messages that have this one, as they are.
func (l *lines) all(message string) (all []map[string]any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.text.Bytes()) {
		var m map[string]any
		if json.Unmarshal(line, &m) == nil && m["msg"] == message {
			all = append(all, m)
		}
	}
	return all
}

func outliers() *config.Outliers {
	whole := config.Dynamic{Value: dynamic.Whole}
	return &config.Outliers{
		Consecutive5xx: 3, ConsecutiveConnectFailures: 3,
		Interval: 10 * time.Second, BaseEjectionTime: 30 * time.Second, MaxEjectionTime: 5 * time.Minute, MaxEjected: whole,
		Enforcing: whole, EnforcingSuccessRate: whole,
	}
}

// judging has a cluster of these endpoints run; it is closed before the test ends.
func judging(t *testing.T, n *fakeNetwork, was *control.ClusterStates, cfg *config.Outliers, addresses ...string) *judged {
	t.Helper()
	c := web(addresses...)
	c.Outliers = cfg
	j := &judged{t: t, log: new(lines)}
	loops := loopsFor(t, 1)
	j.loop = loops[0]
	j.Options = upstream.Options{
		Config: &config.Config{Clusters: []config.Cluster{c}}, Metrics: metrics.NewRegistry(), Loops: loops, Network: n.network(), Inherited: was,
		Log: slog.New(slog.NewJSONHandler(j.log, nil)),
	}
	cs, err := upstream.New(t.Context(), j.Options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	j.Clusters = cs
	j.Cluster, _ = cs.Get("web")
	j.members = j.Cluster.Members()
	cs.Run()
	synctest.Wait()
	return j
}

// call is a request that ends so; a status of 0 is no answer.
func (j *judged) call(e *upstream.Endpoint, status int, o upstream.Outcome) {
	streamtest.Do(j.loop, func() {
		var c upstream.Call
		e.Begin(j.loop, new(upstream.Attempt), &c)
		if status != 0 {
			c.Answered(status)
		}
		c.End(o)
	})
	synctest.Wait()
}

// ejected returns the addresses of those that are.
func (j *judged) ejected() (all []string) {
	for _, e := range j.Cluster.Members() {
		if e.Conditions()&upstream.Ejected != 0 {
			all = append(all, e.Address)
		}
	}
	return all
}

func (j *judged) wantEjected(want ...string) {
	j.t.Helper()
	synctest.Wait()
	if got := j.ejected(); !slices.Equal(got, want) {
		j.t.Fatalf("ejected are %q, want %q", got, want)
	}
}

// figure is a value of the metrics.
func (j *judged) figure(name string, labels ...string) (v int64) {
	for _, f := range j.Metrics.Families() {
		for _, s := range f.Series {
			if f.Desc.Name == "holdfast_cluster_outlier_"+name && slices.Equal(s.Labels, labels) {
				v += s.Value
			}
		}
	}
	return v
}

const a, b = "10.0.0.1:80", "10.0.0.2:80"

func TestAnEndpointThatFailsIsEjectedForItsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := judging(t, &fakeNetwork{}, nil, outliers(), a, b)
		var told []upstream.Condition
		j.Clusters.Watch(func(e *upstream.Endpoint, _, now upstream.Condition) { told = append(told, now) })
		for range 2 {
			j.call(j.members[0], 500, upstream.Complete)
			j.call(j.members[1], 500, upstream.Complete)
		}
		j.call(j.members[1], 200, upstream.Complete)
		j.wantEjected()
		j.call(j.members[0], 500, upstream.Complete)
		j.wantEjected(a)
		for range 10 {
			round := j.Round(balance.Query{})
			if e := round.Next(); e != j.members[1] {
				t.Fatalf("a request goes to %v", e)
			}
		}
		if got := []int64{j.figure("ejections_active", "web"), j.figure("ejections_enforced_total", "web", "consecutive_5xx"), j.figure("ejections_detected_total", "web", "consecutive_5xx")}; !slices.Equal(got, []int64{1, 1, 1}) {
			t.Errorf("counted %v", got)
		}
		time.Sleep(30*time.Second - 1)
		j.wantEjected(a)
		time.Sleep(time.Nanosecond)
		j.wantEjected()
		if n := j.figure("ejections_active", "web"); n != 0 {
			t.Errorf("%d are counted as ejected", n)
		}
		if !slices.Equal(told, []upstream.Condition{upstream.Ejected, 0}) {
			t.Errorf("who watches was told %v", told)
		}
		if l := j.log.all("an endpoint is ejected"); len(l) != 1 || l[0]["cluster"] != "web" || l[0]["endpoint"] != a || l[0]["reason"] != "consecutive_5xx" || l[0]["ejections"] != 1.0 || l[0]["for"] != 30e9 {
			t.Errorf("logged %v", l)
		}
		if l := j.log.all("an endpoint is no longer ejected"); len(l) != 1 {
			t.Errorf("logged %v", l)
		}
	})
}

func TestWhatCountsAsAFailureOfAnEndpoint(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		status  int
		outcome upstream.Outcome
		ejects  bool
	}{
		"an answer":                              {200, upstream.Complete, false},
		"a client's fault":                       {404, upstream.Complete, false},
		"5xx":                                    {503, upstream.Complete, true},
		"5xx that nobody got":                    {503, upstream.Discarded, true},
		"5xx whose client has gone":              {503, upstream.Cancelled, true},
		"5xx that broke off":                     {503, upstream.Reset, true},
		"no answer in time":                      {0, upstream.TimedOut, true},
		"no answer":                              {0, upstream.Reset, true},
		"nonsense":                               {0, upstream.Invalid, true},
		"an answer that breaks off":              {200, upstream.Reset, false}, // it has answered
		"a client that has gone":                 {0, upstream.Cancelled, false},
		"a kept connection that was closed":      {0, upstream.Stale, false},
		"a tunnel":                               {101, upstream.BecameTunnel, false},
		"an upgrade that was refused":            {502, upstream.Complete, true},
		"an upgrade that was reset":              {0, upstream.Reset, true},
		"a 101 to something else than was asked": {101, upstream.Invalid, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				j := judging(t, &fakeNetwork{}, nil, outliers(), a)
				j.call(j.members[0], tt.status, tt.outcome)
				j.call(j.members[0], tt.status, tt.outcome)
				j.wantEjected()
				j.call(j.members[0], tt.status, tt.outcome)
				if ejected := len(j.ejected()) == 1; ejected != tt.ejects {
					t.Errorf("ejected: %v", ejected)
				}
			})
		})
	}
}

func TestConnectionsThatCannotBeMadeEjectUnlessThatIsOurOwnDoing(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fail   func(p *pending) error
		ejects bool
	}{
		"refused":        {func(*pending) error { return syscall.ECONNREFUSED }, true},
		"no answer":      {func(p *pending) error { return p.never() }, true},
		"no descriptors": {func(*pending) error { return syscall.EMFILE }, false},
		"no ports":       {func(*pending) error { return &errWrapped{syscall.EADDRNOTAVAIL} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				cfg := outliers()
				cfg.Consecutive5xx = 0
				j := judging(t, &fakeNetwork{fail: func(p *pending, _ string) error { return tt.fail(p) }}, nil, cfg, a)
				e := &endpoint{j.members[0], t, j.Loops}
				for range 3 {
					j.wantEjected()
					if _, err := e.try((*upstream.Endpoint).Dial, 0); err == nil {
						t.Fatal("it was connected to")
					}
					synctest.Wait()
				}
				if ejected := len(j.ejected()) == 1; ejected != tt.ejects {
					t.Errorf("ejected: %v", ejected)
				}
			})
		})
	}
}

type errWrapped struct{ error }

func (e *errWrapped) Unwrap() error { return e.error }

func TestAConnectionThatIsMadeEndsTheRow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fails := true
		cfg := outliers()
		cfg.Consecutive5xx = 0
		j := judging(t, &fakeNetwork{fail: func(*pending, string) error {
			if fails {
				return errors.New("refused")
			}
			return nil
		}}, nil, cfg, a)
		e := &endpoint{j.members[0], t, j.Loops}
		for _, fails = range []bool{true, true, false, true, true} {
			e.try((*upstream.Endpoint).Dial, 0)
		}
		j.wantEjected()
		fails = true
		e.try((*upstream.Endpoint).Dial, 0)
		j.wantEjected(a)
	})
}

// A reload does not let an outlier off, and what it has done before is not forgotten.
func TestTheNextGenerationGoesOnWithWhatIsKnown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		old := judging(t, &fakeNetwork{}, nil, outliers(), a, b)
		for range 3 {
			old.call(old.members[0], 500, upstream.Complete)
		}
		old.wantEjected(a)
		time.Sleep(10 * time.Second)
		was := &control.ClusterStates{Clusters: []control.ClusterState{{Name: "web"}, {Name: "other"}}}
		for _, e := range old.members {
			s := control.EndpointState{Address: e.Address, At: e.Addr}
			e.OutlierState(&s)
			was.Clusters[0].Endpoints = append(was.Clusters[0].Endpoints, s)
		}
		if s := was.Clusters[0].Endpoints[0]; s.Ejections != 1 || time.Until(s.EjectedUntil) != 20*time.Second || s.Reason != "consecutive_5xx" {
			t.Errorf("what travels is %+v", s)
		}
		if s := was.Clusters[0].Endpoints[1]; s.Ejections != 0 || !s.EjectedUntil.IsZero() || s.Reason != "" {
			t.Errorf("what travels is %+v", s)
		}

		j := judging(t, &fakeNetwork{}, was, outliers(), a, b)
		j.wantEjected(a)
		round := j.Round(balance.Query{})
		if e := round.Next(); e.Address != b {
			t.Errorf("the first request goes to %v", e)
		}
		time.Sleep(20*time.Second - 1)
		j.wantEjected(a)
		time.Sleep(time.Nanosecond)
		j.wantEjected()
		for range 3 {
			j.call(j.members[0], 500, upstream.Complete)
		}
		if l := j.log.all("an endpoint is ejected"); len(l) != 1 || l[0]["ejections"] != 2.0 {
			t.Errorf("logged %v", l)
		}

		none := judging(t, &fakeNetwork{}, was, nil, a, b) // it does not look for any
		none.wantEjected()
	})
}

// An endpoint that its discovery finds late, or again, is still ejected if it was.
func TestAnEjectionLastsWhileAnEndpointIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := judging(t, &fakeNetwork{}, &control.ClusterStates{Clusters: []control.ClusterState{{Name: "web", Endpoints: []control.EndpointState{
			{Address: "10.0.0.9:80", At: place("10.0.0.9:80").Addr, Ejections: 1, EjectedUntil: time.Now().Add(time.Minute), Reason: "success_rate"},
		}}}}, outliers(), a)
		member := func(s string) upstream.Member { return upstream.Member{Address: s, At: place(s)} }
		j.SetMembers([]upstream.Member{member(a), member("10.0.0.9:80")})
		j.wantEjected("10.0.0.9:80")
		late := j.Cluster.Members()[1]
		late.Tunnels.Count(1) // so that it stays known
		j.SetMembers([]upstream.Member{member(a)})
		time.Sleep(30 * time.Second)
		j.SetMembers([]upstream.Member{member(a), member("10.0.0.9:80")})
		j.wantEjected("10.0.0.9:80")
		j.SetMembers([]upstream.Member{member(a)})
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if c := late.Conditions(); c != upstream.Left {
			t.Errorf("when its time is over its conditions are %b", c)
		}
	})
}

func TestTheLogIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg := outliers()
		cfg.Enforcing.Value = 0
		j := judging(t, &fakeNetwork{}, nil, cfg, a)
		for range 3 * 100 {
			j.call(j.members[0], 500, upstream.Complete)
		}
		const message = "an endpoint is an outlier, but is not ejected"
		if n := len(j.log.all(message)); n != 20 {
			t.Errorf("%d lines were written", n)
		}
		if n := j.figure("ejections_detected_total", "web", "consecutive_5xx"); n != 100 {
			t.Errorf("%d outliers were counted", n)
		}
		time.Sleep(10 * time.Second)
		for range 3 {
			j.call(j.members[0], 500, upstream.Complete)
		}
		if l := j.log.all("more about outliers was not written"); len(l) != 1 || l[0]["lines"] != 80.0 || len(j.log.all(message)) != 21 {
			t.Errorf("logged %v", l)
		}
	})
}

// Nothing is decided once the clusters are closed, and before they run.
func TestOutliersAreLookedForFromRunToClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := judging(t, &fakeNetwork{}, nil, outliers(), a)
		j.Clusters.Close()
		for range 3 {
			j.call(j.members[0], 500, upstream.Complete)
		}
		j.wantEjected()
	})
	synctest.Test(t, func(t *testing.T) {
		c := web(a)
		c.Outliers = outliers()
		w := clusters(t, &fakeNetwork{}, loopsFor(t, 1), c)
		cluster, _ := w.Get("web")
		j := &judged{t: t, Clusters: w.Clusters, Cluster: cluster, loop: w.loops[0]}
		for range 3 {
			j.call(cluster.Members()[0], 500, upstream.Complete)
		}
		j.wantEjected()
		w.Run()
		j.wantEjected(a)
	})
}

func place(s string) upstream.Place {
	return upstream.PlaceOf(s)
}
