package config

import "time"

func readTunnels(t *table) Tunnels {
	u := Tunnels{
		HandshakeTimeout: 60 * time.Second, Buffer: 256 << 10, SurviveCrash: true,
		KeepAlive: KeepAlive{Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4},
	}
	readTunnelKeys(t, &u)
	t.strict()
	return u
}

// readTunnelKeys reads the keys that routes have as well.
func readTunnelKeys(t *table, u *Tunnels) {
	read(t, "drain_timeout", &u.DrainTimeout, durationOrOff)
	read(t, "idle_timeout", &u.IdleTimeout, durationOrOff)
	read(t, "max_age", &u.MaxAge, durationOrOff)
	read(t, "handshake_timeout", &u.HandshakeTimeout, durationOrOff)
	read(t, "buffer", &u.Buffer, sizeBetween(4, 64))
	readKeepAlive(t.table("keepalive"), &u.KeepAlive)
	read(t, "on_reload", &u.MoveOnReload, either("keep", "move"))
	read(t, "on_route_removed", &u.CloseOnRouteRemoved, either("keep", "close"))
	read(t, "on_endpoint_removed", &u.CloseOnEndpointRemoved, either("keep", "close"))
	read(t, "on_endpoint_unhealthy", &u.CloseOnEndpointUnhealthy, either("keep", "close"))
	t.boolean("survive_crash", &u.SurviveCrash)
	if !u.CloseOnRouteRemoved || u.MoveOnReload {
		return
	}
	const text = `on_route_removed = "close" goes with on_reload = "move" only: a tunnel that stays where it is never comes to know another configuration`
	if t.has("on_route_removed") {
		t.at("on_route_removed").fail(text)
	} else if t.has("on_reload") {
		t.at("on_reload").fail(text)
	}
}

// maxProbes is the kernel's MAX_TCP_KEEPCNT.
const maxProbes = 127

func readKeepAlive(t *table, k *KeepAlive) {
	read(t, "idle", &k.Idle, keepAliveTime)
	read(t, "interval", &k.Interval, keepAliveTime)
	count := int64(k.Count)
	t.integer("count", &count, 1, maxProbes)
	k.Count = int(count)
	t.strict()
}

// keepAliveTime is a time as the kernel takes it for probes: in whole seconds, up to
// its MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL.
var keepAliveTime = form[time.Duration]{`a duration of whole seconds from "1s" to "32767s"`, func(s string) (time.Duration, error) {
	const most = 32767 * time.Second
	d, err := parseDuration(s)
	if err == nil && (d < time.Second || d > most || d%time.Second != 0) {
		err = errForm
	}
	return d, err
}, writeDuration}

// ClosesRemoved says whether there may be tunnels that are closed when their endpoint has left
// its cluster: whoever has some must go on finding out.
func (c *Config) ClosesRemoved() bool {
	return c.anyTunnels(func(t *Tunnels) bool { return t.CloseOnEndpointRemoved })
}

// ClosesUnhealthy is ClosesRemoved for endpoints that are not fit for new work.
func (c *Config) ClosesUnhealthy() bool {
	return c.anyTunnels(func(t *Tunnels) bool { return t.CloseOnEndpointUnhealthy })
}

func (c *Config) anyTunnels(is func(*Tunnels) bool) bool {
	if is(&c.Tunnels) {
		return true
	}
	for i := range c.HTTPListeners {
		if l := &c.HTTPListeners[i]; l.TCP != nil && is(&l.TCP.Tunnels) {
			return true
		}
	}
	for i := range c.VirtualHosts {
		for j := range c.VirtualHosts[i].Routes {
			if r := &c.VirtualHosts[i].Routes[j]; r.WebSocket && is(&r.Tunnels) {
				return true
			}
		}
	}
	return false
}
