package routecheck

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/config"
	"holdfast/internal/control"
)

// verdict is what has become of a test.
type verdict struct {
	Name  string   `json:"name"`
	Met   bool     `json:"met"`
	Unmet []string `json:"unmet,omitempty"` // what came instead
}

// test tries the expectations of a file.
func (c *checker) test(q *control.RouteQuestion) *control.RouteAnswer {
	tests, err := config.ParseRouteTests(q.Path, q.Tests)
	if err != nil {
		return &control.RouteAnswer{Wrong: strings.Split(err.Error(), "\n")}
	}
	a := new(control.RouteAnswer)
	var verdicts []verdict
	for i := range tests {
		t := &tests[i]
		f, err := c.ask(t)
		if err != nil {
			a.Wrong = append(a.Wrong, fmt.Sprintf("%s: tests[%d]: %v", q.Path, i, err))
			continue
		}
		unmet := f.unmet(&t.Expect)
		if len(unmet) > 0 {
			a.Unmet++
		}
		verdicts = append(verdicts, verdict{t.Name, len(unmet) == 0, unmet})
	}
	switch {
	case a.Wrong != nil:
		return &control.RouteAnswer{Wrong: a.Wrong}
	case q.JSON:
		a.Text = encode(verdicts)
	default:
		a.Text = report(verdicts, a.Unmet)
	}
	return a
}

func report(verdicts []verdict, unmet int) string {
	var b strings.Builder
	for _, v := range verdicts {
		if v.Met {
			continue
		}
		fmt.Fprintf(&b, "%s\n", v.Name)
		for _, u := range v.Unmet {
			fmt.Fprintf(&b, "  %s\n", u)
		}
	}
	fmt.Fprintf(&b, "%d of %d requests get what is expected\n", len(verdicts)-unmet, len(verdicts))
	return b.String()
}

// unmet says what is not as it is expected.
func (f *finding) unmet(x *config.Expectation) (unmet []string) {
	must := func(what, got string, want ...string) {
		if got == "" {
			got = "none"
		}
		text := fmt.Sprintf("%s: %s, expected %s", what, got, strings.Join(want, " or "))
		if len(want) > 0 && want[0] != "" && !slices.Contains(want, got) && !slices.Contains(unmet, text) {
			unmet = append(unmet, text)
		}
	}
	must("virtual host", f.VirtualHost, x.VirtualHost)
	for _, o := range f.Outcomes {
		if o.Share == 0 {
			continue
		}
		must("route", o.Route, x.Routes...)
		for _, c := range o.Clusters {
			if c.Share > 0 {
				must("cluster", c.Cluster, x.Clusters...)
			}
		}
		if len(o.Clusters) == 0 {
			must("cluster", "", x.Clusters...)
		}
		host := o.Host
		if host == "" && o.Target != "" {
			host = "that of the endpoint"
		}
		must("target", o.Target, x.Target)
		must("host", host, x.Host)
		must("redirect", o.Location, x.Redirect)
		status, want := "", ""
		if o.Status != 0 {
			status = strconv.Itoa(o.Status)
		}
		if x.Status != 0 {
			want = strconv.Itoa(x.Status)
		}
		must("status", status, want)
		for _, name := range x.Filters {
			if !slices.ContainsFunc(o.Filters, func(p passed) bool { return p.Name == name }) {
				must("filters", o.filterNames(), "also "+name)
			}
		}
		must("hash", o.Hash, x.Hash)
		mirror := ""
		if o.Mirror != nil {
			mirror = o.Mirror.Cluster
		}
		must("mirror", mirror, x.Mirror)
	}
	return unmet
}

func (o *outcome) filterNames() string {
	names := make([]string, len(o.Filters))
	for i := range o.Filters {
		names[i] = o.Filters[i].Name
	}
	return strings.Join(names, ", ")
}
