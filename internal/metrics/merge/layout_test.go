package merge_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/internal/metrics"
	"holdfast/internal/metrics/merge"
)

// layoutOne is what generations write that have layout version 1, without the bytes that are
// not in use. Such generations live on beside newer supervisors, so the file is never
// written again: a layout with another version gets a file of its own beside it.
const layoutOne = "testdata/layout-1"

// olderBuild returns what a generation of an older build has written.
func olderBuild(t *testing.T) []byte {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the file has the byte order of another machine")
	}
	b, err := os.ReadFile(layoutOne)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTheMemoryOfAnOlderBuildIsRead(t *testing.T) {
	t.Parallel()
	totals := merge.New()
	add(t, totals, 4, olderBuild(t))
	totals.Serve(4)
	want(t, totals, "holdfast_",
		`holdfast_metrics_unshown_series 0`,
		`holdfast_requests_total{code="200",listener="public"} 1e+06`,
		`holdfast_requests_total{code="503",listener="public"} 7`,
		`holdfast_cpu_seconds_total 1.5`,
		`holdfast_request_duration_seconds_bucket{le="0.25"} 1`, `holdfast_request_duration_seconds_bucket{le="1"} 2`,
		`holdfast_request_duration_seconds_bucket{le="+Inf"} 3`,
		`holdfast_request_duration_seconds_sum 61.1`, `holdfast_request_duration_seconds_count 3`,
		`holdfast_balance -3`,
		`holdfast_endpoints{cluster="wéb"} 2`,
		`holdfast_oldest 90`,
		`holdfast_tunnels{cluster="web",generation="4"} 1204`,
		`holdfast_generation_stale{generation="4"} 0`,
		`holdfast_metrics_conflicts{generation="4"} 0`,
	)
	end(t, totals, 4)
	want(t, totals, "holdfast_requests", `holdfast_requests_total{code="200",listener="public"} 1e+06`, `holdfast_requests_total{code="503",listener="public"} 7`)
}

// What another version reads is what this one writes, to the byte.
func TestTheLayoutIsTheOneThatOtherBuildsKnow(t *testing.T) {
	t.Parallel()
	older := olderBuild(t)
	r, f := start(t, merge.New(), 1)
	requests := counter("holdfast_requests_total", "listener", "code")
	r.Counter(requests, "public", "200").Add(1_000_000)
	cpu := counter("holdfast_cpu_seconds_total")
	cpu.Unit = metrics.Seconds
	r.Counter(cpu).Add(uint64(1500 * time.Millisecond))
	duration := histogram("holdfast_request_duration_seconds", 0.25, 1)
	duration.Unit = metrics.Seconds
	for _, d := range []time.Duration{100 * time.Millisecond, time.Second, time.Minute} {
		r.Histogram(duration).Observe(int64(d))
	}
	skipped(t, f)
	r.Gauge(gauge("holdfast_balance", metrics.Sum)).Set(-3)
	r.Gauge(gauge("holdfast_endpoints", metrics.Serving, "cluster"), "wéb").Set(2)
	r.Gauge(gauge("holdfast_oldest", metrics.Max)).Set(90)
	r.Gauge(gauge("holdfast_tunnels", metrics.PerGeneration, "cluster"), "web").Set(1204)
	r.Counter(requests, "public", "503").Add(7)
	now := readFile(t, f)
	if !bytes.Equal(now[:16], older[:16]) || !bytes.Equal(behindOwn(now), behindOwn(older)) {
		path := filepath.Join(t.ArtifactDir(), "layout")
		if err := os.WriteFile(path, now, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Errorf("%s is not what is written now, which go test -artifacts leaves in %s", layoutOne, path)
	}
}

// behindOwn returns the records behind that of the package's own metric, whose help
// text may change.
func behindOwn(b []byte) []byte {
	const head = 8 + 5 + 2 // bytes of a definition before its name
	return b[bytes.Index(b, []byte("holdfast_requests_total"))-head:]
}
