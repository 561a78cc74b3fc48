package cli_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"holdfast/internal/admin/admintest"
	"holdfast/internal/cli"
	"holdfast/internal/control"
	"holdfast/internal/supervisor"
)

func TestClusters(t *testing.T) {
	t.Parallel()
	rate := 98.25
	all := &supervisor.Clusters{
		Generations: []int{3, 2},
		Warnings:    []string{"generation 1 does not say what it knows"},
		More:        4,
		Clusters: []supervisor.Cluster{
			{
				Name: "app", Policy: "least_connections", Generations: []int{3, 2},
				Breakers: []supervisor.Breaker{{Priority: "default", Limits: []supervisor.BreakerLimit{
					{Limit: "requests", Used: 7},
					{Limit: "tunnels", Most: 1000, Used: 1000, Open: true, Overflows: 12},
				}}},
				Endpoints: []supervisor.Endpoint{
					{EndpointState: control.EndpointState{
						Address: "10.0.0.1:80", Name: "10.0.0.1:80", At: netip.MustParseAddrPort("10.0.0.1:80"), Weight: 2, Healthy: true,
						Requests: 1, Tunnels: 1500, Connects: 4, ConnectSum: 0.0101, SuccessRate: &rate,
					}, Generations: []supervisor.EndpointHeld{held(3, 1, 500), held(2, 0, 1000)}},
					{EndpointState: control.EndpointState{
						Address: "app.internal:80", Name: "10.0.0.2:80", Weight: 1, Priority: 1, Conditions: []string{"failing", "ejected"},
						Reason: "the answer was 503", ConnectFails: 3, Ejections: 2, EjectedUntil: time.Now().Add(100*time.Minute + 30*time.Second),
					}, Generations: []supervisor.EndpointHeld{held(3, 0, 0)}},
				},
			},
			{Name: "old", Generations: []int{2}, TLS: &control.TLSState{
				Unverified: true, Expires: time.Now().Add(50*time.Hour + 30*time.Minute), Problem: "open /etc/ca.pem: permission denied",
				Failure: &control.TLSFailure{At: time.Now().Add(-5*time.Hour - 30*time.Minute - 30*time.Second), Endpoint: "10.0.0.3:443", Error: "TLS error: its certificate is not for old.internal"},
			}},
		},
	}
	for name, test := range map[string]struct {
		shown          *supervisor.Clusters
		err            error
		code           int
		stdout, stderr string
	}{
		"nothing":      {&supervisor.Clusters{}, nil, 0, "there are no clusters\n", ""},
		"nobody knows": {nil, errors.New("no generation says"), 1, "", "holdfast: nothing can be shown: no generation says\n"},
		"all that there can be": {all, nil, 0, `app (least_connections)
  requests, default priority: 7, no limit
  tunnels, default priority: 1,000 of 1,000, open: nothing more is let through, 12 refused
  ENDPOINT                     HEALTH           PRIO  WEIGHT  REQUESTS  TUNNELS  CONNECT  FAILED
  10.0.0.1:80                  healthy             0       2         1    1,500    2.5ms       0
    98.2 % of requests succeeded
    generation 3: 1 request, 500 tunnels; generation 2: 0 requests, 1,000 tunnels
  10.0.0.2:80 app.internal:80  failing,ejected     1       1         0        0        -       3
    the answer was 503
    ejected for another 1h 40m, the 2. time in a row

old, in generation 2 only
  TLS, who an endpoint is is not verified, its own certificate expires in 2d 2h
  its files are of no use: open /etc/ca.pem: permission denied
  last handshake that failed, 5h 30m ago: 10.0.0.3:443: TLS error: its certificate is not for old.internal
  it has no endpoint

4 more
`, "holdfast: generation 1 does not say what it knows\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := serve(t, &admintest.Supervisor{OnShow: func(string) (*supervisor.Clusters, error) { return test.shown, test.err }})
			execute(&cli.Program{}, "clusters --runtime-dir "+dir).want(t, test.code, test.stdout, test.stderr)
		})
	}
}

func TestOneClusterIsAskedForByItsName(t *testing.T) {
	t.Parallel()
	dir, _ := serve(t, &admintest.Supervisor{OnShow: func(name string) (*supervisor.Clusters, error) {
		all := &supervisor.Clusters{Generations: []int{1}, Clusters: []supervisor.Cluster{}}
		if name == "app" {
			all.Clusters = append(all.Clusters, supervisor.Cluster{Name: name, Generations: []int{1}})
		}
		return all, nil
	}})
	execute(&cli.Program{}, "clusters app --runtime-dir "+dir).want(t, 0, "app\n  it has no endpoint\n", "")
	execute(&cli.Program{}, "clusters apq --runtime-dir "+dir).want(t, 1, "", "holdfast: nothing can be shown: no generation has a cluster \"apq\"\n")
}

func TestTheTableOfClustersFitsAHundredColumns(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 300)
	e := control.EndpointState{
		Address: long, Name: long, Conditions: []string{"unchecked", "failing", "ejected", "left"}, Reason: long,
		Priority: 9, Weight: 1000, Requests: 99999, Tunnels: 999999, Connects: 1, ConnectSum: 9.9999, ConnectFails: 99999,
	}
	shown := &supervisor.Clusters{Generations: []int{1}, Clusters: []supervisor.Cluster{{Name: long, Policy: long, Generations: []int{2}, Endpoints: []supervisor.Endpoint{{EndpointState: e}}}}}
	dir, _ := serve(t, &admintest.Supervisor{OnShow: func(string) (*supervisor.Clusters, error) { return shown, nil }})
	got := execute(&cli.Program{}, "clusters --runtime-dir "+dir)
	for line := range strings.Lines(got.stdout) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 100 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

func held(generation int, requests, tunnels int64) supervisor.EndpointHeld {
	return supervisor.EndpointHeld{Generation: generation, Requests: requests, Tunnels: tunnels}
}
