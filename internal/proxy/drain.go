package proxy

import (
	"slices"
	"time"

	"holdfast/internal/tunnel"
)

// drain stops accepting and lets go of each class of connection as the design
// says: requests finish, idle connections get a grace, streams may have a limit,
// tunnels stay. Said again, it only changes how long the generation must stay.
func (g *generation) drain(removed []string, hold time.Duration) {
	g.hold = time.Now().Add(hold)
	time.AfterFunc(hold, g.notice)
	if g.phase != serving {
		return
	}
	g.phase = draining
	g.stopAccepting(removed)
	for _, l := range g.listeners {
		l.server.Drain(g.cfg.Drain.IdleGrace)
	}
	g.tunnels.Drain(g.cfg.Drain.CloseSpread)
	if g.cfg.Drain.StreamTimeout > 0 {
		g.limit.Reset(g.cfg.Drain.StreamTimeout)
	}
	tunnels, _ := g.tunnels.Summary()
	g.log.Info("draining", "tunnels", tunnels)
}

// stop drains everything and bounds it: after within, what is left is cut.
func (g *generation) stop(within time.Duration) {
	if g.phase < serving {
		g.over = true
		return
	}
	all := make([]string, 0, len(g.listeners))
	for _, l := range g.listeners {
		all = append(all, l.key)
	}
	g.stopAccepting(all)
	for _, l := range g.listeners {
		l.server.Drain(min(g.cfg.Drain.IdleGrace, within))
	}
	g.phase, g.hold = stopping, time.Time{}
	g.limit.Reset(within)
}

// onLimit cuts what the drain's or the stop's time limit leaves no more time for.
// It says whether the process must end now.
func (g *generation) onLimit() (end bool) {
	switch {
	case g.phase == draining:
		g.log.Info("drain.stream_timeout: cutting the responses that still run")
	case g.cut:
		g.log.Warn("connections did not close in time")
		return true
	default:
		tunnels, _ := g.tunnels.Summary()
		g.log.Info("stop timeout: closing what is left", "tunnels", tunnels)
		g.cut = true
		g.tunnels.CloseAll(tunnel.Stopped, 0)
		g.limit.Reset(endMargin)
	}
	for _, l := range g.listeners {
		l.server.Close()
	}
	return false
}

// finished says whether nothing is left and nobody wants the generation back.
func (g *generation) finished() bool {
	if g.over {
		return true
	}
	if g.phase < draining || time.Now().Before(g.hold) {
		return false
	}
	if slices.ContainsFunc(g.listeners, func(l *listener) bool { return l.connections() > 0 }) {
		return false
	}
	tunnels, _ := g.tunnels.Summary()
	return tunnels == 0
}

// stopAccepting gives up every listening socket; the queues of those in emptied
// are served first.
func (g *generation) stopAccepting(emptied []string) {
	for _, l := range g.listeners {
		l.stop(slices.Contains(emptied, l.key))
	}
}

func (g *generation) pauseAccepting() {
	for _, l := range g.listeners {
		l.pause(true)
	}
}

func (g *generation) resumeAccepting() {
	for _, l := range g.listeners {
		l.pause(false)
	}
}

// onTunnelEnd is called from the tunnel's goroutine.
func (g *generation) onTunnelEnd(r tunnel.Record) {
	g.log.Info("tunnel closed", "id", r.ID, "reason", r.Reason.String(), "route", r.Route, "cluster", r.Cluster, "endpoint", r.Endpoint,
		"duration", r.Ended.Sub(r.Started), "bytes_up", r.ToUp, "bytes_down", r.ToDown)
	g.listener(r.Listener).leave()
	g.notice()
}

// Start takes a tunnel over, as the manager's [TunnelStarter]: it goes on counting
// as a connection of its listener.
func (g *generation) Start(spec tunnel.Spec) {
	g.listener(spec.Listener).enter()
	g.tunnels.Start(spec)
}

// listener returns one by its name; there is no other name to ask for.
func (g *generation) listener(name string) *listener {
	return g.listeners[slices.IndexFunc(g.listeners, func(l *listener) bool { return l.cfg.Name == name })]
}
