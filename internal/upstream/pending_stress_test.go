package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/control"
	"holdfast/internal/dynamic"
	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
	"holdfast/internal/upstream"
)

// meter is a network that counts how many connections are open, those included that are being
// opened, without those that became tunnels.
type meter struct {
	open, most atomic.Int64
	fails      bool // some attempts to connect do
}

func (m *meter) network() upstream.Network {
	return upstream.Network{
		Lookup: func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no names") },
		Connect: func(t *task.Task, _ *stream.Loop, _, _ string, _ time.Time, a *upstream.Attempt, owner upstream.Owner) (upstream.Conn, error) {
			n := m.open.Add(1)
			for most := m.most.Load(); n > most && !m.most.CompareAndSwap(most, n); most = m.most.Load() {
			}
			if rand.IntN(2) == 0 {
				t.Pause()
			}
			if a.Err() != nil || m.fails && rand.IntN(8) == 0 {
				m.open.Add(-1)
				return nil, errors.New("refused")
			}
			return &metered{m: m, owner: owner}, nil
		},
	}
}

// metered is a connection of it.
type metered struct {
	m     *meter
	owner upstream.Owner
	over  bool
}

func (c *metered) Exchange() (exchange.Upstream, error) {
	if c.over {
		return nil, net.ErrClosed
	}
	return &meteredUse{conn: c}, nil
}
func (c *metered) PassOn() (stream.Passed, error) { return stream.Passed{}, net.ErrClosed }
func (c *metered) Alive() bool                    { return !c.over }
func (c *metered) Close()                         { c.end(func() { c.owner.Ended(false) }) }
func (c *metered) end(tell func()) {
	if !c.over {
		c.over = true
		c.m.open.Add(-1)
		tell()
	}
}

type meteredUse struct {
	exchange.Upstream
	conn *metered
}

// storm is many requests at the same time, of all kinds, on several loops, with everything that
// may happen meanwhile.
type storm struct {
	loops, endpoints, tasks, rounds int
	limits                          config.Limits
	elsewhere                       bool // other generations have something now and then
	overrides                       bool // limits are lowered and raised
	leaves                          bool // endpoints leave and come back
}

// No limit is exceeded, and every wait ends. That is so in a bubble, in which whoever waits for
// ever fails the test at once.
func TestNoLimitIsExceededAndEveryWaitEnds(t *testing.T) {
	t.Parallel()
	tight := config.Limits{connections: most(1)}
	for name, s := range map[string]storm{
		"one connection for all":         {4, 3, 60, 30, tight, false, false, false},
		"a few connections":              {4, 3, 80, 30, config.Limits{connections: most(5), tunnels: most(4), requests: most(60)}, false, false, false},
		"one loop":                       {1, 2, 60, 30, config.Limits{connections: most(2)}, false, false, false},
		"few may wait":                   {3, 2, 60, 30, config.Limits{connections: most(2), pendings: most(3)}, false, false, false},
		"others have some":               {3, 2, 60, 30, config.Limits{connections: most(4), tunnels: most(3)}, true, false, false},
		"limits change":                  {3, 2, 60, 30, config.Limits{connections: most(4), tunnels: most(3), requests: most(30)}, false, true, false},
		"endpoints leave and come":       {3, 4, 60, 30, config.Limits{connections: most(2)}, false, false, true},
		"everything happens at one time": {4, 4, 80, 30, config.Limits{connections: most(3), tunnels: most(4), requests: most(50), pendings: most(40)}, true, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { s.run(t) })
		})
	}
}

func (s *storm) run(t *testing.T) {
	m := &meter{fails: true}
	c := web()
	for i := range s.endpoints {
		c.Endpoints = append(c.Endpoints, config.Endpoint{Address: fmt.Sprintf("10.0.0.%d:80", i+1)})
	}
	c.Breakers[0] = s.limits
	for what := range c.Breakers[0] {
		c.Breakers[0][what].Key = config.Limited(what).String()
	}
	loops := loopsFor(t, s.loops)
	var values dynamic.Set
	cs, err := upstream.New(t.Context(), upstream.Options{
		Config: &config.Config{Clusters: []config.Cluster{c}}, Loops: loops, Network: m.network(), Values: &values,
	})
	if err != nil {
		t.Fatal(err)
	}
	cluster, _ := cs.Get("web")
	all := cluster.Members()

	var work, others sync.WaitGroup
	over := make(chan struct{})
	others.Go(func() { s.watch(t, cs, over) })
	others.Go(func() { s.disturb(cs, cluster, &values, all, over) })
	for i := range s.tasks {
		l := loops[i%len(loops)]
		for done := streamtest.Begin(l, func(t *task.Task) {
			for range s.rounds {
				s.request(t, l, all[rand.IntN(len(all))])
			}
		}); done != nil; done = nil {
			work.Go(func() { <-done })
		}
	}
	work.Wait()
	close(over)
	others.Wait()
	cs.SetElsewhere(nil)
	cs.Close()
	if n := m.open.Load(); n != 0 {
		t.Errorf("%d connections are open", n)
	}
	if most := s.limits[connections].Value; m.most.Load() > most && !s.overrides {
		t.Errorf("there were %d connections, %d are allowed", m.most.Load(), most)
	}
	if loads := cs.Loads(); len(loads.Clusters) > 0 {
		t.Errorf("left is %+v", loads)
	}
}

// request is one request or upgrade, with an end of some kind.
func (s *storm) request(t *task.Task, l *stream.Loop, e *upstream.Endpoint) {
	var a upstream.Attempt
	kind := rand.IntN(5)
	open := []opener{opensDial, opensFresh, opensGet, opensGet, opensGet}[kind]
	if rand.IntN(10) == 0 {
		patience := rand.IntN(6)
		l.Tasks.Go(running(func(t *task.Task) {
			for range patience {
				t.Pause()
			}
			a.Cancel(errors.New("gone"))
		}))
	}
	up, err := open(e, t, l, &a)
	if err != nil {
		t.Pause()
		return
	}
	var call upstream.Call
	e.Begin(l, &a, &call)
	for range rand.IntN(4) {
		t.Pause()
	}
	if rand.IntN(20) == 0 { // all loops come to rest in between
		streamtest.Block(l, t, func() { time.Sleep(time.Millisecond) })
	}
	conn := up.(*meteredUse).conn
	switch n := rand.IntN(6); {
	case kind == 0 && n > 2:
		conn.end(conn.owner.Taken)
		e.TunnelOpened(&call)
		call.End(upstream.BecameTunnel)
		t.Pause()
		e.Tunnels.Count(-1)
		return
	case kind == 0, n == 0:
		conn.Close()
	default:
		conn.owner.Idle(conn)
	}
	call.End(upstream.Complete)
}

type running func(*task.Task)

func (r running) Run(t *task.Task) { r(t) }

// watch looks whether more of anything is counted than may be.
func (s *storm) watch(t *testing.T, cs *upstream.Clusters, over <-chan struct{}) {
	for {
		for _, c := range cs.Loads().Clusters {
			for _, used := range c.Used {
				for what, n := range used.Used {
					for limited, l := range s.limits {
						if config.Limited(limited).String() == what && l.Set && n > l.Value && !s.overrides {
							t.Errorf("%d %s, %d are allowed", n, what, l.Value)
						}
					}
				}
			}
		}
		select {
		case <-over:
			return
		case <-time.After(100 * time.Microsecond):
		}
	}
}

// disturb changes what limits go by, until it is over: then all is as it was configured.
func (s *storm) disturb(cs *upstream.Clusters, c *upstream.Cluster, values *dynamic.Set, all []*upstream.Endpoint, over <-chan struct{}) {
	for ended := false; !ended; {
		select {
		case <-over:
			ended = true
		case <-time.After(time.Duration(rand.IntN(300)) * time.Microsecond):
		}
		if s.elsewhere {
			loads := map[int]*control.Loads{}
			for g := range rand.IntN(3) {
				loads[g] = elsewhere("web", load("default", connections, rand.Int64N(3)), load("default", tunnels, rand.Int64N(3)))
			}
			cs.SetElsewhere(loads)
		}
		if s.overrides {
			overrides := map[string]float64{}
			for _, what := range config.LimitedKeys {
				if rand.IntN(3) == 0 {
					overrides[what] = float64(rand.IntN(6) - 1)
				}
			}
			if overrides["connections"] == 0 && rand.IntN(2) == 0 {
				delete(overrides, "connections")
			}
			values.Apply(overrides)
		}
		if s.leaves {
			var members []upstream.Member
			for _, e := range all {
				if rand.IntN(3) > 0 {
					members = append(members, upstream.Member{Address: e.Address, At: upstream.Place{Addr: e.Addr}})
				}
			}
			c.SetMembers(members)
		}
	}
}
