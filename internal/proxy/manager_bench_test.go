package proxy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"holdfast/internal/config"
	"holdfast/internal/stream/streamtest"
	"holdfast/internal/task"
)

// BenchmarkRequest is what the manager, with all but the codecs and the kernel, costs a
// request: with one route, behind many, and with filters that have nothing to do. Filters that
// do something are there for comparison.
func BenchmarkRequest(b *testing.B) {
	route := to("/", "web")
	inert, passed := route, route
	inert.Filters = &config.Filters{ // each kind that an operator can switch off and leave there
		Deny:            networks("198.51.100.0/24"),
		TunnelRateLimit: &config.RateLimit{Requests: config.Dynamic{Value: 1}, Per: time.Second, Burst: 1},
		Fault: &config.Fault{Delay: config.FaultDelay{Percent: config.Dynamic{Key: "delay"}, Duration: time.Second},
			Abort: config.FaultAbort{Percent: config.Dynamic{Key: "abort"}, Status: 503}, MaxActive: config.Dynamic{Value: 1}},
	}
	passed.Filters = &config.Filters{
		Allow: networks("0.0.0.0/0", "::/0"), Deny: networks("198.51.100.0/24"),
		RateLimit: &config.RateLimit{Requests: config.Dynamic{Value: config.MaxRate}, Per: time.Second, Burst: config.MaxRate, ByClient: true},
		Fault:     &config.Fault{Headers: []config.FaultHeader{{Name: "X-Fault"}}},
	}
	elsewhere := passed
	elsewhere.Match.Prefix = "/elsewhere"
	one := []string{"a.example"}
	tests := []struct {
		name    string
		hosts   []config.VirtualHost
		targets []string
	}{
		{"one_route", hostsOf(one, route), []string{"/"}},
		{"10000x10_routes", hostsOf(tenThousand(), tenRoutes()...), []string{"/0/", "/1/", "/2/", "/3/", "/4/", "/5/", "/6/", "/7/", "/8/", "/9/"}},
		{"filters_elsewhere", hostsOf(one, elsewhere, route), []string{"/"}},
		{"filters_disabled", hostsOf(one, inert), []string{"/"}},
		{"filters_passed", hostsOf(one, passed), []string{"/"}},
	}
	for _, tt := range tests {
		b.Run(tt.name, func(b *testing.B) {
			l := streamtest.New(b)
			p := newPlain(l)
			m := p.managerOf(b, &config.Config{
				HTTPListeners: []config.Listener{{Name: "public", TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}},
				VirtualHosts:  tt.hosts, Clusters: oneCluster,
			})
			serve := func(t *task.Task, host int, target string) {
				p.template.Authority, p.template.Target = tt.hosts[host].Domains[0], target
				p.renew()
				m.Serve(t, p)
			}
			b.ReportAllocs()
			streamtest.Go(l, func(t *task.Task) {
				for host := range tt.hosts { // what is made for the first request of a route is not counted
					for _, target := range tt.targets {
						serve(t, host, target)
					}
				}
				for b.Loop() {
					n := rand.Uint32()
					serve(t, int(n>>8)%len(tt.hosts), tt.targets[int(n&0xff)%len(tt.targets)])
				}
			})
		})
	}
}

// hostsOf are virtual hosts of these domains, each with the same routes.
func hostsOf(domains []string, routes ...config.Route) (hosts []config.VirtualHost) {
	for _, d := range domains {
		hosts = append(hosts, config.VirtualHost{Name: d, Listeners: []string{"public"}, Domains: []string{d}, Routes: routes})
	}
	return hosts
}

func tenThousand() (domains []string) {
	for i := range 10_000 {
		domains = append(domains, fmt.Sprintf("h%d.example", i))
	}
	return domains
}

func tenRoutes() (routes []config.Route) {
	for i := range 10 {
		routes = append(routes, to(fmt.Sprintf("/%d/", i), "web"))
	}
	return routes
}
