package admin_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"holdfast/internal/admin/admintest"
)

func TestProfilesOfTheSupervisor(t *testing.T) {
	t.Parallel()
	c := client(t, "unix", begin(t, &admintest.Supervisor{}).socket())
	want(t, c, "GET /debug/pprof/", 200, "goroutine")
	want(t, c, "GET /debug/pprof/goroutine?debug=2", 200, "TestProfilesOfTheSupervisor")
	const gzipped = "\x1f\x8b"
	for _, what := range []string{"GET /debug/pprof/heap", "GET /debug/pprof/profile?seconds=1"} {
		if code, body := ask(t, c, what); code != 200 || !strings.HasPrefix(body, gzipped) {
			t.Errorf("%s: got %d %.20q", what, code, body)
		}
	}
	if code, body := ask(t, c, "GET /debug/pprof/trace?seconds=1"); code != 200 || !strings.HasPrefix(body, "go 1.") {
		t.Errorf("trace: got %d %.20q", code, body)
	}
}

func TestProfilesOfAGeneration(t *testing.T) {
	t.Parallel()
	fake := &admintest.Supervisor{OnProfile: func(ctx context.Context, generation int, name string, over time.Duration) ([]byte, error) {
		deadline, bounded := ctx.Deadline()
		if !bounded || time.Until(deadline) < over {
			return nil, errors.New("too little time")
		}
		if generation == 9 {
			return nil, errors.New("no living generation 9")
		}
		return fmt.Appendf(nil, "\x00%s of %d over %s", name, generation, over), nil
	}}
	c := client(t, "unix", begin(t, fake).socket())
	want(t, c, "GET /debug/pprof/heap?generation=7", 200, "\x00heap of 7 over 0s")
	want(t, c, "GET /debug/pprof/profile?generation=7&seconds=60", 200, "\x00cpu of 7 over 1m0s")
	want(t, c, "GET /debug/pprof/profile?generation=7", 200, "\x00cpu of 7 over 30s")
	want(t, c, "GET /debug/pprof/trace?generation=7", 200, "\x00trace of 7 over 1s")
	want(t, c, "GET /debug/pprof/heap?generation=9", 500, "no living generation 9")
}
