package proxy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/accesslog"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/http1"
	"holdfast/internal/metrics"
	"holdfast/internal/proxy"
	"holdfast/internal/upstream"
)

// figures are all values of a registry that are not 0, by name and labels without
// "holdfast_", of histograms the number of values.
func figures(r *metrics.Registry) map[string]int64 { return figuresOf(r.Families()) }

func figuresOf(families []metrics.Family) map[string]int64 {
	all := map[string]int64{}
	for _, f := range families {
		if f.Desc.Name == "holdfast_cluster_endpoints_healthy" {
			continue // it is that of cluster_endpoints where nothing is wrong
		}
		for _, s := range f.Series {
			v := s.Value
			for _, n := range s.Buckets {
				v += int64(n)
			}
			if v == 0 {
				continue
			}
			name := strings.TrimPrefix(f.Desc.Name, "holdfast_")
			if len(s.Labels) > 0 {
				name += "{" + strings.Join(s.Labels, ",") + "}"
			}
			all[name] = v
		}
	}
	return all
}

// sums are those of the histograms of seconds that are not 0, in seconds: exact where the
// clock is the test's.
func sums(r *metrics.Registry) map[string]string {
	all := map[string]string{}
	for _, f := range r.Families() {
		for _, s := range f.Series {
			if s.Sum != 0 {
				all[strings.TrimPrefix(f.Desc.Name, "holdfast_")+"{"+strings.Join(s.Labels, ",")+"}"] = fmt.Sprint(time.Duration(s.Sum))
			}
		}
	}
	return all
}

// wantFigures compares all figures with lines of "name{labels} value". Those that
// begin with one of ignored are left out.
func wantFigures[V any](t *testing.T, got map[string]V, want string, ignored ...string) {
	t.Helper()
	var all []string
	for name, v := range got {
		if !slices.ContainsFunc(ignored, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			all = append(all, fmt.Sprint(name, " ", v))
		}
	}
	var wanted []string
	for line := range strings.Lines(want) {
		if line = strings.TrimSpace(line); line != "" {
			wanted = append(wanted, line)
		}
	}
	slices.Sort(all)
	slices.Sort(wanted)
	if !slices.Equal(all, wanted) {
		t.Errorf("counted\n  %s\nwant\n  %s", strings.Join(all, "\n  "), strings.Join(wanted, "\n  "))
	}
}

// eventually waits for what nobody signals.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// records is an access log in a file.
type records struct {
	path string
	log  *accesslog.Log
}

func (r *records) open(t *testing.T, m *metrics.Registry) *accesslog.Log {
	t.Helper()
	r.path = filepath.Join(t.TempDir(), "access.log")
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	r.log = accesslog.New([]accesslog.Output{{Path: r.path, Format: "json", File: f}}, 7, m)
	t.Cleanup(func() { r.log.Close(bound) })
	return r.log
}

// read ends the log and returns what was recorded.
func (r *records) read(t *testing.T) (all []map[string]any) {
	t.Helper()
	r.log.Close(bound)
	data, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		one := map[string]any{}
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, one)
	}
	return all
}

// wantRecord compares some of the keys of a record.
func wantRecord(t *testing.T, got map[string]any, want map[string]any) {
	t.Helper()
	for _, key := range slices.Sorted(maps.Keys(want)) {
		if fmt.Sprint(got[key]) != fmt.Sprint(want[key]) {
			t.Errorf("%s is %v, want %v, in\n%v", key, got[key], want[key], got)
		}
	}
}

// One of each way that a request can end, with everything that it leaves behind.
func TestARequestIsCountedAndRecordedHoweverItEnds(t *testing.T) {
	t.Parallel()
	const listened = "downstream_requests_total{public} 1\n"
	const connected = `
		cluster_endpoints{web} 1
		cluster_connections_total{web} 1
		cluster_connect_duration_seconds{web} 1
		endpoint_connections_total{web,10.0.0.1:80} 1
	`
	const open = `
		cluster_connections_active{web} 1
		endpoint_connections_active{web,10.0.0.1:80} 1
	`
	const called = connected + `
		cluster_requests_total{web} 1
		endpoint_requests_total{web,10.0.0.1:80} 1
	`
	const taken = called + "cluster_connection_duration_seconds{web} 1\n"
	const closed = taken + "cluster_connections_closed_total{web,holdfast} 1\n"
	routed := listened + "route_requests_total{site,site:prefix=/} 1\n"
	answered := func(class string) string {
		return routed +
			"downstream_responses_total{public," + class + "} 1\n" +
			"downstream_request_duration_seconds{public} 1\n" +
			"route_responses_total{site,site:prefix=/," + class + "} 1\n" +
			"route_request_duration_seconds{site,site:prefix=/} 1\n"
	}
	limits := config.Route{Timeout: time.Second, StreamIdleTimeout: 5 * time.Second}
	limits.Tunnels.HandshakeTimeout = time.Second
	streaming := func(o *origin) {
		o.reads()
		o.answers(200)
		o.writes("part")
	}
	redirects := func(r *config.Route) {
		r.Clusters, r.Redirect = nil, &config.Redirect{Scheme: "https", Status: 301}
	}
	const redirected = `
		cluster_endpoints{web} 1
		route_redirects_total{site,site:prefix=/} 1
		downstream_responses_total{public,3xx} 1
		route_responses_total{site,site:prefix=/,3xx} 1
	`
	cutShort := fmt.Errorf("%w: %w", io.ErrUnexpectedEOF, &exchange.StatusError{Status: 502, Text: "the connection ended within a response"})
	tests := []struct {
		name      string
		client    func(*testing.T) *client
		behave    func(*origin)
		connect   func(context.Context) error
		during    func(*client) // once everything has come to a standstill
		route     func(*config.Route)
		endpoints []upstream.Member // of the cluster, in place of those of the configuration
		figures   string
		took      string // sums of durations
		record    map[string]any
	}{
		{
			name:   "a request that is answered",
			client: func(t *testing.T) *client { return get(t, "a.example", "//x/./?y") },
			behave: func(o *origin) {
				time.Sleep(250 * time.Millisecond)
				o.answers(200)
				time.Sleep(250 * time.Millisecond)
				o.writes("ok")
				o.ends()
			},
			figures: answered("2xx") + called + open + `
				cluster_responses_total{web,2xx} 1
				cluster_request_duration_seconds{web} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 500ms
				route_request_duration_seconds{site,site:prefix=/} 500ms
				cluster_request_duration_seconds{web} 500ms
			`,
			record: map[string]any{"event": "request", "status": 200, "reason": "", "sent_bytes": 2, "received_bytes": 0, "target": "//x/./?y",
				"method": "GET", "protocol": "HTTP/1.1", "listener": "public", "virtual_host": "site", "route": "site:prefix=/",
				"cluster": "web", "endpoint": first, "client": "192.0.2.1:4711", "generation": 7, "upstream_seconds": 0.25, "duration_seconds": 0.5},
		},
		{
			name: "a body that is uploaded",
			client: func(t *testing.T) *client {
				c := post(t, "a.example", "/")
				go func() { c.send.Write([]byte("twelve bytes")); c.send.Close() }()
				return c
			},
			behave: answering(500),
			figures: answered("5xx") + called + open + `
				cluster_responses_total{web,5xx} 1
				cluster_request_duration_seconds{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
			`,
			record: map[string]any{"status": 500, "reason": "", "sent_bytes": len("answer 500"), "received_bytes": 12},
		},
		{
			name:   "an answer before the end of the request",
			client: func(t *testing.T) *client { return post(t, "a.example", "/") },
			behave: func(o *origin) { o.answers(413); o.ends() },
			figures: answered("4xx") + closed + `
				downstream_responses_early_total{public} 1
				cluster_responses_total{web,4xx} 1
				cluster_request_duration_seconds{web} 1
			`,
			record: map[string]any{"status": 413, "reason": ""},
		},
		{
			name:   "a request without a route",
			client: func(t *testing.T) *client { return get(t, "c.example", "/") },
			figures: listened + `
				cluster_endpoints{web} 1
				downstream_responses_total{public,4xx} 1
				downstream_request_duration_seconds{public} 1
				downstream_requests_refused_total{public,no route} 1
			`,
			record: map[string]any{"status": 404, "reason": "no virtual host", "route": "", "cluster": "", "sent_bytes": len("404 Not Found\n")},
		},
		{
			name:   "a path that has no normal form",
			client: func(t *testing.T) *client { return get(t, "a.example", "/%zz/../a?b") },
			figures: listened + `
				cluster_endpoints{web} 1
				downstream_responses_total{public,4xx} 1
				downstream_request_duration_seconds{public} 1
				downstream_requests_refused_total{public,path} 1
			`,
			record: map[string]any{"status": 400, "reason": "a path with a \"%\" without two hexadecimal digits", "route": "", "target": "/%zz/../a?b"},
		},
		{
			name: "an answer of our own that the client does not take",
			client: func(t *testing.T) *client {
				c := get(t, "c.example", "/")
				c.deaf = true
				return c
			},
			figures: listened + `
				cluster_endpoints{web} 1
				downstream_responses_total{public,4xx} 1
				downstream_requests_refused_total{public,no route} 1
				downstream_requests_cut_total{public,holdfast} 1
			`,
			record: map[string]any{"status": 404, "sent_bytes": 0, "reason": "no virtual host", "duration_seconds": 10},
		},
		{
			name: "an answer of our own whose client leaves",
			client: func(t *testing.T) *client {
				c := get(t, "c.example", "/")
				c.deaf = true
				return c
			},
			during: func(c *client) { c.cancel(errGone) },
			figures: listened + `
				cluster_endpoints{web} 1
				downstream_responses_total{public,4xx} 1
				downstream_requests_refused_total{public,no route} 1
				downstream_requests_cut_total{public,downstream} 1
			`,
			record: map[string]any{"status": 404, "sent_bytes": 0, "reason": "no virtual host"},
		},
		{
			name: "a redirect whose client leaves",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/")
				c.brittle = true
				return c
			},
			route: redirects,
			figures: routed + redirected + `
				downstream_requests_cut_total{public,downstream} 1
			`,
			record: map[string]any{"status": 301, "sent_bytes": 0, "reason": "the client has gone"},
		},
		{
			name: "a redirect that the client does not take",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/")
				c.deaf = true
				return c
			},
			route: redirects,
			figures: routed + redirected + `
				downstream_requests_cut_total{public,holdfast} 1
			`,
			record: map[string]any{"status": 301, "sent_bytes": 0, "reason": "the client did not take the answer in time"},
		},
		{
			name: "a redirect that is cut by the stop",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/")
				c.deaf = true
				return c
			},
			during: func(c *client) { c.cancel(net.ErrClosed) },
			route:  redirects,
			figures: routed + redirected + `
				downstream_requests_cut_total{public,holdfast} 1
			`,
			record: map[string]any{"status": 301, "sent_bytes": 0, "reason": "cut when the time of the drain or the stop was over"},
		},
		{
			name:   "a redirect",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			route:  redirects,
			figures: answered("3xx") + `
				cluster_endpoints{web} 1
				route_redirects_total{site,site:prefix=/} 1
			`,
			record: map[string]any{"status": 301, "reason": "", "cluster": ""},
		},
		{
			name:    "an endpoint that refuses connections",
			client:  func(t *testing.T) *client { return get(t, "a.example", "/") },
			connect: func(context.Context) error { return errors.New("connection refused") },
			figures: answered("5xx") + `
				cluster_endpoints{web} 1
				cluster_connect_failures_total{web} 1
				cluster_connect_attempts_exhausted_total{web} 1
				endpoint_connect_failures_total{web,10.0.0.1:80} 1
				downstream_requests_refused_total{public,upstream unreachable} 1
			`,
			record: map[string]any{"status": 503, "endpoint": first},
		},
		{
			name:    "an endpoint that never answers to a connection",
			client:  func(t *testing.T) *client { return get(t, "a.example", "/") },
			connect: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
			route:   func(r *config.Route) { r.Timeout = time.Hour },
			figures: answered("5xx") + `
				cluster_endpoints{web} 1
				cluster_connect_failures_total{web} 1
				cluster_connect_timeouts_total{web} 1
				cluster_connect_attempts_exhausted_total{web} 1
				endpoint_connect_failures_total{web,10.0.0.1:80} 1
				downstream_requests_refused_total{public,upstream too slow} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 2s
				route_request_duration_seconds{site,site:prefix=/} 2s
			`,
			record: map[string]any{"status": 504},
		},
		{
			name:   "a cluster that is not there",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			route:  func(r *config.Route) { r.Clusters = to("/", "none").Clusters },
			figures: answered("5xx") + `
				cluster_endpoints{web} 1
				downstream_requests_refused_total{public,upstream unreachable} 1
			`,
			record: map[string]any{"status": 503, "cluster": "none", "endpoint": ""},
		},
		{
			name:      "a cluster without an endpoint",
			client:    func(t *testing.T) *client { return get(t, "a.example", "/") },
			endpoints: []upstream.Member{},
			figures: answered("5xx") + `
				cluster_none_healthy_total{web} 1
				downstream_requests_refused_total{public,upstream unreachable} 1
			`,
			record: map[string]any{"status": 503, "endpoint": ""},
		},
		{
			name:   "an endpoint that does not answer in time",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: silent,
			figures: answered("5xx") + closed + `
				cluster_timeouts_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				route_timeouts_total{site,site:prefix=/} 1
				downstream_requests_refused_total{public,upstream too slow} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 1s
				route_request_duration_seconds{site,site:prefix=/} 1s
				cluster_connection_duration_seconds{web} 1s
			`,
			record: map[string]any{"status": 504, "reason": "no response within the route's timeout", "duration_seconds": 1},
		},
		{
			name:    "an endpoint that takes its time to be connected to, and does not answer",
			client:  func(t *testing.T) *client { return get(t, "a.example", "/") },
			connect: func(context.Context) error { time.Sleep(250 * time.Millisecond); return nil },
			behave:  silent,
			figures: answered("5xx") + closed + `
				cluster_timeouts_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				route_timeouts_total{site,site:prefix=/} 1
				downstream_requests_refused_total{public,upstream too slow} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 1s
				route_request_duration_seconds{site,site:prefix=/} 1s
				cluster_connect_duration_seconds{web} 250ms
				cluster_connection_duration_seconds{web} 750ms
			`,
			record: map[string]any{"status": 504, "duration_seconds": 1},
		},
		{
			name:   "an endpoint that says nothing, and no timeout but the idle one",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: silent,
			route:  func(r *config.Route) { r.Timeout = 0 },
			figures: answered("5xx") + closed + `
				cluster_timeouts_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				route_stream_idle_timeouts_total{site,site:prefix=/} 1
				downstream_requests_refused_total{public,upstream too slow} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 5s
				route_request_duration_seconds{site,site:prefix=/} 5s
				cluster_connection_duration_seconds{web} 5s
			`,
			record: map[string]any{"status": 504, "reason": "no byte moved within the route's stream_idle_timeout"},
		},
		{
			name:   "a client whose body does not come",
			client: func(t *testing.T) *client { return post(t, "a.example", "/") },
			behave: silent,
			figures: answered("4xx") + closed + `
				cluster_cancelled_total{web} 1
				route_stream_idle_timeouts_total{site,site:prefix=/} 1
				downstream_requests_refused_total{public,too slow} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 5s
				route_request_duration_seconds{site,site:prefix=/} 5s
				cluster_connection_duration_seconds{web} 5s
			`,
			record: map[string]any{"status": 408, "reason": "no byte moved within the route's stream_idle_timeout, the client's body was due"},
		},
		{
			name:   "an endpoint that closes the connection instead of answering",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: failing(fmt.Errorf("%w: EOF", exchange.ErrNoAnswer)),
			figures: answered("5xx") + closed + `
				cluster_resets_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				downstream_requests_refused_total{public,upstream closed} 1
			`,
			record: map[string]any{"status": 503},
		},
		{
			name:   "an endpoint that closes the connection within its head",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: failing(cutShort),
			figures: answered("5xx") + closed + `
				cluster_resets_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				downstream_requests_refused_total{public,upstream closed} 1
			`,
			record: map[string]any{"status": 502},
		},
		{
			name:   "an endpoint that answers with a 101 that nobody asked for",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: agrees,
			figures: answered("5xx") + closed + `
				cluster_responses_total{web,1xx} 1
				cluster_protocol_errors_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				downstream_requests_refused_total{public,upstream invalid} 1
			`,
			record: map[string]any{"status": 502},
		},
		{
			name:   "an endpoint that answers nonsense",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: failing(&exchange.StatusError{Status: 502, Text: "upstream: nonsense"}),
			figures: answered("5xx") + closed + `
				cluster_protocol_errors_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
				downstream_requests_refused_total{public,upstream invalid} 1
			`,
			record: map[string]any{"status": 502, "reason": "upstream: nonsense"},
		},
		{
			name:   "an endpoint that breaks off its answer",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: func(o *origin) {
				streaming(o)
				o.respond.CloseWithError(cutShort)
			},
			figures: routed + closed + `
				downstream_responses_total{public,2xx} 1
				route_responses_total{site,site:prefix=/,2xx} 1
				downstream_requests_cut_total{public,holdfast} 1
				cluster_responses_total{web,2xx} 1
				cluster_resets_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
			`,
			record: map[string]any{"status": 200, "sent_bytes": 4, "reason": cutShort.Error()},
		},
		{
			name:   "an endpoint that does not go on with its answer",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: streaming,
			figures: routed + closed + `
				downstream_responses_total{public,2xx} 1
				route_responses_total{site,site:prefix=/,2xx} 1
				route_stream_idle_timeouts_total{site,site:prefix=/} 1
				downstream_requests_cut_total{public,holdfast} 1
				cluster_responses_total{web,2xx} 1
				cluster_timeouts_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
			`,
			took:   "cluster_connection_duration_seconds{web} 5s",
			record: map[string]any{"status": 200, "reason": "no byte moved within the route's stream_idle_timeout"},
		},
		{
			name: "a client that does not read",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/")
				c.deaf = true
				return c
			},
			behave: streaming,
			figures: routed + closed + `
				downstream_responses_total{public,2xx} 1
				route_responses_total{site,site:prefix=/,2xx} 1
				route_stream_idle_timeouts_total{site,site:prefix=/} 1
				downstream_requests_cut_total{public,holdfast} 1
				cluster_responses_total{web,2xx} 1
				cluster_cancelled_total{web} 1
			`,
			took:   "cluster_connection_duration_seconds{web} 5s",
			record: map[string]any{"status": 200, "reason": "no byte moved within the route's stream_idle_timeout, the client takes no more"},
		},
		{
			name: "a client whose connection takes no more",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/")
				c.brittle = true
				return c
			},
			behave: streaming,
			figures: routed + closed + `
				downstream_responses_total{public,2xx} 1
				route_responses_total{site,site:prefix=/,2xx} 1
				downstream_requests_cut_total{public,downstream} 1
				cluster_responses_total{web,2xx} 1
				cluster_cancelled_total{web} 1
			`,
			record: map[string]any{"status": 200, "sent_bytes": 0, "reason": "the client has gone"},
		},
		{
			name: "a fault of ours",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/")
				c.panics = true
				return c
			},
			behave: func(o *origin) { o.heads <- "nothing that could be a head" },
			figures: routed + closed + `
				downstream_requests_cut_total{public,holdfast} 1
				cluster_cancelled_total{web} 1
			`,
			record: map[string]any{"status": 0, "reason": "a fault of ours, which is in the log"},
		},
		{
			name: "a fault of ours over a body",
			client: func(t *testing.T) *client {
				c := post(t, "a.example", "/")
				c.poisonous = true
				return c
			},
			behave: silent,
			figures: routed + closed + `
				downstream_requests_cut_total{public,holdfast} 1
				cluster_cancelled_total{web} 1
			`,
			record: map[string]any{"status": 0, "reason": "a fault of ours, which is in the log"},
		},
		{
			name:   "a client that leaves before the answer",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			behave: silent,
			during: func(c *client) { c.cancel(errGone) },
			figures: routed + closed + `
				downstream_requests_cut_total{public,downstream} 1
				cluster_cancelled_total{web} 1
			`,
			record: map[string]any{"status": 0, "reason": "the client has gone"},
		},
		{
			name: "a client whose body is malformed",
			client: func(t *testing.T) *client {
				c := post(t, "a.example", "/")
				c.send.CloseWithError(&exchange.StatusError{Status: 400, Text: "no chunk-size"})
				return c
			},
			behave: silent,
			figures: answered("4xx") + closed + `
				cluster_cancelled_total{web} 1
				downstream_requests_refused_total{public,malformed} 1
			`,
			record: map[string]any{"status": 400, "reason": "no chunk-size"},
		},
		{
			name:   "an upgrade on a route without WebSocket",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			figures: answered("4xx") + `
				cluster_endpoints{web} 1
				downstream_upgrades_total{public,not enabled} 1
				downstream_requests_refused_total{public,WebSocket not enabled} 1
			`,
			record: map[string]any{"event": "request", "status": 403},
		},
		{
			name: "an upgrade from a page that is not allowed",
			client: func(t *testing.T) *client {
				return upgrade(t, "a.example", "/").asks("Origin: https://b.example")
			},
			route: func(r *config.Route) { r.WebSocket, r.Origins = true, []string{"https://a.example"} },
			figures: answered("4xx") + `
				cluster_endpoints{web} 1
				downstream_upgrades_total{public,origin not allowed} 1
				downstream_requests_refused_total{public,origin not allowed} 1
			`,
			record: map[string]any{"status": 403, "reason": "the route's origins do not have the request's"},
		},
		{
			name:   "a field that names no cluster",
			client: func(t *testing.T) *client { return get(t, "a.example", "/").asks("X-Cluster: none") },
			route:  func(r *config.Route) { r.Clusters, r.ClusterHeader = nil, "X-Cluster" },
			figures: answered("4xx") + `
				cluster_endpoints{web} 1
				downstream_requests_refused_total{public,no cluster} 1
			`,
			record: map[string]any{"status": 404, "cluster": ""},
		},
		{
			name:   "a direct response",
			client: func(t *testing.T) *client { return get(t, "a.example", "/") },
			route: func(r *config.Route) {
				r.Clusters, r.Direct = nil, &config.DirectResponse{Status: 403, Body: "no"}
			},
			figures: answered("4xx") + `
				cluster_endpoints{web} 1
				route_direct_responses_total{site,site:prefix=/} 1
			`,
			record: map[string]any{"status": 403, "sent_bytes": 2, "reason": ""},
		},
		{
			name: "a browser's question",
			client: func(t *testing.T) *client {
				c := get(t, "a.example", "/").asks("Origin: https://a.example", "Access-Control-Request-Method: PUT")
				c.request.Method = "OPTIONS"
				return c
			},
			route: func(r *config.Route) { r.CORS = &config.CORS{AllowOrigins: []string{"https://a.example"}} },
			figures: answered("2xx") + `
				cluster_endpoints{web} 1
				route_cors_preflights_total{site,site:prefix=/} 1
			`,
			record: map[string]any{"status": 200, "sent_bytes": 0},
		},
		{
			name: "an upgrade with a body",
			client: func(t *testing.T) *client {
				c := upgrade(t, "a.example", "/")
				c.request.UpgradeBody = true
				return c
			},
			route: func(r *config.Route) { r.WebSocket = true },
			figures: answered("4xx") + `
				cluster_endpoints{web} 1
				downstream_upgrades_total{public,malformed} 1
				downstream_requests_refused_total{public,malformed} 1
			`,
			record: map[string]any{"status": 400},
		},
		{
			name:   "an upgrade that becomes a tunnel",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			behave: agrees,
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: routed + taken + `
				downstream_responses_total{public,1xx} 1
				downstream_upgrades_total{public,tunnel} 1
				route_responses_total{site,site:prefix=/,1xx} 1
				route_tunnels_total{site,site:prefix=/} 1
				route_tunnels_active{site,site:prefix=/} 1
				cluster_responses_total{web,1xx} 1
				cluster_tunnels_total{web} 1
				cluster_tunnels_active{web} 1
				endpoint_tunnels_active{web,10.0.0.1:80} 1
				tunnel_handshake_duration_seconds{public} 1
			`,
			record: map[string]any{"event": "tunnel_open", "status": 101, "reason": "", "route": "site:prefix=/", "cluster": "web", "endpoint": first},
		},
		{
			name: "an upgrade whose client goes before its 101",
			client: func(t *testing.T) *client {
				c := upgrade(t, "a.example", "/")
				c.unreachable = true
				return c
			},
			behave: agrees,
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: routed + closed + `
				downstream_upgrades_total{public,cancelled} 1
				downstream_requests_cut_total{public,downstream} 1
				cluster_responses_total{web,1xx} 1
				cluster_cancelled_total{web} 1
			`,
			record: map[string]any{"event": "request", "status": 0, "reason": "the client has gone"},
		},
		{
			name:   "an upgrade that is agreed to as its time is over",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			behave: func(o *origin) { o.pause = time.Minute; agrees(o) },
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: answered("5xx") + closed + `
				downstream_upgrades_total{public,upstream too slow} 1
				downstream_requests_refused_total{public,upstream too slow} 1
				route_timeouts_total{site,site:prefix=/} 1
				cluster_responses_total{web,1xx} 1
				cluster_timeouts_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 1m0s
				route_request_duration_seconds{site,site:prefix=/} 1m0s
				cluster_connection_duration_seconds{web} 1s
			`,
			record: map[string]any{"event": "request", "status": 504},
		},
		{
			name:   "an upgrade that the upstream refuses",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			behave: answering(401),
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: answered("4xx") + closed + `
				downstream_upgrades_total{public,rejected} 1
				cluster_responses_total{web,4xx} 1
				cluster_request_duration_seconds{web} 1
			`,
			record: map[string]any{"event": "request", "status": 401, "reason": "", "sent_bytes": len("answer 401")},
		},
		{
			name:   "an upgrade that is answered with a 101 to something else",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			behave: func(o *origin) { o.heads <- &exchange.Response{Status: 101, Upgrade: "h2c"} },
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: answered("5xx") + closed + `
				downstream_upgrades_total{public,upstream invalid} 1
				downstream_requests_refused_total{public,upstream invalid} 1
				cluster_responses_total{web,1xx} 1
				cluster_protocol_errors_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
			`,
			record: map[string]any{"status": 502, "reason": "a 101 that does not agree to what was asked for"},
		},
		{
			name:   "an upgrade that is not answered in time",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			behave: silent,
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: answered("5xx") + closed + `
				downstream_upgrades_total{public,upstream too slow} 1
				downstream_requests_refused_total{public,upstream too slow} 1
				route_timeouts_total{site,site:prefix=/} 1
				cluster_timeouts_total{web} 1
				endpoint_errors_total{web,10.0.0.1:80} 1
			`,
			took: `
				downstream_request_duration_seconds{public} 1s
				route_request_duration_seconds{site,site:prefix=/} 1s
				cluster_connection_duration_seconds{web} 1s
			`,
			record: map[string]any{"status": 504},
		},
		{
			name:    "an upgrade that finds nobody",
			client:  func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			connect: func(context.Context) error { return errors.New("connection refused") },
			route:   func(r *config.Route) { r.WebSocket = true },
			figures: answered("5xx") + `
				cluster_endpoints{web} 1
				cluster_connect_failures_total{web} 1
				cluster_connect_attempts_exhausted_total{web} 1
				endpoint_connect_failures_total{web,10.0.0.1:80} 1
				downstream_upgrades_total{public,upstream unreachable} 1
				downstream_requests_refused_total{public,upstream unreachable} 1
			`,
			record: map[string]any{"status": 503},
		},
		{
			name:   "an upgrade whose client leaves first",
			client: func(t *testing.T) *client { return upgrade(t, "a.example", "/") },
			behave: silent,
			during: func(c *client) { c.cancel(errGone) },
			route:  func(r *config.Route) { r.WebSocket = true },
			figures: routed + closed + `
				downstream_upgrades_total{public,cancelled} 1
				downstream_requests_cut_total{public,downstream} 1
				cluster_cancelled_total{web} 1
			`,
			record: map[string]any{"status": 0, "reason": "the client has gone"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T) {
				f := newFarm(t)
				route := to("/", "web")
				route.Timeout, route.StreamIdleTimeout, route.Tunnels = limits.Timeout, limits.StreamIdleTimeout, limits.Tunnels
				if tt.route != nil {
					tt.route(&route)
				}
				f.routes = []config.Route{route}
				f.behave[first], f.connect[first] = tt.behave, tt.connect
				var access records
				f.options = func(o *proxy.ManagerOptions) {
					o.AccessLog = access.open(t, nil)
					if web, _ := o.Clusters.Get("web"); tt.endpoints != nil {
						web.SetMembers(tt.endpoints)
					}
				}
				c := tt.client(t).start(f.manager())
				if tt.during != nil {
					synctest.Wait()
					tt.during(c)
				}
				c.wait()
				wantFigures(t, figures(f.registry), tt.figures)
				wantFigures(t, sums(f.registry), tt.took)
				got := access.read(t)
				if len(got) != 1 {
					t.Fatalf("%d records: %v", len(got), got)
				}
				tt.record["flags"] = flagsOfRequests[tt.name]
				wantRecord(t, got[0], tt.record)
			})
		})
	}
}

func TestWhatIsUnderWayIsCountedUntilItEnds(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		f.behave[first] = silent
		c := get(t, "a.example", "/").start(f.manager())
		synctest.Wait()
		active := func() string {
			var names []string
			for name, v := range figures(f.registry) {
				if strings.Contains(name, "_active") {
					names = append(names, fmt.Sprint(name, " ", v))
				}
			}
			slices.Sort(names)
			return strings.Join(names, "\n")
		}
		if got, want := active(), strings.Join([]string{
			"cluster_connections_active{web} 1",
			"cluster_requests_active{web} 1",
			"downstream_requests_active{public} 1",
			"endpoint_connections_active{web,10.0.0.1:80} 1",
			"endpoint_requests_active{web,10.0.0.1:80} 1",
		}, "\n"); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
		c.cancel(errGone)
		c.wait()
		if got := active(); got != "" {
			t.Errorf("still counted:\n%s", got)
		}
	})
}

func TestARequestThatIsMadeAgainIsCountedAsARetry(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T) {
		f := newFarm(t)
		m := f.manager()
		get(t, "a.example", "/").start(m).wait().wantStatus(200)
		broken := false
		f.behave[first] = func(o *origin) {
			if o.reused && !broken {
				broken = true
				failing(exchange.ErrNoAnswer)(o)
				return
			}
			ok(o)
		}
		get(t, "a.example", "/").start(m).wait().wantStatus(200)
		got := figures(f.registry)
		for name, want := range map[string]int64{
			"cluster_retries_total{web}":                         1,
			"cluster_resets_total{web}":                          1,
			"cluster_requests_total{web}":                        3,
			"cluster_connections_total{web}":                     2,
			"downstream_requests_total{public}":                  2,
			"downstream_request_duration_seconds{public}":        2,
			"cluster_request_duration_seconds{web}":              2,
			"cluster_connection_duration_seconds{web}":           1,
			"endpoint_errors_total{web,10.0.0.1:80}":             1,
			"route_requests_total{site,site:prefix=/}":           2,
			"downstream_requests_cut_total{public,holdfast}":     0,
			"downstream_requests_refused_total{public,no route}": 0,
			"cluster_connect_attempts_exhausted_total{web}":      0,
		} {
			if got[name] != want {
				t.Errorf("%s is %d, want %d", name, got[name], want)
			}
		}
	})
}

// Whoever builds a dashboard sees what can be counted before it happens.
func TestEverySeriesIsThereFromTheStart(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.manager()
	series := map[string]int{}
	for _, family := range f.registry.Families() {
		series[family.Desc.Name] = len(family.Series)
	}
	for name, want := range map[string]int{
		"holdfast_downstream_requests_total":          1,
		"holdfast_downstream_responses_total":         5,
		"holdfast_downstream_requests_refused_total":  20,
		"holdfast_downstream_upgrades_total":          12,
		"holdfast_downstream_requests_cut_total":      2,
		"holdfast_route_responses_total":              5,
		"holdfast_route_tunnels_active":               1,
		"holdfast_cluster_responses_total":            5,
		"holdfast_cluster_tunnel_relayed_bytes_total": 2,
		"holdfast_endpoint_errors_total":              1,
		"holdfast_route_tunnel_relayed_bytes_total":   0, // the route is not for WebSocket
	} {
		if series[name] != want {
			t.Errorf("%s has %d series, want %d", name, series[name], want)
		}
	}
}

// A request that the codec refuses reaches no handler, and is counted and recorded
// all the same.
func TestARequestThatTheCodecRefusesIsCountedAndRecorded(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, request string
		status        int
		refused       string
		record        map[string]any
	}{
		{
			name: "a malformed field", request: "GET /a?b HTTP/1.1\nHost: a.test\nBad Field: x\n\n", status: 400, refused: "malformed",
			record: map[string]any{"reason": "a field line without a valid name", "method": "GET", "target": "/a?b", "protocol": "HTTP/1.1"},
		},
		{
			name: "a malformed request line", request: "GET /\x01 HTTP/1.1\nHost: a.test\n\n", status: 400, refused: "malformed",
			record: map[string]any{"reason": "a control character", "method": "", "target": "", "protocol": ""},
		},
		{
			name: "a head that is too large", request: "GET / HTTP/1.1\nHost: a.test\nX: " + strings.Repeat("x", 9<<10) + "\n\n", status: 431, refused: "head too large",
			record: map[string]any{"method": "GET", "target": "/"},
		},
		{
			name: "a target that is too long", request: "GET /" + strings.Repeat("x", 9<<10) + " HTTP/1.1\nHost: a.test\n\n", status: 414, refused: "head too large",
			record: map[string]any{"method": ""},
		},
		{
			name: "a body that is too large", request: "PUT /big HTTP/1.1\nHost: a.test\nUser-Agent: u\nContent-Length: 9999999999\n\n", status: 413, refused: "body too large",
			record: map[string]any{"method": "PUT", "target": "/big", "authority": "a.test"},
		},
		{
			name: "another version", request: "GET / HTTP/2.0\nHost: a.test\n\n", status: 505, refused: "unsupported",
			record: map[string]any{"reason": "the version HTTP/2.0"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			c := s.client()
			request := strings.ReplaceAll(tt.request, "\n", "\r\n")
			c.Write([]byte(request))
			answer := c.rest()
			_, body, _ := strings.Cut(answer, "\r\n\r\n")
			if !strings.HasPrefix(answer, fmt.Sprintf("HTTP/1.1 %d ", tt.status)) {
				t.Errorf("got %q, want status %d", answer, tt.status)
			}
			c.Close()
			eventually(t, "the connection has ended", func() bool { return figures(s.counted)["downstream_connections_closed_total{public,holdfast}"] == 1 })
			s.settled()
			class := fmt.Sprintf("%dxx", tt.status/100)
			malformed := ""
			if tt.status == 400 {
				malformed = "downstream_protocol_errors_total{public} 1\n"
			}
			bytes := fmt.Sprintf("downstream_received_bytes_total{public} %d\ndownstream_sent_bytes_total{public} %d\n", len(request), len(answer))
			wantFigures(t, figures(s.counted), malformed+bytes+`
				cluster_endpoints{web} 1
				downstream_connections_total{public} 1
				downstream_connections_closed_total{public,holdfast} 1
				downstream_connection_duration_seconds{public} 1
				downstream_requests_total{public} 1
				downstream_request_duration_seconds{public} 1
				downstream_responses_total{public,`+class+`} 1
				downstream_requests_refused_total{public,`+tt.refused+`} 1
			`, "access_log_")
			got := s.records.read(t)
			if len(got) != 1 {
				t.Fatalf("%d records: %v", len(got), got)
			}
			tt.record["status"], tt.record["event"], tt.record["listener"] = tt.status, "request", "public"
			tt.record["sent_bytes"], tt.record["received_bytes"], tt.record["flags"] = len(body), 0, "DPE"
			wantRecord(t, got[0], tt.record)
		})
	}
}

func TestAnAnswerOfTheCodecThatDoesNotLeaveWholeIsCutByWhomeverThatIsTheFault(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		err    error
		figure string
	}{
		"it does":             {nil, "downstream_request_duration_seconds{public}"},
		"the client has gone": {syscall.EPIPE, "downstream_requests_cut_total{public,downstream}"},
		"a slow client":       {os.ErrDeadlineExceeded, "downstream_requests_cut_total{public,holdfast}"},
		"we have closed":      {net.ErrClosed, "downstream_requests_cut_total{public,holdfast}"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			f.manager().Refused(exchange.Downstream{Listener: "public"}, http1.Refusal{
				Request: new(exchange.Request), Start: time.Now(), Status: 400, Reason: "malformed", Err: tt.err})
			wantFigures(t, figures(f.registry), tt.figure+" 1"+`
				cluster_endpoints{web} 1
				downstream_requests_total{public} 1
				downstream_responses_total{public,4xx} 1
				downstream_requests_refused_total{public,malformed} 1
			`)
		})
	}
}

// A tunnel is one record when it opens and one when it closes, and is counted
// wherever it belongs for as long as it lives.
func TestATunnelIsCountedAndRecordedAtBothEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c := s.client()
	c.say(askSocket)
	u := s.endpoint()
	u.head()
	u.say("HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\n\n")
	c.wantHead("101")
	carries(c, u)
	address := u.LocalAddr().String()
	active := func(n int64) bool {
		got := figures(s.counted)
		return got["tunnels_active"] == n && got["route_tunnels_active{site,site:prefix=/socket}"] == n &&
			got["cluster_tunnels_active{web}"] == n && got["endpoint_tunnels_active{web,"+address+"}"] == n
	}
	eventually(t, "the tunnel is counted everywhere", func() bool { return active(1) })
	eventually(t, "the tunnel is not counted among the connections", func() bool {
		got := figures(s.counted)
		return got["downstream_connections_active{public}"] == 0 && got["cluster_connections_active{web}"] == 0
	})
	c.closeWrite()
	u.rest()
	u.Close()
	eventually(t, "the tunnel has ended", func() bool { return active(0) })
	s.settled()
	got := figures(s.counted)
	for name, want := range map[string]int64{
		"tunnel_relayed_bytes_total{upstream}":                   int64(len("up\r\n")),
		"tunnel_relayed_bytes_total{downstream}":                 int64(len("down\r\n")),
		"cluster_tunnel_relayed_bytes_total{web,upstream}":       int64(len("up\r\n")),
		"cluster_tunnel_relayed_bytes_total{web,downstream}":     int64(len("down\r\n")),
		"tunnels_ended_total{downstream closed}":                 1,
		"tunnels_started_total":                                  1,
		"tunnel_duration_seconds":                                1,
		"downstream_connections_total{public}":                   1,
		"downstream_connections_closed_total{public,holdfast}":   0,
		"downstream_connections_closed_total{public,downstream}": 0,
	} {
		if got[name] != want {
			t.Errorf("%s is %d, want %d", name, got[name], want)
		}
	}
	all := s.records.read(t)
	if len(all) != 2 {
		t.Fatalf("%d records: %v", len(all), all)
	}
	wantRecord(t, all[0], map[string]any{"event": "tunnel_open", "status": 101, "route": "site:prefix=/socket", "cluster": "web", "endpoint": address})
	wantRecord(t, all[1], map[string]any{"event": "tunnel_close", "reason": "downstream closed", "received_bytes": 4, "sent_bytes": 6,
		"request_id": all[0]["request_id"], "route": "site:prefix=/socket", "generation": 7})
}
