package report

import (
	"cmp"
	"fmt"
	"io"
)

// A target is what is asked of Holdfast, beside a bound or beside others of the same run.
// It is a most, or a least where more is better.
type target struct {
	key   string
	limit func(r *Run) (float64, string, bool) // and in words
	of    string                               // who is to meet it; empty: Holdfast
}

// bound is a number that does not depend on others.
func bound(v float64) func(*Run) (float64, string, bool) {
	return func(*Run) (float64, string, bool) { return v, number(v), true }
}

// times is a multiple of what one of others has, the best of them: so much worse one may be.
func times(factor float64, key string, others ...string) func(*Run) (float64, string, bool) {
	return func(r *Run) (float64, string, bool) {
		best, name := 0.0, ""
		for _, other := range others {
			if v, ok := r.Median(key, other); ok && (name == "" || (v < best) != more(key)) {
				best, name = v, other
			}
		}
		if more(key) {
			return best / factor, fmt.Sprintf("%s's %s / %s", name, number(best), number(factor)), name != ""
		}
		return factor * best, fmt.Sprintf("%s × %s's %s", number(factor), name, number(best)), name != ""
	}
}

var peers = []string{"haproxy", "nginx", "caddy", "traefik"}

func targets() []target {
	all := []target{
		{key: "idle.private", limit: bound(600)},
		{key: "idle.private", limit: times(0.125, "idle.private", peers...)},
		{key: "idle.descriptors", limit: bound(2.05)}, // what the process itself has is in it
		{key: "idle.left", limit: bound(2)},
		{key: "paced.p99", limit: times(1, "paced.p99", peers...)},
		{key: "http.small.few.cpu", limit: times(0.95, "http.small.few.cpu", "nginx")},
		{key: "http.small.many.cpu", limit: times(0.9, "http.small.many.cpu", "haproxy")},
		{key: "http.16k.few.cpu", limit: times(0.75, "http.16k.few.cpu", "nginx")},
		{key: "http.1m.few.cpu", limit: times(0.75, "http.1m.few.cpu", "nginx")},
		{key: "http.paced.p99", limit: times(1, "http.paced.p99", "nginx")},
		{key: "http.idle.pss", limit: bound(300)},
		{key: "connect.cpu", limit: times(1.05, "connect.cpu", "nginx")},
		{key: "resume.last", limit: bound(1000), of: Vault},
		{key: "move.p99", limit: times(3, "move.steady", Vault), of: Vault},
	}
	for _, key := range []string{"tls.full.cpu", "tls.resumed.cpu", "tls.connect.cpu", "tls.echo.few.cpu", "tls.echo.many.cpu", "tls.idle.private"} {
		all = append(all, target{key: key, limit: times(1, key, "haproxy-tls", "nginx-tls"), of: "holdfast-tls"})
	}
	for _, key := range []string{"echo.few.cpu", "echo.many.cpu"} {
		all = append(all, target{key: key, limit: times(1, key, "nginx")}, target{key: key, limit: times(0.7, key, "iocopy")})
	}
	for _, key := range []string{"bulk.one.cpu", "bulk.few.cpu"} {
		all = append(all, target{key: key, limit: times(1, key, "caddy")})
	}
	for _, key := range []string{"connect.cpu", "connect.rate", "echo.few.cpu", "echo.many.cpu", "bulk.one.cpu", "bulk.few.cpu"} {
		all = append(all, target{key: key, limit: times(1.05, key, NoVault), of: Vault})
	}
	return all
}

// WriteTargets says of each target whether the run has met it.
func (r *Run) WriteTargets(to io.Writer) {
	for _, t := range targets() {
		got, ok := r.Median(t.key, cmp.Or(t.of, Holdfast))
		limit, words, comparable := t.limit(r)
		if !ok || !comparable {
			continue
		}
		bound, over := "at most", got/limit-1
		if more(t.key) {
			bound, over = "at least", limit/got-1
		}
		verdict := "met"
		if over > 0 {
			verdict = fmt.Sprintf("MISSED by %.0f %%", 100*over)
		}
		fmt.Fprintf(to, "%-20s %8s  %-8s %8s (%s): %s\n", t.key, number(got), bound, number(limit), words, verdict)
	}
}
