package proxy

import (
	"fmt"
	"testing"

	"holdfast/internal/config"
	"holdfast/internal/metrics"
	"holdfast/internal/route"
)

// manyRoutes is a table of so many routes for WebSocket.
func manyRoutes(n int) []*route.Route {
	vh := config.VirtualHost{Name: "site-of-a-usual-name", Listeners: []string{"public"}, Domains: []string{"*"}}
	for i := range n {
		vh.Routes = append(vh.Routes, config.Route{Match: config.Match{Path: fmt.Sprintf("/a/usual/path/of/some/length/%d", i)}, WebSocket: true})
	}
	return route.New(&config.Config{VirtualHosts: []config.VirtualHost{vh}}, nil).Routes()
}

// of returns how many series a metric has, and the value of one.
func seriesOf(r *metrics.Registry, name string, labels ...string) (n int, value int64) {
	for _, f := range r.Families() {
		if f.Desc.Name != name {
			continue
		}
		for _, s := range f.Series {
			if fmt.Sprint(s.Labels) == fmt.Sprint(labels) {
				value = s.Value
			}
		}
		n = len(f.Series)
	}
	return n, value
}

func TestWhereRoutesAreManyTheirFiguresComeWithTheirRequests(t *testing.T) {
	t.Parallel()
	file, r, err := metrics.NewOwnFile()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	routes := manyRoutes(mostCounted + 10)
	c := newCountedRoutes(r, routes)
	if n, _ := seriesOf(r, "holdfast_route_requests_total"); n != 0 {
		t.Errorf("%d series are there before any request", n)
	}
	last := routes[len(routes)-1]
	c.of(last).requests.Inc()
	c.of(last).requests.Inc()
	if n, value := seriesOf(r, "holdfast_route_requests_total", last.VirtualHost, last.Name); n != 1 || value != 2 {
		t.Errorf("after two requests of one route %d series are there, its own has %d", n, value)
	}
	for _, r := range routes {
		c.of(r).requests.Inc()
	}
	if n, value := seriesOf(r, "holdfast_route_requests_total", "*", "*"); n != mostCounted+1 || value != 10 {
		t.Errorf("%d series are there, and that of all others has %d", n, value)
	}
	if _, unshown := seriesOf(r, metrics.UnshownSeries); unshown != 0 {
		t.Errorf("the memory file has no room for %d series", unshown)
	}
}

func TestWhereRoutesAreFewTheirFiguresAreThereFromTheStart(t *testing.T) {
	t.Parallel()
	r := metrics.NewRegistry()
	newCountedRoutes(r, manyRoutes(mostAtStart))
	if n, _ := seriesOf(r, "holdfast_route_requests_total"); n != mostAtStart {
		t.Errorf("%d series", n)
	}
}
