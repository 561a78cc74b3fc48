package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// exposition is what /metrics says.
func (i *instance) exposition() ([]byte, error) {
	resp, err := i.admin("/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return body, err
}

// series are values by "name{label=value,…}"; a histogram has its _count and _sum,
// and each of its buckets.
type series map[string]float64

// scrape parses /metrics. counters are those of the series that must never decrease.
func (i *instance) scrape() (all, counters series, err error) {
	body, err := i.exposition()
	if err != nil {
		return nil, nil, err
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	all, counters = make(series), make(series)
	for name, f := range families {
		for _, m := range f.Metric {
			of := labels(m)
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				counters[name+of] = m.GetCounter().GetValue()
			case dto.MetricType_HISTOGRAM:
				h := m.GetHistogram()
				counters[name+"_count"+of] = float64(h.GetSampleCount())
				counters[name+"_sum"+of] = h.GetSampleSum()
				for _, b := range h.Bucket {
					counters[fmt.Sprintf("%s_bucket%s le %v", name, of, b.GetUpperBound())] = float64(b.GetCumulativeCount())
				}
			default:
				all[name+of] = m.GetGauge().GetValue() + m.GetUntyped().GetValue()
			}
		}
	}
	for name, v := range counters {
		all[name] = v
	}
	return all, counters, nil
}

func labels(m *dto.Metric) string {
	var all []string
	for _, l := range m.Label {
		all = append(all, l.GetName()+"="+l.GetValue())
	}
	slices.Sort(all)
	if len(all) == 0 {
		return ""
	}
	return "{" + strings.Join(all, ",") + "}"
}

func (i *instance) mustScrape() series {
	i.t.Helper()
	all, _, err := i.scrape()
	if err != nil {
		i.t.Fatal(err)
	}
	return all
}

// wantSeries waits until the series have these values: what a client has seen may
// be counted a moment later.
func (i *instance) wantSeries(want series) {
	i.t.Helper()
	var all series
	eventually(i.t, func() bool {
		all = i.mustScrape()
		for name, v := range want {
			if got, ok := all[name]; !ok || got != v {
				return false
			}
		}
		return true
	}, func() string {
		var differ []string
		for name, v := range want {
			if got, ok := all[name]; !ok || got != v {
				differ = append(differ, fmt.Sprintf("%s to be %v, it is %v (there: %t)", name, v, got, ok))
			}
		}
		slices.Sort(differ)
		return strings.Join(differ, "\n")
	})
}

// Whatever happens to generations, what has been counted stays counted, and every
// request that was answered is among it.
func TestCountersNeverDecreaseAndLoseNothing(t *testing.T) {
	t.Parallel()
	backend := newBackend(t)
	config := func(n int) string {
		return simple(backend, fmt.Sprintf("# %d\n[reload]\nprobation = \"1ms\"\n[drain]\nidle_grace = \"0s\"\n", n))
	}
	i := serve(t, config(0))
	address := i.address("public")

	stop := make(chan struct{})
	scraped := make(chan error, 1)
	go func() { scraped <- i.watchCounters(stop) }()
	var answered atomic.Int64
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := ask(address, "/"); err == nil {
				answered.Add(1)
			}
		}
	}()
	progress := func() {
		before := answered.Load()
		eventually(t, func() bool { return answered.Load() > before+20 }, func() string { return "requests to be answered" })
	}
	for n := range 4 {
		progress()
		i.reload(config(n + 1))
		progress()
		s := i.wait("a serving generation", func(s *status) bool { return len(s.Generations) > 0 && s.Generations[0].State == "serving" })
		syscall.Kill(s.Generations[0].PID, syscall.SIGKILL)
	}
	progress()
	close(stop)
	<-asked
	if err := <-scraped; err != nil {
		t.Error(err)
	}
	// Of those that were cut off by a kill, some were counted and not answered.
	all := i.mustScrape()
	if got := all["holdfast_downstream_responses_total{class=2xx,listener=public}"]; got < float64(answered.Load()) {
		t.Errorf("%v responses counted, %d were answered", got, answered.Load())
	}
	i.wantSeries(series{
		"holdfast_generation_crashes_total{state=serving}": 4,
		"holdfast_generation_replacements_total{by=new}":   4,
		"holdfast_reloads_total{result=done}":              5,
	})
}

// watchCounters scrapes until stop is closed.
func (i *instance) watchCounters(stop <-chan struct{}) error {
	var before series
	for {
		_, now, err := i.scrape()
		if err != nil {
			return err
		}
		for name, was := range before {
			if is, ok := now[name]; !ok || is < was {
				return fmt.Errorf("%s went from %v to %v (there: %t)", name, was, is, ok)
			}
		}
		before = now
		select {
		case <-stop:
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestMetricsFollowTheConventions(t *testing.T) {
	t.Parallel()
	i := serve(t, simple(newBackend(t), ""))
	wantAnswer(t, i.address("public"))
	body, err := i.exposition()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.New(bytes.NewReader(body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	code, printed, errs := i.holdfast("metrics")
	if code != 0 || !strings.Contains(printed, "holdfast_downstream_requests_total") {
		t.Errorf("holdfast metrics: exit code %d, %q", code, errs)
	}
}

func TestNothingThatAClientSendsMakesASeries(t *testing.T) {
	t.Parallel()
	i := serve(t, simple(newBackend(t), ""))
	address := i.address("public")
	wantAnswer(t, address)
	before := len(i.mustScrape())
	for n := range 20 {
		w := dialWire(t, "tcp", address)
		w.send(fmt.Sprintf("M%d /p%d HTTP/1.1\r\nHost: h%d.test\r\nX-F%d: %d\r\n\r\n", n, n, n, n, n))
		w.reply(fmt.Sprintf("M%d", n))
		w.close()
		w = dialWire(t, "tcp", address)
		w.send(fmt.Sprintf("GET /p%d HTTP/1.%d\r\n\r\n", n, n))
		w.reply("GET")
		w.close()
	}
	if after := len(i.mustScrape()); after != before {
		t.Errorf("%d series, %d before", after, before)
	}
}

func TestWhatIsCounted(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	i := serve(t, simple(up.addr, "[drain]\nidle_grace = \"0s\"\n"))
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}

	// A request with 5 bytes each way, over a connection that stays.
	client := s.dial()
	client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\n12345")
	server := up.accept(t)
	server.wantStart("POST / HTTP/1.1")
	server.wantBytes("12345")
	server.send(answer(503, "busy!"))
	client.want(503, "busy!")
	// One that the codec refuses.
	bad := s.dial()
	bad.send("GET / HTTP/1.1\r\nHost : a.test\r\n\r\n")
	bad.wantRefused(400)
	// A tunnel that the client ends.
	down, behind, _ := s.tunnel("/ws")
	down.send("12345678")
	behind.wantBytes("12345678")
	behind.send("123")
	down.wantBytes("123")
	i.wantSeries(series{"holdfast_tunnels_active": 1, "holdfast_cluster_tunnels_active{cluster=backend}": 1})
	down.close()
	behind.wantEOF()
	behind.close()

	i.wantSeries(series{
		"holdfast_downstream_connections_total{listener=public}":                                                                3,
		"holdfast_downstream_connections_active{listener=public}":                                                               1,
		"holdfast_downstream_requests_total{listener=public}":                                                                   3,
		"holdfast_downstream_requests_active{listener=public}":                                                                  0,
		"holdfast_downstream_responses_total{class=5xx,listener=public}":                                                        1,
		"holdfast_downstream_responses_total{class=4xx,listener=public}":                                                        1,
		"holdfast_cluster_responses_total{class=5xx,cluster=backend}":                                                           1,
		"holdfast_cluster_requests_active{cluster=backend}":                                                                     0,
		"holdfast_tunnels_active":                                                                                               0,
		"holdfast_tunnels_started_total":                                                                                        1,
		"holdfast_tunnels_ended_total{reason=downstream closed}":                                                                1,
		"holdfast_tunnel_relayed_bytes_total{to=upstream}":                                                                      8,
		"holdfast_tunnel_relayed_bytes_total{to=downstream}":                                                                    3,
		"holdfast_route_tunnel_relayed_bytes_total{route=all:prefix=/ws,to=upstream,virtual_host=all}":                          8,
		"holdfast_route_tunnel_relayed_bytes_total{route=all:prefix=/ws,to=downstream,virtual_host=all}":                        3,
		"holdfast_cluster_tunnel_relayed_bytes_total{cluster=backend,to=upstream}":                                              8,
		"holdfast_cluster_tunnel_relayed_bytes_total{cluster=backend,to=downstream}":                                            3,
		"holdfast_endpoint_tunnel_relayed_bytes_total{cluster=backend,endpoint=" + up.addr + ",to=upstream}":                    8,
		"holdfast_endpoint_tunnel_relayed_bytes_total{cluster=backend,endpoint=" + up.addr + ",to=downstream}":                  3,
		"holdfast_cluster_endpoints{cluster=backend}":                                                                           1,
		"holdfast_generation_info{config=" + i.status().ConfigHash + ",generation=1,state=serving,version=" + i.version() + "}": 1,
	})
}

// Every tunnel that was started is open, has ended with a reason, or was lost with
// its process.
func TestTunnelsThatDieWithTheirProcessAreCounted(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	i := serve(t, simple(up.addr, "[tunnels]\nsurvive_crash = false\n"))
	s := &stage{T: t, service: i, addresses: i.addresses(), host: "a.test", up: up}
	for range 3 {
		s.tunnel("/ws")
	}
	down, behind, _ := s.tunnel("/ws")
	down.close()
	behind.wantEOF()
	behind.close()
	i.wantSeries(series{"holdfast_tunnels_active": 3, "holdfast_tunnels_ended_total{reason=downstream closed}": 1})
	syscall.Kill(i.status().Generations[0].PID, syscall.SIGKILL)
	i.wantStates("2 serving")
	i.wantSeries(series{
		"holdfast_tunnels_started_total": 4, "holdfast_tunnels_active": 0, "holdfast_tunnels_lost_total": 3,
		"holdfast_tunnels_ended_total{reason=downstream closed}": 1,
	})
	s.wantLog("the serving generation has died", "tunnels=3")
}

// version is what the service says it is.
func (i *instance) version() string {
	i.t.Helper()
	_, out, _ := i.holdfast("version")
	fields := strings.Fields(out)
	if len(fields) < 2 {
		i.t.Fatal(errors.New(out))
	}
	return fields[1]
}
