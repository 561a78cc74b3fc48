package report

import (
	"fmt"
	"io"
)

// A target is what is asked of Holdfast, beside a bound or beside others of the same run.
type target struct {
	key    string
	atMost func(r *Run) (float64, string, bool) // and in words
}

// bound is a number that does not depend on others.
func bound(v float64) func(*Run) (float64, string, bool) {
	return func(*Run) (float64, string, bool) { return v, number(v), true }
}

// times is a multiple of what one of others has, the best of them.
func times(factor float64, key string, others ...string) func(*Run) (float64, string, bool) {
	return func(r *Run) (float64, string, bool) {
		best, name := 0.0, ""
		for _, other := range others {
			if v, ok := r.Median(key, other); ok && (name == "" || v < best) {
				best, name = v, other
			}
		}
		return factor * best, fmt.Sprintf("%s × %s's %s", number(factor), name, number(best)), name != ""
	}
}

var peers = []string{"haproxy", "nginx", "caddy", "traefik"}

func targets() []target {
	all := []target{
		{"idle.private", bound(600)},
		{"idle.private", times(0.125, "idle.private", peers...)},
		{"idle.descriptors", bound(2.05)}, // what the process itself has is in it
		{"idle.left", bound(2)},
		{"paced.p99", times(1, "paced.p99", peers...)},
	}
	for _, key := range []string{"echo.few.cpu", "echo.many.cpu"} {
		all = append(all, target{key, times(1, key, "nginx")}, target{key, times(0.7, key, "iocopy")})
	}
	for _, key := range []string{"bulk.one.cpu", "bulk.few.cpu"} {
		all = append(all, target{key, times(1, key, "caddy")})
	}
	return all
}

// WriteTargets says of each target whether the run has met it.
func (r *Run) WriteTargets(to io.Writer) {
	for _, t := range targets() {
		got, ok := r.Median(t.key, Reference)
		limit, words, comparable := t.atMost(r)
		if !ok || !comparable {
			continue
		}
		verdict := "met"
		if got > limit {
			verdict = fmt.Sprintf("MISSED by %.0f %%", 100*(got/limit-1))
		}
		fmt.Fprintf(to, "%-16s %8s  at most %8s (%s): %s\n", t.key, number(got), number(limit), words, verdict)
	}
}
