package proxy

import (
	"holdfast/internal/accesslog/flags"
	"holdfast/internal/config"
	"holdfast/internal/exchange"
	"holdfast/internal/metrics"
)

var healthChecked = metrics.Define(metrics.Desc{
	Name: "holdfast_downstream_health_checks_total",
	Help: "Health checks that were answered on a listener, by the answer: ok, or unready while no traffic is wanted.",
	Type: metrics.TypeCounter, Labels: []string{"listener", "answer"},
})

// healthChecks is how a listener answers the checks of load balancers. The zero value answers
// none.
type healthChecks struct {
	asked       *config.HealthCheck // nil: none
	ok, unready *metrics.Counter
}

func newHealthChecks(r *metrics.Registry, l *config.Listener) healthChecks {
	if l.HealthCheck == nil {
		return healthChecks{}
	}
	return healthChecks{
		asked: l.HealthCheck, ok: r.Counter(healthChecked, l.Name, "ok"), unready: r.Counter(healthChecked, l.Name, "unready"),
	}
}

// notStored keeps caches from answering in our place.
var notStored = exchange.Fields{{Name: "Cache-Control", Value: "no-store"}}

// answersHealthCheck answers the request if it is a health check. That comes before the
// routes: who checks knows an address, and no host.
func (r *request) answersHealthCheck() bool {
	h := &r.side.health
	if r.head.Upgrade != "" || !h.asked.Concerns(r.head.Method, r.head.Target) {
		return false
	}
	r.healthCheck = true
	if why := r.m.unready.Load(); why != nil {
		h.unready.Inc()
		r.flag(flags.LocalHealthCheck)
		r.reason = "no traffic is wanted: " + *why
		r.reply(answer{status: 503, fields: notStored, body: *why + "\n"})
		return true
	}
	h.ok.Inc()
	r.reply(answer{status: 200, fields: notStored, body: "ok\n"})
	return true
}

// SetUnready has health checks answered with a reason why no traffic is wanted, or as usual
// if there is none.
func (m *Manager) SetUnready(why string) {
	if why == "" {
		m.unready.Store(nil)
	} else {
		m.unready.Store(&why)
	}
}

// unready does so in the generation, which accepts all the same.
func (g *generation) unready(why string) {
	if g.manager != nil && g.phase != building {
		g.manager.SetUnready(why)
	}
}
