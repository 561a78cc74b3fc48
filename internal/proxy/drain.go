package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"holdfast/internal/control"
	"holdfast/internal/tunnel"
)

// drain stops accepting and lets go of each class of connection as the design
// says: requests finish, idle connections get a grace, or wait for a passage, streams may
// have a limit, tunnels stay. Said again, it only changes how long the generation must
// stay, and wait, and takes back sockets that were sent for a reinstatement that did not
// come. A stop that came before it stands.
func (g *generation) drain(removed []string, hold, passage time.Duration) {
	if g.phase == stopping {
		return
	}
	g.dropSockets()
	g.hold = time.Now().Add(hold)
	time.AfterFunc(hold, g.notice)
	if g.phase < serving {
		return
	}
	// The servers come first: a connection that is taken from a queue meanwhile must
	// hear with its first answer that it is the last.
	g.handover.drain(removed, passage)
	if g.phase != serving {
		return
	}
	g.phase = draining
	g.clusters.SetDraining(true)
	g.pauseTLS(true)
	g.vault.serving.Store(false)
	g.stopAccepting(removed)
	g.tunnels.Drain(g.cfg.Drain.CloseSpread)
	g.memory.Want() // the few that stay may stay for days
	if g.cfg.Drain.StreamTimeout > 0 {
		g.limit.Reset(g.cfg.Drain.StreamTimeout)
	}
	tunnels, _ := g.tunnels.Summary()
	g.log.Info("draining", "tunnels", tunnels)
}

// resume makes a generation that was built for the tunnels of a dead one drain with them,
// when they have come. It serves nobody else.
func (g *generation) resume() error {
	if g.phase != standby {
		return errors.New("not possible now")
	}
	if err := g.vault.awaitTunnels(); err != nil {
		return err
	}
	g.openAccessLogs() // for their ends
	g.phase, g.resumed = draining, true
	g.clusters.SetDraining(true)
	g.pauseTLS(true)
	g.tunnels.Drain(g.cfg.Drain.CloseSpread)
	g.memory.Want()
	g.log.Info("resuming the tunnels of a dead generation")
	return nil
}

// move has the tunnels of a generation that drains go to another one.
func (g *generation) move(all bool) error {
	if g.phase != draining {
		return errors.New("only a generation that drains gives tunnels away")
	}
	g.vault.move(all)
	return nil
}

// clear has a generation that drains be empty within a time. Tunnels are closed one after the other;
// requests have until the end. It can only be made sooner.
func (g *generation) clear(within time.Duration) error {
	switch by := time.Now().Add(within); {
	case g.phase != draining:
		return errors.New("only a generation that drains can be told to end what it has")
	case within < 0:
		return errors.New("there is no time in the past")
	case !g.emptyBy.IsZero() && by.After(g.emptyBy):
		return fmt.Errorf("it was told to be empty within %s already", time.Until(g.emptyBy).Round(time.Second))
	default:
		g.emptyBy = by
	}
	g.clearing.Reset(within)
	g.tunnels.CloseAll(tunnel.Operator, within)
	tunnels, _ := g.tunnels.Summary()
	g.log.Info("told to be empty", "within", within, "tunnels", tunnels)
	return nil
}

// onCleared ends what is left when the time of clear is over.
func (g *generation) onCleared() {
	if g.phase != draining {
		return // it stops, and has another time for that
	}
	tunnels, _ := g.tunnels.Summary()
	g.log.Info("the time to be empty is over: closing what is left", "tunnels", tunnels)
	g.cut = true
	g.tunnels.CloseAll(tunnel.Operator, 0)
	g.limit.Reset(endMargin)
	for _, l := range g.listeners {
		l.cut()
	}
}

// stop drains everything and bounds it: after within, what is left is cut.
func (g *generation) stop(within time.Duration) {
	if g.phase < serving {
		g.over = true
		return
	}
	g.unready(control.UnreadyStopping)
	all := make([]string, 0, len(g.listeners))
	for _, l := range g.listeners {
		all = append(all, l.key)
	}
	g.handover.stay()
	g.drainServers(min(g.cfg.Drain.IdleGrace, within)) // first, as in drain
	g.stopAccepting(all)
	g.dropSockets()
	g.vault.serving.Store(false)
	g.vault.stay()
	g.phase, g.hold = stopping, time.Time{}
	g.limit.Reset(within)
}

// onLimit cuts what the drain's or the stop's time limit leaves no more time for.
// It says whether the process must end now.
func (g *generation) onLimit() (end bool) {
	switch {
	case g.cut:
		g.log.Warn("connections did not close in time")
		return true
	case g.phase == draining:
		g.log.Info("drain.stream_timeout: cutting the responses that still run")
	default:
		tunnels, _ := g.tunnels.Summary()
		g.log.Info("stop timeout: closing what is left", "tunnels", tunnels)
		g.cut = true
		g.tunnels.CloseAll(tunnel.Stopped, 0)
		g.limit.Reset(endMargin)
	}
	for _, l := range g.listeners {
		l.cut()
	}
	return false
}

// abandonTunnels closes those that are left when the process ends, and gives their ends
// a moment to be reported.
func (g *generation) abandonTunnels() {
	g.tunnels.Abandon()
	select {
	case <-g.tunnels.Empty():
	case <-time.After(abandonTime):
	}
}

// finished says whether nothing is left and nobody wants the generation back.
func (g *generation) finished() bool {
	if g.over {
		return true
	}
	if g.phase < draining || time.Now().Before(g.hold) || g.expected() || g.vault.awaits() || g.handover.busy() {
		return false
	}
	if slices.ContainsFunc(g.listeners, func(l *listener) bool { return l.connections() > 0 }) {
		return false
	}
	return g.emptied() == nil
}

// emptied is closed when the last tunnel has ended and its end was reported. It is
// nil, which a select waits for in vain, where that is so already or is not waited
// for.
func (g *generation) emptied() <-chan struct{} {
	if g.phase < draining {
		return nil
	}
	empty := g.tunnels.Empty()
	select {
	case <-empty:
		return nil
	default:
		return empty
	}
}

func (g *generation) drainServers(idleGrace time.Duration) {
	for _, l := range g.listeners {
		l.server.Drain(idleGrace)
	}
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

// onTunnelEnd is called by the Set. A tunnel's end is recorded by access logs and
// counted in the metrics; a line about each is for those who look for one.
func (g *generation) onTunnelEnd(r tunnel.Record) {
	if g.log.Enabled(context.Background(), slog.LevelDebug) {
		g.log.Debug("tunnel closed", "request_id", r.ID, "reason", r.Reason.String(), "route", r.Route, "cluster", r.Cluster, "endpoint", r.Endpoint,
			"duration", r.Ended.Sub(r.Started), "received_bytes", r.ToUp, "sent_bytes", r.ToDown)
	}
	g.vault.forget(r.Number)
	g.manager.TunnelEnded(&r)
	g.listener(r.Listener).leave()
}

// onTunnelMoved is called by the Set.
func (g *generation) onTunnelMoved(r tunnel.Record) {
	if g.log.Enabled(context.Background(), slog.LevelDebug) {
		g.log.Debug("tunnel moved to another generation", "request_id", r.ID)
	}
	g.vault.forget(r.Number)
	g.manager.TunnelLeft(r.Origin)
	g.listener(r.Listener).leave()
}

// Start takes a tunnel over, as the manager's [TunnelStarter]: it goes on counting
// as a connection of its listener.
func (g *generation) Start(spec tunnel.Spec) {
	g.listener(spec.Origin.Listener).enter()
	g.tunnels.Start(spec)
}

// listener returns one by its name. Tunnels may have come whose listener is not here.
func (g *generation) listener(name string) *listener {
	if i := slices.IndexFunc(g.listeners, func(l *listener) bool { return l.cfg.Name == name }); i >= 0 {
		return g.listeners[i]
	}
	return g.elsewhere
}
