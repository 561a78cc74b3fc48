package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// clustersOf returns clusters without loops, of a configuration with these clusters.
func clustersOf(t *testing.T, clusters ...config.Cluster) *upstream.Clusters {
	t.Helper()
	c, err := upstream.New(context.Background(), upstream.Options{Config: &config.Config{Clusters: clusters}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func endpointsOf(addresses ...string) (all []config.Endpoint) {
	for _, a := range addresses {
		all = append(all, config.Endpoint{Address: a})
	}
	return all
}

func memberAt(address, at string) upstream.Member {
	return upstream.Member{Address: address, At: upstream.Place{Addr: netip.MustParseAddrPort(at)}}
}

func TestWhatIsKnownOfAnEndpointClosesItsTunnelsOnlyWherePolicySaysSo(t *testing.T) {
	t.Parallel()
	const here = "127.0.0.1:9000"
	var (
		neither   = endpointPolicy{}
		left      = endpointPolicy{closeLeft: true}
		unhealthy = endpointPolicy{closeUnhealthy: true}
		both      = endpointPolicy{closeLeft: true, closeUnhealthy: true}
		mark      = func(conditions ...upstream.Condition) func(*upstream.Cluster) {
			return func(c *upstream.Cluster) {
				for _, condition := range conditions {
					c.Members()[0].Mark(condition, true)
				}
			}
		}
		leave = func(c *upstream.Cluster) { c.SetMembers([]upstream.Member{memberAt("127.0.0.1:9", "127.0.0.1:9")}) }
	)
	for name, tt := range map[string]struct {
		policy   endpointPolicy
		cluster  string
		endpoint string
		happens  func(*upstream.Cluster)
		want     tunnel.Reason
	}{
		"it is well":                      {both, "web", here, func(*upstream.Cluster) {}, tunnel.Open},
		"it fails":                        {unhealthy, "web", here, mark(upstream.Failing), tunnel.EndpointUnhealthy},
		"it is ejected":                   {unhealthy, "web", here, mark(upstream.Ejected), tunnel.EndpointUnhealthy},
		"it fails, which is no reason":    {left, "web", here, mark(upstream.Failing, upstream.Ejected), tunnel.Open},
		"it was not checked yet":          {both, "web", here, mark(upstream.Unchecked), tunnel.Open},
		"it has left":                     {left, "web", here, leave, tunnel.EndpointRemoved},
		"it has left, which is no reason": {unhealthy, "web", here, leave, tunnel.Open},
		"it has left, both would be":      {both, "web", here, leave, tunnel.EndpointRemoved},
		"nothing is a reason":             {neither, "web", here, func(c *upstream.Cluster) { mark(upstream.Failing)(c); leave(c) }, tunnel.Open},
		"it was never a member":           {left, "web", "127.0.0.1:9001", func(*upstream.Cluster) {}, tunnel.EndpointRemoved},
		"its cluster is not here":         {both, "other", here, func(*upstream.Cluster) {}, tunnel.Open},
		"it is a member by another name":  {both, "web", here, func(c *upstream.Cluster) { c.SetMembers([]upstream.Member{memberAt("app:9000", here)}) }, tunnel.Open},
		"by that name it fails": {both, "web", here, func(c *upstream.Cluster) {
			c.SetMembers([]upstream.Member{memberAt("app:9000", here)})
			mark(upstream.Failing)(c)
		}, tunnel.EndpointUnhealthy},
		"it has left and come back":       {both, "web", here, func(c *upstream.Cluster) { leave(c); c.SetMembers([]upstream.Member{memberAt(here, here)}) }, tunnel.Open},
		"the cluster has nobody any more": {left, "web", here, func(c *upstream.Cluster) { c.SetMembers(nil) }, tunnel.EndpointRemoved},
		"another one of the cluster failed": {both, "web", "127.0.0.1:9001", func(c *upstream.Cluster) {
			c.SetMembers([]upstream.Member{memberAt(here, here), memberAt("127.0.0.1:9001", "127.0.0.1:9001")})
			mark(upstream.Failing)(c)
		}, tunnel.Open},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			clusters := clustersOf(t, config.Cluster{Name: "web", Endpoints: endpointsOf(here)})
			p := provenance{cluster: tt.cluster, endpoint: tt.endpoint, address: netip.MustParseAddrPort(tt.endpoint), endpointPolicy: tt.policy}
			o := newOrigin(&p, routeTunnels{}, clusters.Tunnels(tt.cluster, p.endpoint, p.address))
			web, _ := clusters.Get("web")
			tt.happens(web)
			if got := verdict(clusters, o); got != tt.want {
				t.Errorf("the verdict is %q, want %q", got, tt.want)
			}
		})
	}
}

// One endpoint of ten after the other is replaced, with thousands of tunnels: those of the
// others live on, and those of the one that left are closed if that is wanted.
func TestARollingDeployClosesNoTunnelOfAnEndpointThatIsThere(t *testing.T) {
	t.Parallel()
	for _, closes := range []bool{true, false} {
		t.Run(fmt.Sprint("closes: ", closes), func(t *testing.T) {
			t.Parallel()
			rollingDeploy(t, closes)
		})
	}
}

func rollingDeploy(t *testing.T, closes bool) {
	const endpoints, each = 10, 50 // with a socket pair at each end
	const spread = 300 * time.Millisecond
	var all []upstream.Member
	for i := range endpoints {
		a := fmt.Sprintf("127.0.0.%d:9000", i+1)
		all = append(all, memberAt(a, a))
	}
	clusters := clustersOf(t, config.Cluster{Name: "web"})
	web, _ := clusters.Get("web")
	web.SetMembers(all)

	ended := make(chan tunnel.Record, 2*endpoints*each)
	loops, err := newLoops(2, 256<<10, nil)
	if err != nil {
		t.Fatal(err)
	}
	loops.run()
	set := tunnel.NewSet(tunnel.Options{
		OnEnd: func(r tunnel.Record) { r.Owner.(*tunnelOwner).count(-1); ended <- r }, Loops: loops.all,
		Verdict: tunnel.Verdict{Of: func(o *tunnel.Origin) tunnel.Reason { return verdict(clusters, o) }, Over: spread},
	})
	g := &generation{tunnels: set}
	clusters.Watch(g.endpointChanged)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer := func() net.Conn {
		far, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		near, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go func() { // it closes when the tunnel does
			defer far.Close()
			for b := make([]byte, 16); ; {
				if _, err := far.Read(b); err != nil {
					return
				}
			}
		}()
		return near
	}
	begin := func(m upstream.Member) {
		p := provenance{cluster: "web", endpoint: m.Address, address: m.At.Addr, endpointPolicy: endpointPolicy{closeLeft: closes}}
		o := newOrigin(&p, routeTunnels{}, clusters.Tunnels(p.cluster, p.endpoint, p.address))
		o.Owner.(*tunnelOwner).count(1)
		set.Start(tunnel.Spec{Down: peer(), Up: peer(), Origin: o})
	}
	for _, m := range all {
		for range each {
			begin(m)
		}
	}
	for i, gone := range all {
		others := append(append([]upstream.Member(nil), all[:i]...), all[i+1:]...)
		at := time.Now()
		web.SetMembers(others)
		if !closes {
			web.SetMembers(all)
			continue
		}
		var last time.Duration
		for n := range each {
			select {
			case r := <-ended:
				if r.Endpoint != gone.Address || r.Reason != tunnel.EndpointRemoved {
					t.Fatalf("a tunnel of %s ended when %s left: %s", r.Endpoint, gone.Address, r.Reason)
				}
				last = max(last, r.Ended.Sub(at))
			case <-time.After(time.Minute):
				t.Fatalf("%d of %d tunnels ended that %s had", n, each, gone.Address)
			}
		}
		if last < spread/2 {
			t.Errorf("all tunnels were closed within %v, want it to take about %v", last, spread)
		}
		web.SetMembers(all)
		for range each {
			begin(gone) // their clients come back when it is there again
		}
	}
	if n, _ := set.Summary(); n != endpoints*each || len(ended) > 0 {
		t.Errorf("%d tunnels are left, want %d; %d more have ended", n, endpoints*each, len(ended))
	}
	set.CloseAll(tunnel.Stopped, 0)
	select {
	case <-set.Empty():
	case <-time.After(time.Minute):
		t.Fatal("tunnels are left although all were closed")
	}
	clusters.Close()
	if err := loops.stop(); err != nil {
		t.Error(err)
	}
}
