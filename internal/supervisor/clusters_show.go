package supervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"holdfast/internal/control"
)

const (
	// showTimeout bounds how long a generation may take to say what it knows.
	showTimeout = 3 * time.Second

	// mostShown bounds how many endpoints are shown, and mostWord how many bytes a
	// generation's word may have.
	mostShown = 20_000
	mostWord  = 512
)

// Clusters is all that generations know of their clusters.
type Clusters struct {
	Generations []int     `json:"generations"` // that have said so: the serving one first, then the newest
	Clusters    []Cluster `json:"clusters"`    // by name
	More        int       `json:"more,omitempty"`
	Warnings    []string  `json:"warnings,omitempty"`
}

// Cluster is one of them. What cannot be added up is so in the serving generation, or, where that
// does not have the cluster, in the newest that does.
type Cluster struct {
	Name        string     `json:"name"`
	Policy      string     `json:"policy,omitempty"`
	Generations []int      `json:"generations"`
	Endpoints   []Endpoint `json:"endpoints"` // by priority and name
	Breakers    []Breaker  `json:"breakers,omitempty"`

	TLS *control.TLSState `json:"tls,omitempty"` // nil: its endpoints are spoken to without
}

// Endpoint is an endpoint of a cluster: counts are those of all generations together. Elsewhere is
// what the first of the generations was told that others have.
type Endpoint struct {
	control.EndpointState
	Generations []EndpointHeld `json:"generations"` // that know it
}

// EndpointHeld is what a generation has with an endpoint.
type EndpointHeld struct {
	Generation int   `json:"generation"`
	Requests   int64 `json:"requests"`
	Tunnels    int64 `json:"tunnels"`
}

// Breaker is what is limited of a cluster for one priority.
type Breaker struct {
	Priority string         `json:"priority"`
	Limits   []BreakerLimit `json:"limits"` // by what is limited
}

// BreakerLimit is one limit.
type BreakerLimit struct {
	Limit     string `json:"limit"` // what is limited
	Most      int64  `json:"most,omitempty"`
	Used      int64  `json:"used"` // in all generations
	Open      bool   `json:"open,omitempty"`
	Overflows uint64 `json:"overflows"`
}

// Clusters implements [Commands].
func (s *Supervisor) Clusters(ctx context.Context, name string) (*Clusters, error) {
	if err := s.awaitBegin(ctx); err != nil {
		return nil, err
	}
	select { // one answer is made at a time: it may be large
	case s.viewing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.viewing }()
	var all []*generation
	var warnings []string
	if err := s.try(ctx, func() {
		all = s.sharers()
		slices.SortStableFunc(all, func(a, b *generation) int { // the serving one first
			switch s.serving {
			case a:
				return -1
			case b:
				return 1
			}
			return 0
		})
		for _, g := range s.newestFirst() {
			if g.state != starting && !slices.Contains(all, g) {
				warnings = append(warnings, fmt.Sprintf("generation %d is of a build that says nothing of its clusters, or has not said which build it is", g.number))
			}
		}
	}); err != nil {
		return nil, err
	}
	said := make([]int, len(all))
	errs := make([]error, len(all))
	var asked sync.WaitGroup
	for i, g := range all {
		asked.Go(func() { said[i], errs[i] = g.payload(ctx, control.TypeClusters, showTimeout, control.MaxClusters) })
	}
	asked.Wait()
	v := newClustersView(name)
	for i, g := range all {
		if errs[i] == nil {
			errs[i] = v.add(g.number, said[i])
		}
		if errs[i] != nil {
			g.log.Warn("generation does not say what it knows of its clusters", "err", errs[i])
			warnings = append(warnings, fmt.Sprintf("generation %d does not say what it knows", g.number))
		}
	}
	if len(v.generations) == 0 {
		return nil, errors.New("no generation says what it knows of its clusters")
	}
	shown := v.show()
	shown.Warnings = warnings
	return shown, nil
}

// clustersView adds up what generations know.
type clustersView struct {
	name        string // of the only cluster that is wanted; "": all are
	generations []int
	clusters    map[string]*clusterView
	endpoints   int
	more        int
}

type clusterView struct {
	Cluster
	endpoints map[endpointKey]*Endpoint
	breakers  map[string]map[string]*BreakerLimit // by priority, and what is limited
}

type endpointKey struct{ address, name string }

func newClustersView(name string) *clustersView {
	return &clustersView{name: name, clusters: make(map[string]*clusterView)}
}

// add adds what a generation says, one cluster at a time. With an error that is not counted
// among those that have said something, and some of it may be shown.
func (v *clustersView) add(generation, fd int) error {
	err := control.EachClusterState(fd, func(c *control.ClusterState) {
		if name := clean(c.Name); v.name == "" || name == v.name {
			v.addCluster(generation, name, c)
		}
	})
	if err == nil {
		v.generations = append(v.generations, generation)
	}
	return err
}

func (v *clustersView) addCluster(generation int, name string, c *control.ClusterState) {
	all := v.clusters[name]
	if all == nil {
		if v.endpoints+len(v.clusters) >= mostShown {
			v.more++
			return
		}
		all = &clusterView{
			Cluster:   Cluster{Name: name, Policy: clean(c.Policy), Endpoints: []Endpoint{}},
			endpoints: make(map[endpointKey]*Endpoint), breakers: make(map[string]map[string]*BreakerLimit),
		}
		if c.TLS != nil {
			s := *c.TLS
			s.Problem = clean(s.Problem)
			if f := s.Failure; f != nil {
				s.Failure = &control.TLSFailure{At: f.At, Endpoint: clean(f.Endpoint), Error: clean(f.Error)}
			}
			all.TLS = &s
		}
		v.clusters[name] = all
	}
	if !slices.Contains(all.Generations, generation) {
		all.Generations = append(all.Generations, generation)
	}
	for i := range c.Endpoints {
		v.addEndpoint(all, generation, &c.Endpoints[i])
	}
	for i := range c.Breakers {
		all.addBreaker(&c.Breakers[i])
	}
}

func (v *clustersView) addEndpoint(c *clusterView, generation int, e *control.EndpointState) {
	key := endpointKey{clean(e.Address), clean(e.Name)}
	held := EndpointHeld{generation, e.Requests, e.Tunnels}
	sum := c.endpoints[key]
	if sum == nil {
		if v.endpoints+len(v.clusters) >= mostShown {
			v.more++
			return
		}
		v.endpoints++
		sum = &Endpoint{EndpointState: *e, Generations: []EndpointHeld{held}}
		sum.Address, sum.Name, sum.Reason = key.address, key.name, clean(e.Reason)
		sum.Conditions = cleanAll(e.Conditions)
		sum.Metadata = make(map[string]string, len(e.Metadata))
		for k, m := range e.Metadata {
			sum.Metadata[clean(k)] = clean(m)
		}
		c.endpoints[key] = sum
		return
	}
	if sum.Generations[len(sum.Generations)-1].Generation == generation {
		return // it says so twice
	}
	sum.Generations = append(sum.Generations, held)
	sum.Requests += e.Requests
	sum.Tunnels += e.Tunnels
	sum.Connections += e.Connections
	sum.RequestsSum += e.RequestsSum
	sum.Connects += e.Connects
	sum.ConnectSum = max(-math.MaxFloat64, min(sum.ConnectSum+e.ConnectSum, math.MaxFloat64)) // JSON has no infinity
	sum.ConnectFails += e.ConnectFails
}

// conditionLeft is what generations call an endpoint that its cluster does not have any more.
const conditionLeft = "left"

// mostBreakers is how many priorities, and limits of each, are shown of a cluster.
const mostBreakers = 16

func (c *clusterView) addBreaker(b *control.BreakerState) {
	priority := clean(b.Priority)
	limits := c.breakers[priority]
	if limits == nil {
		if len(c.breakers) >= mostBreakers {
			return
		}
		limits = make(map[string]*BreakerLimit)
		c.breakers[priority] = limits
	}
	for _, what := range slices.Sorted(maps.Keys(b.Limits)) {
		used := b.Limits[what]
		what = clean(what)
		sum := limits[what]
		if sum == nil {
			if len(limits) >= mostBreakers {
				return
			}
			sum = &BreakerLimit{Limit: what, Most: used.Limit, Open: used.Open}
			limits[what] = sum
		}
		sum.Used += used.Here
		sum.Overflows += used.Overflows
	}
}

// show returns all of it in order.
func (v *clustersView) show() *Clusters {
	shown := &Clusters{Generations: v.generations, Clusters: []Cluster{}, More: v.more}
	for _, name := range slices.Sorted(maps.Keys(v.clusters)) {
		c := v.clusters[name]
		for _, e := range c.endpoints {
			if v.behind(c, e) {
				if e.Requests+e.Tunnels+e.Connections == 0 {
					continue
				}
				e.Healthy, e.Conditions = false, []string{conditionLeft}
			}
			c.Endpoints = append(c.Endpoints, *e)
		}
		slices.SortFunc(c.Endpoints, func(a, b Endpoint) int {
			return cmp.Or(cmp.Compare(a.Priority, b.Priority), a.At.Compare(b.At), cmp.Compare(a.Address, b.Address), cmp.Compare(a.Name, b.Name))
		})
		for _, priority := range slices.Sorted(maps.Keys(c.breakers)) {
			b := Breaker{Priority: priority}
			for _, what := range slices.Sorted(maps.Keys(c.breakers[priority])) {
				b.Limits = append(b.Limits, *c.breakers[priority][what])
			}
			c.Breakers = append(c.Breakers, b)
		}
		shown.Clusters = append(shown.Clusters, c.Cluster)
	}
	return shown
}

// behind says whether only older generations have the endpoint, which get no new work, while
// the cluster of the one that serves is without it.
func (v *clustersView) behind(c *clusterView, e *Endpoint) bool {
	if len(v.generations) == 0 {
		return false
	}
	first := v.generations[0]
	return slices.Contains(c.Generations, first) && e.Generations[0].Generation != first
}

// clean is what a generation says, short and harmless to whoever reads it.
func clean(s string) string { return oneLine(s[:min(len(s), mostWord)]) }

func cleanAll(all []string) (short []string) {
	for _, w := range all[:min(len(all), mostBreakers)] {
		short = append(short, clean(w))
	}
	return short
}
