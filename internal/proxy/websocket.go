package proxy

import (
	"context"
	"log/slog"
	"strings"

	"holdfast/internal/exchange"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// upgrade answers a WebSocket upgrade that has a route, in this order:
//
//	the route is not for WebSocket, a redirect included    403, counted
//	the request announced a body                            400
//	no endpoint can be connected to / in time               503 / 504
//	the upstream answers 100, 102 or 103 first              relayed, the wait goes on
//	it agrees with a 101 to WebSocket                       relayed, then a tunnel
//	it answers with another 101                             502
//	it answers anything else                                relayed
//	it does not answer within handshake_timeout             504
//	the client goes first                                   recorded
//
// In every case but the tunnel both connections end: what the client has sent
// behind its head may be of either protocol, and it reaches no upstream that did
// not agree. The upstream's connection is a fresh one and is never used again.
// The route's other timeouts do not apply, but for one: the answer that refuses is an
// ordinary one, and like any other it ends when nothing of it moves within the
// route's stream_idle_timeout.
func (r *request) upgrade() {
	switch {
	case !r.route.WebSocket || r.route.Redirects():
		r.metrics.upgrades[notEnabled].Inc()
		r.refuse(403, refusedWebSocket, "the route does not allow WebSocket")
		return
	case r.head.UpgradeBody:
		r.metrics.upgrades[malformed].Inc()
		r.refuse(400, refusedMalformed, "an upgrade request with a body")
		return
	}
	r.awaitAnswer(r.route.Tunnels.HandshakeTimeout, errHandshakeTimeout)
	up, err := r.connect((*upstream.Endpoint).Dial)
	if err == nil {
		err = r.handshake(up)
	}
	r.metrics.upgrades[r.upgradeOutcome(err)].Inc()
	if err != nil {
		r.failed(err)
	}
}

// handshake sends the upgrade and does what the upstream answers.
func (r *request) handshake(up exchange.Upstream) (err error) {
	r.call = r.endpoint.Call()
	defer func() { r.call.End(r.outcome(err)) }()
	defer closeWith(r.ctx, up)()

	r.rewrite()
	if err := up.Send(r.head); err != nil {
		return err
	}
	if err := up.Finish(nil); err != nil {
		return err
	}
	resp, err := r.receive(up)
	if err != nil {
		return err
	}
	if resp.Status == 101 && resp.Upgrade != "websocket" {
		return errImproper101
	}
	if resp.Status == 101 {
		return r.startTunnel(up, resp)
	}
	if !r.beginAnswer() {
		return context.Cause(r.ctx)
	}
	r.log(slog.LevelDebug, "the upstream refused the upgrade", slog.Int("status", resp.Status))
	r.watchIdle()
	if err := r.relay(up, resp); err != nil {
		return err
	}
	if err := r.x.Finish(up.Trailers()); err != nil {
		return goneError{err}
	}
	r.complete = true
	return nil
}

// startTunnel takes both connections from their codecs and hands them on. Nothing is sent:
// the client is told of a tunnel by that itself, when it is deposited, and so by another
// process if this one dies before.
func (r *request) startTunnel(up exchange.Upstream, resp *exchange.Response) error {
	upConn, upEarly, err := up.Switch()
	if err != nil {
		return err
	}
	if !r.beginAnswer() {
		upConn.Close()
		r.endpoint.TunnelFailed()
		return context.Cause(r.ctx)
	}
	r.status = resp.Status
	downConn, head, downEarly, err := r.x.Switch(resp)
	if err != nil {
		upConn.Close()
		r.endpoint.TunnelFailed()
		return goneError{err}
	}
	r.m.options.Tunnels.Start(tunnel.Spec{
		Down: downConn, Up: upConn,
		Head: head, DownEarly: downEarly, UpEarly: upEarly,
		Origin: r.m.origin(r),
		ID:     strings.Clone(r.id), // it may be a part of the head, which is to go
		Client: r.x.Downstream().Remote,
		Tag:    r.tunnelOpened(),
	})
	return nil
}
