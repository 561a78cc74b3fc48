package upstream

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/metrics"
)

// shortWarming is how long a generation waits for a cluster of which nothing is known when the
// one before is dead, or has not found out either: waiting for what may never come would only
// hold up each reload.
const shortWarming = time.Second

var clustersWarming = metrics.Define(metrics.Desc{
	Name: "holdfast_clusters_warming",
	Help: "Clusters whose endpoints are not known for the first time yet, or have not been checked yet.",
	Type: metrics.TypeGauge,
})

// warming is what a cluster still waits for before it is all that it can be: the zero value
// waits for nothing.
type warming struct {
	mu    sync.Mutex
	waits map[string]int           // how many there are, by what it is
	calm  map[string]chan struct{} // closed when nothing of that name is waited for any more; "" is all
}

// warms says that the cluster is not warm before done is called, which may be done more than
// once. Whoever has it wait does so before [Clusters.Run] returns.
func (c *Cluster) warms(what string) (done func()) {
	w := &c.warming
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waits == nil {
		w.waits = make(map[string]int)
	}
	if len(w.waits) == 0 {
		c.options.warming.Add(1)
	}
	w.waits[what]++
	return sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.waits[what]--; w.waits[what] > 0 {
			return
		}
		delete(w.waits, what)
		w.tell(what)
		if len(w.waits) == 0 {
			c.options.warming.Add(-1)
			w.tell("")
		}
	})
}

// tell has those go on who wait for it. w.mu is held.
func (w *warming) tell(what string) {
	if calm := w.calm[what]; calm != nil {
		close(calm)
		delete(w.calm, what)
	}
}

// warmed returns what is closed as soon as the cluster waits for nothing of that name, or, for
// "", for nothing at all.
func (c *Cluster) warmed(what string) <-chan struct{} {
	w := &c.warming
	w.mu.Lock()
	defer w.mu.Unlock()
	calm := w.calm[what]
	if calm == nil {
		calm = make(chan struct{})
		if len(w.waits) == 0 || what != "" && w.waits[what] == 0 {
			close(calm)
			return calm
		}
		if w.calm == nil {
			w.calm = make(map[string]chan struct{})
		}
		w.calm[what] = calm
	}
	return calm
}

// lacks says in words what the cluster waits for.
func (c *Cluster) lacks() string {
	c.warming.mu.Lock()
	defer c.warming.mu.Unlock()
	return strings.Join(slices.Sorted(maps.Keys(c.warming.waits)), " and ")
}

// warm is [Clusters.Warm]. It goes on without those clusters whose time is over.
func (c *Clusters) warm(ctx context.Context) {
	began := time.Now()
	var cold []string
	for _, name := range slices.Sorted(maps.Keys(c.byName)) {
		cluster := c.byName[name]
		ctx, cancel := context.WithDeadline(ctx, began.Add(cluster.patience()))
		select {
		case <-cluster.warmed(""):
		case <-ctx.Done():
		}
		cancel()
		if lacks := cluster.lacks(); lacks != "" {
			cold = append(cold, name+" ("+lacks+")")
		}
	}
	if len(cold) > 0 {
		c.log.Warn("clusters are not warm in time: the generation goes on with what it knows of them", slog.Int("clusters", len(cold)), slog.String("first", strings.Join(cold[:min(len(cold), mostCold)], ", ")))
	}
}

// inherited is what another generation knew of the cluster last, or nil.
func (c *Cluster) inherited() *control.ClusterState {
	return c.options.states[c.Name]
}

// statesByName are the clusters of another generation; of one name the first.
func statesByName(all *control.ClusterStates) map[string]*control.ClusterState {
	if all == nil {
		return nil
	}
	states := make(map[string]*control.ClusterState, len(all.Clusters))
	for i := range all.Clusters {
		if s := &all.Clusters[i]; states[s.Name] == nil {
			states[s.Name] = s
		}
	}
	return states
}

// mostCold is how many clusters the line of the log names.
const mostCold = 20

// patience is how long the cluster may take.
func (c *Cluster) patience() time.Duration {
	switch {
	case c.options.Urgent && c.inherited() != nil:
		return 0
	case c.options.Urgent, c.inherited() != nil && len(lastOf(c.inherited())) == 0:
		return min(shortWarming, c.cfg.WarmingTimeout)
	}
	return c.cfg.WarmingTimeout
}
