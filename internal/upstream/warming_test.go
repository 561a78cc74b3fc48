package upstream

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/metrics"
)

// clustersToWarm returns clusters of these warming timeouts, and what they log.
func clustersToWarm(t *testing.T, o Options, timeouts map[string]time.Duration) (*Clusters, *bytes.Buffer) {
	t.Helper()
	var log bytes.Buffer
	o.Config = new(config.Config)
	for name, timeout := range timeouts {
		o.Config.Clusters = append(o.Config.Clusters, config.Cluster{Name: name, WarmingTimeout: timeout, Endpoints: []config.Endpoint{{Address: "127.0.0.1:80"}}})
	}
	o.Log, o.Metrics = slog.New(slog.NewTextHandler(&log, nil)), metrics.NewRegistry()
	c, err := New(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return c, &log
}

func TestAGenerationWaitsUntilItsClustersAreWarm(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, log := clustersToWarm(t, Options{}, map[string]time.Duration{"a": 15 * time.Second, "b": 15 * time.Second, "c": time.Second})
		addresses, health := c.byName["a"].warms("addresses"), c.byName["a"].warms("health")
		other := c.byName["b"].warms("health")
		again := c.byName["b"].warms("health")
		time.AfterFunc(time.Second, addresses)
		time.AfterFunc(2*time.Second, other)
		time.AfterFunc(3*time.Second, health)
		time.AfterFunc(4*time.Second, func() {
			if got := c.byName["b"].options.warming.Value(); got != 1 {
				t.Errorf("%d clusters are counted as warming, want 1", got)
			}
			again()
			again() // is no harm
		})
		began := time.Now()
		<-c.byName["a"].warmed("addresses")
		if took := time.Since(began); took != time.Second {
			t.Errorf("what waits for the addresses went on after %v, want 1s", took)
		}
		c.Warm(t.Context())
		if took := time.Since(began); took != 4*time.Second {
			t.Errorf("warm after %v, want 4s", took)
		}
		if got := c.byName["b"].options.warming.Value(); got != 0 {
			t.Errorf("%d clusters are counted as warming, want none", got)
		}
		if log.Len() > 0 {
			t.Errorf("it was logged: %s", log)
		}
	})
}

func TestAGenerationGoesOnWithoutClustersThatDoNotGetWarm(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, log := clustersToWarm(t, Options{}, map[string]time.Duration{"a": 15 * time.Second, "b": 5 * time.Second, "c": 5 * time.Second, "d": time.Minute})
		for _, name := range []string{"a", "b"} {
			c.byName[name].warms("its endpoints")
		}
		began := time.Now()
		c.Warm(t.Context())
		if took := time.Since(began); took != 15*time.Second {
			t.Errorf("went on after %v, want 15s", took)
		}
		if want := `clusters=2 first="a (its endpoints), b (its endpoints)"`; strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), want) {
			t.Errorf("logged %q, want one line with %q", log, want)
		}
		if got := c.byName["a"].options.warming.Value(); got != 2 {
			t.Errorf("%d clusters are counted as warming, want 2: they still are", got)
		}
	})
}

func TestWhoReplacesTheDeadHardlyWaits(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name      string
		inherited *control.ClusterStates
		want      time.Duration
	}{
		{"what is known", &control.ClusterStates{Clusters: []control.ClusterState{{Name: "a"}}}, 0},
		{"what is not known", nil, shortWarming},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, _ := clustersToWarm(t, Options{Urgent: true, Inherited: tc.inherited}, map[string]time.Duration{"a": 15 * time.Second})
				c.byName["a"].warms("its endpoints")
				began := time.Now()
				c.Warm(t.Context())
				if took := time.Since(began); took != tc.want {
					t.Errorf("waited %v, want %v", took, tc.want)
				}
			})
		})
	}
}

// Of a name that nobody could resolve the generation before had no address either: waiting for
// it as if it were new would make each reload as slow as the first start.
func TestAReloadHardlyWaitsForWhatTheGenerationBeforeHadNotFoundEither(t *testing.T) {
	t.Parallel()
	found := control.EndpointState{Address: "127.0.0.1:80", At: netip.MustParseAddrPort("127.0.0.1:80")}
	gone := found
	gone.Conditions = Left.Words()
	for name, tc := range map[string]struct {
		endpoints []control.EndpointState
		want      time.Duration
	}{
		"it knew some":           {[]control.EndpointState{found}, 15 * time.Second},
		"it knew none":           {nil, shortWarming},
		"what it knew is behind": {[]control.EndpointState{gone}, shortWarming},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				inherited := &control.ClusterStates{Clusters: []control.ClusterState{{Name: "a", Endpoints: tc.endpoints}}}
				c, _ := clustersToWarm(t, Options{Inherited: inherited}, map[string]time.Duration{"a": 15 * time.Second})
				c.byName["a"].warms("its endpoints")
				began := time.Now()
				c.Warm(t.Context())
				if took := time.Since(began); took != tc.want {
					t.Errorf("waited %v, want %v", took, tc.want)
				}
			})
		})
	}
}
