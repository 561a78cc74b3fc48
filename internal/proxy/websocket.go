package proxy

import (
	"log/slog"
	"strings"

	"holdfast/internal/exchange"
	"holdfast/internal/stream"
	"holdfast/internal/tunnel"
	"holdfast/internal/upstream"
)

// upgrade answers an upgrade that has a route which does not answer by itself, in this order:
//
//	the route is not for this protocol, a redirect included 403, counted
//	it has origins, of which the request's is none          403, counted
//	the request announced a body                            400
//	a filter of the route refuses it                        what that says
//	no path, host or cluster comes of it                    400 / 400 / 404
//	no endpoint can be connected to / in time               503 / 504
//	the upstream answers 100, 102 or 103 first              relayed, the wait goes on
//	it agrees with a 101 to the protocol                    relayed, then a tunnel
//	it answers with another 101                             502
//	it answers with 2xx, and authorize was not asked        403
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
	case !r.route.Upgrades(r.head.Upgrade) || r.route.Redirects():
		r.metrics.upgrades[notEnabled].Inc()
		r.refuse(403, refusedWebSocket, "the route does not allow WebSocket")
		return
	case !r.route.MayComeFrom(&r.head.Fields):
		r.metrics.upgrades[foreignOrigin].Inc()
		r.refuse(403, refusedOrigin, errForeignOrigin)
		return
	case r.head.UpgradeBody:
		r.metrics.upgrades[malformed].Inc()
		r.refuse(400, refusedMalformed, "an upgrade request with a body")
		return
	case !r.passes():
		r.metrics.upgrades[r.filteredOutcome()].Inc()
		return
	}
	if err := r.takeAim(); err != nil {
		outcome := malformed
		if err == errUnknown {
			outcome = unreachable
		}
		r.metrics.upgrades[outcome].Inc()
		r.failed(err)
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
	r.use(up)
	defer func() { r.leave(err) }()

	if err := r.sendRequest(up); err != nil {
		return err
	}
	resp, err := r.receive(up)
	if err != nil {
		return err
	}
	if resp.Status == 101 && resp.Upgrade != r.head.Upgrade {
		return errImproper101
	}
	if resp.Status == 101 && !r.accepts(resp) {
		return errImproper101
	}
	if resp.Status == 101 {
		return r.startTunnel(up, resp)
	}
	if resp.Status < 300 && r.unauthorized() {
		return errUnauthorized
	}
	if !r.beginAnswer() {
		return r.cause
	}
	if r.logs(slog.LevelDebug) {
		r.log(slog.LevelDebug, "the upstream refused the upgrade", slog.Int("status", resp.Status))
	}
	r.watchIdle()
	if err := r.relay(up, resp); err != nil {
		return err
	}
	if err := r.x.Finish(r.task, up.Trailers()); err != nil {
		return goneError{err}
	}
	r.complete = true
	return nil
}

// accepts says whether a 101 is an answer to what was asked. A client of HTTP/1 sees that itself.
func (r *request) accepts(resp *exchange.Response) bool {
	x, ours := r.x.(interface {
		Accepts(*exchange.Response) bool
	})
	return !ours || x.Accepts(resp)
}

// unauthorized says of an upgrade that nobody was asked about it, as the route wants it. What the
// upstream answers to an ordinary request is not for its client then: any request can ask for
// an upgrade besides.
func (r *request) unauthorized() bool {
	f := r.route.Filters
	return f != nil && f.Authorize != nil && !f.Authorize.Upgrades
}

// startTunnel takes both connections from their codecs and hands them on. Nothing is sent:
// the client is told of a tunnel by that itself, when it is deposited, and so by another
// process if this one dies before.
func (r *request) startTunnel(up exchange.Upstream, resp *exchange.Response) error {
	if r.cause != nil { // the answer has come too late, or to nobody
		return r.cause
	}
	server, err := up.Switch()
	if err != nil {
		return err
	}
	r.beginAnswer()
	r.status = resp.Status
	r.prepare(resp)
	client, head, err := r.x.Switch(resp)
	if err != nil {
		server.Close(r.loop)
		r.endpoint.TunnelFailed()
		return goneError{err}
	}
	r.m.options.Tunnels.Start(tunnel.Spec{
		FDs: [2]int{client.FD, server.FD}, Loop: r.loop.Index,
		Secure: [2]*stream.Secure{client.Secure, server.Secure}, Resets: [2]*stream.Resets{client.Resets, server.Resets},
		On: r.loop.Loop, About: [2]tunnel.About{
			about(&client, r.x.Downstream().Remote.IsValid(), clientKeepAlive, false), // systemd's may be multipath TCP
			about(&server, r.endpoint.Path == "", upstream.KeepAlive, true),
		},
		Head: head, DownEarly: client.Early, UpEarly: server.Early,
		Origin: r.m.origin(r),
		ID:     strings.Clone(r.id), // it may be a part of the head, which is to go
		Client: r.x.Downstream().Remote,
		Tag:    r.tunnelOpened(),
	})
	return nil
}

// about says what is known of a socket of a connection that was made with keep, so that it
// needs not be set again. Nothing is set of unix sockets.
func about(c *stream.Passed, tcp bool, keep stream.KeepAlive, plain bool) tunnel.About {
	a := tunnel.About{Handle: c.Handle, Events: c.Events}
	if tcp {
		a.Plain, a.KeepAlive = plain, tunnel.KeepAlive(keep)
	}
	return a
}
